"""Denoisers whose parameters are split over devices: how they are split, and where they are gathered."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxguide._core import struct
from jaxguide._core.typing import Denoiser, Leaf, PyTree
from jaxguide.distributed.meshes import TENSOR
from jaxguide.distributed.placing import Placement, without


class Split(NamedTuple):
  """How the leaves of a denoiser are placed on a mesh. It is hashable, for a static argument of a program.

  Args:
    place: the placement.
    specs: a specification for each leaf, in the order of the tree.
  """

  place: Placement
  specs: tuple[PartitionSpec, ...]

  @property
  def axes(self) -> set[str]:
    """The axes of the mesh that leaves are split over and gathered along."""
    return {name for spec in self.gathered for names in spec if names for name in _names(names)}

  @property
  def gathered(self) -> tuple[PartitionSpec, ...]:
    """The specifications without ``tensor``, over which leaves stay split where they are used."""
    return tuple(without(spec, TENSOR) for spec in self.specs)

  @property
  def shardings(self) -> list[NamedSharding]:
    """The shardings of the leaves."""
    return [NamedSharding(self.place.mesh, spec) for spec in self.specs]

  def placed(self, denoise: PyTree) -> PyTree:
    """Place a denoiser."""
    return self.place.placed(denoise, self.shardings)

  def gathering(self, denoise: PyTree) -> Denoiser:
    """Wrap a denoiser, within ``shard_map``, so that its leaves are gathered at each evaluation and not before.

    So the whole parameters are in memory only while the network needs them.
    """
    if not self.axes:
      return denoise
    leaves = [
      _Part(leaf, spec) if _is_split(spec) else leaf
      for leaf, spec in zip(jax.tree.leaves(denoise), self.gathered, strict=True)
    ]
    return _Gathering(jax.tree.unflatten(jax.tree.structure(denoise), leaves))


@struct.dataclass
class _Part:
  """The part of an array that a device has."""

  value: Leaf
  spec: PartitionSpec = struct.field(pytree_node=False)

  def whole(self) -> Any:
    value = self.value
    for axis, names in enumerate(self.spec):
      if names:
        value = jax.lax.all_gather(value, _names(names), axis=axis, tiled=True)
    return value


@struct.dataclass
class _Gathering:
  """A denoiser with parts of arrays, which it gathers when it is called."""

  denoise: Leaf

  def __call__(self, x: Any, sigma: Any, cond: Any = None) -> Any:
    # As the parts seem to depend on the noise level, XLA does not gather them before the loop, and for the whole of it.
    denoise, sigma = jax.lax.optimization_barrier((self.denoise, sigma))
    whole = jax.tree.map(lambda node: node.whole() if isinstance(node, _Part) else node, denoise, is_leaf=_is_part)
    return whole(x, sigma, cond)


def _is_part(node: Any) -> bool:
  return isinstance(node, _Part)


def _is_split(spec: PartitionSpec) -> bool:
  return any(names for names in spec)


def _names(names: Any) -> tuple[str, ...]:
  return names if isinstance(names, tuple) else (names,)


def split_of(denoise: PyTree, place: Placement) -> Split:
  """Return how a denoiser is split: as its arrays are on this mesh already, and else by the rule of the placement."""

  def spec(path: Any, leaf: Any) -> PartitionSpec:
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh == place.mesh and _is_split(sharding.spec):
      return sharding.spec
    # Arrays of one axis are whole: they are small, and tables of noise levels are checked wherever they are.
    return place.spec(np.shape(leaf), path) if np.ndim(leaf) > 1 else PartitionSpec()

  return Split(place, tuple(spec(*each) for each in jax.tree_util.tree_leaves_with_path(denoise)))
