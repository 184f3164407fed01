"""Sweeps: samples of each guidance at each scale, their figures, a table and a report, in one folder.

The folder holds ``samples/`` (one .npz for each point), ``points/`` (its settings, figures and time),
``reference.npz``, ``sweep.csv`` and ``report.html``. Nothing is drawn or measured twice: a sweep that was killed goes
on where it stopped, and one with more scales, more samples or another solver is added to what is there.
"""

import contextlib
import dataclasses
import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide import data, generate, models
from jaxguide._core import checks
from jaxguide._core.files import PathLike, check_writable, lock, write_atomically
from jaxguide.distributed import processes
from jaxguide.evaluation import evaluations, held_out_data, metrics, tables
from jaxguide.evaluation.earlier import find_points
from jaxguide.evaluation.evidence import Options
from jaxguide.evaluation.features import Features
from jaxguide.evaluation.grid import Cell, cells, plain, varied
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.points import Measured, as_evaluation, draw, rate_of, read_point, samples_of, scale_of
from jaxguide.evaluation.reference import Reference, open_reference
from jaxguide.evaluation.results import Evaluation, Point, Sweep
from jaxguide.evaluation.statistics import read_statistics, write_statistics
from jaxguide.evaluation.sweep_curves import best_point
from jaxguide.evaluation.sweep_report import write_sweep_report
from jaxguide.generate import Settings
from jaxguide.generate.plan import Load, classifier_folder, grid_of, plan, warn_unguided

SCALES = (0.0, 1.0, 1.5, 2.0, 4.0)
"""The scales of a sweep that names none."""

SHOWN = 100
"""The number of samples of each point that the report may show."""

NEIGHBOURS = (8, 3)
"""The number of samples whose nearest training images the report shows, and how many of each."""


