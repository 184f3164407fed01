"""The devices of this process, and their memory."""

import jax
from jax.sharding import SingleDeviceSharding


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
