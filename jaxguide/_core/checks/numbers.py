"""Checks of numbers. They check concrete values; a tracer passes."""

import math
import operator
import reprlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


def is_concrete(value: Any) -> bool:
  """Whether every leaf of ``value`` is a number or an array with known values, not a tracer."""
  return all(
    isinstance(leaf, int | float | np.generic | np.ndarray | jax.Array) and not isinstance(leaf, jax.core.Tracer)
    for leaf in jax.tree.leaves(value)
  )


def as_float(name: str, value: T) -> T:
  """Convert Python's and NumPy's scalars to ``float``, so that 2, 2.0 and ``np.float32(2)`` compile to one program.

  Other values are returned unchanged.

  Raises:
    TypeError: if ``value`` is a text, a bool, None or complex.

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
  """Check that ``value`` is finite, and return it as `as_float` does.

  Raises:
    ValueError: if an element is infinite or NaN.
    TypeError: if ``value`` is not a number.

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
  """Whether numbers are finite, also in the type to which JAX converts them."""
  array = np.asarray(leaf)
  jax_dtype = jax.dtypes.canonicalize_dtype(array.dtype)
  if array.dtype == np.float64 and jax_dtype == np.float32:
    return bool((np.abs(array) <= np.finfo(np.float32).max).all())
  return bool(np.isfinite(array).all())


def single(name: str, value: T) -> T:
  """Check that ``value`` is one finite number and not an array, and return it as `finite` does.

  Raises:
    TypeError: if it is not a number.
    ValueError: if it has axes, or is not finite.

  >>> single("phi", [0.1, 0.9])
  Traceback (most recent call last):
  ...
  ValueError: phi must be one number, got [0.1, 0.9]
  """
  untyped: Any = value
  if np.shape(untyped):
    raise ValueError(f"{name} must be one number, got {value}")
  return finite(name, value)


def flag(name: str, value: Any) -> bool:
  """Check that ``value`` is True or False, and return it as a ``bool``.

  >>> flag("retrain", "no")
  Traceback (most recent call last):
  ...
  TypeError: retrain must be True or False, got 'no'
  """
  if not isinstance(value, bool | np.bool_):
    raise TypeError(f"{name} must be True or False, got {value!r}")
  return bool(value)


def in_range(name: str, value: T, low: int | float, high: int | float = math.inf) -> T:
  """Check that ``value`` is finite and lies in ``[low, high]``, and return it as `finite` does.

  >>> in_range("eta", 1.5, 0, 1)
  Traceback (most recent call last):
  ...
  ValueError: eta must be between 0 and 1, got 1.5
  """
  value = finite(name, value)
  if is_concrete(value):
    array = np.asarray(value)
    if (array < low).any() or (array > high).any():
      bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
      raise ValueError(f"{name} must be {bounds}, got {value}")
  return value


def above(name: str, value: T, low: int | float) -> T:
  """Check that ``value`` is above ``low``, and return it as `as_float` does. It may be infinite.

  >>> above("norm_threshold", 0.0, 0)
  Traceback (most recent call last):
  ...
  ValueError: norm_threshold must be above 0, got 0.0
  """
  value = as_float(name, value)
  # With this form of the comparison NaN fails.
  if is_concrete(value) and not (np.asarray(value) > low).all():
    raise ValueError(f"{name} must be above {low}, got {value}")
  return value


def number_field(self: Any, name: str, check: Callable[..., Any], *bounds: int | float) -> None:
  """Check a field of a frozen dataclass if its value is a Python or NumPy number, and store the checked value.

  Other values are not checked: trees of gradients, of shapes or of axes are instances of the same classes, and their
  fields hold tracers or placeholders.
  """
  value = getattr(self, name)
  if isinstance(value, int | float | np.number):
    object.__setattr__(self, name, check(name, value, *bounds))


def at_least(name: str, value: Any, low: int) -> int:
  """Check that ``value`` is a whole number of at least ``low``, and return it as an ``int``.

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
  """Check that ``value`` is a whole number from ``low`` to ``high``, and return it as an ``int``.

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
  """Check that ``value`` is one finite number from ``low`` to ``high``, and return it as a ``float``.

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


def rising(self: Any, low: str, high: str, least: int | float = -math.inf) -> None:
  """Check that two fields of a frozen dataclass are finite, at least ``least``, and the first below the second.

  If one of them is not a Python or NumPy number, nothing is checked.

  >>> import dataclasses
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
