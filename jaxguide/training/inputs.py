"""What a training begins with: whether data, network and settings fit, and are those of an earlier run."""

import io
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide import data as datasets
from jaxguide._core.files import write_atomically
from jaxguide._core.typing import PyTree
from jaxguide.data.config import holds_floats
from jaxguide.models import arrays, folders
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import Model, check
from jaxguide.models.networks import CLASSIFIER
from jaxguide.training import snapshots
from jaxguide.training.config import TrainingConfig
from jaxguide.training.objectives import objective
from jaxguide.training.run_config import RunConfig

NEEDED = ("name", "image_shape", "num_classes", "fingerprint", "example")

STAMPS = "data.npy"
"""The file of a run with a number for each example, which tells whether the data have only grown since."""


def check_fits(name: str, data: Any, model: ModelConfig) -> None:
  """Check that a dataset has the images and labels that a network needs.

  Raises:
    TypeError: if it is no dataset.
    ValueError: if its images or labels do not fit.
  """
  if not all(hasattr(data, attribute) for attribute in NEEDED):
    raise TypeError(
      f"{name} must be a dataset, got {type(data).__name__}: make one from arrays with jaxguide.data.Images(images, "
      "labels, num_classes, name), or open files with jaxguide.data.open_data"
    )
  if tuple(data.image_shape) != tuple(model.image_shape) or model.num_classes not in (data.num_classes, None):
    raise ValueError(
      f"the network is for images of shape {model.image_shape} in {model.num_classes} classes, but {data.name} has "
      f"{tuple(data.image_shape)} in {data.num_classes}"
    )
  floats = holds_floats(data)
  if model.encoder == ("pixels" if floats else "latents"):
    held, fitting = ("floats", "latents") if floats else ("pixels", "pixels")
    raise ValueError(
      f"{data.name} holds {held}, and the network's encoder is {model.encoder}: give encoder {fitting!r} "
      f"(--set model.encoder={fitting})"
    )
  names = getattr(data, "class_names", None)
  if model.class_names is not None and names is not None and tuple(names) != tuple(model.class_names):
    raise ValueError(
      f"the network's classes are {', '.join(model.class_names)}, but {data.name} has {', '.join(names)}"
    )
  size = getattr(model, "label_size", None)
  shape = getattr(data, "label_shape", None)
  if size is not None and shape != (size,):
    raise ValueError(f"the network's labels are vectors of length {size}, but {data.name} has labels of shape {shape}")


def has_grown(folder: Path, data: Any) -> bool:
  """Whether a dataset is that of an earlier run with some files more, so that the run may be continued with it."""
  try:
    before = np.load(folder / STAMPS)
  except (OSError, ValueError, EOFError):
    return False
  return bool(datasets.grown(before, data))


def write_stamps(folder: Path, data: Any) -> None:
  """Keep a number for each example of the data of a run, if the dataset has them."""
  stamps = getattr(data, "stamps", None)
  if stamps is not None:
    content = io.BytesIO()
    np.save(content, stamps)
    write_atomically(folder / STAMPS, content.getvalue())


def check_arguments(
  model: ModelConfig, training: TrainingConfig, data: Any, run: RunConfig, held_out: Any, callback: Any
) -> None:
  """Check, before anything is written, that network, training and data fit each other."""
  for name, value, cls in (
    ("model", model, ModelConfig),
    ("training", training, TrainingConfig),
    ("run", run, RunConfig),
  ):
    if not isinstance(value, cls):
      raise TypeError(f"{name} must be a {cls.__name__}, got {type(value).__name__}")
  if callback is not None and not callable(callback):
    raise TypeError(f"callback must be a function of step, state and metrics, got {type(callback).__name__}")
  check_fits("data", data, model)
  if held_out is not None:
    if model.role is not CLASSIFIER:
      raise ValueError(f"held_out is for a classifier, and the network is a {model.network}: leave it out")
    check_fits("held_out", held_out, model)
  if run.patience is not None and held_out is None:
    raise ValueError("patience counts evaluations on held-out data: give held_out, or leave it out")
  if run.snapshot_every and not snapshots.widths(training.means):
    raise ValueError(
      "snapshot_every keeps power-function means: give two of them, such as ema = "
      '["power:std=0.05", "power:std=0.1"], or leave it out'
    )
  folders.shapes(model)
  objective(model, training)


def initial_params(model: ModelConfig, init: Any) -> PyTree:
  """Return the parameters that a training begins with, on the host; None for random ones.

  Raises:
    ValueError: if they do not fit the network.
  """
  if init is None:
    return None
  params = init.params if isinstance(init, Model) else init
  check(Model(model, params))
  return jax.device_get({"params": params["params"]})


def checksum(params: PyTree) -> str:
  """Return a checksum of the parameters that a training begins with."""
  return f"{zlib.crc32(repr(arrays.checksums(params)).encode()):08x}"
