"""Guidance by gradients and clipping of x0, compared with exact posteriors and the papers' formulas in NumPy."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxguide as jg

SIGMAS = [0.05, 0.7, 6.0, 60.0]


class Mixture:
  """A mixture in NumPy: the denoised example, its Jacobian, and the gradient of the class log-probability."""

  def __init__(self, mixture):
    self.means, self.variances = (np.asarray(a).reshape(len(a), -1) for a in (mixture.means, mixture.variances))
    self.weights, self.classes = np.exp(mixture.log_weights), np.asarray(mixture.classes)

  def parts(self, x, sigma, label=None):
    """The components' posterior probabilities and the gradients of their log-densities."""
    chosen = np.ones(len(self.means), bool) if label is None else self.classes == label
    variance = self.variances + sigma**2
    log = np.log(self.weights) - 0.5 * ((x - self.means) ** 2 / variance + np.log(variance)).sum(1)
    share = np.where(chosen, np.exp(log - log[chosen].max()), 0)
    return share / share.sum(), (self.means - x) / variance

  def denoise(self, x, sigma, label=None):
    share, gradient = self.parts(x, sigma, label)
    return x + sigma**2 * share @ gradient

  def jacobian(self, x, sigma, label=None):
    """``I + σ² ∇∇ log p``: the Hessian of the logarithm of a sum."""
    share, gradient = self.parts(x, sigma, label)
    mean = share @ gradient
    hessian = np.einsum("k,ki,kj->ij", share, gradient, gradient) - np.outer(mean, mean)
    hessian -= np.diag(share @ (1 / (self.variances + sigma**2)))
    return np.eye(len(x)) + sigma**2 * hessian

  def class_gradient(self, x0, label):
    """``∇ log p(label | x0)`` of a clean example."""
    (share, gradient), (overall, _) = self.parts(x0, 0.0, label), self.parts(x0, 0.0)
    return share @ gradient - overall @ gradient


def noisy(seed, shape, sigma):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * np.sqrt(1 + sigma**2))


@pytest.fixture
def mixture(random_mixture, float64, no_rank_promotion):
  return random_mixture(0, (3,))


def gaussian(seed, size):
  """A Gaussian with a full covariance, and its denoiser."""
  rng = np.random.default_rng(seed)
  mean, factor = rng.normal(size=size), rng.normal(size=(size, size))
  covariance = factor @ factor.T / size + 0.1 * np.eye(size)

  def denoise(x, sigma, cond):
    return mean + covariance @ jnp.linalg.solve(covariance + sigma**2 * jnp.eye(size), x - mean)

  return mean, covariance, denoise


def posterior_mean(mean, covariance, x, sigma, matrix, y, std):
  """``E[x0 | x, y]`` for a Gaussian prior, ``x = x0 + σ eps`` and ``y = matrix x0 + std eps``."""
  size = len(mean)
  stacked = np.concatenate([np.eye(size), matrix])
  noise = np.concatenate([np.full(size, sigma**2), np.broadcast_to(np.square(std), len(y))])
  gain = covariance @ stacked.T @ np.linalg.inv(stacked @ covariance @ stacked.T + np.diag(noise))
  return mean + gain @ (np.concatenate([x, y]) - stacked @ mean)


# --- reconstruction ---------------------------------------------------------------------------------


def test_reconstruction_with_the_posteriors_covariance_is_exact(float64, relative_error):
  mean, covariance, denoise = gaussian(0, 4)
  rng = np.random.default_rng(1)
  matrix, y, std = rng.normal(size=(2, 4)), rng.normal(size=2), 0.3

  def log_prob(x0, sigma, y):
    inner = jnp.linalg.inv(np.linalg.inv(covariance) + np.eye(4) / sigma**2)
    off = y - matrix @ x0
    return -0.5 * off @ jnp.linalg.solve(matrix @ inner @ matrix.T + std**2 * np.eye(2), off)

  guided = jax.jit(jg.reconstruction(log_prob, 1.0)(denoise))
  for sigma in SIGMAS:
    x = rng.normal(size=4) * np.hypot(1, sigma)
    wanted = posterior_mean(mean, covariance, x, sigma, matrix, y, std)
    assert relative_error(guided(x, sigma, y), wanted) < 1e-12
    assert relative_error(denoise(x, sigma, None), wanted) > 1e-3


