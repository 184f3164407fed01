"""Resizing and cropping of pictures to squares.

The functions take and return Pillow images. ``adm`` is the resizing of OpenAI's guided-diffusion: the picture is halved
by box averages while it is at least twice as large as needed, and brought to its size by a bicubic filter.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxguide.data.decode import LARGEST
from jaxguide.data.records import BadRecord

FILTERS = ("adm", "lanczos", "bicubic", "bilinear", "box", "nearest")

LEAST_SHARE = 0.8
"""The least share of the shorter side that a random crop keeps, as in OpenAI's code."""


def _halved(picture: Any, size: int, filter_name: str) -> Any:
  """Halve a picture while its shorter side is at least ``2 size``, if the filter is ``adm``."""
  from PIL import Image

  while filter_name == "adm" and min(picture.size) >= 2 * size:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  return picture


def _resized(picture: Any, size: tuple[int, int], filter_name: str) -> Any:
  from PIL import Image

  name = "bicubic" if filter_name == "adm" else filter_name
  return picture if picture.size == size else picture.resize(size, Image.Resampling[name.upper()])


def _covering(picture: Any, side: int, filter_name: str) -> Any:
  """Resize a picture so that its shorter side is ``side``.

  Raises:
    BadRecord: if it would have more than `LARGEST` pixels, because one side is much longer than the other.
  """
  picture = _halved(picture, side, filter_name)
  scale = side / min(picture.size)
  width, height = (max(round(extent * scale), side) for extent in picture.size)
  if width * height > LARGEST:
    raise BadRecord(
      f"it has {picture.width}x{picture.height} pixels: one side is so much longer than the other that it would have "
      f"{width}x{height} with a shorter side of {side}, and at most {LARGEST:,} pixels are made"
    )
  return _resized(picture, (width, height), filter_name)


def center(picture: Any, size: int, filter_name: str, rng: np.random.Generator) -> Any:
  """Resize the shorter side to ``size``, and cut off the ends of the longer side."""
  del rng
  resized = _covering(picture, size, filter_name)
  if resized.size == (size, size):
    return resized
  left, top = (resized.width - size) // 2, (resized.height - size) // 2
  return resized.crop((left, top, left + size, top + size))


def random(picture: Any, size: int, filter_name: str, rng: np.random.Generator) -> Any:
  """Cut a random square of 0.8 to 1 times the shorter side, resized to ``size``."""
  side = int(rng.integers(size, int(np.ceil(size / LEAST_SHARE)) + 1))
  resized = _covering(picture, side, filter_name)
  left, top = (int(rng.integers(extent - size + 1)) for extent in resized.size)
  return resized.crop((left, top, left + size, top + size))


def squash(picture: Any, size: int, filter_name: str, rng: np.random.Generator) -> Any:
  """Resize the whole picture to a square; the ratio of its sides changes."""
  del rng
  return _resized(_halved(picture, size, filter_name), (size, size), filter_name)


CROPS: dict[str, Callable[..., Any]] = {"center": center, "random": random, "squash": squash}
"""``(picture, size, filter_name, rng) -> picture``, by name."""
