"""Names with options, as a command line has them: ``unipc:predictor=3``, ``cfg:scale=4,combine=rescaled,phi=0.7``."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxguide._core import checks

T = TypeVar("T")

WANTED = {int: "a whole number", float: "a number", bool: "true or false"}


class Spec(NamedTuple):
  """A name and what was said of it, each value still a text."""

  name: str
  options: Mapping[str, str]


def parse(text: str) -> Spec:
  """Read ``NAME`` or ``NAME:option=value,option=value``.

  Raises:
    ValueError: where an option has no value, or is given twice.

  >>> parse("cfg:scale=4,combine=rescaled")
  Spec(name='cfg', options={'scale': '4', 'combine': 'rescaled'})
  """
  name, colon, rest = text.partition(":")
  options: dict[str, str] = {}
  for part in rest.split(",") if colon else ():
    option, _, value = part.partition("=")
    if not (option and value):
      raise ValueError(f"{text!r} must be written NAME:option=value,option=value; {part!r} is not option=value")
    if option in options:
      raise ValueError(f"{text!r} gives {option} twice")
    options[option] = value
  return Spec(name, options)


def options_of(function: Callable[..., Any], *hidden: str) -> dict[str, inspect.Parameter]:
  """Give the parameters of a function or a class that can be written: a number, a word, or several of one kind."""
  parameters = inspect.signature(function, eval_str=True).parameters
  return {name: each for name, each in parameters.items() if name not in hidden and _kind(each) is not None}


def choose(spec: Spec, known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
  """Give the values of a spec's options, each as its parameter has it.

  Raises:
    ValueError: for an option that is not known, naming those that are, or a value of another kind.

  >>> choose(parse("unipc:predictor=3"), options_of(lambda predictor=2.0: None))
  {'predictor': 3.0}
  """
  for option in spec.options:
    if option not in known:
      has = f"it has {', '.join(known)}" if known else "it has none"
      raise ValueError(f"{spec.name!r} has no option {option!r}; {has}")
  return {option: _read(spec.name, known[option], text) for option, text in spec.options.items()}


def made(
  kind: str, text: str, table: Mapping[str, Callable[..., T]], *hidden: str
) -> tuple[Callable[..., T], dict[str, Any]]:
  """Look up the function that ``NAME:option=value,...`` names, and read its options.

  Args:
    kind: what the table holds, for errors.
    text: the name, with options if there are any.
    table: functions by name; their keyword parameters are the options.
    *hidden: parameters that are no options.

  Raises:
    ValueError: for an unknown name, naming the nearest, or an option that the function does not have.

  >>> function, options = made("power", "square:scale=2", {"square": lambda x, scale=1.0: scale * x * x}, "x")
  >>> function(3.0, **options)
  18.0
  """
  spec = parse(text)
  function = checks.lookup(kind, spec.name, table)
  return function, choose(spec, options_of(function, *hidden))


class HelpRow(NamedTuple):
  """A line of a help text: a name, what it does, and its options."""

  name: str
  text: str
  options: str


def help_row(name: str, function: Callable[..., Any], options: Mapping[str, inspect.Parameter]) -> HelpRow:
  """Give the line of a help text for a function: the first line of its docstring, and its options.

  >>> help_row("parse", parse, {})
  HelpRow(name='parse', text='Read NAME or NAME:option=value,option=value.', options='')
  """
  first_line = (inspect.getdoc(function) or "").splitlines()[0]
  return HelpRow(name, first_line.replace("`", ""), described(options))


def described(known: Mapping[str, inspect.Parameter]) -> str:
  """Give options with their defaults, for a help text.

  >>> described(options_of(lambda eta=0.5, kind="x": None))
  'eta=0.5, kind=x'
  """

  def shown(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is None or default is inspect.Parameter.empty:
      return parameter.name
    several = default if isinstance(default, tuple) else (default,)
    return f"{parameter.name}={'/'.join(f'{each:g}' if isinstance(each, float) else str(each) for each in several)}"

  return ", ".join(map(shown, known.values()))


def _read(name: str, parameter: inspect.Parameter, text: str) -> Any:
  kind = _kind(parameter)
  several = typing.get_origin(kind) is tuple
  each = typing.get_args(kind)[0] if several else kind
  try:
    if each is bool:
      return checks.lookup(parameter.name, text, {"true": True, "false": False})
    return tuple(map(each, text.split("/"))) if several else each(text)
  except ValueError:
    wanted = WANTED.get(each, "words")
    wanted = f"one or more, each {wanted}, with / between them" if several else wanted
    raise ValueError(f"{parameter.name} of {name!r} must be {wanted}, got {text!r}") from None


def _kind(parameter: inspect.Parameter) -> Any:
  """The type of a parameter's values: of those that its annotation allows the plainest, else that of its default."""
  kind = parameter.annotation
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    kind = next((each for each in (str, float, int) if each in typing.get_args(kind)), None)
  if kind in (str, float, int, bool) or typing.get_origin(kind) is tuple:
    return kind
  default = parameter.default
  return float if type(default) is int else type(default) if isinstance(default, bool | str | float) else None
