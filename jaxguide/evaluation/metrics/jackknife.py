"""The grouped jackknife of recall and coverage: how much they depend on which samples were generated.

A bootstrap does not suit them: a resample has copies, whose nearest neighbours are at distance 0, so that the balls of
recall shrink. The jackknife has no copies: it leaves out one group of samples after the other.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide.evaluation.metrics.intervals import Interval, percent, student
from jaxguide.evaluation.metrics.neighbours import (
  Frame,
  block_of,
  block_size,
  nearest_squares,
  squared_distances,
  starts,
)

GROUPS = 20
"""The number of groups of samples."""
_SPARE = 16
"""How many neighbours are kept beyond the k-th, in place of those that are left out."""


class Left(NamedTuple):
  """Figures with one group of samples left out, each of shape (groups,)."""

  recalls: np.ndarray
  coverages: np.ndarray


def without_groups(
  frame: Frame, real: np.ndarray, generated: np.ndarray, radii: np.ndarray, k: int, seed: int, groups: int = GROUPS
) -> Left | None:
  """Compute recall and coverage without each group of generated samples; None if too few samples remain for that.

  Args:
    frame: the unit of the radii.
    real: shape (n, d).
    generated: shape (m, d).
    radii: shape (n,), the squared radii of the balls of coverage.
    k: the neighbour that gives the radius of a ball of recall.
    seed: chooses the groups.
    groups: how many there are, at most m.
  """
  m = len(generated)
  groups = min(groups, m)
  if m - math.ceil(m / groups) <= k:
    return None
  group = np.random.default_rng(seed).permutation(m) % groups
  squares, rows = nearest_squares(frame, generated, None, min(k + _SPARE, m - 1))
  own = np.full((groups, m), -1.0, np.float32)  # No distance is as small: a sample that is left out has no ball.
  for g in range(groups):
    remain = group[rows] != g
    # The first neighbour with k - 1 that remain before it. That more than `_SPARE` are left out does not happen.
    kth = np.where(remain.sum(1) >= k, (remain.cumsum(1) >= k).argmax(1), rows.shape[1] - 1)
    own[g] = np.where(group == g, -1.0, np.take_along_axis(squares, kth[:, None], 1)[:, 0])
  kept = np.arange(groups)[:, None] != group
  reached, covered = _reached(frame, real, generated, own, kept, radii)
  return Left(reached.mean(1), covered.mean(1))


@jax.jit
def _compare(a, norms_a, b, norms_b, own, kept, radii, slack):
  """Say which real samples of a block are in a ball of recall, and have a sample in theirs, for each group left out."""
  distances = squared_distances(a, norms_a, b, norms_b) - slack * (norms_a[:, None] + norms_b[None, :])
  reached = jax.lax.map(lambda limits: (distances <= limits[None]).any(1), own)
  covered = kept @ (distances <= radii[:, None]).astype(jnp.float32).T > 0
  return reached, covered


def _reached(
  frame: Frame, real: np.ndarray, generated: np.ndarray, own: np.ndarray, kept: np.ndarray, radii: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Compare all pairs in float32, block by block. The surface belongs to the ball, up to the rounding error."""
  found = np.zeros((2, len(own), len(real)), bool)
  size_a, size_b = block_size(len(real), real.shape[1]), block_size(len(generated), real.shape[1])
  slack = jnp.float32(frame.slack())
  for i in starts(len(real), size_a):
    a = block_of(frame, real, i, size_a)
    limits = np.full(size_a, -1.0, np.float32)
    limits[: a.rows] = radii[i : i + a.rows]
    for j in starts(len(generated), size_b):
      b = block_of(frame, generated, j, size_b)
      fill = ((0, 0), (0, size_b - b.rows))
      balls = np.pad(own[:, j : j + b.rows], fill, constant_values=-1.0)
      there = np.pad(kept[:, j : j + b.rows], fill).astype(np.float32)
      part = _compare(*a[2:], *b[2:], jnp.asarray(balls), jnp.asarray(there), jnp.asarray(limits), slack)
      found[:, :, i : i + a.rows] |= np.asarray(part)[:, :, : a.rows]
  return found[0], found[1]


def jackknife_interval(value: float, without: np.ndarray, n: int, level: float = 0.95) -> Interval | None:
  """Compute the interval of a share from its values without each of some groups of samples.

  The sum of the squared deviations of these values from their mean, times ``(g - 1) / g``, estimates the variance of
  the figure. For every figure that does not depend on the order of its samples it is too large on average, if anything
  (Efron & Stein 1981, doi:10.1214/aos/1176345462). Half the width of the interval is the root of it times Student's
  quantile.

  Args:
    value: the share, from 0 to 1, at which the interval is centred. The ends are cut at 0 and 1.
    without: shape (g,), the values without each group, g at least 2.
    n: the number of samples, for the text.
    level: the probability that the interval contains the expected share of ``n`` samples.

  Returns:
    The interval; None if all values are equal, which says nothing of the uncertainty.

  >>> jackknife_interval(0.5, np.array([0.5, 0.5]), 10)
  >>> low, high, kind = jackknife_interval(0.5, np.array([0.45, 0.5, 0.55, 0.5]), 40)
  >>> round(low, 3), round(high, 3)
  (0.305, 0.695)
  """
  groups = checks.at_least("the number of values", len(without), 2)
  deviation = math.sqrt((groups - 1) / groups * float(np.square(without - without.mean()).sum()))
  if not deviation:
    return None
  half = student(groups - 1, (1 + level) / 2) * deviation
  kind = f"{percent(level)} by a jackknife of {groups} groups of the {n:,} generated samples, the reference kept"
  ends = max(0.0, value - half), min(1.0, value + half)
  return Interval(*ends, f"{kind}; of the expected share of {n:,} samples")
