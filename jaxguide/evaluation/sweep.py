"""One row of figures for each guidance method and scale, kept as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import check_readable, write_atomically
from jaxguide.evaluation.features import pixel_features
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.metrics import diversity, frechet_distance


@dataclass(frozen=True)
class Measures:
  """What is measured on any set of labelled images, sampled or real.

  Attributes:
    n: how many images there were.
    accuracy: the share, in [0, 1], that the judge takes for the class that was asked for.
    frechet_distance: from the reference images, on pixels in [0, 1].
    diversity: the mean distance between two samples of one class, on pixels in [0, 1].
  """

  n: int
  accuracy: float
  frechet_distance: float
  diversity: float


@dataclass(frozen=True)
class Row:
  """The measures of one method at one scale; its fields are the columns of the CSV file.

  Attributes:
    method: the guidance method, such as ``"cfg"`` or ``"classifier"``.
    scale: the power gamma in ``p(x) p(y|x)^gamma``: 0 is unconditional, 1 conditional.
    n: how many samples were drawn.
    accuracy: see `Measures`.
    frechet_distance: see `Measures`.
    diversity: see `Measures`.
    samples_per_second: of wall-clock time.

  Raises:
    ValueError: if a value is not finite, or outside its range.
  """

  method: str
  scale: float
  n: int
  accuracy: float
  frechet_distance: float
  diversity: float
  samples_per_second: float

  def __post_init__(self):
    checks.finite("scale", self.scale)
    checks.at_least("n", self.n, 1)
    checks.in_range("accuracy", self.accuracy, 0, 1)
    for name in ("frechet_distance", "diversity"):
      checks.in_range(name, getattr(self, name), 0)
    checks.above("samples_per_second", checks.finite("samples_per_second", self.samples_per_second), 0)


def measure(images: np.ndarray, labels: np.ndarray, judge: Judge, reference_images: np.ndarray) -> Measures:
  """Measure labelled images against a judge and a reference set.

  The real data's own figures, which samples can be held to, are those of its test split against its training split.

  Args:
    images: uint8 of shape (n, height, width, channels), n at least 2, with two of one class.
    labels: int of shape (n,), the classes that were asked for.
    judge: fitted on images of that height, width and channels.
    reference_images: uint8 of shape (m, height, width, channels), m at least 2.

  Raises:
    ValueError: as the metrics do, where images or labels are not of that type and shape.
  """
  return Measures(
    n=len(images),
    accuracy=judge.accuracy(images, labels),
    frechet_distance=frechet_distance(pixel_features(images), pixel_features(reference_images)),
    diversity=diversity(images, labels),
  )


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
  return Row(
    method=method,
    scale=scale,
    **asdict(measures),
    samples_per_second=measures.n / float(seconds),
  )


def write_csv(path: str | Path, rows: Sequence[Row]) -> None:
  """Write rows, under a header, atomically. Numbers keep every digit.

  Raises:
    OSError: if the place cannot be written.
  """
  text = io.StringIO(newline="")
  writer = csv.writer(text, lineterminator="\n")
  writer.writerow([field.name for field in fields(Row)])
  writer.writerows(astuple(row) for row in rows)
  write_atomically(path, text.getvalue().encode())


def read_csv(path: str | Path) -> list[Row]:
  """Read back what `write_csv` wrote.

  Raises:
    OSError: if the file cannot be read.
    ValueError: if its header is not a `Row`'s fields, or a line does not hold their values.
  """
  names = [field.name for field in fields(Row)]
  rows = []
  check_readable(path)
  try:
    with open(path, newline="", encoding="utf-8-sig") as file:
      reader = csv.reader(file)
      lines = [(reader.line_num, cells) for cells in reader]
  except (UnicodeDecodeError, csv.Error) as error:
    raise ValueError(f"{path} is no table of a sweep: {error}") from error
  header = lines[0][1] if lines else []
  if header != names:
    raise ValueError(
      f"{path} is no table of a sweep: its first line must be {','.join(names)!r}, got {','.join(header)!r}"
    )
  for number, cells in lines[1:]:
    try:
      method, scale, n, accuracy, frechet, spread, speed = cells
      row = Row(method, float(scale), int(n), float(accuracy), float(frechet), float(spread), float(speed))
    except ValueError as error:
      raise ValueError(f"line {number} of {path} must hold {', '.join(names)}; got {cells} ({error})") from error
    rows.append(row)
  return rows


def formatted(row: Row) -> tuple[str, ...]:
  """Give the cells of a row as people read them, in the order of `Row`'s fields."""
  return (
    row.method,
    f"{row.scale:g}",
    str(row.n),
    f"{row.accuracy:.3f}",
    f"{row.frechet_distance:.3f}",
    f"{row.diversity:.3f}",
    f"{row.samples_per_second:.3g}" if row.samples_per_second < 100 else f"{row.samples_per_second:.0f}",
  )


def table(rows: Sequence[Row]) -> str:
  """Lay rows out as plain text, for a terminal.

  >>> row = Row("cfg", 2.0, 500, 0.99, 0.41234, 1.5, 812.3)
  >>> lines = table([row]).splitlines()
  >>> lines[1].split()
  ['cfg', '2', '500', '0.990', '0.412', '1.500', '812']
  """
  lines = [
    ("method", "scale", "n", "accuracy", "Fréchet", "diversity", "samples/s"),
    *map(formatted, rows),
  ]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      [cells[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    )
    for cells in lines
  )
