"""Interleaved timing, so that the machine's mood is the same for all that is compared, and the report of it."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "torch", "diffusers")

Seconds = dict[str, list[float]]
Row = Mapping[str, Any]


def measure(runs: Mapping[str, Callable[[], object]], rounds: int = 9) -> Seconds:
  """Time each run ``rounds`` times, taking turns, after one of each to warm up."""
  times: Seconds = {name: [] for name in runs}
  for turn in range(rounds + 1):
    for name, run in runs.items():
      began = time.perf_counter()
      jax.block_until_ready(run())
      if turn:
        times[name].append(time.perf_counter() - began)
  return times


def summary(seconds: Seconds, base: str, *, label: str = "run") -> list[dict[str, Any]]:
  """Give a row for each run: median, the middle half's width as a share of it, and its time over the base's.

  The ratio is the median over the rounds' own ratios: what slows one round down slows both.
  """
  rows = []
  for name, values in seconds.items():
    median = statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (median,) * 3
    ratio = statistics.median(value / other for value, other in zip(values, seconds[base], strict=True))
    rows.append({label: name, "ms": median * 1e3, "spread": f"{(high - low) / median:.0%}", f"/ {base}": ratio})
  return rows


def table(rows: Sequence[Row]) -> str:
  """Lay rows out in Markdown; their keys are the columns, numbers get three digits."""
  heads = list(dict.fromkeys(key for each in rows for key in each))
  cells = [heads, ["---"] * len(heads), *([cell(each.get(head, "")) for head in heads] for each in rows)]
  return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def report(name: str, tables: Mapping[str, Sequence[Row]], facts: Iterable[str] = ()) -> None:
  """Print the tables of a benchmark, and write them to ``benchmarks/results/NAME.json`` with what they were taken on.

  Args:
    name: of the benchmark.
    tables: rows by the title of their table.
    facts: what else the figures need, in sentences.
  """
  facts = list(facts)
  conditions = {
    "date": datetime.date.today().isoformat(),
    "machine": f"{os.cpu_count()} cores, {platform.machine()}; JAX on {jax.devices()[0].device_kind}",
    "load": f"{os.getloadavg()[0]:.1f} runnable, of the last minute",
    "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
  }
  for title, rows in tables.items():
    print(f"\n{title}\n\n{table(rows)}")
  print("", *facts, *(f"{key}: {value}" for key, value in conditions.items()), sep="\n")
  RESULTS.mkdir(exist_ok=True)
  (RESULTS / f"{name}.json").write_text(json.dumps({**conditions, "facts": facts, "tables": tables}, indent=2) + "\n")


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def cell(value: Any) -> str:
  """Format a value of a row; numbers get three digits."""
  if not isinstance(value, float):
    return str(value)
  return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
