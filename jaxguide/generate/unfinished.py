"""Samples on their way to a file, kept so that a run that was killed can be gone on with."""

import json
import math
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import records
from jaxguide._core.files import is_part, remove_parts, write_atomically

FILES = ("settings.json", "done.json", "images.npy")


def clear(folder: Path) -> None:
  """Remove such a folder, and nothing else that may lie in it; call it under the lock of its file."""
  for name in FILES:
    (folder / name).unlink(missing_ok=True)
  remove_parts(folder)
  folder.rmdir()


def clear_finished(folder: Path, settings: Mapping[str, Any]) -> None:
  """Remove the folder of a run that was killed after it had written its file, whose settings these are.

  A folder of other settings stays, and so does one that holds anything else.
  """
  if not folder.is_dir() or any(path.name not in FILES and not is_part(path) for path in folder.iterdir()):
    return
  try:
    ours = json.loads((folder / "settings.json").read_text()) == settings
  except FileNotFoundError:
    ours = True  # It was killed while it cleaned up, or before it had begun.
  except (OSError, ValueError):
    ours = False
  if ours:
    clear(folder)


class Unfinished:
  """A folder beside the file that is to be: settings, images so far, and how many they are.

  Whatever moment a run ends at, the folder holds whole samples: their number is written once they are on disk.

  Args:
    folder: where; made if it is not there.
    settings: the record of what the samples depend on; see `jaxguide._core.records`.
    shape: (num, height, width, channels) of them all.
    default: the fields of a record that have a default; see `jaxguide._core.records.differences`.

  Raises:
    ValueError: if the folder holds samples of other settings, is torn, or holds anything else. A folder without samples
      is taken over, whatever its settings.
    OSError: if there is no room for the images and the file that is made of them.
  """

  def __init__(
    self, folder: Path, settings: Mapping[str, Any], shape: Sequence[int], default: Mapping[str, Any] | None = None
  ):
    self.folder = folder
    found = list(folder.iterdir()) if folder.is_dir() else []
    others = sorted(path.name for path in found if path.name not in FILES and not is_part(path))
    if others or (folder.exists() and not folder.is_dir()):
      what = f"holds {others[0]}" if others else "is a file"
      raise ValueError(f"{folder} {what}, where samples would be kept until they are all there: move it away")
    if found:
      remove_parts(folder)
    if not (folder / "settings.json").exists() or self._done() == 0:
      self._begin(settings, tuple(shape))
      return
    try:
      held = json.loads((folder / "settings.json").read_text())
      if not isinstance(held, dict):
        raise ValueError("settings.json holds no settings")
    except (OSError, ValueError) as error:
      raise self._torn(error) from error
    different = records.differences(held, settings, default)
    if different:
      raise ValueError(
        f"{folder} holds samples of an unfinished run with other settings ({'; '.join(different)}): "
        "finish it with its own settings, or remove the folder to start over"
      )
    try:
      images = np.load(folder / "images.npy", mmap_mode="r")  # This mode does not make a file that was cut longer.
      done = self._done()
      if (images.shape, images.dtype) != (tuple(shape), np.uint8) or type(done) is not int or not 0 <= done <= shape[0]:
        raise ValueError(f"{done} images of shape {images.shape} and {images.dtype}")
      self._checksum, checksum = zlib.crc32(np.ascontiguousarray(images[:done]).data), self._held().get("crc32")
      if checksum not in (None, self._checksum):
        raise ValueError("the images are not those that were kept")
    except (OSError, ValueError, EOFError) as error:
      raise self._torn(error) from error
    self.images, self.done = np.load(folder / "images.npy", mmap_mode="r+"), done

  def append(self, images: np.ndarray) -> None:
    """Keep the next samples, uint8 (n, height, width, channels)."""
    self.images[self.done : self.done + len(images)] = images
    self.images.flush()
    self._checksum = zlib.crc32(np.ascontiguousarray(images).data, self._checksum)
    self._count(self.done + len(images))

  def remove(self) -> None:
    """Remove the folder."""
    clear(self.folder)

  def _done(self) -> Any:
    """What the folder says of how many samples there are, None where it says nothing."""
    return self._held().get("done")

  def _held(self) -> dict[str, Any]:
    try:
      held = json.loads((self.folder / "done.json").read_text())
    except (OSError, ValueError, RecursionError):
      return {}
    return held if isinstance(held, dict) else {"done": held}  # A number, where there was no checksum yet.

  def _begin(self, settings: Mapping[str, Any], shape: Sequence[int]) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    (self.folder / "settings.json").unlink(missing_ok=True)
    path = self.folder / "images.npy"
    path.unlink(missing_ok=True)
    # The images are written twice, here and in the file at the end.
    need, free = 2 * math.prod(shape), shutil.disk_usage(self.folder).free
    try:
      if need > free:
        raise OSError(f"{need / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free")
      self.images = np.lib.format.open_memmap(path, "w+", np.uint8, tuple(shape))
      if hasattr(os, "posix_fallocate"):
        # A full disk is an error now, and not a fault in the middle of the run.
        with path.open("r+b") as file:
          os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
      clear(self.folder)
      raise OSError(
        f"cannot keep {shape[0]} samples in {self.folder}: {error.strerror or error}; make room, or lower num"
      ) from error
    self._checksum = 0
    self._count(0)
    # Last, so that a folder without them is one where nothing was begun.
    write_atomically(self.folder / "settings.json", json.dumps(settings, indent=2).encode())

  def _torn(self, error: Exception) -> ValueError:
    return ValueError(f"{self.folder} is torn ({error}): remove it to start over")

  def _count(self, done: int) -> None:
    write_atomically(self.folder / "done.json", json.dumps({"done": done, "crc32": self._checksum}).encode())
    self.done = done
