"""EDM and EDM2: arrays of the published samplers, preconditionings and losses, and properties of our sampler.

`data/README.md` describes the origin of the arrays.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats

import jaxguide as jg
from jaxguide import losses, scaling, schedules


@functools.cache
def arrays(name):
  with np.load(Path(__file__).parent / "data" / f"{name}.npz") as file:
    return dict(file)


def mixture(data, name):
  return jg.gaussian_mixture(*(data[f"{name}/{key}"] for key in ("means", "variances", "classes", "weights")))


def cases(name):
  return [key.removesuffix("/xs") for key in arrays(name) if key.endswith("/xs")]


def wide(per_example):
  return jnp.reshape(per_example, (-1, 1, 1, 1))


# --- the samplers' trajectories -------------------------------------------------------------------

CHURN = {"s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
VP_CHURN = {"s_min": 0.01, "s_max": 20.0, "s_noise": 1.005}
# From table 1 in arXiv:2206.00364: the smallest and the largest level of each discretization of time.
ENDS = {"vp": (0.0103, 152.17), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}


def edm(case):
  """Return the grid and the solver of one of EDM's cases."""
  if case == "abl-edm-alpha0.5":
    return schedules.karras(12), jg.EDMStochastic(alpha=0.5)
  if case.startswith("edm-"):
    range_ = {"edm-18-range": (18, 0.01, 20.0, 5.0), "edm-9-netlimits": (9, 0.02, 40.0)}.get(case, (18,))
    return schedules.karras(*range_), jg.EDMStochastic.from_churn(40 * case.endswith("churn"), 18, **CHURN)
  churn = case == "abl-vp-churn"
  _, discretization, schedule, signal, method, steps = ("abl-vp-vp-vp-heun-16" if churn else case).split("-")
  low, high = ENDS[discretization]
  if discretization == "vp":
    low, high = (float(schedules.Linear().sigma(t)) for t in (1e-3, 1.0))
  vp = schedules.Linear.between(low, high, 1e-3)
  grid = {
    "vp": lambda steps: schedules.from_schedule(vp, steps, 1e-3),
    "ve": lambda steps: schedules.log_snr_uniform(steps, low, high),
    "iddpm": lambda steps: schedules.iddpm(steps, low, high),
    "edm": lambda steps: schedules.karras(steps, low, high),
  }[discretization](int(steps))
  return grid, jg.EDMStochastic.from_churn(
    20 * churn, 16, **VP_CHURN, alpha={"heun": 1.0, "euler": None}[method],
    schedule={"vp": vp, "ve": schedules.EDM(0.0, 1.0, 0.5), "linear": None}[schedule],
    variance_preserving=signal == "vp",
  )  # fmt: skip


def edm2(case):
  """Return the grid and the solver of one of EDM2's cases."""
  return schedules.karras(32), jg.EDMStochastic.from_churn(40 * case.endswith("churn"), 32, **CHURN)


@jax.jit
def denoised(denoise, x, sigma, labels):
  """Denoise all examples at one level. The cases of a shape and a precision share this program."""
  return jax.vmap(denoise, (0, None, 0))(x, sigma, labels)


def walk(denoise, labels, solver, x, sigmas, noise):
  """Return x before each step and after the last, and the examples and levels that the denoiser was called with."""
  calls = []

  def recording(x, sigma):
    calls.append((x, sigma))
    with jax.disable_jit(False):
      return denoised(denoise, x, sigma, labels)

  state, xs = solver.init(x), [x]
  with jax.disable_jit():  # so that all calls are recorded, also those inside a lax.cond
    for step in zip(sigmas[:-1], sigmas[1:], noise, strict=True):
      state = solver.step(recording, state, *step)
      xs.append(state.x)
  return np.stack(xs), *(np.stack(values) for values in zip(*calls, strict=True))


def in_float32_too(cases):
  """Pairs of a case and a precision. The published EDM sampler computes in float64, ours in the type of the grid."""
  return [(case, "float64") for case in cases] + [(case, "float32") for case in cases if "image" in case]


@pytest.fixture
def precision(request):
  """Compute in float64 if the parameter says so, and return the parameter."""
  with jax.enable_x64(request.param == "float64"):
    yield request.param


