"""The report on a noisy classifier: whether it is trained long enough, and whether its gradient is fit to guide."""

import dataclasses
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide import data as datasets
from jaxguide._core import checks, keys
from jaxguide._core.bars import progress_bar
from jaxguide._core.files import PathLike, check_writable, write_atomically
from jaxguide.evaluation import pages
from jaxguide.evaluation.classifiers import Gradients, gradients, guided_samples, level_ends
from jaxguide.evaluation.verdicts import Verdicts, verdicts
from jaxguide.models.model import Model
from jaxguide.models.networks import CLASSIFIER, DENOISER
from jaxguide.training import held_out
from jaxguide.training.held_out import Levels

FEW = 100
"""With fewer held-out examples there is a warning."""

LEVELS = 12

LOWEST, HIGHEST = 0.02, 80.0

SCALES = (0.0, 1.0, 3.0, 10.0)

MOST_ROWS = 10
"""The largest number of classes among the guided samples."""


class ClassifierReport(NamedTuple):
  """What the report shows.

  Args:
    levels: accuracy, likelihood and calibration error by noise level.
    gradients: norm and cosine of the gradient by noise level.
    verdicts: a sentence on each figure, made from the numbers.
    path: the file.
  """

  levels: Levels
  gradients: Gradients
  verdicts: Verdicts
  path: Path


def classifier_report(
  out: PathLike,
  classifier: Model,
  data: Any,
  *,
  denoiser: Model | None = None,
  sigmas: Sequence[float] | None = None,
  scales: Sequence[float] = SCALES,
  num: int = 1000,
  num_gradients: int = 256,
  samples_per_class: int = 6,
  steps: int = 25,
  seed: int = 0,
  title: str = "Noisy classifier",
  facts: Mapping[str, str] | None = None,
  progress: bool = True,
) -> ClassifierReport:
  """Measure a noisy classifier on held-out data, sample with its guidance, and write one HTML file.

  The file needs no network and runs no script. All statements about the results are computed from the numbers.

  Args:
    out: the file, which is written atomically; missing folders are created.
    classifier: the classifier.
    data: a dataset of labelled examples that the classifier was not trained on.
    denoiser: a diffusion model of the same images and classes. With a null class, it gives the implied gradient that
      the classifier's is compared with. The guided samples need it too.
    sigmas: the noise levels, above 0. The default is 12 levels from 0.02 to 80 on a logarithmic scale, within the
      steps of a discrete process, and within the ``noise_range`` of the classifier.
    scales: the guidance scales of the samples.
    num: the largest number of examples for accuracy, likelihood and calibration.
    num_gradients: the largest number of examples for gradients.
    samples_per_class: samples of each class at each scale, of at most ten classes; 0 for no samples.
    steps: steps of the solver for the samples.
    seed: seed of the choice of examples, of their noise and of the samples.
    title: title of the page.
    facts: what a reader needs to know besides, by name.
    progress: whether to show a progress bar.

  Raises:
    TypeError: if ``classifier`` or ``denoiser`` is not a model.
    ValueError: if the models are of other kinds, or of other images or classes than the data.
    OSError: if the file cannot be written. This is checked before any work.
  """
  out = Path(out)
  check_writable(out)
  _check_models(classifier, denoiser, data)
  config, key = classifier.config, keys.seed_key(seed)
  key_levels, key_gradients, key_samples = jax.random.split(key, 3)
  ends = level_ends(classifier, LOWEST, HIGHEST)
  at = np.geomspace(max(ends[0], 1e-4), ends[1], LEVELS) if sigmas is None else np.asarray(sigmas, np.float64)
  examples, labels = _examples(data, checks.at_least("num", num, 1), seed)
  if len(examples) < FEW:
    warnings.warn(
      f"there are {len(examples)} held-out examples, so an accuracy is known within about "
      f"{1 / math.sqrt(len(examples)):.0%}: hold out more, or give other data",
      stacklevel=2,
    )
  batches = _in_batches(examples, labels)
  draws = denoiser is not None and checks.at_least("samples_per_class", samples_per_class, 0) > 0
  few = checks.at_least("num_gradients", num_gradients, 1)
  classes = config.num_classes or 0
  chance = float(np.bincount(labels).max() / len(labels))
  null = None if denoiser is None or config.num_classes != denoiser.config.num_classes else denoiser.null_cond
  pictures = {}
  parts = len(batches) + 1 + (len(scales) if draws else 0)
  with progress_bar(parts, title="measuring the classifier", unit="part", show=progress) as bar:
    levels = held_out.evaluate(config, classifier.params, _counted(batches, bar), key_levels, at)
    measured = gradients(
      _everywhere(classifier),
      np.asarray(config.data.encode(examples[:few])),
      labels[:few],
      key_gradients,
      at,
      denoise=None if denoiser is None or null is None else denoiser.denoiser,
      null_cond=null,
    )
    bar.update()
    if denoiser is not None and draws:
      cond = np.repeat(_some_classes(classes), samples_per_class)
      for scale, images in guided_samples(denoiser, classifier, cond, scales, key_samples, steps=steps):
        pictures[scale] = _grid(images, cond, config.class_names or data.class_names, samples_per_class)
        bar.update()
  said = verdicts(levels, measured, classes=classes, chance=chance)
  described = _facts(classifier, denoiser, data, steps, seed, facts)
  lines = {"accuracy": chance, "nll": math.log(classes)}
  _write(out, title, levels, measured, said, pictures, described, lines)
  return ClassifierReport(levels, measured, said, out)


