"""Shuffled batches: batch ``k`` depends on the seed and ``k`` alone."""

from collections.abc import Iterator

import numpy as np

from jaxguide._core import checks
from jaxguide.data.images import Images


def batches(images: Images, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yield shuffled batches without end.

  Each epoch has its own order, drawn from ``(seed, epoch)`` alone. Every image occurs once per epoch. Every batch is
  full: at the end of an epoch, a batch continues with the first images of the next. Batch ``start + k`` is the same
  whether the run began at 0 or resumed at ``start``.

  Args:
    images: the dataset.
    batch_size: images per batch; it may exceed the size of the dataset.
    seed: a whole number of at least 0.
    start: number of batches to skip, at no cost.

  Yields:
    ``uint8`` images of shape (batch_size, h, w, c) and ``int32`` labels of shape (batch_size,).

  Raises:
    ValueError: if ``batch_size`` is below 1, or ``seed`` or ``start`` below 0.

  >>> data = Images(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32), 3, "three")
  >>> x, labels = next(batches(data, batch_size=6, seed=0))
  >>> x.shape, sorted(labels.tolist())
  ((6, 2, 2, 1), [0, 0, 1, 1, 2, 2])
  """
  # The checks are outside the generator, because its body runs only when the first batch is requested.
  batch_size = checks.at_least("batch_size", batch_size, 1)
  seed = checks.at_least("seed", seed, 0)
  start = checks.at_least("start", start, 0)
  return _batches(images, batch_size, seed, start)


def _batches(images: Images, batch_size: int, seed: int, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  def order(epoch: int) -> np.ndarray:
    # NumPy splits each number into 32-bit words and concatenates them. The low word of the seed, the epoch and the high
    # part of the seed are separate numbers, so that no two pairs (seed, epoch) give the same words.
    return np.random.default_rng((seed % 2**32, epoch, seed // 2**32)).permutation(len(images))

  epoch, offset = divmod(start * batch_size, len(images))
  rest = order(epoch)[offset:]
  while True:
    while len(rest) < batch_size:
      epoch += 1
      rest = np.concatenate([rest, order(epoch)])
    batch, rest = rest[:batch_size], rest[batch_size:]
    yield images.images[batch], images.labels[batch]
