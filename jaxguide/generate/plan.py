"""From names and numbers to a guided denoiser, a solver, and the levels to walk."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxguide import data, schedules, solvers, training
from jaxguide import guidance as guide
from jaxguide._core import checks
from jaxguide._core.files import PathLike
from jaxguide._core.specs import parse
from jaxguide._core.typing import Array, Denoiser, Guidance, Solver
from jaxguide.generate import methods
from jaxguide.generate.settings import Settings
from jaxguide.models.encoders import Encoder
from jaxguide.models.model import Model
from jaxguide.models.networks import CLASSIFIER


class Plan(NamedTuple):
  """What is to be run.

  Args:
    denoiser: guided.
    solver: with a classifier in it, if that shifts the mean.
    sigmas: the levels to walk.
    cond: of every sample.
    labels: of every sample, None where there are no classes.
    image_shape: of one sample.
    init: uint8 (n, *image_shape), images that samples start from in turn; None where they start from noise.
    encoder: how ``x0`` becomes what the file holds.
    record: what the networks are, as plain data.
    data: all arrays that the samples depend on.
  """

  denoiser: Denoiser
  solver: Solver
  sigmas: Array
  cond: Any
  labels: np.ndarray | None
  image_shape: Sequence[int]
  init: np.ndarray | None
  encoder: Encoder
  record: Any
  data: Any


def plan(settings: Settings) -> Plan:
  """Load the networks and put them together.

  Raises:
    ValueError: for a setting that does not suit the model, the guidance or the solver.
    FileNotFoundError: if there is no model.
  """
  model = _load(settings.model, settings)
  texts = _guidances(settings, model)
  names = [parse(text).name for text in texts]
  chosen = [methods.METHODS[name] for name in names]
  classifier = _classifier(settings, model) if any(method.gradient for method in chosen) else None
  for option, value, taken in (
    ("scale", settings.scale, any(method.scale is not None for method in chosen)),
    ("classifier", settings.classifier, classifier is not None),
  ):
    if value is not None and not taken:
      none = ", ".join(names) or "none"
      raise ValueError(f"guidance {none!r} takes no {option}: leave it out, or choose another guidance")
  table = model.config.noise_schedule
  grid = settings.grid or ("respaced" if isinstance(table, schedules.Table) else "karras")
  init = _init(settings, model)
  sigmas = methods.grid(grid, settings.steps, table)
  if init is not None:
    sigmas = sigmas[_first_step(settings, sigmas) :]
  others: list[Model] = []

  def load_other(folder: str) -> Model:
    others.append(_load(folder, settings))
    return others[-1]

  is_ddpm = parse(settings.solver).name == "ddpm"
  shifts = is_ddpm and "classifier" in names
  options = _ddpm(settings, model, shifts) if is_ddpm else {}
  solver = methods.solver(settings.solver, len(sigmas) - 1, **options)
  # How much noise a step of the kind that CFG++ and DDIM take makes anew; None for steps of another kind.
  eta = {solvers.Euler: 0.0, solvers.DDPM: 1.0}.get(type(solver))
  eta = solver.eta if isinstance(solver, solvers.DDIM | solvers.EulerAncestral) else eta
  if isinstance(solver, solvers.EDMStochastic) and np.any(np.asarray(solver.gamma) > 0):
    methods.check_levels(sigmas, "s_min", solver.s_min, "s_max", solver.s_max)
  networks = methods.Networks(model, classifier, load_other, sigmas, eta)
  made = _made(settings, texts, networks)
  if shifts:
    # It goes with the solver and not into the denoiser.
    at = names.index("classifier")
    narrowed = {"sigma_lo", "sigma_hi", "ratio"} & set(parse(texts[at]).options)
    if names.count("classifier") > 1:
      raise ValueError(
        "solver 'ddpm' shifts its mean by one classifier: leave out the others, or choose another solver"
      )
    if narrowed:
      raise ValueError(
        f"solver 'ddpm' shifts its mean by all of the classifier's gradient, at every level: leave out "
        f"{', '.join(sorted(narrowed))}, or choose another solver"
      )
    shift: Any = made.pop(at)
    names.pop(at)
    solver = methods.solver(
      settings.solver, len(sigmas) - 1, **options, **dict(zip(("log_prob", "scale"), shift.parameters, strict=True))
    )
  guidances = _clipped(settings, names, made, model.config.data.bound)
  without_classes = model.config.num_classes is None and model.config.low_res_shape is None
  by_classifier = classifier is not None and all(method.gradient or method.scale is None for method in chosen)
  if without_classes or (by_classifier and model.null_cond is not None):
    guidances = [guide.unconditional(model.null_cond), *guidances]
  cond, labels = _cond(settings, model, classifier)
  return Plan(
    denoiser=guide.chain(*guidances)(model.denoiser),
    solver=solver,
    sigmas=sigmas,
    cond=cond,
    labels=labels,
    image_shape=model.config.image_shape,
    init=init,
    encoder=model.config.data,
    record={
      "network": dataclasses.asdict(model.config),
      "classifier_network": None if classifier is None else dataclasses.asdict(classifier.config),
      "other_networks": [dataclasses.asdict(other.config) for other in others],
    },
    data=(
      model.params,
      None if classifier is None else classifier.params,
      [other.params for other in others],
      cond,
      init,
    ),
  )


def _guidances(settings: Settings, model: Model) -> Sequence[str]:
  """The guidances that are asked for, or those that suit the networks."""
  given = settings.guidance
  if model.config.low_res_shape is not None:
    if given not in (None, ("none",)):
      raise ValueError(f"a model of super-resolution is sampled with guidance 'none', not {', '.join(given)!r}")
    return ()
  if given is not None:
    return () if given == ("none",) else tuple(given)
  if settings.classifier is not None:
    return ("classifier",)
  return () if model.null_cond is None else ("cfg",)


def _made(settings: Settings, texts: Sequence[str], networks: methods.Networks) -> list[Guidance]:
  """Make every guidance; the first that takes a scale has that of the settings."""
  scale, made = settings.scale, []
  for text in texts:
    spec = parse(text)
    takes = methods.METHODS[spec.name].scale is not None
    if takes and scale is not None and "scale" in spec.options:
      raise ValueError(f"scale is given twice, as {scale:g} and in {text!r}: leave out one")
    recommended = None
    if spec.name == "classifier" and networks.classifier is not None:
      recommended = networks.classifier.config.scale
    made.append(methods.build(text, networks, recommended if scale is None or not takes else scale))
    scale = None if takes else scale
  return made


def _clipped(
  settings: Settings, names: Sequence[str], made: Sequence[Guidance], bound: float | None
) -> Sequence[Guidance]:
  """Put the guidances together, and keep x0 within its bound, unless they do so themselves."""
  at = len(made)
  if settings.join == "parallel":
    if not made:
      raise ValueError("there is no guidance in the denoiser to join: leave out join")
    made, at = [guide.parallel(*made)], 1
  elif "classifier" in names:
    # As OpenAI's code: what the network says is clipped, and what the classifier does to it is not.
    at = names.index("classifier")
  clips = settings.clip and not {"clip", "dynamic-threshold"} & set(names)
  return [*made[:at], *([guide.clip_x0(bound)] if clips and bound is not None else []), *made[at:]]


def _ddpm(settings: Settings, model: Model, shifts: bool) -> dict[str, Any]:
  """What the model has to say of ancestral sampling."""
  given = parse(settings.solver).options
  if "gradient_at" in given and not shifts:
    raise ValueError("gradient_at is for solver 'ddpm' with guidance 'classifier', which shifts its mean")
  if given.get("variance") == "learned_range" and model.config.variance != "learned_range":
    raise ValueError(f"the model in {settings.model} has learned no variance: choose small or large")
  return {"variance": model.config.variance}


def _load(folder: PathLike, settings: Settings) -> Model:
  model = training.load(folder)
  fields = {**model.config.fields, "dtype": settings.dtype, "cudnn_attention": settings.cudnn_attention}
  return dataclasses.replace(model, config=dataclasses.replace(model.config, fields=fields))


def _classifier(settings: Settings, model: Model) -> Model:
  folder = settings.classifier or Path(settings.model).parent / "classifier"
  classifier = _load(folder, settings)
  if classifier.config.role is not CLASSIFIER:
    raise ValueError(f"{folder} holds a {classifier.config.network}, not a classifier")
  for name in ("image_shape", "num_classes"):
    ours, theirs = getattr(model.config, name), getattr(classifier.config, name)
    if ours is not None and ours != theirs:
      raise ValueError(f"the classifier in {folder} has {name} {theirs}, but the model has {ours}")
  return classifier


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


def _init(settings: Settings, model: Model) -> np.ndarray | None:
  if settings.init is None:
    return None
  images, _ = data.load_npz(settings.init, labelled=False)
  if images.shape[1:] != model.config.image_shape:
    raise ValueError(
      f"{settings.init} has images of shape {images.shape[1:]}, but the model makes {model.config.image_shape}"
    )
  return images[: settings.num]


def _first_step(settings: Settings, sigmas: Array) -> int:
  """The step of the grid that a walk from an image begins with."""
  levels = np.asarray(sigmas, np.float64)[:-1]
  if settings.init_level is None:
    if len(levels) < 2:
      raise ValueError(
        "half of the steps are walked from init, so that there must be 2 or more: give steps or init_level"
      )
    return len(levels) // 2
  if settings.init_level > levels[0] * 1.01:
    raise ValueError(f"init_level must be at most the grid's first level, {levels[0]:g}, got {settings.init_level:g}")
  return int(np.argmin(np.abs(np.log(levels) - np.log(settings.init_level))))


def _labels(settings: Settings, model: Model, classifier: Model | None) -> np.ndarray | None:
  classes = model.config.num_classes if classifier is None else classifier.config.num_classes
  if classes is None:
    if settings.labels is not None:
      raise ValueError("the model has no classes, and there is no classifier: leave out the labels")
    return None
  wanted = np.arange(classes) if settings.labels is None else np.asarray(settings.labels)
  return np.resize(checks.labels("label", wanted, classes), settings.num).astype(np.int32)
