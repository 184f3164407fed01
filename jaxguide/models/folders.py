"""A network with its parameters, in memory and on disk.

A model is a folder: ``config.json`` says what it is, ``params`` holds its parameters as an Orbax checkpoint, and
``checksums.json`` tells whether the two are as they were saved. The first is written last and removed first, so that
where writing was cut short there is no model instead of half of one.
"""

import dataclasses
import json
import shutil
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
from jaxguide.models import arrays
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import Model, check, shapes


def save(folder: PathLike, model: Model) -> None:
  """Write a model, in place of one that was there. Parameters in boxes (`flax.linen.Partitioned`) are written without.

  Raises:
    OSError: if the folder cannot be written, or is in use.
    ValueError: if the parameters do not fit the network, are no floating-point numbers or not finite, or the folder
      holds an unfinished training.
  """
  folder = Path(folder).absolute()
  check(model)
  model = dataclasses.replace(model, params=_plain(model))
  check_writable(folder / "config.json")
  with lock(folder / ".lock", folder):
    if (folder / "checkpoints").exists() and not (folder / "config.json").exists():
      raise ValueError(f"{folder} holds an unfinished training: finish it, remove it, or choose another folder")
    remove_parts(folder)
    # It tells how the model was trained that was here.
    (folder / "training.json").unlink(missing_ok=True)
    write(folder, model)


def _plain(model: Model) -> PyTree:
  """Give a model's parameters as they come back: out of their boxes, in types that JAX has."""
  params, expected = nn.meta.unbox(model.params), shapes(model.config)
  if list(arrays.leaves(params)) != list(arrays.leaves(expected)) or len(params) != len(expected):
    raise ValueError(f"params must hold {{'params': ...}} and nothing else, got the collections {sorted(params)}")

  def kept(leaf):
    kind = jnp.result_type(leaf)
    if not jnp.issubdtype(kind, jnp.floating):
      raise ValueError(f"parameters must be floating-point numbers, got {kind}")
    return leaf if getattr(leaf, "dtype", None) == kind else jnp.asarray(leaf, kind)

  return jax.tree.map(kept, params)


def write(folder: Path, model: Model) -> None:
  """Do what `save` does, for who has checked the model and holds the folder's lock."""
  import orbax.checkpoint as ocp

  for name in ("config.json", "checksums.json"):
    (folder / name).unlink(missing_ok=True)
  arrays.remove_unfinished(folder)

  def save_params():
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(folder / "params", model.params, force=True)

  arrays.write(folder / "params", model.params, save_params)
  sync_folder(folder)
  config = records.record(config=model.config)["config"]
  sums = {"version": records.VERSION, "config": _checksum(config), "params": arrays.checksums(model.params)}
  write_atomically(folder / "checksums.json", json.dumps(sums, indent=1).encode())
  write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())


def _checksum(config: Mapping[str, Any]) -> str:
  """The checksum of a configuration, however it is laid out in its file."""
  return f"{zlib.crc32(json.dumps(config, sort_keys=True).encode()):08x}"


def load(folder: PathLike, *, verify: bool = True) -> Model:
  """Read a model that `save` wrote.

  Args:
    folder: where it is.
    verify: whether to hold configuration and parameters against the checksums that were saved with them. Without it a
      model is read that has none, or whose ``config.json`` was edited on purpose; `save` then makes it whole.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is torn: a part is missing, is not as it was saved, or does not fit the rest; or if parameters are
      not finite.

  A model can then be guided, in one's own ``jit`` or by `jaxguide.sample_batch`::

    model = load("runs/demo/denoiser")
    guided = jaxguide.classifier_free(model.null_cond, 2.0)(model.denoiser)
  """
  import orbax.checkpoint as ocp

  folder = Path(folder).absolute()
  path = folder / "config.json"
  try:
    held = records.read(path)
    config = ModelConfig(**held)
    expected = shapes(config)
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no model in {folder}: train one, with `jaxguide demo` for example") from None
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path} does not describe a model ({error}): train it again") from error
  sums = _read_checksums(folder, held, expected) if verify else {}
  # Orbax warns about placing arrays unless it is told where; the first device is where they are used from.
  where = devices.first()
  template = [
    jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(sums["params"][name]["dtype"]) if verify else leaf.dtype, sharding=where)
    for name, leaf in arrays.leaves(expected).items()
  ]

  def restore():
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(folder / "params", jax.tree.unflatten(jax.tree.structure(expected), template))
    if verify:
      arrays.check(params, sums["params"])
    check(Model(config, params))
    return params

  params, failed = arrays.attempt(restore)
  if failed is not None:
    raise ValueError(f"the parameters in {folder / 'params'} are torn or not this model's ({failed}): train it again")
  return Model(config, params)


def _read_checksums(folder: Path, config: Mapping[str, Any], expected: PyTree) -> dict[str, Any]:
  """Read the checksums of a model, each parameter's by its path, and hold the configuration against its own."""
  path = folder / "checksums.json"
  try:
    held = records.read(path)
    records.check_version(held)
    if not isinstance(held.get("params"), dict) or "config" not in held:
      raise ValueError("it holds no checksums")
    changed = held["config"] != _checksum(config)
    if not changed:
      for name in arrays.leaves(expected):
        jnp.dtype(held["params"][name]["dtype"])
  except FileNotFoundError:
    raise ValueError(
      f"{folder} has lost its checksums.json, or was saved before there were any: nothing tells whether its parameters "
      "are whole. If you know that they are, load the model with verify=False and save it again"
    ) from None
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is torn or not this model's ({arrays.reason(error)}): train it again") from error
  if changed:
    raise ValueError(
      f"{folder / 'config.json'} was changed after it was saved: undo that, or, if it was meant, load the model with "
      "verify=False and save it again"
    )
  return held


def remove(folder: PathLike) -> None:
  """Remove a model and its training's checkpoints, and nothing else that may lie in the folder."""
  folder = Path(folder)
  # What tells how the checkpoints were made goes after them, or others could go on from them.
  for part in ("config.json", "checksums.json", "params", "checkpoints", "training.json"):
    if (folder / part).is_dir():
      shutil.rmtree(folder / part)
    else:
      (folder / part).unlink(missing_ok=True)
