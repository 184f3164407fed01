"""Conversion of pixels (``uint8``, 0 to 255) to floats in [-1, 1], the range of the networks' inputs."""

from typing import Any

HALF = 127.5
LOW, HIGH = -1.0, 1.0


def to_floats(images: Any, dtype: Any) -> Any:
  """Convert pixels to floats in [-1, 1], ``pixel / 127.5 - 1``. NumPy arrays stay NumPy, and JAX arrays stay JAX.

  Args:
    images: whole numbers from 0 to 255, of any shape.
    dtype: the type of the floats.

  >>> import numpy as np
  >>> to_floats(np.array([0, 255], np.uint8), np.float32).tolist()
  [-1.0, 1.0]
  """
  floats = images.astype(dtype)
  return floats / floats.dtype.type(HALF) - floats.dtype.type(1)
