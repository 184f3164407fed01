"""Sources of data sets, by name.

A source is one function and one entry in `SOURCES`. The name of a data set is ``SOURCE:NAME``, such as ``tfds:mnist``,
or the source alone if it has one data set, such as ``animals``. Another name without a source is one of the TFDS
catalogue, or ``digits``.
"""

import difflib
import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxguide.data.images import Images
from jaxguide.data.records import Records
from jaxguide.data.sources import animals, catalogue, folder

SOURCES: dict[str, Callable[[str, str, str | os.PathLike[str] | None], Images]] = {
  "tfds": catalogue.load,
  animals.NAME: animals.load,
}
"""``(name, split, data_dir) -> Images``, by the name of the source. The name is empty if the source stands alone."""

NAMED: dict[str, tuple[str, ...]] = {catalogue.DIGITS: ("split", "data_dir"), animals.NAME: ("split",)}
"""The data sets whose name is one word, with the settings that each has."""


def load(name: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None) -> Images:
  """Read one split of a data set into memory. The data set is prepared on first use.

  Args:
    name: ``"digits"``; ``"animals"``; or a data set of the TFDS catalogue with the features ``image`` and ``label``,
      such as ``"mnist"`` or ``"tfds:mnist"``; or ``SOURCE:NAME`` of another source in `SOURCES`.
    split: a split of the data set, such as ``"train"`` or ``"test"``.
    data_dir: the folder of prepared data sets. Default: TFDS's own, ``TFDS_DATA_DIR`` or ``~/tensorflow_datasets``.

  Raises:
    ValueError: if there is no such data set or split, or it does not contain labelled images of one size.
    OSError: if the data set cannot be downloaded, written or read.
    ImportError: if the preparation needs a library that is not installed.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   digits = load("digits", "test", folder)
  >>> len(digits), digits.image_shape, digits.num_classes
  (360, (8, 8, 1), 10)
  """
  source, colon, rest = name.partition(":")
  if source in SOURCES and (colon or name in NAMED):
    return SOURCES[source](rest, split, data_dir)
  return catalogue.load(name, split, data_dir)  # A colon is also how TFDS names a version, as in mnist:3.0.1.


SPECIAL = {"split": "train", "data_dir": None, "image_column": "image", "label_column": "label"}
"""The settings that some sources have, with their defaults."""

FILES: dict[str, tuple[str, str]] = {
  ".zip": ("archive", "open_archive"),
  ".npz": ("arrays", "open_arrays"),
  ".array_record": ("array_record", "open_array_record"),
  ".parquet": ("parquet", "open_parquet"),
}
"""The module and the function that opens a file, by the file's ending."""


def open_source(config: Any) -> Records | Images:
  """Open the source of a `jaxguide.data.DataConfig`.

  Raises:
    FileNotFoundError: if there is no such file or folder.
    ValueError: if the source is unknown, or cannot be read.
  """
  name = config.source
  source, colon, rest = name.partition(":")
  if name in NAMED:
    _check_used(config, NAMED[name])
    return load(name, config.split, config.data_dir)
  if not Path(name).expanduser().exists():
    _check_used(config, ("split", "data_dir"))
  if colon and SOURCES.get(source) is catalogue.load:
    return catalogue.open_catalogue(rest, config.split, config.data_dir)
  if colon and source in SOURCES:
    return SOURCES[source](rest, config.split, config.data_dir)
  path = Path(name).expanduser()
  _check_encoding(name)
  if not path.exists():
    near = difflib.get_close_matches(name, NAMED, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(
      f"there is no file or folder {name}: {hint}give a folder of pictures, a file that ends in "
      f"{', '.join(FILES)}, {', '.join(NAMED)}, or tfds:NAME for a data set of TFDS"
    )
  is_parquet = path.suffix.lower() == ".parquet"
  if path.is_dir():
    is_parquet = any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))
  _check_used(config, ("split", "image_column", "label_column") if is_parquet else ())
  if path.is_dir():
    return _open(".parquet", path, config) if is_parquet else folder.open_folder(path, config.labels != "none")
  if path.suffix.lower() not in FILES:
    raise ValueError(f"{path} is not a file of data; their names end in {', '.join(FILES)}")
  return _open(path.suffix.lower(), path, config)


def _check_used(config: Any, used: Sequence[str]) -> None:
  """Check that no setting is given that this source does not have."""
  for name, default in SPECIAL.items():
    if name not in used and getattr(config, name) != default:
      raise ValueError(f"{name} is not a setting for {config.source}: leave it out")


def _check_encoding(name: str) -> None:
  try:
    name.encode()
  except UnicodeEncodeError:
    raise ValueError(f"the path {name!a} is not UTF-8 and cannot be stored: rename it") from None


def _open(ending: str, path: Path, config: Any) -> Records:
  module, function = FILES[ending]
  is_labelled = config.labels != "none"
  columns = config.image_column, config.label_column if is_labelled else None, config.split
  options = {".zip": (is_labelled,), ".parquet": columns}.get(ending, ())
  return getattr(importlib.import_module(f"jaxguide.data.sources.{module}"), function)(path, *options)
