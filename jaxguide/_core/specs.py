"""Names with options, in command-line syntax: ``unipc:predictor=3``, ``cfg:scale=4,combine=rescaled,phi=0.7``."""

import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from jaxguide._core import checks

T = TypeVar("T")

KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


class Spec(NamedTuple):
  """A name and its options. The values of the options are still texts."""

  name: str
  options: Mapping[str, str]


def parse(text: str) -> Spec:
  """Read ``NAME`` or ``NAME:option=value,option=value``.

  Raises:
    ValueError: if an option has no value, or occurs twice.

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
      raise ValueError(f"{text!r} has the option {option} twice")
    options[option] = value
  return Spec(name, options)


def options_of(function: Callable[..., Any], *hidden: str) -> dict[str, inspect.Parameter]:
  """Return the parameters of a function or a class that can be set in a text, except the ``hidden`` ones.

  These are the parameters whose value is a number, a word, true or false, or a tuple of one such kind.
  """
  parameters = inspect.signature(function, eval_str=True).parameters
  return {
    name: parameter for name, parameter in parameters.items() if name not in hidden and _kind(parameter) is not None
  }


def choose(spec: Spec, known: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
  """Convert the texts of a spec's options to values, each of the kind of its parameter.

  Raises:
    ValueError: for an unknown option (the message lists the known ones), or a value of another kind.

  >>> choose(parse("unipc:predictor=3"), options_of(lambda predictor=2.0: None))
  {'predictor': 3.0}
  """
  for option in spec.options:
    if option not in known:
      known_options = f"it has {', '.join(known)}" if known else "it has none"
      raise ValueError(f"{spec.name!r} has no option {option!r}; {known_options}")
  return {option: _read(spec.name, known[option], text) for option, text in spec.options.items()}


def resolve(
  kind: str, text: str, table: Mapping[str, Callable[..., T]], *hidden: str
) -> tuple[Callable[..., T], dict[str, Any]]:
  """Look up the function of a text ``NAME:option=value,...``, and convert the options to values.

  Args:
    kind: what the table contains, for error messages.
    text: the name, with or without options.
    table: functions by name. Their parameters are the options.
    *hidden: parameters that are not options.

  Returns:
    The function, and the values of its options by name.

  Raises:
    ValueError: for an unknown name (the message has the nearest one), or an option that the function does not have.

  >>> function, options = resolve("power", "square:scale=2", {"square": lambda x, scale=1.0: scale * x * x}, "x")
  >>> function(3.0, **options)
  18.0
  """
  spec = parse(text)
  function = checks.lookup(kind, spec.name, table)
  return function, choose(spec, options_of(function, *hidden))


class HelpRow(NamedTuple):
  """A row of a help text: a name, a description, and the options."""

  name: str
  text: str
  options: str


def help_row(name: str, function: Callable[..., Any], options: Mapping[str, inspect.Parameter]) -> HelpRow:
  """Make the row of a help text for a function from the first line of its docstring and its options.

  >>> help_row("parse", parse, {})
  HelpRow(name='parse', text='Read NAME or NAME:option=value,option=value.', options='')
  """
  first_line = (inspect.getdoc(function) or "").splitlines()[0]
  return HelpRow(name, first_line.replace("`", ""), described(options))


def described(known: Mapping[str, inspect.Parameter]) -> str:
  """Format options with their defaults, for a help text.

  >>> described(options_of(lambda eta=0.5, kind="x": None))
  'eta=0.5, kind=x'
  """

  def shown(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is None or default is inspect.Parameter.empty:
      return parameter.name
    values = default if isinstance(default, tuple) else (default,)
    return f"{parameter.name}={'/'.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)}"

  return ", ".join(map(shown, known.values()))


def _read(name: str, parameter: inspect.Parameter, text: str) -> Any:
  """Convert the text of an option to a value of the kind of its parameter."""
  kind = _kind(parameter)
  several = typing.get_origin(kind) is tuple
  element = typing.get_args(kind)[0] if several else kind
  try:
    if element is bool:
      return checks.lookup(parameter.name, text, {"true": True, "false": False})
    return tuple(map(element, text.split("/"))) if several else element(text)
  except ValueError:
    expected = KINDS.get(element, "words")
    expected = f"one or more, each {expected}, with / between them" if several else expected
    raise ValueError(f"{parameter.name} of {name!r} must be {expected}, got {text!r}") from None


def _kind(parameter: inspect.Parameter) -> Any:
  """Return the type of a parameter's values, or None if they cannot be written as a text.

  The annotation decides: of a union, the first of str, float and int that it contains. Else the default's type decides,
  where float stands for int.
  """
  kind = parameter.annotation
  if typing.get_origin(kind) in (typing.Union, types.UnionType):
    kind = next((plain for plain in (str, float, int) if plain in typing.get_args(kind)), None)
  if kind in (str, float, int, bool) or typing.get_origin(kind) is tuple:
    return kind
  default = parameter.default
  return float if type(default) is int else type(default) if isinstance(default, bool | str | float) else None


def described_fields(cls: type) -> dict[str, str]:
  """Return the description of each field of a class: its entry under Args in the docstring.

  >>> class Walk:
  ...   \"\"\"A walk.
  ...
  ...   Args:
  ...     steps: Number of steps,
  ...       at least 1.
  ...   \"\"\"
  >>> described_fields(Walk)
  {'steps': 'Number of steps, at least 1.'}
  """
  arguments = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL)
  entries = re.split(r"\n(?=\w+: )", textwrap.dedent(arguments.group(1))) if arguments else []
  pairs = (entry.split(": ", 1) for entry in entries)
  return {name.strip(): " ".join(text.split()) for name, text in pairs}
