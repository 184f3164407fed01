r"""Encoders: how the stored examples of a data set become what a network sees, and back.

A network sees ``x0``, floats whose clean values lie in a known range. A data set stores something else: pixels are
``uint8``. An `Encoder` goes from one to the other.

Each model names its encoder in `jaxguide.models.ModelConfig`. The programs that train and sample take it from there.
They do not know what the stored examples are.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxguide._core.pixels import HIGH, LOW, to_floats
from jaxguide._core.typing import Array, ArrayLike
from jaxguide.data.pixels import to_uint8


class Encoder(NamedTuple):
  """The way from stored examples to ``x0`` and back.

  Args:
    encode: stored examples (n, ...) to ``x0`` (n, *shape), float32; pure, and called inside ``jit``.
    decode: ``x0`` (n, *shape) to stored examples, in NumPy. Values outside the range are clipped.
    low: the least value of a clean ``x0``; None where there is no bound.
    high: the largest value of a clean ``x0``; None where there is no bound.
  """

  encode: Callable[[ArrayLike], Array]
  decode: Callable[[ArrayLike], np.ndarray]
  low: float | None
  high: float | None

  @property
  def bound(self) -> float | None:
    """The largest absolute value of a clean ``x0``, for `jaxguide.clip_x0`; None where there is none."""
    return None if self.low is None or self.high is None else max(-self.low, self.high)


def _encode_pixels(images: ArrayLike) -> Array:
  return to_floats(jnp.asarray(images), jnp.float32)


PIXELS = Encoder(_encode_pixels, to_uint8, LOW, HIGH)
"""``uint8`` pixels, 0 to 255, to floats in [-1, 1]."""

ENCODERS: dict[str, Encoder] = {"pixels": PIXELS}
