"""Checks of what a caller hands in, made before the work starts.

They look at values where there are values: inside ``jit`` an argument is a tracer, whose value nobody knows yet, and
passes. Each error says what was wrong, what was expected and what to do.
"""

import dataclasses
import difflib
import math
import operator
import reprlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide import struct

T = TypeVar("T")

LARGEST = 2**31 - 1
"""The most numbers of one example."""


def is_concrete(value: Any) -> bool:
  """Whether every leaf of ``value`` is a number or an array that can be looked at."""
  return all(
    isinstance(leaf, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(leaf, jax.core.Tracer)
    for leaf in jax.tree.leaves(value)
  )


def as_float(name: str, value: T) -> T:
  """Give Python's and NumPy's scalars as ``float``, so that 2, 2.0 and ``np.float32(2)`` compile to one program.

  Raises:
    TypeError: if ``value`` is not a number.

  >>> as_float("scale", 2)
  2.0
  """
  if isinstance(value, str | bytes | bool) or value is None:
    raise TypeError(f"{name} must be a number, got {value!r}")
  if any(np.issubdtype(jnp.result_type(leaf), np.complexfloating) for leaf in jax.tree.leaves(value) if _numeric(leaf)):
    raise TypeError(f"{name} must be a real number, got the complex {value!r}")
  return float(value) if isinstance(value, int | float | np.number) else value  # type: ignore[return-value]


def _numeric(leaf: Any) -> bool:
  return isinstance(leaf, complex | np.generic | np.ndarray | jax.Array)


def finite(name: str, value: T) -> T:
  """Give ``value`` back, as `as_float` does, if it is finite (or not known yet).

  Raises:
    ValueError: if an element is infinite or NaN.
    TypeError: if it is not a number.

  >>> finite("scale", float("nan"))
  Traceback (most recent call last):
  ...
  ValueError: scale must be finite, got nan
  """
  value = as_float(name, value)
  if is_concrete(value) and not all(_finite(leaf) for leaf in jax.tree.leaves(value)):
    raise ValueError(f"{name} must be finite, got {value}")
  return value


def _finite(leaf: Any) -> bool:
  """Whether numbers are finite, and stay so in the type that JAX holds them in."""
  array = np.asarray(leaf)
  kind = jax.dtypes.canonicalize_dtype(array.dtype)
  if array.dtype == np.float64 and kind == np.float32:
    return bool((np.abs(array) <= np.finfo(np.float32).max).all())
  return bool(np.isfinite(array).all())


def single(name: str, value: T) -> T:
  """Give ``value`` back, as `finite` does, if it is one number and no array of several.

  Raises:
    TypeError: if it is no number.
    ValueError: if it is several, or not finite.

  >>> single("phi", [0.1, 0.9])
  Traceback (most recent call last):
  ...
  ValueError: phi must be one number, got [0.1, 0.9]
  """
  several: Any = value
  if np.shape(several):
    raise ValueError(f"{name} must be one number, got {value}")
  return finite(name, value)


def flag(name: str, value: Any) -> bool:
  """Give ``value`` back if it is True or False.

  >>> flag("retrain", "no")
  Traceback (most recent call last):
  ...
  TypeError: retrain must be True or False, got 'no'
  """
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f"{name} must be True or False, got {value!r}")
  return bool(value)


def scale(name: str, value: Any) -> Any:
  """Give a scale as a pytree, if it is a function of ``sigma`` or finite (or not known yet).

  Raises:
    ValueError: if it is infinite or NaN.
    TypeError: if it is no number.

  >>> scale("scale", 2)
  2.0
  """
  return struct.as_tree(value) if callable(value) else finite(name, value)


def in_range(name: str, value: T, low: int | float, high: int | float = math.inf) -> T:
  """Give ``value`` back, as `finite` does, if it lies in ``[low, high]``.

  >>> in_range("eta", 1.5, 0, 1)
  Traceback (most recent call last):
  ...
  ValueError: eta must be between 0 and 1, got 1.5
  """
  value = finite(name, value)
  if is_concrete(value):
    array = np.asarray(value)
    if (array < low).any() or (array > high).any():
      wanted = f"at least {low}" if high == math.inf else f"between {low} and {high}"
      raise ValueError(f"{name} must be {wanted}, got {value}")
  return value


def above(name: str, value: T, low: int | float) -> T:
  """Give ``value`` back, as `as_float` does, if it is above ``low``; it may be infinite.

  >>> above("norm_threshold", 0.0, 0)
  Traceback (most recent call last):
  ...
  ValueError: norm_threshold must be above 0, got 0.0
  """
  value = as_float(name, value)
  # Written so that NaN fails.
  if is_concrete(value) and not (np.asarray(value) > low).all():
    raise ValueError(f"{name} must be above {low}, got {value}")
  return value


def written(self: Any, name: str, check: Callable[..., Any], *bounds: int | float) -> None:
  """Check a field of a frozen dataclass if it is a number that somebody wrote, and keep what the check gives.

  Trees of gradients, of shapes or of axes are made of the same classes, and may hold anything.
  """
  value = getattr(self, name)
  if isinstance(value, int | float | np.number):
    object.__setattr__(self, name, check(name, value, *bounds))


def at_least(name: str, value: Any, low: int) -> int:
  """Give ``value`` back as an ``int`` if it is a whole number of at least ``low``.

  >>> at_least("steps", 0, 1)
  Traceback (most recent call last):
  ...
  ValueError: steps must be a whole number of at least 1, got 0
  """
  try:
    number = operator.index(value)
  except TypeError:
    number = low - 1
  if number < low or isinstance(value, bool):
    raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
  return number


