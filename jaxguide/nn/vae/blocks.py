"""The blocks of the autoencoder of latent diffusion, for NHWC images.

Submodules have the names of diffusers' state dicts, with underscores instead of dots before numbers. Parameters and
normalisation are float32; ``dtype`` is the type of convolutions and matrix products.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxguide.nn.layers import Conv, attend_to, upsample
from jaxguide.nn.normalisation import GroupNorm

EPSILON = 1e-6
"""What is added to the variance in each normalisation."""


class ResnetBlock(nn.Module):
  """Two convolutions of normalised and activated features, added to the input."""

  features: int
  groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h, w, features)."""
    h = GroupNorm(silu=True, groups=self.groups, epsilon=EPSILON, name="norm1")(x).astype(self.dtype)
    h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
    h = GroupNorm(silu=True, groups=self.groups, epsilon=EPSILON, name="norm2")(h).astype(self.dtype)
    h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="conv_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """Self-attention of one head over the pixels, added to the input."""

  groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to the same shape."""
    n, h, w, c = x.shape
    normed = GroupNorm(groups=self.groups, epsilon=EPSILON, name="group_norm")(x).reshape(n, h * w, c)
    q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(normed)[:, :, None] for name in ("to_q", "to_k", "to_v"))
    out = attend_to(q, k, v)
    return x + nn.Dense(c, dtype=self.dtype, name="to_out_0")(out).reshape(x.shape)


class Resampler(nn.Module):
  """Double or halve the sides. Halving pads a row and a column of zeros at the end alone, as published."""

  up: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, 2h, 2w, c) or (n, h/2, w/2, c)."""
    if self.up:
      return Conv(x.shape[-1], dtype=self.dtype, name="conv")(upsample(x))
    return Conv(x.shape[-1], stride=2, padding=(0, 1), dtype=self.dtype, name="conv")(x)


class Level(nn.Module):
  """The blocks of one resolution, and the change to the next."""

  features: int
  layers: int
  groups: int
  attention: bool = False
  resample: str | None = None
  use_checkpoint: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, hh, ww, features)."""
    block = nn.remat(ResnetBlock) if self.use_checkpoint else ResnetBlock
    for number in range(self.layers):
      x = block(self.features, self.groups, self.dtype, name=f"resnets_{number}")(x)
      if self.attention:
        x = Attention(self.groups, self.dtype, name=f"attentions_{number}")(x)
    if self.resample is not None:
      up = self.resample == "up"
      x = Resampler(up, self.dtype, name="upsamplers_0" if up else "downsamplers_0")(x)
    return x


class Middle(nn.Module):
  """Two residual blocks, with attention between them if ``attention``."""

  groups: int
  attention: bool = True
  use_checkpoint: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to the same shape."""
    block = nn.remat(ResnetBlock) if self.use_checkpoint else ResnetBlock
    x = block(x.shape[-1], self.groups, self.dtype, name="resnets_0")(x)
    if self.attention:
      x = Attention(self.groups, self.dtype, name="attentions_0")(x)
    return block(x.shape[-1], self.groups, self.dtype, name="resnets_1")(x)
