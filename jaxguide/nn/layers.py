"""The blocks of Dhariwal & Nichol's networks (arXiv:2105.05233, section 3 and appendix A), NHWC.

Names of submodules are those of the published checkpoints with dots for underscores, so that carrying weights over is a
renaming. Parameters and normalisation are float32; ``dtype`` is the type that convolutions and products compute in.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core.typing import Array, Float
from jaxguide.nn.convolution import convolve
from jaxguide.nn.perturbation import Perturbation, smooth

zeros = nn.initializers.zeros

# How many weights a head of attention has from where on heads take turns on a CPU: 784 pixels gain, 576 do not.
ATTENTION_WEIGHTS = 2**19


def timestep_embedding(
  t: Float[Array, " n"], features: int, max_period: int | float = 1e4
) -> Float[Array, "n features"]:
  """Sinusoidal embedding of time (Vaswani et al. 2017), cosines first, as OpenAI's networks have it.

  Args:
    t: (n,) times, which may be fractional.
    features: width of the embedding; an odd one ends in a zero.
    max_period: the longest period, in units of ``2 pi``.

  >>> timestep_embedding(jnp.zeros(1), 4).tolist()
  [[1.0, 1.0, 0.0, 0.0]]
  """
  half = features // 2
  frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = t.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1), ((0, 0), (0, features % 2)))


class Conv(nn.Module):
  """A convolution with a square kernel of odd side and half of it in zeros on each side; see `convolve`."""

  features: int
  kernel_size: int = 3
  stride: int = 1
  kernel_init: Any = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h / stride, w / stride, features)."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    bias = self.param("bias", zeros, (self.features,), jnp.float32)
    out = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)
    return out + _along_channels(bias.astype(self.dtype), out)


def _along_channels(per_channel, like):
  """Give (c,) the axes that it needs to meet (..., c) of ``like``."""
  return jax.lax.expand_dims(per_channel, range(like.ndim - 1))


class GroupNorm(nn.Module):
  """Group normalisation (Wu & He 2018) in float32: 32 groups, or as many as divide both 32 and the channels.

  With ``silu``, x sigmoid(x) of it. Mean and variance are taken per channel and then over the channels of a group, in
  two passes: on a CPU that takes half the time of one reduction over reshaped groups, and it loses no digits to a
  difference of squares.
  """

  silu: bool = False

  @nn.compact
  def __call__(self, x, scale_shift=None):
    """Normalise (n, ..., c) over its pixels, times 1 + scale and plus shift of each example; gives float32."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", zeros, (channels,), jnp.float32)
    return _normalise(x, scale, bias, scale_shift, self.silu)


# Compiled by itself and called: traced, differentiated and lowered once for each shape, and not for each block. XLA
# inlines the calls again. For the gradient it is computed again: to keep x alone takes less memory than to keep the
# parts, and on a CPU less time.
@functools.partial(jax.jit, static_argnames="silu")
@functools.partial(jax.checkpoint, static_argnums=4)
def _normalise(x, scale, bias, scale_shift, silu):
  channels = x.shape[-1]
  groups = math.gcd(32, channels)
  # Height and width stay apart: over a merged axis, and under a vmap of one image each, XLA's CPU backend takes 14
  # times as long for a sum of products, which the gradient has.
  pixels = tuple(range(1, x.ndim - 1))

  def per_group(per_channel):
    return per_channel.reshape(-1, groups, channels // groups).mean(2)

  def spread(per_group):
    return jnp.expand_dims(_spread(per_group, channels), pixels)

  x = x.astype(jnp.float32)
  centred = x - spread(per_group(x.mean(pixels)))
  variance = per_group(jnp.square(centred).mean(pixels))
  scale, bias = _along_channels(scale, x), _along_channels(bias, x)
  out = centred * (spread(jax.lax.rsqrt(variance + 1e-5)) * scale) + bias
  if scale_shift is not None:
    out = out * (1 + scale_shift[0]).astype(jnp.float32) + scale_shift[1].astype(jnp.float32)
  return nn.silu(out) if silu else out


def _spread(per_group, channels):
  """Give each channel what its group has.

  As a product on a CPU: XLA fuses a repetition into the loop over pixels, which then is not vectorised.
  """
  size = channels // per_group.shape[1]
  if jax.default_backend() != "cpu":
    return jnp.repeat(per_group, size, axis=1)
  return per_group @ jnp.repeat(jnp.eye(per_group.shape[1]), size, axis=1)


def downsample(x: Float[Array, "n h w c"]) -> Float[Array, "n hh ww c"]:
  """Mean of each 2x2 square."""
  n, h, w, c = x.shape
  return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: Float[Array, "n h w c"]) -> Float[Array, "n hh ww c"]:
  """Each pixel repeated as a 2x2 square."""
  n, h, w, c = x.shape
  return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class Downsample(nn.Module):
  """Halve the sides: by a convolution of stride 2 if ``use_conv``, else by averaging."""

  use_conv: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h/2, w/2, c)."""
    return Conv(x.shape[-1], stride=2, dtype=self.dtype, name="op")(x) if self.use_conv else downsample(x)


class Upsample(nn.Module):
  """Double the sides by repetition, and convolve if ``use_conv``."""

  use_conv: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, 2h, 2w, c)."""
    x = upsample(x)
    return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x) if self.use_conv else x