@pytest.mark.parametrize("operator", ["inpainting", "mean"])
def test_a_measurement_with_the_exact_spread_is_exact(operator, float64, relative_error):
  rng = np.random.default_rng(2)
  mean, std = rng.normal(size=6), 0.2
  if operator == "inpainting":  # unequal variances, unequal noise
    variance, std, mask = rng.uniform(0.2, 2.0, size=6), rng.uniform(0.1, 0.4, size=6), np.array([1.0, 0, 0, 1, 1, 0])
    measure, matrix = Partial(jnp.multiply, jnp.asarray(mask, float)), np.diag(mask)
    spread = lambda sigma: mask * sigma * jnp.sqrt(variance / (variance + sigma**2))  # noqa: E731
  else:  # pairs, as in super-resolution
    variance, measure, matrix = np.full(6, 0.8), lambda x0: x0.reshape(3, 2).mean(1), np.kron(np.eye(3), [[0.5, 0.5]])
    spread = lambda sigma: sigma * jnp.sqrt(0.8 / (0.8 + sigma**2) / 2)  # noqa: E731
  y = matrix @ rng.normal(size=6)
  denoise = lambda x, sigma, cond: mean + variance / (variance + sigma**2) * (x - mean)  # noqa: E731
  # With spread 0 the result differs if the spread is large relative to the noise.
  exact, point = (
    jax.jit(jg.reconstruction(jg.measurement(measure, std, spread), 1.0)(denoise)) for spread in (spread, 0.0)
  )
  for sigma in SIGMAS:
    x = rng.normal(size=6) * np.hypot(1, sigma)
    wanted = posterior_mean(mean, np.diag(variance), x, sigma, matrix, y, std)
    assert relative_error(exact(x, sigma, y), wanted) < 1e-12
    assert relative_error(point(x, sigma, y), wanted) > 1e-4


def test_reconstruction_is_forward_universal_guidance(mixture, clean, relative_error):
  label, scale, model = 1, 1.7, Mixture(mixture)
  guided = jax.jit(jg.chain(jg.unconditional(3), jg.reconstruction(clean(mixture), scale))(mixture.denoiser))
  for sigma in SIGMAS:
    x = np.asarray(noisy(0, 3, sigma))
    # Bansal et al., arXiv:2302.07121, eq. 3 and 6, in their variables: z_t = sqrt(α) z_0 + sqrt(1 - α) ε, the
    # loss -log p(label | ẑ_0), and s(t) = scale · sqrt(1 - α).
    alpha = 1 / (1 + sigma**2)
    z = np.sqrt(alpha) * x
    eps = (z - np.sqrt(alpha) * model.denoise(x, sigma)) / np.sqrt(1 - alpha)
    z_0 = (z - np.sqrt(1 - alpha) * eps) / np.sqrt(alpha)
    # By the chain rule, since ẑ_0 is a function of x = z / sqrt(α).
    gradient = -model.jacobian(x, sigma).T @ model.class_gradient(z_0, label) / np.sqrt(alpha)
    eps += scale * np.sqrt(1 - alpha) * gradient
    wanted = (z - np.sqrt(1 - alpha) * eps) / np.sqrt(alpha)
    assert relative_error(guided(x, sigma, label), wanted) < 1e-12


