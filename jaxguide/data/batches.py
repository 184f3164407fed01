"""Shuffled batches: batch ``k`` depends on the seed and ``k`` alone."""

from collections.abc import Iterator

import numpy as np

from jaxguide._core import checks
from jaxguide.data.images import Images


def batches(images: Images, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Give shuffled batches without end.

  Each epoch has an order of its own, drawn from ``(seed, epoch)`` alone, and a batch goes on into
  the next epoch where one ends: every image comes once an epoch, every batch is full, and batch
  ``start + k`` is the same whether the run began at 0 or resumed at ``start``.

  Args:
    images: the dataset.
    batch_size: how many images a batch has; it may exceed the dataset.
    seed: a whole number of at least 0.
    start: how many batches to skip, at no cost.

  Yields:
    ``uint8`` images of shape (batch_size, h, w, c) and ``int32`` labels of shape (batch_size,).

  Raises:
    ValueError: if ``batch_size`` is below 1, or ``seed`` or ``start`` below 0.

  >>> data = Images(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32), 3, "three")
  >>> x, labels = next(batches(data, batch_size=6, seed=0))
  >>> x.shape, sorted(labels.tolist())
  ((6, 2, 2, 1), [0, 0, 1, 1, 2, 2])
  """
  # Checked here and not in the generator, whose body runs only when the first batch is asked for.
  batch_size = checks.at_least("batch_size", batch_size, 1)
  seed = checks.at_least("seed", seed, 0)
  start = checks.at_least("start", start, 0)
  return _batches(images, batch_size, seed, start)


def _batches(images: Images, batch_size: int, seed: int, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  def order(epoch: int) -> np.ndarray:
    # NumPy makes words of 32 bits of each number and then adds zeros: a long seed must not run into the epoch.
    return np.random.default_rng((seed % 2**32, epoch, seed // 2**32)).permutation(len(images))

  epoch, offset = divmod(start * batch_size, len(images))
  rest = order(epoch)[offset:]
  while True:
    while len(rest) < batch_size:
      epoch += 1
      rest = np.concatenate([rest, order(epoch)])
    batch, rest = rest[:batch_size], rest[batch_size:]
    yield images.images[batch], images.labels[batch]
