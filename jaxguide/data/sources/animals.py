"""Silhouettes of animals, 28x28 grey: the data of the package animal-mnist, which is small and needs no download.

S. Mohammadi, animal-mnist 0.4, MIT licence, https://pypi.org/project/animal-mnist. It has 1,000 images of each of ten
animals, white on black and upright, and names no splits. Its files are read; its code, which needs TensorFlow, is not
run.
"""

import collections
import gzip
import hashlib
import importlib.util
import io
import os
import zlib
from pathlib import Path

import numpy as np

from jaxguide._core import checks, pickles
from jaxguide.data.images import Images

NAME = "animals"

CLASSES = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
"""The names of the classes, in the order of the labels."""

FILES = ("animal_data_version_3.gz", "animal_label_version_3.gz")
"""The files of the images and of the labels: pickled arrays, compressed."""

TEST_PER_CLASS = 100


def load(name: str = "", split: str = "train", data_dir: str | os.PathLike[str] | None = None) -> Images:
  """Read one split of the animals.

  Of the images that occur once, the 100 of each class whose pixels have the smallest SHA-256 are the test images. So
  the split is the same on every machine. 284 of the 10,000 images are copies of others; all of those are for training.

  Args:
    name: the part behind the colon of ``animals:NAME``. There are no such parts: it must be empty.
    split: ``"train"``, 9,000 images, or ``"test"``, 1,000 images.
    data_dir: must be None: the data are where the package is installed.

  Returns:
    Images of shape (28, 28, 1), and labels of ten classes of equal size.

  Raises:
    ImportError: if the package animal-mnist is not installed.
    ValueError: for another split, a name or a ``data_dir``; or if the files do not contain the expected arrays.
    OSError: if the files are missing or cannot be read.

  With the package installed::

    animals = load(split="test")
    cats = animals.images[animals.labels == animals.class_names.index("cat")]
  """
  if name:
    raise ValueError(f"the data set {NAME!r} has no part {name!r}: leave out what follows {NAME!r}")
  if data_dir is not None:
    raise ValueError(f"data_dir is not a setting for {NAME!r}, which is part of the package animal-mnist: leave it out")
  is_test = checks.lookup("split", split, {"train": False, "test": True})
  images, labels = _read(_folder())
  rows = np.flatnonzero(_test_rows(images, labels) == is_test)
  return Images(images[rows, ..., None], labels[rows], len(CLASSES), NAME, CLASSES)


def _folder() -> Path:
  """Return the folder of the data in the installed package, without importing the package."""
  spec = importlib.util.find_spec("animal_mnist")
  if spec is None or not spec.submodule_search_locations:
    raise ImportError(
      f"the data set {NAME!r} needs the package animal-mnist: pip install --no-deps animal-mnist (2.6 MB, the data "
      "alone), or pip install 'jaxguide[animals]' (with TensorFlow, which the data do not need)"
    )
  return Path(spec.submodule_search_locations[0]) / "data" / "Animal_MNIST"


def _read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
  """Return the images (10000, 28, 28) and the labels (10000,)."""
  images, labels = (_array(folder / file) for file in FILES)
  expected = (np.uint8, (10_000, 28, 28), np.int64, (10_000,))
  found = (images.dtype, images.shape, labels.dtype, labels.shape)
  if found != expected or not np.array_equal(np.bincount(labels), np.full(len(CLASSES), 1000)):
    raise ValueError(
      f"{folder} must contain 10,000 images of 28x28, uint8, and 1,000 labels of each of {len(CLASSES)} classes; got "
      f"{found[0]} of shape {found[1]} and {found[2]} of shape {found[3]}: pip install 'animal-mnist==0.4'"
    )
  return images, labels


def _array(path: Path) -> np.ndarray:
  try:
    content = gzip.decompress(path.read_bytes())
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise OSError(
      f"{path} is damaged ({error}): pip install --force-reinstall --no-deps 'animal-mnist==0.4'"
    ) from error
  return np.asarray(pickles.read(io.BytesIO(content), path))


def _test_rows(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Return for each image whether it belongs to the test split."""
  digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
  copies = collections.Counter(digests)
  is_test = np.zeros(len(images), bool)
  for label in range(len(CLASSES)):
    rows = [row for row in np.flatnonzero(labels == label) if copies[digests[row]] == 1]
    is_test[sorted(rows, key=lambda row: digests[row])[:TEST_PER_CLASS]] = True
  return is_test
