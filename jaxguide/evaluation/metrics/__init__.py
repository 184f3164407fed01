"""Figures of feature arrays, and their intervals: NumPy arrays in, numbers out.

Features may be any vectors: those of a network such as Inception, or raw pixels, which suit small images and need no
network. Figures on different features cannot be compared with each other.
"""

from jaxguide.evaluation.metrics.balls import (
  DensityCoverage,
  Neighbourhoods,
  PrecisionRecall,
  density_coverage,
  neighbourhoods,
  precision_recall,
)
from jaxguide.evaluation.metrics.frechet import (
  Gaussian,
  Moments,
  check_gaussian,
  few_samples_warning,
  frechet_bias,
  frechet_distance,
  gaussian,
)
from jaxguide.evaluation.metrics.inception import Score, inception_score
from jaxguide.evaluation.metrics.intervals import (
  Interval,
  bootstrap,
  frechet_interval,
  least_of,
  mean_interval,
  proportion_interval,
)
from jaxguide.evaluation.metrics.jackknife import jackknife_interval
from jaxguide.evaluation.metrics.kernel import Kid, kid
from jaxguide.evaluation.metrics.neighbours import nearest
from jaxguide.evaluation.metrics.within_class import diversity

__all__ = [
  "DensityCoverage",
  "Gaussian",
  "Interval",
  "Kid",
  "Moments",
  "Neighbourhoods",
  "PrecisionRecall",
  "Score",
  "bootstrap",
  "check_gaussian",
  "density_coverage",
  "diversity",
  "few_samples_warning",
  "frechet_bias",
  "frechet_distance",
  "frechet_interval",
  "gaussian",
  "inception_score",
  "jackknife_interval",
  "kid",
  "least_of",
  "mean_interval",
  "nearest",
  "neighbourhoods",
  "precision_recall",
  "proportion_interval",
]
