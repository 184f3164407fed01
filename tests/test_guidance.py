"""Guidance compared with exact mixtures, and with the papers' formulas written in NumPy."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import jaxguide as jg
from jaxguide._core.typing import x0_of
from jaxguide.guidance import Rule

SHAPES = [(2,), (3, 3, 1)]
SIGMAS = [0.02, 0.4, 1.5, 8.0, 60.0]
SCALES = [-1.0, 0.0, 0.3, 1.0, 2.5, 7.5]


def noisy(mixture, seed, sigma):
  """A typical noisy example of this level."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=mixture.means.shape[1:]) * np.sqrt(1 + sigma**2))


@jax.jit
def evaluate(denoise, x, sigma, cond):
  """Evaluate a denoiser. Those that differ in their numbers alone share a program of each shape."""
  return denoise(x, sigma, cond)


@functools.partial(jax.jit, static_argnums=1)
def end(guided, shape, grid, label, start):
  """The end of Euler's steps, with the same programs."""
  return jg.sample(guided, jax.random.key(0), shape, grid, jg.Euler(), label, x_init=start)[0]


@pytest.fixture(params=SHAPES, ids=str)
def mixture(request, random_mixture, float64, no_rank_promotion):
  return random_mixture(0, request.param)


# --- equivalent methods ---------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
def test_classifier_at_1_on_the_unconditional_is_the_conditional(mixture, sigma, relative_error):
  guided = jg.chain(jg.unconditional(3), jg.classifier(mixture.log_prob, 1.0))(mixture.denoiser)
  for seed, label in enumerate([0, 1, 2]):
    x, at = noisy(mixture, seed, sigma), jnp.asarray(sigma)
    wanted = mixture.denoise(x, at, label)
    assert relative_error(evaluate(guided, x, at, jnp.asarray(label)), wanted) < 1e-12
    assert relative_error(mixture.denoise(x, at, None), wanted) > 1e-9 or sigma < 0.1


@pytest.mark.parametrize("sigma", SIGMAS)
def test_classifier_free_is_classifier_on_the_unconditional(mixture, sigma, relative_error):
  at = noisy(mixture, 5, sigma), jnp.asarray(sigma), jnp.asarray(1)
  for scale in SCALES:
    free = evaluate(jg.classifier_free(3, scale)(mixture.denoiser), *at)
    grad = evaluate(jg.chain(jg.unconditional(3), jg.classifier(mixture.log_prob, scale))(mixture.denoiser), *at)
    assert relative_error(free, grad) < 1e-12, scale


def test_classifier_on_the_conditional_has_the_power_one_plus_scale(mixture, relative_error):
  x, at, label = noisy(mixture, 6, 0.7), jnp.asarray(0.7), jnp.asarray(2)
  twice = evaluate(jg.classifier(mixture.log_prob, 1.5)(mixture.denoiser), x, at, label)
  assert relative_error(twice, evaluate(jg.classifier_free(3, 2.5)(mixture.denoiser), x, at, label)) < 1e-12


@pytest.mark.parametrize("scale", SCALES)
def test_autoguidance_with_the_unconditional_is_classifier_free(mixture, scale, relative_error):
  x, at, label = noisy(mixture, 7, 0.7), jnp.asarray(0.7), jnp.asarray(1)
  guided = jg.autoguidance(jg.unconditional(3)(mixture.denoiser), scale)(mixture.denoiser)
  free = jg.classifier_free(3, scale)(mixture.denoiser)
  assert relative_error(evaluate(guided, x, at, label), evaluate(free, x, at, label)) < 1e-13


def test_autoguidance_is_a_power_of_the_ratio_of_densities(mixture, relative_error):
  # Karras et al., arXiv:2406.02507, eq. 3 for scores: that of p · (p / p_weak)^(w - 1), D = x + σ² score.
  weak = mixture.replace(variances=2 * mixture.variances)
  x, sigma, label, w = noisy(mixture, 8, 0.7), jnp.asarray(0.7), jnp.asarray(2), 2.3
  log_density = lambda x: w * mixture.log_density(x, sigma, label) - (w - 1) * weak.log_density(x, sigma, label)  # noqa: E731
  score = jax.jit(jax.grad(log_density))
  guided = jg.autoguidance(weak.denoiser, w)(mixture.denoiser)
  assert relative_error(evaluate(guided, x, sigma, label), x + sigma**2 * score(x)) < 1e-12


