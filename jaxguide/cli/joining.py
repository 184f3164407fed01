"""Options of commands that several processes can run together."""

import dataclasses
import inspect
from typing import Any

from jaxguide.cli.options import options_of


@dataclasses.dataclass(frozen=True)
class Joining:
  """How the processes of a command find each other, and how their devices are arranged.

  Args:
    distributed: Join the processes that run this command on all hosts. JAX finds them on Cloud TPU and GKE, and under
      SLURM and Open MPI; elsewhere give the three options below.
    coordinator: HOST:PORT of process 0, the same for all processes.
    processes: Number of processes.
    process_index: Number of this process, from 0.
    mesh: How the devices are arranged: data=-1 for a copy of the parameters on each device (the default), fsdp=-1 to
      split the parameters over all of them, data=2,fsdp=4 for both.
  """

  distributed: bool = False
  coordinator: str | None = None
  processes: int | None = None
  process_index: int | None = None
  mesh: str | None = None


PROCESSES = ("distributed", "coordinator", "processes", "process_index")


def joining_options(mesh: bool = True) -> list[inspect.Parameter]:
  """Return the options, with or without that of the mesh."""
  return options_of(Joining, only=None if mesh else PROCESSES)


def join(options: dict[str, Any], mesh: bool = True) -> str | None:
  """Take the options of `Joining` out of those of a command, join the processes, and return the mesh.

  Without ``mesh`` the option of that name stays: it is a setting of the command.

  Raises:
    ValueError: if the options do not belong together.
    OSError: if the processes cannot be joined.
  """
  names = [field.name for field in dataclasses.fields(Joining)] if mesh else PROCESSES
  given = Joining(**{name: options.pop(name) for name in names})
  if given.distributed or given.coordinator is not None:
    from jaxguide import distributed

    distributed.start(given.coordinator, given.processes, given.process_index)
  elif (given.processes, given.process_index) != (None, None):
    raise ValueError("processes and process_index are for --distributed: give it, with --coordinator HOST:PORT")
  return given.mesh


def show(text: str) -> None:
  """Print a result, in the first process alone."""
  from jaxguide import distributed

  if distributed.is_first():
    print(text)
