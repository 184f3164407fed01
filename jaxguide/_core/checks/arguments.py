"""Checks of the arguments that the mathematics takes: shapes, conditions, labels, grids, schedules and solvers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import struct
from jaxguide._core.checks.numbers import T, at_least, finite, is_concrete

LARGEST = 2**31 - 1
"""The most numbers of one example."""


def scale(name: str, value: Any) -> Any:
  """Give a scale as a pytree, if it is a function of ``sigma`` or finite (or not known yet).

  Raises:
    ValueError: if it is infinite or NaN.
    TypeError: if it is no number.

  >>> scale("scale", 2)
  2.0
  """
  return struct.as_tree(value) if callable(value) else finite(name, value)


def solver(value: T) -> T:
  """Give ``value`` back if it is a solver, made and not a name or a class.

  Raises:
    TypeError: if it is none.

  >>> solver("ddim")
  Traceback (most recent call last):
  ...
  TypeError: solver must be a solver, got the name 'ddim': make it with jaxguide.solvers.solver('ddim')
  """
  if isinstance(value, str):
    remedy = f"the name {value!r}: make it with jaxguide.solvers.solver({value!r})"
  elif isinstance(value, type):
    remedy = f"the class {value.__name__}: make one, {value.__name__}()"
  elif not (callable(getattr(value, "init", None)) and callable(getattr(value, "step", None))):
    remedy = f"{value!r}, which has no init and step: make one of jaxguide.solvers, such as DDIM()"
  else:
    return value
  raise TypeError(f"solver must be a solver, got {remedy}")


def schedule(value: T, method: str = "sigma") -> T:
  """Give ``value`` back if it is a noise schedule, made and not a name or a class: something that has the method.

  Raises:
    TypeError: if it is none.

  >>> schedule("cosine")
  Traceback (most recent call last):
  ...
  TypeError: schedule must be a noise schedule, got 'cosine': make one, such as ...
  """
  if isinstance(value, str | type) or not callable(getattr(value, method, None)):
    shown = value.__name__ + "'s class" if isinstance(value, type) else repr(value)
    raise TypeError(
      f"schedule must be a noise schedule, got {shown}: make one, such as jaxguide.schedules.schedule('cosine') or "
      "jaxguide.schedules.table('linear', 1000)"
    )
  return value


def shape(name: str, value: Any) -> tuple[int, ...]:
  """Give the shape of one example as a tuple of whole numbers.

  Raises:
    TypeError: if it is no sequence.
    ValueError: if a side is no whole number of at least 0.

  >>> shape("shape", 8)
  Traceback (most recent call last):
  ...
  TypeError: shape must be the sides of one example, such as (8, 8, 1) or (2,), got 8
  """
  if isinstance(value, str) or not np.iterable(value):
    raise TypeError(f"{name} must be the sides of one example, such as (8, 8, 1) or (2,), got {value!r}")
  sides = tuple(at_least(f"each side of {name}", side, 0) for side in value)
  if math.prod(sides) > LARGEST:
    raise ValueError(f"{name} has {math.prod(sides):,} numbers, and one example may have {LARGEST:,}: got {sides}")
  return sides


def cond(value: T) -> T:
  """Give a condition back if its leaves are numbers or arrays of numbers.

  Raises:
    TypeError: if a leaf is something else, such as a text.

  >>> cond("cat")
  Traceback (most recent call last):
  ...
  TypeError: cond must hold numbers or arrays, got 'cat': give the number of the class
  """
  for leaf in jax.tree.leaves(value):
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
  """Give ``value`` back if every label in it is a class: a whole number from 0 to ``num_classes - 1``.

  With ``null``, ``num_classes`` itself, the null class, passes as well.

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
  """Give a grid of noise levels back if it is one: one axis, at least one step, decreasing, ending in 0.

  >>> sigmas(np.array([1.0, 2.0, 0.0]))
  Traceback (most recent call last):
  ...
  ValueError: sigmas must decrease strictly, but sigmas[0] = 1.0 is followed by sigmas[1] = 2.0
  """
  shape = jnp.shape(value)  # type: ignore[arg-type]
  if len(shape) != 1 or shape[0] < 2:
    raise ValueError(f"sigmas must have one axis of at least two levels, the last of them 0; got shape {shape}")
  if is_concrete(value):
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" and not jnp.issubdtype(array.dtype, jnp.floating):
      raise TypeError(f"sigmas must be real numbers, got {array.dtype}")
    if array.dtype.kind in "iu" or array.dtype == np.float64:
      with np.errstate(over="ignore", under="ignore"):
        array = array.astype(jax.dtypes.canonicalize_dtype(np.float64))  # What the walk takes them as.
    if not np.isfinite(array).all():
      raise ValueError(f"sigmas must be finite, but sigmas[{np.isfinite(array).argmin()}] is not")
    rises = np.flatnonzero(np.diff(array) >= 0)
    if rises.size:
      i = rises[0]
      raise ValueError(
        f"sigmas must decrease strictly, but sigmas[{i}] = {array[i]} is followed by sigmas[{i + 1}] = {array[i + 1]}"
      )
    if array[-1] != 0:
      raise ValueError(f"sigmas must end in 0, but the last is {array[-1]}")
  return value
