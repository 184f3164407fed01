"""Trajectories of k-diffusion's and diffusers' samplers, compared step by step.

`data/README.md` describes the origin of the arrays.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg


@functools.cache
def arrays():
  with np.load(Path(__file__).parent / "data" / "kdiffusion.npz") as file:
    return dict(file)


def cases(*names):
  """Return the cases of these names, as ``LIBRARY/MIXTURE/NAME``."""
  all_cases = [key.removesuffix("/xs") for key in arrays() if key.endswith("/xs")]
  return [case for case in all_cases if name_of(case) in names]


def name_of(case):
  return case.split("/")[-1].partition("@")[0]


# A terminal SNR of 0 is an infinite level. Sampling starts from a large level instead.
INFINITE = 1e6


def grid(case):
  library, _, name = case.split("/")
  if library == "diffusers":
    sigmas = arrays()[f"{case}/sigmas"].astype(np.float32)
    return np.where(np.isinf(sigmas), np.float32(INFINITE), sigmas)
  return arrays()[f"kdiffusion/sigmas/{name.partition('@')[2] or 'karras'}"]


def bounded(x0):
  """Dynamic thresholding by the 90 % quantile of x0, from 1 to 1.5 (Saharia et al., arXiv:2205.11487, section 2.3)."""
  bound = jnp.clip(jnp.quantile(jnp.abs(x0), 0.9), 1, 1.5)
  return jnp.clip(x0, -bound, bound) / bound


def guided(case):
  """Return the denoiser of a case: unconditional, conditional (scale 1) or guided."""
  data, where = arrays(), case.rpartition("/")[0]
  model = jg.gaussian_mixture(*(data[f"{where}/mixture/{key}"] for key in ("means", "variances", "classes", "weights")))
  denoise = jg.classifier_free(model.num_classes, jnp.asarray(data[f"{case}/scale"]))(model.denoiser)
  return jg.clip_x0()(denoise) if name_of(case) in CLIPPED else denoise


def batch(guided, labels, finish=lambda x0: x0):
  return lambda x, sigma: jax.vmap(lambda x, label: finish(guided(x, sigma, label)))(x, labels)


def denoiser(case, bounds=True):
  """Return ``(x, sigma) -> x0`` for a batch, with dynamic thresholding if the case has it."""
  labels = arrays()[f"{case.rpartition('/')[0]}/labels"]
  return batch(guided(case), labels, *[bounded] * (bounds and case in BOUNDED))


def plain(denoise, t, level):
  return denoise


def with_learned_range(denoise, t, level):
  """Add the learned variance that the network of the published case predicts."""

  def predict(x, sigma):
    x_t = x / jnp.sqrt(1 + sigma**2)
    return jg.Prediction(denoise(x, sigma), jnp.tanh(0.7 * x_t + 0.3 * jnp.sin(2 * jnp.pi * t / 1000) - 0.1))

  return predict


def with_eps_of(denoise, t, level):
  """Pass ``x_t`` to the network with another level than its own: the level of the nearest whole step."""

  def predict(x, sigma):
    x_at_level = x * jnp.sqrt((1 + level**2) / (1 + sigma**2))
    return x - sigma / level * (x_at_level - denoise(x_at_level, level))

  return predict


def scale_of(case, sigmas):
  """The factors of a case's states: most states of diffusers are ``sqrt(alpha_bar) x``."""
  library, _, name = case.split("/")
  scaled = library == "diffusers" and not name.startswith(("euler", "heun"))
  return 1 / np.sqrt(1 + sigmas**2) if scaled else np.ones_like(sigmas)


def wide(per_step):
  return np.reshape(per_step, (-1, 1, 1, 1, 1))


# XLA's defaults, as users have them. The tests' faster settings round differently.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@functools.partial(jax.jit, static_argnames=("finish", "network"), compiler_options=AS_USERS)
def states(solver, guided, labels, x, inputs, finish, network):
  denoise = batch(guided, labels, *finish)

  def step(state, inputs):
    *inputs, t, level = inputs
    state = solver.step(network(denoise, t, level), state, *inputs)
    return state, state.x

  return jax.lax.scan(step, solver.init(x), inputs)[1]