@pytest.mark.parametrize(("case", "precision"), in_float32_too(cases("edm_samplers")), indirect=["precision"])
def test_edms_samplers(case, given_noise, precision):
  data, (where, name) = arrays("edm_samplers"), case.split("/")
  model, (sigmas, solver) = mixture(data, f"{where}/mixture"), edm(name)
  labels = data[f"{where}/labels"]
  labels = labels if name.endswith("cond") else np.full(len(labels), model.num_classes)
  x, noise = (jnp.asarray(data[f"{where}/{key}"], sigmas.dtype) for key in ("latents", "noise"))
  xs, _, levels = walk(model.denoiser, labels, solver, x * sigmas[0], sigmas, noise[: len(sigmas) - 1])
  if solver.variance_preserving:  # the published state is x_t
    xs = xs * wide(1 / np.sqrt(1 + np.asarray(sigmas) ** 2))[..., None]
  wanted, deviation = data[f"{case}/xs"], data[f"{case}/deviation"]
  # The published code rounds the cosine table's betas to float32, which changes its smallest levels by 5e-4.
  table = "iddpm" in name
  if precision == "float64" and not table:  # up to the rounding of the stored arrays
    np.testing.assert_allclose(xs, wanted, rtol=1e-7, atol=1e-7)
  np.testing.assert_allclose(xs, wanted, rtol=0, atol=max(1e-5, 10 * deviation))
  np.testing.assert_allclose(
    levels, data[f"{case}/sigmas"], rtol=1e-3 if table else 1e-10 if precision == "float64" else 1e-5
  )


@pytest.mark.parametrize(("case", "precision"), in_float32_too(cases("edm2_samplers")), indirect=["precision"])
def test_edm2s_sampler_with_guidance(case, given_noise, precision):
  data, (where, name) = arrays("edm2_samplers"), case.split("/")
  model, weak = (mixture(data, f"{where}/{which}") for which in ("mixture", "weak"))
  sigmas, solver = edm2(name)
  reference = jg.unconditional(model.num_classes)(model.denoiser) if "cfg" in name else weak.denoiser
  scale = {"churn": 1.5, "f64": 1.5}.get(name.split("-")[1]) or float(name.split("-w")[1])
  guided = jg.autoguidance(reference, scale)(model.denoiser)
  # The published sampler draws noise only in steps that add it.
  raised = (sigmas[:-1] >= CHURN["s_min"]) & (sigmas[:-1] <= CHURN["s_max"])
  noise = (
    jnp.zeros((32, *data[f"{where}/latents"].shape), sigmas.dtype)
    .at[raised]
    .set(jnp.asarray(data[f"{where}/noise"], sigmas.dtype))
  )
  x = jnp.asarray(data[f"{where}/latents"], sigmas.dtype) * sigmas[0]
  xs, inputs, levels = walk(guided, data[f"{where}/labels"], solver, x, sigmas, noise)
  # Each step but the last calls the denoiser twice. The published trajectory has the input of the first call of each
  # step, and the result.
  wanted, deviation = data[f"{case}/xs"], data[f"{case}/deviation"]
  sampler_deviation = data[f"{case}/sampler_deviation"]
  # The published sampler and its grid are in float32, and therefore not exact.
  tolerance = max(1e-5, 10 * deviation, 2 * sampler_deviation)
  np.testing.assert_allclose(np.append(inputs[::2], xs[-1:], axis=0), wanted, rtol=0, atol=tolerance)
  np.testing.assert_allclose(xs[-1], wanted[-1], rtol=0, atol=2e-6)
  np.testing.assert_allclose(levels, data[f"{case}/sigmas"], rtol=2e-6)


# --- properties of the sampler --------------------------------------------------------------------

MEANS, VARIANCES = np.array([[-0.8], [1.1]]), np.array([0.3, 0.1])


def cdf(x, sigma):
  """The distribution function of a noisy mixture in one dimension. It is constant along the flow."""
  return stats.norm.cdf(x, MEANS[:, 0], np.sqrt(VARIANCES + sigma**2)).mean()


PATHS = {
  "midpoint": jg.EDMStochastic(alpha=0.5),
  "two thirds": jg.EDMStochastic(alpha=2 / 3),
  "Euler": jg.EDMStochastic(alpha=None),
  "VP": jg.EDMStochastic(schedule=schedules.Linear(), variance_preserving=True),
  "VP, Euler": jg.EDMStochastic(schedule=schedules.Linear(), variance_preserving=True, alpha=None),
  "VE": jg.EDMStochastic(schedule=schedules.EDM(0.0, 1.0, 0.5)),
  "sigma in VP's scale": jg.EDMStochastic(variance_preserving=True),
  "VP's time": jg.EDMStochastic(schedule=schedules.Linear(), alpha=0.5),
}


