"""Sources of data sets, by name.

A source is one function and one entry in `SOURCES`. The name of a data set is ``SOURCE:NAME``, such as ``tfds:mnist``.
A name without a source is one of the TFDS catalogue, or ``digits``.
"""

import os
from collections.abc import Callable

from jaxguide.data.images import Images
from jaxguide.data.sources import catalogue

SOURCES: dict[str, Callable[[str, str, str | os.PathLike[str] | None], Images]] = {"tfds": catalogue.load}
"""``(name, split, data_dir) -> Images``, by the name of the source."""


def load(name: str, split: str = "train", data_dir: str | os.PathLike[str] | None = None) -> Images:
  """Read one split of a data set into memory. The data set is prepared on first use.

  Args:
    name: ``"digits"``; or a data set of the TFDS catalogue with the features ``image`` and ``label``, such as
      ``"mnist"`` or ``"tfds:mnist"``; or ``SOURCE:NAME`` of another source in `SOURCES`.
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
  if colon and source in SOURCES:
    return SOURCES[source](rest, split, data_dir)
  return catalogue.load(name, split, data_dir)  # A colon is also how TFDS names a version, as in mnist:3.0.1.
