"""Signals that stop a training after the current step, with everything saved."""

import collections
import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxguide.distributed import processes
from jaxguide.distributed.placing import Placement

LOG = logging.getLogger("jaxguide.training")

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C; the end of a process, as `kill` and preemption send it; and SLURM's notice (``--signal=USR1@60``)."""


class Interrupted(KeyboardInterrupt):
  """A training was stopped by a signal, after its state was saved.

  Args:
    number: the number of the signal.
    step: number of completed steps; the checkpoint in ``folder`` has the same number.
    folder: the folder of the training.
  """

  def __init__(self, number: int, step: int, folder: Path):
    self.number, self.step, self.folder = number, step, folder
    super().__init__(
      f"{signal.Signals(number).name}: the training in {folder} was stopped after step {step} and saved; "
      "call fit again with the same arguments to go on"
    )

  @property
  def status(self) -> int:
    """The conventional exit status: 130 after SIGINT, 143 after SIGTERM."""
    return 128 + self.number


LAG = 8
"""The number of steps that pass before a signal to one of several processes stops all of them."""


class Agreement:
  """Lets all processes stop after the same step, although a signal reaches them at different times, or only one.

  At each step the devices compute the largest number that any process knows, beside the training. It is read `LAG`
  steps later, so that nobody waits for it.

  Args:
    place: the devices of the training.
  """

  def __init__(self, place: Placement):
    self._place = place
    self._pending: collections.deque[jax.Array] = collections.deque()
    every = NamedSharding(place.mesh, PartitionSpec(place.mesh.axis_names))
    self._sharding, self._largest = every, jax.jit(jnp.max, out_shardings=place.copied)

  def __call__(self, number: int | None) -> int | None:
    """Tell the number of a signal that has arrived here. Return the one that all processes stop for, or None."""
    if not self._place.spans_processes:
      return number
    flags = jax.make_array_from_callback(
      (len(self._place.devices),), self._sharding, lambda index: np.full(1, number or 0, np.int32)
    )
    with processes.explained():
      self._pending.append(self._largest(flags))
      return int(self._pending.popleft()) or None if len(self._pending) > LAG else None


class Request:
  """Whether a signal asked the training to stop.

  Args:
    number: the first signal that arrived; None if there was none.
    at_once: whether a second SIGINT arrived.
  """

  def __init__(self) -> None:
    self.number: int | None = None
    self.at_once = False

  def __call__(self, number: int, frame: FrameType | None) -> None:
    """Handle a signal: the first one is noted, a second SIGINT raises KeyboardInterrupt."""
    del frame
    if self.number is not None and number == signal.SIGINT:
      self.at_once = True
      raise KeyboardInterrupt
    if self.number is None:
      LOG.warning("stopping after this step; a second Ctrl-C stops at once, without saving")
    self.number = self.number or number


@contextlib.contextmanager
def stop_requests() -> Iterator[Request]:
  """Note stopping signals while the block runs, instead of ending the process.

  Handlers are installed in the main thread only, because Python allows no others, and are restored afterwards.

  >>> with stop_requests() as request:
  ...   signal.raise_signal(signal.SIGTERM)
  ...   request.number == signal.SIGTERM
  True
  """
  request = Request()
  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  before: dict[int, Any] = {}
  try:
    for number in STOPPING:
      before[number] = signal.signal(number, request)
    yield request
  finally:
    for number, handler in before.items():
      # A handler that was not installed by Python is given as None, and cannot be restored.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