def walk(case, solver):
  """Return the states of our solver over the steps of a case, in the variables of the case."""
  data, sigmas = arrays(), grid(case)
  scale, count = scale_of(case, sigmas), len(sigmas) - 1
  network = with_learned_range if name_of(case) == "ddpm-learned_range" else plain
  network = with_eps_of if f"{case}/levels" in data else network
  timesteps, levels = (data.get(f"{case}/{key}", np.zeros(count)) for key in ("timesteps", "levels"))
  inputs = jax.tree.map(jnp.asarray, (sigmas[:-1], sigmas[1:], noise_of(case), timesteps, levels))
  start, labels = jnp.asarray(data[f"{case}/xs"][0] / scale[0]), data[f"{case.rpartition('/')[0]}/labels"]
  finish = (bounded,) if case in BOUNDED else ()
  xs = np.array(states(solver, guided(case), labels, start, inputs, finish, network))
  if "-churn" in case:  # k-diffusion's states are the starts of steps after the noise is added
    gamma = np.where((sigmas >= solver.s_min) & (sigmas <= solver.s_max), solver.gamma, 0)[1:-1]
    xs[:-1] += wide(solver.s_noise * np.sqrt(gamma * (2 + gamma)) * sigmas[1:-1]) * noise_of(case)[1:]
  return xs * wide(scale[1:])


def noise_of(case):
  """Return the noise of each step, or both draws if a step has two."""
  sigmas, drawn = grid(case), arrays()[f"{case.rpartition('/')[0]}/noise"]
  if name_of(case) != "dpmpp_sde":
    return drawn[: len(sigmas) - 1]
  # The published draws are the noises to the midpoint and over the whole step. Our second draw is computed such that
  # our noise to the midpoint equals the published one.
  half, whole = drawn[0:28:2], drawn[1:28:2]
  shared = wide(1 / (1 + sigmas[:-2] / sigmas[1:-1]))
  pairs = np.stack([whole, (half - np.sqrt(shared) * whole) / np.sqrt(1 - shared)], 1)
  return np.concatenate([pairs, pairs[:1]])


def compare(case, xs, steps=None):
  wanted, deviation = arrays()[f"{case}/xs"][1:], arrays()[f"{case}/deviation"]
  np.testing.assert_allclose(xs[:steps], wanted[:steps], rtol=0, atol=max(1e-5, 10 * deviation))


