"""The demo: it trains on digits, samples with both kinds of guidance at several scales, measures, and reports.

A study of your own has the same steps: train (`jaxguide.training`), sample over scales, measure and report
(`jaxguide.evaluation`).
"""

import functools
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide import data, evaluation, guidance, sampling, schedules, solvers, training
from jaxguide._core import keys, records
from jaxguide._core.files import PathLike, check_writable, write_atomically
from jaxguide._core.typing import Denoiser, Guidance
from jaxguide.evaluation import digits

NUM = 500
STEPS = 16
BATCH = 100
SCALES = {"cfg": (0.0, 1.0, 2.0, 4.0, 8.0), "classifier": (0.0, 1.0, 2.0, 5.0, 10.0)}
# The grey levels of the digits are 1/8 apart. Finer noise than this cannot be seen.
SIGMA_MIN, SIGMA_MAX = 0.01, 80.0


class Result(NamedTuple):
  """The result of the demo.

  Args:
    rows: the measures of each method at each scale.
    real: the measures of the real test split.
    report: the report's file.
  """

  rows: list[evaluation.Row]
  real: evaluation.Measures
  report: Path


def train(out: PathLike, *, retrain: bool = False, progress: bool = True) -> tuple[training.Model, training.Model]:
  """Train the denoiser and the classifier on digits, or load them if they were trained before.

  Args:
    out: the models are ``out/denoiser`` and ``out/classifier``.
    retrain: start over.
    progress: whether to show progress bars.
  """
  train_split = data.load("digits", "train")
  denoiser, classifier = (
    training.fit(model, config, train_split, Path(out, name), retrain=retrain, progress=progress)
    for name, model, config in (
      ("denoiser", digits.DENOISER, digits.DENOISER_TRAINING),
      ("classifier", digits.CLASSIFIER, digits.CLASSIFIER_TRAINING),
    )
  )
  return denoiser, classifier


def guidances(denoiser: training.Model, classifier: training.Model) -> dict[str, Callable[[float], Guidance]]:
  """Give the two methods that the demo compares, each as ``scale -> Guidance``.

  The classifier guides the unconditional model. So both methods are the same at scale 0.
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
    retrain: train anew, even where ``out`` holds trained models.
    seed: of the samples.
    overwrite: whether samples and a report of another seed may be replaced; ``retrain`` replaces them as well.
    progress: whether to show progress bars.

  Raises:
    OSError: if ``out`` cannot be written, before any work.
    ValueError: if ``out`` holds models that were configured otherwise, or torn ones, or a report of other samples; or
      the seed is below 0.
    FloatingPointError: if a loss or a sample is not finite.
  """
  from tqdm.auto import tqdm

  out = Path(out)
  check_writable(out / "report.html")
  record = records.record(samples={"seed": keys.check_seed("seed", seed), "num": NUM, "steps": STEPS, "scales": SCALES})
  if (out / "demo.json").exists() and not (overwrite or retrain):
    different = records.differences(records.read(out / "demo.json"), record)
    if different:
      raise ValueError(
        f"{out} holds a demo of other samples ({'; '.join(different)}): choose another folder, or --overwrite it"
      )
  began = time.perf_counter()
  denoiser, classifier = train(out, retrain=retrain, progress=progress)
  trained = time.perf_counter() - began

  train_split, test_split = data.load("digits", "train"), data.load("digits", "test")
  judge = evaluation.Judge.fit(train_split.images, train_split.labels)
  real = evaluation.measure(test_split.images, test_split.labels, judge, train_split.images)
  labels = np.arange(NUM, dtype=np.int32) % train_split.num_classes

  write_atomically(out / "demo.json", json.dumps(record, indent=2).encode())
  rows, grids = [], {}
  methods = guidances(denoiser, classifier)
  with tqdm(total=NUM * sum(map(len, SCALES.values())), desc="sampling", unit="sample", disable=not progress) as bar:
    for method, scale, images, seconds in _sweep(denoiser.denoiser, methods, labels, seed, bar):
      rows.append(
        evaluation.evaluate(
          method, scale, images, labels, seconds=seconds, judge=judge, reference_images=train_split.images
        )
      )
      stem = out / "samples" / f"{method}_{scale:g}"
      data.save_npz(stem.with_name(stem.name + ".npz"), images, labels)
      picture = stem.with_name(stem.name + ".png")
      data.save_png(picture, images, labels, title=f"{evaluation.TITLES[method]}, scale {scale:g}")
      grids[method, scale] = picture.read_bytes()

  evaluation.write_csv(out / "sweep.csv", rows)
  plot = evaluation.fidelity_plot(rows, real)
  write_atomically(out / "fidelity.png", plot)
  size = [sum(leaf.size for leaf in jax.tree.leaves(model.params)) for model in (denoiser, classifier)]
  facts = {
    "data": f"scikit-learn's 8x8 digits, {len(train_split)} to train on and {len(test_split)} to test with",
    "denoiser": f"UNet of {size[0]:,} parameters, {digits.DENOISER_TRAINING.steps} steps of "
    f"{digits.DENOISER_TRAINING.batch_size}, label dropped with probability {digits.DENOISER_TRAINING.p_uncond:g}",
    "classifier": f"noisy classifier of {size[1]:,} parameters, {digits.CLASSIFIER_TRAINING.steps} steps of "
    f"{digits.CLASSIFIER_TRAINING.batch_size}",
    "training": f"{trained:.0f} s in this run; what an earlier run trained is reused",
    "sampling": f"DPM-Solver++(2M), {STEPS} steps from sigma {SIGMA_MAX:g} to {SIGMA_MIN:g}, seed {seed}; "
    "the same noise and labels for every row",
    "machine": f"{jax.default_backend()}, {os.cpu_count()} cores, jax {jax.__version__}, "
    f"Python {platform.python_version()}",
  }
  report = out / "report.html"
  evaluation.write_report(report, title="Guided digits", rows=rows, grids=grids, plot=plot, real=real, facts=facts)
  return Result(rows, real, report)


def _sweep(
  denoiser: Denoiser,
  methods: dict[str, Callable[[float], Guidance]],
  labels: np.ndarray,
  seed: int,
  bar: Any,
) -> Iterator[tuple[str, float, np.ndarray, float]]:
  """Sample, and give (method, scale, images, seconds) for each scale of each method."""
  key = keys.seed_key(seed)
  draw = functools.partial(
    sampling.sample_batch,
    key=key,
    shape=digits.SHAPE,
    sigmas=schedules.karras(STEPS, SIGMA_MIN, SIGMA_MAX),
    solver=solvers.DPMpp2M(),
    batch_size=BATCH,
  )
  for method, guide in methods.items():
    # Compile before the clock starts. One micro-batch compiles the program of every scale.
    draw(guide(0.0)(denoiser), cond=labels[:BATCH])
    for scale in SCALES[method]:
      bar.set_postfix(method=method, scale=scale)
      began = time.perf_counter()
      x = draw(guide(scale)(denoiser), cond=labels, progress=bar.update)
      yield method, scale, data.to_uint8(x), time.perf_counter() - began
