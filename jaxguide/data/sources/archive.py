"""A zip file of pictures, with a folder for each class, or with EDM's ``dataset.json``."""

import functools
import os
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from jaxguide._core.files import check_readable
from jaxguide.data.records import BadRecord, OncePerProcess, Records, Unreadable, stamp, state_of
from jaxguide.data.sources import folder

LARGEST_RATIO = 1000
"""How many times larger than in the archive a picture may be. Pictures are compressed already."""


def open_archive(path: Path, is_labelled: bool = True) -> Records:
  """Return the records of a zip file; see `jaxguide.data.sources.folder.open_folder` for what is a class.

  A single folder that contains everything is no class: archives of a folder have it.

  Args:
    path: the file.
    is_labelled: whether the pictures get labels.

  Raises:
    ValueError: if it is not a zip file, or contains no pictures, or its pictures cannot be labelled.
    OSError: if it is not a regular file.
  """
  check_readable(path)
  try:
    status = os.stat(path)
    with zipfile.ZipFile(path) as archive:
      members = [member for member in archive.infolist() if not member.is_dir()]
      described = next((member for member in members if _is_description(member)), None)
      is_large = described is not None and described.file_size > folder.LARGEST_FILE
      labels = None if described is None or is_large else archive.read(described)
  except Exception as error:  # A damaged archive raises many kinds of exceptions.
    raise ValueError(f"{path} is not a valid zip file ({error})") from error
  if described is not None and is_large:
    raise ValueError(f"{path}: {described.filename} would have {described.file_size:,} bytes, and is not read")
  members = [m for m in members if not any(map(folder.is_hidden, _parts(m)))]
  others = [m.filename for m in members if not folder.is_picture(m.filename) and m is not described]
  members = sorted((m for m in members if folder.is_picture(m.filename)), key=_name)
  if others:
    folder.warn_of_others(path, others)
  if not members:
    raise ValueError(f"{path} contains no pictures; their names end in {', '.join(folder.ENDINGS)}")
  outside = {row for row, member in enumerate(members) if _leads_out(member)}
  start = _common_folder([_name(member) for row, member in enumerate(members) if row not in outside] or [""])
  if described is not None:
    start = _name(described).removesuffix(folder.DATASET_JSON)
  names = [_name(member).removeprefix(start) for member in members]
  bad = {row: reason for row, member in enumerate(members) if (reason := _reason(member)) is not None}
  bad |= {row: "the archive has it twice" for row in range(1, len(names)) if names[row] == names[row - 1]}
  stamps = [stamp(name, member.file_size, member.CRC) for name, member in zip(names, members, strict=True)]
  read = functools.partial(_read, OncePerProcess(_Handle, path), members)
  described_by: folder.Described = (None, None, None)
  if is_labelled and labels is None:
    described_by = folder.labelled_by_folder(path, names, outside)
  elif is_labelled and labels is not None:
    described_by = folder.labelled_by_json(path, names, stamps, bad, labels)
  return Records(str(path), names, *described_by, read, np.array(stamps, np.uint64), bad, state_of([status]))


def _read(handle: OncePerProcess, members: Sequence[zipfile.ZipInfo], row: int) -> bytes:
  try:
    return handle().archive.read(members[row])
  except OSError as error:
    raise Unreadable(f"it cannot be read from the archive ({error.strerror or error})") from error
  except Exception as error:  # A damaged archive raises many kinds of exceptions.
    raise BadRecord(f"it cannot be read from the archive ({error})") from error


class _Handle(threading.local):
  """An open archive for each thread, because reading moves its position."""

  def __init__(self, path: Path):
    self.archive = zipfile.ZipFile(path)


def _is_description(member: zipfile.ZipInfo) -> bool:
  return PurePosixPath(member.filename).name == folder.DATASET_JSON and not any(map(folder.is_hidden, _parts(member)))


def _parts(member: zipfile.ZipInfo) -> tuple[str, ...]:
  return tuple(part for part in PurePosixPath(member.filename).parts if part not in ("..", "/"))


def _name(member: zipfile.ZipInfo) -> str:
  return folder.normal(member.filename)


def _leads_out(member: zipfile.ZipInfo) -> bool:
  path = PurePosixPath(member.filename)
  return path.is_absolute() or ".." in path.parts


def _common_folder(names: list[str]) -> str:
  """Return the folders that contain everything, such as ``photos/``."""
  start = ""
  while True:
    tops = {name.removeprefix(start).partition("/")[:2] for name in names}
    if len(tops) != 1 or ("", "") in tops or not next(iter(tops))[1]:
      return start
    start += "".join(tops.pop())


def _reason(member: zipfile.ZipInfo) -> str | None:
  """Return why a member is not read, or None."""
  if _leads_out(member):
    return "its path leads out of the archive"
  if member.flag_bits & 1:
    return "it is encrypted"
  if member.file_size > folder.LARGEST_FILE or member.file_size > LARGEST_RATIO * max(member.compress_size, 1):
    return f"it would have {member.file_size:,} bytes"
  return None
