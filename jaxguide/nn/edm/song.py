"""DDPM++ and NCSN++ (Song et al. 2021, arXiv:2011.13456), as EDM has them."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide.nn.edm import layers
from jaxguide.nn.edm.layers import XAVIER, Block, FourierEmbedding
from jaxguide.nn.layers import Conv
from jaxguide.nn.meshed import Meshed
from jaxguide.nn.normalisation import GroupNorm
from jaxguide.nn.perturbation import Perturbation
from jaxguide.nn.resampling import check_filter, double, halve

EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")


class SongUNet(Meshed):
  """EDM's DDPM++ and NCSN++ (Karras et al. 2022, arXiv:2206.00364, table 7), with every option of the published class.

  DDPM++ is ``embedding_type="positional", encoder_type="standard", channel_mult_noise=1, resample_filter=(1, 1)``.
  NCSN++ is ``embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=(1, 3, 3, 1)``.
  Both have ``decoder_type="standard"``. The result is the raw output ``F``; `jaxguide.scaling.edm` makes a denoiser of
  it.

  Args:
    img_resolution: the side that names of blocks and ``attn_resolutions`` refer to. Default: the images' height.
    out_channels: channels of the output. Default: as many as the input's.
    augment_dim: length of the augmentation labels that the network was trained with; 0 for none. They are zeros here:
      no augmentation.
    model_channels: channels of the finest level, before ``channel_mult``.
    channel_mult: one factor on ``model_channels`` for each resolution level.
    channel_mult_emb: width of the embedding, divided by ``model_channels``.
    num_blocks: residual blocks per level.
    attn_resolutions: sides of the feature maps that have attention.
    dropout: probability of dropping an activation in training, in [0, 1).
    label_dropout: probability of replacing a label by zeros in training, in [0, 1].
    embedding_type: ``positional`` or ``fourier``.
    channel_mult_noise: width of the embedding of time, divided by ``model_channels``.
    encoder_type: ``standard``, ``skip`` or ``residual``: how the downsampled input enters each level.
    decoder_type: ``standard`` or ``skip``: whether each level adds to the upsampled output.
    resample_filter: the filter of the resampling, an even number of taps.
    use_checkpoint: whether activations are computed again in the backward pass, to save memory.
    dtype: type of convolutions and matrix products. Parameters and normalisation stay float32.
    cudnn_attention: whether to use cuDNN's fused attention kernel on an NVIDIA GPU; as for `jaxguide.UNet`. A block
      has one head with all of its channels, and cuDNN takes at most 128.
    num_classes: number of classes, or None for an unconditional network. A class is a one-hot vector inside.
    null_class: whether the label ``num_classes`` means "no label"; the network gets a vector of zeros for it.
    label_size: length of a label that is a vector of floats; ``num_classes`` is None then.
    perturbation: makes some blocks worse on purpose; see `jaxguide.perturbed`.

  >>> unet = SongUNet(model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), num_classes=10)
  >>> x, t, y = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), jnp.array([3, 10])
  >>> params = jax.eval_shape(unet.init, jax.random.key(0), x, t, y)
  >>> jax.eval_shape(unet.apply, params, x, t, y).shape
  (2, 8, 8, 3)
  """

  img_resolution: int | None = None
  out_channels: int | None = None
  augment_dim: int = 0
  model_channels: int = 128
  channel_mult: Sequence[int | float] = (1, 2, 2, 2)
  channel_mult_emb: int | float = 4
  num_blocks: int = 4
  attn_resolutions: Sequence[int] = (16,)
  dropout: int | float = 0.10
  label_dropout: int | float = 0.0
  embedding_type: str = "positional"
  channel_mult_noise: int | float = 1
  encoder_type: str = "standard"
  decoder_type: str = "standard"
  resample_filter: Sequence[int | float] = (1, 1)
  use_checkpoint: bool = False
  dtype: Any = jnp.float32
  cudnn_attention: bool | None = None
  num_classes: int | None = None
  null_class: bool = True
  label_size: int | None = None
  perturbation: Perturbation | None = None

  frozen: ClassVar[tuple[str, ...]] = ("freqs",)

  def __post_init__(self):
    layers.check_fields(self)
    self.resample_filter = check_filter(self.resample_filter)
    checks.in_range("label_dropout", self.label_dropout, 0, 1)
    for name, known in (("embedding_type", EMBEDDINGS), ("encoder_type", ENCODERS), ("decoder_type", DECODERS)):
      checks.lookup(name, getattr(self, name), dict.fromkeys(known))
    super().__post_init__()

  @nn.compact
  def __call__(self, x, t, y=None, *, train: bool = False):
    """Return the network's raw output ``F``.

    Args:
      x: (n, height, width, channels), noisy images multiplied by ``c_in``.
      t: (n,) the encoded noise level, ``c_noise``.
      y: (n,) labels, if the network has classes; (n, label_size) floats, if labels are vectors.
      train: whether to apply dropout; needs ``rngs={"dropout": key}``.

    Returns:
      (n, height, width, out_channels) in the type of ``x``.

    Raises:
      ValueError: if the shapes do not fit, a label is missing or not one of the classes, or a side cannot be halved at
        every level.
    """
    layers.check_labels(self, x, t, y)
    layers.check_perturbation(self)
    emb = self.embed(t, layers.label_vectors(self, y, t.dtype), train)
    sides = [(self.img_resolution or x.shape[1]) >> level for level in range(len(self.channel_mult))]
    h, skips = self.encode(x, emb, sides, train)
    return self.decode(h, skips, emb, sides, self.out_channels or x.shape[-1], train).astype(x.dtype)

  @nn.nowrap
  def embed(self, t, labels, train: bool):
    """Map times (n,) and label vectors to the embedding (n, channel_mult_emb * model_channels)."""
    width, noise = (int(self.model_channels * mult) for mult in (self.channel_mult_emb, self.channel_mult_noise))
    if self.embedding_type == "fourier":
      emb = FourierEmbedding(noise, name="map_noise")(t)
    else:
      emb = layers.positional_embedding(t, noise, endpoint=True)
    emb = jnp.roll(emb, noise // 2, axis=1)  # Sines first.

    def linear(features, name, bias=True):
      return nn.Dense(features, use_bias=bias, kernel_init=XAVIER.kernel, name=name)

    if labels is not None:
      if train and self.label_dropout:
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.label_dropout, (t.shape[0], 1))
        labels = labels * kept.astype(labels.dtype)
      emb += linear(noise, "map_label")(labels * math.sqrt(labels.shape[1]))
    if self.augment_dim:
      emb += linear(noise, "map_augment", bias=False)(jnp.zeros((t.shape[0], self.augment_dim), emb.dtype))
    return nn.silu(linear(width, "map_layer1")(nn.silu(linear(width, "map_layer0")(emb))))

  @nn.nowrap
  def block(self, features: int, name: str, heads: int = 0, resample: str | None = None):
    """Make a block."""
    cls = nn.remat(Block, static_argnums=(3,)) if self.use_checkpoint else Block
    return cls(
      features,
      heads,
      resample,
      self.dropout,
      skip_scale=math.sqrt(0.5),
      epsilon=1e-6,
      resample_filter=self.resample_filter,
      resample_proj=True,
      adaptive_scale=False,
      inits=XAVIER,
      dtype=self.dtype,
      perturbation=layers.perturbation_of(self, name),
      cudnn_attention=self.cudnn_attention,
      name=name,
    )

  @nn.nowrap
  def conv(self, features: int, name: str):
    """Make a 3x3 convolution."""
    return Conv(features, kernel_init=XAVIER.kernel, dtype=self.dtype, name=name)

  @nn.nowrap
  def encode(self, x, emb, sides, train: bool):
    """Run the downsampling path; return its result, and the outputs of all blocks, from finest to coarsest."""
    aux = x
    h = self.conv(self.model_channels, f"enc_{sides[0]}x{sides[0]}_conv")(x)
    skips = [h]
    for level, mult in enumerate(self.channel_mult):
      name = f"enc_{sides[level]}x{sides[level]}"
      if level:
        h = self.block(h.shape[-1], f"{name}_down", resample="down")(h, emb, train)
        if self.encoder_type == "skip":
          aux = halve(aux, self.resample_filter)
          h += nn.Dense(h.shape[-1], kernel_init=XAVIER.kernel, dtype=self.dtype, name=f"{name}_aux_skip")(aux)
        elif self.encoder_type == "residual":
          # The filter comes after the convolution, which sees zeros beyond the edges.
          extra = len(self.resample_filter) // 2 - 1
          aux = jnp.pad(aux, [(0, 0), (extra, extra), (extra, extra), (0, 0)])
          aux = halve(self.conv(h.shape[-1], f"{name}_aux_residual")(aux), self.resample_filter, pad=False)
          h = aux = (h + aux) * math.sqrt(0.5)
        skips.append(h)
      for i in range(self.num_blocks):
        heads = int(sides[level] in self.attn_resolutions)
        h = self.block(int(self.model_channels * mult), f"{name}_block{i}", heads)(h, emb, train)
        skips.append(h)
    return h, skips

  @nn.nowrap
  def decode(self, h, skips, emb, sides, out_channels: int, train: bool):
    """Run the upsampling path; return the network's output."""
    out: Any = None
    for level in reversed(range(len(sides))):
      name = f"dec_{sides[level]}x{sides[level]}"
      if level == len(sides) - 1:
        h = self.block(h.shape[-1], f"{name}_in0", heads=1)(h, emb, train)
        h = self.block(h.shape[-1], f"{name}_in1")(h, emb, train)
      else:
        h = self.block(h.shape[-1], f"{name}_up", resample="up")(h, emb, train)
      for i in range(self.num_blocks + 1):
        heads = int(i == self.num_blocks and sides[level] in self.attn_resolutions)
        features = int(self.model_channels * self.channel_mult[level])
        h = self.block(features, f"{name}_block{i}", heads)(jnp.concatenate([h, skips.pop()], -1), emb, train)
      if self.decoder_type == "skip" or level == 0:
        out = double(out, self.resample_filter) if out is not None else None
        normed = GroupNorm(True, layers.groups_of(h.shape[-1]), 1e-6, name=f"{name}_aux_norm")(h)
        more = Conv(out_channels, kernel_init=XAVIER.last, name=f"{name}_aux_conv")(normed)
        out = more if out is None else more + out
    return out
