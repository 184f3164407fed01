"""The training loop: one jitted step in a Python loop, checkpoints to resume from, and an eye on the loss.

The state after step ``k`` depends on the configuration and the data alone, whether or not the run was interrupted:
batch ``k`` and the key of step ``k`` are made from the seed and ``k``.

A folder has a record, ``training.json``, of all that the state depends on, and one process at a time that writes there.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide._core import checks, devices, records
from jaxguide._core.files import PathLike, check_writable, lock, remove_parts, sync_folder, write_atomically
from jaxguide._core.typing import PyTree
from jaxguide.data import Images, batches, saturation
from jaxguide.models import arrays
from jaxguide.models import folders as models
from jaxguide.models.config import NOT_FIELDS, ModelConfig, dtype_name
from jaxguide.models.model import Model
from jaxguide.models.networks import NETWORKS
from jaxguide.training import checkpoints
from jaxguide.training.config import TrainingConfig
from jaxguide.training.objectives import objective
from jaxguide.training.step import init_state, train_step

# Steps whose losses are fetched together: looking at each would make the device wait for Python.
CHUNK = 20


def fit(
  model: ModelConfig,
  training: TrainingConfig,
  images: Images,
  folder: PathLike,
  *,
  retrain: bool = False,
  progress: bool = True,
) -> Model:
  """Train a network, or finish its training, or give what an earlier run trained.

  Args:
    model: the network.
    training: how to train it.
    images: what to train it on.
    folder: where the model and its checkpoints are kept.
    retrain: start over, whatever the folder holds. A model that is there stays until the new one is whole.
    progress: whether to show a progress bar with loss and speed.

  Returns:
    The model with the running mean of its parameters, which ``folder`` holds too.

  Raises:
    TypeError: if an argument is of another kind.
    ValueError: if the images do not suit the network; if the folder holds a model or checkpoints that were configured
      otherwise or made of other images, naming what differs; or if no checkpoint is whole.
    OSError: if the folder cannot be written, or another process is training in it.
    FloatingPointError: if the loss, a parameter or the optimiser's state is not finite, naming the step; the last good
      checkpoint stays.
  """
  for name, value, kind in (("model", model, ModelConfig), ("training", training, TrainingConfig)):
    if not isinstance(value, kind):
      raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
  if not isinstance(images, Images):
    raise TypeError(
      f"images must be a jaxguide.data.Images, got {type(images).__name__}: make one of arrays with "
      "Images(images, labels, num_classes, name)"
    )
  checks.flag("retrain", retrain)
  folder = Path(folder).absolute()
  if model.low_res_shape is not None:
    raise ValueError(f"a {model.network} cannot be trained here: the data hold no low-resolution images")
  if images.image_shape != model.image_shape or model.num_classes not in (images.num_classes, None):
    raise ValueError(
      f"the network is for images of shape {model.image_shape} in {model.num_classes} classes, but {images.name} has "
      f"{images.image_shape} in {images.num_classes}"
    )
  models.shapes(model)
  objective(model, training)  # It says what does not go together, before anything is written.
  record = _record(model, training, images)
  check_writable(folder / "training.json")
  with lock(folder / ".lock", folder):
    remove_parts(folder)
    at = _where(folder, record, model, retrain)
    _check_record(at, record, model)
    if (at / "config.json").exists():
      trained = models.load(at)
    else:
      write_atomically(at / "training.json", json.dumps(record, indent=2).encode())
      params = _run(model, training, images, at / "checkpoints", progress)
      trained = Model(model, jax.device_put(params, devices.first()))
      models.write(at, trained)
    shutil.rmtree(at / "checkpoints", ignore_errors=True)
    if at != folder:
      _replace(folder, at)
  return trained


def _where(folder: Path, record: dict[str, Any], model: ModelConfig, retrain: bool) -> Path:
  """Give the folder to train in: beside a model that is trained anew, which stays until there is another."""
  beside = folder / "retraining"
  if (beside / "config.json").exists():
    _replace(folder, beside)  # It was killed while it did so.
  if retrain:
    shutil.rmtree(beside, ignore_errors=True)
    if not (folder / "config.json").exists():
      models.remove(folder)
      return folder
    beside.mkdir()
    return beside
  try:
    goes_on = not _differences(records.read(beside / "training.json"), record, model)
  except (OSError, ValueError):
    return folder
  return beside if goes_on else folder


def _replace(folder: Path, beside: Path) -> None:
  """Put the model that was trained in ``beside`` in the place of the one before. Cut short, it can be done again."""
  if (beside / "params").exists():
    models.remove(folder)
  for part in ("params", "checksums.json", "training.json", "config.json"):
    if (beside / part).exists():
      (beside / part).replace(folder / part)
  sync_folder(folder)
  shutil.rmtree(beside)


def _record(model: ModelConfig, training: TrainingConfig, images: Images) -> dict[str, Any]:
  data = {
    "name": images.name,
    "number": len(images),
    "image_shape": images.image_shape,
    "num_classes": images.num_classes,
    "fingerprint": images.fingerprint,
    "saturation": saturation(images.images),
  }
  return records.record(model=model, training=training, data=data)


def _check_record(folder: Path, record: dict[str, Any], model: ModelConfig) -> None:
  """Check that what a folder holds was made by the run of this record, if it holds anything."""
  path, or_else = folder / "training.json", "retrain it, or choose another folder"
  if not (folder / "config.json").exists() and not checkpoints.steps(folder / "checkpoints"):
    return
  try:
    held = records.read(path)
    held = held if "version" in held else _from_flat(held)
    records.check_version(held)
  except FileNotFoundError:
    raise ValueError(f"{folder} holds a model, but no training.json that tells how it was trained: {or_else}") from None
  except ValueError as error:
    raise ValueError(f"{path} does not tell how the model was trained ({error}): {or_else}") from error
  different = _differences(held, record, model)
  if different:
    raise ValueError(f"{folder} holds a model that was configured otherwise: {or_else}. {'; '.join(different)}")


def _differences(held: dict[str, Any], record: dict[str, Any], model: ModelConfig) -> list[str]:
  """Name each field in which two records differ."""
  data = held.get("data")
  if isinstance(data, dict) and "fingerprint" not in data:  # It was written before there were fingerprints.
    record = {**record, "data": {"name": record["data"]["name"]}}
  module = records.defaults(NETWORKS[model.network].module)
  fields = {name: value for name, value in module.items() if name not in NOT_FIELDS}
  if "dtype" in fields:
    fields["dtype"] = dtype_name(fields["dtype"])
  default = {
    "model": {**records.defaults(ModelConfig), "fields": fields},
    "training": records.defaults(TrainingConfig),
    "data": {"saturation": record["data"].get("saturation")},  # A word on the images, which their fingerprint tells.
  }
  return records.differences(held, record, default)


def _from_flat(held: dict[str, Any]) -> dict[str, Any]:
  """Read a record as it was written before it had parts."""
  parts = {"model": ModelConfig, "training": TrainingConfig}
  split = {
    part: {field.name: held[field.name] for field in dataclasses.fields(cls) if field.name in held}
    for part, cls in parts.items()
  }
  return {"version": records.VERSION, **split, "data": {"name": held.get("data")}}


def _run(model: ModelConfig, training: TrainingConfig, images: Images, folder: Path, progress: bool) -> PyTree:
  """Train, and give the running mean of the parameters."""
  from tqdm.auto import tqdm

  # Examples are spread over the devices where they divide evenly; parameters are on each.
  place = devices.for_batches(training.batch_size)
  state = place.copies(init_state(model, training))
  step = train_step(model, training)
  state = checkpoints.restore(folder, state)
  start = int(state.step)
  source = batches(images, training.batch_size, training.seed, start)
  with tqdm(
    total=training.steps, initial=start, desc=f"training the {model.role.name}", unit="step", disable=not progress
  ) as bar:
    for first in range(start, training.steps, CHUNK):
      chunk = []
      for _ in range(first, min(first + CHUNK, training.steps)):
        state, metrics = step(state, *place.rows(next(source)))
        chunk.append(metrics)
      history = jax.tree.map(lambda *values: np.asarray(values), *jax.device_get(chunk))
      done = first + len(chunk)
      if not np.isfinite(history["loss"]).all():
        bad = first + int(np.argmin(np.isfinite(history["loss"])))
        raise _not_finite(f"the loss is not finite at step {bad}", folder)
      bar.set_postfix({name: f"{values.mean():.3f}" for name, values in history.items()}, refresh=False)
      bar.update(len(chunk))
      last = done == training.steps
      if last or done // training.save_every > first // training.save_every:
        # A loss is that of the parameters before its step.
        path = arrays.not_finite(state)
        if path is not None:
          raise _not_finite(f"{path} is not finite after step {done - 1}", folder)
        # The last step of all is saved as the model itself.
        if not last:
          checkpoints.save(folder, state, done)
  mean = {"params": jax.device_get(state.ema_params["params"])}  # Others were trained beside them.
  # One step more, for the loss of what the last one made.
  _, metrics = step(state, *place.rows(next(source)))
  if not np.isfinite(metrics["loss"]):
    raise _not_finite(f"the loss is not finite after step {training.steps - 1}", folder)
  return mean


def _not_finite(what: str, folder: Path) -> FloatingPointError:
  steps = checkpoints.steps(folder)
  kept = f"the checkpoint of step {max(steps)} is kept in {folder}" if steps else "there was no checkpoint yet"
  return FloatingPointError(f"{what}; {kept}. Try a lower learning_rate")
