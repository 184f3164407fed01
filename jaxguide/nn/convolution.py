"""A convolution whose gradients stay fast inside loops on a CPU.

**Layout.** XLA's CPU backend has a fast path for convolutions in one layout. It changes other convolutions to that
layout only in a program's entry computation. The gradients that JAX derives are convolutions with exchanged axes.
Inside the body of a ``lax.scan`` they miss the fast path: an input gradient is 3 times slower there, a weight gradient
40 times. This module writes both gradients in the forward layout: the input gradient is a convolution with the flipped
kernel, the weight gradient a convolution in which batch and channels are exchanged.

**Library.** XLA has two libraries for convolutions on a CPU, and uses YNNPACK whenever YNNPACK supports the operation.
With the XLA of jax 0.10.2, YNNPACK uses one core only for many images of 16 rows or more, and it is slow for large
kernels. On two cores Eigen takes down to 1/2 of its time for the forward pass and 1/3 for the weight gradient
(``python -m benchmarks convolution``). YNNPACK supports neither a convolution whose output is larger than its input nor
a one-dimensional one, and this module makes use of that: the forward pass pads one more row of zeros and drops a row of
the result, and the weight gradient is a convolution along rows, with one copy of the cotangent for each kernel row.

**Flipping.** To flip a kernel takes as long as to convolve a small image with it. So a kernel is flipped only when the
program is lowered, and not at all if the image has at most as many pixels as the kernel has channels. In that case the
input gradient is one matrix product with the kernel as it is stored, followed by a sum over kernel positions, in half
the time.

The convolution is a JAX primitive and not a ``custom_vjp``, so that forward mode, higher derivatives and ``vmap``
(which folds its axis into the batch) all work. JAX's own rules are used on other backends, for the derivative of a
weight gradient, and for a ``vmap`` over kernels.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxguide._core.typing import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]

# The forward pass avoids YNNPACK if the image has this many rows or the kernel this many entries.
MIN_ROWS, MIN_KERNEL_SIZE = 16, 2**20


def convolve(
  x: Float[Array, "n h w c"],
  kernel: Float[Array, "kh kw c d"],
  stride: int = 1,
  padding: tuple[int, int] | None = None,
) -> Float[Array, "n hh ww d"]:
  """Convolve images, padded with zeros by half a kernel on each side, like ``padding=k//2`` in PyTorch.

  Args:
    x: images, NHWC.
    kernel: HWIO, with odd sides.
    stride: 1, or 2 to halve the sides (an even side becomes exactly half).
    padding: the number of zeros before and behind rows and columns; half a kernel on each side if it is None.

  >>> convolve(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), stride=2).shape
  (1, 4, 4, 5)
  """
  kh, kw = kernel.shape[:2]
  pads = ((kh // 2, kh // 2), (kw // 2, kw // 2)) if padding is None else (padding, padding)
  # Inside shard_map JAX tracks which mesh axes a value varies over, and this primitive has no rule for that.
  if jax.default_backend() == "cpu" and not jax.sharding.get_abstract_mesh().manual_axes:
    return _convolve_p.bind(x, kernel, stride=stride, padding=pads, flipped=False)
  return _plain(x, kernel, stride=stride, padding=pads, flipped=False)


def _flip(kernel):
  """Reverse both spatial axes of a kernel, and exchange its input and output channels."""
  return jnp.swapaxes(kernel[::-1, ::-1], 2, 3)


def _plain(x, kernel, *, stride: int, padding: Padding, flipped: bool):
  """Convolve by JAX's own operation, with the flipped kernel if ``flipped``."""
  kernel = _flip(kernel) if flipped else kernel
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _on_cpu(x, kernel, *, stride: int, padding: Padding, flipped: bool):
  """Do what `_plain` does, in the form that is fastest on a CPU."""
  if flipped:
    pixels = math.prod(x.shape[:3])  # Not an int if the program was exported for batches of any size.
    if stride == 1 and isinstance(pixels, int) and pixels <= x.shape[3]:
      return _as_product(x, kernel, padding)
    kernel = _flip(kernel)
  (above, below), sides = padding
  rows = x.shape[1]
  out_rows = rows + above + below - kernel.shape[0] + 1
  if stride > 1 or out_rows > rows or (rows < MIN_ROWS and kernel.size < MIN_KERNEL_SIZE):
    return _plain(x, kernel, stride=stride, padding=padding, flipped=False)
  # Pad until the output has one row more than the input, which YNNPACK does not support; then drop the extra rows.
  more = ((above, below + rows + 1 - out_rows), sides)
  return _plain(x, kernel, stride=1, padding=more, flipped=False)[:, :out_rows]


