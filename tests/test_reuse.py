"""Gradients that are reused (``every``), compared with loops in NumPy and with cases in which reusing is exact."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxguide as jg
from jaxguide.generate.guidances import GuidanceSpec

GRID = np.array([6.0, 3.0, 1.7, 1.0, 0.6, 0.3, 0.1, 0.0])
LABEL, SCALE = 1, 1.5


class Mixture:
  """A mixture in NumPy: the denoised example, and the gradient of the class log-probability at a noise level."""

  def __init__(self, mixture):
    self.means, self.variances = np.asarray(mixture.means), np.asarray(mixture.variances)
    self.weights, self.classes = np.exp(mixture.log_weights), np.asarray(mixture.classes)

  def score(self, x, sigma, label=None):
    chosen = np.ones(len(self.means), bool) if label is None else self.classes == label
    variance = (self.variances + sigma**2)[chosen]
    off = self.means[chosen] - x
    log = np.log(self.weights[chosen]) - 0.5 * (off**2 / variance + np.log(variance)).sum(1)
    share = np.exp(log - log.max())
    return (share / share.sum()) @ (off / variance)

  def gradient(self, x, sigma):
    return self.score(x, sigma, LABEL) - self.score(x, sigma)

  def denoise(self, x, sigma, label=None):
    return x + sigma**2 * self.score(x, sigma, label)


def weight(sigma):
  """The definition: a gradient g at level sigma is kept as ``sqrt(1 + sigma²) g``."""
  return (1 + sigma**2) ** 0.5


class Kept:
  """The gradient by the definition: computed in every n-th step that acts, and kept in between."""

  def __init__(self, gradient, n):
    self.gradient, self.n, self.step, self.kept = gradient, n, 0, None

  def __call__(self, x, sigma, first=True):
    """The gradient in the current step; a step begins with ``first``, which sets what is kept."""
    computes = self.step % self.n == 0
    used = self.gradient(x, sigma) if computes else self.kept / weight(sigma)
    if first:
      self.pending = weight(sigma) * used if computes else self.kept
    return used

  def next(self):
    self.kept, self.step = self.pending, self.step + 1


@pytest.fixture
def mixture(random_mixture, float64, no_rank_promotion):
  return random_mixture(0, (3,))


def start(sigma=GRID[0]):
  return np.random.default_rng(0).normal(size=3) * np.hypot(1, sigma)


def sampled(guidance, mixture, solver, x_init=None, grid=GRID, key=None):
  x_init = start() if x_init is None else x_init
  key = jax.random.key(3) if key is None else key
  return end(guidance(mixture.denoiser), key, grid, solver, LABEL, x_init)


@jax.jit
def end(guided, key, grid, solver, label, x_init):
  """A sample. Guidances and solvers that differ in their numbers alone share this program."""
  return jg.sample(guided, key, (3,), grid, solver, label, x_init=x_init)[0]


# --- loops in NumPy -------------------------------------------------------------------------------


def euler(guided, kept):
  x = start()
  for sigma, below in itertools.pairwise(GRID):
    x0 = guided(x, sigma, True)
    x = x0 + below / sigma * (x - x0)
    kept.next()
  return x


def heun(guided, kept):
  x = start()
  for sigma, below in itertools.pairwise(GRID):
    slope = (x - guided(x, sigma, True)) / sigma
    ahead = x + (below - sigma) * slope
    if below > 0:
      slope = (slope + (ahead - guided(ahead, below, False)) / below) / 2
      ahead = x + (below - sigma) * slope
    x = ahead
    kept.next()
  return x


def dpmpp_2m(guided, kept):
  x, last = start(), None
  for i, (sigma, below) in enumerate(itertools.pairwise(GRID)):
    x0 = used = guided(x, sigma, True)
    if last is not None and below > 0:
      r = np.log(GRID[i - 1] / sigma) / np.log(sigma / below)
      used = x0 + (x0 - last) / (2 * r)
    x, last = below / sigma * x + (1 - below / sigma) * used, x0
    kept.next()
  return x


WALKS = {"euler": (euler, jg.Euler()), "heun": (heun, jg.Heun()), "dpmpp_2m": (dpmpp_2m, jg.DPMpp2M())}


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("name", WALKS)
def test_a_classifiers_gradient_is_reused(name, n, mixture, relative_error):
  (walk, solver), model = WALKS[name], Mixture(mixture)
  kept = Kept(model.gradient, n)
  wanted = walk(lambda x, sigma, first: model.denoise(x, sigma) + SCALE * sigma**2 * kept(x, sigma, first), kept)
  guidance = jg.chain(jg.unconditional(3), jg.classifier(mixture.log_prob, SCALE, every=n))
  assert relative_error(sampled(guidance, mixture, solver), wanted) < 1e-10
  always = jg.chain(jg.unconditional(3), jg.classifier(mixture.log_prob, SCALE))
  assert relative_error(sampled(always, mixture, solver), wanted) > 1e-3


def test_a_reused_gradient_among_others(mixture, relative_error):
  # Classifier-free guidance with momentum, then the classifier at some levels, and a clip at the end.
  model, weight, beta, low, high, bound = Mixture(mixture), 2.0, -0.5, 0.2, 2.0, 1.2
  kept, momentum, x = Kept(model.gradient, 2), 0.0, start()
  for sigma, below in itertools.pairwise(GRID):
    given, null = model.denoise(x, sigma, LABEL), model.denoise(x, sigma)
    momentum = given - null + beta * momentum
    x0 = given + (weight - 1) * momentum
    if low < sigma <= high:
      x0 = x0 + SCALE * sigma**2 * kept(x, sigma)
      kept.next()
    x0 = np.clip(x0, -bound, bound)
    x = x0 + below / sigma * (x - x0)
  guidance = jg.chain(
    jg.classifier_free(3, weight, jg.projected(1.0, momentum=beta)),
    jg.interval(jg.classifier(mixture.log_prob, SCALE, every=2), low, high),
    jg.clip_x0(bound),
  )
  assert relative_error(sampled(guidance, mixture, jg.Euler()), x) < 1e-10


@pytest.mark.parametrize("point", ["x", "mean"])
def test_ddpm_shifts_its_mean_by_a_reused_gradient(point, mixture, relative_error):
  model, key, x = Mixture(mixture), jax.random.key(3), start()
  kept, steps = Kept(model.gradient, 3), jax.random.split(key)[1]
  for i, (sigma, below) in enumerate(itertools.pairwise(GRID)):
    # Ho et al., arXiv:2006.11239, eq. 7, in x = x0 + sigma eps; the variance of x' is that of x_t over alpha².
    mean = model.denoise(x, sigma) + below**2 / sigma**2 * (x - model.denoise(x, sigma))
    variance = below**2 * (1 - below**2 / sigma**2)
    if point == "mean":
      gradient = kept(mean, below or sigma)
    else:
      gradient = kept(x, sigma) * np.sqrt((1 + sigma**2) / (1 + below**2))
    noise = np.asarray(jax.random.normal(jax.random.fold_in(steps, i), (3,)), float)
    x = mean + SCALE * variance * gradient + np.sqrt(variance) * noise
    kept.next()
  solver = jg.DDPM(log_prob=mixture.log_prob, scale=SCALE, gradient_at=point, every=3)
  assert relative_error(sampled(jg.unconditional(3), mixture, solver, key=key), x) < 1e-10


# --- cases in which reusing is exact ----------------------------------------------------------------


def test_reusing_is_exact_where_the_kept_gradient_is_constant(float64):
  # What is kept of g = m / weight(sigma) is m.
  m = jnp.array([1.0, -2.0, 0.5])
  noisy = lambda x, sigma, cond: m @ x / weight(sigma)  # noqa: E731
  clean = lambda x0, sigma, cond: m @ x0  # noqa: E731
  linear = lambda x, sigma, cond: x / weight(sigma)  # noqa: E731
  walk = lambda denoise, solver: jax.jit(lambda: jg.sample(denoise, jax.random.key(0), (3,), GRID, solver)[0])()  # noqa: E731
  for make, solver in (
    (lambda n: jg.classifier(noisy, 2.0, n), jg.Heun()),
    (lambda n: jg.reconstruction(clean, 2.0, n), jg.Euler()),
    (lambda n: jg.backward_guidance(clean, lambda sigma: 0.1 * sigma, 3, n), jg.Euler()),
    (lambda n: jg.normalized(jg.classifier(noisy, 2.0, n), 0.2), jg.Euler()),
    (lambda n: jg.interval(jg.reconstruction(clean, 2.0, n), 0.2, 2.0), jg.Heun()),
  ):
    three, one = (walk(make(n)(linear), solver) for n in (3, 1))
    np.testing.assert_allclose(three, one, rtol=1e-12)
  for point in ("x", "mean"):
    ddpm = lambda n: jg.DDPM(log_prob=noisy, scale=2.0, gradient_at=point, every=n)  # noqa: E731, B023
    one, four = (walk(linear, ddpm(n)) for n in (1, 4))
    np.testing.assert_allclose(four, one, rtol=1e-12)


@pytest.mark.parametrize("make", [jg.reconstruction, jg.backward_guidance])
def test_the_other_gradients_are_those_of_the_first_step(make, float64):
  # With n above the number of steps there is one gradient, whose change follows from the definition.
  clean = lambda x0, sigma, cond: -0.5 * jnp.sum((x0 - cond) ** 2)  # noqa: E731
  half = lambda x, sigma, cond: 0.5 * x  # noqa: E731
  x, target = np.array([1.0, -2.0]), np.array([3.0, 4.0])
  grid = np.array([2.0, 1.0, 0.5, 0.0])
  got = jg.sample(
    make(clean, 0.3, every=9)(half), jax.random.key(0), (2,), jnp.asarray(grid), jg.Euler(), target, x_init=x
  )
  gradient = target - 0.5 * x
  for sigma, below in itertools.pairwise(grid):
    if make is jg.reconstruction:
      change = 0.3 * sigma**2 * 0.5 * gradient * weight(2.0) / weight(sigma)
    else:
      change = 0.3 * gradient
    x0 = 0.5 * x + change
    x = x0 + below / sigma * (x - x0)
  np.testing.assert_allclose(got[0], x, rtol=1e-12)


# --- what is computed -------------------------------------------------------------------------------


SEEN = []


def _watched(log_prob, x, sigma, cond):
  jax.debug.callback(lambda sigma, x: SEEN.append(round(float(sigma), 4)), sigma, x)  # once for each example
  return log_prob(x, sigma, cond)


LEVELS = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


def levels_of_gradients(make, solver, levels=LEVELS):
  """The levels at which a gradient is computed in a batch of four, and how often."""
  ring = jg.ring(4)
  guidance, solver = (part(Partial(_watched, ring.log_prob)) if callable(part) else part for part in (make, solver))
  options = dict(shape=(2,), sigmas=np.array([*levels, 0.0]), solver=solver, devices=jax.devices()[:1])
  SEEN.clear()
  jg.sample_batch(guidance(ring.denoiser), jax.random.key(0), np.arange(4), **options)
  jax.effects_barrier()
  return sorted(set(SEEN), reverse=True), len(SEEN)


def classifier(**options):
  return lambda log_prob: jg.chain(jg.unconditional(4), jg.classifier(log_prob, 2.0, **options))


@pytest.mark.parametrize("solver", [jg.Euler(), jg.DDIM(1.0), jg.DDPM(), jg.DPMpp2M(), jg.UniPC()], ids=repr)
def test_gradients_are_computed_in_every_nth_step_only(solver):
  # Four examples in one batch on one device. A select in place of a branch would compute the gradient in every step.
  assert levels_of_gradients(classifier(every=2), solver) == ([8.0, 2.0, 0.5], 4 * 3)
  if isinstance(solver, jg.Euler):  # A solver does not know n.
    assert levels_of_gradients(classifier(every=4), solver) == ([8.0, 0.5], 4 * 2)
    assert levels_of_gradients(classifier(every=1), solver) == (LEVELS, 4 * 6)


def test_a_mean_shift_computes_its_gradient_in_every_nth_step_only():
  for point, levels in (("x", [8.0, 1.0]), ("mean", [4.0, 0.5])):
    make = lambda log_prob: jg.DDPM(log_prob=log_prob, gradient_at=point, every=3)  # noqa: E731, B023
    assert levels_of_gradients(lambda log_prob: jg.unconditional(4), make) == (levels, 4 * 2)


def test_a_step_with_two_evaluations_computes_both_gradients_or_none():
  found, count = levels_of_gradients(classifier(every=2), jg.Heun())
  # Steps 0, 2 and 4 evaluate at their level and at the next one.
  assert (found, count) == (LEVELS, 4 * 6)
  # The second evaluation, at the level after the step, computes its gradient too; the step after it does not.
  assert levels_of_gradients(classifier(every=3), jg.Heun()) == ([8.0, 4.0, 1.0, 0.5], 4 * 4)


def test_the_first_step_of_an_interval_computes_the_gradient():
  make = lambda log_prob: jg.interval(jg.classifier(log_prob, 2.0, every=2), 0.3, 4.0)  # noqa: E731
  assert levels_of_gradients(make, jg.Euler())[0] == [4.0, 1.0]


def test_a_classifier_is_asked_at_its_own_noise_levels_only():
  seen = []

  def logits(params, x, t):
    jax.debug.callback(lambda _: seen.append(1), x)
    return x[:, :1] * params[None]

  log_prob = jg.ClassifierLogProb(jnp.array([1.0, -1.0]), logits, jg.scaling.edm(1.0), noise_range=(0.4, 4.0))
  grid = jnp.array([*LEVELS, 0.0])
  guided = jg.classifier(log_prob, 2.0, every=3)(jg.ring(2).denoiser)
  for solver in (jg.Euler(), jg.DDPM(log_prob=log_prob, every=3)):
    denoise = guided if isinstance(solver, jg.Euler) else jg.ring(2).denoiser
    seen.clear()
    jax.block_until_ready(jg.sample(denoise, jax.random.key(0), (2,), grid, solver, 1)[0])
    jax.effects_barrier()
    # Levels 4, 2, 1 and 0.5 are in the range: the gradient is computed at 4 and at 0.5.
    assert len(seen) == 2


def test_outside_a_classifiers_range_the_kept_gradient_is_not_used():
  log_prob = jg.ClassifierLogProb(
    jnp.array([1.0, -1.0]), lambda params, x, t: x[:, :1] * params[None], jg.scaling.edm(1.0), noise_range=(0.4, 4.0)
  )
  guided, bare = jg.classifier(log_prob, 2.0, every=9)(jg.ring(2).denoiser), jg.ring(2).denoiser
  xs, x0s = jg.sample(
    guided, jax.random.key(0), (2,), jnp.array([*LEVELS, 0.0]), jg.Euler(), 1, collect=lambda state: (state.x, state.x0)
  )[1]
  for step, acts in ((4, True), (5, False)):
    same = np.allclose(x0s[step], bare(xs[step - 1], jnp.asarray(LEVELS[step]), 1), atol=1e-6)
    assert same != acts
  given = jg.given("a", log_prob)
  assert [bool(given.acts_at(jnp.asarray(level))) for level in LEVELS] == [0.4 <= level <= 4 for level in LEVELS]


def test_every_1_is_the_guidance_without_it(random_mixture):
  mixture = random_mixture(0, (2,))
  for make in (jg.classifier, jg.reconstruction, jg.backward_guidance):
    with_it, without = make(mixture.log_prob, 2.0, every=1), make(mixture.log_prob, 2.0)
    assert jax.tree.structure(with_it) == jax.tree.structure(without)
  assert jax.tree.structure(jg.DDPM(every=1)) == jax.tree.structure(jg.DDPM())
  assert type(jg.DDPM(log_prob=mixture.log_prob).init(jnp.zeros(2))) is jg.solvers.MultistepState


# --- bad values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [0, -1, True, 1.5, 2.0, "2", None, np.nan, [2]])
def test_every_is_a_whole_number_of_at_least_1(every):
  # The tests check annotations as well, which other types do not pass.
  whole = isinstance(every, int)
  error, message = (ValueError, "every must be a whole number of at least 1") if whole else (TypeError, "annotations")
  log_prob = jg.ring(3).log_prob
  for make in (
    lambda: jg.classifier(log_prob, 1.0, every),
    lambda: jg.reconstruction(log_prob, 1.0, every),
    lambda: jg.backward_guidance(log_prob, 1.0, 1, every),
    lambda: jg.DDPM(log_prob=log_prob, every=every),
  ):
    with pytest.raises(error, match=message):
      make()


@pytest.mark.parametrize("text", ["1.5", "two", "nan"])
def test_every_in_a_text_is_a_whole_number(text):
  for name in ("classifier", "reconstruction", "backward"):
    with pytest.raises(ValueError, match=f"every of '{name}' must be a whole number, got '{text}'"):
      GuidanceSpec.parse(f"{name}:every={text}")
  with pytest.raises(ValueError, match="'cfg' has no option 'every'"):
    GuidanceSpec.parse("cfg:every=2")


def test_what_remembers_is_refused_where_it_cannot_be():
  ring = jg.ring(4)
  again = jg.classifier(ring.log_prob, 1.0, every=2)
  grid, key = jg.karras(3), jax.random.key(0)
  with pytest.raises(ValueError, match=r"reuses the gradient of log_prob, and there is none: leave it out"):
    jg.sample(ring.denoiser, key, (2,), grid, jg.DDPM(every=2), 1)
  with pytest.raises(ValueError, match="put it last in the chain"):
    jg.sample(jg.chain(again, jg.classifier_free(4, 2.0))(ring.denoiser), key, (2,), grid, jg.Euler(), 1)
  with pytest.raises(ValueError, match="cannot be inverted"):
    jg.invert(again(ring.denoiser), jnp.zeros(2), grid, cond=1)
  with pytest.raises(ValueError, match="which has no density"):
    jg.sample_product(jg.tempered(again(ring.denoiser), 4, 2.0), key, 4, (2,), grid, jg.DDPM(), 1)
  guided = again(ring.denoiser)
  with pytest.raises(ValueError, match=r"closes over it: wrap the function with jax\.tree_util\.Partial"):
    jg.sample(lambda *args: guided(*args), key, (2,), grid, jg.Euler(), 1)  # noqa: PLW0108
