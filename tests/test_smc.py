"""Samples of the tempered density, compared with quadrature and closed forms, with and without the correction."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import integrate, stats

import jaxguide as jg
from jaxguide import smc

GRID = jg.karras(6, 0.05, 20.0)


# A mixture on a line with two classes; class 0 is on both sides of class 1.
MEANS, VARIANCES, WEIGHTS = (-0.5, 0.3, 1.5), (0.3, 0.2, 0.2), (0.35, 0.5, 0.15)


@pytest.fixture
def line():
  return jg.gaussian_mixture(np.array(MEANS)[:, None], VARIANCES, [0, 1, 0], WEIGHTS)


@pytest.fixture
def plane():
  """Two classes in the plane, arranged as a cross."""
  means = np.array([[-1.0, 0.0], [1.0, 0.3], [0.0, 0.8], [0.2, -0.9]])
  return jg.gaussian_mixture(means, [0.2, 0.25, 0.15, 0.3], [0, 0, 1, 1], [0.3, 0.2, 0.3, 0.2])


@functools.partial(jax.jit, static_argnames=("num", "shape"))
def draw(target, key, sigmas, solver, cond=0, *, num, shape, threshold=0.5):
  return jg.sample_product(target, key, num, shape, sigmas, solver, cond, threshold)


@functools.partial(jax.jit, static_argnames=("num", "shape"))
def walk(denoise, key, sigmas, solver, cond=0, *, num, shape):
  return jax.vmap(lambda key: jg.sample(denoise, key, shape, sigmas, solver, cond)[0])(jg.sample_keys(key, num))


# --- exact results --------------------------------------------------------------------------------


def test_the_tempered_density_equals_that_of_scipy(line):
  x = np.linspace(-3, 3, 7)
  density = jax.jit(jax.vmap(line.tempered_log_density, (0, None, None, None)))
  for sigma in (0.0, 0.7):
    left, other, right = (
      w * stats.norm.pdf(x, m, np.sqrt(v + sigma**2)) for m, v, w in zip(MEANS, VARIANCES, WEIGHTS, strict=True)
    )
    for scale in (0.0, 1.0, 3.5):
      wanted = (left + other + right) ** (1 - scale) * ((left + right) / 0.5) ** scale
      np.testing.assert_allclose(density(x[:, None].astype(np.float32), sigma, 0, scale), np.log(wanted), rtol=1e-4)


@pytest.mark.parametrize("powers", [(-1.0, 2.0), (0.3, 0.7), (-2.5, 2.0, 1.5)])
def test_the_rate_follows_from_the_heat_equation(random_mixture, powers, float64):
  mixture, label = random_mixture(0, (3,)), jnp.asarray(1)
  conds = (3, 1, 0)[: len(powers)]
  target = smc.product([jg.unconditional(cond)(mixture.denoiser) for cond in conds], powers)

  def log_target(x, variance):
    return sum(a * mixture.log_density(x, jnp.sqrt(variance), c) for a, c in zip(powers, conds, strict=True))

  @jax.jit
  def derivatives(x, variance):
    score = jax.grad(log_target)(x, variance)
    walked = 0.5 * (jnp.trace(jax.hessian(log_target)(x, variance)) + score @ score)
    return jax.grad(log_target, 1)(x, variance), score, walked

  x = jnp.asarray(np.random.default_rng(0).normal(size=3))
  for sigma in (0.1, 1.0, 10.0):
    moved, score, walked = derivatives(x, sigma**2)
    x0, rate = target.evaluate(x, jnp.asarray(sigma), label)
    # d(σ²) = 2 σ² d(log σ).
    np.testing.assert_allclose(rate / (2 * sigma**2), walked - moved, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(x0, x + sigma**2 * score, rtol=1e-9)


def test_both_kinds_of_guidance_have_the_same_target(random_mixture, float64, relative_error):
  mixture = random_mixture(0, (2, 2, 1))
  x, sigma, scale = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 1))), jnp.asarray(0.7), 3.0
  free = smc.tempered(mixture.denoiser, 3, scale)
  given = smc.tempered_by_classifier(jg.unconditional(3)(mixture.denoiser), mixture.log_prob, scale)
  parts = smc.product((jg.unconditional(3)(mixture.denoiser), mixture.denoiser), (1 - scale, scale))
  for cond in (jnp.asarray(0), jnp.asarray(2)):
    x0 = jax.jit(jg.classifier_free(3, scale)(mixture.denoiser))(x, sigma, cond)
    score, score_null = (jax.jit(jax.grad(mixture.log_density))(x, sigma, c) for c in (cond, jnp.asarray(3)))
    rate = scale * (scale - 1) * sigma**2 * ((score - score_null) ** 2).sum()
    for target in (free, given, parts):
      for got, wanted in zip(jax.jit(target.evaluate)(x, sigma, cond), (x0, rate), strict=True):
        assert relative_error(got, wanted) < 1e-12


def gaussian(parameters, x, sigma, cond):
  """The denoiser of one Gaussian."""
  mean, variance = parameters
  return (variance * x + sigma**2 * mean) / (variance + sigma**2)


@pytest.mark.slow
@pytest.mark.parametrize("solver_name", ["dpmpp_2m_sde", "edm_churn", "dpmpp_2m"])
def test_the_product_of_gaussians_is_a_gaussian(solver_name, all_solvers):
  means, variances, powers = np.array([0.0, 0.8, -0.5]), np.array([1.0, 0.5, 0.6]), np.array([-1.0, 1.2, 0.8])

  def exact(sigma):
    """Mean, variance and logarithm of the integral of the product."""
    noisy = variances + sigma**2
    precision = (powers / noisy).sum()
    mean = (powers * means / noisy).sum() / precision
    exponent = precision * mean**2 - (powers * (means**2 / noisy + np.log(2 * np.pi * noisy))).sum()
    return mean, 1 / precision, 0.5 * (exponent + np.log(2 * np.pi / precision))

  density = lambda x: np.prod(stats.norm.pdf(x, means, variances**0.5) ** powers)  # noqa: E731
  np.testing.assert_allclose(exact(0.0)[2], np.log(integrate.quad(density, -20, 20)[0]), rtol=1e-7)

  target = smc.product([Partial(gaussian, tuple(pair)) for pair in np.stack([means, variances], 1)], powers)
  x, population = draw(
    target, jax.random.key(0), jg.karras(150, 0.02, 80.0), all_solvers[solver_name], num=20000, shape=(1,),
    # Without noise copies stay equal, so the deterministic solver resamples at the end only.
    threshold=0.0 if solver_name == "dpmpp_2m" else 0.5,
  )  # fmt: skip
  mean, variance, log_integral = exact(0.0)
  np.testing.assert_allclose(x.mean(), mean, atol=0.03)
  np.testing.assert_allclose(x.var(), variance, rtol=0.03)
  np.testing.assert_allclose(population.log_normalizer, log_integral - exact(80.0)[2], atol=0.03)


def masses(mixture, scale, edges):
  """The tempered density's mass in each bin, by the midpoint rule on a grid four times as fine."""
  fine = [np.linspace(e[0], e[-1], 4 * (e.size - 1), endpoint=False) + (e[1] - e[0]) / 8 for e in edges]
  points = np.stack(np.meshgrid(*fine, indexing="ij"), -1).reshape(-1, len(edges))
  density = jax.jit(jax.vmap(mixture.tempered_log_density, (0, None, None, None)))
  mass = np.exp(np.asarray(density(jnp.asarray(points), 0.0, 0, scale), float)).reshape([f.size for f in fine])
  for axis in range(len(edges)):
    mass = np.add.reduceat(mass, np.arange(0, mass.shape[axis], 4), axis)
  return mass / mass.sum()


