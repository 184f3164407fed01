"""Pictures of samples during a training: the same noise each time, the newest running mean, several guidance scales."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide import data, guidance, sampling, schedules, solvers
from jaxguide._core import keys
from jaxguide.distributed import processes
from jaxguide.models.model import Model
from jaxguide.models.networks import DENOISER
from jaxguide.training.run_config import RunConfig

LARGEST_ROWS = 20
"""The largest number of classes in a picture."""

WITHOUT_CLASSES = 16
"""A model without classes draws this many times as many samples as one with classes draws of each."""


def can_draw(model: Any) -> bool:
  """Whether pictures can be drawn of a model of this configuration: of grey or RGB pixels, by class alone."""
  return (
    model.role is DENOISER
    and model.low_res_shape is None
    and model.label_size is None
    and model.encoder != "latents"
    and model.image_shape[-1] in (1, 3)
  )


def draw(
  path: Path, model: Model, run: RunConfig, seed: int, step: int, batch_size: int, devices: Any = None
) -> np.ndarray | None:
  """Sample from a model, and write a picture with a row for each class.

  All scales share one compiled program, and all pictures of a training too. All processes draw, and the first writes.

  Args:
    path: the PNG file.
    model: the model.
    run: which samples to draw.
    seed: the seed of the samples.
    step: number of completed steps, for the title.
    batch_size: the largest number of samples at a time, such as that of the training's examples.
    devices: the devices, as for `jaxguide.sample_batch`.

  Returns:
    The picture, uint8 of shape (height, width, channels), in the first process; None in others.
  """
  config, null = model.config, model.null_cond
  scales = run.sample_scales if null is not None else (None,)
  labels = _labels(model, run)
  schedule = config.noise_schedule
  if isinstance(schedule, schedules.Table):
    sigmas = schedules.respaced(schedule, min(run.sample_steps, config.diffusion_steps or run.sample_steps))
  else:
    sigmas = schedules.karras(run.sample_steps)
  drawn = []
  for scale in scales:
    guides = [] if scale is None else [guidance.classifier_free(null, float(scale))]
    guides += [] if config.data.bound is None else [guidance.clip_x0(config.data.bound)]
    x = sampling.sample_batch(
      guidance.chain(*guides)(model.denoiser),
      keys.seed_key(seed),
      labels,
      num=WITHOUT_CLASSES * run.samples_per_class if labels is None else len(labels),
      shape=config.image_shape,
      sigmas=sigmas,
      solver=solvers.DPMpp2M(),
      batch_size=batch_size,
      devices=devices,
    )
    drawn.append(config.data.decode(x))
  if not processes.is_first():
    return None
  title = f"step {step:,}"
  if labels is None:
    data.save_png(path, drawn[0], columns=math.ceil(math.sqrt(len(drawn[0]))), title=title)
  else:
    if scales[0] is not None:
      title += f", guidance scale {' | '.join(f'{scale:g}' for scale in scales)} (left to right)"
    # All samples of a class are one row: those of the first scale, a gap, then those of the next.
    classes = np.unique(labels)
    gap = np.full((len(classes), *drawn[0].shape[1:]), 255, drawn[0].dtype)
    parts = [part for images in drawn for part in ((gap, classes), (images, labels))][1:]
    images, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    columns = len(scales) * (run.samples_per_class + 1) - 1
    data.save_png(path, images, rows, columns=columns, title=title, names=config.class_names)
  return _pixels(path)


def _labels(model: Model, run: RunConfig) -> np.ndarray | None:
  if model.config.num_classes is None:
    return None
  return np.arange(min(model.config.num_classes, LARGEST_ROWS), dtype=np.int32).repeat(run.samples_per_class)


def _pixels(path: Path) -> np.ndarray:
  from PIL import Image

  with Image.open(path) as picture:
    return np.asarray(picture.convert("RGB"))


def newest(folder: Path, number: int) -> list[Path]:
  """Return the newest pictures of a run, the newest first."""
  pictures = sorted((path for path in folder.glob("*.png") if path.stem.isdigit()), key=lambda path: int(path.stem))
  return pictures[::-1][:number]
