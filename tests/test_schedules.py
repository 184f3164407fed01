"""Noise schedules and grids, compared with the papers' formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguide import schedules as S


def sigma_of(alpha_bar):
  return np.sqrt((1 - alpha_bar) / alpha_bar)


def logistic(u):
  return 1 / (1 + np.exp(-u))


def song_2021(t, beta_min=0.1, beta_max=20.0):
  """arXiv:2011.13456, eq. 29 with eq. 32's beta: alpha_bar is exp(-∫beta), here by numerical quadrature."""
  from scipy.integrate import quad

  beta = lambda s: beta_min + s * (beta_max - beta_min)  # noqa: E731
  return np.array([np.exp(-quad(beta, 0, u, epsabs=1e-13)[0]) for u in t])


def nichol_2021(t, s=0.008):
  """arXiv:2102.09672, eq. 17."""
  f = lambda u: np.cos((u + s) / (1 + s) * np.pi / 2) ** 2  # noqa: E731
  return f(t) / f(0.0)


def chen_2023(t, start=-3.0, end=3.0, tau=1.0, clip_min=1e-9):
  """arXiv:2301.10972, Algorithm 1."""
  v_start, v_end = logistic(start / tau), logistic(end / tau)
  output = logistic((t * (end - start) + start) / tau)
  return np.clip((v_end - output) / (v_end - v_start), clip_min, 1.0)


def karras_2022(t, low=0.002, high=80.0, rho=7.0):
  """arXiv:2206.00364, eq. 5, with i / (N - 1) = 1 - t."""
  return (high ** (1 / rho) + (1 - t) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def ho_2021(u, low=-20.0, high=20.0):
  """arXiv:2207.12598, section 4: the level of λ = -2 log tan(au + b)."""
  b = np.arctan(np.exp(-high / 2))
  a = np.arctan(np.exp(-low / 2)) - b
  return np.exp(-(-2 * np.log(np.tan(a * u + b))) / 2)


T = np.linspace(0.01, 0.99, 37)
CASES = {
  "linear": (S.Linear(), sigma_of(song_2021(T))),
  "linear, other betas": (S.Linear(0.2, 10.0), sigma_of(song_2021(T, 0.2, 10.0))),
  "cosine": (S.Cosine(), sigma_of(nichol_2021(T))),
  "cosine, other offset": (S.Cosine(s=0.05), sigma_of(nichol_2021(T, 0.05))),
  "sigmoid": (S.Sigmoid(), sigma_of(chen_2023(T))),
  "sigmoid, other ends": (S.Sigmoid(0.0, 3.0, 0.7), sigma_of(chen_2023(T, 0.0, 3.0, 0.7))),
  "edm": (S.EDM(), karras_2022(T)),
  "log-snr": (S.LogSNR(-8.0, 12.0), np.exp(-(12.0 - 20.0 * T) / 2)),
  "log-snr-cosine": (S.LogSNRCosine(), ho_2021(T)),
  "log-snr-cosine, other ends": (S.LogSNRCosine(-5.0, 9.0), ho_2021(T, -5.0, 9.0)),
}


@pytest.fixture(params=CASES)
def case(request):
  return CASES[request.param]


def test_sigma_is_the_papers(case, float64):
  schedule, expected = case
  np.testing.assert_allclose(schedule.sigma(T), expected, rtol=1e-10)


def test_time_inverts_sigma(case, float64):
  schedule, _ = case
  np.testing.assert_allclose(schedule.time(schedule.sigma(T)), T, rtol=1e-9)


def test_float32_keeps_the_levels_and_the_time(case):
  schedule, expected = case
  np.testing.assert_allclose(schedule.sigma(T.astype(np.float32)), expected, rtol=2e-4)
  np.testing.assert_allclose(schedule.time(expected.astype(np.float32)), T, atol=2e-5)


def test_noise_grows_with_time(case):
  sigma = jax.jit(lambda schedule, t: schedule.sigma(t))
  assert (np.diff(sigma(case[0], np.linspace(0, 1, 1001))) > 0).all()


def test_quantile_is_the_level_at_a_uniform_time(case):
  schedule, _ = case
  np.testing.assert_array_equal(schedule.quantile(T), schedule.sigma(T))


def test_time_is_clipped_to_0_and_1(case):
  np.testing.assert_allclose(case[0].time(np.array([1e-9, 1e9])), [0.0, 1.0], atol=1e-4)


def test_schedules_work_element_by_element(case, no_rank_promotion):
  schedule, _ = case
  t = T[:36].reshape(2, 3, 6)
  np.testing.assert_allclose(schedule.sigma(t), np.asarray(schedule.sigma(t.ravel())).reshape(t.shape), rtol=1e-6)
  assert jnp.shape(schedule.time(1.0)) == ()


def test_cosine_stops_at_sigma_max():
  assert float(S.Cosine(sigma_max=50.0).sigma(1.0)) == 50.0


def test_sigmoid_stops_at_alpha_bar_min(float64):
  np.testing.assert_allclose(S.Sigmoid(alpha_bar_min=1e-4).sigma(1.0), sigma_of(1e-4), rtol=1e-4)


@pytest.mark.parametrize("ends", [20.0, 30.0, 40.0])
def test_log_snr_cosine_stays_positive_at_its_noisiest(ends):
  # atan(exp(20)) rounds to a float32 above π/2, whose tangent is negative.
  sigma = S.LogSNRCosine(-ends, ends).sigma(np.linspace(0.0, 1.0, 65))
  assert (np.asarray(sigma) > 0).all()


def test_conventions(float64):
  alpha_bar = np.linspace(0.01, 0.99, 9)
  sigma = S.alpha_bar_to_sigma(alpha_bar)
  log_snr = np.log(alpha_bar / (1 - alpha_bar))
  np.testing.assert_allclose(S.sigma_to_alpha_bar(sigma), alpha_bar, rtol=1e-13)
  np.testing.assert_allclose(S.sigma_to_log_snr(sigma), log_snr, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(S.log_snr_to_sigma(log_snr), sigma, rtol=1e-12)


def test_log_normal_quantile(float64):
  from scipy import stats

  u = np.linspace(0.01, 0.99, 21)
  expected = stats.lognorm(s=1.2, scale=np.exp(-1.2)).ppf(u)
  np.testing.assert_allclose(S.LogNormal().quantile(u), expected, rtol=1e-10)


# --- tables ---------------------------------------------------------------------------------------


def test_table_is_ddpms_cumulative_product(float64):
  betas = np.linspace(1e-4, 0.02, 1000)
  table = S.Table.from_betas(S.linear_betas(1000))
  np.testing.assert_allclose(table.sigmas, sigma_of(np.cumprod(1 - betas)), rtol=1e-10)
  np.testing.assert_allclose(table.sigma(np.arange(1000)), table.sigmas, rtol=1e-12)


def test_linear_betas_scale_with_the_steps():
  np.testing.assert_allclose(S.linear_betas(100), np.linspace(1e-3, 0.2, 100))
  assert S.linear_betas(1).shape == (1,)
  assert S.linear_betas(4).max() < 1


def test_cosine_betas_are_nichol_and_dhariwals():
  for steps in (7, 1000):
    alpha_bar = lambda t: np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # noqa: E731
    expected = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)]
    np.testing.assert_allclose(S.cosine_betas(steps), expected, rtol=1e-9, atol=1e-15)


