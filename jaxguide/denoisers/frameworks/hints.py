"""Constructors: their arguments and the types of these."""

import inspect
import typing
from typing import Any


def constructor(cls: Any) -> list[inspect.Parameter]:
  """Return the arguments of a class's constructor without ``self``."""
  return list(inspect.signature(cls.__init__).parameters.values())[1:]


def takes(cls: type, name: str) -> bool:
  """Whether a class's constructor has an argument of this name.

  >>> takes(inspect.Parameter, "kind")
  True
  """
  return any(one.name == name for one in constructor(cls))


def hints_of(cls: Any) -> dict[str, Any]:
  """Return the types of a constructor's arguments by name; `Any` for those that Python cannot look up.

  >>> class Net:
  ...   def __init__(self, width: int = 8, depth=2): ...
  >>> hints_of(Net)["width"]
  <class 'int'>
  """
  try:
    return typing.get_type_hints(cls.__init__)
  except (NameError, TypeError):
    found = {one.name: one.annotation for one in constructor(cls) if one.annotation is not inspect.Parameter.empty}
    return {name: Any if isinstance(hint, str) else hint for name, hint in found.items()}
