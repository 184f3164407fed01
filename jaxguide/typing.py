"""The types that everything here is written in.

The state of a sampler is ``x = x0 + sigma * eps`` with ``eps ~ N(0, I)`` (variance exploding). Denoisers,
classifiers and solvers see *one example* of shape ``(*shape)`` and a scalar ``sigma``; a batch is ``jax.vmap`` outside.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, PyTree

ArrayLike = jax.typing.ArrayLike
Key = jax.Array
"""A JAX random key: typed, as ``jax.random.key`` makes it, or a raw ``uint32`` pair."""

Leaf = Any
"""A field of a pytree: a number or an array, or whatever a transformation of the tree puts in its place."""

Example = Float[Array, "*shape"]
Scalar = Float[Array, ""]


@runtime_checkable
class Denoiser(Protocol):
  """``E[x0 | x; sigma, cond]``: the clean example that is expected behind a noisy one."""

  def __call__(self, x: Example, sigma: Scalar, cond: Any, /) -> Example:
    """Give ``x0`` of the shape of ``x``."""
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
  "PyTree",
  "Scalar",
  "Solver",
  "SolverState",
]
