"""The training step: accumulation, rematerialisation, optimisers, running means, noise levels, skipped steps."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from tiny import Classify

import jaxguide as jg
from jaxguide import schedules, training
from jaxguide._core import promotion
from jaxguide.training import ModelConfig, TrainingConfig, optimizers, step
from jaxguide.training.objectives import low_resolution

RNG = np.random.default_rng(0)
FIELDS = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 0, "num_head_channels": 8}
UNET = ModelConfig("unet", FIELDS, (4, 4, 1), 2)
CLASSIFIER = ModelConfig("classifier", FIELDS, (4, 4, 1), 2)
HOW = TrainingConfig(steps=4, batch_size=8, warmup=0, rate="constant")
EXAMPLES, LABELS = RNG.integers(0, 256, (8, 4, 4, 1)).astype(np.uint8), np.arange(8, dtype=np.int32) % 2


class Tiny(nn.Module):
  """A network without dropout whose gradients are quick to compile."""

  num_classes: int | None = None
  null_class: bool = True
  use_checkpoint: bool = False

  @nn.compact
  def __call__(self, x, t, y=None, *, train: bool = False):
    """Predict from pixels, time and label."""
    del train
    hidden = nn.Dense(16)(x.reshape(x.shape[0], -1)) + jnp.cos(t)[:, None]
    if y is not None:
      hidden += nn.Embed(self.num_classes + 1, 16)(y)
    return nn.Dense(x[0].size)(nn.silu(hidden)).reshape(x.shape)


TINY = ModelConfig(Tiny, {}, (4, 4, 1), 2)


def run(model, how, steps=1, examples=EXAMPLES):
  step, state = training.train_step(model, how), training.init_state(model, how)
  history = []
  for _ in range(steps):
    state, metrics = step(state, examples, LABELS)
    history.append(jax.device_get(metrics))
  return state, history


@functools.cache
def run_of_the_unet():
  """One step of the UNet, for comparisons with it."""
  return run(UNET, HOW)


def change(how=HOW, **fields):
  return dataclasses.replace(how, **fields)


@pytest.mark.parametrize(
  "model", [TINY, UNET, pytest.param(CLASSIFIER, marks=pytest.mark.slow)], ids=["tiny", "unet", "classifier"]
)
def test_accumulated_gradients_equal_those_of_the_whole_batch(model):
  """The first step of plain SGD shows the gradient: the parameters agree to 1e-6, and so do all figures."""
  how = change(optimizer="sgd", learning_rate=0.1, clip_norm=1e6)
  (whole, one), (parts, four) = run(model, how), run(model, change(how, accumulation=4))
  chex.assert_trees_all_close(parts.params, whole.params, rtol=0, atol=1e-6)
  chex.assert_trees_all_close(four, one, rtol=2e-5, atol=1e-6)
  start = training.init_state(model, how).params
  assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), start, whole.params))) > 1e-3


class Deep(nn.Module):
  """A network of many layers, whose results the gradient needs."""

  @nn.compact
  def __call__(self, x, t, y=None):
    """Predict from pixels and time."""
    del y
    hidden = x.reshape(x.shape[0], -1) + t[:, None]
    for _ in range(5):
      hidden = nn.tanh(nn.Dense(64)(hidden))
    return nn.Dense(x[0].size)(hidden).reshape(x.shape)


@pytest.mark.parametrize(
  "model", [ModelConfig(Deep, {}, (4, 4, 1), None), pytest.param(UNET, marks=pytest.mark.slow)], ids=["own", "unet"]
)
def test_accumulation_needs_less_memory(model):
  """Four parts need half of the memory of the whole batch, or less, with a loop (UNet) or without one (own network)."""

  def temporary(how):
    lowered = training.train_step(model, how).lower(training.init_state(model, how), *batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  batch = np.zeros((1024, *model.image_shape), np.uint8), None if model is not UNET else np.zeros(1024, np.int32)
  how = change(batch_size=1024)
  assert temporary(change(how, accumulation=4)) < 0.5 * temporary(how)


@pytest.mark.parametrize("value", [0.0, -1.5, np.nan, np.inf, -np.inf])
def test_parts_that_wait_take_their_own_rows(value):
  """What a part waits for is 0, whatever the gradient is, also one of several types."""
  total = {"a": jnp.full(2, value), "b": jnp.full(3, value, jnp.bfloat16), "none": jnp.zeros(0)}
  assert jax.jit(step._zero)(total) == 0


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["blocks", "all"])
def test_what_is_computed_again_is_the_same(remat):
  state, history = run_of_the_unet()
  again, same = run(UNET, change(remat=remat))
  chex.assert_trees_all_close(same, history, rtol=1e-5)
  chex.assert_trees_all_close(again.params, state.params, atol=1e-5)


@pytest.mark.parametrize(("remat", "expected"), [("none", 0), ("all", 1)])
def test_the_program_computes_again_what_it_should(remat, expected):
  step, state = training.train_step(TINY, change(remat=remat)), training.init_state(TINY, HOW)
  program = str(jax.make_jaxpr(step)(state, EXAMPLES, LABELS))
  assert program.count("checkpoint[") + program.count("remat2[") + program.count("remat[") >= expected
  assert expected or "checkpoint[" not in program


@pytest.mark.slow
def test_bfloat16_computes_and_float32_keeps():
  """The network computes in bfloat16; parameters, means, moments and the loss stay float32."""
  half = dataclasses.replace(UNET, fields={**FIELDS, "dtype": "bfloat16"})
  step, state = training.train_step(half, HOW), training.init_state(half, HOW)
  program = str(step.trace(state, EXAMPLES, LABELS).jaxpr)
  state, metrics = step(state, EXAMPLES, LABELS)
  _, (full,) = run_of_the_unet()
  assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.means))} == {jnp.dtype("float32")}
  assert metrics["loss"].dtype == np.float32
  assert metrics["loss"] == pytest.approx(full["loss"], rel=0.02)
  assert "bf16" in program


def test_remat_by_blocks_needs_blocks():
  class NoBlocks(nn.Module):
    @nn.compact
    def __call__(self, x, t, y):
      return x + self.param("w", nn.initializers.zeros, ()) + 0 * t[:, None, None, None] + 0 * y[:, None, None, None]

  with pytest.raises(ValueError, match="remat 'blocks' needs a network with the field use_checkpoint"):
    training.train_step(ModelConfig(NoBlocks, {}, (4, 4, 1), 2), change(remat="blocks"))


@pytest.mark.parametrize(
  ("text", "reference"),
  [
    ("adamw:b2=0.95", lambda: optax.adamw(2e-3, b2=0.95, weight_decay=0.1)),
    ("lion:b1=0.8", lambda: optax.lion(2e-3, b1=0.8, weight_decay=0.1)),
    ("muon:ns_steps=3", lambda: optax.contrib.muon(2e-3, ns_steps=3, weight_decay=0.1)),
    ("adam", lambda: optax.adam(2e-3)),
    ("sgd:momentum=0.9,nesterov=true", lambda: optax.sgd(2e-3, momentum=0.9, nesterov=True)),
    ("adafactor:min_dim_size_to_factor=4", lambda: optax.adafactor(2e-3, min_dim_size_to_factor=4)),
  ],
)
def test_an_optimiser_is_optaxs_own(text, reference):
  decay = 0.1 if text.partition(":")[0] in ("adamw", "lion", "muon") else 0.0
  ours, theirs = optimizers.optimizer(text, lambda step: 2e-3, decay), reference()

  def updates(made, params, gradients):
    state = made.init(params)
    for _ in range(3):
      out, state = made.update(gradients, state, params)
    return out

  params = {"w": RNG.normal(size=(8, 8)).astype(np.float32), "b": np.ones(3, np.float32)}
  gradients = jax.tree.map(lambda leaf: np.float32(0.3) * leaf + np.float32(0.1), params)
  with promotion.standard():
    got, wanted = (jax.jit(functools.partial(updates, made))(params, gradients) for made in (ours, theirs))
  chex.assert_trees_all_close(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
  ("text", "decay", "message"),
  [
    ("adam", 0.1, "'adam' has no weight decay: set weight_decay to 0"),
    ("adammw", 0.0, "did you mean 'adamw'"),
    ("adamw:beta=1", 0.0, "has no option 'beta'; it has b1, b2"),
    ("lbfgs", 0.0, "Optax cannot run 'lbfgs' with gradients alone"),
  ],
)
def test_optimisers_that_do_not_run(text, decay, message):
  with pytest.raises(ValueError, match=message):
    optimizers.optimizer(text, 1e-3, decay)


def test_several_running_means():
  """Each mean agrees with its definition on the trajectory of the parameters."""
  how = change(ema=["power:std=0.05", "power:std=0.1", "constant"], ema_decay=0.9)
  step, state = training.train_step(TINY, how), training.init_state(TINY, how)
  expected = [jax.device_get(state.params)] * 3
  for number in range(4):
    state, _ = step(state, EXAMPLES, LABELS)
    new = jax.device_get(state.params)
    powers = [float(training.ema.step_weight(std, number + 1, 1)) for std in (0.05, 0.1)]
    shares = [*powers, 1 - min(0.9, (1 + number) / (10 + number))]
    expected = [jax.tree.map(lambda m, p, s=s: m + s * (p - m), m, new) for m, s in zip(expected, shares, strict=True)]
  for mean, reference in zip(state.means, expected, strict=True):
    chex.assert_trees_all_close(jax.device_get(mean), reference, atol=1e-6)
  chex.assert_trees_all_equal(state.ema_params, state.means[0])


def test_no_buffer_is_donated_twice():
  state = training.init_state(TINY, change(ema=["power:std=0.05", "power:std=0.1"]))
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
  assert len(set(pointers)) == len(pointers)
  params = jax.device_get(state.params)
  own = training.init_state(TINY, HOW, {"params": jax.device_put(params["params"])})
  training.train_step(TINY, HOW)(own, EXAMPLES, LABELS)


def test_given_parameters_are_where_the_training_starts():
  params = jax.tree.map(lambda leaf: leaf + 1, training.init_state(TINY, HOW).params)
  state = training.init_state(TINY, HOW, params)
  chex.assert_trees_all_equal(state.params, params)
  chex.assert_trees_all_equal(state.ema_params, params)


def test_a_step_that_is_not_finite_is_stepped_over_and_counted():
  """It changes nothing but the count: with parameters that are NaN, means and optimiser stay."""
  how = change(skip_nan=3)
  step, state = training.train_step(TINY, how), training.init_state(TINY, how)
  state, metrics = step(state, EXAMPLES, LABELS)
  assert np.isfinite(metrics["loss"])
  before = jax.device_get((state.params, state.means, state.opt_state))
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
  state, metrics = step(dataclasses.replace(state, params=broken), EXAMPLES, LABELS)
  assert not np.isfinite(metrics["loss"])
  assert (int(state.step), int(state.skipped)) == (2, 1)
  chex.assert_trees_all_equal(jax.device_get((state.means, state.opt_state)), before[1:])


def test_the_metrics_of_a_step():
  """The loss is the mean of the examples' losses, the norm that of the gradient, the rate that of the schedule."""
  how = change(optimizer="sgd", rate="cosine-decay", warmup=2, learning_rate=0.5, clip_norm=1e6)
  _, (first, second) = run(TINY, how, 2)
  assert first["loss"] == pytest.approx(first["losses"].mean(), rel=1e-6)
  assert (first["rate"], second["rate"]) == (0.0, 0.25)
  assert first["losses"].shape == first["sigmas"].shape == (8,)
  start = training.init_state(TINY, how).params
  state, _ = run(TINY, change(how, rate="constant", warmup=0, learning_rate=1.0))
  moved = jax.tree.map(lambda a, b: np.square(a - b).sum(), start, jax.device_get(state.params))
  assert first["gradient_norm"] == pytest.approx(np.sqrt(sum(jax.tree.leaves(moved))), rel=1e-5)