def test_scale_0_is_unconditional_and_1_conditional(mixture):
  x, at, label = noisy(mixture, 1, 0.7), jnp.asarray(0.7), jnp.asarray(2)
  conditional, unconditional = mixture.denoise(x, at, label), mixture.denoise(x, at, None)
  assert np.abs(conditional - unconditional).max() > 1e-3
  free = lambda scale: evaluate(jg.classifier_free(3, scale)(mixture.denoiser), x, at, label)  # noqa: E731
  np.testing.assert_allclose(free(0.0), unconditional, rtol=1e-13)
  np.testing.assert_allclose(free(1.0), conditional, rtol=1e-13, atol=1e-14)
  bare = jg.chain(jg.unconditional(3), jg.classifier(mixture.log_prob, 0.0))(mixture.denoiser)
  np.testing.assert_allclose(evaluate(bare, x, at, label), unconditional, rtol=1e-13)


# --- the papers' forms, in their own variables: x_t = alpha x0 + s eps, alpha² + s² = 1 --------------


class VP:
  """A mixture in NumPy, in the variance-preserving variables of both papers."""

  def __init__(self, mixture, sigma):
    self.means, self.variances = (np.asarray(a).reshape(7, -1) for a in (mixture.means, mixture.variances))
    self.weights, self.classes = np.exp(mixture.log_weights), np.asarray(mixture.classes)
    self.alpha, self.s = 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)

  def score(self, x_t, label=None):
    """``∇ log p(x_t | label)``."""
    chosen = np.ones(7, bool) if label is None else self.classes == label
    variance = self.alpha**2 * self.variances[chosen] + self.s**2
    off = x_t - self.alpha * self.means[chosen]
    log = np.log(self.weights[chosen]) - 0.5 * (off**2 / variance + np.log(variance)).sum(1)
    weights = np.exp(log - log.max())
    return (weights / weights.sum()) @ (-off / variance)

  def eps(self, x_t, label=None):
    """The network that both papers train: ``eps = -s ∇ log p``."""
    return -self.s * self.score(x_t, label)

  def classifier_gradient(self, x_t, label):
    """``∇_{x_t} log p(label | x_t)``, by Bayes' rule."""
    return self.score(x_t, label) - self.score(x_t)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_three_forms_of_classifier_guidance_are_one(mixture, sigma, scale, relative_error):
  x, label = noisy(mixture, 2, sigma), 1
  vp = VP(mixture, sigma)
  x_t = vp.alpha * np.asarray(x).ravel()
  gradient = vp.classifier_gradient(x_t, label)
  # Dhariwal & Nichol, arXiv:2105.05233, Algorithm 2: ε̂ = ε(x_t) - s·sqrt(1 - ᾱ_t)·∇ log p(y | x_t), then DDIM's x0.
  eps_hat = vp.eps(x_t) - scale * np.sqrt(1 - vp.alpha**2) * gradient
  by_eps = (x_t - np.sqrt(1 - vp.alpha**2) * eps_hat) / vp.alpha
  # The score form, eq. 13 and before: ∇ log p(x_t) + s ∇ log p(y | x_t); x0 by Tweedie in these variables.
  by_score = (x_t + vp.s**2 * (vp.score(x_t) + scale * gradient)) / vp.alpha
  # The x0 form: the mean of x0 moves by s·(1 - ᾱ)/sqrt(ᾱ)·∇.
  by_x0 = (x_t - vp.s * vp.eps(x_t)) / vp.alpha + scale * vp.s**2 / vp.alpha * gradient

  guided = jg.chain(jg.unconditional(3), jg.classifier(mixture.log_prob, scale))(mixture.denoiser)
  ours = np.asarray(evaluate(guided, x, jnp.asarray(sigma), jnp.asarray(label))).ravel()
  for form in (by_eps, by_score, by_x0):
    assert relative_error(ours, form) < 1e-12

  # Without σ_t the ε-form is a different method.
  dropped = vp.eps(x_t) - scale * gradient
  assert relative_error(ours, (x_t - vp.s * dropped) / vp.alpha) > 1e-3


