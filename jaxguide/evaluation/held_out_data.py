"""The data that a model was trained on, and those that were held out, found by the folder of its training."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from jaxguide import data as datasets
from jaxguide._core import records
from jaxguide._core.files import PathLike
from jaxguide.data.sources import NAMED
from jaxguide.models import pretrained
from jaxguide.models.config import ModelConfig
from jaxguide.models.networks import CLASSIFIER

SHARE = 0.1
"""The share that ``jaxguide train`` holds out for a classifier, unless the configuration has another."""


def held_out_data(folder: PathLike, model: ModelConfig, source: str | None = None) -> Any:
  """Open the data that a model was not trained on.

  Args:
    folder: the folder of the model, or of its training, or the name of a model that comes with the package. The
      folder's ``config.toml`` describes the data of the training and the share that was held out. If nothing was held
      out of a data set with splits, its test split is opened. Without the file, the record of the training names a data
      set, whose test split is opened.
    model: the configuration of the model.
    source: other data, as `jaxguide.data.DataConfig` names them; of a data set with splits the test split. If it is the
      source of the training, only the part that was held out is opened.

  Raises:
    ValueError: if nothing says what the data are, or the training held nothing out.
    FileNotFoundError: if the data are not where they were.
  """
  folder = Path(folder)
  trained_on = _configured(folder)
  if trained_on is not None and (source is None or _is_same(source, str(trained_on.source))):
    share = _share(trained_on, model)
    if not share and is_named(str(trained_on.source)) and trained_on.split == "train":
      return datasets.open_data(dataclasses.replace(_plain(trained_on), split="test"))
    if not share:
      raise ValueError(f"the training of {folder} held no data out: give other data (--data)")
    return datasets.split(datasets.open_data(_plain(trained_on)), share)[1]
  if source is None:
    try:
      record = pretrained.training(folder) or records.read(folder / "training.json")
      return datasets.load(str(record["data"]["name"]), "test")
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{folder} does not say what held-out data there are ({error}): give data (--data)") from None
  height, width, channels = model.image_shape
  named = is_named(source)
  config = datasets.DataConfig(
    source,
    split="test" if named else "train",
    size=height if height == width and not named else None,
    channels=channels if channels in (1, 3) and not named else None,
  )
  return datasets.open_data(config)


def training_data(folder: PathLike, model: ModelConfig) -> Any:
  """Open the data that a model was trained on, without mirroring and random crops, and without what was held out.

  Args:
    folder: the folder of the model, or of its training, as for `held_out_data`.
    model: the configuration of the model.

  Raises:
    ValueError: if nothing says what the data are, or they are now of another shape.
    FileNotFoundError: if the data are not where they were.
  """
  folder = Path(folder)
  trained_on = _configured(folder)
  if trained_on is not None:
    share = _share(trained_on, model)
    opened = datasets.open_data(_plain(trained_on))
    opened = datasets.split(opened, share)[0] if share else opened
  else:
    try:
      record = pretrained.training(folder) or records.read(folder / "training.json")
      opened = datasets.load(str(record["data"]["name"]), "train")
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{folder} does not say what it was trained on ({error})") from None
  if tuple(opened.image_shape) != tuple(model.image_shape):
    raise ValueError(f"the data of the training have shape {tuple(opened.image_shape)}, the model {model.image_shape}")
  return opened


def _share(trained_on: Any, model: ModelConfig) -> float:
  """Return the share that a training held out."""
  if trained_on.held_out is not None:
    return float(trained_on.held_out)
  return SHARE if model.role is CLASSIFIER else 0.0


def _plain(trained_on: Any) -> Any:
  """Return the configuration of data without mirroring or random crops: these are for the training."""
  plain = {"flip": False, "crop": "center" if trained_on.crop == "random" else trained_on.crop}
  return dataclasses.replace(trained_on, **plain)


def is_named(source: str) -> bool:
  """Return whether a source is a data set with a name and splits, such as ``digits`` or ``tfds:NAME``."""
  return source in NAMED or (":" in source and not Path(source).exists())


def _is_same(source: str, other: str) -> bool:
  """Return whether two sources of data are the same, by name or by path."""
  return source == other or (Path(source).exists() and Path(source).resolve() == Path(other).resolve())


def _configured(folder: Path) -> Any:
  """Return the `DataConfig` of a training; None if the folder has none."""
  for path in (folder / "config.toml", folder.parent / "config.toml"):
    if not path.exists() or (path.parent != folder and folder.name != "model"):
      continue
    try:
      section = tomllib.loads(path.read_text("utf-8")).get("data")
      return None if section is None else datasets.DataConfig(**section)
    except (TypeError, ValueError, AttributeError) as error:
      raise ValueError(f"the section [data] of {path} does not describe data ({error}): give data (--data)") from None
  return None
