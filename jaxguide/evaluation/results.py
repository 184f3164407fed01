"""The results of an evaluation: figures with their intervals, and the points of a sweep.

A `Figure` is the value of one measure. An `Evaluation` holds the figures of one set of images, and the protocol on
which they depend. A `Point` is the evaluation of the samples of one method at one value of what is swept. A `Sweep` is
all points, with what a report shows beside them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Figure:
  """The value of a measure, and how certain it is.

  Args:
    value: the value.
    interval: the lower and the upper end of its interval; None if there is none.
    kind: what the interval is, such as ``"95 % of 200 bootstrap resamples"`` or ``"least to greatest of 3 sets"``;
      without an interval why there is none, as ``"no interval: ..."``, or empty.
  """

  value: float | int
  interval: tuple[float | int, float | int] | None = None
  kind: str = ""


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """The figures of one set of images.

  Args:
    n: the number of images.
    figures: the figures by the name of their measure, in the order of `jaxguide.evaluation.MEASURES`.
    protocol: everything that the figures depend on, as plain data (texts, numbers, lists and dictionaries).
    warnings: what a reader has to know, one sentence each, such as too few images for a Fréchet distance.
    left_out: why a figure is not among them, by the name of its measure, where none were asked for by name.
  """

  n: int
  figures: Mapping[str, Figure]
  protocol: Mapping[str, Any]
  warnings: Sequence[str] = ()
  left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Point:
  """The samples of one method at one value of each thing that is swept.

  Args:
    method: the name of the guidance, such as ``"cfg"`` or ``"classifier"``.
    values: the value of each thing that is swept, by name, such as ``{"scale": 2.0, "steps": 20}``.
    evaluation: the figures of the samples.
    images: ``(m, height, width, channels)`` uint8, the first ``m`` of the samples, for pictures. Sample ``i`` of all
      points has the same noise and the same label.
    labels: ``(m,)`` int, their classes; None if there are none.
    seconds: the time that sampling took, without compilation; None if it is not known.
    path: the file of the samples; None if they are in memory alone.
  """

  method: str
  values: Mapping[str, float | int | str]
  evaluation: Evaluation
  images: np.ndarray
  labels: np.ndarray | None
  seconds: float | None
  path: Path | None = None


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The points of a sweep, and what a report shows beside them.

  Args:
    title: the title of the report.
    points: the points, in any order.
    axis: the name in ``values`` along which curves are drawn, such as ``"scale"``. Points that differ in the method or
      in another value belong to different curves.
    real: the figures of real images that were held out of the training, against the same reference; None if there are
      none.
    real_images: ``(m, height, width, channels)`` uint8, real images to look at.
    real_labels: ``(m,)`` int, their classes; None if there are none.
    class_names: the names of the classes; None if they have none.
    neighbours: ``(s, k, height, width, channels)`` uint8, the ``k`` nearest training images of ``s`` samples of the
      best point (the first of the second axis is the nearest); None if they were not searched.
    neighbour_rows: ``(s,)`` int, the rows of these samples in the ``images`` of the best point.
    facts: what the reader should know of data, networks, sampling and machine, by name.
    command: the command that makes the sweep again.
  """

  title: str
  points: Sequence[Point]
  axis: str = "scale"
  real: Evaluation | None = None
  real_images: np.ndarray | None = None
  real_labels: np.ndarray | None = None
  class_names: Sequence[str] | None = None
  neighbours: np.ndarray | None = None
  neighbour_rows: np.ndarray | None = None
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  command: str = ""
