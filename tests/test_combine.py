"""Combine rules, compared with arrays of published guiders and with their exact properties."""

import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide._core.typing import map_x0, x0_of
from jaxguide.guidance.combine import frequency_decoupled, linear, projected, rescaled, tangential, zero_star

GUIDERS = np.load(pathlib.Path(__file__).parent / "data" / "guiders.npz")


def other_form(rule):
  """``base + scale Δ``: the library's default form of projected guidance. jaxguide has the form of the paper."""
  return jax.tree_util.Partial(_other_form, rule)


def _other_form(rule, x0, x0_base, scale, x, sigma):
  return map_x0(lambda doubled: x0_base + scale * (doubled - x0), rule(x0, x0_base, 2.0, x, sigma))


# case -> (input, conditional, base, rule, γ). In the library's "original" formulation the scale is γ - 1. Its guidance
# by skipped or perturbed layers is autoguidance here.
CASES = {
  "cfg-w0": (0, "cond", "uncond", linear, 0.0),
  "cfg-w1": (0, "cond", "uncond", linear, 1.0),
  "cfg-w3": (0, "cond", "uncond", linear, 3.0),
  "cfg-w7.5": (0, "cond", "uncond", linear, 7.5),
  "cfg-orig": (0, "cond", "uncond", linear, 4.0),
  "autoguidance": (0, "cond", "uncond", linear, 3.0),
  "slg-slgonly": (0, "cond", "skip", linear, 2.0),
  "slg-cfgonly": (0, "cond", "uncond", linear, 3.0),
  "cfg-rescale0.3": (1, "cond", "uncond", rescaled(0.3), 7.5),
  "cfg-rescale0.7": (1, "cond", "uncond", rescaled(0.7), 7.5),
  "cfg-rescale1": (1, "cond", "uncond", rescaled(1.0), 7.5),
  "cfg-rescale-w1": (0, "cond", "uncond", rescaled(0.5), 1.0),
  "autoguidance-rescale": (1, "cond", "uncond", rescaled(0.4), 7.5),
  "apg-default": (0, "cond", "uncond", projected(1.0, 15.0), 7.5),
  "apg-orig": (0, "cond", "uncond", projected(0.2, 2.5), 4.0),
  "apg-eta0": (1, "cond", "uncond", other_form(projected(0.0, 5.0)), 3.0),
  "apg-eta0.5": (1, "cond", "uncond", other_form(projected(0.5, 5.0)), 3.0),
  "apg-eta1": (1, "cond", "uncond", other_form(projected(1.0, 5.0)), 3.0),
  "apg-norescale-eta0": (0, "cond", "uncond", other_form(projected(0.0)), 3.0),
  "apg-guidance_rescale": (0, "cond", "uncond", rescaled(0.6, other_form(projected(0.0, 6.0))), 7.5),
  "cfgzero-step0": (0, "cond", "uncond", zero_star(0.5), 3.0),
  "cfgzero-init2-step1": (1, "cond", "uncond", zero_star(0.5), 3.0),
  "cfgzero-step1": (0, "cond", "uncond", zero_star(), 3.0),
  "cfgzero-noinit": (1, "cond", "uncond", zero_star(), 7.5),
  "cfgzero-orig": (0, "cond", "uncond", zero_star(), 4.0),
  "cfgzero-rescale": (1, "cond", "uncond", rescaled(0.7, zero_star()), 7.5),
  "fdg-default": (1, "cond", "uncond", frequency_decoupled(1.0, 4 / 9), 10.0),
  "fdg-3lv": (1, "cond", "uncond", frequency_decoupled(1.0, 3 / 7, 0.5 / 7), 8.0),
  "fdg-8x8": (0, "cond", "uncond", frequency_decoupled(1.0, 2 / 6.5), 7.5),
  "fdg-orig": (1, "cond", "uncond", frequency_decoupled(1.0, 0.5), 7.0),
  "fdg-rescale-data": (1, "cond", "uncond", rescaled(0.7, frequency_decoupled(1.0, 0.4)), 6.0),
  "fdg-1lv": (1, "cond", "uncond", frequency_decoupled(1.0), 4.0),
  "tcfg-in0-w3": (0, "cond", "uncond", tangential, 3.0),
  "tcfg-in0-w7.5": (0, "cond", "uncond", tangential, 7.5),
  "tcfg-in1-w3": (1, "cond", "uncond", tangential, 3.0),
  "tcfg-in1-w7.5": (1, "cond", "uncond", tangential, 7.5),
  "tcfg-orig": (0, "cond", "uncond", tangential, 4.0),
  "tcfg-rescale": (1, "cond", "uncond", rescaled(0.5, tangential), 7.5),
}


