"""The types that everything here is written in.

The state of a sampler is ``x = x0 + sigma * eps`` with ``eps ~ N(0, I)`` (variance exploding). Denoisers,
classifiers and solvers see *one example* of shape ``(*shape)`` and a scalar ``sigma``; a batch is ``jax.vmap`` outside.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxguide._core import struct

ArrayLike = jax.typing.ArrayLike
Key = jax.Array
"""A JAX random key: typed, as ``jax.random.key`` makes it, or a raw ``uint32`` pair."""

Leaf = Any
"""A field of a pytree: a number or an array, or whatever a transformation of the tree puts in its place."""

Example = Float[Array, "*shape"]
Scalar = Float[Array, ""]


Scale = ArrayLike | Callable[..., ArrayLike]
"""A number, or a function of ``sigma`` that gives one; see `jaxguide.scales`."""


def scale_at(scale: Scale, sigma: Scalar, x: Example) -> Scalar:
  """Give a scale at a noise level, in the type of an example.

  Raises:
    ValueError: if it is more than one number.

  >>> import jax.numpy as jnp
  >>> float(scale_at(lambda sigma: 3 * sigma, jnp.asarray(2.0), jnp.zeros(2)))
  6.0
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"an example must be floats, got {x.dtype}")
  value = jnp.asarray(scale(sigma) if callable(scale) else scale, x.dtype)
  if value.ndim:
    raise ValueError(f"a scale is one number for one example, got shape {value.shape}: vmap over scales, outside")
  return value


@struct.dataclass
class Prediction:
  """What a denoiser gives that says more than ``x0``.

  Guidance changes ``x0`` and lets the rest be; only who has a use for the rest looks at it.

  Args:
    x0: the clean example.
    variance: the network's word on the variance of `jaxguide.DDPM`'s step, of the shape of ``x0``: -1 for the smallest
      and 1 for the largest (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15); None if it has none.
    guidance_state: what a guidance keeps for the next step, None if nothing; see `jaxguide.guidance.state`.
  """

  x0: Leaf
  variance: Leaf = None
  guidance_state: Leaf = None


def x0_of(prediction: Any) -> Example:
  """The clean example in what a denoiser gave."""
  return prediction.x0 if isinstance(prediction, Prediction) else prediction


def map_x0(function: Callable[..., Any], prediction: Any, *others: Any) -> Any:
  """Apply a function to the clean examples in what denoisers gave.

  The first one's variance, if any, stays; so does the newest guidance state. Guidance is written with this, so that
  it never touches a learned variance.

  >>> import jax.numpy as jnp
  >>> float(map_x0(lambda a, b: a - b, jnp.asarray(3.0), jnp.asarray(1.0)))
  2.0
  """
  made = function(x0_of(prediction), *map(x0_of, others))
  said = (part for part in (made, prediction, *others) if isinstance(part, Prediction))
  variance = prediction.variance if isinstance(prediction, Prediction) else None
  state = next((part.guidance_state for part in said if part.guidance_state is not None), None)
  if not isinstance(x0_of(made), jax.Array | np.ndarray | int | float):
    raise TypeError(f"guidance must give a clean example, got {x0_of(made)!r}: perhaps a rule is to be called first")
  bare = variance is None and state is None
  return x0_of(made) if bare else Prediction(x0_of(made), variance, state)


@runtime_checkable
class Denoiser(Protocol):
  """``E[x0 | x; sigma, cond]``: the clean example that is expected behind a noisy one."""

  def __call__(self, x: Example, sigma: Scalar, cond: Any, /) -> Example | Prediction:
    """Give ``x0`` of the shape of ``x``, or a `Prediction` that holds it."""
    ...


@runtime_checkable
class LogProb(Protocol):
  """``log p(cond | x; sigma)``: what a classifier trained on noisy examples says of a condition."""

  def __call__(self, x: Example, sigma: Scalar, cond: Any, /) -> Scalar:
    """Give a scalar."""
    ...


Guidance = Callable[[Denoiser], Denoiser]
"""A guidance method: it takes a denoiser and gives back the guided one."""


@runtime_checkable
class SolverState(Protocol):
  """What a solver carries from step to step. ``x`` is the sample so far, ``x0`` the last denoised one."""

  @property
  def x(self) -> Example:
    """The noisy example at the current ``sigma``."""
    ...

  @property
  def x0(self) -> Example:
    """The guided denoiser's latest output."""
    ...


@runtime_checkable
class Solver(Protocol):
  """One step from ``sigma`` down to ``sigma_next``; ``denoise`` has its condition already."""

  def init(self, x: Example) -> Any:
    """Give the state that the first step starts from."""
    ...

  def step(
    self,
    denoise: Callable[[Example, Scalar], Example],
    state: Any,
    sigma: Scalar,
    sigma_next: Scalar,
    key: Key,
  ) -> Any:
    """Give the state at ``sigma_next``."""
    ...


__all__ = [
  "Array",
  "ArrayLike",
  "Denoiser",
  "Example",
  "Float",
  "Guidance",
  "Int",
  "Key",
  "Leaf",
  "LogProb",
  "Prediction",
  "PyTree",
  "Scalar",
  "Scale",
  "Solver",
  "SolverState",
  "map_x0",
  "scale_at",
  "x0_of",
]
