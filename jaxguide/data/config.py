"""The configuration of a dataset, as plain data, and the dataset that it describes."""

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import write_atomically
from jaxguide.data import prepared, resize, sources
from jaxguide.data.batches import default_workers
from jaxguide.data.dataset import Dataset
from jaxguide.data.images import Images
from jaxguide.data.prepared import DecodedPictures, Pictures, Preparation
from jaxguide.data.records import BadRecord, Records, Unreadable, shown

BOUNDS: dict[str, tuple[int | float, int | float]] = {
  "size": (1, 2**16),
  "channels": (1, 3),
  "held_out": (0, 1),
  "workers": (1, 1024),
  "processes": (0, 1024),
}

CHECKS = ("all", "none")

LABELS = ("auto", "none")

SHOWN = 5
"""The number of bad files that a message names."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The configuration of a dataset.

  Args:
    source: where the examples are: a folder of pictures with a sub-folder for each class, a .zip file of it, an .npz,
      .array_record or .parquet file, ``digits``, ``animals`` or ``tfds:NAME``. A folder without sub-folders is for a
      model without classes. A .zip file may have EDM's dataset.json. ``SOURCE:NAME`` takes another source of
      `jaxguide.data.sources.SOURCES`. A folder named digits or animals is written ./digits or ./animals.
    split: the split, for animals, for a data set of TFDS, and for Parquet files with names such as
      train-00000-of-00002.parquet.
    size: the side of the square that pictures are resized to. If left out, all pictures must have one size.
    channels: 3 for RGB, 1 for grey. If left out, 3 for pictures, and as stored for arrays.
    crop: how a picture becomes a square: center, random (0.8 to 1 times the shorter side) or squash.
    filter: the filter of the resizing: adm (that of OpenAI's guided-diffusion), lanczos, bicubic, bilinear, box or
      nearest.
    background: the colour behind transparent pixels, by name or as #rrggbb.
    flip: whether half of the examples are mirrored from left to right, at random.
    labels: auto, or none to train without the labels that the data have.
    skip_bad: whether files that cannot be used are left out, up to half of all and not a whole class. If not, they are
      named before the work starts.
    check: all, to decode every picture once before the work starts (once for each data set, the result is kept in the
      cache folder); or none.
    held_out: the share of the examples that is held out of the training, chosen by a hash of their names. If left out,
      0 for a denoiser and 0.1 for a classifier.
    cache: whether all pictures are decoded once and kept in memory.
    contents: whether the fingerprint of the data depends on the contents of the files, which are then read once. If
      not, it depends on their names, sizes and times.
    workers: number of threads that read pictures. If left out, that of the cores, at least 2 and at most 16.
    processes: number of processes that read pictures while a model trains, each with ``workers`` threads (if left
      out, 1); 0 for threads alone. Processes decode faster on many cores; each takes seconds to start and about 300 MB.
    image_column: the column of the pictures, for Parquet.
    label_column: the column of the labels, for Parquet.
    data_dir: the folder of TFDS's prepared data sets.

  Raises:
    ValueError: for a value that is out of range or of a wrong type, naming the field.
  """

  source: str | os.PathLike[str]
  split: str = "train"
  size: int | None = None
  channels: int | None = None
  crop: str = "center"
  filter: str = "adm"
  background: str = "white"
  flip: bool = False
  labels: str = "auto"
  skip_bad: bool = False
  check: str = "all"
  held_out: float | int | None = None
  cache: bool = False
  contents: bool = False
  workers: int | None = None
  processes: int = 0
  image_column: str = "image"
  label_column: str = "label"
  data_dir: str | os.PathLike[str] | None = None

  def __post_init__(self):
    for name in ("source", "data_dir"):
      if isinstance(getattr(self, name), os.PathLike):
        object.__setattr__(self, name, os.fspath(getattr(self, name)))
    paths = {"source": str, "data_dir": str | None}
    for field in dataclasses.fields(self):
      kind = paths.get(field.name, field.type)
      value = checks.field(field.name, getattr(self, field.name), kind, *BOUNDS.get(field.name, ()))
      object.__setattr__(self, field.name, value)
    for name, known in (("crop", resize.CROPS), ("filter", resize.FILTERS), ("check", CHECKS), ("labels", LABELS)):
      checks.lookup(name, getattr(self, name), dict.fromkeys(known))
    if self.channels == 2:
      raise ValueError("channels must be 1 for grey or 3 for RGB, got 2")
    if self.held_out == 1:
      raise ValueError("held_out must be below 1, or nothing is left to train on")
    self._colour()

  def _colour(self) -> tuple[int, ...]:
    from PIL import ImageColor

    wanted = f"background must be a colour such as white or #80a0ff, got {self.background!r}"
    try:
      colour = ImageColor.getrgb(self.background)
    except ValueError:
      raise ValueError(wanted) from None
    if len(colour) > 3:
      raise ValueError(f"{wanted}, which is transparent itself: leave out its fourth number")
    if not all(0 <= part <= 255 for part in colour):
      raise ValueError(f"{wanted}, whose numbers are not all from 0 to 255")
    return colour

  def threads(self) -> int:
    """Return the number of threads that read pictures."""
    return default_workers() if self.workers is None else self.workers

  def preparation(self) -> Preparation:
    """Return how pictures become examples."""
    return Preparation(self.size, self.channels or 3, self.filter, self.crop, self._colour(), self.flip)


