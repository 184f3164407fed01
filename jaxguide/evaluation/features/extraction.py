"""Features of many images: read ahead, resized and computed in batches, on all devices of this process."""

import collections
import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.bars import progress_bar
from jaxguide._core.typing import PyTree
from jaxguide.data.batches import default_workers
from jaxguide.data.dataset import Dataset
from jaxguide.data.images import Images
from jaxguide.distributed import processes
from jaxguide.distributed.placing import Placement, for_batches
from jaxguide.evaluation.features.base import Features, Resize
from jaxguide.evaluation.features.pixels import check_images

LEAST_CANVAS = 64
"""Images of different sizes are padded to sides that are this number times a power of two."""

MATRICES = 16
"""The number of sizes whose matrices are kept."""


class _Source(NamedTuple):
  """Where images come from.

  Args:
    total: number of images.
    batches: ``size -> batches``, each an array (n, h, w, c) or a list of n arrays (h, w, c), with n = size but for the
      last.
    name: the name of an image by its number, for messages.
  """

  total: int
  batches: Callable[[int], Generator[Any, None, None]]
  name: Callable[[int], str]


def extract(
  features: Features,
  images: Any,
  *,
  outputs: Sequence[str] = ("pool",),
  batch_size: int = 64,
  total: int | None = None,
  progress: bool | Callable[[int], object] = False,
  title: str = "features",
) -> dict[str, np.ndarray]:
  """Compute features of images.

  Images are resized on the device. The network is compiled once; the resizing once if all images have one size, and
  otherwise once for each pair of sides after padding to powers of two. Grey images become RGB if the features need 3
  channels. The memory for images does not depend on their number.

  Args:
    features: the features.
    images: uint8, one of: an array of shape (n, h, w, c), which may be a memory map; a `jaxguide.data.Dataset`, whose
      examples are read ahead in threads; or an iterable of arrays of shape (h, w, c), of any sizes.
    outputs: the names of the outputs, such as ``("pool", "logits")``.
    batch_size: number of images that are computed at once, at least 1; rounded up to a multiple of the devices.
    total: number of images, if ``images`` is an iterable without a length.
    progress: whether to show a progress bar with images per second; or a function that is called after each batch with
      its number of images.
    title: what the bar says.

  Returns:
    Arrays float32 of shape (n, d) by the names in ``outputs``, in the order of the images. They do not depend on
    ``batch_size`` beyond rounding errors.

  Raises:
    ValueError: if there are no images, an image is not uint8 of 3 axes, its number of channels does not fit, images
      that are not resized have several sizes, an output is unknown, or ``total`` is missing or wrong.
    FloatingPointError: if the features of an image are not finite; the message names the image.

  >>> from jaxguide.evaluation.features import resizing
  >>> def colour(params, images):
  ...   return {"pool": images.mean((1, 2))}
  >>> resize = resizing.square(8, resizing.tf1_bilinear)
  >>> colours = Features("colour", 1, "", colour, {}, resize, 3, "Colour")
  >>> extract(colours, [np.full((4, 4, 3), 9, np.uint8), np.full((6, 5, 1), 7, np.uint8)])["pool"].tolist()
  [[9.0, 9.0, 9.0], [7.0, 7.0, 7.0]]
  """
  source = _source(images, total)
  batch_size = checks.at_least("batch_size", batch_size, 1)
  if isinstance(outputs, str) or not outputs:
    raise ValueError(f"outputs must be a tuple of names, such as ('pool',), got {outputs!r}")
  devices = len(jax.devices())
  size = -(-min(batch_size, source.total) // devices) * devices
  found: dict[str, np.ndarray] = {}
  done = 0
  with (
    progress_bar(source.total, title=title, unit="image", show=progress is True and processes.is_first()) as bar,
    contextlib.closing(source.batches(size)) as batches,
  ):
    tell = progress if callable(progress) else bar.update
    for number, on_device in _computed(features, source, batches, size, tuple(outputs)):
      if done + number > source.total:
        raise ValueError(f"total is {source.total}, but there are more images: correct it, or leave out the others")
      for name, value in on_device.items():
        rows = processes.gathered(value)[:number]
        _check_finite(features, name, rows, done, source)
        if name not in found:
          found[name] = np.empty((source.total, *rows.shape[1:]), np.float32)
        found[name][done : done + number] = rows
      done += number
      tell(number)
  if done < source.total:
    raise ValueError(f"total is {source.total}, but there are only {done} images: correct it")
  return {name: found[name] for name in outputs}


def _check_finite(features: Features, output: str, rows: np.ndarray, begun: int, source: _Source) -> None:
  """Check the features of images, the first of which has the number ``begun``.

  Raises:
    FloatingPointError: if they are not finite.
  """
  finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
  if not finite.all():
    cause = "if it is so for other images too, the weights are damaged; get them again"
    if not jax.tree.leaves(features.params):
      cause = "the function of the features must give finite numbers for every image"
    image = source.name(begun + int(np.argmin(finite)))
    raise FloatingPointError(f"{output} of {features.name} is not finite for {image}: {cause}")


def _computed(
  features: Features, source: _Source, batches: Iterable[Any], size: int, outputs: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
  """Yield the number of images of each batch, and its outputs. The next batch is read while one is computed."""
  place = for_batches(size)
  params = place.copies(features.params)
  prepare = _Preparation(features, source, size, place)
  begun = 0
  running: list[tuple[int, dict[str, jax.Array]]] = []
  for batch in batches:
    images = prepare(batch, begun)
    begun += len(batch)
    running.append((len(batch), _compute(params, images, function=features.function, outputs=outputs)))
    if len(running) > 1:
      yield running.pop(0)
  yield from running


@functools.partial(jax.jit, static_argnames=("function", "outputs"))
def _compute(params: PyTree, images: jax.Array, *, function: Any, outputs: tuple[str, ...]) -> dict[str, jax.Array]:
  found = function(params, images)
  return {name: checks.lookup("output of the features", name, found).astype(jnp.float32) for name in outputs}


@functools.partial(jax.jit, static_argnames="channels")
def _resized(images: jax.Array, rows: jax.Array, columns: jax.Array, *, channels: int | None) -> jax.Array:
  """Resize one image (h, w, c) or several (n, h, w, c), to float32 in [0, 255]. A bicubic filter may overshoot."""
  images = images.astype(jnp.float32)
  images = jnp.einsum("rh,...hwc->...rwc", rows, images, precision="highest")
  images = jnp.einsum("sw,...rwc->...rsc", columns, images, precision="highest")
  return _with_channels(jnp.clip(images, 0, 255), channels)


@functools.partial(jax.jit, static_argnames="channels")
def _as_they_are(images: jax.Array, *, channels: int | None) -> jax.Array:
  return _with_channels(images.astype(jnp.float32), channels)


def _with_channels(images: jax.Array, channels: int | None) -> jax.Array:
  return images if channels in (None, images.shape[-1]) else jnp.repeat(images, channels, -1)


class _Preparation:
  """What turns a batch of uint8 images into a float32 array of ``size`` images on the devices."""

  def __init__(self, features: Features, source: _Source, size: int, place: Placement):
    self.features, self.source, self.size, self.place = features, source, size, place
    self.resize = None if features.resize is None else functools.lru_cache(MATRICES)(_in_float32(features.resize))
    self.shape: tuple[int, ...] | None = None

  def __call__(self, batch: Any, begun: int) -> jax.Array:
    """Prepare a batch whose first image has the number ``begun``. Images that are missing from ``size`` are zeros."""
    for number, image in enumerate(batch if isinstance(batch, list) else batch[:1]):
      self._check(image, begun + number)
      self.shape = self.shape or image.shape
    # Only one size is computed without padding, so that few programs are compiled whatever the sizes are.
    if not isinstance(batch, list) or all(image.shape == self.shape for image in batch):
      images = np.stack(batch) if isinstance(batch, list) else np.asarray(batch)
      missing = self.size - len(images)
      images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), np.uint8)]) if missing else images
      return self._together(self.place.rows(images))
    if self.resize is None:
      other = next(number for number, image in enumerate(batch) if image.shape != self.shape)
      raise ValueError(
        f"the features {self.features.name} do not resize, so that all images must have one size, but "
        f"{self.source.name(begun + other)} is {batch[other].shape} and the first one {self.shape}"
      )
    resized = [self._alone(image) for image in batch]
    resized += [jnp.zeros_like(resized[0])] * (self.size - len(resized))
    return self.place.rows(jnp.stack(resized))

  def _together(self, images: jax.Array) -> jax.Array:
    """Resize images of one size."""
    if self.resize is None:
      return _as_they_are(images, channels=self.features.channels)
    rows, columns = self.place.copies(self.resize(*images.shape[1:3]))
    return _resized(images, rows, columns, channels=self.features.channels)

  def _alone(self, image: np.ndarray) -> jax.Array:
    """Resize one image, padded with zeros at its right and lower border, which the padded matrices multiply by 0."""
    assert self.resize is not None
    rows, columns = self.resize(*image.shape[:2])
    height, width = (_canvas(side) - side for side in image.shape[:2])
    padded = np.pad(image, ((0, height), (0, width), (0, 0)))
    rows, columns = np.pad(rows, ((0, 0), (0, height))), np.pad(columns, ((0, 0), (0, width)))
    # One device of this process; the batch is split over all of them later.
    return _resized(*jax.device_put((padded, rows, columns), jax.local_devices()[0]), channels=self.features.channels)

  def _check(self, image: Any, number: int) -> None:
    """Check an image.

    Raises:
      ValueError: if it is not uint8 (h, w, c) with pixels, or has a number of channels that does not fit.
    """
    dtype, shape = getattr(image, "dtype", None), tuple(getattr(image, "shape", ()))
    if dtype != np.uint8 or len(shape) != 3 or 0 in shape:
      raise ValueError(
        f"{self.source.name(number)} must be uint8 of shape (height, width, channels) with no axis of size 0, "
        f"got {type(image).__name__ if dtype is None else f'{dtype} of shape {shape}'}"
      )
    channels = self.features.channels
    if channels is None and self.shape is not None and shape[-1] != self.shape[-1]:
      raise ValueError(f"{self.source.name(number)} has {shape[-1]} channels and the first one {self.shape[-1]}")
    if channels is not None and shape[-1] not in (1, channels):
      raise ValueError(
        f"{self.source.name(number)} has {shape[-1]} channels, but the features {self.features.name} need {channels}, "
        "or grey images of 1; convert it first"
      )


