"""Flax linen modules as networks: comparison of modules by value, and checks of parameters against a module."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from jaxguide._core.kept import kept
from jaxguide._core.typing import PyTree
from jaxguide.nn.parameters import shapes_alone


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleMethod:
  """A method of a Flax module; two are equal if their modules have equal types and fields.

  Python compares the objects of bound methods by identity. With this class two networks of the same configuration share
  one compiled program. Fields without a hash, such as dictionaries, lists and arrays, are compared by their contents.
  """

  module: nn.Module
  name: str

  def __call__(self, *args, **kwargs):
    """Call the method."""
    return getattr(self.module, self.name)(*args, **kwargs)

  def __eq__(self, other):
    return isinstance(other, ModuleMethod) and self._value == other._value

  def __hash__(self):
    return hash(self._value)

  @functools.cached_property
  def _value(self):
    return _hashable(self.module), self.name


def _hashable(value):
  """Convert a value to one that has a hash; two results are equal if the values have the same contents."""
  if isinstance(value, nn.Module):
    fields = [field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name")]
    return type(value), value.name, tuple((name, _hashable(getattr(value, name))) for name in fields)
  if isinstance(value, Mapping):
    return "mapping", frozenset((key, _hashable(item)) for key, item in value.items())
  if isinstance(value, list | tuple):
    return type(value), tuple(map(_hashable, value))
  if isinstance(value, set | frozenset):
    return "set", frozenset(map(_hashable, value))
  if isinstance(value, np.ndarray | jax.Array):
    return "array", value.shape, value.dtype, np.asarray(value).tobytes()
  try:
    hash(value)
  except TypeError:
    return _ById(value)
  return value


@dataclasses.dataclass(frozen=True, eq=False)
class _ById:
  """A value without a hash, compared by identity."""

  value: Any

  def __eq__(self, other):
    return isinstance(other, _ById) and self.value is other.value

  def __hash__(self):
    return id(self.value)


def by_value(apply: Callable[..., Any]) -> Callable[..., Any]:
  """Return a Flax module's method as a `ModuleMethod`, and any other function unchanged.

  Raises:
    TypeError: if ``apply`` is a module, is a network of another framework with its parameters, or cannot be called.
  """
  if isinstance(apply, nn.Module):
    raise TypeError(
      "apply must be a function of (params, x, c_noise, ...), got a module: give its method, "
      f"{type(apply).__name__}.apply"
    )
  maker = _maker_of(apply)
  if maker is not None:
    raise TypeError(
      f"apply must be a function of (params, x, c_noise, ...), got {type(apply).__name__} with its parameters, which "
      f"would be constants of the program: give jaxguide.{maker}(model, scaling)"
    )
  if isinstance(apply, str) or (apply is not None and not callable(apply)):
    raise TypeError(f"apply must be a function of (params, x, c_noise, ...), got {apply!r}")
  owner = getattr(apply, "__self__", None)
  return ModuleMethod(owner, apply.__name__) if isinstance(owner, nn.Module) else apply


def _maker_of(apply: Any) -> str | None:
  """Return which function makes a denoiser of a network that has its parameters inside; None for other functions."""
  # Neither is imported here: a network of theirs exists only where the user has imported them.
  nnx, equinox = sys.modules.get("flax.nnx"), sys.modules.get("equinox")
  if nnx is not None and isinstance(apply, nnx.Module):
    return "from_nnx"
  # Equinox's transformed functions are modules without arrays.
  if equinox is not None and isinstance(apply, equinox.Module) and any(map(equinox.is_array, jax.tree.leaves(apply))):
    return "from_equinox"
  return None


def module_of(apply: Callable[..., Any] | None) -> nn.Module | None:
  """Return the Flax module of a `ModuleMethod`, and None for any other function.

  >>> module_of(by_value(nn.Dense(3).apply)).features
  3
  """
  return apply.module if isinstance(apply, ModuleMethod) else None


def name_of(module: Any) -> str:
  """Return the name of a module's class, or of the network of another framework in it."""
  return getattr(module, "name_of_network", type(module).__name__)