@pytest.mark.parametrize("path", PATHS)
def test_every_path_converges_at_its_order(path, given_noise, float64):
  solver, high, low, start = PATHS[path], 5.0, 0.4, 3.0
  model = jg.gaussian_mixture(MEANS, VARIANCES, [0, 1])
  exact = optimize.brentq(lambda x: cdf(x, low) - cdf(start, high), -5, 5, xtol=1e-13)
  counts, errors = [40, 80, 160, 320], []

  @jax.jit
  def end(sigmas, n):
    """Take the first ``n`` steps of a grid. One compiled program serves every ``n``."""

    def step(state, inputs):
      i, *levels = inputs
      return jax.lax.cond(i < n, lambda: solver.step(model.denoise, state, *levels, jnp.zeros(1)), lambda: state), None

    inputs = jnp.arange(len(sigmas) - 1), sigmas[:-1], sigmas[1:]
    return jax.lax.scan(step, solver.init(jnp.asarray([start])), inputs)[0].x

  for n in counts:
    sigmas = np.append(np.geomspace(high, low, n + 1), np.full(counts[-1] - n, low))
    errors.append(abs(end(sigmas, n)[0] - exact))
  order = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
  assert abs(order - solver.order) < 0.1
  assert errors[-1] < 0.01


def test_without_churn_it_is_heun(float64, random_mixture):
  model, keys = random_mixture(0, (2,)).denoiser, jax.random.split(jax.random.key(0), 3)
  paths = [
    jax.jit(jax.vmap(lambda key: jg.sample(model, key, (2,), jg.karras(9), solver, 1, lambda s: s.x)[1]))(keys)  # noqa: B023
    for solver in (jg.EDMStochastic(), jg.Heun())
  ]
  np.testing.assert_allclose(*paths, rtol=1e-12)


def test_noise_is_added_between_the_bounds_only(given_noise, float64):
  solver = jg.EDMStochastic(gamma=0.2, s_min=1.0, s_max=3.0, s_noise=1.5, alpha=None)
  for sigma, raised in ((0.9, False), (1.0, True), (3.0, True), (3.1, False)):
    calls = []
    solver.step(
      lambda x, sigma: calls.append((x, sigma)) or x, solver.init(jnp.asarray(2.0)), jnp.asarray(sigma),  # noqa: B023
      jnp.asarray(0.5), jnp.asarray(0.7),
    )  # fmt: skip
    hat = 1.2 * sigma if raised else sigma
    np.testing.assert_allclose(calls[0], (2.0 + 1.5 * 0.7 * np.sqrt(hat**2 - sigma**2), hat), rtol=1e-14)


def test_churn_may_raise_the_level_above_the_schedules_largest(given_noise, float64):
  # The time may exceed 1. If it were clipped, the level passed to the denoiser would not be that of the noise.
  solver = jg.EDMStochastic(gamma=0.4, schedule=schedules.Linear(), variance_preserving=True)

  @jax.jit
  def first_level(top):
    calls = []
    solver.step(lambda x, sigma: calls.append(sigma) or x, solver.init(top), top, top / 2, jnp.asarray(1.0))
    return calls[0]

  top = schedules.Linear().sigma(1.0)
  np.testing.assert_allclose(first_level(top), 1.4 * top, rtol=1e-12)


