"""Guidance that remembers: what it keeps from one step to the next travels through the sampling loop's carry.

A guidance whose prediction depends on earlier ones, such as the momentum of `jaxguide.combine.projected`, holds a
`Memory` among its parameters, reads its value, and says what it should be next in ``Prediction.memory``. `sample` puts
the one in and takes the other out, once a step: a solver's first evaluation counts, and its others in that step see
the same memory. Everything that remembers nothing is none the wiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxguide import struct
from jaxguide.typing import Example, Leaf, Prediction, PyTree


@struct.dataclass
class Memory:
  """What a guidance was told by its last step; of the shape of ``x``, or None before the first.

  >>> Memory().or_zeros(jnp.ones(2)).tolist()
  [0.0, 0.0]
  """

  value: Leaf = None

  def or_zeros(self, x: Example) -> Example:
    """Give the value, zeros like ``x`` before the first step."""
    return jnp.zeros_like(x) if self.value is None else self.value


def find(tree: PyTree) -> Memory | None:
  """Give the memory inside a denoiser or a guidance, if there is one.

  Raises:
    ValueError: if there are several.
  """
  found = [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_memory) if _is_memory(leaf)]
  if len(found) > 1:
    raise ValueError(f"at most one guidance may remember earlier steps, but {len(found)} do: leave momentum to one")
  return found[0] if found else None


def recall(tree: PyTree, value: Any) -> PyTree:
  """Put a value into the memory inside a tree; the same tree where there is none."""
  return jax.tree.map(lambda leaf: Memory(value) if _is_memory(leaf) else leaf, tree, is_leaf=_is_memory)


def noticed(denoise: Callable[..., Any], said: list[Any]) -> Callable[..., Any]:
  """Give a denoiser that writes down, while it is traced, what it says."""

  def listening(x, sigma, cond):
    said.append(denoise(x, sigma, cond))
    return said[-1]

  return listening


def after(said: Sequence[Any]) -> Any:
  """What is to be remembered after a step, of all that was said in it; None if nothing."""
  first = said[0] if said else None
  return first.memory if isinstance(first, Prediction) else None


def _is_memory(node: Any) -> bool:
  return isinstance(node, Memory)
