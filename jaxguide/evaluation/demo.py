"""The demo: train on digits, sample with two guidance methods at several scales, measure the samples, and report.

Your own study has the same steps: train (`jaxguide.training`), sample over scales (`jaxguide.sampling`), measure and
report (`jaxguide.evaluation`).
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide import data, evaluation, guidance, sampling, schedules, solvers
from jaxguide._core import keys, records
from jaxguide._core.bars import progress_bar
from jaxguide._core.files import PathLike, check_writable, write_atomically
from jaxguide._core.typing import Denoiser, Guidance
from jaxguide.training import Model, ModelConfig, TrainingConfig, fit

# The networks are for scikit-learn's 8x8 digits. Training takes minutes on two CPU cores.
SHAPE = (8, 8, 1)


def _model(network: str, channels: int) -> ModelConfig:
  fields = {"model_channels": channels, "channel_mult": (1, 2), "num_res_blocks": 1, "num_head_channels": channels}
  return ModelConfig(network, fields, image_shape=SHAPE, num_classes=10)


DENOISER, CLASSIFIER = _model("unet", 16), _model("classifier", 24)
DENOISER_TRAINING = TrainingConfig(steps=1200, p_uncond=0.15)
CLASSIFIER_TRAINING = TrainingConfig(steps=500, weight_decay=0.3, noise_mean=0.0, noise_std=1.5)

NUM = 500
STEPS = 16
BATCH = 100
SCALES = {"cfg": (0.0, 1.0, 2.0, 4.0, 8.0), "classifier": (0.0, 1.0, 2.0, 5.0, 10.0)}
# The grey levels of the digits are 1/8 apart. Noise below SIGMA_MIN is too small to be visible.
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0


class Result(NamedTuple):
  """The result of the demo.

  Args:
    rows: the measures of each method at each scale.
    real: the measures of the real test split.
    report: path of the report.
  """

  rows: list[evaluation.Row]
  real: evaluation.Measures
  report: Path


def train(out: PathLike, *, retrain: bool = False, progress: bool = True) -> tuple[Model, Model]:
  """Train the denoiser and the classifier on digits, or load them if they were trained before.

  Args:
    out: folder of the demo; the models are in ``out/denoiser`` and ``out/classifier``.
    retrain: whether to train again, even if the folder has trained models.
    progress: whether to show progress bars.
  """
  images = data.load("digits", "train")
  denoiser = fit(DENOISER, DENOISER_TRAINING, images, Path(out, "denoiser"), retrain=retrain, progress=progress)
  classifier = fit(CLASSIFIER, CLASSIFIER_TRAINING, images, Path(out, "classifier"), retrain=retrain, progress=progress)
  return denoiser, classifier


def guidances(denoiser: Model, classifier: Model) -> dict[str, Callable[[float], Guidance]]:
  """Return the two methods that the demo compares, each as a function ``scale -> Guidance``.

  The classifier guides the unconditional model, so both methods are the same at scale 0.
  """
  null = denoiser.null_cond
  return {
    "cfg": lambda scale: guidance.chain(guidance.classifier_free(null, scale), guidance.clip_x0()),
    "classifier": lambda scale: guidance.chain(
      guidance.unconditional(null), guidance.classifier(classifier.log_prob, scale), guidance.clip_x0()
    ),
  }


def run(
  out: PathLike = "runs/demo", *, retrain: bool = False, seed: int = 0, overwrite: bool = False, progress: bool = True
) -> Result:
  """Run the whole demo.

  Args:
    out: folder for the models, ``sweep.csv``, ``samples``, ``fidelity.png`` and ``report.html``.
    retrain: whether to train again, even if ``out`` has trained models.
    seed: seed of the samples, at least 0.
    overwrite: whether to replace samples and a report of another seed. ``retrain`` replaces them too.
    progress: whether to show progress bars.

  Raises:
    OSError: if ``out`` cannot be written. This is checked before any work.
    ValueError: if ``out`` has models of another configuration or damaged ones, or samples of another seed, or if
      ``seed`` is below 0.
    FloatingPointError: if a loss or a sample is not finite.
  """
  out = Path(out)
  check_writable(out / "report.html")
  record = records.record(samples={"seed": keys.check_seed("seed", seed), "num": NUM, "steps": STEPS, "scales": SCALES})
  if not (overwrite or retrain):
    _check_same_samples(out, record)

  start = time.perf_counter()
  denoiser, classifier = train(out, retrain=retrain, progress=progress)
  training_seconds = time.perf_counter() - start

  train_split, test_split = data.load("digits", "train"), data.load("digits", "test")
  judge = evaluation.Judge.fit(train_split.images, train_split.labels)
  real = evaluation.measure(test_split.images, test_split.labels, judge, train_split.images)

  write_atomically(out / "demo.json", json.dumps(record, indent=2).encode())
  methods = guidances(denoiser, classifier)
  labels = np.resize(np.unique(train_split.labels), NUM)
  rows, grids = [], {}
  for method, scale, images, seconds in _sweep(denoiser.denoiser, methods, labels, seed, progress):
    grids[method, scale] = _save(out / "samples", method, scale, images, labels)
    rows.append(
      evaluation.evaluate(
        method, scale, images, labels, seconds=seconds, judge=judge, reference_images=train_split.images
      )
    )

  evaluation.write_csv(out / "sweep.csv", rows)
  plot = evaluation.fidelity_plot(rows, real)
  write_atomically(out / "fidelity.png", plot)
  facts = _facts(denoiser, classifier, training_seconds, seed)
  report = out / "report.html"
  evaluation.write_report(report, title="Guided digits", rows=rows, grids=grids, plot=plot, real=real, facts=facts)
  return Result(rows, real, report)


def _check_same_samples(out: Path, record: Mapping[str, Any]) -> None:
  """Check that ``out`` has no samples, or samples of the same record.

  Raises:
    ValueError: if it has other samples.
  """
  if (out / "demo.json").exists():
    differences = records.differences(records.read(out / "demo.json"), record)
    if differences:
      raise ValueError(
        f"{out} has other samples of the demo ({'; '.join(differences)}): choose another folder, or --overwrite them"
      )


def _sweep(
  denoiser: Denoiser,
  methods: Mapping[str, Callable[[float], Guidance]],
  labels: np.ndarray,
  seed: int,
  progress: bool,
) -> Iterator[tuple[str, float, np.ndarray, float]]:
  """Sample with each method at each of its scales, all with the same noise and labels.

  Yields:
    The method, the scale, the uint8 images, and the seconds that sampling took without compilation.
  """
  draw = functools.partial(
    sampling.sample_batch,
    key=keys.seed_key(seed),
    shape=SHAPE,
    sigmas=schedules.karras(STEPS, SIGMA_MIN, SIGMA_MAX),
    solver=solvers.DPMpp2M(),
    batch_size=BATCH,
  )
  total = len(labels) * sum(len(SCALES[method]) for method in methods)
  with progress_bar(total, title="sampling", unit="sample", show=progress) as bar:
    for method, guide in methods.items():
      # Compile before the time is taken. The program of one micro-batch serves all scales.
      draw(guide(0.0)(denoiser), cond=labels[:BATCH])
      for scale in SCALES[method]:
        bar.set_postfix(method=method, scale=scale)
        start = time.perf_counter()
        x = draw(guide(scale)(denoiser), cond=labels, progress=bar.update)
        yield method, scale, data.to_uint8(x), time.perf_counter() - start


def _save(folder: Path, method: str, scale: float, images: np.ndarray, labels: np.ndarray) -> bytes:
  """Write samples to an npz file and a PNG grid, and return the bytes of the grid."""
  name = f"{method}_{scale:g}"
  picture = folder / f"{name}.png"
  data.save_npz(folder / f"{name}.npz", images, labels)
  data.save_png(picture, images, labels, title=f"{evaluation.TITLES[method]}, scale {scale:g}")
  return picture.read_bytes()


def _facts(denoiser: Model, classifier: Model, training_seconds: float, seed: int) -> dict[str, str]:
  """Describe the data, the networks, the sampling and the machine, for the report."""
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(model.params)) for model in (denoiser, classifier)]
  train_count, test_count = (len(data.load("digits", split)) for split in ("train", "test"))
  return {
    "data": f"scikit-learn's 8x8 digits, {train_count} for training and {test_count} for testing",
    "denoiser": f"UNet of {sizes[0]:,} parameters, {DENOISER_TRAINING.steps} steps of batch size "
    f"{DENOISER_TRAINING.batch_size}, label dropped with probability {DENOISER_TRAINING.p_uncond:g}",
    "classifier": f"noisy classifier of {sizes[1]:,} parameters, {CLASSIFIER_TRAINING.steps} steps of batch size "
    f"{CLASSIFIER_TRAINING.batch_size}",
    "training": f"{training_seconds:.0f} s in this run; models of an earlier run are reused",
    "sampling": f"DPM-Solver++(2M), {STEPS} steps from sigma {SIGMA_MAX:g} to {SIGMA_MIN:g}, seed {seed}; "
    "all rows have the same noise and labels",
    "machine": f"{jax.default_backend()}, {os.cpu_count()} cores, jax {jax.__version__}, "
    f"Python {platform.python_version()}",
  }