def _check_models(classifier: Model, denoiser: Model | None, data: Any) -> None:
  """Check, before any work, that the models and the data fit each other."""
  for name, model, role in (("classifier", classifier, CLASSIFIER), ("denoiser", denoiser, DENOISER)):
    if model is None and name == "denoiser":
      continue
    if not isinstance(model, Model):
      raise TypeError(f"{name} must be a jaxguide.models.Model, got {type(model).__name__}: load one from its folder")
    if model.config.role is not role:
      raise ValueError(f"{name} must be a {role.name}, got a {model.config.network}")
  config = classifier.config
  if tuple(data.image_shape) != config.image_shape or data.num_classes != config.num_classes:
    raise ValueError(
      f"the classifier is for images of shape {config.image_shape} in {config.num_classes} classes, but {data.name} "
      f"has {tuple(data.image_shape)} in {data.num_classes}"
    )
  names = data.class_names
  if config.class_names is not None and names is not None and tuple(names) != tuple(config.class_names):
    raise ValueError(
      f"the classifier's classes are {', '.join(config.class_names)}, but {data.name} has {', '.join(names)}"
    )
  if denoiser is None:
    return
  if denoiser.config.low_res_shape is not None:
    raise ValueError("a classifier guides no model of super-resolution: give another denoiser")
  if denoiser.config.image_shape != config.image_shape or denoiser.config.num_classes not in (config.num_classes, None):
    raise ValueError(
      f"the classifier is for images of shape {config.image_shape} in {config.num_classes} classes, but the denoiser "
      f"has {denoiser.config.image_shape} in {denoiser.config.num_classes}"
    )


def _everywhere(classifier: Model) -> Any:
  """Return the classifier's log-probability without its range, outside of which its gradient would be 0."""
  return dataclasses.replace(classifier.log_prob, noise_range=None)