def total_variation(x, mass, edges):
  counts = np.histogramdd(np.asarray(x), edges)[0]
  return 0.5 * (np.abs(counts / len(x) - mass).sum() + 1 - counts.sum() / len(x))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "solver", "steps", "edges"),
  [
    ("line", jg.DPMpp2MSDE(), 80, [np.linspace(-4, 4, 41)]),
    ("plane", jg.DPMpp2MSDE(eta=2.0), 120, [np.linspace(-3, 3, 17)] * 2),
  ],
)
def test_it_samples_the_tempered_density_and_guidance_does_not(name, solver, steps, edges, request):
  mixture, num = request.getfixturevalue(name), 50_000
  at, options = (jax.random.key(0), jg.karras(steps, 0.02, 40.0), solver), {"num": num, "shape": (len(edges),)}
  compiled = draw._cache_size()
  for scale in (2.0, 4.0):
    mass = masses(mixture, scale, edges)
    # The expected total variation of the same number of exact samples.
    assert np.sqrt(mass / (2 * np.pi * num)).sum() < 0.015
    target = jg.tempered(mixture.denoiser, 2, scale)
    x, population = draw(target, *at, **options)
    assert total_variation(x, mass, edges) < 0.03
    assert total_variation(walk(target, *at, **options), mass, edges) > 0.06
    assert population.ess.min() > 0.2 * num
    # Another scale does not compile again.
    assert draw._cache_size() == compiled + 1