CHURN = {"s_min": 0.05, "s_max": 10.0, "s_noise": 1.003}
SOLVERS = {
  name: solver
  for solver, *names in (
    (jg.Euler(), "euler euler-epsilon euler-v_prediction euler-sample euler-karras euler-epsilon-karras euler-trailing",
     "euler-v_prediction-karras euler-sample-karras euler-leading-sd dpmpp-o1 dpmpp-o1-karras"),
    (jg.EDMStochastic.from_churn(12, 15, alpha=None, **CHURN), "euler-churn"),
    (jg.EDMStochastic.from_churn(12, 15, **CHURN), "heun-churn"),
    (jg.Heun(), "heun heun-cond heun-epsilon heun-epsilon-karras heun-v_prediction heun-v_prediction-karras",
     "heun-sample heun-sample-karras"),
    (jg.DPMpp2M(), "dpmpp_2m dpmpp_2m-w dpmpp_2m-cond dpmpp-o2 dpmpp-o2-karras dpmpp-o2-v_prediction dpmpp-o2-sample",
     "dpmpp-o2-sd-w5 dpmpp-o2-sigmamin dpmpp-o2-euleratfinal dpmpp-o2-lu dpmpp-o2-exponential dpmpp-o2-beta",
     "dpmpp-o2-cosine dpmpp-o2-trailing dpmpp-o2-leading dpmpp-o2-karras-evalT"),
    (jg.DDIM(), "ddim-epsilon ddim-v_prediction ddim-sample ddim-clipped-out ddim-trailing ddim-sd ddim-cosine",
     "ddim-zsnr-v-trailing ddim-epsilon-w3"),
    (jg.DDIM(0.5), "ddim-eta0.5"),
    (jg.DDIM(1.0), "ddim-eta1-clip sde-dpmpp-o1 sde-dpmpp-o1-karras"),
    (jg.DDPM(), "ddpm-fixed_small ddpm-fixed_small_log ddpm-v-trailing ddpm-x0-cosine"),
    (jg.DDPM("large"), "ddpm-fixed_large"),
    (jg.DDPM("learned_range"), "ddpm-learned_range"),
    (jg.EulerAncestral(), "euler_ancestral eulera eulera-epsilon eulera-v_prediction eulera-trailing"),
    (jg.EulerAncestral(0.5, s_noise=1.01), "euler_ancestral-eta0.5"),
    (jg.EulerAncestral(0.0), "euler_ancestral-eta0"),
    (jg.DPMpp2SAncestral(), "dpmpp_2s_ancestral"),
    (jg.DPMpp2SSDE(), "dpmpp_sde"),
    (jg.DPMpp2MSDE(), "dpmpp_2m_sde sde-dpmpp-o2 sde-dpmpp-o2-karras"),
    (jg.DPMpp2MSDE(solver_type="heun"), "dpmpp_2m_sde-heun sde-dpmpp-o2-heun"),
    (jg.DPMpp2MSDE(0.0, solver_type="heun"), "dpmpp-o2-heun"),
    (jg.DPMpp2MSDE(0.4), "dpmpp_2m_sde-eta0.4"),
    (jg.DPMpp2MSDE(0.0), "dpmpp_2m_sde-eta0"),
    (jg.UniPC(1), "unipc-o1-bh2"),
    (jg.UniPC(2), "unipc-o2-bh2 unipc-o2-karras unipc-o2-v"),
  )
  for name in " ".join(names).split()
}  # fmt: skip
CLIPPED = {"ddim-clipped-out", "ddim-eta1-clip", "ddpm-fixed_small_log", "ddpm-fixed_large", "ddpm-learned_range"}
REPRODUCED = [case for case in cases(*SOLVERS) if case != "diffusers/ring/euler-churn"]
CURVED = {
  "dpmpp_3m_sde": jg.DPMpp3MSDE(),
  "dpmpp_3m_sde-cond": jg.DPMpp3MSDE(),
  "dpmpp_3m_sde-eta0.4": jg.DPMpp3MSDE(0.4, 1.02),
  "dpmpp-o3": jg.DPMpp3M(),
  "dpmpp-o3-karras": jg.DPMpp3M(),
  "dpmpp-o3-w3": jg.DPMpp3M(),
  "dpmpp-o3-10steps": jg.DPMpp3M(),
  "sde-dpmpp-o3": jg.DPMpp3MSDE(),
  "sde-dpmpp-o3-karras": jg.DPMpp3MSDE(),
}
LOWERED = cases("unipc-o3", "unipc-o3-bh2", "unipc-o3-karras-w3")
BOUNDED = ["diffusers/ring/ddim-thresholding"]
KEEP_EPS = ["diffusers/ring/ddim-linspace", *BOUNDED]


def test_every_case_is_compared():
  compared = [*REPRODUCED, *cases(*CURVED), *LOWERED, *KEEP_EPS, "diffusers/ring/euler-churn"]
  assert sorted(compared) == sorted(key.removesuffix("/xs") for key in arrays() if key.endswith("/xs"))
  counts = [
    sum(case.startswith(library) for case in part) for part in (REPRODUCED, compared) for library in ("kd", "di")
  ]
  assert counts == [27, 66, 32, 78]  # as data/README.md says


@pytest.mark.parametrize("case", REPRODUCED)
def test_published_trajectories(case, given_noise):
  compare(case, walk(case, SOLVERS[name_of(case)]))


# --- trajectories that differ, and the reasons ------------------------------------------------------


@pytest.mark.parametrize("case", LOWERED)
def test_unipc_3_is_the_same_up_to_the_last_two_steps(case, given_noise):
  # diffusers knows the number of steps that are left, and lowers the order of the last but one step too.
  xs = walk(case, jg.UniPC(3))
  compare(case, xs, -2)
  with pytest.raises(AssertionError, match="Not equal"):
    compare(case, xs)


