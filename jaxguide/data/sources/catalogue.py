"""Datasets by name: ``digits``, which needs no download, and the TFDS catalogue.

TensorFlow is needed only to prepare catalogue datasets whose images TFDS has to encode first, such as MNIST and
CIFAR-10. To read them once they are prepared, TensorFlow is not needed.
"""

import contextlib
import difflib
import functools
import io
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import replacing
from jaxguide.data.images import Images
from jaxguide.data.records import BadRecord, OncePerProcess, Records, Unreadable, stamp, state_of
from jaxguide.data.sources.rows import Joined, Numbered, spread

DIGITS = "digits"

LARGEST_IN_MEMORY = 2**30
"""The bytes of images up to which `open_catalogue` reads a dataset into memory."""


def load(name: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None) -> Images:
  """Read one split of ``digits`` or of a dataset of the TFDS catalogue; see `jaxguide.data.load`."""
  builder = _open(name, data_dir)
  num_classes = _num_classes(name, builder.info.features)
  _require_one_size(name, builder.info.features["image"])
  builder = _prepared(name, split, builder, data_dir)
  try:
    examples = list(builder.as_data_source(split))
  except (RuntimeError, OSError) as error:
    raise OSError(_damaged(name, builder.data_path, error)) from error
  return Images(
    images=np.stack([example["image"] for example in examples]),
    labels=np.array([example["label"] for example in examples], np.int32),
    num_classes=num_classes,
    name=name,
    class_names=_class_names(builder.info.features["label"]),
  )


def open_catalogue(name: str, split: str, data_dir: str | os.PathLike[str] | None) -> Records | Images:
  """Return one split of a dataset of the TFDS catalogue, in memory if it is small.

  Images of one size with at most 1 GiB in total are read into memory. Others are read when they are needed, and may
  have any size. The labels are then read once, and kept in the cache folder. A record's stamp is a hash of the names
  of the dataset, its version and the file, of the file's size, and of the row: TFDS gives other data another version.

  Raises:
    ValueError, OSError, ImportError: as `jaxguide.data.load` does.
  """
  builder = _open(name, data_dir)
  features = builder.info.features
  num_classes = _num_classes(name, features)
  builder = _prepared(name, split, builder, data_dir)
  info, shape = builder.info.splits[split], features["image"].shape
  if None not in shape and info.num_examples * math.prod(shape) <= LARGEST_IN_MEMORY:
    return load(name, split, data_dir)
  paths = [(Path(part.filename), part.take) for part in info.file_instructions]
  try:
    statuses = [path.stat() for path, _ in paths]
    source = _encoded(builder, split)
    facts = [(path.name, status.st_size) for (path, _), status in zip(paths, statuses, strict=True)]
    common = [stamp(name, str(builder.version), *each) for each in facts]
    labels = _labels(source, str(stamp(split, *common)))
  except (RuntimeError, OSError) as error:
    raise OSError(_damaged(name, builder.data_path, error)) from error

  return Records(
    name,
    Joined([Numbered(f"{path.name} row ", number) for path, number in paths]),
    labels,
    _class_names(features["label"]),
    num_classes,
    functools.partial(_read_image, OncePerProcess(_encoded, builder, split)),
    np.concatenate([spread(each, number) for each, (_, number) in zip(common, paths, strict=True)]),
    state=state_of(statuses),
  )


def _read_image(source: OncePerProcess, row: int) -> bytes | np.ndarray:
  try:
    return source()[row]["image"]
  except OSError as error:
    raise Unreadable(f"it cannot be read ({_line(error)})") from error
  except RuntimeError as error:
    raise BadRecord(f"it is damaged ({_line(error)})") from error


def _encoded(builder: Any, split: str) -> Any:
  """Return the examples of a split, with encoded images where they are stored so."""
  import tensorflow_datasets as tfds

  is_encoded = isinstance(builder.info.features["image"], tfds.features.Image)
  return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()} if is_encoded else None)


def _labels(source: Any, key: str) -> np.ndarray:
  """Return the labels of all examples. They are read once and kept in the cache folder."""
  from jaxguide.data.config import cache_folder

  path = cache_folder() / "labels" / f"{key}.npy"
  with contextlib.suppress(OSError, ValueError, EOFError):
    labels = np.load(path)
    if labels.shape == (len(source),) and labels.dtype == np.int32:
      return labels
  labels = np.array([source[row]["label"] for row in range(len(source))], np.int32)
  with contextlib.suppress(OSError), replacing(path) as file:  # If they cannot be kept, they are read again next time.
    np.save(file, labels)
  return labels