@jax.jit
@jax.value_and_grad
def sum_and_gradient(solver, model):
  return jg.sample(model, jax.random.key(0), (2,), jg.karras(6), solver, 1)[0].sum()


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_gradients_with_respect_to_the_solver_are_finite(gamma, random_mixture, float64):
  solver = jg.EDMStochastic(gamma, alpha=0.7, schedule=schedules.Linear(), variance_preserving=True)
  model = random_mixture(0, (2,)).denoiser
  gradient = sum_and_gradient(solver, model)[1]
  assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(gradient))
  for name in ("s_noise", "alpha"):
    up, down = (
      sum_and_gradient(solver.replace(**{name: getattr(solver, name) + step}), model)[0] for step in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(getattr(gradient, name), (up - down) / 2e-5, rtol=1e-5, atol=1e-8)


def test_churn_is_divided_by_the_number_of_steps_up_to_a_bound():
  assert jg.EDMStochastic.from_churn(40, num_steps=256).gamma == 40 / 256
  assert jg.EDMStochastic.from_churn(40, num_steps=18).gamma == np.sqrt(2) - 1
  np.testing.assert_allclose(jax.jit(lambda churn: jg.EDMStochastic.from_churn(churn, 8).gamma)(2.0), 0.25)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"gamma": 0.5}, "gamma must be between 0 and 0.414"),
    ({"gamma": -0.1}, "gamma must be between"),
    ({"s_min": -1.0}, "s_min must be at least 0"),
    ({"s_max": np.nan}, "s_max must be at least 0"),
    ({"s_noise": np.inf}, "s_noise must be finite"),
    ({"alpha": 0}, "alpha must be above 0 and at most 1, or None for Euler's method; got 0"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(ValueError, match=message):
    jg.EDMStochastic(**options)


def test_bad_churn_and_tables():
  with pytest.raises(ValueError, match="s_churn must be at least 0"):
    jg.EDMStochastic.from_churn(-1, num_steps=5)
  with pytest.raises(ValueError, match="num_steps must be a whole number"):
    jg.EDMStochastic.from_churn(1, num_steps=0)
  with pytest.raises(TypeError, match="give a schedule"):
    jg.EDMStochastic(schedule=schedules.table("linear", 10))


# --- preconditioning and losses -------------------------------------------------------------------

SCALINGS = {
  "EDM": scaling.edm,
  "EDM-sd": lambda: scaling.edm(1.0),
  "VP": lambda: scaling.eps(schedules.Linear(), time_scale=999.0),
  "VE": scaling.ve,
  "iDDPM": lambda: scaling.iddpm(schedules.table("cosine", 1000)),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_preconditionings(name):
  data = arrays("edm_losses")
  for key, value in SCALINGS[name]()(data["precond/sigma_grid"])._asdict().items():
    wanted = data[f"precond/{name}/{key}"]
    # At small noise the published time of VP has few digits in float32, by cancellation.
    np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-3 if (name, key) == ("VP", "c_noise") else 0)


def test_iddpms_table():
  data = arrays("edm_losses")
  levels = data["precond/iDDPM/u"][::-1]  # increasing, from 0
  ours = schedules.table("cosine", 1000)
  # The published levels are a recursion in float32. The smallest ones have errors of up to 5e-4.
  np.testing.assert_allclose(np.append(0, ours.sigmas), levels, rtol=5e-4)
  np.testing.assert_allclose(ours.sigmas[100:], levels[101:], rtol=1e-5)
  theirs, grid = schedules.Table(jnp.asarray(levels[1:])), data["precond/sigma_grid"]
  np.testing.assert_array_equal(schedules.round_sigma(theirs, grid), data["precond/iDDPM/round_sigma"])
  np.testing.assert_array_equal(scaling.iddpm(theirs)(grid).c_noise, data["precond/iDDPM/c_noise"])


EDM_LEVELS = (schedules.LogNormal(), scaling.edm_weight)
EDM_LEVELS_P = (schedules.LogNormal(-0.4, 1.0), functools.partial(scaling.edm_weight, sigma_data=0.7))
LOSSES = {
  "EDMLoss": (*EDM_LEVELS, "rnd_normal"),
  "EDMLoss-P": (*EDM_LEVELS_P, "rnd_normal"),
  "VPLoss": (schedules.UniformTime(schedules.Linear()), scaling.eps_weight, "rnd_uniform down"),
  "VELoss": (schedules.LogSNR(-2 * np.log(100.0), -2 * np.log(0.02)), scaling.eps_weight, "rnd_uniform"),
}


def quantiles(data, draws):
  """Convert the published draws to the fraction of levels that are lower, the argument of ``quantile``."""
  drawn = data[draws.split()[0]].astype(np.float64).ravel()
  if "rnd_normal" in draws:
    return jnp.asarray(stats.norm.cdf(drawn))
  return jnp.asarray(1 - drawn if "down" in draws else drawn)  # VP's time decreases with its draw


@pytest.fixture
def given_draws(monkeypatch):
  """``(u, noise)``: the next losses draw these quantiles and this noise."""

  def give(u, noise):
    monkeypatch.setattr(losses, "stratified_uniform", lambda key, num: u)
    monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: noise.astype(dtype))

  return give


