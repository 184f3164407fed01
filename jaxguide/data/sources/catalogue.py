"""Labelled images in memory: the digits that need no download, and the TFDS catalogue.

Everything works without TensorFlow, except to prepare a catalogue dataset whose images TFDS has to
encode first (MNIST and CIFAR-10 are such). Once prepared, they too are read without it.
"""

import contextlib
import difflib
import io
import os
import sys
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide.data.images import Images

DIGITS = "digits"


def load(name: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None) -> Images:
  """Read one split of a dataset into memory, preparing it on first use.

  Args:
    name: ``"digits"``, or a dataset of the TFDS catalogue with the features ``image`` and
      ``label``, as ``"mnist"`` or ``"cifar10"``.
    split: a split of the dataset, as ``"train"`` or ``"test"``.
    data_dir: where prepared datasets are kept; by default where TFDS keeps them, ``TFDS_DATA_DIR``
      or ``~/tensorflow_datasets``.

  Raises:
    ValueError: if there is no such dataset or split, or it does not hold labelled images of one
      size.
    OSError: if the dataset cannot be downloaded, written or read.
    ImportError: if preparing it needs a library that is not installed.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   digits = load("digits", "test", folder)
  >>> len(digits), digits.image_shape, digits.num_classes
  (360, (8, 8, 1), 10)
  """
  builder = _open(name, data_dir)
  num_classes = _num_classes(name, builder.info.features)
  if not builder.data_path.exists():
    _prepare(name, builder)
    builder = _open(name, data_dir)
  splits = builder.info.splits
  if not splits:
    raise OSError(_damaged(name, builder.data_path, "it lists no splits"))
  checks.lookup("split", split, splits)
  try:
    examples = list(builder.as_data_source(split))
  except (RuntimeError, OSError) as error:
    raise OSError(_damaged(name, builder.data_path, error)) from error
  return Images(
    images=np.stack([example["image"] for example in examples]),
    labels=np.array([example["label"] for example in examples], np.int32),
    num_classes=num_classes,
    name=name,
  )


def _open(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
  """Give the TFDS builder of a dataset."""
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
  """Give the number of classes, once it is clear that these are labelled images of one size."""
  import tensorflow_datasets as tfds

  names = list(features.keys()) if isinstance(features, tfds.features.FeaturesDict) else []
  if not {"image", "label"} <= set(names):
    raise ValueError(f"dataset {name!r} must have the features image and label; it has {', '.join(names)}")
  image, label = features["image"], features["label"]
  if not isinstance(label, tfds.features.ClassLabel) or label.num_classes is None:
    raise ValueError(f"dataset {name!r} must have a class as its label; it has {label}")
  if image.np_dtype != np.uint8 or len(image.shape) != 3 or None in image.shape:
    raise ValueError(f"dataset {name!r} must have uint8 images of one size; it has {image}")
  return label.num_classes


def _prepare(name: str, builder: Any) -> None:
  """Prepare a dataset. TFDS works in a folder aside and renames it, so it is there whole or not."""
  quiet = io.StringIO()
  # TFDS announces every dataset as a download; its progress bars are worth having for those that are.
  bars = quiet if name == DIGITS else sys.stderr
  try:
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(bars):
      builder.download_and_prepare(file_format="array_record")
  except ImportError as error:
    raise ImportError(_missing(name, error)) from error
  except Exception as error:  # of whatever kind that dataset's own code raises
    if not builder.data_path.exists():  # else another process was faster, which is as good
      raise OSError(
        f"cannot prepare dataset {name!r} in {builder.data_path}: {_line(error)}; check that folder and the network"
      ) from error


def _damaged(name: str, directory: Any, why: Any) -> str:
  return (
    f"cannot read dataset {name!r} in {directory}: {_line(why)}; it is damaged or not in the "
    "array_record format, so delete that directory or give another data_dir"
  )


def _missing(name: str, error: ImportError) -> str:
  return (
    f"dataset {name!r} needs a library that is not installed ({_line(error)}); "
    "pip install 'jaxguide[tensorflow]' has what most of the catalogue needs"
  )


def _line(error: Any) -> str:
  """Give the first line of what went wrong at the root: TFDS wraps errors, and goes on for pages."""
  while getattr(error, "__cause__", None) is not None:
    error = error.__cause__
  return next(iter(str(error).strip().splitlines()), type(error).__name__)
