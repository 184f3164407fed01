"""The public names of the package, and those that the API pages in ``docs/api`` show."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jaxguide

DOCS = Path(__file__).parents[1] / "docs"
_MODULE = re.compile(r"^\.\. automodule:: (\S+)\n((?:   :.*\n)*)", re.MULTILINE)
_DATA = re.compile(r"^\.\. py:data:: (\w+)\n   :module: (\S+)", re.MULTILINE)


def packages() -> list[str]:
  """Give the public packages: those that say by ``__all__`` what is public, and no part of whose name is private."""
  found = pkgutil.walk_packages(jaxguide.__path__, "jaxguide.")
  names = [module.name for module in found if module.ispkg and "._" not in module.name]
  return ["jaxguide", *(name for name in names if hasattr(importlib.import_module(name), "__all__"))]


def public() -> Iterator[tuple[str, Any]]:
  """Give the public names and what they stand for; of modules without ``__all__``, what they define themselves."""
  for package in packages():
    for name in importlib.import_module(package).__all__:
      thing = getattr(importlib.import_module(package), name)
      yield f"{package}.{name}", thing
      if inspect.ismodule(thing):
        for inner in members(thing):
          yield f"{package}.{name}.{inner}", getattr(thing, inner)


def members(module: Any) -> list[str]:
  """Give the names that ``automodule`` shows: ``__all__``; or the functions and classes that the module defines."""
  if hasattr(module, "__all__"):
    return list(module.__all__)
  return [
    name
    for name, thing in vars(module).items()
    if not name.startswith("_") and callable(thing) and getattr(thing, "__module__", None) == module.__name__
  ]


def documented() -> dict[str, Any]:
  """Give what the API pages show, by the name under which they do."""
  shown = {}
  for page in sorted(DOCS.rglob("*.md")):
    text = page.read_text()
    for name, options in _MODULE.findall(text):
      module = importlib.import_module(name)
      shown[name] = module
      excluded = re.findall(r":exclude-members: (.*)", options)
      excluded = {part.strip() for line in excluded for part in line.split(",")}
      shown |= {f"{name}.{member}": getattr(module, member) for member in members(module) if member not in excluded}
    shown |= {
      f"{module}.{name}": getattr(importlib.import_module(module), name) for name, module in _DATA.findall(text)
    }
  return shown


def documented_as(thing: Any, shown: Mapping[str, Any]) -> str | None:
  """Give the name under which a thing is shown; None if it is not."""
  return next((name for name, other in shown.items() if other is thing), None)
