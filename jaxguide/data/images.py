"""Labelled images in memory."""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from jaxguide._core import checks


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
class Images:
  """Labelled images in memory.

  Attributes:
    images: ``uint8`` of shape (n, h, w, c), from 0 to 255.
    labels: a list or array of whole numbers of shape (n,), from 0 to ``num_classes - 1``; stored as ``int32``.
    num_classes: number of classes, including those without an image.
    name: the name of the dataset.

  Raises:
    ValueError: if the images or the labels have another type, shape or range.
  """

  images: Any
  labels: Any
  num_classes: int
  name: str

  def __post_init__(self):
    images, labels = np.asarray(self.images), np.asarray(self.labels)
    check_images(images, labels)
    checks.labels("label", labels, checks.at_least("num_classes", self.num_classes, 1))
    object.__setattr__(self, "images", images)
    object.__setattr__(self, "labels", labels.astype(np.int32))

  def __len__(self) -> int:
    return len(self.images)

  @property
  def image_shape(self) -> tuple[int, ...]:
    """Shape (h, w, c) of one image."""
    return self.images.shape[1:]

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the images' shape, the number of classes, the pixels and the labels, in this order.

    It does not depend on the name or on the type of the labels. It is computed once: do not change the arrays later.
    """
    digest = hashlib.sha256(f"{self.images.shape} {self.num_classes}".encode())
    for array in (self.images, self.labels.astype("<i8")):
      digest.update(np.ascontiguousarray(array).reshape(-1).data)
    return digest.hexdigest()
