"""Devices: which ones there are, and where arrays are placed on them.

Every program that places arrays does it through a `Placement`. It holds a mesh of devices with one axis, ``batch``. The
rows of a batch are split along that axis, and parameters are copied to every device.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxguide._core.typing import PyTree


class Placement(NamedTuple):
  """How arrays are placed on a mesh of devices.

  Args:
    devices: the devices of the mesh.
    split: the sharding of arrays whose rows are split over the devices.
    copied: the sharding of arrays that every device holds whole.
  """

  devices: Sequence[jax.Device]
  split: NamedSharding
  copied: NamedSharding

  def rows(self, tree: PyTree) -> PyTree:
    """Split the first axis of every array over the devices."""
    return jax.device_put(tree, self.split)

  def copies(self, tree: PyTree) -> PyTree:
    """Copy every array to all devices."""
    return jax.device_put(tree, self.copied)


def placement(devices: Any = None) -> Placement:
  """Make the placement of arrays on some devices.

  Args:
    devices: a list of devices; all devices of this process if left out.

  Raises:
    TypeError: if ``devices`` is no list of devices.
    ValueError: if it is empty, or names a device twice.

  >>> placement([jax.devices()[0]]).rows(np.zeros((4, 2))).shape
  (4, 2)
  """
  if devices is not None and not (isinstance(devices, Sequence) and all(isinstance(d, jax.Device) for d in devices)):
    raise TypeError(f"devices must be a list of devices, such as jax.devices(), got {devices!r}")
  devices = jax.local_devices() if devices is None else list(devices)
  if not devices:
    raise ValueError("devices must name at least one device, or be left out to use all")
  if len(set(devices)) < len(devices):
    raise ValueError(f"devices must name each device once, got {devices}")
  mesh = Mesh(np.asarray(devices), ("batch",))
  return Placement(devices, NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec()))


def for_batches(batch_size: int) -> Placement:
  """Make the placement of batches of a fixed size: on all devices of this process if they divide it, else on one.

  >>> len(for_batches(1).devices)
  1
  """
  devices = jax.local_devices()
  return placement(devices if batch_size % len(devices) == 0 else devices[:1])


def first() -> SingleDeviceSharding:
  """Give the sharding of arrays that lie on the first device of this process."""
  return SingleDeviceSharding(jax.local_devices()[0])


def host() -> jax.Device | None:
  """Give the host's CPU; None where JAX was told not to use it.

  >>> host().platform
  'cpu'
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None
