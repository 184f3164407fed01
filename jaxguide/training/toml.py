"""TOML files: reading with errors that name the file and the line, and writing."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxguide._core import checks
from jaxguide._core.files import PathLike, check_readable


def read(path: PathLike) -> dict[str, Any]:
  """Read a TOML file.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not valid TOML, naming the line.
  """
  path = Path(path)
  check_readable(path)
  try:
    return tomllib.loads(path.read_bytes().decode())
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no configuration file {path}") from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not valid TOML: {_reason(error)}") from None


def value(text: str) -> Any:
  """Return the value of a text on the command line: a TOML value, or else the text itself.

  >>> value("200_000"), value("[1.0, 2.0]"), value("true"), value("power:std=0.1")
  (200000, [1.0, 2.0], True, 'power:std=0.1')
  """
  try:
    return tomllib.loads(f"value = {text}")["value"] if "\n" not in text else text
  except ValueError:
    return text
  except RecursionError as error:
    raise ValueError(f"a value is not valid TOML: {_reason(error)}") from None


def _reason(error: Exception) -> str:
  return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def assign(sections: dict[str, Any], assignment: str) -> None:
  """Set one value, ``section.name=value``, in a nested dictionary.

  Raises:
    ValueError: if the text has another form.

  >>> sections = {}
  >>> assign(sections, "training.steps=200_000")
  >>> sections
  {'training': {'steps': 200000}}
  """
  name, equals, text = assignment.partition("=")
  *parts, last = name.strip().split(".")
  if not equals or not all([*parts, last]):
    raise ValueError(f"set must be given as section.name=value, such as training.steps=200000, got {assignment!r}")
  for part in parts:
    section = sections.setdefault(part, {})
    if not isinstance(section, dict):
      raise ValueError(f"{part} is a value and has no {last}: {assignment!r} cannot be set")
    sections = section
  sections[last] = value(text.strip())


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
  """Return nested dictionaries as one; a value of ``above`` replaces that of ``below``.

  Raises:
    ValueError: if ``below`` has a value where ``above`` has a dictionary.

  >>> merge({"run": {"keep": 2, "patience": 5}}, {"run": {"keep": 3}})
  {'run': {'keep': 3, 'patience': 5}}
  """
  merged = dict(below)
  for name, item in above.items():
    under = merged.get(name)
    if isinstance(item, Mapping) and name in merged and not isinstance(under, Mapping):
      raise ValueError(f"[{name}] must be a section with names and values, got {under!r}")
    merged[name] = merge(under, item) if isinstance(under, Mapping) and isinstance(item, Mapping) else item
  return merged


def plain(value: Any) -> Any:
  """Return a dataclass, or nested data, in the form that TOML can hold. Fields that are None are left out."""
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
  if isinstance(value, Mapping):
    return {name: plain(item) for name, item in value.items() if item is not None}
  return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def dumps(sections: Mapping[str, Any]) -> str:
  """Return nested data as the text of a TOML file.

  >>> print(dumps({"held_out": 0.1, "run": {"keep": 2, "patience": None}}), end="")
  held_out = 0.1
  <BLANKLINE>
  [run]
  keep = 2
  """
  import tomli_w

  # tomli_w writes each item of a list on a line of its own.
  return re.sub(r"\[\n((?:    .*,\n)+)\]", lambda match: _one_line(match[1]), tomli_w.dumps(plain(sections)))


def _one_line(items: str) -> str:
  texts = [line.strip().removesuffix(",") for line in items.splitlines()]
  return f"[{', '.join(texts)}]"


def fill(cls: Any, section: str, values: Any) -> Any:
  """Make a dataclass from a section of a file.

  Raises:
    ValueError: if the section is no table, has a name that the class does not have (naming the nearest), lacks one
      without a default, or has a value that the class refuses.
  """
  if not isinstance(values, Mapping):
    raise ValueError(f"[{section}] must be a section with names and values, got {values!r}")
  known = {field.name: field for field in dataclasses.fields(cls) if field.init}
  for name in values:
    checks.lookup(f"name in [{section}]", name, known)
  for name, field in known.items():
    required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    if required and name not in values:
      raise ValueError(f"{section}.{name} is missing: give it")
  return cls(**values)


def of_fit(model: Any, training: Any, run: Any, data: Any) -> str:
  """Return the ``config.toml`` of a run whose data came from Python."""
  head = f"# Written by jaxguide.training.fit. The data came from Python: {str(data.name)!r}.\n\n"
  return head + dumps({"model": model, "training": training, "run": run})