@pytest.mark.parametrize("case", KEEP_EPS)
def test_diffusers_ddim_with_a_fixed_stride_and_eps_before_thresholding(case, given_noise):
  # diffusers' DDIM uses the stride T // n for every spacing, and uses the eps from before the thresholding of x0.
  data, alpha_bar = arrays(), jg.schedules.table("linear", 1000).alpha_bar
  with jax.enable_x64(True):
    denoise, x_t, xs = denoiser(case, bounds=False), data[f"{case}/xs"][0].astype(float), []
    for t in data[f"{case}/timesteps"].astype(int):
      a, below = alpha_bar[t], alpha_bar[t - 50] if t >= 50 else 1.0
      x0 = denoise(jnp.asarray(x_t / np.sqrt(a)), jnp.asarray(np.sqrt((1 - a) / a)))
      eps = (x_t - np.sqrt(a) * x0) / np.sqrt(1 - a)
      x_t = np.sqrt(below) * (jax.vmap(bounded)(x0) if case in BOUNDED else x0) + np.sqrt(1 - below) * eps
      xs.append(x_t)
  compare(case, np.stack(xs))
  with pytest.raises(AssertionError, match="Not equal"):
    compare(case, walk(case, jg.DDIM()))


def test_eulers_churn_in_diffusers_evaluates_the_network_before_the_noise(given_noise):
  # It adds noise to x after the evaluation of the network: the slope belongs to the point and level before the noise.
  case, s_min, s_max, s_noise = "diffusers/ring/euler-churn", 0.05, 50.0, 1.003
  sigmas, gamma = grid(case).astype(float), 10 / 20
  with jax.enable_x64(True):
    denoise, x, xs = denoiser(case), arrays()[f"{case}/xs"][0].astype(float), []
    for sigma, below, z in zip(sigmas[:-1], sigmas[1:], noise_of(case), strict=True):
      rise = min(gamma, np.sqrt(2) - 1) if s_min <= sigma <= s_max else 0.0
      slope = (x - np.asarray(denoise(jnp.asarray(x), jnp.asarray(sigma)))) / sigma
      x = x + s_noise * np.sqrt(rise * (2 + rise)) * sigma * z + (below - (1 + rise) * sigma) * slope
      xs.append(x)
  compare(case, np.stack(xs))


def third_order(denoise, x, sigmas, noise, eta, s_noise, curvature=1.0, line="exact", constant=0.5):
  """DPM-Solver++(3M) and its SDE form in float64, in k-diffusion's form. k-diffusion has ``curvature=0.5``."""
  xs, past, steps = [], [], []
  for sigma, below, z in zip(sigmas[:-1], sigmas[1:], noise, strict=True):
    x0 = np.asarray(denoise(jnp.asarray(x), sigma))
    if below == 0:
      x = x0
    else:
      h = np.log(sigma / below)
      far = (1 + eta) * h
      x = np.exp(-far) * x - np.expm1(-far) * x0
      phi_2 = np.expm1(-far) / far + 1
      phi_3 = phi_2 / far - constant
      if len(past) > 1:
        r = [steps[-1] / h, steps[-2] / h]
        d = [(x0 - past[-1]) / r[0], (past[-1] - past[-2]) / r[1]]
        x = x + phi_2 * (d[0] + (d[0] - d[1]) * r[0] / sum(r)) - 2 * curvature * phi_3 * (d[0] - d[1]) / sum(r)
      elif past:
        x = x + {"exact": phi_2, "midpoint": -np.expm1(-far) / 2}[line] * (x0 - past[-1]) * h / steps[-1]
      x = x + s_noise * below * np.sqrt(-np.expm1(-2 * eta * h)) * z
      steps.append(h)
    past.append(x0)
    xs.append(x)
  return np.stack(xs)


