"""Solvers: their order of convergence, the papers' steps in NumPy, and the distribution that they sample."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.integrate import solve_ivp

import jaxguide as jg

MEANS, VARIANCES = np.array([[-0.8, 0.1], [0.5, 1.0], [1.2, -0.4]]), np.array([0.2, 0.35, 0.1])
WEIGHTS = np.array([0.3, 0.5, 0.2])


def mixture():
  return jg.gaussian_mixture(MEANS, VARIANCES, [0, 1, 2], WEIGHTS)


def exact_x0(x, sigma):
  """The mixture's denoiser, with NumPy."""
  variance = (VARIANCES + sigma**2)[:, None]
  log = np.log(WEIGHTS) - 0.5 * ((x - MEANS) ** 2 / variance + np.log(variance)).sum(1)
  weights = np.exp(log - log.max())
  return (weights / weights.sum()) @ (MEANS + VARIANCES[:, None] / variance * (x - MEANS))


def walk(solver, denoise, x, sigmas, keys, n):
  """Take the first ``n`` steps of a grid, which need not end in 0. One compiled program serves every ``n``."""

  def step(state, inputs):
    i, *inputs = inputs
    return jax.lax.cond(i < n, lambda: solver.step(denoise, state, *inputs), lambda: state), None

  return jax.lax.scan(step, solver.init(x), (jnp.arange(len(keys)), sigmas[:-1], sigmas[1:], keys))[0].x


def is_random(solver):
  """Whether the result of a step depends on its key."""
  denoise = lambda x, sigma: 0.5 * x  # noqa: E731
  steps = [
    solver.step(denoise, solver.init(jnp.ones(2)), jnp.asarray(2.0), jnp.asarray(1.0), jax.random.key(i)).x
    for i in (0, 1)
  ]
  return not np.array_equal(*steps)


def order_of(counts, errors):
  return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def smooth_grid(steps, high, low):
  return np.geomspace(high, low, steps + 1)


def uneven_grid(steps, high, low):
  """Every second step is twice as long. A multistep method that ignores the lengths loses its order on this grid."""
  lengths = np.where(np.arange(steps) % 2, 2.0, 1.0)
  return high * (low / high) ** np.append(0, np.cumsum(lengths) / lengths.sum())


FINE = np.array([128, 256, 512, 1024]), 500.0, 0.4


def padded(grid, steps, high, low, longest):
  """A grid of ``steps`` steps, filled up with ``low`` to ``longest`` steps."""
  return jnp.asarray(np.append(grid(steps, high, low), np.full(longest - steps, low)))


@functools.cache
def exact_flow(x, high, low):
  """The end of the probability flow from ``x`` at level ``high`` to level ``low``."""
  derivative = lambda sigma, x: (x - exact_x0(x, sigma)) / sigma  # noqa: E731
  return solve_ivp(derivative, (high, low), x, "DOP853", rtol=1e-13, atol=1e-14).y[:, -1]


# --- order ----------------------------------------------------------------------------------------


def errors_of_the_flow(solver, x, counts, high, low):
  """The errors at the end for each number of steps in ``counts``, for both grids."""
  model, longest = mixture(), max(counts)
  program = jax.jit(lambda *args: walk(solver, model.denoise, jnp.asarray(x), *args))
  keys, wanted = jax.random.split(jax.random.key(0), longest), exact_flow(tuple(x), high, low)
  for grid in (smooth_grid, uneven_grid):
    yield [np.linalg.norm(program(padded(grid, n, high, low, longest), keys, n) - wanted) for n in counts]


def test_deterministic_solvers_converge_at_their_order(solver, float64):
  if is_random(solver):
    pytest.skip("stochastic: its order is tested by the variance, below")
  # The first steps of a third-order multistep method have a lower order. Their error is small only if x0 hardly changes
  # there, so that the grid must start at a high level.
  counts, high, low = (np.array([32, 64, 128, 256]), 5.0, 0.4) if solver.order < 3 else FINE
  for errors in errors_of_the_flow(solver, np.array([0.8, -0.6]) * high, counts, high, low):
    assert abs(order_of(counts, errors) - solver.order) < 0.1
    assert errors[-1] < 0.05


