"""Networks of Flax NNX."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxguide.denoisers.frameworks.hints import takes
from jaxguide.denoisers.frameworks.own import Variables, constructor_fields, looked_up, nested

Place = tuple[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class NnxParts:
  """An NNX network without its arrays.

  Args:
    graph: the definition of its graph.
    tree: the tree of its state.
    places: (collection, path) of each leaf; ``rng`` for the state of random numbers, which is made anew in each call.
    leaves: shape and type of each leaf.
  """

  graph: Any
  tree: Any
  places: tuple[Place, ...]
  leaves: tuple[Any, ...]

  def shapes(self) -> Variables:
    """Return the shapes and types of the network's arrays."""
    kept = [(place, leaf) for place, leaf in zip(self.places, self.leaves, strict=True) if place[0] != "rng"]
    return nested(*zip(*kept, strict=True)) if kept else {}

  def run(self, variables: Variables, key: Any, train: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call the network in evaluation or training mode."""
    from flax import nnx

    root = jax.random.key(0) if key is None else key
    if "rngs" in options:
      options = {**options, "rngs": None if key is None else nnx.Rngs(jax.random.fold_in(root, len(self.places)))}
    before = [
      _random(leaf, root, number) if place[0] == "rng" else looked_up(variables, place)
      for number, (place, leaf) in enumerate(zip(self.places, self.leaves, strict=True))
    ]
    model = nnx.merge(self.graph, jax.tree.unflatten(self.tree, before))
    if train:
      model.train()
    else:
      model.eval()
    output = model(*args, **options)
    after = {place: leaf for place, leaf in _placed(nnx.state(model))}
    for place, leaf in zip(self.places, before, strict=True):
      if after.get(place) is leaf:
        continue
      name = "/".join(place[1])
      if place[0] != "rng":
        raise ValueError(
          f"{type(model).__name__} changes its state {name} in {'training' if train else 'evaluation'}, which is not "
          "supported: a denoiser is a function. Use, for example, GroupNorm in place of BatchNorm"
        )
      if key is None:
        raise ValueError(
          f"{type(model).__name__} draws random numbers ({name}) outside of training: a denoiser is a function. Use "
          "nnx.Dropout, which model.eval() turns off"
        )
    return output


def _random(leaf: Any, root: Any, number: int) -> Any:
  if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jnp.zeros(leaf.shape, leaf.dtype)
  key = jax.random.fold_in(root, number)
  return jax.random.split(key, leaf.shape) if leaf.shape else key


def _placed(state: Any) -> list[tuple[Place, Any]]:
  """Return the leaves of a state with their places, in the order of its tree."""
  from flax import nnx

  found = []
  variables = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
  for path, variable in variables:
    collection = "state"
    for kind, name in ((nnx.RngState, "rng"), (nnx.Param, "params"), (nnx.BatchStat, "batch_stats")):
      if isinstance(variable, kind):
        collection = name
    for inside, leaf in jax.tree_util.tree_leaves_with_path(variable):
      # The first name inside a variable is that of its value.
      names = (*path, *inside[1:])
      place = collection, tuple(jax.tree_util.keystr((one,), simple=True) for one in names)
      found.append((place, _array(leaf, place)))
  return found


def _array(leaf: Any, place: Place) -> Any:
  """Return a leaf of a state as an array, which Python's numbers are not yet, as in ``nnx.Param(1.0)``.

  Raises:
    TypeError: if it is something else, such as a text.
  """
  if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
    return leaf
  if isinstance(leaf, bool | int | float | complex):
    return jnp.asarray(leaf)
  raise TypeError(
    f"the variable {'/'.join(place[1])} holds a {type(leaf).__name__}, and an nnx.Variable must hold arrays or "
    "numbers: make it an attribute of its module"
  )


def split(model: Any) -> tuple[NnxParts, Variables]:
  """Divide an NNX network into its definition and its arrays."""
  from flax import nnx

  graph, state = nnx.split(model)
  placed = _placed(state)
  places = tuple(place for place, _ in placed)
  leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for _, leaf in placed)
  kept = [(place, leaf) for place, leaf in placed if place[0] != "rng"]
  return NnxParts(graph, jax.tree.structure(state), places, leaves), nested(*zip(*kept, strict=True)) if kept else {}


class NnxMaker:
  """How networks of an `nnx.Module` class are made."""

  batched = True

  def fields(self, cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of the constructor without ``rngs``."""
    return constructor_fields(cls, ("rngs",))

  def parts(self, cls: type, fields: Mapping[str, Any]) -> NnxParts:
    """Return the network of these fields without its arrays."""
    from flax import nnx

    return split(nnx.eval_shape(lambda: self._made(cls, fields, jax.random.key(0))))[0]

  def initial(self, cls: type, fields: Mapping[str, Any], key: Any, args: tuple[Any, ...], options: Any) -> Variables:
    """Draw the initial arrays of the network of these fields."""
    return split(self._made(cls, fields, key))[1]

  def _made(self, cls: type, fields: Mapping[str, Any], key: Any) -> Any:
    from flax import nnx

    return cls(**fields, **({"rngs": nnx.Rngs(key)} if takes(cls, "rngs") else {}))
