"""EDM2's UNet."""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide._core.typing import PyTree
from jaxguide.nn.edm.layers import check_fields, check_labels, check_perturbation, label_vectors, perturbation_of
from jaxguide.nn.edm2 import layers
from jaxguide.nn.edm2.layers import Block, MPConv, MPFourier, mp_cat, mp_silu, mp_sum
from jaxguide.nn.meshed import Meshed
from jaxguide.nn.parameters import parameter
from jaxguide.nn.perturbation import Perturbation
from jaxguide.nn.resampling import check_filter


class EDM2UNet(Meshed):
  """EDM2's magnitude-preserving UNet (Karras et al. 2024, arXiv:2312.02696, config G), with its learned uncertainty.

  It has no biases and no group normalisation. The weights of each output are normalised wherever they are used. In
  training they are also replaced by their normalised values before each step, which `forced` does. The result is the
  raw output ``F``; `jaxguide.scaling.edm` makes a denoiser of it.

  Args:
    img_resolution: the side that names of blocks and ``attn_resolutions`` refer to. Default: the images' height.
    out_channels: channels of the output. Default: as many as the input's.
    model_channels: channels of the finest level, before ``channel_mult``: 128 in XS, 192 in S, 256 in M, 320 in L,
      384 in XL and 448 in XXL.
    channel_mult: one factor on ``model_channels`` for each resolution level.
    channel_mult_noise: width of the embedding of time, divided by ``model_channels``. Default: as many as the finest
      level.
    channel_mult_emb: width of the embedding, divided by ``model_channels``. Default: as many as the widest level.
    num_blocks: residual blocks per level.
    attn_resolutions: sides of the feature maps that have attention.
    label_balance: share of the label in its sum with the embedding of time.
    concat_balance: share of the encoder's features where the decoder gets them.
    resample_filter: the filter of the resampling, an even number of taps.
    channels_per_head: channels of an attention head. A block with fewer channels has no attention.
    dropout: probability of dropping an activation in training, in [0, 1).
    res_balance: share of a block's residual in its sum with the skip path.
    attn_balance: share of attention in its sum with the skip path.
    clip_act: activations are clipped to this magnitude; None for no clipping.
    logvar_channels: features of time in the learned uncertainty.
    use_checkpoint: whether activations are computed again in the backward pass, to save memory.
    dtype: type of convolutions and matrix products. Parameters and embeddings stay float32.
    cudnn_attention: whether to use cuDNN's fused attention kernel on an NVIDIA GPU; as for `jaxguide.UNet`.
    num_classes: number of classes, or None for an unconditional network. A class is a one-hot vector inside.
    null_class: whether the label ``num_classes`` means "no label"; the network gets a vector of zeros for it.
    label_size: length of a label that is a vector of floats; ``num_classes`` is None then.
    perturbation: makes some blocks worse on purpose; see `jaxguide.perturbed`.

  >>> unet = EDM2UNet(model_channels=16, channel_mult=(1, 2), num_blocks=1, channels_per_head=16, num_classes=10)
  >>> x, t, y = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.array([3, 10])
  >>> params = jax.eval_shape(unet.init, jax.random.key(0), x, t, y)
  >>> jax.eval_shape(unet.apply, params, x, t, y).shape
  (2, 8, 8, 4)
  """

  img_resolution: int | None = None
  out_channels: int | None = None
  model_channels: int = 192
  channel_mult: Sequence[int | float] = (1, 2, 3, 4)
  channel_mult_noise: int | float | None = None
  channel_mult_emb: int | float | None = None
  num_blocks: int = 3
  attn_resolutions: Sequence[int] = (16, 8)
  label_balance: float = 0.5
  concat_balance: float = 0.5
  resample_filter: Sequence[int | float] = (1, 1)
  channels_per_head: int = 64
  dropout: int | float = 0.0
  res_balance: float = 0.3
  attn_balance: float = 0.3
  clip_act: int | float | None = 256
  logvar_channels: int = 128
  use_checkpoint: bool = False
  dtype: Any = jnp.float32
  cudnn_attention: bool | None = None
  num_classes: int | None = None
  null_class: bool = True
  label_size: int | None = None
  perturbation: Perturbation | None = None

  frozen: ClassVar[tuple[str, ...]] = ("freqs", "phases")

  def __post_init__(self):
    check_fields(self)
    self.resample_filter = check_filter(self.resample_filter)
    for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
      checks.in_range(name, getattr(self, name), 0, 1)
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
    check_labels(self, x, t, y)
    check_perturbation(self)
    if self.is_initializing():
      MPConv(1, name="logvar_linear")(MPFourier(self.logvar_channels, name="logvar_fourier")(t))
    widths = [int(self.model_channels * mult) for mult in self.channel_mult]
    emb = self.embed(t, label_vectors(self, y, t.dtype), widths)
    sides = [(self.img_resolution or x.shape[1]) >> level for level in range(len(widths))]
    h = jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
    h = MPConv(widths[0], 3, self.dtype, name=f"enc_{sides[0]}x{sides[0]}_conv")(h)
    skips = [h]
    for level, width in enumerate(widths):
      name = f"enc_{sides[level]}x{sides[level]}"
      if level:
        h = self.block(h.shape[-1], False, f"{name}_down", resample="down")(h, emb, train)
        skips.append(h)
      for i in range(self.num_blocks):
        h = self.block(width, False, f"{name}_block{i}", sides[level] in self.attn_resolutions)(h, emb, train)
        skips.append(h)
    for level in reversed(range(len(widths))):
      name = f"dec_{sides[level]}x{sides[level]}"
      if level == len(widths) - 1:
        h = self.block(h.shape[-1], True, f"{name}_in0", attends=True)(h, emb, train)
        h = self.block(h.shape[-1], True, f"{name}_in1")(h, emb, train)
      else:
        h = self.block(h.shape[-1], True, f"{name}_up", resample="up")(h, emb, train)
      for i in range(self.num_blocks + 1):
        h = mp_cat(h, skips.pop(), self.concat_balance)
        h = self.block(widths[level], True, f"{name}_block{i}", sides[level] in self.attn_resolutions)(h, emb, train)
    gain = parameter(self, "out_gain", nn.initializers.zeros, ())
    return MPConv(self.out_channels or x.shape[-1], 3, self.dtype, name="out_conv")(h, gain).astype(x.dtype)

  @nn.nowrap
  def embed(self, t, labels, widths: Sequence[int]):
    """Map times (n,) and label vectors to the embedding."""
    noise, width = (
      default if mult is None else int(self.model_channels * mult)
      for mult, default in ((self.channel_mult_noise, widths[0]), (self.channel_mult_emb, max(widths)))
    )
    emb = MPConv(width, dtype=t.dtype, name="emb_noise")(MPFourier(noise, name="emb_fourier")(t))
    if labels is not None:
      label = MPConv(width, dtype=t.dtype, name="emb_label")(labels * labels.shape[1] ** 0.5)
      emb = mp_sum(emb, label, self.label_balance)
    return mp_silu(emb)

  @nn.nowrap
  def block(self, features: int, decoder: bool, name: str, attends: bool = False, resample: str | None = None):
    """Make a block."""
    cls = nn.remat(Block, static_argnums=(3,)) if self.use_checkpoint else Block
    return cls(
      features,
      decoder,
      features // self.channels_per_head if attends else 0,
      resample,
      self.resample_filter,
      self.dropout,
      self.res_balance,
      self.attn_balance,
      self.clip_act,
      self.dtype,
      perturbation_of(self, name),
      self.cudnn_attention,
      name=name,
    )

  @nn.nowrap
  def forced(self, params: PyTree) -> PyTree:
    """Return the parameters with every kernel normalised: forced weight normalisation (section 2.3 and algorithm 1).

    A training calls it before each step, so that the length of a kernel neither grows nor changes the learning rate.
    The network computes the same with either.

    Args:
      params: ``{"params": ...}``; other collections are returned as they are.
    """

    def normalise(path, leaf):
      return layers.forced(leaf) if path[-1].key == "kernel" else leaf

    return {**params, "params": jax.tree_util.tree_map_with_path(normalise, params["params"])}

  @nn.nowrap
  def logvar(self, params: PyTree, c_noise):
    """Return the learned uncertainty ``u`` (n,): the log of the expected loss at each noise level (eq. 21 to 23).

    It is part of the parameters. `jaxguide.uncertainty_loss` trains it.

    Args:
      params: ``{"params": ...}``.
      c_noise: (n,) the encoded noise levels.
    """
    features = params["params"]["logvar_fourier"]
    out = layers.fourier(c_noise, features["freqs"], features["phases"])
    kernel = params["params"]["logvar_linear"]["kernel"]
    return (out @ (kernel * layers.magnitude(kernel)).astype(out.dtype))[:, 0]
