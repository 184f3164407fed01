"""Group normalisation, with statistics and a gradient that suit the device.

Normalisation takes little arithmetic, so its time is that of reading and writing arrays. There are two forms of the
statistics:

**Two passes**, in float32 and on CPUs: the mean, and then the mean square of what is left.

**One pass**, for half precision on GPUs and TPUs: the mean and the mean square at once. The rounding error of their
difference is below that of the input, which has 8 or 11 bits. Forward, x is read twice and the result is written once.

The gradient keeps x and the statistics, and computes the rest again. On a GPU x and the cotangent are read twice, and
the gradient is written once. Nothing of the size of x is stored in float32. JAX's own gradient of the same formula
would store the product of the cotangent and SiLU's derivative in float32, since both the sums over the pixels and the
result take it. Each of them has its own copy of x here, from which it computes this product.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide.nn import linear
from jaxguide.nn.parameters import parameter


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
    """Normalise (n, ..., c) over pixels and groups, then multiply by 1 + scale and add shift, both (n, 1, ..., c)."""
    channels = x.shape[-1]
    scale = parameter(self, "scale", nn.initializers.ones, (channels,))
    bias = parameter(self, "bias", nn.initializers.zeros, (channels,))
    groups = math.gcd(32, channels) if self.groups is None else self.groups
    return group_norm(x, scale, bias, scale_shift, self.silu, groups, self.epsilon, self.dtype)


# Jitted by itself, so that it is traced, differentiated and lowered once per shape and not once per block. XLA inlines
# the calls.
@functools.partial(jax.jit, static_argnames=("silu", "groups", "epsilon", "dtype"))
def group_norm(x, scale, bias, scale_shift, silu, groups, epsilon, dtype):
  """Normalise x, scale and shift it by the parameters, and then as ``scale_shift`` says; see `GroupNorm`."""
  scale, bias = (along_channels(each.astype(jnp.float32), x) for each in (scale, bias))
  if scale_shift is not None:
    factor = (1 + scale_shift[0]).astype(jnp.float32)
    scale, bias = scale * factor, bias * factor + scale_shift[1].astype(jnp.float32)
  # Inside shard_map JAX tracks which mesh axes a value varies over, and `linear`'s primitive has no rule for that.
  plain = jax.sharding.get_abstract_mesh().manual_axes
  normalise = jax.checkpoint(_normalise, static_argnums=(3, 4, 5, 6)) if plain else _with_gradient
  return normalise(x, scale, bias, silu, groups, epsilon, dtype)


def _normalise(x, scale, bias, silu, groups, epsilon, dtype):
  mean, inverse = _statistics(x, groups, epsilon)
  return _scaled(x, mean, inverse, scale, bias, silu, dtype)


_with_gradient = jax.custom_jvp(_normalise, nondiff_argnums=(3, 4, 5, 6))


@_with_gradient.defjvp
def _jvp(silu, groups, epsilon, dtype, primals, tangents):
  x, scale, bias = primals
  mean, inverse = _statistics(x, groups, epsilon)
  derivative = linear.Linear(_derivative, _gradient, (silu, groups, dtype))
  out = _scaled(x, mean, inverse, scale, bias, silu, dtype)
  return out, linear.apply(derivative, (x, mean, inverse, scale, bias), tangents)


def _statistics(x, groups, epsilon):
  """Return the mean and the inverse of the deviation of each group, for each channel."""
  one_pass = jax.default_backend() != "cpu" and jnp.finfo(x.dtype).bits < 32
  x = x.astype(jnp.float32)
  of_groups = _group_means(x, groups)
  mean = _to_channels(of_groups, x)
  if one_pass:
    variance = jnp.maximum(_group_means(jnp.square(x), groups) - jnp.square(of_groups), 0)
  else:
    variance = _group_means(jnp.square(x - mean), groups)
  return mean, _to_channels(jax.lax.rsqrt(variance + epsilon), x)


def _scaled(x, mean, inverse, scale, bias, silu, dtype):
  out = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
  return (nn.silu(out) if silu else out).astype(dtype)


def _normed_and_slope(x, mean, inverse, scale, bias, silu):
  """Return what is scaled, and SiLU's derivative."""
  normed = (x.astype(jnp.float32) - mean) * inverse
  if not silu:
    return normed, 1.0
  before = normed * scale + bias
  sigmoid = jax.nn.sigmoid(before)
  return normed, sigmoid * (1 + before * (1 - sigmoid))


def _derivative(residuals, tangents, silu, groups, dtype):
  """Return the tangent of `_normalise` for those of x, scale and bias."""
  x, mean, inverse, scale, bias = residuals
  x_dot, scale_dot, bias_dot = tangents
  normed, slope = _normed_and_slope(x, mean, inverse, scale, bias, silu)
  means = lambda values: _to_channels(_group_means(values, groups), x)  # noqa: E731
  x_dot = x_dot.astype(jnp.float32)
  normed_dot = inverse * (x_dot - means(x_dot) - normed * means(normed * x_dot))
  return (slope * (scale * normed_dot + scale_dot * normed + bias_dot)).astype(dtype)


def _gradient(residuals, cotangent, silu, groups, dtype):
  """Transpose `_derivative`: one pass for the sums over the pixels, and one for the gradient of x."""
  del dtype
  x, mean, inverse, scale, bias = residuals
  cotangent = cotangent.astype(jnp.float32)
  rest = linear.after(cotangent, mean), inverse, scale, bias, silu
  copies = _barrier((x, x))
  _, slope = _normed_and_slope(copies[0], *rest)
  of_bias = _sum_pixels(cotangent * slope)
  normed, slope = _normed_and_slope(copies[1], *rest)
  of_scale = _sum_pixels(cotangent * slope * normed)
  # For each group, the mean of the gradient of what is normalised, and of its product with what is normalised.
  pixels = math.prod(x.shape[1:-1])
  first, second = (_to_channels(_group_means(scale * each, groups), x) / pixels for each in (of_bias, of_scale))
  normed, slope = _normed_and_slope(x, *rest)
  of_x = inverse * (scale * (cotangent * slope) - first - normed * second)
  alone = scale.shape[0] == 1
  of_parameters = (each.sum(0, keepdims=True) if alone else each for each in (of_scale, of_bias))
  return of_x.astype(x.dtype), *of_parameters


def _sum_pixels(values):
  """Sum (n, ..., c) over the pixels, along one axis at a time.

  XLA fuses what is summed into a sum along one axis. Into a sum along both axes it does not: it stores what is summed
  in float32.
  """
  ndim = values.ndim
  while values.ndim > 3:
    values = _barrier(values.sum(2))
  return jnp.expand_dims(values.sum(1), tuple(range(1, ndim - 1))) if ndim > 2 else values


def _barrier(values):
  """Have XLA store the values before it computes what follows from them. On a CPU they are returned as they are.

  XLA's CPU backend removes barriers after it has merged operations into loops, so they would only prevent merging.
  """
  return values if jax.default_backend() == "cpu" else jax.lax.optimization_barrier(values)


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
    per_channel = per_group @ jnp.repeat(jnp.eye(per_group.shape[1], dtype=per_group.dtype), size, axis=1)
  return jnp.expand_dims(per_channel, tuple(range(1, like.ndim - 1)))


def along_channels(per_channel, like):
  """Add leading axes to (c,) so that it broadcasts with ``like`` of shape (..., c)."""
  return jax.lax.expand_dims(per_channel, range(like.ndim - 1))
