"""Meshes of devices, described by three numbers.

A mesh has three axes. The rows of a batch are split over ``data`` and ``fsdp``. Parameters are split over ``fsdp``, and
copied along ``data``. Over ``tensor`` the layers of transformers are split, their heads and widths; other arrays are
copied along it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxguide._core import checks, specs

BATCH_AXES = ("data", "fsdp")
"""The axes that the rows of a batch are split over."""

FSDP = "fsdp"
"""The axis that parameters are split over."""

TENSOR = "tensor"
"""The axis that the heads and widths of transformers are split over."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The axes of a mesh of devices, as plain data. One of them may be -1: all devices that are left.

  Args:
    data: number of copies of the parameters; each has its own part of a batch.
    fsdp: number of devices over which parameters, optimiser state and running means are split. Each device has its own
      part of a batch too.
    tensor: number of devices for one part of a batch, over which the layers of transformers are split.

  Raises:
    ValueError: if an axis is neither -1 nor at least 1, or two of them are -1.

  >>> MeshConfig(fsdp=4).sizes(8), str(MeshConfig.parse("data=2,fsdp=4"))
  ((2, 4, 1), 'data=2,fsdp=4')
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    for name, value in self._axes():
      if value != -1:
        object.__setattr__(self, name, checks.whole(name, value, 1, 2**20))
    if [value for _, value in self._axes()].count(-1) > 1:
      raise ValueError(f"only one axis of a mesh can be -1, all devices that are left, got {self}")

  @classmethod
  def parse(cls, text: str) -> "MeshConfig":
    """Read ``fsdp=8`` or ``data=2,fsdp=4``. Axes that are not named are 1, and ``data`` is -1 unless another one is.

    Raises:
      ValueError: for an unknown axis, or a value that is no whole number.
    """
    if not isinstance(text, str) or "=" not in text:
      raise ValueError(f"a mesh is written data=2,fsdp=4, got {text!r}")
    options = specs.choose(specs.parse(f"mesh:{text}"), specs.options_of(cls))
    if -1 in options.values():
      options.setdefault("data", 1)
    return cls(**options)

  def __str__(self) -> str:
    return ",".join(f"{name}={value}" for name, value in self._axes() if value != 1) or "data=1"

  def _axes(self) -> list[tuple[str, int]]:
    return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]

  def sizes(self, devices: int) -> tuple[int, int, int]:
    """Return the three sizes for a number of devices.

    Raises:
      ValueError: if the devices cannot be arranged so.
    """
    sizes = [value for _, value in self._axes()]
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % given == 0:
      sizes[sizes.index(-1)] = devices // given
    if math.prod(sizes) != devices:
      raise ValueError(
        f"the mesh {self} needs {given if -1 not in sizes else f'a multiple of {given}'} devices, and there are "
        f"{devices}: give another mesh, such as data=-1 or fsdp=-1, where -1 is all devices that are left"
      )
    return tuple(sizes)  # type: ignore[return-value]

  def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices in a mesh. By default these are all devices of all processes.

    Devices that are close to each other on the network get neighbouring places on the last axes, so that ``tensor`` and
    ``fsdp`` communicate the fastest. Where the devices are in several slices or hosts without a common interconnect,
    only ``data`` goes across them, if it can.

    Raises:
      ValueError: if the devices cannot be arranged so.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = self.sizes(len(devices))
    # With Explicit axes, the default of jax.make_mesh, every operation of a network would have to name its axes.
    return Mesh(_arranged(sizes, devices), [name for name, _ in self._axes()], axis_types=(AxisType.Auto,) * len(sizes))


def _arranged(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
  from jax.experimental import mesh_utils

  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1 and sizes[0] % slices == 0:
    within = (sizes[0] // slices, *sizes[1:])
    return np.asarray(mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices))
  if devices[0].platform != "tpu":
    return np.asarray(devices).reshape(sizes)
  return np.asarray(mesh_utils.create_device_mesh(sizes, devices))


def as_mesh(given: Any) -> Mesh | None:
  """Return a mesh from what a user may give: a `MeshConfig`, its text, a `jax.sharding.Mesh`, or a list of devices.

  Returns:
    The mesh; None for None.

  Raises:
    TypeError: if it is none of these.
    ValueError: if a list is empty or has a device twice, or the devices cannot be arranged so.
  """
  if given is None or isinstance(given, Mesh):
    return given
  if isinstance(given, str):
    given = MeshConfig.parse(given)
  if isinstance(given, MeshConfig):
    return given.make()
  if not (isinstance(given, Sequence) and all(isinstance(device, jax.Device) for device in given)):
    raise TypeError(
      f"devices must be a list of devices, such as jax.devices(), a MeshConfig such as fsdp=8, or a mesh, got {given!r}"
    )
  if not given:
    raise ValueError("devices must have at least one device: leave it out to use all devices")
  if len(set(given)) < len(given):
    raise ValueError(f"devices must have each device only once, got {given}")
  return MeshConfig().make(given)
