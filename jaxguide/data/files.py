"""Samples in ``.npz`` files in the format of OpenAI's evaluator, and the settings stored in sample files."""

import math
import zipfile
from pathlib import Path

import numpy as np

from jaxguide._core.files import PathLike, check_readable, replacing
from jaxguide.data.images import check_images

WRITERS = "jaxguide sample and jaxguide.data.save_npz write such files"


def save_npz(path: PathLike, images: np.ndarray, labels: np.ndarray | None = None, settings: str | None = None) -> None:
  """Write samples in the format of OpenAI's guided-diffusion evaluator, atomically.

  Args:
    path: the file; no suffix is added, and missing folders are created.
    images: ``uint8`` of shape (n, h, w, c), stored as ``arr_0``.
    labels: whole numbers of shape (n,), stored as ``arr_1`` in ``int64``. If None, the file has no ``arr_1``.
    settings: a text that describes how the samples were generated, stored as ``settings``; see `settings_of`.

  Raises:
    ValueError: if the images or the labels have another type or shape.
    TypeError: if the settings are not a text.
    OSError: if ``path`` cannot be written.
  """
  images, labels = np.asarray(images), None if labels is None else np.asarray(labels)
  check_images(images, labels)
  if labels is not None and labels.max() > np.iinfo(np.int64).max:
    raise ValueError(f"labels must fit int64, got {labels.max()}")
  if not isinstance(settings, str | None):
    raise TypeError(f"settings must be a text, got {type(settings).__name__}")
  with replacing(path) as file:
    arrays = {"arr_0": images}
    if labels is not None:
      arrays["arr_1"] = labels.astype(np.int64)
    if settings is not None:
      arrays["settings"] = np.array(settings)
    np.savez(file, **arrays)  # type: ignore[arg-type]


def settings_of(path: PathLike) -> str | None:
  """Return the settings stored in an ``.npz`` or ``.png`` file; None if it has none or cannot be read."""
  from PIL import PngImagePlugin

  try:
    check_readable(path)
    if Path(path).suffix == ".png":
      # Not `Image.open`, which refuses very large pictures. No pixels are read here.
      with PngImagePlugin.PngImageFile(path) as picture:
        return picture.info.get("settings")
    check_sizes(path)
    with np.load(path) as arrays:
      return str(arrays["settings"])
  except Exception:  # A damaged file can raise any kind of exception.
    return None


def check_sizes(path: PathLike) -> None:
  """Check, before memory is allocated, that the arrays of an .npz file are no larger than the file can hold.

  Raises:
    ValueError: if the header of an array states a larger size, or the file is not an .npz file.
  """
  with open(path, "rb") as opened:
    if not zipfile.is_zipfile(opened):
      raise ValueError("it contains no arrays")
  with zipfile.ZipFile(path) as members:
    for member in members.infolist():
      with members.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        stated_size = math.prod(shape) * dtype.itemsize
        # Deflate compresses by a factor of at most 1032.
        if stated_size > min(member.file_size, 1032 * member.compress_size):
          raise ValueError(
            f"the header of {member.filename} states {stated_size} bytes, but it has only {member.file_size}"
          )


def load_npz(path: PathLike, labelled: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
  """Read a file written by `save_npz`.

  Args:
    path: the file.
    labelled: whether the file must have labels.

  Returns:
    ``uint8`` images (n, h, w, c), and ``int64`` labels (n,) or None if the file has none.

  Raises:
    FileNotFoundError: if there is no such file.
    OSError: if it cannot be read.
    ValueError: if it is not an .npz file of that format.
  """
  check_readable(path)
  try:
    check_sizes(path)
    with np.load(path) as arrays:
      images = arrays["arr_0"]
      labels = arrays["arr_1"] if labelled or "arr_1" in arrays else None
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no file {path}: {WRITERS}") from None
  except OSError as error:
    raise OSError(f"cannot read {path}: {error.strerror or error}") from error
  except Exception as error:  # A damaged archive can raise any kind of exception.
    # NumPy treats any file without arrays as a pickle, and its message recommends an option that would run its code.
    reason = "it contains no arrays" if "pickle" in str(error) else error
    raise ValueError(
      f"{path} is not an .npz file with images in arr_0 and labels in arr_1 ({reason}): {WRITERS}"
    ) from error
  try:
    check_images(images, labels)
  except ValueError as error:
    raise ValueError(f"{path} contains no labelled images: {error}") from None
  return images, None if labels is None else labels.astype(np.int64)