def test_the_variance_of_a_gaussian_converges_at_the_order(solver, given_noise, float64):
  if solver.order == 0:
    pytest.skip("it samples consistency models alone")
  # For Gaussian data every step is affine in the start and in the noises. So the mean and the variance of the samples
  # follow exactly from derivatives, without sampling errors.
  m, v = 0.7, 0.3
  counts, high, low = (np.array([256, 512, 1024, 2048]), 6.0, 0.3) if solver.order < 3 else FINE

  def denoise(x, sigma):
    return m + v / (v + sigma**2) * (x - m)

  end = lambda x, z, solver, sigmas, n: walk(solver, denoise, x, sigmas, z, n)  # noqa: E731
  path, longest = jax.jit(jax.value_and_grad(end, (0, 1))), max(counts)
  gamma = getattr(solver, "gamma", None)
  for grid in (smooth_grid, uneven_grid):
    errors = []
    for n in counts:
      if isinstance(solver, jg.EDMStochastic):  # the more steps, the less noise in each
        solver = solver.replace(gamma=gamma * counts[0] / n)
      sigmas = padded(grid, n, high, low, longest)
      mean, (by_start, by_noise) = path(jnp.asarray(m), jnp.zeros((longest, 2)), solver, sigmas, n)
      variance = by_start**2 * (v + high**2) + (by_noise**2).sum()
      np.testing.assert_allclose(mean, m, rtol=1e-12)
      errors.append(abs(variance - (v + low**2)))
    assert abs(order_of(counts, errors) - solver.order) < 0.1, grid
    assert errors[-1] < 0.05 * (v + low**2)


def test_unipc_3_is_of_fourth_order(float64):
  # A separate test: the errors reach the rounding errors with few steps, and the solver has no noise.
  counts = [256, 512, 1024]
  for errors in errors_of_the_flow(jg.UniPC(3), np.array([40.0, -30.0]), counts, 50.0, 0.4):
    assert abs(order_of(counts, errors) - jg.UniPC(3).order) < 0.1


@pytest.mark.parametrize("make", [jg.EulerAncestral, jg.DPMpp2SAncestral, jg.DPMpp2SSDE, jg.DPMpp2MSDE, jg.DPMpp3MSDE])
def test_gradients_with_respect_to_eta_are_finite(make, float64):
  def end(solver):
    return jg.sample(mixture().denoiser, jax.random.key(0), (2,), jg.karras(5), solver, 1)[0].sum()

  gradient = jax.jit(jax.grad(end))
  for eta in (0.0, 0.5, 1.0):
    assert np.isfinite(jax.tree.leaves(gradient(make(jnp.asarray(eta), jnp.asarray(1.0))))).all(), eta


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("euler-ancestral", {"eta": 1.5}, "eta must be"),
    ("euler-ancestral", {"s_noise": -1}, "s_noise must be"),
    ("dpmpp-2s-ancestral", {"eta": -0.1}, "eta must be"),
    ("dpmpp-2m-sde", {"eta": -1}, "eta must be"),
    ("dpmpp-2s-sde", {"eta": -1}, "eta must be"),
    ("dpmpp-2s-sde", {"s_noise": -1}, "s_noise must be"),
    ("dpmpp-2m-sde", {"solver_type": "huen"}, "did you mean 'heun'"),
    ("dpmpp-3m-sde", {"s_noise": float("nan")}, "s_noise must be"),
    ("unipc", {"predictor": 4}, "predictor must be 1, 2 or 3"),
    ("unipc", {"predictor": 0}, "predictor must be a whole number of at least 1"),
  ],
)
def test_bad_options(name, options, message):
  with pytest.raises(ValueError, match=message):
    jg.solvers.solver(name, **options)


# --- the papers' steps, in their own variables: x_t = sqrt(ᾱ_t) x ------------------------------------

ALPHA_BARS = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


@pytest.fixture(params=[(999, 998), (700, 650), (400, 10), (3, 2), (0, None)], ids=str)
def ddpm_step(request, float64):
  """``x_t``, x0, noise and ᾱ at two steps of DDPM's process; ``None`` is the clean end, ᾱ = 1."""
  t, before = request.param
  alpha_bar, alpha_bar_before = ALPHA_BARS[t], 1.0 if before is None else ALPHA_BARS[before]
  x_t, x0, z = np.random.default_rng(t).normal(size=(3, 4))
  return x_t, x0, z, alpha_bar, alpha_bar_before


