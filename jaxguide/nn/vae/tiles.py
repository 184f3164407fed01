"""Convolutional networks on large images, tile by tile, so that memory does not grow with the image.

The rule is that of diffusers' ``AutoencoderKL``: tiles overlap, and where two meet, the later one fades in linearly
over the overlap. The result is approximate: a normalisation sees the statistics of its tile alone, and attention sees
no further than the tile. The tiles at the right and at the bottom are as small as what remains there.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxguide._core.typing import Array, Float


class Tiles(NamedTuple):
  """How images are cut.

  Args:
    size: the side of a tile.
    overlap: the overlap of two tiles. Less than the size.
  """

  size: int
  overlap: int

  def starts(self, side: int) -> range:
    """Return where tiles begin along a side.

    >>> list(Tiles(8, 2).starts(16))
    [0, 6, 12]
    """
    return range(0, side, self.size - self.overlap)


def tiled(
  function: Callable[[Array], Array], x: Float[Array, "n h w c"], tiles: Tiles, up: int = 1, down: int = 1
) -> Array:
  """Apply a function to the tiles of images, one after the other, and blend the results.

  Args:
    function: maps a tile (n, h, w, c) to (n, h up / down, w up / down, d). It is traced once for each shape of tiles:
      four at most.
    x: the images. An image within one tile is given to the function as it is.
    tiles: how images are cut. Its numbers and the sides of the images must be multiples of ``down``.
    up: what the function multiplies the sides by.
    down: what it divides the sides by.

  Returns:
    (n, h up / down, w up / down, d).

  >>> x = jnp.arange(100.0).reshape(1, 10, 10, 1)
  >>> bool(jnp.allclose(tiled(lambda tile: 2 * tile, x, Tiles(4, 2)), 2 * x))
  True
  """
  n, height, width, channels = x.shape
  if max(height, width) <= tiles.size:
    return function(x)
  corners = list(itertools.product(tiles.starts(height), tiles.starts(width)))
  by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
  for row, column in corners:
    shape = min(tiles.size, height - row), min(tiles.size, width - column)
    by_shape.setdefault(shape, []).append((row, column))
  pieces: dict[tuple[int, int], Array] = {}
  for shape, starts in by_shape.items():

    def piece(start: Array, shape: tuple[int, int] = shape) -> Array:
      return function(jax.lax.dynamic_slice(x, (0, start[0], start[1], 0), (n, *shape, channels)))

    pieces |= dict(zip(starts, jax.lax.map(piece, jnp.array(starts)), strict=True))
  overlap, kept = tiles.overlap * up // down, (tiles.size - tiles.overlap) * up // down
  rows = []
  above: list[Array] = []
  for row in tiles.starts(height):
    blended: list[Array] = []
    for number, column in enumerate(tiles.starts(width)):
      tile = pieces[row, column]
      if above:
        tile = _fade(above[number], tile, overlap, axis=1)
      if blended:
        tile = _fade(blended[-1], tile, overlap, axis=2)
      blended.append(tile)
    rows.append(jnp.concatenate([tile[:, :kept, :kept] for tile in blended], axis=2))
    above = blended
  return jnp.concatenate(rows, axis=1)


def _fade(before: Array, tile: Array, overlap: int, axis: int) -> Array:
  """Blend the beginning of a tile along an axis with the end of the tile before it."""
  extent = min(before.shape[axis], tile.shape[axis], overlap)
  end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
  beginning, rest = jnp.split(tile, [extent], axis=axis)
  weight = jnp.arange(extent, dtype=tile.dtype) / max(extent, 1)
  weight = weight.reshape(*(extent if each == axis else 1 for each in range(tile.ndim)))
  return jnp.concatenate([end * (1 - weight) + beginning * weight, rest], axis=axis)