def test_reconstruction_with_sigma_as_spread_is_that_of_video_diffusion_models(mixture, relative_error):
  rng, weight, model = np.random.default_rng(13), 2.0, Mixture(mixture)
  matrix, known = rng.normal(size=(2, 3)), rng.normal(size=2)
  log_prob = jg.measurement(Partial(jnp.matmul, jnp.asarray(matrix)), 1e-9, lambda sigma: sigma)
  guided = jax.jit(jg.chain(jg.unconditional(None), jg.reconstruction(log_prob, weight))(mixture.denoiser))
  for sigma in SIGMAS:
    # Ho et al., arXiv:2204.03458, eq. 8, in their variables: z_t = α x + σ_t ε.
    x, alpha = np.asarray(noisy(13, 3, sigma)), 1 / np.hypot(1, sigma)
    off = known - matrix @ model.denoise(x, sigma)
    gradient = -2 * model.jacobian(x, sigma).T @ matrix.T @ off / alpha  # of ‖known - reconstructed‖², in z_t
    wanted = model.denoise(x, sigma) - weight * alpha / 2 * gradient
    assert relative_error(guided(x, sigma, known), wanted) < 1e-12


@pytest.mark.parametrize(("eta", "solver"), [(1.0, jg.DDPM()), (1.0, jg.DDIM(1.0)), (0.0, jg.DDIM(0.0))])
def test_dps_is_its_algorithm_1(eta, solver, mixture, given_noise, relative_error):
  rng = np.random.default_rng(3)
  matrix, y, zeta = rng.normal(size=(2, 3)), rng.normal(size=2), 0.35
  sigmas = np.array([20.0, 8.0, 3.0, 1.0, 0.4, 0.1, 0.0])
  noise, model = rng.normal(size=(6, 3)), Mixture(mixture)

  # Chung et al., arXiv:2209.14687, Algorithm 1, in its variables; step sizes ζ / ‖y - A x̂_0‖.
  bars = 1 / (1 + sigmas**2)  # ᾱ_i of the step's start, ᾱ_{i-1} of its end
  x_i, wanted = np.sqrt(bars[0]) * rng.normal(size=3) * sigmas[0], []
  start = x_i / np.sqrt(bars[0])
  for bar, after, z in zip(bars[:-1], bars[1:], noise, strict=True):
    x, sigma = x_i / np.sqrt(bar), np.sqrt(1 / bar - 1)
    score = (model.denoise(x, sigma) - x) / sigma**2 / np.sqrt(bar)
    x_0 = (x_i + (1 - bar) * score) / np.sqrt(bar)
    alpha = bar / after
    if eta == 1:
      x_next = np.sqrt(alpha) * (1 - after) / (1 - bar) * x_i + np.sqrt(after) * (1 - alpha) / (1 - bar) * x_0
      x_next += np.sqrt((1 - after) / (1 - bar) * (1 - alpha)) * z
    else:  # a step of DDIM instead of DDPM
      x_next = np.sqrt(after) * x_0 + np.sqrt(1 - after) * (x_i - np.sqrt(bar) * x_0) / np.sqrt(1 - bar)
    off = y - matrix @ x_0
    gradient = -2 * model.jacobian(x, sigma).T @ matrix.T @ off / np.sqrt(bar)  # of ‖y - A x̂_0‖²
    x_i = x_next - zeta / np.linalg.norm(off) * gradient
    wanted.append(x_i / np.sqrt(after))

  operator = Partial(jnp.matmul, jnp.asarray(matrix))
  # zeta is the paper's ζ'. The gradient of a square divided by its root is twice the gradient of the root.
  guidance = jg.reconstruction(jg.distance(operator), jg.scales.dps(2 * zeta, sigmas, eta))
  guided = jg.chain(jg.unconditional(None), guidance)(mixture.denoiser)
  step = jax.jit(lambda *args: solver.step(lambda x, sigma: guided(x, sigma, jnp.asarray(y)), *args))
  state = solver.init(jnp.asarray(start))
  for i, z in enumerate(noise):
    state = step(state, jnp.asarray(sigmas[i]), jnp.asarray(sigmas[i + 1]), jnp.asarray(z))
    assert relative_error(state.x, wanted[i]) < 1e-11, i


def test_the_network_runs_once_forwards(float64):
  seen = []

  def watched(x, sigma, cond):
    jax.debug.callback(lambda _: seen.append("network"), x)
    return jnp.tanh(x)

  for guidance in (
    jg.reconstruction(lambda x0, sigma, cond: jnp.sum(x0), 1.0),
    jg.backward_guidance(lambda x0, sigma, cond: jnp.sum(x0), 0.1, steps=3),
  ):
    seen.clear()
    jax.jit(guidance(watched))(jnp.ones(2), jnp.asarray(1.0), 0).block_until_ready()
    jax.effects_barrier()
    assert seen == ["network"]


