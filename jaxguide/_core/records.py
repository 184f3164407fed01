"""Records of runs: everything that a run depends on, as plain data that can be compared field by field.

A record is stored as JSON: ``{"version": 1, "model": {...}, "training": {...}, "data": {...}}``. Each configuration is
a separate part, so that two configurations may have fields of the same name. If a record was written before a field
existed, the field's default is used.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxguide._core.files import PathLike

VERSION = 1

LARGEST = 2**26
"""The largest size of a record's file in bytes. Real records are much smaller."""


def record(**parts: Any) -> dict[str, Any]:
  """Make a record from dataclasses and plain data, each under its own name, in the form in which JSON returns them.

  Raises:
    TypeError: if a part holds something that JSON cannot hold, such as an array.

  >>> record(data={"name": "digits", "shape": (8, 8, 1)})
  {'version': 1, 'data': {'name': 'digits', 'shape': [8, 8, 1]}}
  """
  return {"version": VERSION, **json.loads(json.dumps(parts, default=dataclasses.asdict))}


def flat(stored: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a record by name.

  >>> flat({"version": 1, "training": {"steps": 5}})
  {'version': 1, 'training.steps': 5}
  """
  fields: dict[str, Any] = {}
  for name, part in stored.items():
    fields.update(
      {f"{name}.{field}": value for field, value in part.items()} if isinstance(part, Mapping) else {name: part}
    )
  return fields


def read(path: PathLike) -> dict[str, Any]:
  """Read a record, or another JSON file that holds an object, strictly.

  Raises:
    FileNotFoundError: if there is no such file.
    OSError: if it cannot be read.
    ValueError: if it is damaged: it is not a JSON object, has a field twice, is nested too deeply or is too large.
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
      raise ValueError("it is not a JSON object")
  except NotADirectoryError:
    raise FileNotFoundError(f"there is no {path}") from None
  except RecursionError:
    raise ValueError(f"{path} is damaged (it is nested too deeply)") from None
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error})") from error
  return value


def check_version(stored: Mapping[str, Any]) -> None:
  """Check that a record has this version of the format or an older one.

  Raises:
    ValueError: if it has a newer one, or no valid version.

  >>> check_version({"version": 2})
  Traceback (most recent call last):
  ...
  ValueError: the record has version 2, but this jaxguide reads versions up to 1: use a newer one
  """
  version = stored.get("version")
  if type(version) is not int or version < 1:
    raise ValueError(f"the record has version {version!r}, which is not a whole number of at least 1")
  if version > VERSION:
    raise ValueError(
      f"the record has version {version}, but this jaxguide reads versions up to {VERSION}: use a newer one"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f"it has the field {next(name for name in names if names.count(name) > 1)!r} twice")
  return fields


def _refuse(constant: str) -> None:
  raise ValueError(f"{constant} is not a number of JSON")


def defaults(cls: type) -> dict[str, Any]:
  """Return the defaults of a dataclass's fields, by name. Fields without a default are left out.

  >>> @dataclasses.dataclass
  ... class Training:
  ...   steps: int
  ...   seed: int = 0
  >>> defaults(Training)
  {'seed': 0}
  """
  return {field.name: field.default for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}


class Difference(NamedTuple):
  """A field in which two records differ. A value is `ABSENT` if the record does not have the field.

  Args:
    name: the field, such as ``training.steps``.
    stored: its value in the record of the run that already exists ("there").
    requested: its value in the record of the run that is requested now ("here").
  """

  name: str
  stored: Any
  requested: Any

  def __str__(self) -> str:
    return f"{self.name} is {shown(self.stored)} there, and {shown(self.requested)} here"


def differences(
  stored: Mapping[str, Any], requested: Mapping[str, Any], default: Mapping[str, Any] | None = None
) -> list[str]:
  """List the fields in which two records differ, with both values, as texts.

  Args:
    stored: the record of the run that already exists ("there").
    requested: the record of the run that is requested now ("here").
    default: values for fields that a record does not have, part by part. A field without a default differs if one
      record does not have it.

  Returns:
    One text for each field that differs. The list is empty if the records agree.

  >>> differences({"training": {"steps": 5}}, {"training": {"steps": 9, "seed": 0}}, {"training": {"seed": 0}})
  ['training.steps is 5 there, and 9 here']
  """
  return [str(difference) for difference in compare(stored, requested, default)]


def compare(
  stored: Mapping[str, Any], requested: Mapping[str, Any], default: Mapping[str, Any] | None = None
) -> list[Difference]:
  """List the fields in which two records differ, as `differences` does, but not as texts.

  >>> compare({"training": {"steps": 5}}, {"training": {"steps": 9}})
  [Difference(name='training.steps', stored=5, requested=9)]
  """
  found: list[Difference] = []
  _compare("", stored, requested, default or {}, found)
  return found


def _compare(name: str, stored: Any, requested: Any, default: Any, found: list[Difference]) -> None:
  """Append to ``found`` each difference between two values of a field, or of its parts."""
  if isinstance(stored, Mapping) and isinstance(requested, Mapping):
    defaults = default if isinstance(default, Mapping) else {}
    for key in dict.fromkeys([*stored, *requested]):
      default = defaults.get(key, ABSENT)
      _compare(f"{name}.{key}" if name else key, stored.get(key, default), requested.get(key, default), default, found)
  elif _plain(stored) != _plain(requested):
    found.append(Difference(name, stored, requested))


MOST_SHOWN = 200
"""The most letters of a list in a message."""

ABSENT = object()
"""The value of a field that a record does not have."""


def _plain(value: Any) -> Any:
  """Convert a default to the form in which JSON returns it."""
  return value if value is ABSENT or value is None else json.loads(json.dumps(value))


def shown(value: Any) -> str:
  """Write a value for a message: a long one by its ends.

  >>> shown([1, 2]), shown([0.25] * 100)
  ('[1, 2]', '100 values, 0.25 to 0.25')
  """
  if isinstance(value, list | tuple) and len(repr(value)) > MOST_SHOWN:
    return f"{len(value)} values, {value[0]!r} to {value[-1]!r}"
  return "absent" if value is ABSENT else repr(value)
