"""Records of runs: all that a run depends on, as plain data in named parts that can be compared field by field.

A record is what a JSON file holds: ``{"version": 1, "model": {...}, "training": {...}, "data": {...}}``. Each
configuration is a part of its own, so that fields of two configurations may share a name. A record that was written
before a field existed has the field's default.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

VERSION = 1


def record(**parts: Any) -> dict[str, Any]:
  """Make a record of dataclasses and plain data, each under its own name, as it comes back from JSON.

  Raises:
    TypeError: if a part holds what JSON cannot, such as an array.

  >>> record(data={"name": "digits", "shape": (8, 8, 1)})
  {'version': 1, 'data': {'name': 'digits', 'shape': [8, 8, 1]}}
  """
  return {"version": VERSION, **json.loads(json.dumps(parts, default=dataclasses.asdict))}


def defaults(cls: type) -> dict[str, Any]:
  """Give the fields of a dataclass that have a default, with it.

  >>> @dataclasses.dataclass
  ... class Training:
  ...   steps: int
  ...   seed: int = 0
  >>> defaults(Training)
  {'seed': 0}
  """
  return {field.name: field.default for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}


def differences(
  held: Mapping[str, Any], wanted: Mapping[str, Any], default: Mapping[str, Any] | None = None
) -> list[str]:
  """Name each field in which two records differ, with both values.

  Args:
    held: the record of the run that is there.
    wanted: the record of the run that is asked for.
    default: the value of a field that a record does not have, part by part. A field without one has to be in both.

  Returns:
    A text for each field that differs; none if the records agree.

  >>> differences({"training": {"steps": 5}}, {"training": {"steps": 9, "seed": 0}}, {"training": {"seed": 0}})
  ['training.steps is 5 there, and 9 here']
  """
  found: list[str] = []
  _compare("", held, wanted, default or {}, found)
  return found


def _compare(name: str, held: Any, wanted: Any, default: Any, found: list[str]) -> None:
  if isinstance(held, Mapping) and isinstance(wanted, Mapping):
    default = default if isinstance(default, Mapping) else {}
    for key in dict.fromkeys([*held, *wanted]):
      usual = default.get(key, _ABSENT)
      _compare(f"{name}.{key}" if name else key, held.get(key, usual), wanted.get(key, usual), usual, found)
  elif _plain(held) != _plain(wanted):
    found.append(f"{name} is {_shown(held)} there, and {_shown(wanted)} here")


_ABSENT = object()


def _plain(value: Any) -> Any:
  """Give a default as JSON would give it back."""
  return value if value is _ABSENT or value is None else json.loads(json.dumps(value))


def _shown(value: Any) -> str:
  return "absent" if value is _ABSENT else repr(value)
