"""Halving and doubling the sides of images by a small filter, as in the networks of EDM and EDM2."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxguide._core.typing import Array, Float
from jaxguide.nn.layers import downsample, upsample


def check_filter(taps: Sequence[int | float]) -> tuple[int | float, ...]:
  """Return the taps of a filter as a tuple.

  Raises:
    ValueError: unless their number is even and above 0, and their sum is not 0.

  >>> check_filter([1, 3, 3, 1])
  (1, 3, 3, 1)
  """
  taps = tuple(taps)
  if not taps or len(taps) % 2 or not np.isfinite(taps).all() or not sum(taps):
    raise ValueError(
      f"resample_filter must be an even number of numbers with a sum other than 0, such as (1, 1), got {taps}"
    )
  return taps


def halve(x: Float[Array, "n h w c"], taps: Sequence[int | float], pad: bool = True) -> Float[Array, "n hh ww c"]:
  """Filter images along both axes, and keep each second pixel.

  It is PyTorch's depthwise ``conv2d`` of stride 2 with the outer product of the taps, whose sum is made 1.

  Args:
    x: images, NHWC, with even sides.
    taps: the filter along one axis, an even number.
    pad: whether the images are padded with zeros by ``len(taps) // 2 - 1``, so that the sides become exactly half.

  >>> halve(jnp.arange(4.0).reshape(1, 2, 2, 1), (1, 1)).ravel().tolist()
  [1.5]
  """
  if len(set(taps)) == 1 and len(taps) == 2:
    return downsample(x)
  weights = np.asarray(taps, np.float32) / np.float32(sum(taps))
  extra = len(taps) // 2 - 1 if pad else 0
  for axis in (1, 2):
    widths = [(extra, extra) if each == axis else (0, 0) for each in range(4)]
    pairs = jnp.moveaxis(jnp.pad(x, widths), axis, 1)
    pairs = pairs.reshape(pairs.shape[0], -1, 2, *pairs.shape[2:])
    size = pairs.shape[1] - len(taps) // 2 + 1
    x = sum(float(weight) * pairs[:, at // 2 : at // 2 + size, at % 2] for at, weight in enumerate(weights.tolist()))  # type: ignore[assignment]
    x = jnp.moveaxis(x, 1, axis)
  return x


def double(x: Float[Array, "n h w c"], taps: Sequence[int | float]) -> Float[Array, "n hh ww c"]:
  """Put zeros between the pixels of images, and filter them along both axes.

  It is PyTorch's depthwise ``conv_transpose2d`` of stride 2, padded by ``len(taps) // 2 - 1``, with the outer product
  of the taps, whose sum is made 4.

  Args:
    x: images, NHWC.
    taps: the filter along one axis, an even number.

  >>> double(jnp.ones((1, 1, 1, 1)), (1, 3, 3, 1)).ravel().tolist()
  [0.5625, 0.5625, 0.5625, 0.5625]
  """
  if len(set(taps)) == 1 and len(taps) == 2:
    return upsample(x)
  weights = 2 * np.asarray(taps, np.float32) / np.float32(sum(taps))
  pad, reach = len(taps) // 2 - 1, len(taps) // 2
  for axis in (1, 2):
    side = x.shape[axis]
    padded = jnp.pad(jnp.moveaxis(x, axis, 1), [(0, 0), (reach, reach), (0, 0), (0, 0)])
    phases = []
    for phase in (0, 1):
      # Pixel 2 m + phase gets tap k of pixel m - d, where k = 2 d + phase + pad.
      taps_of = [(d, 2 * d + phase + pad) for d in range(-reach, reach + 1) if 0 <= 2 * d + phase + pad < len(taps)]
      phases.append(sum(float(weights[k]) * padded[:, reach - d : reach - d + side] for d, k in taps_of))
    merged = jnp.stack(phases, axis=2).reshape(padded.shape[0], 2 * side, *padded.shape[2:])
    x = jnp.moveaxis(merged, 1, axis)
  return x
