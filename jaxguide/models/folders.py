"""Models as folders on disk.

The folder of a model has ``config.json`` with its configuration, ``params`` with its parameters as an Orbax checkpoint,
and ``checksums.json`` with checksums of both. ``config.json`` is written last and removed first: if writing is
interrupted, the folder contains no model instead of an incomplete one.

The folder of a training run has its model in the subfolder ``model``, which is replaced while the run goes on: the new
model is written beside the old one, and then they are swapped by renames. `load` takes either kind of folder, and the
name of a model that comes with the package.
"""

import dataclasses
import json
import shutil
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core import devices, records
from jaxguide._core.files import PathLike, check_writable, lock, remove_parts, sync_folder, write_atomically
from jaxguide._core.typing import PyTree
from jaxguide.distributed.processes import several
from jaxguide.models import arrays, pretrained
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import Model, check, shapes

MODEL, NEW, OLD = "model", "model.new", "model.old"
"""The subfolder of a run with its model; and its names while it is written, and while it is replaced."""

ATTEMPTS = 10
"""How often `load` tries to read a model that is replaced meanwhile."""


def save(folder: PathLike, model: Model) -> None:
  """Write a model to a folder. A model that is already there is replaced.

  Parameters in boxes (`flax.linen.Partitioned`) are unboxed first.

  Raises:
    OSError: if the folder cannot be written, or is in use.
    ValueError: if the parameters do not fit the network, are not floating-point numbers or not finite, or if the folder
      contains a training run.
  """
  folder = Path(folder).absolute()
  check(model)
  model = dataclasses.replace(model, params=_plain(model))
  check_writable(folder / "config.json")
  with lock(folder / ".lock", folder):
    if (folder / "checkpoints").exists() or located(folder) != folder:
      raise ValueError(f"{folder} contains a training run: choose another folder, or remove the run")
    remove_parts(folder)
    # training.json describes the training of the model that is replaced.
    (folder / "training.json").unlink(missing_ok=True)
    write(folder, model)


def _plain(model: Model) -> PyTree:
  """Return a model's parameters as they will be loaded: unboxed, and in types that JAX supports."""
  params, expected = nn.meta.unbox(model.params), shapes(model.config)
  if list(arrays.leaves(params)) != list(arrays.leaves(expected)) or len(params) != len(expected):
    raise ValueError(f"params must have the collection 'params' only, got the collections {sorted(params)}")

  def convert(leaf):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"parameters must be floating-point numbers, got {dtype}")
    return leaf if getattr(leaf, "dtype", None) == dtype else jnp.asarray(leaf, dtype)

  return jax.tree.map(convert, params)


def write(folder: Path, model: Model) -> None:
  """Write a model like `save`, but without checks. The caller must hold the folder's lock."""
  for name in ("config.json", "checksums.json"):
    (folder / name).unlink(missing_ok=True)
  arrays.remove_unfinished(folder)

  # Where there are several processes, Orbax refuses arrays on the devices of one, as those of a loaded model are.
  params = jax.device_get(model.params) if several() else model.params

  def save_params():
    with arrays.checkpointer() as checkpointer:
      checkpointer.save(folder / "params", params, force=True)

  arrays.write(folder / "params", params, save_params)
  sync_folder(folder)
  config = records.record(config=model.config)["config"]
  checksums = {"version": records.VERSION, "config": _checksum(config), "params": arrays.checksums(model.params)}
  write_atomically(folder / "checksums.json", json.dumps(checksums, indent=1).encode())
  write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())


def _checksum(config: Mapping[str, Any]) -> str:
  """Return the CRC-32 of a configuration. It does not depend on the whitespace or the order of keys in its file."""
  return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def located(folder: PathLike) -> Path:
  """Return the folder that has the model's files: ``folder`` itself, or its subfolder if it is that of a training run.

  >>> located("runs/nothing-there").name
  'nothing-there'
  """
  folder = Path(folder)
  # While a model is replaced, there is for a moment only the old one.
  return next((folder / name for name in (MODEL, OLD) if (folder / name / "config.json").exists()), folder)


def exists(folder: PathLike) -> bool:
  """Whether there is a model in a folder, which may be damaged, or by that name in the package.

  >>> exists("animals"), exists("no-animals")
  (True, False)
  """
  return (located(folder) / "config.json").exists() or pretrained.name_of(folder) is not None


def publish(run: Path, model: Model, record: Mapping[str, Any]) -> None:
  """Write the model of a training run, and replace the one before it. The caller must hold the lock of the run.

  If the process is killed, the old model or the new one is there.

  Args:
    run: the folder of the run.
    model: the model.
    record: the record of the training, stored in the file ``training.json`` beside the parameters.
  """
  recover(run)
  new, old = run / NEW, run / OLD
  new.mkdir(parents=True)
  try:
    write(new, model)
    write_atomically(new / "training.json", json.dumps(record, indent=2).encode())
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    raise
  if (run / MODEL).exists():
    (run / MODEL).rename(old)
  new.rename(run / MODEL)
  sync_folder(run)
  shutil.rmtree(old, ignore_errors=True)


def recover(run: Path) -> None:
  """Put a model into its place that an interrupted `publish` left beside it, and remove what is incomplete."""
  if (run / OLD).exists() and not (run / MODEL).exists():
    (run / OLD).rename(run / MODEL)
  for name in (NEW, OLD):
    if (run / name).exists():
      shutil.rmtree(run / name)


