"""The shell lines of the documentation: found on a page, checked by name, and made small to be run.

A fence without a language, or with ``bash``, ``sh``, ``shell`` or ``console``, holds shell lines. A backslash continues
a line. The line ``<!-- not run: REASON -->`` before a fence leaves its commands unrun.
"""

import configparser
import dataclasses
import os
import re
import shlex
from pathlib import Path

import typer.main

from jaxguide import cli, evaluation
from jaxguide._core import checks
from jaxguide.evaluation import features, grid, measures
from jaxguide.generate import Settings
from jaxguide.models import importers, pretrained

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PROGRAM = typer.main.get_command(cli.app)

FENCE = re.compile(
  r"^(?P<indent> *)```(?:bash|sh|shell|console)?[ \t]*\n(?P<text>.*?)^(?P=indent)```[ \t]*$", re.MULTILINE | re.DOTALL
)
OTHER_FENCE = re.compile(r"^( *)```(?!(?:bash|sh|shell|console)\b)\S.*?^\1```[ \t]*$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>[^\n]*\S) -->\s*\Z")
ENVIRONMENT = re.compile(r"[A-Z][A-Z0-9_]*=")
OPERATORS = {"&&", "||", ";", "|", "&"}


@dataclasses.dataclass(frozen=True)
class Command:
  """One command of a page.

  Args:
    line: the number of its line on the page.
    words: its words, without assignments to the environment and redirections.
    output: the file that its output is sent to, or None.
    reason: why it is not run, or None.
  """

  line: int
  words: tuple[str, ...]
  output: str | None = None
  reason: str | None = None

  @property
  def is_ours(self):
    """Whether it is a command of jaxguide."""
    return self.words[0] == "jaxguide"

  def __str__(self):
    return f"line {self.line}: {shlex.join(self.words)}"


def commands_of(text):
  """Give the commands of a page, in order."""
  # What is in fences of other languages is blanked out, so that the end of one is not taken for the start of another.
  text = OTHER_FENCE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
  for block in FENCE.finditer(text):
    marked = NOT_RUN.search(text[: block.start()])
    number = text.count("\n", 0, block.start("text")) + 1
    lines = block["text"].splitlines()
    while lines:
      first, line, taken = number, lines[0], 1
      while line.endswith("\\") and taken < len(lines):
        line = line[:-1] + lines[taken]
        taken += 1
      lines, number = lines[taken:], number + taken
      yield from _commands(line.strip().removeprefix("$ "), first, marked and marked["reason"])


def _commands(line, number, reason):
  """Give the commands of one line, those inside the words of others too."""
  lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", line), posix=True, punctuation_chars="&|;<>")
  lexer.whitespace_split = True
  try:
    tokens = list(lexer)
  except ValueError:  # Output that is shown, with a quotation mark that is alone.
    if not re.match(r"jaxguide |pip ", line):
      return
    raise
  words, output = [], None
  for token in [*tokens, ";"]:
    if token in OPERATORS:
      if words:
        yield Command(number, tuple(words), output, reason)
      words, output = [], None
    elif token in (">", ">>"):
      output = ""
    elif output == "":
      output = token
    elif words or not ENVIRONMENT.match(token):
      words.append(token)
      if re.search(r"(^|\$\()jaxguide [a-z]", token):  # Such as ssh HOST "jaxguide train ...".
        inner = re.search(r"(?:^|\$\()(jaxguide [^)]*)", token)[1]
        yield from (dataclasses.replace(each, reason=f"inside {words[0]}") for each in _commands(inner, number, reason))


# --- names ----------------------------------------------------------------------------------------


