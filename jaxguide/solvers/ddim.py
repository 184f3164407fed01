"""DDIM, Euler's method (DDIM with ``eta = 0``), and Euler ancestral (DDIM with a default ``eta`` of 1)."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Key, Leaf, Scalar
from jaxguide.schedules.posterior import ancestral
from jaxguide.solvers.base import MOST_S_NOISE, Denoise, Memoryless, State, draw, move


@struct.dataclass
class DDIM(Memoryless):
  r"""DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16); with ``eta = 0`` it is Euler's method.

  .. math::
    x' = D + \sqrt{\sigma'^2 - \sigma_{up}^2}\,\frac{x - D}{\sigma} + \sigma_{up} z, \quad
    \sigma_{up} = \eta \frac{\sigma'}{\sigma} \sqrt{\sigma^2 - \sigma'^2}

  Args:
    eta: amount of noise in [0, 1]: 0 is deterministic, 1 has the noise of `DDPM`.

  >>> DDIM(eta=0.5).eta
  0.5
  """

  eta: Leaf = 0.0
  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "eta", checks.in_range, 0, 1)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    x, _ = state
    x0 = denoise(x, sigma)
    down, up = ancestral(self.eta, sigma, sigma_next)
    return State(move(x, x0, sigma, down) + up * draw(key, x), x0)


@struct.dataclass
class EulerAncestral(Memoryless):
  """Euler's method to a level below the next one, then new noise: k-diffusion's ``sample_euler_ancestral``.

  In ``x = x0 + sigma eps`` it is `DDIM` (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16) with another default and a
  factor on the noise. ``eta = 1`` is `DDPM` with the small variance.

  Args:
    eta: amount of noise in [0, 1]: 0 is Euler's method, 1 has the noise of `DDPM`.
    s_noise: factor on the added noise, at least 0.

  >>> EulerAncestral().eta
  1.0
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "eta", checks.in_range, 0, 1)
    checks.number_field(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    x, _ = state
    x0 = denoise(x, sigma)
    down, up = ancestral(self.eta, sigma, sigma_next)
    return State(move(x, x0, sigma, down) + jnp.asarray(self.s_noise, x.dtype) * up * draw(key, x), x0)


@struct.dataclass
class Euler(Memoryless):
  """Euler's method on the probability flow: `DDIM` with ``eta = 0``. It draws no noise.

  It is also first-order DPM-Solver++, "1S" (Lu et al. 2022, arXiv:2211.01095, section 4.1): with
  ``h = log(sigma / sigma')`` their ``(sigma' / sigma) x + (1 - e^{-h}) D`` equals ``D + (sigma' / sigma) (x - D)``.
  """

  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = False

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    return State(move(state.x, x0, sigma, sigma_next), x0)
