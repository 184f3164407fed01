"""The run: draw the samples, keep those that are done, and write the file at the end."""

import contextlib
import dataclasses
import json
import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxguide
from jaxguide import data, models, sampling
from jaxguide._core import checks, keys, records
from jaxguide._core.bars import progress_bar
from jaxguide._core.files import PathLike, check_writable, lock, remove_parts
from jaxguide._core.typing import PyTree
from jaxguide.distributed import placement, processes
from jaxguide.generate import unfinished
from jaxguide.generate.plan import Load, Plan, plan
from jaxguide.generate.settings import Settings, plain_record
from jaxguide.models import pretrained
from jaxguide.models.config import ModelConfig

Names = Sequence[str] | None

WITHOUT_EFFECT = ("model", "classifier", "init", "base_samples", "vae", "batch_size")
"""The settings that may differ where the record has the arrays that the samples depend on."""


def _save_npz(path: Path, images: np.ndarray, labels: np.ndarray | None, settings: str, names: Names) -> None:
  del names
  data.save_npz(path, images, labels, settings)


def _save_png(path: Path, images: np.ndarray, labels: np.ndarray | None, settings: str, names: Names) -> None:
  """Draw all samples in one picture: a row for each label, or a square if there is one label."""
  counts = np.ones(1) if labels is None else np.bincount(labels)
  if np.count_nonzero(counts) == 1:
    title = None if labels is None else f"label {labels[0]}" if names is None else names[labels[0]]
    data.save_png(path, images, columns=math.ceil(math.sqrt(len(images))), title=title, settings=settings)
  else:
    data.save_png(path, images, labels, columns=int(counts.max()), settings=settings, names=names)


FORMATS: dict[str, Callable[..., None]] = {".npz": _save_npz, ".png": _save_png}


def run(
  out: PathLike,
  settings: Settings,
  *,
  overwrite: bool = False,
  grow: bool = False,
  progress: bool | Callable[[int], object] = True,
  load: Load = models.load,
  devices: Any = None,
) -> bool:
  """Sample, and write the samples to a file.

  Several processes that were joined by `jaxguide.distributed.start` draw the samples together: each writes its own part
  into the folder of the unfinished run, which all of them must see, and the first one writes the file.

  While it runs, the samples so far are kept in the folder ``OUT.unfinished``. If the run is killed and started again
  with the same settings, it goes on where it stopped, and the file is the same as that of an unbroken run. The file
  holds its settings. If the file exists and was made with the same settings, nothing is drawn.

  Args:
    out: the file: an ``.npz`` (``arr_0`` uint8 NHWC, ``arr_1`` labels, as OpenAI's evaluator reads it) or a ``.png`` (a
      picture of all samples, with labels).
    settings: everything that the samples depend on.
    overwrite: whether to replace a finished file that was made with other settings.
    grow: whether a finished file with fewer samples, made with the same settings otherwise, is continued: its samples
      are the first of the new file, which replaces it. A file with more samples is left as it is.
    progress: whether to show a progress bar; or a function that is called first with the number of samples that are
      there from earlier, and then after each batch with its number of samples.
    load: loads the model of a folder; for several runs one that keeps what it loaded.
    devices: the devices, a mesh, or the text of one such as ``"fsdp=8"``, as for `jaxguide.sample_batch`. They do not
      change the samples.

  Returns:
    Whether samples were drawn; False if the file existed already.

  Warns:
    UserWarning: if far more pixels are saturated than in the training data; or if no guidance is named, and the model
      takes labels and has no null class, so that none is used.

  Raises:
    ValueError: before the work starts, for a setting that is out of range, unknown, or does not suit the others; or for
      a finished file or an unfinished run with other settings, naming what differs.
    OSError: before the work starts, if ``out`` cannot be written, or another process is writing it.
    FileNotFoundError: if there is no model.
    FloatingPointError: if a sample is not finite. The samples before it are kept.
  """
  out = Path(os.path.realpath(out) if os.path.islink(out) else out)
  if not out.suffix:
    raise ValueError(f"out must be a file that ends in {' or '.join(FORMATS)}, got {out}")
  write = checks.lookup("format", out.suffix, FORMATS)
  if checks.flag("grow", grow) and out.suffix != ".npz":
    raise ValueError(f"samples in {out.suffix} cannot be continued: give a file that ends in .npz, or leave out grow")
  check_writable(out)
  checks.flag("overwrite", overwrite)
  run_plan = plan(settings, load)
  settings = run_plan.settings
  if out.suffix == ".png" and run_plan.file_shape[-1] not in (1, 3):
    raise ValueError(
      f"a PNG needs images of 1 (gray) or 3 (RGB) channels, and the model's have {run_plan.file_shape[-1]}: write .npz"
    )
  record = _record(run_plan, settings.num)
  _check_same(record, out, devices)
  unfinished_at = out.with_name(out.name + ".unfinished")

  def begin() -> unfinished.Unfinished | None:
    """Lock the file, and return the samples so far; None if nothing is left to do."""
    stack.enter_context(lock(out.with_name(f".{out.name}.lock"), out))
    remove_parts(out.parent, out.name)
    if out.exists():
      old_record = _settings_of(out)
      if old_record is not None:
        unfinished.clear_finished(unfinished_at, old_record)
      grown = _grown(old_record, run_plan, load) if grow else None
      if not overwrite and grown is None:
        _check_finished(out, old_record, record)
        return None
      if grown is not None and grown >= settings.num:
        return None
    kept = _continued(unfinished_at, record, run_plan, load) if grow else None
    samples = unfinished.Unfinished(unfinished_at, record, (settings.num, *run_plan.file_shape), _DEFAULTS)
    with _removed_if_empty(samples):
      if grow and not samples.done and kept is None and out.exists():
        kept = data.load_npz(out, labelled=False)[0]
      if kept is not None and len(kept):
        samples.append(kept[: settings.num])
    return samples

  def finish() -> float:
    """Write the file, and return the share of saturated pixels."""
    assert samples is not None
    write(out, samples.images, run_plan.labels, json.dumps(record), run_plan.class_names)
    share = data.saturation(samples.images)
    samples.remove()
    return float(share)

  with contextlib.ExitStack() as stack:
    samples = _begun(begin, unfinished_at)
    if samples is None:
      return False
    with _removed_if_empty(samples):
      _sample(samples, settings, run_plan, progress, devices)
    share = processes.first_does(finish)
  if processes.is_first():
    _warn_of_saturation(settings, share)
  return True