@pytest.mark.parametrize("rate", ["constant", "cosine-decay", "inverse-sqrt"])
def test_a_training_without_warm_up_begins_at_the_peak(rate):
  assert float(change(rate=rate, learning_rate=0.25).schedule()(0)) == 0.25


# --- noise levels -----------------------------------------------------------------------------------


def quantiles(text, schedule, u):
  return np.asarray(schedules.levels(text, schedule).quantile(jnp.asarray(u)))


U = np.linspace(0.05, 0.95, 7)


def test_named_distributions_of_noise_levels(float64):
  """Against SciPy: log-normal; uniform in time; logit-normal in the time of a flow; and Ho & Salimans' cosine."""
  flow, cosine = schedules.Flow(), schedules.Cosine()
  normal = scipy.stats.norm.ppf(U)
  np.testing.assert_allclose(quantiles("log-normal:mean=-1.2,std=1.4", cosine, U), np.exp(-1.2 + 1.4 * normal))
  time = scipy.special.expit(0.3 + 1.1 * normal)
  np.testing.assert_allclose(quantiles("logit-normal:mean=0.3,std=1.1", flow, U), time / (1 - time), rtol=1e-6)
  np.testing.assert_allclose(quantiles("uniform:t_min=0,t_max=1", flow, U), U / (1 - U), rtol=1e-6)
  b = np.arctan(np.exp(-20 / 2))
  a = np.arctan(np.exp(20 / 2)) - b
  log_snr = -2 * np.log(np.tan(a * U + b))
  np.testing.assert_allclose(quantiles("log-snr-cosine", cosine, U), np.exp(-log_snr / 2), rtol=1e-6)


