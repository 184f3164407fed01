"""Several processes that run the same program, on one or many hosts.

`start` joins them by `jax.distributed`. From then on each process calls the same functions with the same arguments.
What one process alone may do, such as writing a file, is done by the first one (`is_first`); the others wait for it
(`first_does`).
"""

import collections
import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from jaxguide._core import checks
from jaxguide._core.typing import PyTree
from jaxguide.distributed.meeting import meet

T = TypeVar("T")

LOG = logging.getLogger("jaxguide.distributed")

PATIENCE = 30
"""Seconds after which a process that does not answer counts as dead. Then the others end."""

LAST_WORDS = 2
"""Seconds that the first process waits when it ends because of an error, so that the others can say theirs."""

START = 300
"""Seconds that `start` waits for the other processes by default."""


def start(
  coordinator: str | None = None,
  processes: int | None = None,
  index: int | None = None,
  *,
  timeout: int = START,
) -> None:
  """Join the processes of this program. Call it once, before anything else of JAX.

  Without arguments JAX finds the other processes itself, on Cloud TPU and GKE, and under SLURM and Open MPI. On CPU the
  processes communicate by Gloo. If one process dies, the others end within a minute. Under SLURM and Open MPI JAX gives
  each process one GPU, that of its number on its host, unless ``JAX_LOCAL_DEVICE_IDS`` says otherwise.

  Args:
    coordinator: ``HOST:PORT`` of the first process.
    processes: number of processes.
    index: number of this process, from 0.
    timeout: seconds to wait for the other processes.

  Raises:
    ValueError: if only some of the three arguments are given, or one is out of range; if two processes have the same
      index, or were told different numbers of processes; if they have different numbers of devices; or if nothing is
      given and JAX finds no other processes.
    OSError: if the coordinator cannot be reached, its port is in use, or a process does not come in time.
    RuntimeError: if JAX has computed something already, or the processes are joined already.
  """
  given = {"coordinator": coordinator, "processes": processes, "index": index}
  missing = [name for name, value in given.items() if value is None]
  if 0 < len(missing) < len(given):
    raise ValueError(f"coordinator, processes and index belong together, and {' and '.join(missing)} are missing")
  timeout = checks.at_least("timeout", timeout, 1)
  if coordinator is not None and processes is not None and index is not None:
    processes = checks.at_least("processes", processes, 1)
    index = checks.whole("index", index, 0, processes - 1)
    host, port = _address(coordinator)
    meet(host, port, processes, index, timeout)
  try:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      coordinator,
      processes,
      index,
      initialization_timeout=timeout,
      heartbeat_timeout_seconds=PATIENCE,
      shutdown_timeout_seconds=PATIENCE,
      # Left to itself JAX looks for a cluster even if everything is given.
      cluster_detection_method=None if coordinator is None else "deactivate",
    )
  except ValueError as error:
    raise ValueError(
      "JAX finds no other processes here (it knows Cloud TPU, GKE, SLURM and Open MPI): give "
      "--coordinator HOST:PORT --processes N --process-index I"
    ) from error
  except RuntimeError as error:
    if "must be called before" in str(error) or "only be called once" in str(error):
      raise RuntimeError("call start once, and before anything else of JAX: JAX has started already") from error
    reason = str(error).strip().splitlines()[0][:200]
    raise OSError(f"the processes could not be joined within {timeout} s: {reason}") from error
  _end_all_on_error()
  _check_devices()
  _connect()
  LOG.info(
    "process %d of %d, with %d of %d devices", jax.process_index(), jax.process_count(), jax.local_device_count(),
    jax.device_count(),
  )  # fmt: skip


def _check_devices() -> None:
  """Check that all processes have the same number of devices.

  Raises:
    ValueError: in every process, if not.
  """
  counts = collections.Counter(device.process_index for device in jax.devices())
  numbers = [counts[index] for index in range(jax.process_count())]
  other = next((index for index, number in enumerate(numbers) if number != numbers[0]), None)
  if other is not None:
    raise ValueError(
      f"all processes must have the same number of devices, but process 0 has {numbers[0]} and process {other} has "
      f"{numbers[other]}: give each process as many"
    )


def _connect() -> None:
  """Let the processes connect to each other now, when all of them are there.

  Gloo connects a group of devices when they communicate for the first time, and then waits 30 seconds only. Later one
  process may come much later than the others, such as when it alone writes a file. Once connected they wait for it.
  """
  from_each(None)  # From device i of each process to device i of the others.
  wait_for_all("the processes are joined")  # From all devices to all.


def _address(coordinator: str) -> tuple[str, int]:
  host, colon, port = str(coordinator).rpartition(":")
  if not (host and colon and port.isdigit() and 0 < int(port) < 2**16) or "/" in host or host.split() != [host]:
    raise ValueError(f"coordinator must be HOST:PORT, such as 10.0.0.1:1234, got {coordinator!r}")
  return host.strip("[]"), int(port)