def check(command):
  """Raise an error where a command names something that does not exist."""
  words = command.words
  if "jaxguide" in words and not (words[0] == "pip" or re.match(r"git|cd|python", words[0])):
    parsed(words[words.index("jaxguide") + 1 :])
  elif words[0] == "pip" or words[:3] == ("python", "-m", "pip"):
    for word in words:
      _check_extras(word)
  elif words[:3] == ("python", "-m", "benchmarks"):
    if len(words) > 3 and not (ROOT / "benchmarks" / f"{words[3]}.py").is_file():
      raise ValueError(f"there is no benchmark {words[3]!r}")
  else:
    for word in words[1:]:
      file = word.partition("::")[0]
      if re.match(r"(tests|benchmarks|docs|notebooks|\.ci)/[\w/]+\.\w+$", file) and not (ROOT / file).exists():
        raise ValueError(f"there is no file {file}")


def _check_extras(word):
  found = re.search(r"(?:^\.|^jaxguide|jaxguide\S* ?|/)\[([\w,-]+)\]", word)
  if found:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    for extra in found[1].split(","):
      checks.lookup("extra", extra, dict(settings["options.extras_require"]))


def parsed(arguments):
  """Parse the arguments of jaxguide as it does, and look up the names among their values; return the options.

  Raises:
    Exception: that of the command, for an option or a name that does not exist.
  """
  if not arguments or arguments[0].startswith("-"):
    return {}
  name, *rest = arguments
  checks.lookup("command", name, PROGRAM.commands)
  if "--help" in rest or "--help-all" in rest:
    return {}
  values = values_of(arguments)
  known = {field.name for field in dataclasses.fields(Settings)}
  settings = {field: value for field, value in values.items() if field in known}
  if name == "sweep":
    base = Settings(**{field: value for field, value in settings.items() if field != "guidance"})
    scales = [float(text) for text in (values["scales"] or "1").split(",")]
    grid.cells(base, values["guidance"] or "cfg", scales, values["over"] or ())
  elif name in ("sample", "export-sampler"):
    Settings(**settings)
  if name == "train":
    _check_training(values)
  if values.get("features"):
    features.parse(values["features"])
  if values.get("measures"):
    measures.check_names(values["measures"].split(","))
  if name == "import-adm" or (name == "import" and (values["family"] or values["preset"])):
    _check_weights("adm" if name == "import-adm" else values["family"], values["preset"])
  if name == "demo":
    checks.lookup("demo", values["name"], evaluation.demo.DEMOS)
  return values


def values_of(arguments):
  """Return the options of a command of jaxguide by name, None for those that are not given."""
  name, *rest = arguments
  values = PROGRAM.commands[name].make_context(name, list(rest)).params
  return {option: value if value != () and value != [] else None for option, value in values.items()}


def _check_training(values):
  """Make the settings of a training, if they are all given, as the command does, on data that need not be there."""
  import numpy as np

  from jaxguide import data, training
  from jaxguide.cli import train
  from jaxguide.training import toml

  given = {
    section: {name: values[name] for name in names if values[name] is not None}
    for section, names in train.SECTIONS.items()
  }
  given["model"] = {} if values["network"] is None else {"network": values["network"]}
  if values["preset"] is not None:
    given["preset"] = values["preset"]
  for assignment in values["set_"] or ():
    toml.assign(given, assignment)
  if values["name"] is not None:
    given = toml.merge(toml.read(pretrained.settings(values["name"])), given)
  if ":" in (values["network"] or ""):  # A module of the user's own, which is not here.
    given["model"], given["preset"] = {}, "none"
  # What begins from a file of settings, a run or a model has settings that are not on the page.
  if values["config"] is None and values["init_from"] is None and "source" in given["data"]:
    size = given["data"].get("size") or 32
    images = data.Images(np.zeros((2, size, size, 3), np.uint8), [0, 1], 2, "photos")
    training.recipe(given, images).model_config(images)


def _check_weights(family, preset):
  families = importers.families()
  if family is not None:
    families = {family: checks.lookup("family", family, families)}
  if preset is not None:
    checks.lookup("preset", preset, {name: None for each in families.values() for name in each.presets})