def test_reconstruction_with_a_learned_variance():
  # The learned variance does not change and is not part of the gradient.
  denoise = lambda x, sigma, cond: jg.Prediction(0.5 * x, 100 * x)  # noqa: E731
  guided = jg.reconstruction(lambda x0, sigma, cond: jnp.sum(x0), 2.0)(denoise)
  prediction = guided(jnp.ones(2), jnp.asarray(3.0), None)
  np.testing.assert_allclose(prediction.x0, 0.5 + 2 * 9 * 0.5)
  np.testing.assert_array_equal(prediction.variance, 100)


# --- measurements -----------------------------------------------------------------------------------


def test_a_measurement_is_a_density(float64):
  rng = np.random.default_rng(4)
  x0, y, std = rng.normal(size=(2, 2, 1)), rng.normal(size=2), rng.uniform(0.1, 1.0, size=2)
  log_prob = jg.measurement(lambda x0: (x0**2).sum((1, 2)), std, lambda sigma: 0.5 * sigma)
  variance = std**2 + 0.25 * 0.8**2
  wanted = np.sum(-0.5 * (y - (x0**2).sum((1, 2))) ** 2 / variance - 0.5 * np.log(2 * np.pi * variance))
  np.testing.assert_allclose(log_prob(jnp.asarray(x0), jnp.asarray(0.8), jnp.asarray(y)), wanted, rtol=1e-13)


def test_the_distance_has_a_gradient_at_0(float64):
  log_prob, y = jg.distance(lambda x0: 2 * x0), jnp.array([2.0, 4.0])
  np.testing.assert_array_equal(jax.grad(log_prob)(y / 2, jnp.asarray(1.0), y), 0)
  x0 = jnp.array([1.0, 3.0])  # the second number of the residual is 2
  np.testing.assert_allclose(jax.grad(log_prob)(x0, jnp.asarray(1.0), y), [0.0, -2.0])
  np.testing.assert_array_equal(jax.jit(jax.hessian(log_prob))(y / 2, jnp.asarray(1.0), y), 0)


def counts_near_means(xs, model):
  """The number of samples within three and a half standard deviations of each mean."""
  far = np.linalg.norm(xs[:, None] - np.asarray(model.means), axis=-1)
  return np.bincount(far.argmin(1)[far.min(1) < 0.35], minlength=len(model.means))


def test_inpainting_samples_the_modes_that_fit_the_measurement():
  ring, known = jg.ring(8), Partial(jnp.multiply, jnp.array([1.0, 0.0]))
  grid = jg.karras(40)
  options = dict(shape=(2,), sigmas=grid, solver=jg.DDIM(1.0))
  # One measurement for each sample: it fits the modes at the top and the bottom, or those at the right.
  ys = jnp.repeat(jnp.array([[0.0, 0.0], [1.0, 0.0]]), 64, 0)
  for guidance in (
    jg.reconstruction(jg.measurement(known, 0.1), 1.0),
    jg.reconstruction(jg.distance(known), jg.scales.dps(0.4, grid)),
  ):
    guided = jg.chain(jg.unconditional(None), guidance)(ring.denoiser)
    xs = jg.sample_batch(guided, jax.random.key(0), ys, **options)
    first, second = counts_near_means(xs[:64], ring), counts_near_means(xs[64:], ring)
    assert first[2] + first[6] >= 54
    assert min(first[2], first[6]) >= 16
    assert second[0] + second[1] + second[7] >= 48
    # The unguided model samples all modes.
    assert counts_near_means(jg.sample_batch(ring.denoiser, jax.random.key(0), 8, num=64, **options), ring).max() < 20