def test_a_table_of_betas_of_has_the_schedules_levels(float64):
  for schedule in (S.Linear(), S.Sigmoid(), S.Cosine()):
    table = S.Table.from_betas(S.betas_of(schedule, 50, max_beta=1 - 1e-12))
    np.testing.assert_allclose(table.sigmas[:-1], schedule.sigma(np.arange(1, 50) / 50), rtol=1e-6)


def test_table_interpolates_log_sigma(float64):
  table = S.Table(jnp.array([0.1, 1.0, 100.0]))
  np.testing.assert_allclose(table.sigma(np.array([0.5, 1.5])), [0.1**0.5, 10.0])
  np.testing.assert_allclose(table.time(np.array([0.1**0.5, 10.0])), [0.5, 1.5], rtol=1e-12)
  np.testing.assert_allclose(table.time(np.array([1e-9, 1e9])), [0.0, 2.0])


def test_times_of_a_tables_levels_are_whole_in_float32():
  table = S.Table.from_betas(S.linear_betas(1000))
  np.testing.assert_array_equal(table.time(table.sigmas), np.arange(1000))
  np.testing.assert_array_equal(table.sigma(np.arange(1000)), table.sigmas.astype(np.float32))


def test_table_quantile_draws_all_steps_equally_often():
  table = S.Table.from_betas(S.linear_betas(10))
  levels, counts = np.unique(np.asarray(table.quantile((np.arange(200) + 0.5) / 200)), return_counts=True)
  np.testing.assert_array_equal(levels, table.sigmas.astype(np.float32))
  assert (counts == 20).all()
  assert float(table.quantile(1.0)) == np.float32(table.sigmas[-1])