@pytest.mark.parametrize("case", cases(*CURVED))
def test_3m_with_the_whole_curvature(case, given_noise):
  solver, sigmas = CURVED[name_of(case)], grid(case).astype(float)
  scale = scale_of(case, sigmas)
  published = {"curvature": 0.5}
  if case.startswith("diffusers"):  # the second step is that of 2M with the midpoint rule
    published["line"] = "midpoint"
  if "sde-dpmpp" in case:  # a sign error: the term of the curvature does not vanish for small steps
    published["constant"] = -0.5
  with jax.enable_x64(True):
    args = (
      jax.jit(denoiser(case)), arrays()[f"{case}/xs"][0] / scale[0], sigmas, noise_of(case).astype(float),
      getattr(solver, "eta", 0.0), getattr(solver, "s_noise", 1.0),
    )  # fmt: skip
    theirs, ours = (wide(scale[1:]) * third_order(*args, **options) for options in (published, {}))
  # With less than 15 steps diffusers lowers the order of the last but one.
  compare(case, theirs, -2 if "10steps" in case else None)
  got = walk(case, solver)
  np.testing.assert_allclose(got, ours, rtol=0, atol=max(1e-5, 10 * arrays()[f"{case}/deviation"]))
  with pytest.raises(AssertionError, match="Not equal"):
    compare(case, got)


# --- grids ------------------------------------------------------------------------------------------


def test_the_exponential_grid_is_uniform_in_log_snr():
  np.testing.assert_allclose(jg.log_snr_uniform(15, 0.02, 20.0), arrays()["kdiffusion/sigmas/exponential"], rtol=2e-6)


@pytest.mark.parametrize(
  ("name", "make"), [("exponential", jg.log_snr_uniform), ("lu", jg.log_snr_uniform), ("karras", jg.karras)]
)
def test_grids_between_diffusers_ends(name, make):
  wanted = arrays()[f"diffusers/ring/dpmpp-o2-{name}/sigmas"]
  np.testing.assert_allclose(make(20, float(wanted[-2]), float(wanted[0])), wanted, rtol=2e-7)


@pytest.mark.parametrize(
  ("case", "spacing"),
  [("ddim-epsilon", "leading"), ("ddim-trailing", "trailing"), ("dpmpp-o2-trailing", "trailing")],
)
def test_spacings_of_a_table(case, spacing):
  table = jg.schedules.table("linear", 1000)
  visited = arrays()[f"diffusers/ring/{case}/timesteps"].astype(int)
  got = jg.respaced(table, len(visited), spacing)
  np.testing.assert_array_equal(got, jg.respaced(table, visited))
  np.testing.assert_allclose(got, arrays()[f"diffusers/ring/{case}/sigmas"], rtol=2e-4)


def test_a_table_that_ends_without_signal():
  # Lin et al., arXiv:2305.08891, Algorithm 1, except for the last beta of 1, whose level would be infinite.
  root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
  alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  betas = 1 - alpha_bar / np.append(1, alpha_bar[:-1])
  assert betas[-1] == 1
  betas[-1] = 1 - 1e-6
  got = jg.respaced(jg.schedules.Table.from_betas(betas), 20, "trailing")
  wanted = arrays()["diffusers/ring/ddim-zsnr-v-trailing/sigmas"]
  assert np.isinf(wanted[0])
  assert got[0] > 1e5
  np.testing.assert_allclose(got[1:], wanted[1:], rtol=2e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [1, 7, 20, 300, 999, 1000])
def test_spacings_are_those_of_the_paper(count, spacing):
  # Lin et al., arXiv:2305.08891, table 2, with steps counted from 0.
  table = jg.schedules.table("linear", 1000)
  wanted = {
    "leading": np.arange(0, count) * (1000 // count),
    "trailing": np.round(np.flip(1000 - np.arange(count) * (1000 / count))).astype(int) - 1,
  }[spacing]
  np.testing.assert_array_equal(jg.respaced(table, count, spacing), jg.respaced(table, wanted))


def test_a_spacing_is_for_a_number_of_steps():
  table = jg.schedules.table("linear", 1000)
  with pytest.raises(ValueError, match="did you mean 'trailing'"):
    jg.respaced(table, 10, "traling")
  with pytest.raises(ValueError, match="leave out 'leading'"):
    jg.respaced(table, "ddim10", "leading")
