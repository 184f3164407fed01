"""Scales that change with the noise level, compared with the papers' formulas in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import scales, schedules

TIMES = np.linspace(0, 1, 11)


def at_times(scale, schedule=None):
  schedule = schedules.Linear() if schedule is None else schedule
  return np.array([scale(jnp.asarray(schedule.sigma(t))) for t in TIMES])


# Wang et al., arXiv:2404.13040: functions of t that multiply w = γ - 1.
PUBLISHED = {
  "linear": (scales.linear, {}, lambda t: 2 * (1 - t)),
  "raised cosine": (scales.raised_cosine, {}, lambda t: np.cos(np.pi * t) + 1),
  "powered cosine, 1": (scales.powered_cosine, {}, lambda t: (1 - np.cos(np.pi * (1 - t))) / 2),
  "powered cosine, 4": (scales.powered_cosine, {"power": 4.0}, lambda t: (1 - np.cos(np.pi * (1 - t) ** 4)) / 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_published_schedules(name, scale, float64):
  make, options, wanted = PUBLISHED[name]
  got = at_times(make(scale, schedules.Linear(), **options))
  np.testing.assert_allclose(got, 1 + (scale - 1) * wanted(TIMES), atol=1e-9)


def test_the_clamped_schedule_has_a_floor(float64):
  got = at_times(scales.linear(3.0, schedules.Linear(), floor=2.0))
  np.testing.assert_allclose(got, np.maximum(2.0, 1 + 4 * (1 - TIMES)), atol=1e-9)


def test_the_mean_of_linear_and_raised_cosine_is_the_scale(float64):
  times = (np.arange(1000) + 0.5) / 1000
  for make in (scales.linear, scales.raised_cosine):
    scale = jax.vmap(make(2.5, schedules.Cosine()))(schedules.Cosine().sigma(times))
    np.testing.assert_allclose(np.mean(scale), 2.5, atol=5e-3)


def test_the_time_of_a_table_is_a_fraction_of_its_steps():
  table = schedules.table("linear", 1000)
  middle = jnp.asarray(table.sigmas)[499]
  np.testing.assert_allclose(scales.linear(3.0, table)(middle), 1 + 4 * (1 - 499 / 999), rtol=1e-5)


@pytest.mark.parametrize("make", [scales.linear, scales.raised_cosine, scales.powered_cosine])
def test_a_scale_is_constant_outside_its_schedule(make):
  scale = make(3.0, schedules.LogSNR(-5.0, 9.0))
  for inside, beyond in ((np.exp(2.5), 1e4), (np.exp(-4.5), 1e-6)):
    np.testing.assert_allclose(scale(jnp.asarray(beyond)), scale(jnp.asarray(inside)), rtol=1e-5)
    assert np.isfinite(jax.grad(scale)(jnp.asarray(beyond)))


def test_a_sweep_over_schedules_numbers_is_one_program(random_mixture):
  mixture = random_mixture(0, (2,))

  @jax.jit
  @chex.assert_max_traces(1)
  def run(guided):
    return guided(jnp.ones(2), jnp.asarray(0.7), jnp.asarray(1))

  made = [
    run(jg.classifier_free(3, scales.powered_cosine(scale, schedules.Linear(0.1 * scale), scale))(mixture.denoiser))
    for scale in (1.5, 2.0, 4.0)
  ]
  assert len(np.unique(made, axis=0)) == 3


def test_every_scale_can_be_a_function_of_sigma(random_mixture, float64, relative_error):
  m = random_mixture(0, (2,))
  x, sigma, label = jnp.ones(2), jnp.asarray(0.7), jnp.asarray(1)
  double = lambda sigma: 2 * sigma  # noqa: E731
  makers = {
    "classifier_free": lambda scale: jg.classifier_free(3, scale)(m.denoiser),
    "classifier": lambda scale: jg.classifier(m.log_prob, scale)(m.denoiser),
    "autoguidance": lambda scale: jg.autoguidance(jg.unconditional(3)(m.denoiser), scale)(m.denoiser),
  }
  for name, make in makers.items():
    assert relative_error(make(double)(x, sigma, label), make(1.4)(x, sigma, label)) < 1e-14, name
  step = lambda scale: (  # noqa: E731
    jg.DDPM("small", m.log_prob, scale)
    .step(jg.solvers.Conditioned(m.denoiser, label), jg.DDPM().init(x), sigma, jnp.asarray(0.3), jax.random.key(0))
    .x
  )
  assert relative_error(step(double), step(1.4)) < 1e-14
  assert relative_error(step(double), step(0.0)) > 1e-3


def test_vmap_over_scales(random_mixture):
  mixture, keys = random_mixture(0, (2,)), jg.sample_keys(jax.random.key(0), 3)

  def one(key, scale):
    guided = jg.classifier_free(3, scale)(mixture.denoiser)
    return jg.sample(guided, key, (2,), jg.karras(6), jg.DPMpp2M(), 1)[0]

  together = jax.vmap(one)(keys, jnp.array([0.0, 1.0, 4.0]))
  for i, scale in enumerate([0.0, 1.0, 4.0]):
    np.testing.assert_allclose(together[i], one(keys[i], scale), rtol=2e-5, atol=1e-6)


# --- CFG++ ----------------------------------------------------------------------------------------


def algorithm_2(denoise, x, sigmas, lam, label):
  """Chung et al., arXiv:2406.08070, Algorithm 2, in the paper's variables: DDIM that adds the unconditional noise."""
  alpha_bar = 1 / (1 + np.asarray(sigmas) ** 2)
  x_t = np.sqrt(alpha_bar[0]) * np.asarray(x)
  for sigma, ab, ab_next in zip(sigmas[:-1], alpha_bar[:-1], alpha_bar[1:], strict=True):
    eps = [
      (x_t - np.sqrt(ab) * np.asarray(denoise(jnp.asarray(x_t / np.sqrt(ab)), jnp.asarray(sigma), cond)))
      / np.sqrt(1 - ab)
      for cond in (3, label)
    ]
    guided = eps[0] + lam * (eps[1] - eps[0])
    x0 = (x_t - np.sqrt(1 - ab) * guided) / np.sqrt(ab)
    x_t = np.sqrt(ab_next) * x0 + np.sqrt(1 - ab_next) * eps[0]
  return x_t


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_cfg_pp_is_algorithm_2(lam, random_mixture, float64, relative_error):
  mixture, grid = random_mixture(0, (2,)), np.asarray(jg.karras(12, 0.02, 20.0), float)
  guided = jg.classifier_free(3, scales.cfg_pp(lam, grid))(mixture.denoiser)
  start = 20.0 * jnp.array([0.3, -1.1])
  wanted = algorithm_2(mixture.denoiser, start, grid, lam, 1)
  for solver in (jg.Euler(), jg.DDIM(0.0)):
    got, _ = jg.sample(guided, jax.random.key(0), (2,), grid, solver, 1, x_init=start)
    assert relative_error(got, wanted) < 1e-12
  # With the guided noise in its place it would be another method.
  plain, _ = jg.sample(jg.classifier_free(3, lam)(mixture.denoiser), jax.random.key(0), (2,), grid, jg.Euler(), 1)
  assert relative_error(plain, wanted) > 1e-3


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_cfg_pp_with_noise_keeps_the_unconditional_noise(eta, random_mixture, given_noise, float64, relative_error):
  # One step of DDIM(η) that adds the unconditional noise ε_∅.
  m, grid = random_mixture(0, (2,)), np.array([3.0, 1.0, 0.5, 0.0])
  x, z, label = jnp.array([2.0, -1.0]), jnp.array([0.2, 0.7]), jnp.asarray(1)
  guided = jg.classifier_free(3, scales.cfg_pp(0.6, grid, eta))(m.denoiser)
  step = lambda x, sigma: guided(x, sigma, label)  # noqa: E731
  got = jg.DDIM(eta).step(step, jg.DDIM().init(x), jnp.asarray(3.0), jnp.asarray(1.0), z).x
  bare, given = (np.asarray(m.denoise(x, jnp.asarray(3.0), cond)) for cond in (None, label))
  up = eta * 1.0 / 3.0 * np.sqrt(3.0**2 - 1.0**2)
  wanted = bare + 0.6 * (given - bare) + np.sqrt(1 - up**2) * (x - bare) / 3.0 + up * z
  assert relative_error(got, wanted) < 1e-12


def test_scales_on_a_grid_take_bfloat16():
  grid = jg.karras(6)
  for make in (scales.cfg_pp, scales.dps):
    scale = make(0.5, grid)
    wanted = scale(jnp.asarray(1.0))
    assert scale(jnp.ones((), jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(scale(jnp.ones((), jnp.bfloat16)).astype(float), wanted, rtol=0.01)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: scales.linear(np.nan, schedules.Cosine()), "scale must be finite"),
    (lambda: scales.linear(2.0, schedules.Cosine(), floor=np.inf), "floor must be finite"),
    (lambda: scales.powered_cosine(2.0, schedules.Cosine(), 0.0), "power must be above 0"),
    (lambda: scales.cfg_pp(0.5, np.array([1.0, 2.0, 0.0])), "sigmas must decrease"),
    (lambda: scales.cfg_pp(0.5, np.array([2.0, 1.0, 0.0]), eta=2.0), "eta must be between 0 and 1"),
  ],
)
def test_bad_numbers(make, message):
  with pytest.raises(ValueError, match=message):
    make()
