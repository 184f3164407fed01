"""The kernel distance (KID): the squared maximum mean discrepancy with a cubic kernel."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxguide._core import checks
from jaxguide.evaluation.metrics.arrays import check_pair


class Kid(NamedTuple):
  """The kernel distance.

  Args:
    mean: the mean over the subsets. It is an unbiased estimate, so it can be below 0 where the true distance is near 0.
    std: the standard deviation over the subsets (divided by their number, not by one less). It is that of the estimate
      from one subset, and not the error of the mean.
  """

  mean: float
  std: float


def _sum(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
  """Sum the kernel over all pairs, and over the pairs of equal rows."""
  kernel = a @ b.T
  kernel /= a.shape[1]
  kernel += 1
  kernel **= 3
  return float(kernel.sum()), float(kernel.trace())


def _mmd(real: np.ndarray, generated: np.ndarray) -> float:
  """Estimate the squared maximum mean discrepancy without bias (Gretton et al. 2012, equation 3)."""
  m, n = len(real), len(generated)
  (aa, a), (bb, b), (ab, _) = _sum(real, real), _sum(generated, generated), _sum(real, generated)
  return (aa - a) / (m * (m - 1)) + (bb - b) / (n * (n - 1)) - 2 * ab / (m * n)


def kid(
  real: npt.ArrayLike, generated: npt.ArrayLike, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Kid:
  """Compute the kernel distance of two sets of features (Binkowski et al. 2018, arXiv:1801.01401).

  It is the unbiased estimate of the squared maximum mean discrepancy with the kernel ``(x.y / d + 1)^3``, averaged over
  random subsets. Unlike the Fréchet distance its expectation does not depend on the number of samples. With the same
  seed the subsets are those of torch-fidelity, whose generated set is its first and whose default seed is 2020.

  Args:
    real: shape (n, d).
    generated: shape (m, d).
    subsets: the number of subsets, at least 1.
    subset_size: the number of samples in a subset, at least 2 and at most n and m. A subset has no sample twice.
    seed: chooses the subsets, from 0 to 2^32 - 1.

  Returns:
    The mean and the standard deviation over the subsets.

  Raises:
    ValueError: if the features are not valid or their widths differ, or if ``subset_size`` is larger than a set.

  >>> kid([[0.0], [1.0], [2.0]], [[0.0], [1.0], [2.0]], subsets=1, subset_size=3)
  Kid(mean=-23.333333333333332, std=0.0)
  """
  real, generated = check_pair(real, generated, least=2)
  subsets, size = checks.at_least("subsets", subsets, 1), checks.at_least("subset_size", subset_size, 2)
  seed = checks.whole("seed", seed, 0, 2**32 - 1)
  fewest = min(len(real), len(generated))
  if size > fewest:
    raise ValueError(
      f"subset_size is {size:,}, but there are only {len(real):,} real and {len(generated):,} generated samples: give "
      f"subset_size={fewest} or less; smaller subsets have the same expectation and a larger standard deviation"
    )
  # NumPy never changes the numbers of RandomState, and torch-fidelity uses them.
  rng = np.random.RandomState(seed)
  values = []
  for _ in range(subsets):
    chosen = rng.choice(len(generated), size, replace=False)
    others = rng.choice(len(real), size, replace=False)
    with np.errstate(over="ignore", invalid="ignore"):
      values.append(_mmd(real[others].astype(np.float64), generated[chosen].astype(np.float64)))
  if not np.isfinite(values).all():
    raise ValueError("the features are too large: their sixth powers overflow float64; divide both sets by one number")
  return Kid(float(np.mean(values)), float(np.std(values)))