def _check_same(record: Mapping[str, Any], out: Path, devices: Any) -> None:
  """Check that all processes draw the same samples to the same file on the same mesh."""
  if processes.several():
    mesh = placement(devices).mesh
    numbers = [device.id for device in mesh.devices.flat]
    facts = {"out": str(out.absolute()), "the mesh": dict(mesh.shape), "devices": numbers, "jax": jax.__version__}
    processes.check_same({**records.flat(record), **facts})


@contextlib.contextmanager
def _removed_if_empty(samples: unfinished.Unfinished) -> Iterator[None]:
  """After an error, remove a folder without samples, which would block a run with other settings."""
  try:
    yield
  except BaseException:
    if not samples.done and processes.is_first():
      samples.remove()
    raise


def _begun(begin: Callable[[], unfinished.Unfinished | None], folder: Path) -> unfinished.Unfinished | None:
  """Let the first process begin, and the others join it."""
  found: list[unfinished.Unfinished | None] = []

  def task() -> int | None:
    found.append(begin())
    return None if found[0] is None else found[0].done

  done = processes.first_does(task)
  if found or done is None:
    return found[0] if found else None
  return unfinished.Unfinished.joined(folder, done)


_DEFAULTS = {"settings": records.defaults(Settings), "network": records.defaults(ModelConfig)}
_DEFAULTS["classifier_network"] = _DEFAULTS["network"]


def _record(run_plan: Plan, num: int) -> dict[str, Any]:
  """Give the record of everything that the first ``num`` samples depend on."""
  params, *of_samples = run_plan.data
  arrays = (params, jax.tree.map(lambda rows: rows[:num], of_samples))
  return records.record(
    settings=dataclasses.replace(run_plan.settings, num=num),
    **run_plan.record,
    data={"crc32": _fingerprint(arrays)},
    jaxguide=jaxguide.__version__,
  )


def _grown(old_record: Mapping[str, Any] | None, run_plan: Plan, load: Load) -> int | None:
  """Give the number of samples of a record, if they are those of a plan but for their number; else None.

  The size of the batches and how paths are written may differ too: the record has what is in the files.
  """
  num, different = _compared(old_record, run_plan, load)
  return None if different else num


def _compared(old_record: Mapping[str, Any] | None, run_plan: Plan, load: Load) -> tuple[int, list[records.Difference]]:
  """Give the number of samples of a record, and in what they differ from those of a plan but for their number."""
  try:
    stored: dict[str, Any] = {**(old_record or {})}
    ours = dataclasses.asdict(run_plan.settings)
    stored["settings"] = {**stored["settings"], **{name: ours[name] for name in WITHOUT_EFFECT}}
    num = checks.whole("num", stored["settings"]["num"], 1, 2**63)
  except (KeyError, TypeError, ValueError):
    return 0, [records.Difference("settings", None, None)]
  # The plan of more samples has more labels.
  other = run_plan if num <= run_plan.settings.num else plan(dataclasses.replace(run_plan.settings, num=num), load)
  return num, records.compare(stored, _record(other, num), _DEFAULTS)


