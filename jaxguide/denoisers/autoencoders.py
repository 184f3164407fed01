"""Autoencoders with their parameters: images to latents and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, struct
from jaxguide._core.pixels import to_floats
from jaxguide._core.typing import Array, Leaf
from jaxguide.denoisers.linen import by_value, module_of
from jaxguide.nn.vae.tiles import Tiles, tiled


@struct.dataclass
class Autoencoder:
  """An autoencoder with its parameters. Its methods are pure, and may be called in ``jit`` and ``grad``.

  Latents are ``(z - shift_factor) * scaling_factor``, where ``z`` is what the network works on, as diffusers' pipelines
  have them.

  Args:
    params: the parameters.
    apply: the ``apply`` of a `jaxguide.AutoencoderKL`.
    tile: the side in pixels from which images are encoded and decoded in tiles, see `tiled`; None for whole images.
    overlap: the overlap of tiles in pixels.

  >>> from jaxguide.nn import AutoencoderKL
  >>> module = AutoencoderKL((8, 8), 1, norm_num_groups=4)
  >>> images = jnp.zeros((2, 16, 16, 3))
  >>> autoencoder = Autoencoder(module.init(jax.random.key(0), images), module.apply)
  >>> autoencoder.encode(images).shape, autoencoder.decode(jnp.zeros((2, 8, 8, 4))).shape
  ((2, 8, 8, 4), (2, 16, 16, 3))
  """

  params: Leaf
  apply: Callable[..., Any] = struct.field(pytree_node=False)
  tile: int | None = struct.field(pytree_node=False, default=None)
  overlap: int = struct.field(pytree_node=False, default=0)

  def __post_init__(self):
    object.__setattr__(self, "apply", by_value(self.apply))

  @property
  def module(self) -> Any:
    """The Flax module."""
    return module_of(self.apply)

  @property
  def factor(self) -> int:
    """The side of an image over that of its latents."""
    return self.module.factor

  def encode(self, images: Any, key: Any = None) -> Array:
    """Encode images.

    Args:
      images: (n, h, w, c) floats in [-1, 1], or ``uint8`` pixels; sides are multiples of `factor`.
      key: the key of a sample of the posterior; None for its mean.

    Returns:
      (n, h / factor, w / factor, latent_channels) float32, shifted and scaled.

    Raises:
      ValueError: for another shape or type.
    """
    mean, std = self.posterior(images)
    return mean if key is None else mean + std * jax.random.normal(key, mean.shape, mean.dtype)

  def posterior(self, images: Any) -> tuple[Array, Array]:
    """Return the mean and the standard deviation of the latents, shifted and scaled.

    Args:
      images: as for `encode`.

    Raises:
      ValueError: for another shape or type.
    """
    mean, logvar = self.moments(images)
    shift, scale = self._factors()
    return (mean - shift) * scale, jnp.exp(logvar / 2) * jnp.abs(scale)

  def moments(self, images: Any) -> tuple[Array, Array]:
    """Return the mean and the log-variance, in [-30, 20], of the posterior, neither shifted nor scaled.

    Args:
      images: as for `encode`.

    Raises:
      ValueError: for another shape or type.
    """
    x = jnp.asarray(images)
    if x.dtype == jnp.uint8:
      x = to_floats(x, jnp.float32)
    channels = self.params["params"]["encoder"]["conv_in"]["kernel"].shape[2]
    _check("images", x, channels)
    if x.shape[1] % self.factor or x.shape[2] % self.factor:
      raise ValueError(f"the sides of images must be multiples of {self.factor}, got {x.shape[1]}x{x.shape[2]}")
    return _moments(self, x)

  def decode(self, latents: Any) -> Array:
    """Decode latents.

    Args:
      latents: (n, h, w, latent_channels) floats, as `encode` returns them.

    Returns:
      (n, factor * h, factor * w, c) float32, about [-1, 1]; `jaxguide.data.to_uint8` makes pixels of them.

    Raises:
      ValueError: for another shape or type.
    """
    z = jnp.asarray(latents)
    _check("latents", z, self.module.latent_channels)
    shift, scale = self._factors()
    return _decode(self, z.astype(jnp.float32) / scale + shift)

  def tiled(self, tile: int = 512, overlap: float = 0.25) -> Autoencoder:
    """Return the autoencoder that cuts larger images into tiles, so that memory does not grow with the image.

    The result is approximate, because normalisation and attention see one tile at a time; see
    `jaxguide.nn.vae.tiles`. An image within one tile is computed as a whole.

    Args:
      tile: the side of a tile in pixels, a multiple of `factor`.
      overlap: the overlap of two tiles, as a share of the side; at least 0 and below 1. It is rounded down to whole
        latents.

    Raises:
      ValueError: if a number is out of range.
    """
    tile = checks.at_least("tile", tile, self.factor)
    if tile % self.factor:
      raise ValueError(f"tile must be a multiple of {self.factor}, the pixels of a latent, got {tile}")
    share = float(checks.number("overlap", overlap, 0, 1))
    if share >= 1:
      raise ValueError(f"overlap must be below 1, got {overlap}")
    return dataclasses.replace(self, tile=tile, overlap=int(tile // self.factor * share) * self.factor)

  def _factors(self) -> tuple[Array, Array]:
    """Return the shift and the scale, for latents of four axes."""
    given = (self.module.shift_factor, self.module.scaling_factor)
    shift, scale = (jnp.asarray(factor, jnp.float32).reshape(1, 1, 1, -1) for factor in given)
    return shift, scale


def _check(name: str, x: Array, channels: int) -> None:
  """Check a batch of images or latents.

  Raises:
    ValueError: if it is no batch of floats with these channels.
  """
  if x.ndim != 4 or x.shape[-1] != channels or not jnp.issubdtype(x.dtype, np.floating) or 0 in x.shape:
    raise ValueError(
      f"{name} must be floats of shape (n, height, width, {channels}), as this autoencoder takes them, got {x.dtype} "
      f"of shape {x.shape}"
    )


@jax.jit
def _moments(autoencoder: Autoencoder, x: Array) -> tuple[Array, Array]:
  def run(tile: Array) -> Array:
    return jnp.concatenate(autoencoder.apply(autoencoder.params, tile, method="moments"), axis=-1)

  if autoencoder.tile is None:
    out = run(x)
  else:
    out = tiled(run, x, Tiles(autoencoder.tile, autoencoder.overlap), down=autoencoder.factor)
  mean, logvar = jnp.split(out, 2, axis=-1)
  return mean, logvar


@jax.jit
def _decode(autoencoder: Autoencoder, z: Array) -> Array:
  def run(tile: Array) -> Array:
    return autoencoder.apply(autoencoder.params, tile, method="decode")

  if autoencoder.tile is None:
    return run(z)
  factor = autoencoder.factor
  return tiled(run, z, Tiles(autoencoder.tile // factor, autoencoder.overlap // factor), up=factor)
