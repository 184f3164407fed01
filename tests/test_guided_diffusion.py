"""OpenAI's process: tables, trajectories, posterior and losses, compared with arrays from OpenAI's code.

The arrays were made with an exact mixture as the network, so no weights are needed; see tests/data/README.md.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import denoisers, posterior, scaling, schedules, variational
from jaxguide._core.typing import x0_of
from jaxguide.solvers import Conditioned

DATA = Path(__file__).parent / "data" / "guided_diffusion"
# The compiler options of users: the options that make the tests fast round differently.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
CASES = json.loads((DATA / "cases.json").read_text())
TRAJECTORIES = ["sampler_ring2d", "cfg_ring2d", "sampler_img48", "cfg_img48"]


@functools.cache
def arrays(name):
  with np.load(DATA / f"{name}.npz") as file:
    return {key: np.moveaxis(file[key], -3, -1) if file[key].ndim >= 4 else file[key] for key in file}


@functools.cache
def mixture(name):
  data = arrays(name)
  means, variances, weights = (data[f"gmm/{part}"].astype(np.float64) for part in ("means", "variances", "weights"))
  return jg.gaussian_mixture(means, variances, data["gmm/classes"], weights)


def deep(per_example):
  return jnp.asarray(per_example).reshape(-1, 1, 1, 1)


def network(params, x_vp, c_noise, cond):
  """The exact mixture as a network, with the input scaling and the time input of OpenAI's networks.

  ``params``: the mixture, the levels of the table, the number of steps in one unit of the time input, the prediction,
  and whether the variance is learned.
  """
  mixture, sigmas, per_unit, prediction, learned = params
  dtype = x_vp.dtype
  # In double precision if it is enabled, as for the published arrays.
  x_vp, c_noise, sigmas = (array.astype(float) for array in (x_vp, c_noise, sigmas))
  step = c_noise * per_unit
  sigma = sigmas[jnp.round(step).astype(int)]
  x = x_vp * deep(jnp.sqrt(1 + sigma**2))
  cond = jnp.full(x.shape[0], mixture.num_classes) if cond is None else cond
  x0 = jax.vmap(mixture.denoiser)(x, sigma, cond)
  output = x0 if prediction == "x0" else (x - x0) / deep(sigma)
  if learned:
    wave = jnp.tanh(0.7 * x_vp + 0.3 * jnp.sin(2 * jnp.pi * deep(step) / len(sigmas)) - 0.1)
    output = jnp.concatenate([output, wave], -1)
  return output.astype(dtype)


@functools.cache
def network_of_kind(*kind):
  """`network` for one prediction and one kind of variance; each kind is another compiled program."""
  return lambda params, *inputs: network((*params, *kind), *inputs)


class Network:
  """`network` with its parameters."""

  def __init__(self, name, schedule, steps, prediction="eps", learned=False, rescale=False):
    self.mixture, self.table = mixture(name), schedules.table(schedule, steps)
    time_scale = 1000 / steps if rescale else None
    self.scaling = {"eps": scaling.eps, "x0": scaling.x0}[prediction](self.table, time_scale)
    per_unit = steps / 1000 if rescale else 1.0
    self.params = self.mixture, jnp.asarray(self.table.sigmas), jnp.asarray(per_unit)
    self.kind, self.learned = network_of_kind(prediction, learned), learned

  def __call__(self, params, x, c_noise, cond):
    return self.kind(self.params, x, c_noise, cond)

  @property
  def denoiser(self):
    return jg.NetworkDenoiser(self.params, self.kind, self.scaling, learned_variance=self.learned)


network_of = functools.cache(Network)


def trajectory(guided, solver, sigmas, x, cond, noise):
  def step(state, inputs):
    state = solver.step(Conditioned(guided, cond), state, *inputs)
    return state, (state.x, state.x0)

  return jax.lax.scan(step, solver.init(x), (sigmas[:-1], sigmas[1:], noise))[1]


trajectories = jax.jit(jax.vmap(trajectory, (None, None, None, 0, 0, 1), (1, 1)))


# --- trajectories ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "case"),
  [
    pytest.param(name, case, id=f"{name}-{case['id']}", marks=pytest.mark.slow if "img48" in name else ())
    for name in TRAJECTORIES
    for case in CASES[name]
  ],
)
def test_trajectories(name, case, given_noise, float64):
  data, mixture_ = arrays(name), mixture(name)
  kind = case["var_type"].removeprefix("fixed_")
  net = network_of(
    name,
    case["schedule"],
    case["T"],
    "x0" if case["predict_xstart"] else "eps",
    kind == "learned_range",
    case["rescale_timesteps"],
  )
  scale, w = case["classifier_scale"], case["w"]
  guidances = [jg.unconditional(mixture_.num_classes) if w is None else jg.classifier_free(mixture_.num_classes, w)]
  guidances += [jg.clip_x0(1.0)] if case["clip_denoised"] else []
  if case["sampler"] == "ddim_sample_loop":
    solver = jg.DDIM(case["eta"])
    guidances += [] if scale is None else [jg.classifier(mixture_.log_prob, scale)]
  else:
    solver = jg.DDPM(kind) if scale is None else jg.DDPM(kind, mixture_.log_prob, scale)
  sigmas = np.asarray(schedules.respaced(net.table, case["respacing"]), np.float32)
  # The published loops start from N(0, I) in x_t = alpha x.
  x = data["x_T"] * np.sqrt(1 + np.square(sigmas[0]))
  assert x.dtype == np.float32
  xs, x0s = jax.device_get(
    trajectories(jg.chain(*guidances)(net.denoiser), solver, sigmas, x, data["y"], data[case["noise_key"]])
  )
  alphas = 1 / np.sqrt(1 + np.square(sigmas[1:]))[:, None, None, None, None]
  for got, wanted, deviation in (
    (xs * alphas, data[case["id"] + "/xs"][1:], case["fp32_dev"]),
    (x0s, data[case["id"] + "/pred_xstart"], case["fp32_dev_pred_xstart"]),
  ):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=max(1e-5, 10 * deviation))


def test_ddim_inversion(given_noise):
  data, net = arrays("gd_pure"), network_of("gd_pure", "linear", 1000)
  wanted = data["ddim_reverse/linear-ddim25/xs"]
  sigmas = np.asarray(net.table.respaced("ddim25").sigmas, np.float32)
  denoise = jax.jit(jax.vmap(Conditioned(jg.unconditional(net.mixture.num_classes)(net.denoiser), None), (0, None)))
  step = jax.jit(lambda x, *levels: jg.Euler().step(denoise, jg.Euler().init(x), *levels, jax.random.key(0)).x)
  x = wanted[0] * np.sqrt(1 + sigmas[0] ** 2)
  for i in range(len(sigmas) - 1):
    x = step(x, sigmas[i], sigmas[i + 1])
    np.testing.assert_allclose(np.asarray(x) / np.sqrt(1 + sigmas[i + 1] ** 2), wanted[i + 1], atol=2e-5)
  # After the last level the published array has the predicted noise.
  x, x0 = jax.device_get((x, denoise(x, sigmas[-1])))
  np.testing.assert_allclose((x - x0) / sigmas[-1], wanted[-1], atol=2e-5)


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["linear_1000", "linear_4000", "cosine_1000", "cosine_4000"])
def test_schedule_arrays(key, float64):
  data = arrays("schedules")
  name, steps = key.split("_")
  table = schedules.table(name, int(steps))
  got = {"betas": table.betas, "alphas_cumprod": table.alpha_bar}
  sigma, below = table.sigmas, np.append(0, table.sigmas[:-1])
  above = np.append(table.sigmas[1:], np.inf)
  variance = posterior.reverse_variance("small", sigma, below, above)
  alpha, alpha_below = (1 / np.sqrt(1 + level**2) for level in (sigma, below))
  got["posterior_variance"] = alpha_below**2 * variance.value
  got["posterior_log_variance_clipped"] = variance.log + 2 * np.log(alpha_below)
  # The mean is linear: its coefficients are its values for x0 = 1, x_t = 0 and for x0 = 0, x_t = 1.
  got["posterior_mean_coef1"] = alpha_below * posterior.posterior_mean(0.0, 1.0, sigma, below)
  got["posterior_mean_coef2"] = alpha_below * posterior.posterior_mean(1 / alpha, 0.0, sigma, below)
  checked = 0
  for name_, value in got.items():
    if f"{key}/{name_}" in data:
      np.testing.assert_allclose(value, data[f"{key}/{name_}"], rtol=1e-9, atol=1e-15, err_msg=name_)
      checked += 1
  assert checked == 6


def test_respaced_arrays():
  data = arrays("respacing")
  for key in (key for key in data if key.endswith("timesteps")):
    steps, spec, _ = key.split("/")
    np.testing.assert_array_equal(schedules.spaced_timesteps(int(steps), spec.replace("-", ",")), data[key], key)
    for name in ("linear", "cosine"):
      process = schedules.table(name, int(steps)).respaced(spec.replace("-", ","))
      np.testing.assert_allclose(process.betas, data[f"{steps}/{spec}/{name}_betas"], rtol=1e-8)
      np.testing.assert_allclose(process.alpha_bar, data[f"{steps}/{spec}/{name}_alphas_cumprod"], rtol=1e-9)


# --- the posterior and the bound ------------------------------------------------------------------

CONFIGS = ["linear-1000-full", "cosine-1000-50", "linear-4000-100"]


@pytest.fixture
def point(request):
  return point_of(request.param)


@functools.cache
def on_device(name):
  return jax.device_put(arrays(name))


class Point:
  """The noise levels and examples of the arrays of one configuration."""

  def __init__(self, config):
    self.config = config
    self.data = on_device("gd_pure")
    self.schedule, steps, spec = config.split("-")
    self.steps = int(steps)
    table = schedules.table(self.schedule, self.steps)
    self.process = table if spec == "full" else table.respaced(spec)
    levels = np.concatenate([[0], self.process.sigmas, [np.inf]]).astype(np.float32)
    t = np.asarray(self.data[f"{config}/t"])
    below, sigma, above = (levels[t + i].reshape(-1, 1, 1, 1) for i in range(3))
    self.below, self.sigma, self.above = jax.device_put((below, sigma, above))
    self.alpha, self.alpha_below = jax.device_put([1 / np.sqrt(1 + level**2) for level in (sigma, below)])
    self.x0, self.noise = self.data["x_start"], self.data["noise"]
    self.x = self.x0 + self.sigma * self.noise

  def levels(self):
    return (level[:, 0, 0, 0] for level in (self.sigma, self.below, self.above))

  def expect(self, key, got, atol=0.0):
    """Compare with a published array, to 1e-5 of 1 plus the example's largest value, plus ``atol``."""
    wanted = np.asarray(self.data[f"{self.config}/{key}"])
    got = np.asarray(got)
    if np.ndim(got) == 4 and wanted.ndim == 1:
      assert got.shape[1:] == (1, 1, 1)
      got = got[:, 0, 0, 0]
    assert got.shape == wanted.shape
    largest = np.abs(wanted).reshape(len(wanted), -1).max(1)
    excess = np.abs(got - wanted).reshape(len(wanted), -1).max(1) - 1e-5 * (1 + largest) - atol
    assert excess.max() <= 0, f"{key}: {excess}"


