"""Checks of scales, solvers, schedules, shapes, conditions, labels and grids."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import struct
from jaxguide._core.checks.numbers import T, at_least, finite, is_concrete

LARGEST = 2**31 - 1
"""The largest number of elements of one example."""


def scale(name: str, value: Any) -> Any:
  """Check that a scale is finite or a function of ``sigma``, and return it as a pytree.

  Raises:
    ValueError: if it is infinite or NaN.
    TypeError: if it is neither a number nor a function.

  >>> scale("scale", 2)
  2.0
  """
  return struct.as_tree(value) if callable(value) else finite(name, value)


def solver(value: T) -> T:
  """Check that ``value`` is an instance of a solver, and return it.

  Raises:
    TypeError: if it is something else, such as a solver's name or class.

  >>> solver("ddim")
  Traceback (most recent call last):
  ...
  TypeError: solver must be a solver, got the name 'ddim': make it with jaxguide.solvers.solver('ddim')
  """
  if isinstance(value, str):
    problem = f"the name {value!r}: make it with jaxguide.solvers.solver({value!r})"
  elif isinstance(value, type):
    problem = f"the class {value.__name__}: make an instance, {value.__name__}()"
  elif not (callable(getattr(value, "init", None)) and callable(getattr(value, "step", None))):
    problem = f"{value!r}, which has no methods init and step: use a solver of jaxguide.solvers, such as DDIM()"
  else:
    return value
  raise TypeError(f"solver must be a solver, got {problem}")


def schedule(value: T, method: str = "sigma") -> T:
  """Check that ``value`` is an instance of a noise schedule, which means that it has the method, and return it.

  Raises:
    TypeError: if it is something else, such as a schedule's name or class.

  >>> schedule("cosine")
  Traceback (most recent call last):
  ...
  TypeError: schedule must be a noise schedule, got 'cosine': make one, such as ...
  """
  if isinstance(value, str | type) or not callable(getattr(value, method, None)):
    shown = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
    raise TypeError(
      f"schedule must be a noise schedule, got {shown}: make one, such as jaxguide.schedules.schedule('cosine') or "
      "jaxguide.schedules.table('linear', 1000)"
    )
  return value


def shape(name: str, value: Any) -> tuple[int, ...]:
  """Check the shape of one example, and return it as a tuple of whole numbers.

  Raises:
    TypeError: if it is not a sequence.
    ValueError: if a side is not a whole number of at least 0, or the example would have more than `LARGEST` elements.

  >>> shape("shape", 8)
  Traceback (most recent call last):
  ...
  TypeError: shape must be the sides of one example, such as (8, 8, 1) or (2,), got 8
  """
  if isinstance(value, str) or not np.iterable(value):
    raise TypeError(f"{name} must be the sides of one example, such as (8, 8, 1) or (2,), got {value!r}")
  sides = tuple(at_least(f"each side of {name}", side, 0) for side in value)
  if math.prod(sides) > LARGEST:
    raise ValueError(f"{name} has {math.prod(sides):,} numbers, but one example may have {LARGEST:,}: got {sides}")
  return sides


def cond(value: T) -> T:
  """Check that the leaves of a condition are numbers or arrays of numbers, and return it.

  Raises:
    TypeError: if a leaf is something else, such as a text.
    ValueError: if a whole number is outside the range of JAX's integer type.

  >>> cond("cat")
  Traceback (most recent call last):
  ...
  TypeError: cond must hold numbers or arrays, got 'cat': give the number of the class
  """
  for leaf in jax.tree.leaves(value):
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      raise TypeError("cond must hold numbers or arrays, got random keys: give jax.random.key_data(keys)")
    if isinstance(leaf, str | bytes) or (hasattr(leaf, "dtype") and leaf.dtype.kind in "OSU"):
      raise TypeError(f"cond must hold numbers or arrays, got {leaf!r}: give the number of the class")
    if is_concrete(leaf) and np.asarray(leaf).dtype.kind in "iu":
      array = np.asarray(leaf)
      limits = np.iinfo(jax.dtypes.canonicalize_dtype(array.dtype))
      outside = array[(array < limits.min) | (array > limits.max)]
      if outside.size:
        raise ValueError(f"cond must lie in JAX's {limits.dtype}, {limits.min} to {limits.max}, got {outside.flat[0]}")
  return value


def labels(name: str, value: T, num_classes: int, null: bool = False) -> T:
  """Check that every label in ``value`` is a class, a whole number from 0 to ``num_classes - 1``, and return ``value``.

  If ``null`` is true, the null class ``num_classes`` is allowed too.

  Raises:
    TypeError: if a label is not a whole number.
    ValueError: if a label is outside the range.

  >>> labels("label", 12, 10)
  Traceback (most recent call last):
  ...
  ValueError: label 12 is not one of the 10 classes, 0 to 9
  """
  if is_concrete(value):
    for leaf in map(np.asarray, jax.tree.leaves(value)):
      if not np.issubdtype(leaf.dtype, np.integer):
        raise TypeError(f"{name} must be whole numbers, got {leaf.dtype}")
      outside = leaf[(leaf < 0) | (leaf >= num_classes + null)]
      if outside.size:
        also = f" (or {num_classes}, the null class)" if null else ""
        raise ValueError(
          f"{name} {outside.flat[0]} is not one of the {num_classes} classes, 0 to {num_classes - 1}{also}"
        )
  return value


def sigmas(value: T) -> T:
  """Check a grid of noise levels, and return it. It must have one axis, at least one step, decrease, and end in 0.

  Raises:
    TypeError: if the levels are not real numbers.
    ValueError: if it is not such a grid.

  >>> sigmas(np.array([1.0, 2.0, 0.0]))
  Traceback (most recent call last):
  ...
  ValueError: sigmas must decrease strictly, but sigmas[0] = 1.0 is followed by sigmas[1] = 2.0
  """
  shape = jnp.shape(value)  # type: ignore[arg-type]
  if len(shape) != 1 or shape[0] < 2:
    raise ValueError(f"sigmas must have one axis of at least two levels, the last one 0; got shape {shape}")
  if is_concrete(value):
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" and not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(f"sigmas must be real numbers, got {array.dtype}")
    if array.dtype.kind in "iu" or array.dtype == np.float64:
      with np.errstate(over="ignore", under="ignore"):
        array = array.astype(jax.dtypes.canonicalize_dtype(np.float64))  # The sampler converts them to this type.
    if not np.isfinite(array).all():
      raise ValueError(f"sigmas must be finite as {array.dtype}, but sigmas[{np.isfinite(array).argmin()}] is not")
    rises = np.flatnonzero(np.diff(array) >= 0)
    if rises.size:
      i = rises[0]
      raise ValueError(
        f"sigmas must decrease strictly, but sigmas[{i}] = {array[i]} is followed by sigmas[{i + 1}] = {array[i + 1]}"
      )
    if array[-1] != 0:
      raise ValueError(f"sigmas must end in 0, but the last is {array[-1]}")
  return value
