"""The Fréchet distance between Gaussians fitted to features, and what too few samples do to it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxguide._core import checks
from jaxguide.evaluation.metrics.arrays import check_features, check_width, chunks

SINGLE = float(np.finfo(np.float32).eps)
"""Files of statistics are often computed in float32, so a covariance is taken for symmetric and positive semi-definite
if it is up to the rounding errors of float32."""


class Gaussian(NamedTuple):
  """The mean and the covariance of features.

  Args:
    mean: float64 of shape (d,).
    covariance: float64 of shape (d, d), unbiased: the sum of squares divided by ``n - 1``.
    n: the number of samples that it was fitted to; None if it is not known.
  """

  mean: np.ndarray
  covariance: np.ndarray
  n: int | None = None


class Moments:
  """The mean and the covariance of features that come in batches, in float64 (Chan et al. 1983).

  >>> moments = Moments()
  >>> moments.add(np.array([[0.0], [2.0]]))
  >>> moments.add(np.array([[4.0]]))
  >>> moments.gaussian()
  Gaussian(mean=array([2.]), covariance=array([[4.]]), n=3)
  """

  def __init__(self) -> None:
    self.n = 0
    self._mean: np.ndarray = np.zeros(0)
    self._squares: np.ndarray = np.zeros((0, 0))

  def add(self, features: npt.ArrayLike) -> None:
    """Add features of shape (n, d), n at least 1.

    Raises:
      ValueError: if they are not finite real numbers of that shape, or their width is not that of the batches before.
    """
    features = check_features("features", features, least=1)
    width = features.shape[1]
    if self.n:
      check_width(len(self._mean), width)
    else:
      self._mean, self._squares = np.zeros(width), np.zeros((width, width))
    with np.errstate(over="ignore", invalid="ignore"):
      for rows in chunks(*features.shape):
        part = features[rows].astype(np.float64)
        mean = part.mean(0)
        part -= mean
        n, step = self.n + len(part), mean - self._mean
        self._squares += part.T @ part
        self._squares += np.outer(step, step * (self.n * len(part) / n))
        self._mean += step * (len(part) / n)
        self.n = n

  def gaussian(self) -> Gaussian:
    """Give the Gaussian of all features added so far.

    Raises:
      ValueError: if they are fewer than 2, or so large that their squares overflow.
    """
    if self.n < 2:
      raise ValueError(f"a covariance needs at least 2 feature vectors, got {self.n}")
    if not np.isfinite(self._squares).all():
      raise ValueError("the features are too large: their squares overflow float64; divide both sets by one number")
    return Gaussian(self._mean.copy(), self._squares / (self.n - 1), self.n)


def gaussian(features: npt.ArrayLike) -> Gaussian:
  """Fit a Gaussian to features of shape (n, d), n at least 2, in float64. Pieces of 64 MiB are copied, never the whole.

  Raises:
    ValueError: if there are fewer than 2 vectors, or a value is not real or not finite.

  >>> gaussian([[1.0, 0.0], [3.0, 0.0]])
  Gaussian(mean=array([2., 0.]), covariance=array([[2., 0.], [0., 0.]]), n=2)
  """
  moments = Moments()
  moments.add(check_features("features", features))
  return moments.gaussian()


def check_gaussian(name: str, mean: npt.ArrayLike, covariance: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Check a mean and a covariance, and return them in float64.

  The covariance must be symmetric and positive semi-definite up to the rounding errors of float32.

  Raises:
    ValueError: if the shapes, the values or the covariance are not valid.

  >>> check_gaussian("the statistics", np.zeros(2), np.diag([1.0, -1.0]))
  Traceback (most recent call last):
  ...
  ValueError: the covariance of the statistics has a negative eigenvalue, so it is not a covariance: ...
  """
  mean, covariance = np.asarray(mean), np.asarray(covariance)
  if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
    raise ValueError(f"{name} must be real numbers, got {mean.dtype} and {covariance.dtype}")
  if mean.ndim != 1 or not mean.size or covariance.shape != (len(mean), len(mean)):
    raise ValueError(
      f"{name} must have a mean of shape (d,) and a covariance of shape (d, d), got {mean.shape} and {covariance.shape}"
    )
  mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
  if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
    raise ValueError(f"{name} must be finite, but some values of the mean or the covariance are infinite or NaN")
  if not covariance.any():
    return mean, covariance
  slack = len(mean) * SINGLE * max(covariance.diagonal().max(), np.finfo(np.float64).tiny)
  if np.abs(covariance - covariance.T).max() > slack:
    raise ValueError(f"the covariance of {name} is not symmetric: make the statistics again")
  try:
    np.linalg.cholesky(covariance + slack * np.eye(len(mean)))
  except np.linalg.LinAlgError:
    raise ValueError(
      f"the covariance of {name} has a negative eigenvalue, so it is not a covariance: make the statistics again"
    ) from None
  return mean, covariance


