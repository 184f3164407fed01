"""The blocks of Dhariwal & Nichol's networks (arXiv:2105.05233, section 3 and appendix A), for NHWC images.

Submodules have the names of the published checkpoints with underscores instead of dots, so that weights are converted
by renaming. Parameters and normalisation are float32; ``dtype`` is the type of convolutions and matrix products.
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

# On a CPU, heads are processed one by one once an attention matrix has this many entries. This is faster for 784
# pixels, but not for 576.
ATTENTION_WEIGHTS = 2**19


def timestep_embedding(
  t: Float[Array, " n"], features: int, max_period: int | float = 1e4
) -> Float[Array, "n features"]:
  """Return a sinusoidal embedding of time (Vaswani et al. 2017), cosines first as in OpenAI's networks.

  Args:
    t: (n,) times, which may be fractional.
    features: width of the embedding. If it is odd, the last feature is 0.
    max_period: the longest period, in units of ``2 pi``.

  >>> timestep_embedding(jnp.zeros(1), 4).tolist()
  [[1.0, 1.0, 0.0, 0.0]]
  """
  half = features // 2
  frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
  angles = t.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1), ((0, 0), (0, features % 2)))


class Conv(nn.Module):
  """A convolution with a square kernel of odd side, padded by half a kernel on each side; see `convolve`.

  ``padding`` is another number of zeros before and behind rows and columns.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: tuple[int, int] | None = None
  kernel_init: Any = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32
  bias_init: Any = zeros

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h / stride, w / stride, features)."""
    shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
    out = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
    return out + _along_channels(bias.astype(self.dtype), out)


def _along_channels(per_channel, like):
  """Add leading axes to (c,) so that it broadcasts with ``like`` of shape (..., c)."""
  return jax.lax.expand_dims(per_channel, range(like.ndim - 1))


class GroupNorm(nn.Module):
  """Group normalisation (Wu & He 2018) in float32, optionally followed by SiLU.

  Args:
    silu: whether SiLU follows.
    groups: number of groups, which divides the channels. Default: gcd(32, channels).
    epsilon: what is added to the variance.

  The mean and then the variance are computed per channel and averaged over the channels of a group. On a CPU this takes
  half the time of one reduction over reshaped groups, and it avoids the rounding error of a difference of squares.
  """

  silu: bool = False
  groups: int | None = None
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x, scale_shift=None):
    """Normalise (n, ..., c) over pixels and groups, then multiply by 1 + scale and add shift; return float32."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", zeros, (channels,), jnp.float32)
    groups = math.gcd(32, channels) if self.groups is None else self.groups
    return _normalise(x, scale, bias, scale_shift, self.silu, groups, self.epsilon)


# Jitted by itself, so that it is traced, differentiated and lowered once per shape and not once per block. XLA inlines
# the calls. jax.checkpoint computes it again for the gradient: to store x alone takes less memory than to store the
# intermediate results, and on a CPU less time.
@functools.partial(jax.jit, static_argnames=("silu", "groups", "epsilon"))
@functools.partial(jax.checkpoint, static_argnums=(4, 5, 6))
def _normalise(x, scale, bias, scale_shift, silu, groups, epsilon):
  channels = x.shape[-1]
  # Height and width are not merged into one axis: under a vmap over single images, XLA's CPU backend takes 14 times as
  # long for a sum of products over a merged axis, and the gradient has such sums.
  pixels = tuple(range(1, x.ndim - 1))

  def per_group(per_channel):
    return per_channel.reshape(-1, groups, channels // groups).mean(2)

  def to_channels(per_group):
    return jnp.expand_dims(_repeat_for_channels(per_group, channels), pixels)

  x = x.astype(jnp.float32)
  centred = x - to_channels(per_group(x.mean(pixels)))
  variance = per_group(jnp.square(centred).mean(pixels))
  scale, bias = _along_channels(scale, x), _along_channels(bias, x)
  out = centred * (to_channels(jax.lax.rsqrt(variance + epsilon)) * scale) + bias
  if scale_shift is not None:
    out = out * (1 + scale_shift[0]).astype(jnp.float32) + scale_shift[1].astype(jnp.float32)
  return nn.silu(out) if silu else out


def _repeat_for_channels(per_group, channels):
  """Repeat each group's value for all channels of the group.

  On a CPU this is a matrix product: XLA would fuse a `jnp.repeat` into the loop over pixels, which is then not
  vectorised.
  """
  size = channels // per_group.shape[1]
  if jax.default_backend() != "cpu":
    return jnp.repeat(per_group, size, axis=1)
  return per_group @ jnp.repeat(jnp.eye(per_group.shape[1]), size, axis=1)


def downsample(x: Float[Array, "n h w c"]) -> Float[Array, "n hh ww c"]:
  """Average each 2x2 square."""
  n, h, w, c = x.shape
  return x.reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def upsample(x: Float[Array, "n h w c"]) -> Float[Array, "n hh ww c"]:
  """Repeat each pixel as a 2x2 square."""
  n, h, w, c = x.shape
  return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class Downsample(nn.Module):
  """Halve the sides by a convolution of stride 2 if ``use_conv``, otherwise by averaging."""

  use_conv: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h/2, w/2, c)."""
    return Conv(x.shape[-1], stride=2, dtype=self.dtype, name="op")(x) if self.use_conv else downsample(x)


class Upsample(nn.Module):
  """Double the sides by repeating pixels, followed by a convolution if ``use_conv``."""

  use_conv: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, 2h, 2w, c)."""
    x = upsample(x)
    return Conv(x.shape[-1], dtype=self.dtype, name="conv")(x) if self.use_conv else x


