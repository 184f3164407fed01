"""DDIM, and Euler's method, which is its deterministic end."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxguide import checks, struct
from jaxguide.posterior import posterior_std
from jaxguide.solvers.base import Denoise, Memoryless, State, move
from jaxguide.typing import Key, Leaf, Scalar


@struct.dataclass
class DDIM(Memoryless):
  r"""DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16); with ``eta = 0`` it is Euler's method.

  .. math::
    x' = D + \sqrt{\sigma'^2 - \sigma_{up}^2}\,\frac{x - D}{\sigma} + \sigma_{up} z, \quad
    \sigma_{up} = \eta \frac{\sigma'}{\sigma} \sqrt{\sigma^2 - \sigma'^2}

  Args:
    eta: 0 deterministic, 1 as random as `DDPM`; in [0, 1].

  >>> DDIM(eta=0.5).eta
  0.5
  """

  eta: Leaf = 0.0
  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1

  def __post_init__(self):
    checks.written(self, "eta", checks.in_range, 0, 1)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    x, _ = state
    x0 = denoise(x, sigma)
    up = jnp.asarray(self.eta, x.dtype) * posterior_std(sigma, sigma_next)
    # sqrt(sigma'^2 - up^2), without its cancellation, and with a finite gradient at sigma' = 0
    eta = jnp.asarray(self.eta, x.dtype)
    ratio = sigma_next / sigma
    square = (1 - eta) * (1 + eta) + (eta * ratio) ** 2
    kept = sigma_next * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return State(move(x, x0, sigma, kept) + up * jax.random.normal(key, x.shape, x.dtype), x0)


@struct.dataclass
class Euler(Memoryless):
  """Euler's method on the probability flow: `DDIM` with ``eta = 0``, and no noise drawn."""

  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    return State(move(state.x, x0, sigma, sigma_next), x0)