point_of = functools.cache(Point)


def from_eps(point):
  """The rounding error of x0 = x - sigma eps in float32, the formula of the published arrays."""
  return 4 * np.finfo(np.float32).eps * np.asarray(point.sigma)[:, 0, 0, 0]


@pytest.mark.parametrize("point", CONFIGS, indirect=True)
def test_closed_forms(point):
  data, alpha, sigma = point.data, point.alpha, point.sigma
  x, x_below = data["x_t_rand"] / alpha, data["x_prev_rand"] / point.alpha_below
  point.expect("q_sample", alpha * point.x)
  point.expect("q_mean_variance/mean", alpha * point.x0)
  point.expect("q_mean_variance/variance", (alpha * sigma) ** 2)
  point.expect("q_mean_variance/log_variance", 2 * jnp.log(alpha * sigma))
  mean = posterior.posterior_mean(x, point.x0, sigma, point.below)
  variance = posterior.reverse_variance("small", sigma, point.below, point.above)
  point.expect("q_posterior/mean", point.alpha_below * mean)
  point.expect("q_posterior/variance", point.alpha_below**2 * variance.value)
  point.expect("q_posterior/log_variance_clipped", variance.log + 2 * jnp.log(point.alpha_below))
  point.expect("predict_xstart_from_eps", denoisers.eps_to_x0(x, data["eps_rand"], sigma))
  point.expect("predict_eps_from_xstart", denoisers.x0_to_eps(x, point.x0, sigma))
  # The posterior mean, solved for x0.
  share = (point.below / sigma) ** 2
  point.expect("predict_xstart_from_xprev", (x_below - share * x) / (1 - share))
  point.expect(
    "prior_bpd", jax.vmap(variational.prior_bits, (0, None))(point.x0, jnp.asarray(point.process.sigmas[-1]))
  )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", posterior.VARIANCES)
