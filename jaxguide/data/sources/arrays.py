"""Arrays in an ``.npz`` file: images or latents, with labels."""

import dataclasses
import difflib
import functools
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core.files import check_readable
from jaxguide.data.files import check_sizes
from jaxguide.data.records import BadRecord, Records, Unreadable, shown, state_of
from jaxguide.data.sources.folder import describe_labels
from jaxguide.data.sources.rows import Numbered, stamps_of_rows

IMAGES = {"arr_0": "arr_1", "images": "labels"}
"""The array of labels that belongs to an array of images, as names in the file."""

LATENTS = "latents"

EXAMPLES = (*IMAGES, LATENTS)
"""The names of arrays of examples."""

POSTERIOR = ("std", "flipped", "flipped_std")
"""The arrays beside latents, of the same shape, that `jaxguide encode` writes: see `open_arrays`."""

OTHERS = (*IMAGES.values(), "shift", "scale", "class_names", *POSTERIOR)
"""The names of the other arrays that are read. ``settings`` may be there too, since ``jaxguide sample`` writes it."""

LOCAL_HEADER = struct.Struct("<4s22xHH")
"""The header before a member of a zip file: its signature, the lengths of the member's name and of its extra field."""


@dataclasses.dataclass(frozen=True)
class FileRows:
  """An array in a file that is not compressed. Its rows are read one by one, so that it takes no memory.

  Args:
    path: the file.
    offset: where the array's first byte is in the file.
    shape: the shape of the array.
    dtype: its type.
  """

  path: Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def __getitem__(self, row: int) -> np.ndarray:
    size = math.prod(self.shape[1:]) * self.dtype.itemsize
    # Opened for each row: this is safe in threads and processes, and takes less time than decoding a picture.
    try:
      with open(self.path, "rb", buffering=0) as file:
        file.seek(self.offset + row * size)
        content = file.read(size)
    except OSError as error:
      raise Unreadable(f"it cannot be read ({error.strerror or error})") from error
    if len(content) < size:
      raise BadRecord("the file ends before it")
    return np.frombuffer(content, self.dtype).reshape(self.shape[1:])


def open_arrays(path: Path) -> Records:
  """Return the records of an ``.npz`` file.

  The file has one of

  - ``arr_0``: ``uint8`` images (n, h, w, c) or (n, h, w), and perhaps their labels ``arr_1``, as ``jaxguide sample``
    and OpenAI's guided-diffusion write them;
  - ``images`` and perhaps ``labels``: the same under other names;
  - ``latents``: floats (n, h, w, c), and perhaps ``labels``, ``shift`` and ``scale``. Examples are
    ``(latents - shift) * scale``, with one number or (c,) numbers each. With an array ``std`` of the same shape they
    are means, and each time an example is read, ``std`` times fresh normal noise is added to it. ``flipped``, and
    ``flipped_std`` with ``std``, are those of the mirrored images, of which one half of the examples is then taken, at
    random. ``jaxguide encode`` writes such files.

  Labels are (n,) whole numbers or texts, which are classes, or (n, d) numbers, which are vectors. ``class_names`` may
  hold the names of the classes. A record's stamp is a hash of the file's name, size and time and of its row.

  An array that ``np.savez`` wrote in C order is read row by row, without its checksum, which the check of the data
  looks at once. One of ``np.savez_compressed``, or in Fortran order,
  is read into memory. The arrays must not be pickled objects, so that no code of the file can run.

  Raises:
    ValueError: if the file is damaged, or its arrays have other names, types or shapes.
    OSError: if it cannot be read.

  Warns:
    UserWarning: if the file has arrays of other names, which are not used.
  """
  arrays = _read(path)
  state = state_of([os.stat(path)])
  try:
    main = _main_array(arrays)
    rows = arrays.pop(main)
    labels = arrays.pop(IMAGES.get(main, "labels"), None)
    class_names = arrays.pop("class_names", None)
    if main == LATENTS:
      parts = {name: arrays.pop(name) for name in POSTERIOR if name in arrays}
      read = _latents(rows, arrays.pop("shift", None), arrays.pop("scale", None), parts)
    else:
      read = _images(main, rows)
    names = Numbered("latent " if main == LATENTS else "image ", rows.shape[0])
    described = _labels(labels, class_names, names)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  verify = functools.partial(_verify, path) if isinstance(rows, FileRows) else None
  if arrays:
    warnings.warn(f"{path} has arrays that are not used: {shown(', '.join(sorted(arrays)))}", stacklevel=4)
  return Records(str(path), names, *described, read, stamps_of_rows(path, len(names)), state=state, verify=verify)


