"""The data of a training: whether they fit the network, and whether they are those of an earlier run."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide import data as datasets
from jaxguide._core.files import write_atomically
from jaxguide.models.config import ModelConfig

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
