"""A folder of pictures: a sub-folder for each class, or pictures alone."""

import functools
import hashlib
import json
import os
import reprlib
import stat
import warnings
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxguide.data.dataset import MOST_CLASSES
from jaxguide.data.records import BadRecord, Records, Unreadable, facts_of, shown, stamp

ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")

DATASET_JSON = "dataset.json"
"""EDM's file of labels: ``{"labels": [["00000/img00000000.png", 6], ...]}``, or ``{"labels": null}``."""

LARGEST_FILE = 2**28
"""The largest file of a picture in bytes."""

SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev"})
"""Names of folders that contain a split of the data, and not a class."""


def is_hidden(name: str) -> bool:
  """Whether a file or folder is one that systems leave behind, such as ``.DS_Store``."""
  return name.startswith(".") or name in HIDDEN


def is_picture(name: str) -> bool:
  """Whether a file's name has the ending of a picture."""
  return name.lower().endswith(ENDINGS)


def normal(name: Any) -> str:
  """Return the name of a file without empty parts and dots.

  >>> normal("./a//1.png")
  'a/1.png'
  """
  if not isinstance(name, str):
    raise ValueError(f"{name!r} is not the name of a picture")
  return str(PurePosixPath(name)) if "./" in name or "//" in name else name


def open_folder(path: Path, is_labelled: bool = True) -> Records:
  """Return the records of a folder.

  Each sub-folder with pictures is a class, with the name of the sub-folder; deeper folders belong to it. Without
  sub-folders there are no classes. A file ``dataset.json`` has the labels instead, as in EDM's datasets. Hidden files
  and folders are passed over; other files that are no pictures are left out with a warning.

  Args:
    path: the folder.
    is_labelled: whether the pictures get labels. If not, they may stand anywhere in the folder.

  Raises:
    ValueError: if there are no pictures; or with labels, if some stand beside folders of pictures, or the sub-folders
      are splits, such as ``train`` and ``test``.
  """
  names: list[str] = []
  stamps: list[int] = []
  state = hashlib.sha256()
  bad: dict[int, str] = {}
  others: list[str] = []
  root = path.resolve()
  for name, entry in _files(path):
    if not is_picture(name):
      if name != DATASET_JSON:
        others.append(name)
      continue
    reason, status = _checked(entry, root)
    if reason is not None:
      bad[len(names)] = reason
    names.append(name)
    stamps.append(stamp(name, status.st_size, status.st_mtime_ns))
    state.update(facts_of(status))
  if others:
    warn_of_others(path, others)
  if not names:
    raise ValueError(f"{path} contains no pictures; their names end in {', '.join(ENDINGS)}")
  labels = path / DATASET_JSON
  described: Described = (None, None, None)
  if is_labelled and os.path.lexists(labels):
    if not labels.is_file():
      raise ValueError(f"{labels} is not a regular file: give the labels in one, or remove it")
    described = labelled_by_json(path, names, stamps, bad, labels.read_bytes())
  elif is_labelled:
    described = labelled_by_folder(path, names)
    _warn_of_empty(path, described[1] or ())

  read = functools.partial(_read, os.path.join(path, ""), names)
  return Records(str(path), names, *described, read, np.array(stamps, np.uint64), bad, state.hexdigest())


def _read(folder: str, names: Sequence[str], row: int) -> bytes:
  try:
    # Without a limit in `read`, for which Python would allocate memory; and without a buffer, which copies.
    with open(folder + names[row], "rb", buffering=0) as file:
      if os.fstat(file.fileno()).st_size > LARGEST_FILE:
        raise BadRecord(f"it is larger than {LARGEST_FILE:,} bytes")
      return file.readall()
  except OSError as error:
    raise Unreadable(f"it cannot be read ({error.strerror or error})") from error


def _files(path: Path, prefix: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
  """Yield all files that are not hidden, in the order of their names, with their paths inside the folder."""
  with os.scandir(path / prefix) as entries:
    found = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
  for entry in found:
    if entry.is_dir(follow_symlinks=False):
      yield from _files(path, f"{prefix}{entry.name}/")
    elif entry.is_symlink() and os.path.isdir(entry.path):  # `entry.is_dir` raises an error for a link to itself.
      link = shown(prefix + entry.name)
      warnings.warn(f"{path}: {link} is a link to a folder, which is not followed: give that folder", stacklevel=4)
    else:
      yield prefix + entry.name, entry


def _checked(entry: os.DirEntry[str], root: Path) -> tuple[str | None, os.stat_result]:
  """Return why a file is not read, or None, and what the file system knows of it."""
  try:
    status = entry.stat()
  except OSError as error:
    return f"it cannot be read ({error.strerror or error})", entry.stat(follow_symlinks=False)
  if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
    return "it is a link out of the folder", status
  if not stat.S_ISREG(status.st_mode):
    return "it is not a regular file", status
  return None, status


def warn_of_others(path: Path, others: Sequence[str]) -> None:
  """Warn of files that are no pictures."""
  named = shown(", ".join(others[:3])) + (", ..." if len(others) > 3 else "")
  warnings.warn(f"{path} has {len(others)} files that are no pictures and are left out: {named}", stacklevel=4)


def _warn_of_empty(path: Path, classes: Sequence[str]) -> None:
  """Warn of sub-folders without pictures, which are no classes."""
  with os.scandir(path) as entries:
    folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False) and not is_hidden(entry.name)}
  empty = sorted(folders - {*classes})
  if empty:
    named = shown(", ".join(empty[:5]))
    warnings.warn(f"{path} has folders without pictures, which are no classes: {named}", stacklevel=4)