def one_step(solver, x_t, x0, z, alpha_bar, alpha_bar_before):
  """Take a step of our solver, with input and output in the papers' variables."""
  sigma, sigma_next = (np.sqrt((1 - a) / a) for a in (alpha_bar, alpha_bar_before))
  state = solver.init(jnp.asarray(x_t / np.sqrt(alpha_bar)))
  state = solver.step(lambda x, s: jnp.asarray(x0), state, jnp.asarray(sigma), jnp.asarray(sigma_next), jnp.asarray(z))
  np.testing.assert_array_equal(state.x0, x0)
  return np.sqrt(alpha_bar_before) * np.asarray(state.x)


def test_ddpm_is_the_papers_posterior(ddpm_step, given_noise):
  x_t, x0, z, alpha_bar, before = ddpm_step
  # Ho et al., arXiv:2006.11239, eq. 6 and 7.
  alpha = alpha_bar / before
  beta = 1 - alpha
  mean = (np.sqrt(before) * beta * x0 + np.sqrt(alpha) * (1 - before) * x_t) / (1 - alpha_bar)
  variance = (1 - before) / (1 - alpha_bar) * beta
  np.testing.assert_allclose(one_step(jg.DDPM(), *ddpm_step), mean + np.sqrt(variance) * z, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 1.0])
def test_ddim_is_the_papers_step(ddpm_step, eta, given_noise):
  x_t, x0, z, alpha_bar, before = ddpm_step
  # Song et al., arXiv:2010.02502, eq. 16 and 12.
  eps = (x_t - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar)
  sigma = eta * np.sqrt((1 - before) / (1 - alpha_bar)) * np.sqrt(1 - alpha_bar / before)
  wanted = np.sqrt(before) * x0 + np.sqrt(max(1 - before - sigma**2, 0)) * eps + sigma * z
  np.testing.assert_allclose(one_step(jg.DDIM(eta), *ddpm_step), wanted, rtol=1e-8, atol=1e-9)


def vp_x0(x_t, alpha, s):
  return exact_x0(x_t / alpha, s / alpha)


@pytest.mark.parametrize("grid", [smooth_grid, uneven_grid])
def test_dpmpp_2m_is_algorithm_2(grid, float64):
  sigmas = np.append(grid(9, 20.0, 0.05), 0.0)
  alphas = 1 / np.sqrt(1 + sigmas**2)
  s = sigmas * alphas
  x = start = np.array([3.0, -1.0])
  with np.errstate(divide="ignore"):
    lambdas = np.log(alphas / s)
  # Lu et al., arXiv:2211.01095, Algorithm 2; the step to λ = ∞ is its first-order one, e^{-h} = 0.
  before = None
  for i in range(1, len(sigmas)):
    h = lambdas[i] - lambdas[i - 1]
    model = vp_x0(x, alphas[i - 1], s[i - 1])
    if before is None or np.isinf(h):
      d = model
    else:
      r = (lambdas[i - 1] - lambdas[i - 2]) / h
      d = (1 + 1 / (2 * r)) * model - 1 / (2 * r) * before
    x = s[i] / s[i - 1] * x - alphas[i] * (np.exp(-h) - 1) * d
    before = model
  got = jg.sample(
    mixture().denoiser, jax.random.key(0), (2,), sigmas, jg.DPMpp2M(), 3, x_init=jnp.asarray(start / alphas[0])
  )[0]
  np.testing.assert_allclose(got, x, rtol=1e-11)


def test_heun_is_algorithm_1(float64):
  t = np.append(smooth_grid(7, 20.0, 0.05), 0.0)
  x = start = np.array([30.0, -10.0])
  # Karras et al., arXiv:2206.00364, Algorithm 1 with σ(t) = t, s(t) = 1.
  for i in range(len(t) - 1):
    d = (x - exact_x0(x, t[i])) / t[i]
    x_next = x + (t[i + 1] - t[i]) * d
    if t[i + 1] != 0:
      d_next = (x_next - exact_x0(x_next, t[i + 1])) / t[i + 1]
      x_next = x + (t[i + 1] - t[i]) * (0.5 * d + 0.5 * d_next)
    x = x_next
  got = jg.sample(mixture().denoiser, jax.random.key(0), (2,), t, jg.Heun(), 3, x_init=jnp.asarray(start))[0]
  np.testing.assert_allclose(got, x, rtol=1e-11)


