"""Group normalisation, in the form that suits the device.

Normalisation takes little arithmetic, so its time is that of reading and writing arrays. There are two forms:

**Two passes for the statistics**, in float32 and on CPUs: the mean, and then the mean square of what is left.

**One pass for the statistics**, for half precision on GPUs and TPUs: the mean and the mean square at once. The rounding
error of their difference is below that of the input, which has 8 or 11 bits. Forward, x is read twice and the result is
written once. Backward, x and the cotangent are read twice, and the gradient is written once. Nothing of the size of x
is stored in float32. JAX's own gradient of the same formula would store the product of the cotangent and SiLU's
derivative in float32, since both the sums over the pixels and the result take it. The rule below gives each of them its
own copy, which is computed again from x.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

STATISTICS = "group statistics"
"""The name under which `jax.checkpoint` keeps mean and deviation of each group."""


class GroupNorm(nn.Module):
  """Group normalisation (Wu & He 2018) in float32, optionally followed by SiLU.

  Args:
    silu: whether SiLU follows.
    groups: number of groups, which divides the channels. Default: gcd(32, channels).
    epsilon: what is added to the variance.
    dtype: type of the result.
  """

  silu: bool = False
  groups: int | None = None
  epsilon: float = 1e-5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, scale_shift=None):
    """Normalise (n, ..., c) over pixels and groups, then multiply by 1 + scale and add shift."""
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    groups = math.gcd(32, channels) if self.groups is None else self.groups
    one_pass = jax.default_backend() != "cpu" and jnp.finfo(x.dtype).bits < 32
    args = (x, scale, bias, scale_shift, self.silu, groups, self.epsilon)
    return in_one_pass(*args, self.dtype) if one_pass else in_two_passes(*args).astype(self.dtype)


# Jitted by itself, so that it is traced, differentiated and lowered once per shape and not once per block. XLA inlines
# the calls. jax.checkpoint computes it again for the gradient: to store x alone takes less memory than to store the
# intermediate results, and on a CPU less time.
@functools.partial(jax.jit, static_argnames=("silu", "groups", "epsilon"))
@functools.partial(jax.checkpoint, static_argnums=(4, 5, 6))
def in_two_passes(x, scale, bias, scale_shift, silu, groups, epsilon):
  """Normalise with the mean and then the variance, each per channel and then averaged over the channels of a group.

  On a CPU this takes half the time of one reduction over reshaped groups, and it avoids the rounding error of a
  difference of squares.
  """
  x = x.astype(jnp.float32)
  centred = x - _to_channels(_group_means(x, groups), x)
  variance = _group_means(jnp.square(centred), groups)
  scale, bias = along_channels(scale, x), along_channels(bias, x)
  out = centred * (_to_channels(jax.lax.rsqrt(variance + epsilon), x) * scale) + bias
  if scale_shift is not None:
    out = out * (1 + scale_shift[0]).astype(jnp.float32) + scale_shift[1].astype(jnp.float32)
  return nn.silu(out) if silu else out


# x and the statistics are kept for the gradient, the rest is computed again.
@functools.partial(jax.jit, static_argnames=("silu", "groups", "epsilon", "dtype"))
@functools.partial(
  jax.checkpoint, static_argnums=(4, 5, 6, 7), policy=jax.checkpoint_policies.save_only_these_names(STATISTICS)
)
def in_one_pass(x, scale, bias, scale_shift, silu, groups, epsilon, dtype):
  """Normalise with the mean and the mean square of each group."""
  scale, bias = along_channels(scale, x), along_channels(bias, x)
  if scale_shift is not None:
    factor = (1 + scale_shift[0]).astype(jnp.float32)
    scale, bias = scale * factor, bias * factor + scale_shift[1].astype(jnp.float32)
  return _normalise(x, scale, bias, silu, groups, epsilon, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def _normalise(x, scale, bias, silu, groups, epsilon, dtype):
  mean, inverse = _statistics(x, groups, epsilon)
  out = (x.astype(jnp.float32) - mean) * inverse * scale + bias
  return (nn.silu(out) if silu else out).astype(dtype)


@_normalise.defjvp
def _tangent(silu, groups, epsilon, dtype, primals, tangents):
  """Give the derivative such that its transpose takes one pass for the sums over the pixels and one for the rest."""
  (x, scale, bias), (x_dot, scale_dot, bias_dot) = primals, tangents
  mean, inverse = _statistics(x, groups, epsilon)

  def derived(x):
    normed = (x.astype(jnp.float32) - mean) * inverse
    before = normed * scale + bias
    if not silu:
      return normed, before, 1.0
    sigmoid = jax.nn.sigmoid(before)
    return normed, before * sigmoid, sigmoid * (1 + before * (1 - sigmoid))

  normed, out, slope = derived(x)
  copies = jax.lax.optimization_barrier((x, x))
  _, _, slope_of_bias = derived(copies[0])
  copy, _, slope_of_scale = derived(copies[1])
  x_dot = x_dot.astype(jnp.float32)
  factor = scale * inverse
  # The derivatives of mean and deviation, for each channel.
  mean_dot = _to_channels(_group_means(x_dot, groups), x)
  turned = _to_channels(_group_means(normed * x_dot, groups), x)
  out_dot = slope * (factor * x_dot)
  out_dot += slope_of_bias * _spread(bias_dot - factor * mean_dot, x)
  out_dot += slope_of_scale * copy * _spread(scale_dot - factor * turned, x)
  return out.astype(dtype), out_dot.astype(dtype)


def _spread(per_channel, like):
  """Broadcast (n, 1, ..., c) along the first axis of pixels, in a way that keeps the transpose in two stages.

  The transpose is a sum over all pixels. XLA fuses what is summed into a sum along one axis. Into a sum along both axes
  it does not: it stores what is summed in float32.
  """
  if like.ndim < 4:
    return per_channel
  shape = (*per_channel.shape[:1], like.shape[1], *per_channel.shape[2:])
  return jax.lax.optimization_barrier(jnp.broadcast_to(per_channel, shape))


def _statistics(x, groups, epsilon):
  """Return the mean and the inverse of the deviation of each group, for each channel."""
  x = x.astype(jnp.float32)
  mean, square = _group_means(x, groups), _group_means(jnp.square(x), groups)
  inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + epsilon)
  return tuple(_to_channels(checkpoint_name(value, STATISTICS), x) for value in (mean, inverse))


def _group_means(x, groups):
  """Average (n, ..., c) over the pixels, and then over the channels of each group: (n, groups)."""
  # Height and width are not merged into one axis: under a vmap over single images, XLA's CPU backend takes 14 times as
  # long for a sum of products over a merged axis, and the gradient has such sums.
  return x.mean(tuple(range(1, x.ndim - 1))).reshape(-1, groups, x.shape[-1] // groups).mean(2)


def _to_channels(per_group, like):
  """Repeat each group's value for all channels of the group, and add axes so that it broadcasts with (n, ..., c).

  On a CPU this is a matrix product: XLA would fuse a `jnp.repeat` into the loop over pixels, which is then not
  vectorised.
  """
  size = like.shape[-1] // per_group.shape[1]
  if jax.default_backend() != "cpu":
    per_channel = jnp.repeat(per_group, size, axis=1)
  else:
    per_channel = per_group @ jnp.repeat(jnp.eye(per_group.shape[1]), size, axis=1)
  return jnp.expand_dims(per_channel, tuple(range(1, like.ndim - 1)))


def along_channels(per_channel, like):
  """Add leading axes to (c,) so that it broadcasts with ``like`` of shape (..., c)."""
  return jax.lax.expand_dims(per_channel, range(like.ndim - 1))
