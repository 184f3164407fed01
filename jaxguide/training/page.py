"""The page of a training run, ``index.html``: curves and the newest pictures, in one file without scripts."""

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxguide._core.files import write_atomically
from jaxguide.training import grids, journal, run_folder

PICTURES = 6
"""The number of pictures on the page."""

POINTS = 400
"""The largest number of points of a curve."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 260, 64, 30, 12, 24

Number = int | float

REFRESH = 30
"""Number of seconds after which a browser reads the page of an unfinished run again."""


class Curve(NamedTuple):
  """A curve of a plot: its name, and its points in pixels as an SVG path has them."""

  name: str
  path: str


class Plot(NamedTuple):
  """A plot as the template draws it."""

  title: str
  note: str
  curves: Sequence[Curve]
  x_ticks: Sequence[tuple[float, str]]
  y_ticks: Sequence[tuple[float, str]]
  x_label: str
  summary: str


def write(folder: Path, facts: Mapping[str, str], done: int, steps: int) -> None:
  """Write the page of a run from its metrics and pictures.

  Args:
    folder: the folder of the run.
    facts: what is shown at the top, by name.
    done: number of completed steps.
    steps: number of steps of the whole training.
  """
  import jinja2

  lines = journal.read(folder / run_folder.METRICS)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("jaxguide.training", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
  )
  pictures = [
    (int(path.stem), base64.b64encode(path.read_bytes()).decode())
    for path in grids.newest(folder / run_folder.SAMPLES, PICTURES)
  ]
  text = environment.get_template("page.html.jinja").render(
    title=folder.name,
    facts={**facts, **_progress(lines, done, steps)},
    plots=plots(lines),
    pictures=pictures,
    refresh=REFRESH if done < steps else None,
    size=(WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT),
  )
  write_atomically(folder / run_folder.PAGE, text.encode())


def _progress(lines: Sequence[Mapping[str, Any]], done: int, steps: int) -> dict[str, str]:
  last = lines[-1] if lines else {}
  facts = {"steps": f"{done:,} of {steps:,} ({done / steps:.0%})"}
  if isinstance(last.get("loss"), float):
    facts["loss"] = f"{last['loss']:.4g}"
  if last.get("images_per_second"):
    facts["speed"] = f"{last['images_per_second']:,.0f} images/s"
  if last.get("seconds"):
    minutes = last["seconds"] / 60
    facts["time so far"] = f"{minutes:,.1f} min" if minutes < 120 else f"{minutes / 60:,.1f} h"
  if last.get("memory"):
    facts["memory"] = f"{last['memory'] / 2**20:,.0f} MiB"
  if last.get("skipped"):
    facts["steps stepped over"] = str(last["skipped"])
  return facts


def plots(lines: Sequence[Mapping[str, Any]]) -> list[Plot]:
  """Return the plots of a run's metrics, without those that have no points."""
  made = [
    _over_steps("Loss", "Mean of each interval. It should fall, then flatten.", lines, {"loss": "loss"}, log=True),
    _over_steps("Accuracy", "Share of noisy training examples that are classified right.", lines, {"accuracy": ""}),
    _held_out(lines),
    _levels(lines),
    _over_steps(
      "Gradient norm",
      "Before clipping. Sudden peaks are a sign of instability.",
      lines,
      {"gradient_norm": ""},
      log=True,
    ),
    _over_steps("Learning rate", "", lines, {"rate": ""}),
    _over_steps("Images a second", "", lines, {"images_per_second": ""}),
  ]
  return [plot for plot in made if plot is not None]


def _over_steps(
  title: str, note: str, lines: Sequence[Mapping[str, Any]], names: Mapping[str, str], log: bool = False
) -> Plot | None:
  series = {
    shown: [(line["step"], line[name]) for line in lines if _is_number(line.get(name))] for name, shown in names.items()
  }
  return plot(title, note, series, "step", log_y=log)


