"""Devices, and the placement of arrays on them.

All code that places arrays uses a `Placement`. It holds a mesh of devices with one axis, ``batch``. The rows of a batch
are split along that axis, and parameters are copied to every device.
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
    copied: the sharding of arrays that are replicated on every device.
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
    devices: a list of devices. The default is all devices of this process.

  Raises:
    TypeError: if ``devices`` is not a list of devices.
    ValueError: if the list is empty or has a device twice.

  >>> placement([jax.devices()[0]]).rows(np.zeros((4, 2))).shape
  (4, 2)
  """
  if devices is not None and not (isinstance(devices, Sequence) and all(isinstance(d, jax.Device) for d in devices)):
    raise TypeError(f"devices must be a list of devices, such as jax.devices(), got {devices!r}")
  devices = jax.local_devices() if devices is None else list(devices)
  if not devices:
    raise ValueError("devices must have at least one device: leave it out to use all devices")
  if len(set(devices)) < len(devices):
    raise ValueError(f"devices must have each device only once, got {devices}")
  mesh = Mesh(np.asarray(devices), ("batch",))
  return Placement(devices, NamedSharding(mesh, PartitionSpec("batch")), NamedSharding(mesh, PartitionSpec()))


def for_batches(batch_size: int) -> Placement:
  """Make the placement of batches of a fixed size.

  It uses all devices of this process if their number divides the batch size, and the first device otherwise.

  >>> len(for_batches(1).devices)
  1
  """
  devices = jax.local_devices()
  return placement(devices if batch_size % len(devices) == 0 else devices[:1])


def first() -> SingleDeviceSharding:
  """Return the sharding of arrays on the first device of this process."""
  return SingleDeviceSharding(jax.local_devices()[0])


def host() -> jax.Device | None:
  """Return the host's CPU as a JAX device, or None if JAX runs without its CPU backend.

  >>> host().platform
  'cpu'
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None


def free_bytes() -> int | None:
  """Return the memory in bytes that a device of this process has left; None where the system does not say."""
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    return free_host_bytes()
  facts = device.memory_stats() or {}
  return facts["bytes_limit"] - facts.get("bytes_in_use", 0) if "bytes_limit" in facts else None


def free_host_bytes() -> int | None:
  """Return the memory in bytes that the host has left; None where the system does not say."""
  try:
    with open("/proc/meminfo") as file:
      facts = dict(line.split(":", 1) for line in file)
    return int(facts["MemAvailable"].split()[0]) * 1024
  except (OSError, KeyError, ValueError):
    return None
