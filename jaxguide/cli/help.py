"""The help of the commands: an example first, options in groups, and no more than one screen.

``--help`` shows as much as a screen holds: whole descriptions if they fit, else their first sentences, else the options
of the last groups by their names alone. ``--help-all`` shows everything, with the tables of names.
"""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import typer.core

from jaxguide._core.specs import HelpRow

SCREEN = 50
"""The most lines of a help."""

INDENT = 2

KINDS = {"path": "PATH", "str": "TEXT", "int": "INT", "integer": "INT", "float": "NUMBER"}

Tables = Mapping[str, Sequence[HelpRow]]

SAMPLING = {
  "Guidance": ["guidance", "scale", "scales", "classifier", "join"],
  "Solver": ["solver", "steps", "grid", "over", "clip"],
  "Pictures to start from, latents": ["init", "init-level", "base-samples", "vae", "vae-tile"],
  "Computation": ["batch-size", "dtype", "matmul-precision", "cudnn-attention"],
}
"""The options of `jaxguide.generate.Settings` by group."""

FIGURES = {
  "Figures": [
    *("interval", "resamples", "neighbours", "density-neighbours", "subsets", "subset-size", "splits", "figures-seed")
  ]
}
"""The options of `jaxguide.evaluation.evidence.Options`."""

DEVICES = {"Many devices and hosts": ["mesh", "distributed", "coordinator", "processes", "process-index"]}
"""The options of `jaxguide.cli.joining.Joining`."""


class Entry(NamedTuple):
  """An option or an argument in the help: its name, its first column, its description, and its default or the like."""

  name: str
  usage: str
  text: str
  facts: str


class Command(typer.core.TyperCommand):
  """A command whose help fits a screen. `grouped` makes one with groups of options and tables of names."""

  groups: Mapping[str, Sequence[str]] = {}
  tables: Callable[[], Tables] | None = None

  @classmethod
  def grouped(cls, groups: Mapping[str, Sequence[str]], tables: Callable[[], Tables] | None = None) -> type["Command"]:
    """Make the class of a command.

    Args:
      groups: names of options by the title of their group, the most important group first. Options that are in no
        group come before all groups.
      tables: gives names and what they do, by heading, for ``--help-all``. It is called only for the help.
    """
    return type("Command", (cls,), {"groups": groups, "tables": None if tables is None else staticmethod(tables)})

  def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
    """Print everything for ``--help-all``."""
    if "--help-all" in args and "--" not in args[: args.index("--help-all")]:
      print(self.whole_help(ctx))
      ctx.exit()
    return super().parse_args(ctx, args)

  def format_help(self, ctx: Any, formatter: Any) -> None:
    """Write the help that fits a screen."""
    groups, width = grouped_entries(self, ctx), formatter.width
    pages = [_page(self, ctx, groups, width, whole=True)] if self.tables is None else []
    pages += [_page(self, ctx, groups, width, hidden=number) for number in range(len(groups) + 1)]
    formatter.write(next((page for page in pages if len(page.splitlines()) <= SCREEN), pages[-1]))

  def whole_help(self, ctx: Any) -> str:
    """Return the help with all descriptions and the tables of names."""
    width = ctx.make_formatter().width
    text = _page(self, ctx, grouped_entries(self, ctx), width, whole=True)
    return text + ("" if self.tables is None else f"\n{table_text(self.tables(), width)}")


class Group(typer.core.TyperGroup):
  """The program: its help lists the commands by what they are for."""

  groups: Mapping[str, Sequence[str]] = {}

  def format_help(self, ctx: Any, formatter: Any) -> None:
    """Write the usage, examples, and each command with its first sentence."""
    usage, text = _head(self, ctx, formatter.width)
    lines = [*usage, "", *text]
    for title, names in _in_groups(self.groups, list(self.commands), "Further commands").items():
      rows = [(name, first_sentence(_paragraphs(self.commands[name])[1][0])) for name in names]
      lines += ["", f"{title}:", *_columns(rows, formatter.width)]
    options = [(entry.usage, entry.text) for entry in _entries(self, ctx)]
    formatter.write("\n".join([*lines, "", "Options:", *_columns(options, formatter.width)]) + "\n")


def table_text(tables: Tables, width: int = 78) -> str:
  """Lay out names, what they do and their options, by heading.

  >>> print(table_text({"--solver": [HelpRow("ddim", "DDIM.", "eta=0")]}))
  --solver:
    ddim  DDIM. [eta=0]
  """
  lines: list[str] = []
  for title, rows in tables.items():
    texts = [(name, f"{does} [{options}]" if options else does) for name, does, options in rows]
    lines += ["", f"{title}:", *_columns(texts, width)]
  return "\n".join(lines[1:])


def grouped_entries(command: Any, ctx: Any) -> dict[str, list[Entry]]:
  """Return the arguments and options of a command by the title of their group."""
  by_name = {entry.name: entry for entry in _entries(command, ctx)}
  titles = _in_groups(getattr(command, "groups", {}), list(by_name), "Options")
  return {title: [by_name[name] for name in names] for title, names in titles.items()}


