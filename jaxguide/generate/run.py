"""The run: sample, keep what is done, and write the file at the end."""

import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxguide
from jaxguide import data, sampling
from jaxguide._core import checks, keys, records
from jaxguide._core.files import PathLike, check_writable, lock, remove_parts
from jaxguide._core.typing import PyTree
from jaxguide.generate import unfinished
from jaxguide.generate.plan import Plan, plan
from jaxguide.generate.settings import Settings
from jaxguide.models.config import ModelConfig


def _save_png(path: Path, images: np.ndarray, labels: np.ndarray | None, settings: str) -> None:
  """Draw every sample: a row for each label, or a square where there is only one."""
  counts = np.ones(1) if labels is None else np.bincount(labels)
  if np.count_nonzero(counts) == 1:
    title = None if labels is None else f"label {labels[0]}"
    data.save_png(path, images, columns=math.ceil(math.sqrt(len(images))), title=title, settings=settings)
  else:
    data.save_png(path, images, labels, columns=int(counts.max()), settings=settings)


FORMATS: dict[str, Callable[..., None]] = {".npz": data.save_npz, ".png": _save_png}


def run(out: PathLike, settings: Settings, *, overwrite: bool = False, progress: bool = True) -> bool:
  """Sample and write a file.

  Until the file is whole, the samples are kept in a folder beside it, ``OUT.unfinished``. A run that was killed goes on
  where it stopped when it is started again with the same settings, and the file is what an unbroken run gives. The file
  holds its settings. Where it is there already, and was made with the same ones, nothing is drawn.

  Args:
    out: an ``.npz`` (``arr_0`` uint8 NHWC, ``arr_1`` labels, as OpenAI's evaluator reads it) or a ``.png`` (a labelled
      grid).
    settings: all that the samples depend on.
    overwrite: whether a finished file that was made with other settings may be replaced.
    progress: whether to show a progress bar.

  Returns:
    Whether samples were drawn; False if the file was there already.

  Warns:
    UserWarning: if far more of the pixels lie at the ends of their range than in the training data.

  Raises:
    ValueError: for a setting that is out of range, unknown, or does not suit the others, before the work starts; or a
      finished file or an unfinished run with other settings, naming what differs.
    OSError: if ``out`` cannot be written, or another process is writing it, before the work starts.
    FileNotFoundError: if there is no model.
    FloatingPointError: if a sample is not finite. Those before it are kept.
  """
  out = Path(os.path.realpath(out) if os.path.islink(out) else out)
  write = checks.lookup("format", out.suffix, FORMATS)
  check_writable(out)
  checks.flag("overwrite", overwrite)
  planned = plan(settings)
  if out.suffix == ".png" and planned.image_shape[-1] not in (1, 3):
    raise ValueError(
      f"a PNG needs images of 1 (gray) or 3 (RGB) channels, and the model's have {planned.image_shape[-1]}: write .npz"
    )
  record = records.record(
    settings=settings, **planned.record, data={"crc32": _fingerprint(planned.data)}, jaxguide=jaxguide.__version__
  )
  unfinished_at = out.with_name(out.name + ".unfinished")
  with lock(out.with_name(f".{out.name}.lock"), out):
    remove_parts(out.parent, out.name)
    if out.exists():
      held = _settings_of(out)
      if held is not None:
        unfinished.clear_finished(unfinished_at, held)
      if not overwrite:
        _check_finished(out, held, record)
        return False
    samples = unfinished.Unfinished(unfinished_at, record, (settings.num, *planned.image_shape), _DEFAULTS)
    try:
      _sample(samples, settings, planned, progress)
    except BaseException:
      if not samples.done:
        samples.remove()  # It must not stand in the way of a run with better settings.
      raise
    write(out, samples.images, planned.labels, json.dumps(record))
    share = data.saturation(samples.images)
    samples.remove()
  _warn_of_saturation(settings, share)
  return True


_DEFAULTS = {"settings": records.defaults(Settings), "network": records.defaults(ModelConfig)}
_DEFAULTS["classifier_network"] = _DEFAULTS["network"]


def _sample(samples: unfinished.Unfinished, settings: Settings, planned: Plan, progress: bool) -> None:
  from tqdm.auto import tqdm

  init = planned.init
  with tqdm(total=settings.num, initial=samples.done, desc="sampling", unit="sample", disable=not progress) as bar:
    batches = sampling.sample_batches(
      planned.denoiser,
      keys.seed_key(settings.seed),
      planned.cond,
      num=settings.num,
      shape=planned.image_shape,
      sigmas=planned.sigmas,
      solver=planned.solver,
      batch_size=settings.batch_size,
      skip=samples.done,
      x_init=None if init is None else lambda rows: np.asarray(planned.encoder.encode(init[rows % len(init)])),
      add_noise=init is not None,
    )
    with jax.default_matmul_precision(settings.matmul_precision):
      for x in batches:
        samples.append(planned.encoder.decode(x))
        bar.update(len(x))


def _settings_of(out: Path) -> dict[str, Any] | None:
  try:
    held = json.loads(data.settings_of(out) or "")
  except (ValueError, RecursionError):
    return None
  return held if isinstance(held, dict) else None


def _check_finished(out: Path, held: Mapping[str, Any] | None, record: Mapping[str, Any]) -> None:
  if held is None:
    raise ValueError(
      f"{out} is there already, and does not say what it was made with: choose another file, or --overwrite it"
    )
  different = records.differences(held, record, _DEFAULTS)
  if different:
    raise ValueError(
      f"{out} is there already, made with other settings ({'; '.join(different)}): choose another file, or "
      "--overwrite it"
    )


def _warn_of_saturation(settings: Settings, share: float) -> None:
  """Warn where the share of saturated values is more than half the way from the training data's to 1."""
  try:
    trained = float(records.read(Path(settings.model, "training.json"))["data"]["saturation"])
  except (OSError, ValueError, KeyError, TypeError):
    trained = 0.8  # A model that does not say: so much black or white is rare but in drawings.
  if share > (1 + trained) / 2 and trained < 1:
    warnings.warn(
      f"{share:.0%} of the pixel values lie at the ends of their range, 0 or 255, and {trained:.0%} would be usual: "
      "the samples are saturated; lower the scale of guidance, or try cfg:combine=rescaled or dynamic-threshold",
      stacklevel=3,
    )


def _fingerprint(arrays: PyTree) -> int:
  """A number that other arrays would, as good as surely, not have."""
  total = 0
  for leaf in jax.tree.leaves(arrays):
    total = zlib.crc32(np.ascontiguousarray(leaf).data, total)
  return total
