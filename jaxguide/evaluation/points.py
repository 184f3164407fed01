"""The points of a sweep: their samples are drawn and measured, and kept in files.

A point has two files: ``samples/NAME.npz``, and ``points/NAME.json`` with its settings, its figures and its speed.
"""

import dataclasses
import functools
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide import generate
from jaxguide._core import records
from jaxguide._core.bars import progress_bar
from jaxguide._core.files import write_atomically
from jaxguide.distributed import processes
from jaxguide.evaluation import evaluations
from jaxguide.evaluation.evidence import Evidence, Options
from jaxguide.evaluation.features import Features
from jaxguide.evaluation.grid import Cell
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.measures import chosen_measures
from jaxguide.evaluation.protocols import in_force
from jaxguide.evaluation.reference import Reference
from jaxguide.evaluation.results import Evaluation, Figure
from jaxguide.generate import Settings
from jaxguide.generate.plan import Load


@dataclasses.dataclass(frozen=True)
class Measured:
  """What all points are measured with. Calling it measures images."""

  reference: Reference
  features: Features
  judge: Judge | None
  measures: Sequence[str] | None
  options: Options

  def __call__(
    self,
    images: np.ndarray,
    labels: np.ndarray | None,
    sampling: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, float], object] = False,
  ) -> Evaluation:
    """Measure images. ``progress`` is that of `jaxguide.evaluation.evaluations.evaluate_against`."""
    return evaluations.evaluate_against(
      images,
      labels,
      self.reference,
      self.features,
      self.judge,
      measures=self.measures,
      options=self.options,
      sampling=sampling,
      progress=progress,
    )

  def check(self, image_shape: Sequence[int], labels: np.ndarray | None, num: int) -> None:
    """Check that the measures that are named can be computed, with empty images in place of the samples."""
    outputs = {name: np.zeros((num, 0)) for name in self.features.outputs}
    images = np.broadcast_to(np.zeros(1, np.uint8), (num, *image_shape))
    chosen_measures(
      self.measures, Evidence(images, labels, outputs, self.reference.statistics, self.judge, self.options)
    )

  def protocol(
    self, images: np.ndarray, labels: np.ndarray | None, sampling: Mapping[str, Any] | None
  ) -> dict[str, Any]:
    """Return the protocol that the figures of images would have."""
    return evaluations.protocol(images, labels, self.reference, self.features, self.judge, self.options, sampling)


def draw(
  out: Path, found: Sequence[Cell], measured: Measured, load: Load, progress: bool, devices: Any = None
) -> dict[str, str]:
  """Draw and measure every point, and return a fact about those that failed.

  A sample takes two steps of the bar: it is drawn, and then it is measured.
  """
  failed, total, show = [], 2 * sum(cell.settings.num for cell in found), progress and processes.is_first()
  compiled: set[Settings] = set()
  with progress_bar(total, title="sweep", unit="step", show=show) as bar:
    for cell in found:
      title = f"{cell.method}{'' if cell.settings.scale is None else f', scale {cell.settings.scale:g}'}"
      bar.set_postfix_str(title)
      program = dataclasses.replace(cell.settings, scale=None, seed=0, labels=None, num=1)
      watch = _Watch(bar, title, program not in compiled)
      try:
        generate.run(samples_of(out, cell), cell.settings, grow=True, progress=watch, load=load, devices=devices)
      except FloatingPointError as error:
        warnings.warn(f"{cell.name} is left out: {error}", stacklevel=3)
        failed.append(f"{cell.method} at scale {cell.settings.scale}: {error}")
        watch.reach(2 * cell.settings.num)
        continue
      if watch.batches:
        compiled.add(program)
      watch.reach(cell.settings.num)
      bar.set_postfix_str(f"{title}, measuring")
      _measure(out, cell, measured, watch)
      watch.reach(2 * cell.settings.num)
  return {"failed": "; ".join(failed)} if failed else {}


