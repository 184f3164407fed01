"""Dataclasses that are pytrees. The tree structures of two classes are never equal.

With ``jax.tree_util.register_dataclass``, and so with ``flax.struct``, the tree structures of two classes are equal if
the classes have the same number of leaves and the same static fields, such as ``Euler()`` and ``Heun()``. Then ``jit``
could run the program that it compiled for the other class. Here the class is part of the tree structure.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax


def field(*, pytree_node: bool = True, **options: Any) -> Any:
  """Declare a field. It is static (hashed and compared, not traced) if ``pytree_node`` is false."""
  return dataclasses.field(metadata={"pytree_node": pytree_node}, **options)


@dataclass_transform(field_specifiers=(field,), frozen_default=True)
def dataclass(cls):
  """Make a class a frozen dataclass and a pytree. Instances compare by identity, since their leaves are arrays."""
  cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
  cls.replace = dataclasses.replace  # as in flax.struct
  fields = dataclasses.fields(cls)
  leaves = [f.name for f in fields if f.metadata.get("pytree_node", True)]
  static = [f.name for f in fields if f.name not in leaves]

  def flatten(tree):
    children = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in leaves]
    return children, (cls, *(getattr(tree, name) for name in static))

  def unflatten(aux, children):
    return cls(**dict(zip(leaves, children, strict=True)), **dict(zip(static, aux[1:], strict=True)))

  jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
  return cls


def as_tree(function: Callable[..., Any]) -> Callable[..., Any]:
  """Return a callable as a pytree. A plain function becomes a static part of a pytree without leaves.

  >>> jax.tree.leaves(as_tree(max)), jax.tree.leaves(as_tree(jax.tree_util.Partial(max, 2.0)))
  ([], [2.0])
  """
  return jax.tree_util.Partial(function) if jax.tree_util.all_leaves([function]) else function
