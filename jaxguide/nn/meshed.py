"""Networks that also run under a mesh with Explicit axes."""

import contextlib
import itertools
from typing import Any

import flax.linen as nn
import jax


def _with_auto_axes(function, out, *args, **kwargs):
  """Call a function with the mesh's Explicit axes as Auto axes: inside it XLA chooses the sharding of every result.

  Args:
    function: the function to call.
    out: the PartitionSpec of the function's outputs.
    *args: its positional arguments. If no mesh is set, the mesh is taken from the arrays among the arguments.
    **kwargs: its keyword arguments.
  """
  leaves, treedef = jax.tree.flatten((args, kwargs))
  arrays = [isinstance(leaf, jax.Array) for leaf in leaves]
  context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
  mesh = jax.sharding.get_abstract_mesh()
  for leaf in itertools.compress(leaves, arrays):
    if not mesh.empty:
      break
    mesh = jax.typeof(leaf).sharding.mesh
    if not mesh.empty:
      traced = isinstance(leaf, jax.core.Tracer)
      context = jax.sharding.use_abstract_mesh(mesh) if traced else jax.set_mesh(leaf.sharding.mesh)
  explicit = jax.sharding.AxisType.Explicit
  axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == explicit)
  if not axes:
    return function(*args, **kwargs)

  def call(*dynamic):
    remaining = iter(dynamic)
    all_leaves = [next(remaining) if is_array else leaf for leaf, is_array in zip(leaves, arrays, strict=True)]
    args, kwargs = jax.tree.unflatten(treedef, all_leaves)
    return function(*args, **kwargs)

  with context:
    return jax.sharding.auto_axes(call, axes=axes, out_sharding=out)(*itertools.compress(leaves, arrays))


class Meshed(nn.Module):
  """A network whose ``apply`` and ``init`` also work under a mesh with Explicit axes (`jax.make_mesh`)."""

  @nn.nowrap
  def apply(self, variables, x, *args, **kwargs):  # type: ignore[override]
    """Apply the network like `flax.linen.Module.apply`, also under a mesh with Explicit axes (`jax.make_mesh`)."""
    out = jax.sharding.PartitionSpec(*jax.typeof(x).sharding.spec[:1])
    return _with_auto_axes(super().apply, out, variables, x, *args, **kwargs)

  @nn.nowrap
  def init(self, *args, **kwargs):
    """Draw variables like `flax.linen.Module.init`; under a mesh with Explicit axes they are replicated."""
    return _with_auto_axes(super().init, jax.sharding.PartitionSpec(), *args, **kwargs)
