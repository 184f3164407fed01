"""The demos: train on a data set, sample with two guidance methods at several scales, measure the samples, and report.

``digits`` takes minutes, ``animals`` half an hour. Your own study has the same steps: train (`jaxguide.training`), then
sweep over scales (`jaxguide.evaluation.sweep`).
"""

import dataclasses
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxguide import data
from jaxguide._core import checks, keys
from jaxguide._core.files import PathLike, check_writable
from jaxguide.evaluation.results import Sweep
from jaxguide.evaluation.sweeps import check_same, sweep
from jaxguide.generate import Settings
from jaxguide.training import Model, ModelConfig, TrainingConfig, fit


class Demo(NamedTuple):
  """What a demo trains, samples and measures.

  Args:
    title: the title of its report.
    data: the name of the data set, for `jaxguide.data.load`, with the splits ``train`` and ``test``.
    denoiser: the denoiser's network.
    classifier: the classifier's network.
    denoiser_training: its training.
    classifier_training: its training.
    scales: the guidance scales.
    num: the number of samples of each point.
    steps: the steps of the solver.
    batch_size: the number of samples drawn at a time.
    sigmas: the least and the greatest noise level of the grid.
    features: the features of the figures.
  """

  title: str
  data: str
  denoiser: ModelConfig
  classifier: ModelConfig
  denoiser_training: TrainingConfig
  classifier_training: TrainingConfig
  scales: Sequence[float]
  num: int
  steps: int
  batch_size: int
  sigmas: tuple[float, float]
  features: str


def _network(network: str, channels: int, mult: tuple[int, ...], shape: tuple[int, ...], **fields: Any) -> ModelConfig:
  own = {"model_channels": channels, "channel_mult": mult, "num_res_blocks": 1, "num_head_channels": channels}
  return ModelConfig(network, {**own, **fields}, image_shape=shape, num_classes=10)


# Noise below 0.01 is too small to be visible.
DIGITS = Demo(
  title="Guided digits",
  data="digits",
  denoiser=_network("unet", 16, (1, 2), (8, 8, 1)),
  classifier=_network("classifier", 24, (1, 2), (8, 8, 1)),
  denoiser_training=TrainingConfig(steps=1200, p_uncond=0.15),
  classifier_training=TrainingConfig(steps=500, weight_decay=0.3, noise_mean=0.0, noise_std=1.5),
  scales=(0.0, 1.0, 2.0, 4.0, 8.0),
  num=500,
  steps=16,
  batch_size=100,
  sigmas=(0.01, 80.0),
  features="pixels",
)
ANIMALS = Demo(
  title="Guided animals",
  data="animals",
  denoiser=_network("unet", 32, (1, 2, 2), (28, 28, 1), attention_resolutions=(4,)),
  classifier=_network("classifier", 32, (1, 2, 3), (28, 28, 1), attention_resolutions=(4,), dropout=0.1),
  denoiser_training=TrainingConfig(steps=1600, batch_size=32, learning_rate=1e-3, p_uncond=0.15),
  classifier_training=TrainingConfig(steps=500, batch_size=32, weight_decay=0.2, noise_mean=0.0, noise_std=1.5),
  scales=(0.0, 1.0, 2.0, 4.0, 8.0),
  num=200,
  steps=20,
  batch_size=100,
  sigmas=(0.01, 80.0),
  features="pixels",
)

DEMOS = {"digits": DIGITS, "animals": ANIMALS}


class Result(NamedTuple):
  """The result of a demo.

  Args:
    sweep: the figures of each method at each scale, and of real images that were held out.
    report: path of the report.
  """

  sweep: Sweep
  report: Path


def train(out: PathLike, name: str = "digits", *, retrain: bool = False, progress: bool = True) -> tuple[Model, Model]:
  """Train the denoiser and the classifier of a demo, or load them if they were trained before.

  Args:
    out: folder of the demo; the models are in ``out/denoiser`` and ``out/classifier``.
    name: the demo, one of `DEMOS`.
    retrain: whether to train again, even if the folder has trained models.
    progress: whether to show progress bars.
  """
  demo = checks.lookup("demo", name, DEMOS)
  images = data.load(demo.data, "train")
  trained = [
    fit(
      dataclasses.replace(config, class_names=images.class_names),
      training,
      images,
      Path(out, folder),
      retrain=retrain,
      progress=progress,
    )
    for folder, config, training in (
      ("denoiser", demo.denoiser, demo.denoiser_training),
      ("classifier", demo.classifier, demo.classifier_training),
    )
  ]
  return trained[0], trained[1]


