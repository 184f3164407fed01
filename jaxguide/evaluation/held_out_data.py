"""The data that a model was not trained on, found by the folder of its training."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from jaxguide import data as datasets
from jaxguide._core import records
from jaxguide._core.files import PathLike
from jaxguide.models.config import ModelConfig

SHARE = 0.1
"""The share that ``jaxguide train`` holds out for a classifier, unless the configuration has another."""


def held_out_data(folder: PathLike, model: ModelConfig, source: str | None = None) -> Any:
  """Open the data that a model was not trained on.

  Args:
    folder: the folder of the model, or of its training. Its ``config.toml`` describes the data of the training and the
      share that was held out. Without one, its ``training.json`` names a data set, whose test split is opened.
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
    share = SHARE if trained_on.held_out is None else trained_on.held_out
    if not share:
      raise ValueError(f"the training of {folder} held no data out: give other data (--data)")
    # Without mirroring or random crops: these are for the training.
    plain = {"flip": False, "crop": "center" if trained_on.crop == "random" else trained_on.crop}
    return datasets.split(datasets.open_data(dataclasses.replace(trained_on, **plain)), share)[1]
  if source is None:
    try:
      return datasets.load(str(records.read(folder / "training.json")["data"]["name"]), "test")
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise ValueError(f"{folder} does not say what held-out data there are ({error}): give data (--data)") from None
  height, width, channels = model.image_shape
  is_named = source == "digits" or (source.partition(":")[1] and not Path(source).exists())
  config = datasets.DataConfig(
    source,
    split="test" if is_named else "train",
    size=height if height == width and not is_named else None,
    channels=channels if channels in (1, 3) and not is_named else None,
  )
  return datasets.open_data(config)


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
