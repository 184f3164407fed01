"""Samples on their way to a file, kept so that a run that was killed can be gone on with."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide.files import write_atomically


class Unfinished:
  """A folder beside the file that is to be: settings, images so far, and how many they are.

  Whatever moment a run ends at, the folder holds whole samples: their number is written once they are on disk.

  Args:
    folder: where; made if it is not there.
    settings: what the samples depend on, as JSON has it.
    shape: (num, height, width, channels) of them all.

  Raises:
    ValueError: if the folder holds samples of other settings, or is torn.
  """

  def __init__(self, folder: Path, settings: Mapping[str, Any], shape: Sequence[int]):
    self.folder = folder
    held = self._held()
    if held is None:
      folder.mkdir(parents=True, exist_ok=True)
      self.images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, tuple(shape))
      self._count(0)
      # Last, so that a folder without them is one where nothing was begun.
      write_atomically(folder / "settings.json", json.dumps(settings, indent=2).encode())
      return
    different = [name for name in {**held, **settings} if held.get(name) != settings.get(name)]
    if different:
      name = different[0]
      raise ValueError(
        f"{folder} holds samples of an unfinished run with {name} {held.get(name)!r}, not {settings.get(name)!r}: "
        "finish it with its own settings, or remove the folder to start over"
      )
    try:
      self.images = np.load(folder / "images.npy", mmap_mode="r+")
      self.done = json.loads((folder / "done.json").read_text())
    except (OSError, ValueError) as error:
      raise ValueError(f"{folder} is torn ({error}): remove it to start over") from error

  def append(self, images: np.ndarray) -> None:
    """Keep the next samples, uint8 (n, height, width, channels)."""
    self.images[self.done : self.done + len(images)] = images
    self.images.flush()
    self._count(self.done + len(images))

  def remove(self) -> None:
    """Remove the folder."""
    shutil.rmtree(self.folder)

  def _held(self) -> Any:
    try:
      return json.loads((self.folder / "settings.json").read_text())
    except FileNotFoundError:
      return None

  def _count(self, done: int) -> None:
    write_atomically(self.folder / "done.json", str(done).encode())
    self.done = done
