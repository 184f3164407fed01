"""Losses, compared with the papers' algorithms in NumPy on the same random numbers, and their properties."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxguide as jg
from jaxguide import losses, scaling, schedules

NUM, SHAPE = 12, (2, 2, 1)


def data(seed=0, num=NUM):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(num, *SHAPE)), rng.integers(0, 5, num)


def network(params, x, c_noise, cond):
  """A nonlinear function of all inputs."""
  return jnp.tanh(params * x + 0.1 * cond.reshape(-1, 1, 1, 1).astype(x.dtype)) + 1e-3 * c_noise.reshape(-1, 1, 1, 1)


def draws(key, num=NUM):
  """The uniforms and normals of one call of the loss, drawn as `denoising_loss` splits its key."""
  drop_key, noise_key = jax.random.split(key)
  level_key, normal_key = jax.random.split(noise_key)
  u = losses.stratified_uniform(level_key, num)
  return drop_key, np.asarray(u), np.asarray(jax.random.normal(normal_key, (num, *SHAPE), float))


def test_the_loss_of_the_classifier_free_paper(float64):
  x, c = data()
  key, p_uncond, null = jax.random.key(3), 0.4, 5
  drop_key, u, eps = draws(key)
  # Ho & Salimans, arXiv:2207.12598, Algorithm 1, with section 4's p(λ).
  c = np.asarray(losses.drop_cond(drop_key, jnp.asarray(c), null, p_uncond))  # c <- null with probability p_uncond
  assert 0 < (c == null).sum() < NUM
  b = np.arctan(np.exp(-20.0 / 2))
  a = np.arctan(np.exp(20.0 / 2)) - b
  lam = (-2 * np.log(np.tan(a * u + b))).reshape(-1, 1, 1, 1)  # λ ~ p(λ)
  alpha, sigma = np.sqrt(1 / (1 + np.exp(-lam))), np.sqrt(1 - 1 / (1 + np.exp(-lam)))
  z = alpha * x + sigma * eps  # z_λ = α x + σ ε
  # The network's time input is that of λ in the cosine schedule, here by numerical inversion of ᾱ(t).
  bar = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2  # noqa: E731
  t = np.linspace(0, 1, 400_001)
  time = 1000 * np.interp(-1 / (1 + np.exp(-lam)), -bar(t), t)
  predicted = np.tanh(0.7 * z + 0.1 * c.reshape(-1, 1, 1, 1)) + 1e-3 * time
  wanted = np.mean((predicted - eps) ** 2)  # ∇ ||ε_θ(z_λ, c) - ε||²

  got = jg.denoising_loss(
    jnp.asarray(0.7), network, key, jnp.asarray(x), jnp.asarray(data()[1]),
    scaling=scaling.eps(schedules.Cosine()), noise_levels=schedules.LogSNRCosine(), null_cond=null, p_uncond=p_uncond,
  )  # fmt: skip
  np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize("weight", [None, scaling.eps_weight, scaling.x0_weight, scaling.min_snr_weight])
@pytest.mark.parametrize("prediction", scaling.PREDICTIONS)
def test_every_prediction_and_weight_is_a_weighted_loss_of_x0(prediction, weight, float64):
  x0, c = data(1)
  key = jax.random.key(1)
  _, u, eps = draws(key)
  sigma = np.exp(-1.2 + 1.2 * stats.norm.ppf(u))
  alpha = 1 / np.sqrt(1 + sigma**2)
  # For each convention: the factor of its input, the conversion of its output to x0, and the weight of |x0 - D|² that
  # its own squared error has.
  total, above = np.sqrt(sigma**2 + 0.25), sigma - 0.002
  seen, to_x0, own = {
    "eps": (alpha, lambda x, f: x - w(sigma) * f, sigma**-2.0),
    "x0": (alpha, lambda x, f: f, sigma**0.0),
    "v": (alpha, lambda x, f: w(alpha) * (w(alpha) * x) - w(alpha * sigma) * f, 1 / (alpha * sigma) ** 2),
    "edm": (
      1 / total,
      lambda x, f: w(0.25 / total**2) * x + w(0.5 * sigma / total) * f,
      (sigma**2 + 0.25) / (0.5 * sigma) ** 2,  # λ(σ) of arXiv:2206.00364, table 1
    ),
    "ve": (sigma**0.0, lambda x, f: x + w(sigma) * f, sigma**-2.0),
    "flow": (1 / (1 + sigma), lambda x, f: w(1 / (1 + sigma)) * (x - w(sigma) * f), ((1 + sigma) / sigma) ** 2),
    "flow_to_data": (1 / (1 + sigma), lambda x, f: w(1 / (1 + sigma)) * (x + w(sigma) * f), ((1 + sigma) / sigma) ** 2),
    "consistency": (
      1 / total,
      lambda x, f: w(0.25 / (above**2 + 0.25)) * x + w(0.5 * above / total) * f,
      (sigma**2 + 0.25) / (0.5 * above) ** 2,
    ),
  }[prediction]
  x = x0 + w(sigma) * eps
  scale = scaling.scaling(prediction, schedules.Linear(), 1000.0)
  f = np.asarray(network(jnp.asarray(0.7), jnp.asarray(w(seen) * x), scale(sigma).c_noise, jnp.asarray(c)))
  factor = {None: own, scaling.eps_weight: sigma**-2.0, scaling.x0_weight: sigma**0.0}.get(
    weight, np.minimum(sigma**-2.0, 5.0)
  )
  wanted = np.mean(w(factor) * (to_x0(x, f) - x0) ** 2)
  got = jg.denoising_loss(
    jnp.asarray(0.7), network, key, jnp.asarray(x0), jnp.asarray(c),
    scaling=scale, noise_levels=schedules.LogNormal(), weight=weight,
  )  # fmt: skip
  np.testing.assert_allclose(got, wanted, rtol=1e-9)


def w(per_example):
  return np.asarray(per_example).reshape(-1, 1, 1, 1)


LEVELS, MEAN, VARIANCE = schedules.LogNormal(-0.5, 1.0), 0.4, 0.3


@functools.cache
def eight_draws(num):
  """Keys, examples that are N(MEAN, VARIANCE), and the noise levels that the loss draws with each key."""

  def draw(key):
    x0 = MEAN + np.sqrt(VARIANCE) * jax.random.normal(jax.random.fold_in(key, 1), (num, 1))
    _, noise_key = jax.random.split(key)
    return x0, LEVELS.quantile(losses.stratified_uniform(jax.random.split(noise_key)[0], num))

  keys = jax.random.split(jax.random.key(5), 8)
  return list(zip(keys, *jax.jit(jax.vmap(draw))(keys), strict=True))


@pytest.mark.parametrize("prediction", scaling.PREDICTIONS)
def test_the_exact_denoiser_minimises_the_loss(prediction):
  # For data N(m, v) the optimal x0 is affine in x with coefficients that depend on sigma. The test perturbs them.
  m, v = MEAN, VARIANCE
  make = scaling.scaling(prediction, schedules.Linear(), 1000.0)

  @jax.jit
  def loss_and_gradient(off, key, x0, sigma):
    def loss(off):
      def exact(params, scaled, c_noise, cond):
        c_skip, c_out, c_in, _ = (c[:, None] for c in make(sigma))
        x = scaled / c_in
        shrink = v / (v + sigma[:, None] ** 2)
        return (m + params[0] + (1 + params[1]) * shrink * (x - m) - c_skip * x) / c_out

      return jg.denoising_loss(
        off, exact, key, x0, scaling=make, noise_levels=LEVELS, weight=lambda s: 1 / (0.3 + s**2)
      )

    return jax.value_and_grad(loss)(off)

  draws = eight_draws(4000)
  best = [loss_and_gradient(np.zeros(2, np.float32), *drawn) for drawn in draws]
  gradients = np.array([g for _, g in best])
  # The mean of eight independent gradients is zero within its standard error.
  error = gradients.std(0, ddof=1) / np.sqrt(8)
  assert (np.abs(gradients.mean(0)) < 5 * error + 1e-4).all()
  assert (np.abs(gradients) < 0.1).all()
  for off in ([0.2, 0.0], [-0.2, 0.0], [0.0, 0.3], [0.0, -0.3]):
    for drawn, (lowest, _) in zip(draws, best, strict=True):
      assert loss_and_gradient(np.array(off, np.float32), *drawn)[0] > lowest


def test_add_noise_adds_normal_noise_of_its_level():
  x0 = jnp.ones((2000, 3))
  x, sigma = losses.add_noise(jax.random.key(0), x0, schedules.LogNormal())
  z = np.asarray((x - x0) / sigma[:, None])
  assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
  assert abs(np.corrcoef(np.abs(z).mean(1), sigma)[0, 1]) < 0.1


# --- draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 2, 7, 1000])
def test_each_of_the_strata_is_drawn_from_once(num):
  u = np.asarray(losses.stratified_uniform(jax.random.key(num), num), np.float64)
  assert ((u > 0) & (u < 1)).all()
  # Rounding can move a number to the edge of the next part.
  np.testing.assert_array_equal(np.sort(np.floor(u * num - 1e-4 * (u * num % 1 < 1e-4))), np.arange(num))


def test_stratified_draws_are_uniform_and_in_random_order():
  u = np.stack([losses.stratified_uniform(key, 16) for key in jax.random.split(jax.random.key(0), 100)])
  for place in (0, 7, 15):
    assert stats.kstest(u[:, place], "uniform").pvalue > 1e-3
  assert stats.kstest((u * 16 % 1).ravel(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
  ("levels", "to_known", "known"),
  [
    (schedules.LogNormal(-1.0, 1.5), np.log, stats.norm(-1.0, 1.5)),
    (schedules.Linear(), lambda s: np.log1p(s**2), None),  # log(1 + σ²) = ∫beta, a quadratic in t
    (schedules.LogSNR(-10.0, 15.0), lambda s: -2 * np.log(s), stats.uniform(-10.0, 25.0)),
    # λ = -2 log tan(θ) with uniform θ has a hyperbolic secant distribution (section 4 of the guidance paper).
    (schedules.LogSNRCosine(), lambda s: -np.log(s), stats.hypsecant()),
  ],
)
def test_noise_levels_have_their_distribution(levels, to_known, known):
  # One call for each draw: the draws of one call are stratified, so they are not independent.
  keys = jax.random.split(jax.random.key(0), 2000)
  draw = jax.jit(jax.vmap(lambda key: losses.add_noise(key, jnp.zeros((4, 1)), levels)[1][0]))
  value = to_known(np.asarray(draw(keys), np.float64))
  if known is None:
    value, known = (-0.1 + np.sqrt(0.01 + 2 * 19.9 * value)) / 19.9, stats.uniform()
  assert stats.kstest(value, known.cdf).pvalue > 1e-3


def test_conditions_are_dropped_with_probability_p_uncond():
  cond = {"label": jnp.full(5000, 3), "text": jnp.ones((5000, 4))}
  null = {"label": 7, "text": jnp.zeros(4)}
  for p_uncond in (0.0, 0.1, 0.5, 1.0):
    dropped = losses.drop_cond(jax.random.key(1), cond, null, p_uncond)
    gone = np.asarray(dropped["label"]) == 7
    assert abs(gone.mean() - p_uncond) <= 4 * np.sqrt(p_uncond * (1 - p_uncond) / 5000)
    # All leaves of a row are dropped together.
    np.testing.assert_array_equal(dropped["text"], np.where(gone[:, None], 0.0, np.ones((5000, 4))))
    assert dropped["label"].dtype == cond["label"].dtype


# --- the loss of the classifier -------------------------------------------------------------------


def test_classifier_loss_is_a_cross_entropy(float64):
  x0, labels = data(2)
  params = np.random.default_rng(3).normal(size=(4, 5))
  key = jax.random.key(4)

  def apply(params, x, c_noise):
    return x.reshape(NUM, -1) @ params + 1e-3 * c_noise[:, None] * jnp.arange(5.0)[None]

  make = scaling.eps(schedules.Linear())
  level_key, normal_key = jax.random.split(key)
  u = np.asarray(losses.stratified_uniform(level_key, NUM))
  sigma = np.sqrt(np.exp(0.5 * 19.9 * u**2 + 0.1 * u) - 1)
  x_t = w(1 / np.sqrt(1 + sigma**2)) * (x0 + w(sigma) * np.asarray(jax.random.normal(normal_key, x0.shape, float)))
  logits = x_t.reshape(NUM, -1) @ params + u[:, None] * np.arange(5)
  log_prob = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  loss, accuracy = jg.classifier_loss(
    jnp.asarray(params), apply, key, jnp.asarray(x0), jnp.asarray(labels), scaling=make,
    noise_levels=schedules.Linear(),
  )  # fmt: skip
  np.testing.assert_allclose(loss, -log_prob[np.arange(NUM), labels].mean(), rtol=1e-8)
  np.testing.assert_allclose(accuracy, (logits.argmax(1) == labels).mean())


# --- use and bad input ----------------------------------------------------------------------------

OPTIONS = {"scaling": scaling.eps(schedules.Cosine()), "noise_levels": schedules.LogSNRCosine()}


def plain(params, x, c_noise, cond):
  return params * x


def test_p_uncond_0_needs_no_condition():
  loss = jg.denoising_loss(jnp.asarray(0.1), plain, jax.random.key(0), jnp.ones((4, 2)), **OPTIONS)
  assert loss.shape == ()


def test_one_trace_for_any_probability_and_schedule():
  @jax.jit
  @chex.assert_max_traces(1)
  def loss(params, key, p_uncond, levels):
    return jg.denoising_loss(
      params, plain, key, jnp.ones((4, 2)), jnp.zeros(4, int), null_cond=3, p_uncond=p_uncond,
      scaling=OPTIONS["scaling"], noise_levels=levels,
    )  # fmt: skip

  for i in range(3):
    loss(jnp.asarray(0.1 * i), jax.random.key(i), 0.1 * i, schedules.LogNormal(-1.0 - i, 1.0))


@pytest.mark.parametrize("p_uncond", [-0.1, 1.1, np.nan])
def test_p_uncond_is_a_probability(p_uncond):
  with pytest.raises(ValueError, match="p_uncond must be"):
    jg.denoising_loss(
      jnp.asarray(0.1), plain, jax.random.key(0), jnp.ones((4, 2)), jnp.zeros(4, int), null_cond=3,
      p_uncond=p_uncond, **OPTIONS,
    )  # fmt: skip


@pytest.mark.parametrize(("cond", "null"), [(None, 3), (jnp.zeros(4, int), None), (None, None)])
def test_p_uncond_above_0_needs_cond_and_null_cond(cond, null):
  with pytest.raises(ValueError, match="p_uncond above 0 needs"):
    jg.denoising_loss(
      jnp.asarray(0.1), plain, jax.random.key(0), jnp.ones((4, 2)), cond, null_cond=null, p_uncond=0.1, **OPTIONS
    )


def test_a_network_of_another_shape_is_refused():
  doubled = lambda params, x, c_noise, cond: jnp.concatenate([x, x], -1)  # noqa: E731
  with pytest.raises(ValueError, match=r"with a learned variance, use jaxguide\.variational\.variational_loss"):
    jg.denoising_loss(jnp.asarray(0.1), doubled, jax.random.key(0), jnp.ones((4, 2)), **OPTIONS)


def test_a_network_in_bfloat16_has_a_loss_in_float32():
  half = lambda params, x, c_noise, cond: (params * x).astype(jnp.bfloat16)  # noqa: E731
  loss = jg.denoising_loss(jnp.asarray(0.1), half, jax.random.key(0), jnp.ones((4, 2)), **OPTIONS)
  assert loss.dtype == jnp.float32


def test_annotated_shapes_and_types_are_checked_in_tests():
  # Guards against annotations that jaxtyping silently ignores.
  from jaxtyping import TypeCheckError

  with pytest.raises(TypeCheckError):
    losses.add_noise(jax.random.key(0), jnp.zeros((2, 3), jnp.complex64), schedules.Cosine())
