"""How well samples match the real data (Fréchet distance), their labels (`Judge`) and each other (diversity).

All three look at raw pixels. That suits small images such as the 8 x 8 digits, needs no downloaded network, and is why
none of these figures compares with one computed on Inception features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


def _check_images(images: np.ndarray) -> None:
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(
      "images must be uint8 of shape (n, height, width, channels), "
      f"got {images.dtype} of shape {images.shape}; quantise them to 0..255 first"
    )


def _check_labelled(images: np.ndarray, labels: np.ndarray) -> None:
  _check_images(images)
  if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
    raise ValueError(
      f"labels must be whole numbers, one for each of the {len(images)} images (at least one), "
      f"got {labels.dtype} of shape {labels.shape}"
    )


def pixel_features(images: np.ndarray) -> np.ndarray:
  """Lay each image out as one vector of its pixels.

  Args:
    images: uint8 of shape (n, height, width, channels).

  Returns:
    float64 of shape (n, height * width * channels), in [0, 1].

  Raises:
    ValueError: if the images have another type or number of axes.

  >>> pixel_features(np.array([[[[0], [255]]]], np.uint8))
  array([[0., 1.]])
  """
  images = np.asarray(images)
  _check_images(images)
  return images.reshape(len(images), int(np.prod(images.shape[1:]))) / 255.0


def _moments(name: str, features: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Give the mean and a symmetric square root of the unbiased covariance."""
  features = np.asarray(features)
  if features.dtype.kind not in "fiub":
    raise ValueError(f"{name} must be real numbers, got {features.dtype}")
  if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
    raise ValueError(
      f"{name} must be at least 2 feature vectors of at least 1 number, of shape (n, d), got shape {features.shape}"
    )
  if not np.isfinite(features).all():
    raise ValueError(f"{name} must be finite, but holds infinity or NaN; drop those samples")
  features = features.astype(np.float64)
  mean = features.mean(0)
  centred = features - mean
  values, vectors = np.linalg.eigh(centred.T @ centred / (len(features) - 1))
  # Rounding leaves the zero eigenvalues of a singular covariance slightly negative.
  return mean, (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(features_a: npt.ArrayLike, features_b: npt.ArrayLike) -> float:
  """Measure the Fréchet distance between Gaussians fitted to two sets of feature vectors.

  It is ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``, with unbiased covariances ``S``: the formula of the FID
  (Heusel et al. 2017, arXiv:1706.08500), which is the square of the Wasserstein-2 distance. Few samples bias it
  upwards, so compare only figures that come from equally many.

  Args:
    features_a: shape (n, d), n at least 2.
    features_b: shape (m, d), m at least 2.

  Returns:
    The distance, at least 0, in squared units of the features.

  Raises:
    ValueError: if a set has fewer than 2 samples or a value that is not finite, or the widths d differ.

  >>> a = np.array([[-1.0], [1.0]])
  >>> round(frechet_distance(a, 3 * a + 5), 6)  # 5^2 + (3 - 1)^2 * 2
  33.0
  """
  mean_a, root_a = _moments("features_a", features_a)
  mean_b, root_b = _moments("features_b", features_b)
  if len(mean_a) != len(mean_b):
    raise ValueError(
      f"both sets of features must have one width, got {len(mean_a)} and {len(mean_b)}; were the images of one size?"
    )
  # With M = S_a^(1/2) S_b^(1/2), tr (S_a S_b)^(1/2) = tr (M M^T)^(1/2) is the sum of M's singular values. They come
  # without squaring M: where a covariance is singular, the root of a rounding error of 1e-17 would be 3e-9.
  cross = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
  spread = (root_a**2).sum() + (root_b**2).sum() - 2 * cross
  distance = float(((mean_a - mean_b) ** 2).sum() + spread)
  if not np.isfinite(distance):
    raise ValueError("the features are too large: their squares are beyond float64")
  return max(0.0, distance)


def diversity(images: npt.ArrayLike, labels: npt.ArrayLike) -> float:
  """Measure how unlike one another the samples of one class are.

  For each class it takes the mean Euclidean distance, on pixels in [0, 1], over all pairs of samples for which that
  class was asked; the result is the mean over the classes. Classes with a single sample have no pair and do not count.
  It is 0 where every class has collapsed onto one image, and says nothing of whether the samples are any good: read it
  beside fidelity.

  Args:
    images: uint8 of shape (n, height, width, channels).
    labels: int of shape (n,), the classes that were asked for.

  Returns:
    The mean distance, from 0 to ``sqrt(height * width * channels)``.

  Raises:
    ValueError: if no class has two samples, or the images or labels are not of that type and shape.

  >>> images = np.array([0, 255, 51, 51], np.uint8).reshape(4, 1, 1, 1)
  >>> diversity(images, np.array([0, 0, 1, 1]))
  0.5
  """
  images, labels = np.asarray(images), np.asarray(labels)
  _check_labelled(images, labels)
  means = []
  for label in np.unique(labels):
    chosen = images[labels == label]
    n = len(chosen)
    if n > 1:
      pixels = chosen.reshape(n, -1).astype(np.float64)
      # On whole numbers |a|^2 + |b|^2 - 2ab is exact, so equal images are at distance 0.
      gram = pixels @ pixels.T
      squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
      means.append(np.sqrt(squares).sum() / (n * (n - 1)) / 255)
  if not means:
    raise ValueError("no class has two samples to compare: draw at least two of one class")
  return float(np.mean(means))


@dataclass(frozen=True)
class Judge:
  """A support vector machine on raw pixels, which says what class a sample shows.

  It judges whether samples are of the class that was asked for. It never guides: a classifier that steered the sampler
  would also approve of samples that merely fool it. Make one with `Judge.fit`.

  Attributes:
    machine: the fitted ``sklearn.svm.SVC``.
    shape: (height, width, channels) of the images that it was fitted on.
  """

  machine: Any
  shape: tuple[int, ...]

  @classmethod
  def fit(cls, images: np.ndarray, labels: np.ndarray) -> "Judge":
    """Fit a judge on real images; the result depends on nothing but them.

    The time grows with the square of the number of images: a moment for the digits, minutes for tens of thousands.

    Args:
      images: uint8 of shape (n, height, width, channels), the training split.
      labels: int of shape (n,), of at least two classes.

    Raises:
      ValueError: if the images or labels are not of that type and shape, or are all of one class.
    """
    from sklearn.svm import SVC

    images, labels = np.asarray(images), np.asarray(labels)
    _check_labelled(images, labels)
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
    _check_images(images)
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
    _check_labelled(images, labels)
    unknown = np.setdiff1d(labels, self.machine.classes_)
    if unknown.size:
      raise ValueError(
        f"label {unknown[0]} is of no class that this judge was fitted on; "
        f"it knows {', '.join(map(str, self.machine.classes_))}"
      )
    return float((self.predict(images) == labels).mean())
