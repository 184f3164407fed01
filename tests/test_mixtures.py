"""Gaussian mixtures, compared with SciPy's densities, quadrature, Bayes' rule and automatic derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import jaxguide as jg

MEANS, VARIANCES = np.array([-1.0, 0.3, 1.1, 2.0]), np.array([0.1, 0.4, 0.05, 0.2])
WEIGHTS, CLASSES = np.array([0.1, 0.4, 0.3, 0.2]), np.array([0, 1, 0, 2])


@pytest.fixture
def line(float64):
  """Four Gaussians of three classes on a line."""
  return jg.gaussian_mixture(MEANS[:, None], VARIANCES, CLASSES, 5 * WEIGHTS)


def members(cond):
  return np.ones(4, bool) if cond in (None, 3) else cond == CLASSES


def density(x, sigma, cond):
  """``p(x | cond; sigma)`` by SciPy."""
  chosen = members(cond)
  weights = WEIGHTS[chosen] / WEIGHTS[chosen].sum()
  parts = zip(weights, MEANS[chosen], VARIANCES[chosen], strict=True)
  return sum(w * stats.norm.pdf(x, m, np.sqrt(v + sigma**2)) for w, m, v in parts)


@pytest.mark.parametrize("cond", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 5.0])
def test_density_equals_that_of_scipy(line, sigma, cond):
  for x in np.linspace(-3, 4, 5):
    got = line.log_density(jnp.array([x]), jnp.asarray(sigma), cond)
    np.testing.assert_allclose(got, np.log(density(x, sigma, cond)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cond", [None, 0, 2])
@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_denoiser_is_the_posterior_mean_by_quadrature(line, sigma, cond):
  for x in (-1.0, 0.4, 3.0):
    joint = lambda x0: density(x0, 0.0, cond) * stats.norm.pdf(x, x0, sigma)  # noqa: B023, E731
    mass, mean = (
      integrate.quad(lambda x0: x0**n * joint(x0), -9, 9, points=[-1, 0.3, 1.1, 2], limit=200, epsabs=1e-13)[0]  # noqa: B023
      for n in (0, 1)
    )
    np.testing.assert_allclose(line.denoise(jnp.array([x]), jnp.asarray(sigma), cond)[0], mean / mass, rtol=1e-8)


@pytest.mark.parametrize("shape", [(), (3,), (4, 2, 1)])
@pytest.mark.parametrize("sigma", [0.02, 0.7, 40.0])
def test_the_denoiser_follows_from_the_score_by_tweedies_formula(random_mixture, shape, sigma, float64, relative_error):
  mixture = random_mixture(0, shape)
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape) * (1 + sigma))
  for cond in (None, 0, 2):
    score = jax.jit(jax.grad(mixture.log_density))(x, jnp.asarray(sigma), cond)
    assert relative_error(mixture.denoise(x, jnp.asarray(sigma), cond), x + sigma**2 * score) < 1e-12


def test_class_posterior_is_bayes_rule(line):
  prior = np.array([WEIGHTS[members(c)].sum() for c in range(3)])
  for sigma in (0.05, 1.0, 10.0):
    for x in (-1.2, 0.5, 2.0):
      joint = prior * [density(x, sigma, c) for c in range(3)]
      got = [line.class_log_prob(jnp.array([x]), jnp.asarray(sigma), c) for c in range(3)]
      np.testing.assert_allclose(np.exp(got), joint / joint.sum(), rtol=1e-9)
    assert float(line.class_log_prob(jnp.array([0.1]), jnp.asarray(sigma), 3)) == 0


def test_log_prob_far_from_everything_stays_finite():
  ring = jg.ring(8)
  for where in (1e3, 1e6):
    x, sigma = jnp.array([where, -where]), jnp.asarray(0.01)
    assert np.isfinite(ring.denoiser(x, sigma, 3)).all()
    assert np.isfinite(jax.grad(ring.log_prob)(x, sigma, 3)).all()


def test_the_pytrees_equal_the_methods(line):
  x, sigma = jnp.array([0.2]), jnp.asarray(0.4)
  leaves, treedef = jax.tree.flatten((line.denoiser, line.log_prob))
  denoiser, log_prob = jax.tree.unflatten(treedef, leaves)
  np.testing.assert_array_equal(denoiser(x, sigma, 1), line.denoise(x, sigma, 1))
  np.testing.assert_array_equal(log_prob(x, sigma, 1), line.class_log_prob(x, sigma, 1))
  np.testing.assert_array_equal(denoiser(x, sigma, None), denoiser(x, sigma, 3))


@pytest.mark.parametrize("cond", [None, 0, 1])
def test_samples_have_the_mixtures_distribution(line, cond):
  keys = jax.random.split(jax.random.key(0), 5000)
  draws = np.asarray(jax.jit(jax.vmap(lambda key: line.sample(key, cond)))(keys))[:, 0]
  cdf = lambda x: np.interp(x, *_cumulative(cond))  # noqa: E731
  assert stats.kstest(draws, cdf).pvalue > 1e-3
  other = 1 if cond == 0 else 0
  assert stats.kstest(draws, lambda x: np.interp(x, *_cumulative(other))).pvalue < 1e-9


def _cumulative(cond):
  x = np.linspace(-6, 7, 20001)
  return x, integrate.cumulative_trapezoid(density(x, 0.0, cond), x, initial=0)


def test_image_samples_have_the_mixtures_moments(random_mixture, float64):
  mixture = random_mixture(3, (2, 2, 1))
  draw = jax.jit(jax.vmap(lambda key: mixture.sample(key, 2)))
  draws = np.asarray(draw(jax.random.split(jax.random.key(1), 20000)))
  weights = np.exp(mixture.log_weights) * (np.asarray(mixture.classes) == 2)
  weights = (weights / weights.sum()).reshape(-1, 1, 1, 1)
  mean = (weights * mixture.means).sum(0)
  variance = (weights * (mixture.variances + mixture.means**2)).sum(0) - mean**2
  error = np.sqrt(variance / 20000)
  assert (np.abs(draws.mean(0) - mean) < 4.5 * error).all()
  np.testing.assert_allclose(draws.var(0), variance, rtol=0.05)


def test_ring():
  ring = jg.ring(6, radius=2.0, std=0.3)
  angle = np.arange(6) * np.pi / 3
  np.testing.assert_allclose(ring.means, 2 * np.stack([np.cos(angle), np.sin(angle)], 1), atol=1e-6)
  np.testing.assert_allclose(ring.variances, np.full((6, 2), 0.09), rtol=1e-6)
  np.testing.assert_allclose(np.exp(ring.log_weights), np.full(6, 1 / 6), rtol=1e-6)
  assert ring.num_classes == 6


@pytest.mark.parametrize("variances", [0.5, np.full(3, 0.5), np.full((3, 2, 2), 0.5), np.full((1, 2, 2), 0.5)])
def test_variances_broadcast(variances):
  mixture = jg.gaussian_mixture(np.zeros((3, 2, 2)), variances, [0, 1, 2])
  np.testing.assert_array_equal(mixture.variances, np.full((3, 2, 2), 0.5))


def test_variances_with_one_number_each_belong_to_the_components():
  # With three components in three dimensions, shape (3,) is ambiguous.
  mixture = jg.gaussian_mixture(np.zeros((3, 3)), [0.1, 0.2, 0.3], [0, 1, 2])
  np.testing.assert_allclose(mixture.variances[:, 0], [0.1, 0.2, 0.3], rtol=1e-6)
  np.testing.assert_allclose(mixture.variances[1], [0.2] * 3, rtol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"means": np.zeros((0, 2))}, "at least one component"),
    ({"means": 0.5}, "at least one component"),
    ({"classes": [0, 1]}, "shape"),
    ({"classes": [0, 2, 2]}, "no class"),
    ({"classes": [1, 2, 3]}, "no class"),
    ({"classes": [-1, 0, 1]}, "no class"),
    ({"classes": [0.0, 1.0, 2.0]}, "whole numbers"),
    ({"weights": [1.0, 1.0]}, "shape"),
    ({"weights": [1.0, 0.0, 1.0]}, "above 0"),
    ({"weights": [1.0, np.nan, 1.0]}, "above 0"),
    ({"variances": 0.0}, "above 0"),
    ({"variances": [1.0, -1.0, 1.0]}, "above 0"),
    ({"variances": np.inf}, "above 0"),
    ({"variances": np.ones((3, 5))}, "do not fit"),
  ],
)
def test_bad_mixtures_are_refused(change, message):
  args = {"means": np.zeros((3, 2)), "variances": 1.0, "classes": [0, 1, 2], **change}
  # As arrays, because the run-time type checks of the tests refuse a list of floats as labels.
  with pytest.raises(ValueError, match=message):
    jg.gaussian_mixture(**{name: np.asarray(value) for name, value in args.items()})


def test_means_that_are_not_finite_are_refused():
  with pytest.raises(ValueError, match="means"):
    jg.gaussian_mixture(np.array([[0.0], [np.nan]]), 1.0, [0, 1])
