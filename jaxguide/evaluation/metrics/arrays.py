"""Checks of feature arrays, and the pieces in which they are read."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

_CHUNK = 2**23
"""The number of elements of a piece. In float64 they take 64 MiB."""


def chunks(count: int, width: int) -> Iterator[slice]:
  """Give slices of rows that together are all ``count`` rows, each small enough for a copy in float64.

  >>> list(chunks(5, 2**22))
  [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
  """
  rows = max(1, _CHUNK // max(1, width))
  for start in range(0, count, rows):
    yield slice(start, min(start + rows, count))


def check_features(name: str, features: npt.ArrayLike, least: int = 2) -> np.ndarray:
  """Check that features are at least ``least`` vectors of finite real numbers, and return them as an array.

  Raises:
    ValueError: if they are not.

  >>> check_features("real", [[1.0], [np.nan]])
  Traceback (most recent call last):
  ...
  ValueError: real must be finite, but some values are infinite or NaN; drop those samples
  """
  array = np.asarray(features)
  if array.dtype.kind not in "fiub":
    raise ValueError(f"{name} must be real numbers, got {array.dtype}")
  if array.ndim != 2 or len(array) < least or not array.shape[1]:
    raise ValueError(
      f"{name} must be at least {least} feature vectors of at least 1 number, of shape (n, d), got shape {array.shape}"
    )
  if array.dtype.kind == "f" and not all(np.isfinite(array[rows]).all() for rows in chunks(*array.shape)):
    raise ValueError(f"{name} must be finite, but some values are infinite or NaN; drop those samples")
  return array


def check_width(a: int, b: int) -> None:
  """Check that two sets of features have one width.

  Raises:
    ValueError: if they have not.
  """
  if a != b:
    raise ValueError(
      f"both sets of features must have one width, got {a} and {b}: compute them from images of the same shape, with "
      "one network"
    )


def check_pair(real: npt.ArrayLike, generated: npt.ArrayLike, least: int) -> tuple[np.ndarray, np.ndarray]:
  """Check real and generated features, and that they have one width, and return both as arrays.

  Raises:
    ValueError: if one of them is not valid, or their widths differ.
  """
  a, b = check_features("real", real, least), check_features("generated", generated, least)
  check_width(a.shape[1], b.shape[1])
  return a, b