def check_span(text):
  """Check the names of the options in a command that stands in a sentence, where values may be placeholders."""
  words = text.split()[1:]
  if not words or not re.fullmatch(r"[a-z][a-z-]+", words[0]):
    return
  command = checks.lookup("command", words[0], PROGRAM.commands)
  options = {"--help", "--help-all"}.union(*((*each.opts, *each.secondary_opts) for each in command.params))
  for word in words[1:]:
    if re.match(r"--[a-z]", word):
      checks.lookup("option", word.partition("=")[0], dict.fromkeys(options))


# --- small ----------------------------------------------------------------------------------------

# What is added to a command of the documentation, so that it takes seconds. The last value of an option counts.
# Five steps have a level in the intervals that pages give.
FEW = {
  "classifier-report": "--num 4 --samples 1 --steps 2 --scale 1 --overwrite",
  "encode": "--size 16",
  "evaluate": "--features pixels",
  "export-sampler": "--steps 2 --platforms cpu",
  "reference": "--features pixels --size 8 --overwrite",
  "sample": "--steps 5 --num 4",
  "sweep": "--steps 2 --num 4 --features pixels",
  "train": "--steps 2 --size 8 --held-out 0.25",
  "train that goes on": "--steps 4",
}

# The fields of networks that make them small, where a training names the network.
SMALL = {
  "unet": {"model_channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": []},
  "dit": {"hidden_size": 16, "depth": 1, "num_heads": 2},
}
SMALL |= {"classifier": SMALL["unet"], "sit": SMALL["dit"]}

# Values that are made small, by option: meshes for the four devices of the tests, and two of several values.
VALUES = {
  "--mesh": [(r"(fsdp|data)=[48]\b", r"\1=2")],
  "--over": [(r"^steps=.*", "steps=2,3"), (r"^([^=]+=[^,]+,[^,=]+),.*", r"\1")],
  "--scales": [(r"^([^,]+,[^,]+),.*", r"\1")],
}


def small(arguments, continues=False):
  """Return the arguments of a command of jaxguide with those of a small one.

  Args:
    arguments: the name of the command and its arguments.
    continues: whether it is a training that goes on.
  """
  name, *rest = arguments
  rest = [_replaced(before, word) for before, word in zip([name, *rest], rest, strict=False)]
  values = values_of([name, *rest])
  if name != "train":
    return [name, *rest, *FEW.get(name, "").split()]
  if values["print_config"]:
    return [name, *rest]
  if continues and values["source"] is None:
    return [name, *rest, *FEW["train that goes on"].split()]
  added = FEW["train"].split() + (FEW["train that goes on"].split() if continues else [])
  # Three examples run on one of the four devices, for which a step compiles in half of the time.
  added += ["--batch-size", "3" if values["mesh"] is None else "4", "--sample-every", "0"]
  if values["accumulation"]:
    added += ["--accumulation", "1"]
  preset = "unet" if values["preset"] in (None, "size", "none") else values["preset"].partition("-")[0].lower()
  network = values["network"] or preset
  if values["init_from"] is None:
    for field, value in SMALL.get(network, {}).items():
      added += ["--set", f"model.fields.{field}={value}"]
  return [name, *rest, *added]


def _replaced(option, word):
  for pattern, value in VALUES.get(option, ()):
    word = re.sub(pattern, value, word)
  return word


def written(arguments):
  """Return the path that a command of jaxguide writes to, or None."""
  values = values_of(arguments)
  if values.get("print_config") or values.get("dry_run"):
    return None
  return values.get("out")


def read(arguments):
  """Give the paths that a command of jaxguide may read: all but the one that it writes, if it does not go on there."""
  values = values_of(arguments)
  continues = arguments[0] == "train" and not any(values[option] for option in ("source", "name", "config"))
  for option, value in values.items():
    if option != "out" or continues:
      yield from (os.fspath(each) for each in (value if isinstance(value, list | tuple) else [value]) if _is_path(each))


def _is_path(value):
  return isinstance(value, str | os.PathLike) and bool(os.fspath(value))
