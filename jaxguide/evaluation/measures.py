"""The measures of images: one table, `MEASURES`.

To add a measure, write a function and add an entry to `MEASURES`. It then has a column in the CSV file, in the table
and in the report, and a panel in the plot.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxguide._core import checks
from jaxguide._core.bars import progress_bar
from jaxguide.evaluation import computed
from jaxguide.evaluation.evidence import Evidence
from jaxguide.evaluation.results import Figure


class Measure(NamedTuple):
  """One measure: how to compute it, and how to show it.

  Args:
    function: computes the figure, or its value alone, from an `Evidence`.
    title: the title in plots and tables.
    description: what it measures and how to read it, for the report.
    inception: the established name on Inception features. On others the title names the features. Empty for a measure
      whose title does not depend on the features.
    needs: what the evidence must have: ``reference``, ``reference features``, ``reference spatial``, ``spatial``,
      ``logits``, ``labels``, ``judge``, ``neighbours`` (enough images of both) or ``pairs`` (two samples of one class).
    better: ``"higher"`` or ``"lower"``, or None if neither is better.
    low: the smallest valid value.
    high: the largest valid value.
    number_format: the format specification of a value, as of the built-in ``format``; empty for three digits.
  """

  function: Callable[[Evidence], Figure | float]
  title: str
  description: str
  inception: str = ""
  needs: Sequence[str] = ()
  better: Literal["higher", "lower"] | None = None
  low: float = 0.0
  high: float = math.inf
  number_format: str = ""

  def title_on(self, features: str) -> str:
    """Give the title on some features, by their name. On Inception's it is the established name.

    >>> MEASURES["frechet_distance"].title_on("inception"), MEASURES["frechet_distance"].title_on("dinov2")
    ('FID', 'Fréchet distance (dinov2)')
    """
    family = features.partition(":")[0]
    if self.inception:
      return self.inception if family == "inception" else f"{self.title} ({family})" if family else self.title
    return self.title

  def text(self, value: float | int) -> str:
    """Format a value.

    >>> MEASURES["kid"].text(0.00123456), MEASURES["kid"].text(123.456), MEASURES["precision"].text(0.5)
    ('0.00123', '123.5', '0.500')
    """
    if self.number_format:
      return format(value, self.number_format)
    return f"{value:#.3g}".rstrip(".") if abs(value) < 100 else f"{value:.1f}"


MEASURES: dict[str, Measure] = {
  "frechet_distance": Measure(
    computed.frechet_distance,
    "Fréchet distance",
    "The distance between two Gaussians, one fitted to the features of the samples and one to those of the reference "
    "(Heusel et al. 2017). It depends only on the means and covariances over all classes together. Few samples bias it "
    "upwards, so compare it only between sets of equal size, on the same features. Published values are on those of "
    "Inception. Copies of the training images would have a low distance too.",
    inception="FID",
    needs=("reference",),
    better="lower",
  ),
  "spatial_frechet_distance": Measure(
    computed.spatial_frechet_distance,
    "spatial Fréchet distance",
    "The Fréchet distance on features that still have a place in the image (Nash et al. 2021). It notices wrong "
    "layouts, to which pooled features are blind.",
    inception="sFID",
    needs=("spatial", "reference spatial"),
    better="lower",
  ),
  "kid": Measure(
    computed.kid,
    "kernel distance",
    "The squared maximum mean discrepancy with a polynomial kernel of degree 3 (Binkowski et al. 2018). It has no bias "
    "from few samples, so it can be slightly below 0.",
    inception="KID",
    needs=("reference features",),
    better="lower",
    low=-math.inf,
  ),
  "inception_score": Measure(
    computed.inception_score,
    "classifier score",
    "The exponential of the mean divergence between the classes predicted for one sample and for all (Salimans et al. "
    "2016). It is high if the network is sure of each sample, and the samples are of many of ImageNet's classes. It "
    "does not look at the reference. For images unlike ImageNet's it means little.",
    inception="Inception score",
    needs=("logits",),
    better="higher",
    low=1.0,
  ),
  "precision": Measure(
    computed.precision,
    "precision",
    "Fidelity: the share of samples that lie within the k-th nearest neighbour's distance of some reference image "
    "(Kynkäänniemi et al. 2019).",
    needs=("reference features", "neighbours"),
    better="higher",
    high=1.0,
    number_format=".3f",
  ),
  "recall": Measure(
    computed.recall,
    "recall",
    "Diversity: the share of reference images that lie within the k-th nearest neighbour's distance of some sample "
    "(Kynkäänniemi et al. 2019). Precision and recall depend on the numbers of samples and of reference images.",
    needs=("reference features", "neighbours"),
    better="higher",
    high=1.0,
    number_format=".3f",
  ),
  "density": Measure(
    computed.density,
    "density",
    "Fidelity, less sensitive to outliers than precision: how many reference neighbourhoods hold a sample, on average, "
    "divided by k (Naeem et al. 2020). It can be above 1.",
    needs=("reference features", "neighbours"),
    better="higher",
  ),
  "coverage": Measure(
    computed.coverage,
    "coverage",
    "Diversity, less sensitive to outliers than recall: the share of reference images whose neighbourhood holds a "
    "sample (Naeem et al. 2020).",
    needs=("reference features", "neighbours"),
    better="higher",
    high=1.0,
    number_format=".3f",
  ),
  "accuracy": Measure(
    computed.accuracy,
    "judged accuracy",
    "The share of samples for which a judge predicts the class that they were sampled for. The judge was trained on "
    "real images and did not guide the samples. Its accuracy on real images is the most that can be expected; "
    "differences smaller than its error rate there mean little. At scale 0 the samples do not depend on the class.",
    needs=("labels", "judge"),
    better="higher",
    high=1.0,
    number_format=".3f",
  ),
  "diversity": Measure(
    computed.diversity,
    "diversity within a class",
    "The mean Euclidean distance between the features of two samples of the same class, averaged over the classes. "
    "Both variety and noise raise it, so it does not measure quality. At scale 0 the samples do not depend on the "
    "class, so it is the distance between samples of all classes.",
    needs=("pairs",),
  ),
  "saturated": Measure(
    computed.saturated,
    "saturated pixels",
    "The share of pixel values that are 0 or 255. Too high a scale pushes pixels to the ends of their range: compare "
    "with the real images.",
    high=1.0,
    number_format=".1%",
  ),
}


def missing(measure: Measure, evidence: Evidence) -> str | None:
  """Say what a measure needs and the evidence does not have; None if it has everything."""
  reference, labels, judge = evidence.reference, evidence.labels, evidence.judge
  real = None if reference is None else reference.features
  k = max(evidence.options.neighbours, evidence.options.density_neighbours)
  unknown = np.zeros(0) if judge is None or labels is None else judge.unknown(labels)
  there = {
    "reference": reference is not None,
    "reference features": real is not None,
    "reference spatial": reference is not None and reference.mu_s is not None,
    "neighbours": real is not None and min(len(real), len(evidence.images)) > k,
    "spatial": "spatial" in evidence.outputs,
    "logits": "logits" in evidence.outputs,
    "labels": labels is not None,
    "judge": judge is not None and not len(unknown),
    "pairs": labels is not None and len(labels) > len(np.unique(labels)),
  }
  words = {
    "reference": "a reference (--reference)",
    "reference features": "a reference (--reference)"
    if reference is None
    else "the features of reference images (statistics of means and covariances are not enough)",
    "reference spatial": "a reference (--reference)" if reference is None else "a reference with spatial features",
    "neighbours": f"more than {k} images and reference images, for the {k} nearest neighbours (there are "
    f"{len(evidence.images):,} and {0 if real is None else len(real):,})",
    "spatial": "spatial features, which inception has",
    "logits": "logits, which inception and efficientnet-lite0 have",
    "labels": "labels of the images",
    "judge": f"a judge that knows the class {unknown[0]}: the reference has no images of it"
    if len(unknown)
    else "a judge, which needs labelled reference images",
    "pairs": "labels of the images" if labels is None else "two labelled images of one class",
  }
  return next((words[name] for name in measure.needs if not there[name]), None)


def _lacking(measure: Measure, evidence: Evidence) -> str | None:
  """Say what a measure lacks for the images, or for one of the three sets that they are split into."""
  parts = _thirds(evidence) if evidence.options.interval == "min-of-3" else [evidence]
  return next((lacking for part in parts if (lacking := missing(measure, part)) is not None), None)


def _thirds(evidence: Evidence) -> list[Evidence]:
  """Split the images into three sets, in their order.

  Raises:
    ValueError: if there are fewer than 6.
  """
  size = len(evidence.images) // 3
  if size < 2:
    raise ValueError(f"interval 'min-of-3' splits the images into three sets, and {len(evidence.images)} are too few")
  return [evidence.rows(slice(i * size, (i + 1) * size)) for i in range(3)]


OTHER_NAMES = {
  "fid": "frechet_distance on the features inception (features inception:weights=FILE)",
  "sfid": "spatial_frechet_distance on the features inception (features inception:weights=FILE)",
  "fd_dinov2": "frechet_distance on the features dinov2 (features dinov2:weights=FILE)",
  "fdd": "frechet_distance on the features dinov2 (features dinov2:weights=FILE)",
  "fd": "frechet_distance",
  "mmd": "kid",
  "is": "inception_score",
  "prdc": "the four measures precision, recall, density and coverage",
}
"""What measures of other programs are called here."""

OF_PAIRS = ("lpips", "ssim", "ms-ssim", "psnr")


def check_names(names: Sequence[str] | None) -> None:
  """Check names of measures, before any work.

  Raises:
    ValueError: if a name is unknown.

  >>> check_names(["fid"])
  Traceback (most recent call last):
  ...
  ValueError: there is no measure 'fid': it is called frechet_distance on the features inception ...
  """
  for name in names or ():
    plain = str(name).lower()
    if name not in MEASURES and plain in OTHER_NAMES:
      raise ValueError(f"there is no measure {name!r}: it is called {OTHER_NAMES[plain]}")
    if name not in MEASURES and plain in OF_PAIRS:
      raise ValueError(
        f"there is no measure {name!r}, which compares two versions of one picture: the measures here compare sets of "
        f"images; there are {', '.join(MEASURES)}"
      )
    checks.lookup("measure", name, MEASURES)


def left_out(evidence: Evidence) -> dict[str, str]:
  """Say what each measure lacks that the evidence does not suffice for, by its name."""
  lacking = {name: _lacking(entry, evidence) for name, entry in MEASURES.items()}
  return {name: text for name, text in lacking.items() if text is not None}


def chosen_measures(names: Sequence[str] | None, evidence: Evidence) -> dict[str, Measure]:
  """Return measures by name, in the order of `MEASURES`; by default all that the evidence suffices for.

  Raises:
    ValueError: if a name is unknown, a measure that is named needs what is not there, or there is none.
  """
  if names is None:
    chosen = {name: entry for name, entry in MEASURES.items() if _lacking(entry, evidence) is None}
  else:
    check_names(names)
    chosen = {name: entry for name, entry in MEASURES.items() if name in names}
    for name, entry in chosen.items():
      lacking = _lacking(entry, evidence)
      if lacking is not None:
        raise ValueError(f"{name} needs {lacking}: give it, or leave {name} out")
  if not chosen:
    raise ValueError("there is nothing to measure: give a reference, or labels")
  return chosen


def measure(
  evidence: Evidence, names: Sequence[str] | None = None, progress: bool | Callable[[str, float], object] = False
) -> dict[str, Figure]:
  """Compute the figures of images.

  Args:
    evidence: the images, and what they are compared with.
    names: which measures of `MEASURES`; by default all that the evidence suffices for.
    progress: whether to show a progress bar, which names the figure that is computed; or a function that is called
      before each figure with its title and the share of the figures that are there.

  Raises:
    ValueError: if a name is unknown, if a measure that is named needs what is not there, or if a value is not finite or
      outside the measure's range.
  """
  chosen = chosen_measures(names, evidence)
  sets = _thirds(evidence) if evidence.options.interval == "min-of-3" else [evidence]
  figures: dict[str, Figure] = {}
  with progress_bar(len(chosen), title="figures", unit="figure", show=progress is True) as bar:
    for name, entry in chosen.items():
      bar.set_postfix_str(entry.title, refresh=True)
      if callable(progress):
        progress(entry.title, len(figures) / len(chosen))
      found = [_checked(name, entry, entry.function(part)) for part in sets]
      figures[name] = found[0] if len(sets) == 1 else _of_three(entry, found, len(sets[0].images))
      bar.update()
  return figures


def _checked(name: str, entry: Measure, figure: Figure | float) -> Figure:
  figure = figure if isinstance(figure, Figure) else Figure(figure)
  return dataclasses.replace(figure, value=float(checks.in_range(name, figure.value, entry.low, entry.high)))


def _of_three(entry: Measure, found: Sequence[Figure], size: int) -> Figure:
  """Join the figures of three sets of images."""
  values = [figure.value for figure in found]
  ends = (min(values), max(values))
  if entry.better == "lower":
    return Figure(ends[0], ends, f"least to greatest of 3 sets of {size}; the value is the least")
  return Figure(float(np.mean(values)), ends, f"least to greatest of 3 sets of {size}")
