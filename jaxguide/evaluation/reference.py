"""The reference of an evaluation: real images, or samples of another model, or statistics of their features.

`open_reference` takes all of them. Of images it computes the features of each, in pieces, so that a data set need not
fit in memory.
"""

import dataclasses
import functools
import hashlib
import os
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide import data
from jaxguide._core.bars import progress_bar
from jaxguide.data.dataset import Dataset
from jaxguide.evaluation import metrics
from jaxguide.evaluation.features import Features, extract
from jaxguide.evaluation.statistics import Statistics, read_statistics

MOST_FEATURES = 50_000
"""The most images whose single features are kept, for kernel distances and neighbours. Means count all images."""

MANY = 2_000
"""The number of images from which on a hint says how to keep their features."""

OTHERS = {"inception": "fid", "dinov2": "fd_dinov2"}
"""The names that EDM2's files of statistics have for features. Files of others than us are of these features."""

PIECE = 4096
"""The number of images whose features are computed between two updates of the means."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """What samples are compared with.

  Args:
    name: what it is, for protocols, such as the path or the name of a data set.
    statistics: the statistics of its features.
    dataset: its images, to look at and to fit a judge on; None if only the statistics are at hand.
  """

  name: str
  statistics: Statistics
  dataset: Dataset | None = None

  @property
  def protocol(self) -> dict[str, Any]:
    """What it contributes to the protocol of figures."""
    return {"name": self.name, "images": self.statistics.n, "statistics_hash": self._hash}

  @functools.cached_property
  def _hash(self) -> str:
    """Identifies the statistics by their numbers."""
    digest = hashlib.sha256()
    for name in ("mu", "sigma", "mu_s", "sigma_s", "features", "labels"):
      values = getattr(self.statistics, name)
      digest.update(name.encode() if values is None else np.ascontiguousarray(values).data)
    return digest.hexdigest()[:16]

  @property
  def class_names(self) -> Sequence[str] | None:
    """The names of the classes; None if they are not known."""
    return self.statistics.class_names if self.dataset is None else self.dataset.class_names

  def kept_rows(self) -> np.ndarray:
    """Return the rows of the data set whose features the statistics hold."""
    return chosen_rows(self.statistics.n or 0)

  def labelled(self) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the images (m, height, width, channels) and labels (m,) of the rows of `kept_rows`.

    The images are None if there is no data set, the labels are None if it has no classes.
    """
    if self.dataset is None:
      return None, self.statistics.labels
    images = np.stack([self.dataset.example(int(row), _RNG)[0] for row in self.kept_rows()])
    return images, self.statistics.labels


_RNG = np.random.default_rng(0)


def chosen_rows(total: int) -> np.ndarray:
  """Choose the rows whose features are kept: all, or `MOST_FEATURES` of them at random, always the same."""
  if total <= MOST_FEATURES:
    return np.arange(total)
  return np.sort(np.random.default_rng(0).permutation(total)[:MOST_FEATURES])


def statistics_of(
  dataset: Dataset | np.ndarray,
  features: Features,
  *,
  name: str = "images",
  batch_size: int = 64,
  progress: bool = True,
) -> Statistics:
  """Compute the statistics of the features of images.

  Args:
    dataset: uint8 images of shape (n, height, width, channels), n at least 2; or a data set of them.
    features: the features.
    name: what the images are, for the progress bar.
    batch_size: the number of images at a time.
    progress: whether to show a progress bar.

  Raises:
    ValueError: if there are fewer than 2 images, or they do not suit the features.
    FloatingPointError: if a feature is not finite.
  """
  if isinstance(dataset, np.ndarray):
    dataset = data.Images(dataset, None, None, name)
  total = len(dataset)
  if total < 2:
    raise ValueError(f"a reference needs at least 2 images, and {name} has {total}")
  names = [output for output in features.outputs if output in ("pool", "spatial")]
  moments = {output: metrics.Moments() for output in names}
  kept, wanted = [], chosen_rows(total)
  with progress_bar(total, title=f"features of {name}", unit="image", show=progress) as bar:
    for start in range(0, total, PIECE):
      rows = np.arange(start, min(start + PIECE, total))
      part = dataset.subset(rows)
      found = extract(features, part, outputs=names, batch_size=batch_size, progress=bar.update)
      for output in names:
        moments[output].add(found[output])
      kept.append(found["pool"][np.isin(rows, wanted)])
  pool, spatial = moments["pool"].gaussian(), moments["spatial"].gaussian() if "spatial" in moments else None
  labels = _labels(dataset, wanted)
  return Statistics(
    mu=pool.mean,
    sigma=pool.covariance,
    n=total,
    mu_s=None if spatial is None else spatial.mean,
    sigma_s=None if spatial is None else spatial.covariance,
    features=np.concatenate(kept),
    labels=labels,
    class_names=None if labels is None else dataset.class_names,
    fingerprint=dataset.fingerprint,
    protocol=_protocol(features, dataset.image_shape),
  )


