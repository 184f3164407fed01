"""Options of commands, made from the fields of dataclasses.

A field becomes an option: its name, its type and its default are those of the field, and its help is the field's entry
under Args in the docstring of the class. So a new field of `jaxguide.generate.Settings` is a new option of ``jaxguide
sample``.
"""

import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxguide._core.specs import described_fields


def options_of(
  cls: type, names: Mapping[str, str] | None = None, only: Sequence[str] | None = None, unset: bool = False
) -> list[inspect.Parameter]:
  """Give the options of a command that fills a dataclass.

  Args:
    cls: a dataclass. Its docstring describes every field under Args.
    names: names of options where they are not those of the fields; ``label`` for ``labels``, which is given once for
      each value.
    only: the fields that become options. The default is all.
    unset: whether an option that is not given is None, so that it can be told from one that is given the default.

  Raises:
    KeyError: if the docstring does not describe a field.
  """
  descriptions, annotations = described_fields(cls), typing.get_type_hints(cls)
  parameters = []
  for field in dataclasses.fields(cls):
    if only is not None and field.name not in only:
      continue
    kind = _kind(annotations[field.name])
    default = None if unset else field.default
    is_optional = default is None
    name = (names or {}).get(field.name, field.name).replace("_", "-")
    flag = f"--{name}" if kind is not bool or default is False else f"--{name}/--no-{name}"
    text = descriptions[field.name].replace("`", "")
    option = typer.Option(flag, help=text[:1].upper() + text[1:])
    parameters.append(
      inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        annotation=Annotated[kind | None if is_optional else kind, option],
      )
    )
  return parameters


def _kind(annotation: Any) -> Any:
  """Give the type of an option: what a command line can give of the types that a field may have."""
  kinds = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
  kinds = kinds or (annotation,)
  if any(kind is os.PathLike or typing.get_origin(kind) is os.PathLike for kind in kinds):
    return Path
  for kind in kinds:
    if typing.get_origin(kind) is not None:
      return list[_kind(typing.get_args(kind)[0])]  # type: ignore[misc]
  return next(kind for kind in (str, float, int, bool) if kind in kinds)


def with_options(*parameters: inspect.Parameter, after: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
  """Give a command further options. The function takes them as keyword arguments, ``**options``.

  Args:
    *parameters: the options, from `options_of`.
    after: the parameter of the command after which they come.
  """

  def decorate(function: Callable[..., None]) -> Callable[..., None]:
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    every: Any = function
    at = 1 + [parameter.name for parameter in own].index(after)
    in_order = [
      parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*own[:at], *parameters, *own[at:])
    ]
    every.__signature__ = inspect.Signature(in_order)
    every.__annotations__ = {parameter.name: parameter.annotation for parameter in in_order} | {"return": None}
    return function

  return decorate