def test_a_label_and_a_measurement():
  ring, known = jg.ring(8), Partial(jnp.multiply, jnp.array([1.0, 0.0]))
  guided = jg.reconstruction(jg.given("y", jg.measurement(known, 0.2)), 1.0)(jg.given("label", ring.denoiser))
  cond = {"label": jnp.arange(16) % 8, "y": ring.means[jnp.arange(16) % 8] * jnp.array([[1.0, 0.0]])}
  options = dict(shape=(2,), sigmas=jg.karras(40), solver=jg.DDIM(1.0))
  xs = jg.sample_batch(guided, jax.random.key(0), cond, **options)
  assert np.linalg.norm(xs - np.asarray(ring.means)[np.arange(16) % 8], axis=1).max() < 0.4
  # The label inside the dictionary is checked.
  with pytest.raises(ValueError, match="label 9 is not one of"):
    jg.sample_batch(guided, jax.random.key(0), {**cond, "label": jnp.full(16, 9)}, **options)


def test_classifier_free_guidance_with_one_part_of_the_condition(mixture):
  x, at = noisy(5, 3, 0.7), jnp.asarray(0.7)
  inside = jg.classifier_free(3, 2.5)(mixture.denoiser)
  cond = {"label": jnp.asarray(1), "y": jnp.zeros(3)}
  np.testing.assert_array_equal(jg.given("label", inside)(x, at, cond), inside(x, at, jnp.asarray(1)))


def test_an_unconditional_denoiser_does_not_check_the_condition():
  ring = jg.ring(3)
  options = dict(shape=(2,), sigmas=jg.karras(3), solver=jg.Euler())
  guidance = jg.backward_guidance(jg.measurement(lambda x0: x0[0], 0.5), 0.01)
  for null in (None, 3):
    guided = jg.chain(jg.unconditional(null), guidance)(ring.denoiser)
    assert jg.sample_batch(guided, jax.random.key(0), jnp.full(2, 0.5), **options).shape == (2, 2)
  with pytest.raises(ValueError, match="label 4 is not one of"):
    jg.sample_batch(jg.chain(jg.unconditional(4), guidance)(ring.denoiser), jax.random.key(0), jnp.ones(2), **options)


@pytest.mark.parametrize(("cond", "message"), [({"label": 1}, "has 'label'"), (3, "is not a dictionary")])
def test_a_missing_part_of_the_condition_is_an_error(cond, message):
  with pytest.raises(ValueError, match=f"must be a dictionary with 'y', but it {message}"):
    jg.given("y", lambda x, sigma, cond: x)(jnp.ones(2), jnp.asarray(1.0), cond)


def test_a_measurement_of_another_shape_is_an_error():
  for log_prob in (jg.measurement(lambda x0: x0[:1], 0.1), jg.distance(lambda x0: x0[:1])):
    with pytest.raises(ValueError, match=r"gives shape \(1,\), but the measurement has shape \(2,\)"):
      log_prob(jnp.ones(2), jnp.asarray(1.0), jnp.ones(2))


# --- backward guidance ------------------------------------------------------------------------------


def test_backward_guidance_is_the_papers_equations(mixture, clean, relative_error):
  label, steps, rate, model = 2, 4, 0.05, Mixture(mixture)
  guided = jax.jit(jg.chain(jg.unconditional(3), jg.backward_guidance(clean(mixture), rate, steps))(mixture.denoiser))
  for sigma in SIGMAS:
    # Bansal et al., arXiv:2302.07121, eq. 7 by gradient descent from 0, and eq. 9.
    x, alpha = np.asarray(noisy(6, 3, sigma)), 1 / (1 + sigma**2)
    z, z_0, change = np.sqrt(alpha) * x, model.denoise(x, sigma), np.zeros(3)
    for _ in range(steps):
      change -= rate * -model.class_gradient(z_0 + change, label)
    eps = (z - np.sqrt(alpha) * z_0) / np.sqrt(1 - alpha) - np.sqrt(alpha / (1 - alpha)) * change
    wanted = (z - np.sqrt(1 - alpha) * eps) / np.sqrt(alpha)
    assert relative_error(guided(x, sigma, label), wanted) < 1e-12
    assert np.abs(change).max() > 1e-6


