"""k-diffusion's and diffusers' samplers: their published trajectories, step by step.

Where the arrays come from is told in `data/README.md`.
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


def cases(*solvers):
  """Give the cases that hold a trajectory of one of these, as ``LIBRARY/MIXTURE/NAME``."""
  names = [key.removesuffix("/xs") for key in arrays() if key.endswith("/xs")]
  return [name for name in names if name.split("/")[-1].partition("@")[0] in solvers]


def grid(case):
  library, _, name = case.split("/")
  if library == "diffusers":
    return arrays()[f"{case}/sigmas"].astype(np.float32)
  return arrays()[f"kdiffusion/sigmas/{name.partition('@')[2] or 'karras'}"]


def denoiser(case):
  """Give ``(x, sigma) -> x0`` of a batch: unconditional, conditional (scale 1) or guided."""
  data, where = arrays(), case.rpartition("/")[0]
  model = jg.gaussian_mixture(*(data[f"{where}/mixture/{key}"] for key in ("means", "variances", "classes", "weights")))
  guided = jg.classifier_free(model.num_classes, float(data[f"{case}/scale"]))(model.denoiser)
  return lambda x, sigma: jax.vmap(guided, (0, None, 0))(x, sigma, data[f"{where}/labels"])


def scale_of(case, sigmas):
  """What a case's states are to be divided by: diffusers holds most in ``sqrt(alpha_bar) x``."""
  library, _, name = case.split("/")
  held_scaled = library == "diffusers" and not name.startswith("euler")
  return 1 / np.sqrt(1 + sigmas**2) if held_scaled else np.ones_like(sigmas)


def walk(case, solver):
  """Give our states over the steps of a case, in the case's own variables."""
  data, sigmas, where = arrays(), grid(case), case.rpartition("/")[0]
  denoise, scale = denoiser(case), scale_of(case, sigmas)
  state = solver.init(jnp.asarray(data[f"{case}/xs"][0] / scale[0]))

  def step(state, inputs):
    state = solver.step(denoise, state, *inputs)
    return state, state.x

  noise = data[f"{where}/noise"][: len(sigmas) - 1]
  xs = jax.lax.scan(step, state, (jnp.asarray(sigmas[:-1]), jnp.asarray(sigmas[1:]), jnp.asarray(noise)))[1]
  return np.asarray(xs) * scale[1:].reshape(-1, *[1] * (xs.ndim - 1))


def compare(case, xs, steps=None):
  wanted, deviation = arrays()[f"{case}/xs"][1:], arrays()[f"{case}/deviation"]
  np.testing.assert_allclose(xs[:steps], wanted[:steps], rtol=0, atol=max(1e-5, 10 * deviation))


SOLVERS = {
  "euler": jg.Euler(),
  "euler-trailing": jg.Euler(),
  "euler-epsilon-karras": jg.Euler(),
  "euler-leading-sd": jg.Euler(),
  "heun": jg.Heun(),
  "heun-cond": jg.Heun(),
  "dpmpp_2m": jg.DPMpp2M(),
  "dpmpp_2m-w": jg.DPMpp2M(),
  "dpmpp_2m-cond": jg.DPMpp2M(),
  "dpmpp-o2": jg.DPMpp2M(),
  "dpmpp-o2-karras": jg.DPMpp2M(),
  "dpmpp-o2-trailing": jg.DPMpp2M(),
  "ddim-epsilon": jg.DDIM(),
  "ddim-trailing": jg.DDIM(),
  "euler_ancestral": jg.EulerAncestral(),
  "euler_ancestral-eta0.5": jg.EulerAncestral(0.5, s_noise=1.01),
  "euler_ancestral-eta0": jg.EulerAncestral(0.0),
  "eulera": jg.EulerAncestral(),
  "eulera-epsilon": jg.EulerAncestral(),
  "eulera-trailing": jg.EulerAncestral(),
  "dpmpp_2s_ancestral": jg.DPMpp2SAncestral(),
  "dpmpp_2m_sde": jg.DPMpp2MSDE(),
  "dpmpp_2m_sde-heun": jg.DPMpp2MSDE(solver_type="heun"),
  "dpmpp_2m_sde-eta0.4": jg.DPMpp2MSDE(0.4),
  "dpmpp_2m_sde-eta0": jg.DPMpp2MSDE(0.0),
  "sde-dpmpp-o2": jg.DPMpp2MSDE(),
  "sde-dpmpp-o2-karras": jg.DPMpp2MSDE(),
  "sde-dpmpp-o2-heun": jg.DPMpp2MSDE(solver_type="heun"),
  "unipc-o1-bh2": jg.UniPC(1),
  "unipc-o2-bh2": jg.UniPC(2),
  "unipc-o2-karras": jg.UniPC(2),
  "unipc-o2-v": jg.UniPC(2),
}


