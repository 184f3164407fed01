"""The ADM of Dhariwal & Nichol (2021, arXiv:2105.05233), as EDM has it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide.nn.edm import layers
from jaxguide.nn.edm.layers import KAIMING, Block
from jaxguide.nn.layers import Conv
from jaxguide.nn.meshed import Meshed
from jaxguide.nn.normalisation import GroupNorm
from jaxguide.nn.perturbation import Perturbation

CHANNELS_PER_HEAD = 64
"""The channels of an attention head. A block with fewer has no attention."""


class DhariwalUNet(Meshed):
  """EDM's ADM (Karras et al. 2022, arXiv:2206.00364, table 7), with every option of the published class.

  It is the network of ImageNet-64 there. It differs from `jaxguide.UNet` in the blocks that have attention, in the
  initialisation and in the labels, which are vectors. The result is the raw output ``F``; `jaxguide.scaling.edm` makes
  a denoiser of it.

  Args:
    img_resolution: the side that names of blocks and ``attn_resolutions`` refer to. Default: the images' height.
    out_channels: channels of the output. Default: as many as the input's.
    augment_dim: length of the augmentation labels that the network was trained with; 0 for none. They are zeros here:
      no augmentation.
    model_channels: channels of the finest level, before ``channel_mult``.
    channel_mult: one factor on ``model_channels`` for each resolution level.
    channel_mult_emb: width of the embedding, divided by ``model_channels``.
    num_blocks: residual blocks per level.
    attn_resolutions: sides of the feature maps that have attention. A head has 64 channels; blocks with fewer channels
      have no attention.
    dropout: probability of dropping an activation in training, in [0, 1).
    label_dropout: probability of replacing a label by zeros in training, in [0, 1].
    use_checkpoint: whether activations are computed again in the backward pass, to save memory.
    dtype: type of convolutions and matrix products. Parameters and normalisation stay float32.
    cudnn_attention: whether to use cuDNN's fused attention kernel on an NVIDIA GPU; as for `jaxguide.UNet`.
    num_classes: number of classes, or None for an unconditional network. A class is a one-hot vector inside.
    null_class: whether the label ``num_classes`` means "no label"; the network gets a vector of zeros for it.
    label_size: length of a label that is a vector of floats; ``num_classes`` is None then.
    perturbation: makes some blocks worse on purpose; see `jaxguide.perturbed`.

  >>> unet = DhariwalUNet(model_channels=32, channel_mult=(1, 2), num_blocks=1, num_classes=10)
  >>> x, t, y = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), jnp.array([3, 10])
  >>> params = jax.eval_shape(unet.init, jax.random.key(0), x, t, y)
  >>> jax.eval_shape(unet.apply, params, x, t, y).shape
  (2, 8, 8, 3)
  """

  img_resolution: int | None = None
  out_channels: int | None = None
  augment_dim: int = 0
  model_channels: int = 192
  channel_mult: Sequence[int | float] = (1, 2, 3, 4)
  channel_mult_emb: int | float = 4
  num_blocks: int = 3
  attn_resolutions: Sequence[int] = (32, 16, 8)
  dropout: int | float = 0.10
  label_dropout: int | float = 0.0
  use_checkpoint: bool = False
  dtype: Any = jnp.float32
  cudnn_attention: bool | None = None
  num_classes: int | None = None
  null_class: bool = True
  label_size: int | None = None
  perturbation: Perturbation | None = None

  def __post_init__(self):
    layers.check_fields(self)
    checks.in_range("label_dropout", self.label_dropout, 0, 1)
    super().__post_init__()

  @nn.compact
  def __call__(self, x, t, y=None, *, train: bool = False):
    """Return the network's raw output ``F``; arguments, result and errors as for `SongUNet`."""
    layers.check_labels(self, x, t, y)
    layers.check_perturbation(self)
    emb = self.embed(t, layers.label_vectors(self, y, t.dtype), train)
    sides = [(self.img_resolution or x.shape[1]) >> level for level in range(len(self.channel_mult))]
    widths = [int(self.model_channels * mult) for mult in self.channel_mult]
    bias = KAIMING.bias(9 * x.shape[-1])
    first = f"enc_{sides[0]}x{sides[0]}_conv"
    h = Conv(widths[0], kernel_init=KAIMING.kernel, dtype=self.dtype, bias_init=bias, name=first)(x)
    skips = [h]
    for level, width in enumerate(widths):
      name, attends = f"enc_{sides[level]}x{sides[level]}", sides[level] in self.attn_resolutions
      if level:
        h = self.block(h.shape[-1], f"{name}_down", resample="down")(h, emb, train)
        skips.append(h)
      for i in range(self.num_blocks):
        h = self.block(width, f"{name}_block{i}", attends)(h, emb, train)
        skips.append(h)
    for level in reversed(range(len(widths))):
      name, attends = f"dec_{sides[level]}x{sides[level]}", sides[level] in self.attn_resolutions
      if level == len(widths) - 1:
        h = self.block(h.shape[-1], f"{name}_in0", attends=True)(h, emb, train)
        h = self.block(h.shape[-1], f"{name}_in1")(h, emb, train)
      else:
        h = self.block(h.shape[-1], f"{name}_up", resample="up")(h, emb, train)
      for i in range(self.num_blocks + 1):
        joined = jnp.concatenate([h, skips.pop()], -1)
        h = self.block(widths[level], f"{name}_block{i}", attends)(joined, emb, train)
    h = GroupNorm(True, layers.groups_of(h.shape[-1]), name="out_norm")(h)
    return Conv(self.out_channels or x.shape[-1], kernel_init=KAIMING.last, name="out_conv")(h).astype(x.dtype)

  @nn.nowrap
  def embed(self, t, labels, train: bool):
    """Map times (n,) and label vectors to the embedding (n, channel_mult_emb * model_channels)."""
    emb, width = layers.positional_embedding(t, self.model_channels), int(self.model_channels * self.channel_mult_emb)

    def linear(features, fan_in, name):
      return nn.Dense(features, kernel_init=KAIMING.kernel, bias_init=KAIMING.bias(fan_in), name=name)

    if self.augment_dim:
      nothing = jnp.zeros((t.shape[0], self.augment_dim), emb.dtype)
      emb += nn.Dense(self.model_channels, use_bias=False, kernel_init=KAIMING.last, name="map_augment")(nothing)
    emb = nn.silu(linear(width, self.model_channels, "map_layer0")(emb))
    emb = linear(width, width, "map_layer1")(emb)
    if labels is not None:
      if train and self.label_dropout:
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.label_dropout, (t.shape[0], 1))
        labels = labels * kept.astype(labels.dtype)
      # Of variance 1, since a one-hot label has a single 1.
      emb += nn.Dense(width, use_bias=False, kernel_init=nn.initializers.normal(1.0), name="map_label")(labels)
    return nn.silu(emb)

  @nn.nowrap
  def block(self, features: int, name: str, attends: bool = False, resample: str | None = None):
    """Make a block."""
    cls = nn.remat(Block, static_argnums=(3,)) if self.use_checkpoint else Block
    heads = features // CHANNELS_PER_HEAD if attends else 0
    return cls(
      features,
      heads,
      resample,
      self.dropout,
      dtype=self.dtype,
      perturbation=layers.perturbation_of(self, name),
      cudnn_attention=self.cudnn_attention,
      name=name,
    )
