"""Pictures in Parquet files, as Hugging Face's datasets are stored."""

import difflib
import functools
import importlib.util
import json
import os
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core.files import check_readable
from jaxguide.data.records import BadRecord, OncePerProcess, Records, Unreadable, shown, state_of
from jaxguide.data.sources.folder import Described, describe_labels
from jaxguide.data.sources.rows import Joined, Numbered, part_of, stamps_of_rows

CACHE = 2**28
"""The bytes of encoded pictures that are kept in memory: 256 MiB."""

LOADS = 4
"""The number of row groups that are read at the same time."""

SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(-.*)?\.parquet")
"""The name of a part of a split in Hugging Face's datasets, such as ``train-00000-of-00002.parquet``."""


def open_parquet(
  path: Path, image_column: str = "image", label_column: str | None = "label", split: str = "train"
) -> Records:
  """Return the records of a Parquet file, or of a folder of Parquet files.

  In a folder, the files are those in it, or in its sub-folder ``data``. If they have names such as
  ``train-00000-of-00002.parquet``, those of the split are taken.

  The column of pictures holds their bytes, encoded as in files of their own: ``{bytes, path}``, as Hugging Face stores
  them (the path is not followed), or plain binary. The column of labels holds whole numbers, whose names are taken from
  the feature ``ClassLabel`` if the file has it; texts, whose names are sorted; or lists of numbers, all of one length.
  A record's stamp is a hash of its file's name, size and time and of its row.

  Labels are read at once, and pictures when they are needed, by row groups. Row groups of 256 MiB in total are kept.
  From a larger dataset, each picture in random order costs the reading of a row group: a warning says so.

  Args:
    path: the file or the folder.
    image_column: the column of the pictures.
    label_column: the column of the labels; None to leave them out.
    split: the split, such as ``train``, if the names of the files have one.

  Raises:
    ValueError: if a file is damaged, or a column is missing or of another type.
    OSError: if a file cannot be read.
    ImportError: if pyarrow is not installed.
  """
  if importlib.util.find_spec("pyarrow") is None:
    raise ImportError(f"{path} needs pyarrow: pip install 'jaxguide[parquet]'")
  paths = _paths(path, split)
  tables = [_Table(file, image_column, label_column) for file in paths]
  if not sum(len(table) for table in tables):
    raise ValueError(f"{path} contains no rows")
  names = Joined([Numbered(f"{table.path.name} row ", len(table)) for table in tables])
  described: Described = (None, None, None)
  if label_column is not None:
    described = _labels(tables, label_column, names)
  groups = OncePerProcess(_Groups, tables)
  starts = np.cumsum([0, *(len(table) for table in tables)])

  read = functools.partial(_read, groups, starts)
  stamps = np.concatenate([stamps_of_rows(table.path, len(table)) for table in tables])
  groups().warn_if_slow(path)
  state = state_of(os.stat(table.path) for table in tables)
  return Records(str(path), names, *described, read, stamps, state=state)


def _read(groups: OncePerProcess, starts: np.ndarray, row: int) -> bytes:
  table = part_of(starts, row)
  return groups().read(table, row - int(starts[table]))


def _paths(path: Path, split: str) -> list[Path]:
  """Return the files of a split.

  Raises:
    ValueError: if there are files of other splits alone, or a file of the split is missing.
  """
  if not path.is_dir():
    return [path]
  paths = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
  if not paths:
    raise ValueError(f"{path} contains no .parquet files")
  matches = [SHARD.fullmatch(file.name) for file in paths]
  splits = {match[1] if match else None for match in matches}
  if splits == {None}:
    return paths
  if split not in splits:
    known = ", ".join(sorted(name for name in splits if name))
    raise ValueError(f"{path} has no files of the split {split!r}; it has {known}")
  chosen = {file: match for file, match in zip(paths, matches, strict=True) if match and match[1] == split}
  for number in {int(match[3]) for match in chosen.values()}:
    missing = sorted({*range(number)} - {int(match[2]) for match in chosen.values() if int(match[3]) == number})
    if missing:
      names = ", ".join(f"{split}-{index:05}-of-{number:05}.parquet" for index in missing[:3])
      raise ValueError(
        f"{path} lacks {len(missing)} of the {number} files of the split {split!r}: {names}"
        f"{', ...' if len(missing) > 3 else ''}. Add them, or give one file alone as the source"
      )
  return [*chosen]


