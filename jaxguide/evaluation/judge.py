"""A judge: a classifier that tells the class of a sample and never guides."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxguide.evaluation.features import check_images, check_labelled, pixel_features


@dataclass(frozen=True)
class Judge:
  """A support vector machine on raw pixels that predicts the class of a sample.

  It tells whether samples have the class that they were sampled for. It must not guide: a classifier that guides also
  accepts samples that merely fool it. Make one with `Judge.fit`.

  Attributes:
    machine: the fitted ``sklearn.svm.SVC``.
    shape: (height, width, channels) of the images that it was fitted on.
  """

  machine: Any
  shape: tuple[int, ...]

  @classmethod
  def fit(cls, images: np.ndarray, labels: np.ndarray) -> "Judge":
    """Fit a judge on real images. The result depends on the images and labels alone.

    The time grows with the square of the number of images: less than a second for the digits, minutes for tens of
    thousands.

    Args:
      images: uint8 of shape (n, height, width, channels), the training split.
      labels: int of shape (n,), of at least two classes.

    Raises:
      ValueError: if the images or labels are not of that type and shape, or are all of one class.
    """
    from sklearn.svm import SVC

    images, labels = np.asarray(images), np.asarray(labels)
    check_labelled(images, labels)
    if len(np.unique(labels)) < 2:
      raise ValueError(f"a judge needs at least two classes to tell apart, got only {labels[0]}")
    # On the digits, accuracy is flat within 1% for C from 5 to 30 and gamma from 0.05 to 0.3; "scale", 1 / (d var), is
    # 0.11 there and adapts to the size and contrast of other images.
    machine = SVC(C=10.0, kernel="rbf", gamma="scale")
    return cls(machine.fit(pixel_features(images), labels), images.shape[1:])

  def predict(self, images: np.ndarray) -> np.ndarray:
    """Say which class each image shows.

    Args:
      images: uint8 of shape (n, height, width, channels).

    Returns:
      int of shape (n,).

    Raises:
      ValueError: if the images are not uint8, or not of the shape that the judge was fitted on.
    """
    images = np.asarray(images)
    check_images(images)
    if images.shape[1:] != self.shape:
      raise ValueError(
        f"this judge was fitted on images of shape {self.shape}, got {images.shape[1:]}; "
        "fit one on images of that shape"
      )
    return self.machine.predict(pixel_features(images))

  def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
    """Give the share of the images, from 0 to 1, that the judge takes for what their labels say.

    Args:
      images: uint8 of shape (n, height, width, channels), n at least 1.
      labels: int of shape (n,), among the classes that the judge was fitted on.

    Raises:
      ValueError: as `predict` does, or if a label is of no class that the judge knows.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    check_labelled(images, labels)
    unknown = np.setdiff1d(labels, self.machine.classes_)
    if unknown.size:
      raise ValueError(
        f"label {unknown[0]} is of no class that this judge was fitted on; "
        f"it knows {', '.join(map(str, self.machine.classes_))}"
      )
    return float((self.predict(images) == labels).mean())