@pytest.mark.parametrize(
  ("noise", "share_above_one"), [("uniform", 0.5), ("logit-normal:mean=2,std=0.5", 1.0), ("log-normal", None)]
)
def test_a_training_draws_the_named_levels(noise, share_above_one):
  how = change(noise=noise, batch_size=8)
  _, (metrics,) = run(dataclasses.replace(TINY, prediction="flow", schedule="flow"), how)
  if share_above_one is None:
    share_above_one = np.mean(scipy.stats.norm.sf(0.6 / 1.2) > (np.arange(8) + 0.5) / 8)
  assert np.mean(metrics["sigmas"] > 1) == pytest.approx(share_above_one, abs=0.13)


@pytest.mark.parametrize(
  ("model", "options", "message"),
  [
    (UNET, {"noise": "uniform", "noise_mean": 0.0}, "noise_mean and noise_std are for noise 'log-normal'"),
    (UNET, {"label_smoothing": 0.1}, "label_smoothing is for classifiers"),
    (UNET, {"warmup": 4}, "warmup must be at most steps - 1, which is 3, got 4"),
    (UNET, {"accumulation": 3}, "8 examples cannot be divided into 3 equal parts"),
    (
      dataclasses.replace(UNET, diffusion_steps=10, prediction="eps"),
      {"noise": "uniform"},
      "draws its steps uniformly: leave out noise_mean, noise_std and noise",
    ),
  ],
)
def test_options_that_do_not_fit(model, options, message):
  with pytest.raises(ValueError, match=message):
    training.train_step(model, change(**options))


