r"""Solvers: one step from ``sigma`` to ``sigma_next``.

In ``x = x0 + sigma eps`` the probability flow is ``dx / dsigma = (x - D(x, sigma)) / sigma`` (Karras et al. 2022,
arXiv:2206.00364, eq. 1 with s = 1), and its stochastic relatives add noise while they remove as much more. A solver is
``init(x) -> state`` and ``step(denoise, state, sigma, sigma_next, key) -> state``; it calls ``denoise(x, sigma) -> x0``
as often as it needs to. The last step, to ``sigma_next = 0``, lands on ``x0`` in every one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide import checks, struct
from jaxguide.typing import ArrayLike, Example, Key, Leaf, Scalar, Solver

Denoise = Callable[[Example, Scalar], Example]


class State(NamedTuple):
  """The sample so far, and what the denoiser last said of it (before the first step: the sample itself)."""

  x: Leaf
  x0: Leaf


def _move(x: Example, x0: Example, sigma: Scalar, sigma_next: Scalar) -> Example:
  """Keep ``eps`` and change its amount: ``x0 + sigma_next eps``, the exact solution if ``x0`` stood still."""
  return x0 + (sigma_next / sigma) * (x - x0)


@struct.dataclass
class DDIM:
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
    # Only numbers that somebody wrote: a tree of gradients is made of this class too, and may hold anything.
    if isinstance(self.eta, int | float | np.number):
      object.__setattr__(self, "eta", checks.in_range("eta", self.eta, 0, 1))

  def init(self, x: Example) -> State:
    """Start from ``x``."""
    return State(x, x)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    x, _ = state
    x0 = denoise(x, sigma)
    up = jnp.asarray(self.eta, x.dtype) * _posterior_std(sigma, sigma_next)
    # sqrt(sigma'^2 - up^2), without its cancellation, and with a finite gradient at sigma' = 0
    eta = jnp.asarray(self.eta, x.dtype)
    ratio = sigma_next / sigma
    square = (1 - eta) * (1 + eta) + (eta * ratio) ** 2
    kept = sigma_next * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return State(_move(x, x0, sigma, kept) + up * jax.random.normal(key, x.shape, x.dtype), x0)


@struct.dataclass
class Euler:
  """Euler's method on the probability flow: `DDIM` with ``eta = 0``, and no noise drawn."""

  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1

  def init(self, x: Example) -> State:
    """Start from ``x``."""
    return State(x, x)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    del key
    x0 = denoise(state.x, sigma)
    return State(_move(state.x, x0, sigma, sigma_next), x0)


@struct.dataclass
class DDPM:
  r"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7) with the posterior's variance.

  .. math::
    x' \sim q(x' | x, x_0 = D) = N\Big(D + \frac{\sigma'^2}{\sigma^2} (x - D),\;
      \frac{\sigma'^2}{\sigma^2} (\sigma^2 - \sigma'^2)\Big)

  which is `DDIM` with ``eta = 1``. Guidance reaches the mean through ``D``.
  """

  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1

  def init(self, x: Example) -> State:
    """Start from ``x``."""
    return State(x, x)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    x, _ = state
    x0 = denoise(x, sigma)
    mean = x0 + (sigma_next / sigma) ** 2 * (x - x0)
    return State(mean + _posterior_std(sigma, sigma_next) * jax.random.normal(key, x.shape, x.dtype), x0)


@struct.dataclass
class Heun:
  """Heun's second-order method (Karras et al. 2022, arXiv:2206.00364, Algorithm 1).

  Two evaluations a step, and one in the last, where the slope at ``sigma = 0`` is not defined.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2

  def init(self, x: Example) -> State:
    """Start from ``x``."""
    return State(x, x)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step."""
    del key
    x0 = denoise(state.x, sigma)
    guess = _move(state.x, x0, sigma, sigma_next)

    def correct(guess):
      slope = (state.x - x0) / sigma
      slope_next = (guess - denoise(guess, sigma_next)) / sigma_next
      return state.x + (sigma_next - sigma) * (slope + slope_next) / 2

    return State(jax.lax.cond(sigma_next > 0, correct, lambda guess: guess, guess), x0)


class MultistepState(NamedTuple):
  """A `State` that also remembers the level of its ``x0``; infinite before the first step."""

  x: Leaf
  x0: Leaf
  sigma: Leaf


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
    return MultistepState(_move(state.x, x0 + slope * (x0 - state.x0), sigma, sigma_next), x0, sigma)


def _posterior_std(sigma: Scalar, sigma_next: Scalar) -> Scalar:
  """Standard deviation of ``q(x' | x, x0)``; its gradient is kept finite at ``sigma_next = 0``."""
  return sigma_next / sigma * jnp.sqrt(jnp.maximum(sigma**2 - sigma_next**2, 0))


SOLVERS: dict[str, type] = {"euler": Euler, "ddim": DDIM, "ddpm": DDPM, "heun": Heun, "dpmpp-2m": DPMpp2M}


def solver(name: str, **options: ArrayLike) -> Solver:
  """Make a solver by name.

  Raises:
    ValueError: for an unknown name (with the nearest), or an option that the solver does not have.

  >>> solver("ddim", eta=1.0)
  DDIM(eta=1.0)
  >>> solver("huen")
  Traceback (most recent call last):
  ...
  ValueError: unknown solver 'huen': did you mean 'heun'? There are ddim, ddpm, dpmpp-2m, euler, heun
  """
  cls = checks.lookup("solver", name, SOLVERS)
  return cls(**checks.options(name, cls, options))