@pytest.mark.parametrize("point", CONFIGS, indirect=True)
def test_steps(point, kind, clip):
  net = network_of("gd_pure", point.schedule, point.steps, learned=kind == "learned_range")
  null, log_prob = net.mixture.num_classes, net.mixture.log_prob
  pre = ("fixed_" if kind != "learned_range" else "") + f"{kind}-clip{int(clip)}/"
  wanted = {key.removeprefix(f"{point.config}/{pre}") for key in point.data if key.startswith(f"{point.config}/{pre}")}
  guided = jg.chain(jg.unconditional(null), *[jg.clip_x0()] * clip)(net.denoiser)
  sigma, below, above = point.levels()
  prediction = jax.vmap(guided, (0, 0, None))(point.x, sigma, 0)
  x0, learned = x0_of(prediction), prediction.variance if kind == "learned_range" else None
  mean = posterior.posterior_mean(point.x, x0, point.sigma, point.below)
  variance = posterior.reverse_variance(kind, point.sigma, point.below, point.above, learned)
  x0_error = from_eps(point)
  mean_error = (1 - np.square(point.below / point.sigma))[:, 0, 0, 0] * x0_error
  got = {
    "pred_xstart": (x0, x0_error),
    "p_mean": (point.alpha_below * mean, mean_error),
    "variance": (point.alpha_below**2 * variance.value, 0),
    "log_variance": (variance.log + 2 * jnp.log(point.alpha_below), 0),
    "vb_terms_bpd": (
      jax.vmap(functools.partial(variational.vb_bits, variance=kind))(
        point.x0, point.x, prediction, sigma, below, above
      ),
      0,
    ),
  }
  if "condition_mean" in wanted:
    # A step without noise gives the shifted mean.
    def shifted(x, y, *levels):
      solver = jg.DDPM(kind, log_prob, 1.5)
      state = solver.init(x)._replace(sigma=levels[2])
      return solver.step(Conditioned(guided, y), state, levels[0], levels[1], jnp.zeros_like(x)).x

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(jax.random, "normal", lambda key, shape, dtype: key)
      stepped = jax.vmap(shifted)(point.x, point.data["y"], sigma, below, above)
    got["condition_mean"] = (point.alpha_below * stepped, mean_error)
  if "condition_score_mean" in wanted:
    x0 = jax.vmap(lambda *args: x0_of(jg.classifier(log_prob, 1.5)(guided)(*args)))(point.x, sigma, point.data["y"])
    mean = posterior.posterior_mean(point.x, x0, point.sigma, point.below)
    got |= {
      "condition_score_pred_xstart": (x0, x0_error),
      "condition_score_mean": (point.alpha_below * mean, mean_error),
    }
  assert wanted <= set(got)
  for key in wanted:
    point.expect(pre + key, *got[key])