class Factored(NamedTuple):
  """A Gaussian whose covariance is ``factor.T @ factor``.

  Args:
    mean: shape (d,).
    factor: shape (r, d), of any number of rows.
    trace: the trace of the covariance.
  """

  mean: np.ndarray
  factor: np.ndarray
  trace: float


def _of_few(features: np.ndarray) -> Factored:
  """Factor the covariance of features with fewer samples than columns: the centred features are a factor."""
  with np.errstate(over="ignore", invalid="ignore"):
    mean = features.mean(0, dtype=np.float64)
    factor = (features - mean) / np.sqrt(len(features) - 1)
    trace = float(np.square(factor).sum())
  if not np.isfinite(trace):
    raise ValueError("the features are too large: their squares overflow float64; divide both sets by one number")
  return Factored(mean, factor, trace)


def _of_covariance(mean: np.ndarray, covariance: np.ndarray) -> Factored:
  trace = float(covariance.trace())
  try:
    factor = np.linalg.cholesky(covariance).T
    if np.square(factor.diagonal()).min() > 1e-10 * covariance.diagonal().max():
      return Factored(mean, factor, trace)
  except np.linalg.LinAlgError:
    pass
  values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
  # By rounding, the zero eigenvalues of a singular covariance are small numbers of either sign.
  kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
  return Factored(mean, np.sqrt(values[kept])[:, None] * vectors[:, kept].T, trace)


def factored(name: str, given: npt.ArrayLike | Gaussian) -> Factored:
  """Factor the covariance of features or of a `Gaussian`.

  Raises:
    ValueError: if the features or the Gaussian are not valid.
  """
  if isinstance(given, Gaussian):
    return _of_covariance(*check_gaussian(name, given.mean, given.covariance))
  features = check_features(name, given)
  if len(features) <= features.shape[1]:
    return _of_few(features)
  fitted = gaussian(features)
  return _of_covariance(fitted.mean, fitted.covariance)


class Spanned(NamedTuple):
  """Few samples and a Gaussian of many more columns, in the span of the samples: no matrix of the columns is factored.

  Args:
    centre: shape (d,), the mean of the samples.
    products: shape (n, n), ``X S X^T`` of the centred samples ``X`` and the Gaussian's covariance ``S``.
    norms: shape (n,), the squared lengths of the centred samples.
  """

  centre: np.ndarray
  products: np.ndarray
  norms: np.ndarray

  @classmethod
  def of(cls, features: np.ndarray, covariance: np.ndarray) -> "Spanned":
    """Compute the products of samples (n, d)."""
    centre = features.mean(0, dtype=np.float64)
    centred = features - centre
    with np.errstate(over="ignore", invalid="ignore"):
      products = centred @ covariance @ centred.T
    if not np.isfinite(products).all():
      raise ValueError("the features are too large: their squares overflow float64; divide both sets by one number")
    return cls(centre, products, np.square(centred).sum(1))

  @staticmethod
  def suits(features: np.ndarray, given: object) -> bool:
    """Whether the second set is a Gaussian, and the samples of the first are at most half as many as its columns."""
    return isinstance(given, Gaussian) and 2 * len(features) <= features.shape[1]

  def cross(self, counts: np.ndarray) -> float:
    """Return the trace of ``(S_a S_b)^(1/2)`` where sample i counts ``counts[i]`` times: shape (n,), sum above 1."""
    n = counts.sum()
    mean = self.products @ counts / n
    gram = self.products - mean[:, None] - mean + counts @ mean / n
    chosen, roots = np.flatnonzero(counts), np.sqrt(counts[counts > 0])
    values = np.linalg.eigvalsh(gram[np.ix_(chosen, chosen)] * (roots[:, None] * roots))
    # Zeros, of which there is at least one, are rounding errors here. The root of one would be 3e-9 of the largest.
    values[values < len(values) * np.finfo(np.float64).eps * values[-1]] = 0
    return float(np.sqrt(values).sum() / np.sqrt(n - 1))