def _held_out(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
  found = [(line["step"], line["held_out"]) for line in lines if isinstance(line.get("held_out"), Mapping)]
  series = {"": [(step, figures["mean_nll"]) for step, figures in found if _is_number(figures.get("mean_nll"))]}
  note = "Negative log-likelihood on held-out data. Where it rises, the classifier overfits."
  return plot("Held-out loss", note, series, "step")


def _levels(lines: Sequence[Mapping[str, Any]]) -> Plot | None:
  """Plot the loss against the noise level, at the beginning and at the end of the run so far."""
  found = [line for line in lines if isinstance(line.get("loss_by_noise_level"), Mapping)]
  chosen = {found[i]["step"]: found[i] for i in sorted({0, len(found) // 2, len(found) - 1})} if found else {}
  series = {}
  for step, line in chosen.items():
    levels = line["loss_by_noise_level"]
    middles = [math.sqrt(low * high) for low, high in zip(levels["sigma"], levels["sigma"][1:], strict=False)]
    series[f"step {step}"] = [(s, v) for s, v in zip(middles, levels["loss"], strict=True) if _is_number(v)]
  return plot("Loss by noise level", "Each bin of sigma by itself.", series, "sigma", log_x=True, log_y=True)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and math.isfinite(value)


def plot(
  title: str,
  note: str,
  series: Mapping[str, Sequence[tuple[Number, Number]]],
  x_label: str,
  *,
  log_x: bool = False,
  log_y: bool = False,
) -> Plot | None:
  """Return a plot of several series; None if they have fewer than two points.

  Args:
    title: what the plot shows.
    note: how it is read.
    series: points (x, y) by the name of the curve.
    x_label: the name of the horizontal axis.
    log_x: whether the horizontal axis is logarithmic.
    log_y: whether the vertical axis is logarithmic, if all values are above 0.
  """
  points = [point for values in series.values() for point in values]
  if len({x for x, _ in points}) < 2:
    return None
  log_y = log_y and all(y > 0 for _, y in points)
  x_map, x_ticks = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT, log_x)
  y_map, y_ticks = _axis([y for _, y in points], HEIGHT - BOTTOM, TOP, log_y)
  curves = []
  for name, values in series.items():
    thinned = values[:: -(-len(values) // POINTS)] if values else []
    if values and thinned[-1] != values[-1]:
      thinned = [*thinned, values[-1]]
    curves.append(Curve(name, "M" + " L".join(f"{x_map(x):.1f} {y_map(y):.1f}" for x, y in thinned) if thinned else ""))
  (_, first), (_, last) = points[0], points[-1]
  summary = f"{title} from {first:.4g} to {last:.4g}"
  return Plot(title, note, [curve for curve in curves if curve.path], x_ticks, y_ticks, x_label, summary)


def _axis(values: Sequence[Number], start: int, end: int, log: bool) -> Any:
  """Return a map from values to pixels, and the ticks: their pixels and texts."""
  change = math.log10 if log else float
  low, high = change(min(values)), change(max(values))
  if high - low < 1e-12 * max(abs(low), abs(high), 1e-12):
    low, high = low - abs(low or 1) * 0.5, high + abs(high or 1) * 0.5

  def to_pixels(value: Number) -> float:
    return start + (change(value) - low) / (high - low) * (end - start)

  def position(number: Number) -> float:
    return start + (number - low) / (high - low) * (end - start)

  if log and high - low >= 1:
    numbers = range(math.ceil(low), math.floor(high) + 1)
    every = -(-len(numbers) // 6)
    return to_pixels, [(position(number), _text(10.0**number)) for number in numbers[::every]]
  distance = (high - low) / 4
  if log:
    powers = range(math.floor(low), math.ceil(high) + 1)
    round_values = [digit * 10.0**power for power in powers for digit in (1, 2, 3, 5, 7)]
    inside = [value for value in round_values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    if len(inside) > 1:
      return to_pixels, [(to_pixels(value), _text(value)) for value in inside]
    return to_pixels, [(position(low + i * distance), _text(10 ** (low + i * distance))) for i in range(5)]
  size = 10 ** math.floor(math.log10(distance))
  width = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= distance)
  first = math.ceil(low / width - 1e-9)
  ticks = [first * width + i * width for i in range(6) if first * width + i * width <= high + 1e-9 * width]
  return to_pixels, [(position(tick), _text(tick)) for tick in ticks]


def _text(value: Number) -> str:
  return f"{value:,.0f}" if abs(value) >= 1000 and value == round(value) else f"{value:.3g}"
