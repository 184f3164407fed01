"""Heun's method."""

from __future__ import annotations

from typing import ClassVar

import jax

from jaxguide._core import struct
from jaxguide._core.typing import Key, Scalar
from jaxguide.solvers.base import Denoise, Memoryless, State, move


@struct.dataclass
class Heun(Memoryless):
  """Heun's second-order method (Karras et al. 2022, arXiv:2206.00364, Algorithm 1).

  A step has two evaluations. The last step has one, since the slope at ``sigma = 0`` is not defined.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = False

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step."""
    del key
    x0 = denoise(state.x, sigma)
    x_euler = move(state.x, x0, sigma, sigma_next)

    def correct(x_euler):
      slope = (state.x - x0) / sigma
      slope_next = (x_euler - denoise(x_euler, sigma_next)) / sigma_next
      return state.x + (sigma_next - sigma) * (slope + slope_next) / 2

    return State(jax.lax.cond(sigma_next > 0, correct, lambda x_euler: x_euler, x_euler), x0)