# --- the algorithm --------------------------------------------------------------------------------


def test_the_loop_equals_a_loop_in_numpy(line, float64):
  num, grid, key = 32, np.array(jg.karras(8, 0.1, 10.0), float), jax.random.key(3)
  solver, scale, threshold = jg.DDIM(1.0), 3.0, 0.9
  x_ours, population = draw(
    jg.tempered(line.denoiser, 2, scale), key, jnp.asarray(grid), solver, num=num, shape=(1,), threshold=threshold
  )

  # A second implementation: the same random numbers, scores of the densities, weights in σ², trapezoid rule in log σ.
  scores = jax.jit(jax.vmap(jax.grad(line.log_density), (0, None, None)))
  normal = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (1,), float)))
  starts, steps = jax.vmap(jax.random.split, out_axes=1)(jg.sample_keys(key, num))
  x = grid[0] * np.asarray(normal(starts))
  weights, rate, uniform_key, sizes, log_z = np.ones(num), 0.0, jax.random.fold_in(key, np.uint32(2**32 - 1)), [], 0.0

  def chosen(weights, i):
    u = float(jax.random.uniform(jax.random.fold_in(uniform_key, i), (), float))
    return np.searchsorted(np.cumsum(weights / weights.sum()), (np.arange(num) + u) / num, side="right")

  for i, (sigma, sigma_next) in enumerate(itertools.pairwise(grid)):
    bare, given = (np.asarray(scores(jnp.asarray(x), sigma, cond)) for cond in (2, 0))
    rate_last, rate = rate, 0.5 * scale * (scale - 1) * ((given - bare) ** 2).sum(1)
    if i:
      weights = weights * np.exp(
        0.5 * (rate_last * 2 * grid[i - 1] ** 2 + rate * 2 * sigma**2) * np.log(grid[i - 1] / sigma)
      )
      sizes.append(weights.sum() ** 2 / (weights**2).sum())
      if sizes[-1] < threshold * num:
        ancestors = chosen(weights, i)
        x, bare, given, rate = (a[ancestors] for a in (x, bare, given, rate))
        log_z, weights = log_z + np.log(weights.mean()), np.ones(num)
    z = np.asarray(normal(jax.vmap(jax.random.fold_in, (0, None))(steps, i)))
    x0 = x + sigma**2 * (bare + scale * (given - bare))
    up = sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)
    x = x0 + np.sqrt(sigma_next**2 - up**2) * (x - x0) / sigma + up * z
  weights = weights * np.exp(rate * grid[-2] ** 2)
  sizes.append(weights.sum() ** 2 / (weights**2).sum())

  assert x_ours.dtype == population.ess.dtype == jnp.float64
  np.testing.assert_allclose(population.ess, sizes, rtol=1e-9)
  np.testing.assert_array_equal(population.resampled, [*(np.array(sizes[:-1]) < threshold * num), True])
  assert 0 < population.resampled[:-1].sum() < 7
  np.testing.assert_allclose(population.log_normalizer, log_z + np.log(weights.mean()), rtol=1e-9)
  np.testing.assert_allclose(x_ours, x[chosen(weights, 8)], rtol=1e-9)


@pytest.mark.parametrize("solver_name", ["dpmpp_2m_sde", "heun", "edm_churn"])
def test_at_scales_0_and_1_it_is_plain_sampling(line, solver_name, all_solvers):
  solver, options = all_solvers[solver_name], {"num": 100, "shape": (1,)}
  for scale, cond in ((0.0, 2), (1.0, 0)):
    x, population = draw(jg.tempered(line.denoiser, 2, scale), jax.random.key(1), GRID, solver, **options)
    np.testing.assert_array_equal(population.ess, np.full(6, 100.0))
    np.testing.assert_array_equal(population.resampled, [False] * 5 + [True])
    assert population.log_normalizer == 0
    # The particles are also in the same order.
    wanted = walk(line.denoiser, jax.random.key(1), GRID, solver, cond, **options)
    np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=1e-5)


