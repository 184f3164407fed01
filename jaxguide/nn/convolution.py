"""A convolution whose gradients stay fast inside loops on a CPU.

XLA's CPU backend brings a convolution into the layout of its fast path only in a program's entry computation. The
gradients that JAX derives are convolutions with exchanged axes, and inside the body of a ``lax.scan`` they miss that
path: an input gradient runs 3 times slower there, a weight gradient 40 times. Here both gradients are written in the
forward layout to begin with: the input gradient as a convolution with the flipped kernel, the weight gradient as one in
which batch and channels have changed places.

It is a primitive of its own, and not a ``custom_vjp``, so that forward mode, higher derivatives and ``vmap`` (which
folds its axis into the batch) all work. On other backends JAX's own rules are the right ones, and are used; so they are
for the derivative of a weight gradient, and for a ``vmap`` over kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxguide.typing import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]


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
    return _convolve_p.bind(x, kernel, stride=stride, padding=padding)
  return _plain(x, kernel, stride=stride, padding=padding)


def _plain(x, kernel, *, stride: int, padding: Padding):
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _input_gradient(cotangent, x, kernel, *, stride: int, padding: Padding):
  """Spread the cotangent out to stride 1, and convolve it with the kernel flipped and its channels exchanged."""
  pads = []
  for side, out, k, (low, _) in zip(x.aval.shape[1:3], cotangent.shape[1:3], kernel.shape[:2], padding, strict=True):
    spread = (out - 1) * stride + 1
    pads.append((k - 1 - low, side - spread + low))
  if stride > 1:
    zero = jnp.zeros((), cotangent.dtype)
    cotangent = lax.pad(cotangent, zero, [(0, 0, 0), *(((0, 0, stride - 1),) * 2), (0, 0, 0)])
  flipped = jnp.swapaxes(kernel[::-1, ::-1], 2, 3)
  return _convolve_p.bind(cotangent, flipped, stride=1, padding=tuple(pads))


def _kernel_gradient(cotangent, x, kernel, *, stride: int, padding: Padding):
  """Exchange batch and channels: the cotangent is the kernel, as large as the image, and examples are summed over."""
  kh, kw, _, _ = kernel.aval.shape
  gradient = lax.conv_general_dilated(
    x.transpose(3, 1, 2, 0),
    cotangent.transpose(1, 2, 0, 3),
    (1, 1),
    padding,
    rhs_dilation=(stride, stride),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  # A stride that does not use the last rows of the image leaves positions that no kernel has.
  return gradient[:, :kh, :kw].transpose(1, 2, 0, 3)


def _batch(args, axes, *, stride: int, padding: Padding):
  (x, kernel), (x_axis, kernel_axis) = args, axes
  if kernel_axis is not None:
    plain = functools.partial(_plain, stride=stride, padding=padding)
    return jax.vmap(plain, axes)(x, kernel), 0
  x = jnp.moveaxis(x, x_axis, 0)
  out = _convolve_p.bind(x.reshape(-1, *x.shape[2:]), kernel, stride=stride, padding=padding)
  return out.reshape(*x.shape[:2], *out.shape[1:]), 0


_convolve_p = Primitive("jaxguide_convolve")
_convolve_p.def_impl(jax.jit(_plain, static_argnames=("stride", "padding")))
_convolve_p.def_abstract_eval(
  lambda x, kernel, **params: jax.core.ShapedArray(
    (out := jax.eval_shape(functools.partial(_plain, **params), x, kernel)).shape, out.dtype
  )
)
ad.defbilinear(_convolve_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[_convolve_p] = _batch
mlir.register_lowering(_convolve_p, mlir.lower_fun(_plain, multiple_results=False))