def test_backward_guidance_moves_to_the_measurement(float64):
  # A step of size std² reaches the measurement.
  guidance = jg.backward_guidance(jg.measurement(lambda x0: x0, 0.5), 0.25, steps=1)
  y = jnp.array([1.0, -2.0])
  np.testing.assert_allclose(guidance(lambda x, sigma, cond: x)(jnp.zeros(2), jnp.asarray(1.0), y), y, rtol=1e-14)


# --- normalized -------------------------------------------------------------------------------------


def test_normalized_classifier_guidance_is_norm_based_guidance(mixture, relative_error):
  label, model = 1, Mixture(mixture)

  @jax.jit
  def guided(scale, ratio, *args):
    guidance = jg.normalized(jg.classifier(mixture.log_prob, scale), ratio)
    return jg.chain(jg.unconditional(3), guidance)(mixture.denoiser)(*args)

  for sigma in SIGMAS:
    x = np.asarray(noisy(7, 3, sigma))
    # Kim et al., arXiv:2111.11755, in scores: s + ratio · ‖s‖ / ‖g‖ · g.
    (own, gradients), (overall, _) = model.parts(x, sigma, label), model.parts(x, sigma)
    score, gradient = overall @ gradients, own @ gradients - overall @ gradients
    score = score + 0.3 * np.linalg.norm(score) / np.linalg.norm(gradient) * gradient
    wanted = x + sigma**2 * score
    # Only the sign of the scale inside matters; a small scale has a larger rounding error.
    for scale, ratio, tolerance in ((1.0, 0.3, 1e-9), (1e4, 0.3, 1e-12), (-1e4, -0.3, 1e-12)):
      assert relative_error(guided(scale, ratio, x, jnp.asarray(sigma), label), wanted) < tolerance


@pytest.mark.parametrize(
  "inside",
  [
    lambda log_prob: jg.classifier_free(3, 4.0),
    lambda log_prob: jg.reconstruction(log_prob, 2.0),
    lambda log_prob: jg.chain(jg.classifier_free(3, 2.0), jg.clip_x0(0.1)),
  ],
)
def test_normalized_wraps_any_guidance(inside, mixture, clean):
  args, guidance = (noisy(8, 3, 0.7), jnp.asarray(0.7), jnp.asarray(1)), inside(clean(mixture))
  base, full = mixture.denoiser(*args), guidance(mixture.denoiser)(*args)
  change = jg.normalized(guidance, 0.2)(mixture.denoiser)(*args) - base
  np.testing.assert_allclose(jnp.linalg.norm(change), 0.2 * jnp.linalg.norm(args[0] - base), rtol=1e-12)
  np.testing.assert_allclose(change / jnp.linalg.norm(change), (full - base) / jnp.linalg.norm(full - base), rtol=1e-9)


def test_normalized_has_finite_derivatives_without_change_or_noise(float64):
  null = jg.classifier(lambda x, sigma, cond: 0.0 * jnp.sum(x), 1.0)
  push = jg.classifier(lambda x, sigma, cond: jnp.sum(x), 1.0)
  half, same = (lambda x, sigma, cond: 0.5 * x), (lambda x, sigma, cond: x)
  at = jnp.asarray(1.0), None
  for guidance, denoise in ((null, half), (push, same), (null, same)):
    guided = jg.normalized(guidance, 0.3)(denoise)
    derivatives = jax.jit(lambda x, f=guided: (f(x, *at), jax.jacfwd(f)(x, *at), jax.jacfwd(jax.jacrev(f))(x, *at)))
    value, jacobian, hessian = derivatives(jnp.ones(2))
    np.testing.assert_array_equal(value, denoise(jnp.ones(2), *at))
    np.testing.assert_array_equal(jacobian, denoise(jnp.eye(2), *at))
    np.testing.assert_array_equal(hessian, 0)


