"""Nearest neighbours among features.

Squared distances are computed block by block on the device as ``|a|^2 + |b|^2 - 2ab`` in float32. What the rounding
error of float32 leaves open is computed again in float64, so the results are those of differences in float64, and the
distance of copies is exactly 0.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxguide._core import checks
from jaxguide.evaluation.metrics.arrays import check_features, check_width, chunks

_BLOCK = 4096
"""The largest number of rows of a block."""
_ELEMENTS = 2**24
"""The largest number of elements of a block of features, unless it has few rows."""
_MORE = 2
"""How many candidates are kept beyond the neighbours that are asked for."""
_FAR = 1e30
"""The squared norm of rows that only fill up a block. That of features is at most their width."""


class Frame(NamedTuple):
  """The origin and the unit in which blocks are computed, so that float32 neither overflows nor cancels much."""

  origin: np.ndarray
  unit: float

  @classmethod
  def of(cls, *sets: np.ndarray) -> "Frame":
    """Choose the mean of all rows as the origin, and the largest distance from it along an axis as the unit."""
    total = sum(
      (each[rows].sum(0, dtype=np.float64) for each in sets for rows in chunks(*each.shape)), np.zeros(sets[0].shape[1])
    )
    origin = total / sum(map(len, sets))
    unit = max(float(np.abs(each[rows] - origin).max()) for each in sets for rows in chunks(*each.shape))
    if not math.isfinite(unit):
      raise ValueError("the features are too large: their sum overflows float64; divide both sets by one number")
    return cls(origin, unit or 1.0)

  def rows(self, features: np.ndarray) -> np.ndarray:
    """Give features in float64, moved and scaled."""
    return (features - self.origin) / self.unit

  def slack(self, precision: type = np.float32) -> float:
    """The error of a squared distance by a product of blocks, as a share of the sum of the squared norms.

    Sums of d products have an error of about sqrt(d) roundings.
    """
    return float(np.finfo(precision).eps) * (4 + math.sqrt(len(self.origin)))

  def squares(self, a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Compute the squared distances of pairs of rows from their differences in float64, in the frame's unit."""
    found = np.empty(len(rows))
    for part in chunks(len(rows), a.shape[1]):
      difference = (a[rows[part]].astype(np.float64) - b[columns[part]]) / self.unit
      found[part] = np.einsum("pd,pd->p", difference, difference)
    return found


class Block(NamedTuple):
  """Rows of features on the device, filled up to the size that all blocks of a set have."""

  start: int
  rows: int
  values: jax.Array
  norms: jax.Array


