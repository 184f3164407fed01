"""The sampler of consistency models."""

from __future__ import annotations

from typing import ClassVar

import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Key, Leaf, Scalar
from jaxguide.solvers.base import Denoise, Memoryless, State, draw


@struct.dataclass
class Consistency(Memoryless):
  r"""Multistep sampling of a consistency model (Song et al. 2023, arXiv:2303.01469, Algorithm 1).

  .. math:: x' = D(x, \sigma) + \sqrt{\sigma'^2 - \sigma_{min}^2}\; z

  A consistency model gives a whole sample at each level (`jaxguide.scaling.consistency`). Each step adds noise to it,
  down to the next level. The last step, to level 0, adds none: a grid of two levels is one-step sampling. The levels
  that were published are `jaxguide.schedules.consistency`. With other denoisers, which give the mean of x0, the samples
  do not follow their distribution.

  OpenAI's code clips ``D`` to [-1, 1]; `jaxguide.clip_x0` does that, and ``jaxguide sample`` by itself. With a guided
  denoiser D is the guided one.

  Args:
    sigma_min: the level at which a consistency model gives its input; at least 0. At or below it no noise is added.

  Raises:
    ValueError: if ``sigma_min`` is negative.

  >>> Consistency(sigma_min=0.002).evaluations
  1
  """

  sigma_min: Leaf = 0.002
  order: ClassVar[int] = 0  # Of another denoiser it does not solve the equation.
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "sigma_min", checks.in_range, 0)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with one evaluation."""
    x0 = denoise(state.x, sigma)
    square = jnp.square(sigma_next) - jnp.square(jnp.asarray(self.sigma_min, sigma_next.dtype))
    # Without the conditions the gradient of the root would be infinite at 0.
    up = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return State(x0 + up * draw(key, state.x), x0)