def _distance_of_few(few: npt.ArrayLike, given: Gaussian, names: Sequence[str]) -> float | None:
  """Compute the distance in the span of few samples; None if they are not few."""
  features = check_features(names[0], few)
  if not Spanned.suits(features, given):
    return None
  mean, covariance = check_gaussian(names[1], given.mean, given.covariance)
  check_width(features.shape[1], len(mean))
  spanned = Spanned.of(features, covariance)
  trace = float(spanned.norms.sum() / (len(features) - 1) + covariance.trace())
  return float(((spanned.centre - mean) ** 2).sum()) + trace - 2 * spanned.cross(np.ones(len(features)))


def frechet_distance(features_a: npt.ArrayLike | Gaussian, features_b: npt.ArrayLike | Gaussian) -> float:
  """Compute the Fréchet distance between Gaussians fitted to two sets of feature vectors.

  It is ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``, with unbiased covariances ``S``. This is the formula of
  the FID (Heusel et al. 2017, arXiv:1706.08500), the square of the Wasserstein-2 distance. Few samples bias it upwards,
  so compare only distances of equally many samples; see `frechet_bias`. Covariances may be singular.

  Args:
    features_a: shape (n, d), n at least 2; or the `Gaussian` of such features.
    features_b: shape (m, d), m at least 2; or a `Gaussian`.

  Returns:
    The distance, at least 0, in squared units of the features.

  Raises:
    ValueError: if a set has fewer than 2 vectors or a value that is not real or not finite, if a covariance is not
      symmetric or not positive semi-definite, or if the widths d differ.

  >>> a = np.array([[-1.0], [1.0]])
  >>> round(frechet_distance(a, 3 * a + 5), 6)  # 5^2 + (3 - 1)^2 * 2
  33.0
  >>> round(frechet_distance(gaussian(a), Gaussian(np.array([5.0]), np.array([[18.0]]))), 6)
  33.0
  """
  names = ("features_a", "features_b")
  for few, given, order in ((features_a, features_b, names), (features_b, features_a, names[::-1])):
    if isinstance(given, Gaussian) and not isinstance(few, Gaussian):
      found = _distance_of_few(few, given, order)
      if found is not None:
        return max(0.0, found)
  a, b = factored("features_a", features_a), factored("features_b", features_b)
  check_width(len(a.mean), len(b.mean))
  # With factors S = F^T F, tr (S_a S_b)^(1/2) is the sum of the singular values of F_a F_b^T. The SVD does not square
  # that matrix: if a covariance is singular, the square root of a rounding error of 1e-17 would be 3e-9.
  cross = np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum()
  distance = float(((a.mean - b.mean) ** 2).sum() + a.trace + b.trace - 2 * cross)
  if not np.isfinite(distance):
    raise ValueError("the features are too large: their squares overflow float64; divide both sets by one number")
  return max(0.0, distance)


