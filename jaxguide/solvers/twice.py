"""DPM-Solver++ of second order in one step, with two evaluations."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxguide import checks, struct
from jaxguide.solvers.base import Denoise, Memoryless, State, ancestral, draw, move
from jaxguide.typing import Example, Key, Leaf, Scalar


def midpoint(denoise: Denoise, x: Example, sigma: Scalar, sigma_next: Scalar) -> State:
  """Step with the x0 of half-way in ``log sigma``; straight to x0 where the way is infinite."""
  x0 = denoise(x, sigma)
  inner = sigma_next > 0

  def again(x0):
    half = jnp.sqrt(sigma * jnp.where(inner, sigma_next, sigma))
    return denoise(move(x, x0, sigma, half), half)

  return State(move(x, jax.lax.cond(inner, again, lambda x0: x0, x0), sigma, sigma_next), x0)


@struct.dataclass
class DPMpp2S(Memoryless):
  r"""DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, Algorithm 1, with ``r = 1/2``).

  With ``D_s`` at ``s = sqrt(sigma sigma')``, where `Euler` (their first order) takes it,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + (1 - e^{-h}) D_s, \quad h = \log(\sigma / \sigma')

  Two evaluations a step, and one in the last, where ``s`` would be 0.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step."""
    del key
    return midpoint(denoise, state.x, sigma, sigma_next)


@struct.dataclass
class DPMpp2SAncestral(Memoryless):
  r"""`DPMpp2S` to a level below, and noise up to the next one: k-diffusion's ``sample_dpmpp_2s_ancestral``.

  The level below and the noise are those of `EulerAncestral`. The order is that of the variance of Gaussian data.

  Args:
    eta: 0 `DPMpp2S`, 1 as random as `DDPM`; in [0, 1].
    s_noise: factor on the noise that is added, at least 0.

  >>> DPMpp2SAncestral().eta
  1.0
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2

  def __post_init__(self):
    checks.written(self, "eta", checks.in_range, 0, 1)
    checks.written(self, "s_noise", checks.in_range, 0)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step: two evaluations, and one in the last."""
    down, up = ancestral(self.eta, sigma, sigma_next)
    x, x0 = midpoint(denoise, state.x, sigma, down)
    return State(x + jnp.asarray(self.s_noise, x.dtype) * up * draw(key, x), x0)