Described = tuple[np.ndarray | None, Sequence[str] | None, int | None]


def labelled_by_folder(path: Path, names: Sequence[str], bad: Container[int] = ()) -> Described:
  """Return labels, class names and the number of classes by the first folder in each record's name.

  Records that are ``bad`` are not looked at, and have the label 0.

  Raises:
    ValueError: if some records are in a folder and others are not, or the folders are splits.
  """
  folders = [name.partition("/")[0] if "/" in name else None for name in names]
  good = [row for row in range(len(names)) if row not in bad]
  outside = [names[row] for row in good if folders[row] is None]
  if len(outside) == len(good):
    return None, None, None
  if outside:
    raise ValueError(
      f"{path} has pictures beside folders of pictures, such as {shown(outside[0])}: move them into the folder of "
      "their class, or give labels none (--set data.labels=none) for a model without classes"
    )
  classes = sorted({folder for row in good if (folder := folders[row]) is not None})
  if SPLITS.issuperset(name.lower() for name in classes) and all(names[row].count("/") > 1 for row in good):
    raise ValueError(
      f"the sub-folders of {path} are {', '.join(classes)}, which are splits and no classes: give one of them, such as "
      f"{path / classes[0]}"
    )
  numbers: dict[str | None, int] = {name: number for number, name in enumerate(classes)}
  return np.array([numbers.get(folder, 0) for folder in folders], np.int32), classes, len(classes)


def labelled_by_json(path: Path, names: list[str], stamps: list[int], bad: dict[int, str], content: bytes) -> Described:
  """Return labels, class names and the number of classes by EDM's ``dataset.json``.

  Pictures that it names and that are not there are added to the names, the stamps and the bad records.

  Raises:
    ValueError: if it is damaged, names a picture with two labels, or a record has no label in it.
  """
  try:
    described = json.loads(content, object_pairs_hook=_unique)["labels"]
    if described is None:
      return None, None, None
    pairs = described.items() if isinstance(described, Mapping) else described
    pairs = [(normal(name), label) for name, label in pairs]
    table = dict(pairs)
    for name, label in pairs:
      if len(table) < len(pairs) and label != table[name]:
        raise ValueError(f"{shown(name)} has two labels, {label!r} and {table[name]!r}")
    missing = next((name for name in names if name not in table), None)
    if missing is not None:
      raise ValueError(f"{shown(missing)} has no label")
    for name in sorted(table.keys() - {*names}):
      bad[len(names)] = f"{DATASET_JSON} names it, and there is no such picture"
      names.append(name)
      stamps.append(stamp(name))
    return describe_labels([table[name] for name in names], names)
  except RecursionError:
    raise ValueError(f"{path}: {DATASET_JSON} is not a valid list of labels (it is nested too deeply)") from None
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path}: {DATASET_JSON} is not a valid list of labels ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = Counter(name for name, _ in pairs)
    raise ValueError(f"it has {names.most_common(1)[0][0]!r} twice")
  return fields


def describe_labels(labels: Any, names: Sequence[str], class_names: Sequence[str] | None = None) -> Described:
  """Return labels, class names and the number of classes, for labels that are whole numbers or vectors.

  Args:
    labels: a label for each record.
    names: the names of the records, for errors.
    class_names: the names of the classes, if they have some.

  Raises:
    ValueError: if the labels are neither, with the first wrong one and its record; or a class's name stands twice.
  """
  if class_names is not None and len({*class_names}) < len(class_names):
    name = next(name for name in class_names if class_names.count(name) > 1)
    raise ValueError(f"class_names has {name!r} twice: give each class a name of its own")
  try:
    array = np.asarray(labels)
  except ValueError:  # Vectors of several lengths.
    array = np.empty(0)
  number = MOST_CLASSES if class_names is None else len(class_names)
  if array.ndim == 1 and array.dtype.kind in "iub" and array.size and array.min() >= 0 and array.max() < number:
    return array.astype(np.int32), class_names, int(array.max()) + 1 if class_names is None else number
  if array.ndim == 2 and array.dtype.kind in "iufb" and array.size and class_names is None:
    vectors = _float32(array)
    if np.isfinite(vectors).all():
      return vectors, None, None
  row = next((row for row, label in enumerate(labels) if not _fits(label, labels[0], number)), 0)
  label = labels[row].tolist() if isinstance(labels[row], np.ndarray | np.generic) else labels[row]
  text = f"{shown(names[row])}: label {reprlib.repr(label)} is not"
  if class_names is not None:
    raise ValueError(f"{text} one of the {number} classes, a whole number from 0 to {number - 1}")
  size = f"{np.size(labels[0])} " if np.ndim(labels[0]) == 1 and np.size(labels[0]) else ""
  raise ValueError(
    f"{text} a whole number from 0 to {MOST_CLASSES - 1}, or a vector of {size}finite numbers: give each record such a "
    "label, all of one kind"
  )


def _fits(label: Any, first: Any, number: int) -> bool:
  """Whether a label is one of some number of classes, or a vector of float32 numbers, as the first label is."""
  if np.ndim(first) == 0:
    return isinstance(label, int | np.integer | np.bool_) and bool(0 <= label < number)
  array = np.asarray(label)
  is_vector = array.ndim == 1 and array.size == np.size(first) and array.size and array.dtype.kind in "iufb"
  return bool(is_vector and np.isfinite(_float32(array)).all())


def _float32(array: np.ndarray) -> np.ndarray:
  with np.errstate(over="ignore"):  # Numbers that are too large become infinite.
    return array.astype(np.float32)