# --- grids ----------------------------------------------------------------------------------------


def is_grid(sigmas, steps):
  sigmas = np.asarray(sigmas)
  return sigmas.shape == (steps + 1,) and (np.diff(sigmas) < 0).all() and sigmas[-1] == 0


@pytest.mark.parametrize("steps", [1, 1000])
def test_grids_decrease_to_zero(steps):
  table = S.Table.from_betas(S.linear_betas(1000))
  assert is_grid(S.karras(steps), steps)
  assert is_grid(S.log_snr_uniform(steps), steps)
  assert is_grid(S.cosine_time(steps), steps)
  assert is_grid(S.respaced(table, steps), steps)
  for name in S.SCHEDULES:
    assert is_grid(S.from_schedule(S.schedule(name), steps), steps), name


def test_karras_is_equation_5(float64):
  i = np.arange(18)
  expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
  np.testing.assert_allclose(S.karras(18)[:-1], expected, rtol=1e-12)
  expected = (9 ** (1 / 3) + i / 17 * (0.1 ** (1 / 3) - 9 ** (1 / 3))) ** 3
  np.testing.assert_allclose(S.karras(18, 0.1, 9.0, 3.0)[:-1], expected, rtol=1e-12)
  np.testing.assert_allclose(S.karras(1), [80.0, 0.0])


def test_log_snr_uniform_is_geometric(float64):
  np.testing.assert_allclose(S.log_snr_uniform(9, 0.02, 30.0)[:-1], np.geomspace(30.0, 0.02, 9), rtol=1e-12)


def test_cosine_time_is_uniform_in_the_angle(float64):
  expected = np.tan(np.linspace(np.arctan(50.0), np.arctan(0.03), 14))
  np.testing.assert_allclose(S.cosine_time(14, 0.03, 50.0)[:-1], expected, rtol=1e-12)
  # The cosine schedule without its offset, over the same ends.
  times = np.linspace(*S.Cosine(s=0.0).time(np.array([50.0, 0.03])), 14)
  np.testing.assert_allclose(S.Cosine(s=0.0).sigma(times), expected, rtol=1e-12)
  np.testing.assert_array_equal(S.cosine_time(1, 0.03, 50.0), [50.0, 0.0])


def test_from_schedule_is_uniform_in_time(float64):
  expected = [*karras_2022(np.array([1.0, 0.75, 0.5, 0.25])), 0.0]
  np.testing.assert_allclose(S.from_schedule(S.EDM(), 4), expected, rtol=1e-12)


def test_from_schedule_down_to_a_time(float64):
  expected = np.sqrt(np.expm1(0.5 * 19.9 * (t := np.linspace(1, 1e-3, 7)) ** 2 + 0.1 * t))
  np.testing.assert_allclose(S.from_schedule(S.Linear(), 7, t_min=1e-3)[:-1], expected, rtol=1e-12)
  for t_min in (0.0, 1.1, np.nan):
    with pytest.raises(ValueError, match="t_min must be"):
      S.from_schedule(S.Linear(), 7, t_min=t_min)


BOUNDED = [grid for grid in S.GRIDS.values() if grid is not S.flow]  # grids with the options sigma_min and sigma_max


def test_grids_of_numbers_are_rounded_once():
  for grid in BOUNDED:
    with jax.enable_x64(True):
      exact = np.asarray(grid(18))
    np.testing.assert_array_equal(grid(18), exact.astype(np.float32))
    np.testing.assert_allclose(jax.jit(lambda low: grid(18, low))(0.002), exact, rtol=1e-5)  # noqa: B023


@pytest.mark.parametrize("steps", [1, 2, 9, 16])
def test_iddpm_is_table_1(steps, float64):
  # Karras et al., arXiv:2206.00364, table 1, iDDPM: u_{j-1} = √((u_j² + 1) / max(ᾱ_{j-1} / ᾱ_j, C_1) - 1), u_M = 0.
  total, c_1, c_2 = 1000, 0.001, 0.008
  alpha_bar = np.sin(np.pi / 2 * np.arange(total + 1) / (total * (c_2 + 1))) ** 2
  u = np.zeros(total + 1)
  for j in range(total, 0, -1):
    u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], c_1) - 1)
  # The visited j run from the largest level in the range (j_0) to the smallest.
  j = np.flatnonzero((u >= 0.03) & (u <= 90.0))
  expected = u[j[0] + np.round((j[-1] - j[0]) / max(steps - 1, 1) * np.arange(steps)).astype(int)]
  np.testing.assert_allclose(S.iddpm(steps, 0.03, 90.0)[:-1], expected, rtol=1e-8)


