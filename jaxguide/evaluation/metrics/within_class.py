"""How different the samples of one class are."""

import numpy as np
import numpy.typing as npt

from jaxguide.evaluation.features import check_labelled
from jaxguide.evaluation.metrics.arrays import check_features

_BLOCK = 2048
"""The number of rows of a block of distances."""


def _mean_distance(vectors: np.ndarray) -> float:
  """Compute the mean Euclidean distance over all pairs of at least two vectors, in blocks."""
  n = len(vectors)
  whole = vectors.dtype.kind in "iub"
  # For whole numbers |a|^2 + |b|^2 - 2ab is exact. Others are centred, so that there is less to cancel.
  centre = 0.0 if whole else vectors.mean(0, dtype=np.float64)
  starts = range(0, n, _BLOCK)
  total = 0.0
  for i in starts:
    a = vectors[i : i + _BLOCK].astype(np.float64) - centre
    norms_a = np.square(a).sum(1)
    for j in starts[i // _BLOCK :]:
      b = a if j == i else vectors[j : j + _BLOCK].astype(np.float64) - centre
      norms_b = np.square(b).sum(1)
      squares = norms_a[:, None] + norms_b
      # What is smaller than the rounding error is the distance of equal vectors.
      error = 0.0 if whole else 16 * np.finfo(np.float64).eps * squares
      squares -= 2 * (a @ b.T)
      squares[squares <= error] = 0
      if j == i:
        np.fill_diagonal(squares, 0)
      total += (1 if j == i else 2) * np.sqrt(squares).sum()
  return float(total / (n * (n - 1)))


def diversity(images: npt.ArrayLike, labels: npt.ArrayLike) -> float:
  """Compute how different the samples of the same class are, on pixels or on features.

  For each class it is the mean Euclidean distance over all pairs of samples with that label; the result is the mean
  over the classes. Classes with a single sample have no pair and do not count. It is 0 if all samples of each class are
  the same. It does not measure quality: read it together with a measure of fidelity.

  Args:
    images: images, uint8 of shape (n, height, width, channels), whose distances are those of pixels in [0, 1]; or
      features of shape (n, d).
    labels: int of shape (n,), the classes that the images were sampled for.

  Returns:
    The mean distance: from 0 to ``sqrt(height * width * channels)`` for images, in units of the features otherwise.

  Raises:
    ValueError: if no class has two samples, or the images, features or labels do not have that type and shape.

  >>> images = np.array([0, 255, 51, 51], np.uint8).reshape(4, 1, 1, 1)
  >>> diversity(images, np.array([0, 0, 1, 1]))
  0.5
  >>> diversity(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([7, 7]))
  5.0
  """
  images, labels = np.asarray(images), np.asarray(labels)
  unit = 1.0
  if images.ndim == 2:
    images = check_features("features", images, least=1)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
      raise ValueError(
        f"labels must be whole numbers, one for each of the {len(images)} feature vectors, "
        f"got {labels.dtype} of shape {labels.shape}"
      )
  else:
    check_labelled(images, labels)
    unit = 255.0
  classes, counts = np.unique(labels, return_counts=True)
  chosen = (
    images[labels == label].reshape(count, -1) for label, count in zip(classes, counts, strict=True) if count > 1
  )
  means = [_mean_distance(vectors) / unit for vectors in chosen]
  if not means:
    raise ValueError("no class has two samples to compare: draw at least two of one class")
  if not np.isfinite(means).all():
    raise ValueError("the features are too large: their squares overflow float64; divide them by one number")
  return float(np.mean(means))