def perfect(model, scale, to_sigma, log_variance=None):
  """A network whose denoiser, with the given scaling, is the mixture's exact denoiser."""

  def apply(params, x, c_noise, cond):
    sigma = to_sigma(c_noise)
    c_skip, c_out, c_in, _ = map(wide, scale(sigma))
    x = x / c_in
    x0 = predicted(model.denoiser, x, sigma, cond)
    output = (x0 - c_skip * x) / c_out
    return output if log_variance is None else (output, log_variance(sigma))

  return apply


@jax.jit
def predicted(denoise, x, sigma, labels):
  return jax.vmap(denoise)(x, sigma, labels)


@pytest.mark.parametrize("cond", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_edms_losses(name, cond, float64, given_draws):
  data, (levels, weight, draws) = arrays("edm_losses"), LOSSES[name]
  case = f"{name}-cond" if cond else name
  model, x0, noise = mixture(data, "mixture"), data["images"].astype(np.float64), data["unit_noise"].astype(np.float64)
  labels = data["labels"] if cond else np.full(len(x0), model.num_classes)
  u = quantiles(data, draws)
  sigma = levels.quantile(u)
  np.testing.assert_allclose(sigma, data[f"{case}/sigma"].ravel(), rtol=1e-5)
  prediction = predicted(model.denoiser, x0 + wide(sigma) * noise, sigma, labels)
  wanted = data[f"{case}/loss"]
  np.testing.assert_allclose(wide(weight(sigma)) * (prediction - x0) ** 2, wanted, rtol=1e-4, atol=1e-5)

  given_draws(u, noise)
  scale = scaling.edm()
  apply = perfect(model, scale, lambda c: jnp.exp(4 * c))
  loss = jax.jit(
    lambda x0, labels: jg.denoising_loss(
      None, apply, jax.random.key(0), x0, labels, scaling=scale, noise_levels=levels, weight=weight
    )
  )(x0, labels)
  np.testing.assert_allclose(loss, wanted.astype(np.float64).mean(), rtol=2e-6)


def test_edm2s_loss(float64, given_draws):
  data = arrays("edm_losses")
  model, x0 = mixture(data, "edm2/mixture"), data["edm2/images"].astype(float)
  levels, scale = schedules.LogNormal(-0.4, 1.0), scaling.edm()
  u = jnp.asarray(stats.norm.cdf(data["edm2/rnd_normal"].astype(float).ravel()))
  np.testing.assert_allclose(levels.quantile(u), data["edm2/sigma"].ravel(), rtol=1e-6)
  given_draws(u, data["edm2/unit_noise"])
  log_variance = lambda sigma: 0.3 * jnp.log(sigma) - 0.2  # noqa: E731
  apply = perfect(model, scale, lambda c: jnp.exp(4 * c), log_variance)
  loss = jax.jit(
    lambda x0, labels: jg.uncertainty_loss(
      None, apply, jax.random.key(0), x0, labels, scaling=scale, noise_levels=levels, weight=scaling.edm_weight
    )
  )(x0, np.full(len(x0), model.num_classes))
  np.testing.assert_allclose(loss, data["edm2/loss"].astype(float).mean(), rtol=1e-6)


def test_the_best_log_variance_is_that_of_the_weighted_error():
  # e^u = E λ |D - x0|² for a denoiser that predicts 0, data that are N(0, 1), and one noise level.
  def loss(u):
    return jg.uncertainty_loss(
      u, lambda params, x, c_noise, cond: (jnp.zeros_like(x), jnp.full(len(x), params)), jax.random.key(0),
      jax.random.normal(jax.random.key(1), (4000, 2)), scaling=scaling.x0(schedules.Linear()),
      noise_levels=schedules.LogNormal(0.0, 0.0), weight=lambda sigma: 3.0 * sigma**0,
    )  # fmt: skip

  gradient = jax.jit(jax.grad(loss))
  assert abs(gradient(np.log(3.0))) < 0.05
  assert abs(gradient(np.log(2.0))) > 0.3


def test_a_log_variance_of_another_shape_is_refused():
  with pytest.raises(ValueError, match=r"expected \(4, 2\) and \(4,\)"):
    jax.eval_shape(
      lambda x0: jg.uncertainty_loss(
        None, lambda params, x, c_noise, cond: (x, jnp.zeros(())), jax.random.key(0), x0,
        scaling=scaling.edm(), noise_levels=schedules.LogNormal(), weight=scaling.edm_weight,
      ),
      np.zeros((4, 2), np.float32),
    )  # fmt: skip