def unlike(out: PathLike, settings: Settings, load: Load = models.load) -> list[records.Difference]:
  """Return in what the samples of a finished file differ from those of some settings; not in their number.

  Args:
    out: the file.
    settings: the settings.
    load: loads the model of a folder.

  Returns:
    Fields of the file's record that differ: ``settings.*``, ``network.*``, ``classifier_network.*``,
    ``other_networks``, ``jaxguide`` (its version), and ``data.crc32`` where parameters, labels or images to start from
    are others. A file without a record differs in ``settings``.
  """
  return _compared(_settings_of(Path(out)), plan(settings, load), load)[1]


def _continued(folder: Path, record: Mapping[str, Any], run_plan: Plan, load: Load) -> np.ndarray | None:
  """Take the samples of an unfinished run of another number of the same samples, and remove its folder."""
  old_record = unfinished.settings_of(folder)
  if old_record is None or not records.differences(old_record, record, _DEFAULTS):
    return None
  num = _grown(old_record, run_plan, load)
  if num is None:
    return None
  old = unfinished.Unfinished(folder, old_record, (num, *run_plan.file_shape), _DEFAULTS)
  kept = np.array(old.images[: old.done])
  old.remove()
  return kept


def _sample(
  samples: unfinished.Unfinished,
  settings: Settings,
  run_plan: Plan,
  progress: bool | Callable[[int], object],
  devices: Any,
) -> None:
  init = run_plan.init
  show = progress is True and processes.is_first()
  with progress_bar(settings.num, initial=samples.done, title="sampling", unit="sample", show=show) as bar:
    tell = progress if callable(progress) else bar.update
    if callable(progress):
      tell(samples.done)
    shares = sampling.sample_shares(
      run_plan.denoiser,
      keys.seed_key(settings.seed),
      run_plan.cond,
      num=settings.num,
      shape=run_plan.image_shape,
      sigmas=run_plan.sigmas,
      solver=run_plan.solver,
      batch_size=settings.batch_size,
      skip=samples.done,
      devices=devices,
      x_init=None if init is None else lambda rows: np.asarray(run_plan.encoder.encode(init[rows % len(init)])),
      add_noise=init is not None,
    )
    with jax.default_matmul_precision(settings.matmul_precision):
      for share in shares:
        samples.write(share.rows, run_plan.encoder.decode(share.samples))
        # A sample counts when all before it are on the disk.
        processes.wait_for_all("the samples of a batch are written")
        if processes.is_first():
          samples.commit(share.num)
        else:
          samples.done += share.num
        tell(share.num)


def _settings_of(out: Path) -> dict[str, Any] | None:
  try:
    record = json.loads(data.settings_of(out) or "")
  except (ValueError, RecursionError):
    return None
  return plain_record(record) if isinstance(record, dict) else None


def _check_finished(out: Path, old_record: Mapping[str, Any] | None, record: Mapping[str, Any]) -> None:
  if old_record is None:
    raise ValueError(
      f"{out} exists already, and does not tell what it was made with: choose another file, or --overwrite it"
    )
  # What the networks are follows from the settings. It is named only where nothing else differs.
  only_settings = ({"settings": part.get("settings")} for part in (old_record, record))
  different = records.differences(next(only_settings), next(only_settings), _DEFAULTS)
  different = different or records.differences(old_record, record, _DEFAULTS)
  if different:
    raise ValueError(
      f"{out} exists already, made with other settings ({'; '.join(different)}): choose another file, or --overwrite it"
    )


def _warn_of_saturation(settings: Settings, share: float) -> None:
  """Warn if the share of saturated values is more than half way from the training data's share to 1."""
  try:
    record = pretrained.training(settings.model) or records.read(Path(settings.model, "training.json"))
    trained = float(record["data"]["saturation"])
  except (OSError, ValueError, KeyError, TypeError):
    trained = 0.8  # For a model without this figure. Only drawings have so many saturated pixels.
  if share > (1 + trained) / 2 and trained < 1:
    warnings.warn(
      f"{share:.0%} of the pixel values lie at the ends of their range, 0 or 255, and {trained:.0%} would be usual: "
      "the samples are saturated; lower the scale of guidance, or try cfg:combine=rescaled or dynamic-threshold",
      stacklevel=3,
    )


def _fingerprint(arrays: PyTree) -> int:
  """Give a CRC-32 checksum of arrays."""
  total = 0
  for leaf in jax.tree.leaves(arrays):
    total = zlib.crc32(np.ascontiguousarray(leaf).data, total)
  return total
