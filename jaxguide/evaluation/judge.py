"""A judge: a classifier that predicts the class of samples, and does not guide them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxguide.evaluation.features import check_images, check_labelled, pixel_features


@dataclass(frozen=True)
class Judge:
  """A support vector machine on raw pixels that predicts the class of a sample.

  It measures whether samples have the class that they were sampled for. Do not guide with it: guidance can produce
  samples that fool the guiding classifier, and that classifier cannot detect them. Make a judge with `Judge.fit`.

  Attributes:
    machine: the fitted ``sklearn.svm.SVC``.
    shape: (height, width, channels) of the images on which it was fitted.
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
      ValueError: if the images or labels do not have that type and shape, or if all labels are equal.
    """
    from sklearn.svm import SVC

    images, labels = np.asarray(images), np.asarray(labels)
    check_labelled(images, labels)
    if len(np.unique(labels)) < 2:
      raise ValueError(f"a judge needs images of at least two classes, but all labels are {labels[0]}")
    # On the digits, the accuracy changes by less than 1% for C from 5 to 30 and gamma from 0.05 to 0.3. "scale" is
    # 1 / (d var), which is 0.11 there. It adapts to the size and contrast of other images.
    machine = SVC(C=10.0, kernel="rbf", gamma="scale")
    return cls(machine.fit(pixel_features(images), labels), images.shape[1:])

  def predict(self, images: np.ndarray) -> np.ndarray:
    """Predict the class of each image.

    Args:
      images: uint8 of shape (n, height, width, channels).

    Returns:
      int of shape (n,).

    Raises:
      ValueError: if the images are not uint8, or do not have the shape of the images on which the judge was fitted.
    """
    images = np.asarray(images)
    check_images(images)
    if images.shape[1:] != self.shape:
      raise ValueError(
        f"this judge was fitted on images of shape {self.shape}, got {images.shape[1:]}; "
        "fit a judge on images of that shape"
      )
    return self.machine.predict(pixel_features(images))

  def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
    """Compute the share of images, from 0 to 1, for which the judge predicts their label.

    Args:
      images: uint8 of shape (n, height, width, channels), n at least 1.
      labels: int of shape (n,), among the classes on which the judge was fitted.

    Raises:
      ValueError: for the reasons of `predict`, or if the judge was not fitted on the class of a label.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    check_labelled(images, labels)
    unknown = np.setdiff1d(labels, self.machine.classes_)
    if unknown.size:
      raise ValueError(
        f"this judge was not fitted on a class {unknown[0]}, which is among the labels; "
        f"its classes are {', '.join(map(str, self.machine.classes_))}"
      )
    return float((self.predict(images) == labels).mean())
