"""Datasets of files: records that are decoded, resized and cropped when they are read."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxguide._core import devices
from jaxguide._core.bars import progress_bar
from jaxguide.data import decode, resize
from jaxguide.data.dataset import Dataset
from jaxguide.data.images import Images
from jaxguide.data.pixels import saturation
from jaxguide.data.records import BadRecord, Records, Unreadable, shown

SATURATION_SAMPLES = 512


@dataclasses.dataclass(frozen=True)
class Preparation:
  """How pictures become examples.

  Args:
    size: the side of the square that pictures are resized to; None to take them as they are.
    channels: 1 for grey, 3 for RGB.
    filter: the filter of the resizing, one of `jaxguide.data.resize.FILTERS`.
    crop: how a picture becomes a square, a name of `jaxguide.data.resize.CROPS`.
    background: the colour behind transparent pixels, (red, green, blue) from 0 to 255.
    flip: whether half of the examples are mirrored, at random.
  """

  size: int | None = None
  channels: int = 3
  filter: str = "adm"
  crop: str = "center"
  background: tuple[int, ...] = (255, 255, 255)
  flip: bool = False

  @property
  def is_random(self) -> bool:
    """Whether an example is another one each time."""
    return self.flip or self.crop == "random"

  def picture(self, content: bytes | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make an example of a record.

    Returns:
      ``uint8`` (h, w, channels); or ``float32`` (h, w, c), if the record is an array of floats, such as latents. An
      array of floats (variants, moments, h, w, c) is what an example is drawn from: one of the variants, and with two
      moments normal noise of that mean and that standard deviation.

    Raises:
      BadRecord: if the record is no picture, or is damaged.
    """
    if isinstance(content, np.ndarray):
      if content.dtype.kind == "f":
        return _floats(content, rng)
      picture = decode.from_array(content)
    else:
      picture = decode.decode(content, self.background)
    if self.size is not None:
      picture = resize.CROPS[self.crop](picture, self.size, self.filter, rng)
    mode = "L" if self.channels == 1 else "RGB"
    array = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    array = array.reshape(*array.shape[:2], self.channels)
    return array[:, ::-1] if self.flip and rng.random() < 0.5 else array


