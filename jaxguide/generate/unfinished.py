"""Samples on their way to a file, kept so that a run that was killed can be gone on with."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide.files import write_atomically

FILES = ("settings.json", "done.json", "images.npy")


class Unfinished:
  """A folder beside the file that is to be: settings, images so far, and how many they are.

  Whatever moment a run ends at, the folder holds whole samples: their number is written once they are on disk.

  Args:
    folder: where; made if it is not there.
    settings: what the samples depend on, as JSON has it.
    shape: (num, height, width, channels) of them all.

  Raises:
    ValueError: if the folder holds samples of other settings, is torn, or holds anything else.
    OSError: if there is no room for the images.
  """

  def __init__(self, folder: Path, settings: Mapping[str, Any], shape: Sequence[int]):
    self.folder = folder
    settings = json.loads(json.dumps(settings))  # As they come back: lists for tuples.
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
      what = f"holds {others[0]}" if others else "is a file"
      raise ValueError(f"{folder} {what}, where samples would be kept until they are all there: move it away")
    if not (folder / "settings.json").exists():
      self._begin(settings, tuple(shape))
      return
    try:
      held = json.loads((folder / "settings.json").read_text())
      if not isinstance(held, dict):
        raise ValueError("settings.json holds no settings")
    except (OSError, ValueError) as error:
      raise self._torn(error) from error
    different = [name for name in {**held, **settings} if held.get(name) != settings.get(name)]
    if different:
      name = different[0]
      raise ValueError(
        f"{folder} holds samples of an unfinished run with {name} {held.get(name)!r}, not {settings.get(name)!r}: "
        "finish it with its own settings, or remove the folder to start over"
      )
    try:
      images = np.load(folder / "images.npy", mmap_mode="r")  # This mode does not make a file that was cut longer.
      done = json.loads((folder / "done.json").read_text())
      if (images.shape, images.dtype) != (tuple(shape), np.uint8) or type(done) is not int or not 0 <= done <= shape[0]:
        raise ValueError(f"{done} images of shape {images.shape} and {images.dtype}")
    except (OSError, ValueError, EOFError) as error:
      raise self._torn(error) from error
    self.images, self.done = np.load(folder / "images.npy", mmap_mode="r+"), done

  def append(self, images: np.ndarray) -> None:
    """Keep the next samples, uint8 (n, height, width, channels)."""
    self.images[self.done : self.done + len(images)] = images
    self.images.flush()
    self._count(self.done + len(images))

  def remove(self) -> None:
    """Remove the folder."""
    for name in FILES:
      (self.folder / name).unlink(missing_ok=True)
    self.folder.rmdir()

  def _begin(self, settings: Mapping[str, Any], shape: Sequence[int]) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    path = self.folder / "images.npy"
    self.images = np.lib.format.open_memmap(path, "w+", np.uint8, tuple(shape))
    if hasattr(os, "posix_fallocate"):
      # A full disk is an error now, and not a fault in the middle of the run.
      with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    self._count(0)
    # Last, so that a folder without them is one where nothing was begun.
    write_atomically(self.folder / "settings.json", json.dumps(settings, indent=2).encode())

  def _torn(self, error: Exception) -> ValueError:
    return ValueError(f"{self.folder} is torn ({error}): remove it to start over")

  def _count(self, done: int) -> None:
    write_atomically(self.folder / "done.json", str(done).encode())
    self.done = done