def _verify(path: Path) -> None:
  """Compare all arrays of a file with their checksums.

  Raises:
    ValueError: if one is damaged.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      damaged = archive.testzip()
  except Exception as error:  # A damaged archive can raise any kind of exception.
    raise ValueError(f"{path} is not a valid .npz file ({error})") from error
  if damaged is not None:
    raise ValueError(f"{path} is damaged: {damaged} does not have the checksum that is stored with it: copy it again")


def _main_array(arrays: Mapping[str, Any]) -> str:
  """Return the name of the array that contains the examples."""
  present = [name for name in EXAMPLES if name in arrays]
  if len(present) > 1:
    raise ValueError(f"it has the arrays {' and '.join(present)}: keep one of them")
  if present:
    return present[0]
  near = [(name, match) for name in arrays for match in difflib.get_close_matches(name, EXAMPLES, n=1)]
  hint = f": did you mean {near[0][1]!r} by {near[0][0]!r}?" if near else ""
  others = shown(", ".join(arrays))
  raise ValueError(f"it needs an array {', '.join(EXAMPLES[:-1])} or {LATENTS}; it has {others}{hint}")


def _read(path: Path) -> dict[str, Any]:
  """Return the arrays of a file by name: `FileRows` where possible, and None for those that are not used."""
  check_readable(path)
  try:
    path.open("rb").close()
  except OSError as error:
    raise OSError(f"cannot read {path}: {error.strerror or error}") from error
  try:
    check_sizes(path)
    arrays: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive, np.load(path) as loaded:
      for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        rows = _rows_in_file(path, archive, member) if name in (*EXAMPLES, *POSTERIOR) else None
        arrays[name] = loaded[name] if rows is None and name in (*EXAMPLES, *OTHERS) else rows
    arrays.pop("settings", None)
    return arrays
  except Exception as error:  # A damaged archive can raise any kind of exception.
    # NumPy's message recommends an option that would run code of the file.
    reason = "it contains pickled objects, which are not read" if "pickle" in str(error) else error
    raise ValueError(f"{path} is not a valid .npz file ({reason})") from error


def _rows_in_file(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> FileRows | None:
  """Return an array whose rows can be read from the file, or None if it cannot be read so."""
  if member.compress_type != zipfile.ZIP_STORED:
    return None
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read_header(file)
    header_size = file.tell()
  if len(shape) < 3 or is_fortran or dtype.hasobject:
    return None
  with open(path, "rb") as opened:
    opened.seek(member.header_offset)
    signature, name_size, extra_size = LOCAL_HEADER.unpack(opened.read(LOCAL_HEADER.size))
  if signature != b"PK\3\4":
    raise ValueError(f"there is no {member.filename} where its list of contents says")
  return FileRows(path, member.header_offset + LOCAL_HEADER.size + name_size + extra_size + header_size, shape, dtype)


def _images(name: str, rows: np.ndarray | FileRows) -> Any:
  """Return the function that reads an image.

  Raises:
    ValueError: if the array does not contain images.
  """
  is_shaped = len(rows.shape) == 3 or (len(rows.shape) == 4 and rows.shape[3] in (1, 3))
  if rows.dtype != np.uint8 or not is_shaped or 0 in rows.shape:
    remedy = ""
    if rows.dtype.kind == "f":
      remedy = (
        ". Make pixels of floats in [-1, 1] with jaxguide.data.to_uint8. Floats of an autoencoder are latents: save "
        "them under that name, np.savez(FILE, latents=array, labels=labels)"
      )
    elif len(rows.shape) == 4 and rows.shape[1] in (1, 3):
      remedy = ". Move its channels to the last axis"
    raise ValueError(
      f"{name} must be uint8 of shape (images, height, width, channels) with 1 or 3 channels, or without that axis, "
      f"got {rows.dtype} of shape {rows.shape}{remedy}"
    )
  return rows.__getitem__


def _latents(rows: np.ndarray | FileRows, shift: Any, scale: Any, parts: Mapping[str, Any]) -> Any:
  """Return the function that reads a latent.

  Raises:
    ValueError: if the array is not latents, or the shift, the scale or another array does not belong to them.
  """
  if rows.dtype.kind != "f" or len(rows.shape) != 4 or 0 in rows.shape:
    raise ValueError(
      "latents must be floats of shape (examples, height, width, channels) with no axis of size 0, "
      f"got {rows.dtype} of shape {rows.shape}"
    )
  channels = rows.shape[3]
  factors = []
  for name, value, default in (("shift", shift, 0), ("scale", scale, 1)):
    array = np.asarray(default if value is None else value)
    is_valid = array.dtype.kind in "fiu" and array.shape in ((), (1,), (channels,)) and np.isfinite(array).all()
    if not is_valid or (name == "scale" and (array == 0).any()):
      raise ValueError(
        f"{name} must be one finite number, or one for each of the {channels} channels"
        f"{', and not 0' if name == 'scale' else ''}, got {array.dtype} of shape {array.shape}: {array}"
      )
    factors.append(array.astype(np.float64))
  for name, array in parts.items():
    if array.dtype.kind != "f" or array.shape != rows.shape:
      raise ValueError(f"{name} must be floats of the shape of latents, {rows.shape}, got {array.dtype} {array.shape}")
  if "flipped_std" in parts and "flipped" not in parts:
    raise ValueError("flipped_std needs the array flipped")
  if "flipped" in parts and ("std" in parts) != ("flipped_std" in parts):
    raise ValueError("std and flipped_std belong together: leave out both, or give both")
  means = [rows, *([parts["flipped"]] if "flipped" in parts else [])]
  deviations = [parts[name] for name in ("std", "flipped_std") if name in parts]
  return functools.partial(_read_latent, means, deviations, factors[0], factors[1])


def _read_latent(means: Any, deviations: Any, shift: np.ndarray, scale: np.ndarray, row: int) -> np.ndarray:
  """Return a latent (h, w, c); or, if it is drawn when it is read, what it is drawn from: (variants, moments, ...)."""
  found = [((rows[row] - shift) * scale).astype(np.float32) for rows in means]
  if len(means) == 1 and not deviations:
    return found[0]
  moments = [found, *([[(rows[row] * scale).astype(np.float32) for rows in deviations]] if deviations else [])]
  return np.stack([np.stack(moment) for moment in moments], axis=1)


def _labels(labels: Any, class_names: Any, names: Sequence[str]) -> tuple[Any, Any, int | None]:
  """Return labels, class names and the number of classes.

  Raises:
    ValueError: if they do not fit.
  """
  if class_names is not None:
    class_names = np.asarray(class_names)
    if class_names.ndim != 1 or class_names.dtype.kind != "U" or labels is None:
      problem = "there are no labels" if labels is None else f"got {class_names.dtype} of shape {class_names.shape}"
      raise ValueError(f"class_names must be texts, one for each class of the labels, but {problem}")
  if labels is None:
    return None, None, None
  number = len(names)
  if labels.shape[:1] != (number,):
    raise ValueError(f"it has {number} examples, and labels of shape {labels.shape}: give one label for each")
  if labels.dtype.kind in "iub" and labels.shape[1:] == (1,):
    raise ValueError(
      f"labels are whole numbers of shape {labels.shape}: make them ({number},) if they are classes, or floats if "
      "they are vectors"
    )
  if labels.dtype.kind == "U" and labels.ndim == 1 and class_names is None:
    class_names, labels = np.unique(labels, return_inverse=True)
  return describe_labels(labels, names, None if class_names is None else class_names.tolist())
