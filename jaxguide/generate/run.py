"""The run: sample, keep what is done, and write the file at the end."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import jaxguide
from jaxguide import checks, data, sampling
from jaxguide.files import PathLike, check_writable
from jaxguide.generate.plan import Settings, plan
from jaxguide.generate.unfinished import Unfinished
from jaxguide.typing import PyTree


def _save_png(path: Path, images: np.ndarray, labels: np.ndarray | None) -> None:
  """Draw every sample: a row for each label, or a square where there is only one."""
  counts = np.ones(1) if labels is None else np.bincount(labels)
  if np.count_nonzero(counts) == 1:
    title = None if labels is None else f"label {labels[0]}"
    data.save_png(path, images, columns=math.ceil(math.sqrt(len(images))), title=title)
  else:
    data.save_png(path, images, labels, columns=int(counts.max()))


FORMATS: dict[str, Callable[..., None]] = {".npz": data.save_npz, ".png": _save_png}


def run(out: PathLike, settings: Settings, *, progress: bool = True) -> None:
  """Sample and write a file.

  Until the file is whole, the samples are kept in a folder beside it, ``OUT.unfinished``. A run that was killed goes on
  where it stopped when it is started again with the same settings, and the file is what an unbroken run gives.

  Args:
    out: an ``.npz`` (``arr_0`` uint8 NHWC, ``arr_1`` labels, as OpenAI's evaluator reads it) or a ``.png`` (a labelled
      grid).
    settings: all that the samples depend on.
    progress: whether to show a progress bar.

  Raises:
    ValueError: for a setting that is out of range, unknown, or does not suit the others, before the work starts; or an
      unfinished run with other settings.
    OSError: if ``out`` cannot be written, before the work starts.
    FileNotFoundError: if there is no model.
    FloatingPointError: if a sample is not finite. Those before it are kept.
  """
  from tqdm.auto import tqdm

  out = Path(out)
  write = checks.lookup("format", out.suffix, FORMATS)
  check_writable(out)
  planned = plan(settings)
  record = {
    "version": jaxguide.__version__,
    **dataclasses.asdict(settings),
    **planned.record,
    "data": _fingerprint(planned.data),
  }
  shape = (settings.num, *planned.image_shape)
  unfinished = Unfinished(out.with_name(out.name + ".unfinished"), record, shape)
  with tqdm(total=settings.num, initial=unfinished.done, desc="sampling", unit="sample", disable=not progress) as bar:
    batches = sampling.sample_batches(
      planned.denoiser,
      jax.random.key(settings.seed),
      planned.cond,
      num=settings.num,
      shape=planned.image_shape,
      sigmas=planned.sigmas,
      solver=planned.solver,
      batch_size=settings.batch_size,
      skip=unfinished.done,
    )
    for x in batches:
      unfinished.append(data.to_uint8(x))
      bar.update(len(x))
  write(out, unfinished.images, planned.labels)
  unfinished.remove()


def _fingerprint(arrays: PyTree) -> int:
  """A number that other arrays would, as good as surely, not have."""
  total = 0
  for leaf in jax.tree.leaves(arrays):
    total = zlib.crc32(np.ascontiguousarray(leaf).data, total)
  return total