class ResBlock(nn.Module):
  """BigGAN's residual block; the embedding scales and shifts the second normalisation, or is added before it.

  With ``skip`` there is only its skip path.
  """

  features: int
  dropout: int | float = 0.0
  use_scale_shift_norm: bool = False
  resample: str | None = None
  dtype: Any = jnp.float32
  skip: bool = False

  @nn.compact
  def __call__(self, x, emb, train):
    """Map (n, h, w, c) and (n, emb) to (n, h, w, features), sides doubled or halved by ``resample`` up or down."""
    change = {"up": upsample, "down": downsample, None: lambda x: x}[self.resample]
    h = 0 if self.skip else self.residual(x, emb, train, change)
    x = change(x)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="skip_connection")(x)
    return x.astype(self.dtype) + h

  @nn.nowrap
  def residual(self, x, emb, train, change):
    """Give what is added to the skip path."""
    h = GroupNorm(silu=True, name="in_layers_0")(x).astype(self.dtype)
    h = Conv(self.features, dtype=self.dtype, name="in_layers_2")(change(h))
    width = 2 * self.features if self.use_scale_shift_norm else self.features
    emb = nn.Dense(width, dtype=self.dtype, name="emb_layers_1")(nn.silu(emb))[:, None, None]
    norm = GroupNorm(silu=True, name="out_layers_0")
    h = norm(h, jnp.split(emb, 2, axis=-1)) if self.use_scale_shift_norm else norm(h + emb)
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return Conv(self.features, kernel_init=zeros, dtype=self.dtype, name="out_layers_3")(h)


# Compiled by itself for the same reason as `_normalise`.
@functools.partial(jax.jit, static_argnames=("heads", "new_order", "perturbation", "sides", "cudnn"))
def attend(
  qkv: Float[Array, "n t qkv"],
  heads: int,
  new_order: bool,
  perturbation: Perturbation | None = None,
  sides: tuple[int, ...] = (),
  cudnn: bool = False,
) -> Float[Array, "n t c"]:
  """Attend, with the softmax in float32.

  Args:
    qkv: queries, keys and values side by side.
    heads: how many; divides a third of the channels.
    new_order: whether the channels are laid out (qkv, head, channel), or (head, qkv, channel) as in the first release.
    perturbation: what is done to the attention, if anything: ``identity`` or ``smooth``.
    sides: (height, width) of the map that the pixels are of, if the attention is perturbed.
    cudnn: whether it is cuDNN's fused kernel on a GPU, which never holds all the weights.
  """
  n, t, channels = qkv.shape
  if new_order:
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, heads, -1), 2, 0)
  else:
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, heads, 3, -1), 3, 0)
  if perturbation is not None and perturbation.kind == "identity":
    out = v
  else:
    if perturbation is not None:
      q = smooth(q.reshape(n, *sides, heads, -1), perturbation.width).reshape(n, -1, heads, v.shape[-1])
    # What one mean query attends to is every pixel's.
    out = jnp.broadcast_to(_attention(q, k, v, cudnn), v.shape)
  return out.reshape(n, t, channels // 3)


def _attention(q, k, v, cudnn):
  backend = jax.default_backend()
  if backend == "cpu":
    return _attention_on_cpu(q, k, v)
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if cudnn and backend == "gpu" else "xla")


def _attention_on_cpu(q, k, v):
  """Do what ``jax.nn.dot_product_attention`` does, in half the time.

  XLA's CPU backend is quick with a product only where its axes are in order, so the heads come first. Where one head
  alone has many weights, heads take turns, so that what is computed stays in the cache; for the gradient it is computed
  again.
  """
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
  if q.shape[2] * k.shape[2] < ATTENTION_WEIGHTS:
    out = _weigh(q, k, v)
  else:
    heads = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = jax.lax.map(lambda head: jax.checkpoint(_weigh, prevent_cse=False)(*head), heads).reshape(q.shape)
  return out.transpose(0, 2, 1, 3)


def _weigh(q, k, v):
  """Attend, by queries that are scaled; the result is normalised, not every weight."""
  logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  total = weights.sum(-1, keepdims=True)
  return (jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total).astype(v.dtype)


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
  """Number of heads: ``num_heads``, or what ``num_head_channels`` for each makes, where that is not -1."""
  if num_head_channels != -1:
    if channels % num_head_channels:
      raise ValueError(f"num_head_channels {num_head_channels} must divide the {channels} channels that attend")
    return channels // num_head_channels
  if channels % num_heads:
    raise ValueError(f"num_heads {num_heads} must divide the {channels} channels that attend")
  return num_heads


class AttentionBlock(nn.Module):
  """Self-attention over the pixels, with a residual connection."""

  num_heads: int = 1
  num_head_channels: int = -1
  use_new_attention_order: bool = False
  dtype: Any = jnp.float32
  perturbation: Perturbation | None = None
  cudnn_attention: bool = False

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to the same shape."""
    if self.perturbation is not None and self.perturbation.kind == "skip":
      return x
    n, h, w, c = x.shape
    heads = count_heads(c, self.num_heads, self.num_head_channels)
    normed = GroupNorm(name="norm")(x).reshape(n, h * w, c)
    qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(normed)
    out = attend(qkv, heads, self.use_new_attention_order, self.perturbation, (h, w), self.cudnn_attention)
    out = nn.Dense(c, kernel_init=zeros, dtype=self.dtype, name="proj_out")(out)
    return x + out.reshape(x.shape)


class AttentionPool(nn.Module):
  """CLIP's attention pooling (Radford et al. 2021): the mean of the pixels attends to them all."""

  features: int
  num_head_channels: int

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, features)."""
    n, h, w, c = x.shape
    x = x.reshape(n, h * w, c)
    x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
    position = self.param("positional_embedding", nn.initializers.normal(c**-0.5), (h * w + 1, c), jnp.float32)
    x += position[None]
    qkv = nn.Dense(3 * c, name="qkv_proj")(x)
    out = attend(qkv, count_heads(c, 1, self.num_head_channels), new_order=True)
    return nn.Dense(self.features, name="c_proj")(out[:, 0])
