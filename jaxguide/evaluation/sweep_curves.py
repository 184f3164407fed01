"""What a report knows about a sweep: its curves, the names of its figures, which points compare, and the best of them.

A curve is one guidance method with one value of everything that is swept beside the axis.
"""

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxguide._core import checks
from jaxguide.evaluation.protocols import OF_SAMPLES
from jaxguide.evaluation.results import Evaluation, Figure, Point, Sweep
from jaxguide.evaluation.sweep_words import describe

METHODS = {
  "cfg": "classifier-free guidance",
  "classifier": "classifier guidance",
  "autoguidance": "autoguidance",
  "pag": "perturbed-attention guidance",
  "seg": "smoothed energy guidance",
  "slg": "skip-layer guidance",
  "compose": "composition of labels",
}
"""The titles of methods. A method without a title is shown by its name."""

AXES = {"scale": "guidance scale", "steps": "number of steps"}
"""The titles of axes. An axis without a title is shown by its name."""

RANKING = (
  "frechet_distance", "kid", "spatial_frechet_distance", "inception_score", "precision", "coverage", "density",
  "recall", "accuracy",
)  # fmt: skip
"""Which point is best is decided by the first of these measures that the points have."""


class Axis(NamedTuple):
  """What the curves are drawn along.

  Args:
    name: its name in the points' ``values``.
    values: its values in order: numbers, then infinity, then words in the order of the points.
    is_numeric: whether all of them are finite numbers.
    is_ordered: whether they have an order: numbers and infinity do, words do not.
  """

  name: str
  values: Sequence[Any]
  is_numeric: bool
  is_ordered: bool = True

  @property
  def title(self) -> str:
    """The title below a plot."""
    return AXES.get(self.name, self.word)

  @property
  def word(self) -> str:
    """Its name in a sentence, such as ``"scale"`` before a value."""
    return self.name.replace("_", " ")


def text_of(value: Any) -> str:
  """Format a value of the axis.

  >>> text_of(2.0), text_of(float("inf")), text_of("heun")
  ('2', 'inf', 'heun')
  """
  return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


class Curve(NamedTuple):
  """The points of one method and one value of all that is swept beside the axis, in the order of the axis."""

  title: str
  points: Sequence[Point]


def _key(sweep: Sweep, point: Point) -> tuple[Any, ...]:
  return point.method, *sorted((name, str(value)) for name, value in point.values.items() if name != sweep.axis)


def _is_finite(value: Any) -> bool:
  return isinstance(value, int | float | np.number) and math.isfinite(value)


def axis_of(sweep: Sweep) -> Axis:
  """Return the axis of a sweep, with its values in order."""
  values = list(dict.fromkeys(point.values[sweep.axis] for point in sweep.points))
  numbers = sorted(value for value in values if _is_finite(value))
  infinite = [value for value in values if text_of(value) == "inf"]
  words = [value for value in values if value not in numbers and value not in infinite]
  return Axis(sweep.axis, [*numbers, *infinite, *words], len(numbers) == len(values), not words)


def curves_of(sweep: Sweep) -> list[Curve]:
  """Sort the points of a sweep into curves.

  The title of a curve has the method, and those of the other values that differ between points.

  Raises:
    ValueError: if two points of a curve are at one value of the axis.
  """
  axis, groups = axis_of(sweep), collections.defaultdict(list)
  for point in sweep.points:
    groups[_key(sweep, point)].append(point)
  others = [name for point in sweep.points for name in point.values if name != sweep.axis]
  differing = [
    name for name in dict.fromkeys(others) if len({str(point.values.get(name)) for point in sweep.points}) > 1
  ]
  curves = []
  for points in groups.values():
    first = points[0]
    parts = [f"{name.replace('_', ' ')} {text_of(first.values[name])}" for name in differing if name in first.values]
    title = ", ".join([METHODS.get(first.method, first.method), *parts])
    values = [point.values[sweep.axis] for point in points]
    if len(set(values)) < len(values):
      raise ValueError(f"{title} has two points at one {sweep.axis}, among {values}: give each value once")
    curves.append(Curve(title, sorted(points, key=lambda point: axis.values.index(point.values[sweep.axis]))))
  return curves


def measures_of(points: Sequence[Point]) -> list[str]:
  """Return the names of all measures that some point has, in the order in which they appear."""
  return list(dict.fromkeys(name for point in points for name in point.evaluation.figures))


# --- which points compare -------------------------------------------------------------------------