def _prepared(name: str, split: str, builder: Any, data_dir: str | os.PathLike[str] | None) -> Any:
  """Prepare a dataset if needed, and return its builder."""
  if not builder.data_path.exists():
    _prepare(name, builder)
    builder = _open(name, data_dir)
  if not builder.info.splits:
    raise OSError(_damaged(name, builder.data_path, "it lists no splits"))
  checks.lookup("split", split, builder.info.splits)
  return builder


def _open(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
  """Return the TFDS builder of a dataset."""
  import tensorflow_datasets as tfds
  from google.protobuf.json_format import ParseError

  from jaxguide.data.sources.digits import JaxguideDigits

  directory = None if data_dir is None else os.path.expanduser(data_dir)
  try:
    if name == DIGITS:
      return JaxguideDigits(data_dir=directory)
    return tfds.builder(name, data_dir=directory)
  except tfds.core.DatasetNotFoundError:
    known = [DIGITS, *tfds.list_builders(with_community_datasets=False)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise ValueError(
      f"unknown dataset {name!r}: did you mean {near!r}? There are {DIGITS!r} and the TFDS "
      "catalogue, https://www.tensorflow.org/datasets/catalog"
    ) from None
  except ParseError as error:
    raise OSError(_damaged(name, directory or tfds.core.constants.DATA_DIR, error)) from error
  except ImportError as error:
    raise ImportError(_missing(name, error)) from error
  except (ValueError, AssertionError) as error:
    raise ValueError(f"TFDS cannot open dataset {name!r}: {_line(error)}") from error


def _num_classes(name: str, features: Any) -> int:
  """Check that the features are labelled images, and return the number of classes."""
  import tensorflow_datasets as tfds

  names = list(features.keys()) if isinstance(features, tfds.features.FeaturesDict) else []
  if not {"image", "label"} <= set(names):
    raise ValueError(f"dataset {name!r} must have the features image and label; it has {', '.join(names)}")
  image, label = features["image"], features["label"]
  if not isinstance(label, tfds.features.ClassLabel) or label.num_classes is None:
    raise ValueError(f"dataset {name!r} must have a class as its label; its label is {label}")
  if image.np_dtype != np.uint8 or len(image.shape) != 3:
    raise ValueError(f"dataset {name!r} must have uint8 images; its image feature is {image}")
  return label.num_classes


def _require_one_size(name: str, image: Any) -> None:
  if None in image.shape:
    raise ValueError(
      f"dataset {name!r} must have uint8 images of one size; its image feature is {image}: open it with "
      f"jaxguide.data.open_data, source tfds:{name} and a size to which the images are resized"
    )


def _class_names(label: Any) -> list[str] | None:
  """Return the names of the classes of a label feature, or None if it has none."""
  names = getattr(label, "names", None)
  return list(names) if names and len(set(names)) == len(names) else None


def _prepare(name: str, builder: Any) -> None:
  """Prepare a dataset. TFDS writes to a temporary folder and renames it at the end, so it is never incomplete."""
  discarded = io.StringIO()
  # TFDS prints a download message and progress bars for every dataset. For the digits, which need no download, both are
  # discarded; for the others only the message.
  progress_bars = discarded if name == DIGITS else sys.stderr
  try:
    with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(progress_bars):
      builder.download_and_prepare(file_format="array_record")
  except ImportError as error:
    raise ImportError(_missing(name, error)) from error
  except Exception as error:  # The code of a dataset can raise any kind of exception.
    if not builder.data_path.exists():  # If it exists, another process has prepared the dataset in the meantime.
      raise OSError(
        f"cannot prepare dataset {name!r} in {builder.data_path}: {_line(error)}; check that folder and the network"
      ) from error


def _damaged(name: str, directory: Any, why: Any) -> str:
  """Return the error message for a prepared dataset that cannot be read."""
  return (
    f"cannot read dataset {name!r} in {directory}: {_line(why)}; it is damaged or not in the "
    "array_record format, so delete that directory or give another data_dir"
  )


def _missing(name: str, error: ImportError) -> str:
  """Return the error message for a dataset that needs a library that is not installed."""
  return (
    f"dataset {name!r} needs a library that is not installed ({_line(error)}); "
    "pip install 'jaxguide[tensorflow]' installs what most of the catalogue needs"
  )


def _line(error: Any) -> str:
  """Return the first line of the original error's message. TFDS wraps errors, and its messages are pages long."""
  while getattr(error, "__cause__", None) is not None:
    error = error.__cause__
  return next(iter(str(error).strip().splitlines()), type(error).__name__)
