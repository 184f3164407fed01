"""Magnitude-preserving layers (Karras et al. 2024, arXiv:2312.02696, section 2 and appendix B), for NHWC images.

If the inputs of such a layer have the root mean square 1, its outputs have it too.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxguide.nn.convolution import convolve
from jaxguide.nn.layers import attend
from jaxguide.nn.parameters import parameter
from jaxguide.nn.perturbation import Perturbation
from jaxguide.nn.resampling import double, halve

EPSILON = 1e-4
"""What is added to a root mean square before it divides."""


def normalize(x, axis: int | Sequence[int] = -1):
  """Divide by the root mean square over some axes, plus `EPSILON` (eq. 66).

  >>> normalize(jnp.array([3.0, 3.0])).round(2).tolist()
  [1.0, 1.0]
  """
  return x / (EPSILON + root_mean_square(x, axis)).astype(x.dtype)


def root_mean_square(x, axis: int | Sequence[int] = -1):
  """Return the root mean square over some axes, which stay as axes of length 1, in float32 or what is wider."""
  wide = x.astype(np.promote_types(x.dtype, np.float32))
  square = jnp.square(wide).mean(axis, keepdims=True)
  # Without the condition the gradient of the root would be infinite at 0.
  return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def mp_silu(x):
  """Return SiLU, divided by its root mean square for standard normal inputs (eq. 81)."""
  return nn.silu(x) / 0.596


def mp_sum(a, b, t: float = 0.5):
  """Return a weighted sum that keeps magnitudes: ``((1 - t) a + t b) / √((1 - t)² + t²)`` (eq. 88).

  >>> round(float(mp_sum(jnp.asarray(1.0), jnp.asarray(1.0))), 4)
  1.4142
  """
  return (a + t * (b - a)) / math.hypot(1 - t, t)


def mp_cat(a, b, t: float = 0.5):
  """Concatenate channels, scaled so that ``a`` and ``b`` contribute in the proportion ``1 - t`` to ``t`` (eq. 103)."""
  na, nb = a.shape[-1], b.shape[-1]
  total = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
  return jnp.concatenate([total / math.sqrt(na) * (1 - t) * a, total / math.sqrt(nb) * t * b], -1)


class MPFourier(nn.Module):
  """Random Fourier features of magnitude 1 (eq. 75). Frequencies and phases are drawn once and not trained."""

  features: int

  @nn.compact
  def __call__(self, t):
    """Map (n,) to (n, features)."""

    def uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, 0, 2 * math.pi)

    freqs = parameter(self, "freqs", nn.initializers.normal(2 * math.pi), (self.features,))
    phases = parameter(self, "phases", uniform, (self.features,))
    return fourier(t, freqs, phases)


def fourier(t, freqs, phases):
  """Return ``√2 cos(freqs t + phases)``, (n, features), for times (n,)."""
  freqs, phases = (jax.lax.stop_gradient(leaf).astype(t.dtype) for leaf in (freqs, phases))
  return math.sqrt(2) * jnp.cos(jnp.outer(t, freqs) + phases[None])


class MPConv(nn.Module):
  """A convolution or dense layer without bias, whose kernel has magnitude 1 for each output (eq. 47, 54 and 66).

  Args:
    features: channels of the output.
    kernel_size: side of the kernel, odd; 0 for a dense layer, which is a 1x1 convolution too.
    dtype: type of the product.
  """

  features: int
  kernel_size: int = 0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, gain=1.0):
    """Map (..., c) to (..., features), multiplied by ``gain``."""
    shape = (*(self.kernel_size,) * (2 if self.kernel_size else 0), x.shape[-1], self.features)
    kernel = parameter(self, "kernel", nn.initializers.normal(1.0), shape)
    x = x.astype(self.dtype)
    # The factor of an output can multiply its weights or what they give for an image, whichever is less. In half
    # precision it multiplies the weights, which are rounded to that type anyway, so that nothing is rounded twice.
    factor = magnitude(kernel, gain)
    late = math.prod(kernel.shape[:-1]) > math.prod(x.shape[1:-1]) and jnp.finfo(self.dtype).bits >= 32
    kernel = (kernel if late else kernel * factor).astype(self.dtype)
    out = convolve(x, kernel) if self.kernel_size else x @ kernel
    return out * factor.reshape((1,) * (x.ndim - 1) + (-1,)).astype(out.dtype) if late else out


def forced(kernel):
  """Return a kernel in which the weights of each output have magnitude 1."""
  return normalize(kernel, tuple(range(kernel.ndim - 1)))


def magnitude(kernel, gain=1.0):
  """Return the factor (1, ..., c_out) that gives the weights of each output magnitude 1, over the root of their number.

  A layer with weights ``kernel * magnitude(kernel)`` keeps magnitudes (eq. 47).
  """
  norm = EPSILON + root_mean_square(kernel, tuple(range(kernel.ndim - 1)))
  return gain / math.sqrt(math.prod(kernel.shape[:-1])) / norm


class Block(nn.Module):
  """A magnitude-preserving residual block with attention if it has heads (figure 21 of the paper).

  Args:
    features: channels of the output.
    decoder: whether the block belongs to the decoder; otherwise its input is normalised for each pixel.
    heads: number of attention heads; 0 for a block without attention.
    resample: ``up`` doubles the sides, ``down`` halves them.
    resample_filter: the filter of the resampling.
    dropout: probability of dropping an activation in training.
    res_balance: share of the residual in its sum with the skip path.
    attn_balance: share of attention in its sum with the skip path.
    clip_act: activations are clipped to this magnitude; None for no clipping.
    dtype: type of convolutions and matrix products.
    perturbation: makes the block worse on purpose, or None.
    cudnn_attention: whether to use cuDNN's kernel on a GPU. Default: where it can.
  """

  features: int
  decoder: bool
  heads: int = 0
  resample: str | None = None
  resample_filter: Sequence[int | float] = (1, 1)
  dropout: int | float = 0.0
  res_balance: float = 0.3
  attn_balance: float = 0.3
  clip_act: int | float | None = 256
  dtype: Any = jnp.float32
  perturbation: Perturbation | None = None
  cudnn_attention: bool | None = None

  @nn.compact
  def __call__(self, x, emb, train):
    """Map (n, h, w, c) and (n, emb) to (n, h, w, features), with the sides doubled or halved by ``resample``."""
    if self.resample is not None:
      x = (double if self.resample == "up" else halve)(x, self.resample_filter)
    skip = x
    if x.shape[-1] != self.features:
      skip = MPConv(self.features, dtype=self.dtype, name="conv_skip")(x)
    if not self.decoder:
      skip = x = normalize(skip)
    if self.perturbation is not None and self.perturbation.kind == "skip":
      return skip
    x = mp_sum(skip, self.residual(x, emb, train), self.res_balance)
    if self.heads:
      x = mp_sum(x, self.attention(x), self.attn_balance)
    return x if self.clip_act is None else jnp.clip(x, -self.clip_act, self.clip_act)

  @nn.nowrap
  def residual(self, x, emb, train):
    """Return the residual."""
    h = MPConv(self.features, 3, self.dtype, name="conv_res0")(mp_silu(x))
    gain = parameter(self, "emb_gain", nn.initializers.zeros, ())
    factor = MPConv(self.features, dtype=emb.dtype, name="emb_linear")(emb, gain) + 1
    h = mp_silu(h * factor[:, None, None].astype(h.dtype))
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return MPConv(self.features, 3, self.dtype, name="conv_res1")(h)

  @nn.nowrap
  def attention(self, x):
    """Return self-attention over the pixels, with queries, keys and values of magnitude 1."""
    n, h, w, c = x.shape
    qkv = MPConv(3 * c, dtype=self.dtype, name="attn_qkv")(x).reshape(n, h * w, 3 * self.heads, -1)
    qkv = normalize(qkv).reshape(n, h * w, 3 * c)
    out = attend(qkv, self.heads, True, self.perturbation, (h, w), self.cudnn_attention)
    return MPConv(c, dtype=self.dtype, name="attn_proj")(out).reshape(x.shape)
