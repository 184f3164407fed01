"""Samples in ``.npz`` files, as OpenAI's evaluator reads them, and the settings that files hold."""

import math
import zipfile
from pathlib import Path

import numpy as np

from jaxguide._core.files import PathLike, check_readable, replacing
from jaxguide.data.images import check_images


def save_npz(path: PathLike, images: np.ndarray, labels: np.ndarray | None = None, settings: str | None = None) -> None:
  """Write samples in the format of OpenAI's guided-diffusion evaluator, atomically.

  Args:
    path: the file, taken as it is; missing folders are made.
    images: ``uint8`` of shape (n, h, w, c), stored as ``arr_0``.
    labels: whole numbers of shape (n,), stored as ``arr_1`` in ``int64``; without them there is none.
    settings: a text that says what the samples were made with, stored as ``settings``; see `settings_of`.

  Raises:
    ValueError: if the images or the labels are not that.
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
  """Read what a finished ``.npz`` or ``.png`` says of the settings that it was made with; None if it says nothing."""
  from PIL import PngImagePlugin

  try:
    check_readable(path)
    if Path(path).suffix == ".png":
      # Not `Image.open`, which refuses large pictures: here none of their pixels is read.
      with PngImagePlugin.PngImageFile(path) as picture:
        return picture.info.get("settings")
    _check_sizes(path)
    with np.load(path) as arrays:
      return str(arrays["settings"])
  except Exception:  # A damaged file may raise anything.
    return None


def _check_sizes(path: PathLike) -> None:
  """Check that the arrays of an .npz file are no larger than the file can hold, before memory is taken for them.

  Raises:
    ValueError: if one claims to be, or the file is none of that format.
  """
  with open(path, "rb") as opened:
    if not zipfile.is_zipfile(opened):
      raise ValueError("it holds no arrays")
  with zipfile.ZipFile(path) as members:
    for member in members.infolist():
      with members.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        claimed = math.prod(shape) * dtype.itemsize
        # Deflate makes a thousandth of what it is given at best.
        if claimed > min(member.file_size, 1032 * member.compress_size):
          raise ValueError(f"{member.filename} claims {claimed} bytes, and the file has {member.file_size}")


def load_npz(path: PathLike, labelled: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
  """Read what `save_npz` wrote: ``uint8`` images (n, h, w, c) and ``int64`` labels (n,).

  Args:
    path: the file.
    labelled: whether there have to be labels; without them ``None`` is given.

  Raises:
    FileNotFoundError: if there is no such file.
    OSError: if it cannot be read.
    ValueError: if it is not an .npz file of that format.
  """
  check_readable(path)
  try:
    _check_sizes(path)
    with np.load(path) as arrays:
      images = arrays["arr_0"]
      labels = arrays["arr_1"] if labelled or "arr_1" in arrays else None
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no file {path}: write one with save_npz") from None
  except OSError as error:
    raise OSError(f"cannot read {path}: {error.strerror or error}") from error
  except Exception as error:  # A damaged archive may raise anything.
    # NumPy takes whatever is no array for a pickle, and gives advice that would run what it holds.
    reason = "it holds no arrays" if "pickle" in str(error) else error
    raise ValueError(
      f"{path} is not an .npz file with images in arr_0 and labels in arr_1 ({reason}): write one with save_npz"
    ) from error
  try:
    check_images(images, labels)
  except ValueError as error:
    raise ValueError(f"{path} holds no labelled images: {error}") from None
  return images, None if labels is None else labels.astype(np.int64)
