"""Networks of Equinox."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide.denoisers.frameworks.hints import takes
from jaxguide.denoisers.frameworks.own import Variables, constructor_fields, looked_up, nested

Place = tuple[str, tuple[str, ...]]
MODEL, STATE = "model", "state"


@dataclasses.dataclass(frozen=True)
class EquinoxParts:
  """An Equinox network without its arrays.

  Args:
    tree: the tree of the pair of the network and its `equinox.nn.State`, which may be None.
    leaves: for each leaf its (collection, path), or None if it is no array.
    values: for each leaf its shape and type, or the leaf itself if it is no array.
  """

  tree: Any
  leaves: tuple[Place | None, ...]
  values: tuple[Any, ...]

  def shapes(self) -> Variables:
    """Return the shapes and types of the network's arrays."""
    kept = [(place, value) for place, value in zip(self.leaves, self.values, strict=True) if place is not None]
    return nested(*zip(*kept, strict=True)) if kept else {}

  def run(self, variables: Variables, key: Any, train: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call the network, with its state if it has one, in evaluation or training mode."""
    import equinox

    leaves = [
      value if place is None else looked_up(variables, place)
      for place, value in zip(self.leaves, self.values, strict=True)
    ]
    model, state = jax.tree.unflatten(self.tree, leaves)
    if train and state is not None:
      raise ValueError(
        f"{type(model).__name__} has a state, such as batch statistics, which is not supported in training: use, for "
        "example, equinox.nn.GroupNorm"
      )
    model = equinox.nn.inference_mode(model, value=not train)
    if state is None:
      return model(*args, **options)
    output, _ = model(*args, state, **options)
    return output


def split(model: Any, state: Any) -> tuple[EquinoxParts, Variables]:
  """Divide an Equinox network and its state into their structure and their arrays."""
  with_path, tree = jax.tree_util.tree_flatten_with_path((model, state))
  places: list[Place | None] = []
  values, arrays = [], []
  for path, leaf in with_path:
    if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
      places.append(None)
      values.append(leaf)
      continue
    own = path[0].idx == 0
    collection = "params" if own and jnp.issubdtype(leaf.dtype, jnp.inexact) else "state"
    names = tuple(jax.tree_util.keystr((one,), simple=True) for one in path[1:])
    places.append((collection, names if own else ("values", *names)))
    values.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    arrays.append(leaf)
  kept = [place for place in places if place is not None]
  return EquinoxParts(tree, tuple(places), tuple(values)), nested(kept, arrays)


def has_indices(model: Any) -> bool:
  """Whether a network has layers with a state."""
  import equinox

  index = equinox.nn.StateIndex
  return any(isinstance(node, index) for node in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, index)))


class EquinoxMaker:
  """How networks of an `equinox.Module` class are made."""

  batched = False

  def fields(self, cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of the constructor without ``key``."""
    return constructor_fields(cls, ("key",))

  def parts(self, cls: type, fields: Mapping[str, Any]) -> EquinoxParts:
    """Return the network of these fields without its arrays."""
    import equinox

    made = equinox.filter_eval_shape(self._made, cls, fields, jax.random.key(0))
    return split(*made)[0]

  def initial(self, cls: type, fields: Mapping[str, Any], key: Any, args: tuple[Any, ...], options: Any) -> Variables:
    """Draw the initial arrays of the network of these fields."""
    return split(*self._made(cls, fields, key))[1]

  def _made(self, cls: type, fields: Mapping[str, Any], key: Any) -> Any:
    import equinox

    keys = {"key": key} if takes(cls, "key") else {}
    model, state = equinox.nn.make_with_state(cls)(**fields, **keys)
    return model, state if jax.tree.leaves(state) else None
