"""Images at the edge of the library: ``uint8`` on disk, floats in [-1, 1] inside.

Every image here is a batch in NHWC order: (images, height, width, channels).
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide.checks import at_least
from jaxguide.files import PathLike, check_readable, replacing

WHITE = 255
PADDING = 6
GAP = 4  # wide enough to keep the strokes of one digit from running into the next
TITLE_SIZE = 15
MOST_ZOOM = 1000


def check_images(images: np.ndarray, labels: np.ndarray | None = None) -> None:
  """Check that ``images`` is a batch of images and that ``labels``, if given, has one for each.

  Raises:
    ValueError: if ``images`` is not ``uint8`` of shape (n, h, w, c) with at least one image, or
      ``labels`` is not (n,) whole numbers.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
    raise ValueError(
      "images must be uint8 of shape (images, height, width, channels), none of them 0; "
      f"got {images.dtype} of shape {images.shape}"
    )
  if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
    raise ValueError(
      f"labels must be one whole number for each of the {len(images)} images; "
      f"got {labels.dtype} of shape {labels.shape}"
    )


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
  return np.rint((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8)


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
  return images.astype(np.float32) / np.float32(127.5) - np.float32(1)


def save_npz(path: PathLike, images: np.ndarray, labels: np.ndarray | None = None, settings: str | None = None) -> None:
  """Write samples in the format of OpenAI's guided-diffusion evaluator, atomically.

  Args:
    path: the file, taken as it is; missing folders are made.
    images: ``uint8`` of shape (n, h, w, c), stored as ``arr_0``.
    labels: whole numbers of shape (n,), stored as ``arr_1`` in ``int64``; without them there is none.
    settings: a text that says what the samples were made with, stored as ``settings``; see `settings_of`.

  Raises:
    ValueError: if the images or the labels are not that.
    OSError: if ``path`` cannot be written.
  """
  images, labels = np.asarray(images), None if labels is None else np.asarray(labels)
  check_images(images, labels)
  if labels is not None and labels.max() > np.iinfo(np.int64).max:
    raise ValueError(f"labels must fit int64, got {labels.max()}")
  if not isinstance(settings, str | None):
    raise TypeError(f"settings must be a text, got {type(settings).__name__}")
  with replacing(path) as file:
    arrays = {"arr_0": images}
    if labels is not None:
      arrays["arr_1"] = labels.astype(np.int64)
    if settings is not None:
      arrays["settings"] = np.array(settings)
    np.savez(file, **arrays)  # type: ignore[arg-type]


def settings_of(path: PathLike) -> str | None:
  """Read what a finished ``.npz`` or ``.png`` says of the settings that it was made with; None if it says nothing."""
  from PIL import PngImagePlugin

  try:
    check_readable(path)
    if Path(path).suffix == ".png":
      # Not `Image.open`, which refuses large pictures: here none of their pixels is read.
      with PngImagePlugin.PngImageFile(path) as picture:
        return picture.info.get("settings")
    _check_sizes(path)
    with np.load(path) as arrays:
      return str(arrays["settings"])
  except Exception:  # A damaged file may raise anything.
    return None


def saturation(images: np.ndarray) -> float:
  """Give the share of the values, from 0 to 1, that lie at an end of the range of pixels, 0 or 255.

  >>> saturation(np.array([0, 255, 7, 9], np.uint8))
  0.5
  """
  images = np.asarray(images)
  if images.dtype != np.uint8:
    raise ValueError(f"images must be uint8 pixels, got {images.dtype}")
  return float(((images == 0) | (images == WHITE)).mean())


def _check_sizes(path: PathLike) -> None:
  """Check that the arrays of an .npz file are no larger than the file can hold, before memory is taken for them.

  Raises:
    ValueError: if one claims to be, or the file is none of that format.
  """
  with open(path, "rb") as opened:
    if not zipfile.is_zipfile(opened):
      raise ValueError("it holds no arrays")
  with zipfile.ZipFile(path) as members:
    for member in members.infolist():
      with members.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        claimed = math.prod(shape) * dtype.itemsize
        # Deflate makes a thousandth of what it is given at best.
        if claimed > min(member.file_size, 1032 * member.compress_size):
          raise ValueError(f"{member.filename} claims {claimed} bytes, and the file has {member.file_size}")


def load_npz(path: PathLike, labelled: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
  """Read what `save_npz` wrote: ``uint8`` images (n, h, w, c) and ``int64`` labels (n,).

  Args:
    path: the file.
    labelled: whether there have to be labels; without them ``None`` is given.

  Raises:
    FileNotFoundError: if there is no such file.
    OSError: if it cannot be read.
    ValueError: if it is not an .npz file of that format.
  """
  check_readable(path)
  try:
    _check_sizes(path)
    with np.load(path) as arrays:
      images = arrays["arr_0"]
      labels = arrays["arr_1"] if labelled or "arr_1" in arrays else None
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no file {path}: write one with save_npz") from None
  except OSError as error:
    raise OSError(f"cannot read {path}: {error.strerror or error}") from error
  except Exception as error:  # A damaged archive may raise anything.
    # NumPy takes whatever is no array for a pickle, and gives advice that would run what it holds.
    reason = "it holds no arrays" if "pickle" in str(error) else error
    raise ValueError(
      f"{path} is not an .npz file with images in arr_0 and labels in arr_1 ({reason}): write one with save_npz"
    ) from error
  try:
    check_images(images, labels)
  except ValueError as error:
    raise ValueError(f"{path} holds no labelled images: {error}") from None
  return images, None if labels is None else labels.astype(np.int64)


def image_grid(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
  """Lay images out row by row on white.

  Args:
    images: ``uint8`` of shape (n, h, w, c).
    columns: how many images a row has; fewer if there are not as many.
    gap: how many pixels lie between neighbours.

  Returns:
    ``uint8`` of shape (rows * (h + gap) - gap, columns * (w + gap) - gap, c).

  Raises:
    ValueError: if ``images`` is not that, ``columns`` is below 1, or ``gap`` below 0.

  >>> image_grid(np.zeros((5, 8, 8, 1), np.uint8), columns=3).shape
  (17, 26, 1)
  """
  images = np.asarray(images)
  check_images(images)
  n, h, w, c = images.shape
  columns = min(at_least("columns", columns, 1), n)
  if at_least("gap", gap, 0) > MOST_ZOOM:
    raise ValueError(f"gap must be at most {MOST_ZOOM}, got {gap}")
  rows = -(-n // columns)
  high, wide = h + at_least("gap", gap, 0), w + gap
  cells = np.full((rows * columns, high, wide, c), WHITE, np.uint8)
  cells[:n, :h, :w] = images
  grid = cells.reshape(rows, columns, high, wide, c).swapaxes(1, 2)
  return grid.reshape(rows * high, columns * wide, c)[: rows * high - gap, : columns * wide - gap]


def save_png(
  path: PathLike,
  images: np.ndarray,
  labels: np.ndarray | None = None,
  columns: int = 10,
  zoom: int | None = None,
  title: str | None = None,
  settings: str | None = None,
) -> None:
  """Write a grid of images as a PNG picture, atomically.

  Args:
    path: the file; missing folders are made.
    images: ``uint8`` of shape (n, h, w, c), gray (c = 1) or RGB (c = 3).
    labels: whole numbers of shape (n,). With them there is one row for each label that occurs, in
      order, with the label at its left and the first ``columns`` of its images.
    columns: how many images a row has at most.
    zoom: how many pixels a side each pixel becomes; the default makes images of at least 48.
    title: a line of text above the grid.
    settings: a text that says what the images were made with, kept inside the file; see `settings_of`.

  Raises:
    ValueError: if the images, the labels, ``columns`` or ``zoom`` are not that.
    OSError: if ``path`` cannot be written.
  """
  from PIL import Image, ImageDraw, PngImagePlugin

  images, labels = np.asarray(images), None if labels is None else np.asarray(labels)
  check_images(images, labels)
  n, h, w, c = images.shape
  if zoom is not None and at_least("zoom", zoom, 1) > MOST_ZOOM:
    raise ValueError(f"zoom must be at most {MOST_ZOOM}, got {zoom}")
  if c not in {1, 3}:
    raise ValueError(f"a PNG needs images of 1 (gray) or 3 (RGB) channels, got {c}")
  columns = min(at_least("columns", columns, 1), n)
  zoom = -(-48 // h) if zoom is None else at_least("zoom", zoom, 1)

  names: list[str] = []
  if labels is not None:
    classes = np.unique(labels)
    names = [str(label) for label in classes]
    members = [np.flatnonzero(labels == label)[:columns] for label in classes]
    columns = max(map(len, members))
    rows = np.full((len(classes), columns, h, w, c), WHITE, np.uint8)
    for row, member in zip(rows, members, strict=True):
      row[: len(member)] = images[member]
    images = rows.reshape(-1, h, w, c)
  grid = image_grid(images.repeat(zoom, axis=1).repeat(zoom, axis=2), columns, GAP)

  cell = h * zoom
  name_font, title_font = _font(min(14, max(8, cell - 2))), _font(TITLE_SIZE)
  left = PADDING + max((round(name_font.getlength(name)) + PADDING for name in names), default=0)
  top = PADDING + (TITLE_SIZE + 2 * PADDING if title else 0)
  title_width = round(title_font.getlength(title)) if title else 0
  width = left + max(grid.shape[1], title_width) + PADDING
  canvas = Image.new("L" if c == 1 else "RGB", (width, top + grid.shape[0] + PADDING), "white")
  canvas.paste(Image.fromarray(grid[..., 0] if c == 1 else grid), (left, top))
  draw = ImageDraw.Draw(canvas)
  if title:
    draw.text((left, PADDING), title, "black", title_font)
  for i, name in enumerate(names):
    middle = top + i * (cell + GAP) + cell // 2
    draw.text((left - PADDING, middle), name, "black", name_font, anchor="rm")
  info = PngImagePlugin.PngInfo()
  if settings is not None:
    info.add_text("settings", settings)
  with replacing(path) as file:
    canvas.save(file, "PNG", pnginfo=info)


def _font(size: int) -> Any:
  """Matplotlib's own font, which every installation has, and which knows σ where Pillow's does not."""
  import matplotlib
  from PIL import ImageFont

  return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
