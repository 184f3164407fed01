"""What the figures of a sweep say, in sentences: the best values, and what went wrong."""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from jaxguide.evaluation.results import Figure, Point, Sweep
from jaxguide.evaluation.sweep_curves import (
  Axis,
  Curve,
  axis_of,
  best_of,
  best_point,
  comparable,
  curves_of,
  measures_of,
  overlap,
  text_of,
)
from jaxguide.evaluation.sweep_words import Described, describe

TOLD = (
  ("frechet_distance", "kid", "spatial_frechet_distance", "inception_score"),
  ("precision", "density", "accuracy"),
  ("recall", "coverage"),
)
"""A finding has the first measure of each of these that the curve has; without any, the first measure of all."""

LOST = 0.75
"""Diversity below this share of that of the real images, or of a curve's largest if that is less, is called lost."""

UNCONDITIONAL = ("cfg", "classifier")
"""Guidances whose samples at scale 0 do not depend on the class."""

SATURATED = 0.05
"""A share of saturated pixels that exceeds that of the real images by this much is named."""

DISTANCES = ("frechet_distance", "spatial_frechet_distance", "kid")
DIVERSITIES = ("recall", "coverage", "diversity")


def listed(texts: Sequence[str], most: int = 6) -> str:
  """Join texts in a sentence.

  >>> listed(["1", "2", "3"]), listed(["1", "2", "3"], most=2)
  ('1, 2 and 3', '1, 2 and 1 more')
  """
  texts = list(texts)
  if len(texts) > most:
    texts = [*texts[:most], f"{len(texts) - most} more"]
  return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def where(points: Iterable[Point], axis: Axis) -> str:
  """Say at which values of the axis points are, such as ``"scale 2"`` or ``"scales 2 and 4"``."""
  points = sorted(points, key=lambda point: axis.values.index(point.values[axis.name]))
  plural = "s" if len(points) > 1 and not axis.word.endswith("s") else ""
  return f"{axis.word}{plural} {listed([text_of(point.values[axis.name]) for point in points])}"


def at(points: Iterable[Point], axis: Axis) -> str:
  """Say the same with a preposition, such as ``"at scale 2"`` or ``"with solver heun"``."""
  return f"{'at' if axis.is_ordered else 'with'} {where(points, axis)}"


def value_text(figure: Figure, described: Described) -> str:
  """Format a figure with its interval, such as ``"12.3 (11.9 to 12.8)"``."""
  if figure.interval is None:
    return described.text(figure.value)
  low, high = map(described.text, figure.interval)
  return f"{described.text(figure.value)} ({low} to {high})"


# --- the best values ------------------------------------------------------------------------------


def findings(sweep: Sweep) -> list[str]:
  """Say for each curve which values are the best, and where, in one sentence.

  Points with another protocol than most are left out.
  """
  axis, points = axis_of(sweep), comparable(sweep)
  kept = {id(point) for point in points}
  sentences = []
  for curve in curves_of(sweep):
    own = [point for point in curve.points if id(point) in kept]
    names = measures_of(own)
    told = [next((name for name in group if name in names), None) for group in TOLD]
    parts = [
      _best_part(own, name, describe(name, points[0].evaluation.protocol, sweep.real), axis)
      for name in ([name for name in told if name] or names[:1])
    ]
    if not own:
      sentences.append(f"The figures of {curve.title} have another protocol than most, and are not compared.")
    elif parts:
      alone = f", {where(own, axis)}," if len(own) == 1 else ""
      sentences.append(f"With {curve.title}{alone} {listed(parts)}.")
    else:
      sentences.append(f"There are no figures of {curve.title}.")
  return sentences