def _in_float32(resize: Resize) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
  def converted(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = resize(height, width)
    return rows.astype(np.float32), columns.astype(np.float32)

  return converted


def _canvas(side: int) -> int:
  """Return the side to which a side is padded.

  >>> [_canvas(side) for side in (1, 64, 65, 500)]
  [64, 64, 128, 512]
  """
  return LEAST_CANVAS << max(-(-side // LEAST_CANVAS) - 1, 0).bit_length()


def _source(images: Any, total: int | None) -> _Source:
  """Make the source of an array, a dataset or an iterable.

  Raises:
    ValueError: if there are no images, they are not uint8, or ``total`` is missing or wrong.
    TypeError: if ``images`` is something else.
  """
  if isinstance(images, Images):
    images = images.images
  if isinstance(images, jax.Array):
    images = np.asarray(images)
  if isinstance(images, np.ndarray):
    check_images(images)
  elif not isinstance(images, Dataset) and not isinstance(images, Iterable):
    raise TypeError(f"images must be an array, a dataset, or an iterable of arrays, got {type(images).__name__}")
  length = len(images) if hasattr(images, "__len__") else None
  if total is not None:
    total = checks.at_least("total", total, 1)
  if length is None and total is None:
    raise ValueError("images is an iterable without a length: give their number as total")
  if None not in (length, total) and length != total:
    raise ValueError(f"total is {total}, but there are {length} images: correct it, or leave it out")
  number = total if length is None else length
  if not number:
    raise ValueError("images must have at least one image, got none")
  if isinstance(images, Dataset):
    return _Source(number, functools.partial(_from_dataset, images), functools.partial(_name_in, images))
  make = _from_array if isinstance(images, np.ndarray) else _from_iterable
  return _Source(number, functools.partial(make, images), "image {}".format)


def _from_array(images: Any, size: int) -> Generator[np.ndarray, None, None]:
  for first in range(0, len(images), size):
    yield np.asarray(images[first : first + size])


def _from_iterable(images: Iterable[Any], size: int) -> Generator[list[Any], None, None]:
  remaining = iter(images)
  while batch := list(itertools.islice(remaining, size)):
    yield batch


def _from_dataset(dataset: Dataset, size: int) -> Generator[list[Any], None, None]:
  """Yield the examples in their order. Threads read the next two batches while one is in use."""

  def read(row: int) -> Any:
    return dataset.example(row, np.random.default_rng(row))[0]

  rows = iter(range(len(dataset)))
  pool = ThreadPoolExecutor(getattr(dataset, "workers", None) or default_workers())
  try:
    ahead: collections.deque[Future[Any]] = collections.deque(
      pool.submit(read, row) for row in itertools.islice(rows, 2 * size)
    )
    while ahead:
      yield [ahead.popleft().result() for _ in range(min(size, len(ahead)))]
      ahead.extend(pool.submit(read, row) for row in itertools.islice(rows, size))
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _name_in(dataset: Dataset, number: int) -> str:
  try:
    return dataset.example_name(number)
  except NotImplementedError:
    return f"{dataset.name}[{number}]"