@pytest.mark.parametrize("sigma", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("w", [0.5, 3.0])
def test_the_three_forms_of_classifier_free_guidance_are_one(mixture, sigma, w, relative_error):
  x, label = noisy(mixture, 3, sigma), 0
  vp = VP(mixture, sigma)
  z = vp.alpha * np.asarray(x).ravel()
  # Ho & Salimans, arXiv:2207.12598, Algorithm 2: ε̃ = (1 + w) ε(z, c) - w ε(z), x̃ = (z - σ ε̃) / α.
  by_eps = (z - vp.s * ((1 + w) * vp.eps(z, label) - w * vp.eps(z))) / vp.alpha
  by_score = (z + vp.s**2 * ((1 + w) * vp.score(z, label) - w * vp.score(z))) / vp.alpha
  denoised = lambda label: (z - vp.s * vp.eps(z, label)) / vp.alpha  # noqa: E731
  by_x0 = (1 + w) * denoised(label) - w * denoised(None)

  guided = jg.classifier_free(3, 1 + w)(mixture.denoiser)
  ours = np.asarray(evaluate(guided, x, jnp.asarray(sigma), jnp.asarray(label))).ravel()
  for form in (by_eps, by_score, by_x0):
    assert relative_error(ours, form) < 1e-12


# --- composition ----------------------------------------------------------------------------------

AT = (jnp.asarray(2.0), jnp.asarray(0.5), 1)


def test_chain_applies_the_leftmost_innermost():
  plus = lambda denoise: lambda *args: denoise(*args) + 1  # noqa: E731
  times = lambda denoise: lambda *args: 10 * denoise(*args)  # noqa: E731
  identity = lambda x, sigma, cond: x  # noqa: E731
  assert float(jg.chain(plus, times)(identity)(*AT)) == 30
  assert float(jg.chain(times, plus)(identity)(*AT)) == 21
  assert float(jg.chain()(identity)(*AT)) == 2
  assert float(jg.chain(jg.chain(plus, times), plus)(identity)(*AT)) == 31


def test_chain_equals_nested_application(mixture):
  x, at, label = noisy(mixture, 4, 0.5), jnp.asarray(0.5), jnp.asarray(1)
  first, second = jg.classifier_free(3, 2.0), jg.classifier(mixture.log_prob, 0.7)
  for a, b in ((first, second), (second, first), (first, jg.clip_x0(0.3)), (jg.clip_x0(0.3), first)):
    chained = evaluate(jg.chain(a, b)(mixture.denoiser), x, at, label)
    np.testing.assert_array_equal(chained, evaluate(b(a(mixture.denoiser)), x, at, label))


def test_clip_at_the_end_and_at_the_start_of_a_chain():
  denoise = lambda x, sigma, cond: x * jnp.asarray(cond, x.dtype)  # noqa: E731
  free, clip = jg.classifier_free(0, 3.0), jg.clip_x0(1.0)
  assert float(jg.chain(free, clip)(denoise)(*AT)) == 1  # 3 * 2, clipped
  assert float(jg.chain(clip, free)(denoise)(*AT)) == 3  # 3 * clipped 2
  assert float(jg.clip_x0(0.25)(denoise)(-AT[0], AT[1], 1)) == -0.25
  assert float(jg.clip_x0(5.0)(denoise)(*AT)) == 2


def test_a_condition_with_several_leaves():
  cond = {"label": jnp.asarray(3.0), "text": jnp.arange(4.0)}
  null = {"label": 0, "text": np.zeros(4)}
  denoise = lambda x, sigma, c: x * c["label"] + c["text"].sum()  # noqa: E731
  guided = jg.classifier_free(null, 2.0)(denoise)
  assert float(guided(jnp.asarray(1.0), AT[1], cond)) == 2 * (3 + 6)


# --- several at once ------------------------------------------------------------------------------


def test_compose_is_a_product_of_densities(mixture, relative_error):
  # Liu et al., arXiv:2206.01714, eq. 11: the score of p(x) Π (p(x | y_i) / p(x))^γ_i; D = x + σ² score.
  x, sigma, powers, labels = noisy(mixture, 9, 0.7), jnp.asarray(0.7), (1.5, 0.8, -0.6), (0, 2, 1)

  def log_density(x):
    bare = mixture.log_density(x, sigma, None)
    return bare + sum(p * (mixture.log_density(x, sigma, y) - bare) for p, y in zip(powers, labels, strict=True))

  guided = jg.compose(3, jnp.array(powers))(mixture.denoiser)
  got = evaluate(guided, x, sigma, jnp.array(labels))
  assert relative_error(got, x + sigma**2 * jax.jit(jax.grad(log_density))(x)) < 1e-12


@pytest.mark.parametrize("scale", SCALES)
def test_compose_of_one_is_classifier_free(mixture, scale, relative_error):
  x, sigma = noisy(mixture, 10, 0.7), jnp.asarray(0.7)
  one = evaluate(jg.compose(3, jnp.array([scale]))(mixture.denoiser), x, sigma, jnp.array([2]))
  free = evaluate(jg.classifier_free(3, scale)(mixture.denoiser), x, sigma, jnp.asarray(2))
  assert relative_error(one, free) < 1e-13


def test_compose_samples_with_conditions_of_each_sample():
  ring, scales = jg.ring(4), jnp.array([2.0, -0.5])
  guided = jg.compose(4, scales)(ring.denoiser)
  labels = np.array([[0, 1], [2, 3], [1, 0]])
  options = dict(shape=(2,), sigmas=jg.karras(10), solver=jg.Heun(), devices=jax.devices()[:1])
  made = jg.sample_batch(guided, jax.random.key(0), labels, **options)
  # Towards the first, away from the second: the angle tells the class.
  angles = np.arctan2(made[:, 1], made[:, 0]) / (np.pi / 2)
  np.testing.assert_array_equal(np.round(angles) % 4, labels[:, 0])
  with pytest.raises(ValueError, match="one of the 4 classes"):
    jg.sample_batch(guided, jax.random.key(0), labels + 2, **options)


@pytest.mark.parametrize("cond", [1, np.array([1]), np.array([1, 2, 0])])
def test_compose_needs_one_scale_for_each_condition(mixture, cond):
  with pytest.raises(ValueError, match="one scale for each condition"):
    jg.compose(3, jnp.array([1.0, 2.0]))(mixture.denoiser)(noisy(mixture, 0, 1.0), jnp.asarray(1.0), cond)


def test_parallel_adds_the_changes_of_its_guidances(mixture, relative_error):
  x, sigma, label = noisy(mixture, 11, 0.7), jnp.asarray(0.7), jnp.asarray(1)
  weak = mixture.replace(variances=1.5 * mixture.variances)
  one, two = jg.classifier_free(3, 3.0), jg.autoguidance(weak.denoiser, 2.0)
  bare = mixture.denoise(x, sigma, label)
  changes = sum(guidance(mixture.denoiser)(x, sigma, label) - bare for guidance in (one, two))
  got = jg.parallel(one, two)(mixture.denoiser)(x, sigma, label)
  assert relative_error(got, bare + changes) < 1e-13
  # The form of papers that add a term: u + γ (c - u) + s (c - w).
  null = mixture.denoise(x, sigma, None)
  assert relative_error(got, null + 3 * (bare - null) + 1.0 * (bare - weak.denoise(x, sigma, label))) < 1e-12
  assert relative_error(jg.chain(one, two)(mixture.denoiser)(x, sigma, label), got) > 1e-3
  assert relative_error(jg.parallel()(mixture.denoiser)(x, sigma, label), bare) < 1e-15


def test_parallel_shares_the_evaluation_of_the_bare_denoiser():
  unet = jg.UNet(model_channels=32, num_res_blocks=1, num_classes=3, channel_mult=(1,), attention_resolutions=())
  x = jnp.zeros((8, 8, 1))
  shapes = jax.eval_shape(unet.init, jax.random.key(0), x[None], jnp.zeros(1), jnp.zeros(1, int))
  params = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
  network = jg.NetworkDenoiser(params, unet.apply, jg.scaling.v(jg.schedules.Cosine()))

  def flops(denoise):
    return jax.jit(denoise).lower(x, jnp.asarray(1.0), jnp.asarray(1)).cost_analysis()["flops"]

  away = lambda label: jg.autoguidance(jg.unconditional(label)(network), 2.0)  # noqa: E731
  assert flops(away(3)(network)) / flops(network) < 2.1
  assert flops(jg.parallel(away(3), away(2))(network)) / flops(network) < 3.1


# --- momentum -------------------------------------------------------------------------------------


def test_momentum_is_carried_from_step_to_step(mixture, relative_error):
  # Sadat et al., arXiv:2410.02416, algorithm 1, along Euler's steps.
  grid, beta, gamma = np.asarray(jg.karras(6, 0.05, 5.0), float), -0.6, 4.0
  x = start = noisy(mixture, 12, 5.0)
  average, label = 0.0, jnp.asarray(1)
  for sigma, below in itertools.pairwise(grid):
    given, null = (np.asarray(mixture.denoise(x, jnp.asarray(sigma), cond)) for cond in (label, None))
    average = given - null + beta * average
    along = np.vdot(average, given) / np.vdot(given, given) * given
    x0 = given + (gamma - 1) * (average - along)
    x = x0 + below / sigma * (x - x0)
  guided = jg.classifier_free(3, gamma, jg.projected(momentum=beta))(mixture.denoiser)
  shape = start.shape
  got = end(guided, shape, grid, label, start)
  assert relative_error(got, x) < 1e-12
  for other in (jg.projected(), jg.projected(momentum=0.0)):
    without = jg.classifier_free(3, gamma, other)(mixture.denoiser)
    assert relative_error(end(without, shape, grid, label, start), x) > 1e-6


def test_outside_an_interval_the_momentum_does_not_change():
  network = lambda x, sigma, cond: 0 * x + cond * sigma  # noqa: E731
  rule = jg.projected(1.0, momentum=0.5)
  guided = jg.interval(jg.classifier_free(0.0, 2.0, rule), 0.0, 3.0)(network)
  grid = jnp.array([5.0, 4.0, 3.0, 2.0, 0.0])
  _, x0 = jg.sample(guided, jax.random.key(0), (1,), grid, jg.Euler(), 1.0, collect=lambda state: state.x0)
  # x0 is bare at levels 5 and 4; at 3 it is 3 + (2 - 1) 3; at 2 it is 2 + (2 + 0.5 · 3).
  np.testing.assert_allclose(x0[:, 0], [5, 4, 6, 5.5], rtol=1e-6)


@pytest.mark.parametrize("outer", [jg.classifier_free(3, 0.0), jg.compose(3, jnp.zeros(1))], ids=["cfg", "compose"])
def test_a_guidance_with_momentum_cannot_be_inside_a_batched_guidance(outer, mixture):
  # The null prediction would use the momentum of the conditional one.
  inner = jg.classifier_free(3, 2.0, jg.projected(momentum=-0.5))
  cond = jnp.asarray(1) if "classifier_free" in str(outer.formula) else jnp.array([1])
  with pytest.raises(ValueError, match="put it last in the chain"):
    jg.chain(inner, outer)(mixture.denoiser)(noisy(mixture, 0, 1.0), jnp.asarray(1.0), cond)


def test_momentum_inside_a_plain_function_is_an_error(mixture):
  guided = jg.classifier_free(3, 2.0, jg.projected(momentum=-0.5))(mixture.denoiser)
  shape = mixture.means.shape[1:]
  with pytest.raises(ValueError, match=r"closes over it: wrap the function with jax\.tree_util\.Partial"):
    jg.sample(lambda *args: guided(*args), jax.random.key(0), shape, jg.karras(3), jg.Euler(), 1)  # noqa: PLW0108


def test_each_momentum_is_its_own(mixture, relative_error):
  # Two rules of Sadat et al., arXiv:2410.02416, algorithm 1: from the unconditional and then from a weak prediction.
  weak, label = mixture.replace(variances=2 * mixture.variances), jnp.asarray(1)
  grid, betas, scales = np.asarray(jg.karras(5, 0.05, 5.0), float), (-0.6, 0.3), (2.0, 1.5)
  x, averages = noisy(mixture, 13, 5.0), [0.0, 0.0]
  start = x
  for sigma, below in itertools.pairwise(grid):
    x0 = mixture.denoise(x, jnp.asarray(sigma), label)
    bases = mixture.denoise(x, jnp.asarray(sigma), None), weak.denoise(x, jnp.asarray(sigma), label)
    for i, base in enumerate(bases):
      averages[i] = x0 - base + betas[i] * averages[i]
      x0 = x0 + (scales[i] - 1) * averages[i]
    x = x0 + below / sigma * (x - x0)
  rules = [jg.projected(1.0, momentum=beta) for beta in betas]
  guidance = jg.chain(jg.classifier_free(3, scales[0], rules[0]), jg.autoguidance(weak.denoiser, scales[1], rules[1]))
  for inside in (guidance, jg.interval(guidance, 0.0, 10.0)):
    guided = inside(mixture.denoiser)
    assert relative_error(end(guided, start.shape, grid, label, start), x) < 1e-12


# --- interval -------------------------------------------------------------------------------------


def test_interval_is_guided_inside_and_bare_outside(mixture):
  guidance = jg.classifier_free(3, 3.0)
  guided = jg.interval(guidance, 0.5, 2.0)(mixture.denoiser)
  x, label = noisy(mixture, 7, 1.0), jnp.asarray(1)
  # The lower bound is not in the interval, the upper bound is.
  for sigma, inside in ((0.1, False), (0.5, False), (0.500001, True), (1.0, True), (2.0, True), (2.000001, False)):
    at = jnp.asarray(sigma)
    wanted = evaluate(guidance(mixture.denoiser) if inside else mixture.denoiser, x, at, label)
    np.testing.assert_allclose(evaluate(guided, x, at, label), wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("infinity", [jnp.inf, math.inf, float("inf"), np.float64(np.inf)])
def test_interval_may_have_no_upper_bound(infinity):
  guided = jg.interval(jg.classifier_free(0, 3.0), 1.0, infinity)(lambda x, sigma, cond: x * cond)
  assert [float(guided(jnp.asarray(1.0), jnp.asarray(s), 1.0)) for s in (0.5, 1e6)] == [1.0, 3.0]


def watched(log_prob, seen):
  """The classifier, with a record of the levels at which it runs."""

  def run(parameters, x, sigma, cond):
    jax.debug.callback(lambda sigma: seen.append(round(float(sigma), 4)), sigma)
    return parameters(x, sigma, cond)

  return jax.tree_util.Partial(run, log_prob)


def test_outside_the_interval_the_classifier_does_not_run():
  ring, seen = jg.ring(4), []
  guidance = jg.interval(jg.classifier(watched(ring.log_prob, seen), 2.0), 0.5, 4.0)
  grid = jnp.array([9.0, 4.0, 2.0, 0.75, 0.5, 0.25, 0.0])
  options = dict(num=3, shape=(2,), sigmas=grid, solver=jg.Euler(), devices=jax.devices()[:1])
  jg.sample_batch(guidance(ring.denoiser), jax.random.key(0), 1, **options)
  jax.effects_barrier()
  assert set(seen) == {4.0, 2.0, 0.75}
  # A check of this test: without the interval the classifier runs at every level.
  seen.clear()
  jg.sample_batch(guidance.parameters[0](ring.denoiser), jax.random.key(0), 1, **options)
  jax.effects_barrier()
  assert set(seen) == {9.0, 4.0, 2.0, 0.75, 0.5, 0.25}


def primitives(jaxpr):
  """The names of all primitives in a jaxpr, and in those inside it."""
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    for inner in jaxprs_in_params(equation.params):
      yield from primitives(inner)


@pytest.mark.parametrize("solver_name", ["euler", "dpmpp_2m", "ddpm"])  # Heun has a branch of its own
def test_interval_is_a_branch_under_vmap_over_keys_and_labels(solver_name, all_solvers):
  ring = jg.ring(4)

  def batch(guidance, keys, labels, sigmas):
    one = lambda key, y: jg.sample(guidance(ring.denoiser), key, (2,), sigmas, all_solvers[solver_name], y)[0]  # noqa: E731
    return jax.vmap(one)(keys, labels)

  args = jg.sample_keys(jax.random.key(0), 3), jnp.arange(3), jg.karras(5)
  free = jg.classifier_free(4, 2.0)
  assert "cond" not in list(primitives(jax.make_jaxpr(batch)(free, *args).jaxpr))
  assert "cond" in list(primitives(jax.make_jaxpr(batch)(jg.interval(free, 0.1, 1.0), *args).jaxpr))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, np.float32("nan"), np.array([1.0, np.nan]), jnp.nan])
