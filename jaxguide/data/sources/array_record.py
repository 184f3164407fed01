"""Encoded pictures in an ArrayRecord file (https://github.com/google/array_record), with labels in a JSON file."""

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import records as json_records
from jaxguide._core.files import PathLike, check_readable, replacing, write_atomically
from jaxguide.data.records import BadRecord, OncePerProcess, Records, state_of
from jaxguide.data.sources.folder import Described, describe_labels
from jaxguide.data.sources.rows import Numbered, stamps_of_rows

OPTIONS = "readahead_buffer_size:0"
"""Options of a reader of single records: nothing is read ahead."""

BUFFER = 2**15

FIELDS = ("labels", "class_names", "names")


def side_file(path: PathLike) -> Path:
  """Return the JSON file that belongs to an ArrayRecord file.

  >>> side_file("photos.array_record").name
  'photos.array_record.json'
  """
  return Path(f"{os.fspath(path)}.json")


def open_array_record(path: Path) -> Records:
  """Return the records of an ArrayRecord file. Each record is a picture, encoded as in a file of its own.

  A JSON file beside it, such as ``photos.array_record.json`` for ``photos.array_record``, may have the fields

  - ``labels``: a list with a class, or a vector of numbers, for each record;
  - ``class_names``: the names of the classes;
  - ``names``: the names of the records, for messages and for the split; all different.

  A record's stamp is a hash of the file's name, size and time and of its row. `write_array_record` writes both files.

  Raises:
    ValueError: if one of the files is damaged, or they do not fit each other.
    OSError: if one cannot be read.
  """
  check_readable(path)
  reader = OncePerProcess(_reader, path)
  if not reader().ok():
    raise ValueError(f"{path} is not a complete ArrayRecord file: write it again")
  number = reader().num_records()
  if not number:
    raise ValueError(f"{path} contains no records")
  described, names = _described(side_file(path), number)

  read = functools.partial(_read, reader)
  stamps = stamps_of_rows(path, number)
  return Records(str(path), names, *described, read, stamps, state=state_of([os.stat(path)]))


def _reader(path: Path) -> Any:
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(str(path), options=OPTIONS, file_reader_buffer_size=BUFFER)


def _read(reader: OncePerProcess, row: int) -> bytes:
  try:
    return reader().read([row])[0]  # The reader may be used by several threads.
  except RuntimeError as error:
    raise BadRecord(f"it is damaged ({next(iter(str(error).splitlines()), 'unreadable')})") from error


def _described(path: Path, number: int) -> tuple[Described, Sequence[str]]:
  """Return labels, class names and the number of classes, and the names of records, from the JSON file.

  Raises:
    ValueError: if it is damaged or does not fit.
  """
  if not path.exists():
    return (None, None, None), Numbered("record ", number)
  fields = json_records.read(path)
  try:
    unknown = sorted(fields.keys() - {*FIELDS})
    if unknown:
      raise ValueError(f"it has the unknown field {unknown[0]!r}; its fields are {', '.join(FIELDS)}")
    labels, class_names, names = (fields.get(name) for name in FIELDS)
    _check_texts("class_names", class_names)
    _check_texts("names", names)
    for name, values in (("labels", labels), ("names", names)):
      if values is not None and (not isinstance(values, list) or len(values) != number):
        length = len(values) if isinstance(values, list) else "no list of"
        raise ValueError(f"there are {number} records, and {length} {name}")
    if names is not None and len({*names}) < number:
      raise ValueError(f"names has {next(name for name in names if names.count(name) > 1)!r} twice")
    if class_names is not None and labels is None:
      raise ValueError("class_names need labels")
    names = names or Numbered("record ", number)
    return (None, None, None) if labels is None else describe_labels(labels, names, class_names), names
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def _check_texts(name: str, values: Any) -> None:
  is_texts = isinstance(values, list) and values and all(isinstance(value, str) for value in values)
  if values is not None and not is_texts:
    raise ValueError(f"{name} must be a list of texts")


def write_array_record(
  path: PathLike,
  pictures: Iterable[bytes],
  labels: Any = None,
  class_names: Sequence[str] | None = None,
  names: Sequence[str] | None = None,
) -> None:
  """Write encoded pictures as an ArrayRecord file, and what belongs to them as a JSON file beside it.

  Any source can be converted so: ``write_array_record(path, map(records.read, range(len(records))), records.labels,
  records.class_names, records.names)``. Random access is faster than in Parquet.

  Args:
    path: the file; its name ends in ``.array_record``. Missing folders are created.
    pictures: the bytes of each picture, as in a file of its own (JPEG, PNG, ...). They are written as they come.
    labels: (n,) whole numbers, or (n, d) numbers, or None.
    class_names: the names of the classes, or None.
    names: the names of the pictures, all different, or None.

  Raises:
    ValueError: if there are no pictures, there is not one label and one name for each, or the file's name has another
      ending.
    TypeError: if a picture is not bytes.
    OSError: if ``path`` cannot be written.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = Path(folder, "photos.array_record")
  ...   write_array_record(path, [b"first", b"second"], [1, 0], ["cat", "dog"])
  ...   records = open_array_record(path)
  >>> len(records), records.labels.tolist(), records.class_names
  (2, [1, 0], ['cat', 'dog'])
  """
  from array_record.python import array_record_module

  path = Path(path)
  if path.suffix != ".array_record":
    raise ValueError(f"the name of an ArrayRecord file must end in .array_record, got {path.name}")
  values = (None if labels is None else np.asarray(labels).tolist(), class_names, names)
  fields = {name: list(value) for name, value in zip(FIELDS, values, strict=True) if value is not None}
  described = json.dumps(fields).encode()
  if len(described) > json_records.LARGEST:
    raise ValueError(f"the labels and names take {len(described):,} bytes; at most {json_records.LARGEST:,} are read")
  with replacing(path) as file:
    part = file.name  # The writer opens it by its name.
    writer = array_record_module.ArrayRecordWriter(part, "group_size:1")
    number = 0
    try:
      for picture in pictures:
        if not isinstance(picture, bytes):
          raise TypeError(f"picture {number} must be the bytes of an encoded picture, got {type(picture).__name__}")
        writer.write(picture)
        number += 1
    finally:
      writer.close()
    if not number:
      raise ValueError("there are no pictures to write")
    for name in ("labels", "names"):
      if name in fields and len(fields[name]) != number:
        raise ValueError(f"there are {number} pictures, and {len(fields[name])} {name}")
    if fields:
      write_atomically(side_file(path), described)
    else:
      with contextlib.suppress(FileNotFoundError):
        os.remove(side_file(path))
