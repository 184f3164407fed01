"""Checkpoints of a training run: two are kept, each with checksums."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import jax

from jaxguide.models import arrays
from jaxguide.training.step import TrainState


def steps(folder: Path) -> list[int]:
  """The steps of which there are checkpoints."""
  return [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []


def _manager(folder: Path) -> Any:
  """What writes and reads checkpoints. It keeps two, so that where the last is torn there is another."""
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
  """Give the state of the last checkpoint that is whole; the one that was given if there is no checkpoint."""
  import orbax.checkpoint as ocp

  template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
  items = {"state": ocp.args.StandardRestore(template), "checksums": ocp.args.JsonRestore()}

  def restore(step: int) -> TrainState:
    with _manager(folder) as manager:
      held = manager.restore(step, args=ocp.args.Composite(**items))
    arrays.check(held["state"], held["checksums"])
    if held["state"].step != step:
      raise ValueError(f"it is one of step {held['state'].step}")
    return held["state"]

  folder.mkdir(exist_ok=True)
  arrays.remove_unfinished(folder)
  torn: dict[int, str] = {}
  for step in sorted(steps(folder), reverse=True):
    restored, failed = arrays.attempt(lambda: restore(step))  # noqa: B023
    if failed is None:
      for number, reason in torn.items():
        warnings.warn(
          f"the checkpoint of step {number} in {folder} is torn ({reason}): going on from step {step}", stacklevel=4
        )
        shutil.rmtree(folder / str(number))
      return restored
    torn[step] = failed
  if torn:
    step, reason = next(iter(torn.items()))
    raise ValueError(f"the checkpoint of step {step} in {folder} is torn ({reason}), and no other is whole: retrain")
  return state