def test_iddpm_needs_as_many_levels_as_steps():
  with pytest.raises(ValueError, match=r"the table has 10 levels from 1e-05 to 10000.0, too few for 11 steps"):
    S.iddpm(11, 1e-5, 1e4, table=S.table("cosine", 10))


def test_the_nearest_step():
  table = S.table("cosine", 50)
  levels = np.append(0, table.sigmas)
  sigmas = np.random.default_rng(0).uniform(0, 3, 200).astype(np.float32)
  expected = np.abs(sigmas[:, None] - levels).argmin(1)
  np.testing.assert_array_equal(S.nearest_step(table, sigmas), expected - 1)
  np.testing.assert_array_equal(S.round_sigma(table, sigmas), levels[expected].astype(np.float32))
  np.testing.assert_array_equal(S.round_sigma(table, table.sigmas), table.sigmas.astype(np.float32))


@pytest.mark.parametrize("name", ["linear", "edm", "log-snr"])
def test_inverse_extrapolates_and_time_clips(name, float64):
  schedule, t = S.schedule(name), np.array([0.2, 1.0, 1.3])
  np.testing.assert_allclose(schedule.inverse(schedule.sigma(t)), t, rtol=1e-10)
  np.testing.assert_allclose(schedule.time(schedule.sigma(t)), [0.2, 1.0, 1.0], rtol=1e-10)


@pytest.mark.parametrize(("low", "high", "t_min"), [(0.02, 100.0, 1e-3), (0.002, 80.0, 1e-3), (0.5, 3.0, 0.2)])
def test_linear_between_two_levels(low, high, t_min, float64):
  schedule = S.Linear.between(low, high, t_min)
  np.testing.assert_allclose(schedule.sigma(np.array([t_min, 1.0])), [low, high], rtol=1e-10)


def test_uniform_times_are_drawn_between_the_bounds(float64):
  u = np.linspace(0, 1, 5)
  expected = S.Linear().sigma(0.2 + 0.5 * u)
  np.testing.assert_allclose(S.UniformTime(S.Linear(), 0.2, 0.7).quantile(u), expected, rtol=1e-14)


def space_timesteps(num_timesteps, count):
  """The single-section case of Nichol & Dhariwal's respacing: accumulate a fractional stride, round half to even."""
  stride = (num_timesteps - 1) / (count - 1)
  steps, current = [], 0.0
  for _ in range(count):
    steps.append(round(current))
    current += stride
  return steps


@pytest.mark.parametrize(("total", "count"), [(1000, 2), (1000, 25), (1000, 250), (1000, 1000), (4000, 100), (6, 3)])
def test_respaced_visits_the_published_steps(total, count):
  table = S.Table(jnp.arange(1, total + 1, dtype=jnp.float32))  # step t has the level t + 1
  np.testing.assert_array_equal(S.respaced(table, count)[:-1] - 1, space_timesteps(total, count)[::-1])


def test_respaced_rounds_half_to_even():
  table = S.Table(jnp.arange(1.0, 7.0))
  # 0, 2.5, 5: 2.5 goes to 2 and not to 3.
  np.testing.assert_array_equal(S.respaced(table, 3), [6.0, 3.0, 1.0, 0.0])


def test_respaced_accepts_steps_in_any_order():
  table = S.Table(jnp.arange(1.0, 11.0))
  for steps in ([9, 0, 4], (0, 4, 9), np.array([4, 9, 0])):
    np.testing.assert_array_equal(S.respaced(table, steps), [10.0, 5.0, 1.0, 0.0])


# --- invalid arguments ----------------------------------------------------------------------------

TABLE = S.Table(jnp.arange(1.0, 11.0))


@pytest.mark.parametrize("steps", [0, -1, 2.0, "3", None, True])
def test_the_number_of_steps_must_be_whole_and_positive(steps):
  for make in (*S.GRIDS.values(), lambda n: S.from_schedule(S.Linear(), n), S.cosine_betas):
    with pytest.raises((ValueError, TypeError)):  # a TypeError where types are checked at run time
      make(steps)


@pytest.mark.parametrize(
  ("low", "high"), [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (np.nan, 1.0), (0.1, np.nan), (0.1, np.inf)]
)
@pytest.mark.parametrize("grid", BOUNDED)
def test_bounds_must_be_finite_and_in_order(grid, low, high):
  with pytest.raises(ValueError, match="sigma_m"):
    grid(5, low, high)


