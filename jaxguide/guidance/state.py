"""State that a guidance keeps from one step to the next: it travels in the carry of the sampling loop.

The momentum of `jaxguide.combine.projected` is such a state, and so is a gradient that is reused (``every``). A
guidance with state holds a `GuidanceState` among its parameters. It reads the value of the last step there, and returns
the next value in `Prediction.guidance_state`, as `GuidanceState.becomes` writes it. `jaxguide.sample` gives every state
a slot, and moves the values from one step to the next. The first evaluation of a step sets the next value; a solver's
further evaluations in that step read the same old value. Guidance without state is not affected.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxguide._core import struct
from jaxguide._core.typing import Example, Leaf, Prediction, PyTree, by_slot


@struct.dataclass
class GuidanceState:
  """The state of a guidance after the last step: an array of the shape of ``x``, or None before the first step.

  >>> GuidanceState().or_zeros(jnp.ones(2)).tolist()
  [0.0, 0.0]
  """

  value: Leaf = None
  slot: str = struct.field(pytree_node=False, default="")
  kind: ClassVar[str] = "momentum"

  def or_zeros(self, x: Example) -> Any:
    """Return the value; before the first step, zeros of the shape of ``x``."""
    return jnp.zeros_like(x) if self.value is None else self.value

  def becomes(self, value: Any) -> dict[str, Any]:
    """Return what a guidance gives as its `Prediction.guidance_state`, for the next value of this state."""
    return {self.slot or self.kind: value}


@struct.dataclass
class GradientState(GuidanceState):
  """A gradient and the number of steps so far, ``(gradient, steps)``.

  >>> GradientState().or_zeros(jnp.ones(2))[1].item()
  0
  """

  kind: ClassVar[str] = "gradient"

  def or_zeros(self, x: Example) -> Any:
    """Return the value; before the first step, a gradient of zeros and no steps."""
    return (jnp.zeros_like(x), jnp.zeros((), jnp.int32)) if self.value is None else self.value


def find(tree: PyTree) -> list[GuidanceState]:
  """Return the states inside a denoiser or a guidance."""
  return [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(leaf)]


def start(tree: PyTree, x: Example) -> dict[str, Any]:
  """Return the values of the states of a denoiser before the first step, by their slots."""
  return {str(slot): state.or_zeros(x) for slot, state in enumerate(find(tree))}


def placed(tree: PyTree, values: Mapping[str, Any]) -> PyTree:
  """Give each state inside a tree its slot and the value there; a tree without state does not change."""
  slots = map(str, itertools.count())

  def place(state):
    slot = next(slots)
    return dataclasses.replace(state, value=values[slot], slot=slot)

  return map_states(place, tree)


def map_states(function: Callable[[Any], Any], tree: PyTree) -> PyTree:
  """Apply a function to the states inside a tree."""
  return jax.tree.map(lambda leaf: function(leaf) if _is_state(leaf) else leaf, tree, is_leaf=_is_state)


def recording(denoise: Callable[..., Any], outputs: list[Any]) -> Callable[..., Any]:
  """Wrap a denoiser so that each output is appended to ``outputs`` while it is traced."""

  def recorded(x, sigma, cond):
    outputs.append(denoise(x, sigma, cond))
    return outputs[-1]

  return recorded


def next_values(outputs: Sequence[Any]) -> dict[str, Any]:
  """Return the states' next values from the denoiser's outputs in one step: those of the first output."""
  first = outputs[0] if outputs else None
  return by_slot(first.guidance_state) if isinstance(first, Prediction) else {}


def _is_state(node: Any) -> bool:
  return isinstance(node, GuidanceState)
