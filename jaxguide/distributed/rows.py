"""Rows that move between devices: particles that are resampled."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxguide._core.typing import PyTree
from jaxguide.distributed.placing import Placement, placement


def for_particles(number: int, devices: Any) -> Placement:
  """Make the placement of particles.

  Raises:
    ValueError: if their number is no multiple of the number of devices.
  """
  place = placement(devices)
  # Of a mesh with Explicit axes every operation on particles would have to name them.
  place = Placement(Mesh(place.mesh.devices, place.mesh.axis_names))
  if number % place.parts:
    raise ValueError(
      f"{number} particles cannot be divided over {place.parts} devices: give a multiple of {place.parts}, such as "
      f"{-(-number // place.parts) * place.parts}"
    )
  return place


def take_rows(tree: PyTree, rows: jax.Array, place: Placement | None) -> PyTree:
  """Return the given rows of every array, within a program.

  With a placement the rows of the arrays are split over devices. Each device passes its part to its neighbour, as often
  as there are other devices, and keeps the rows that it needs of each part that it holds. So it never has more than two
  parts, and the number of messages does not depend on which rows are needed.

  Args:
    tree: arrays of n rows.
    rows: (n,) which rows are returned, the same on all devices.
    place: where the arrays are; None for arrays that are not split.

  >>> take_rows(jnp.arange(4.0), jnp.array([0, 0, 3, 3]), None).tolist()
  [0.0, 0.0, 3.0, 3.0]
  """
  if place is None or place.parts == 1:
    return jax.tree.map(lambda leaf: leaf[rows], tree)
  axes, parts = place.batch_axes, place.parts
  to_neighbour = [(number, (number - 1) % parts) for number in range(parts)]

  def on_device(own: PyTree, rows: jax.Array) -> PyTree:
    size = len(rows)
    first = jax.lax.axis_index(axes)

    def keep(owner: jax.Array, part: PyTree, taken: PyTree) -> PyTree:
      within = rows - owner * size
      here = (within >= 0) & (within < size)

      def choose(part: jax.Array, taken: jax.Array) -> jax.Array:
        mask = here.reshape(-1, *(1,) * (part.ndim - 1))
        return jnp.where(mask, part[jnp.clip(within, 0, size - 1)], taken)

      return jax.tree.map(choose, part, taken)

    def turn(number: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
      part, taken = carry
      part = jax.lax.ppermute(part, axes, to_neighbour)
      return part, keep((first + number) % parts, part, taken)

    return jax.lax.fori_loop(1, parts, turn, (own, keep(first, own, own)))[1]

  split, mesh = PartitionSpec(axes), place.mesh
  rows = jax.lax.with_sharding_constraint(rows, place.split)
  return jax.shard_map(on_device, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False)(tree, rows)
