"""The figures of a training: fetched from the device once per interval, checked, and appended to ``metrics.jsonl``."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide._core.files import write_atomically
from jaxguide.models import arrays

EDGES = tuple(2.0**k for k in range(-6, 7))
"""The edges of the bins of noise levels (sigma), each twice the one before. The outermost bins are open."""

PER_EXAMPLE = ("losses", "sigmas")

AHEAD = 32
"""The host starts at most this many steps before the device has finished the first of them, to limit the batches in
memory."""

NAMED = 8
"""The largest number of examples that an error names."""


class Step(NamedTuple):
  """A step whose figures have not been fetched yet.

  Args:
    number: the number of the step, from 0.
    rows: (batch_size,) the positions of the examples in the dataset; None if they are not known.
    metrics: the figures, arrays on the device.
  """

  number: int
  rows: np.ndarray | None
  metrics: Mapping[str, Any]


class NotFinite(Exception):
  """A step whose loss or gradient is not finite.

  Args:
    problem: what is not finite, and in which step.
    examples: the examples with a loss that is not finite, with their noise levels; empty if there are none.
  """

  def __init__(self, problem: str, examples: str = ""):
    self.problem, self.examples = problem, examples
    super().__init__(problem)


def read(path: Path, until: float | int = math.inf) -> list[dict[str, Any]]:
  """Return the lines of a ``metrics.jsonl`` up to a step. A line that was cut off by a kill is left out."""
  lines = []
  for text in path.read_text().splitlines() if path.exists() else ():
    try:
      line = json.loads(text)
    except ValueError:
      continue
    if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= until:
      lines.append(line)
  return lines


class Journal:
  """Collects the figures of steps, and writes a line per interval.

  The figures of an interval are fetched after the first step of the next interval was started. So the device has work
  while the host waits for them.

  Args:
    path: ``metrics.jsonl``. Lines after ``start`` are removed: they are of a process that was killed. None if another
      process writes it.
    start: number of completed steps.
    batch_size: examples per step.
    example_name: the name of an example by its position, for errors.
    skip: number of steps that may have a loss or gradient that is not finite.
    skipped: number of such steps so far.
    log: receives each new line, such as a writer or a progress bar.
  """

  def __init__(
    self,
    path: Path | None,
    start: int,
    batch_size: int,
    *,
    example_name: Callable[[int], str] = str,
    skip: int = 0,
    skipped: int = 0,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
  ):
    self.path, self.batch_size, self.example_name, self.log = path, batch_size, example_name, log
    self.skip, self.skipped = skip, skipped
    lines = read(path, start) if path is not None else []
    self.seconds = float(lines[-1].get("seconds", 0.0)) if lines else 0.0
    if path is not None:
      write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    self._steps: list[Step] = []
    self._ready: list[Step] = []
    self._since, self._paused = time.perf_counter(), 0.0

  def add(self, step: Step) -> None:
    """Add a step, whose figures may still be computed. Figures of the interval before it are fetched now."""
    self._steps.append(step)
    if len(self._steps) > AHEAD:
      jax.block_until_ready(self._steps[-AHEAD].metrics)
    self._write_ready()

  def end_interval(self) -> None:
    """End an interval after the last step that was added. Its line is written after the next step."""
    self._write_ready()
    self._ready, self._steps = self._steps, []

  def flush(self, further: Callable[[], Mapping[str, Any]] | None = None) -> None:
    """Write the line of all steps so far now, which waits for the device.

    Args:
      further: returns further figures of the line. It is called once the losses are known to be finite.

    Raises:
      NotFinite: if a loss or a gradient is not finite, and no further step may be skipped.
    """
    self._write_ready()
    self._ready, self._steps = self._steps, []
    self._write_ready(further)

  @contextmanager
  def pause(self) -> Iterator[None]:
    """Leave the time of a block out of the speed, such as that of saving."""
    start = time.perf_counter()
    yield
    self._paused += time.perf_counter() - start

  def _write_ready(self, further: Callable[[], Mapping[str, Any]] | None = None) -> None:
    steps, self._ready = self._ready, []
    if not steps:
      return
    fetched = jax.device_get([step.metrics for step in steps])
    self._check(steps, fetched)
    line = {**_means(fetched), **self._speed(len(steps)), "memory": memory(), "skipped": self.skipped}
    line = {"step": steps[-1].number + 1, **line}
    if further is not None:
      with self.pause():
        line.update(further())
    if self.path is None:
      return
    try:
      with self.path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    except OSError as error:
      raise arrays.cannot_write(self.path, error.strerror or str(error)) from error
    self.log(line)

  def _check(self, steps: Sequence[Step], fetched: Sequence[Mapping[str, Any]]) -> None:
    for step, metrics in zip(steps, fetched, strict=True):
      what = next((name for name in ("loss", "gradient_norm") if not np.isfinite(metrics.get(name, 0.0))), None)
      if what is None:
        continue
      self.skipped += 1
      if self.skipped > self.skip:
        name = {"loss": "the loss", "gradient_norm": "the gradient"}[what]
        after = f", after {self.skip} that were stepped over" if self.skip else ""
        raise NotFinite(f"{name} is not finite at step {step.number}{after}", self._examples(step, metrics))

  def _examples(self, step: Step, metrics: Mapping[str, Any]) -> str:
    """Describe the examples whose loss is not finite; all of the batch if only the gradient is not finite."""
    losses, sigmas = (np.asarray(metrics.get(name, ())) for name in PER_EXAMPLE)
    if step.rows is None or not losses.size:
      return ""
    bad = np.flatnonzero(~np.isfinite(losses))
    among = bad if bad.size else np.arange(len(losses))
    texts = [f"{self.example_name(int(step.rows[i]))} (sigma {sigmas[i]:.3g})" for i in among[:NAMED]]
    more = f" and {len(among) - NAMED} more" if len(among) > NAMED else ""
    return ("Its examples are " if not bad.size else "The loss is not finite for ") + ", ".join(texts) + more

  def _speed(self, count: int) -> dict[str, float]:
    now = time.perf_counter()
    elapsed, self._since = now - self._since, now
    trained, self._paused = max(elapsed - self._paused, 1e-9), 0.0
    self.seconds += elapsed
    return {"images_per_second": _rounded(count * self.batch_size / trained), "seconds": round(self.seconds, 3)}


def _means(fetched: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Return the mean of each figure over steps, without values that are not finite; and losses by noise level."""
  figures: dict[str, Any] = {}
  for name in fetched[0]:
    values = np.asarray([metrics[name] for metrics in fetched], np.float64)
    if name not in PER_EXAMPLE and values.ndim == 1:
      finite = values[np.isfinite(values)]
      # The rate is that of the last step.
      figures[name] = _rounded(values[-1] if name == "rate" else finite.mean()) if finite.size else None
  if all(name in fetched[0] for name in PER_EXAMPLE):
    losses, sigmas = (np.concatenate([np.ravel(metrics[name]) for metrics in fetched]) for name in PER_EXAMPLE)
    figures["loss_by_noise_level"] = by_noise_level(losses, sigmas)
  return figures


def by_noise_level(losses: np.ndarray, sigmas: np.ndarray) -> dict[str, list[float | None]]:
  """Return the mean loss in each bin of noise levels; None for a bin without a finite loss.

  >>> levels = by_noise_level(np.array([1.0, 3.0, 5.0]), np.array([0.3, 0.4, 1e3]))
  >>> levels["loss"][4], levels["loss"][-1], len(levels["sigma"])
  (2.0, 5.0, 13)
  """
  losses, sigmas = np.asarray(losses, np.float64), np.asarray(sigmas, np.float64)
  finite = np.isfinite(losses) & np.isfinite(sigmas)
  bins = np.clip(np.searchsorted(EDGES, sigmas[finite], side="right") - 1, 0, len(EDGES) - 2)
  counts = np.bincount(bins, minlength=len(EDGES) - 1)
  sums = np.bincount(bins, losses[finite], minlength=len(EDGES) - 1)
  means = [_rounded(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
  return {"sigma": list(EDGES), "loss": means}


def _rounded(value: Any) -> float:
  return float(f"{float(value):.6g}")


def memory() -> int:
  """Return the largest number of bytes that were in use on the first device; on CPU, those of the process now."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return int(stats["peak_bytes_in_use"])
  try:
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
  except OSError:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