def _labels(dataset: Dataset, rows: np.ndarray) -> np.ndarray | None:
  if dataset.num_classes is None:
    return None
  labels = getattr(dataset, "labels", None)
  if labels is not None and len(labels) == len(dataset):
    return np.asarray(labels)[rows].astype(np.int64)
  return np.array([int(dataset.example(int(row), _RNG)[1]) for row in rows])


def open_reference(
  source: Any,
  features: Features,
  image_shape: Sequence[int] | None = None,
  *,
  batch_size: int = 64,
  progress: bool = True,
  kept: Statistics | None = None,
  hint: bool = False,
) -> Reference:
  """Open a reference.

  Args:
    source: a file of statistics (.npz or .pkl, see `jaxguide.evaluation.read_statistics`); an .npz of samples; an .npz
      of both, such as OpenAI's reference batches, whose images give the features of single images; another
      data set as `jaxguide.data.DataConfig` names it (a folder, a .zip, ``tfds:NAME``, ``digits``); a
      `jaxguide.data.DataConfig`; a `jaxguide.data.Dataset`; uint8 images (n, height, width, channels); a `Statistics`;
      or a `Reference`.
    features: the features on which samples are compared.
    image_shape: (height, width, channels) of the samples. Pictures are resized to it, as OpenAI's reference batches
      are; other images must have it, unless it is left out.
    batch_size: the number of images at a time.
    progress: whether to show progress bars.
    kept: statistics from earlier, which are taken if they are of the same images and features.
    hint: whether to say, before the features of many images are computed, how to keep them.

  Warns:
    UserWarning: the hint, if a network computes the features of `MANY` images or more.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file holds neither images nor statistics, or statistics of other features, or images of another
      shape.
  """
  if isinstance(source, Reference):
    check_same_features(source.statistics, features, source.name, image_shape)
    return source
  if isinstance(source, Statistics):
    check_same_features(source, features, "the reference", image_shape)
    return Reference("statistics", source)
  name = os.fspath(source) if isinstance(source, str | os.PathLike) else getattr(source, "name", None)
  if isinstance(source, data.DataConfig):
    name = str(source.source)
  name = str(name or "images")
  is_file = isinstance(source, str | os.PathLike) and Path(source).suffix.lower() in (".npz", ".pkl")
  if is_file and Path(source).is_file():
    arrays = _arrays_in(Path(source))
    if arrays is None or "mu" in arrays:
      metric = (
        {"inception": "fid", "dinov2": "fd_dinov2"}.get(features.name.partition(":")[0]) if arrays is None else None
      )
      statistics = read_statistics(source, metric)
      if arrays is None or "arr_0" not in arrays or _suit(statistics, features):
        check_same_features(statistics, features, name, image_shape)
        if arrays is not None and "arr_0" in arrays and statistics.features is None:
          images = images_beside_moments(source)
          _hint(hint, features, len(images), name)
          found = statistics_of(images, features, name=name, batch_size=batch_size, progress=progress)
          statistics = dataclasses.replace(statistics, features=found.features)
        return Reference(name, statistics)
  if is_file and not Path(source).exists():
    raise FileNotFoundError(
      f"there is no file {name}: give a file of statistics (jaxguide reference SOURCE --out STATISTICS.npz makes one), "
      "an .npz of images, a folder of pictures, or the name of a data set"
    )
  dataset = _dataset(source, image_shape, progress)
  if image_shape is not None and tuple(dataset.image_shape) != tuple(image_shape):
    raise ValueError(
      f"the reference {name} has images of shape {tuple(dataset.image_shape)}, and the samples have "
      f"{tuple(image_shape)}: give a reference of that shape"
    )
  wanted = _protocol(features, dataset.image_shape)
  if kept is not None and kept.fingerprint == dataset.fingerprint and kept.protocol == wanted:
    return Reference(name, kept, dataset)
  if isinstance(source, str | os.PathLike):
    _hint(
      hint, features, len(dataset), f"{name} --size {dataset.image_shape[0]}" if _is_pictures(Path(source)) else name
    )
  return Reference(name, statistics_of(dataset, features, name=name, batch_size=batch_size, progress=progress), dataset)


