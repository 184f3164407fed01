"""The processes of a program meet before JAX joins them, so that a missing or wrong one gets a clear error.

JAX itself ends a process with a stack trace of C++ if another one does not come.
"""

import contextlib
import json
import os
import socket
import time
from typing import Any

ANSWER = 5.0
"""Seconds in which what connects has to say who it is. Something else than one of the processes may say nothing."""

HERE = {"process": 0}
"""What the first process answers at once, so that the others know that it is the first process that listens."""


def meet(host: str, port: int, processes: int, index: int, timeout: float | int) -> None:
  """Wait until all processes are there. The first one listens, and the others connect to it.

  Args:
    host: address of the first process.
    port: a port that is free there. It is free again when this returns.
    processes: number of processes.
    index: number of this process, from 0.
    timeout: seconds to wait.

  Raises:
    OSError: if the first process cannot be reached, its port is in use, or a process does not come.
    ValueError: in every process, if two have the same number, or they were told different numbers of processes.
  """
  end = time.monotonic() + timeout
  if index == 0:
    _receive(port, processes, end, timeout)
  else:
    _present(host, port, processes, index, end, timeout)


def _receive(port: int, processes: int, end: float, timeout: float | int) -> None:
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    listener = socket.create_server(
      ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=processes
    )
  except OSError as error:
    raise OSError(
      f"the coordinator's port {port} cannot be used ({os.strerror(error.errno or 0)}): choose another port"
    ) from None
  present: dict[int, socket.socket] = {}
  problem: str | None = None
  with listener:
    try:
      while len(present) < processes - 1 and problem is None:
        listener.settimeout(max(end - time.monotonic(), 0.01))
        try:
          connection, _ = listener.accept()
        except TimeoutError:
          missing = [str(number) for number in range(1, processes) if number not in present]
          raise OSError(
            f"of {processes} processes, number {', '.join(missing[:8])} did not come within {timeout:g} s: was the "
            "command started on every host, with the same coordinator?"
          ) from None
        said = _line(connection, min(end, time.monotonic() + ANSWER))
        number = said.get("index") if isinstance(said, dict) else None
        if type(number) is not int:
          connection.close()  # Something else than one of the processes.
          continue
        for other in [other for other, waiting in present.items() if _has_ended(waiting)]:
          present.pop(other).close()  # It may be started again.
        if said.get("processes") != processes:
          problem = f"process 0 was told of {processes} processes, and process {number} of {said.get('processes')}"
        elif number in present or not 0 < number < processes:
          problem = f"two processes have the number {number}: give each its own --process-index"
        _say(connection, HERE)
        if problem is not None:
          _say(connection, {"problem": problem})
          connection.close()
        else:
          present[number] = connection
      for connection in present.values():
        _say(connection, {"problem": problem})
    finally:
      for connection in present.values():
        connection.close()
  if problem is not None:
    raise ValueError(problem)


def _present(host: str, port: int, processes: int, index: int, end: float, timeout: float | int) -> None:
  reason = "no answer"
  while time.monotonic() < end:
    try:
      with socket.create_connection((host, port), timeout=max(min(5.0, end - time.monotonic()), 0.01)) as connection:
        connection.sendall(json.dumps({"index": index, "processes": processes}).encode() + b"\n")
        here = _line(connection, end) == HERE
        said = _line(connection, end) if here else None
    except OSError as error:
      reason = error.strerror or str(error)
      time.sleep(0.2)
      continue
    if isinstance(said, dict):
      if said.get("problem") is not None:
        raise ValueError(said["problem"])
      return
    if here:
      raise OSError(f"the coordinator {host}:{port} ended before all processes were there: see what process 0 says")
    reason = "what is there does not answer as process 0 does"  # Proxies accept, and close, before process 0 is there.
    time.sleep(0.2)
  raise OSError(
    f"the coordinator {host}:{port} cannot be reached after {timeout:g} s ({reason}): is process 0 running there, and "
    "is the port open?"
  )


def _say(connection: socket.socket, what: dict[str, Any]) -> None:
  # JAX says which process is missing, if this one has just ended.
  with contextlib.suppress(OSError):
    connection.sendall(json.dumps(what).encode() + b"\n")


def _has_ended(connection: socket.socket) -> bool:
  """Whether the process at the other end, which has nothing more to say, has closed the connection."""
  connection.settimeout(0)
  try:
    return not connection.recv(1)
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    connection.settimeout(ANSWER)


def _line(connection: socket.socket, end: float) -> Any:
  """Return the object of a line of JSON, or None if there is none in time."""
  received = b""
  try:
    while not received.endswith(b"\n") and len(received) < 10_000:
      connection.settimeout(max(end - time.monotonic(), 0.01))
      part = connection.recv(1)  # No more than this line: another one may follow.
      if not part:
        return None
      received += part
    return json.loads(received)
  except (OSError, ValueError):
    return None
