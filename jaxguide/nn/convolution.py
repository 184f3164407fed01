"""A convolution whose gradients stay fast inside loops on a CPU.

XLA's CPU backend brings a convolution into the layout of its fast path only in a program's entry computation. The
gradients that JAX derives are convolutions with exchanged axes, and inside the body of a ``lax.scan`` they miss that
path: an input gradient runs 3 times slower there, a weight gradient 40 times. Here both gradients are written in the
forward layout to begin with: the input gradient as a convolution with the flipped kernel, the weight gradient as one in
which batch and channels have changed places.

XLA has two libraries for convolutions on a CPU, and takes YNNPACK's wherever that says that it can. In the XLA of jax
0.10.2 YNNPACK keeps to one core for many images of 16 rows and more, and is slow with large kernels: on two cores
Eigen's takes as little as half its time forward, and a third for the weight gradient (``python -m benchmarks
convolution``). YNNPACK's takes no image that grows, and nothing that is one-dimensional. So forward there is one row of
zeros more, and a row of the result is dropped; and the weight gradient goes along rows, with the cotangent once for
each row of the kernel.

To turn a kernel round takes as long as to convolve a small image with it. So it is turned only where the program is
lowered, and for images of no more pixels than the kernel has channels not at all: there the input gradient is one
product with the kernel as it lies, to all its positions, and a sum of what falls on one pixel, in half the time.

It is a primitive of its own, and not a ``custom_vjp``, so that forward mode, higher derivatives and ``vmap`` (which
folds its axis into the batch) all work. On other backends JAX's own rules are the right ones, and are used; so they are
for the derivative of a weight gradient, and for a ``vmap`` over kernels.
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

# From where on the forward pass keeps out of YNNPACK's way: rows of the image, or numbers in the kernel.
ROWS, KERNEL = 16, 2**20


def convolve(
  x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c d"], stride: int = 1
) -> Float[Array, "n hh ww d"]:
  """Convolve with half a kernel of zeros on each side, as PyTorch's ``padding=k//2`` does.

  Args:
    x: images, NHWC.
    kernel: HWIO, with odd sides.
    stride: 1, or 2 to halve the sides (an even side gives exactly half).

  >>> convolve(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5)), stride=2).shape
  (1, 4, 4, 5)
  """
  kh, kw = kernel.shape[:2]
  padding = ((kh // 2, kh // 2), (kw // 2, kw // 2))
  # Inside shard_map JAX keeps track of which axes a value varies over; only its own rules know how.
  if jax.default_backend() == "cpu" and not jax.sharding.get_abstract_mesh().manual_axes:
    return _convolve_p.bind(x, kernel, stride=stride, padding=padding, turned=False)
  return _plain(x, kernel, stride=stride, padding=padding, turned=False)


def _turn(kernel):
  """Turn a kernel round, and exchange its channels."""
  return jnp.swapaxes(kernel[::-1, ::-1], 2, 3)


def _plain(x, kernel, *, stride: int, padding: Padding, turned: bool):
  kernel = _turn(kernel) if turned else kernel
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _on_cpu(x, kernel, *, stride: int, padding: Padding, turned: bool):
  if turned:
    pixels = math.prod(x.shape[:3])  # In a program for batches of any size it is no number.
    if stride == 1 and isinstance(pixels, int) and pixels <= x.shape[3]:
      return _as_product(x, kernel, padding)
    kernel = _turn(kernel)
  (above, below), sides = padding
  rows = x.shape[1]
  made = rows + above + below - kernel.shape[0] + 1
  if stride > 1 or made > rows or (rows < ROWS and kernel.size < KERNEL):
    return _plain(x, kernel, stride=stride, padding=padding, turned=False)
  more = ((above, below + rows + 1 - made), sides)
  return _plain(x, kernel, stride=1, padding=more, turned=False)[:, :made]


def _as_product(x, kernel, padding: Padding):
  """Convolve with the kernel turned round, which it is not: every pixel gives to all that it is seen by."""
  n, h, w, d = x.shape
  kh, kw, c, _ = kernel.shape
  exact = np.promote_types(x.dtype, np.float32)
  given = lax.dot_general(
    x.reshape(-1, d), kernel.reshape(-1, d), (((1,), (1,)), ((), ())), preferred_element_type=exact
  ).reshape(n, h, w, kh, kw, c)
  none = (0, 0, 0)
  given = lax.pad(given, jnp.zeros((), exact), [none, *((*pad, 0) for pad in padding), none, none, none])
  rows, columns = given.shape[1] - kh + 1, given.shape[2] - kw + 1
  parts = (
    given[:, kh - 1 - i : kh - 1 - i + rows, kw - 1 - j : kw - 1 - j + columns, i, j]
    for i in range(kh)
    for j in range(kw)
  )
  return sum(parts, jnp.zeros((), exact)).astype(x.dtype)


def _input_gradient(cotangent, x, kernel, *, stride: int, padding: Padding, turned: bool):
  """Spread the cotangent out to stride 1, and convolve it with the kernel turned round."""
  pads = []
  for side, out, k, (low, _) in zip(x.aval.shape[1:3], cotangent.shape[1:3], kernel.shape[:2], padding, strict=True):
    spread = (out - 1) * stride + 1
    pads.append((k - 1 - low, side - spread + low))
  if stride > 1:
    zero = jnp.zeros((), cotangent.dtype)
    cotangent = lax.pad(cotangent, zero, [(0, 0, 0), *(((0, 0, stride - 1),) * 2), (0, 0, 0)])
  return _convolve_p.bind(cotangent, kernel, stride=1, padding=tuple(pads), turned=not turned)


def _kernel_gradient(cotangent, x, kernel, *, stride: int, padding: Padding, turned: bool):
  """Exchange batch and channels: the cotangent is the kernel, as wide as the image, and rows are summed over as well.

  Each row of the gradient sees the cotangent moved by another row; the moved ones are its channels, side by side.
  """
  (n, h, w, c), d = x.shape, cotangent.shape[3]
  kh, kw, *_ = kernel.aval.shape
  (above, _), sides = padding
  ends = (kh - 1 - above, h + above - (cotangent.shape[1] - 1) * stride - 1, stride - 1)
  cotangent = lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [(0, 0, 0), ends, (0, 0, 0), (0, 0, 0)])
  moved = jnp.concatenate([cotangent[:, i : i + h] for i in reversed(range(kh))], axis=3)
  gradient = lax.conv_general_dilated(
    x.transpose(3, 2, 0, 1).reshape(c, w, n * h),
    moved.transpose(2, 0, 1, 3).reshape(-1, n * h, kh * d),
    (1,),
    (sides,),
    rhs_dilation=(stride,),
    dimension_numbers=("NWC", "WIO", "NWC"),
  )
  # A stride that does not use the last columns of the image leaves positions that no kernel has.
  gradient = gradient[:, :kw].reshape(c, kw, kh, d).transpose(2, 1, 0, 3)
  return _turn(gradient) if turned else gradient


def _batch(args, axes, **params):
  (x, kernel), (x_axis, kernel_axis) = args, axes
  if kernel_axis is not None:
    return jax.vmap(lambda x, kernel: _plain(x, kernel, **params), axes)(x, kernel), 0
  x = jnp.moveaxis(x, x_axis, 0)
  out = _convolve_p.bind(x.reshape(-1, *x.shape[2:]), kernel, **params)
  return out.reshape(*x.shape[:2], *out.shape[1:]), 0


def _abstract(x, kernel, **params):
  out = jax.eval_shape(functools.partial(_plain, **params), x, kernel)
  # On the mesh of x, and spread over its batch as x is: a type without a mesh meets no other one under a mesh.
  sharding = x.sharding.update(spec=jax.sharding.PartitionSpec(x.sharding.spec[0], None, None, None))
  return jax.core.ShapedArray(out.shape, out.dtype, sharding=sharding)


_convolve_p = Primitive("jaxguide_convolve")
_convolve_p.def_impl(jax.jit(_on_cpu, static_argnames=("stride", "padding", "turned")))
_convolve_p.def_abstract_eval(_abstract)
ad.defbilinear(_convolve_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[_convolve_p] = _batch
mlir.register_lowering(_convolve_p, mlir.lower_fun(_on_cpu, multiple_results=False))
