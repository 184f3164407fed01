"""Snapshots of power-function means on disk, from which a mean of another width is made after the training.

During a training with two such means, such as ``ema=("power:std=0.05", "power:std=0.1")``, `write` stores both every so
often. `reconstruct` approximates the mean of any other width by a weighted sum of the snapshots (Karras et al. 2024,
arXiv:2312.02696, section 3.2). It reads one snapshot after another, so that only the sum is in memory.

A snapshot is a ``.safetensors`` file of the network's parameters in float32. Its name is its step and its width.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide._core import checks, specs
from jaxguide._core.files import replacing
from jaxguide._core.typing import PyTree
from jaxguide.models import arrays
from jaxguide.training import ema

FOLDER = "snapshots"
"""The name of the snapshots' folder in the folder of a run."""

TOLERANCE = 0.2
"""The largest relative error of a profile that snapshots may approximate."""

_NAME = re.compile(r"(\d+)-(0\.\d+|\d\.?\d*e-\d+)\.safetensors")


class Snapshot(NamedTuple):
  """A running mean in a file.

  Args:
    step: number of training steps that it is the mean of.
    std: its width, relative to the duration of the training so far.
    path: the file.
  """

  step: int
  std: float
  path: Path


class Reconstructed(NamedTuple):
  """A running mean made from snapshots.

  Args:
    params: the network's parameters, ``{"params": ...}``.
    step: number of training steps that it is the mean of.
    error: the relative error of its profile: how far the weight that it gives to each training step is from the wanted
      one. It does not depend on the parameters.
    number: number of snapshots.
  """

  params: PyTree
  step: int
  error: float
  number: int


def widths(means: Sequence[str]) -> dict[int, float]:
  """Return the width of each power-function mean, by its place among the running means.

  >>> widths(("constant", "power:std=0.05", "power"))
  {1: 0.05, 2: 0.1}
  """
  parsed = {place: specs.parse(text) for place, text in enumerate(means)}
  return {place: float(spec.options.get("std", 0.1)) for place, spec in parsed.items() if spec.name == "power"}


def write(folder: Path, step: int, means: Sequence[str], params: Sequence[PyTree]) -> None:
  """Write a snapshot of each power-function mean, atomically. Snapshots of the same step are replaced.

  Args:
    folder: the folder of the snapshots; it is created if necessary.
    step: number of completed steps, at least 1.
    means: the running means of the training, `TrainingConfig.means`. Others than power-function means are not written.
    params: the means' parameters in the same order, `TrainState.means`. Of the collections only ``params`` is written.

  Raises:
    OSError: if a file cannot be written. The files of earlier snapshots stay.
  """
  from safetensors.numpy import save_file

  for place, std in widths(means).items():
    tensors = {
      path: np.ascontiguousarray(leaf, np.float32) for path, leaf in arrays.leaves(params[place]["params"]).items()
    }
    metadata = {"step": str(step), "std": repr(std), "checksums": json.dumps(arrays.checksums(tensors))}
    with replacing(folder / f"{step:09d}-{std!r}.safetensors") as file:
      save_file(tensors, file.name, metadata)


def find(folder: Path) -> list[Snapshot]:
  """Return the snapshots in a folder, ordered by step and then by width. The list is empty if there is no folder."""
  matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
  return sorted(Snapshot(int(match[1]), float(match[2]), path) for match, path in matches if match)


def remove_after(folder: Path, step: int) -> None:
  """Remove snapshots of later steps than a training continues from: it may take other steps than before."""
  for snapshot in find(folder):
    if snapshot.step > step:
      snapshot.path.unlink()


