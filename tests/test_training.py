import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import once
import pytest
from tiny import Mlp

import jaxguide as jg
from jaxguide import training
from jaxguide.data import Images
from jaxguide.models import folders as model
from jaxguide.models.model import init_params
from jaxguide.training import ModelConfig, TrainingConfig, loop, objectives, rates, step

TINY = {
  "model_channels": 8,
  "channel_mult": (1,),
  "num_res_blocks": 1,
  "attention_resolutions": (),
  "num_head_channels": 8,
}
UNET = ModelConfig("unet", TINY, image_shape=(4, 4, 1), num_classes=2)
FAST = ModelConfig(Mlp, {}, image_shape=(4, 4, 1), num_classes=2)
CLASSIFIER = ModelConfig("classifier", TINY, image_shape=(4, 4, 1), num_classes=2)


LEARNED = ModelConfig(
  "unet",
  {**TINY, "out_channels": 2, "null_class": False},
  (4, 4, 1),
  2,
  prediction="eps",
  schedule="cosine",
  diffusion_steps=100,
  variance="learned_range",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Compile the step and the initial state of a configuration once for all tests, and not in each call of `fit`."""
  with once.compiled():
    yield


@pytest.fixture(scope="module")
def images():
  """Two classes that are easy to distinguish: bright at the top, bright at the bottom."""
  rng = np.random.default_rng(0)
  labels = np.arange(40, dtype=np.int32) % 2
  pixels = rng.integers(0, 60, (40, 4, 4, 1)).astype(np.uint8)
  pixels[labels == 0, :2] += 180
  pixels[labels == 1, 2:] += 180
  return Images(pixels, labels, 2, "halves")


# One configuration for most trainings. Three examples cannot be distributed over the four devices of the
# tests, and one device compiles in half the time.
LONG = TrainingConfig(steps=10, batch_size=3, save_every=4, ema_decay=0.15)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
  """The model of an uninterrupted training, and its folder. Tests that change the folder copy it first."""
  folder = tmp_path_factory.mktemp("trained") / "model"
  return training.fit(FAST, LONG, images, folder, progress=False), folder


def leaves_equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.slow
def test_both_networks_learn(images, tmp_path):
  config = TrainingConfig(steps=60, batch_size=16, learning_rate=5e-3, warmup=5, ema_decay=0.9)
  denoiser = training.fit(UNET, config, images, tmp_path / "denoiser", progress=False)
  config = dataclasses.replace(
    config, batch_size=15
  )  # The first training runs on all devices, this one on a single device.
  classifier = training.fit(CLASSIFIER, config, images, tmp_path / "classifier", progress=False)
  x0 = jnp.asarray(images.images[:8] / 127.5 - 1, jnp.float32)
  log_prob = jax.vmap(classifier.log_prob, (0, None, 0))(x0, jnp.asarray(0.1), jnp.asarray(images.labels[:8]))
  assert (jnp.exp(log_prob) > 0.9).all()
  noisy = x0 + 0.3 * jax.random.normal(jax.random.key(0), x0.shape)
  seen = jax.vmap(denoiser.denoiser, (0, None, 0))(noisy, jnp.asarray(0.3), jnp.asarray(images.labels[:8]))
  assert jnp.square(seen - x0).mean() < 0.5 * jnp.square(noisy - x0).mean()


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(images, trained, tmp_path, monkeypatch):
  whole, make, seen = trained[0], loop.train_step, []

  def killed(*args):
    step = make(*args)

    def run(state, *batch):
      seen.append(int(state.step))
      if len(seen) == 10:
        raise KeyboardInterrupt
      return step(state, *batch)

    return run

  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
      training.fit(FAST, LONG, images, tmp_path / "killed", progress=False)
    # The mean at the last checkpoint can be used, while the training is not finished.
    assert not leaves_equal(training.load(tmp_path / "killed").params, whole.params)
    seen.clear()
    resumed = training.fit(FAST, LONG, images, tmp_path / "killed", progress=False)
  assert seen == list(range(8, 11))  # The last step only computes the final loss.
  assert leaves_equal(resumed.params, whole.params)


def test_a_trained_model_is_loaded_and_not_trained_again(images, trained, tmp_path, monkeypatch):
  first, folder = trained
  folder = shutil.copytree(folder, tmp_path / "model")
  config = LONG
  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_step", None)
    again = training.fit(FAST, config, images, folder, progress=False)
    assert leaves_equal(first.params, again.params)
    assert again.config == FAST
    with pytest.raises(ValueError, match="with other settings: retrain it, or choose another folder"):
      training.fit(FAST, dataclasses.replace(config, seed=1), images, folder, progress=False)
    others = Images(255 - images.images, images.labels, 2, "halves")
    with pytest.raises(ValueError, match="with other settings: retrain it, or choose another folder"):
      training.fit(FAST, config, others, folder, progress=False)
  (folder / "notes.txt").touch()
  other = training.fit(FAST, config, others, folder, retrain=True, progress=False)
  assert (folder / "notes.txt").exists()
  assert not leaves_equal(first.params, other.params)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(images, tmp_path, monkeypatch):
  config, make = LONG, loop.train_step

  def poisoned(*args):
    step = make(*args)

    def run(state, *batch):
      k = int(state.step)
      state, metrics = step(state, *batch)
      return state, {**metrics, "loss": metrics["loss"] * (jnp.nan if k == 9 else 1)}

    return run

  monkeypatch.setattr(loop, "train_step", poisoned)
  with pytest.raises(FloatingPointError, match=r"not finite at step 9; the checkpoint of step 8 is kept in .*lower"):
    training.fit(FAST, config, images, tmp_path, progress=False)
  assert (tmp_path / "checkpoints" / "8").is_dir()
  # If all checkpoints are damaged, the run cannot be continued.
  for path in sorted((tmp_path / "checkpoints").rglob("*")):
    if path.is_file() and path.stat().st_size > 100:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match=r"checkpoint of step 8 in .* is damaged"):
    training.fit(FAST, config, images, tmp_path, progress=False)


def test_the_running_mean_agrees_with_its_definition(images):
  state, step = loop.init_state(FAST, LONG), loop.train_step(FAST, LONG)
  mean = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
  for k in range(4):
    state, _ = step(state, images.images[:3], images.labels[:3])
    decay = min(0.15, (1 + k) / (10 + k))
    mean = [decay * m + (1 - decay) * np.asarray(p) for m, p in zip(mean, jax.tree.leaves(state.params), strict=True)]
  for ours, theirs in zip(jax.tree.leaves(state.ema_params), mean, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_damaged_model_is_not_loaded(trained, tmp_path):
  params, whole = trained[0].params, shutil.copytree(trained[1] / "model", tmp_path / "whole")

  damaged = shutil.copytree(whole, tmp_path / "damaged")
  for path in sorted((damaged / "params").rglob("*")):
    if path.is_file() and path.stat().st_size > 100:
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  with pytest.raises(ValueError, match="are damaged or belong to another model"):
    training.load(damaged)

  shutil.rmtree(damaged / "params")
  with pytest.raises(ValueError, match="are damaged or belong to another model"):
    training.load(damaged)

  (damaged / "config.json").write_text('{"network": "unet"')
  with pytest.raises(ValueError, match="does not describe a model"):
    training.load(damaged)

  other = json.loads((whole / "config.json").read_text())
  other["fields"]["width"] = 16
  (whole / "config.json").write_text(json.dumps(other))
  with pytest.raises(ValueError, match=r"config\.json was changed after it was saved"):
    training.load(whole)

  with pytest.raises(FileNotFoundError, match="there is no model in"):
    training.load(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="do not fit Mlp"):
    model.save(tmp_path / "bad", model.Model(FAST, {"params": params["params"]["Dense_2"]}))
  assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"network": "unett"}, "unknown network 'unett': did you mean 'unet'"),
    ({"fields": {"num_head": 2}}, "unknown field of UNet 'num_head': did you mean 'num_heads'"),
    ({"prediction": "w"}, "unknown prediction 'w'"),
    ({"variance": "learned_range"}, "give out_channels 2"),
    ({"diffusion_steps": 10, "schedule": "sigmoid"}, "unknown schedule of discrete steps 'sigmoid'"),
    ({"rescale_timesteps": True}, "give diffusion_steps"),
    ({"diffusion_steps": 10, "prediction": "edm"}, "has no discrete steps: leave out diffusion_steps"),
    ({"scale": 2.0}, "recommended guidance scale of a classifier"),
    ({"network": "classifier", "variance": "large"}, "a classifier has no variance"),
    ({"fields": {"num_classes": 5}}, "num_classes is not one of the fields"),
    ({"fields": {"perturbation": {"kind": "skip"}}}, "perturbation is not one of a model's fields"),
    ({"image_shape": (8, 8)}, r"must be \(height, width, channels\), got \(8, 8\)"),
    ({"num_classes": 0}, "num_classes must be a whole number from 1 to 16777216"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"low_res_shape": (2, 2, 1)}, "low_res_shape must be given for a super_res_unet, .*; the network is a unet"),
    ({"network": "super_res_unet"}, "low_res_shape must be given for a super_res_unet"),
  ],
)
def test_a_bad_model_config(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(UNET, **change)


@pytest.mark.parametrize(
  "change",
  [{"steps": 0}, {"batch_size": 0}, {"learning_rate": float("nan")}, {"p_uncond": 1.5}, {"ema_decay": -0.1}],
)
def test_a_bad_training_config(change):
  (name,) = change
  with pytest.raises(ValueError, match=name):
    dataclasses.replace(TrainingConfig(steps=1), **change)


@pytest.mark.slow
def test_a_learned_variance_is_learned(images, tmp_path):
  config = TrainingConfig(steps=200, batch_size=16, learning_rate=5e-3, warmup=5, ema_decay=0.9)
  trained = training.fit(LEARNED, config, images, tmp_path / "model", progress=False)
  x0 = jnp.asarray(images.images[:8] / 127.5 - 1, jnp.float32)
  sigmas = jg.respaced(LEARNED.noise_schedule, 100)

  def bits(variance):
    one = lambda key, x0, y: jg.variational.bits_per_dim(trained.denoiser, key, x0, sigmas, y, variance)  # noqa: E731
    return jax.jit(jax.vmap(one))(jg.sample_keys(jax.random.key(0), 8), x0, images.labels[:8]).vb.mean(0)

  # The learned variance, between small and large, gives the better bound. (The first step is left out: the error in x0,
  # times 1e4, dominates it.)
  learned, small, large = (bits(kind)[1:].sum() for kind in ("learned_range", "small", "large"))
  assert learned < small
  assert learned < large


def test_options_that_do_not_apply(images, tmp_path):
  for config, change, message in (
    (LEARNED, {"noise_mean": 0.0}, "draws its steps uniformly"),
    (LEARNED, {"p_uncond": 0.1}, "p_uncond needs a network with a null class"),
    (UNET, {"loss": "kl"}, "loss is for a denoiser on a discrete process"),
  ):
    with pytest.raises(ValueError, match=message):
      training.fit(config, TrainingConfig(steps=1, **change), images, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_unconditional_network_is_trained_without_labels(images, tmp_path):
  config = dataclasses.replace(FAST, num_classes=None)
  trained = training.fit(config, TrainingConfig(steps=1, batch_size=3), images, tmp_path, progress=False)
  assert trained.null_cond is None
  seen = jax.eval_shape(trained.denoiser, jnp.ones((4, 4, 1)), jnp.asarray(1.0), None)
  assert seen.shape == (4, 4, 1)
  assert training.load(tmp_path).config == config


def test_images_that_do_not_fit(images, tmp_path):
  with pytest.raises(ValueError, match=r"images of shape \(8, 8, 1\) in 2 classes, but halves has \(4, 4, 1\) in 2"):
    training.fit(dataclasses.replace(UNET, image_shape=(8, 8, 1)), TrainingConfig(steps=1), images, tmp_path)
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match="cannot write"):
    training.fit(FAST, TrainingConfig(steps=1), images, tmp_path / "file" / "model")


def test_the_wrong_kind_of_model(trained):
  with pytest.raises(ValueError, match="needs a classifier, but the model is a unet"):
    _ = dataclasses.replace(trained[0], config=UNET).log_prob
  assert isinstance(trained[0].denoiser, jg.NetworkDenoiser)


SUPER_RES = ModelConfig("super_res_unet", TINY, image_shape=(4, 4, 1), num_classes=2, low_res_shape=(2, 2, 1))


def test_a_super_resolution_model_can_be_saved_and_used(tmp_path):
  shapes = jax.eval_shape(lambda key: init_params(SUPER_RES, key), jax.random.key(0))
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
  training.save(tmp_path / "model", training.Model(SUPER_RES, params))
  loaded = training.load(tmp_path / "model")
  assert loaded.config == SUPER_RES
  cond = {"label": jnp.asarray(1), "low_res": jnp.zeros((2, 2, 1))}
  seen = jax.eval_shape(loaded.denoiser, jnp.ones((4, 4, 1)), jnp.asarray(1.0), cond)
  assert seen.shape == (4, 4, 1)


@pytest.mark.parametrize(("fields", "null"), [({}, 2), ({"null_class": False}, None)])
def test_the_null_label_of_a_network_with_and_without_a_null_class(fields, null):
  assert training.Model(dataclasses.replace(UNET, fields={**TINY, **fields}), {}).null_cond == null


def test_denoisers_of_one_configuration_are_one_program(trained):
  @jax.jit
  @chex.assert_max_traces(1)
  def denoise(denoiser, x):
    return denoiser(x, jnp.asarray(1.0), jnp.asarray(0))

  for source in (trained[0], training.load(trained[1]), training.load(trained[1])):
    denoise(source.denoiser, jnp.zeros((4, 4, 1)))


# --- options of the configuration - ---------------------------------------------------------------


def one_step(images, **options):
  """The initial parameters, the state after one step, and the metrics; without dropout."""
  config = TrainingConfig(steps=4, batch_size=3, warmup=0, clip_norm=1e9, **options)
  state = step.init_state(FAST, config)
  first = jax.tree.map(np.array, state.params)
  after, metrics = step.train_step(FAST, config)(state, images.images[:3], images.labels[:3])
  return first, after, metrics


def test_a_power_function_mean_is_kept(images):
  first, after, _ = one_step(images, ema="power:std=0.2")
  mean = training.PowerFunctionEMA((0.2,))
  (wanted,) = jax.jit(lambda first, params: mean.update((first,), params, 1, 1))(first, after.params)
  chex.assert_trees_all_close(after.ema_params, wanted, rtol=1e-6)


@pytest.mark.parametrize(
  ("rate", "last"), [("constant", 1.0), ("inverse-sqrt:decay_start=25", 0.5), ("cosine-decay", 0.0)]
)
def test_the_learning_rate_is_the_named_one(rate, last):
  schedule = rates.rate(rate, 0.1, steps=100, warmup=10)
  np.testing.assert_allclose([schedule(5), schedule(10), schedule(100)], [0.05, 0.1, 0.1 * last], atol=1e-7)
  changed = rates.rate(TrainingConfig(steps=100, warmup=10, rate=rate).rate, 0.1, 100, 10)
  assert changed(60) == schedule(60)


# The ratio of two losses is that of their weights if all examples have the same noise level.
LEVEL = {"noise_mean": 0.5, "noise_std": 0.0}


@pytest.fixture(scope="module")
def plain_loss(images):
  """The loss of all examples at one noise level, without a weight."""
  return float(one_step(images, **LEVEL)[2]["loss"])


@pytest.mark.parametrize(
  ("weight", "of_sigma"),
  [
    ("eps", lambda sigma: 1 / sigma**2),
    ("min-snr:gamma=2", lambda sigma: np.minimum(1 / sigma**2, 2)),
    ("edm:sigma_data=0.3", lambda sigma: (sigma**2 + 0.3**2) / (0.3 * sigma) ** 2),
  ],
)
def test_the_loss_has_the_named_weight(images, plain_loss, weight, of_sigma):
  weighted = float(one_step(images, weight=weight, **LEVEL)[2]["loss"])
  sigma = np.exp(0.5)
  c_out = float(FAST.scaling(sigma).c_out)
  np.testing.assert_allclose(weighted / plain_loss, of_sigma(sigma) * c_out**2, rtol=1e-4)


def test_a_learned_uncertainty_is_trained_and_not_saved(images, tmp_path):
  seen = []

  def callback(number, state, metrics):
    seen.append((np.abs(state.params["uncertainty"]["Dense_0"]["kernel"]).max(), float(metrics["loss"])))

  config = TrainingConfig(steps=2, batch_size=3, uncertainty=True)
  trained = training.fit(FAST, config, images, tmp_path / "model", callback=callback, progress=False)
  assert seen[-1][0] > 0
  assert np.isfinite([loss for _, loss in seen]).all()
  assert list(trained.params) == ["params"]
  assert list(training.load(tmp_path / "model").params) == ["params"]


@pytest.mark.parametrize(
  ("model", "options"),
  [
    (CLASSIFIER, {"weight": "eps"}),
    (CLASSIFIER, {"uncertainty": True}),
    (CLASSIFIER, {"loss": "kl"}),
    (CLASSIFIER, {"p_uncond": 0.1}),
    (UNET, {"loss": "kl"}),
  ],
)
def test_a_loss_that_does_not_apply_is_refused(model, options):
  with pytest.raises(ValueError, match="leave"):
    objectives.objective(model, TrainingConfig(steps=1, **options))
