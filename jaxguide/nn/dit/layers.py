"""The parts of DiT, SiT, REPA's SiT and LightningDiT: embedders, the adaLN-zero block and the last layer.

Submodules have the names of the published checkpoints with underscores instead of dots. Parameters and normalisation
are float32; ``dtype`` is the type of matrix products and of the tokens between blocks.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide.nn.dit.positions import rotate
from jaxguide.nn.layers import QKV, attend_heads, zeros
from jaxguide.nn.parameters import parameter
from jaxguide.nn.perturbation import Perturbation, smooth

xavier = nn.initializers.xavier_uniform()
small = nn.initializers.normal(0.02)

FREQUENCIES = 256
"""The number of sines and cosines that a time is embedded in."""


def flat_xavier(key, shape, dtype):
  """Xavier's initialisation of a patch embedding, whose kernel counts as a matrix (patch and channels, features)."""
  return xavier(key, (shape[0] * shape[1] * shape[2], shape[3]), dtype).reshape(shape)


class PatchEmbedder(nn.Module):
  """Cut an image into square patches, and map each to a token."""

  features: int
  patch_size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h / patch * w / patch, features)."""
    return _Patches(self.features, self.patch_size, self.dtype, name="proj")(x)


class _Patches(nn.Module):
  """A convolution whose stride is its kernel's side, as one matrix product."""

  features: int
  patch_size: int
  dtype: Any

  @nn.compact
  def __call__(self, x):
    n, h, w, c = x.shape
    p = self.patch_size
    kernel = parameter(self, "kernel", flat_xavier, (p, p, c, self.features))
    bias = parameter(self, "bias", zeros, (self.features,))
    tokens = x.reshape(n, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, p * p * c)
    return (
      tokens.astype(self.dtype) @ kernel.reshape(-1, self.features).astype(self.dtype)
      + bias.astype(self.dtype)[None, None]
    )


class TimestepEmbedder(nn.Module):
  """Map a time to a vector: 256 cosines and sines, and two linear layers.

  The periods grow geometrically from ``2 pi`` to ``2 pi 1e4``. The longest belongs to number 128, which the table does
  not have; with ``freq_shift`` 1, as in diffusers, it is that of the last number, 127.
  """

  features: int
  freq_shift: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, t):
    """Map (n,) to (n, features)."""
    half = FREQUENCIES // 2
    frequencies = 1e4 ** (-jnp.arange(half, dtype=jnp.float32) / (half - self.freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], 1)
    dense = functools.partial(nn.Dense, self.features, dtype=self.dtype, kernel_init=small)
    return dense(name="mlp_2")(nn.silu(dense(name="mlp_0")(waves)))


class LabelEmbedder(nn.Module):
  """Look up the vector of a label; the last one means "no label"."""

  labels: int
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, y):
    """Map (n,) to (n, features)."""
    table = nn.Embed(self.labels, self.features, embedding_init=small, dtype=self.dtype, name="embedding_table")
    return table(y)


# Jitted by itself, so that it is traced, differentiated and lowered once per shape and not once per block.
@functools.partial(jax.jit, static_argnames=("rms", "eps", "dtype"))
@functools.partial(jax.checkpoint, static_argnums=(4, 5, 6))
def _modulated(x, weight, shift, scale, rms, eps, dtype):
  x = x.astype(jnp.float32)
  if not rms:
    x = x - x.mean(-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
  factor = 1 + scale.astype(jnp.float32)
  if weight is not None:
    factor = factor * weight[None]
  x = x * factor[:, None]
  return (x if shift is None else x + shift.astype(jnp.float32)[:, None]).astype(dtype)


class ModulatedNorm(nn.Module):
  """Normalise each token, multiply it by ``1 + scale`` and add ``shift``.

  It is layer normalisation without parameters, or with ``rms`` RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) with a
  weight.
  """

  rms: bool = False
  eps: float | int = 1e-6
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, shift, scale):
    """Map (n, t, c), with (n, c) shift or None and (n, c) scale, to (n, t, c)."""
    weight = parameter(self, "scale", nn.initializers.ones, x.shape[-1:]) if self.rms else None
    return _modulated(x, weight, shift, scale, self.rms, self.eps, self.dtype)


class Attention(nn.Module):
  """Multi-head self-attention over tokens.

  Args:
    num_heads: number of heads.
    qkv_bias: whether queries, keys and values have a bias.
    qk_norm: how each head's queries and keys are normalised, ``layer`` (with weight and bias, eps 1e-5), ``rms`` or "".
    dtype: type of matrix products.
    perturbation: one of kind ``identity`` or ``smooth``, or None. As in diffusers, ``smooth`` blurs the queries before
      they are normalised and turned.
    cudnn_attention: whether to use cuDNN's kernel on a GPU. Default: where it can.
  """

  num_heads: int
  qkv_bias: bool = True
  qk_norm: str = ""
  dtype: Any = jnp.float32
  perturbation: Perturbation | None = None
  cudnn_attention: bool | None = None

  @nn.compact
  def __call__(self, x, sides, rope=None):
    """Map (n, t, c) to the same shape.

    Args:
      x: tokens.
      sides: (height, width) of the tokens.
      rope: cosines and sines, each (t, c / heads), or None.
    """
    n, t, c = x.shape
    of_heads = QKV(self.num_heads, True, self.qkv_bias, xavier, self.dtype, name="qkv")
    q, k, v = of_heads(x)
    perturbation = self.perturbation
    if perturbation is not None and perturbation.kind == "smooth":
      q = smooth(q.reshape(n, *sides, *q.shape[2:]), perturbation.width).reshape(n, -1, *q.shape[2:])
    if self.qk_norm == "layer":
      norm = functools.partial(nn.LayerNorm, 1e-5, use_fast_variance=False)
      q, k = norm(name="q_norm")(q).astype(v.dtype), norm(name="k_norm")(k).astype(v.dtype)
    elif self.qk_norm == "rms":
      q, k = nn.RMSNorm(name="q_norm")(q).astype(v.dtype), nn.RMSNorm(name="k_norm")(k).astype(v.dtype)
    if rope is not None:
      q, k = rotate(q, *rope), rotate(k, *rope)
    identity = perturbation is not None and perturbation.kind == "identity"
    out = v if identity else attend_heads(q, k, v, self.cudnn_attention)
    return nn.Dense(c, dtype=self.dtype, kernel_init=xavier, name="proj")(out.reshape(n, t, c))