def test_the_effective_sample_size_falls_and_recovers(plane):
  x, population = draw(
    jg.tempered(plane.denoiser, 2, 4.0), jax.random.key(0), jg.karras(40, 0.02, 40.0), jg.DDPM(), num=2000, shape=(2,)
  )
  ess, resampled = np.asarray(population.ess), np.asarray(population.resampled)
  np.testing.assert_array_equal(resampled[:-1], ess[:-1] < 1000)
  assert 1 <= resampled[:-1].sum() <= 5
  after = np.flatnonzero(resampled[:-1])
  assert (ess[after + 1] > ess[after]).all()
  assert (ess >= 1).all()
  assert (ess < 2000 + 0.01).all()
  # The noise has separated the copies again.
  assert len(np.unique(np.asarray(x), axis=0)) > 1500


def test_systematic_resampling_is_unbiased():
  n, weights = 40, np.random.default_rng(0).exponential(size=40) ** 2
  weights[[0, 17, 39]] = 0
  weights /= weights.sum()
  resample = jax.jit(jax.vmap(smc.resample, (0, None)))
  ancestors = np.asarray(resample(jax.random.split(jax.random.key(0), 20000), jnp.log(weights) + 3))
  assert (np.diff(ancestors, axis=1) >= 0).all()
  counts = (ancestors[:, :, None] == np.arange(n)).sum(1)
  assert (counts >= np.floor(n * weights - 1e-4)).all()
  assert (counts <= np.ceil(n * weights + 1e-4)).all()
  # The standard error is 0.5 / sqrt(20000) at most.
  np.testing.assert_allclose(counts.mean(0), n * weights, atol=0.02)


@pytest.mark.parametrize("num", [1, 7, 50_000])
def test_equal_weights_give_each_particle_one_copy(num):
  for log_weight in (0.0, -300.0, 5.3):
    for seed in range(20):
      ancestors = smc.resample(jax.random.key(seed), jnp.full(num, log_weight))
      np.testing.assert_array_equal(ancestors, np.arange(num))


def test_weights_beyond_the_range_of_exp():
  # exp of these numbers overflows or underflows.
  log_weights = jnp.array([-5000.0, 3000.0, 3000.0, -jnp.inf])
  np.testing.assert_array_equal(smc.resample(jax.random.key(0), log_weights), [1, 1, 2, 2])
  np.testing.assert_allclose(smc.effective_sample_size(log_weights), 2)
  np.testing.assert_allclose(smc.log_mean_exp(log_weights), 3000 - np.log(2))


# --- cost, memory, batches and errors -------------------------------------------------------------


def network(weights, x, sigma, cond):
  return jnp.tanh(weights @ (x / (1 + sigma) + 0.1 * jnp.asarray(cond, x.dtype)))


def test_it_costs_no_more_than_guidance():
  denoise = Partial(network, 0.1 * jax.random.normal(jax.random.key(0), (128, 128)))
  target, options = jg.tempered(denoise, 0, 2.0), {"num": 4, "shape": (128,)}
  args = jax.random.key(0), GRID, jg.DPMpp2MSDE(), 1
  ours, plain = (
    function.lower(guided, *args, **options).compile().cost_analysis()["flops"]
    for function, guided in ((draw, target), (walk, jg.classifier_free(0, 2.0)(denoise)))
  )
  np.testing.assert_allclose(ours / plain, 1, rtol=0.05)


def test_memory_does_not_grow_with_the_steps(line):
  def temporary(steps):
    program = draw.lower(
      jg.tempered(line.denoiser, 2, 2.0), jax.random.key(0), jg.karras(steps), jg.DDPM(), num=200, shape=(4,)
    ).compile()
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

  # Only the grid and the record of the weights grow with the steps. The particles would take 3,200 bytes a step.
  assert temporary(500) - temporary(10) < 490 * 40


