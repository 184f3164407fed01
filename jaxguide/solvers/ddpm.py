"""Ancestral sampling."""

from __future__ import annotations

from typing import ClassVar

import jax

from jaxguide import struct
from jaxguide.solvers.base import Denoise, Memoryless, State
from jaxguide.solvers.ddim import posterior_std
from jaxguide.typing import Key, Scalar

VARIANCES = ("small", "large", "learned_range")


@struct.dataclass
class DDPM(Memoryless):
  r"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7) with the posterior's variance.

  .. math::
    x' \sim q(x' | x, x_0 = D) = N\Big(D + \frac{\sigma'^2}{\sigma^2} (x - D),\;
      \frac{\sigma'^2}{\sigma^2} (\sigma^2 - \sigma'^2)\Big)

  which is `DDIM` with ``eta = 1``. Guidance reaches the mean through ``D``.
  """

  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    x, _ = state
    x0 = denoise(x, sigma)
    mean = x0 + (sigma_next / sigma) ** 2 * (x - x0)
    return State(mean + posterior_std(sigma, sigma_next) * jax.random.normal(key, x.shape, x.dtype), x0)
