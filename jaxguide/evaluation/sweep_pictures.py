"""Pictures of the samples of a sweep: PNG images, as many and as large as a page holds."""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxguide.evaluation import pages
from jaxguide.evaluation.results import Point

BUDGET = 6_000_000
"""The largest number of bytes of the pictures of all points, before they are encoded as text."""

SMALL = 64
"""Images of at most this side, in pixels, are enlarged without smoothing."""

LARGEST = 192
"""The largest side of an image in the picture at the top, in pixels. Larger images are made smaller."""


class Plan(NamedTuple):
  """How many images of a point are shown, and how large.

  Args:
    side: the largest height and width of an image in pixels.
    classes: the largest number of classes.
    each: the number of images of a class beside each other in the pictures of the slider.
  """

  side: int
  classes: int
  each: int


PLANS = (
  Plan(128, 10, 3),
  Plan(96, 10, 3),
  Plan(64, 10, 3),
  Plan(64, 10, 2),
  Plan(48, 10, 2),
  Plan(32, 10, 2),
  Plan(32, 6, 1),
  Plan(24, 4, 1),
  Plan(16, 2, 1),
)
"""From the best to the smallest. The first is taken whose pictures fit in `BUDGET`."""


class Block(NamedTuple):
  """The images of one class in one picture.

  Args:
    name: the class; empty if there are none.
    source: the address of the image, as of an ``img`` element.
    width: its width in pixels.
    height: its height in pixels.
    is_crisp: whether it is to be enlarged without smoothing.
  """

  name: str
  source: str
  width: int
  height: int
  is_crisp: bool


class Layout(NamedTuple):
  """The picture at the top: images in a line, the largest number of classes, and rows of images of a class."""

  columns: int
  classes: int
  rows: int


def layout_of(images: np.ndarray) -> Layout:
  """Choose the layout of the picture at the top by the size of its images, ``(m, height, width, channels)``."""
  side = max(images.shape[1:3])
  return Layout(10, 10, 5) if side <= SMALL // 2 else Layout(5, 10, 2) if side <= SMALL else Layout(4, 8, 2)


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
  """Make images smaller, so that the longer side has at most ``side`` pixels.

  Args:
    images: ``(m, height, width, channels)`` uint8.
    side: in pixels.
  """
  from PIL import Image

  _, height, width, channels = images.shape
  factor = max(height, width) / side
  if factor <= 1 or not len(images):
    return images
  size = max(1, round(width / factor)), max(1, round(height / factor))
  resized = [
    [np.asarray(Image.fromarray(image[..., c]).resize(size, Image.Resampling.BOX)) for c in range(channels)]
    for image in images
  ]
  return np.moveaxis(np.array(resized, np.uint8), 1, -1)


def png(image: np.ndarray) -> bytes:
  """Encode an image as PNG: grey, grey with alpha, RGB or RGB with alpha.

  Args:
    image: ``(height, width, channels)`` uint8, with 1 to 4 channels.
  """
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, format="PNG")
  return file.getvalue()


def _shown(images: np.ndarray) -> np.ndarray:
  """Return images with channels that a picture can have: two channels are shown as red and green."""
  if images.shape[3] == 2:
    return np.concatenate([images, np.zeros_like(images[..., :1])], axis=3)
  return images


def block(name: str, images: np.ndarray, columns: int, side: int, rows: int = 0) -> Block:
  """Arrange images of one class in a picture. What is between them and what is missing is transparent.

  Args:
    name: the class.
    images: ``(m, height, width, channels)`` uint8, m at least 1.
    columns: images in a line.
    side: the largest height and width of an image in pixels.
    rows: the number of lines; 0 for as many as needed.
  """
  is_crisp = max(images.shape[1:3]) <= SMALL
  images = _shown(shrunk(images, side))
  m, height, width, channels = images.shape
  rows = rows or -(-m // columns)
  if rows * columns == 1:
    return Block(name, pages.data_uri(name, png(images[0])), width, height, is_crisp)
  # Copies of each pixel, so that the gap is narrow beside small images as well.
  zoom = max(1, 48 // max(height, width))
  images, height, width = images.repeat(zoom, axis=1).repeat(zoom, axis=2), height * zoom, width * zoom
  gap = max(1, round(max(height, width) / 16))
  color = 1 if channels == 1 else 3
  canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, color + 1), np.uint8)
  for i, image in enumerate(images[: rows * columns]):
    top, left = i // columns * (height + gap), i % columns * (width + gap)
    cell = canvas[top : top + height, left : left + width]
    cell[..., color] = image[..., 3] if channels == 4 else 255
    cell[..., :color] = image[..., :color]
  return Block(name, pages.data_uri(name, png(canvas)), canvas.shape[1], canvas.shape[0], is_crisp)


# --- which images ---------------------------------------------------------------------------------


def chosen_classes(labels: Sequence[np.ndarray], most: int) -> tuple[list[int], int]:
  """Choose classes that all of several sets of images have, evenly over the numbers of classes.

  Args:
    labels: the labels of each set.
    most: the largest number of classes.

  Returns:
    The classes in rising order, and the number of classes to choose from.
  """
  common = sorted(set.intersection(*({int(label) for label in each} for each in labels)))
  if len(common) <= most:
    return common, len(common)
  return [common[round(i * (len(common) - 1) / max(1, most - 1))] for i in range(most)], len(common)


def class_name(label: int, names: Sequence[str] | None) -> str:
  """Return the name of a class; its number if it has none."""
  return str(names[label]) if names is not None and 0 <= label < len(names) else f"class {label}"


def by_class(
  images: np.ndarray,
  labels: np.ndarray | None,
  classes: Sequence[int],
  names: Sequence[str] | None,
  layout: Layout,
  side: int,
) -> list[Block]:
  """Make a block for each class; without labels, one without a name for each column of the layout."""
  if labels is None or not classes:
    shown = images[: layout.columns * layout.rows]
    columns = min(layout.columns, len(shown))
    return [block("", shown[i::columns], 1, side, -(-len(shown) // columns)) for i in range(columns)]
  columns, blocks = across(layout, len(classes)), []
  for label in classes:
    own = images[np.asarray(labels) == label][: columns * layout.rows]
    blocks.append(block(class_name(label, names), own, columns, side))
  return blocks


def across(layout: Layout, classes: int) -> int:
  """Return how many images of a class are beside each other; 1 without classes."""
  return min(5, max(1, layout.columns // classes)) if classes else 1


# --- the plan -------------------------------------------------------------------------------------


def plan_for(points: Sequence[Point], frames: int) -> Plan:
  """Choose how many images of each point are shown, and how large, so that the page stays below `BUDGET`.

  The bytes are estimated from images of points that lie evenly in the order given.

  Args:
    points: points whose images are shown.
    frames: the number of points in the slider and in the grid.
  """
  having = [point.images[:3] for point in points if len(point.images)]
  for plan in PLANS if having else ():
    some = [having[i] for i in sorted({0, len(having) // 3, 2 * len(having) // 3, len(having) - 1})]
    size = float(np.mean([len(png(image)) for images in some for image in _shown(shrunk(images, plan.side))]))
    # The slider shows ``each`` images of a class, and the grid one more.
    if size * frames * plan.classes * (plan.each + 1) <= BUDGET:
      return plan
  return PLANS[-1 if having else 0]