def sweep(
  out: PathLike,
  base: Settings,
  *,
  guidance: str | Sequence[str] | None = None,
  scales: Sequence[float | int] | None = None,
  over: Sequence[str] | Mapping[str, Sequence[Any]] = (),
  reference: Any = None,
  features: str | Features | None = None,
  judge: str | Judge | None = "auto",
  measures: Sequence[str] | None = None,
  options: Options | None = None,
  title: str | None = None,
  facts: Mapping[str, str] | None = None,
  command: str = "",
  overwrite: bool = False,
  progress: bool = True,
  devices: Any = None,
) -> Sweep:
  """Sample with each guidance at each scale, measure the samples, and write a table and a report.

  All points have the same noise and the same labels. The program of each guidance is compiled once. If the sweep is
  stopped and started again, it goes on where it stopped. Points that are in the folder from earlier sweeps are shown
  too. If ``num`` is larger than it was, the samples that are there are the first of the larger number.

  Args:
    out: the folder.
    base: what all points share, without guidance and scale.
    guidance: the guidances to compare, as `jaxguide.evaluation.cells` takes them; by default those that suit the
      networks: cfg where the model has a null class, classifier where there is a classifier, else none.
    scales: the guidance scales; by default that of ``base``, or `SCALES`.
    over: what else is swept, such as ``["steps=10,20", "cfg:sigma_hi=2,inf"]``.
    reference: what samples are compared with, as `jaxguide.evaluation.open_reference` takes it; by default the images
      that the model was trained on.
    features: the features, as for `jaxguide.evaluation.evaluate`.
    judge: the judge, as for `jaxguide.evaluation.evaluate`.
    measures: names of `jaxguide.evaluation.MEASURES`; by default all that can be computed.
    options: how figures are computed; by default `Options()`.
    title: the title of the report.
    facts: further facts for the report, by name.
    command: the command that makes the sweep again, for the report.
    overwrite: whether to remove the points of earlier sweeps first.
    progress: whether to show progress bars.
    devices: the devices that draw, a mesh, or the text of one, as for `jaxguide.sample_batch`. Several processes that
      were joined by `jaxguide.distributed.start` sweep together in one folder.

  Returns:
    All points of the folder, as the report shows them.

  Warns:
    UserWarning: if a point has samples that are not finite: it is left out, and the others are drawn. If points have
      figures of more than ``num`` samples: their figures are then those of the first ``num``. If no guidance is named,
      and none suits a model that takes labels.

  Raises:
    ValueError: before any work, for settings, a guidance or a reference that do not suit the networks, or a folder with
      points of another model.
    FileNotFoundError: if there is no model or no reference.
    OSError: if the folder cannot be written, or another process is writing it.
  """
  out = Path(out)
  if out.exists() and not out.is_dir():
    raise NotADirectoryError(f"out must be a folder, and {out} is a file: choose another")
  check_writable(out / "report.html")
  options = options or Options()
  load: Load = functools.cache(models.load)  # type: ignore[assignment]
  if guidance is None:
    guidance = _suitable(base, load)
    if guidance == ["none"] and (scales is not None or base.scale is not None):
      raise ValueError(
        f"{base.model} has no null class, and there is no classifier: no guidance takes a scale, leave out scales "
        "(--scales)"
      )
    if guidance == ["none"]:
      warn_unguided(base.model, load(base.model), stacklevel=2)
  checks.at_least("num", base.num, 2)
  several = isinstance(base.steps, str) and re.fullmatch(r"\d+(,\d+)+", base.steps)
  if several and grid_of(base, load(base.model)).name != "respaced":
    raise ValueError(f"steps must be one number, got {base.steps!r}: sweep several by over (--over steps={base.steps})")
  found = cells(base, guidance, scales, over, SCALES)
  plans = [plan(cell.settings, load) for cell in found]  # A setting that does not suit the networks is refused here.
  chosen = evaluations.chosen_features(features, plans[0].image_shape)
  processes.check_same(
    {
      "out": str(out.absolute()),
      "the points": [dataclasses.asdict(cell.settings) for cell in found],
      "reference": str(reference) if isinstance(reference, str | os.PathLike) else None,
      "features": chosen.name,
      "judge": judge if isinstance(judge, str) else None,
      "measures": measures,
      "options": dataclasses.asdict(options),
    }
  )
  with contextlib.ExitStack() as stack:
    processes.first_does(functools.partial(_begin, out, overwrite, stack))
    points = find_points(out, found, load)
    if points.larger is not None:
      warnings.warn(
        f"{out} has figures of {points.larger} samples, and num is {base.num}: they are now those of the first "
        f"{base.num}; give num {points.larger} again for the others",
        stacklevel=2,
      )
    trained, held_out = _data_of(base, load, reference is None)
    against = _reference(out, trained if reference is None else reference, chosen, plans[0].image_shape, progress)
    fitted = evaluations.judge_of(judge, against, chosen, plans[0].labels is not None, plans[0].class_names)
    measured = Measured(against, chosen, fitted, None if measures is None else list(measures), options)
    for each in plans:
      measured.check(each.image_shape, each.labels, base.num)
    real = None if held_out is None else _real(held_out, measured, base.num)
    failed = draw(out, points.drawn, measured, load, progress, devices)
    processes.wait_for_all("all points are written")
    swept = _gather(out, [*points.shown, *map(plain, points.others)], measured, real, held_out)
    names = ", ".join(points.left_out)
    left_out = {"left out": f"older points whose samples are others today: {names}"} if names else {}
    swept = dataclasses.replace(
      swept,
      title=title or f"Guided samples of {Path(base.model).name}",
      class_names=plans[0].class_names,
      facts={
        **_facts(base, load, against, varied(found)),
        **(facts or {}),
        **failed,
        **left_out,
      },
      command=command,
    )
    processes.first_does(functools.partial(_report, out, swept))
  return swept


