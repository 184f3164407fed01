"""Programs of several processes on this machine, for tests: each runs one function, and its result is returned."""

import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_port() -> int:
  """Return a port that no process uses."""
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def environment(devices: int = 1, exact: bool = False) -> dict[str, str]:
  """Return the environment of a process with this number of CPU devices, which imports this source tree.

  ``exact`` is for comparisons in double precision: programs are optimised as for a user. Else they compile in half
  of the time, as in the tests; fifty steps of a training then differ by up to 1e-7 from mesh to mesh.
  """
  path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
  flags = [] if exact else [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
  flags.append(f"--xla_force_host_platform_device_count={devices}")
  return {**os.environ, "XLA_FLAGS": " ".join(flags), "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def start(
  function: str, processes: int, devices: int = 1, exact: bool = False, **arguments: Any
) -> list[subprocess.Popen]:
  """Start processes that each run ``module:function`` of the tests with the same arguments.

  Args:
    function: the function. Its arguments and its result are what JSON can write.
    processes: number of processes. They are joined if there are several.
    devices: number of devices of each.
    exact: see `environment`.
    **arguments: the arguments.
  """
  port = free_port()
  folder, started = tempfile.mkdtemp(), []
  for index in range(processes):
    out = Path(folder, f"{index}.json")
    call = json.dumps([function, arguments, f"127.0.0.1:{port}", processes, index, str(out)])
    process = subprocess.Popen(
      [sys.executable, __file__, call],
      env=environment(devices, exact),
      stderr=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    process.result = out
    started.append(process)
  return started


def results(started: list[subprocess.Popen], timeout: float = 300) -> list[Any]:
  """Wait for processes, and return what their functions returned.

  Raises:
    AssertionError: if one fails, with what it said.
  """
  said = [process.communicate(timeout=timeout) for process in started]
  for process, (_, errors) in zip(started, said, strict=True):
    assert process.returncode == 0, errors
  return [json.loads(process.result.read_text()) for process in started]


def run(function: str, processes: int, devices: int = 1, exact: bool = False, **arguments: Any) -> list[Any]:
  """Run processes to their end; see `start`."""
  return results(start(function, processes, devices, exact, **arguments))


def main(call: str) -> None:
  """Be one of the processes."""
  function, arguments, coordinator, processes, index, out = json.loads(call)
  if processes > 1:
    from jaxguide import distributed

    distributed.start(coordinator, processes, index, timeout=60)
  module, _, name = function.partition(":")
  result = getattr(importlib.import_module(module), name)(**arguments)
  Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
  main(sys.argv[1])