class _Table:
  """A Parquet file: its metadata, and the row groups in it."""

  def __init__(self, path: Path, image_column: str, label_column: str | None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    check_readable(path)
    self.path = path
    try:
      with pq.ParquetFile(path) as file:
        self.metadata, self.schema = file.metadata, file.schema_arrow
    except (pa.ArrowException, OSError) as error:
      if isinstance(error, FileNotFoundError | PermissionError):
        raise
      raise ValueError(f"{path} is not a complete Parquet file ({_line(error)})") from error
    for option, name in (("image_column", image_column), ("label_column", label_column)):
      if name is not None and self.schema.names.count(name) > 1:
        raise ValueError(f"{path} has several columns {name!r}: rename them, or give another one as {option}")
      if name is not None and name not in self.schema.names:
        near = difflib.get_close_matches(name, self.schema.names, n=1)
        hint = f": did you mean {near[0]!r}?" if near else "."
        without = "" if option == "image_column" else ", or labels none to train without labels"
        names = shown(", ".join(self.schema.names))
        raise ValueError(f"{path} has no column {name!r}{hint} It has {names}; give one as {option}{without}")
    self.leaf = _bytes_of(path, image_column, self.schema.field(image_column).type)
    self.is_plain = self.leaf == image_column
    groups = [self.metadata.row_group(group) for group in range(self.metadata.num_row_groups)]
    self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    self.size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == self.leaf)

  def __len__(self) -> int:
    return int(self.starts[-1])

  def column(self, name: str, group: int | None = None) -> Any:
    """Return a column, or a row group of it, as a chunked array."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
      with pq.ParquetFile(self.path, metadata=self.metadata) as file:
        table = file.read([name]) if group is None else file.read_row_group(group, [name])
    except (pa.ArrowException, OSError) as error:
      raise ValueError(f"{self.path} is damaged ({_line(error)})") from error
    return table.column(0)

  def pictures(self, group: int) -> Any:
    """Return the bytes of the pictures in a row group, as a chunked array."""
    column = self.column(self.leaf, group)
    # Of {bytes, path}, only the bytes were read.
    return column if self.is_plain else column.flatten()[0]


def _line(error: Exception) -> str:
  return next(iter(str(error).splitlines()), type(error).__name__)


def _bytes_of(path: Path, name: str, kind: Any) -> str:
  """Return the path of the bytes in a column of pictures.

  Raises:
    ValueError: if the column holds something else.
  """
  import pyarrow as pa

  def is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

  if is_bytes(kind):
    return name
  if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type):
    return f"{name}.bytes"
  raise ValueError(f"{path}: column {name!r} must hold encoded pictures, as bytes or {{bytes, path}}, got {kind}")


def _labels(tables: Sequence[_Table], name: str, rows: Sequence[str]) -> Described:
  """Return labels, class names and the number of classes of all files.

  Raises:
    ValueError: if they are not labels, or the names of classes differ between files.
  """
  class_names = _class_names(tables[0], name)
  for table in tables[1:]:
    if _class_names(table, name) != class_names:
      raise ValueError(f"{tables[0].path} and {table.path} have other names for the classes of {name!r}")
  values: list[np.ndarray] = []
  for table in tables:
    column = table.column(name)
    if column.null_count:
      row = next(row for row, value in enumerate(column) if not value.is_valid)
      raise ValueError(f"{table.path}: row {row} has no {name!r}, and {column.null_count - 1} others have none")
    try:
      values.append(_array(column))
    except ValueError as error:
      raise ValueError(f"{table.path}: column {name!r} {error}") from error
  for table, array in zip(tables, values, strict=True):
    if _kind(array) != _kind(values[0]):
      kinds = f"{_kind(values[0])} in {tables[0].path} and {_kind(array)} in {table.path}"
      raise ValueError(f"column {name!r} has {kinds}: give all files labels of one kind")
  try:
    labels = np.concatenate(values)
    if labels.dtype.kind in "OU":
      found, labels = np.unique(labels.astype(str), return_inverse=True)
      class_names = found.tolist()
    return describe_labels(labels, rows, class_names)
  except ValueError as error:
    raise ValueError(f"{tables[0].path}: column {name!r}: {error}") from error


def _kind(labels: np.ndarray) -> str:
  """Return what labels are, in words."""
  if labels.ndim > 1:
    return f"lists of {labels.shape[1]} numbers"
  return "texts" if labels.dtype.kind in "OU" else "whole numbers"


def _array(column: Any) -> np.ndarray:
  """Convert a column of labels to an array: whole numbers, texts, or vectors.

  Raises:
    ValueError: if it holds something else.
  """
  import pyarrow as pa

  kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
  column = column.cast(kind)
  if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
    values = column.to_numpy()
    return values if values.dtype == np.uint64 else values.astype(np.int64)
  if pa.types.is_string(kind) or pa.types.is_large_string(kind):
    return column.to_numpy().astype(str)
  is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
  if is_list and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)):
    rows = column.to_pylist()
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or any(value is None for row in rows for value in row):
      raise ValueError("must hold lists of one length without missing numbers")
    return np.array(rows, np.float64)
  raise ValueError(f"must hold whole numbers, texts, or lists of numbers, got {kind}")


def _class_names(table: _Table, name: str) -> list[str] | None:
  """Return the names of a feature ``ClassLabel`` from Hugging Face's description in the file, or None."""
  try:
    described = json.loads((table.schema.metadata or {})[b"huggingface"])
    feature = described["info"]["features"][name]
    names = feature["names"]
  except (KeyError, TypeError, ValueError):
    return None
  is_names = isinstance(names, list) and names and all(isinstance(each, str) for each in names)
  return names if is_names and len({*names}) == len(names) else None


