"""Checkpoints of a training run. The last two are kept, each with checksums."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import jax

from jaxguide.models import arrays
from jaxguide.training.step import TrainState


def steps(folder: Path) -> list[int]:
  """Return the steps that have a checkpoint."""
  return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _manager(folder: Path) -> Any:
  """Return Orbax's checkpoint manager. It keeps two checkpoints, in case the last one is damaged."""
  import orbax.checkpoint as ocp

  options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
  return ocp.CheckpointManager(folder, options=options)


def save(folder: Path, state: TrainState, step: int) -> None:
  """Write the checkpoint of a step."""
  import orbax.checkpoint as ocp

  items = {"state": ocp.args.StandardSave(state), "checksums": ocp.args.JsonSave(arrays.checksums(state))}

  def save():
    with _manager(folder) as manager:
      manager.save(step, args=ocp.args.Composite(**items))

  arrays.write(folder / str(step), state, save)


def restore(folder: Path, state: TrainState) -> TrainState:
  """Return the state of the last undamaged checkpoint, or ``state`` if there are no checkpoints.

  Damaged checkpoints after the restored one are removed, with a warning.

  Args:
    folder: the folder of the checkpoints; it is created if necessary.
    state: a state with the expected shapes, types and shardings.

  Raises:
    ValueError: if there are checkpoints, but all are damaged.
  """
  import orbax.checkpoint as ocp

  template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
  items = {"state": ocp.args.StandardRestore(template), "checksums": ocp.args.JsonRestore()}

  def restore(step: int) -> TrainState:
    with _manager(folder) as manager:
      checkpoint = manager.restore(step, args=ocp.args.Composite(**items))
    arrays.check(checkpoint["state"], checkpoint["checksums"])
    if checkpoint["state"].step != step:
      raise ValueError(f"it contains the state of step {checkpoint['state'].step}")
    return checkpoint["state"]

  folder.mkdir(exist_ok=True)
  arrays.remove_unfinished(folder)
  damaged: dict[int, str] = {}
  for step in sorted(steps(folder), reverse=True):
    restored, failure = arrays.attempt(lambda: restore(step))  # noqa: B023
    if failure is None:
      for number, reason in damaged.items():
        warnings.warn(
          f"the checkpoint of step {number} in {folder} is damaged ({reason}): continuing from step {step}",
          stacklevel=4,
        )
        shutil.rmtree(folder / str(number))
      return restored
    damaged[step] = failure
  if damaged:
    step, reason = next(iter(damaged.items()))
    raise ValueError(
      f"the checkpoint of step {step} in {folder} is damaged ({reason}), and there is no undamaged one: retrain"
    )
  return state
