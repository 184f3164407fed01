"""The parts that the UNet and the classifier share: time embedding, downsampling path and middle blocks."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide.nn.layers import AttentionBlock, Conv, Downsample, ResBlock, check_cudnn, timestep_embedding
from jaxguide.nn.meshed import Meshed
from jaxguide.nn.perturbation import Perturbation


class Encoder(Meshed):
  """Fields and building blocks of both networks. The fields have the names used in OpenAI's guided-diffusion."""

  model_channels: int = 64
  out_channels: int | None = None
  num_res_blocks: int = 2
  attention_resolutions: Sequence[int] | None = None
  dropout: int | float = 0.0
  channel_mult: Sequence[int | float] = (1, 2)
  conv_resample: bool = True
  num_heads: int = 1
  num_head_channels: int = -1
  use_scale_shift_norm: bool = True
  resblock_updown: bool = True
  use_new_attention_order: bool = False
  use_checkpoint: bool = False
  dtype: Any = jnp.float32
  cudnn_attention: bool | None = None

  def __post_init__(self):
    # A configuration read from a file has lists, but a Flax module must be hashable.
    self.channel_mult = tuple(self.channel_mult)
    name, levels = type(self).__name__, len(self.channel_mult)
    default = (2,) if levels > 1 else ()
    self.attention_resolutions = default if self.attention_resolutions is None else tuple(self.attention_resolutions)
    if not levels:
      raise ValueError(f"{name} needs a channel_mult for at least one level")
    factors = {2**level for level in range(levels)}
    if not factors.issuperset(self.attention_resolutions):
      # OpenAI's command lines take image sides here, but its networks take downsampling factors. Without this check, a
      # network that is given sides would silently have no attention.
      raise ValueError(
        f"{name} with {levels} levels takes attention_resolutions among the downsampling factors {sorted(factors)}, "
        f"got {list(self.attention_resolutions)}"
      )
    if checks.in_range("dropout", self.dropout, 0, 1) == 1:
      raise ValueError("dropout must be at least 0 and below 1, got 1")
    check_cudnn(self)
    super().__post_init__()

  @nn.nowrap
  def channels(self, level: int) -> int:
    """Return the number of channels of a resolution level; level 0 is the finest."""
    return int(self.channel_mult[level] * self.model_channels)

  @nn.nowrap
  def attends(self, level: int) -> bool:
    """Return whether a level has attention."""
    return 2**level in (self.attention_resolutions or ())

  @nn.nowrap
  def check_input(self, x, t) -> None:
    """Raise ValueError unless x is a batch of images that can be halved at every level, with one time per image."""
    if x.ndim != 4:
      raise ValueError(f"{type(self).__name__} takes images of shape (n, height, width, channels), got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{type(self).__name__} takes floating-point images in [-1, 1], got {x.dtype}")
    if t.shape != x.shape[:1]:
      raise ValueError(f"{type(self).__name__} takes one time for each of {x.shape[0]} images, got shape {t.shape}")
    factor = 2 ** (len(self.channel_mult) - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
      raise ValueError(
        f"{type(self).__name__} halves the image {len(self.channel_mult) - 1} times, so its sides must be multiples "
        f"of {factor}; got {x.shape[1]}x{x.shape[2]}. Pad the image, or shorten channel_mult"
      )

  @nn.nowrap
  def perturbation_of(self, name: str) -> Perturbation | None:
    """Return the perturbation of the named block, or None. This base class has no perturbations."""
    return None

  @nn.nowrap
  def res_block(self, features: int, name: str, resample: str | None = None):
    """Make a residual block."""
    # nn.remat computes the activations again in the backward pass; argument 3 is the flag `train`.
    cls = nn.remat(ResBlock, static_argnums=(3,)) if self.use_checkpoint else ResBlock
    skip = self.perturbation_of(name) is not None
    return cls(features, self.dropout, self.use_scale_shift_norm, resample, self.dtype, skip, name=name)

  @nn.nowrap
  def attention(self, num_heads: int, name: str):
    """Make an attention block."""
    cls = nn.remat(AttentionBlock) if self.use_checkpoint else AttentionBlock
    order, perturbation = self.use_new_attention_order, self.perturbation_of(name)
    return cls(num_heads, self.num_head_channels, order, self.dtype, perturbation, self.cudnn_attention, name=name)

  @nn.nowrap
  def embed_time(self, t):
    """Map (n,) times to (n, 4 model_channels)."""
    width = 4 * self.model_channels
    emb = nn.Dense(width, name="time_embed_0")(timestep_embedding(t, self.model_channels))
    return nn.Dense(width, name="time_embed_2")(nn.silu(emb))

  @nn.nowrap
  def encode(self, x, emb, train: bool) -> list[Any]:
    """Run the downsampling path; return the output of every block, from finest to coarsest."""
    h = Conv(self.channels(0), dtype=self.dtype, name="input_blocks_0_0")(x)
    outputs = [h]
    for level in range(len(self.channel_mult)):
      for _ in range(self.num_res_blocks):
        name = f"input_blocks_{len(outputs)}"
        h = self.res_block(self.channels(level), f"{name}_0")(h, emb, train)
        if self.attends(level):
          h = self.attention(self.num_heads, f"{name}_1")(h)
        outputs.append(h)
      if level < len(self.channel_mult) - 1:
        name = f"input_blocks_{len(outputs)}_0"
        if self.resblock_updown:
          h = self.res_block(h.shape[-1], name, "down")(h, emb, train)
        else:
          h = Downsample(self.conv_resample, self.dtype, name=name)(h)
        outputs.append(h)
    return outputs

  @nn.nowrap
  def middle(self, h, emb, train: bool):
    """Apply two residual blocks with attention between them, at the coarsest resolution."""
    h = self.res_block(h.shape[-1], "middle_block_0")(h, emb, train)
    h = self.attention(self.num_heads, "middle_block_1")(h)
    return self.res_block(h.shape[-1], "middle_block_2")(h, emb, train)
