"""Figures as text: a table for a terminal, and a CSV file."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jaxguide.evaluation.measures import MEASURES
from jaxguide.evaluation.protocols import differences
from jaxguide.evaluation.results import Evaluation, Figure, Sweep


def columns(evaluations: Sequence[Evaluation]) -> list[str]:
  """Return the names of the measures that at least one evaluation has, in the order of `MEASURES`."""
  return [name for name in MEASURES if any(name in one.figures for one in evaluations)]


def figure_text(name: str, figure: Figure | None) -> str:
  """Format a figure with half the width of its interval, or with its ends if it is not in their middle.

  >>> figure_text("precision", Figure(0.8, (0.78, 0.82), "95 %")), figure_text("kid", Figure(1.234, (1.23, 1.238), ""))
  ('0.800 ± 0.020', '1.23 ± 0.00')
  >>> figure_text("precision", Figure(0.9, (0.744, 0.965), "95 %"))
  '0.900 (0.744 to 0.965)'
  """
  if figure is None:
    return ""
  text = MEASURES[name].text(figure.value)
  if figure.interval is None:
    return text
  low, high = figure.interval
  percent, decimals = text.endswith("%"), len(text.rstrip("%").partition(".")[2])
  # Rounded to the digits that are shown, both halves are one number.
  if "e" not in text and abs(low + high - 2 * figure.value) <= 10.0 ** -(decimals + 2 * percent):
    return f"{text} ± {(high - low) / 2:.{decimals}{'%' if percent else 'f'}}"
  return f"{text} ({MEASURES[name].text(low)} to {MEASURES[name].text(high)})"


def table(rows: Mapping[str, Evaluation] | Sweep, title: str = "samples") -> str:
  """Format evaluations as a plain-text table for a terminal.

  Lines below say in what the protocols differ, which figures have no interval and why, and which are left out and why.

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
  notes = [*_without_interval(evaluations), *_left_out(named)]
  return "\n".join([*text, "", *notes] if notes else text)


def _without_interval(evaluations: Sequence[Evaluation]) -> list[str]:
  """Say why figures have no interval, in a line for each reason."""
  reasons: dict[str, dict[str, None]] = {}
  for one in evaluations:
    for name, figure in one.figures.items():
      if figure.interval is None and figure.kind:
        reasons.setdefault(figure.kind, {})[heading(name, evaluations)] = None
  return [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]


def _left_out(named: Sequence[tuple[tuple[str, ...], Evaluation]]) -> list[str]:
  """Say which figures are left out, in a line for each reason, with the rows if it is not all."""
  evaluations = [one for _, one in named]
  reasons: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
  for cells, one in named:
    for name, reason in one.left_out.items():
      names, rows = reasons.setdefault(reason, ({}, {}))
      names[heading(name, evaluations)] = None
      rows[" ".join(cells)] = None
  lines = []
  for reason, (names, rows) in reasons.items():
    whose = "" if len(rows) == len(named) else f" of {', '.join(rows)}"
    lines.append(f"Left out{whose}: {', '.join(names)}; needs {reason}.")
  return lines


def heading(name: str, evaluations: Sequence[Evaluation]) -> str:
  """Give the heading of a measure, as the report has it: its title on the features, if all are on the same."""
  features = {str(one.protocol.get("features", "")).partition(":")[0] for one in evaluations}
  return MEASURES[name].title_on(features.pop() if len(features) == 1 else "")


def as_plain(rows: Mapping[str, Evaluation]) -> dict[str, Any]:
  """Return evaluations as plain data, each figure with its title on the features beside its value."""
  content: dict[str, Any] = {}
  for row, one in rows.items():
    content[row] = dataclasses.asdict(one)
    for name, figure in content[row]["figures"].items():
      content[row]["figures"][name] = {"title": heading(name, [one]), **figure}
  return content


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
  what the interval is (``recall``, ``recall_low``, ``recall_high``, ``recall_interval``), and samples_per_second. The
  columns ``kid`` and ``inception_score`` are there on Inception's features alone; on others they are called
  ``kernel_distance`` and ``classifier_score``.
  """
  keys = list(dict.fromkeys(key for point in swept.points for key in point.values))
  evaluations = [point.evaluation for point in swept.points]
  names = columns(evaluations)
  text = io.StringIO(newline="")
  writer = csv.writer(text, lineterminator="\n")
  heads = [f"{_column(name, evaluations)}{end}" for name in names for end in ("", "_low", "_high", "_interval")]
  writer.writerow(["method", *keys, "n", *heads, "samples_per_second"])
  for point in swept.points:
    cells: list[Any] = [point.method, *(point.values.get(key, "") for key in keys), point.evaluation.n]
    for name in names:
      figure = point.evaluation.figures.get(name)
      ends = ("", "") if figure is None or figure.interval is None else figure.interval
      cells += ["" if figure is None else figure.value, *ends, "" if figure is None else figure.kind]
    writer.writerow([*cells, point.evaluation.n / point.seconds if point.seconds else ""])
  return text.getvalue()


def _column(name: str, evaluations: Sequence[Evaluation]) -> str:
  """Give the name of a column: that of the measure, unless it is a name of Inception's and the features are others."""
  entry = MEASURES[name]
  is_inceptions = name == entry.inception.lower().replace(" ", "_")
  if is_inceptions and heading(name, evaluations) != entry.inception:
    return entry.title.replace(" ", "_")
  return name