def block_size(count: int, width: int) -> int:
  """Choose the number of rows of all blocks of a set, such that little of the last one is empty."""
  most = min(_BLOCK, max(128, _ELEMENTS // width))
  return -(-math.ceil(count / math.ceil(count / most)) // 64) * 64


def block_of(frame: Frame, features: np.ndarray, start: int, size: int) -> Block:
  """Put the block of rows that begins at ``start`` on the device."""
  part = frame.rows(features[start : start + size])
  values = np.zeros((size, part.shape[1]), np.float32)
  values[: len(part)] = part
  norms = np.full(size, _FAR, np.float32)
  norms[: len(part)] = np.einsum("nd,nd->n", part, part)
  return Block(start, len(part), jnp.asarray(values), jnp.asarray(norms))


def starts(count: int, size: int) -> range:
  """Give the first rows of the blocks of a set."""
  return range(0, count, size)


def squared_distances(a: jax.Array, norms_a: jax.Array, b: jax.Array, norms_b: jax.Array) -> jax.Array:
  """Compute the squared distances of all rows of two blocks. By rounding, they can be a little below 0."""
  products = jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
  return norms_a[:, None] + norms_b[None, :] - 2 * products


def _search(a: jax.Array, norms_a: jax.Array, b: jax.Array, norms_b: jax.Array, k: int, how: str) -> Any:
  """Find the k smallest squared distances of each row of ``a``, and of ``b`` if ``how`` is not ``"rows"``."""
  distances = squared_distances(a, norms_a, b, norms_b)
  if how == "own":  # Both blocks are the same rows, and no row is its own neighbour.
    distances = jnp.where(jnp.eye(len(a), dtype=bool), jnp.float32(_FAR), distances)
  found = [jax.lax.top_k(-distances, k)]
  if how == "both":
    found.append(jax.lax.top_k(-distances.T, k))
  return found


_search_jit = jax.jit(_search, static_argnames=("k", "how"))


class _Best:
  """The smallest squared distances of each row so far, with their columns, in ascending order."""

  def __init__(self, count: int, k: int):
    self.squares = np.full((count, k), np.inf, np.float32)
    self.columns = np.zeros((count, k), np.int64)

  def update(self, block: Block, found: Sequence[jax.Array], start: int) -> None:
    """Add what was found for the rows of a block among the columns that begin at ``start``."""
    rows = slice(block.start, block.start + block.rows)
    negative, columns = (np.asarray(part)[: block.rows] for part in found)
    squares = np.concatenate([self.squares[rows], -negative], 1)
    columns = np.concatenate([self.columns[rows], columns + start], 1)
    order = np.argsort(squares, axis=1, kind="stable")[:, : self.squares.shape[1]]
    self.squares[rows] = np.take_along_axis(squares, order, 1)
    self.columns[rows] = np.take_along_axis(columns, order, 1)


def _candidates(frame: Frame, queries: np.ndarray, base: np.ndarray | None, count: int) -> _Best:
  """Find candidates for the nearest rows in float32; ``base`` is None if the queries are searched among themselves."""
  best = _Best(len(queries), count)
  size = block_size(len(queries), queries.shape[1])
  if base is None:
    for i in starts(len(queries), size):
      a = block_of(frame, queries, i, size)
      best.update(a, _search_jit(*a[2:], *a[2:], min(count, size), "own")[0], i)
      for j in starts(len(queries), size)[i // size + 1 :]:
        b = block_of(frame, queries, j, size)
        rows, columns = _search_jit(*a[2:], *b[2:], min(count, size), "both")
        best.update(a, rows, j)
        best.update(b, columns, i)
    return best
  size_b = block_size(len(base), base.shape[1])
  for j in starts(len(base), size_b):
    b = block_of(frame, base, j, size_b)
    for i in starts(len(queries), size):
      a = block_of(frame, queries, i, size)
      best.update(a, _search_jit(*a[2:], *b[2:], min(count, size_b), "rows")[0], j)
  return best


def _search_float64(
  frame: Frame, queries: np.ndarray, base: np.ndarray, count: int, own: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  """Find candidates in float64: their squared distances, and their columns. ``own`` is each query's row in the base."""
  found, columns = np.empty((len(queries), count)), np.empty((len(queries), count), np.int64)
  for rows in chunks(len(queries), len(base)):
    a = frame.rows(queries[rows])
    squares = np.empty((len(a), len(base)))
    for part in chunks(*base.shape):
      b = frame.rows(base[part])
      squares[:, part] = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * (a @ b.T)
    if own is not None:
      squares[np.arange(len(a)), own[rows]] = np.inf
    columns[rows] = np.argpartition(squares, count - 1, axis=1)[:, :count]
    found[rows] = np.take_along_axis(squares, columns[rows], 1)
  return found, columns


def _search_exact(
  frame: Frame, queries: np.ndarray, base: np.ndarray, count: int, own: np.ndarray | None
) -> np.ndarray:
  """Find the columns of the nearest rows from the differences of all pairs."""
  columns = np.empty((len(queries), count), np.int64)
  every = np.arange(len(base))
  for i in range(len(queries)):
    squares = frame.squares(queries, base, np.full(len(base), i), every)
    if own is not None:
      squares[own[i]] = np.inf
    columns[i] = np.argpartition(squares, count - 1)[:count]
  return columns


def nearest_squares(
  frame: Frame, queries: np.ndarray, base: np.ndarray | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Find the k nearest rows: their squared distances in the frame's unit, in ascending order, and their numbers.

  Candidates are found in float32. For rows for which its error leaves open whether they are the nearest ones, they are
  found in float64, and for those that are still open from the differences.
  """
  others = queries if base is None else base
  available = len(others) - (base is None)
  count = min(k + _MORE, available)
  squares, columns = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)

  def settle(rows: np.ndarray, candidates: np.ndarray, last: np.ndarray | None, precision: type) -> np.ndarray:
    """Sort the candidates of some rows by their exact distances, and return the rows that are still open."""
    exact = frame.squares(queries, others, np.repeat(rows, count), candidates.ravel()).reshape(candidates.shape)
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    squares[rows] = np.take_along_axis(exact, order, 1)
    columns[rows] = np.take_along_axis(candidates, order, 1)
    if last is None or count == available:
      return rows[:0]
    # What is no candidate has at least the last candidate's distance less the error. If it is as near as that, its norm
    # is at most the row's norm and the distance.
    norms = np.concatenate([np.square(frame.rows(queries[rows[part]])).sum(1) for part in chunks(len(rows), width)])
    reach = np.sqrt(norms) + np.sqrt(last.clip(0))
    found = squares[rows, -1]
    return rows[(found > 0) & (found > last - frame.slack(precision) * (norms + np.square(reach)))]

  width = queries.shape[1]
  best = _candidates(frame, queries, base, count)
  rows = settle(np.arange(len(queries)), best.columns, best.squares[:, -1].astype(np.float64), np.float32)
  if len(rows):
    approximate, candidates = _search_float64(frame, queries[rows], others, count, rows if base is None else None)
    rows = settle(rows, candidates, approximate.max(1), np.float64)
  if len(rows):
    settle(rows, _search_exact(frame, queries[rows], others, count, rows if base is None else None), None, np.float64)
  return squares, columns


def nearest(queries: npt.ArrayLike, base: npt.ArrayLike | None, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Find the ``k`` nearest rows of ``base`` for each query, by Euclidean distance.

  Args:
    queries: shape (n, d), n at least 1.
    base: shape (m, d); None searches among the queries, where a row is not its own neighbour, but a copy of it is.
    k: the number of neighbours, from 1 to m (to n - 1 without a base).

  Returns:
    The distances, float64 of shape (n, k), in ascending order, and the rows of ``base``, int64 of shape (n, k). The
    distance of equal rows is exactly 0.

  Raises:
    ValueError: if the features are not valid, their widths differ, or there are fewer than ``k`` rows to find.

  >>> distances, rows = nearest([[0.0], [5.0]], [[1.0], [7.0], [5.0]], 2)
  >>> distances.tolist(), rows.tolist()
  ([[1.0, 5.0], [0.0, 2.0]], [[0, 2], [2, 1]])
  >>> nearest([[0.0], [5.0], [7.0]], None, 1)[1].tolist()
  [[1], [2], [1]]
  """
  queries = check_features("queries", queries, least=1)
  sets = [queries]
  if base is not None:
    sets.append(check_features("base", base, least=1))
    check_width(queries.shape[1], sets[1].shape[1])
  k = checks.whole("k", k, 1, len(sets[-1]) - (base is None))
  frame = Frame.of(*sets)
  squares, rows = nearest_squares(frame, queries, sets[1] if base is not None else None, k)
  return np.sqrt(squares) * frame.unit, rows