def tolerance(case):
  # The published arrays are in float32: a rounding error of that type, or the common tolerance if it is larger.
  return {"rtol": 1e-5, "atol": max(1e-6, 1.5 * float(GUIDERS.get(f"{case}/deviation", 0)))}


def to_x0(case, prediction, x, sigma):
  """Convert a prediction in the variable of the rule's paper to x0."""
  if case.startswith("cfgzero"):
    return (x - sigma * prediction) / (1 + sigma)  # a flow's velocity
  if case.startswith("tcfg"):
    return x - sigma * prediction  # eps
  return prediction


def from_x0(case, x0, x, sigma):
  """Convert x0 to the variable of the rule's paper."""
  if case.startswith("cfgzero"):
    return (x - (1 + sigma) * x0) / sigma
  return (x - x0) / sigma if case.startswith("tcfg") else x0


@pytest.mark.parametrize("case", CASES)
def test_published_guiders(case, float64):
  number, given, base, rule, scale = CASES[case]
  given, base = (jnp.float64(GUIDERS[f"in{number}/{name}"]) for name in (given, base))
  # The library rescales in the variable of the rule, jaxguide in x0. They agree for x = 0, where predictions are
  # multiples of x0.
  x = 0 * given if "rescale" in case else jnp.asarray(np.random.default_rng(0).normal(size=given.shape))
  sigma = jnp.asarray(0.7)
  # The library has channels first; only frequency_decoupled depends on the axes.
  given, base, x = (np.moveaxis(image, 0, -1) for image in (given, base, x))
  x0 = rule(to_x0(case, given, x, sigma), to_x0(case, base, x, sigma), scale, x, sigma)
  x0, x = (jnp.moveaxis(image, -1, 0) for image in (x0, x))
  np.testing.assert_allclose(from_x0(case, x0, x, sigma), GUIDERS[f"{case}/pred"], **tolerance(case))


INTERVAL = {f"cfg-interval-step{step}": step for step in (0, 1, 2, 5, 6, 7, 8, 9)}


@pytest.mark.parametrize("case", INTERVAL)
def test_published_interval(case, float64):
  # From 0.15 to 0.75 of 10 steps: the library guides from step 1 to step 6.
  grid = np.asarray(jg.karras(10))
  predictions = jnp.stack([GUIDERS["in0/uncond"], GUIDERS["in0/cond"]])
  guidance = jg.interval(jg.classifier_free(0, 3.0), grid[7], grid[1])
  sigma = jnp.asarray(grid[INTERVAL[case]])
  x0 = guidance(lambda x, sigma, cond: predictions[cond])(predictions[0], sigma, jnp.asarray(1))
  np.testing.assert_allclose(x0, GUIDERS[f"{case}/pred"], **tolerance(case))


# case -> the scale of the guidance by skipped or perturbed layers that is added to classifier-free guidance of 3
BOTH = {"slg-both": 2.8, "pag-both": 3.0, "seg-both": 2.5}


