"""The training loop: a Python loop over one jitted step, with checkpoints to resume from and checks for finite values.

The state after step ``k`` depends on the configuration and the data alone, whether or not the run was interrupted:
batch ``k`` and the random key of step ``k`` are derived from the seed and ``k``.

The folder of a training contains ``training.json``, a record of everything that the state depends on. A lock allows one
process at a time to write to the folder.
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

# Losses are fetched once per this many steps: to fetch each loss would make the device wait for Python.
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
  """Train a network, continue an interrupted training, or load the model if it is trained already.

  Args:
    model: the configuration of the network.
    training: the configuration of the training.
    images: the training data.
    folder: the folder of the model and its checkpoints.
    retrain: whether to start over. A model that is already in the folder stays until the new one is complete.
    progress: whether to show a progress bar with loss and speed.

  Returns:
    The trained model, whose parameters are the running mean. ``folder`` contains the same model.

  Raises:
    TypeError: if an argument has a wrong type.
    ValueError: if the images do not fit the network; if the folder contains a model or checkpoints with other settings
      or other images, naming what differs; or if all checkpoints are damaged.
    OSError: if the folder cannot be written, or another process is training in it.
    FloatingPointError: if the loss, a parameter or the optimiser's state is not finite, naming the step. The last
      checkpoint before it is kept.
  """
  checks.flag("retrain", retrain)
  _check_arguments(model, training, images)
  folder = Path(folder).absolute()
  record = _record(model, training, images)
  check_writable(folder / "training.json")
  with lock(folder / ".lock", folder):
    remove_parts(folder)
    target = _training_folder(folder, record, model, retrain)
    _check_record(target, record, model)
    if (target / "config.json").exists():
      trained = models.load(target)
    else:
      write_atomically(target / "training.json", json.dumps(record, indent=2).encode())
      params = _run(model, training, images, target / "checkpoints", progress)
      trained = Model(model, jax.device_put(params, devices.first()))
      models.write(target, trained)
    shutil.rmtree(target / "checkpoints", ignore_errors=True)
    if target != folder:
      _replace(folder, target)
  return trained


def _check_arguments(model: ModelConfig, training: TrainingConfig, images: Images) -> None:
  """Check, before anything is written, that network, training and images fit each other."""
  for name, value, cls in (("model", model, ModelConfig), ("training", training, TrainingConfig)):
    if not isinstance(value, cls):
      raise TypeError(f"{name} must be a {cls.__name__}, got {type(value).__name__}")
  if not isinstance(images, Images):
    raise TypeError(
      f"images must be a jaxguide.data.Images, got {type(images).__name__}: make one from arrays with "
      "Images(images, labels, num_classes, name)"
    )
  if model.low_res_shape is not None:
    raise ValueError(f"fit cannot train a {model.network}: Images have no low-resolution images")
  if images.image_shape != model.image_shape or model.num_classes not in (images.num_classes, None):
    raise ValueError(
      f"the network is for images of shape {model.image_shape} in {model.num_classes} classes, but {images.name} has "
      f"{images.image_shape} in {images.num_classes}"
    )
  models.shapes(model)
  objective(model, training)


def _training_folder(folder: Path, record: dict[str, Any], model: ModelConfig, retrain: bool) -> Path:
  """Return the folder to train in.

  It is ``folder`` itself, or its subfolder ``retraining`` if a complete model in ``folder`` is retrained: that model
  stays until the new one is complete. An interrupted retraining is continued if its settings are the same.
  """
  retraining = folder / "retraining"
  if (retraining / "config.json").exists():
    _replace(folder, retraining)  # An earlier process was killed during the replacement.
  if retrain:
    shutil.rmtree(retraining, ignore_errors=True)
    if not (folder / "config.json").exists():
      models.remove(folder)
      return folder
    retraining.mkdir()
    return retraining
  try:
    same_settings = not _differences(records.read(retraining / "training.json"), record, model)
  except (OSError, ValueError):
    return folder
  return retraining if same_settings else folder


def _replace(folder: Path, retraining: Path) -> None:
  """Replace the model in ``folder`` by the one in ``retraining``. If it is interrupted, it can be called again."""
  if (retraining / "params").exists():
    models.remove(folder)
  for part in ("params", "checksums.json", "training.json", "config.json"):
    if (retraining / part).exists():
      (retraining / part).replace(folder / part)
  sync_folder(folder)
  shutil.rmtree(retraining)


def _record(model: ModelConfig, training: TrainingConfig, images: Images) -> dict[str, Any]:
  """Return the record of a training: everything that its result depends on, as plain data."""
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
  """Check that a folder is empty or contains the result of the training of this record.

  Raises:
    ValueError: if it contains a model or checkpoints with another record, or with none.
  """
  path, remedy = folder / "training.json", "retrain it, or choose another folder"
  if not (folder / "config.json").exists() and not checkpoints.steps(folder / "checkpoints"):
    return
  try:
    stored = records.read(path)
    stored = stored if "version" in stored else _from_flat(stored)
    records.check_version(stored)
  except FileNotFoundError:
    raise ValueError(
      f"{folder} contains a model, but no training.json with the settings of its training: {remedy}"
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} is not a valid record of the model's training ({error}): {remedy}") from error
  different = _differences(stored, record, model)
  if different:
    raise ValueError(
      f"{folder} contains a model that was trained with other settings: {remedy}. {'; '.join(different)}"
    )


def _differences(stored: dict[str, Any], record: dict[str, Any], model: ModelConfig) -> list[str]:
  """Return a text for each field in which a stored record differs from this one."""
  data = stored.get("data")
  if isinstance(data, dict) and "fingerprint" not in data:  # Records of older versions have no fingerprint.
    record = {**record, "data": {"name": record["data"]["name"]}}
  module = records.defaults(NETWORKS[model.network].module)
  fields = {name: value for name, value in module.items() if name not in NOT_FIELDS}
  if "dtype" in fields:
    fields["dtype"] = dtype_name(fields["dtype"])
  default = {
    "model": {**records.defaults(ModelConfig), "fields": fields},
    "training": records.defaults(TrainingConfig),
    # Records of older versions have no saturation. It follows from the images, which the fingerprint identifies.
    "data": {"saturation": record["data"].get("saturation")},
  }
  return records.differences(stored, record, default)


def _from_flat(flat: dict[str, Any]) -> dict[str, Any]:
  """Convert a record of an older version, whose fields are not divided into parts."""
  parts = {"model": ModelConfig, "training": TrainingConfig}
  split = {
    part: {field.name: flat[field.name] for field in dataclasses.fields(cls) if field.name in flat}
    for part, cls in parts.items()
  }
  return {"version": records.VERSION, **split, "data": {"name": flat.get("data")}}


def _run(model: ModelConfig, training: TrainingConfig, images: Images, folder: Path, progress: bool) -> PyTree:
  """Train from the last checkpoint in a folder, and return the running mean of the parameters."""
  from tqdm.auto import tqdm

  # Examples are distributed over the devices if the batch size is a multiple of their number.
  # Parameters are replicated.
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
        # The losses above are those of the parameters before each step, so the newest state is checked separately.
        path = arrays.not_finite(state)
        if path is not None:
          raise _not_finite(f"{path} is not finite after step {done - 1}", folder)
        # After the last step the model itself is saved, and no checkpoint.
        if not last:
          checkpoints.save(folder, state, done)
  mean = {
    "params": jax.device_get(state.ema_params["params"])
  }  # Without parameters that were trained together with it.
  # One more step, only to compute the loss of the final parameters.
  _, metrics = step(state, *place.rows(next(source)))
  if not np.isfinite(metrics["loss"]):
    raise _not_finite(f"the loss is not finite after step {training.steps - 1}", folder)
  return mean


def _not_finite(problem: str, folder: Path) -> FloatingPointError:
  """Return the error for a value that is not finite; it names the last checkpoint."""
  steps = checkpoints.steps(folder)
  last = f"the checkpoint of step {max(steps)} is kept in {folder}" if steps else "there was no checkpoint yet"
  return FloatingPointError(f"{problem}; {last}. Try a lower learning_rate")
