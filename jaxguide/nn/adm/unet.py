"""The UNet of Dhariwal & Nichol 2021, and its super-resolution variant."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide._core.pixels import to_floats
from jaxguide.nn.adm.encoder import Encoder
from jaxguide.nn.layers import Conv, Upsample, zeros
from jaxguide.nn.normalisation import GroupNorm
from jaxguide.nn.perturbation import Perturbation


class UNet(Encoder):
  """The UNet of Dhariwal & Nichol (2021, arXiv:2105.05233, section 3), with every option of the published models.

  ``unet.apply(params, x, t, y)`` returns the raw output ``F`` of the shape of ``x``. `jaxguide.scaling` converts it to
  a prediction of x0.

  Args:
    model_channels: channels of the finest level; the time embedding is four times as wide.
    out_channels: channels of the output. Default: as many as the input's. A learned variance needs twice the image's.
    num_res_blocks: residual blocks per level.
    attention_resolutions: downsampling factors that have attention; (2,) means at half the image's sides. Default: (2,)
      if there are at least two levels, otherwise none.
    dropout: probability of dropping an activation in training, in [0, 1).
    channel_mult: one factor on ``model_channels`` for each resolution level.
    conv_resample: whether resampling includes a convolution. Only used if ``resblock_updown`` is off.
    num_heads: number of attention heads. Only used if ``num_head_channels`` is -1.
    num_head_channels: channels per head; -1 to use ``num_heads``.
    num_heads_upsample: number of heads in the upsampling path; -1 for ``num_heads``.
    use_scale_shift_norm: whether the embedding scales and shifts the normalised activations (adaptive group
      normalisation) instead of being added.
    resblock_updown: whether residual blocks do the resampling.
    use_new_attention_order: whether channels are laid out (qkv, head, channel) instead of (head, qkv, channel).
    use_checkpoint: whether activations are computed again in the backward pass, to save memory.
    dtype: type of convolutions and matrix products, ``jnp.float32`` or ``jnp.bfloat16``. Parameters and normalisation
      stay float32. On an NVIDIA GPU float32 products use TF32 (10 bits of mantissa) unless
      ``jax.default_matmul_precision("highest")`` is set.
    cudnn_attention: whether to use cuDNN's fused attention kernel on an NVIDIA GPU; no effect on other devices. By
      default it is used wherever it can be, that is on Ampere or newer, with ``dtype`` bfloat16, and with heads whose
      channels are a multiple of 8 and at most 128. It never stores the whole attention matrix. It supports first
      derivatives in reverse mode only: give False for others.
    num_classes: number of classes, or None for an unconditional network.
    null_class: whether there is a label that means "no label": one more class, ``num_classes`` itself, or the vector of
      zeros. Classifier-free guidance needs it. The published networks do not have it.
    label_size: length of a label that is a vector of floats, such as attributes or an embedding; ``num_classes`` is
      None then. A linear map without bias adds it to the time embedding, as in EDM's networks.
    perturbation: makes some blocks worse on purpose; see `jaxguide.perturbed`. It adds no parameters, and `init`
      ignores it.

  >>> import jax
  >>> unet = UNet(model_channels=32, num_classes=10)
  >>> x, t, y = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), jnp.array([3, 10])
  >>> params = jax.eval_shape(unet.init, jax.random.key(0), x, t, y)
  >>> jax.eval_shape(unet.apply, params, x, t, y).shape
  (2, 8, 8, 1)
  """

  num_classes: int | None = None
  null_class: bool = True
  num_heads_upsample: int = -1
  label_size: int | None = None
  perturbation: Perturbation | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.label_size is not None and self.num_classes is not None:
      raise ValueError(
        f"{type(self).__name__} takes classes or label vectors, got num_classes={self.num_classes} and "
        f"label_size={self.label_size}: leave out one of them"
      )

  @nn.nowrap
  def perturbation_of(self, name: str) -> Perturbation | None:
    """Return the perturbation of the named block, or None; always None in `init`."""
    perturbation = None if self.is_initializing() else self.perturbation
    return perturbation if perturbation is not None and name in perturbation.blocks else None

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
      ValueError: if the shapes do not fit; a side cannot be halved at every level; a network with classes gets no
        labels, or one without classes gets some; a label is not a class of the network; or the network has no block
        that the perturbation names.
    """
    return self.predict(x, t, y, self.out_channels or x.shape[-1], train)

  @nn.nowrap
  def predict(self, x, t, y, out_channels: int, train: bool):
    """Run the network; unlike ``__call__``, ``x`` may have more channels than the image."""
    self.check_input(x, t)
    name = type(self).__name__
    if (y is None) != (self.num_classes is None and self.label_size is None):
      raise ValueError(
        f"{name} with num_classes={self.num_classes} was given {'no' if y is None else 'unexpected'} labels"
      )
    label_shape = t.shape if self.label_size is None else (*t.shape, self.label_size)
    if y is not None and y.shape != label_shape:
      kind = "label" if self.label_size is None else f"label of {self.label_size} numbers"
      raise ValueError(f"{name} takes one {kind} for each of {x.shape[0]} images, got shape {y.shape}")
    if self.num_classes is not None:
      checks.labels("label", y, self.num_classes, self.null_class)
    if self.perturbation is not None and not self.is_initializing():
      self.perturbation.check(self.variables)
    emb = self.embed_time(t)
    if self.num_classes is not None:
      emb += nn.Embed(self.num_classes + self.null_class, emb.shape[-1], name="label_emb")(y)
    if self.label_size is not None:
      emb += nn.Dense(emb.shape[-1], use_bias=False, name="label_emb")(y.astype(emb.dtype))

    skips = self.encode(x, emb, train)
    h = self.middle(skips[-1], emb, train)
    block = 0
    for level in reversed(range(len(self.channel_mult))):
      for i in range(self.num_res_blocks + 1):
        name, part = f"output_blocks_{block}", 1
        h = self.res_block(self.channels(level), f"{name}_0")((h, skips.pop()), emb, train)
        if self.attends(level):
          heads = self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample
          h, part = self.attention(heads, f"{name}_1")(h), 2
        if level and i == self.num_res_blocks:
          if self.resblock_updown:
            h = self.res_block(h.shape[-1], f"{name}_{part}", "up")(h, emb, train)
          else:
            h = Upsample(self.conv_resample, self.dtype, name=f"{name}_{part}")(h)
        block += 1

    h = GroupNorm(silu=True, name="out_0")(h)
    return Conv(out_channels, kernel_init=zeros, name="out_2")(h).astype(x.dtype)


