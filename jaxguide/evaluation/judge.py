"""Judges: classifiers that predict the class of samples, and do not guide them.

A judge measures whether samples have the class that they were sampled for. Do not guide with it: guidance can produce
samples that fool the guiding classifier, and that classifier cannot detect them.
"""

import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide.evaluation.features import check_images, check_labelled, pixel_features

MOST_EXAMPLES = 20_000
"""The most examples that `fit_judge` fits a judge on."""

MOST_PIXELS = 4096
"""The most numbers in an image for which a judge on pixels is chosen by default."""


@dataclass(frozen=True)
class Judge:
  """A classifier on pixels or on features. Make one with `Judge.fit` or `Judge.fit_features`.

  Attributes:
    machine: the fitted classifier of scikit-learn.
    shape: (height, width, channels) of the images on which it was fitted; None for a judge on features.
    name: what it is, for tables and reports.
    hash: identifies what it was fitted on; empty if that is not known.
  """

  machine: Any
  shape: tuple[int, ...] | None
  name: str = "a support vector machine on pixels"
  hash: str = ""

  @classmethod
  def fit(cls, images: np.ndarray, labels: np.ndarray) -> "Judge":
    """Fit a support vector machine on the pixels of real images. The result depends on the images and labels alone.

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
    _check_classes(labels)
    # On the digits, the accuracy changes by less than 1% for C from 5 to 30 and gamma from 0.05 to 0.3. "scale" is
    # 1 / (d var), which is 0.11 there. It adapts to the size and contrast of other images.
    machine = SVC(C=10.0, kernel="rbf", gamma="scale")
    return cls(machine.fit(pixel_features(images), labels), images.shape[1:], hash=_hash(images, labels))

  @classmethod
  def fit_features(cls, features: np.ndarray, labels: np.ndarray, name: str = "features") -> "Judge":
    """Fit a logistic regression on the features of real images.

    Args:
      features: shape (n, d), finite.
      labels: int of shape (n,), of at least two classes.
      name: the name of the features.

    Raises:
      ValueError: if the features or labels do not have that shape, or if all labels are equal.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f"features must have shape (n, d) and labels must be n whole numbers, got {features.shape} and {labels.dtype} "
        f"of shape {labels.shape}"
      )
    _check_classes(labels)
    machine = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConvergenceWarning)  # After 200 steps its accuracy does not change any more.
      fitted = machine.fit(features, labels)
    return cls(fitted, None, f"a logistic regression on features ({name})", _hash(features, labels))

  def predict(self, images: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
    """Predict the class of each image.

    Args:
      images: uint8 of shape (n, height, width, channels).
      features: shape (n, d), the features of the images, for a judge on features.

    Returns:
      int of shape (n,).

    Raises:
      ValueError: if the images are not uint8, or do not have the shape of the images on which the judge was fitted; or
        if a judge on features has no features, or features of another width.
    """
    images = np.asarray(images)
    check_images(images)
    if self.shape is None:
      width = self.machine.n_features_in_
      if features is None or features.shape != (len(images), width):
        got = "none" if features is None else f"features of shape {features.shape}"
        raise ValueError(f"this judge needs {width} features of each of the {len(images)} images, got {got}")
      return self.machine.predict(features)
    if images.shape[1:] != self.shape:
      raise ValueError(
        f"this judge was fitted on images of shape {self.shape}, got {images.shape[1:]}; "
        "fit a judge on images of that shape"
      )
    return self.machine.predict(pixel_features(images))

  def unknown(self, labels: np.ndarray) -> np.ndarray:
    """Return the classes among labels on which the judge was not fitted, in ascending order."""
    return np.setdiff1d(labels, self.machine.classes_)

  def right(self, images: np.ndarray, labels: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
    """Say of each image whether the judge predicts its label.

    Args:
      images: uint8 of shape (n, height, width, channels), n at least 1.
      labels: int of shape (n,), among the classes on which the judge was fitted.
      features: as for `predict`.

    Returns:
      bool of shape (n,).

    Raises:
      ValueError: for the reasons of `predict`, or if the judge was not fitted on the class of a label.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    check_labelled(images, labels)
    unknown = self.unknown(labels)
    if unknown.size:
      raise ValueError(
        f"this judge was not fitted on a class {unknown[0]}, which is among the labels; "
        f"its classes are {', '.join(map(str, self.machine.classes_))}"
      )
    return self.predict(images, features) == labels

  def accuracy(self, images: np.ndarray, labels: np.ndarray, features: np.ndarray | None = None) -> float:
    """Compute the share of images, from 0 to 1, for which the judge predicts their label.

    The arguments and the errors are those of `right`.
    """
    return float(self.right(images, labels, features).mean())


def _hash(examples: np.ndarray, labels: np.ndarray) -> str:
  digest = hashlib.sha256(np.ascontiguousarray(examples).data)
  digest.update(np.ascontiguousarray(labels, np.int64).data)
  return digest.hexdigest()[:16]


def _check_classes(labels: np.ndarray) -> None:
  if len(np.unique(labels)) < 2:
    raise ValueError(f"a judge needs images of at least two classes, but all labels are {labels[0]}")


KINDS = ("auto", "pixels", "features", "none")


def fit_judge(
  kind: str, images: np.ndarray | None, features: np.ndarray | None, labels: np.ndarray | None, features_name: str = ""
) -> Judge | None:
  """Fit a judge on real images, of at most `MOST_EXAMPLES` examples, chosen at random if there are more.

  Args:
    kind: ``"pixels"``, a support vector machine; ``"features"``, a logistic regression; ``"auto"``, on pixels for
      images of at most `MOST_PIXELS` numbers, else on features; or ``"none"``.
    images: uint8 of shape (n, height, width, channels); None if they are not at hand.
    features: shape (n, d), their features; None if they are not at hand.
    labels: int of shape (n,), their classes; None if they have none.
    features_name: the name of the features.

  Returns:
    The judge; None for ``"none"``, or for ``"auto"`` where there are no labels of two classes, or neither images nor
    features.

  Raises:
    ValueError: for another kind, or a kind for which something is missing.
  """
  checks.lookup("judge", kind, dict.fromkeys(KINDS))
  source = {"pixels": images, "features": features}
  if kind == "auto":
    if labels is None or len(np.unique(labels)) < 2:
      return None
    small = images is not None and np.prod(images.shape[1:]) <= MOST_PIXELS
    kind = "pixels" if small else "features" if features is not None else "none"
  if kind == "none":
    return None
  if labels is None or source[kind] is None:
    what = "labels" if labels is None else {"pixels": "the images", "features": "the features"}[kind]
    raise ValueError(f"judge {kind!r} needs {what} of the reference, which are not at hand: choose another judge")
  rows = np.sort(np.random.default_rng(0).permutation(len(labels))[:MOST_EXAMPLES])
  if kind == "pixels" and images is not None:
    return Judge.fit(images[rows], labels[rows])
  return Judge.fit_features(np.asarray(features)[rows], labels[rows], features_name)
