"""The samples of an unfinished run, kept on disk so that a run that was killed can continue."""

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
from jaxguide.generate.settings import plain_record

FILES = ("settings.json", "done.json", "images.npy")


def clear(folder: Path) -> None:
  """Remove the folder of an unfinished run, and no other files in it. The caller holds the lock of the output file."""
  for name in FILES:
    (folder / name).unlink(missing_ok=True)
  remove_parts(folder)
  folder.rmdir()


def clear_finished(folder: Path, settings: Mapping[str, Any]) -> None:
  """Remove the folder of a run that was killed after it had written its output file.

  A folder of a run with other settings stays, and so does a folder with other files in it.

  Args:
    folder: the folder beside the output file.
    settings: the settings of the output file.
  """
  if not folder.is_dir() or any(path.name not in FILES and not is_part(path) for path in folder.iterdir()):
    return
  try:
    is_same_run = plain_record(json.loads((folder / "settings.json").read_text())) == settings
  except FileNotFoundError:
    is_same_run = True  # The run was killed while it cleaned up, or before it drew anything.
  except (OSError, ValueError):
    is_same_run = False
  if is_same_run:
    clear(folder)


def settings_of(folder: Path) -> dict[str, Any] | None:
  """Return the settings of the run in a folder; None if there are none, or they cannot be read."""
  try:
    settings = json.loads((folder / "settings.json").read_text())
  except (OSError, ValueError, RecursionError):
    return None
  return plain_record(settings) if isinstance(settings, dict) else None


class Unfinished:
  """A folder beside the output file. It holds the settings, the images so far, and their number with a checksum.

  The number is written after the images are on disk. So the folder holds whole samples at any moment.

  Args:
    folder: the folder; it is made if it does not exist.
    settings: the record of everything that the samples depend on; see `jaxguide._core.records`.
    shape: (num, height, width, channels) of all samples.
    default: the defaults of the record's fields; see `jaxguide._core.records.differences`.

  Raises:
    ValueError: if the folder holds samples of other settings, is damaged, or holds other files. A folder without
      samples is used, whatever its settings are.
    OSError: if there is no room for the images and for the output file.
  """

  def __init__(
    self, folder: Path, settings: Mapping[str, Any], shape: Sequence[int], default: Mapping[str, Any] | None = None
  ):
    self.folder = folder
    contents = list(folder.iterdir()) if folder.is_dir() else []
    others = sorted(path.name for path in contents if path.name not in FILES and not is_part(path))
    if others or (folder.exists() and not folder.is_dir()):
      what = f"holds {others[0]}" if others else "is a file"
      raise ValueError(f"{folder} {what}, but the samples of the unfinished run are kept there: move it away")
    if contents:
      remove_parts(folder)
    if not (folder / "settings.json").exists() or self._done() == 0:
      self._begin(settings, tuple(shape))
      return
    try:
      old_settings = json.loads((folder / "settings.json").read_text())
      if not isinstance(old_settings, dict):
        raise ValueError("settings.json holds no settings")
    except (OSError, ValueError) as error:
      raise self._damaged(error) from error
    different = records.differences(plain_record(old_settings), settings, default)
    if different:
      raise ValueError(
        f"{folder} holds samples of an unfinished run with other settings ({'; '.join(different)}): "
        "finish it with its own settings, or remove the folder to start over"
      )
    try:
      images = np.load(folder / "images.npy", mmap_mode="r")  # In this mode a file that was cut off stays as it is.
      done = self._done()
      if (images.shape, images.dtype) != (tuple(shape), np.uint8) or type(done) is not int or not 0 <= done <= shape[0]:
        raise ValueError(f"{done} images of shape {images.shape} and {images.dtype}")
      self._checksum, checksum = zlib.crc32(np.ascontiguousarray(images[:done]).data), self._progress().get("crc32")
      if checksum not in (None, self._checksum):
        raise ValueError("the images do not match their checksum")
    except (OSError, ValueError, EOFError) as error:
      raise self._damaged(error) from error
    self.images, self.done = np.load(folder / "images.npy", mmap_mode="r+"), done

  @classmethod
  def joined(cls, folder: Path, done: int) -> "Unfinished":
    """Return the samples that another process keeps in a folder, for writing some of them.

    Args:
      folder: the folder.
      done: the number of samples that are done.
    """
    samples = cls.__new__(cls)
    samples.folder, samples.done = folder, done
    samples.images = np.load(folder / "images.npy", mmap_mode="r+")
    return samples

  def append(self, images: np.ndarray) -> None:
    """Add the next samples, uint8 (n, height, width, channels)."""
    self.write(self.done + np.arange(len(images)), images)
    self.commit(len(images))

  def write(self, rows: np.ndarray, images: np.ndarray) -> None:
    """Write samples, uint8 (n, height, width, channels), to their places. They count once they are committed."""
    self.images[rows] = images
    self.images.flush()

  def commit(self, num: int) -> None:
    """Count the next samples, which have been written, perhaps by several processes."""
    self._checksum = zlib.crc32(np.ascontiguousarray(self.images[self.done : self.done + num]).data, self._checksum)
    self._count(self.done + num)

  def remove(self) -> None:
    """Remove the folder."""
    clear(self.folder)

  def _done(self) -> Any:
    """The number of samples in the folder; None if it is not known."""
    return self._progress().get("done")

  def _progress(self) -> dict[str, Any]:
    try:
      progress = json.loads((self.folder / "done.json").read_text())
    except (OSError, ValueError, RecursionError):
      return {}
    return progress if isinstance(progress, dict) else {"done": progress}  # Older files hold the number alone.

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
        # Reserve the space now. Otherwise a full disk would end the run in the middle.
        with path.open("r+b") as file:
          os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
      clear(self.folder)
      raise OSError(
        f"cannot keep {shape[0]} samples in {self.folder}: {error.strerror or error}; make room, or lower num"
      ) from error
    self._checksum = 0
    self._count(0)
    # The settings are written last: a folder without them holds nothing.
    write_atomically(self.folder / "settings.json", json.dumps(settings, indent=2).encode())

  def _damaged(self, error: Exception) -> ValueError:
    return ValueError(f"{self.folder} is damaged ({error}): remove it to start over")

  def _count(self, done: int) -> None:
    write_atomically(self.folder / "done.json", json.dumps({"done": done, "crc32": self._checksum}).encode())
    self.done = done