def _in_groups(groups: Mapping[str, Sequence[str]], names: Sequence[str], rest: str) -> dict[str, list[str]]:
  """Put names into groups. Those that are in none come first, in a group of the name ``rest``."""
  taken = {name for group in groups.values() for name in group}
  whole = {rest: [name for name in names if name not in taken]}
  whole |= {title: [name for name in group if name in names] for title, group in groups.items()}
  return {title: group for title, group in whole.items() if group}


def _entries(command: Any, ctx: Any) -> list[Entry]:
  entries = []
  for param in command.get_params(ctx):
    record = param.get_help_record(ctx)
    if record is None:
      continue
    described = record[1].replace("\\[", "[")  # Older versions of Typer escape brackets.
    text, _, facts = f"{described} ".rpartition("  [")
    text, facts = (text, f"[{facts}".rstrip()) if facts.endswith("] ") and text else (described, "")
    is_argument = param.param_type_name == "argument"
    entries.append(
      Entry(
        param.name if is_argument else param.opts[0].lstrip("-"),
        record[0].split()[0] if is_argument else _usage(record[0]),
        text.strip(),
        facts,
      )
    )
  return entries


def _usage(text: str) -> str:
  """Shorten the first column of an option.

  >>> _usage("--clip / --no-clip"), _usage("--label <list[str]>"), _usage("--num INTEGER")
  ('--[no-]clip', '--label TEXT', '--num INT')
  """
  text = re.sub(r"^--([\w-]+) [/;,] --no-\1$", r"--[no-]\1", text.replace(" <bool>", ""))

  def kind(found: re.Match[str]) -> str:
    word = re.sub(r"^<?(list\[)?|\]?>?$", "", found[0].strip()).lower()
    return f" {KINDS[word]}" if word in KINDS else found[0]

  return re.sub(r" \S+$", kind, text)


def _paragraphs(command: Any) -> tuple[list[str], list[str]]:
  """Return the examples of a command's docstring, and its other paragraphs."""
  found = [" ".join(part.split()) for part in (command.help or "").replace("`", "").split("\n\n")]
  examples = [part.removeprefix("Example: ") for part in found if part.startswith("Example: ")]
  return examples, [part for part in found if not part.startswith("Example: ")]


def first_sentence(text: str) -> str:
  """Return the first sentence of a description.

  >>> first_sentence("Width of the mean, 0.1 or so. The default is 0.")
  'Width of the mean, 0.1 or so.'
  """
  return re.split(r"(?<=[.?!]) (?=[A-Z])", text, maxsplit=1)[0]


def _columns(rows: Sequence[tuple[str, str]], width: int, most: int = 30) -> list[str]:
  """Lay out two columns."""
  first = max([len(name) for name, _ in rows if len(name) <= most], default=0)
  lines = []
  for name, text in rows:
    head = f"{'':{INDENT}}{name:{first}}  " if name else " " * 2 * INDENT
    rest = textwrap.wrap(text, width - INDENT - first - 2, break_on_hyphens=False) or [""]
    if len(name) > first:
      lines.append(head.rstrip())
      head = " " * (INDENT + first + 2)
    lines.append((head + rest[0]).rstrip())
    lines += [" " * (INDENT + first + 2) + line for line in rest[1:]]
  return lines


def _head(command: Any, ctx: Any, width: int) -> tuple[list[str], list[str]]:
  """Return the lines of the usage with the examples, and those of the text."""
  examples, paragraphs = _paragraphs(command)
  usage = [f"Usage: {ctx.command_path} {' '.join(command.collect_usage_pieces(ctx)).replace('{', '').replace('}', '')}"]
  for example in examples:
    # A line that is broken by a backslash can still be copied.
    parts = textwrap.wrap(example, width - 11, break_long_words=False, break_on_hyphens=False)
    usage += f"Example: {(chr(92) + chr(10) + '    ').join(f'{part} ' for part in parts)}".rstrip().split("\n")
  text = [line for part in paragraphs for line in ["", *textwrap.wrap(part, width, break_on_hyphens=False)]]
  return usage, text[1:]


def _page(
  command: Any, ctx: Any, groups: Mapping[str, Sequence[Entry]], width: int, whole: bool = False, hidden: int = 0
) -> str:
  """Write a help: with whole descriptions or their first sentences, and the last ``hidden`` groups by name alone."""
  usage, text = _head(command, ctx, width)
  lines = [*usage, "", *text]
  shown = len(groups) - hidden
  for number, (title, entries) in enumerate(groups.items()):
    if number < shown:
      rows = [
        (entry.usage, f"{entry.text if whole else first_sentence(entry.text)} {entry.facts}") for entry in entries
      ]
      lines += ["", f"{title}:", *_columns(rows, width)]
    else:
      names = ", ".join(entry.usage.split()[0] for entry in entries)
      lines += [""] if number == shown else []
      lines += textwrap.wrap(f"{title}: {names}", width, subsequent_indent="  ", break_on_hyphens=False)
  if not whole:
    lines += ["", f"All of it in full: {ctx.command_path} --help-all"]
    lines += [] if command.tables is None else [f"Names and their own options: {ctx.find_root().info_name} methods"]
  return "\n".join(lines) + "\n"