def _as_product(x, kernel, padding: Padding):
  """Convolve with the flipped kernel without flipping it.

  One matrix product gives the contribution of every pixel at every kernel position. The output sums the contributions
  that fall on the same pixel.
  """
  n, h, w, d = x.shape
  kh, kw, c, _ = kernel.shape
  exact = np.promote_types(x.dtype, np.float32)
  contributions = lax.dot_general(
    x.reshape(-1, d), kernel.reshape(-1, d), (((1,), (1,)), ((), ())), preferred_element_type=exact
  ).reshape(n, h, w, kh, kw, c)
  none = (0, 0, 0)
  pads = [none, *((*pad, 0) for pad in padding), none, none, none]
  contributions = lax.pad(contributions, jnp.zeros((), exact), pads)
  rows, columns = contributions.shape[1] - kh + 1, contributions.shape[2] - kw + 1
  shifted = (
    contributions[:, kh - 1 - i : kh - 1 - i + rows, kw - 1 - j : kw - 1 - j + columns, i, j]
    for i in range(kh)
    for j in range(kw)
  )
  return sum(shifted, jnp.zeros((), exact)).astype(x.dtype)


def _input_gradient(cotangent, x, kernel, *, stride: int, padding: Padding, flipped: bool):
  """Insert zeros into the cotangent to undo the stride, and convolve it with the flipped kernel."""
  pads = []
  for side, out, k, (low, _) in zip(x.aval.shape[1:3], cotangent.shape[1:3], kernel.shape[:2], padding, strict=True):
    dilated = (out - 1) * stride + 1
    pads.append((k - 1 - low, side - dilated + low))
  if stride > 1:
    zero = jnp.zeros((), cotangent.dtype)
    cotangent = lax.pad(cotangent, zero, [(0, 0, 0), *(((0, 0, stride - 1),) * 2), (0, 0, 0)])
  return _convolve_p.bind(cotangent, kernel, stride=1, padding=tuple(pads), flipped=not flipped)


def _kernel_gradient(cotangent, x, kernel, *, stride: int, padding: Padding, flipped: bool):
  gradient = weight_gradient(x, cotangent, kernel.aval.shape[:2], stride, padding)
  return _flip(gradient) if flipped else gradient


# Jitted by itself, so that it is traced and lowered once per shape and not once per layer. XLA inlines the calls.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def weight_gradient(x, cotangent, sides: tuple[int, int], stride: int, padding: Padding):
  """Convolve x with the cotangent as kernel, with batch and channels exchanged.

  The convolution is one-dimensional, along the width. Rows join the batch as a summed axis. For each of the kh rows of
  the gradient the cotangent is shifted by a different number of rows; the kh shifted copies are concatenated along the
  channels.
  """
  (n, h, w, c), d = x.shape, cotangent.shape[3]
  kh, kw = sides
  (above, _), columns = padding
  ends = (kh - 1 - above, h + above - (cotangent.shape[1] - 1) * stride - 1, stride - 1)
  cotangent = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [(0, 0, 0), ends, (0, 0, 0), (0, 0, 0)])
  shifted = jnp.concatenate([cotangent[:, i : i + h] for i in reversed(range(kh))], axis=3)
  gradient = lax.conv_general_dilated(
    x.transpose(3, 2, 0, 1).reshape(c, w, n * h),
    shifted.transpose(2, 0, 1, 3).reshape(shifted.shape[2], n * h, kh * d),
    (1,),
    (columns,),
    rhs_dilation=(stride,),
    dimension_numbers=("NWC", "WIO", "NWC"),
  )
  # If the stride skips the last columns of the image, the result has more columns than the kernel: drop them.
  return gradient[:, :kw].reshape(c, kw, kh, d).transpose(2, 1, 0, 3)


def _batch(args, axes, **params):
  (x, kernel), (x_axis, kernel_axis) = args, axes
  if kernel_axis is not None:
    return jax.vmap(lambda x, kernel: _plain(x, kernel, **params), axes)(x, kernel), 0
  x = jnp.moveaxis(x, x_axis, 0)
  out = _convolve_p.bind(x.reshape(-1, *x.shape[2:]), kernel, **params)
  return out.reshape(*x.shape[:2], *out.shape[1:]), 0


def _abstract(x, kernel, **params):
  out = jax.eval_shape(functools.partial(_plain, **params), x, kernel)
  # The output has the mesh of x and its batch sharding: under a mesh, a type without one matches no other type.
  sharding = x.sharding.update(spec=jax.sharding.PartitionSpec(x.sharding.spec[0], None, None, None))
  return jax.core.ShapedArray(out.shape, out.dtype, sharding=sharding)


_convolve_p = Primitive("jaxguide_convolve")
_convolve_p.def_impl(jax.jit(_on_cpu, static_argnames=("stride", "padding", "flipped")))
_convolve_p.def_abstract_eval(_abstract)
ad.defbilinear(_convolve_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[_convolve_p] = _batch
mlir.register_lowering(_convolve_p, mlir.lower_fun(_on_cpu, multiple_results=False))
