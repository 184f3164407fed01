"""Figures as text: a table for a terminal, and a CSV file."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jaxguide.evaluation.evaluations import differences
from jaxguide.evaluation.measures import MEASURES
from jaxguide.evaluation.results import Evaluation, Figure, Sweep


def columns(evaluations: Sequence[Evaluation]) -> list[str]:
  """Return the names of the measures that at least one evaluation has, in the order of `MEASURES`."""
  return [name for name in MEASURES if any(name in one.figures for one in evaluations)]


def figure_text(name: str, figure: Figure | None) -> str:
  """Format a figure with half the width of its interval; empty for None.

  >>> figure_text("precision", Figure(0.8, (0.78, 0.82), "95 %")), figure_text("kid", Figure(1.234, (1.23, 1.238), ""))
  ('0.800 ± 0.020', '1.23 ± 0.00')
  """
  if figure is None:
    return ""
  text = MEASURES[name].text(figure.value)
  if figure.interval is None:
    return text
  half, percent = (figure.interval[1] - figure.interval[0]) / 2, text.endswith("%")
  decimals = len(text.rstrip("%").partition(".")[2])
  return f"{text} ± {half:.{decimals}{'%' if percent else 'f'}}"


def table(rows: Mapping[str, Evaluation] | Sweep, title: str = "samples") -> str:
  """Format evaluations as a plain-text table for a terminal. If their protocols differ, a line below says in what.

  Args:
    rows: evaluations by the name of their samples; or a sweep.
    title: the heading of the names.
  """
  if isinstance(rows, Sweep):
    headings, named = _of_sweep(rows)
  else:
    headings, named = [title], [((name,), one) for name, one in rows.items()]
  evaluations = [one for _, one in named]
  names = columns(evaluations)
  lines = [(*headings, "n", *(heading(name, evaluations) for name in names))]
  lines += [(*cells, str(one.n), *(figure_text(name, one.figures.get(name)) for name in names)) for cells, one in named]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  left = len(headings)
  text = [
    "  ".join(cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
    for pairs in (list(zip(cells, widths, strict=True)) for cells in lines)
  ]
  different = differences([one.protocol for one in evaluations])
  if different:
    text += ["", "The rows cannot be compared as they are. They differ in " + "; ".join(different) + "."]
  return "\n".join(text)


def heading(name: str, evaluations: Sequence[Evaluation]) -> str:
  """Give the short heading of a measure: its established name if all features are Inception's, else its name."""
  families = {str(one.protocol.get("features")).partition(":")[0] for one in evaluations}
  established = MEASURES[name].inception
  return established if established and families == {"inception"} else name.replace("_", " ")


def _of_sweep(swept: Sweep) -> tuple[list[str], list[tuple[tuple[str, ...], Evaluation]]]:
  keys = list(dict.fromkeys(key for point in swept.points for key in point.values))
  rows = [
    ((point.method, *(_shown(point.values.get(key)) for key in keys)), point.evaluation) for point in swept.points
  ]
  if swept.real is not None:
    rows.append((("real images", *("" for _ in keys)), swept.real))
  return ["method", *keys], rows


def _shown(value: Any) -> str:
  return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def csv_text(swept: Sweep) -> str:
  """Format a sweep as CSV, with all digits.

  The columns are method, one for each thing that is swept, n, for each measure its value, the ends of its interval and
  what the interval is (``kid``, ``kid_low``, ``kid_high``, ``kid_interval``), and samples_per_second.
  """
  keys = list(dict.fromkeys(key for point in swept.points for key in point.values))
  names = columns([point.evaluation for point in swept.points])
  text = io.StringIO(newline="")
  writer = csv.writer(text, lineterminator="\n")
  heads = [f"{name}{end}" for name in names for end in ("", "_low", "_high", "_interval")]
  writer.writerow(["method", *keys, "n", *heads, "samples_per_second"])
  for point in swept.points:
    cells: list[Any] = [point.method, *(point.values.get(key, "") for key in keys), point.evaluation.n]
    for name in names:
      figure = point.evaluation.figures.get(name)
      ends = ("", "") if figure is None or figure.interval is None else figure.interval
      cells += ["" if figure is None else figure.value, *ends, "" if figure is None else figure.kind]
    writer.writerow([*cells, point.evaluation.n / point.seconds if point.seconds else ""])
  return text.getvalue()