@pytest.mark.parametrize("case", BOTH)
def test_published_guiders_of_three_predictions(case, float64):
  predictions = jnp.stack([GUIDERS[f"in0/{name}"] for name in ("uncond", "cond", "skip")])
  network = lambda x, sigma, cond: predictions[cond]  # noqa: E731
  # The library adds s (cond - skip), which is autoguidance with a power of 1 + s.
  guidance = jg.parallel(jg.classifier_free(0, 3.0), jg.autoguidance(jg.unconditional(2)(network), 1 + BOTH[case]))
  x0 = guidance(network)(predictions[0], jnp.asarray(1.0), jnp.asarray(1))
  np.testing.assert_allclose(x0, GUIDERS[f"{case}/pred"], **tolerance(case))


MOMENTUM = {
  "apg-momentum-0.5": jg.classifier_free(0, 3.0, other_form(projected(0.0, 8.0, -0.5))),
  "apg-momentum-0.75": jg.classifier_free(0, 3.0, other_form(projected(0.0, 8.0, -0.75))),
  "apg-momentum0.5": jg.classifier_free(0, 3.0, other_form(projected(0.0, 8.0, 0.5))),
}


@pytest.mark.parametrize("solver", [jg.Euler(), jg.DPMpp2M(), jg.DDPM()], ids=str)
@pytest.mark.parametrize("case", MOMENTUM)
def test_published_guiders_with_momentum(case, solver):
  grid = jnp.arange(6.0, -1.0, -1.0)
  predictions = jnp.stack([GUIDERS["seq/uncond"], GUIDERS["seq/cond"]])
  network = lambda x, sigma, cond: predictions[cond, 6 - sigma.astype(int)]  # noqa: E731
  shape = predictions.shape[2:]
  _, x0 = jg.sample(
    MOMENTUM[case](network), jax.random.key(0), shape, grid, solver, jnp.asarray(1), collect=lambda state: state.x0
  )
  np.testing.assert_allclose(x0, GUIDERS[f"{case}/pred"], rtol=1e-5, atol=5e-6)


# --- properties of the rules ----------------------------------------------------------------------

RULES = {
  "linear": linear,
  "rescaled": rescaled(0.7),
  "projected": projected(0.2, 0.4),
  "zero_star": zero_star(50.0),
  "tangential": tangential,
  "frequency_decoupled": frequency_decoupled(1.0, 0.3),
  "momentum": projected(0.2, 0.4, -0.5),
  "rescaled_tangential": rescaled(0.7, tangential),
}
NEUTRAL = {
  "rescaled": rescaled(0.0),
  "projected": projected(1.0),
  "momentum": projected(1.0, momentum=0.0),
  "frequency_decoupled": frequency_decoupled(1.0, 1.0),
}


@pytest.fixture
def predictions(float64):
  """``(x0, x0_base, x)`` of an image."""
  return tuple(jnp.asarray(np.random.default_rng(3).normal(size=(3, 4, 4, 2))))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sigma", [0.02, 1.5, 40.0])
def test_scale_1_is_the_conditional(name, sigma, predictions, relative_error):
  x0, base, x = predictions
  args = (x0, base), ((1 + sigma) * x, jnp.asarray(sigma))
  assert relative_error(x0_of(RULES[name](*args[0], 1.0, *args[1])), x0) < 1e-12
  assert relative_error(x0_of(RULES[name](*args[0], 1.1, *args[1])), x0) > 1e-3


@pytest.mark.parametrize("name", NEUTRAL)
@pytest.mark.parametrize("scale", [-1.0, 0.0, 3.0])
def test_rules_with_neutral_parameters_are_linear(name, scale, predictions, relative_error):
  x0, base, x = predictions
  wanted = linear(x0, base, scale, x, jnp.asarray(1.0))
  assert relative_error(x0_of(NEUTRAL[name](x0, base, scale, x, jnp.asarray(1.0))), wanted) < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_autoguidance_takes_the_same_rules(name, random_mixture, float64, relative_error):
  mixture = random_mixture(0, (3, 3, 1))
  x, sigma, label = jnp.ones((3, 3, 1)), jnp.asarray(0.8), jnp.asarray(1)
  auto = jg.autoguidance(jg.unconditional(3)(mixture.denoiser), 3.0, RULES[name])(mixture.denoiser)
  free = jg.classifier_free(3, 3.0, RULES[name])(mixture.denoiser)
  wanted = RULES[name](mixture.denoise(x, sigma, label), mixture.denoise(x, sigma, None), 3.0, x, sigma)
  for guided in (auto, free):
    assert relative_error(x0_of(guided(x, sigma, label)), x0_of(wanted)) < 1e-13


