"""Shuffled batches: batch ``k`` depends on the seed and ``k`` alone.

Grain (https://google-grain.readthedocs.io) shuffles, reads ahead in threads and makes the batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxguide._core import checks, keys
from jaxguide.data.dataset import Batch, Dataset
from jaxguide.data.images import Images

THREADS = 16
"""Threads that read examples by default, as Grain has it. They wait for the disk, or run outside Python's lock."""


def batches(dataset: Dataset, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[np.ndarray, Any]]:
  """Yield shuffled batches without end, as pairs of examples and labels; see `stream`.

  Args:
    dataset: the dataset.
    batch_size: examples per batch; it may exceed the size of the dataset.
    seed: a whole number from 0 to 2**64 - 1.
    start: number of batches to skip, at no cost.

  Yields:
    Examples of shape (batch_size, h, w, c), and labels: ``int32`` (batch_size,), ``float32`` (batch_size, d), or None.

  Raises:
    ValueError: if ``batch_size`` is below 1, or ``seed`` or ``start`` is out of range.

  >>> data = Images(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3, dtype=np.int32), 3, "three")
  >>> x, labels = next(batches(data, batch_size=6, seed=0))
  >>> x.shape, sorted(labels.tolist())
  ((6, 2, 2, 1), [0, 0, 1, 1, 2, 2])
  """
  # The checks are outside the generator, because its body runs only when the first batch is requested.
  source = stream(dataset, batch_size, seed, start)
  return ((batch.examples, batch.labels) for batch in source)


def stream(dataset: Dataset, batch_size: int, seed: int, start: int = 0, *, workers: int = THREADS) -> Iterator[Batch]:
  """Yield shuffled batches without end.

  Each epoch has its own order, drawn from ``(seed, epoch)`` alone. Every example occurs once per epoch. Every batch is
  full: at the end of an epoch, a batch continues with the first examples of the next. Batch ``start + k`` is the same
  whether the run began at 0 or resumed at ``start``, and for any number of workers; so are random augmentations.

  Args:
    dataset: the dataset.
    batch_size: examples per batch; it may exceed the size of the dataset.
    seed: a whole number from 0 to 2**64 - 1; all of its bits are used.
    start: number of batches to skip, at no cost.
    workers: number of threads that read examples ahead.

  Yields:
    `Batch`.

  Raises:
    ValueError: if ``batch_size`` or ``workers`` is below 1, or ``seed`` or ``start`` is out of range.

  >>> data = Images(np.zeros((3, 2, 2, 1), np.uint8), None, None, "three")
  >>> sorted(next(stream(data, batch_size=3, seed=0)).rows.tolist())
  [0, 1, 2]
  """
  batch_size = checks.at_least("batch_size", batch_size, 1)
  start = checks.at_least("start", start, 0)
  workers = checks.at_least("workers", workers, 1)
  return _stream(dataset, batch_size, keys.check_seed("seed", seed), start, workers)


def _stream(dataset: Dataset, batch_size: int, seed: int, start: int, workers: int) -> Iterator[Batch]:
  import grain

  # The seed of Grain's shuffle has 32 bits, so it is derived from all bits of the seed.
  rows = grain.MapDataset.range(len(dataset)).seed(seed).shuffle().repeat()
  if isinstance(dataset, Images):
    # In memory, a batch is one indexing operation, which one thread does faster than several.
    whole = rows.batch(batch_size, drop_remainder=True, batch_fn=np.asarray).map(lambda batch: _take(dataset, batch))
    return iter(whole[start:].to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
  examples = rows.random_map(lambda row, rng: (row, *dataset.example(int(row), rng)))
  reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2 * batch_size, workers))
  return iter(examples[start * batch_size :].to_iter_dataset(reading).batch(batch_size, batch_fn=_join))


def _take(images: Images, rows: np.ndarray) -> Batch:
  return Batch(images.images[rows], None if images.labels is None else images.labels[rows], rows)


def _join(examples: Sequence[tuple[int, np.ndarray, Any]]) -> Batch:
  rows, arrays, labels = zip(*examples, strict=True)
  return Batch(
    np.stack(arrays),
    None if labels[0] is None else np.stack([np.asarray(label) for label in labels]).astype(_label_type(labels[0])),
    np.asarray(rows),
  )


def _label_type(label: Any) -> type:
  return np.int32 if np.ndim(label) == 0 else np.float32