def _hint(wanted: bool, features: Features, number: int, source: str) -> None:
  """Say how the features of many images can be kept."""
  if wanted and features.weights and number >= MANY:
    warnings.warn(
      f"the features of {number:,} images are computed, which can take minutes. To compute them once: jaxguide "
      f"reference {source} --features {features.name} --out STATISTICS.npz; then --reference STATISTICS.npz",
      stacklevel=4,
    )


def has_moments_and_images(path: str | os.PathLike[str]) -> bool:
  """Whether a file has the moments of a data set and some images of it, as OpenAI's reference batches have."""
  arrays = (_arrays_in(Path(path)) if Path(path).is_file() else None) or []
  return {"mu", "arr_0"} <= {*arrays}


def images_beside_moments(path: str | os.PathLike[str]) -> Dataset:
  """Open the images of such a file."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*arrays that are not used")  # The moments are read elsewhere.
    return data.open_data(data.DataConfig(os.fspath(path)), False)


def _arrays_in(path: Path) -> list[str] | None:
  """Name the arrays of an .npz file; None for another file."""
  if path.suffix.lower() != ".npz":
    return None
  try:
    with zipfile.ZipFile(path) as members:
      return [name.removesuffix(".npy") for name in members.namelist()]
  except (OSError, zipfile.BadZipFile):
    return []  # Whoever reads the file says what is wrong with it.


def _suit(statistics: Statistics, features: Features) -> bool:
  try:
    check_same_features(statistics, features, "")
  except ValueError:
    return False
  return True


def _protocol(features: Features, image_shape: Sequence[int]) -> dict[str, Any]:
  """Return what the features of images depend on."""
  return {**features.protocol, "image_shape": list(image_shape)}


def check_same_features(
  statistics: Statistics, features: Features, name: str, image_shape: Sequence[int] | None = None
) -> None:
  """Check that statistics are of some features, by what they say of themselves and by their width.

  Args:
    statistics: the statistics.
    features: the features.
    name: what the statistics are, for the error.
    image_shape: (height, width, channels) of the samples; None if it is not known.

  Raises:
    ValueError: if they are of others, or of images of another shape than the samples.
  """
  stored: Mapping[str, Any] | None = statistics.protocol
  if stored is None:
    family = features.name.partition(":")[0]
    if family not in OTHERS:
      raise ValueError(
        f"the statistics in {name} do not say what features they are of, so they can only be those of inception or "
        f"dinov2, and not of {features.name}: choose these features, or give images"
      )
    stored = {}
  wanted = features.protocol if image_shape is None else _protocol(features, image_shape)
  different = [
    f"{key} is {stored.get(key)!r} there, and {value!r} here"
    for key, value in wanted.items()
    if stored.get(key, value) != value
  ]
  width = None if image_shape is None else _width(features, image_shape)
  if width is not None and len(statistics.mu) != width:
    different.append(f"{len(statistics.mu)} numbers there, and {width} here")
  if different:
    raise ValueError(
      f"the statistics in {name} are of other features ({'; '.join(different)}): make them anew (jaxguide reference), "
      "or choose their features"
    )


def _width(features: Features, image_shape: Sequence[int]) -> int:
  """Return the number of features of an image, without computing them."""
  height, width, channels = image_shape
  if features.resize is not None:
    height, width = (len(matrix) for matrix in features.resize(height, width))
  image = jax.ShapeDtypeStruct((1, height, width, features.channels or channels), np.float32)
  return jax.eval_shape(features.function, features.params, image)["pool"].shape[1]


def _dataset(source: Any, image_shape: Sequence[int] | None, progress: bool) -> Dataset:
  if isinstance(source, Dataset):
    return source
  if isinstance(source, np.ndarray):
    return data.Images(source, None, None, "images")
  if isinstance(source, data.DataConfig):
    return data.open_data(source, progress)
  text = os.fspath(source)
  path = Path(text)
  size = channels = None
  if image_shape is not None and _is_pictures(path):
    height, width, channels = image_shape
    size = height if height == width else None
    channels = channels if channels in (1, 3) else None
  return data.open_data(data.DataConfig(text, size=size, channels=channels), progress)


def _is_pictures(path: Path) -> bool:
  return path.is_dir() or path.suffix in (".zip", ".parquet", ".array_record")
