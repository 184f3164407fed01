"""What figures are computed from: images with their features, the reference, a judge, and options."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide.evaluation import metrics
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.statistics import Statistics

INTERVALS = ("bootstrap", "min-of-3", "none")


@dataclasses.dataclass(frozen=True)
class Options:
  """How figures are computed. All of it is part of their protocol.

  Args:
    interval: how the interval of a figure is made: bootstrap (resamples of the images; Wilson's score for shares of
      them; a jackknife for recall and coverage), min-of-3 (the images are split into three sets in their order; of
      distances the least of the three counts, as in EDM, and of other figures the mean; the interval goes from the
      least to the greatest), or none. The kernel distance and the score of the logits have their standard deviation
      over subsets in any case, unless each subset has all samples.
    resamples: number of resamples of the bootstrap; if left out, 200, or as many as minutes allow for the Fréchet
      distance of many images with many features, but at least 30.
    neighbours: k of precision and recall.
    density_neighbours: k of density and coverage.
    subsets: number of subsets for the KID.
    subset_size: number of images in a subset for the KID.
    splits: number of splits for the Inception score.
    figures_seed: seed of the resamples and subsets.
  """

  interval: str = "bootstrap"
  resamples: int | None = None
  neighbours: int = 3
  density_neighbours: int = 5
  subsets: int = 100
  subset_size: int = 1000
  splits: int = 10
  figures_seed: int = 0

  def __post_init__(self):
    checks.lookup("interval", self.interval, dict.fromkeys(INTERVALS))
    for field in dataclasses.fields(self)[1:]:
      if field.name == "resamples" and self.resamples is None:
        continue
      least = 0 if field.name == "figures_seed" else 2 if field.name in ("resamples", "subset_size") else 1
      object.__setattr__(self, field.name, checks.at_least(field.name, getattr(self, field.name), least))


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
  """The input of a measure.

  Args:
    images: uint8 of shape (n, height, width, channels), the images to measure.
    labels: int of shape (n,), the classes that the images were sampled for; None if there are none.
    outputs: the outputs of the features for these images: ``pool`` (n, d), perhaps ``spatial`` (n, e) and ``logits``
      (n, k).
    reference: the statistics of the reference; None if there is none.
    judge: a classifier that did not guide the samples; None if there is none.
    options: how figures are computed.
  """

  images: np.ndarray
  labels: np.ndarray | None
  outputs: Mapping[str, np.ndarray]
  reference: Statistics | None
  judge: Judge | None
  options: Options

  def rows(self, rows: Any) -> "Evidence":
    """Return the evidence of some of the images."""
    return dataclasses.replace(
      self,
      images=self.images[rows],
      labels=None if self.labels is None else self.labels[rows],
      outputs={name: values[rows] for name, values in self.outputs.items()},
    )

  @functools.cached_property
  def neighbourhoods(self) -> metrics.Neighbourhoods:
    """Which samples and reference images lie near each other, for precision, recall, density and coverage."""
    real, generated = self.known.features, self.outputs["pool"]
    assert real is not None
    options = self.options
    seed = options.figures_seed if options.interval == "bootstrap" else None
    return metrics.neighbourhoods(real, generated, options.neighbours, options.density_neighbours, seed)

  @property
  def known(self) -> Statistics:
    """The statistics of the reference, which must be there."""
    assert self.reference is not None  # `jaxguide.evaluation.measures.missing` has seen to it.
    return self.reference
