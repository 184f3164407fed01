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
  """What a guidance was told by its last step; of the shape of ``x``, or None before the first.

  >>> GuidanceState().or_zeros(jnp.ones(2)).tolist()
  [0.0, 0.0]
  """

  value: Leaf = None

  def or_zeros(self, x: Example) -> Example:
    """Give the value, zeros like ``x`` before the first step."""
    return jnp.zeros_like(x) if self.value is None else self.value


def find(tree: PyTree) -> GuidanceState | None:
  """Give the memory inside a denoiser or a guidance, if there is one.

  Raises:
    ValueError: if there are several.
  """
  found = [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(leaf)]
  if len(found) > 1:
    raise ValueError(f"at most one guidance may remember earlier steps, but {len(found)} do: leave momentum to one")
  return found[0] if found else None


def recall(tree: PyTree, value: Any) -> PyTree:
  """Put a value into the memory inside a tree; the same tree where there is none."""
  return jax.tree.map(lambda leaf: GuidanceState(value) if _is_state(leaf) else leaf, tree, is_leaf=_is_state)


def noticed(denoise: Callable[..., Any], said: list[Any]) -> Callable[..., Any]:
  """Give a denoiser that writes down, while it is traced, what it says."""

  def listening(x, sigma, cond):
    said.append(denoise(x, sigma, cond))
    return said[-1]

  return listening


def after(said: Sequence[Any]) -> Any:
  """What is to be remembered after a step, of all that was said in it; None if nothing."""
  first = said[0] if said else None
  return first.guidance_state if isinstance(first, Prediction) else None


def _is_state(node: Any) -> bool:
  return isinstance(node, GuidanceState)
