"""The autoencoder of models that make latents."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide import data, models
from jaxguide._core.files import PathLike
from jaxguide._core.typing import Array
from jaxguide.denoisers.autoencoders import Autoencoder
from jaxguide.distributed.placing import placement
from jaxguide.models import importers
from jaxguide.models.encoders import Encoder
from jaxguide.models.importers import state_dicts
from jaxguide.models.model import Model
from jaxguide.models.networks import AUTOENCODER

AT_A_TIME = 8
"""The number of images that a device decodes at a time."""


class Vae(NamedTuple):
  """An autoencoder that encodes and decodes arrays of any length, on all devices of this process.

  Args:
    model: its configuration and parameters.
    autoencoder: the autoencoder, whose parameters are on the devices.
    size: the number of images at a time.
  """

  model: Model
  autoencoder: Autoencoder
  size: int

  @classmethod
  def load(cls, path: PathLike, tile: int | None = None, at_a_time: int | None = None) -> "Vae":
    """Load an autoencoder.

    Args:
      path: the folder of a model, or a published file; see `jaxguide.models.importers.vae` for its settings.
      tile: the side in pixels from which images are cut into tiles; None for whole images.
      at_a_time: images at a time, rounded up to a multiple of the devices; 8 for each if it is None.

    Raises:
      ValueError: if it is no autoencoder.
      FileNotFoundError: if there is no such file or folder.
    """
    model = load_model(path)
    place = placement(jax.local_devices())
    autoencoder = model.autoencoder
    autoencoder = dataclasses.replace(autoencoder, params=place.copies(autoencoder.params))
    if tile is not None:
      autoencoder = autoencoder.tiled(tile)
    parts = place.parts
    size = AT_A_TIME * parts if at_a_time is None else -(-at_a_time // parts) * parts
    return cls(model, autoencoder, size)

  def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an image by the shape of its latent."""
    height, width, _ = latent_shape
    factor = self.autoencoder.factor
    return height * factor, width * factor, self.autoencoder.module.out_channels

  def moments(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation of the latents of images, shifted and scaled as for training."""
    mean, std = self._in_parts(_moments, images)
    return mean, std

  @property
  def encoder(self) -> Encoder:
    """The conversion of pixels to latents, by their mean, and back."""

    def encode(images: Any) -> Array:
      return jnp.asarray(self.moments(np.asarray(images))[0])

    def decode(x: Any) -> np.ndarray:
      return data.to_uint8(self._in_parts(_decode, np.asarray(x, np.float32))[0])

    return Encoder(encode, decode, None, None)

  def _in_parts(self, function: Any, array: np.ndarray) -> tuple[np.ndarray, ...]:
    """Apply a function of the autoencoder to parts of an array. All parts have one size, for one program."""
    place = placement(jax.local_devices())
    parts = []
    for start in range(0, len(array), self.size):
      part = array[start : start + self.size]
      missing = np.zeros((self.size - len(part), *part.shape[1:]), part.dtype)
      found = function(self.autoencoder, place.rows(np.concatenate([part, missing])))
      parts.append([np.asarray(each)[: len(part)] for each in found])
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


@jax.jit
def _moments(autoencoder: Autoencoder, images: Array) -> tuple[Array, Array]:
  return autoencoder.posterior(images)


@jax.jit
def _decode(autoencoder: Autoencoder, latents: Array) -> tuple[Array]:
  return (autoencoder.decode(latents),)


def load_model(path: PathLike) -> Model:
  """Load the model of an autoencoder from a folder or from a published file.

  Raises:
    ValueError: if it is no autoencoder, or the file does not tell all of its settings.
    FileNotFoundError: if there is no such file or folder.
  """
  path = Path(path)
  if path.is_file() or path.suffix in state_dicts.FORMATS:
    try:
      model, _ = importers.read_model(path)
    except ValueError as error:
      raise ValueError(f"{error}; jaxguide import takes settings, and vae the folder that it writes") from error
  else:
    model = models.load(path)
  if model.config.role is not AUTOENCODER:
    raise ValueError(f"{path} holds a {model.config.network}, and vae must be an autoencoder")
  return model