def reconstruct(folder: Path, std: float, step: int | None, expected: PyTree) -> Reconstructed:
  """Approximate a running mean of another width by a weighted sum of snapshots.

  Args:
    folder: the folder of the snapshots.
    std: the width of the mean, above 0 and at most 0.2887.
    step: the training step at which the mean ends. Default: that of the last snapshot. Snapshots of later steps are not
      used.
    expected: the shapes of the network's parameters, ``{"params": ...}``, from `jaxguide.models.model.shapes`.

  Raises:
    FileNotFoundError: if there are no snapshots.
    ValueError: if ``std`` or ``step`` is out of range; if there are too few snapshots for the width, so that the
      relative error of the profile would be above `TOLERANCE`; or if a snapshot is damaged or of another network.
  """
  ema.std_to_exponent(std)
  snapshots = find(folder)
  if not snapshots:
    raise FileNotFoundError(
      f"there are no snapshots in {folder}: train with at least two power-function means, such as "
      'ema = ["power:std=0.05", "power:std=0.1"], and with snapshot_every'
    )
  steps = sorted({snapshot.step for snapshot in snapshots})
  step = steps[-1] if step is None else checks.at_least("step", step, 1)
  if not steps[0] <= step <= steps[-1]:
    raise ValueError(f"step must be from {steps[0]} to {steps[-1]}, the steps of the snapshots in {folder}, got {step}")
  used = [snapshot for snapshot in snapshots if snapshot.step <= step]
  profiles = ema.Profiles([snapshot.step for snapshot in used], [snapshot.std for snapshot in used])
  wanted = ema.Profiles([step], [std])
  coefficients = ema.posthoc_coefficients(profiles, wanted)[:, 0]
  error = profile_error(profiles, wanted, coefficients)
  if error > TOLERANCE:
    raise ValueError(
      f"the {len(used)} snapshots up to step {step} give a mean of width {std:g} with an error of {error:.0%}, and at "
      f"most {TOLERANCE:.0%} is allowed: choose a width nearer to {_kept(used)}, or train with more snapshots"
    )
  params = ema.weighted_sum((_read(snapshot, expected["params"]) for snapshot in used), coefficients)
  return Reconstructed({"params": params}, step, error, len(used))


def profile_error(snapshots: ema.Profiles, wanted: ema.Profiles, coefficients: np.ndarray) -> float:
  """Return ``|p - Σ_i c_i p_i| / |p|`` in the norm of L2: the relative error of an approximated profile ``p``.

  >>> kept = ema.Profiles([100.0, 100.0], [0.05, 0.10])
  >>> profile_error(kept, ema.Profiles([100.0], [0.10]), np.array([0.0, 1.0]))
  0.0
  """
  t, std = (np.asarray(values, np.float64) for values in snapshots)
  (t_wanted,), (std_wanted,) = wanted  # type: ignore[misc]
  among = ema.correlation(t[:, None], std[:, None], t, std)
  across = ema.correlation(t, std, t_wanted, std_wanted)
  itself = ema.correlation(t_wanted, std_wanted, t_wanted, std_wanted)
  square = itself - 2 * coefficients @ across + coefficients @ among @ coefficients
  # The difference of nearly equal numbers is exact to about 1e-15 of them only.
  return float(np.sqrt(square / itself)) if square > 1e-12 * itself else 0.0


def _kept(snapshots: Sequence[Snapshot]) -> str:
  return " and ".join(f"{std:g}" for std in sorted({snapshot.std for snapshot in snapshots}))


def _read(snapshot: Snapshot, expected: PyTree) -> PyTree:
  """Read a snapshot as a tree of float32 arrays, and compare it with its checksums."""
  from safetensors import SafetensorError, safe_open

  remedy = "remove this file, and the mean is made from the others"
  try:
    with safe_open(snapshot.path, framework="numpy") as file:
      metadata: dict[str, Any] = file.metadata() or {}
      checksums = json.loads(metadata["checksums"])
      if (int(metadata["step"]), float(metadata["std"])) != snapshot[:2]:
        raise ValueError(f"it contains the mean of step {metadata['step']} and width {metadata['std']}")
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    arrays.check(tensors, checksums)
  except (SafetensorError, KeyError, ValueError, TypeError) as error:
    raise ValueError(f"the snapshot {snapshot.path} is damaged ({arrays.reason(error)}): {remedy}") from error
  shapes = {name: leaf.shape for name, leaf in arrays.leaves(expected).items()}
  if {name: array.shape for name, array in tensors.items()} != shapes:
    raise ValueError(f"the snapshot {snapshot.path} has the parameters of another network: {remedy}")
  bad = arrays.not_finite(tensors)
  if bad is not None:
    raise ValueError(f"the parameter {bad} in the snapshot {snapshot.path} is not finite: {remedy}")
  return jax.tree.unflatten(jax.tree.structure(expected), [tensors[name] for name in shapes])