def test_normalized_does_not_underflow():
  # In float32 the square of 1e-30 is 0.
  tiny = jg.classifier(lambda x, sigma, cond: 1e-30 * jnp.sum(x), 1.0)
  guided = jg.normalized(tiny, 0.5)(lambda x, sigma, cond: 0 * x)
  np.testing.assert_allclose(guided(jnp.array([3.0, 4.0]), jnp.asarray(1.0), None), 2.5 / np.sqrt(2), rtol=1e-6)


def test_normalized_costs_nothing_where_the_evaluation_is_shared():
  denoise = Partial(lambda w, x, sigma, cond: jnp.tanh(w @ x), jnp.eye(8))
  log_prob = Partial(lambda x, sigma, cond: -jnp.sum(x**2))

  def products(guidance):
    guided = jax.jit(lambda guidance, denoise, x: guidance(denoise)(x, jnp.asarray(1.0), 0))
    return guided.lower(guidance, denoise, jnp.ones(8)).compile().as_text().count(" dot(")

  for guidance, count in ((jg.classifier(log_prob, 1.0), 1), (jg.reconstruction(log_prob, 1.0), 2)):
    assert products(guidance) == products(jg.normalized(guidance, 0.1)) == count


# --- both kinds in one chain ------------------------------------------------------------------------


def test_classifier_free_and_classifier_guidance_add_up(mixture, relative_error):
  args = noisy(9, 3, 0.7), jnp.asarray(0.7), jnp.asarray(2)
  for a, b in ((1.0, 1.5), (3.0, 2.0), (0.0, 1.0)):
    both = jg.chain(jg.classifier_free(3, a), jg.classifier(mixture.log_prob, b))(mixture.denoiser)
    assert relative_error(both(*args), jg.classifier_free(3, a + b)(mixture.denoiser)(*args)) < 1e-12


# --- neutral settings -------------------------------------------------------------------------------


def test_neutral_settings_are_the_bare_denoiser(mixture, clean, relative_error):
  for guidance in (
    jg.reconstruction(clean(mixture), 0.0),
    jg.reconstruction(clean(mixture), lambda sigma: 0 * sigma),
    jg.backward_guidance(clean(mixture), 0.0, 3),
    jg.normalized(jg.classifier(mixture.log_prob, 2.0), 0.0),
    jg.dynamic_threshold(0.5, bound=10.0),
    jg.dynamic_threshold(0.5, bound=10.0, most=10.0),
  ):
    guided = jax.jit(guidance(mixture.denoiser))
    for sigma in SIGMAS:
      args = noisy(10, 3, sigma), jnp.asarray(sigma), jnp.asarray(1)
      assert relative_error(guided(*args), mixture.denoiser(*args)) < 1e-12


# --- dynamic thresholding ---------------------------------------------------------------------------


def thresholded(x0, quantile, bound, most):
  return np.asarray(
    jg.dynamic_threshold(quantile, bound, most)(lambda x, sigma, cond: x)(jnp.asarray(x0), jnp.asarray(1.0), None)
  )


def test_dynamic_thresholding_is_imagens(float64):
  x0 = 3 * np.random.default_rng(11).normal(size=(4, 4, 3))
  for quantile, bound in ((0.995, 1.0), (0.8, 1.0), (0.8, 2.0), (1.0, 0.5)):
    # Saharia et al., arXiv:2205.11487, section 2.3 and figure A.10.
    s = np.maximum(np.percentile(np.abs(x0).ravel(), 100 * quantile), bound)
    np.testing.assert_allclose(thresholded(x0, quantile, bound, np.inf), np.clip(x0, -s, s) / s * bound, rtol=1e-13)


def test_dynamic_thresholding_between_its_bounds_is_a_clip():
  x0 = 3 * np.random.default_rng(12).normal(size=(4, 4, 3)).astype(np.float32)
  np.testing.assert_allclose(thresholded(x0, 0.9, 1.5, 1.5), np.clip(x0, -1.5, 1.5))
  # The few elements outside the bound are clipped, since the quantile is inside it.
  few = np.append(np.full(99, 0.5), 9.0).astype(np.float32)
  np.testing.assert_array_equal(thresholded(few, 0.95, 1.0, np.inf), np.clip(few, -1, 1))


