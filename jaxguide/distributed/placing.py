"""The placement of arrays on a mesh: the rows of batches, and parameters that are copied or split.

One rule says how an array of parameters is split over ``fsdp``: along its largest axis that the number of devices
divides, and not at all if it has fewer than `SMALL` numbers. Each array with the shape of the parameters follows it:
gradients, the optimiser's state and running means.

Another rule, by names, splits the layers of transformers over ``tensor``: the first of two layers by its outputs, the
second by its inputs (Shoeybi et al. 2019, arXiv:1909.08053). These stay split where they are used, so each device
computes a part of the heads and of the width, and XLA sums the results.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxguide._core.typing import PyTree
from jaxguide.distributed.meshes import BATCH_AXES, FSDP, TENSOR, as_mesh

SMALL = 2**12
"""Arrays with fewer numbers are not split: a message costs more than the memory is worth."""


def split_axis(shape: Sequence[int], parts: int) -> int | None:
  """Return the axis along which an array is split into equal parts; None if it is not split.

  It is the largest axis that ``parts`` divides, and the last one among equal axes.

  >>> split_axis((3, 3, 192, 384), 8), split_axis((3, 3, 3, 192), 8), split_axis((768,), 8)
  (3, 3, None)
  """
  if parts == 1 or math.prod(shape) < SMALL:
    return None
  axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
  return max(axes, key=lambda axis: (shape[axis], axis)) if axes else None


BY_OUTPUTS = ("attn/qkv", "mlp/fc1", "mlp/w12", "adaLN_modulation_1")
BY_INPUTS = ("attn/proj", "mlp/fc2", "mlp/w3")
"""The layers of a transformer's block that are split over ``tensor``, along their outputs or their inputs."""


def tensor_axis(path: Sequence[Any], shape: Sequence[int], parts: int) -> int | None:
  """Return the axis along which a parameter is split over ``tensor``; None if it is not split.

  Args:
    path: where the parameter is in a tree, as JAX's paths, or names.
    shape: its shape.
    parts: the number of devices of the axis.

  >>> tensor_axis(["attn", "qkv", "kernel"], (32, 96), 2), tensor_axis(["attn", "proj", "kernel"], (32, 32), 2)
  (1, 0)
  >>> tensor_axis(["attn", "proj", "bias"], (32,), 2)
  """
  if parts == 1 or not shape:
    return None
  *layer, kind = [str(getattr(part, "key", getattr(part, "name", part))) for part in path] or [""]
  name = "/".join(layer)
  if name.endswith(BY_OUTPUTS):
    axis = len(shape) - 1
  elif name.endswith(BY_INPUTS) and kind == "kernel" and len(shape) == 2:
    axis = 0
  else:
    return None
  return axis if shape[axis] % parts == 0 else None


