"""The blocks of Dhariwal & Nichol's networks (arXiv:2105.05233, section 3 and appendix A), for NHWC images.

Submodules have the names of the published checkpoints with underscores instead of dots, so that weights are converted
by renaming. Parameters and normalisation are float32; ``dtype`` is the type of convolutions and matrix products.
"""

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core.typing import Array, Float
from jaxguide.nn.convolution import convolve
from jaxguide.nn.normalisation import GroupNorm, along_channels
from jaxguide.nn.parameters import parameter
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
    kernel = parameter(self, "kernel", self.kernel_init, shape)
    bias = parameter(self, "bias", self.bias_init, (self.features,))
    out = convolve(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
    return out + along_channels(bias.astype(self.dtype), out)


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
    """Map (n, h, w, c) and (n, emb) to (n, h, w, features); ``resample`` "up" doubles the sides, "down" halves them.

    ``x`` may be a tuple of arrays, whose channels are concatenated.
    """
    parts = x if isinstance(x, tuple) else (x,)
    x = jnp.concatenate(parts, -1)
    if jax.default_backend() != "gpu":  # Elsewhere the concatenated array is there in any case.
      parts = (x,)
    resize = {"up": upsample, "down": downsample, None: lambda x: x}[self.resample]
    h = 0 if self.skip else self.residual(x, emb, train, resize)
    if x.shape[-1] != self.features:
      x = JoinedDense(self.features, self.dtype, name="skip_connection")(tuple(map(resize, parts)))
    else:
      x = resize(x)
    return x.astype(self.dtype) + h

  @nn.nowrap
  def residual(self, x, emb, train, resize):
    """Return the residual, which is added to the skip path."""
    h = GroupNorm(silu=True, dtype=self.dtype, name="in_layers_0")(x)
    h = Conv(self.features, dtype=self.dtype, name="in_layers_2")(resize(h))
    width = 2 * self.features if self.use_scale_shift_norm else self.features
    emb = nn.Dense(width, dtype=self.dtype, name="emb_layers_1")(nn.silu(emb))[:, None, None]
    norm = GroupNorm(silu=True, dtype=self.dtype, name="out_layers_0")
    h = norm(h, jnp.split(emb, 2, axis=-1)) if self.use_scale_shift_norm else norm(h + emb)
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return Conv(self.features, kernel_init=zeros, dtype=self.dtype, name="out_layers_3")(h)


class JoinedDense(nn.Module):
  """A linear layer of the channels of several arrays. Each is multiplied with its part of the kernel.

  On a GPU this saves to write the concatenated array.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, parts):
    """Map a tuple of (..., c) to (..., features)."""
    widths = [part.shape[-1] for part in parts]
    kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), (sum(widths), self.features))
    bias = parameter(self, "bias", zeros, (self.features,))
    kernels = jnp.split(kernel.astype(self.dtype), list(itertools.accumulate(widths[:-1])))
    first, *others = (part.astype(self.dtype) @ rows for part, rows in zip(parts, kernels, strict=True))
    out = sum(others, first)
    return out + along_channels(bias.astype(self.dtype), out)


class QKV(nn.Module):
  """Queries, keys and values of all heads, by one linear layer.

  Args:
    heads: number of heads; it must divide the channels.
    new_order: whether the layer's channels are laid out (qkv, head, channel). If false, (head, qkv, channel), as in
      OpenAI's first release.
    use_bias: whether there is a bias.
    kernel_init: how the kernel is initialised.
    dtype: type of the product.
    bias_init: how the bias is initialised.

  On a GPU the three are separate products with parts of the kernel, since an attention kernel takes them as separate
  arrays. To cut them out of one product would take as many bytes again.
  """

  heads: int
  new_order: bool = True
  use_bias: bool = True
  kernel_init: Any = nn.initializers.lecun_normal()
  dtype: Any = jnp.float32
  bias_init: Any = zeros

  @nn.compact
  def __call__(self, x):
    """Map (n, t, c) to three arrays (n, t, heads, c / heads)."""
    n, t, c = x.shape
    kernel = parameter(self, "kernel", self.kernel_init, (c, 3 * c)).astype(self.dtype)
    bias = parameter(self, "bias", self.bias_init, (3 * c,)).astype(self.dtype) if self.use_bias else None
    x = x.astype(self.dtype)
    if jax.default_backend() != "gpu":
      out = x @ kernel
      return split_heads(out if bias is None else out + along_channels(bias, out), self.heads, self.new_order)
    kernels = split_heads(kernel, self.heads, self.new_order)
    outs = [x @ part.reshape(c, c) for part in kernels]
    if bias is not None:
      outs = [
        out + along_channels(part.ravel(), out)
        for out, part in zip(outs, split_heads(bias, self.heads, self.new_order), strict=True)
      ]
    return tuple(out.reshape(n, t, self.heads, -1) for out in outs)


def split_heads(qkv: Float[Array, "*n qkv"], heads: int, new_order: bool) -> tuple[Float[Array, "*n heads c"], ...]:
  """Split the channels of queries, keys and values, and the heads of each; see `QKV` for the order."""
  order = (3, heads) if new_order else (heads, 3)
  return tuple(jnp.moveaxis(qkv.reshape(*qkv.shape[:-1], *order, -1), -3 if new_order else -2, 0))


def attend_to(
  q: Float[Array, "n t heads c"],
  k: Float[Array, "n t heads c"],
  v: Float[Array, "n t heads c"],
  perturbation: Perturbation | None = None,
  sides: tuple[int, ...] = (),
  cudnn: bool | None = None,
) -> Float[Array, "n t hc"]:
  """Apply multi-head self-attention, with the softmax in float32; the heads are concatenated.

  Args:
    q: queries.
    k: keys.
    v: values.
    perturbation: a perturbation of the attention, of kind ``identity`` or ``smooth``, or None.
    sides: (height, width) of the feature map. Only needed with a perturbation.
    cudnn: whether to use cuDNN's fused kernel on a GPU, which never stores the whole attention matrix. Default: where
      it can (`fits_cudnn`).
  """
  if perturbation is not None and perturbation.kind == "identity":
    out = v
  else:
    if perturbation is not None:
      # Of an infinite width it is one query, the mean.
      q = smooth(q.reshape(len(q), *sides, *q.shape[2:]), perturbation.width).reshape(len(q), -1, *q.shape[2:])
    out = attend_heads(q, k, v, cudnn)
  return out.reshape(*out.shape[:2], -1)


# Jitted by itself for the same reason as `jaxguide.nn.normalisation.group_norm`.
@functools.partial(jax.jit, static_argnames=("heads", "new_order", "perturbation", "sides", "cudnn"))
def attend(
  qkv: Float[Array, "n t qkv"],
  heads: int,
  new_order: bool,
  perturbation: Perturbation | None = None,
  sides: tuple[int, ...] = (),
  cudnn: bool | None = False,
) -> Float[Array, "n t c"]:
  """Apply multi-head self-attention, with the softmax in float32.

  Args:
    qkv: queries, keys and values, concatenated along the channels.
    heads: number of heads; it must divide a third of the channels.
    new_order: whether the channels are laid out (qkv, head, channel). If false, (head, qkv, channel), as in OpenAI's
      first release.
    perturbation: a perturbation of the attention, of kind ``identity`` or ``smooth``, or None.
    sides: (height, width) of the feature map. Only needed with a perturbation.
    cudnn: whether to use cuDNN's fused kernel on a GPU, which never stores the whole attention matrix; None
      for wherever it can be (`fits_cudnn`).
  """
  q, k, v = split_heads(qkv, heads, new_order)
  return attend_to(q, k, v, perturbation, sides, cudnn)


# Jitted by itself for the same reason as `jaxguide.nn.normalisation.group_norm`.
@functools.partial(jax.jit, static_argnames="cudnn")
def attend_heads(
  q: Float[Array, "n queries heads c"],
  k: Float[Array, "n t heads c"],
  v: Float[Array, "n t heads c"],
  cudnn: bool | None = None,
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
  fused = backend == "gpu" and (fits_cudnn(q, k) if cudnn is None else cudnn)
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else "xla")


def fits_cudnn(q: Float[Array, "n queries heads c"], k: Float[Array, "n t heads c"]) -> bool:
  """Return whether this process has a GPU whose fused attention by cuDNN takes these arrays.

  It takes half precision, heads whose channels are a multiple of 8 and at most 128, and an NVIDIA GPU of compute
  capability 8 (Ampere) or more.
  """
  try:
    capable = float(getattr(jax.devices()[0], "compute_capability", 0)) >= 8
  except ValueError:  # It is not NVIDIA's.
    return False
  half = q.dtype in (jnp.bfloat16, jnp.float16)
  return capable and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and q.shape[1] == k.shape[1]


def check_cudnn(module: Any) -> None:
  """Raise ValueError if a network demands cuDNN's attention with a type that it does not take.

  Args:
    module: the network, with the fields ``cudnn_attention`` and ``dtype``.
  """
  if module.cudnn_attention and jnp.dtype(module.dtype) not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"cudnn_attention needs half precision: give {type(module).__name__} dtype bfloat16 with it, or leave it out; "
      f"got {jnp.dtype(module.dtype)}"
    )


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
  cudnn_attention: bool | None = None

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to the same shape."""
    if self.perturbation is not None and self.perturbation.kind == "skip":
      return x
    n, h, w, c = x.shape
    heads = count_heads(c, self.num_heads, self.num_head_channels)
    normed = GroupNorm(dtype=self.dtype, name="norm")(x).reshape(n, h * w, c)
    q, k, v = QKV(heads, self.use_new_attention_order, dtype=self.dtype, name="qkv")(normed)
    out = attend_to(q, k, v, self.perturbation, (h, w), self.cudnn_attention)
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
    position = parameter(self, "positional_embedding", nn.initializers.normal(c**-0.5), (h * w + 1, c))
    x += position[None]
    qkv = nn.Dense(3 * c, name="qkv_proj")(x)
    out = attend(qkv, count_heads(c, 1, self.num_head_channels), new_order=True)
    return nn.Dense(self.features, name="c_proj")(out[:, 0])
