"""Interleaved timing: the machine's mood is the same for all that is compared."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax


def medians(runs: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
  """Give the median seconds of each run, after one of each to warm up, taking turns."""
  times: dict[str, list[float]] = {name: [] for name in runs}
  for turn in range(rounds + 1):
    for name, run in runs.items():
      began = time.perf_counter()
      jax.block_until_ready(run())
      if turn:
        times[name].append(time.perf_counter() - began)
  return {name: statistics.median(values) for name, values in times.items()}


def table(seconds: Mapping[str, float], base: str) -> str:
  """Lay the medians out with their ratio to one of them."""
  width = max(map(len, seconds))
  return "\n".join(
    f"{name:{width}}  {value * 1e3:9.2f} ms  {value / seconds[base]:6.2f}" for name, value in seconds.items()
  )


def row(cells: Sequence[str]) -> str:
  """Lay cells out as a row of a Markdown table."""
  return f"| {' | '.join(cells)} |"
