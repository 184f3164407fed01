"""Measures that count samples in balls around others: precision, recall, density and coverage.

A pair is decided in float32 if the rounding error leaves no doubt, and in float64 otherwise. So the figures are those
of float64, and a copy of a neighbour, which is on the surface of a ball, is inside it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxguide._core import checks
from jaxguide.evaluation.metrics.arrays import check_pair
from jaxguide.evaluation.metrics.jackknife import Left, without_groups
from jaxguide.evaluation.metrics.neighbours import (
  Block,
  Frame,
  block_of,
  block_size,
  nearest_squares,
  squared_distances,
  starts,
)


def _compare(
  a: jax.Array,
  norms_a: jax.Array,
  b: jax.Array,
  norms_b: jax.Array,
  radii: tuple[jax.Array, ...],
  slack: jax.Array,
) -> Any:
  """Decide which pairs are inside balls: for each array of squared radii, of shape (rows, 1) or (1, columns).

  Returns:
    For each, how many pairs of each row and of each column are inside for certain, and which pairs are in doubt; and
    whether any is.
  """
  distances = squared_distances(a, norms_a, b, norms_b)
  error = slack * (norms_a[:, None] + norms_b[None, :])
  found = []
  for radius in radii:
    inside = distances + error <= radius
    doubt = (distances - error <= radius) & ~inside
    found.append((inside.sum(1), inside.sum(0), doubt, doubt.any()))
  return found


_compare_jit = jax.jit(_compare)
_MANY = 100_000
"""From this number of pairs in doubt on, copies are looked for, since equal pairs need to be computed only once."""


def _recheck(
  frame: Frame, a: np.ndarray, b: np.ndarray, doubt: np.ndarray, radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Decide in float64 which pairs in doubt are inside: ``radii`` are squared, of shape (rows, 1) or (1, columns)."""
  rows, columns = np.nonzero(doubt)
  limits = np.broadcast_to(radii, doubt.shape)[rows, columns]
  if len(rows) < _MANY:
    squares = frame.squares(a, b, rows, columns)
  else:
    firsts_a, numbers_a = _copies(a)
    firsts_b, numbers_b = _copies(b)
    pairs, which = np.unique(numbers_a[rows] * len(b) + numbers_b[columns], return_inverse=True)
    squares = frame.squares(a, b, firsts_a[pairs // len(b)], firsts_b[pairs % len(b)])[which]
  inside = squares <= limits
  return np.bincount(rows[inside], minlength=len(doubt)), np.bincount(columns[inside], minlength=doubt.shape[1])


def _copies(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Number the distinct rows: the first row of each number, and the number of each row."""
  _, firsts, numbers = np.unique(features, axis=0, return_index=True, return_inverse=True)
  return firsts, numbers.ravel()


def _inside(
  frame: Frame, real: np.ndarray, generated: np.ndarray, radii: Sequence[np.ndarray], whose: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Count the pairs that are inside balls around real or generated samples.

  Args:
    frame: the unit of the radii.
    real: shape (n, d).
    generated: shape (m, d).
    radii: squared radii, each of shape (n,) or (m,).
    whose: for each, ``"real"`` or ``"generated"``: the centres of its balls.

  Returns:
    For each, the number of pairs of each real sample, of shape (n,), and of each generated one, of shape (m,).
  """
  counts = [(np.zeros(len(real), np.int64), np.zeros(len(generated), np.int64)) for _ in radii]
  size_a, size_b = block_size(len(real), real.shape[1]), block_size(len(generated), real.shape[1])
  slack = jnp.float32(frame.slack())
  for a, b in _pairs(frame, real, generated, size_a, size_b):
    rows, columns = slice(a.start, a.start + a.rows), slice(b.start, b.start + b.rows)
    limits = []
    for radius, owner in zip(radii, whose, strict=True):
      limit = np.zeros(size_a if owner == "real" else size_b)
      part = radius[rows if owner == "real" else columns]
      limit[: len(part)] = part
      limits.append(limit[:, None] if owner == "real" else limit[None])
    found = _compare_jit(*a[2:], *b[2:], tuple(jnp.asarray(limit, jnp.float32) for limit in limits), slack)
    for (of_rows, of_columns), (in_rows, in_columns, doubt, any_doubt), limit in zip(
      counts, found, limits, strict=True
    ):
      of_rows[rows] += np.asarray(in_rows)[: a.rows]
      of_columns[columns] += np.asarray(in_columns)[: b.rows]
      if any_doubt:
        mask = np.asarray(doubt)[: a.rows, : b.rows]
        inner = limit[: a.rows] if len(limit) == size_a else limit[:, : b.rows]
        more = _recheck(frame, real[rows], generated[columns], mask, inner)
        of_rows[rows] += more[0]
        of_columns[columns] += more[1]
  return counts


def _pairs(frame: Frame, a: np.ndarray, b: np.ndarray, size_a: int, size_b: int) -> Iterator[tuple[Block, Block]]:
  for i in starts(len(a), size_a):
    block = block_of(frame, a, i, size_a)
    for j in starts(len(b), size_b):
      yield block, block_of(frame, b, j, size_b)


class Neighbourhoods(NamedTuple):
  """Precision, recall, density and coverage, and what they are means of: one value for each sample.

  Args:
    precision: the share of generated samples that are realistic, from 0 to 1.
    recall: the share of real samples that the generated ones reach, from 0 to 1.
    density: how many real neighbourhoods a generated sample is in, as a share of k, at least 0; about 1 if both sets
      have one distribution.
    coverage: the share of real samples with a generated one in their neighbourhood, from 0 to 1.
    in_real: bool of shape (m,), for precision: whether each generated sample is in a ball of a real one.
    in_generated: bool of shape (n,), for recall: whether each real sample is in a ball of a generated one.
    densities: float64 of shape (m,), for density.
    covered: bool of shape (n,), for coverage.
    left: recall and coverage without each group of generated samples, for their intervals; None if not asked for.
  """

  precision: float
  recall: float
  density: float
  coverage: float
  in_real: np.ndarray
  in_generated: np.ndarray
  densities: np.ndarray
  covered: np.ndarray
  left: Left | None = None


class PrecisionRecall(NamedTuple):
  """Precision and recall; the arrays are those of `Neighbourhoods`."""

  precision: float
  recall: float
  in_real: np.ndarray
  in_generated: np.ndarray


class DensityCoverage(NamedTuple):
  """Density and coverage; the arrays are those of `Neighbourhoods`."""

  density: float
  coverage: float
  densities: np.ndarray
  covered: np.ndarray


def _radii(frame: Frame, features: np.ndarray, k: int) -> np.ndarray:
  """Compute the squared distances to the 1st to k-th neighbours among the features, of shape (n, k)."""
  return nearest_squares(frame, features, None, k)[0]


def _checked(real: npt.ArrayLike, generated: npt.ArrayLike, *ks: Any) -> tuple[np.ndarray, np.ndarray]:
  real, generated = check_pair(real, generated, least=2)
  fewest = min(len(real), len(generated))
  for k in ks:
    if checks.at_least("k", k, 1) >= fewest:
      raise ValueError(
        f"k is {k}, but the smaller set has {fewest} samples, of which each has {fewest - 1} neighbours: give a "
        "smaller k or more samples"
      )
  return real, generated


def neighbourhoods(
  real: npt.ArrayLike, generated: npt.ArrayLike, k: int = 3, k_density: int = 5, jackknife_seed: int | None = None
) -> Neighbourhoods:
  """Compute `precision_recall` and `density_coverage` together, with fewer distances than one after the other.

  Args:
    real: shape (n, d).
    generated: shape (m, d).
    k: the neighbour that gives the radius of a ball, for precision and recall.
    k_density: the same for density and coverage.
    jackknife_seed: chooses the groups of generated samples that are left out in turn; None leaves out none.

  Raises:
    ValueError: if the features are not valid, their widths differ, or a set has no more than ``k`` samples.

  >>> found = neighbourhoods([[0.0], [1.0], [2.0]], [[0.5], [9.0], [9.5]], k=1, k_density=1)
  >>> round(found.precision, 3), found.recall, round(found.density, 3), round(found.coverage, 3)
  (0.333, 1.0, 0.667, 0.667)
  """
  real, generated = _checked(real, generated, k, k_density)
  frame = Frame.of(real, generated)
  of_real = _radii(frame, real, max(k, k_density))
  balls = [of_real[:, k - 1], _radii(frame, generated, k)[:, k - 1], of_real[:, k_density - 1]]
  found = _inside(frame, real, generated, balls, ["real", "generated", "real"])
  in_real, in_generated, covered = found[0][1] > 0, found[1][0] > 0, found[2][0] > 0
  densities = found[2][1] / k_density
  precision, recall, density, coverage = (
    float(values.mean()) for values in (in_real, in_generated, densities, covered)
  )
  left = None if jackknife_seed is None else without_groups(frame, real, generated, balls[2], k, jackknife_seed)
  return Neighbourhoods(precision, recall, density, coverage, in_real, in_generated, densities, covered, left)


def precision_recall(real: npt.ArrayLike, generated: npt.ArrayLike, k: int = 3) -> PrecisionRecall:
  """Compute the precision and recall of generated features (Kynkäänniemi et al. 2019, arXiv:1904.06991).

  Around each sample is a ball that reaches its k-th neighbour in its own set; the sample itself is no neighbour, a copy
  of it is. Precision is the share of generated samples in a ball of a real one (equation 2), recall the share of real
  samples in a ball of a generated one. The surface belongs to the ball, as in the paper. Both depend on the numbers of
  samples: compare only figures of equally many.

  OpenAI's evaluator has the same rule, but computes distances in float16 unless they overflow, so that its figures
  differ from these a little.

  Args:
    real: shape (n, d).
    generated: shape (m, d).
    k: the neighbour that gives the radius of a ball, below n and m.

  Raises:
    ValueError: if the features are not valid, their widths differ, or a set has no more than ``k`` samples.

  >>> found = precision_recall([[0.0], [1.0], [2.0]], [[0.5], [9.0], [9.5]], k=1)
  >>> round(found.precision, 3), found.recall
  (0.333, 1.0)
  """
  real, generated = _checked(real, generated, k)
  frame = Frame.of(real, generated)
  balls = [_radii(frame, features, k)[:, -1] for features in (real, generated)]
  found = _inside(frame, real, generated, balls, ["real", "generated"])
  in_real, in_generated = found[0][1] > 0, found[1][0] > 0
  return PrecisionRecall(float(in_real.mean()), float(in_generated.mean()), in_real, in_generated)


def density_coverage(real: npt.ArrayLike, generated: npt.ArrayLike, k: int = 5) -> DensityCoverage:
  """Compute the density and coverage of generated features (Naeem et al. 2020, arXiv:2002.09797).

  Around each real sample is a ball that reaches its k-th real neighbour. Density is the mean over the generated samples
  of the number of balls that a sample is in, divided by k (equation 4). Coverage is the share of balls with a generated
  sample in them (equation 5). If both sets have one distribution, the expectation of density is 1, and that of coverage
  is ``1 - (n - 1)...(n - k) / ((m + n - 1)...(m + n - k))``.

  The surface belongs to the ball, as it does for precision and recall. The authors' program (prdc) leaves it out, which
  differs only for distances that are equal, such as those of copies.

  Args:
    real: shape (n, d).
    generated: shape (m, d).
    k: the neighbour that gives the radius of a ball, below n and m.

  Raises:
    ValueError: if the features are not valid, their widths differ, or a set has no more than ``k`` samples.

  >>> density_coverage([[0.0], [1.0], [2.0]], [[0.5], [9.0]], k=1)[:2]
  (1.0, 0.6666666666666666)
  """
  real, generated = _checked(real, generated, k)
  frame = Frame.of(real, generated)
  ((per_real, per_generated),) = _inside(frame, real, generated, [_radii(frame, real, k)[:, -1]], ["real"])
  densities, covered = per_generated / k, per_real > 0
  return DensityCoverage(float(densities.mean()), float(covered.mean()), densities, covered)