class _Groups:
  """Row groups of pictures, of which the last ones used stay in memory."""

  def __init__(self, tables: Sequence[_Table]):
    self.tables = tables
    self.kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
    self.size = 0
    self.lock = threading.Lock()
    # A row group is read by one thread, while others that need it wait; and few are read at the same time.
    self.loading = [threading.Lock() for _ in range(LOADS)]

  def read(self, table: int, row: int) -> bytes:
    """Return the bytes of a picture."""
    group = part_of(self.tables[table].starts, row)
    content = self._group(table, group)[row - int(self.tables[table].starts[group])].as_py()
    if content is None:
      raise BadRecord("the picture's bytes are not in the file")
    return content

  def _group(self, table: int, group: int) -> Any:
    key = table, group
    column = self._kept(key)
    if column is not None:
      return column
    with self.loading[hash(key) % LOADS]:
      column = self._kept(key)  # Another thread may have read it in the meantime.
      if column is None:
        try:
          column = self.tables[table].pictures(group)
        except ValueError as error:
          kind = Unreadable if isinstance(error.__cause__, OSError) else BadRecord
          raise kind(str(error)) from error
        self._keep(key, column)
    return column

  def _kept(self, key: tuple[int, int]) -> Any:
    with self.lock:
      if key in self.kept:
        self.kept.move_to_end(key)
      return self.kept.get(key)

  def _keep(self, key: tuple[int, int], column: Any) -> None:
    with self.lock:
      self.kept[key] = column
      self.size += column.nbytes
      while self.size > CACHE and len(self.kept) > 1:
        self.size -= self.kept.popitem(last=False)[1].nbytes

  def warn_if_slow(self, path: Path) -> None:
    """Warn if the pictures do not fit into memory, and a row group has many of them."""
    total, groups = sum(table.size for table in self.tables), sum(len(table.starts) - 1 for table in self.tables)
    rows = sum(len(table) for table in self.tables)
    if total > CACHE and rows > groups:
      warnings.warn(
        f"{path} has {total / 1e9:.1f} GB in row groups of {rows // groups} pictures, and in random order each picture "
        f"takes the reading of {total / groups / 1e6:.1f} MB: convert it with jaxguide.data.write_array_record, or "
        "keep the decoded pictures in memory with cache",
        stacklevel=5,
      )
