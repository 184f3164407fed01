"""What CI runs, with stand-ins for its commands: what is shown, and with which status it ends."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / ".ci" / "run"

# A virtual environment whose commands are the stand-ins, and which is empty but for that.
PYTHON3 = """mkdir -p "$3/bin"
echo "PATH='$STANDINS':$PATH" > "$3/bin/activate"
echo "$3" > "$STANDINS/venv"
"""
COMMANDS = {
  "python3": PYTHON3,
  "pip": '[[ $* != *"[test]" ]] || exit "${INSTALL:-0}"',
  "pytest": """[[ $# == 0 ]] && exit "${QUICK:-0}"
touch "$STANDINS/slow"
sleep "${SLOW_SECONDS:-0}"
exit "${SLOW:-0}"
""",
  "mypy": 'sleep 0.5\necho "types were looked at"\nexit "${TYPES:-0}"',
  "jaxguide": 'exit "${INSTALLED:-0}"',
  **dict.fromkeys(("ruff", "nbstripout", "sphinx-build", "python"), "exit 0"),
}

pytestmark = pytest.mark.skipif(os.name == "nt" or shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def started(tmp_path):
  """Start it in a folder of its own, with other statuses of some commands."""

  def start(**statuses):
    standins = tmp_path / "bin"
    standins.mkdir()
    for name, text in COMMANDS.items():
      (standins / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
      (standins / name).chmod(0o755)
    (tmp_path / ".ci").mkdir()
    shutil.copy(RUN, tmp_path / ".ci")
    variables = {"PATH": f"{standins}:{os.environ['PATH']}", "STANDINS": str(standins)}
    return subprocess.Popen(
      ["bash", str(tmp_path / ".ci" / "run")],
      env={**os.environ, **variables, **{name: str(value) for name, value in statuses.items()}},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start


@pytest.mark.parametrize(
  ("statuses", "wanted", "checks"),
  [
    ({}, 0, 0),
    ({"SLOW": 3}, 3, 0),
    ({"TYPES": 4}, 4, 4),
    ({"SLOW": 3, "TYPES": 4}, 3, 4),
    ({"INSTALLED": 5, "TYPES": 4}, 5, 4),
  ],
  ids=str,
)
def test_what_runs_beside_the_tests_is_shown_in_every_case(started, tmp_path, statuses, wanted, checks):
  running = started(**statuses)
  output, _ = running.communicate(timeout=60)
  assert running.returncode == wanted
  assert output.endswith(f"Lint, types and the documentation (status {checks}):\ntypes were looked at\n")
  assert not Path((tmp_path / "bin" / "venv").read_text().strip()).exists()


@pytest.mark.parametrize("name", ["INSTALL", "QUICK"])
def test_a_failure_of_the_quick_tests_ends_it_at_once(started, tmp_path, name):
  running = started(**{name: 2})
  output, _ = running.communicate(timeout=60)
  assert (running.returncode, output) == (2, "")
  assert not (tmp_path / "bin" / "slow").exists()


def test_it_can_be_stopped(started, tmp_path):
  running = started(SLOW_SECONDS=2)
  while not (tmp_path / "bin" / "slow").exists():
    time.sleep(0.05)
  running.send_signal(signal.SIGTERM)  # Bash takes it when the command in front has ended.
  output, _ = running.communicate(timeout=60)
  assert running.returncode == 143
  assert "Lint, types and the documentation" in output
  assert not Path((tmp_path / "bin" / "venv").read_text().strip()).exists()
