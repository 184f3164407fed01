"""Labelled images in memory."""

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from jaxguide._core import checks


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


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Labelled images.

  Attributes:
    images: ``uint8`` of shape (n, h, w, c), from 0 to 255.
    labels: whole numbers of any type, or a list of them, of shape (n,), from 0 to ``num_classes - 1``; they are kept as
      ``int32``.
    num_classes: how many classes there are, whether or not each occurs.
    name: what the dataset is called.

  Raises:
    ValueError: if the arrays are not that.
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
    """The shape (h, w, c) of one image."""
    return self.images.shape[1:]

  @functools.cached_property
  def fingerprint(self) -> str:
    """Tell these images from others: a SHA-256 over their shape, pixels, labels, and number of classes, in order.

    The name is not part of it, nor is the type of the labels. It is made once: do not change the arrays afterwards.
    """
    made = hashlib.sha256(f"{self.images.shape} {self.num_classes}".encode())
    for array in (self.images, self.labels.astype("<i8")):
      made.update(np.ascontiguousarray(array).reshape(-1).data)
    return made.hexdigest()
