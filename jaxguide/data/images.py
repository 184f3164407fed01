"""Labelled images in memory."""

import dataclasses
import functools
import hashlib
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide.data.dataset import MOST_CLASSES, Dataset
from jaxguide.data.pixels import saturation


def check_images(images: np.ndarray, labels: np.ndarray | None = None) -> None:
  """Check that ``images`` is a batch of images and that ``labels``, if given, has one label per image.

  Raises:
    ValueError: if ``images`` is not ``uint8`` of shape (n, h, w, c) with no axis of size 0, or ``labels`` is not (n,)
      whole numbers.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
    remedy = ": make pixels of floats in [-1, 1] with jaxguide.data.to_uint8" if images.dtype.kind == "f" else ""
    raise ValueError(
      "images must be uint8 of shape (images, height, width, channels) with no axis of size 0, "
      f"got {images.dtype} of shape {images.shape}{remedy}"
    )
  if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
    raise ValueError(
      f"labels must be one whole number for each of the {len(images)} images, "
      f"got {labels.dtype} of shape {labels.shape}"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Images(Dataset):
  """Images in memory, with classes, with label vectors or without labels. It is a `jaxguide.data.Dataset`.

  Attributes:
    images: ``uint8`` of shape (n, h, w, c), from 0 to 255.
    labels: a list or array of shape (n,) of whole numbers from 0 to ``num_classes - 1``, stored as ``int32``; or (n, d)
      floats, stored as ``float32``, with ``num_classes`` None; or None.
    num_classes: number of classes, including those without an image; None if labels are vectors or absent.
    name: the name of the dataset.
    class_names: the names of the classes, one for each, or None.

  Raises:
    ValueError: if the images, the labels or the names have another type, shape or range.
  """

  images: Any
  labels: Any
  num_classes: int | None
  name: str
  class_names: Sequence[str] | None = None

  def __post_init__(self):
    images = np.asarray(self.images)
    labels = None if self.labels is None else np.asarray(self.labels)
    if self.num_classes is None:
      check_images(images)
      labels = None if labels is None else _check_vectors(labels, len(images))
    else:
      if labels is None:
        raise ValueError(f"images of {self.num_classes} classes need labels: give them, or num_classes None")
      check_images(images, labels)
      if checks.at_least("num_classes", self.num_classes, 1) > MOST_CLASSES:
        raise ValueError(f"num_classes must be at most {MOST_CLASSES}, got {self.num_classes}")
      checks.labels("label", labels, self.num_classes)
      labels = labels.astype(np.int32)
    if self.class_names is not None:
      names = tuple(checks.field("class_names", self.class_names, Sequence[str]))
      if len(names) != (self.num_classes or 0):
        raise ValueError(f"class_names must have one name for each of {self.num_classes} classes, got {len(names)}")
      object.__setattr__(self, "class_names", names)
    object.__setattr__(self, "images", images)
    object.__setattr__(self, "labels", labels)

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Shape (h, w, c) of one image."""
    return self.images.shape[1:]

  @property
  def label_shape(self) -> tuple[int, ...] | None:
    """``()`` for classes, ``(d,)`` for vectors, None without labels."""
    return None if self.labels is None else self.labels.shape[1:]

  def example(self, row: int, rng: np.random.Generator | None = None) -> tuple[np.ndarray, Any]:
    """Return an image and its label."""
    del rng
    return self.images[row], None if self.labels is None else self.labels[row]

  def example_name(self, row: int) -> str:
    """Return the name of an image: the dataset's, with the image's number."""
    return f"{self.name}[{row}]"

  def subset(self, rows: np.ndarray) -> "Images":
    """Return the images of some rows."""
    labels = None if self.labels is None else self.labels[rows]
    return dataclasses.replace(self, images=self.images[rows], labels=labels)

  @functools.cached_property
  def saturation(self) -> float:
    """The share of pixel values that are 0 or 255."""
    return saturation(self.images)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the images' shape, the number of classes, the pixels and the labels, in this order.

    It does not depend on the names or on the type of the labels. It is computed once: do not change the arrays later.
    """
    digest = hashlib.sha256(f"{self.images.shape} {self.num_classes}".encode())
    labels = [] if self.labels is None else [self.labels.astype("<i8" if self.num_classes else "<f4")]
    for array in (self.images, *labels):
      digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.hexdigest()


def _check_vectors(labels: np.ndarray, number: int) -> np.ndarray:
  if labels.ndim != 2 or len(labels) != number or not labels.shape[1] or labels.dtype.kind not in "fiub":
    raise ValueError(
      f"without num_classes, labels must be a vector of numbers for each of the {number} images, of shape "
      f"({number}, d), got {labels.dtype} of shape {labels.shape}: give num_classes if they are classes"
    )
  with np.errstate(over="ignore"):  # Numbers that are too large become infinite.
    vectors = labels.astype(np.float32)
  if not np.isfinite(vectors).all():
    row = int(np.argmin(np.isfinite(vectors).all(axis=1)))
    raise ValueError(f"labels must be finite float32 numbers, got {reprlib.repr(labels[row].tolist())} for image {row}")
  return vectors