class Placement(NamedTuple):
  """How arrays are placed on a mesh.

  Args:
    mesh: the mesh. Rows of batches are split over its axes ``data`` and ``fsdp``; of a mesh with other names, over the
      first axis.
  """

  mesh: Mesh

  @property
  def batch_axes(self) -> tuple[str, ...]:
    """The axes that the rows of a batch are split over."""
    axes = tuple(name for name in self.mesh.axis_names if name in BATCH_AXES)
    return axes or tuple(self.mesh.axis_names[:1])

  @property
  def parts(self) -> int:
    """The number of parts of a batch."""
    return math.prod(self.mesh.shape[name] for name in self.batch_axes)

  @property
  def fsdp(self) -> int:
    """The number of parts of the parameters."""
    return dict(self.mesh.shape).get(FSDP, 1)

  @property
  def tensor(self) -> int:
    """The number of parts of the layers of transformers."""
    return dict(self.mesh.shape).get(TENSOR, 1)

  @property
  def devices(self) -> list[jax.Device]:
    """The devices of the mesh, of all processes."""
    return list(self.mesh.devices.flat)

  @property
  def spans_processes(self) -> bool:
    """Whether other processes have devices of the mesh too."""
    return any(device.process_index != jax.process_index() for device in self.devices)

  @property
  def split(self) -> NamedSharding:
    """The sharding of arrays whose rows are split."""
    return NamedSharding(self.mesh, PartitionSpec(self.batch_axes))

  @property
  def copied(self) -> NamedSharding:
    """The sharding of arrays that each device has as a whole."""
    return NamedSharding(self.mesh, PartitionSpec())

  def spec(self, shape: Sequence[int], path: Sequence[Any] = ()) -> PartitionSpec:
    """Return how an array of parameters is split: by `tensor_axis`, and over ``fsdp`` by the rule of `split_axis`."""
    along = tensor_axis(path, shape, self.tensor)
    # The axis that is split over `tensor` is not split again: as if the number of devices did not divide it.
    axis = split_axis([size if each != along else 1 for each, size in enumerate(shape)], self.fsdp)
    names: list[str | None] = [None] * len(shape)
    for name, each in ((FSDP, axis), (TENSOR, along)):
      if each is not None:
        names[each] = name
    while names and names[-1] is None:
      names.pop()
    return PartitionSpec(*names)

  def shardings(self, tree: PyTree) -> PyTree:
    """Return the sharding of each array of a tree of parameters, or of shapes."""
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: NamedSharding(self.mesh, self.spec(np.shape(leaf), path)), tree
    )

  def local_rows(self, size: int) -> np.ndarray:
    """Return which rows of a batch of ``size`` rows are on devices of this process, in increasing order."""
    indices = self.split.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in indices]))

  def rows(self, tree: PyTree) -> PyTree:
    """Split the first axis of every array over the devices. Each process has the whole arrays."""
    return self.placed(tree, [self.split] * len(jax.tree.leaves(tree)))

  def own_rows(self, tree: PyTree, size: int) -> PyTree:
    """Make arrays of ``size`` rows, of which this process has `local_rows`, in their order."""
    if not self.spans_processes:
      return self.rows(tree)

    def place(leaf):
      return jax.make_array_from_process_local_data(self.split, np.asarray(leaf), (size, *np.shape(leaf)[1:]))

    return jax.tree.map(place, tree)

  def copies(self, tree: PyTree) -> PyTree:
    """Copy every array to all devices. Each process has the whole arrays."""
    return self.placed(tree, [self.copied] * len(jax.tree.leaves(tree)))

  def shards(self, tree: PyTree) -> PyTree:
    """Split parameters over ``fsdp``, by the rule of `split_axis`. Each process has the whole arrays."""
    return self.placed(tree, jax.tree.leaves(self.shardings(tree)))

  def constrained(self, tree: PyTree, axis: int = 0) -> PyTree:
    """Within a program, keep the rows of every array split over the devices. ``axis`` is that of the rows."""
    if len(self.devices) == 1:
      return tree
    split = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, self.batch_axes))
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, split), tree)

  def joined(self, tree: PyTree) -> PyTree:
    """Within a program, give each device the whole of every array."""
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.copied), tree)

  def whole(self, params: PyTree) -> PyTree:
    """Within a program, gather parameters that are split, each where it is used. Their gradients are split again.

    With the policy `not_gathered`, `jax.checkpoint` drops the gathered arrays and gathers them again.
    """
    if self.fsdp == 1:
      return params
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: _gathered(self, self.spec(leaf.shape, path), leaf), params
    )

  def placed(self, tree: PyTree, shardings: Sequence[NamedSharding]) -> PyTree:
    """Place each array of a tree by its sharding. Each process has the whole arrays, or they are placed already.

    The shardings are a list in the order of the leaves, since not every tree may hold other things than arrays.
    """
    leaves, structure = jax.tree.flatten(tree)
    if not self.spans_processes:
      return jax.tree.unflatten(structure, jax.device_put(leaves, list(shardings)))

    def place(leaf, sharding):
      if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
      if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(place(data, sharding), impl=jax.random.key_impl(leaf))
      array = np.asarray(leaf)
      return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.unflatten(structure, [place(*each) for each in zip(leaves, shardings, strict=True)])