@pytest.mark.parametrize("rho", [0.0, 0.5, np.nan, -7.0])
def test_rho_is_at_least_1(rho):
  with pytest.raises(ValueError, match="rho"):
    S.karras(5, rho=rho)


def test_an_unknown_schedule_names_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'cosine'"):
    S.schedule("cosin")
  with pytest.raises(ValueError, match="beta_max must be finite"):
    S.schedule("linear", beta_max=np.nan)


@pytest.mark.parametrize(
  ("steps", "message"),
  [
    ([0, 0, 3], "differ"),
    ([0, 10], "0 to 9"),
    ([-1, 3], "0 to 9"),
    (11, "at most"),
    (0, "at least 1"),
    (True, "whole"),
    (np.array([], int), "at least one step"),
    ([], "at least one step"),
    (np.array([0.5]), "whole"),
  ],
)
def test_respaced_refuses_other_steps(steps, message):
  with pytest.raises(ValueError, match=message):
    S.respaced(TABLE, steps)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [[0.1]], [np.nan], [-0.1]])
def test_betas_lie_between_0_and_1(betas):
  with pytest.raises(ValueError, match="betas"):
    S.Table.from_betas(np.asarray(betas))


def test_from_schedule_refuses_a_table():
  # A table's time is a step: levels at times 1 to 1/steps would all lie within its first step.
  with pytest.raises((TypeError, ValueError), match="respaced"):
    S.from_schedule(TABLE, 5)


# --- truncated distributions ----------------------------------------------------------------------


def test_a_truncated_log_normal_is_scipys():
  from scipy.stats import truncnorm

  mean, std, low, high = -0.6, 1.2, 0.2, 3.0
  u = np.linspace(0.001, 0.999, 53)
  ends = (np.log([low, high]) - mean) / std
  wanted = np.exp(truncnorm.ppf(u, *ends, loc=mean, scale=std))
  truncated = S.Truncated(S.LogNormal(mean, std), low, high)
  np.testing.assert_allclose(truncated.quantile(u), wanted, rtol=2e-5)
  np.testing.assert_allclose(jax.jit(lambda levels: levels.quantile(u))(truncated), wanted, rtol=2e-5)


def test_a_truncated_table_has_the_steps_in_the_range_equally_often():
  table = S.table("linear", 100)
  inside = table.sigmas[(table.sigmas >= 0.1) & (table.sigmas <= 2.0)]
  u = (np.arange(100 * inside.size) + 0.5) / (100 * inside.size)
  drawn = np.asarray(S.Truncated(table, 0.1, 2.0).quantile(u))
  levels, counts = np.unique(drawn, return_counts=True)
  np.testing.assert_allclose(levels, inside, rtol=1e-6)
  np.testing.assert_allclose(counts, 100, atol=1)


@pytest.mark.parametrize("levels", [S.Cosine(), S.LogSNRCosine(), S.UniformTime(S.Linear()), S.LogNormal(0.0, 1.0)])
def test_a_truncated_distribution_is_the_whole_one_given_its_range(levels):
  quantile = jax.jit(lambda levels, u: levels.quantile(u))
  whole = np.asarray(quantile(levels, (np.arange(200_000) + 0.5) / 200_000))
  given = whole[(whole >= 0.3) & (whole <= 4.0)]
  u = (np.arange(given.size) + 0.5) / given.size
  np.testing.assert_allclose(quantile(S.Truncated(levels, 0.3, 4.0), u), given, rtol=1e-3)


def test_ends_beyond_the_distribution_truncate_nothing():
  u = np.linspace(0.01, 0.99, 7)
  truncated = S.Truncated(S.LogNormal(), 0.0, 1e6)
  np.testing.assert_allclose(truncated.quantile(u), S.LogNormal().quantile(u), rtol=1e-6)
  assert truncated.quantile(np.float32([0, 1])).tolist() == [0.0, 1e6]


def test_ranges_that_are_refused():
  with pytest.raises(ValueError, match="sigma_lo must be below sigma_hi"):
    S.Truncated(S.Cosine(), 2.0, 1.0)
  with pytest.raises(ValueError, match=r"only 0\.00% of the noise levels lie between 500 and 1000"):
    S.Truncated(S.LogNormal(), 500.0, 1000.0)
  with pytest.raises(TypeError, match="must be a noise schedule"):
    S.Truncated("cosine", 1.0, 2.0)
