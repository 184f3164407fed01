"""What a guidance leaves out: passes whose result is not used, and evaluations that are known already.

At some scales a part of a guidance is not needed: at 1 classifier-free guidance is the conditional prediction, at 0 a
gradient changes nothing. A scale that is known while a program is made (a number in plain Python,
`jaxguide.scales.static`) leaves that part out of the program. A scale of `jaxguide.scales.branching` is looked at while
the program runs. Any other scale is data, and the program computes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, struct
from jaxguide._core.typing import Example, Leaf, PyTree, Scalar, Scale, scale_at


@struct.dataclass
class Static:
  """A scale that is a part of the program; see `jaxguide.scales.static`."""

  value: float = struct.field(pytree_node=False)

  def __call__(self, sigma: Scalar) -> float:
    """Return the number."""
    return self.value


@struct.dataclass
class Branching:
  """A scale that is looked at while the program runs; see `jaxguide.scales.branching`."""

  scale: Leaf

  def __call__(self, sigma: Scalar) -> Any:
    """Return the scale at this level."""
    return self.scale(sigma) if callable(self.scale) else self.scale


def known(scale: Scale) -> float | None:
  """Return the number that a scale is, if the program can be made for it; None if it is data or depends on the level.

  >>> known(2.0), known(Static(1.0)), known(lambda sigma: sigma)
  (2.0, 1.0, None)
  """
  value: Any = scale.value if isinstance(scale, Static) else scale
  if callable(value) or not checks.is_concrete(value) or np.ndim(value):
    return None
  return float(value)


def at(
  scale: Scale,
  sigma: Scalar,
  x: Example,
  others: Mapping[float, Callable[[], Any]],
  full: Callable[[Scalar], Any],
) -> Any:
  """Evaluate ``full(scale)``, or at one of the scales in ``others`` that function, which needs less.

  Args:
    scale: a number or a function of ``sigma``.
    sigma: the noise level.
    x: the example, in whose type ``full`` gets the scale.
    others: functions of nothing by scale. They return what ``full`` would, in the same structure.
    full: a function of the scale.
  """
  number = known(scale)
  if number is not None and number in others:
    return others[number]()
  value = scale_at(scale, sigma, x)
  if not isinstance(scale, Branching):
    return full(value)
  return jax.lax.switch(_place(value, tuple(others)), [*others.values(), lambda: full(value)])


def differs(scale: Scale, sigma: Scalar, x: Example, number: float) -> Any:
  """Return whether a scale is another one than a number; True for a scale that is not looked at."""
  if known(scale) is not None:
    return known(scale) != number
  return _place(scale_at(scale, sigma, x), (number,)) == 1 if isinstance(scale, Branching) else True


def _place(value: Scalar, numbers: tuple[float, ...]) -> Any:
  """Return the place of a value in ``numbers``, or their number if it is none of them.

  A batch of values is none of them, so that a choice by the place stays a choice under ``vmap`` over scales. There all
  branches of the choice would run for every scale, at more cost than the full one alone.
  """

  @jax.custom_batching.custom_vmap
  def place(value):
    index = jnp.asarray(len(numbers), jnp.int32)
    for number in numbers[::-1]:
      index = jnp.where(value == number, numbers.index(number), index).astype(jnp.int32)
    return index

  @place.def_vmap
  def _(axis_size, in_batched, value):
    del axis_size, in_batched, value
    return jnp.asarray(len(numbers), jnp.int32), False

  return place(jax.lax.stop_gradient(value))


@struct.dataclass
class Known:
  """A denoiser whose prediction at one ``x``, ``sigma`` and ``cond`` is known and is not computed again.

  The inputs are recognised by identity. Behind a transformation, such as a gradient, they are others, and the denoiser
  is evaluated.
  """

  denoise: Leaf
  x: Leaf
  sigma: Leaf
  cond: Leaf
  prediction: Leaf

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> Any:
    """Return the prediction."""
    return self.prediction if self.knows(x, sigma, cond) else self.denoise(x, sigma, cond)

  def knows(self, x: Example, sigma: Scalar, cond: PyTree) -> bool:
    """Whether the prediction is that of these inputs."""
    return x is self.x and sigma is self.sigma and cond is self.cond


def evaluated(denoise: Any, x: Example, sigma: Scalar, cond: PyTree) -> tuple[Any, Known]:
  """Evaluate a denoiser. Return its prediction, and the denoiser that knows it."""
  prediction = denoise(x, sigma, cond)
  inner = denoise.denoise if isinstance(denoise, Known) else denoise
  return prediction, Known(inner, x, sigma, cond, prediction)
