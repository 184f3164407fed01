"""Conversion between ``uint8`` pixels and floats in [-1, 1]."""

import jax
import numpy as np

from jaxguide._core.pixels import HALF, HIGH, LOW, to_floats


def to_uint8(x: jax.typing.ArrayLike) -> np.ndarray:
  """Convert floats in [-1, 1] to ``uint8`` pixels, rounded to the nearest of the 256 levels.

  Args:
    x: images of any shape; values outside [-1, 1] are clipped.

  Raises:
    ValueError: if ``x`` is not floating point, or contains a NaN.

  >>> to_uint8(np.array([-1.5, -1.0, 0.5, 1.0])).tolist()
  [0, 0, 191, 255]
  """
  array = np.asarray(x)
  if not jax.dtypes.issubdtype(array.dtype, np.floating):  # np.issubdtype does not support bfloat16
    raise ValueError(f"to_uint8 takes floats in [-1, 1], got {array.dtype}")
  array = array.astype(np.float32)
  if np.isnan(array).any():
    raise ValueError(f"the images contain {np.isnan(array).sum()} NaN, which cannot be converted to pixels")
  return np.rint((np.clip(array, LOW, HIGH) + 1) * HALF).astype(np.uint8)


def from_uint8(images: np.ndarray) -> np.ndarray:
  """Convert ``uint8`` pixels to ``float32`` in [-1, 1]. `to_uint8` is the exact inverse.

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
  """Return the fraction of values that are 0 or 255, the ends of the pixel range.

  >>> saturation(np.array([0, 255, 7, 9], np.uint8))
  0.5
  """
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise ValueError(f"images must be uint8 pixels, got {images.dtype}")
  return float(((images == 0) | (images == 255)).mean())