def test_dynamic_thresholding_is_diffusers():
  with np.load(Path(__file__).parent / "data" / "thresholding.npz") as data:
    xs, eps, bars = data["xs"], data["eps"], data["alphas_bar"]
  guided = jax.vmap(jg.dynamic_threshold(0.9, 1.0, 1.5)(lambda x, sigma, cond: x), (0, None, None))
  kinds = set()
  for x, e, bar, after, wanted in zip(xs[:-1], eps, bars, [*bars[1:], 1.0], xs[1:], strict=True):
    x0 = (x - np.sqrt(1 - bar) * e) / np.sqrt(bar)
    got = np.asarray(guided(jnp.asarray(x0, jnp.float32), jnp.asarray(1.0), None))
    # A step of DDIM with the eps of the x0 before thresholding.
    np.testing.assert_allclose(np.sqrt(after) * got + np.sqrt(1 - after) * e, wanted, rtol=0, atol=2e-6)
    s = np.quantile(np.abs(x0), 0.9, axis=1)
    kinds |= {*np.digitize(s, [1.0, 1.5])}
  assert kinds == {0, 1, 2}  # below, between and above its bounds


# --- numbers ----------------------------------------------------------------------------------------

ANY = lambda x, sigma, cond: jnp.sum(x)  # noqa: E731


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: jg.reconstruction(ANY, np.nan), "scale must be finite"),
    (lambda: jg.backward_guidance(ANY, np.inf), "step_size must be finite"),
    (lambda: jg.backward_guidance(ANY, 0.1, 0), "steps must be a whole number of at least 1"),
    (lambda: jg.normalized(jg.classifier(ANY, 1.0), np.nan), "ratio must be finite"),
    (lambda: jg.measurement(ANY, 0.0), "std must be above 0"),
    (lambda: jg.measurement(ANY, np.array([0.1, -1.0])), "std must be above 0"),
    (lambda: jg.measurement(ANY, np.inf), "std must be finite"),
    (lambda: jg.measurement(ANY, 0.1, np.nan), "spread must be finite"),
    (lambda: jg.dynamic_threshold(1.2), "quantile must be between 0 and 1"),
    (lambda: jg.dynamic_threshold(np.nan), "quantile must be finite"),
    (lambda: jg.dynamic_threshold(0.9, 0.0), "bound must be above 0"),
    (lambda: jg.dynamic_threshold(0.9, np.inf), "bound must be finite"),
    (lambda: jg.dynamic_threshold(0.9, 1.0, 0.5), "most must be at least bound, got 0.5 and 1.0"),
    (lambda: jg.dynamic_threshold(0.9, 1.0, np.nan), "most must be above 0"),
    (lambda: jg.scales.dps(np.nan, jg.karras(3)), "scale must be finite"),
    (lambda: jg.scales.dps(1.0, jg.karras(3), 2.0), "eta must be between 0 and 1"),
    (lambda: jg.scales.dps(1.0, jnp.array([1.0, 2.0, 0.0])), "sigmas must decrease"),
  ],
)
def test_bad_numbers_are_errors(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_sweep_over_every_number_is_one_program(random_mixture):
  model = random_mixture(0, (2,))
  operator = lambda mask, x0: mask * x0  # noqa: E731

  @jax.jit
  @chex.assert_max_traces(1)
  def run(guidance, x, sigma, y):
    return jg.chain(jg.unconditional(None), guidance)(model.denoiser)(x, sigma, y)

  for a in (0.5, 0.7, 0.9):
    measured = jg.measurement(Partial(operator, jnp.array([a, 0.0])), a, a)
    run(
      jg.chain(
        jg.reconstruction(measured, a),
        jg.reconstruction(jg.distance(Partial(operator, jnp.array([0.0, a]))), jg.scales.dps(a, jg.karras(4), a)),
        jg.normalized(jg.backward_guidance(measured, a, 2), a),
        jg.dynamic_threshold(a, a, 2 * a),
      ),
      jnp.array([0.3, a]),
      jnp.asarray(a),
      jnp.array([a, 0.0]),
    )