class _Watch:
  """Counts samples and takes the time of batches. The first batch may hold the compilation of the program.

  Args:
    bar: the progress bar.
    title: its text.
    compiles: whether the program is new, which the bar says until the first batch is there.
  """

  def __init__(self, bar: Any, title: str, compiles: bool):
    self.bar, self.title, self.compiles, self.seen = bar, title, compiles, 0
    self.batches: list[tuple[int, float]] = []
    self.last: float | None = None

  def __call__(self, number: int) -> None:
    now = time.perf_counter()
    if self.last is not None:
      self.batches.append((number, now - self.last))
    if self.compiles and len(self.batches) < 2:
      self.bar.set_postfix_str(self.title if self.batches else f"{self.title}, compiling")
    self.last = now
    self.reach(self.seen + number)

  def measuring(self, num: int, what: str, share: float) -> None:
    """Say what is computed of ``num`` samples that are drawn, and that a share of it is done."""
    self.bar.set_postfix_str(f"{self.title}, measuring: {what}")
    self.reach(num + int(num * share))

  def reach(self, steps: int) -> None:
    """Let the bar stand at a number of steps of this point."""
    self.bar.update(steps - self.seen)
    self.seen = steps

  def rate(self) -> tuple[float, bool] | None:
    """Return samples per second, and whether the time holds a compilation; None if nothing was drawn."""
    if not self.batches:
      return None
    warm = self.batches[1:] or self.batches
    return sum(number for number, _ in warm) / max(sum(seconds for _, seconds in warm), 1e-9), len(self.batches) == 1


def samples_of(out: Path, cell: Cell) -> Path:
  """Return the file of the samples of a point."""
  return out / "samples" / f"{cell.name}.npz"


def _measure(out: Path, cell: Cell, measured: Measured, watch: _Watch) -> None:
  """Measure the samples of a point, unless their figures of the same protocol are there, and write the point's file."""
  path = out / "points" / f"{cell.name}.json"
  kept = processes.from_first(read_point(path))
  rate = watch.rate()
  if rate is not None and (kept is None or kept.get("rate") is None or kept.get("cold") or not rate[1]):
    speed: dict[str, Any] = {"rate": rate[0], "cold": rate[1]}
  else:
    speed = {"rate": (kept or {}).get("rate"), "cold": (kept or {}).get("cold")}
  images, labels, sampling = evaluations.open_images(samples_of(out, cell))
  num = cell.settings.num
  images, labels = images[:num], None if labels is None else labels[:num]
  # With what was in force where a setting was left at its default.
  sampling = {**(in_force(sampling) or {}).get("settings", {}), "num": num}
  wanted = measured.protocol(images, labels, sampling)
  if kept is None or kept["evaluation"]["protocol"] != wanted or kept.get("measures") != measured.measures:
    result = _as_plain(measured(images, labels, sampling, functools.partial(watch.measuring, num)))
  else:
    result = kept["evaluation"]
  content = records.record(
    method=cell.method, settings=cell.settings, measures=measured.measures, evaluation=result, **speed
  )
  if content != kept and processes.is_first():
    write_atomically(path, json.dumps(content, indent=2).encode())


def _as_plain(result: Evaluation) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(result), default=list))


def read_point(path: Path) -> dict[str, Any] | None:
  """Read the file of a point; None if there is none, or it is damaged."""
  try:
    content = records.read(path)
    Cell(content["method"], Settings(**content["settings"]))
    complete = as_evaluation(content["evaluation"]).figures and {"rate", "cold"} <= content.keys()
    return content if complete else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def as_evaluation(content: Mapping[str, Any]) -> Evaluation:
  """Return the evaluation that a point's file holds as plain data."""
  figures = {
    name: Figure(figure["value"], None if figure["interval"] is None else tuple(figure["interval"]), figure["kind"])
    for name, figure in content["figures"].items()
  }
  return Evaluation(content["n"], figures, content["protocol"], tuple(content["warnings"]), content.get("left_out", {}))


def scale_of(cell: Cell) -> float | None:
  """Give the scale of a point. A guidance without one leaves the model as it is, which is conditional: scale 1."""
  used = cell.settings.guidance_specs or ()
  own = [spec.options["scale"] for spec in used if spec.takes_scale and "scale" in spec.options]
  if cell.settings.scale is not None:
    return cell.settings.scale
  return own[0] if own else None if any(spec.takes_scale for spec in used) else 1.0


def rate_of(points: Mapping[str, Any], name: str) -> float | None:
  """Give samples per second of a point; None if it is not known.

  A point whose only batch held a compilation has the rate of its neighbours.
  """
  own = points[name]
  alike = [one["rate"] for one in points.values() if one["method"] == own["method"] and one["rate"] and not one["cold"]]
  if (own["rate"] is None or own["cold"]) and alike:
    return float(np.median(alike))
  return own["rate"]
