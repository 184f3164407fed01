"""Trained models that come with the package, by name.

A model NAME has three files in the folder ``weights``. ``NAME.safetensors`` has the parameters in float16,
``NAME.json`` has the configuration and the record of the training, and ``NAME.toml`` has the settings with which
``jaxguide train NAME`` trains it anew. A name can be given where the folder of a model is expected. If there is a
folder of that name, the folder is used.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide._core import checks, records
from jaxguide._core.files import PathLike, write_atomically
from jaxguide._core.typing import PyTree
from jaxguide.models import arrays
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import Model, check, shapes

FOLDER = Path(__file__).with_name("weights")

ENDING = ".safetensors"


def names() -> tuple[str, ...]:
  """Return the names of the models that come with the package.

  >>> names()
  ('animals', 'animals-classifier')
  """
  return tuple(sorted(path.stem for path in FOLDER.glob(f"*{ENDING}")))


def name_of(path: PathLike) -> str | None:
  """Return the name of the model that is meant by a path; None if it is a path of the user's own.

  >>> name_of("animals"), name_of("runs/animals")
  ('animals', None)
  """
  path = Path(path)
  return str(path) if str(path) in names() and not path.exists() else None


def load(name: str) -> Model:
  """Read a model that comes with the package. Its parameters are float32, converted from the stored float16.

  Args:
    name: one of `names`.

  Raises:
    ValueError: for an unknown name, or if the installed files are damaged.
    OSError: if they cannot be read.

  >>> load("animals").config.class_names[2]
  'cat'
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load as parse

  path = _path(name)
  record = records.read(path.with_suffix(".json"))
  content = path.read_bytes()
  try:
    records.check_version(record)
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
      raise ValueError("the parameters do not match their SHA-256")
    config = ModelConfig(**record["config"])
    stored, expected = parse(content), shapes(config)
    # By NumPy, since JAX would compile a program for each shape.
    params = [jax.device_put(np.asarray(stored[key], np.float32)) for key in arrays.leaves(expected)]
    model = Model(config, jax.tree.unflatten(jax.tree.structure(expected), params))
    check(model)
  except (KeyError, TypeError, ValueError, SafetensorError) as error:
    raise ValueError(f"{path} is damaged ({arrays.reason(error)}): install jaxguide again") from error
  return model


def digest(name: str) -> str:
  """Return the SHA-256 of a model's parameters, as its record has it.

  Raises:
    ValueError: for an unknown name.

  >>> len(digest("animals"))
  64
  """
  return records.read(_path(name).with_suffix(".json"))["sha256"]


def settings(name: str) -> Path:
  """Return the TOML file with the settings of a model's training.

  Raises:
    ValueError: for an unknown name.

  >>> settings("animals").name
  'animals.toml'
  """
  return _path(name).with_suffix(".toml")


def training(path: PathLike) -> dict[str, Any] | None:
  """Return the record of a model's training; None if the path does not mean a model of the package.

  Raises:
    ValueError: if the installed file is damaged.

  >>> training("animals")["data"]["name"]
  'animals'
  """
  name = name_of(path)
  return None if name is None else records.read(_path(name).with_suffix(".json"))["training"]


def classifier_of(path: PathLike) -> str | None:
  """Return the name of the classifier that belongs to a model of the package; None if there is none.

  >>> classifier_of("animals"), classifier_of("runs/animals")
  ('animals-classifier', None)
  """
  classifier = f"{path}-classifier"
  return classifier if name_of(path) is not None and classifier in names() else None


def save(name: str, model: Model, record: Mapping[str, Any], folder: Path = FOLDER) -> int:
  """Write a model to the files of the package, with its parameters in float16.

  Args:
    name: the name of the model.
    model: the model.
    record: the record of its training, as `jaxguide.training` writes it.
    folder: the folder of the files.

  Returns:
    The size of the parameters' file in bytes.

  Raises:
    ValueError: if the parameters do not fit the network, or are not finite in float16.
    OSError: if a file cannot be written.
  """
  from safetensors.numpy import save as as_bytes

  check(model)
  half = as_half(model.params)
  check(Model(model.config, half))
  content = as_bytes(arrays.leaves(half))
  facts = records.record(config=model.config, sha256=hashlib.sha256(content).hexdigest(), training=record)
  write_atomically(folder / f"{name}{ENDING}", content)
  write_atomically(folder / f"{name}.json", (json.dumps(facts, indent=2) + "\n").encode())
  return len(content)


def as_half(params: PyTree) -> PyTree:
  """Return parameters in float16, as NumPy arrays. Numbers beyond 65,504 become infinite."""

  def convert(leaf: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
      return np.ascontiguousarray(np.asarray(leaf), np.float16)

  return jax.tree.map(convert, params)


def _path(name: str) -> Path:
  return checks.lookup("model of the package", name, {known: FOLDER / f"{known}{ENDING}" for known in names()})
