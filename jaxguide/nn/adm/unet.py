"""The UNet of Dhariwal & Nichol 2021, and the one that makes small images large."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide._core.pixels import to_floats
from jaxguide.nn.adm.encoder import Encoder
from jaxguide.nn.layers import Conv, GroupNorm, Upsample, zeros
from jaxguide.nn.perturbation import Perturbation


class UNet(Encoder):
  """The UNet of Dhariwal & Nichol (2021, arXiv:2105.05233, section 3), with every switch of the published models.

  ``unet.apply(params, x, t, y)`` gives ``F`` of the shape of ``x``: what it means is up to `jaxguide.scaling`.

  Args:
    model_channels: channels of the finest level; the time embedding is four times as wide.
    out_channels: channels of the output: as many as the input's if left out; twice the image's for learned variance.
    num_res_blocks: residual blocks a level.
    attention_resolutions: downsampling factors at which there is attention: (2,) is at half the image's sides. If left
      out, (2,) where there is such a level.
    dropout: probability of dropping an activation in training, in [0, 1).
    channel_mult: one factor on ``model_channels`` for each level of resolution.
    conv_resample: whether resampling convolves, where ``resblock_updown`` is off.
    num_heads: attention heads, where ``num_head_channels`` is -1.
    num_head_channels: channels of a head; -1 to count by ``num_heads``.
    num_heads_upsample: heads on the way up; -1 for ``num_heads``.
    use_scale_shift_norm: the embedding scales and shifts the normalised activations (adaptive group normalisation),
      instead of being added.
    resblock_updown: resample inside residual blocks.
    use_new_attention_order: the layout (qkv, head, channel) in place of (head, qkv, channel).
    use_checkpoint: compute activations again for the backward pass, to save memory.
    dtype: what convolutions and products compute in, ``jnp.float32`` or ``jnp.bfloat16``; parameters and normalisation
      stay float32. On an NVIDIA GPU float32 products are TF32, of 10 bits, unless
      ``jax.default_matmul_precision("highest")`` holds.
    cudnn_attention: attend by cuDNN's fused kernel on an NVIDIA GPU of Ampere's generation or later; elsewhere it
      changes nothing. It needs ``dtype`` bfloat16 and heads of at most 128 channels, a multiple of 8; it never holds
      all the weights of a map, and has a first derivative in reverse mode only.
    num_classes: number of classes, or None for an unconditional network.
    null_class: whether there is one more label, ``num_classes`` itself, that stands for none, as classifier-free
      guidance needs it. The published networks have none.
    perturbation: what makes some blocks worse on purpose; see `jaxguide.perturbed`. The parameters are those of the
      network without it, and a new network's are drawn without it.

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
  perturbation: Perturbation | None = None

  @nn.nowrap
  def perturbation_of(self, name: str) -> Perturbation | None:
    """Give what is done to a block."""
    perturbation = None if self.is_initializing() else self.perturbation
    return perturbation if perturbation is not None and name in perturbation.blocks else None

  @nn.compact
  def __call__(self, x, t, y=None, *, train: bool = False):
    """Predict.

    Args:
      x: (n, height, width, channels), scaled by ``c_in``.
      t: (n,) what tells the noise level, ``c_noise``.
      y: (n,) labels, if the network has classes.
      train: whether to drop activations; needs ``rngs={"dropout": key}``.

    Returns:
      (n, height, width, out_channels) in the type of ``x``.

    Raises:
      ValueError: where the shapes do not fit, the sides do not halve evenly, or labels are given to a network without
        classes or not given to one with, or are not of its classes; where a block to perturb is not there.
    """
    return self.predict(x, t, y, self.out_channels or x.shape[-1], train)

  @nn.nowrap
  def predict(self, x, t, y, out_channels: int, train: bool):
    """Do what calling the network does, for inputs that may have more channels than the image."""
    self.check_input(x, t)
    name = type(self).__name__
    if (y is None) != (self.num_classes is None):
      raise ValueError(
        f"{name} with num_classes={self.num_classes} was given {'no' if y is None else 'unexpected'} labels"
      )
    if y is not None and y.shape != t.shape:
      raise ValueError(f"{name} takes one label for each of {x.shape[0]} images, got shape {y.shape}")
    checks.labels("label", y, self.num_classes or 0, self.null_class)
    if self.perturbation is not None and not self.is_initializing():
      self.perturbation.check(self.variables)
    emb = self.embed_time(t)
    if self.num_classes is not None:
      emb += nn.Embed(self.num_classes + self.null_class, emb.shape[-1], name="label_emb")(y)

    skips = self.encode(x, emb, train)
    h = self.middle(skips[-1], emb, train)
    block = 0
    for level in reversed(range(len(self.channel_mult))):
      for i in range(self.num_res_blocks + 1):
        name, part = f"output_blocks_{block}", 1
        h = self.res_block(self.channels(level), f"{name}_0")(jnp.concatenate([h, skips.pop()], -1), emb, train)
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

  It sees the low-resolution image beside the noisy one, enlarged bilinearly and concatenated to it. Its condition is
  one pytree: ``unet.apply(params, x, t, {"label": y, "low_res": image})``; without classes ``{"low_res": image}``.
  The fields are those of `UNet`.

  >>> unet = SuperResUNet(model_channels=32, num_classes=10)
  >>> x, t = jnp.zeros((2, 16, 16, 3)), jnp.zeros(2)
  >>> cond = {"label": jnp.array([3, 10]), "low_res": jnp.zeros((2, 4, 4, 3))}
  >>> params = jax.eval_shape(unet.init, jax.random.key(0), x, t, cond)
  >>> jax.eval_shape(unet.apply, params, x, t, cond).shape
  (2, 16, 16, 3)
  """

  @nn.compact
  def __call__(self, x, t, cond, *, train: bool = False):  # type: ignore[override]
    """Predict.

    Args:
      x: (n, height, width, channels), scaled by ``c_in``.
      t: (n,) what tells the noise level, ``c_noise``.
      cond: ``low_res``, (n, low height, low width, channels), clean and not scaled, in [-1, 1] or uint8; and ``label``,
        (n,), if the network has classes.
      train: whether to drop activations; needs ``rngs={"dropout": key}``.

    Returns:
      (n, height, width, out_channels) in the type of ``x``; as many channels as ``x`` if ``out_channels`` was left out.

    Raises:
      ValueError: as for `UNet`; where there is no low-resolution image, or not one for each of ``x``, with its channels
        and no larger than it.
    """
    if not isinstance(cond, Mapping) or "low_res" not in cond or cond.keys() - {"label", "low_res"}:
      raise ValueError(
        'SuperResUNet takes a condition {"label": y, "low_res": image}, without "label" if unconditional'
      )
    low = cond["low_res"]
    fits = low.ndim == x.ndim == 4 and (low.shape[0], low.shape[3]) == (x.shape[0], x.shape[3])
    if not fits or low.shape[1] > x.shape[1] or low.shape[2] > x.shape[2]:
      raise ValueError(
        f"SuperResUNet takes a low_res image for each of the images of shape {x.shape}, with their channels and no "
        f"larger than they are; got shape {low.shape}"
      )
    low = to_floats(low, x.dtype) if low.dtype == jnp.uint8 else low.astype(x.dtype)
    # Half-pixel centres, edges repeated: PyTorch's bilinear interpolation with align_corners=False.
    large = jax.image.resize(low, x.shape, "bilinear", antialias=False)
    return self.predict(jnp.concatenate([x, large], -1), t, cond.get("label"), self.out_channels or x.shape[-1], train)