def _best_part(points: Sequence[Point], name: str, entry: Described, axis: Axis) -> str:
  having = [point for point in points if name in point.evaluation.figures]
  figures = [point.evaluation.figures[name] for point in having]
  if len(points) == 1 or entry.better is None:
    ends = {id(point): point for point in (having[0], having[-1])}.values()
    texts = [entry.text(point.evaluation.figures[name].value) for point in ends]
    if len(points) == 1:
      return f"the {entry.title} is {texts[0]}"
    return f"the {entry.title} is {listed([f'{t} {at([p], axis)}' for t, p in zip(texts, ends, strict=True)])}"
  best = best_of(having, name, entry.better)
  value = best[0].evaluation.figures[name]
  if len({figure.value for figure in figures}) == 1 < len(figures):
    return f"the {entry.title} is {entry.text(value.value)} everywhere"
  superlative = {"lower": "least", "higher": "highest"}[entry.better]
  overlapping = [
    point
    for point in having
    if not any(point is one for one in best) and name in DISTANCES and overlap(point.evaluation.figures[name], value)
  ]
  doubt = f"; the interval overlaps that of {where(overlapping, axis)}" if overlapping else ""
  return f"the {entry.title} is {superlative} {at(best, axis)} ({entry.text(value.value)}{doubt})"


# --- what went wrong ------------------------------------------------------------------------------


def troubles(sweep: Sweep) -> list[str]:
  """Say what went wrong, as far as the figures tell it. The list is empty if they tell nothing."""
  axis, kept = axis_of(sweep), {id(point) for point in comparable(sweep)}
  sentences = []
  for curve in curves_of(sweep):
    own = [point for point in curve.points if id(point) in kept]
    sentences += [*_saturated(sweep, curve, own, axis), *_lost(sweep, curve, own, axis)]
    sentences += [*_inaccurate(sweep, curve, own, axis), *_at_the_end(sweep, curve, own, axis)]
    sentences += _nearer_than_real(sweep, curve, own, axis)
  return [*sentences, *_copies(sweep), *_warnings(sweep, axis)]


def _real(sweep: Sweep, name: str) -> float | None:
  figure = None if sweep.real is None else sweep.real.figures.get(name)
  return None if figure is None else figure.value


def _ends(figure: Figure) -> tuple[float, float]:
  """Return the ends of a figure's interval; its value twice if it has none."""
  low, high = (figure.value, figure.value) if figure.interval is None else figure.interval
  return min(low, figure.value), max(high, figure.value)


def _having(points: Sequence[Point], name: str) -> dict[int, float]:
  return {i: p.evaluation.figures[name].value for i, p in enumerate(points) if name in p.evaluation.figures}


def _saturated(sweep: Sweep, curve: Curve, points: Sequence[Point], axis: Axis) -> list[str]:
  real = _real(sweep, "saturated")
  if real is None and sweep.real_images is not None and sweep.real_images.size:
    real = float(np.isin(sweep.real_images, (0, 255)).mean())
  if real is None:
    return []
  over = {i: value for i, value in _having(points, "saturated").items() if value > real + SATURATED}
  if not over:
    return []
  most = max(over, key=lambda i: over[i])
  return [
    f"With {curve.title} many pixels are at 0 or 255 {at([points[i] for i in over], axis)}: up to {over[most]:.1%} "
    f"({at([points[most]], axis)}); of the real images {real:.1%}. The guidance may be too strong there."
  ]


def _lost(sweep: Sweep, curve: Curve, points: Sequence[Point], axis: Axis) -> list[str]:
  """Diversity is lost where it is clearly below that of the real images and below the largest of the curve."""
  sentences = []
  for name in DIVERSITIES:
    real, values = _real(sweep, name), _having(points, name)
    if real is None or not values:
      continue
    entry, largest = describe(name, points[0].evaluation.protocol, sweep.real), max(values, key=lambda i: values[i])
    below = min(real, values[largest]) * LOST
    low = {i: value for i, value in values.items() if _ends(points[i].evaluation.figures[name])[1] < below}
    known = f"that of the real images is {entry.text(real)}"
    if low:
      least = min(low, key=lambda i: low[i])
      most = (
        ""
        if values[largest] >= LOST * real
        else (f", at most it is {entry.text(values[largest])} ({at([points[largest]], axis)})")
      )
      sentences.append(
        f"With {curve.title} diversity is lost {at([points[i] for i in low], axis)}: the {entry.title} falls to "
        f"{entry.text(low[least])} ({at([points[least]], axis)}){most}, and {known}."
      )
    elif _ends(points[largest].evaluation.figures[name])[1] < LOST * real:
      sentences.append(
        f"With {curve.title} the {entry.title} is at most {entry.text(values[largest])} "
        f"({at([points[largest]], axis)}), and {known}."
      )
  return sentences


