"""The help of the commands, and the scripts that complete them in a shell."""

import re
import shutil
import subprocess
import sys

import pytest

from jaxguide import cli, generate
from jaxguide.cli import help as pages
from jaxguide.cli.main import Program

COMMANDS = [name for names in Program.groups.values() for name in names]


@pytest.fixture
def run(monkeypatch, capsys):
  """Run the command; give its exit status, what it printed, and its errors."""
  monkeypatch.setenv("COLUMNS", "80")

  def run(*args):
    monkeypatch.setattr(sys, "argv", ["jaxguide", *args])
    with pytest.raises(SystemExit) as exit:
      cli.main()
    return exit.value.code, *capsys.readouterr()

  return run


def test_the_program_has_each_command_in_a_group(run):
  status, printed, _ = run("--help")
  assert status == 0
  assert len(printed.splitlines()) <= 50
  assert re.findall(r"^  ([a-z][a-z-]*)  +\S", printed, re.M) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_fits_a_screen_and_begins_with_an_example(run, name):
  status, printed, errors = run(name, "--help")
  lines = printed.splitlines()
  assert (status, errors) == (0, "")
  assert lines[0].startswith(f"Usage: jaxguide {name} [OPTIONS]")
  assert lines[1].startswith(f"Example: jaxguide {name}")
  assert len(lines) <= 50
  assert max(map(len, lines)) <= 80
  # What the screen has no room for is named, and --help-all describes it.
  status, everything, _ = run(name, "--help-all")
  assert status == 0
  options = set(re.findall(r"^  --(?:\[no-\])?([a-z0-9-]+)", everything, re.M))
  assert options <= set(re.findall(r"--(?:\[no-\])?([a-z0-9-]+)", printed))


def test_examples_are_commands_that_there_are(run, monkeypatch):
  """An example that has an option which the command does not have would be refused."""
  for name in COMMANDS:
    everything = run(name, "--help-all")[1]
    example = re.search(r"^Example: (.*?)\n\n", everything, re.M | re.S)[1].replace("\\\n", "")
    for option in re.findall(r" --([a-z-]+)", example):
      assert re.search(rf"^  --(\[no-\])?{option}\b", everything, re.M), (name, option)


def test_a_help_shows_what_there_is_room_for():
  sentences = "First sentence. Second sentence."
  entries = [pages.Entry(f"o{i}", f"--o{i} INT", sentences, "[default: 1]") for i in range(20)]
  groups = {"Options": entries[:2], "More": entries[2:]}

  class Command:
    help = "Do something.\n\nExample: jaxguide do --o1 2"
    tables = None

    def collect_usage_pieces(self, ctx):
      return ["[OPTIONS]"]

  class Context:
    command_path = "jaxguide do"

  whole = pages._page(Command(), Context(), groups, 78, whole=True)
  assert whole.count("Second sentence. [default: 1]") == 20
  short = pages._page(Command(), Context(), groups, 78, hidden=1)
  assert short.count("First sentence. [default: 1]") == 2
  assert "Second" not in short
  assert "More: --o2, --o3," in short
  assert "All of it in full: jaxguide do --help-all" in short


def test_an_example_that_is_broken_is_still_a_command(run):
  printed = run("sweep", "--help")[1]
  example = re.search(r"^Example: (.*?)\n\n", printed, re.M | re.S)[1]
  assert "\\\n" in example
  echo = subprocess.run(["bash", "-c", f"echo {example}"], capture_output=True, text=True, check=True).stdout
  assert "--num 1000 --out runs/photos/sweep" in echo


def test_a_default_that_is_the_networks_own_is_no_number(run):
  printed = " ".join(run("methods", "ddpm", "classifier")[1].split())
  assert "[variance=the model's, gradient_at=x]" in printed
  assert "[scale=the classifier's or 2, every=1]" in printed


def test_methods_shows_what_is_asked_for(run):
  status, printed, _ = run("methods", "solver", "karras")
  assert status == 0
  assert "--solver:\n" in printed
  assert "--grid:\n  karras" in printed
  assert "respaced" not in printed
  status, _, errors = run("methods", "karas")
  assert (status, errors) == (2, "jaxguide: there is no 'karas': jaxguide methods lists all names\n")


def test_python_m_jaxguide_is_jaxguide():
  found = subprocess.run([sys.executable, "-m", "jaxguide", "--version"], capture_output=True, text=True, check=True)
  import jaxguide

  assert found.stdout == f"jaxguide {jaxguide.__version__}\n"


# --- completion -----------------------------------------------------------------------------------


def completed(script, *words):
  """What bash offers after these words, the last of which is not finished."""
  line = f"{script}\nCOMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}\n_jaxguide\n"
  line += 'printf "%s\\n" "${COMPREPLY[@]}"'
  return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes(run):
  status, script, _ = run("completion", "bash")
  assert status == 0
  assert set(COMMANDS) < set(completed(script, "jaxguide", ""))
  assert completed(script, "jaxguide", "sw") == ["sweep"]
  assert completed(script, "jaxguide", "sample", "--cl") == ["--classifier", "--clip"]
  assert completed(script, "jaxguide", "sample", "--no-cl") == ["--no-clip"]
  names = [row.name for row in generate.overview()["--solver"]]
  assert completed(script, "jaxguide", "sample", "--solver", "") == names
  assert completed(script, "jaxguide", "train", "--data", "") == []  # bash then completes files


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_all_words(run, shell):
  status, script, _ = run("completion", shell)
  assert status == 0
  for name in COMMANDS:
    assert re.search(rf"['\s]{name}\b", script)
  assert "dpmpp-2m-sde" in script
  if shutil.which(shell) is None:
    pytest.skip(f"{shell} is not installed, so that the script is not run")
  subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_an_unknown_shell(run):
  status, _, errors = run("completion", "tcsh")
  assert status == 2
  assert "unknown shell 'tcsh'" in errors