def whole(name: str, value: Any, low: int, high: int) -> int:
  """Give ``value`` back as an ``int`` if it is a whole number from ``low`` to ``high``.

  >>> whole("num_classes", 10**12, 1, 2**24)
  Traceback (most recent call last):
  ...
  ValueError: num_classes must be a whole number from 1 to 16777216, got 1000000000000
  """
  try:
    number = low - 1 if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = low - 1
  if not low <= number <= high:
    raise ValueError(f"{name} must be a whole number from {low} to {high}, got {reprlib.repr(value)}")
  return number


def number(name: str, value: Any, low: int | float = -math.inf, high: int | float = math.inf) -> float:
  """Give ``value`` back as a ``float`` if it is one finite number from ``low`` to ``high``.

  >>> number("learning_rate", "fast", 0)
  Traceback (most recent call last):
  ...
  ValueError: learning_rate must be a number, got 'fast'
  """
  try:
    if isinstance(value, str | bytes | bool | np.bool_):
      raise TypeError
    result = float(value)
  except (TypeError, ValueError, OverflowError):
    raise ValueError(f"{name} must be a number, got {reprlib.repr(value)}") from None
  return in_range(name, result, low, high)


def field(name: str, value: Any, kind: Any, *bounds: int | float) -> Any:
  """Give the value of a configuration's field as plain data, if it is what the field's annotation says.

  Args:
    name: of the field.
    value: what was given; it may come from a JSON file, and then has lists for tuples, or be NumPy's.
    kind: the annotation: ``bool``, ``int``, ``float`` (which ``int`` may be too), ``str``, a ``Mapping`` with names,
      a ``Sequence`` of those, or one of them or None.
    *bounds: the least and the largest number, for each element of a sequence. A whole number needs both.

  Raises:
    ValueError: if it is not.

  >>> field("image_shape", [8, 8, np.int64(1)], Sequence[int], 1, 2**16)
  (8, 8, 1)
  >>> field("channel_mult", "12", Sequence[int | float], 0, 10)
  Traceback (most recent call last):
  ...
  ValueError: channel_mult must be a list, got '12'
  """
  kinds = typing.get_args(kind)
  if type(None) in kinds:
    kinds = tuple(one for one in kinds if one is not type(None))
    if value is None:
      return None
    return field(name, value, kinds[0] if len(kinds) == 1 else typing.Union[kinds], *bounds)  # noqa: UP007
  origin = typing.get_origin(kind)
  if origin is Sequence:
    if not isinstance(value, list | tuple | np.ndarray) or (isinstance(value, np.ndarray) and value.ndim != 1):
      raise ValueError(f"{name} must be a list, got {reprlib.repr(value)}")
    return tuple(field(f"each of {name}", item, kinds[0], *bounds) for item in value)
  if origin is Mapping:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
      raise ValueError(f"{name} must be a mapping with names as keys, got {reprlib.repr(value)}")
    return dict(value)
  if kind is bool:
    if not isinstance(value, bool | np.bool_):
      raise ValueError(f"{name} must be true or false, got {reprlib.repr(value)}")
    return bool(value)
  if float in (kind, *kinds):
    checked = number(name, value, *bounds)
    return value if isinstance(value, int) and int in kinds else checked
  if int in (kind, *kinds):
    low, high = map(int, bounds)
    return whole(name, value, low, high)
  if not isinstance(value, str):
    raise ValueError(f"{name} must be a text, got {reprlib.repr(value)}")
  return value


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
  """Give ``table[name]``, or an error that names the nearest entry.

  >>> lookup("solver", "dddim", {"ddim": 1, "heun": 2})
  Traceback (most recent call last):
  ...
  ValueError: unknown solver 'dddim': did you mean 'ddim'? There are ddim, heun
  """
  if isinstance(name, str) and name in table:
    return table[name]
  near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.0)
  hint = f": did you mean {near[0]!r}?" if near else "."
  raise ValueError(f"unknown {kind} {name!r}{hint} There are {', '.join(sorted(table))}")


def options(name: str, cls: type, given: Mapping[str, Any]) -> Mapping[str, Any]:
  """Give ``given`` back if each key of it is a field of the dataclass ``cls``, which the user calls ``name``."""
  known = [field.name for field in dataclasses.fields(cls)]
  for option in given:
    if option not in known:
      has = f"it has {', '.join(known)}" if known else "it has none"
      raise ValueError(f"{name!r} has no option {option!r}; {has}")
  return given


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


def rising(self: Any, low: str, high: str, least: int | float = -math.inf) -> None:
  """Check two fields of a frozen dataclass, if they are known: both finite, the first at least and below the second.

  >>> @dataclasses.dataclass
  ... class Ends:
  ...   low: float
  ...   high: float
  >>> rising(Ends(2.0, 1.0), "low", "high")
  Traceback (most recent call last):
  ...
  ValueError: low must be below high, got 2.0 and 1.0
  """
  ends = getattr(self, low), getattr(self, high)
  if not all(isinstance(end, int | float | np.number) for end in ends):
    return
  for name, end in zip((low, high), ends, strict=True):
    in_range(name, end, least)
  if not ends[0] < ends[1]:
    raise ValueError(f"{low} must be below {high}, got {ends[0]} and {ends[1]}")


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