def _begin(out: Path, overwrite: bool, stack: contextlib.ExitStack) -> None:
  stack.enter_context(lock(out / ".lock", out))
  if overwrite:
    _clear(out)
  (out / "samples").mkdir(parents=True, exist_ok=True)
  (out / "points").mkdir(exist_ok=True)


def _report(out: Path, swept: Sweep) -> None:
  write_atomically(out / "sweep.csv", tables.csv_text(swept).encode())
  write_sweep_report(out / "report.html", swept)


def check_same(out: PathLike, settings: Settings, fields: Sequence[str]) -> None:
  """Check that a folder has no points, or points with the same values of some fields of their settings.

  Raises:
    ValueError: if a point has another value.
  """
  for path in sorted(Path(out, "points").glob("*.json")):
    content = read_point(path)
    different = [
      f"{name} is {content['settings'].get(name)!r} there, and {getattr(settings, name)!r} here"
      for name in fields
      if content is not None and content["settings"].get(name) != getattr(settings, name)
    ]
    if different:
      raise ValueError(
        f"{out} has samples with other settings ({'; '.join(different)}): choose another folder, or --overwrite them"
      )


def _clear(out: Path) -> None:
  """Remove the points of earlier sweeps, and no other files."""
  for path in (out / "points").glob("*.json"):
    path.unlink()
  for path in (out / "samples").iterdir() if (out / "samples").is_dir() else ():
    if re.fullmatch(r".*_[0-9a-f]{10}\.npz", path.name):
      path.unlink()
    elif re.fullmatch(r".*_[0-9a-f]{10}\.npz\.unfinished", path.name):
      generate.clear(path)


def _suitable(base: Settings, load: Load) -> list[str]:
  """Name the guidances that suit the networks."""
  model = load(base.model)
  names = ["cfg"] if model.null_cond is not None else []
  if base.classifier is not None or models.exists(classifier_folder(base)):
    names.append("classifier")
  return names or ["none"]


def _data_of(base: Settings, load: Load, needed: bool) -> tuple[Any, Any]:
  """Open the data that the model was trained on, and those that were held out; None where they are not known.

  Raises:
    ValueError: if the training data are needed and not known.
  """
  config = load(base.model).config
  try:
    trained = held_out_data.training_data(base.model, config)
  except (ValueError, OSError, ImportError) as error:
    if needed:
      raise ValueError(
        f"the data that {base.model} was trained on are not known ({error}): give a reference (--reference)"
      ) from error
    trained = None
  try:
    held_out = held_out_data.held_out_data(base.model, config)
  except (ValueError, OSError, ImportError):
    held_out = None
  return trained, held_out


def _reference(out: Path, source: Any, features: Features, image_shape: Sequence[int], progress: bool) -> Reference:
  """Open the reference. The features of its images are kept in the folder, and read if they are of the same images."""
  path = out / "reference.npz"
  try:
    kept = read_statistics(path) if path.exists() else None
  except (OSError, ValueError):
    kept = None
  opened = open_reference(source, features, image_shape, progress=progress, kept=kept)
  if opened.dataset is not None and opened.statistics is not kept and processes.is_first():
    write_statistics(path, opened.statistics)
  return opened


def _real(held_out: data.Dataset, measured: Measured, number: int) -> Evaluation | None:
  """Measure as many held-out images as there are samples of a point, or all if they are fewer."""
  images, labels = _examples(held_out, number)
  try:
    return measured(images, labels) if len(images) > 1 else None
  except ValueError:
    return None  # A measure that is asked for of the samples may need what the held-out images do not have.


def _examples(dataset: data.Dataset, number: int) -> tuple[np.ndarray, np.ndarray | None]:
  """Return images and labels of a data set, spread over all."""
  rows = np.random.default_rng(0).permutation(len(dataset))[:number]
  pairs = [dataset.example(int(row), np.random.default_rng(0)) for row in rows]
  labels = None if dataset.num_classes is None else np.array([int(label) for _, label in pairs])
  return np.stack([image for image, _ in pairs]), labels


