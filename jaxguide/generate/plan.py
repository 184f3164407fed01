"""From names and numbers to a guided denoiser, a solver, and the levels to walk."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxguide import checks, data, schedules, solvers, training
from jaxguide import guidance as guide
from jaxguide.files import PathLike
from jaxguide.training import Model
from jaxguide.typing import Array, Denoiser, Solver

GUIDANCES = ("cfg", "classifier", "none")
GRIDS = ("respaced", *schedules.GRIDS)
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Settings:
  """All that samples depend on.

  Args:
    model: folder of a denoiser.
    classifier: folder of a classifier; for ``classifier`` guidance, the one beside the model if left out.
    base_samples: an ``.npz`` of low-resolution samples, for a model of super-resolution, which are taken in turn; their
      labels, where the model has classes, are those of the file.
    labels: classes to take in turn; all of them if left out.
    num: number of samples.
    guidance: ``cfg``, ``classifier`` (of the unconditional network, where the model can be one) or ``none``. If left
      out, ``classifier`` where there is one, else ``cfg`` where the model knows a null class, else ``none``. A model of
      super-resolution takes ``none`` alone.
    scale: the power in ``p(x) p(y|x)^scale``; if left out, what is recommended for the classifier, or 2.
    solver: a name from `jaxguide.solvers`. With ``ddpm`` a classifier shifts the mean (Dhariwal & Nichol's Algorithm
      1), with any other it bends the score (their Algorithm 2).
    steps: steps of the solver; with the grid ``respaced`` also a text, as `jaxguide.schedules.spaced_timesteps` has it.
    eta: randomness of ``ddim``, in [0, 1].
    variance: of ``ddpm``, ``small``, ``large`` or ``learned_range``; the model's own if left out.
    churn: ``S_churn`` of ``edm-stochastic``, at least 0.
    gradient_at: where ``ddpm`` takes the classifier's gradient, ``x`` or ``mean``; see `jaxguide.DDPM`.
    grid: ``respaced`` (steps of the model's own discrete process) or a name from `jaxguide.schedules`; if left out,
      ``respaced`` where the model has one, else ``karras``.
    sigma_min: the last noise level above 0, for the other grids.
    sigma_max: their first.
    dtype: what the networks compute in, ``float32`` or ``bfloat16``.
    clip: whether x0 is kept in [-1, 1]: what ``cfg`` made of it, or before a ``classifier`` changes it.
    seed: sample ``i`` depends on the seed, ``i`` and its label alone.
    batch_size: samples at a time.
  """

  model: str
  classifier: str | None = None
  base_samples: str | None = None
  labels: Sequence[int] | None = None
  num: int = 16
  guidance: str | None = None
  scale: float | int | None = None
  solver: str = "ddim"
  steps: int | str = 50
  eta: float | int | None = None
  variance: str | None = None
  churn: float | int | None = None
  gradient_at: str | None = None
  grid: str | None = None
  sigma_min: float | int | None = None
  sigma_max: float | int | None = None
  dtype: str = "float32"
  clip: bool = True
  seed: int = 0
  batch_size: int = 256

  def __post_init__(self):
    for name, low in (("num", 1), ("batch_size", 1), ("seed", 0)):
      checks.at_least(name, getattr(self, name), low)
    if not isinstance(self.steps, str):
      checks.at_least("steps", self.steps, 1)
    if self.labels is not None:
      labels = np.asarray(self.labels)
      if labels.ndim != 1 or not labels.size:
        raise ValueError("labels must be at least one class; leave them out to take all in turn")
      object.__setattr__(self, "labels", tuple(labels.tolist()))
    if self.scale is not None:
      checks.finite("scale", self.scale)
    for kind, value, known in (("guidance", self.guidance, GUIDANCES), ("grid", self.grid, GRIDS)):
      if value is not None:
        checks.lookup(kind, value, dict.fromkeys(known))
    checks.lookup("solver", self.solver, solvers.SOLVERS)
    checks.lookup("dtype", self.dtype, dict.fromkeys(DTYPES))


class Plan(NamedTuple):
  """What is to be run.

  Args:
    denoiser: guided.
    solver: with a classifier in it, if that shifts the mean.
    sigmas: the levels to walk.
    cond: of every sample.
    labels: of every sample, None where there are no classes.
    image_shape: of one sample.
    record: what the networks are, as plain data.
    data: all arrays that the samples depend on.
  """

  denoiser: Denoiser
  solver: Solver
  sigmas: Array
  cond: Any
  labels: np.ndarray | None
  image_shape: Sequence[int]
  record: Any
  data: Any


def plan(settings: Settings) -> Plan:
  """Load the networks and put them together.

  Raises:
    ValueError: for a setting that does not suit the model, the guidance or the solver.
    FileNotFoundError: if there is no model.
  """
  options = _solver_options(settings)
  # Before the networks are read, which takes a while.
  solvers.solver(settings.solver, **options)
  model = _load(settings.model, settings)
  sigmas = _sigmas(settings, model)
  if settings.churn is not None:
    options = {"gamma": solvers.EDMStochastic.from_churn(settings.churn, len(sigmas) - 1).gamma}
  name = _guidance(settings, model)
  for option, value, of in (
    ("scale", settings.scale, ("cfg", "classifier")),
    ("classifier", settings.classifier, ("classifier",)),
  ):
    if value is not None and name not in of:
      raise ValueError(f"guidance {name!r} takes no {option}: leave it out, or choose another guidance")
  shifts = name == "classifier" and settings.solver == "ddpm"
  if settings.gradient_at is not None and not shifts:
    raise ValueError("gradient_at is for solver 'ddpm' with guidance 'classifier', where it shifts the mean")
  classifier = _classifier(settings, model) if name == "classifier" else None
  scale = settings.scale
  if scale is None:
    scale = 2.0 if classifier is None or classifier.config.scale is None else classifier.config.scale

  clip = [guide.clip_x0()] if settings.clip else []
  guidances = list(clip)
  if name == "cfg":
    guidances = [guide.classifier_free(model.null_cond, scale), *clip]
  elif classifier is not None:
    if model.null_cond is not None or model.config.num_classes is None:
      guidances = [guide.unconditional(model.null_cond), *clip]
    if shifts:
      options |= {"log_prob": classifier.log_prob, "scale": scale}
    else:
      guidances += [guide.classifier(classifier.log_prob, scale)]
  elif model.config.num_classes is None and model.config.low_res_shape is None:
    guidances = [guide.unconditional(None), *clip]
  if settings.variance == "learned_range" and model.config.variance != "learned_range":
    raise ValueError(f"the model in {settings.model} has learned no variance: choose small or large")
  if settings.solver == "ddpm":
    options.setdefault("variance", model.config.variance)
  cond, labels = _cond(settings, model, classifier)
  return Plan(
    denoiser=guide.chain(*guidances)(model.denoiser),
    solver=solvers.solver(settings.solver, **options),
    sigmas=sigmas,
    cond=cond,
    labels=labels,
    image_shape=model.config.image_shape,
    record={
      "network": dataclasses.asdict(model.config),
      "classifier_network": None if classifier is None else dataclasses.asdict(classifier.config),
    },
    data=(model.params, None if classifier is None else classifier.params, cond),
  )


def _load(folder: PathLike, settings: Settings) -> Model:
  model = training.load(folder)
  fields = {**model.config.fields, "dtype": settings.dtype}
  return dataclasses.replace(model, config=dataclasses.replace(model.config, fields=fields))


def _solver_options(settings: Settings) -> dict[str, Any]:
  given = {name: getattr(settings, name) for name in ("eta", "variance", "gradient_at")}
  if settings.churn is not None:
    if settings.solver != "edm-stochastic":
      raise ValueError(f"churn is for solver 'edm-stochastic', not {settings.solver!r}")
    checks.in_range("churn", settings.churn, 0)
  return {name: value for name, value in given.items() if value is not None}


def _guidance(settings: Settings, model: Model) -> str:
  given = settings.guidance
  if model.config.low_res_shape is not None:
    if given not in (None, "none"):
      raise ValueError(f"a model of super-resolution is sampled with guidance 'none', not {given!r}")
    return "none"
  if given == "cfg" and model.null_cond is None:
    raise ValueError("the model knows no null class, which cfg needs: choose guidance 'classifier' or 'none'")
  if given is not None:
    return given
  if settings.classifier is not None:
    return "classifier"
  return "none" if model.null_cond is None else "cfg"


def _classifier(settings: Settings, model: Model) -> Model:
  folder = settings.classifier or Path(settings.model).parent / "classifier"
  classifier = _load(folder, settings)
  if classifier.config.network != "classifier":
    raise ValueError(f"{folder} holds a {classifier.config.network}, not a classifier")
  for name in ("image_shape", "num_classes"):
    ours, theirs = getattr(model.config, name), getattr(classifier.config, name)
    if ours is not None and ours != theirs:
      raise ValueError(f"the classifier in {folder} has {name} {theirs}, but the model has {ours}")
  return classifier


def _sigmas(settings: Settings, model: Model) -> Array:
  table = model.config.noise_schedule
  grid = settings.grid or ("respaced" if isinstance(table, schedules.Table) else "karras")
  ends = settings.sigma_min, settings.sigma_max
  if grid == "respaced":
    if not isinstance(table, schedules.Table):
      raise ValueError(f"grid 'respaced' is for models of a discrete process; choose from {', '.join(schedules.GRIDS)}")
    if ends != (None, None):
      raise ValueError("grid 'respaced' takes its levels from the model: leave out sigma_min and sigma_max")
    steps = settings.steps
    return schedules.respaced(table, int(steps) if str(steps).isdecimal() else steps)
  low, high = (default if end is None else end for end, default in zip(ends, (0.01, 80.0), strict=True))
  if not str(settings.steps).isdecimal():
    raise ValueError(f"grid {grid!r} takes a number of steps, got {settings.steps!r}")
  return schedules.GRIDS[grid](int(settings.steps), low, high)


def _cond(settings: Settings, model: Model, classifier: Model | None) -> tuple[Any, np.ndarray | None]:
  """Give every sample's condition, and the label in it."""
  shape = model.config.low_res_shape
  if (shape is None) != (settings.base_samples is None):
    needs = "takes no" if shape is None else "needs"
    raise ValueError(f"the model {needs} base_samples: low-resolution images are for models of super-resolution")
  if settings.base_samples is None:
    labels = _labels(settings, model, classifier)
    return labels, labels
  images, labels = data.load_npz(settings.base_samples, labelled=False)
  if images.shape[1:] != shape:
    raise ValueError(f"{settings.base_samples} has images of shape {images.shape[1:]}, but the model takes {shape}")
  if settings.labels is not None:
    raise ValueError("the labels are those of base_samples: leave out others")
  rows = np.arange(settings.num) % len(images)
  low_res = images[rows]  # The network takes bytes: as floats many would not fit.
  if model.config.num_classes is None:
    return {"low_res": low_res}, None
  if labels is None:
    raise ValueError(f"{settings.base_samples} has no labels, which the model needs: it must have them in arr_1")
  labels = checks.labels("label", labels[rows], model.config.num_classes).astype(np.int32)
  return {"label": labels, "low_res": low_res}, labels


def _labels(settings: Settings, model: Model, classifier: Model | None) -> np.ndarray | None:
  classes = model.config.num_classes if classifier is None else classifier.config.num_classes
  if classes is None:
    if settings.labels is not None:
      raise ValueError("the model has no classes, and there is no classifier: leave out the labels")
    return None
  wanted = np.arange(classes) if settings.labels is None else np.asarray(settings.labels)
  return np.resize(checks.labels("label", wanted, classes), settings.num).astype(np.int32)
