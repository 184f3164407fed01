"""Grids of images, and PNG files of them.

Images are ``uint8`` batches in NHWC order: (images, height, width, channels).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core.checks import at_least
from jaxguide._core.files import PathLike, replacing
from jaxguide.data.images import check_images

WHITE = 255

PADDING = 6

GAP = 4  # wide enough that the strokes of neighbouring digits do not touch

TITLE_SIZE = 15

LARGEST_ZOOM = 1000
"""The largest zoom, and the largest gap, in pixels."""


def image_grid(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
  """Arrange images row by row on a white background.

  Args:
    images: ``uint8`` of shape (n, h, w, c).
    columns: images per row; at most n are used.
    gap: number of white pixels between neighbours.

  Returns:
    ``uint8`` of shape (rows * (h + gap) - gap, columns * (w + gap) - gap, c).

  Raises:
    ValueError: if ``images`` has another type or shape, ``columns`` is below 1, or ``gap`` is below 0 or above 1000.

  >>> image_grid(np.zeros((5, 8, 8, 1), np.uint8), columns=3).shape
  (17, 26, 1)
  """
  images = np.asarray(images)
  check_images(images)
  n, h, w, c = images.shape
  columns = min(at_least("columns", columns, 1), n)
  if at_least("gap", gap, 0) > LARGEST_ZOOM:
    raise ValueError(f"gap must be at most {LARGEST_ZOOM}, got {gap}")
  rows = -(-n // columns)
  cell_height, cell_width = h + at_least("gap", gap, 0), w + gap
  cells = np.full((rows * columns, cell_height, cell_width, c), WHITE, np.uint8)
  cells[:n, :h, :w] = images
  grid = cells.reshape(rows, columns, cell_height, cell_width, c).swapaxes(1, 2)
  grid = grid.reshape(rows * cell_height, columns * cell_width, c)
  return grid[: rows * cell_height - gap, : columns * cell_width - gap]


def save_png(
  path: PathLike,
  images: np.ndarray,
  labels: np.ndarray | None = None,
  columns: int = 10,
  zoom: int | None = None,
  title: str | None = None,
  settings: str | None = None,
  names: Sequence[str] | None = None,
) -> None:
  """Write a grid of images as a PNG file, atomically.

  Args:
    path: the file; missing folders are created.
    images: ``uint8`` of shape (n, h, w, c), gray (c = 1) or RGB (c = 3).
    labels: whole numbers of shape (n,). If given, the grid has one row for each label that occurs, in increasing
      order: the label at the left, then the first ``columns`` images with this label.
    columns: the largest number of images in a row.
    zoom: each pixel becomes a square of this side, from 1 to 1000. By default images are at least 48 pixels high.
    title: a line of text above the grid.
    settings: a text that describes how the images were generated, stored in the file; see `settings_of`.
    names: the name of each class, which stands beside its row in place of the label.

  Raises:
    ValueError: if the images, the labels, ``columns`` or ``zoom`` have another type, shape or range, or if a label has
      no name.
    OSError: if ``path`` cannot be written.
  """
  from PIL import Image, ImageDraw, PngImagePlugin

  images, labels = np.asarray(images), None if labels is None else np.asarray(labels)
  check_images(images, labels)
  n, h, w, c = images.shape
  if zoom is not None and at_least("zoom", zoom, 1) > LARGEST_ZOOM:
    raise ValueError(f"zoom must be at most {LARGEST_ZOOM}, got {zoom}")
  if c not in {1, 3}:
    raise ValueError(f"a PNG needs images of 1 (gray) or 3 (RGB) channels, got {c}")
  columns = min(at_least("columns", columns, 1), n)
  zoom = -(-48 // h) if zoom is None else at_least("zoom", zoom, 1)

  captions: list[str] = []
  if labels is not None:
    classes = np.unique(labels)
    if names is not None and not 0 <= classes[0] <= classes[-1] < len(names):
      raise ValueError(f"there are names for {len(names)} classes, but labels from {classes[0]} to {classes[-1]}")
    captions = [str(label) if names is None else _on_one_line(names[label]) for label in classes]
    members = [np.flatnonzero(labels == label)[:columns] for label in classes]
    columns = max(map(len, members))
    rows = np.full((len(classes), columns, h, w, c), WHITE, np.uint8)
    for row, member in zip(rows, members, strict=True):
      row[: len(member)] = images[member]
    images = rows.reshape(-1, h, w, c)
  grid = image_grid(images.repeat(zoom, axis=1).repeat(zoom, axis=2), columns, GAP)

  cell, title = h * zoom, _on_one_line(title or "")
  name_font, title_font = _font(min(14, max(8, cell - 2))), _font(TITLE_SIZE)
  left = PADDING + max((round(name_font.getlength(name)) + PADDING for name in captions), default=0)
  top = PADDING + (TITLE_SIZE + 2 * PADDING if title else 0)
  title_width = round(title_font.getlength(title)) if title else 0
  width = left + max(grid.shape[1], title_width) + PADDING
  canvas = Image.new("L" if c == 1 else "RGB", (width, top + grid.shape[0] + PADDING), "white")
  canvas.paste(Image.fromarray(grid[..., 0] if c == 1 else grid), (left, top))
  draw = ImageDraw.Draw(canvas)
  if title:
    draw.text((left, PADDING), title, "black", title_font)
  for i, name in enumerate(captions):
    middle = top + i * (cell + GAP) + cell // 2
    draw.text((left - PADDING, middle), name, "black", name_font, anchor="rm")
  info = PngImagePlugin.PngInfo()
  if settings is not None:
    info.add_text("settings", settings)
  with replacing(path) as file:
    canvas.save(file, "PNG", pnginfo=info)


def _on_one_line(text: str) -> str:
  return "".join(letter if letter.isprintable() else " " for letter in text)


def _font(size: int) -> Any:
  """Return the font that matplotlib installs. Unlike Pillow's default font, it contains σ."""
  import matplotlib
  from PIL import ImageFont

  return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
