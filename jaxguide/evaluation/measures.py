"""The measures of labelled images: one table, `MEASURES`.

To add a measure, write a function and add an entry to `MEASURES`. It then has a column in the CSV file, in the table
and in the report, and a panel in the plot.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxguide._core import checks
from jaxguide.evaluation.features import pixel_features
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.metrics import diversity, frechet_distance


class Evidence(NamedTuple):
  """The input of a measure.

  Args:
    images: uint8 of shape (n, height, width, channels), the images to measure.
    labels: int of shape (n,), the classes that the images were sampled for.
    reference_images: uint8 of shape (m, height, width, channels), real images to compare with.
    judge: a classifier that did not guide the samples.
  """

  images: np.ndarray
  labels: np.ndarray
  reference_images: np.ndarray
  judge: Judge


class Measure(NamedTuple):
  """One measure: how to compute it, and how to show it.

  Args:
    function: computes the value from an `Evidence`.
    title: the title in the plot and the report.
    description: what it measures and how to read it, for the report. The report replaces ``{real}`` by the value of the
      real test split and ``{counts}`` by the numbers of samples; other braces must be doubled.
    better: ``"higher"`` or ``"lower"``, or None if neither is better.
    low: the smallest valid value.
    high: the largest valid value.
    number_format: the format specification of a value in tables and the report, as of the built-in ``format``.
  """

  function: Callable[[Evidence], float]
  title: str
  description: str
  better: Literal["higher", "lower"] | None = None
  low: float = 0.0
  high: float = math.inf
  number_format: str = ".3f"

  @property
  def heading(self) -> str:
    """The title, and which direction is better."""
    return self.title if self.better is None else f"{self.title} ({self.better} is better)"

  def text(self, value: float) -> str:
    """Format a value."""
    return format(value, self.number_format)


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
    "The share of samples for which a support vector machine on raw pixels predicts the class that they were sampled "
    "for. The machine was trained on the real training split and did not guide the samples. On the real test split its "
    "accuracy is {real:.1%}; differences smaller than its error rate there mean little. At scale 0 the samples do not "
    "depend on the class, so the accuracy is that of chance.",
    better="higher",
    high=1.0,
  ),
  "frechet_distance": Measure(
    _frechet_distance,
    "Fréchet distance on pixels",
    "The distance between two Gaussians, one fitted to the samples and one to the training split, as in the FID "
    "(Heusel et al. 2017). It is computed on raw pixels in [0, 1] and not on Inception features, so it cannot be "
    "compared with published FIDs. It depends only on the means and covariances over all classes together. Few samples "
    "bias it upwards (here {counts} per row), so compare it only between sets of equal size. Copies of the training "
    "images would have a low distance too: a value below that of the real test split does not prove quality.",
    better="lower",
  ),
  "diversity": Measure(
    _diversity,
    "diversity within a class",
    "The mean Euclidean distance, on pixels in [0, 1], between two samples of the same class, averaged over the "
    "classes. Both variety and noise in the images raise it, so it does not measure quality. At scale 0 the samples do "
    "not depend on the class, so it is the distance between samples of all classes.",
  ),
}


class Figures(Mapping[str, float]):
  """Checked values of measures by name, in the order of `MEASURES`. It cannot be changed, and can be hashed.

  Args:
    values: the values by name.

  Raises:
    ValueError: if a name is not in `MEASURES`, or a value is not finite or outside the measure's range.

  >>> dict(Figures({"diversity": 1.5, "accuracy": 0.9}))
  {'accuracy': 0.9, 'diversity': 1.5}
  >>> Figures({"acuracy": 0.9})
  Traceback (most recent call last):
  ...
  ValueError: unknown measure 'acuracy': did you mean 'accuracy'? There are accuracy, diversity, frechet_distance
  """

  def __init__(self, values: Mapping[str, float]):
    if not isinstance(values, Mapping):
      raise TypeError(f"figures must be a mapping from names of measures to values, got {values!r}")
    for name, value in values.items():
      entry = checks.lookup("measure", name, MEASURES)
      checks.in_range(name, value, entry.low, entry.high)
    self._values = {name: float(values[name]) for name in MEASURES if name in values}

  def __getitem__(self, name: str) -> float:
    return self._values[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._values)

  def __len__(self) -> int:
    return len(self._values)

  def __hash__(self) -> int:
    return hash(tuple(self._values.items()))

  def __repr__(self) -> str:
    return f"Figures({self._values})"


class Measured:
  """Base of `Measures` and `Row`: it checks ``n`` and ``figures``, and makes each measure an attribute."""

  n: int
  figures: Mapping[str, float]

  def __post_init__(self) -> None:
    checks.at_least("n", self.n, 1)
    object.__setattr__(self, "figures", Figures(self.figures))

  def __getattr__(self, name: str) -> float:
    # Python calls this only for attributes that are not found. While an object is unpickled it has no figures yet.
    figures = self.__dict__.get("figures", {})
    if name not in figures:
      raise AttributeError(f"there is no measure {name!r} in this {type(self).__name__}, only {', '.join(figures)}")
    return figures[name]


@dataclasses.dataclass(frozen=True)
class Measures(Measured):
  """The measures of a set of labelled images, sampled or real. Each measure is also an attribute.

  Args:
    n: number of images, at least 1.
    figures: values of measures by name, converted to `Figures`.

  Raises:
    ValueError: if ``n`` or a value is out of range, or a measure is unknown.

  >>> Measures(500, {"accuracy": 0.9}).accuracy
  0.9
  """

  n: int
  figures: Mapping[str, float]


def measure(
  images: np.ndarray,
  labels: np.ndarray,
  judge: Judge,
  reference_images: np.ndarray,
  names: Sequence[str] | None = None,
) -> Measures:
  """Compute the measures of labelled images.

  To have values of real data to compare samples with, measure the test split with the training split as reference.

  Args:
    images: uint8 of shape (n, height, width, channels), n at least 2, with two of one class.
    labels: int of shape (n,), the classes that the images were sampled for.
    judge: fitted on images of that height, width and channels.
    reference_images: uint8 of shape (m, height, width, channels), m at least 2.
    names: which measures of `MEASURES` to compute, by default all.

  Raises:
    ValueError: if a name is unknown, if images or labels do not have that type and shape, or if a value is not finite
      or outside the measure's range.
  """
  evidence = Evidence(images, labels, reference_images, judge)
  chosen = {name: checks.lookup("measure", name, MEASURES) for name in (MEASURES if names is None else names)}
  return Measures(len(images), {name: entry.function(evidence) for name, entry in chosen.items()})