# --- classifiers and super-resolution ---------------------------------------------------------------


def test_label_smoothing_is_a_mixed_target():
  """Cross-entropy against (1 - a) onehot + a / K, in NumPy."""
  logits, labels = RNG.normal(size=(6, 3)), RNG.integers(0, 3, 6)
  batch = jg.losses.Noisy(jnp.zeros((6, 1)), jnp.zeros((6, 1)), jnp.ones(6), jnp.asarray(labels))
  errors, correct = jg.losses.classifier_errors(
    None,
    lambda params, x, t: jnp.asarray(logits, jnp.float32),
    batch,
    scaling=jg.scaling.v(schedules.Cosine()),
    label_smoothing=0.2,
  )
  target = 0.8 * np.eye(3)[labels] + 0.2 / 3
  np.testing.assert_allclose(errors, -(target * scipy.special.log_softmax(logits, 1)).sum(1), rtol=1e-5)
  np.testing.assert_array_equal(correct, logits.argmax(1) == labels)


def test_a_classifier_of_a_range_is_trained_on_it_alone():
  model = ModelConfig(Classify, {}, (4, 4, 1), 2, noise_range=(0.5, 2.0))
  _, (metrics,) = run(model, HOW)
  assert (metrics["sigmas"] >= 0.5).all()
  assert (metrics["sigmas"] <= 2.0).all()
  assert np.ptp(metrics["sigmas"]) > 0.7


SUPER = ModelConfig("super_res_unet", FIELDS, (4, 4, 1), 2, low_res_shape=(2, 2, 1))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_super_resolution_network_is_trained_on_made_low_resolution_images(noise):
  how = change(low_res_noise=noise)
  goal = training.objective(SUPER, how)
  x0 = np.float32(EXAMPLES) / np.float32(127.5) - 1
  batch = jax.jit(goal.draw)(jax.random.key(0), x0, LABELS)
  boxes = x0.reshape(8, 2, 2, 2, 2, 1).mean((2, 4))
  if noise:
    std = np.std(np.asarray(batch.cond["low_res"]) - boxes, axis=(1, 2, 3))
    assert (std > 0).all()
    assert std.max() < 1.0
    _, (metrics,) = run(SUPER, how)
    assert np.isfinite(metrics["loss"])
  else:
    np.testing.assert_allclose(batch.cond["low_res"], boxes, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cubic", "lanczos3", "lanczos5"])
def test_low_resolution_filters_keep_a_constant_and_antialias(name):
  resize = low_resolution(name, (16, 16, 1), (4, 4, 1))
  np.testing.assert_allclose(resize(jnp.full((1, 16, 16, 1), 0.3)), 0.3, atol=1e-5)
  stripes = jnp.broadcast_to(jnp.array([1.0, -1.0])[jnp.arange(16) % 2][:, None], (1, 16, 16))[..., None]
  assert abs(np.asarray(resize(stripes)))[:, 1:-1].max() < 0.1


@pytest.mark.parametrize(
  ("filter_name", "low", "message"),
  [
    ("box", (3, 2, 1), "needs sides of image_shape .* that are multiples"),
    ("cubic", (2, 2, 3), "low_res_shape must be smaller"),
    ("cubic", (8, 8, 1), "low_res_shape must be smaller"),
  ],
)
def test_low_resolution_shapes_that_do_not_fit(filter_name, low, message):
  with pytest.raises(ValueError, match=message):
    low_resolution(filter_name, (4, 4, 1), low)
