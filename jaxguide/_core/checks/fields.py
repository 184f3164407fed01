"""Checks of the fields of configurations and of names in tables."""

import contextlib
import dataclasses
import difflib
import math
import reprlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxguide._core.checks.numbers import T, number, whole

LEAST_ALIKE = 0.4
"""A name that is less alike than this share is not proposed."""


def field(name: str, value: Any, kind: Any, *bounds: int | float) -> Any:
  """Check that the value of a configuration's field fits its annotation, and return it as plain data.

  Args:
    name: the field's name.
    value: the field's value. It may contain NumPy's numbers, or lists instead of tuples, as JSON has them.
    kind: the annotation: ``bool``, ``int``, ``float`` (which allows ``int``), ``str``, a ``Mapping`` with text keys, a
      ``Sequence``, ``list`` or ``tuple`` of one of these, or a union of one of these with None. For any other
      annotation, the value may be all that `plain` returns.
    *bounds: the smallest and the largest number allowed, also for each element of a sequence. ``int`` needs both.

  Raises:
    ValueError: if the value does not fit.

  >>> field("image_shape", [8, 8, np.int64(1)], Sequence[int], 1, 2**16)
  (8, 8, 1)
  >>> field("channel_mult", "12", Sequence[int | float], 0, 10)
  Traceback (most recent call last):
  ...
  ValueError: channel_mult must be a list, got '12'
  """
  kinds = typing.get_args(kind)
  if type(None) in kinds:
    kinds = tuple(member for member in kinds if member is not type(None))
    if value is None:
      return None
    return field(name, value, kinds[0] if len(kinds) == 1 else typing.Union[kinds], *bounds)  # noqa: UP007
  origin = typing.get_origin(kind)
  if origin in (Sequence, list) or (origin is tuple and kinds[1:] == (Ellipsis,)):
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
  if kind is not str:
    return plain(name, value)
  if not isinstance(value, str):
    raise ValueError(f"{name} must be a text, got {reprlib.repr(value)}")
  return value


def plain(name: str, value: Any) -> Any:
  """Return a value as plain data: a number, a text, true or false, None, or tuples and mappings of these.

  A dtype becomes its name.

  Raises:
    ValueError: if it is something else, such as a function or a number that is not finite.

  >>> plain("sizes", [np.int64(8), None]), plain("param_dtype", np.float32)
  ((8, None), 'float32')
  """
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    raise ValueError(f"{name} must be finite, got {value}")
  if value is None or isinstance(value, bool | int | float | str):
    return value
  if isinstance(value, list | tuple):
    return tuple(plain(f"each of {name}", item) for item in value)
  if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
    return {key: plain(f"{name}.{key}", item) for key, item in value.items()}
  if isinstance(value, np.dtype | type):
    with contextlib.suppress(TypeError, ValueError):
      if np.dtype(value) != object:
        return np.dtype(value).name
  raise ValueError(
    f"{name} must be plain data (numbers, texts, lists of them, or a dtype), which can be stored as text, got "
    f"{reprlib.repr(value)}; for a network, make a subclass that has it as its default"
  )


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
  """Return ``table[name]``. The error for an unknown name has the nearest name and all known ones.

  Args:
    kind: what the table contains, for the error message.
    name: the name to look up.
    table: the values by name.

  Raises:
    ValueError: if the table has no such name.

  >>> lookup("solver", "dddim", {"ddim": 1, "heun": 2})
  Traceback (most recent call last):
  ...
  ValueError: unknown solver 'dddim': did you mean 'ddim'? There are ddim, heun
  >>> lookup("solver", "dpm++", {"ddpm": 1, "dpmpp-2m": 2})
  Traceback (most recent call last):
  ...
  ValueError: unknown solver 'dpm++': did you mean 'dpmpp-2m'? There are ddpm, dpmpp-2m
  """
  if isinstance(name, str) and name in table:
    return table[name]
  written = str(name).replace("+", "p")  # DPM-Solver++ is written dpmpp.
  alike = {known: difflib.SequenceMatcher(None, known, written).ratio() for known in table}
  nearest = max(alike, key=lambda known: alike[known], default=None)
  hint = "." if nearest is None or alike[nearest] < LEAST_ALIKE else f": did you mean {nearest!r}?"
  raise ValueError(f"unknown {kind} {name!r}{hint} There are {', '.join(sorted(table))}")


def options(name: str, cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
  """Check that each key of ``values`` is a field of the dataclass ``cls``, and return ``values``.

  Args:
    name: the name by which the user chose the class, for the error message.
    cls: a dataclass.
    values: values of its fields, by name.

  Raises:
    ValueError: if the class has no such field.
  """
  known = [field.name for field in dataclasses.fields(cls)]
  for option in values:
    if option not in known:
      known_options = f"it has {', '.join(known)}" if known else "it has none"
      raise ValueError(f"{name!r} has no option {option!r}; {known_options}")
  return values
