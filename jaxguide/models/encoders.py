r"""Encoders: the conversion between the stored examples of a dataset and x0.

Diffusion works on ``x0``: floats whose clean values lie in a known range. A dataset stores another type: pixels are
``uint8``. An `Encoder` converts one to the other.

The name of a model's encoder is a field of `jaxguide.models.ModelConfig`. Training and sampling convert examples by
this encoder alone, so they work for every type of stored example.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxguide._core.pixels import HIGH, LOW, to_floats
from jaxguide._core.typing import Array, ArrayLike
from jaxguide.data.pixels import to_uint8


class Encoder(NamedTuple):
  """The conversion of stored examples to ``x0`` and back.

  Args:
    encode: maps stored examples (n, ...) to ``x0`` (n, *shape), float32; a pure function, called inside ``jit``.
    decode: maps ``x0`` (n, *shape) to stored examples, in NumPy. Values outside the range are clipped.
    low: the least value of a clean ``x0``; None if there is no bound.
    high: the largest value of a clean ``x0``; None if there is no bound.
  """

  encode: Callable[[ArrayLike], Array]
  decode: Callable[[ArrayLike], np.ndarray]
  low: float | None
  high: float | None

  @property
  def bound(self) -> float | None:
    """The largest absolute value of a clean ``x0``, for `jaxguide.clip_x0`; None if there is no bound."""
    return None if self.low is None or self.high is None else max(-self.low, self.high)


def _encode_pixels(images: ArrayLike) -> Array:
  return to_floats(jnp.asarray(images), jnp.float32)


PIXELS = Encoder(_encode_pixels, to_uint8, LOW, HIGH)
"""Converts ``uint8`` pixels, 0 to 255, to floats in [-1, 1]."""


def _as_floats(latents: ArrayLike) -> Array:
  return jnp.asarray(latents, jnp.float32)


LATENTS = Encoder(_as_floats, lambda x: np.asarray(x, np.float32), None, None)
"""Takes floats, such as the latents of an autoencoder, as they are."""

ENCODERS: dict[str, Encoder] = {"pixels": PIXELS, "latents": LATENTS}
