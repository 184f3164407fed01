"""Intervals of figures, each with a text that says what it is an interval of."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxguide._core import checks
from jaxguide.evaluation.metrics.arrays import check_features, check_width, chunks
from jaxguide.evaluation.metrics.frechet import Factored, Gaussian, Spanned, check_gaussian, factored

BUDGET = 1e13
"""The number of operations that `frechet_interval` may take by default: minutes on two cores."""
_FEWEST, _MOST = 30, 200


class Interval(NamedTuple):
  """An interval of a figure.

  Args:
    low: the lower end.
    high: the upper end.
    kind: what the interval is, such as ``"95 % of 1,000 bootstrap resamples"``.
  """

  low: float
  high: float
  kind: str


def _level(level: float) -> float:
  level = checks.number("level", level, 0, 1)
  if level in {0, 1}:
    raise ValueError(f"level must be between 0 and 1, without both, got {level}")
  return level


def percent(level: float) -> str:
  """Write a level as a percentage."""
  return f"{100 * level:.6g} %"


def _percentiles(values: np.ndarray, level: float) -> tuple[float, float]:
  if not np.isfinite(values).all():
    raise ValueError("the figure of a bootstrap resample is infinite or NaN; check the function on such a resample")
  low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def bootstrap(
  function: Callable[[np.ndarray], float], n: int, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
  """Compute the percentile interval of a bootstrap over ``n`` samples (Efron 1979).

  It suits means and other figures that copies of a sample do not bias. For the Fréchet distance use `frechet_interval`.

  Args:
    function: maps rows, int64 of shape (n,) with repetitions, to the figure of these samples.
    n: the number of samples, at least 2.
    resamples: the number of resamples, at least 2.
    seed: chooses them.
    level: the share of the resamples' figures in the interval, between 0 and 1.

  Raises:
    ValueError: if an argument is out of range, or the figure of a resample is not finite.

  >>> values = np.arange(100.0)
  >>> low, high, kind = bootstrap(lambda rows: values[rows].mean(), 100)
  >>> round(low), round(high), kind
  (44, 55, '95 % of 1,000 bootstrap resamples')
  """
  n, resamples = checks.at_least("n", n, 2), checks.at_least("resamples", resamples, 2)
  level, rng = _level(level), np.random.default_rng(checks.at_least("seed", seed, 0))
  figures = np.array([float(function(rng.integers(n, size=n))) for _ in range(resamples)])
  return Interval(*_percentiles(figures, level), f"{percent(level)} of {resamples:,} bootstrap resamples")


def mean_interval(
  values: npt.ArrayLike, resamples: int = 2000, seed: int = 0, level: float = 0.95, what: str = "samples"
) -> Interval:
  """Compute the bootstrap interval of a mean of one value for each sample, such as a density.

  The values of the samples are resampled, not the features: what the values depend on beside their own sample, such as
  the balls around the real samples, is kept. For values of 0 and 1 use `proportion_interval`.

  Args:
    values: shape (n,), n at least 2.
    resamples: the number of resamples, at least 2.
    seed: chooses them.
    level: the share of the resamples' means in the interval, between 0 and 1.
    what: what the samples are, for the text.

  Raises:
    ValueError: if the values are not at least two finite numbers, or an argument is out of range.

  >>> mean_interval([0.8, 1.0, 1.2, 1.0], what="generated samples").kind
  '95 % of 2,000 bootstrap resamples of the generated samples, all else kept'
  """
  values = np.asarray(values)
  if values.dtype.kind not in "fiub" or values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
    raise ValueError(f"values must be at least two finite numbers, of shape (n,), got {values.dtype} of {values.shape}")
  resamples, rng = checks.at_least("resamples", resamples, 2), np.random.default_rng(checks.at_least("seed", seed, 0))
  level = _level(level)
  # Resamples are drawn from the distinct values, which are few for counts.
  distinct, counts = np.unique(values.astype(np.float64), return_counts=True)
  means = np.empty(resamples)
  for rows in chunks(resamples, len(distinct)):
    drawn = rng.multinomial(len(values), counts / len(values), size=rows.stop - rows.start)
    means[rows] = drawn @ distinct / len(values)
  kind = f"{percent(level)} of {resamples:,} bootstrap resamples of the {what}, all else kept"
  return Interval(*_percentiles(means, level), kind)


def proportion_interval(count: int, n: int, level: float = 0.95, what: str = "samples") -> Interval:
  """Compute Wilson's score interval of a share, such as an accuracy, a precision or a recall (Wilson 1927).

  It is an interval of the probability in the population of which the ``n`` samples were drawn independently. It is
  never empty, also for a share of 0 or 1.

  Args:
    count: how many samples have the property, from 0 to n.
    n: the number of samples, at least 1.
    level: the probability that the interval contains the true one, between 0 and 1.
    what: what the samples are, for the text.

  Raises:
    ValueError: if an argument is out of range.

  >>> low, high, kind = proportion_interval(81, 263)
  >>> round(low, 4), round(high, 4), kind
  (0.2553, 0.3662, "95 % by Wilson's score for 263 samples, all else kept")
  """
  n = checks.at_least("n", n, 1)
  count, level = checks.whole("count", count, 0, n), _level(level)
  z = statistics.NormalDist().inv_cdf((1 + level) / 2)
  share, scale = count / n, 1 + z**2 / n
  middle = (share + z**2 / (2 * n)) / scale
  half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / scale
  low, high = max(0.0, middle - half) if count else 0.0, min(1.0, middle + half) if count < n else 1.0
  return Interval(low, high, f"{percent(level)} by Wilson's score for {n:,} {what}, all else kept")


def least_of(figures: Sequence[float]) -> tuple[float, Interval]:
  """Give the least figure of some sets of samples, as EDM reports it, and the interval from the least to the greatest.

  EDM draws three sets of 50,000 images and reports the minimum (Karras et al. 2022, arXiv:2206.00364, section 5). The
  minimum of several sets is lower than the figure of one on average; compare it only with minima of equally many.

  Args:
    figures: the figure of each set, at least two.

  Raises:
    ValueError: if there are fewer than two, or one is not finite.

  >>> least_of([2.02, 1.97, 1.99])
  (1.97, Interval(low=1.97, high=2.02, kind='least to greatest of 3 sets'))
  """
  values = [checks.number("each of figures", figure) for figure in figures]
  if len(values) < 2:
    raise ValueError(f"figures must be those of at least two sets of samples, got {len(values)}")
  return min(values), Interval(min(values), max(values), f"least to greatest of {len(values)} sets")


class _Resampled:
  """The Fréchet distance to a reference as a function of how often each sample counts.

  With the reference's covariance ``F^T F``, the trace of ``(S F^T F)^(1/2)`` is that of the square root of the
  covariance of the vectors ``F x``, or of their Gram matrix where samples are fewer. So the vectors are computed once.
  Few samples need no factor: see `Spanned`.
  """

  def __init__(self, reference: Gaussian | np.ndarray, generated: np.ndarray):
    self.spanned: Spanned | None = None
    if isinstance(reference, Gaussian) and Spanned.suits(generated, reference):
      mean, covariance = check_gaussian("real", reference.mean, reference.covariance)
      check_width(len(mean), generated.shape[1])
      self.spanned = Spanned.of(generated, covariance)
      self.reference = Factored(mean, np.zeros((0, len(mean))), float(covariance.trace()))
    else:
      self.reference = factored("real", reference)
    check_width(len(self.reference.mean), generated.shape[1])
    self.generated, self.centre = generated, generated.mean(0, dtype=np.float64)
    self.norms = np.empty(len(generated))
    # The rounding errors of float32 in these vectors are independent, so they add no more than 1e-14 of a variance.
    self.moved = np.empty((len(generated), len(self.reference.factor)), np.float32)
    for rows in chunks(*generated.shape):
      part = generated[rows] - self.centre
      self.norms[rows] = np.square(part).sum(1)
      self.moved[rows] = part @ self.reference.factor.T

  def cost(self) -> float:
    """The number of operations of one resample, about."""
    n, r = self.moved.shape if self.spanned is None else self.spanned.products.shape
    return n * r * min(n, r) + 4.0 * min(n, r) ** 3

  def __call__(self, counts: np.ndarray) -> float:
    n, width = counts.sum(), self.moved.shape[1]
    chosen = np.flatnonzero(counts)
    mean = np.zeros(len(self.centre))
    for rows in chunks(len(counts), len(self.centre)):
      mean += counts[rows] @ (self.generated[rows] - self.centre)
    mean /= n
    trace = (counts @ self.norms - n * (mean @ mean)) / (n - 1)
    offset = self.centre + mean - self.reference.mean
    known = float(offset @ offset + trace + self.reference.trace)
    if self.spanned is not None:
      return known - 2 * self.spanned.cross(counts)
    shift = self.reference.factor @ mean
    if len(chosen) <= width:
      vectors = np.sqrt(counts[chosen])[:, None] * (self.moved[chosen] - shift)
      gram = vectors @ vectors.T
    else:
      gram = np.zeros((width, width))
      for rows in chunks(len(chosen), width):
        vectors = np.sqrt(counts[chosen[rows]])[:, None] * (self.moved[chosen[rows]] - shift)
        gram += vectors.T @ vectors
    return known - 2 * float(np.sqrt(np.linalg.eigvalsh(gram).clip(0) / (n - 1)).sum())


def frechet_interval(
  real: npt.ArrayLike | Gaussian,
  generated: npt.ArrayLike,
  resamples: int | None = None,
  seed: int = 0,
  level: float = 0.95,
  of: Literal["figure", "limit"] = "figure",
) -> Interval:
  """Compute a bootstrap interval of the Fréchet distance of generated features to real ones.

  Generated samples are drawn again with repetitions; the reference is kept. A resample has copies, which bias its
  distance upwards once more, by about as much as the number of samples has biased the distance itself. The interval is
  therefore not made of the resamples' distances, but of their differences to their mean: half its width is their
  standard deviation times Student's quantile.

  ``of="figure"`` centres it at the distance itself. It is an interval of the expected distance of ``n`` samples of the
  same generator to the same reference, so it says by how much another set may differ. ``of="limit"`` also subtracts the
  bias, which is the resamples' mean less the distance. It is an interval of the distance with infinitely many generated
  samples; the distance itself may lie above it. It needs at least twice as many samples as columns, and the text warns
  where they are fewer than four times as many.

  In simulations with 500 samples of 16 features both intervals covered a distance of 2 as often as they say. Where the
  distance is almost 0, or the samples are fewer than about four times the columns, they are too wide.

  Args:
    real: shape (m, d), or a `Gaussian`.
    generated: shape (n, d), n at least 3.
    resamples: the number of resamples, at least 2. By default as many as `BUDGET` allows, from 30 to 200: 130 for
      10,000 samples of 2,048 features, and 41 for 50,000.
    seed: chooses them.
    level: the probability that the interval contains what it is an interval of, between 0 and 1.
    of: ``"figure"`` or ``"limit"``.

  Returns:
    The interval, of numbers of at least 0.

  Raises:
    ValueError: if the features are not valid, their widths differ, or an argument is out of range.

  >>> from jaxguide.evaluation.metrics import frechet_distance
  >>> real, generated = np.random.default_rng(0).normal(size=(2, 400, 2))
  >>> low, high, kind = frechet_interval(real, generated + 1)
  >>> bool(low < frechet_distance(real, generated + 1) < high), kind
  (True, '95 % by 200 bootstrap resamples of the 400 generated samples, the reference kept; of the expected distance ...
  """
  generated = check_features("generated", generated, least=3)
  if of not in {"figure", "limit"}:
    raise ValueError(f"of must be 'figure' or 'limit', got {of!r}")
  if of == "limit" and len(generated) < 2 * generated.shape[1]:
    raise ValueError(
      f"of='limit' needs at least twice as many samples as columns, got {len(generated):,} samples of "
      f"{generated.shape[1]:,}: the bias of fewer cannot be subtracted; give more samples, or of='figure'"
    )
  level, rng = _level(level), np.random.default_rng(checks.at_least("seed", seed, 0))
  distance = _Resampled(real if isinstance(real, Gaussian) else np.asarray(real), generated)
  n, width = generated.shape
  if resamples is None:
    resamples = int(min(max(BUDGET / max(distance.cost(), 1.0), _FEWEST), _MOST))
  resamples = checks.at_least("resamples", resamples, 2)
  drawn = np.empty(resamples)
  for i in range(resamples):
    counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
    drawn[i] = distance(counts)
  value = distance(np.ones(n))
  if not np.isfinite([value, *drawn]).all():
    raise ValueError("the features are too large: their squares overflow float64; divide both sets by one number")
  half = student(resamples - 1, (1 + level) / 2) * float(drawn.std(ddof=1))
  kind = (
    f"{percent(level)} by {resamples} bootstrap resamples of the {n:,} generated samples, the reference kept; of the "
  )
  if of == "figure":
    kind += f"expected distance of {n:,} samples"
  else:
    value -= drawn.mean() - value
    half *= math.sqrt(1 + 1 / resamples)
    kind += "distance with infinitely many generated samples"
    if n < 4 * width:
      kind += f" (not to be trusted: {n:,} samples are too few for {width:,} features to subtract the bias)"
  return Interval(max(0.0, value - half), max(0.0, value + half), kind)


def student(freedom: int, probability: float) -> float:
  """Return the quantile of Student's t distribution."""
  from scipy import special

  return float(special.stdtrit(freedom, probability))
