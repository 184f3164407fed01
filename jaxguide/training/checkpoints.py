"""Checkpoints of a training run, written by Orbax while the training goes on. The newest are kept, with checksums."""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxguide._core.typing import PyTree
from jaxguide.distributed import processes
from jaxguide.models import arrays
from jaxguide.training import desk
from jaxguide.training.step import TrainState

LOG = logging.getLogger("jaxguide.training")


TIMEOUT = 600
"""Seconds until the other processes end the saving of a checkpoint that one process could not write."""


def steps(folder: Path) -> list[int]:
  """Return the steps that have a checkpoint, in increasing order."""
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


class Checkpoints:
  """Writes checkpoints in the background. Use it as a context manager.

  Args:
    folder: the folder of the checkpoints; it is created if necessary.
    keep: number of checkpoints to keep, the newest ones. With 2 or more, a damaged one is no loss.
    keep_every: checkpoints whose step is a multiple of this are kept too; None for no others.
  """

  def __init__(self, folder: Path, keep: int = 2, keep_every: int | None = None):
    import orbax.checkpoint as ocp

    processes.first_does(lambda: folder.mkdir(parents=True, exist_ok=True))
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      keep_period=keep_every,
      enable_async_checkpointing=True,
      async_options=ocp.AsyncOptions(timeout_secs=TIMEOUT),
    )
    self.folder, self._manager = folder, ocp.CheckpointManager(folder, options=options)
    self._pending: int | None = None
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "Checkpoints":
    self._stack.enter_context(arrays.without_tracebacks())
    return self

  def __exit__(self, kind: object, *error: object) -> None:
    # An error that ends the training is not hidden by one of a checkpoint.
    with self._stack, contextlib.suppress(*(() if kind is None else (Exception,))):
      if self._manager is not None:
        self._manager.close()

  def save(self, state: TrainState, step: int) -> None:
    """Start to write the checkpoint of a step. The state may be donated as soon as this returns.

    Raises:
      OSError: if this checkpoint or the one before it cannot be written, naming the reason. Earlier ones stay.
    """
    import orbax.checkpoint as ocp

    self.wait()
    self._pending = step
    self._raise_first(arrays.shortage(self.folder / str(step), state))  # In the process that has too little space.
    items = {"state": ocp.args.StandardSave(state), "checksums": ocp.args.JsonSave(checksums(state))}
    self._attempt(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

  def wait(self) -> None:
    """Wait until the last checkpoint is written.

    Raises:
      OSError: if it cannot be written.
    """
    if self._pending is not None:
      self._attempt(self._manager.wait_until_finished)
      self._pending = None

  def remove(self, step: int) -> None:
    """Remove the checkpoint of a step."""
    self.wait()
    self._manager.delete(step)

  def abandon(self) -> None:
    """Do not wait for what is being written. The next run removes the incomplete files."""
    if self._manager is not None:
      desk.ABANDONED.append(self._manager.close)
    self._manager = None

  def _attempt(self, call: Callable[[], Any]) -> None:
    _, failure = arrays.attempt(call, arrays.PATIENCE)
    self._raise_first(failure)

  def _raise_first(self, failure: str | None) -> None:
    failure = _first_failure(failure)
    if failure is not None:
      path, self._pending = self.folder / str(self._pending), None
      processes.first_does(lambda: arrays.remove_unfinished(self.folder, path.name))
      raise arrays.cannot_write(path, failure)


def _first_failure(failure: str | None) -> str | None:
  """Return the failure of the first process that has one, in all processes; None if none has."""
  return next((other for other in processes.from_each(failure) if other is not None), None)


def checksums(tree: PyTree) -> dict[str, dict[str, Any]]:
  """Return `jaxguide.models.arrays.checksums` of a tree, computed in several threads."""
  leaves = arrays.leaves(tree)
  if processes.several():  # They compute together, in one order.
    return {path: arrays.checksum(leaf) for path, leaf in leaves.items()}
  with ThreadPoolExecutor() as pool:
    return dict(zip(leaves, pool.map(arrays.checksum, leaves.values()), strict=True))


def restore(folder: Path, template: TrainState, state: Callable[[], TrainState]) -> TrainState:
  """Return the state of the last undamaged checkpoint, or ``state()`` if there are no checkpoints.

  A checkpoint of any number of devices and processes can be restored on any other. Each process reads its own part.

  Damaged checkpoints after the restored one are removed, with a warning.

  Args:
    folder: the folder of the checkpoints; it is created if necessary.
    template: the shapes, types and shardings of a state.
    state: a function that returns the state of a training that begins.

  Raises:
    ValueError: if there are checkpoints, but all are damaged.
  """
  import orbax.checkpoint as ocp

  items = {"state": ocp.args.StandardRestore(template), "checksums": ocp.args.JsonRestore()}

  def read(step: int) -> Any:
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(folder, options=options) as manager:
      return manager.restore(step, args=ocp.args.Composite(**items))

  def check(checkpoint: Any, step: int) -> TrainState:
    arrays.check(checkpoint["state"], checkpoint["checksums"])
    if checkpoint["state"].step != step:
      raise ValueError(f"it contains the state of step {checkpoint['state'].step}")
    return checkpoint["state"]

  def prepare() -> tuple[list[str], list[int]]:
    folder.mkdir(exist_ok=True)
    unfinished = {path.name.partition(".")[0] for path in folder.glob("*.orbax-checkpoint-tmp*")}
    arrays.remove_unfinished(folder)
    return sorted(unfinished), steps(folder)

  unfinished, found = processes.first_does(prepare)
  damaged: dict[int, str] = {}
  for step in reversed(found):
    checkpoint, failure = arrays.attempt(lambda: read(step))  # noqa: B023
    failure = _first_failure(failure)
    if failure is None:  # Then all processes have read it, and compute the checksums together.
      restored, failure = arrays.attempt(lambda: check(checkpoint, step))  # noqa: B023
      failure = _first_failure(failure)
    if failure is None:
      for number, reason in damaged.items():
        warnings.warn(
          f"the checkpoint of step {number} in {folder} is damaged ({reason}): continuing from step {step}",
          stacklevel=4,
        )
        processes.first_does(lambda: shutil.rmtree(folder / str(number)))  # noqa: B023
      _say_where_it_goes_on(folder, step, unfinished)
      return restored
    damaged[step], checkpoint = failure, None  # There may be no room for two.
  if damaged:
    step, reason = next(iter(damaged.items()))
    raise ValueError(
      f"the checkpoint of step {step} in {folder} is damaged ({reason}), and there is no undamaged one: retrain"
    )
  _say_where_it_goes_on(folder, 0, unfinished)
  return state()


def _say_where_it_goes_on(folder: Path, step: int, unfinished: Sequence[str]) -> None:
  for name in unfinished:
    if name.isdigit() and int(name) > step:
      LOG.warning("the checkpoint of step %s in %s was not written to the end", name, folder)
  if step:
    LOG.info("continuing from step %d", step)
