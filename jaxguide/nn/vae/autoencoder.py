"""The autoencoder with a Kullback-Leibler penalty of Rombach et al. 2022 (arXiv:2112.10752), as in Stable Diffusion.

Its fields and submodules have the names of diffusers' ``AutoencoderKL``. The autoencoders of Stable Diffusion 1 to 3,
of SDXL, of FLUX.1 and of LightningDiT (VA-VAE, arXiv:2501.01423) are this network with other fields.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxguide.nn.layers import Conv
from jaxguide.nn.normalisation import GroupNorm
from jaxguide.nn.vae.blocks import EPSILON, Level, Middle

LOG_VARIANCES = (-30.0, 20.0)
"""The range that the logarithm of the posterior's variance is clipped to."""

ATTENTION = "Attn"
"""How the type of a level begins that has attention after each residual block."""


class _Half(nn.Module):
  """The fields that encoder and decoder share. ``features`` are the channels of the output."""

  block_out_channels: Sequence[int]
  layers_per_block: int
  features: int
  groups: int
  attention: Sequence[bool]
  mid_attention: bool
  use_checkpoint: bool
  dtype: Any


class Encoder(_Half):
  """Map images to the features of the latents' mean and variance."""

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h / factor, w / factor, features)."""
    last = len(self.block_out_channels) - 1
    rest = (self.use_checkpoint, self.dtype)
    x = Conv(self.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
    for number, (channels, attends) in enumerate(zip(self.block_out_channels, self.attention, strict=True)):
      down = "down" if number < last else None
      name = f"down_blocks_{number}"
      x = Level(channels, self.layers_per_block, self.groups, attends, down, *rest, name=name)(x)
    x = Middle(self.groups, self.mid_attention, *rest, name="mid_block")(x)
    x = GroupNorm(silu=True, groups=self.groups, epsilon=EPSILON, name="conv_norm_out")(x)
    return Conv(self.features, dtype=self.dtype, name="conv_out")(x)


class Decoder(_Half):
  """Map latents to images."""

  @nn.compact
  def __call__(self, z):
    """Map (n, h, w, c) to (n, factor h, factor w, features)."""
    last = len(self.block_out_channels) - 1
    rest = (self.use_checkpoint, self.dtype)
    x = Conv(self.block_out_channels[-1], dtype=self.dtype, name="conv_in")(z)
    x = Middle(self.groups, self.mid_attention, *rest, name="mid_block")(x)
    for number, (channels, attends) in enumerate(zip(self.block_out_channels[::-1], self.attention, strict=True)):
      up = "up" if number < last else None
      x = Level(channels, self.layers_per_block + 1, self.groups, attends, up, *rest, name=f"up_blocks_{number}")(x)
    x = GroupNorm(silu=True, groups=self.groups, epsilon=EPSILON, name="conv_norm_out")(x)
    return Conv(self.features, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
  """Images to latents and back. `jaxguide.Autoencoder` applies the latents' scale and shift.

  The defaults are those of Stable Diffusion 1.

  Args:
    block_out_channels: channels of each level, from the largest images on. Each level but the last halves the sides.
    layers_per_block: residual blocks of each level of the encoder; the decoder has one more.
    latent_channels: channels of the latents.
    out_channels: channels of the decoded images.
    norm_num_groups: groups of each normalisation.
    down_block_types: the type of each level of the encoder: ``DownEncoderBlock2D``, or ``AttnDownEncoderBlock2D`` with
      attention after each residual block. Without elements, all are of the first type.
    up_block_types: the same for the decoder, from the smallest images on: ``UpDecoderBlock2D`` or
      ``AttnUpDecoderBlock2D``.
    use_quant_conv: whether a 1x1 convolution follows the encoder.
    use_post_quant_conv: whether a 1x1 convolution comes before the decoder.
    mid_block_add_attention: whether there is attention between the levels of the encoder and those of the decoder.
    z_channels: channels between the encoder or the decoder and these convolutions, where they are not
      ``latent_channels``, as CompVis' code allows.
    scaling_factor: what shifted latents are multiplied by: one number, or one for each channel.
    shift_factor: what is subtracted from latents first: one number, or one for each channel.
    use_checkpoint: whether residual blocks are computed again for the gradient, which saves memory.
    dtype: type of convolutions and matrix products.
  """

  block_out_channels: Sequence[int] = (128, 256, 512, 512)
  layers_per_block: int = 2
  latent_channels: int = 4
  out_channels: int = 3
  norm_num_groups: int = 32
  down_block_types: Sequence[str] = ()
  up_block_types: Sequence[str] = ()
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  z_channels: int | None = None
  scaling_factor: Any = 0.18215
  shift_factor: Any = 0.0
  use_checkpoint: bool = False
  dtype: Any = jnp.float32

  def setup(self):
    """Define the submodules."""
    inner = self.latent_channels if self.z_channels is None else self.z_channels

    def make(cls, features, types):
      attends = tuple(kind.startswith(ATTENTION) for kind in types) or (False,) * len(self.block_out_channels)
      return cls(
        self.block_out_channels,
        self.layers_per_block,
        features,
        self.norm_num_groups,
        attends,
        self.mid_block_add_attention,
        self.use_checkpoint,
        self.dtype,
      )

    self.encoder = make(Encoder, 2 * inner, self.down_block_types)
    self.decoder = make(Decoder, self.out_channels, self.up_block_types)
    if self.use_quant_conv:
      self.quant_conv = nn.Dense(2 * self.latent_channels, dtype=self.dtype)
    if self.use_post_quant_conv:
      self.post_quant_conv = nn.Dense(inner, dtype=self.dtype)

  @property
  def factor(self) -> int:
    """The side of an image over that of its latents."""
    return 2 ** (len(self.block_out_channels) - 1)

  def moments(self, x):
    """Map images (n, h, w, c) in [-1, 1] to the mean and the log-variance of the posterior of the raw latents."""
    out = self.encoder(x)
    out = self.quant_conv(out) if self.use_quant_conv else out
    mean, logvar = jnp.split(out.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOG_VARIANCES)

  def decode(self, z):
    """Map raw latents (n, h, w, latent_channels) to images (n, factor h, factor w, out_channels), about [-1, 1]."""
    z = self.post_quant_conv(z) if self.use_post_quant_conv else z
    return self.decoder(z).astype(jnp.float32)

  def __call__(self, x):
    """Encode images and decode the mean."""
    return self.decode(self.moments(x)[0])