# For the gradient, jax.checkpoint computes what is between two matrix products again from what the first one gave. On a
# CPU this takes less time than to store two or three more arrays of that size in memory that was not used before.
@jax.jit
@jax.checkpoint
def _gelu(x):
  return nn.gelu(x, approximate=True)


@jax.jit
@jax.checkpoint
def _gated(x):
  gate, x = jnp.split(x, 2, -1)
  return nn.silu(gate) * x


class Mlp(nn.Module):
  """Two linear layers with GELU, in its approximation by tanh, between them."""

  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, t, c) to the same shape."""
    h = _gelu(nn.Dense(self.hidden, dtype=self.dtype, kernel_init=xavier, name="fc1")(x))
    return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name="fc2")(h)


class SwiGLU(nn.Module):
  """A gated layer, ``w3(silu(w1 x) * w2 x)`` (Shazeer 2020, arXiv:2002.05202); ``w12`` holds both of the first."""

  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    """Map (n, t, c) to the same shape."""
    h = _gated(nn.Dense(2 * self.hidden, dtype=self.dtype, kernel_init=xavier, name="w12")(x))
    return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=xavier, name="w3")(h)


def mlp_width(hidden_size: int, mlp_ratio: float | int, swiglu: bool) -> int:
  """Return the hidden width of a block's last layers; a gated one has two thirds, which is the same work.

  >>> mlp_width(32, 4.0, False), mlp_width(32, 4.0, True)
  (128, 85)
  """
  width = int(hidden_size * mlp_ratio)
  return int(2 / 3 * width) if swiglu else width


class Block(nn.Module):
  """The adaLN-zero block (Peebles & Xie 2023, arXiv:2212.09748, figure 3): attention, and then a layer for each token.

  A vector sets shift, scale and gate of both parts. All are 0 at initialisation, so that the block does nothing.

  Args:
    num_heads: number of attention heads.
    mlp_width: hidden width of the second part.
    qkv_bias: whether queries, keys and values have a bias.
    qk_norm: as for `Attention`.
    swiglu: whether the second part is gated.
    rmsnorm: whether tokens are normalised by RMSNorm.
    wo_shift: whether there is no shift.
    norm_eps: the number that the second normalisation adds to the variance.
    dtype: type of matrix products.
    perturbation: a perturbation, or None. ``skip`` leaves the whole block out.
    cudnn_attention: whether to use cuDNN's kernel on a GPU. Default: where it can.
  """

  num_heads: int
  mlp_width: int
  qkv_bias: bool = True
  qk_norm: str = ""
  swiglu: bool = False
  rmsnorm: bool = False
  wo_shift: bool = False
  norm_eps: float | int = 1e-6
  dtype: Any = jnp.float32
  perturbation: Perturbation | None = None
  cudnn_attention: bool | None = None

  @nn.compact
  def __call__(self, x, c, sides, rope=None):
    """Map (n, t, features) tokens, with the (n, features) vector ``c``, to the same shape."""
    if self.perturbation is not None and self.perturbation.kind == "skip":
      return x
    parts = 4 if self.wo_shift else 6
    vectors: list[Any] = jnp.split(modulation(c, parts, self.dtype), parts, -1)
    if self.wo_shift:
      vectors = [None, *vectors[:2], None, *vectors[2:]]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = vectors
    norm = functools.partial(ModulatedNorm, self.rmsnorm, dtype=self.dtype)
    attention = Attention(
      self.num_heads,
      self.qkv_bias,
      self.qk_norm,
      self.dtype,
      self.perturbation,
      self.cudnn_attention,
      name="attn",
    )
    x = x + gate[:, None] * attention(norm(name="norm1")(x, shift, scale), sides, rope)
    mlp = (SwiGLU if self.swiglu else Mlp)(self.mlp_width, self.dtype, name="mlp")
    return x + gate_mlp[:, None] * mlp(norm(eps=self.norm_eps, name="norm2")(x, shift_mlp, scale_mlp))


def modulation(c, parts, dtype):
  """Return the vectors that modulate a block, concatenated; to be called within a module."""
  return nn.Dense(parts * c.shape[-1], dtype=dtype, kernel_init=zeros, name="adaLN_modulation_1")(nn.silu(c))


class FinalLayer(nn.Module):
  """Normalise and modulate tokens, and map each to the numbers of its patch."""

  features: int
  rmsnorm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, c):
    """Map (n, t, c) to (n, t, features)."""
    shift, scale = jnp.split(modulation(c, 2, self.dtype), 2, -1)
    x = ModulatedNorm(self.rmsnorm, dtype=self.dtype, name="norm_final")(x, shift, scale)
    return nn.Dense(self.features, dtype=self.dtype, kernel_init=zeros, name="linear")(x)


def to_image(tokens, sides, patch_size):
  """Put patches together: (n, t, patch * patch * c) to (n, height * patch, width * patch, c)."""
  n, p = tokens.shape[0], patch_size
  patches = tokens.reshape(n, *sides, p, p, -1)
  return patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, sides[0] * p, sides[1] * p, -1)