def run(
  out: PathLike | None = None,
  name: str = "digits",
  *,
  retrain: bool = False,
  seed: int = 0,
  overwrite: bool = False,
  progress: bool = True,
) -> Result:
  """Run a whole demo. The classifier guides the unconditional model, so both methods are the same at scale 0.

  Args:
    out: folder for the models, ``sweep.csv``, ``samples`` and ``report.html``; by default ``runs/demo`` for digits and
      ``runs/NAME`` for others.
    name: the demo, one of `DEMOS`.
    retrain: whether to train again, even if ``out`` has trained models.
    seed: seed of the samples, at least 0.
    overwrite: whether to replace samples and a report of another seed. ``retrain`` replaces them too.
    progress: whether to show progress bars.

  Raises:
    OSError: if ``out`` cannot be written. This is checked before any work.
    ValueError: if ``out`` has models of another configuration or damaged ones, or samples of another seed, or if
      ``seed`` is below 0, or there is no such demo.
    FloatingPointError: if a loss or a sample is not finite.
  """
  demo = checks.lookup("demo", name, DEMOS)
  out = Path(out or folder_of(name))
  check_writable(out / "report.html")
  low, high = demo.sigmas
  settings = Settings(
    model=out / "denoiser",
    classifier=out / "classifier",
    num=demo.num,
    solver="dpmpp-2m",
    steps=demo.steps,
    grid=f"karras:sigma_min={low:g},sigma_max={high:g}",
    seed=keys.check_seed("seed", seed),
    batch_size=demo.batch_size,
  )
  if not (overwrite or retrain):
    check_same(out, settings, ("seed",))
  start = time.perf_counter()
  denoiser, classifier = train(out, name, retrain=retrain, progress=progress)
  seconds = time.perf_counter() - start
  found = sweep(
    out,
    settings,
    guidance=["cfg", "classifier"],
    scales=demo.scales,
    features=demo.features,
    title=demo.title,
    facts=_facts(demo, denoiser, classifier, seconds),
    command=f"jaxguide demo --data {name} --out {out}" + (f" --seed {seed}" if seed else ""),
    overwrite=overwrite or retrain,
    progress=progress,
  )
  return Result(found, out / "report.html")


def folder_of(name: str) -> Path:
  """Return the folder of a demo by default.

  >>> folder_of("digits").as_posix(), folder_of("animals").as_posix()
  ('runs/demo', 'runs/animals')
  """
  return Path("runs", "demo" if name == "digits" else name)


def _facts(demo: Demo, denoiser: Model, classifier: Model, seconds: float) -> dict[str, str]:
  """Describe the data, the networks, the training and the machine, for the report."""
  sizes = [sum(leaf.size for leaf in jax.tree.leaves(model.params)) for model in (denoiser, classifier)]
  counts = [len(data.load(demo.data, split)) for split in ("train", "test")]
  of_denoiser, of_classifier = demo.denoiser_training, demo.classifier_training
  return {
    "data": f"{demo.data}, {counts[0]} images for training and {counts[1]} held out",
    "denoiser": f"UNet of {sizes[0]:,} parameters, {of_denoiser.steps} steps of batch size {of_denoiser.batch_size}, "
    f"label dropped with probability {of_denoiser.p_uncond:g}",
    "classifier": f"noisy classifier of {sizes[1]:,} parameters, {of_classifier.steps} steps of batch size "
    f"{of_classifier.batch_size}",
    "training": f"{seconds:.0f} s in this run; models of an earlier run are reused",
    "machine": f"{jax.default_backend()}, {os.cpu_count()} cores, jax {jax.__version__}, "
    f"Python {platform.python_version()}",
  }