LOSSES = sorted({tuple(key.split("/")[:3]) for key in arrays("gd_pure") if "/loss/" in key or "/fixed_output/" in key})


@pytest.mark.parametrize(("config", "group", "name"), LOSSES)
def test_training_losses(config, group, name):
  point = point_of(config)
  variance, loss, *rest = name.split("-")
  kind = variance.removeprefix("fixed_")
  net = network_of(
    "gd_pure", point.schedule, point.steps, "x0" if rest == ["predx0"] else "eps", kind == "learned_range"
  )
  fixed = point.data["fixed_model_output"][..., : None if net.learned else 3]

  def terms(params):
    return variational.variational_terms(
      params,
      net if group == "loss" else lambda params, *_: params,
      point.x0,
      point.data[f"{config}/t"],
      point.noise,
      scaling=net.scaling,
      process=point.process,
      loss=loss.lower(),
      variance=kind,
    )

  def total(params):
    got = terms(params)
    return got.loss.sum(), got

  pre = f"{group}/{name}/"
  parts = {key.removeprefix(f"{config}/{pre}") for key in point.data if key.startswith(f"{config}/{pre}")}
  assert {"loss"} <= parts <= {"loss", "mse", "vb", "grad"}
  if "grad" in parts:
    gradient, got = jax.jit(jax.grad(total, has_aux=True), compiler_options=AS_USERS)(fixed)
    point.expect(pre + "grad", gradient)
  else:
    got = jax.jit(terms)(fixed)
  for part in parts - {"grad"}:
    point.expect(pre + part, getattr(got, part), 10 * CASES["gd_pure"].get(f"{config}/{group}/{name}", 0))


@pytest.mark.parametrize("case", [key for key in CASES["gd_pure"] if key.startswith("calc_bpd_loop")])
def test_bits_per_dim(case, monkeypatch):
  data = arrays("gd_pure")
  schedule, steps, spec, variance, clip = case.split("/")[1].split("-")
  kind = variance.removeprefix("fixed_")
  net = network_of("gd_pure", schedule, int(steps), learned=kind == "learned_range")
  guided = jg.chain(jg.unconditional(net.mixture.num_classes), *[jg.clip_x0()] * (clip == "clip1"))(net.denoiser)
  monkeypatch.setattr(jg.keys, "threefry", lambda key: key)
  monkeypatch.setattr(jax.random, "fold_in", lambda key, i: key[i])
  monkeypatch.setattr(jax.random, "normal", lambda key, shape, dtype: key)
  sigmas = schedules.respaced(net.table, spec)
  bits = jax.jit(jax.vmap(lambda noise, x0: variational.bits_per_dim(guided, noise, x0, sigmas, 0, kind), (1, 0)))(
    data[f"{case}/noise"], data["x_start"][:3]
  )
  names = {"total": "total_bpd", "prior": "prior_bpd", "vb": "vb", "x0_mse": "xstart_mse", "eps_mse": "mse"}
  for ours, theirs in names.items():
    wanted = data[f"{case}/{theirs}"]
    np.testing.assert_allclose(getattr(bits, ours), wanted, rtol=1e-5, atol=max(1e-5, 10 * CASES["gd_pure"][case]))
