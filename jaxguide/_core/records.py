"""Records of runs: all that a run depends on, as plain data in named parts that can be compared field by field.

A record is what a JSON file holds: ``{"version": 1, "model": {...}, "training": {...}, "data": {...}}``. Each
configuration is a part of its own, so that fields of two configurations may share a name. A record that was written
before a field existed has the field's default.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxguide._core.files import PathLike

VERSION = 1

# More than any record has.
LARGEST = 2**26


def record(**parts: Any) -> dict[str, Any]:
  """Make a record of dataclasses and plain data, each under its own name, as it comes back from JSON.

  Raises:
    TypeError: if a part holds what JSON cannot, such as an array.

  >>> record(data={"name": "digits", "shape": (8, 8, 1)})
  {'version': 1, 'data': {'name': 'digits', 'shape': [8, 8, 1]}}
  """
  return {"version": VERSION, **json.loads(json.dumps(parts, default=dataclasses.asdict))}


def read(path: PathLike) -> dict[str, Any]:
  """Read a record, or another file of JSON with fields, strictly.

  Raises:
    FileNotFoundError: if there is no such file.
    OSError: if it cannot be read.
    ValueError: if it is torn: it is not JSON, names a field twice, or holds what no record does.
  """
  path = Path(path)
  try:
    if path.exists() and not path.is_file():
      raise ValueError("it is not a regular file")
    with path.open("rb") as file:
      content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
      raise ValueError(f"it is larger than {LARGEST:,} bytes")
    value = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    if not isinstance(value, dict):
      raise ValueError("it holds no fields")
  except NotADirectoryError:
    raise FileNotFoundError(f"there is no {path}") from None
  except RecursionError:
    raise ValueError(f"{path} is torn (it is nested too deeply)") from None
  except ValueError as error:
    raise ValueError(f"{path} is torn ({error})") from error
  return value


def check_version(held: Mapping[str, Any]) -> None:
  """Check that a record is of this version or an older one.

  Raises:
    ValueError: if it is not.

  >>> check_version({"version": 2})
  Traceback (most recent call last):
  ...
  ValueError: the record has version 2, and this jaxguide knows those up to 1: use a newer one
  """
  version = held.get("version")
  if type(version) is not int or version < 1:
    raise ValueError(f"the record has version {version!r}, which is none")
  if version > VERSION:
    raise ValueError(
      f"the record has version {version}, and this jaxguide knows those up to {VERSION}: use a newer one"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
  return fields


def _refuse(constant: str) -> None:
  raise ValueError(f"{constant} is no number")


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
