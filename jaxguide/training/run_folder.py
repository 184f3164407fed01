"""The folder of a training run, and the record of everything that its state depends on.

The folder contains

- ``training.json``: the record, and ``history``, the settings that were changed when the run was continued,
- ``config.toml``: the whole configuration,
- ``metrics.jsonl``: a line of figures per interval,
- ``samples/``: pictures of samples,
- ``checkpoints/``: what the training continues from,
- ``snapshots/``: running means from which those of other widths are made,
- ``data.npy``: a number for each example of the data,
- ``model/``: the newest model, with its own copy of the record,
- ``index.html``: curves and pictures.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxguide._core import files, records
from jaxguide._core.files import write_atomically
from jaxguide.distributed import processes
from jaxguide.models import folders, networks
from jaxguide.models.config import ModelConfig, default_fields
from jaxguide.training import checkpoints, inputs, snapshots
from jaxguide.training.config import TrainingConfig
from jaxguide.training.run_config import RunConfig

RECORD, CONFIG, METRICS, SAMPLES, CHECKPOINTS, PAGE = (
  "training.json",
  "config.toml",
  "metrics.jsonl",
  "samples",
  "checkpoints",
  "index.html",
)

CHANGEABLE = frozenset(
  f"training.{name}" for name in ("steps", "save_every", "learning_rate", "rate", "warmup", "skip_nan", "remat")
) | {"data.number", "data.saturation", *(f"run.{field.name}" for field in dataclasses.fields(RunConfig))}
"""The settings that may differ when a run is continued. They do not change the meaning of its state."""

WITHOUT_INFLUENCE = frozenset({"training.save_every", "training.skip_nan", "training.remat"}) | frozenset(
  f"run.{field.name}" for field in dataclasses.fields(RunConfig)
)
"""The settings that do not change the model of a finished run."""

REMEDY = "retrain it, or choose another folder"


class Stored(NamedTuple):
  """What a folder contains.

  Args:
    run: the record of the run, whose checkpoints are in the folder; None if there is none.
    model: the record of the training of the model; None if there is no model, or it has no record.
    finished: whether the model is that of a finished training.
    kept: whether the model stays until the run is finished, because the run is its retraining.
    steps: number of steps of the newest checkpoint.
  """

  run: dict[str, Any] | None
  model: dict[str, Any] | None
  finished: bool
  kept: bool
  steps: int


def record(model: ModelConfig, training: TrainingConfig, data: Any, run: RunConfig, init: str | None) -> dict[str, Any]:
  """Return the record of a training: everything that its result depends on, as plain data.

  Args:
    model: the configuration of the network.
    training: the configuration of the training.
    data: the dataset.
    run: how the run logs, saves and draws, which has no influence on the result.
    init: a checksum of the parameters that the training begins with; None if they are random.
  """
  preparation = getattr(data, "preparation", None)
  facts = {
    "name": data.name,
    "number": len(data),
    "image_shape": data.image_shape,
    "num_classes": data.num_classes,
    "fingerprint": data.fingerprint,
    "saturation": data.saturation,
    **({} if preparation is None else {"preparation": dataclasses.asdict(preparation)}),
  }
  begun = {} if init is None else {"init": init}
  return records.record(model=model, training=training, data=facts, run=run, **begun)


def read(folder: Path) -> Stored:
  """Read what a folder contains.

  Raises:
    ValueError: if it contains a model or checkpoints, but no valid record of them.
  """
  trained = checkpoints.steps(folder / CHECKPOINTS)
  model_folder = folders.located(folder)
  has_model = (model_folder / "config.json").exists()
  run = _read(folder / RECORD) if trained or ((folder / RECORD).exists() and model_folder != folder) else None
  model = _read(model_folder / RECORD) if has_model else None
  # A folder without the subfolder `model` is of an older version, which wrote the model at the end of the training.
  finished = model is not None and (model_folder == folder or model.get("finished") is True)
  return Stored(run, model, finished, bool(run and run.get("keeps_model")), trained[-1] if trained else 0)


def _read(path: Path) -> dict[str, Any]:
  try:
    stored = records.read(path)
    stored = stored if "version" in stored else _from_flat(stored)
    records.check_version(stored)
  except FileNotFoundError:
    raise ValueError(
      f"{path.parent} contains a model, but no {RECORD} with the settings of its training: {REMEDY}"
    ) from None
  except ValueError as error:
    raise ValueError(f"{path} is not a valid record of the model's training ({error}): {REMEDY}") from error
  return stored


def _from_flat(flat: dict[str, Any]) -> dict[str, Any]:
  """Convert a record of an older version, whose fields are not divided into parts."""
  parts = {"model": ModelConfig, "training": TrainingConfig}
  split = {
    part: {field.name: flat[field.name] for field in dataclasses.fields(cls) if field.name in flat}
    for part, cls in parts.items()
  }
  return {"version": records.VERSION, **split, "data": {"name": flat.get("data")}}


def write(folder: Path, wanted: Mapping[str, Any], history: Sequence[Mapping[str, Any]], keeps_model: bool) -> None:
  """Write the record of a run."""
  content = {**wanted, "history": list(history), **({"keeps_model": True} if keeps_model else {})}
  write_atomically(folder / RECORD, json.dumps(content, indent=2).encode())


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[records.Difference]:
  """Return the fields in which a stored record differs from the one of this training."""
  names = ("version", "model", "training", "data", "run", "init")
  stored = {name: stored[name] for name in names if name in stored}
  data, wanted = stored.get("data"), dict(wanted)
  if "preparation" in wanted["data"] and isinstance(data, dict):
    # Files that were moved are the same data: their fingerprint does not depend on the name of their folder.
    stored["data"] = data = {**data, "name": wanted["data"]["name"]}
  if isinstance(data, dict) and "fingerprint" not in data:  # Records of older versions have no fingerprint.
    wanted["data"] = {"name": wanted["data"]["name"]}
  fields = default_fields(networks.find(wanted["model"]["network"]))
  default = {
    "model": {**records.defaults(ModelConfig), "fields": fields},
    "training": records.defaults(TrainingConfig),
    # Records of older versions have no saturation. It follows from the images, which the fingerprint identifies.
    "data": {"saturation": wanted["data"].get("saturation")},
    "run": wanted["run"],
    "init": None,
  }
  return records.compare(stored, wanted, default)


def check_same(folder: Path, different: Sequence[records.Difference], allowed: frozenset[str] = frozenset()) -> None:
  """Check that records differ in allowed fields only.

  Raises:
    ValueError: if not, naming the fields with both values.
  """
  refused = [difference for difference in different if difference.name not in allowed]
  if refused:
    raise ValueError(
      f"{folder} contains a model that was trained with other settings: {REMEDY}. {'; '.join(map(str, refused))}"
    )


def adopt(folder: Path) -> None:
  """Move a model of an older version, whose files are in the folder itself, into the subfolder ``model``."""
  folders.recover(folder)
  if not (folder / "config.json").exists():
    return
  if not (folder / folders.MODEL).exists():
    new = folder / folders.NEW
    new.mkdir()
    for name in ("params", "checksums.json", RECORD, "config.json"):
      path = folder / name
      if path.is_dir():
        shutil.copytree(path, new / name)
      elif path.exists():
        shutil.copyfile(path, new / name)
    if (new / RECORD).exists():
      content = {**records.read(new / RECORD), "finished": True}
      write_atomically(new / RECORD, json.dumps(content, indent=2).encode())
    new.rename(folder / folders.MODEL)
  for name in ("config.json", "checksums.json"):
    (folder / name).unlink(missing_ok=True)
  shutil.rmtree(folder / "params", ignore_errors=True)


def clear(folder: Path) -> None:
  """Remove a run, except its model. Other files in the folder stay."""
  # The record is removed after the checkpoints that it describes. Otherwise, after an interruption, a training with
  # another configuration could continue from them.
  for part in (CHECKPOINTS, METRICS, SAMPLES, PAGE, snapshots.FOLDER, inputs.STAMPS, RECORD):
    if (folder / part).is_dir():
      shutil.rmtree(folder / part)
    else:
      (folder / part).unlink(missing_ok=True)


class Start(NamedTuple):
  """How a call of `fit` begins.

  Args:
    trained: whether the folder has the finished model of this training, so that nothing is left to do.
    keeps_model: whether the model that is there stays until the training is finished.
    changes: the settings that differ from those of the steps so far.
    history: the earlier changes.
  """

  trained: bool
  keeps_model: bool
  changes: Sequence[records.Difference]
  history: Sequence[Mapping[str, Any]]


def start(folder: Path, wanted: Mapping[str, Any], retrain: bool, grown: bool = False) -> Start:
  """Decide whether a training begins, continues, or is finished already. The caller must hold the lock of the folder.

  Args:
    folder: the folder of the run.
    wanted: the record of this training.
    retrain: whether to start over. A finished model that is already in the folder stays until the new one is complete.
    grown: whether the data are those of the run with some examples more, which is allowed.

  Raises:
    ValueError: if the folder contains a model or checkpoints with settings that cannot be changed, naming them.
  """
  folders.recover(folder)
  if retrain:
    return _start_over(folder)
  stored = read(folder)
  changeable = CHANGEABLE | {"data.fingerprint"} if grown else CHANGEABLE - {"data.number"}
  same_run = [] if stored.run is None else differences(stored.run, wanted)
  continues = stored.run is not None and not [change for change in same_run if change.name not in changeable]
  if stored.finished and stored.model is not None and not (stored.kept and continues):
    different = differences(stored.model, wanted)
    if not [change for change in different if change.name not in WITHOUT_INFLUENCE]:
      return Start(True, False, (), ())
    if stored.run is None or not stored.steps:
      check_same(folder, different)  # Without checkpoints it cannot be continued.
  if stored.run is None:
    if stored.model is not None:
      check_same(folder, differences(stored.model, wanted))
    return Start(False, False, (), ())
  check_same(folder, same_run, changeable)
  _check_steps(folder, stored, wanted, same_run)
  history = stored.run.get("history", ())
  return Start(False, stored.kept, same_run, history if isinstance(history, list) else ())


def _check_steps(
  folder: Path, stored: Stored, wanted: Mapping[str, Any], changes: Sequence[records.Difference]
) -> None:
  steps = wanted["training"]["steps"]
  if steps < stored.steps:
    raise ValueError(
      f"training.steps is {steps}, but the run in {folder} has taken {stored.steps} steps already: give at least "
      f"{stored.steps}, or retrain it"
    )
  influence = [change for change in changes if change.name not in WITHOUT_INFLUENCE]
  if influence and stored.finished and not stored.kept and steps == stored.steps:
    raise ValueError(
      f"the run in {folder} has taken all of its {steps} steps with other settings: give more steps to continue it "
      f"with the new ones, or retrain it. {'; '.join(map(str, influence))}"
    )


def _start_over(folder: Path) -> Start:
  adopt(folder)
  model = folder / folders.MODEL
  try:
    unfinished = records.read(model / RECORD).get("finished") is not True
  except FileNotFoundError:
    unfinished = False
  except ValueError:
    unfinished = True
  clear(folder)
  if unfinished and model.exists():
    shutil.rmtree(model)
  return Start(False, model.exists(), (), ())


def begin(folder: Path, record: Mapping[str, Any], retrain: bool, data: Any, stack: contextlib.ExitStack) -> Start:
  """Lock a folder and decide how a training begins there, in the first process, for all.

  Args:
    folder: the folder of the run.
    record: the record of this training.
    retrain: whether to start over.
    data: the dataset.
    stack: it releases the lock at its end.

  Raises:
    OSError: if the folder cannot be written, or another training is running in it.
    ValueError: as `start`.
  """
  found: list[Start] = []

  def look() -> list[bool]:
    files.check_writable(folder / RECORD)
    stack.enter_context(files.lock(folder / ".lock", folder))
    files.remove_parts(folder)
    decided = start(folder, record, retrain, grown=inputs.has_grown(folder, data))
    if not decided.trained:
      adopt(folder)
    found.append(decided)
    return [decided.trained, decided.keeps_model]

  trained, keeps_model = processes.first_does(look)
  # Only the first process says and writes what has changed.
  return found[0] if found else Start(trained, keeps_model, (), ())
