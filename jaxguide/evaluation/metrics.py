"""Metrics on raw pixels: the Fréchet distance to real data, and the diversity within a class.

Raw pixels suit small images such as the 8 x 8 digits, and need no downloaded network. The values cannot be compared
with those on Inception features.
"""

import numpy as np
import numpy.typing as npt

from jaxguide.evaluation.features import check_labelled


def _moments(name: str, features: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Compute the mean, of shape (d,), and the symmetric square root of the unbiased covariance, of shape (d, d)."""
  features = np.asarray(features)
  if features.dtype.kind not in "fiub":
    raise ValueError(f"{name} must be real numbers, got {features.dtype}")
  if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
    raise ValueError(
      f"{name} must be at least 2 feature vectors of at least 1 number, of shape (n, d), got shape {features.shape}"
    )
  if not np.isfinite(features).all():
    raise ValueError(f"{name} must be finite, but some values are infinite or NaN; drop those samples")
  features = features.astype(np.float64)
  mean = features.mean(0)
  centred = features - mean
  values, vectors = np.linalg.eigh(centred.T @ centred / (len(features) - 1))
  # By rounding, the zero eigenvalues of a singular covariance can be slightly negative.
  return mean, (vectors * np.sqrt(values.clip(0))) @ vectors.T


def frechet_distance(features_a: npt.ArrayLike, features_b: npt.ArrayLike) -> float:
  """Compute the Fréchet distance between Gaussians fitted to two sets of feature vectors.

  It is ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``, with unbiased covariances ``S``. This is the formula of
  the FID (Heusel et al. 2017, arXiv:1706.08500), the square of the Wasserstein-2 distance. Few samples bias it upwards,
  so compare only distances of equally many samples.

  Args:
    features_a: shape (n, d), n at least 2.
    features_b: shape (m, d), m at least 2.

  Returns:
    The distance, at least 0, in squared units of the features.

  Raises:
    ValueError: if a set has fewer than 2 vectors or a value that is not real or not finite, or if the widths d differ.

  >>> a = np.array([[-1.0], [1.0]])
  >>> round(frechet_distance(a, 3 * a + 5), 6)  # 5^2 + (3 - 1)^2 * 2
  33.0
  """
  mean_a, root_a = _moments("features_a", features_a)
  mean_b, root_b = _moments("features_b", features_b)
  if len(mean_a) != len(mean_b):
    raise ValueError(
      f"both sets of features must have one width, got {len(mean_a)} and {len(mean_b)}: "
      "compute them from images of the same shape"
    )
  # With M = S_a^(1/2) S_b^(1/2), tr (S_a S_b)^(1/2) = tr (M M^T)^(1/2) is the sum of the singular values of M. The SVD
  # does not square M: if a covariance is singular, the square root of a rounding error of 1e-17 would be 3e-9.
  cross = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
  covariance_part = (root_a**2).sum() + (root_b**2).sum() - 2 * cross
  distance = float(((mean_a - mean_b) ** 2).sum() + covariance_part)
  if not np.isfinite(distance):
    raise ValueError("the features are too large: their squares overflow float64; divide both sets by one number")
  return max(0.0, distance)


def diversity(images: npt.ArrayLike, labels: npt.ArrayLike) -> float:
  """Compute how different the samples of the same class are.

  For each class it is the mean Euclidean distance, on pixels in [0, 1], over all pairs of samples with that label; the
  result is the mean over the classes. Classes with a single sample have no pair and do not count. It is 0 if all
  samples of each class are the same image. It does not measure quality: read it together with a measure of fidelity.

  Args:
    images: uint8 of shape (n, height, width, channels).
    labels: int of shape (n,), the classes that the images were sampled for.

  Returns:
    The mean distance, from 0 to ``sqrt(height * width * channels)``.

  Raises:
    ValueError: if no class has two samples, or the images or labels do not have that type and shape.

  >>> images = np.array([0, 255, 51, 51], np.uint8).reshape(4, 1, 1, 1)
  >>> diversity(images, np.array([0, 0, 1, 1]))
  0.5
  """
  images, labels = np.asarray(images), np.asarray(labels)
  check_labelled(images, labels)
  means = []
  for label in np.unique(labels):
    chosen = images[labels == label]
    n = len(chosen)
    if n > 1:
      pixels = chosen.reshape(n, -1).astype(np.float64)
      # For whole numbers |a|^2 + |b|^2 - 2ab is exact, so the distance of equal images is 0.
      gram = pixels @ pixels.T
      squares = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
      means.append(np.sqrt(squares).sum() / (n * (n - 1)) / 255)
  if not means:
    raise ValueError("no class has two samples to compare: draw at least two of one class")
  return float(np.mean(means))