CHEAP = {"broadcast_in_dim", "convert_element_type", "copy", "name", "reshape", "rev", "sharding_constraint"}
CHEAP |= {"squeeze", "transpose"}
"""Operations that only place, cast or rearrange numbers: what they give is not kept for the backward pass."""


def not_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
  """A policy of `jax.checkpoint`: keep everything but the parameters that `Placement.whole` gathered.

  What is only a cast or a rearrangement of them is not kept either. In JAX 0.10
  ``jax.checkpoint_policies.save_anything_except_these_names`` keeps the named arrays too.
  """
  return primitive.name not in CHEAP


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(place: Placement, spec: PartitionSpec, leaf: jax.Array) -> jax.Array:
  return jax.lax.with_sharding_constraint(leaf, NamedSharding(place.mesh, without(spec, FSDP)))


def _gather_forward(place: Placement, spec: PartitionSpec, leaf: jax.Array) -> tuple[jax.Array, None]:
  # Not by `_gather` itself: `jax.checkpoint` would see a function with a rule of its own, and keep its result.
  return jax.lax.with_sharding_constraint(leaf, NamedSharding(place.mesh, without(spec, FSDP))), None


def _gather_backward(place: Placement, spec: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
  # Left to JAX, the gradient would be whole on every device first.
  return (jax.lax.with_sharding_constraint(gradient, NamedSharding(place.mesh, spec)),)


_gather.defvjp(_gather_forward, _gather_backward)


def _gathered(place: Placement, spec: PartitionSpec, leaf: jax.Array) -> jax.Array:
  return _gather(place, spec, leaf) if FSDP in spec else leaf


def without(spec: PartitionSpec, axis: str) -> PartitionSpec:
  """Return a specification without an axis of the mesh.

  >>> tuple(without(PartitionSpec("tensor", "fsdp"), "fsdp"))
  ('tensor', None)
  """
  return PartitionSpec(*(None if name == axis else name for name in spec))


def placement(devices: Any = None) -> Placement:
  """Make the placement of arrays on some devices.

  Args:
    devices: a list of devices, a mesh, or a `jaxguide.distributed.MeshConfig` or its text. The default is all devices
      of all processes.

  Raises:
    TypeError: if it is none of these.
    ValueError: if a list is empty or has a device twice, the devices cannot be arranged so, or none of them is of this
      process.

  >>> placement([jax.devices()[0]]).rows(np.zeros((4, 2))).shape
  (4, 2)
  """
  mesh = as_mesh(devices)
  place = Placement(as_mesh(jax.devices()) if mesh is None else mesh)  # type: ignore[arg-type]
  if all(device.process_index != jax.process_index() for device in place.devices):
    raise ValueError(
      f"none of the {len(place.devices)} devices is of process {jax.process_index()}: give devices of every "
      "process, or call this in the processes of the devices alone"
    )
  return place


def for_batches(batch_size: int, devices: Any = None) -> Placement:
  """Make the placement of batches of a fixed size.

  By default it uses all devices. If their number does not divide the batch size, it uses the first device, where there
  is one process.

  Args:
    batch_size: rows of a batch.
    devices: as for `placement`.

  Raises:
    ValueError: if the batch cannot be divided over the devices that are asked for, or over those of several processes.

  >>> len(for_batches(1).devices)
  1
  """
  place = placement(devices)
  if batch_size % place.parts == 0:
    return place
  if devices is None and jax.process_count() == 1:
    return placement(jax.local_devices()[:1])
  raise ValueError(
    f"a batch of {batch_size} cannot be divided over the {place.parts} parts of the mesh "
    f"({', '.join(f'{name}={size}' for name, size in place.mesh.shape.items())}): give a batch_size that is a multiple "
    f"of {place.parts}, such as {-(-batch_size // place.parts) * place.parts}, or another mesh"
  )
