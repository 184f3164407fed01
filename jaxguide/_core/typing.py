"""The types that the library's functions are annotated with.

The state of a sampler is ``x = x0 + sigma * eps`` with ``eps ~ N(0, I)`` (variance exploding). Denoisers, classifiers
and solvers take *one example* of shape ``(*shape)`` and a scalar ``sigma``. For a batch, apply ``jax.vmap`` outside.
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
"""A JAX random key: typed, as ``jax.random.key`` returns it, or a raw ``uint32`` pair."""

Leaf = Any
"""A field of a pytree: a number or an array, or the placeholder that a transformation of the tree puts in its place."""

Example = Float[Array, "*shape"]
Scalar = Float[Array, ""]


Scale = ArrayLike | Callable[..., ArrayLike]
"""A number, or a function of ``sigma`` that returns one; see `jaxguide.scales`."""


def scale_at(scale: Scale, sigma: Scalar, x: Example) -> Scalar:
  """Evaluate a scale at a noise level, and convert it to the type of an example.

  Raises:
    TypeError: if the example is not floating-point.
    ValueError: if the scale is more than one number.

  >>> import jax.numpy as jnp
  >>> float(scale_at(lambda sigma: 3 * sigma, jnp.asarray(2.0), jnp.zeros(2)))
  6.0
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"an example must be floats, got {x.dtype}")
  value = jnp.asarray(scale(sigma) if callable(scale) else scale, x.dtype)
  if value.ndim:
    raise ValueError(f"a scale must be one number for one example, got shape {value.shape}: use vmap for several")
  return value


@struct.dataclass
class Prediction:
  """A denoiser's output with extras: x0, an optional learned variance, an optional guidance state.

  Guidance changes ``x0`` alone.

  Args:
    x0: the predicted clean example.
    variance: the network's output for the variance of `jaxguide.DDPM`'s step, of the shape of ``x0``: -1 for the
      smallest and 1 for the largest (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15). None if the network does not
      predict the variance.
    guidance_state: the values that guidances pass on to the next step, by the slots of their states, or None; see
      `jaxguide.guidance.state`.
  """

  x0: Leaf
  variance: Leaf = None
  guidance_state: Leaf = None


def x0_of(prediction: Any) -> Example:
  """Return the clean example of a denoiser's output, which is ``x0`` itself or a `Prediction`."""
  return prediction.x0 if isinstance(prediction, Prediction) else prediction


def map_x0(function: Callable[..., Any], prediction: Any, *others: Any) -> Any:
  """Apply a function to the clean examples of one or more denoisers' outputs.

  Guidance methods use this, so that they do not change a learned variance.

  Args:
    function: takes the clean examples, and returns a clean example, or a `Prediction` with a new guidance state.
    prediction: a denoiser's output, whose variance, if any, is part of the result.
    *others: more outputs.

  Returns:
    The new clean example, in a `Prediction` if there is a variance or a guidance state. The state of a slot is the
    first that the function's result, ``prediction`` and ``others`` have.

  Raises:
    TypeError: if the function does not return a clean example.

  >>> import jax.numpy as jnp
  >>> float(map_x0(lambda a, b: a - b, jnp.asarray(3.0), jnp.asarray(1.0)))
  2.0
  """
  result = function(x0_of(prediction), *map(x0_of, others))
  predictions = [output for output in (result, prediction, *others) if isinstance(output, Prediction)]
  variance = prediction.variance if isinstance(prediction, Prediction) else None
  states = [output.guidance_state for output in predictions if output.guidance_state is not None]
  state = {slot: value for values in states[::-1] for slot, value in by_slot(values).items()} if states else None
  x0 = x0_of(result)
  if not isinstance(x0, jax.Array | np.ndarray | int | float):
    raise TypeError(
      f"guidance must return a clean example, got {x0!r}: if this is a combine rule, call it with its options first"
    )
  return x0 if variance is None and state is None else Prediction(x0, variance, state)


def by_slot(guidance_state: Any) -> dict[str, Any]:
  """Return the values of a `Prediction.guidance_state` by their slots. A value without a slot is that of the first."""
  if guidance_state is None:
    return {}
  return guidance_state if isinstance(guidance_state, dict) else {"0": guidance_state}


@runtime_checkable
class Denoiser(Protocol):
  """``E[x0 | x; sigma, cond]``: the expected clean example of a noisy one."""

  def __call__(self, x: Example, sigma: Scalar, cond: Any, /) -> Example | Prediction:
    """Predict ``x0``, of the shape of ``x``. The output may be a `Prediction` that holds it."""
    ...


@runtime_checkable
class LogProb(Protocol):
  """``log p(cond | x; sigma)``: the log-probability of a condition by a classifier trained on noisy examples."""

  def __call__(self, x: Example, sigma: Scalar, cond: Any, /) -> Scalar:
    """Return the log-probability, a scalar."""
    ...


Guidance = Callable[[Denoiser], Denoiser]
"""A guidance method: a function from a denoiser to the guided denoiser."""


@runtime_checkable
class SolverState(Protocol):
  """The state of a solver between two steps."""

  @property
  def x(self) -> Example:
    """The noisy example at the current ``sigma``."""
    ...

  @property
  def x0(self) -> Example:
    """The guided denoiser's latest prediction of the clean example."""
    ...


@runtime_checkable
class Solver(Protocol):
  """One step from ``sigma`` down to ``sigma_next``. The condition is already part of ``denoise``."""

  def init(self, x: Example) -> Any:
    """Return the state before the first step."""
    ...

  def step(
    self,
    denoise: Callable[[Example, Scalar], Example],
    state: Any,
    sigma: Scalar,
    sigma_next: Scalar,
    key: Key,
  ) -> Any:
    """Return the state at ``sigma_next``."""
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