def _knows_class(point: Point) -> bool:
  """Whether samples depend on the class that they were drawn for. Unguided ones of these guidances do not."""
  return point.values.get("scale") != 0 or re.split("[+:, ]", point.method)[0] not in UNCONDITIONAL


def _inaccurate(sweep: Sweep, curve: Curve, points: Sequence[Point], axis: Axis) -> list[str]:
  real = _real(sweep, "accuracy")
  if real is None:
    return []
  low = {
    i: value
    for i, value in _having(points, "accuracy").items()
    if _ends(points[i].evaluation.figures["accuracy"])[1] < real and _knows_class(points[i])
  }
  if not low:
    return []
  entry, least = describe("accuracy", points[0].evaluation.protocol, sweep.real), min(low, key=lambda i: low[i])
  return [
    f"With {curve.title} the classes are recognised less often than those of real images ({entry.text(real)}) "
    f"{at([points[i] for i in low], axis)}; least {at([points[least]], axis)} ({entry.text(low[least])})."
  ]


def _at_the_end(sweep: Sweep, curve: Curve, points: Sequence[Point], axis: Axis) -> list[str]:
  """The best value is the last on a numeric axis, so that a better one may lie beyond."""
  name = next((name for name in DISTANCES if any(name in p.evaluation.figures for p in points)), None)
  having = [point for point in points if name in point.evaluation.figures]
  if name is None or not axis.is_numeric or len(having) < 2:
    return []
  entry = describe(name, having[0].evaluation.protocol, sweep.real)
  best = best_of(having, name, entry.better)
  if len(best) > 1 or best[0] is not having[-1]:
    return []
  return [
    f"With {curve.title} the {entry.title} is least at the end of what was tried ({where(best, axis)}). A larger "
    f"{axis.title} may be better."
  ]


def _nearer_than_real(sweep: Sweep, curve: Curve, points: Sequence[Point], axis: Axis) -> list[str]:
  sentences = []
  for name in DISTANCES:
    real = _real(sweep, name)
    if real is None or sweep.real is None:
      continue
    least = _ends(sweep.real.figures[name])[0]
    figures = {i: points[i].evaluation.figures[name] for i in _having(points, name)}
    near = [points[i] for i, figure in figures.items() if _ends(figure)[1] < least]
    if near:
      entry = describe(name, points[0].evaluation.protocol, sweep.real)
      fewer = min(point.evaluation.n for point in near) > sweep.real.n and name != "kid"
      cause = (
        f" There are fewer real images ({sweep.real.n:,}), which enlarges their distance."
        if fewer
        else " Copies of training images would do that: look at the nearest ones."
      )
      sentences.append(
        f"With {curve.title} the {entry.title} {at(near, axis)} is below that of the real images "
        f"({entry.text(real)}).{cause}"
      )
  return sentences


def _copies(sweep: Sweep) -> list[str]:
  if sweep.neighbours is None or sweep.neighbour_rows is None or not len(sweep.neighbours):
    return []
  samples = best_point(sweep)[0].images[np.asarray(sweep.neighbour_rows)]
  if samples.shape[1:] != sweep.neighbours.shape[2:]:
    return []
  equal = int((samples == sweep.neighbours[:, 0]).reshape(len(samples), -1).all(axis=1).sum())
  return [f"{equal} of {len(samples)} samples are equal to a training image, pixel by pixel."] if equal else []


def _warnings(sweep: Sweep, axis: Axis) -> list[str]:
  """The warnings of the evaluations, each once, with where it applies if not everywhere."""
  texts = dict.fromkeys(text for point in sweep.points for text in point.evaluation.warnings)
  sentences = []
  for text in texts:
    parts = [
      f"{curve.title} {at(own, axis)}"
      for curve in curves_of(sweep)
      if (own := [point for point in curve.points if text in point.evaluation.warnings])
    ]
    everywhere = all(text in point.evaluation.warnings for point in sweep.points)
    sentences.append(text if everywhere else f"{text} This concerns {listed(parts)}.")
  if sweep.real is not None:
    sentences += [f"Real images: {text}" for text in sweep.real.warnings if text not in texts]
  return sentences