def test_vmap_over_conditions_and_powers(random_mixture, no_rank_promotion):
  mixture = random_mixture(0, (2, 1))

  def one(key, scale, label):
    target = jg.tempered(mixture.denoiser, 3, scale)
    return jg.sample_product(target, key, 16, (2, 1), GRID, jg.DPMpp2MSDE(), label)

  args = jg.sample_keys(jax.random.key(0), 3), jnp.array([0.5, 2.0, 4.0]), jnp.array([0, 1, 2])
  x, population = jax.jit(jax.vmap(one))(*args)
  assert x.shape == (3, 16, 2, 1)
  assert population.ess.shape == population.resampled.shape == (3, 6)
  alone = jax.jit(one)
  for i in range(3):
    x_alone, population_alone = alone(*(a[i] for a in args))
    np.testing.assert_allclose(x[i], x_alone, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(population.ess[i], population_alone.ess, rtol=1e-4)


def test_the_solver_receives_a_learned_variance(line):
  def learned(denoiser, x, sigma, cond):
    return jg.Prediction(denoiser(x, sigma, cond), 0 * x - 0.5)

  denoise, solver, options = Partial(learned, line.denoiser), jg.DDPM("learned_range"), {"num": 16, "shape": (1,)}
  x, _ = draw(jg.tempered(denoise, 2, 1.0), jax.random.key(1), GRID, solver, **options)
  np.testing.assert_allclose(x, walk(denoise, jax.random.key(1), GRID, solver, **options), rtol=1e-4, atol=1e-5)


def test_particles_have_the_type_of_the_levels(line, float64):
  grid = GRID.astype(jnp.float32)
  x, population = draw(jg.tempered(line.denoiser, 2, 2.0), jax.random.key(1), grid, jg.DDPM(), num=8, shape=(1,))
  assert x.dtype == population.ess.dtype == population.log_normalizer.dtype == jnp.float32


def test_particles_are_nan_if_a_weight_is_not_finite(line):
  def broken(denoiser, x, sigma, cond):
    # NaN for some particles at one level.
    return jnp.where((x > 1) & (sigma < 5) & (sigma > 1), jnp.nan, denoiser(x, sigma, cond))

  target = jg.tempered(Partial(broken, line.denoiser), 2, 2.0)
  x, population = draw(target, jax.random.key(1), GRID, jg.DDPM(), num=50, shape=(1,))
  assert np.isnan(x).all()
  assert np.isnan(population.log_normalizer)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"num_particles": 0}, "num_particles must be a whole number of at least 1"),
    ({"threshold": 1.5}, "threshold must be between 0 and 1"),
    ({"sigmas": np.array([1.0, 2.0, 0.0])}, "sigmas must decrease"),
    ({"cond": 5}, "is not one of the 2 classes"),
    ({"solver": jg.DDPM(log_prob=jg.ring(2).log_prob)}, "the solver's own classifier"),
  ],
)
def test_bad_arguments_are_refused(line, change, message):
  given = {"num_particles": 4, "sigmas": GRID, "solver": jg.DDPM(), "cond": 0, "shape": (1,), **change}
  with pytest.raises(ValueError, match=message):
    jg.sample_product(jg.tempered(line.denoiser, 2, 2.0), jax.random.key(0), **given)


def test_bad_powers_are_refused():
  one = lambda x, sigma, cond: x  # noqa: E731
  with pytest.raises(ValueError, match="one power for each denoiser, got 1 for 2"):
    smc.product((one, one), (1.0,))
  with pytest.raises(ValueError, match="one power for each"):
    smc.product((), ())
  with pytest.raises(ValueError, match="powers must have the sum 1"):
    smc.product((one, one), (1.0, 2.0))
  for make in (lambda a: smc.product((one, one), (1 - a, a)), lambda a: jg.tempered(one, 0, a)):
    with pytest.raises(ValueError, match="must be finite"):
      make(np.nan)


@pytest.mark.parametrize(
  ("make", "error", "message"),
  [
    (lambda ring: (smc.tempered(ring.denoiser, 9, 2.0), jg.DDPM()), ValueError, "label 9 is not one of the 4 classes"),
    (lambda ring: (smc.tempered(ring.denoiser, 4, 2.0), jg.DPMpp2MSDE(s_noise=1.5)), ValueError, "s_noise must be 1"),
    (lambda ring: (jg.classifier_free(4, 2.0)(ring.denoiser), jg.DDPM()), TypeError, "target"),
  ],
)
def test_bad_targets_and_solvers_are_refused(make, error, message):
  target, solver = make(jg.ring(4))
  with pytest.raises(error, match=message):
    smc.sample_product(target, jax.random.key(0), 10, (2,), jg.karras(3), solver, cond=1)