# --- what the report shows ------------------------------------------------------------------------


def _gather(
  out: Path, cells_of: Sequence[Cell], measured: Measured, real: Evaluation | None, held_out: data.Dataset | None
) -> Sweep:
  """Collect points with their pictures. Those that could not be drawn have no file."""
  read = {cell: read_point(out / "points" / f"{cell.name}.json") for cell in cells_of if samples_of(out, cell).exists()}
  stored = {cell.name: content for cell, content in read.items() if content is not None}
  all_cells = [cell for cell in cells_of if cell.name in stored]
  values = varied(all_cells)
  values["scale"] = [scale_of(cell) for cell in all_cells]
  axis = next((key for key, column in values.items() if len(set(column)) > 1), "scale")
  points = []
  for i, cell in enumerate(all_cells):
    result = as_evaluation(stored[cell.name]["evaluation"])
    images, labels, _ = evaluations.open_images(samples_of(out, cell))
    shown, rate = min(result.n, SHOWN), rate_of(stored, cell.name)
    points.append(
      Point(
        method=cell.method,
        values={key: column[i] for key, column in values.items() if column[i] is not None}
        | _unset(axis, values[axis][i]),
        evaluation=result,
        images=images[:shown],
        labels=None if labels is None else labels[:shown],
        seconds=None if rate is None else result.n / rate,
        path=samples_of(out, cell),
      )
    )
  real_images, real_labels = (None, None) if held_out is None else _examples(held_out, SHOWN)
  if real_images is None and measured.reference.dataset is not None:
    real_images, real_labels = _examples(measured.reference.dataset, SHOWN)
  swept = Sweep("", points, axis, real, real_images, real_labels)
  return dataclasses.replace(swept, **_nearest(swept, measured))


def _unset(axis: str, value: Any) -> dict[str, Any]:
  """Give the value of a point that does not have what the axis shows."""
  return {axis: "unset"} if value is None else {}


def _nearest(swept: Sweep, measured: Measured) -> dict[str, Any]:
  """Find the nearest training images of those samples of the best point that are closest to a training image."""
  dataset, real = measured.reference.dataset, measured.reference.statistics.features
  if dataset is None or real is None or not swept.points:
    return {}
  best, _ = best_point(swept)
  pool = evaluations.outputs_of(best.images, measured.features, 64, False)["pool"]
  number, k = NEIGHBOURS
  distances, rows = metrics.nearest(pool, real, min(k, len(real)))
  closest = np.argsort(distances[:, 0], kind="stable")[:number]
  kept = measured.reference.kept_rows()
  pictures = [
    np.stack([dataset.example(int(kept[row]), np.random.default_rng(0))[0] for row in rows[i]]) for i in closest
  ]
  return {"neighbours": np.stack(pictures), "neighbour_rows": closest}


def _facts(base: Settings, load: Load, reference: Reference, swept: Mapping[str, Any]) -> dict[str, str]:
  """Describe the networks, the data, the sampling and the machine. What is swept is left out."""
  model = load(base.model)
  sizes = sum(leaf.size for leaf in jax.tree.leaves(model.params))
  device = jax.local_devices()[0]
  named = {"solver": base.solver, "steps": f"{base.steps} steps", "seed": f"seed {base.seed}"}
  sampling = [text for name, text in named.items() if name not in swept]
  same = [] if "seed" in swept else ["all points have the same noise and labels"]
  return {
    "denoiser": f"{model.config.network} of {sizes:,} parameters, in {base.model}",
    "reference": f"{reference.name}, {reference.statistics.n or 'an unknown number of'} images",
    **({"sampling": "; ".join([", ".join(sampling), *same] if sampling else same)} if sampling or same else {}),
    "machine": f"{device.device_kind}, {jax.local_device_count()} device(s), jax {jax.__version__}",
  }
