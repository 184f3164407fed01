"""The plots of a report of a sweep: which there are, their values, and what is said about them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxguide.evaluation import sweep_plots as plots
from jaxguide.evaluation.results import Point, Sweep
from jaxguide.evaluation.sweep_curves import Axis, Comparison, Curve, axis_of, compare, curves_of, measures_of, text_of
from jaxguide.evaluation.sweep_findings import DISTANCES, value_text, where
from jaxguide.evaluation.sweep_words import Described, describe

TRADE = (("precision", "accuracy"), ("recall", "coverage", "diversity"))
"""The first of each that the points have are plotted against each other: fidelity against diversity."""


class View(NamedTuple):
  """A sweep with what is derived from it.

  Args:
    sweep: the sweep.
    axis: its axis.
    curves: its curves.
    comparison: which points have the same protocol.
    comparable: the points whose protocol is that of most.
    odd: the identities of the others.
    described: all measures by name.
  """

  sweep: Sweep
  axis: Axis
  curves: Sequence[Curve]
  comparison: Comparison
  comparable: Sequence[Point]
  odd: frozenset[int]
  described: Mapping[str, Described]

  def real(self, name: str) -> float | None:
    """The value of a measure of the real images."""
    figure = None if self.sweep.real is None else self.sweep.real.figures.get(name)
    return None if figure is None else figure.value


def view_of(sweep: Sweep) -> View:
  """Derive what the parts of the report share.

  Raises:
    ValueError: if two points of a curve are at one value of the axis.
  """
  comparison = compare(sweep)
  kept = [point for i, point in enumerate(sweep.points) if i not in comparison.odd]
  protocol = kept[0].evaluation.protocol
  return View(
    sweep,
    axis_of(sweep),
    curves_of(sweep),
    comparison,
    kept,
    frozenset(id(sweep.points[i]) for i in comparison.odd),
    {name: describe(name, protocol, sweep.real) for name in measures_of(sweep.points)},
  )


def panels_of(view: View) -> dict[str, Any]:
  """The large plots, each for a laptop and for a phone, and the small ones."""
  names = list(view.described) if len(view.sweep.points) > 1 else []
  trade = [next((name for name in group if name in names), None) for group in TRADE]
  large: list[dict[str, Any]] = []
  small: list[dict[str, Any]] = []
  if trade[0] and trade[1]:
    large += _plane(view, trade[1], trade[0])
  if len(view.axis.values) == 1:
    names = []
  first = next((name for name in DISTANCES if name in names), None)
  for name in sorted(names, key=lambda name: name != first):
    if name == first or (not large and not small):
      large.append(_along(view, name, (plots.WIDE, plots.NARROW)))
    else:
      small.append(_along(view, name, (plots.NARROW,)))
  return {"large": large, "small": small, "has_bars": _has_intervals(view)}


def _has_intervals(view: View) -> bool:
  return any(figure.interval for point in view.sweep.points for figure in point.evaluation.figures.values())


def _tip(view: View, curve: Curve, point: Point, names: Sequence[str]) -> str:
  figures = [(view.described[name], point.evaluation.figures[name]) for name in names]
  parts = [f"{entry.title} {value_text(figure, entry)}" for entry, figure in figures]
  return f"{curve.title}, {where([point], view.axis)}: {', '.join(parts)}"


def _plane(view: View, across: str, up: str) -> list[dict[str, Any]]:
  curves = [
    [
      plots.Value(
        (x := point.evaluation.figures[across]).value,
        (y := point.evaluation.figures[up]).value,
        x.interval,
        y.interval,
        text_of(point.values[view.axis.name]),
        _tip(view, curve, point, (up, across)),
        id(point) in view.odd,
      )
      for point in curve.points
      if {across, up} <= {*point.evaluation.figures}
    ]
    for curve in view.curves
  ]
  if not any(curves):
    return []
  entries = view.described
  title = f"{entries[up].title} against {entries[across].title}"
  real = (view.real(across), view.real(up))
  star = None if real[0] is None or real[1] is None else (real[0], real[1])
  titles = (entries[across].heading, entries[up].heading)
  sizes = [
    plots.plot(curves, titles, star, _summary(view, title, curves), size, is_joined=view.axis.is_ordered)
    for size in (plots.WIDE, plots.NARROW)
  ]
  missing = [sum(map(len, curves)) - panel.labels for panel in sizes]
  note = f"A point is labelled with its {view.axis.word}"
  note += ", where there is room." if any(missing) else "."
  return [{"sizes": sizes, "note": note, "has_real": star is not None}]


def _along(view: View, name: str, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
  places = dict(zip(view.axis.values, plots.places(view.axis), strict=True))
  curves = [
    [
      plots.Value(
        places[point.values[view.axis.name]],
        (figure := point.evaluation.figures[name]).value,
        None,
        figure.interval,
        "",
        _tip(view, curve, point, (name,)),
        id(point) in view.odd,
      )
      for point in curve.points
      if name in point.evaluation.figures
    ]
    for curve in view.curves
  ]
  entry, real = view.described[name], view.real(name)
  title = f"{entry.title} over the {view.axis.title}"
  summary = _summary(view, title, curves)
  titles, at = (view.axis.title, entry.heading), None if real is None else (None, real)
  drawn = [
    plots.plot(curves, titles, at, summary, size, axis=view.axis, is_joined=view.axis.is_ordered) for size in sizes
  ]
  return {"sizes": drawn, "note": "", "has_real": real is not None}


def _summary(view: View, title: str, curves: Sequence[Sequence[plots.Value]]) -> str:
  ends = [
    (
      values[0].tip
      if len(values) == 1
      else f"from {values[0].tip} to {values[-1].tip.rpartition(f'{curve.title}, ')[2]}"
    )
    for curve, values in zip(view.curves, curves, strict=True)
    if values
  ]
  return f"{title}: {'; '.join(ends)}. The table has all values."
