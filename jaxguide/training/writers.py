"""Writers of metrics and pictures besides the run's own folder: TensorBoard and Weights & Biases.

A writer has three methods, those of `Writer`. To add one, write its class and add an entry to `WRITERS`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Writer(Protocol):
  """A place for the metrics and pictures of a training."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write numbers by name."""

  def image(self, step: int, name: str, array: np.ndarray) -> None:
    """Write a picture, uint8 of shape (height, width, channels)."""

  def close(self) -> None:
    """Write what is still in memory."""


class TensorBoard:
  """Event files of TensorBoard in the subfolder ``tensorboard``; start ``tensorboard --logdir FOLDER``."""

  def __init__(self, folder: Path, name: str):
    del name
    try:
      from tensorboardX import SummaryWriter
    except ImportError as error:
      raise _missing("tensorboard", "tensorboardX") from error
    self._writer = SummaryWriter(str(folder / "tensorboard"))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write numbers by name."""
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def image(self, step: int, name: str, array: np.ndarray) -> None:
    """Write a picture."""
    self._writer.add_image(name, array, step, dataformats="HWC")

  def close(self) -> None:
    """Write what is still in memory."""
    self._writer.close()


class WeightsAndBiases:
  """A run of Weights & Biases. It is continued when the training is; its id is kept in the file ``wandb.id``."""

  def __init__(self, folder: Path, name: str):
    try:
      import wandb
    except ImportError as error:
      raise _missing("wandb", "wandb") from error
    self._wandb: Any = wandb
    path = folder / "wandb.id"
    identity = path.read_text().strip() if path.exists() else None
    self._run = wandb.init(project="jaxguide", name=name, dir=str(folder), id=identity, resume="allow")
    path.write_text(self._run.id)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write numbers by name."""
    self._run.log(dict(values), step=step)

  def image(self, step: int, name: str, array: np.ndarray) -> None:
    """Write a picture."""
    self._run.log({name: self._wandb.Image(array)}, step=step)

  def close(self) -> None:
    """Write what is still in memory."""
    self._run.finish()


def _missing(name: str, package: str) -> ImportError:
  return ImportError(
    f"the writer {name!r} needs {package}, which is not installed: pip install 'jaxguide[{name}]', or leave it out"
  )


WRITERS: dict[str, Callable[[Path, str], Writer]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""``(folder, name) -> Writer``, by name."""


class Writers:
  """Several writers as one."""

  def __init__(self, names: tuple[str, ...], folder: Path):
    self._writers = [WRITERS[name](folder, folder.name) for name in names]

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Write numbers by name."""
    for writer in self._writers:
      writer.scalars(step, values)

  def image(self, step: int, name: str, array: np.ndarray) -> None:
    """Write a picture."""
    for writer in self._writers:
      writer.image(step, name, array)

  def close(self) -> None:
    """Close all writers."""
    for writer in self._writers:
      writer.close()
