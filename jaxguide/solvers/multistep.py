"""Methods that look back at earlier steps instead of evaluating more often."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxguide import struct
from jaxguide.solvers.base import Denoise, MultistepState, move
from jaxguide.typing import Example, Key, Scalar


@struct.dataclass
class DPMpp2M:
  r"""DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2): second order at one evaluation a step.

  With ``h = log(sigma / sigma')`` and ``r = h_previous / h``,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + (1 - e^{-h}) \Big(D + \frac{D - D_{previous}}{2 r}\Big)

  The first step and the last, where ``h`` is infinite, are of first order.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 1

  def init(self, x: Example) -> MultistepState:
    """Start from ``x``, with no step behind."""
    return MultistepState(x, x, jnp.asarray(jnp.inf, x.dtype))

  def step(
    self, denoise: Denoise, state: MultistepState, sigma: Scalar, sigma_next: Scalar, key: Key
  ) -> MultistepState:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    inner = (sigma_next > 0) & jnp.isfinite(state.sigma)
    # Where a step is of first order the numbers below would be infinite, and so would their gradients.
    h = jnp.log(sigma / jnp.where(inner, sigma_next, sigma / 2))
    h_last = jnp.log(jnp.where(inner, state.sigma, 2 * sigma) / sigma)
    slope = jnp.where(inner, h / (2 * h_last), 0)
    return MultistepState(move(state.x, x0 + slope * (x0 - state.x0), sigma, sigma_next), x0, sigma)