class ResBlock(nn.Module):
  """BigGAN's residual block. The embedding scales and shifts the second normalisation, or is added before it.

  If ``skip`` is true, the block consists of its skip path alone.
  """

  features: int
  dropout: int | float = 0.0
  use_scale_shift_norm: bool = False
  resample: str | None = None
  dtype: Any = jnp.float32
  skip: bool = False

  @nn.compact
  def __call__(self, x, emb, train):
    """Map (n, h, w, c) and (n, emb) to (n, h, w, features); ``resample`` "up" doubles the sides, "down" halves them."""
    resize = {"up": upsample, "down": downsample, None: lambda x: x}[self.resample]
    h = 0 if self.skip else self.residual(x, emb, train, resize)
    x = resize(x)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="skip_connection")(x)
    return x.astype(self.dtype) + h

  @nn.nowrap
  def residual(self, x, emb, train, resize):
    """Return the residual, which is added to the skip path."""
    h = GroupNorm(silu=True, name="in_layers_0")(x).astype(self.dtype)
    h = Conv(self.features, dtype=self.dtype, name="in_layers_2")(resize(h))
    width = 2 * self.features if self.use_scale_shift_norm else self.features
    emb = nn.Dense(width, dtype=self.dtype, name="emb_layers_1")(nn.silu(emb))[:, None, None]
    norm = GroupNorm(silu=True, name="out_layers_0")
    h = norm(h, jnp.split(emb, 2, axis=-1)) if self.use_scale_shift_norm else norm(h + emb)
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return Conv(self.features, kernel_init=zeros, dtype=self.dtype, name="out_layers_3")(h)


# Jitted by itself for the same reason as `_normalise`.
@functools.partial(jax.jit, static_argnames=("heads", "new_order", "perturbation", "sides", "cudnn"))
def attend(
  qkv: Float[Array, "n t qkv"],
  heads: int,
  new_order: bool,
  perturbation: Perturbation | None = None,
  sides: tuple[int, ...] = (),
  cudnn: bool = False,
) -> Float[Array, "n t c"]:
  """Apply multi-head self-attention, with the softmax in float32.

  Args:
    qkv: queries, keys and values, concatenated along the channels.
    heads: number of heads; it must divide a third of the channels.
    new_order: whether the channels are laid out (qkv, head, channel). If false, (head, qkv, channel), as in OpenAI's
      first release.
    perturbation: a perturbation of the attention, of kind ``identity`` or ``smooth``, or None.
    sides: (height, width) of the feature map. Only needed with a perturbation.
    cudnn: whether to use cuDNN's fused kernel on a GPU, which never stores the whole attention matrix.
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
    out = attend_heads(q, k, v, cudnn)
  return out.reshape(n, t, channels // 3)


# Jitted by itself for the same reason as `_normalise`.
@functools.partial(jax.jit, static_argnames="cudnn")
def attend_heads(
  q: Float[Array, "n queries heads c"], k: Float[Array, "n t heads c"], v: Float[Array, "n t heads c"], cudnn: bool
) -> Float[Array, "n t heads c"]:
  """Attend with given queries, keys and values, with the softmax in float32.

  Args:
    q: queries, as many as keys; or a single one, whose output every token gets.
    k: keys.
    v: values.
    cudnn: as for `attend`.
  """
  return jnp.broadcast_to(_attention(q, k, v, cudnn), v.shape)


def _attention(q, k, v, cudnn):
  backend = jax.default_backend()
  if backend == "cpu":
    return _attention_on_cpu(q, k, v)
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if cudnn and backend == "gpu" else "xla")


def _attention_on_cpu(q, k, v):
  """Compute ``jax.nn.dot_product_attention`` in half the time.

  XLA's CPU backend is fast only for batched products whose batch axes come first, so the head axis is moved to the
  front. If the attention matrix of a head is large (`ATTENTION_WEIGHTS`), heads are processed one by one, so that
  intermediate results stay in the cache; these are computed again for the gradient.
  """
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v))
  if q.shape[2] * k.shape[2] < ATTENTION_WEIGHTS:
    out = _weigh(q, k, v)
  else:
    heads = tuple(x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out = jax.lax.map(lambda head: jax.checkpoint(_weigh, prevent_cse=False)(*head), heads).reshape(q.shape)
  return out.transpose(0, 2, 1, 3)


def _weigh(q, k, v):
  """Attend with queries that are already scaled. The result is divided by the sum of the weights, not every weight."""
  logits = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32)
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
  total = weights.sum(-1, keepdims=True)
  return (jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total).astype(v.dtype)


def count_heads(channels: int, num_heads: int, num_head_channels: int) -> int:
  """Return the number of heads: ``num_heads`` if ``num_head_channels`` is -1, else channels / num_head_channels."""
  if num_head_channels != -1:
    if channels % num_head_channels:
      raise ValueError(
        f"num_head_channels {num_head_channels} must divide the {channels} channels that attend: give a divisor, such "
        f"as {math.gcd(num_head_channels, channels)}"
      )
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
  """CLIP's attention pooling (Radford et al. 2021): the mean of the pixels attends to itself and all pixels."""

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
