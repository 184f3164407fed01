"""Counts of a program's floating-point operations and of its memory, from shapes alone: nothing is compiled or run."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxguide._core.typing import PyTree


def operations(function: Callable[..., Any], *args: Any) -> int:
  """Count the floating-point operations of a function's matrix products and convolutions.

  A multiplication and an addition are two operations. The body of a loop counts as often as it runs (once for a loop
  whose length depends on data), and of alternatives the largest counts. Other operations are few in comparison.

  Args:
    function: a function that can be traced.
    *args: its arguments, arrays or `jax.ShapeDtypeStruct`.

  >>> operations(lambda a, b: a @ b, jax.ShapeDtypeStruct((3, 5), float), jax.ShapeDtypeStruct((5, 7), float))
  210
  """
  return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    inner = [_count(part) for part in _parts(equation)]
    if name in COUNTS:
      total += COUNTS[name](equation)
    elif name == "scan":
      total += params["length"] * sum(inner)
    elif name == "cond":
      total += max(inner)
    else:
      total += sum(inner)
  return total


def _parts(equation: Any) -> Iterator[Any]:
  """Yield the programs inside an operation, such as the body of a loop or a jitted function."""
  for value in equation.params.values():
    for closed in value if isinstance(value, tuple | list) else (value,):
      jaxpr = getattr(closed, "jaxpr", closed)
      if hasattr(jaxpr, "eqns"):
        yield jaxpr


def _shapes(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
  a, b = (variable.aval.shape for variable in equation.invars[:2])
  return a, b, equation.outvars[0].aval.shape


def _product(equation: Any) -> int:
  left, _, out = _shapes(equation)
  (contracted, _), _ = equation.params["dimension_numbers"]
  return 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
  image, kernel, out = _shapes(equation)
  params, numbers = equation.params, equation.params["dimension_numbers"]
  total = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
  for axis, window in enumerate(
    zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True)
  ):
    i, k, o = (spec[axis + 2] for spec in (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec))
    total *= _products(image[i], kernel[k], out[o], *window)
  return total // params["batch_group_count"]


def _own_convolution(equation: Any) -> int:
  """Count `jaxguide.nn.convolution.convolve`, which is an operation of its own on a CPU."""
  image, kernel, out = _shapes(equation)
  total = 2 * out[0] * out[3] * image[3]
  for axis, padding in enumerate(equation.params["padding"]):
    total *= _products(image[axis + 1], kernel[axis], out[axis + 1], equation.params["stride"], padding, 1, 1)
  return total


def _products(
  side: int, kernel: int, out: int, stride: int, padding: tuple[int, int], spread: int, dilation: int
) -> int:
  """Count the products of a convolution along one axis: without those with padding, or between spread-out pixels."""
  places = np.arange(out)[:, None] * stride + np.arange(kernel) * dilation - padding[0]
  return int(((places >= 0) & (places <= (side - 1) * spread) & (places % spread == 0)).sum())


COUNTS: dict[str, Callable[[Any], int]] = {
  "dot_general": _product,
  "conv_general_dilated": _convolution,
  "jaxguide_convolve": _own_convolution,
}
"""The operations that are counted, by the name of JAX's primitive."""


def size(tree: PyTree) -> int:
  """Return the bytes of a tree of arrays or shapes.

  >>> size({"w": jax.ShapeDtypeStruct((2, 3), "float32")})
  24
  """
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kept(function: Callable[..., Any], params: PyTree, *args: Any) -> int:
  """Return the bytes that the forward pass of a function keeps for its gradient, without the parameters themselves.

  Args:
    function: ``(params, *args) -> scalar``.
    params: its parameters, arrays or shapes.
    *args: further arguments, which it is not differentiated for.

  >>> w, x = jax.ShapeDtypeStruct((5, 7), "float32"), jax.ShapeDtypeStruct((3, 5), "float32")
  >>> kept(lambda w, x: jax.numpy.sum(x @ w), w, x) == size(x)
  True
  """
  leaves = jax.tree.leaves(
    jax.eval_shape(lambda params, *args: jax.vjp(lambda params: function(params, *args), params)[1], params, *args)
  )
  # The parameters are kept as well, and are counted elsewhere.
  parameters = Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params))
  return size(leaves) - size([leaf for leaf in leaves if _take(parameters, (leaf.shape, leaf.dtype))])


def _take(counter: Counter[Any], item: Any) -> bool:
  """Take one item out of a counter; return whether there was one."""
  counter[item] -= 1
  return counter[item] >= 0


def largest(function: Callable[..., Any], *args: Any) -> int:
  """Return the bytes of the largest array that a function computes on its way.

  >>> largest(lambda x: jax.numpy.outer(x, x).sum(), jax.ShapeDtypeStruct((10,), "float32"))
  400
  """
  return _largest(jax.make_jaxpr(function)(*args).jaxpr)


def _largest(jaxpr: Any) -> int:
  own = [
    size(variable.aval) for equation in jaxpr.eqns for variable in equation.outvars if hasattr(variable.aval, "dtype")
  ]
  return max([0, *own, *(_largest(part) for equation in jaxpr.eqns for part in _parts(equation))])
