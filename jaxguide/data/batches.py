"""Shuffled batches: batch ``k`` depends on the seed and ``k`` alone.

Grain (https://google-grain.readthedocs.io) reads ahead in threads and processes, and draws the randomness of each
example. The order is a permutation by NumPy, because Grain's takes 16 microseconds for each example.
"""

import functools
import itertools
import multiprocessing
import os
import reprlib
import signal
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxguide._core import checks, keys
from jaxguide.data.dataset import Batch, Dataset
from jaxguide.data.images import Images

LARGEST_PART = 8
"""The largest number of examples that a thread reads at a time."""

EXAMPLE_TYPES = (np.dtype(np.uint8), np.dtype(np.float32))
"""The types of examples."""


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


def stream(
  dataset: Dataset,
  batch_size: int,
  seed: int,
  start: int = 0,
  *,
  workers: int | None = None,
  processes: int | None = None,
  share: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Yield shuffled batches without end.

  Each epoch has its own order, drawn from ``(seed, epoch)`` alone. Every example occurs once per epoch. Every batch is
  full: at the end of an epoch, a batch continues with the first examples of the next. Batch ``start + k`` is the same
  whether the run began at 0 or resumed at ``start``, and for any number of workers and processes; so are random
  augmentations.

  Args:
    dataset: the dataset.
    batch_size: examples per batch; it may exceed the size of the dataset.
    seed: a whole number from 0 to 2**64 - 1; all of its bits are used.
    start: number of batches to skip, at no cost.
    workers: number of threads that read examples ahead, in each process. By default the dataset's own ``workers``, or
      `default_workers`, or 1 with several processes. `Images` are in memory, and always read by one thread.
    processes: number of processes that read examples ahead; 0 for threads of this process alone. By default the
      dataset's own ``processes``, or 0. Each process is started anew, so it takes seconds and about 300 MB, and a
      script must have its ``if __name__ == "__main__":``. They are worth it where many cores decode pictures.
    share: the positions in a batch, in increasing order, that are read; the default is all. Where several programs
      train together, each reads the rows of its own devices.

  Yields:
    `Batch`, of ``batch_size`` examples, or of those of ``share``.

  Raises:
    ValueError: if ``batch_size`` or ``workers`` is below 1, or ``seed``, ``start`` or ``processes`` is out of range;
      and while batches are read, if an example or its label is not what the dataset says, with the example's name.

  >>> data = Images(np.zeros((3, 2, 2, 1), np.uint8), None, None, "three")
  >>> sorted(next(stream(data, batch_size=3, seed=0)).rows.tolist())
  [0, 1, 2]
  """
  batch_size = checks.at_least("batch_size", batch_size, 1)
  start = checks.at_least("start", start, 0)
  processes = checks.at_least("processes", getattr(dataset, "processes", 0) if processes is None else processes, 0)
  workers = getattr(dataset, "workers", None) if workers is None else workers
  if workers is None:
    workers = 1 if processes else default_workers()
  workers = checks.at_least("workers", workers, 1)
  rows = np.arange(batch_size) if share is None else _checked_share(share, batch_size)
  return Batches(_stream(dataset, batch_size, keys.check_seed("seed", seed), start, workers, processes, rows))


def _checked_share(share: np.ndarray, batch_size: int) -> np.ndarray:
  rows = np.asarray(share)
  if rows.dtype.kind not in "iu" or rows.ndim != 1 or not rows.size or (np.diff(rows) < 1).any():
    raise ValueError(f"share must be increasing positions in a batch, at least one, got {share!r}")
  if rows[0] < 0 or rows[-1] >= batch_size:
    raise ValueError(f"share must be positions below the batch_size {batch_size}, got {share!r}")
  return rows


class Batches(Iterator[Batch]):
  """Batches that Grain reads ahead. Its threads and processes end with `close`, with this object, or with the program.

  Args:
    source: an iterator of Grain.
  """

  def __init__(self, source: Any):
    self._sources = [source]
    # Left to itself, Grain ends processes when the modules that this needs are gone, and errors are printed.
    self._end = weakref.finalize(self, _close_all, self._sources)

  def __next__(self) -> Batch:
    if not self._sources:
      raise StopIteration
    return next(self._sources[0])

  def close(self) -> None:
    """End the threads and processes that read ahead; then there are no more batches."""
    self._end()


def _close_all(iterators: list[Any]) -> None:
  while iterators:
    iterators.pop().close()


def default_workers() -> int:
  """Return the number of threads that read examples by default: that of the cores, at least 2 and at most 16.

  More threads than cores wait for each other, and are only faster on a slow disk or network.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(max(cores, 2), 16)


class Order:
  """The rows of a dataset in the order of a stream, in parts of one size. It is a source of Grain.

  Args:
    number: number of rows.
    seed: the seed, from 0 to 2**64 - 1.
    size: rows in a part.

  >>> order = Order(3, seed=0, size=2)
  >>> sorted(np.concatenate([order[0], order[1], order[2]]).tolist())
  [0, 0, 1, 1, 2, 2]
  """

  def __init__(self, number: int, seed: int, size: int):
    self.number = number
    self.seed = seed
    self.size = size

  def __len__(self) -> int:
    return sys.maxsize // self.size

  def __getitem__(self, part: int) -> np.ndarray:
    """Return the rows of a part, (size,) ``int64``."""
    epoch, offset = divmod(int(part) * self.size, self.number)
    pieces = [_permutation(self.number, self.seed, epoch)[offset : offset + self.size]]
    missing = self.size - len(pieces[0])
    while missing > 0:
      epoch += 1
      pieces.append(_permutation(self.number, self.seed, epoch)[:missing])
      missing -= len(pieces[-1])
    return np.concatenate(pieces)


@functools.lru_cache(maxsize=4)
def _permutation(number: int, seed: int, epoch: int) -> np.ndarray:
  """Return the order of an epoch."""
  # NumPy splits each number into 32-bit words and concatenates them. The low word of the seed, the epoch and the high
  # part of the seed are separate numbers, so that no two pairs (seed, epoch) give the same words.
  return np.random.default_rng((seed % 2**32, epoch, seed // 2**32)).permutation(number)


def _stream(
  dataset: Dataset, batch_size: int, seed: int, start: int, workers: int, processes: int, share: np.ndarray
) -> Any:
  if isinstance(dataset, Images):  # In memory, a batch is one indexing operation, so there is nothing to read ahead.
    return _in_memory(dataset, Order(len(dataset), seed, batch_size), start, share)
  import grain

  # A thread reads several examples at a time, because passing single ones between threads takes a tenth of the time.
  size = max(divisor for divisor in range(1, LARGEST_PART + 1) if batch_size % divisor == 0)
  order: Any = Order(len(dataset), seed, size)
  parts = grain.MapDataset.source(order).seed(seed).random_map(functools.partial(_read, dataset))
  # A part is read as a whole, since its random numbers are those of the part, and what is not in the share is dropped.
  needed = np.unique(share // size)
  number = len(needed)
  if number < batch_size // size:
    parts = grain.MapDataset.source(_Some(parts, needed, batch_size // size))
  join = functools.partial(_join, kept=np.searchsorted(needed, share // size) * size + share % size)
  if not processes:
    reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(2 * number, workers))
    return iter(parts[start * number :].to_iter_dataset(reading).batch(number, batch_fn=join))
  _parse_flags()
  batches = parts.batch(number, drop_remainder=True, batch_fn=join)[start:]
  reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)
  options = grain.MultiprocessingOptions(num_workers=processes)
  return iter(batches.to_iter_dataset(reading).mp_prefetch(options, _start_worker).map(_copied))


class _Some:
  """Some parts of each batch, as a source of Grain.

  Args:
    parts: all parts.
    needed: which parts of a batch.
    number: number of parts in a batch.
  """

  def __init__(self, parts: Any, needed: np.ndarray, number: int):
    self.parts, self.needed, self.number = parts, needed, number

  def __len__(self) -> int:
    return len(self.parts) // self.number * len(self.needed)

  def __getitem__(self, index: int) -> Batch:
    batch, place = divmod(int(index), len(self.needed))
    return self.parts[batch * self.number + int(self.needed[place])]


def _parse_flags() -> None:
  """Let Grain's processes use the defaults of absl's flags, in a program that does not parse them."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, number: int) -> None:
  """Let a worker process live as long as its parent: that decides what an interruption does, or is killed."""
  del index, number
  for signal_number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signal_number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  if parent is not None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
  parent.join()
  os._exit(1)


def _copied(batch: Batch) -> Batch:
  """Copy a batch out of the memory that Grain's processes share, which is cheap beside decoding it.

  An array there that is still in use at the end of the program is an error of Grain.
  """
  examples, labels, rows = batch
  return Batch(np.array(examples), None if labels is None else np.array(labels), np.array(rows))


def _in_memory(images: Images, order: Order, start: int, share: np.ndarray) -> Iterator[Batch]:
  for number in itertools.count(start):
    rows = order[number][share]
    yield Batch(images.images[rows], None if images.labels is None else images.labels[rows], rows)


def _read(dataset: Dataset, rows: np.ndarray, rng: np.random.Generator) -> Batch:
  """Read some examples, one after the other, and check them: the dataset may be one of the user's own.

  Raises:
    ValueError: if an example or a label is not what the dataset says it is, with the example's name.
  """
  examples, labels = zip(*(dataset.example(int(row), rng) for row in rows), strict=True)
  shape, first = tuple(dataset.image_shape), getattr(examples[0], "dtype", None)
  for row, example in zip(rows, examples, strict=True):
    kind = getattr(example, "dtype", None)
    if kind not in EXAMPLE_TYPES or example.shape != shape:
      got = type(example).__name__ if kind is None else f"{kind} of shape {tuple(example.shape)}"
      raise ValueError(f"{_name(dataset, row)} is {got}, expected an array of uint8 or float32 of shape {shape}")
    if kind != first:
      raise ValueError(f"{_name(dataset, row)} is {kind} and {_name(dataset, rows[0])} is {first}: make them one type")
  batch = np.stack(examples)
  if batch.dtype == np.float32 and not np.isfinite(batch).all():
    row = next(row for row, example in zip(rows, batch, strict=True) if not np.isfinite(example).all())
    raise ValueError(f"{_name(dataset, row)} has values that are not finite: mend or remove it")
  checked = _as_labels(dataset, labels)
  if checked is None:  # Then one by one, to name the wrong one.
    parts = [_as_labels(dataset, [label]) for label in labels]
    for row, label, part in zip(rows, labels, parts, strict=True):
      if part is None:
        raise ValueError(f"{_name(dataset, row)} has the label {reprlib.repr(label)}, expected {_label_of(dataset)}")
    checked = np.concatenate([part for part in parts if part is not None])  # Such as int64 and uint64.
  return Batch(batch, checked if checked.ndim else None, rows)


def _as_labels(dataset: Dataset, labels: Sequence[Any]) -> np.ndarray | None:
  """Return labels as an array, which is () for a dataset without labels; None if one is not as the dataset says."""
  number, shape = dataset.num_classes, dataset.label_shape
  if number is None and shape is None:
    return None if any(label is not None for label in labels) else np.empty(())
  try:
    array = np.asarray(labels)
  except ValueError:  # Vectors of several lengths.
    return None
  if number is not None:
    is_valid = array.ndim == 1 and array.dtype.kind in "iub" and array.min() >= 0 and array.max() < number
    return array.astype(np.int32) if is_valid else None
  if array.shape[1:] != tuple(shape or ()) or array.dtype.kind not in "iufb":
    return None
  with np.errstate(over="ignore"):  # Numbers that are too large become infinite.
    array = array.astype(np.float32)
  return array if np.isfinite(array).all() else None


def _label_of(dataset: Dataset) -> str:
  """Return what a label of a dataset is, in words."""
  if dataset.num_classes is not None:
    return f"a whole number from 0 to {dataset.num_classes - 1}"
  if dataset.label_shape is None:
    return "None, because the dataset has neither num_classes nor label_shape"
  return f"an array of finite numbers of shape {tuple(dataset.label_shape)}"


def _name(dataset: Dataset, row: int | np.integer) -> str:
  try:
    return dataset.example_name(int(row))
  except NotImplementedError:
    return f"{dataset.name}[{row}]"


def _join(parts: Sequence[Batch], kept: np.ndarray) -> Batch:
  examples, labels, rows = zip(*parts, strict=True)
  other = next((part for part in parts if part.examples.dtype != examples[0].dtype), None)
  if other is not None:
    kinds = f"row {other.rows[0]} is {other.examples.dtype} and row {rows[0][0]} is {examples[0].dtype}"
    raise ValueError(f"the examples have several types: {kinds}: make them one type")
  joined = Batch(np.concatenate(examples), None if labels[0] is None else np.concatenate(labels), np.concatenate(rows))
  if len(kept) == len(joined.rows):
    return joined
  own_labels = None if joined.labels is None else joined.labels[kept]
  return Batch(joined.examples[kept], own_labels, joined.rows[kept])
