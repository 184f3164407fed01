"""Pixels and floats: ``uint8`` on disk, floats in [-1, 1] inside."""

import jax
import numpy as np

from jaxguide._core.pixels import HALF, HIGH, LOW, to_floats


def to_uint8(x: jax.typing.ArrayLike) -> np.ndarray:
  """Give floats in [-1, 1] as ``uint8``, rounded to the nearest of the 256 levels.

  Args:
    x: images of any shape; values outside [-1, 1] are clipped.

  Raises:
    ValueError: if ``x`` is not floating point, or holds a NaN.

  >>> to_uint8(np.array([-1.5, -1.0, 0.5, 1.0])).tolist()
  [0, 0, 191, 255]
  """
  array = np.asarray(x)
  if not jax.dtypes.issubdtype(array.dtype, np.floating):  # NumPy's own does not know bfloat16
    raise ValueError(f"to_uint8 takes floats in [-1, 1], got {array.dtype}")
  array = array.astype(np.float32)
  if np.isnan(array).any():
    raise ValueError(f"the images hold {np.isnan(array).sum()} NaN, which no pixel can show")
  return np.rint((np.clip(array, LOW, HIGH) + 1) * HALF).astype(np.uint8)


def from_uint8(images: np.ndarray) -> np.ndarray:
  """Give ``uint8`` pixels as ``float32`` in [-1, 1]; `to_uint8` takes them back exactly.

  Raises:
    ValueError: if ``images`` is not ``uint8``.

  >>> from_uint8(np.array([0, 255], np.uint8)).tolist()
  [-1.0, 1.0]
  """
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise ValueError(f"from_uint8 takes uint8 pixels, got {images.dtype}")
  return to_floats(images, np.float32)


def saturation(images: np.ndarray) -> float:
  """Give the share of the values, from 0 to 1, that lie at an end of the range of pixels, 0 or 255.

  >>> saturation(np.array([0, 255, 7, 9], np.uint8))
  0.5
  """
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise ValueError(f"images must be uint8 pixels, got {images.dtype}")
  return float(((images == 0) | (images == 255)).mean())