def test_zero_star_has_zero_velocity_above_sigma_zero(predictions, relative_error):
  # In the variables of a flow, x_t = x / (1 + σ), an Euler step with zero velocity does not move.
  x0, _, x = predictions
  denoise = lambda x, sigma, cond: x0 * jnp.asarray(cond, x0.dtype)  # noqa: E731
  guided = jg.classifier_free(0, 4.0, zero_star(3.0))(denoise)
  euler = jg.Euler()
  for sigma, still in ((5.0, True), (3.0, True), (2.9, False)):
    step = lambda x, s: guided(x, s, jnp.asarray(1))  # noqa: E731
    after = euler.step(step, euler.init(x), jnp.asarray(sigma), jnp.asarray(1.0), jax.random.key(0)).x
    assert (relative_error(after / 2, x / (1 + sigma)) < 1e-12) == still


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_rules_are_finite_for_equal_and_zero_predictions(name, shape, float64):
  # Equal predictions, predictions of 0, constant images, examples of one number.
  zero, one = jnp.zeros(shape), jnp.ones(shape)
  if name == "frequency_decoupled" and 1 in shape:
    pytest.skip("one number has no frequencies")
  total = lambda x0, base, scale, x: x0_of(RULES[name](x0, base, scale, x, jnp.asarray(0.5))).sum()  # noqa: E731
  gradient = jax.grad(total, (0, 1, 2, 3))
  for x0, base, x in ((zero, zero, zero), (one, one, one), (one, zero, one), (zero, one, zero), (one, one, zero)):
    outputs = RULES[name](x0, base, 3.0, x, jnp.asarray(0.5)), gradient(x0, base, 3.0, x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs)), (x0, base, x)


def test_a_sweep_over_a_rules_numbers_is_one_program(predictions):
  @jax.jit
  @chex.assert_max_traces(1)
  def run(rule, *args):
    return rule(*args)

  for number in (0.1, 0.4, 0.9):
    run(projected(number, 1.0 + number), *predictions[:2], 3.0, predictions[2], 1.0)


def test_a_rule_may_be_a_plain_function():
  guided = jg.classifier_free(0, 3.0, lambda x0, base, scale, x, sigma: x0 + scale)(lambda x, sigma, cond: x * cond)
  assert float(jax.jit(guided)(jnp.asarray(2.0), jnp.asarray(1.0), 1.0)) == 5.0


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: rescaled(1.1), "phi must be between 0 and 1"),
    (lambda: rescaled(np.nan), "phi must be finite"),
    (lambda: projected(np.inf), "eta must be finite"),
    (lambda: projected(0.0, 0.0), "norm_threshold must be above 0"),
    (lambda: projected(0.0, np.nan), "norm_threshold must be above 0"),
    (lambda: projected(momentum=1.5), "momentum must be between -1 and 1"),
    (frequency_decoupled, "at least one level"),
    (lambda: frequency_decoupled(1.0, np.nan), "ratio must be finite"),
    (lambda: frequency_decoupled(1, 1, 1)(*3 * [np.ones((3, 3, 1))], 1, 1), "sides of at least 4, got shape .3, 3, 1."),
    (lambda: zero_star(-1.0), "sigma_zero must be above 0"),
  ],
)
def test_bad_numbers(make, message):
  with pytest.raises(ValueError, match=message):
    make()
