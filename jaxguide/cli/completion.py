"""The command ``completion``, which writes scripts that complete commands, options and names in a shell.

The scripts hold all words. So Tab answers at once: neither Python nor JAX is started.
"""

from typing import Annotated, Any, NamedTuple

import typer

from jaxguide.cli.help import Command, first_sentence, grouped_entries

app = typer.Typer()


class Word(NamedTuple):
  """A command or an option, what it does, and whether it takes a value."""

  name: str
  text: str
  takes_value: bool = False


@app.command(cls=Command)
def completion(
  shell: Annotated[str, typer.Argument(metavar="SHELL", help="The shell: bash, zsh or fish.")],
) -> None:
  """Write the script that completes commands, options and names in a shell.

  Put this line into ~/.bashrc: eval "$(jaxguide completion bash)". For zsh put it into ~/.zshrc, after compinit. For
  fish the command is: jaxguide completion fish > ~/.config/fish/completions/jaxguide.fish. The script holds the names
  of this version; a file of it is written anew after an update.

  Example: jaxguide completion bash
  """
  from jaxguide._core import checks
  from jaxguide.cli.main import app as program

  write = checks.lookup("shell", shell, {"bash": bash, "zsh": zsh, "fish": fish})
  print(write(words_of(typer.main.get_command(program)), values()), end="")


def words_of(program: Any) -> dict[Word, list[Word]]:
  """Return the commands of the program with their options."""
  commands = {}
  for name, command in sorted(program.commands.items()):
    context = command.context_class(command, info_name=name)
    options = [
      Word(flag, entry.text, " " in entry.usage)
      for entries in grouped_entries(command, context).values()
      for entry in entries
      if entry.usage.startswith("--")
      for flag in ((f"--{entry.name}", f"--no-{entry.name}") if "[no-]" in entry.usage else (f"--{entry.name}",))
    ]
    described = next(part for part in (command.help or "").split("\n\n") if not part.startswith("Example: "))
    everything = Word("--help-all", "Show every option with its whole description.")
    commands[Word(name, first_sentence(" ".join(described.split())))] = [*options, everything]
  return commands


def values() -> dict[str, list[str]]:
  """Return the names that options take, by option."""
  from jaxguide import generate
  from jaxguide.evaluation import features
  from jaxguide.generate.settings import DTYPES, JOINS
  from jaxguide.training.config import MATMUL_PRECISIONS

  tables = {**generate.overview(), "--features": features.help_rows()}
  named = {option: [row.name for row in rows] for option, rows in tables.items() if option.startswith("--")}
  fixed = {"--join": JOINS, "--dtype": DTYPES, "--matmul-precision": MATMUL_PRECISIONS}
  return {**named, **{option: [*names] for option, names in fixed.items()}}


def bash(commands: dict[Word, list[Word]], named: dict[str, list[str]]) -> str:
  """Return the script for bash."""
  choices = "\n".join(f'    {option}) words="{" ".join(names)}" ;;' for option, names in named.items())
  options = "\n".join(
    f'      {command.name}) words="{" ".join(option.name for option in found)}" ;;'
    for command, found in commands.items()
  )
  return f"""_jaxguide() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=""
  case "${{COMP_WORDS[COMP_CWORD-1]}}" in
{choices}
  esac
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{" ".join(command.name for command in commands)} --help --version"
  elif [ -z "$words" ] && [[ "$word" == -* ]]; then
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _jaxguide jaxguide
"""


def zsh(commands: dict[Word, list[Word]], named: dict[str, list[str]]) -> str:
  """Return the script for zsh."""

  def listed(words: Any) -> str:
    return " ".join(_quoted(f"{word.name}:{first_sentence(word.text)}") for word in words)

  choices = "\n".join(f"    {option}) compadd -- {' '.join(names)}; return ;;" for option, names in named.items())
  options = "\n".join(f"    {command.name}) words_of=({listed(found)}) ;;" for command, found in commands.items())
  return f"""#compdef jaxguide
_jaxguide() {{
  local -a words_of
  if (( CURRENT == 2 )); then
    words_of=({listed([*commands, Word("--help", "Show the help."), Word("--version", "Show the version.")])})
    _describe 'command' words_of
    return
  fi
  case "${{words[CURRENT-1]}}" in
{choices}
  esac
  if [[ "${{words[CURRENT]}}" != -* ]]; then
    _files
    return
  fi
  case "${{words[2]}}" in
{options}
  esac
  _describe -o 'option' words_of
}}
compdef _jaxguide jaxguide
"""


def fish(commands: dict[Word, list[Word]], named: dict[str, list[str]]) -> str:
  """Return the script for fish."""
  lines = [
    f"complete -c jaxguide -n __fish_use_subcommand -f -a {command.name} -d {_quoted(command.text)}"
    for command in commands
  ]
  lines += [f"complete -c jaxguide -n __fish_use_subcommand -f -l {name}" for name in ("help", "version")]
  for command, options in commands.items():
    for option in options:
      takes = " -r" if option.takes_value else ""
      takes = f" -x -a {_quoted(' '.join(named[option.name]))}" if option.name in named else takes
      lines.append(
        f"complete -c jaxguide -n '__fish_seen_subcommand_from {command.name}' -l {option.name[2:]}{takes}"
        f" -d {_quoted(first_sentence(option.text))}"
      )
  return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
  """Quote a text for zsh and fish. They escape an apostrophe in different ways, so it becomes a Unicode quotation mark.

  >>> _quoted("OpenAI's")
  "'OpenAI’s'"
  """
  return "'" + text.replace("'", "’").replace("\\", "/") + "'"