def open_data(config: DataConfig, progress: bool = True) -> Dataset:
  """Open the dataset of a configuration, and check every picture of it once.

  Args:
    config: the configuration.
    progress: whether to show progress bars.

  Returns:
    `Images` for data in memory (``digits``, or with ``cache``), else a dataset that reads its files as they are needed.

  Raises:
    FileNotFoundError: if there is no such file or folder.
    ValueError: if the source is unknown; if there are no pictures; if they have several sizes and no ``size`` is given;
      or if some cannot be used, with the names of some, and ``skip_bad`` is off or would leave out more than half of
      them or a whole class.

  Warns:
    UserWarning: if files are left out, with their number and the names of some.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   digits = open_data(DataConfig("digits", data_dir=folder))
  >>> digits.image_shape, digits.class_names[3]
  ((8, 8, 1), '3')
  """
  found = sources.open_source(config)
  if isinstance(found, Images):
    return _from_images(found, config, progress)
  if config.labels == "none":
    found = dataclasses.replace(found, labels=None, class_names=None, num_classes=None)
  first = _first(found)
  if isinstance(first, np.ndarray) and first.dtype != np.uint8:
    return _floats(found, config, progress)
  if isinstance(first, np.ndarray) and config.channels is None and (first.ndim == 2 or first.shape[-1] == 1):
    config = dataclasses.replace(config, channels=1)
  return _prepared(found, config, progress)


def _first(records: Records) -> bytes | np.ndarray | None:
  """Return the first record that can be read."""
  for row in range(len(records)):
    if row not in records.bad:
      with contextlib.suppress(BadRecord):
        return records.read(row)
  return None


def _prepared(records: Records, config: DataConfig, progress: bool) -> Dataset:
  """Check the records, and return the dataset of those that can be used."""
  preparation = config.preparation()
  if config.size is None and config.crop != "center":
    raise ValueError(f"crop {config.crop!r} needs the side of the square: give size")
  bad = _checked(records, preparation, config, progress)
  if bad:
    _report(records, bad, config.skip_bad)
  rows = np.delete(np.arange(len(records)), list(bad))
  contents = _contents(records, rows) if config.contents else None
  dataset = Pictures(records, preparation, rows, (0, 0, 0), contents, config.workers, config.processes)
  dataset = dataclasses.replace(dataset, image_shape=_shape(dataset))
  return prepared.in_memory(dataset, config.threads(), progress) if config.cache else dataset


def _shape(dataset: Pictures) -> tuple[int, ...]:
  """Return the shape of the first example that can be read. Without a check, those before it may be bad files.

  Raises:
    ValueError: if none can be read, with the name of the first and the reason.
  """
  reason = ""
  for row in dataset.rows:
    try:
      return dataset.preparation.picture(dataset.records.read(int(row)), np.random.default_rng(0)).shape
    except BadRecord as error:
      reason = reason or str(error)
  count = f"none of the {len(dataset):,} files of {dataset.name} can be used"
  raise ValueError(f"{count}, such as {shown(dataset.records.names[int(dataset.rows[0])])}: {reason}")


