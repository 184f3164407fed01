"""What makes no sense is refused where it is said, in words, and not silently made into something else."""

import dataclasses
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxguide as jg
from jaxguide import checks, data, evaluation, losses, models, scales, schedules, training, variational
from jaxguide._core import promotion
from jaxguide.generate import Settings, unfinished
from jaxguide.training import ModelConfig, TrainingConfig, ema


@pytest.fixture(autouse=True)
def as_installed(monkeypatch):
  """The checks of types are the tests' own: a user meets the package without them."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


RING, KEY, GRID, ONE = jg.ring(4), jax.random.key(0), jg.karras(6), jnp.asarray(1.0)


def draw(denoise=RING.denoiser, **options):
  options = {"cond": 1, "num": 2, "shape": (2,), "sigmas": GRID, "solver": jg.Euler(), **options}
  return jg.sample_batch(denoise, KEY, **options)


KEEP = Partial(lambda x, sigma, cond: x)


@pytest.mark.parametrize(
  ("options", "error", "message"),
  [
    (
      {"denoise": KEEP, "cond": np.array([2**32 + 1, 7])},
      ValueError,
      "cond must lie in JAX's int32, -2147483648 to 2147483647, got 4294967297",
    ),
    ({"denoise": KEEP, "cond": 2**32 + 5}, ValueError, "cond must lie in JAX's int32, .* got 4294967301"),
    ({"cond": np.array([[0, 1], [2, 3]])}, ValueError, r"one label of one example, got shape \(2,\): use vmap"),
    ({"cond": None}, ValueError, "cond must be a label of the mixture's 4 classes, or 4 for all of them"),
    ({"sigmas": np.array([3 + 1j, 1, 0])}, TypeError, "sigmas must be real numbers, got complex128"),
    ({"sigmas": np.array([1e300, 1, 0])}, ValueError, r"sigmas\[0\] is not"),
    ({"sigmas": np.array([1.0, 1e-50, 0])}, ValueError, "must decrease strictly"),
    (
      {"x_init": np.full((2, 2), 200, np.uint8)},
      TypeError,
      r"in \[-1, 1\] are, got uint8: give jaxguide.data.from_uint8",
    ),
    ({"add_noise": "no"}, TypeError, "add_noise must be True or False, got 'no'"),
    ({"devices": jax.devices()[0]}, TypeError, "devices must be a list of devices"),
    ({"devices": "cpu"}, ValueError, "a mesh is written data=2,fsdp=4, got 'cpu'"),
    ({"shape": (10**12,)}, ValueError, "one example may have 2,147,483,647"),
    ({"shape": (1,)}, ValueError, r"the denoiser returned shape \(2,\) for an example of shape \(1,\)"),
  ],
)
def test_samples(options, error, message):
  with pytest.raises(error, match=message):
    draw(**options)


def test_a_grid_of_bytes_is_one():
  np.testing.assert_array_equal(draw(sigmas=np.array([5, 3, 0], np.uint8)), draw(sigmas=np.array([5.0, 3.0, 0.0])))


def test_labels_of_a_mixture():
  with pytest.raises(ValueError, match="label 99 is not one of the 4 classes"):
    RING.sample(KEY, 99)
  with pytest.raises(TypeError, match="label must be whole numbers"):
    RING.sample(KEY, 1.5)
  with pytest.raises(TypeError, match="key must be a random key"):
    RING.sample(0, 1)
  keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
  np.testing.assert_allclose(jax.vmap(lambda key: RING.sample(key, 1))(keys)[1], RING.sample(keys[1], 1), rtol=1e-6)


@pytest.mark.parametrize(
  ("null", "cond", "message"),
  [
    (2.5, jnp.array([0, 1]), "null_cond must be whole numbers as cond is, got 2.5"),
    (True, jnp.array([0, 1]), "null_cond must be whole numbers as cond is, got True"),
    (1e6, jnp.ones(2, jnp.float16), "infinite in cond's type, float16"),
  ],
)
def test_null_conditions_of_another_kind(null, cond, message):
  with pytest.raises(ValueError, match=message):
    losses.drop_cond(KEY, cond, null, 1.0)
  with pytest.raises(ValueError, match=message):
    jg.classifier_free(null, 0.0)(lambda x, sigma, cond: x)(jnp.zeros(2), ONE, cond[0])


TABLE = schedules.table("linear", 100)
EXAMPLES = jnp.zeros((4, 2))


def loss(x0=EXAMPLES, cond=None, **options):
  options = {"scaling": jg.scaling.eps(TABLE), "noise_levels": TABLE, **options}
  return losses.denoising_loss(ONE, lambda params, x, t, y: params * x, KEY, x0, cond, **options)


def classifier_loss(labels):
  apply = lambda params, x, t: x  # noqa: E731
  return losses.classifier_loss(ONE, apply, KEY, EXAMPLES, labels, scaling=jg.scaling.eps(TABLE), noise_levels=TABLE)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda: loss(scaling="v"), TypeError, "scaling must be a function of sigma, got 'v'"),
    (lambda: loss(scaling=TABLE), TypeError, "scaling must be a function of sigma, got Table"),
    (lambda: loss(scaling=jg.scaling.v), TypeError, "got the function v: make one"),
    (lambda: loss(noise_levels="linear"), TypeError, "schedule must be a noise schedule, got 'linear'"),
    (lambda: loss(np.zeros((4, 2), np.uint8)), TypeError, "x0 must be floats.* got uint8"),
    (lambda: loss(jnp.zeros((0, 2))), ValueError, "a batch of at least one example"),
    (lambda: loss(cond=[0, 1, 2, 3], null_cond=4, p_uncond=0.5), ValueError, "convert a list of labels to one array"),
    (lambda: classifier_loss([0.0, 1, 0, 1]), ValueError, "labels must be whole numbers, one for each of the 4"),
    (lambda: classifier_loss([0, 1]), ValueError, r"one for each of the 4 examples, got int32 of shape \(2,\)"),
    (lambda: jg.NetworkDenoiser(ONE, lambda p, x, t, y: x, "v")(jnp.zeros(2), ONE), TypeError, "scaling must be"),
    (lambda: jg.NetworkDenoiser(ONE, nn.Dense(2), None), TypeError, "give its method, Dense.apply"),
    (lambda: jg.ClassifierLogProb(ONE, "dense", None), TypeError, "apply must be a function of"),
    (lambda: variational.bits_per_dim(RING.denoiser, 0, jnp.zeros(2), GRID, 4), TypeError, "key must be a random key"),
    (lambda: schedules.iddpm(8, table="linear"), TypeError, "schedule of discrete steps, .* got 'linear'"),
    (lambda: schedules.betas_of("cosine", 8), TypeError, "schedule must be a noise schedule, got 'cosine'"),
    (lambda: schedules.round_sigma("linear", 1.0), TypeError, "schedule of discrete steps, .* got 'linear'"),
    (lambda: schedules.grids.nearest_step(schedules.Cosine(), 1.0), TypeError, "schedule of discrete steps"),
  ],
)
def test_losses_and_networks(call, error, message):
  with pytest.raises(error, match=message):
    call()


def test_lists_are_arrays():
  assert classifier_loss([0, 1, 0, 1]) == classifier_loss(jnp.array([0, 1, 0, 1]))
  images = np.arange(64, dtype=np.uint8).reshape(4, 4, 4, 1)
  judge = evaluation.Judge.fit(list(images), [0, 1, 0, 1])
  assert judge.accuracy(list(images), [0, 1, 0, 1]) == judge.accuracy(images, np.array([0, 1, 0, 1]))


def test_a_bound_does_not_know_its_batch():
  keys = jax.random.split(jax.random.key(0, impl="rbg"), 3)
  bits = jax.vmap(lambda key: variational.bits_per_dim(RING.denoiser, key, jnp.ones(2), GRID, 4).total)
  np.testing.assert_allclose(bits(keys)[1:], bits(keys[1:]), rtol=1e-6)


def test_what_people_forget(tmp_path):
  guided = jg.classifier_free(4, 2.0)(KEEP)
  with pytest.raises(ValueError, match="give a cond, such as the labels"):
    jg.sample_batch(guided, KEY, num=2, shape=(2,), sigmas=GRID, solver=jg.Euler())
  with pytest.raises(ValueError, match=r"with jaxguide\.data\.to_uint8"):
    data.save_png(tmp_path / "x.png", np.zeros((2, 4, 4, 1), np.float32))
  with pytest.raises(ValueError, match=r"unknown solver 'dpm\+\+': did you mean 'dpmpp-2m'"):
    jg.solvers.solver("dpm++")


def test_null_conditions_that_no_type_holds():
  with pytest.raises(ValueError, match="no type of JAX holds both"):
    jax.jit(promotion.same_type)(np.int32(-1), np.uint32(3_000_000_000))


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda: jg.combine.rescaled([0.1, 0.9]), ValueError, "phi must be one number"),
    (lambda: jg.combine.projected(eta=[0.1, 0.2]), ValueError, "eta must be one number"),
    (lambda: jg.combine.projected(momentum=np.array([0.1, 0.2])), ValueError, "momentum must be one number"),
    (lambda: jg.combine.frequency_decoupled([1.0, 0.5]), ValueError, "ratio must be one number"),
    (lambda: jg.classifier_free(4, 2.0, "rescaled"), TypeError, "combine must be a rule, such as"),
    (lambda: jg.classifier_free(4, 2.0, jg.combine.projected), TypeError, r"call it, projected\(...\)"),
    (lambda: jg.autoguidance(jg.clip_x0(), 2.0), TypeError, "got a guidance: apply it to one first"),
    (lambda: jg.autoguidance(None, 2.0), TypeError, "denoise must be a denoiser"),
    (lambda: jg.chain(RING.denoiser), TypeError, "got a denoiser: apply guidance"),
    (lambda: jg.parallel(RING.denoiser), TypeError, "got a denoiser: apply guidance"),
    (lambda: jg.interval(RING.denoiser, 0.1, 1.0), TypeError, "got a denoiser: apply guidance"),
    (lambda: jg.normalized(None, 0.1), TypeError, "guidance must be a function from a denoiser"),
    (lambda: jg.classifier(2.0, RING.log_prob), TypeError, "log_prob must be a function"),
    (lambda: jg.classifier_free(4, 1e39), ValueError, "scale must be finite"),
    (lambda: jg.clip_x0(0), ValueError, "bound must be above 0"),
    (lambda: jg.DPMpp2MSDE(eta=1e30), ValueError, "eta must be between 0 and 100"),
    (lambda: jg.EulerAncestral(s_noise=1e30), ValueError, "s_noise must be between 0 and 10"),
  ],
)
def test_guidances_and_solvers(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_examples_are_floats():
  with pytest.raises(TypeError, match="an example must be floats, got int32"):
    jg.typing.scale_at(2.5, ONE, jnp.array([2, -2]))
  module = nn.Dense(2)
  with pytest.raises(TypeError, match="got the network Dense: make one of it"):
    draw(module)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("edm", {"sigma_min": 80.0, "sigma_max": 0.002}, "sigma_min must be below sigma_max"),
    ("edm", {"sigma_min": -1.0}, "sigma_min must be at least 0"),
    ("cosine", {"s": -1.0}, "s must be at least 0"),
    ("cosine", {"sigma_max": -5.0}, "sigma_max must be above 0"),
    ("log-snr", {"log_snr_min": 20.0, "log_snr_max": -20.0}, "log_snr_min must be below log_snr_max"),
    ("log-snr-cosine", {"log_snr_min": 1.0, "log_snr_max": 1.0}, "log_snr_min must be below log_snr_max"),
    ("linear", {"beta_min": -5.0}, "beta_min must be at least 0"),
    ("sigmoid", {"tau": 0.0}, "tau must be above 0"),
    ("sigmoid", {"start": 3.0, "end": -3.0}, "start must be below end"),
    ("flow", {"sigma_max": 0.0}, "sigma_max must be above 0"),
  ],
)
def test_schedules(name, options, message):
  with pytest.raises(ValueError, match=message):
    schedules.schedule(name, **options)


@pytest.mark.parametrize(
  "make",
  [
    lambda schedule: schedules.from_schedule(schedule, 5),
    lambda schedule: scales.linear(2.0, schedule),
    lambda schedule: scales.raised_cosine(2.0, schedule),
    schedules.UniformTime,
  ],
)
@pytest.mark.parametrize("schedule", ["cosine", schedules.Cosine])
def test_a_schedule_by_name_or_class(make, schedule):
  with pytest.raises(TypeError, match="schedule must be a noise schedule, got"):
    make(schedule)


def test_levels_of_training_and_tables():
  for make, message in (
    (lambda: schedules.LogNormal(std=-1.0), "std must be at least 0"),
    (lambda: schedules.UniformTime(schedules.Cosine(), 0.9, 0.1), "t_min must be below t_max"),
    (lambda: schedules.Linear.between(100.0, 0.02), "sigma_min must be below sigma_max"),
    (lambda: schedules.Table(jnp.array([5.0, 3.0, 1.0])), "one axis of increasing levels"),
    (lambda: schedules.respaced(schedules.table("linear", 9), np.ones((2, 2), int)), "one axis"),
  ):
    with pytest.raises(ValueError, match=message):
      make()
  with pytest.raises(TypeError, match="table must be a Table"):
    schedules.respaced("linear", 5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: ema.weighted_sum([{"w": np.ones(2)}] * 2, np.ones((2, 2))), "coefficients must have one axis"),
    (lambda: ema.weighted_sum([], []), "coefficients must have one axis"),
    (lambda: ema.step_weight(0.1, 1, 5), "t_delta must lie between 0 and t_next"),
    (lambda: ema.response(-3.0, 1.0, 0.1), "time must be at least 0"),
    (lambda: ema.correlation(-1.0, 0.1, 1.0, 0.1), "t_a must be above 0"),
    (lambda: ema.PowerFunctionEMA(stds=()), "stds must be at least one width"),
  ],
)
def test_means_of_parameters(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_distances_that_cannot_be_computed():
  with pytest.raises(ValueError, match="overflow float64"), np.errstate(all="ignore"):
    evaluation.frechet_distance(np.array([[1e160], [-1e160]]), np.array([[0.0], [1.0]]))
  with pytest.raises(ValueError, match="must be real numbers, got complex128"):
    evaluation.frechet_distance(np.array([[0j], [1j]]), np.array([[0j], [50j]]))


@pytest.mark.parametrize(
  ("changes", "error", "message"),
  [
    ({"guidance": "none:scale=2"}, ValueError, "guidance 'none' takes no options"),
    ({"guidance": 5}, TypeError, "guidance must be names with their options"),
    ({"solver": jg.DDIM()}, TypeError, "solver must be a name with"),
    ({"grid": GRID}, TypeError, "grid must be a name with"),
    ({"model": None}, TypeError, "model must be a path"),
    ({"clip": "no"}, TypeError, "clip must be True or False"),
    ({"labels": [2**64]}, ValueError, "label must be a whole number from"),
    ({"scale": np.array([1, 2.0])}, ValueError, "scale must be a number"),
    ({"init_level": 2.0}, ValueError, "give both, or leave it out"),
  ],
)
def test_settings(changes, error, message):
  with pytest.raises(error, match=message):
    Settings(**{"model": "m", **changes})


def test_settings_of_other_kinds_of_numbers_are_plain(tmp_path):
  settings = Settings(
    model=tmp_path, scale=np.float32(2), num=np.int64(2), seed=np.int64(3), steps=np.int32(2), batch_size=np.int64(1)
  )
  assert settings == Settings(model=str(tmp_path), scale=2.0, num=2, seed=3, steps=2, batch_size=1)
  assert all(type(getattr(settings, name)) is int for name in ("num", "seed", "steps", "batch_size"))


CONFIG = ModelConfig(
  "unet", {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_head_channels": 8}, (4, 4, 1), 2
)


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  shapes = models.model.shapes(CONFIG)
  return jax.tree.map(lambda leaf: 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


def test_parameters_of_another_kind_come_back(params, tmp_path):
  boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, names=(None,) * leaf.ndim), params)
  double = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
  for name, given in (("boxed", boxed), ("double", double)):
    training.save(tmp_path / name, training.Model(CONFIG, given))
    held = training.load(tmp_path / name).params
    assert jax.tree.all(jax.tree.map(np.array_equal, held, params)), name


def test_parameters_that_would_not_come_back_replace_nothing(params, tmp_path):
  training.save(tmp_path, training.Model(CONFIG, params))
  for given, message in (
    ({**params, "batch_stats": {}}, "batch_stats"),
    (jax.tree.map(lambda leaf: leaf.astype(np.complex64), params), "must be floating-point numbers, got complex64"),
    (jax.tree.map(lambda leaf: leaf.astype(np.int32), params), "must be floating-point numbers, got int32"),
  ):
    with pytest.raises(ValueError, match=message):
      training.save(tmp_path, training.Model(CONFIG, given))
    assert jax.tree.all(jax.tree.map(np.array_equal, training.load(tmp_path).params, params))


def test_a_training_that_would_train_nothing():
  for name in ("learning_rate", "clip_norm"):
    with pytest.raises(ValueError, match=f"{name} must be above 0"):
      dataclasses.replace(TrainingConfig(steps=1), **{name: 0.0})
  with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
    jg.UNet(dropout=1.0)
  images = data.Images(np.zeros((2, 4, 4, 1), np.uint8), np.arange(2), 2, "two")
  with pytest.raises(TypeError, match="retrain must be True or False"):
    training.fit(CONFIG, TrainingConfig(steps=1), images, "nowhere", retrain="no")


# --- files ----------------------------------------------------------------------------------------


def test_a_link_stays_a_link(tmp_path):
  (tmp_path / "real").mkdir()
  link = tmp_path / "link.npz"
  link.symlink_to(tmp_path / "real" / "samples.npz")
  data.save_npz(link, np.zeros((1, 4, 4, 1), np.uint8))
  assert link.is_symlink()
  assert os.listdir(tmp_path / "real") == ["samples.npz"]


def test_pixels_that_rotted_while_they_were_kept(tmp_path):
  made = unfinished.Unfinished(tmp_path / "kept", {"settings": {}}, (3, 4, 4, 1))
  made.append(np.ones((2, 4, 4, 1), np.uint8))
  again = unfinished.Unfinished(tmp_path / "kept", {"settings": {}}, (3, 4, 4, 1))
  assert again.done == 2
  content = bytearray((tmp_path / "kept" / "images.npy").read_bytes())
  content[-40] ^= 1  # of the second image; the third is not there yet
  (tmp_path / "kept" / "images.npy").write_bytes(content)
  with pytest.raises(ValueError, match=r"is damaged \(the images do not match their checksum\)"):
    unfinished.Unfinished(tmp_path / "kept", {"settings": {}}, (3, 4, 4, 1))


def test_what_npz_and_png_do_not_hold(tmp_path):
  images = np.zeros((2, 4, 4, 1), np.uint8)
  with pytest.raises(ValueError, match="labels must fit int64"):
    data.save_npz(tmp_path / "a.npz", images, np.array([2**64 - 1, 0], np.uint64))
  with pytest.raises(TypeError, match="settings must be a text"):
    data.save_npz(tmp_path / "a.npz", images, settings={"a": 1})
  with pytest.raises(ValueError, match="zoom must be at most"):
    data.save_png(tmp_path / "a.png", images, zoom=10**6)
  data.save_npz(tmp_path / "list.npz", images, [0, 1])
  assert data.load_npz(tmp_path / "list.npz")[1].tolist() == [0, 1]
  with pytest.raises(OSError, match="its name is longer than"):
    data.save_npz(tmp_path / ("n" * 252 + ".npz"), images)


def test_a_pipe_has_no_settings(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  assert data.settings_of(tmp_path / "fifo") is None


def test_numbers_that_are_several():
  assert checks.single("x", np.float32(2)) == 2.0
  with pytest.raises(TypeError, match="flag must be True or False, got 1"):
    checks.flag("flag", 1)
