"""The computation of each measure: from the evidence to a figure with its interval."""

import numpy as np

from jaxguide import data
from jaxguide.evaluation import metrics
from jaxguide.evaluation.evidence import Evidence, Options
from jaxguide.evaluation.results import Figure


def _figure(value: float, interval: metrics.Interval | None) -> Figure:
  return Figure(value) if interval is None else Figure(value, (interval.low, interval.high), interval.kind)


def _frechet(features: np.ndarray, reference: metrics.Gaussian, options: Options) -> Figure:
  value = metrics.frechet_distance(features, reference)
  if options.interval != "bootstrap" or len(features) < 3:
    return Figure(value)
  return _figure(value, metrics.frechet_interval(reference, features, options.resamples, options.figures_seed))


def frechet_distance(evidence: Evidence) -> Figure:
  """Compute the Fréchet distance of the pooled features."""
  return _frechet(evidence.outputs["pool"], evidence.known.gaussian, evidence.options)


def spatial_frechet_distance(evidence: Evidence) -> Figure:
  """Compute the Fréchet distance of the spatial features."""
  return _frechet(evidence.outputs["spatial"], evidence.known.spatial, evidence.options)


def kid(evidence: Evidence) -> Figure:
  """Compute the kernel distance."""
  real, generated, options = evidence.known.features, evidence.outputs["pool"], evidence.options
  assert real is not None
  size = min(options.subset_size, len(real), len(generated))
  # Where a subset is all of both sets, every other is the same.
  subsets = 1 if size == len(real) == len(generated) else options.subsets
  mean, std = metrics.kid(real, generated, subsets, size, options.figures_seed)
  if options.subsets == 1:
    return Figure(mean, None, "no interval: there is one subset")
  if size == len(generated):
    return Figure(mean, None, f"no interval: each subset has all {size:,} samples (give a smaller subset_size)")
  return Figure(mean, (mean - std, mean + std), f"standard deviation over {options.subsets} subsets of {size}")


def inception_score(evidence: Evidence) -> Figure:
  """Compute the score of the logits."""
  splits = min(evidence.options.splits, len(evidence.images))
  mean, std = metrics.inception_score(evidence.outputs["logits"], splits)
  if splits == 1:
    return Figure(mean, None, "no interval: there is one split")
  return Figure(mean, (mean - std, mean + std), f"standard deviation over {splits} splits")


def _share(flags: np.ndarray, evidence: Evidence) -> Figure:
  """Make the figure that is the share of samples with a property."""
  count, with_interval = int(flags.sum()), evidence.options.interval == "bootstrap"
  return _figure(count / len(flags), metrics.proportion_interval(count, len(flags)) if with_interval else None)


def _mean(values: np.ndarray, evidence: Evidence, what: str) -> Figure:
  """Make the figure that is the mean of one number for each sample."""
  options = evidence.options
  interval = None
  if options.interval == "bootstrap" and len(values) > 1:
    interval = metrics.mean_interval(values, options.resamples or 200, options.figures_seed, what=what)
  return _figure(float(values.mean()), interval)


def precision(evidence: Evidence) -> Figure:
  """Compute the share of samples that are realistic."""
  return _share(evidence.neighbourhoods.in_real, evidence)


def _of_reference(value: float, without: np.ndarray | None, evidence: Evidence) -> Figure:
  """Make the figure that is a share of the reference images. It varies with the samples that were generated."""
  if evidence.options.interval != "bootstrap":
    return Figure(value)
  interval = None if without is None else metrics.jackknife_interval(value, without, len(evidence.images))
  if interval is None:
    few = "there are too few samples" if without is None else "the figure is the same without each group of samples"
    return Figure(value, None, f"no interval: {few}, which says nothing of its uncertainty")
  return _figure(value, interval)


def recall(evidence: Evidence) -> Figure:
  """Compute the share of reference images that the samples reach."""
  found = evidence.neighbourhoods
  return _of_reference(found.recall, None if found.left is None else found.left.recalls, evidence)


def density(evidence: Evidence) -> Figure:
  """Compute how many reference neighbourhoods hold a sample."""
  return _mean(evidence.neighbourhoods.densities, evidence, "samples")


def coverage(evidence: Evidence) -> Figure:
  """Compute the share of reference images with a sample nearby."""
  found = evidence.neighbourhoods
  return _of_reference(found.coverage, None if found.left is None else found.left.coverages, evidence)


def accuracy(evidence: Evidence) -> Figure:
  """Compute the share of samples that the judge gives their label."""
  assert evidence.judge is not None
  assert evidence.labels is not None
  right = evidence.judge.right(evidence.images, evidence.labels, evidence.outputs.get("pool"))
  return _share(right, evidence)


def diversity(evidence: Evidence) -> Figure:
  """Compute the mean distance within a class."""
  assert evidence.labels is not None
  return Figure(metrics.diversity(evidence.outputs["pool"], evidence.labels))


def saturated(evidence: Evidence) -> Figure:
  """Compute the share of pixels at 0 or 255."""
  shares = np.array([data.saturation(image[None]) for image in evidence.images])
  return _mean(shares, evidence, "samples")
