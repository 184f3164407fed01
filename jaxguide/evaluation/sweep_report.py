"""The report of a sweep: one HTML file with pictures, curves, a slider, a table and sentences on the figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxguide._core.files import PathLike, check_writable, write_atomically
from jaxguide.evaluation import pages
from jaxguide.evaluation import sweep_pictures as pictures
from jaxguide.evaluation import sweep_plots as plots
from jaxguide.evaluation.results import Figure, Point, Sweep
from jaxguide.evaluation.sweep_curves import (
  Axis,
  Curve,
  best_of,
  best_point,
  check_sweep,
  flatten,
  starred,
  text_of,
)
from jaxguide.evaluation.sweep_findings import at, findings, listed, troubles, value_text, where
from jaxguide.evaluation.sweep_panels import View, panels_of, view_of
from jaxguide.evaluation.sweep_words import Described, describe

MOST_CURVES = 6
"""The largest number of curves with pictures."""

MOST_FRAMES = 12
"""The largest number of points of a curve with pictures."""

MOST_NEIGHBOURS = (8, 6)
"""The largest number of samples with their nearest training images, and of these images."""


def write_sweep_report(path: PathLike, sweep: Sweep) -> None:
  """Write the report of a sweep: one HTML file that needs no network and runs no script.

  All statements about the results are computed from the figures. A page of many points shows pictures of some of them,
  and says so; its table has all.

  Args:
    path: the file, which is written atomically; missing folders are created.
    sweep: the points, and what is shown beside them. All but the points may be missing.

  Raises:
    TypeError: if ``sweep`` is not a `Sweep`.
    ValueError: if the sweep has no points, two points of a curve at one value, or images, labels or figures that cannot
      be shown.
    OSError: if the file cannot be written. This is checked before any work.

  >>> import pathlib, tempfile
  >>> from jaxguide.evaluation.results import Evaluation, Figure
  >>> evaluation = Evaluation(100, {"frechet_distance": Figure(1.5)}, {"features": "pixels"})
  >>> point = Point("cfg", {"scale": 2.0}, evaluation, np.zeros((4, 8, 8, 1), np.uint8), None, 3.0)
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   write_sweep_report(pathlib.Path(folder, "report.html"), Sweep("Guided digits", [point]))
  ...   "the Fréchet distance (pixels) is 1.5" in pathlib.Path(folder, "report.html").read_text("utf-8")
  True
  """
  check_writable(path)
  check_sweep(sweep)
  view = view_of(sweep)
  page = pages.render(
    "sweep_report.html.jinja",
    title=sweep.title,
    findings=findings(sweep),
    troubles=troubles(sweep),
    can_compare=sweep.real is not None,
    axis=view.axis,
    top=_top(sweep, view.axis, view.curves),
    legend=_legend(view, panels := panels_of(view)),
    colors=pages.COLORS,
    panels=panels,
    pictures=_walks(view),
    most_frames=MOST_FRAMES,
    table=_table(view),
    neighbours=_neighbours(sweep),
    measures=[(entry.heading, entry.description) for entry in view.described.values() if entry.description],
    facts=sweep.facts,
    protocol=view.comparison.shared,
    real_protocol=_real_protocol(view),
    command=sweep.command,
  )
  write_atomically(path, page.encode())


def _legend(view: View, panels: Mapping[str, Any]) -> list[tuple[str, plots.Plot]]:
  """The titles of the curves and of the real images, with how they look."""
  legend = [(curve.title, plots.swatch(i, is_joined=view.axis.is_ordered)) for i, curve in enumerate(view.curves)]
  has_real = any(panel["has_real"] for panel in panels["large"] + panels["small"])
  return [*legend, ("real images", plots.swatch(None))] if has_real else legend


# --- the picture at the top -----------------------------------------------------------------------


def _top(sweep: Sweep, axis: Axis, curves: Sequence[Curve]) -> dict[str, Any] | None:
  """The samples of the best point, and real images of the same classes."""
  best, name = best_point(sweep)
  if not len(best.images):
    return None
  title = next(curve.title for curve in curves if any(point is best for point in curve.points))
  entry = describe(name, best.evaluation.protocol, sweep.real)
  if len(sweep.points) == 1:
    chosen = "There are no other samples to choose from."
  elif name:
    superlative = {"lower": "least", "higher": "highest", None: ""}[entry.better]
    text = value_text(best.evaluation.figures[name], entry)
    chosen = f"These samples are shown because their {entry.title} is the {superlative} of all: {text}."
  else:
    chosen = "These samples are the first of the sweep, since no figure says which are the best."
  layout = pictures.layout_of(best.images)
  has_real = sweep.real_images is not None and len(sweep.real_images) > 0
  labelled = [labels for labels in (best.labels, sweep.real_labels if has_real else None) if labels is not None]
  classes, total = pictures.chosen_classes(labelled, layout.classes) if labelled else ([], 0)
  notes = []
  if 0 < len(classes) < total:
    notes.append(f"{len(classes)} of {total:,} classes are shown.")
  side = max(best.images.shape[1:3])
  if side > pictures.LARGEST:
    notes.append(f"Images of {side} pixels are shown at {pictures.LARGEST} pixels.")

  def blocks(images: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    made = pictures.by_class(images, labels, classes, sweep.class_names, layout, pictures.LARGEST)
    return {"blocks": made, **_columns(layout, made, len(classes) if labels is not None else 0)}

  return {
    "title": f"Samples: {title}, {where([best], axis)}",
    "what": f"Samples with {title} {at([best], axis)}",
    "chosen": chosen,
    "notes": notes,
    "samples": blocks(best.images, best.labels),
    "real": blocks(sweep.real_images, sweep.real_labels) if has_real and sweep.real_images is not None else None,
  }


def _columns(layout: pictures.Layout, blocks: Sequence[pictures.Block], classes: int) -> dict[str, int]:
  """How many blocks are beside each other on a laptop and on a phone."""
  across = pictures.across(layout, classes)
  on_phone = {10: 5, 5: 5}.get(layout.columns, 2)
  return {
    "wide": min(len(blocks), max(1, layout.columns // across)),
    "phone": min(len(blocks), max(1, on_phone // across)),
  }


# --- the slider and the grids ---------------------------------------------------------------------


def _some(points: Sequence[Point], most: int, always: Sequence[Point]) -> list[Point]:
  """Choose points evenly, with the ends and those that are always shown."""
  if len(points) <= most:
    return list(points)
  even = {round(i * (len(points) - 1) / (most - 1)) for i in range(most)}
  for i, point in enumerate(points):
    if any(point is one for one in always) and i not in even:
      even.remove(min(even - {0, len(points) - 1}, key=lambda j: abs(j - i)))
      even.add(i)
  return [points[i] for i in sorted(even)]


def _walks(view: View) -> dict[str, Any] | None:
  """The slider and the grid of each curve of two points or more, with what a reader should know of both."""
  sweep, axis = view.sweep, view.axis
  ranked = best_point(sweep)[1]
  bests = {
    curve.title: (best_of(curve.points, ranked, describe(ranked, {}).better) or list(curve.points))[0]
    for curve in view.curves
  }
  shown = [
    (curve.title, some)
    for curve in view.curves[:MOST_CURVES]
    if len(some := _some([p for p in curve.points if len(p.images)], MOST_FRAMES, [bests[curve.title]])) > 1
  ]
  if not shown:
    return None
  points = [point for _, some in shown for point in some]
  plan = pictures.plan_for(points, len(points))
  shared = min(len(point.images) for point in points)
  labels = next((np.asarray(point.labels)[:shared] for point in points if point.labels is not None), None)
  classes, total = ([], 0) if labels is None else pictures.chosen_classes([labels], plan.classes)
  layout = pictures.layout_of(points[0].images)
  layout = layout._replace(rows=min(plan.each, layout.rows))
  walks, grids = [], []
  for title, some in shown:
    frames = []
    for point in some:
      made = pictures.by_class(point.images[:shared], labels, classes, sweep.class_names, layout, plan.side)
      figures = [(entry.title, value_text(point.evaluation.figures[name], entry))
                 for name, entry in view.described.items() if name in point.evaluation.figures]  # fmt: skip
      frames.append(
        {
          "text": text_of(point.values[axis.name]),
          "at": at([point], axis),
          "blocks": made,
          "figures": figures,
          **_columns(layout, made, len(classes)),
        }
      )
    start = next((i for i, point in enumerate(some) if point is bests[title]), 0)
    walks.append({"title": title, "frames": frames, "start": start})
    numbers = range(shared) if labels is None else [int(np.flatnonzero(labels == label)[0]) for label in classes]
    rows = []
    for row in list(numbers)[: plan.classes]:
      name = f"noise {row + 1}" if labels is None else pictures.class_name(int(labels[row]), sweep.class_names)
      rows.append((name, [(at([p], axis), pictures.block(name, p.images[[row]], 1, plan.side)) for p in some]))
    grids.append({"title": title, "columns": [frame["text"] for frame in frames], "rows": rows})
  return {
    "walks": walks,
    "grids": grids,
    "rows": "noise" if labels is None else "class",
    "notes": _notes(view, shown, plan, classes, total, points),
  }


def _notes(
  view: View,
  shown: Sequence[tuple[str, Sequence[Point]]],
  plan: pictures.Plan,
  classes: Sequence[int],
  total: int,
  points: Sequence[Point],
) -> list[str]:
  """What the pictures do not show."""
  notes = []
  if len(view.curves) > MOST_CURVES:
    notes.append(f"There are pictures of {len(shown)} of {len(view.curves)} curves.")
  if any(len(curve.points) > MOST_FRAMES for curve in view.curves):
    notes.append(f"At most {MOST_FRAMES} points of a curve are shown, with both ends and the best.")
  if 0 < len(classes) < total:
    notes.append(f"{len(classes)} of {total:,} classes are shown.")
  side = max(max(point.images.shape[1:3]) for point in points)
  if side > plan.side:
    notes.append(f"Images of {side} pixels are shown at {plan.side} pixels.")
  return notes


# --- the table ------------------------------------------------------------------------------------


def _table(view: View) -> dict[str, Any]:
  sweep, described = view.sweep, view.described
  best = {
    name: {id(point) for point in starred(view.comparable, name, entry.better)}
    for name, entry in described.items()
    if len(sweep.points) > 1
  }

  def cell(figure: Figure | None, entry: Described, is_best: bool = False) -> dict[str, Any] | None:
    if figure is None:
      return None
    interval = None if figure.interval is None else " to ".join(map(entry.text, figure.interval))
    return {"text": entry.text(figure.value), "interval": interval, "best": is_best}

  groups = []
  for curve in view.curves:
    lines = [
      {
        "at": text_of(point.values[view.axis.name]),
        "odd": id(point) in view.odd,
        "n": f"{point.evaluation.n:,}",
        "cells": [
          cell(point.evaluation.figures.get(name), entry, id(point) in best.get(name, ()))
          for name, entry in described.items()
        ],
        "seconds": _seconds(point.seconds),
        "speed": f"{point.evaluation.n / point.seconds:.3g}" if point.seconds else "",
      }
      for point in curve.points
    ]
    groups.append((curve.title, lines))
  real = None
  if sweep.real is not None:
    cells = [cell(sweep.real.figures.get(name), entry) for name, entry in described.items()]
    real = {"n": f"{sweep.real.n:,}", "cells": cells}
  return {
    "names": [entry.title for entry in described.values()],
    "groups": groups,
    "real": real,
    "differences": view.comparison.differences,
    "has_odd": bool(view.comparison.odd),
    "intervals": _intervals(view),
    "has_best": any(best.values()),
    "note": _real_note(view),
  }


def _real_note(view: View) -> str:
  """Say that the distance of the real images has another bias, if their number is another."""
  if view.sweep.real is None or "frechet_distance" not in view.sweep.real.figures:
    return ""
  num, real = view.comparable[0].evaluation.n, view.sweep.real.n
  if num == real or "frechet_distance" not in view.described:
    return ""
  title, way = view.described["frechet_distance"].title, "larger" if real < num else "smaller"
  return f"There are {real:,} real images and {num:,} samples, so that the {title} of the real images is {way} by bias."


def _intervals(view: View) -> list[str]:
  """Say what the intervals are, one sentence for each kind."""
  evaluations = [point.evaluation for point in view.sweep.points]
  evaluations += [view.sweep.real] if view.sweep.real is not None else []
  kinds: dict[str, dict[str, None]] = {}
  for evaluation in evaluations:
    for name, figure in evaluation.figures.items():
      if (figure.interval is not None or figure.kind) and name in view.described:
        kinds.setdefault(figure.kind or "an interval without a description", {})[view.described[name].title] = None
  return [f"Interval of the {listed([*titles], most=20)}: {kind}." for kind, titles in kinds.items()]


def _real_protocol(view: View) -> Mapping[str, str]:
  """The entries of the real images' protocol that are not those of the samples."""
  if view.sweep.real is None:
    return {}
  own = {"number of images": f"{view.sweep.real.n}", **dict(flatten(view.sweep.real.protocol))}
  return {name: text for name, text in own.items() if view.comparison.shared.get(name) != text}


# --- nearest training images ----------------------------------------------------------------------


def _neighbours(sweep: Sweep) -> dict[str, Any] | None:
  if sweep.neighbours is None or sweep.neighbour_rows is None or not len(sweep.neighbours):
    return None
  best = best_point(sweep)[0]
  most, across = MOST_NEIGHBOURS
  rows = []
  for i, row in enumerate(sweep.neighbour_rows[:most]):
    name = f"sample {i + 1}"
    if best.labels is not None:
      name += f", {pictures.class_name(int(best.labels[row]), sweep.class_names)}"
    images = [best.images[row], *sweep.neighbours[i, :across]]
    rows.append((name, [pictures.block(name, image[None], 1, pictures.SMALL) for image in images]))
  return {"rows": rows, "count": len(rows[0][1]) - 1, "total": len(sweep.neighbours)}


def _seconds(value: float | None) -> str:
  if value is None:
    return ""
  return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