def check_params(module: nn.Module, params: PyTree, *args: Any) -> None:
  """Check that parameters fit a Flax module.

  Args:
    module: the network.
    params: its variables, ``{"params": ...}``.
    *args: inputs of the network; only their shapes and types matter.

  Raises:
    ValueError: if a parameter is missing, unknown or of another shape (the message names the first one), or if the
      network cannot be called with ``args``.
  """
  name, expected = name_of(module), param_shapes(module, *args)
  ours, theirs = (
    {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}
    # Parameters can be in Flax boxes with partitioning metadata.
    for leaves in map(jax.tree_util.tree_leaves_with_path, map(nn.meta.unbox, (params, expected)))
  )
  for path in [*theirs, *ours]:
    if ours.get(path) != theirs.get(path):
      if path not in ours:
        problem = f"{path} is missing"
      elif path not in theirs:
        problem = f"{path} is not a parameter of the network"
      else:
        problem = f"{path} has shape {ours[path]}, expected {theirs[path]}"
      raise ValueError(f"the parameters do not fit {name}: {problem}")


def param_shapes(module: nn.Module, *args: Any) -> PyTree:
  """Return the shapes and types of a Flax module's variables, ``{"params": ...}``, without creating the variables.

  Args:
    module: the network.
    *args: inputs of the network; only their shapes and types matter.

  Raises:
    ValueError: if the network cannot be called with them.

  >>> param_shapes(nn.Dense(3), jnp.zeros((1, 2)))["params"]["kernel"].shape
  (2, 3)
  """
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), args)
  leaves, treedef = jax.tree.flatten(shapes)
  return _param_shapes(ModuleMethod(module, "init"), tuple(leaves), treedef)


@functools.lru_cache(maxsize=64)  # Tracing a network is slow, and loading a model needs the shapes several times.
def _param_shapes(init: ModuleMethod, leaves: tuple[Any, ...], treedef: Any) -> PyTree:
  def trace() -> PyTree:
    try:
      with shapes_alone():
        return jax.eval_shape(init, jax.random.key(0), *jax.tree.unflatten(treedef, leaves))
    except FlaxError as error:
      raise ValueError(f"{type(init.module).__name__} cannot be called with inputs of these shapes: {error}") from error

  # What our own networks have depends on plain fields alone. The trace of another network may depend on anything, and
  # on a mesh the shapes have shardings.
  if not _is_plain(init.module) or not jax.sharding.get_abstract_mesh().empty:
    return trace()
  question = f"parameters of {init.module} for {leaves} in {treedef}"
  return _from_lists(kept(question, lambda: _to_lists(trace())))


def _is_plain(value: Any) -> bool:
  """Whether this is a network of ours with plain fields, or a plain value of a field."""
  if isinstance(value, nn.Module):
    fields = [getattr(value, field.name) for field in dataclasses.fields(value) if field.name != "parent"]
    return type(value).__module__.startswith("jaxguide.nn.") and all(map(_is_plain, fields))
  if isinstance(value, tuple):
    return all(map(_is_plain, value))
  return value is None or type(value) in (bool, int, float, str, type(jnp.float32))


def _to_lists(shapes: PyTree) -> Any:
  """Write shapes and types in dictionaries in a way that JSON can hold."""
  if isinstance(shapes, jax.ShapeDtypeStruct):
    return [shapes.dtype.name, *shapes.shape]
  return {name: _to_lists(each) for name, each in shapes.items()}


def _from_lists(lists: Any) -> PyTree:
  if isinstance(lists, list):
    return jax.ShapeDtypeStruct(tuple(lists[1:]), jnp.dtype(lists[0]))
  return {name: _from_lists(each) for name, each in lists.items()}