def _report(records: Records, bad: Mapping[int, str], skip_bad: bool) -> None:
  """Warn of the files that are left out.

  Raises:
    ValueError: if they are not to be left out, or they are more than half of the files, or all files of a class.
  """
  count = f"{len(bad):,} of {len(records):,} files of {records.name}"
  named = "".join(f"\n  {shown(f'{records.names[row]}: {reason}')}" for row, reason in list(bad.items())[:SHOWN])
  named += f"\n  and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
  mend = "Mend or remove them"
  if not skip_bad:
    remedy = mend if len(bad) == len(records) else f"{mend}, or leave them out with skip_bad (--skip-bad)"
    raise ValueError(f"{count} cannot be used:{named}\n{remedy}")
  if 2 * len(bad) > len(records):
    raise ValueError(f"{count} cannot be used, and skip_bad leaves out at most half of them:{named}\n{mend}")
  lost = _lost_classes(records, bad)
  if lost:
    classes = shown(", ".join(lost[:SHOWN])) + (f" and {len(lost) - SHOWN:,} more" if len(lost) > SHOWN else "")
    raise ValueError(
      f"{count} cannot be used, and no picture would be left of the classes {classes}:{named}\n"
      f"{mend}, or remove the classes"
    )
  warnings.warn(f"{count} are left out:{named}", stacklevel=4)


def _lost_classes(records: Records, bad: Mapping[int, str]) -> list[str]:
  """Return the classes all of whose pictures are bad, by their names or numbers."""
  labels = records.labels
  if labels is None or records.num_classes is None:
    return []
  lost = np.setdiff1d(labels[list(bad)], np.delete(labels, list(bad)))
  return [str(number) if records.class_names is None else records.class_names[number] for number in lost]


def _checked(records: Records, preparation: Preparation, config: DataConfig, progress: bool) -> dict[int, str]:
  """Return why records cannot be used. The result of decoding all pictures is kept in the cache folder.

  It is kept for these files and this way of preparing them, and not if the system could not read one of them.
  """
  if config.check == "none":
    return dict(records.bad)
  how = (preparation.size, preparation.channels, preparation.crop, preparation.filter)
  facts = (records.name, *how, len(records), records.state, records.bad)
  digest = hashlib.sha256(repr(facts).encode() + records.stamps.tobytes()).hexdigest()
  path = cache_folder() / "checked" / f"{digest}.json"
  try:
    return {int(row): str(reason) for row, reason in json.loads(path.read_bytes()).items()}
  except (OSError, ValueError, AttributeError):
    pass
  bad, is_final = prepared.check(records, preparation, config.threads(), progress)
  if not is_final:
    return bad
  try:
    write_atomically(path, json.dumps(bad).encode())
  except OSError as error:
    warnings.warn(f"the result of the check is not kept, so that it is repeated next time: {error}", stacklevel=5)
  return bad


def cache_folder() -> Path:
  """Return the folder of what can be computed again."""
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxguide"


def _contents(records: Records, rows: np.ndarray) -> str:
  """Return a hash of the contents of all files. Without a check, some may be damaged, which count as empty.

  Raises:
    ValueError: if the system cannot read a file, with its name.
  """
  digest = hashlib.sha256()
  for row in rows:
    try:
      content = records.read(int(row))
    except Unreadable as error:
      raise ValueError(f"{records.name}: {shown(records.names[int(row)])} cannot be used: {error}") from error
    except BadRecord:
      content = b""
    digest.update(hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).digest())
  return digest.hexdigest()


def _from_images(images: Images, config: DataConfig, progress: bool) -> Dataset:
  """Apply the options of a configuration to a data set in memory."""
  if config.labels == "none":
    images = dataclasses.replace(images, labels=None, num_classes=None, class_names=None)
  height, width, channels = images.image_shape
  same_size = config.size in (None, height) and (height == width or config.size is None)
  if same_size and config.channels in (None, channels) and not config.flip and config.crop != "random":
    return images
  records = _as_records(images)
  config = dataclasses.replace(config, check="none", channels=config.channels or channels)
  return _prepared(records, config, progress)