def load(folder: PathLike, *, verify: bool = True) -> Model:
  """Read a model that `save` or a training wrote. The training may be going on: its newest model is read.

  Args:
    folder: the folder of the model, or of a training run; or, where there is no such folder, the name of a model that
      comes with the package, one of `jaxguide.models.names`.
    verify: whether to compare configuration and parameters with the checksums that were saved with them. Use False for
      a model without checksums, or whose ``config.json`` was edited on purpose; then `save` it to update the checksums.

  Raises:
    FileNotFoundError: if the folder contains no model, with the names of models that there are.
    ValueError: if the model is damaged (a part is missing, was changed after it was saved, or does not fit the other
      parts), or if parameters are not finite.

  The model can be guided in your own ``jit`` or by `jaxguide.sample_batch`::

    model = load("runs/demo/denoiser")
    guided = jaxguide.classifier_free(model.null_cond, 2.0)(model.denoiser)
  """
  name = pretrained.name_of(folder)
  if name is not None:
    return pretrained.load(name)
  folder = Path(folder).absolute()
  for _ in range(ATTEMPTS - 1):
    before = _identity(folder)
    try:
      return _load(located(folder), verify)
    except (OSError, ValueError):
      if _identity(folder) == before:
        raise
      time.sleep(0.1)  # A training has replaced the model meanwhile.
  return _load(located(folder), verify)


def _identity(folder: Path) -> tuple[int, int] | None:
  """Return the number of the model's folder in the file system, and the time of its change; None if there is none."""
  try:
    stat = located(folder).stat()
  except OSError:
    return None
  return stat.st_ino, stat.st_mtime_ns


def _instead(folder: Path) -> str:
  """Say where there are models beside a folder that has none."""
  parent = (folder.parent if folder.name == "model" else folder).parent
  found = [path.parent for pattern in ("*/config.json", "*/model/config.json") for path in parent.glob(pattern)]
  beside = sorted({path.relative_to(parent).parts[0] for path in found})
  shipped = f"with jaxguide come {', '.join(pretrained.names())}"
  if not beside:
    return f"train one, with `jaxguide demo` for example; {shipped}"
  return f"beside it there are {', '.join(beside[:5])}{', ...' if len(beside) > 5 else ''}; {shipped}"


def _load(folder: Path, verify: bool) -> Model:
  path = folder / "config.json"
  try:
    fields = records.read(path)
    config = ModelConfig(**fields)
    expected = shapes(config)
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no model in {folder}: {_instead(folder)}") from None
  except (TypeError, ValueError) as error:
    advice = "" if isinstance(error.__cause__, (ImportError, AttributeError)) else ": train it again"
    raise ValueError(f"{path} does not describe a model ({error}){advice}") from error
  checksums = _read_checksums(folder, fields, expected) if verify else {}
  dtypes = {
    name: jnp.dtype(checksums["params"][name]["dtype"]) if verify else leaf.dtype
    for name, leaf in arrays.leaves(expected).items()
  }
  # Without a sharding Orbax warns about the placement of arrays.
  sharding = devices.first()
  template = [
    jax.ShapeDtypeStruct(leaf.shape, dtypes[name], sharding=sharding) for name, leaf in arrays.leaves(expected).items()
  ]

  structure, names = jax.tree.structure(expected), list(arrays.leaves(expected))

  def restore():
    found = None
    if verify and {*checksums["params"]} == {*names}:
      found = arrays.read(folder / "params", checksums["params"], sharding)
    if found is not None:
      params = jax.tree.unflatten(structure, [found[name] for name in names])
    else:
      with arrays.checkpointer() as checkpointer:
        params = checkpointer.restore(folder / "params", jax.tree.unflatten(structure, template))
      if verify:
        arrays.check(params, checksums["params"])
    check(Model(config, params))
    return params

  params, failure = arrays.attempt(restore)
  if failure is not None:
    raise ValueError(
      f"the parameters in {folder / 'params'} are damaged or belong to another model ({failure}): train it again"
    )
  return Model(config, params)


def _read_checksums(folder: Path, config: Mapping[str, Any], expected: PyTree) -> dict[str, Any]:
  """Read the checksums of a model, and compare the configuration with its checksum.

  Returns:
    The content of ``checksums.json``; its ``params`` has a checksum with a valid type for each parameter.
  """
  path = folder / "checksums.json"
  try:
    checksums = records.read(path)
    records.check_version(checksums)
    if not isinstance(checksums.get("params"), dict) or "config" not in checksums:
      raise ValueError("it contains no checksums")
    changed = checksums["config"] != _checksum(config)
    if not changed:
      for name in arrays.leaves(expected):
        jnp.dtype(checksums["params"][name]["dtype"])
  except FileNotFoundError:
    raise ValueError(
      f"{folder} has no checksums.json, so its parameters cannot be verified. If you know that they are not damaged, "
      "load the model with verify=False and save it again"
    ) from None
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(
      f"{path} is damaged or belongs to another model ({arrays.reason(error)}): train it again"
    ) from error
  if changed:
    raise ValueError(
      f"{folder / 'config.json'} was changed after it was saved: undo the change, or, if it was intended, load the "
      "model with verify=False and save it again"
    )
  return checksums
