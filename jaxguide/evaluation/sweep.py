"""One row of figures for each guidance method and scale, kept as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import check_readable, write_atomically
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.measures import MEASURES, Figures, measure

BEFORE, AFTER = ["method", "scale", "n"], ["samples_per_second"]
"""The columns of the CSV file before and after the measures."""


@dataclass(frozen=True)
class Row:
  """The measures of one method at one scale: a line of the CSV file. Each measure is an attribute: ``row.accuracy``.

  Args:
    method: the guidance method, such as ``"cfg"`` or ``"classifier"``.
    scale: the power gamma in ``p(x) p(y|x)^gamma``: 0 is unconditional, 1 conditional.
    n: number of samples.
    figures: values of measures by name; see `jaxguide.evaluation.measures.MEASURES`.
    samples_per_second: of wall-clock time.

  Raises:
    ValueError: if a value is not finite, or outside its range.
  """

  method: str
  scale: float
  n: int
  figures: Mapping[str, float]
  samples_per_second: float

  def __post_init__(self):
    checks.finite("scale", self.scale)
    checks.at_least("n", self.n, 1)
    if not isinstance(self.figures, Figures):
      object.__setattr__(self, "figures", Figures(self.figures))
    checks.above("samples_per_second", checks.finite("samples_per_second", self.samples_per_second), 0)

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__") or "figures" not in self.__dict__:
      raise AttributeError(name)
    return getattr(self.__dict__["figures"], name)


def evaluate(
  method: str,
  scale: float | int,
  images: np.ndarray,
  labels: np.ndarray,
  *,
  seconds: float | int,
  judge: Judge,
  reference_images: np.ndarray,
) -> Row:
  """Measure the samples that one method drew at one scale, and make a row of it.

  Args:
    method: the method's name.
    scale: the guidance scale, finite.
    images: as for `measure`.
    labels: as for `measure`.
    seconds: how long the sampling took, more than 0; leave compilation out of it.
    judge: as for `measure`.
    reference_images: as for `measure`.

  Raises:
    ValueError: if the scale or the seconds are out of range, or as `measure` does.
  """
  scale = checks.finite("scale", float(scale))
  if not checks.finite("seconds", seconds) > 0:
    raise ValueError(f"seconds must be more than 0, got {seconds}")
  measures = measure(images, labels, judge, reference_images)
  return Row(method, scale, measures.n, measures.figures, measures.n / float(seconds))


def columns(rows: Sequence[Row]) -> list[str]:
  """Give the names of the measures that rows have.

  Raises:
    ValueError: if the rows have different measures.
  """
  names = list(dict.fromkeys(tuple(row.figures) for row in rows))
  if len(names) > 1:
    raise ValueError(f"all rows must have the same measures, got {names[0]} and {names[1]}")
  return list(names[0]) if names else list(MEASURES)


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
  """Write rows to a CSV file, atomically. Numbers keep all their digits.

  Raises:
    ValueError: if the rows have different measures.
    OSError: if the file cannot be written.
  """
  names = columns(rows)
  text = io.StringIO(newline="")
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow([*BEFORE, *names, *AFTER])
  writer.writerows(
    [row.method, row.scale, row.n, *(row.figures[name] for name in names), row.samples_per_second] for row in rows
  )
  write_atomically(path, text.getvalue().encode())


def read_csv(path: str | Path) -> list[Row]:
  """Read a CSV file that `write_csv` wrote. It may have any of the measures of `MEASURES`.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if its header or a line is not that of a sweep, or a value is out of range.
  """
  check_readable(path)
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      reader = csv.reader(file)
      lines = [(reader.line_num, cells) for cells in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} is no table of a sweep: {error}") from error
  header = lines[0][1] if lines else []
  if header[: len(BEFORE)] != BEFORE or header[-len(AFTER) :] != AFTER:
    expected = ",".join([*BEFORE, *MEASURES, *AFTER])
    raise ValueError(f"{path} is no table of a sweep: its first line must be {expected!r}, got {','.join(header)!r}")
  names = header[len(BEFORE) : -len(AFTER)]
  for name in names:
    checks.lookup(f"measure in {path}", name, MEASURES)
  rows = []
  for number, cells in lines[1:]:
    try:
      method, scale, n, *values, speed = cells
      figures = dict(zip(names, map(float, values), strict=True))
      rows.append(Row(method, float(scale), int(n), figures, float(speed)))
    except ValueError as error:
      raise ValueError(f"line {number} of {path} must hold {', '.join(header)}; got {cells} ({error})") from error
  return rows


def formatted(row: Row) -> tuple[str, ...]:
  """Give the cells of a row as text: method, scale, number of samples, measures, speed."""
  speed = row.samples_per_second
  return (
    row.method,
    f"{row.scale:g}",
    str(row.n),
    *(f"{value:.3f}" for value in row.figures.values()),
    f"{speed:.3g}" if speed < 100 else f"{speed:.0f}",
  )


def table(rows: Sequence[Row]) -> str:
  """Lay rows out as plain text, for a terminal.

  >>> row = Row("cfg", 2.0, 500, {"accuracy": 0.99, "frechet_distance": 0.41234, "diversity": 1.5}, 812.3)
  >>> lines = table([row]).splitlines()
  >>> lines[1].split()
  ['cfg', '2', '500', '0.990', '0.412', '1.500', '812']
  """
  lines = [
    ("method", "scale", "n", *(name.replace("_", " ") for name in columns(rows)), "samples/s"),
    *map(formatted, rows),
  ]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    )
    for cells in lines
  )
