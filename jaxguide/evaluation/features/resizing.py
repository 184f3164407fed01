"""Resizing as matrices: each output row of a picture is a weighted sum of its rows, and each column of its columns.

A matrix depends on the two lengths alone, so a resizing is the same operation on every device, and it can be compared
with the library that published figures were computed with. Two of them differ enough to change an FID by whole points
(Parmar et al. 2022, arXiv:2104.11222).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide.evaluation.features.base import Resize

Matrix = Callable[..., np.ndarray]
"""``(n_in, n_out, rows=slice) -> (number of rows, n_in)``, such as `tf1_bilinear`."""

ALL = slice(None)


def tf1_bilinear(n_in: int, n_out: int, rows: slice = ALL) -> np.ndarray:
  """Return the matrix of TensorFlow 1's ``resize_bilinear``: no half-pixel centres and no antialiasing.

  Row ``i`` interpolates at the position ``i n_in / n_out``. TensorFlow computes positions in float32, and so does this
  function. The same rule is torch-fidelity's ``interpolate_bilinear_2d_like_tensorflow1x``.

  Args:
    n_in: number of pixels before, at least 1.
    n_out: number of pixels after, at least 1.
    rows: which rows of the matrix to make. The default is all.

  Returns:
    float64 of shape (n_out, n_in), or fewer rows. Each row sums to 1.

  Raises:
    ValueError: if a length is below 1.

  >>> tf1_bilinear(2, 4)
  array([[1. , 0. ],
         [0.5, 0.5],
         [0. , 1. ],
         [0. , 1. ]])
  """
  _check(n_in, n_out)
  positions = np.arange(n_out, dtype=np.float32)[rows] * np.float32(np.float32(n_in) / np.float32(n_out))
  lower = np.minimum(positions.astype(np.int64), n_in - 1)
  share = (positions - lower.astype(np.float32)).astype(np.float64)
  return _dense(np.stack([lower, np.minimum(lower + 1, n_in - 1)], 1), np.stack([1 - share, share], 1), n_in)


def pillow(n_in: int, n_out: int, filter: str = "bicubic", rows: slice = ALL) -> np.ndarray:
  """Return the matrix of Pillow's ``Image.resize``, which is antialiased, without rounding to whole numbers.

  Pillow computes so for images of mode F. clean-fid (Parmar et al. 2022) resizes each channel in that mode, bicubic.
  Row ``i`` is the filter, centred at ``(i + 1/2) n_in / n_out`` and widened by ``n_in / n_out`` if that is above 1,
  at the centres of the input pixels. It is cut off at the border and divided by its sum.

  Args:
    n_in: number of pixels before, at least 1.
    n_out: number of pixels after, at least 1.
    filter: ``"box"``, ``"bilinear"``, ``"bicubic"`` (Keys' with a = -1/2) or ``"lanczos"`` (of 3 lobes).
    rows: which rows of the matrix to make. The default is all.

  Returns:
    float64 of shape (n_out, n_in), or fewer rows. Each row sums to 1.

  Raises:
    ValueError: if a length is below 1, or the filter is unknown.

  >>> pillow(4, 2, "bilinear").round(3)
  array([[0.429, 0.429, 0.143, 0.   ],
         [0.   , 0.143, 0.429, 0.429]])
  """
  _check(n_in, n_out)
  support, weight = checks.lookup("filter", filter, FILTERS)
  scale = n_in / n_out
  widening = max(scale, 1.0)
  centres = (np.arange(n_out)[rows] + 0.5) * scale
  first = np.maximum(np.floor(centres - support * widening + 0.5), 0).astype(np.int64)
  end = np.minimum(np.floor(centres + support * widening + 0.5), n_in).astype(np.int64)
  pixels = first[:, None] + np.arange(max((end - first).max(initial=1), 1))
  weights = np.where(pixels < end[:, None], weight((pixels - centres[:, None] + 0.5) / widening), 0.0)
  return _dense(np.minimum(pixels, n_in - 1), weights / weights.sum(1, keepdims=True), n_in)


def square(size: int, matrix: Matrix) -> Resize:
  """Make the resizing to ``size`` times ``size`` pixels, whatever the sides were; the picture may be distorted.

  Args:
    size: the side of the result in pixels, at least 1.
    matrix: `tf1_bilinear`, `pillow`, or ``functools.partial(pillow, filter="lanczos")``.

  Raises:
    ValueError: if ``size`` is below 1.

  >>> rows, columns = square(299, tf1_bilinear)(32, 48)
  >>> rows.shape, columns.shape
  ((299, 32), (299, 48))
  """
  size = checks.at_least("size", size, 1)
  return lambda height, width: (matrix(height, size), matrix(width, size))


def shorter_side_then_crop(size: int, crop: int, matrix: Matrix) -> Resize:
  """Make the resizing of the shorter side to ``size`` pixels, followed by the central ``crop`` times ``crop`` pixels.

  Lengths are rounded as in torchvision: the longer side becomes ``int(size * longer / shorter)``, and the crop begins
  at ``round((length - crop) / 2)``, where halves go to the even number.

  Args:
    size: the shorter side in pixels after resizing, at least 1.
    crop: the side of the result in pixels, from 1 to ``size``.
    matrix: as in `square`.

  Raises:
    ValueError: if ``size`` is below 1, or ``crop`` is not between 1 and ``size``.

  >>> rows, columns = shorter_side_then_crop(256, 224, pillow)(480, 640)
  >>> rows.shape, columns.shape
  ((224, 480), (224, 640))
  """
  size = checks.at_least("size", size, 1)
  crop = checks.at_least("crop", crop, 1)
  if crop > size:
    raise ValueError(f"crop must be at most size = {size}, got {crop}")

  def cropped(length: int, shorter: int) -> np.ndarray:
    resized = int(size * length / shorter)
    begin = round((resized - crop) / 2)
    return matrix(length, resized, rows=slice(begin, begin + crop))

  return lambda height, width: (cropped(height, min(height, width)), cropped(width, min(height, width)))


def _check(n_in: int, n_out: int) -> None:
  checks.at_least("n_in", n_in, 1)
  checks.at_least("n_out", n_out, 1)


def _dense(pixels: np.ndarray, weights: np.ndarray, n_in: int) -> np.ndarray:
  """Return the matrix of which row ``i`` has ``weights[i, k]`` at ``pixels[i, k]``, which may occur more than once."""
  matrix = np.zeros((len(pixels), n_in))
  np.add.at(matrix, (np.arange(len(pixels))[:, None], pixels), weights)
  return matrix


def _box(x: np.ndarray) -> np.ndarray:
  return ((x > -0.5) & (x <= 0.5)).astype(np.float64)


def _bilinear(x: np.ndarray) -> np.ndarray:
  return np.maximum(1 - np.abs(x), 0.0)


def _bicubic(x: np.ndarray) -> np.ndarray:
  """Keys 1981, with a = -1/2."""
  x = np.abs(x)
  inner = 1.5 * x**3 - 2.5 * x**2 + 1
  outer = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  return np.select([x < 1, x < 2], [inner, outer], 0.0)


def _lanczos(x: np.ndarray) -> np.ndarray:
  return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


FILTERS: dict[str, tuple[float, Callable[[np.ndarray], Any]]] = {
  "box": (0.5, _box),
  "bilinear": (1.0, _bilinear),
  "bicubic": (2.0, _bicubic),
  "lanczos": (3.0, _lanczos),
}
"""Half the width of each filter of `pillow`, in pixels, and its function."""
