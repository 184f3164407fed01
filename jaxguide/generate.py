"""Samples from a trained model into a file: what ``jaxguide sample`` does."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide import checks, data, sampling, schedules, solvers, training
from jaxguide import guidance as guide
from jaxguide.files import PathLike, check_writable
from jaxguide.training import Model
from jaxguide.typing import Guidance


def _save_png(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
  """Draw every sample: a row for each label, or a square where there is only one."""
  counts = np.bincount(labels)
  if np.count_nonzero(counts) == 1:
    data.save_png(path, images, columns=math.ceil(math.sqrt(len(images))), title=f"label {labels[0]}")
  else:
    data.save_png(path, images, labels, columns=int(counts.max()))


FORMATS: dict[str, Callable[..., None]] = {".npz": data.save_npz, ".png": _save_png}


def _cfg(model: Model, scale: float | int = 2.0) -> Guidance:
  return guide.classifier_free(model.null_cond, scale)


def _classifier(model: Model, classifier: PathLike, scale: float | int = 2.0) -> Guidance:
  trained = training.load(classifier)
  for name in ("image_shape", "num_classes"):
    ours, theirs = getattr(model.config, name), getattr(trained.config, name)
    if ours != theirs:
      raise ValueError(f"the classifier in {classifier} has {name} {theirs}, but the model has {ours}")
  return guide.chain(guide.unconditional(model.null_cond), guide.classifier(trained.log_prob, scale))


def _none(model: Model) -> Guidance:
  del model
  return guide.chain()


GUIDANCES: dict[str, Callable[..., Guidance]] = {"cfg": _cfg, "classifier": _classifier, "none": _none}
"""Each takes the model and, of the options, those that are its parameters."""


def run(
  out: PathLike,
  *,
  model: PathLike,
  classifier: PathLike | None = None,
  labels: Sequence[int] | None = None,
  num: int = 16,
  guidance: str = "cfg",
  scale: float | int | None = None,
  solver: str = "ddim",
  steps: int = 50,
  eta: float | int | None = None,
  grid: str = "karras",
  sigmas: tuple[float, float] = (0.01, 80.0),
  seed: int = 0,
  batch_size: int = 256,
  progress: bool = True,
) -> None:
  """Sample and write a file.

  Args:
    out: an ``.npz`` (``arr_0`` uint8 NHWC, ``arr_1`` labels) or a ``.png`` (a labelled grid).
    model: folder of a denoiser.
    classifier: folder of a classifier, for ``classifier`` guidance; if left out, the one beside the model.
    labels: classes to take in turn; all of them if left out.
    num: number of samples.
    guidance: ``cfg``, ``classifier`` (of the unconditional denoiser) or ``none`` (the conditional denoiser).
    scale: the power in ``p(x) p(y|x)^scale``; 2 if left out.
    solver: a name from `jaxguide.solvers`.
    steps: steps of the solver.
    eta: randomness of ``ddim``, in [0, 1].
    grid: a name from `jaxguide.schedules`.
    sigmas: the last noise level above 0, and the first.
    seed: sample ``i`` depends on the seed, ``i`` and its label alone.
    batch_size: samples at a time.
    progress: whether to show a progress bar.

  Raises:
    ValueError: for any of these that is out of range, unknown, or no option of the guidance or solver that is asked
      for, before the work starts.
    OSError: if ``out`` cannot be written, before the work starts.
    FileNotFoundError: if there is no model.
    FloatingPointError: if a sample is not finite.
  """
  from tqdm.auto import tqdm

  out = Path(out)
  write = checks.lookup("format", out.suffix, FORMATS)
  check_writable(out)
  num = checks.at_least("num", num, 1)
  seed = checks.at_least("seed", seed, 0)
  make_guidance = checks.lookup("guidance", guidance, GUIDANCES)
  options: dict[str, Any] = {
    name: value for name, value in (("scale", scale), ("classifier", classifier)) if value is not None
  }
  takes = inspect.signature(make_guidance).parameters
  for name in options:
    if name not in takes:
      raise ValueError(f"guidance {guidance!r} takes no {name}: leave it out, or choose another guidance")
  if scale is not None:
    checks.finite("scale", scale)
  if "classifier" in takes:
    options.setdefault("classifier", Path(model).parent / "classifier")
  make_solver = solvers.solver(solver, **({} if eta is None else {"eta": eta}))
  levels = checks.lookup("grid", grid, schedules.GRIDS)(steps, *sigmas)
  denoiser = training.load(model)
  classes = denoiser.config.num_classes
  if classes is None:
    raise ValueError(f"the model in {model} has no classes")
  each = np.resize(np.arange(classes) if labels is None else np.asarray(labels), num).astype(np.int32)
  checks.labels("label", each, classes)
  guided = guide.chain(make_guidance(denoiser, **options), guide.clip_x0())(denoiser.denoiser)
  with tqdm(total=num, desc="sampling", unit="sample", disable=not progress) as bar:
    x = sampling.sample_batch(
      guided,
      jax.random.key(seed),
      each,
      shape=denoiser.config.image_shape,
      sigmas=levels,
      solver=make_solver,
      batch_size=batch_size,
      progress=bar.update,
    )
  write(out, data.to_uint8(x), each)