def test_a_scale_is_finite(scale):
  for make in (lambda s: jg.classifier_free(0, s), lambda s: jg.classifier(jg.ring(3).log_prob, s)):
    with pytest.raises(ValueError, match="scale must be finite"):
      make(scale)


def test_a_scale_is_a_number():
  for scale in ("2", None):
    with pytest.raises(TypeError):
      jg.classifier_free(0, scale)


@pytest.mark.parametrize(
  ("low", "high"), [(1.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (0.0, np.nan), (np.inf, np.inf), (0.0, 0.0)]
)
def test_an_interval_is_not_empty(low, high):
  with pytest.raises(ValueError, match="sigma_"):
    jg.interval(jg.classifier_free(0, 2.0), low, high)


@pytest.mark.parametrize("bound", [-1.0, np.nan, np.inf])
def test_a_clip_bound_is_finite(bound):
  with pytest.raises(ValueError, match="bound"):
    jg.clip_x0(bound)


@pytest.mark.parametrize("null", [None, {"label": 0}, (0,)])
def test_null_cond_has_the_structure_of_cond(null):
  with pytest.raises(ValueError, match="null_cond must have the structure of cond"):
    jg.classifier_free(null, 2.0)(lambda x, sigma, cond: x)(*AT)


@pytest.mark.parametrize("null", [7, -1])
@pytest.mark.parametrize("make", [lambda n: jg.classifier_free(n, 2.0), lambda n: jg.compose(n, jnp.ones(1))])
def test_a_null_cond_is_one_of_the_denoisers_classes(make, null):
  guided, cond = make(null)(jg.ring(4).denoiser), np.array([[1]])
  cond = cond if "Composed" in type(guided).__name__ else cond[0]
  with pytest.raises(ValueError, match=f"label {null} is not one of the 4 classes"):
    jg.sample_batch(guided, jax.random.key(0), cond, shape=(2,), sigmas=jg.karras(3), solver=jg.Euler())


@pytest.mark.parametrize("null", [4.7, np.array([4]), "none"])
def test_a_null_cond_has_the_shape_and_type_of_a_cond(null):
  with pytest.raises(ValueError, match="null_cond must"):
    jg.classifier_free(null, 2.0)(lambda x, sigma, cond: x)(*AT)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_a_scale_is_one_number_for_one_example(mixture, shape):
  x, sigma, label = noisy(mixture, 0, 1.0), jnp.asarray(1.0), jnp.asarray(1)
  for guidance in (
    jg.classifier_free(3, np.ones(shape)), jg.classifier(mixture.log_prob, np.ones(shape)),
    jg.autoguidance(mixture.denoiser, lambda sigma: jnp.ones(shape)), jg.normalized(jg.clip_x0(), np.ones(shape)),
  ):  # fmt: skip
    with pytest.raises(ValueError, match="one number for one example"):
      guidance(mixture.denoiser)(x, sigma, label)


@pytest.mark.parametrize("make", [jg.chain, jg.parallel, lambda g: jg.interval(g, 0.1, 1.0)])
@pytest.mark.parametrize("guidance", [None, [jg.clip_x0()]])
def test_guidance_is_a_function(make, guidance):
  with pytest.raises(TypeError):
    make(guidance)


def test_a_rule_maker_in_place_of_a_rule_is_an_error(mixture):
  with pytest.raises(TypeError, match=r"got the function that makes one: call it, frequency_decoupled\(...\)"):
    jg.classifier_free(3, 2.0, jg.frequency_decoupled)(mixture.denoiser)


def test_an_interval_drops_the_learned_variance_of_a_weak_model(mixture):
  bare = mixture.denoiser
  weak = lambda x, sigma, cond: jg.Prediction(bare(x, sigma, cond), x)  # noqa: E731
  guided = jg.interval(jg.autoguidance(weak, 2.0), 0.1, 2.0)(bare)
  assert guided(noisy(mixture, 0, 1.0), jnp.asarray(1.0), jnp.asarray(1)).shape == mixture.means.shape[1:]


def test_guidance_without_a_condition_is_an_error():
  with pytest.raises(ValueError, match="cond"):
    jg.classifier_free(None, 2.0)(lambda x, sigma, cond: x)(AT[0], AT[1], None)


def test_rules_of_one_kind_have_one_tree_structure(make_guidance, random_mixture):
  mixture = random_mixture(0, (2,))
  # The structure does not depend on the numbers, so other numbers do not compile again.
  one, two = (jax.tree.structure(make_guidance(mixture, scale)) for scale in (1.0, 2.0))
  assert one == two
  assert isinstance(make_guidance(mixture, 1.0), Rule)


# --- a learned variance ---------------------------------------------------------------------------


def test_guidance_does_not_change_a_learned_variance(make_guidance, random_mixture, float64):
  mixture = random_mixture(0, (2,))
  # The learned variance of each evaluation is its condition; guidance must return that of the sample's own condition.
  bare = mixture.denoiser
  learned = lambda x, sigma, cond: jg.Prediction(bare(x, sigma, cond), x * 0 + jnp.asarray(cond, x.dtype))  # noqa: E731
  x, guidance = noisy(mixture, 0, 1.0), make_guidance(mixture, 3.0)
  both = jax.jit(lambda *args: (guidance(learned)(*args), x0_of(guidance(bare)(*args))))
  for sigma in (0.1, 1.0):  # outside and inside the interval
    prediction, x0 = both(x, jnp.asarray(sigma), jnp.asarray(1))
    np.testing.assert_allclose(prediction.x0, x0, rtol=1e-14)
    # The unconditional denoiser has the null class as its condition.
    unconditional = len(guidance.parameters) == 1 and "unconditional" in str(guidance.parameters[0])
    np.testing.assert_array_equal(prediction.variance, np.full(2, mixture.num_classes if unconditional else 1))


# --- cost -----------------------------------------------------------------------------------------

# Evaluations of the network in each guided evaluation, as in README's table. The evaluations of two guidances in a
# chain are added. The evaluations of a separate weak network do not count.
PASSES = {
  "classifier_free": 2,
  "classifier": 1,
  "reused": 1,
  "unconditional_classifier": 1,
  "interval": 2,
  "autoguidance": 1,
  "rescaled": 2,
  "projected": 2,
  "momentum": 2,
  "zero_star": 2,
  "tangential": 2,
  "frequency_decoupled": 2,
  "scheduled": 2,
  "cfg_pp": 2,
  "compose": 3,
  "classifier_after_classifier_free": 2,
  "reconstruction": 1,
  "backward_guidance": 1,
  "clip_x0": 2,
  "dynamic_threshold": 2,
}


def test_passes_of_the_network(make_guidance, random_mixture, request):
  name, mixture, seen = request.node.callspec.params["make_guidance"], random_mixture(0, (2,)), []
  if name not in PASSES:
    pytest.skip("made of others")

  def watched(mixture, x, sigma, cond):
    jax.debug.callback(lambda *_: seen.append(1), x, cond)  # once for each condition of a batch
    return mixture.denoise(x, sigma, cond)

  guided = make_guidance(mixture, 2.0)(jax.tree_util.Partial(watched, mixture))
  jax.jit(guided)(jnp.ones(2), jnp.asarray(1.0), jnp.asarray(1))
  jax.effects_barrier()
  assert len(seen) == PASSES[name]