def frechet_bias(covariance: npt.ArrayLike, n: int) -> float:
  """Estimate the Fréchet distance that ``n`` samples of a Gaussian have, on average, from that Gaussian itself.

  It is the part of a distance that comes from the number of samples. For ``n`` of at least ``2 d`` it is the second
  order of the distance in the errors of the moments: with the eigenvalues ``l`` of the covariance,
  ``sum_i l_i / n + (sum_ij l_i l_j / (l_i + l_j) + sum_i l_i / 2) / (2 (n - 1))``, for the identity
  ``d / n + d (d + 1) / (4 (n - 1))``. Below, ``n`` samples are drawn with seed 0, once where
  ``n d`` is large. The figure is exact within some
  percent. Features are not Gaussian, so it is a rough figure for them.

  Args:
    covariance: shape (d, d), positive semi-definite.
    n: the number of samples, at least 2.

  Returns:
    The mean distance, in squared units of the features.

  Raises:
    ValueError: if ``n`` is below 2, or the covariance is not valid.

  >>> round(frechet_bias(np.eye(16), 500), 4)
  0.1683
  """
  return _bias(_eigenvalues(covariance), checks.at_least("n", n, 2))


def _eigenvalues(covariance: npt.ArrayLike) -> np.ndarray:
  """Return the eigenvalues of a covariance that are not 0, of shape (r,)."""
  covariance = np.asarray(covariance)
  _, covariance = check_gaussian("the Gaussian", np.zeros(len(covariance) if covariance.ndim else 1), covariance)
  values = np.linalg.eigvalsh(covariance).clip(0)
  return values[values > 1e-12 * values[-1]]


def _bias(values: np.ndarray, n: int) -> float:
  """Estimate the distance of ``n`` samples from their Gaussian by the eigenvalues of its covariance."""
  total = values.sum()
  if not total:
    return 0.0
  if n >= 2 * len(values):
    pairs = (values[:, None] * values / (values[:, None] + values)).sum()
    return float(total / n + (pairs + total / 2) / (2 * (n - 1)))
  rng = np.random.default_rng(0)
  distances = []
  for _ in range(max(1, 2**16 // (n * len(values)))):
    drawn = rng.standard_normal((n, len(values)))
    drawn = (drawn - drawn.mean(0)) / np.sqrt(n - 1)
    moved = drawn * values
    gram = moved @ moved.T if n < len(values) else moved.T @ moved
    cross = np.sqrt(np.linalg.eigvalsh(gram).clip(0)).sum()
    distances.append(total + np.square(drawn * np.sqrt(values)).sum() - 2 * cross)
  return float(total / n + np.mean(distances))


def few_samples_warning(n: int, reference: Gaussian, features: np.ndarray | None = None) -> str:
  """Say what fewer samples than columns do to a Fréchet distance, in a sentence or two with the size of the bias.

  Args:
    n: the number of generated samples, at least 2.
    reference: the Gaussian of the real features.
    features: shape (m, d), the features that it was fitted to, if they are at hand. Where they are few, the eigenvalues
      of their covariance are computed in their span.

  Returns:
    The text; empty if there are more samples than columns.

  Raises:
    ValueError: if ``n`` is below 2, or the covariance is not valid.

  >>> few_samples_warning(8, Gaussian(np.zeros(16), np.eye(16)))
  '8 samples are too few for 16 features: their covariance has rank 7 at most. The Fréchet distance of 8 real ...
  >>> few_samples_warning(17, Gaussian(np.zeros(16), np.eye(16)))
  ''
  """
  d = len(reference.mean)
  if checks.at_least("n", n, 2) > d:
    return ""
  if features is not None and len(features) == reference.n and 2 * len(features) <= d:
    factor = _of_few(features).factor
    values = np.linalg.eigvalsh(factor @ factor.T).clip(0)
    values = values[values > 1e-12 * values[-1]]
  else:
    values = _eigenvalues(reference.covariance)
  return (
    f"{n:,} samples are too few for {d:,} features: their covariance has rank {n - 1:,} at most. The Fréchet distance "
    f"of {n:,} real samples would already be about {_bias(values, n):.3g}, and that of 50,000 "
    f"about {_bias(values, 50_000):.3g} (for Gaussian features). Compare it only with distances "
    "of equally many samples."
  )