def _drawn(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Draw an example from an array (variants, moments, h, w, c): a variant, and with two moments noise for its mean."""
  mean, *deviation = array[rng.integers(len(array))]
  return mean + deviation[0] * rng.standard_normal(mean.shape, np.float32) if deviation else mean


def _floats(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  if array.ndim == 5 and np.isfinite(array).all():
    return _drawn(array, rng)
  if array.ndim != 3 or not np.isfinite(array).all():
    problem = f"it has shape {array.shape}, not (height, width, channels)" if array.ndim != 3 else "it is not finite"
    raise BadRecord(problem)
  return array.astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures(Dataset):
  """Pictures in files, decoded and resized when they are read. It is a `jaxguide.data.Dataset`.

  Args:
    records: the records.
    preparation: how they become examples.
    rows: (n,) the records that are used, by their number.
    image_shape: (height, width, channels) of every example.
    contents: a hash of the files' contents, if the fingerprint should depend on it.
    workers: the number of threads that read the examples in `jaxguide.data.stream`, or None for its default.
    processes: the number of processes that read them there.
  """

  records: Records
  preparation: Preparation
  rows: np.ndarray
  image_shape: Sequence[int]
  contents: str | None = None
  workers: int | None = None
  processes: int = 0

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def name(self) -> str:
    """The name of the source."""
    return self.records.name

  @property
  def num_classes(self) -> int | None:
    """Number of classes, or None."""
    return self.records.num_classes

  @property
  def class_names(self) -> Sequence[str] | None:
    """The names of the classes, or None."""
    return self.records.class_names

  @property
  def label_shape(self) -> tuple[int, ...] | None:
    """``()`` for classes, ``(d,)`` for vectors, None without labels."""
    return None if self.records.labels is None else self.records.labels.shape[1:]

  def example(self, row: int, rng: np.random.Generator | None = None) -> tuple[np.ndarray, Any]:
    """Read an example and its label.

    Raises:
      ValueError: if the file is damaged or was removed, with its name.
    """
    record = int(self.rows[row])
    try:
      array = self.preparation.picture(self.records.read(record), rng or np.random.default_rng(0))
    except BadRecord as error:
      raise ValueError(f"{self.example_name(row)} cannot be used: {error}") from error
    if array.shape != tuple(self.image_shape):
      remedy = ": give size (--size)" if self.preparation.size is None else ""
      raise ValueError(f"{self.example_name(row)} has shape {array.shape}, expected {tuple(self.image_shape)}{remedy}")
    return array, None if self.records.labels is None else self.records.labels[record]

  def example_name(self, row: int) -> str:
    """Return the name of an example's file."""
    return f"{self.name}: {shown(self.records.names[int(self.rows[row])])}"

  @functools.cached_property
  def stamps(self) -> np.ndarray:
    """(n,) ``uint64``: a hash of each example's name, size, time of change and label."""
    stamps, labels = self.records.stamps[self.rows], self.records.labels
    if labels is None:
      return stamps
    # A label by its class's name, so that a new class does not change the others.
    names = self.records.class_names
    texts = [repr(label if names is None else names[label]) for label in labels[self.rows].tolist()]
    of_label = {text: int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for text in set(texts)}
    return stamps ^ np.array([of_label[text] for text in texts], np.uint64)

  @functools.cached_property
  def fingerprint(self) -> str:
    """SHA-256 of the files' names, sizes and times of change, their labels, and how they are prepared.

    It is cheap for a million files. It does not change if the folder is moved with its times. A file whose content
    changes while its size and time stay is only noticed with ``contents``.
    """
    names = None if self.records.class_names is None else list(self.records.class_names)
    facts = (dataclasses.astuple(self.preparation), tuple(self.image_shape), names, self.contents)
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(np.sort(self.stamps).tobytes())
    return digest.hexdigest()

  @functools.cached_property
  def saturation(self) -> float | None:
    """The share of pixel values that are 0 or 255, in at most 512 examples; None for floats."""
    rows = np.linspace(0, len(self) - 1, min(len(self), SATURATION_SAMPLES)).astype(int)
    if self.example(0)[0].dtype != np.uint8:
      return None
    return float(np.mean([saturation(self.example(int(row))[0]) for row in rows]))

  def subset(self, rows: np.ndarray) -> "Pictures":
    """Return the examples of some rows."""
    return dataclasses.replace(self, rows=self.rows[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedPictures(Images):
  """Pictures that were decoded into memory. Names, stamps and the fingerprint are those of their files.

  Args:
    pictures: the pictures in files, in the same order.
  """

  pictures: Any = None

  def example_name(self, row: int) -> str:
    """Return the name of an example's file."""
    return self.pictures.example_name(row)

  @property
  def stamps(self) -> np.ndarray:
    """(n,) ``uint64``: as of the pictures in files."""
    return self.pictures.stamps

  @property
  def fingerprint(self) -> str:
    """As of the pictures in files, so that a run may go on with or without the cache."""
    return self.pictures.fingerprint

  def subset(self, rows: np.ndarray) -> "DecodedPictures":
    """Return the examples of some rows."""
    labels = None if self.labels is None else self.labels[rows]
    return dataclasses.replace(self, images=self.images[rows], labels=labels, pictures=self.pictures.subset(rows))


def in_memory(dataset: Pictures, workers: int, progress: bool = True) -> Images:
  """Decode all pictures into memory.

  Raises:
    ValueError: if they need more than half of the memory that is free, or each is another one at each reading.
  """
  if dataset.preparation.is_random:
    raise ValueError("cache keeps decoded pictures, but crop 'random' and flip make others each time: leave one out")
  needed = len(dataset) * int(np.prod(dataset.image_shape))
  free = devices.free_host_bytes()
  if free is not None and needed > free / 2:
    raise ValueError(
      f"cache needs {needed / 1e9:.1f} GB for {len(dataset):,} pictures, and {free / 1e9:.1f} GB are free, of which "
      "at most half is used: leave out cache"
    )
  images = np.empty((len(dataset), *dataset.image_shape), np.uint8)

  def read(row: int) -> None:
    images[row] = dataset.example(row)[0]

  for _ in _in_threads(read, range(len(dataset)), workers, "decoding pictures", progress):
    pass
  labels = None if dataset.records.labels is None else dataset.records.labels[dataset.rows]
  return DecodedPictures(images, labels, dataset.num_classes, dataset.name, dataset.class_names, dataset)


def _in_threads(function: Any, items: Sequence[Any], workers: int, title: str, progress: bool) -> Iterator[Any]:
  """Yield ``function(item)`` in order, computed in threads, with a progress bar."""
  with ThreadPoolExecutor(workers) as pool, progress_bar(len(items), title=title, unit="picture", show=progress) as bar:
    chunk = 64 * workers  # Not all at once: a million futures take memory.
    for start in range(0, len(items), chunk):
      for result in pool.map(function, items[start : start + chunk]):
        bar.update()
        yield result


def check(records: Records, preparation: Preparation, workers: int, progress: bool) -> tuple[dict[int, str], bool]:
  """Decode every picture once.

  Returns:
    The reason of each record that cannot be used, by its row; and whether the system could read all records, so that
    the reasons stay true.

  Raises:
    ValueError: if the file of all records is damaged; or there is no size to resize to, and the pictures have several.
  """
  if records.verify is not None:
    records.verify()
  deterministic = dataclasses.replace(preparation, flip=False)

  def shape_of(row: int) -> tuple[int, ...] | BadRecord:
    if row in records.bad:
      return BadRecord(records.bad[row])
    try:
      return deterministic.picture(records.read(row), np.random.default_rng(0)).shape
    except BadRecord as error:
      return type(error)(str(error))  # Another one: the traceback of this one keeps the picture in memory.

  bad: dict[int, str] = {}
  is_final = True
  shapes: dict[tuple[int, ...], int] = {}  # The first picture of each.
  checked = _in_threads(shape_of, range(len(records)), workers, "checking pictures", progress)
  for row, result in enumerate(checked):
    if isinstance(result, BadRecord):
      bad[row] = str(result)
      is_final &= not isinstance(result, Unreadable)
    else:
      shapes.setdefault(result, row)
  if len(shapes) > 1:
    (one, first), (other, second) = list(shapes.items())[:2]
    examples = (
      f"{records.names[first]} has {one[1]}x{one[0]} pixels and {records.names[second]} has {other[1]}x{other[0]}"
    )
    raise ValueError(
      f"the pictures of {records.name} have {len(shapes):,} sizes: {shown(examples)}. Give the side to which all are "
      "resized: size (--size)"
    )
  return bad, is_final
