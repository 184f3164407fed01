"""State that a guidance keeps from one step to the next: it travels in the carry of the sampling loop.

The momentum of `jaxguide.combine.projected` is such a state. A guidance with state holds a `GuidanceState` among its
parameters. It reads the value of the last step there, and returns the next value in `Prediction.guidance_state`.
`jaxguide.sample` moves the value from one step to the next. The first evaluation of a step sets the next value; a
solver's further evaluations in that step read the same old value. Guidance without state is not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxguide._core import struct
from jaxguide._core.typing import Example, Leaf, Prediction, PyTree


@struct.dataclass
class GuidanceState:
  """The state of a guidance after the last step: an array of the shape of ``x``, or None before the first step.

  >>> GuidanceState().or_zeros(jnp.ones(2)).tolist()
  [0.0, 0.0]
  """

  value: Leaf = None

  def or_zeros(self, x: Example) -> Example:
    """Return the value; before the first step, zeros of the shape of ``x``."""
    return jnp.zeros_like(x) if self.value is None else self.value


def find(tree: PyTree) -> GuidanceState | None:
  """Return the state inside a denoiser or a guidance, or None if there is none.

  Raises:
    ValueError: if there are several.
  """
  states = [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(leaf)]
  if len(states) > 1:
    raise ValueError(f"at most one guidance can have momentum, but {len(states)} do: give momentum to one of them")
  return states[0] if states else None


def with_value(tree: PyTree, value: Any) -> PyTree:
  """Set the value of the state inside a tree; a tree without state does not change."""
  return jax.tree.map(lambda leaf: GuidanceState(value) if _is_state(leaf) else leaf, tree, is_leaf=_is_state)


def recording(denoise: Callable[..., Any], outputs: list[Any]) -> Callable[..., Any]:
  """Wrap a denoiser so that each output is appended to ``outputs`` while it is traced."""

  def recorded(x, sigma, cond):
    outputs.append(denoise(x, sigma, cond))
    return outputs[-1]

  return recorded


def next_value(outputs: Sequence[Any]) -> Any:
  """Return the state's next value from the denoiser's outputs in one step: that of the first output, or None."""
  first = outputs[0] if outputs else None
  return first.guidance_state if isinstance(first, Prediction) else None


def _is_state(node: Any) -> bool:
  return isinstance(node, GuidanceState)