@pytest.mark.parametrize("case", cases(*SOLVERS))
def test_published_trajectories(case, given_noise):
  compare(case, walk(case, SOLVERS[case.split("/")[-1].partition("@")[0]]))


@pytest.mark.parametrize("case", cases("unipc-o3", "unipc-o3-bh2", "unipc-o3-karras-w3"))
def test_unipc_3_but_for_the_end(case, given_noise):
  # diffusers, which knows how many steps are left, lowers the order of the last but one too.
  xs = walk(case, jg.UniPC(3))
  compare(case, xs, -2)
  with pytest.raises(AssertionError, match="Not equal"):
    compare(case, xs)


# --- the curvature of 3M ----------------------------------------------------------------------------


def third_order(denoise, x, sigmas, noise, eta, s_noise, curvature):
  """k-diffusion's ``sample_dpmpp_3m_sde`` in float64, with any weight of the curvature; it has 1/2."""
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
      phi_3 = phi_2 / far - 0.5
      if len(past) > 1:
        r = [steps[-1] / h, steps[-2] / h]
        d = [(x0 - past[-1]) / r[0], (past[-1] - past[-2]) / r[1]]
        x = x + phi_2 * (d[0] + (d[0] - d[1]) * r[0] / sum(r)) - 2 * curvature * phi_3 * (d[0] - d[1]) / sum(r)
      elif past:
        x = x + phi_2 * (x0 - past[-1]) * h / steps[-1]
      x = x + s_noise * below * np.sqrt(-np.expm1(-2 * eta * h)) * z
      steps.append(h)
    past.append(x0)
    xs.append(x)
  return np.stack(xs)


@pytest.mark.parametrize("case", cases("dpmpp_3m_sde", "dpmpp_3m_sde-eta0.4", "dpmpp_3m_sde-cond"))
def test_3m_with_all_of_the_curvature(case, given_noise):
  eta, s_noise = (0.4, 1.02) if "eta" in case else (1.0, 1.0)
  data, sigmas, where = arrays(), grid(case).astype(float), case.rpartition("/")[0]
  with jax.enable_x64(True):
    walked = [
      third_order(
        jax.jit(denoiser(case)), data[f"{case}/xs"][0].astype(float), sigmas,
        data[f"{where}/noise"][: len(sigmas) - 1].astype(float), eta, s_noise, curvature,
      )
      for curvature in (0.5, 1.0)
    ]  # fmt: skip
  compare(case, walked[0])
  got = walk(case, jg.DPMpp3MSDE(eta, s_noise))
  np.testing.assert_allclose(got, walked[1], rtol=0, atol=max(1e-5, 10 * arrays()[f"{case}/deviation"]))
  with pytest.raises(AssertionError, match="Not equal"):
    compare(case, got)


# --- grids ------------------------------------------------------------------------------------------


def test_the_exponential_grid_is_uniform_in_log_snr():
  np.testing.assert_allclose(jg.log_snr_uniform(15, 0.02, 20.0), arrays()["kdiffusion/sigmas/exponential"], rtol=2e-6)


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


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("count", [1, 7, 20, 300, 999, 1000])
def test_spacings_are_the_written_ones(count, spacing):
  # Lin et al., arXiv:2305.08891, table 2, counted from 0.
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