ENDS = [
  (jg.DDIM(0.0), jg.Euler()),
  (jg.DDIM(1.0), jg.DDPM()),
  (jg.DDIM(0.7), jg.EulerAncestral(0.7)),
  (jg.DPMpp2SAncestral(0.0), jg.DPMpp2S()),
  (jg.DPMpp2SSDE(0.0), jg.DPMpp2S()),
  (jg.DPMpp2MSDE(0.0), jg.DPMpp2M()),
  (jg.DPMpp3MSDE(0.0), jg.DPMpp3M()),
]


@jax.jit
def path(model, keys, solver):
  """The paths of samples. Solvers that differ in their numbers alone share this program."""
  return jax.vmap(lambda key: jg.sample(model, key, (2,), jg.karras(12), solver, 3, lambda state: state.x)[1])(keys)


@pytest.mark.parametrize(("one", "other"), ENDS, ids=str)
def test_a_family_ends_in_its_members(one, other, float64):
  model, keys = mixture().denoiser, jax.random.split(jax.random.key(0), 5)
  np.testing.assert_allclose(*(path(model, keys, solver) for solver in (one, other)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("ratio", [0.5, 1e-2, 1e-4])
def test_ddim_1_is_ddpm_over_long_steps_in_float32(ratio, given_noise):
  # The remaining factor of eps is sigma'² / sigma. In the paper's form it is a small difference of two large numbers.
  x, z = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
  args = lambda x0: x0, jnp.asarray(1.0), jnp.asarray(ratio, jnp.float32), jnp.asarray(z)
  states = [s.step(lambda x, sigma: 0 * x, s.init(jnp.asarray(x)), *args[1:]).x for s in (jg.DDIM(1.0), jg.DDPM())]
  np.testing.assert_allclose(*states, rtol=1e-5, atol=2e-6 * ratio)


# --- every solver ---------------------------------------------------------------------------------


def test_the_last_step_lands_on_x0(solver, no_rank_promotion):
  x0 = jnp.array([0.3, -2.0])
  state = solver.init(jnp.array([5.0, 7.0]))
  np.testing.assert_array_equal(state.x, [5.0, 7.0])
  for sigma, sigma_next in ((3.0, 1.0), (1.0, 0.0)):
    state = solver.step(lambda x, s: x0, state, jnp.asarray(sigma), jnp.asarray(sigma_next), jax.random.key(0))
  np.testing.assert_allclose(state.x, x0, rtol=1e-6)
  np.testing.assert_array_equal(state.x0, x0)


def test_a_step_evaluates_as_often_as_declared(solver):
  calls = []

  def denoise(x, sigma):
    calls.append(1)
    return 0.5 * x

  solver.step(denoise, solver.init(jnp.ones(2)), jnp.asarray(2.0), jnp.asarray(1.0), jax.random.key(0))
  assert len(calls) == solver.evaluations


def test_a_step_depends_on_its_key_if_declared_stochastic():
  for cls in jg.solvers.SOLVERS.values():
    # Two solvers have no noise by default.
    options = {jg.DDIM: {"eta": 1.0}, jg.EDMStochastic: {"gamma": 0.1}}.get(cls, {})
    assert is_random(cls(**options)) == cls.stochastic, cls


def test_the_documentation_lists_what_solvers_declare(all_solvers):
  document = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
  table = document.partition("## Solvers\n")[2].partition("\n## ")[0]
  documented = {}
  for row in table.splitlines():
    if row.startswith("| `") and not row.startswith("| `--"):
      name, cls, order, evaluations, noise, _, _ = (cell.strip(" `") for cell in row.strip("|").split("|"))
      documented[name] = cls.partition("(")[0], int(order), int(evaluations), not noise.startswith("no")
  wanted = {}
  for name in jg.solvers.SOLVERS:
    solver = jg.solvers.solver(name)
    wanted[name] = type(solver).__name__, solver.order, solver.evaluations, solver.stochastic
  assert documented == wanted
  # All of them are in the table of conftest.py, so that the tests of every solver run for them.
  assert {type(solver) for solver in all_solvers.values()} == set(jg.solvers.SOLVERS.values())


def test_solvers_by_name():
  for name, cls in jg.solvers.SOLVERS.items():
    assert type(jg.solvers.solver(name)) is cls
  assert jg.solvers.solver("ddim", eta=0.3).eta == 0.3
  with pytest.raises(ValueError, match="did you mean 'heun'"):
    jg.solvers.solver("heunn")
  with pytest.raises(ValueError, match="has no option 'eta'"):
    jg.solvers.solver("euler", eta=1.0)


@pytest.mark.parametrize("eta", [-0.1, 1.1, np.nan, np.inf])
def test_eta_lies_between_0_and_1(eta):
  with pytest.raises(ValueError, match="eta must be"):
    jg.DDIM(eta)


# --- one key, one Brownian motion -----------------------------------------------------------------


def ancestral(eta):
  """The remaining factor of eps, and the std of the added noise, by Song et al., arXiv:2010.02502, eq. 12 and 16."""

  def parts(sigma, below):
    up = eta * below / sigma * np.sqrt(sigma**2 - below**2)
    return np.sqrt(below**2 - up**2) / sigma, up

  return parts


def sde(eta):
  """The same by Lu et al., arXiv:2211.01095, eq. 18."""
  return lambda sigma, below: (
    (below / sigma) ** (1 + eta),
    below * np.sqrt(1 - (below / sigma) ** (2 * eta)),
  )


def large(sigma, below):
  """The same for DDPM with beta as the variance, in ``x = x_t / alpha``."""
  return (below / sigma) ** 2, np.sqrt((sigma**2 - below**2) / (1 + sigma**2) * (1 + below**2))


def churn(gamma):
  """The same for Karras et al., arXiv:2206.00364, Algorithm 2: the step down shrinks the noise added before it."""
  return lambda sigma, below: (below / sigma / (1 + gamma), below / (1 + gamma) * np.sqrt(gamma * (2 + gamma)))


NOISY = [
  (jg.DDIM(1.0), ancestral(1.0)),
  (jg.DDIM(0.5), ancestral(0.5)),
  (jg.DDPM(), ancestral(1.0)),
  (jg.DDPM("large"), large),
  (jg.EulerAncestral(0.7), ancestral(0.7)),
  (jg.DPMpp2SAncestral(), ancestral(1.0)),
  (jg.DPMpp2SSDE(), sde(1.0)),
  (jg.DPMpp2SSDE(0.4), sde(0.4)),
  (jg.DPMpp2MSDE(), sde(1.0)),
  (jg.DPMpp2MSDE(0.4, solver_type="heun"), sde(0.4)),
  (jg.DPMpp3MSDE(0.4), sde(0.4)),
  (jg.EDMStochastic(0.2), churn(0.2)),
  (jg.Consistency(), lambda s, n: (0 * s, np.sqrt(n**2 - 0.002**2))),
]


def test_one_key_is_one_noise_for_every_solver(float64):
  # If x0 is known, the noise that a step drew can be computed from its result.
  x0, key = np.array([0.3, -1.0, 2.0]), jax.random.key(3)
  known, sigmas = lambda x, sigma, cond: jnp.asarray(x0), np.asarray(jg.karras(6, 0.05, 10.0))
  start_key, step_key = jax.random.split(key)
  start = sigmas[0] * jax.random.normal(start_key, (3,))
  wanted = [jax.random.normal(jax.random.fold_in(step_key, i), (3,)) for i in range(5)]
  walked = jax.jit(lambda solver: jg.sample(known, key, (3,), sigmas, solver, collect=lambda state: state.x)[1])
  for solver, parts in NOISY:
    xs = np.asarray(walked(solver))
    factor, up = parts(sigmas[:-2, None], sigmas[1:-1, None])
    before = np.stack([start, *xs[:-2]])
    noise = (xs[:-1] - x0[None] - factor * (before - x0)) / up
    np.testing.assert_allclose(noise, wanted, rtol=1e-9, atol=1e-9, err_msg=str(solver))
  assert {type(solver) for solver, _ in NOISY} == {cls for cls in jg.solvers.SOLVERS.values() if cls.stochastic}


@pytest.mark.slow
def test_samples_of_one_key_converge_to_each_other():
  # The exact path is the same for all solvers. The difference of two solvers on one path falls in proportion to the
  # length of the steps.
  model = mixture().denoiser
  keys, others = (jg.sample_keys(jax.random.key(seed), 100) for seed in (0, 1))

  def ends(solver, steps, keys):
    grid = jg.log_snr_uniform(steps, 0.01, 40.0)
    return np.asarray(jax.jit(jax.vmap(lambda key: jg.sample(model, key, (2,), grid, solver, 3)[0]))(keys))

  def rms_difference(a, b):
    return np.sqrt(((a - b) ** 2).sum(1).mean())

  solvers = [jg.DDIM(1.0), jg.DPMpp2SAncestral(), jg.DPMpp2SSDE(), jg.DPMpp3MSDE()]
  reference = {steps: ends(jg.DPMpp2MSDE(), steps, keys) for steps in (40, 160)}
  of_other_keys = rms_difference(reference[160], ends(jg.DPMpp2MSDE(), 160, others))
  for solver in solvers:
    coarse, fine = (rms_difference(reference[steps], ends(solver, steps, keys)) for steps in reference)
    assert fine < 0.04 * of_other_keys, solver
    assert fine < coarse / 3, solver


@pytest.mark.parametrize("eta", [1e-6, 0.4, 1.0])
def test_the_noise_at_the_midpoint_belongs_to_the_same_brownian_motion(eta, given_noise, float64):
  # The noise of a step is proportional to the integral of exp(-eta (end - t)) dW, here a sum over short intervals.
  h, n = 1.3, 20000
  t = (np.arange(n) + 0.5) * h / n
  to_half, whole = np.exp(-eta * (h / 2 - t)) * (t < h / 2), np.exp(-eta * (h - t))
  correlation = (to_half @ whole) / np.sqrt((to_half @ to_half) * (whole @ whole))
  inputs = []

  def denoise(x, sigma):
    inputs.append(x)
    return 0 * x

  # The step's first draw is (1, 0) and its second draw is (0, 1), so that the result shows the weight of each.
  key, solver = jnp.eye(2), jg.DPMpp2SSDE(eta)
  with jax.disable_jit():
    state = solver.step(denoise, solver.init(jnp.zeros(2)), jnp.exp(h), jnp.asarray(1.0), key)
  half = inputs[1] / np.linalg.norm(inputs[1])
  np.testing.assert_allclose(half, [correlation, np.sqrt(1 - correlation**2)], rtol=1e-6)
  np.testing.assert_allclose(state.x / np.linalg.norm(state.x), [1.0, 0.0])


# --- the distribution of samples ------------------------------------------------------------------


NUM = 3000


def four_components():
  means = [[-1.0, 0.0], [1.0, 0.3], [0.2, 1.0], [0.0, -0.5]]
  return jg.gaussian_mixture(means, [0.1, 0.2, 0.2, 0.1], [0, 0, 1, 1], [0.6, 0.4, 0.5, 0.5])


@functools.cache
def exact_draws():
  draw = jax.jit(jax.vmap(lambda key: four_components().sample(key, 0)))
  return np.asarray(draw(jax.random.split(jax.random.key(2), NUM)))


def pvalues(solver, scale, steps):
  """Two-sample tests of guided samples of class 0 against exact draws, along each axis and the diagonal."""
  guided = jg.classifier_free(2, scale)(four_components().denoiser)
  samples = jg.sample_batch(
    guided, jax.random.key(1), 0, num=NUM, shape=(2,), sigmas=jg.karras(steps, 0.01, 40.0), solver=solver,
    devices=jax.devices()[:1],
  )  # fmt: skip
  directions = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
  return [stats.ks_2samp(samples @ d, exact_draws() @ d).pvalue for d in directions]


def test_at_scale_1_solvers_sample_the_conditional(solver):
  if solver.order == 0:
    pytest.skip("it samples consistency models alone")
  steps = 160 if solver.order == 1 else 40
  assert min(pvalues(solver, 1.0, steps)) > 1e-3
  # At another scale, with the same program, samples are sharper than the conditional, and the test detects it.
  assert min(pvalues(solver, 3.0, steps)) < 1e-9


def test_two_classes_of_solvers_have_different_tree_structures():
  # With equal structures, jit would run the program that it compiled for the other solver.
  structures = [jax.tree.structure(solver) for solver in (jg.Euler(), jg.DDPM(), jg.Heun(), jg.DPMpp2M())]
  assert all((a == b) == (i == j) for i, a in enumerate(structures) for j, b in enumerate(structures))


# --- DDPM: tests that the published arrays of tests/test_guided_diffusion.py do not cover --------------


def quadratic_log_prob(x, sigma, cond):
  return -0.5 * ((x - cond) ** 2).sum() / (1 + sigma**2)


def its_gradient(x, sigma, cond):
  return (cond - x) / (1 + sigma**2)


def test_the_mean_shift_at_the_mean_is_the_papers(given_noise, float64):
  # Dhariwal & Nichol, arXiv:2105.05233, section 4.1: x_{t-1} ~ N(mu + s Sigma g, Sigma) with g the gradient of
  # log p(y | x_{t-1}) at x_{t-1} = mu, in x_t = alpha x.
  x, z, y, sigma, below, s = np.array([1.5, -2.0]), np.array([0.3, -1.1]), np.array([0.4, 0.2]), 2.0, 1.2, 3.0
  alpha, alpha_below = (1 / np.sqrt(1 + level**2) for level in (sigma, below))
  x0 = exact_x0(x, sigma)
  beta = 1 - alpha**2 / alpha_below**2
  variance = beta * (1 - alpha_below**2) / (1 - alpha**2)
  mu = (
    alpha_below * beta / (1 - alpha**2) * x0 + alpha / alpha_below * (1 - alpha_below**2) / (1 - alpha**2) * alpha * x
  )
  g = its_gradient(mu / alpha_below, below, y) / alpha_below
  wanted = (mu + s * variance * g + np.sqrt(variance) * z) / alpha_below
  solver = jg.DDPM("small", quadratic_log_prob, s, gradient_at="mean")
  conditioned = jg.solvers.Conditioned(lambda x, sigma, cond: jnp.asarray(x0), y)
  got = solver.step(conditioned, solver.init(jnp.asarray(x)), jnp.asarray(sigma), jnp.asarray(below), jnp.asarray(z)).x
  np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_the_two_points_of_the_gradient_agree_in_small_steps(float64):
  model = mixture()

  def end(point, steps):
    solver = jg.DDPM("small", model.log_prob, 1.0, gradient_at=point)
    grid = jg.respaced(jg.schedules.table("linear", 1000), steps)
    denoise = jg.unconditional(3)(model.denoiser)
    return jax.jit(lambda grid: jg.sample(denoise, jax.random.key(0), (2,), grid, solver, 1)[0])(grid)

  # The numbers differ, and the difference falls with the number of steps. It is small already with few steps, because
  # the last steps reduce the difference of two samples.
  differences = [float(jnp.abs(end("x", steps) - end("mean", steps)).max()) for steps in (20, 500)]
  assert differences[0] > 1e-6
  assert differences[1] < differences[0] / 5


def test_a_learned_range_needs_a_learned_variance():
  with pytest.raises(ValueError, match="learned_variance=True"):
    jg.sample(mixture().denoiser, jax.random.key(0), (2,), jg.karras(3), jg.DDPM("learned_range"), 1)


def test_a_mean_shift_needs_the_condition():
  solver = jg.DDPM(log_prob=quadratic_log_prob)
  with pytest.raises(TypeError, match="Conditioned"):
    solver.step(lambda x, sigma: x, solver.init(jnp.ones(2)), jnp.asarray(1.0), jnp.asarray(0.5), jax.random.key(0))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"variance": "lerned_range"}, "did you mean 'learned_range'"),
    ({"gradient_at": "mu"}, "unknown point for the gradient 'mu'"),
    ({"scale": float("nan")}, "scale must be finite"),
  ],
)
def test_bad_options_of_ddpm(options, message):
  with pytest.raises(ValueError, match=message):
    jg.DDPM(**options)


def test_learned_variance_costs_one_evaluation_a_step():
  calls = []

  def apply(params, x, c_noise, cond):
    jax.debug.callback(lambda: calls.append(1))
    return jnp.concatenate([params * x, x], -1)

  scaling = jg.scaling.eps(jg.schedules.Cosine())
  denoise = jg.NetworkDenoiser(jnp.asarray(0.5), apply, scaling, learned_variance=True)
  jax.block_until_ready(jg.sample(denoise, jax.random.key(0), (4, 4, 1), jg.karras(7), jg.DDPM("learned_range")))
  jax.effects_barrier()
  assert len(calls) == 7
