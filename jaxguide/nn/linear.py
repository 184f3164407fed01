"""Linear functions whose transpose is given, for gradients that compute again what they need.

The gradient of a layer needs intermediate results of the forward pass. To compute them again takes less memory than to
keep them, and on a CPU less time, since what is kept is written to fresh memory. `jax.checkpoint` does not help there:
XLA's CPU backend drops the barriers by which JAX puts the second computation behind the first. Both are then done in
the forward pass, and their results are kept. A layer whose derivative is a `Linear` writes its transpose itself. There
the cotangent is known, and what is computed `after` it cannot be computed in the forward pass.

`jax.custom_vjp` would allow this, too, but has no forward mode.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxguide._core.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Linear:
  """A linear function with residuals, and its transpose.

  Args:
    function: maps ``(residuals, inputs, *fields)``, both tuples, to an array of the shape of the first input. It is
      linear in ``inputs``, and a function of a module: programs are found again by it.
    transpose: maps ``(residuals, cotangent, *fields)`` to the cotangents of all inputs.
    fields: further arguments of both, which are hashable.
  """

  function: Callable[..., Array]
  transpose: Callable[..., tuple[Array, ...]]
  fields: tuple[Any, ...] = ()


def apply(linear: Linear, residuals: tuple[Array, ...], inputs: tuple[Array, ...]) -> Array:
  """Apply a linear function. All derivatives of it, forward and backward, exist, and so does ``vmap``.

  Args:
    linear: the function and its transpose.
    residuals: what the function is not linear in.
    inputs: what it is linear in.

  >>> twice = Linear(lambda r, t: r[0] * t[0], lambda r, cotangent: (after(cotangent, r[0]) * cotangent,))
  >>> jax.grad(lambda t: apply(twice, (jnp.full(3, 2.0),), (t,)).sum())(jnp.ones(3)).tolist()
  [2.0, 2.0, 2.0]
  """
  return _linear_p.bind(*residuals, *inputs, linear=linear, count=len(residuals))


def after(cotangent: Float[Array, "n ..."], value: Float[Array, "m ..."]) -> Float[Array, "m ..."]:
  """Return ``value``, (n, ...) or (1, ...), in a way that it cannot be used before ``cotangent`` is known.

  0 times the first number of its cotangent is added to each example. This is 0 unless that number is not finite. On
  other backends than CPUs ``value`` is returned as it is: they heed ``jax.lax.optimization_barrier``. It is returned as
  it is, too, if there is no first number, or if a mesh with explicit axes splits the examples, since JAX then refuses
  to take one number.
  """
  split = any(axis is not None for axis in jax.typeof(cotangent).sharding.spec[1:])
  if jax.default_backend() != "cpu" or split or 0 in cotangent.shape:
    return value
  first = cotangent[(slice(None), *[slice(1)] * (cotangent.ndim - 1))]
  return value + (0 * first).reshape(-1, *(1,) * (value.ndim - 1)).astype(value.dtype)


def _call(*args, linear: Linear, count: int):
  return linear.function(args[:count], args[count:], *linear.fields)


def _abstract(*args, linear: Linear, count: int):
  # The mesh and its axes are those of the first input.
  return args[count].update(dtype=jax.eval_shape(lambda *args: _call(*args, linear=linear, count=count), *args).dtype)


def _jvp(primals, tangents, *, linear: Linear, count: int):
  bind = functools.partial(_linear_p.bind, linear=linear, count=count)
  residuals, inputs = primals[:count], primals[count:]
  of_residuals, of_inputs = tangents[:count], tangents[count:]
  given = lambda values: any(type(each) is not ad.Zero for each in values)  # noqa: E731
  parts = []
  if given(of_inputs):
    parts.append(bind(*residuals, *map(ad.instantiate_zeros, of_inputs)))
  if given(of_residuals):
    moved = tuple(map(ad.instantiate_zeros, of_residuals))
    parts.append(jax.jvp(lambda *r: linear.function(r, inputs, *linear.fields), residuals, moved)[1])
  return bind(*primals), functools.reduce(jnp.add, parts)


def _transpose(cotangent, *args, linear: Linear, count: int):
  if type(cotangent) is ad.Zero:
    return [None] * len(args)
  found = linear.transpose(args[:count], cotangent, *linear.fields)
  return [None] * count + [
    each if ad.is_undefined_primal(to) else None for each, to in zip(found, args[count:], strict=True)
  ]


def _batch(args, axes, *, linear: Linear, count: int):
  size = next(arg.shape[axis] for arg, axis in zip(args, axes, strict=True) if axis is not None)
  args = [arg if axis is None else jnp.moveaxis(arg, axis, 0) for arg, axis in zip(args, axes, strict=True)]
  if axes[count] is None:  # The result has the shape of the first input.
    args[count] = jnp.broadcast_to(args[count], (size, *args[count].shape))
  mapped = tuple(None if axis is None and at != count else 0 for at, axis in enumerate(axes))
  batched = Linear(_batched_function, _batched_transpose, (linear, mapped[:count], mapped[count:]))
  return _linear_p.bind(*args, linear=batched, count=count), 0


def _batched_function(residuals, inputs, linear, of_residuals, of_inputs):
  return jax.vmap(lambda r, t: linear.function(r, t, *linear.fields), (of_residuals, of_inputs))(residuals, inputs)


def _batched_transpose(residuals, cotangent, linear, of_residuals, of_inputs):
  each = jax.vmap(lambda r, ct: linear.transpose(r, ct, *linear.fields), (of_residuals, 0))(residuals, cotangent)
  return tuple(found if axis == 0 else found.sum(0) for found, axis in zip(each, of_inputs, strict=True))


_linear_p = Primitive("jaxguide_linear")
_linear_p.def_impl(jax.jit(_call, static_argnames=("linear", "count")))
_linear_p.def_abstract_eval(_abstract)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_call, multiple_results=False))