def _examples(data: Any, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Choose examples of a dataset, in the order of the choice, so that the first of them are a choice as well."""
  rows = np.random.default_rng(seed).permutation(len(data))[:num]
  examples, labels = zip(*(data.example(int(row), np.random.default_rng(int(row))) for row in rows), strict=True)
  return np.stack(examples), np.asarray(labels, np.int32)


def _in_batches(examples: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
  size = held_out.BATCH_SIZE
  return [(examples[first : first + size], labels[first : first + size]) for first in range(0, len(labels), size)]


def _counted(batches: Sequence[Any], bar: Any) -> Iterator[Any]:
  """Yield batches, and move the bar after each."""
  for batch in batches:
    yield batch
    bar.update()


def _some_classes(classes: int) -> np.ndarray:
  """Choose at most `MOST_ROWS` classes, spread over all of them."""
  return np.unique(np.linspace(0, classes - 1, min(classes, MOST_ROWS)).round().astype(np.int32))


def _grid(images: np.ndarray, labels: np.ndarray, names: Sequence[str] | None, columns: int) -> bytes:
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "grid.png")
    datasets.save_png(path, images, labels, columns=columns, names=names)
    return path.read_bytes()


def _facts(
  classifier: Model, denoiser: Model | None, data: Any, steps: int, seed: int, more: Mapping[str, str] | None
) -> dict[str, str]:
  def described(model: Model) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return f"{model.config.network} of {size:,} parameters, {model.config.num_classes or 'no'} classes"

  levels = classifier.config.noise_range
  return {
    "classifier": described(classifier),
    "noise levels of its training": "all" if levels is None else f"sigma {levels[0]:g} to {levels[1]:g}",
    "data": f"{data.name}, {len(data):,} held-out examples",
    "diffusion model": "none" if denoiser is None else described(denoiser),
    "sampling": f"DPM-Solver++(2M), {steps} steps, seed {seed}",
    **(more or {}),
  }


class _Figure(NamedTuple):
  title: str
  reading: str
  verdict: str
  plot: str | None
  alt: str


SAMPLES_READING = (
  "Classifier guidance of the unconditional model, from the same noise at each scale; scale 0 is unguided. Good: at "
  "some scale from 1 to 10 each row shows its class, with differences from column to column. Bad: rows that show other "
  "classes (the gradient is wrong or too weak); or, at every scale that shows the class, blotches or the same image in "
  "each column (the gradient is too strong, or the classifier is fooled by what is no image)."
)

NO_SAMPLES = "There are no samples: they need a diffusion model (--denoiser) and at least one sample of each class."

READINGS = {
  "accuracy": "Good: close to 100% at low noise, and falling to chance only where a person could not name the class "
  "either. Bad: low at low noise (trained too briefly, or too small), or at chance while the noise is still weak "
  "(never trained on such noise).",
  "nll": "Good: low at low noise, and rising to the uniform guess without crossing it, since a classifier that knows "
  "when it cannot know is never worse. Bad: above the uniform guess, where the classifier is confident and wrong.",
  "calibration": "Good: below 0.05 everywhere, since guidance multiplies the probabilities as they are. Bad: above "
  "0.1; too much confidence makes guidance too strong, too little makes it too weak.",
  "norm": "Good: small where the class is plain or invisible, with one maximum between, and as long as the diffusion "
  "model's own gradient at the high and middle noise levels. Bad: many times longer (samples are pushed off the data "
  "at every scale) or many times shorter (guidance does nothing unless the scale is large).",
  "cosine": "Good: above 0.5 at the noise levels at which the accuracy rises, where the class of a sample is decided. "
  "At low noise it falls for every classifier, since both gradients are mostly error there. Bad: near 0, as for random "
  "directions, whose cosines lie within the dotted lines.",
}


def _write(
  out: Path,
  title: str,
  levels: Levels,
  measured: Gradients,
  said: Verdicts,
  pictures: Mapping[float, bytes],
  facts: Mapping[str, str],
  lines: Mapping[str, float],
) -> None:
  """Write the page. ``lines`` has the accuracy by chance and the likelihood of a uniform guess."""
  sigmas = levels.sigmas
  own = {"this classifier": measured.norm}
  implied = {} if measured.implied_norm is None else {"diffusion model": measured.implied_norm}
  random = measured.dimension**-0.5
  figures = [
    _figure(
      "accuracy",
      "Accuracy",
      said.accuracy,
      sigmas,
      {"accuracy": levels.accuracy, "mean confidence": levels.confidence},
      {f"chance, {lines['accuracy']:.0%}": lines["accuracy"]},
    ),
    _figure(
      "nll",
      "Negative log-likelihood, in nats",
      said.nll,
      sigmas,
      {"negative log-likelihood": levels.nll},
      {f"uniform guess, {lines['nll']:.2f}": lines["nll"]},
    ),
    _figure("calibration", "Calibration error", said.calibration, sigmas, {"error": levels.calibration_error}, {}),
    _figure("norm", "Norm of the gradient", said.norm, sigmas, {**own, **implied}, {}, log=True),
    _figure(
      "cosine",
      "Cosine with the diffusion model",
      said.cosine,
      sigmas,
      {} if measured.cosine is None else {"cosine": measured.cosine},
      {"random directions": random, "": -random},
    ),
  ]
  table = [
    ("noise level σ", sigmas, "{:.3g}"),  # σ alone would become Σ: the page begins each title with a capital
    ("accuracy", levels.accuracy, "{:.3f}"),
    ("NLL (nats)", levels.nll, "{:.3f}"),
    ("calibration error", levels.calibration_error, "{:.3f}"),
    ("confidence", levels.confidence, "{:.3f}"),
    ("norm", measured.norm[:, 1], "{:.3g}"),
  ]
  if measured.cosine is not None and measured.implied_norm is not None:
    table += [("implied norm", measured.implied_norm[:, 1], "{:.3g}"), ("cosine", measured.cosine[:, 1], "{:.3f}")]
  page = pages.render(
    "classifier_report.html.jinja",
    title=title,
    findings=[said.summary, said.nll, said.cosine] if measured.cosine is not None else [said.summary, said.nll],
    facts=facts,
    figures=figures,
    samples_reading=SAMPLES_READING if pictures else NO_SAMPLES,
    samples=[(scale, pages.data_uri("the grid", png), pages.png_width(png)) for scale, png in pictures.items()],
    columns=[name for name, _, _ in table],
    table=[[shape.format(values[level]) for _, values, shape in table] for level in range(len(sigmas))],
    levels=levels,
    gradients=measured,
  )
  write_atomically(out, page.encode())


def _figure(
  name: str,
  title: str,
  verdict: str,
  sigmas: np.ndarray,
  curves: Mapping[str, np.ndarray],
  lines: Mapping[str, float],
  log: bool = False,
) -> _Figure:
  """Make a figure over the noise level. A curve is (k,), or (k, 3): a median with its quartiles as a band."""
  if not curves:
    return _Figure(title, READINGS[name], verdict, None, "")
  ends = []
  for label, values in curves.items():
    middle = values if values.ndim == 1 else values[:, 1]
    ends.append(
      f"{label} {middle[0]:.2g} at sigma {sigmas[0]:.2g}, {middle[len(sigmas) // 2]:.2g} at "
      f"{sigmas[len(sigmas) // 2]:.2g} and {middle[-1]:.2g} at {sigmas[-1]:.2g}"
    )
  alt = f"{title} over the noise level: {'; '.join(ends)}. The table at the end has all values."
  return _Figure(title, READINGS[name], verdict, pages.data_uri(title, _plot(title, sigmas, curves, lines, log)), alt)


def _plot(
  title: str, sigmas: np.ndarray, curves: Mapping[str, np.ndarray], lines: Mapping[str, float], log: bool
) -> bytes:
  from matplotlib.figure import Figure

  figure = Figure(figsize=(8, 3.6), dpi=150)
  figure.set_layout_engine("constrained")
  axes = figure.subplots()
  axes.set_xscale("log")
  if log:
    axes.set_yscale("log")
  for (label, values), (color, marker) in zip(curves.items(), pages.STYLES, strict=False):
    middle = values if values.ndim == 1 else values[:, 1]
    axes.plot(sigmas, middle, color=color, marker=marker, linewidth=1.8, markersize=5, label=label)
    if values.ndim == 2:
      axes.fill_between(sigmas, values[:, 0], values[:, 2], color=color, alpha=0.15, linewidth=0)
  for label, value in lines.items():
    axes.axhline(value, color="0.4", linestyle=":", linewidth=1.4, zorder=1, label=label or None)
  axes.set(xlabel="noise level σ", ylabel=title)
  pages.tidy(axes)
  if not log and min(float(np.min(values)) for values in curves.values()) >= 0:
    axes.set_ylim(bottom=0)
  if len(curves) + len(lines) > 1:
    axes.legend(frameon=False, fontsize=9)
  return pages.png_of(figure)
