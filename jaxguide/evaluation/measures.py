"""What is measured on a set of labelled images: one table of measures.

A measure is one function and one entry in `MEASURES`. The CSV file, the table in the terminal, the plot and the report
have a column or a panel for every entry.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxguide._core import checks
from jaxguide.evaluation.features import pixel_features
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.metrics import diversity, frechet_distance


class Evidence(NamedTuple):
  """What a measure is computed from.

  Args:
    images: uint8 of shape (n, height, width, channels), the images that are measured.
    labels: int of shape (n,), the classes that they were sampled for.
    reference_images: uint8 of shape (m, height, width, channels), real images to compare with.
    judge: a classifier that did not guide the samples.
  """

  images: np.ndarray
  labels: np.ndarray
  reference_images: np.ndarray
  judge: Judge


class Measure(NamedTuple):
  """A measure.

  Args:
    function: computes it from an `Evidence`.
    title: its name in plots, tables and the report.
    description: what it is and how to read it, for the report. It may contain ``{real}``, the value of the real test
      split, and ``{counts}``, the numbers of samples.
    better: ``"higher"`` or ``"lower"``; None where neither is better.
    low: the least possible value.
    high: the largest possible value.
  """

  function: Callable[[Evidence], float]
  title: str
  description: str
  better: str | None = None
  low: float = 0.0
  high: float = math.inf

  @property
  def heading(self) -> str:
    """The title with the direction that is better."""
    return self.title if self.better is None else f"{self.title} ({self.better} is better)"


def _accuracy(evidence: Evidence) -> float:
  return evidence.judge.accuracy(evidence.images, evidence.labels)


def _frechet_distance(evidence: Evidence) -> float:
  return frechet_distance(pixel_features(evidence.images), pixel_features(evidence.reference_images))


def _diversity(evidence: Evidence) -> float:
  return diversity(evidence.images, evidence.labels)


MEASURES: dict[str, Measure] = {
  "accuracy": Measure(
    _accuracy,
    "judged accuracy",
    "The share of samples that a support vector machine on raw pixels assigns to their own class. It was trained "
    "on the real training split and never guided a sample. On the real test split its accuracy is {real:.1%}; "
    "differences smaller than its errors mean little. At scale 0 the samples do not depend on the class, and the "
    "accuracy is that of chance.",
    better="higher",
    high=1.0,
  ),
  "frechet_distance": Measure(
    _frechet_distance,
    "Fréchet distance on pixels",
    "The distance between Gaussians that are fitted to the samples and to the training split, as in the FID "
    "(Heusel et al. 2017), but on raw pixels in [0, 1] and not on Inception features: it cannot be compared with "
    "published FIDs. It depends on means and covariances alone, over all classes together. Few samples bias it "
    "upwards (here {counts} per row), so compare it only between sets of equal size. Copies of the training "
    "images would have a low distance too: a value below that of the real test split does not prove quality.",
    better="lower",
  ),
  "diversity": Measure(
    _diversity,
    "diversity within a class",
    "The mean Euclidean distance, on pixels in [0, 1], between two samples of the same class, averaged over the "
    "classes. Noise raises it as well as variety. At scale 0 it spans all classes. Read it beside the others.",
  ),
}


class Figures(Mapping[str, float]):
  """Values of measures by name; each is an attribute as well.

  Args:
    values: the values by name.

  Raises:
    ValueError: for a name that is no measure, naming the nearest; or a value that is not finite or out of range.

  >>> figures = Figures({"accuracy": 0.9})
  >>> figures.accuracy, figures["accuracy"]
  (0.9, 0.9)
  """

  def __init__(self, values: Mapping[str, float]):
    for name, value in values.items():
      measure = checks.lookup("measure", name, MEASURES)
      checks.in_range(name, value, measure.low, measure.high)
    self._values = {name: float(values[name]) for name in MEASURES if name in values}

  def __getitem__(self, name: str) -> float:
    return self._values[name]

  def __iter__(self):
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def __getattr__(self, name: str) -> float:
    if name.startswith("_") or name not in self._values:
      raise AttributeError(f"there is no measure {name!r}; there are {', '.join(self.__dict__.get('_values', {}))}")
    return self._values[name]

  def __hash__(self) -> int:
    return hash(tuple(self._values.items()))

  def __repr__(self) -> str:
    return f"Figures({self._values})"


@dataclasses.dataclass(frozen=True)
class Measures:
  """The measures of a set of labelled images, sampled or real. Each is an attribute as well: ``measures.accuracy``.

  Args:
    n: number of images.
    figures: the values by name; a mapping is made a `Figures`.
  """

  n: int
  figures: Mapping[str, float]

  def __post_init__(self):
    checks.at_least("n", self.n, 1)
    if not isinstance(self.figures, Figures):
      object.__setattr__(self, "figures", Figures(self.figures))

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__") or "figures" not in self.__dict__:
      raise AttributeError(name)
    return getattr(self.__dict__["figures"], name)


def measure(
  images: np.ndarray,
  labels: np.ndarray,
  judge: Judge,
  reference_images: np.ndarray,
  names: Sequence[str] | None = None,
) -> Measures:
  """Measure labelled images.

  The figures of real data, to which samples can be compared, are those of its test split against its training split.

  Args:
    images: uint8 of shape (n, height, width, channels), n at least 2, with two of one class.
    labels: int of shape (n,), the classes that the images were sampled for.
    judge: fitted on images of that height, width and channels.
    reference_images: uint8 of shape (m, height, width, channels), m at least 2.
    names: which measures of `MEASURES`; all of them if left out.

  Raises:
    ValueError: for an unknown name, or as the metrics do, where images or labels are not of that type and shape.
  """
  evidence = Evidence(images, labels, reference_images, judge)
  chosen = {name: checks.lookup("measure", name, MEASURES) for name in (MEASURES if names is None else names)}
  return Measures(len(images), {name: entry.function(evidence) for name, entry in chosen.items()})
