"""Many devices and many hosts: meshes, the placement of arrays on them, and processes that work together.

`MeshConfig` describes a mesh of devices. `start` joins the processes of a program. Sampling and training then run on
the devices of all processes, and their results are those of one device.
"""

from jaxguide.distributed.meshes import MeshConfig
from jaxguide.distributed.placing import Placement, placement
from jaxguide.distributed.processes import (
  check_same,
  end,
  first_does,
  from_each,
  from_first,
  gathered,
  is_first,
  several,
  start,
  wait_for_all,
)

__all__ = [
  "MeshConfig",
  "Placement",
  "check_same",
  "end",
  "first_does",
  "from_each",
  "from_first",
  "gathered",
  "is_first",
  "placement",
  "several",
  "start",
  "wait_for_all",
]
