"""Encoded pictures to pixels: JPEG, PNG, WebP, the first frame of a GIF, BMP and TIFF, in any colour mode."""

import functools
import io
import warnings
from typing import Any

import numpy as np

from jaxguide.data.records import BadRecord, Unreadable

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are decoded, by Pillow's names."""

LARGEST = 2**26
"""The largest number of pixels of a picture, 67 million. A larger one is taken for a decompression bomb."""


def decode(content: bytes, background: tuple[int, ...] = (255, 255, 255)) -> Any:
  """Decode a picture.

  It is rotated as its EXIF data say. Transparent pixels are laid over a background. CMYK and palettes become RGB, and
  16-bit grey becomes 8-bit.

  Args:
    content: the bytes of the file.
    background: the colour behind transparent pixels.

  Returns:
    A Pillow image in mode ``L`` (grey) or ``RGB``.

  Raises:
    BadRecord: if it is no picture of these `FORMATS`, is damaged or truncated, or has more than `LARGEST` pixels.
  """
  from PIL import Image, UnidentifiedImageError

  if not content:
    raise BadRecord("it is empty")
  _prepare_pillow()
  try:
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
      width, height = picture.size
      if width * height > LARGEST:
        raise BadRecord(f"it has {width}x{height} pixels; a picture may have at most {LARGEST:,}")
      return to_mode(_with_alpha(picture, content), background)
  except BadRecord:
    raise
  except Image.DecompressionBombError:
    raise BadRecord(f"it has far too many pixels; a picture may have at most {LARGEST:,}") from None
  except UnidentifiedImageError:
    raise BadRecord(f"it is not a picture of the formats {', '.join(FORMATS)}") from None
  except MemoryError as error:
    raise Unreadable("there is not enough memory to decode it") from error
  except Exception as error:  # The decoders raise many kinds of exceptions for damaged files.
    raise BadRecord(f"it is damaged ({next(iter(str(error).splitlines()), type(error).__name__)})") from error


@functools.cache
def _prepare_pillow() -> None:
  """Load the decoders of all formats, and ignore Pillow's warnings of sizes and of damaged EXIF data.

  This is done once and for the whole process, because `warnings.catch_warnings` is not safe in threads: it can leave
  all warnings switched off.
  """
  from PIL import Image

  Image.init()
  warnings.filterwarnings("ignore", module=r"PIL\.")


RAW_LEVELS = {"L;2": 85, "L;4": 17, "I;16B": 1}
"""What Pillow multiplies grey levels of a PNG by, by the name that it has for their storage."""


def _with_alpha(picture: Any, content: bytes) -> Any:
  """Give a PNG with a transparent colour an alpha channel.

  Pillow compares that colour, which has the bits of the file, with pixels that it has converted to 8 bits. So it finds
  other pixels in grey of 2, 4 and 16 bits and in RGB of 16 bits. They are compared here as they are in the file.
  """
  from PIL import Image

  stored = picture.tile[0].args if picture.format == "PNG" and picture.tile else None
  key = picture.info.get("transparency")
  if key is None or (stored != "RGB;16B" and stored not in RAW_LEVELS):
    return picture
  picture.load()
  pixels = np.asarray(picture)
  if stored == "RGB;16B":  # Pillow keeps the high bytes. By the other order of bytes, it keeps the low ones.
    with Image.open(io.BytesIO(content), formats=("PNG",)) as low:
      low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
      low.load()
      values = pixels.astype(np.uint16) * 256 + np.asarray(low)
    opaque = (values != np.array(key, np.uint16)).any(axis=-1)
  else:
    bits = {"L;2": 3, "L;4": 15}.get(stored, 65535)  # Higher bits of the colour have no meaning.
    opaque = pixels != (key & bits) * RAW_LEVELS[stored]
  alone = Image.fromarray(_from_16_bits(pixels) if stored == "I;16B" else pixels)
  alone.info = {name: value for name, value in picture.info.items() if name != "transparency"}  # EXIF data stay.
  alone.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
  return alone


def to_mode(picture: Any, background: tuple[int, ...]) -> Any:
  """Convert a Pillow image to mode ``L`` or ``RGB``, upright and without transparency.

  Raises:
    BadRecord: if its pixels are neither 8 nor 16 bits.
  """
  from PIL import Image, ImageOps

  picture.load()
  ImageOps.exif_transpose(picture, in_place=True)
  if picture.mode.startswith("I") or picture.mode == "F":
    return Image.fromarray(_from_16_bits(np.asarray(picture)))
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    behind = Image.new("RGBA", picture.size, (*background, 255))
    return Image.alpha_composite(behind, picture).convert("RGB")
  mode = "L" if picture.mode in ("1", "L") else "RGB"
  return picture if picture.mode == mode else picture.convert(mode)


def _from_16_bits(array: np.ndarray) -> np.ndarray:
  """Convert 16-bit grey to 8 bits; 65535 becomes 255."""
  if array.dtype.kind == "f" or array.min() < 0 or array.max() > 65535:
    raise BadRecord("its pixels are neither 8-bit nor 16-bit: convert it")
  return np.rint(array.astype(np.float64) / 257).astype(np.uint8)


def from_array(array: np.ndarray) -> Any:
  """Convert ``uint8`` pixels, (h, w), (h, w, 1) or (h, w, 3), to a Pillow image.

  Raises:
    BadRecord: if the array has another type or shape.
  """
  from PIL import Image

  pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
  if array.dtype != np.uint8 or pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or not array.size:
    raise BadRecord(f"it is {array.dtype} of shape {array.shape}, not uint8 pixels of 1 or 3 channels")
  return Image.fromarray(pixels)