def _end_all_on_error() -> None:
  """Let an error that ends this process end the others at once, in place of after a wait at the exit.

  JAX waits at the exit of a process until all processes are there, but after an error the others wait for this one.
  """
  before = sys.excepthook

  def ended(kind: Any, error: BaseException, trace: Any) -> None:
    before(kind, error, trace)
    end(1)

  sys.excepthook = ended


def end(status: int) -> None:
  """End this process at once, because of an error. If there are other processes, they end as well.

  Call it in place of ``sys.exit`` where the other processes may be waiting for this one.
  """
  if several():
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
      time.sleep(LAST_WORDS)  # Without process 0 JAX ends the others, which may be about to say the same error.
    os._exit(status)
  sys.exit(status)


def is_first() -> bool:
  """Whether this process is the first one, which writes files for all.

  >>> is_first()
  True
  """
  return not several() or jax.process_index() == 0


def several() -> bool:
  """Whether there is more than one process.

  >>> several()
  False
  """
  # Asking for the number of processes would start JAX's backend.
  return jax.distributed.is_initialized() and jax.process_count() > 1


def wait_for_all(what: str) -> None:
  """Wait until every process has come here.

  Args:
    what: a name of the place, for the error if the processes are at different ones.
  """
  if several():
    from jax.experimental import multihost_utils

    with explained():
      multihost_utils.sync_global_devices(what)


def gathered(tree: PyTree, only_first: bool = False) -> PyTree:
  """Return arrays that span processes as NumPy arrays, whole in each process. Other arrays become NumPy arrays too.

  Args:
    tree: the arrays.
    only_first: whether the others than the first process drop each array when it has been sent; they return None.
  """
  if not several():
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  drops = only_first and not is_first()

  def fetch(leaf):
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
      leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return None if drops else np.asarray(leaf)

  with explained():
    whole = jax.tree.map(fetch, tree)
  return None if drops else whole


def from_each(value: Any) -> list[Any]:
  """Return the values of all processes, in their order. A value is what JSON can write.

  >>> from_each({"steps": 3})
  [{'steps': 3}]
  """
  if not several():
    return [json.loads(json.dumps(value))]
  from jax.experimental import multihost_utils

  content = np.frombuffer(json.dumps(value).encode(), np.uint8)
  with explained():
    lengths = multihost_utils.process_allgather(np.asarray(len(content), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:length])) for row, length in zip(np.asarray(rows), lengths.tolist(), strict=True)]


def from_first(value: Any) -> Any:
  """Return the value of the first process, in all processes. A value is what JSON can write.

  >>> from_first(3)
  3
  """
  return from_each(value if is_first() else None)[0]


def first_does(task: Callable[[], T]) -> T:
  """Let the first process do a task, and the others wait for it. If it fails, it fails in all processes.

  Args:
    task: what returns what JSON can write, or None.

  Returns:
    What the task returned, in all processes.

  Raises:
    Exception: the error of the task, in the first process.
    RuntimeError: in the others, with the message of the error.
  """
  if not several():
    return task()
  result, failure = None, None
  if is_first():
    try:
      result = task()
    except BaseException as error:
      failure = error
  said = from_first([result, None if failure is None else f"{type(failure).__name__}: {failure}"])
  if failure is not None:
    raise failure
  if said[1] is not None:
    raise RuntimeError(f"process 0 failed: {said[1]}")
  return said[0]


def check_same(facts: Mapping[str, Any]) -> None:
  """Check that all processes were started with the same facts, such as settings, data and version.

  Args:
    facts: by name what must be the same; what JSON can write. Values are compared by hash first.

  Raises:
    ValueError: in every process, if a fact differs, naming it, both values and a process that has the other value.
  """
  if not several():
    return
  texts = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
  digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
  if len({*from_each(digest)}) == 1:
    return
  every = from_each(texts)
  for number, other in enumerate(every):
    for name in sorted({*every[0], *other}):
      if every[0].get(name) != other.get(name):
        raise ValueError(
          f"the processes do not run the same: {name} is {_short(every[0].get(name))} in process 0 and "
          f"{_short(other.get(name))} in process {number}. Start all of them with the same arguments, files and version"
        )


def _short(text: str | None) -> str:
  return "missing" if text is None else text if len(text) <= 200 else f"{text[:200]}..."


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """While the block runs, an error of communication says that another process has probably ended.

  Raises:
    ConnectionError: in place of such an error.
  """
  try:
    yield
  except (RuntimeError, ValueError) as error:  # JAX raises both kinds.
    if not _is_of_communication(error):
      raise
    first = str(error).strip().splitlines()[0][:200]
    raise ConnectionError(
      f"process {jax.process_index()}: the communication with the other processes failed, probably because one of "
      f"them has ended; see its messages. Start all of them again to go on. ({first})"
    ) from error


def _is_of_communication(error: BaseException) -> bool:
  if not several():
    return False
  text = str(error)
  return any(word in text for word in ("Gloo", "gloo", "NCCL", "Connection", "connection", "UNAVAILABLE", "heartbeat"))
