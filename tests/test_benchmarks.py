import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory, startup, timing

ROOT = Path(__file__).parent.parent
NO_BENCHMARKS = {"__init__", "__main__", "networks", "peers", "timing"}


def test_the_entry_lists_every_benchmark():
  made = subprocess.run([sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True)
  listed = {line.split()[0] for line in made.stdout.splitlines()[1:]}
  assert listed == {path.stem for path in ROOT.glob("benchmarks/*.py")} - NO_BENCHMARKS


def test_an_unknown_benchmark_is_one_sentence_that_names_the_nearest():
  made = subprocess.run(
    [sys.executable, "-m", "benchmarks", "samplin"], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert made.returncode == 1
  assert "sampling" in made.stderr
  assert "Traceback" not in made.stderr


@pytest.mark.slow
def test_programs_of_sampling_are_lowered():
  """They call what `sample_batch` compiles, which is not public."""
  assert "stablehlo" in memory.sampling_program(2, 1, 8).as_text()
  assert "stablehlo" in startup.sampling_program("64x64", 2, 1).as_text()


def test_help_lists_the_benchmarks():
  listed = subprocess.run(
    [sys.executable, "-m", "benchmarks", "unet", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
  )

  assert "  unet" in listed.stdout


def test_ratios_are_those_of_the_rounds():
  # One round was slow for both: their ratio does not see it, that of the medians would.
  seconds = {"ours": [1.0, 10.0, 1.0, 4.0], "theirs": [2.0, 20.0, 2.0, 8.0]}
  ours, theirs = timing.summary(seconds, "ours")
  assert (ours["/ ours"], theirs["/ ours"]) == (1.0, 2.0)
  assert (ours["ms"], theirs["ms"]) == (2500.0, 5000.0)


def test_measuring_takes_turns():
  turns = []
  seconds = timing.measure({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)
  assert turns == ["a", "b"] * 3
  assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_report_is_printed_and_written(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
  timing.report("some", {"title": [{"run": "a", "ms": 1234.5}, {"run": "b", "share": 0.12345}]}, ["a fact"])
  printed = capsys.readouterr().out
  assert "| run | ms | share |\n| --- | --- | --- |\n| a | 1234 |  |\n| b |  | 0.123 |" in printed
  written = json.loads((tmp_path / "results" / "some.json").read_text())
  assert written["tables"]["title"][0] == {"run": "a", "ms": 1234.5}
  assert written["facts"] == ["a fact"]
  assert written["versions"]["jax"]