class SuperResUNet(UNet):
  """The super-resolution UNet of Dhariwal & Nichol (2021, arXiv:2105.05233, section 5.2).

  The low-resolution image is enlarged bilinearly and concatenated to the noisy image along the channels. The condition
  is one pytree: ``unet.apply(params, x, t, {"label": y, "low_res": image})``, or ``{"low_res": image}`` if there are no
  classes. The fields are those of `UNet`.

  >>> unet = SuperResUNet(model_channels=32, num_classes=10)
  >>> x, t = jnp.zeros((2, 16, 16, 3)), jnp.zeros(2)
  >>> cond = {"label": jnp.array([3, 10]), "low_res": jnp.zeros((2, 4, 4, 3))}
  >>> params = jax.eval_shape(unet.init, jax.random.key(0), x, t, cond)
  >>> jax.eval_shape(unet.apply, params, x, t, cond).shape
  (2, 16, 16, 3)
  """

  @nn.compact
  def __call__(self, x, t, cond, *, train: bool = False):  # type: ignore[override]
    """Return the network's raw output ``F``.

    Args:
      x: (n, height, width, channels), noisy images multiplied by ``c_in``.
      t: (n,) the encoded noise level, ``c_noise``.
      cond: a dictionary with ``low_res``, (n, low height, low width, channels), clean images that are not scaled, in
        [-1, 1] or uint8; and ``label``, (n,), if the network has classes.
      train: whether to apply dropout; needs ``rngs={"dropout": key}``.

    Returns:
      (n, height, width, out_channels) in the type of ``x``. If ``out_channels`` is None, as many channels as ``x``.

    Raises:
      ValueError: as for `UNet`; also if ``low_res`` is missing, has another batch size or other channels than ``x``, or
        is larger than ``x``.
    """
    if not isinstance(cond, Mapping) or "low_res" not in cond or cond.keys() - {"label", "low_res"}:
      raise ValueError(
        'SuperResUNet takes a condition {"label": y, "low_res": image}, without "label" if unconditional'
      )
    low = cond["low_res"]
    fits = low.ndim == x.ndim == 4 and (low.shape[0], low.shape[3]) == (x.shape[0], x.shape[3])
    if not fits or low.shape[1] > x.shape[1] or low.shape[2] > x.shape[2]:
      raise ValueError(
        f"SuperResUNet takes one low_res image for each image of x, with the same channels and no larger; "
        f"got shape {low.shape} for x of shape {x.shape}"
      )
    low = to_floats(low, x.dtype) if low.dtype == jnp.uint8 else low.astype(x.dtype)
    # The same as PyTorch's bilinear interpolation with align_corners=False: half-pixel centres, repeated edges.
    large = jax.image.resize(low, x.shape, "bilinear", antialias=False)
    return self.predict(jnp.concatenate([x, large], -1), t, cond.get("label"), self.out_channels or x.shape[-1], train)
