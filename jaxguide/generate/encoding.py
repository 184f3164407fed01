"""Data sets of latents, which an autoencoder makes of pictures."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import zlib
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide import data
from jaxguide._core import checks, records
from jaxguide._core.bars import progress_bar
from jaxguide._core.files import PathLike, check_writable, lock, remove_parts, replacing, write_atomically
from jaxguide.data.batches import default_workers
from jaxguide.data.config import holds_floats
from jaxguide.data.dataset import Dataset
from jaxguide.generate.latents import Vae

DTYPES = ("float32", "float16")


@dataclasses.dataclass(frozen=True)
class Encoding:
  """How pictures become latents.

  Args:
    vae: Autoencoder: the folder of an imported one, or a published file.
    size: Side of the square that pictures are resized to. If left out, all must have one size.
    crop: How a picture becomes a square: center or squash.
    filter: Filter of the resizing, as for jaxguide train.
    split: Split of the data, for sources that have splits.
    labels: auto, or none to leave out the labels that the data have.
    flip: Encode the mirrored pictures too; the training then takes either, at random.
    samples: Store one sample of each latent instead of its mean and standard deviation, in half the space; the training
      then sees the same sample each time.
    seed: Seed of these samples.
    tile: Side in pixels from which pictures are encoded in tiles, which takes less memory and is approximate.
    dtype: Type of the numbers in the file, float32 or float16.
    batch_size: Pictures at a time, over all devices.
  """

  vae: PathLike
  size: int | None = None
  crop: str = "center"
  filter: str = "adm"
  split: str = "train"
  labels: str = "auto"
  flip: bool = False
  samples: bool = False
  seed: int = 0
  tile: int | None = None
  dtype: str = "float32"
  batch_size: int = 32

  def __post_init__(self):
    checks.lookup("dtype", self.dtype, dict.fromkeys(DTYPES))
    checks.at_least("batch_size", self.batch_size, 1)
    checks.at_least("seed", self.seed, 0)
    if self.crop == "random":
      raise ValueError("crop must be center or squash: each picture is encoded once")
    if self.seed and not self.samples:
      raise ValueError("seed is for samples: give --samples with it, or leave it out")


class Encoded(NamedTuple):
  """What a file of latents holds.

  Args:
    number: the number of latents.
    shape: (height, width, channels) of each.
    std: the standard deviation of all numbers of the latents, with the spread of their posteriors.
  """

  number: int
  shape: tuple[int, ...]
  std: float


def encode(source: PathLike | Dataset, out: PathLike, encoding: Encoding, *, progress: bool = True) -> Encoded:
  """Encode a data set, and write the latents to an ``.npz`` file that `jaxguide.data.open_data` reads.

  The latents are shifted and scaled as models are trained on them. The file has ``latents``, their means, and ``std``,
  their standard deviations, so that training draws a fresh sample of the posterior at each reading; with
  ``flip`` also ``flipped`` and ``flipped_std``; ``labels`` and ``class_names`` where there are some; and ``settings``.

  While it runs, what is done is kept in the folder ``OUT.unfinished``. After a kill, the same call goes on there.

  Args:
    source: a data set, or the name of one as in `jaxguide.data.DataConfig`.
    out: the file; its name ends in ``.npz``. A file that is there is not replaced.
    encoding: how pictures become latents.
    progress: whether to show a progress bar.

  Returns:
    What the file holds.

  Raises:
    ValueError: if the data are no pictures, do not fit the autoencoder, or the folder holds other unfinished work.
    OSError: if ``out`` exists, cannot be written, or is in use.
    FloatingPointError: if a latent is not finite, with the name of its picture.
  """
  out = Path(out)
  if out.suffix != ".npz":
    raise ValueError(f"out must be a file that ends in .npz, got {out}")
  if out.exists():
    raise OSError(f"{out} exists already: choose another file, or remove it")
  check_writable(out)
  vae = Vae.load(encoding.vae, encoding.tile, encoding.batch_size)
  channels = vae.model.config.image_shape[-1]
  dataset = _open(source, encoding, channels, progress)
  record = _record(dataset, encoding, vae)
  height, width, _ = dataset.image_shape
  factor = vae.autoencoder.factor
  if height % factor or width % factor:
    raise ValueError(
      f"the pictures of {dataset.name} have {width}x{height} pixels, and the autoencoder takes multiples of {factor}: "
      "give size (--size)"
    )
  shape = (len(dataset), height // factor, width // factor, vae.autoencoder.module.latent_channels)
  names = [variant + moment for variant in ("latents", "flipped") for moment in ("", "_std")]
  names = [
    name for name in names if (encoding.flip or "flipped" not in name) and not (encoding.samples and "_" in name)
  ]
  with lock(out.with_name(f".{out.name}.lock"), out):
    unfinished = _Unfinished(out.with_name(f"{out.name}.unfinished"), record, shape, names, encoding.dtype)
    _run(dataset, vae, encoding, unfinished, progress)
    std = unfinished.finish(out, *_labels(dataset))
  return Encoded(len(dataset), shape[1:], std)


def _open(source: PathLike | Dataset, encoding: Encoding, channels: int, progress: bool) -> Dataset:
  if isinstance(source, Dataset):
    dataset: Any = source
  else:
    names = ("size", "crop", "filter", "split", "labels")
    settings = {name: getattr(encoding, name) for name in names}
    dataset = data.open_data(data.DataConfig(os.fspath(source), channels=channels, **settings), progress)
  if holds_floats(dataset):
    raise ValueError(f"{dataset.name} holds floats, and pictures are encoded")
  if dataset.image_shape[-1] != channels:
    raise ValueError(
      f"the pictures of {dataset.name} have {dataset.image_shape[-1]} channels, and the autoencoder takes {channels}"
    )
  return dataset


def _record(dataset: Dataset, encoding: Encoding, vae: Vae) -> dict[str, Any]:
  """Return everything that the latents depend on."""
  crc = functools.reduce(
    lambda total, leaf: zlib.crc32(np.ascontiguousarray(leaf).data, total), jax.tree.leaves(vae.model.params), 0
  )
  settings = {**dataclasses.asdict(encoding), "vae": str(encoding.vae)}
  settings.pop("batch_size")
  return records.record(
    encoding=settings,
    network=vae.model.config,
    data={"name": dataset.name, "fingerprint": dataset.fingerprint},
    crc32=crc,
  )


def _labels(dataset: Any) -> tuple[Any, Sequence[str] | None]:
  """Return the labels of all examples, and the names of the classes."""
  if dataset.num_classes is None and dataset.label_shape is None:
    return None, None
  if hasattr(dataset, "records"):
    labels = dataset.records.labels[dataset.rows]
  elif hasattr(dataset, "labels"):
    labels = dataset.labels
  else:
    labels = np.stack([dataset.example(row, np.random.default_rng(0))[1] for row in range(len(dataset))])
  return np.asarray(labels), dataset.class_names


def _run(dataset: Dataset, vae: Vae, encoding: Encoding, unfinished: "_Unfinished", progress: bool) -> None:
  size = vae.size
  rows = [range(start, min(start + size, len(dataset))) for start in range(unfinished.done, len(dataset), size)]

  def read(batch: range) -> np.ndarray:
    with ThreadPoolExecutor(getattr(dataset, "workers", None) or default_workers()) as pool:
      return np.stack([example for example, _ in pool.map(lambda row: dataset.example(row, rng), batch)])

  rng = np.random.default_rng(0)
  bar = progress_bar(len(dataset), initial=unfinished.done, title="encoding", unit="picture", show=progress)
  with bar, contextlib.closing(_ahead(read, rows)) as batches:
    for batch, images in zip(rows, batches, strict=True):
      found: dict[str, np.ndarray] = {}
      for variant, pictures in (("latents", images), ("flipped", images[:, :, ::-1])):
        if variant == "latents" or encoding.flip:
          mean, std = vae.moments(pictures)
          if encoding.samples:
            mean = mean + std * _noise(encoding.seed, variant, batch, mean.shape[1:])
          found |= {variant: mean, f"{variant}_std": std}
      for array in found.values():
        finite = np.isfinite(array).reshape(len(array), -1).all(1)
        if not finite.all():
          name = dataset.example_name(batch[int(np.argmin(finite))])
          raise FloatingPointError(f"the latent of {name} is not finite: the autoencoder is damaged")
      unfinished.append(found, len(batch))
      bar.update(len(batch))


def _noise(seed: int, variant: str, rows: Sequence[int], shape: Sequence[int]) -> np.ndarray:
  """Return noise that depends on the seed, the variant and the row alone."""
  number = int(variant == "flipped")
  return np.stack([np.random.default_rng((seed, number, row)).standard_normal(shape, np.float32) for row in rows])


def _ahead(read: Any, batches: Sequence[range]) -> Generator[np.ndarray, None, None]:
  """Read one batch ahead of the one that is used."""
  with ThreadPoolExecutor(1) as pool:
    waiting = [pool.submit(read, batch) for batch in batches[:1]]
    for following in [*batches[1:], None]:
      if not waiting:
        return
      current = waiting.pop().result()
      if following is not None:
        waiting.append(pool.submit(read, following))
      yield current


class _Unfinished:
  """The latents so far, in a folder beside the file.

  Args:
    folder: the folder.
    record: everything that the latents depend on.
    shape: (n, h, w, c) of all latents.
    names: the arrays.
    dtype: their type.

  Raises:
    ValueError: if the folder holds the latents of another record.
  """

  def __init__(self, folder: Path, record: Mapping[str, Any], shape: tuple[int, ...], names: Sequence[str], dtype: str):
    self.folder, self.record, self.done = folder, record, 0
    path = folder / "progress.json"
    if path.exists():
      stored = records.read(path)
      different = records.differences(stored.get("record", {}), record)
      if different:
        raise ValueError(
          f"{folder} holds latents of an unfinished run with other settings ({'; '.join(different)}): finish it with "
          "its own settings, or remove the folder to start over"
        )
      self.done = checks.whole("done", stored.get("done"), 0, shape[0])
    elif folder.exists() and any(folder.iterdir()):
      known = {f"{name}.npy" for name in names}
      others = sorted(each.name for each in folder.iterdir() if each.name not in known)
      if others:
        raise ValueError(f"{folder} holds {others[0]}, but unfinished latents are kept there: move it away")
    folder.mkdir(parents=True, exist_ok=True)
    remove_parts(folder)
    mode: Any = "r+" if path.exists() else "w+"
    self.arrays = {
      name: np.lib.format.open_memmap(folder / f"{name}.npy", mode, np.dtype(dtype), shape) for name in names
    }
    for name, array in self.arrays.items():
      if (array.shape, array.dtype) != (shape, np.dtype(dtype)):
        raise ValueError(f"{folder / name}.npy is damaged: remove the folder to start over")
    self._write()

  def _write(self) -> None:
    content = json.dumps({"record": self.record, "done": self.done}, indent=1)
    write_atomically(self.folder / "progress.json", content.encode())

  def append(self, found: Mapping[str, np.ndarray], number: int) -> None:
    """Add the next latents."""
    for name, array in self.arrays.items():
      array[self.done : self.done + number] = found[name]
      array.flush()
    self.done += number
    self._write()

  def finish(self, out: Path, labels: Any, class_names: Sequence[str] | None) -> float:
    """Write the file, remove the folder, and return the standard deviation of the latents."""
    std = self._std()
    arrays: dict[str, Any] = {name.replace("latents_std", "std"): array for name, array in self.arrays.items()}
    if labels is not None:
      arrays["labels"] = labels
    if class_names is not None:
      arrays["class_names"] = np.array(class_names)
    arrays["settings"] = np.array(json.dumps({**self.record, "std": std}))
    with replacing(out) as file:
      np.savez(file, **arrays)
    self.arrays.clear()
    shutil.rmtree(self.folder)
    return std

  def _std(self) -> float:
    total, squares, count = 0.0, 0.0, 0
    for start in range(0, self.done, 1024):
      for name, array in self.arrays.items():
        part = np.asarray(array[start : start + 1024], np.float64)
        squares += float(np.square(part).sum())
        if not name.endswith("_std"):
          total += float(part.sum())
          count += part.size
    return float(np.sqrt(max(squares / count - (total / count) ** 2, 0)))