def _as_records(images: Images) -> Records:
  stamps = np.array([int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "little") for image in images.images])
  names = [images.example_name(row) for row in range(len(images))]
  return Records(
    images.name,
    names,
    images.labels,
    images.class_names,
    images.num_classes,
    lambda row: images.images[row],
    stamps.astype(np.uint64),
  )


def _floats(records: Records, config: DataConfig, progress: bool) -> Dataset:
  """Return a data set of floats, such as latents, which are taken as they are."""
  for name in ("size", "channels"):
    if getattr(config, name) is not None:
      raise ValueError(f"{records.name} contains floats, which are not resized or converted: leave out {name}")
  if config.flip or config.crop != "center":
    raise ValueError(f"{records.name} contains floats, which are not cropped or mirrored: leave out crop and flip")
  if config.cache:
    raise ValueError(f"{records.name} contains floats, for which there is no cache: leave it out")
  return _prepared(records, config, progress)


def holds_floats(dataset: Any) -> bool:
  """Return whether the examples of a dataset are floats, such as latents. One that cannot be read counts as pixels.

  >>> holds_floats(Images(np.zeros((1, 1, 1, 1), np.uint8), None, None, "black"))
  False
  """
  try:
    example, _ = dataset.example(0, np.random.default_rng(0))
  except (ValueError, OSError):
    return False
  return np.asarray(example).dtype.kind == "f"


def split(dataset: Dataset, held_out: float) -> tuple[Dataset, Dataset]:
  """Split a dataset into a part to train on and a part that is held out.

  An example is held out if a hash of its name is small. So it stays in its part when others are added or removed.

  Args:
    dataset: the dataset.
    held_out: the share that is held out, about; above 0 and below 1.

  Returns:
    The part to train on, and the part that is held out.

  Raises:
    ValueError: if one of the parts is empty.

  >>> images = Images(np.zeros((100, 1, 1, 1), np.uint8), None, None, "black")
  >>> train, held_out = split(images, 0.2)
  >>> len(train) + len(held_out), 10 < len(held_out) < 30
  (100, True)
  """
  checks.number("held_out", held_out, 0, 1)
  name_of: Callable[[int], str] = _name_in_source(dataset)
  chosen = np.array([_share(name_of(row)) < held_out for row in range(len(dataset))])
  if chosen.all() or not chosen.any():
    part = "trained on" if chosen.all() else "held out"
    raise ValueError(
      f"of the {len(dataset)} examples of {dataset.name} none would be {part} with held_out={held_out:g}: choose "
      "another share"
    )
  return dataset.subset(np.flatnonzero(~chosen)), dataset.subset(np.flatnonzero(chosen))


def _name_in_source(dataset: Dataset) -> Callable[[int], str]:
  """Return the function that names examples for a split.

  The names are those of files without the path of the source, which may be moved; or numbers, for images in memory.
  """
  if isinstance(dataset, DecodedPictures):
    dataset = dataset.pictures
  if isinstance(dataset, Pictures):
    names, rows = dataset.records.names, dataset.rows
    return lambda row: names[int(rows[row])]
  return str if isinstance(dataset, Images) else dataset.example_name


def _share(name: str) -> float:
  """Return a number in [0, 1) that depends on a name alone."""
  content = name.encode(errors="surrogateescape")  # The names of files need not be UTF-8.
  return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") / 2**64


def grown(before: np.ndarray, dataset: Any) -> int | None:
  """Return the number of examples that a dataset has more than before, or None if it does not have all of before.

  Args:
    before: (n,) the ``stamps`` of the dataset as it was.
    dataset: the dataset as it is.

  >>> grown(np.array([1, 2], np.uint64), Images(np.zeros((3, 1, 1, 1), np.uint8), None, None, "x")) is None
  True
  """
  now = getattr(dataset, "stamps", None)
  if now is None or not np.isin(before, now).all():
    return None
  return len(now) - len(before)