def flatten(protocol: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
  """Yield the entries of nested plain data by dotted name, as texts.

  >>> dict(flatten({"features": "pixels", "reference": {"n": 100}}))
  {'features': 'pixels', 'reference.n': '100'}
  """
  for name, value in protocol.items():
    if isinstance(value, Mapping) and value:
      yield from flatten(value, f"{prefix}{name}.")
    elif isinstance(value, list | tuple):
      yield f"{prefix}{name}", ", ".join(map(str, value))
    else:
      yield f"{prefix}{name}", str(value)


class Comparison(NamedTuple):
  """Which points have the same protocol.

  Args:
    odd: the positions in the sweep's points of those whose protocol is not that of most.
    differences: what differs, one sentence for each entry of the protocol.
    shared: the protocol that most points have, without what is swept, and how all samples were drawn.
  """

  odd: frozenset[int]
  differences: Sequence[str]
  shared: Mapping[str, str]


def compare(sweep: Sweep) -> Comparison:
  """Compare the protocols of the points, without what is swept.

  An entry is left out if its name is ``method``, ``guidance`` or that of a swept value, or if it says which samples
  were measured and how they were drawn.
  """
  swept = {"method", "guidance", *(name for point in sweep.points for name in point.values)}

  def entries(evaluation: Evaluation) -> dict[str, str]:
    kept = {
      name: text
      for name, text in flatten(evaluation.protocol)
      if name.rpartition(".")[2] not in swept and name.partition(".")[0] not in ("samples", *OF_SAMPLES)
    }
    return {"number of samples": f"{evaluation.n}", **kept}

  protocols = [entries(point.evaluation) for point in sweep.points]
  counts = collections.Counter(tuple(sorted(protocol.items())) for protocol in protocols)
  most = counts.most_common(1)[0][0]
  odd = frozenset(i for i, protocol in enumerate(protocols) if tuple(sorted(protocol.items())) != most)
  differences = []
  for name in dict.fromkeys(name for protocol in protocols for name in protocol):
    values = collections.Counter(protocol.get(name, "not given") for protocol in protocols)
    if len(values) > 1:
      parts = [f"{text} at {number} point{'s' * (number > 1)}" for text, number in values.most_common()]
      differences.append(f"{name}: {', '.join(parts)}")
  every = [dict(flatten(point.evaluation.protocol)) for point in sweep.points]
  drawn = {name: text for name, text in every[0].items() if all(one.get(name) == text for one in every)}
  shared = next(p for p in protocols if tuple(sorted(p.items())) == most)
  return Comparison(odd, differences, {**shared, **drawn})


def comparable(sweep: Sweep) -> list[Point]:
  """Return the points whose protocol is that of most points."""
  odd = compare(sweep).odd
  return [point for i, point in enumerate(sweep.points) if i not in odd]


# --- the best point -------------------------------------------------------------------------------


def best_of(points: Sequence[Point], name: str, better: str | None) -> list[Point]:
  """Return the points with the best value of a measure; none if no point has it or neither direction is better."""
  having = [point for point in points if name in point.evaluation.figures]
  if not having or better is None:
    return []
  best = {"lower": min, "higher": max}[better](point.evaluation.figures[name].value for point in having)
  return [point for point in having if point.evaluation.figures[name].value == best]


def overlap(a: Figure, b: Figure) -> bool:
  """Whether the intervals of two figures have a number in common. A figure without an interval has none."""
  if a.interval is None or b.interval is None:
    return False
  return bool(a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1])


def starred(points: Sequence[Point], name: str, better: str | None) -> list[Point]:
  """Return the points with the best value of a measure, and those whose intervals overlap that of a best one.

  There are none if these are all points, so that the figures do not tell which is the best.
  """
  having = [point for point in points if name in point.evaluation.figures]
  best = best_of(points, name, better)
  values = [point.evaluation.figures[name] for point in best]
  found = [
    point
    for point in having
    if any(point is one for one in best) or any(overlap(point.evaluation.figures[name], value) for value in values)
  ]
  return found if len(found) < len(having) else []


def best_point(sweep: Sweep) -> tuple[Point, str]:
  """Choose the point whose samples are shown first, among those with the protocol of most points.

  It is the one with the least Fréchet distance. Without that measure, the next of `RANKING` decides; of equal points,
  the first.

  Args:
    sweep: a sweep with at least one point.

  Returns:
    The point, and the name of the measure that decided; empty if none did, and the first point is returned.
  """
  points = comparable(sweep)
  for name in RANKING:
    best = best_of(points, name, describe(name, {}).better)
    if best:
      return best[0], name
  return points[0], ""


# --- checks ---------------------------------------------------------------------------------------


def check_sweep(sweep: Sweep) -> None:
  """Check that a sweep can be shown.

  Raises:
    TypeError: if it is not a `Sweep`.
    ValueError: if it has no points, a point lacks a value of the axis, images, labels or neighbours have other types or
      shapes than `Sweep` says, or a figure is not finite.
  """
  if not isinstance(sweep, Sweep):
    raise TypeError(f"sweep must be a jaxguide.evaluation.results.Sweep, got {type(sweep).__name__}")
  if not sweep.points:
    raise ValueError("the sweep has no points to show: evaluate at least one method at one value")
  for point in sweep.points:
    where = f"the point of {point.method} at {dict(point.values)}"
    if sweep.axis not in point.values:
      raise ValueError(f"{where} has no value of the axis {sweep.axis!r}: give one, or another axis")
    _check_pictures(f"images of {where}", point.images, point.labels)
    for name, figure in point.evaluation.figures.items():
      checks.finite(f"{name} of {where}", figure.value)
      checks.finite(f"the interval of {name} of {where}", list(figure.interval or ()))
  if sweep.real_images is not None:
    _check_pictures("real_images", sweep.real_images, sweep.real_labels)
  if sweep.neighbours is not None:
    images, rows = np.asarray(sweep.neighbours), sweep.neighbour_rows
    if images.ndim != 5 or images.dtype != np.uint8 or not images.shape[1]:
      raise ValueError(
        f"neighbours must be uint8 of shape (s, k, height, width, channels), got {images.dtype} of {images.shape}"
      )
    available = len(best_point(sweep)[0].images)
    if rows is None or np.shape(rows) != images.shape[:1] or any(not 0 <= row < available for row in rows):
      raise ValueError(
        f"neighbour_rows must have {len(images)} rows of the {available} images of the best point, got {rows}"
      )


def _check_pictures(what: str, images: np.ndarray, labels: np.ndarray | None) -> None:
  if images.dtype != np.uint8 or images.ndim != 4 or not 1 <= images.shape[3] <= 4:
    raise ValueError(
      f"{what} must be uint8 of shape (m, height, width, channels) with 1 to 4 channels, got {images.dtype} of shape "
      f"{images.shape}"
    )
  if labels is not None and np.shape(labels) != (len(images),):
    raise ValueError(f"labels of {what} must be one for each of the {len(images)} images, got {np.shape(labels)}")
