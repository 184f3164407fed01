"""Sweeps over the guidance scale: one row of measures for each method and scale, stored as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import check_readable, write_atomically
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.measures import MEASURES, Measured, measure

BEFORE, AFTER = ["method", "scale", "n"], ["samples_per_second"]
"""The columns of the CSV file before and after the measures."""


@dataclass(frozen=True)
class Row(Measured):
  """The measures of one method at one scale: one line of the CSV file. Each measure is also an attribute.

  Args:
    method: the guidance method, such as ``"cfg"`` or ``"classifier"``.
    scale: the power gamma in ``p(x) p(y|x)^gamma``: 0 is unconditional, 1 conditional.
    n: number of samples, at least 1.
    figures: values of measures by name, converted to `Figures`.
    samples_per_second: samples per second of wall-clock time, above 0.

  Raises:
    ValueError: if a value is not finite or outside its range, or a measure is unknown.
  """

  method: str
  scale: float
  n: int
  figures: Mapping[str, float]
  samples_per_second: float

  def __post_init__(self) -> None:
    checks.finite("scale", self.scale)
    super().__post_init__()
    checks.above("samples_per_second", checks.finite("samples_per_second", self.samples_per_second), 0)


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
  """Measure the samples of one method at one scale, and return them as a row.

  Args:
    method: the method's name.
    scale: the guidance scale, finite.
    images: the samples, as for `measure`.
    labels: as for `measure`.
    seconds: the time that sampling took, above 0, without compilation.
    judge: as for `measure`.
    reference_images: as for `measure`.

  Raises:
    ValueError: if ``scale`` or ``seconds`` is out of range, or for the reasons of `measure`.
  """
  scale = checks.finite("scale", float(scale))
  if not checks.finite("seconds", seconds) > 0:
    raise ValueError(f"seconds must be more than 0, got {seconds}")
  measures = measure(images, labels, judge, reference_images)
  return Row(method, scale, measures.n, measures.figures, measures.n / float(seconds))


def columns(rows: Sequence[Row]) -> list[str]:
  """Return the names of the measures that all rows have, in the order of `MEASURES`; all names if there are no rows.

  Raises:
    ValueError: if the rows have different measures.
  """
  sets = list(dict.fromkeys(tuple(row.figures) for row in rows))
  if len(sets) > 1:
    raise ValueError(f"all rows must have the same measures, got ({', '.join(sets[0])}) and ({', '.join(sets[1])})")
  return list(sets[0] if sets else MEASURES)


def write_csv(path: str | Path, rows: Iterable[Row]) -> None:
  """Write rows to a CSV file, atomically and with all digits.

  The columns are method, scale, n, one for each measure in the order of `MEASURES`, and samples_per_second.

  Raises:
    ValueError: if the rows have different measures.
    OSError: if the file cannot be written.
  """
  rows = list(rows)
  names = columns(rows)
  text = io.StringIO(newline="")
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow([*BEFORE, *names, *AFTER])
  writer.writerows(
    [row.method, row.scale, row.n, *(row.figures[name] for name in names), row.samples_per_second] for row in rows
  )
  write_atomically(path, text.getvalue().encode())


def read_csv(path: str | Path) -> list[Row]:
  """Read a CSV file of the format of `write_csv`. It may have a column for only some of the measures of `MEASURES`.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if the file is not a sweep table: its first line has other columns, an unknown measure or a measure
      twice, or a line has a value that is missing, not a number, not finite or out of range.
  """
  check_readable(path)
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      reader = csv.reader(file)
      lines = [(reader.line_num, cells) for cells in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} is not a sweep table: {error}") from error
  header = lines[0][1] if lines else []
  if header[: len(BEFORE)] != BEFORE or header[-len(AFTER) :] != AFTER:
    expected = ",".join([*BEFORE, *MEASURES, *AFTER])
    raise ValueError(
      f"{path} is not a sweep table: its first line must be {expected!r}, where measures may be missing, "
      f"got {','.join(header)!r}"
    )
  names = header[len(BEFORE) : -len(AFTER)]
  for name in names:
    try:
      checks.lookup("measure", name, MEASURES)
    except ValueError as error:
      raise ValueError(f"{path} is not a sweep table: {error}") from None
    if names.count(name) > 1:
      raise ValueError(f"{path} is not a sweep table: it has the column {name!r} twice")
  rows = []
  for number, cells in lines[1:]:
    try:
      method, scale, n, *values, speed = cells
      figures = dict(zip(names, map(float, values), strict=True))
      rows.append(Row(method, float(scale), int(n), figures, float(speed)))
    except ValueError as error:
      raise ValueError(f"line {number} of {path} must have {', '.join(header)}; got {cells} ({error})") from error
  return rows


def formatted(row: Row) -> tuple[str, ...]:
  """Format a row as the cells of a table: method, scale, number of samples, measures, samples per second."""
  speed = row.samples_per_second
  return (
    row.method,
    f"{row.scale:g}",
    str(row.n),
    *(MEASURES[name].text(value) for name, value in row.figures.items()),
    f"{speed:.3g}" if speed < 100 else f"{speed:.0f}",
  )


def table(rows: Sequence[Row]) -> str:
  """Format rows as a plain-text table for a terminal.

  Raises:
    ValueError: if the rows have different measures.

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
