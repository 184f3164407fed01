"""From settings to a plan: a guided denoiser, a solver, and the noise levels of the walk."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxguide import data, models, schedules
from jaxguide import guidance as guide
from jaxguide._core import checks, specs
from jaxguide._core.files import PathLike
from jaxguide._core.typing import Array, Denoiser, Guidance, Solver
from jaxguide.generate import latents
from jaxguide.generate.classes import classes_of, names_of, number_of, numbered
from jaxguide.generate.guidances import BOUNDS, GuidanceSpec
from jaxguide.generate.methods import Networks
from jaxguide.generate.settings import Settings
from jaxguide.generate.walks import GridSpec, check_walk, ddim_eta
from jaxguide.models import pretrained
from jaxguide.models.config import ModelConfig
from jaxguide.models.encoders import Encoder
from jaxguide.models.model import Model
from jaxguide.models.networks import CLASSIFIER, DENOISER

CONSISTENCY = "consistency"
"""The prediction of consistency models, and the solver and the grid that they are sampled with."""


class Plan(NamedTuple):
  """What is run.

  Args:
    settings: the settings, in which classes that were named are numbers.
    denoiser: the guided denoiser.
    solver: the solver, which holds the classifier if that shifts the mean.
    sigmas: (steps + 1,) the noise levels of the walk.
    cond: the condition of every sample.
    labels: the label of every sample; None where there are no classes.
    class_names: the names of the classes; None where they have none.
    image_shape: the shape of one sample.
    file_shape: the shape of one picture in the file; another one than ``image_shape`` where latents are decoded.
    init: (n, *file_shape) stored examples that samples start from in turn; None where they start from noise.
    encoder: how ``x0`` becomes what the file holds.
    record: what the networks are, as plain data.
    data: all arrays that the samples depend on.
  """

  settings: Settings
  denoiser: Denoiser
  solver: Solver
  sigmas: Array
  cond: Any
  labels: np.ndarray | None
  class_names: Sequence[str] | None
  image_shape: Sequence[int]
  file_shape: Sequence[int]
  init: np.ndarray | None
  encoder: Encoder
  record: Any
  data: Any


Load = Callable[[PathLike], Model]


def plan(settings: Settings, load: Load = models.load) -> Plan:
  """Load the networks and put them together.

  Args:
    settings: everything that the samples depend on.
    load: loads the model of a folder.

  Raises:
    ValueError: for a setting that does not suit the model, the guidance or the solver.
    FileNotFoundError: if there is no model.
  """
  load = functools.partial(_load, settings, load)
  model = load(settings.model)
  if model.config.role is not DENOISER:
    raise ValueError(f"the model in {settings.model} is {_kind(model)}, and samples are drawn from a denoiser")
  vae = _vae(settings, model)
  chosen = chosen_of(settings, model)
  classifier = _classifier(settings, model, load) if any(spec.method.gradient for spec in chosen) else None
  _check_unused(settings, model, chosen, classifier, load)
  if settings.guidance is None and not chosen:
    warn_unguided(settings.model, model, stacklevel=3)
  settings, class_names = by_number(settings, model, classifier)
  chosen = chosen_of(settings, model)
  file_shape = model.config.image_shape if vae is None else vae.image_shape(model.config.image_shape)
  init = _init(settings, file_shape)
  _check_solver(settings, model)
  sigmas = _sigmas(settings, model)
  shifts_mean = settings.solver_spec.name == "ddpm" and any(spec.name == "classifier" for spec in chosen)
  solver = settings.solver_spec.build(len(sigmas) - 1, **_solver_defaults(settings, model, shifts_mean))
  check_walk(solver, sigmas)
  others: list[Model] = []

  def load_other(folder: str) -> Model:
    others.append(load(folder))
    return others[-1]

  networks = Networks(model, classifier, load_other, sigmas, ddim_eta(solver))
  guidances = list(zip(chosen, _built(settings, chosen, networks), strict=True))
  if shifts_mean:
    solver, guidances = _move_into_solver(solver, guidances)
  steps = _clipped(settings, guidances, model.config.data.bound)
  if _runs_unconditionally(model, chosen):
    steps = [guide.unconditional(model.null_cond), *steps]
  cond, labels = _cond(settings, model, classifier)
  others += [] if vae is None else [vae.model]
  every_model = [model, *([] if classifier is None else [classifier]), *others]
  return Plan(
    settings=settings,
    denoiser=guide.chain(*steps)(model.denoiser),
    solver=solver,
    sigmas=sigmas,
    cond=cond,
    labels=labels,
    class_names=class_names,
    image_shape=model.config.image_shape,
    file_shape=file_shape,
    init=init,
    encoder=model.config.data if vae is None else vae.encoder,
    record={
      "network": dataclasses.asdict(model.config),
      "classifier_network": None if classifier is None else dataclasses.asdict(classifier.config),
      "other_networks": [dataclasses.asdict(other.config) for other in others],
    },
    data=([part.params for part in every_model], cond, init),
  )


def chosen_of(settings: Settings, model: Model) -> Sequence[GuidanceSpec]:
  """Give the guidances that are named, or those that suit the networks."""
  if model.config.low_res_shape is not None:
    if settings.guidance not in (None, ("none",)):
      raise ValueError(
        f"a model of super-resolution is sampled with guidance 'none', not {', '.join(settings.guidance)!r}"
      )
    return ()
  if settings.guidance_specs is not None:
    return settings.guidance_specs
  if settings.classifier is not None:
    return (GuidanceSpec.parse("classifier"),)
  return () if model.null_cond is None else (GuidanceSpec.parse("cfg"),)


def warn_unguided(folder: PathLike, model: Model, stacklevel: int) -> None:
  """Warn that a model which takes labels is not guided by them, where no guidance was named.

  It has no null class, so classifier-free guidance is not the default, and its samples are those of the labels as they
  are. A model without labels is not meant, nor one of super-resolution.
  """
  if model.config.num_classes is None or model.config.low_res_shape is not None:
    return
  own = "; a network of your own has one if its attribute null_class is true" if ":" in model.config.network else ""
  warnings.warn(
    f"the model in {folder} has no null class{own}: the samples have their labels, but no guidance. Give a classifier "
    "(--classifier), another guidance such as autoguidance, or guidance 'none' to say that none is wanted",
    stacklevel=stacklevel + 1,
  )


def _check_unused(
  settings: Settings, model: Model, chosen: Sequence[GuidanceSpec], classifier: Model | None, load: Load
) -> None:
  """Check that a scale is used, and warn of a classifier that is not. Such a classifier must fit the model, too."""
  names = ", ".join(spec.name for spec in chosen) or "none"
  if settings.scale is not None and not any(spec.takes_scale for spec in chosen):
    why = ""
    if settings.guidance is None and not chosen and model.null_cond is None:
      why = " (none is the default of a model that has no null class)"
    raise ValueError(f"guidance {names!r} takes no scale{why}: leave it out, or choose another guidance")
  if settings.classifier is not None and classifier is None:
    _classifier(settings, model, load)
    warnings.warn(
      f"guidance {names!r} does not use the classifier; it does with guidance 'classifier' beside it", stacklevel=3
    )


def _check_solver(settings: Settings, model: Model) -> None:
  if model.config.prediction == CONSISTENCY != settings.solver_spec.name:
    raise ValueError(
      f"the model in {settings.model} is a consistency model, which gives a clean example in one step and not the mean "
      f"that solver {settings.solver_spec.name!r} needs: give solver 'consistency' (--solver consistency --steps 2)"
    )


def _sigmas(settings: Settings, model: Model) -> Array:
  """Give the levels of the walk: the grid, or its end if the walk starts from images."""
  sigmas = grid_of(settings, model).levels(settings.steps, model.config.noise_schedule)
  return sigmas if settings.init is None else sigmas[_first_step(settings, sigmas) :]


def grid_of(settings: Settings, model: Model) -> GridSpec:
  """Give the grid that is named, or that which suits the model."""
  default = "respaced" if isinstance(model.config.noise_schedule, schedules.Table) else "karras"
  if model.config.prediction == CONSISTENCY:
    default = CONSISTENCY
  return settings.grid_spec or GridSpec.parse(default)


def _solver_defaults(settings: Settings, model: Model, shifts_mean: bool) -> dict[str, Any]:
  """Give the fields of the solver that follow from the model."""
  if settings.solver_spec.name != "ddpm":
    return {}
  options = settings.solver_spec.options
  if "gradient_at" in options and not shifts_mean:
    raise ValueError("gradient_at is for solver 'ddpm' with guidance 'classifier', which shifts its mean")
  if options.get("variance") == "learned_range" and model.config.variance != "learned_range":
    raise ValueError(f"the model in {settings.model} has learned no variance: choose small or large")
  return {"variance": model.config.variance}


def _built(settings: Settings, chosen: Sequence[GuidanceSpec], networks: Networks) -> list[Guidance]:
  """Build the guidances. The scale of the settings goes to the first that takes one."""
  scales = scales_of(settings, chosen, networks.classifier)
  return [spec.build(networks, scale) for spec, scale in zip(chosen, scales, strict=True)]


def scales_of(settings: Settings, chosen: Sequence[GuidanceSpec], classifier: Model | None) -> list[float | int | None]:
  """Give the scale of each guidance: its own, that of the settings, or its default; None where it takes none."""
  scale, found = settings.scale, []
  for spec in chosen:
    if spec.takes_scale and scale is not None and "scale" in spec.options:
      raise ValueError(f"scale is given twice, as {scale:g} and in {spec.text!r}: leave out one")
    recommended = classifier.config.scale if spec.name == "classifier" and classifier is not None else None
    default = spec.method.scale if recommended is None else recommended
    own = spec.options.get("scale", default if scale is None else scale)
    found.append(own if spec.takes_scale else None)
    scale = None if spec.takes_scale else scale
  return found


Named = tuple[GuidanceSpec, Guidance]


def _move_into_solver(solver: Solver, guidances: list[Named]) -> tuple[Solver, list[Named]]:
  """Move the classifier from the guidances into the solver ``ddpm``, which shifts its mean by the gradient."""
  (spec, guidance), *more = [named for named in guidances if named[0].name == "classifier"]
  if more:
    raise ValueError("solver 'ddpm' shifts its mean by one classifier: leave out the others, or choose another solver")
  narrowed = {"ratio", *(name for pair in BOUNDS.values() for name in pair)} & set(spec.options)
  if narrowed:
    raise ValueError(
      f"solver 'ddpm' shifts its mean by all of the classifier's gradient, at every level: leave out "
      f"{', '.join(sorted(narrowed))}, or choose another solver"
    )
  rule: Any = guidance
  log_prob, scale = rule.parameters[:2]
  shifted: Any = solver
  return (
    dataclasses.replace(shifted, log_prob=log_prob, scale=scale, every=spec.options.get("every", 1)),
    [named for named in guidances if named[0] is not spec],
  )


def _clipped(settings: Settings, guidances: Sequence[Named], bound: float | None) -> Sequence[Guidance]:
  """Join the guidances, and clip x0 to its bound unless one of them does."""
  names, steps = [spec.name for spec, _ in guidances], [guidance for _, guidance in guidances]
  at = len(steps)
  if settings.join == "parallel":
    if not steps:
      raise ValueError("there is no guidance in the denoiser to join: leave out join")
    steps, at = [guide.parallel(*steps)], 1
  elif "classifier" in names:
    # As in OpenAI's code: the network's prediction is clipped, and the change by the classifier is not.
    at = names.index("classifier")
  if bound is None or not settings.clip or {"clip", "dynamic-threshold"} & set(names):
    return steps
  return [*steps[:at], guide.clip_x0(bound), *steps[at:]]


def _runs_unconditionally(model: Model, chosen: Sequence[GuidanceSpec]) -> bool:
  """Whether the model runs without labels: it has no classes, or only classifiers guide and it has a null label."""
  if model.config.num_classes is None and model.config.low_res_shape is None:
    return True
  by_classifier = any(spec.method.gradient for spec in chosen)
  only_classifiers = all(spec.method.gradient or not spec.takes_scale for spec in chosen)
  return by_classifier and only_classifiers and model.null_cond is not None


def _load(settings: Settings, load: Load, folder: PathLike) -> Model:
  """Load a model, and let its network compute as the settings say."""
  model = load(folder)
  known = {field.name for field in dataclasses.fields(model.config.module)}
  fields = dict(model.config.fields)
  for name, value, default in (
    ("dtype", settings.dtype, "float32"),
    ("cudnn_attention", settings.cudnn_attention, None),
  ):
    if name in known:
      fields[name] = value
    elif value != default:
      raise ValueError(f"the network in {folder}, a {model.config.network}, has no field {name}: leave it out")
  return dataclasses.replace(model, config=dataclasses.replace(model.config, fields=fields))


def classifier_folder(settings: Settings) -> PathLike:
  """Return the folder of the classifier: the one that is named, or that which belongs to the model."""
  own = settings.classifier or pretrained.classifier_of(settings.model)
  return own or Path(settings.model).parent / "classifier"


def _classifier(settings: Settings, model: Model, load: Load) -> Model:
  folder = classifier_folder(settings)
  if settings.classifier is None and not models.exists(folder):
    raise FileNotFoundError(
      f"guidance by a classifier needs one, and there is none in {folder}: give classifier (--classifier)"
    )
  classifier = load(folder)
  if classifier.config.role is not CLASSIFIER:
    raise ValueError(f"{folder} holds a {classifier.config.network}, not a classifier")
  for name in ("image_shape", "num_classes"):
    ours, theirs = getattr(model.config, name), getattr(classifier.config, name)
    if ours is not None and ours != theirs:
      raise ValueError(f"the classifier in {folder} has {name} {theirs}, but the model has {ours}")
  ours, theirs = model.config.class_names, classifier.config.class_names
  if ours is not None and theirs is not None and ours != theirs:
    label = next(label for label, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
    raise ValueError(
      f"the classifier in {folder} has other classes than the model: class {label} is {theirs[label]!r}, but "
      f"{ours[label]!r} in the model"
    )
  return classifier


def _cond(settings: Settings, model: Model, classifier: Model | None) -> tuple[Any, np.ndarray | None]:
  """Give every sample's condition, and the label in it."""
  if model.config.label_size is not None:
    raise ValueError(
      f"the model in {settings.model} takes labels that are vectors of {model.config.label_size} numbers, which cannot "
      "be given here: sample it in Python, sample_batch(..., cond=vectors)"
    )
  shape = model.config.low_res_shape
  if (shape is None) != (settings.base_samples is None):
    needs = "takes no base_samples, which are for models of super-resolution: leave them out"
    if shape is not None:
      needs = f"needs base_samples (--base-samples FILE), low-resolution images: {base_samples_of(model.config)}"
    raise ValueError(f"the model {needs}")
  if settings.base_samples is None:
    labels = _labels(settings, model, classifier)
    return labels, labels
  images, labels = data.load_npz(settings.base_samples, labelled=False)
  if images.shape[1:] != shape:
    raise ValueError(f"{settings.base_samples} has images of shape {images.shape[1:]}, but the model takes {shape}")
  if settings.labels is not None:
    raise ValueError("the labels are those of base_samples: leave out others")
  rows = np.arange(settings.num) % len(images)
  low_res = images[rows]  # The network takes uint8, which needs a quarter of the memory of floats.
  if model.config.num_classes is None:
    return {"low_res": low_res}, None
  if labels is None:
    raise ValueError(f"{settings.base_samples} has no labels, which the model needs: it must have them in arr_1")
  labels = checks.labels("label", labels[rows], model.config.num_classes).astype(np.int32)
  return {"label": labels, "low_res": low_res}, labels


def base_samples_of(config: ModelConfig) -> str:
  """Say what the file of the low-resolution images of a model has to hold."""
  height, width, channels = config.low_res_shape or ()
  labels = "" if config.num_classes is None else ", and their labels (images,) as arr_1"
  return f"an .npz with uint8 images of shape (images, {height}, {width}, {channels}) as arr_0{labels}"


def _kind(model: Model) -> str:
  role = model.config.role.name
  named = "" if role == model.config.network else f" ({model.config.network})"
  return f"{'an' if role[0] in 'aeiou' else 'a'} {role}{named}"


def _vae(settings: Settings, model: Model) -> latents.Vae | None:
  """Load the autoencoder of a model that makes latents.

  Raises:
    ValueError: if there is none, the model makes pixels, or its latents have other channels.
  """
  if model.config.encoder != "latents":
    if settings.vae is not None:
      raise ValueError(f"the model in {settings.model} makes pixels, and needs no autoencoder: leave out vae")
    return None
  if settings.vae is None:
    raise ValueError(
      f"the model in {settings.model} makes latents, which are no pictures yet: give their autoencoder, vae "
      "(--vae FILE)"
    )
  vae = latents.Vae.load(settings.vae, settings.vae_tile)
  ours, theirs = model.config.image_shape[-1], vae.autoencoder.module.latent_channels
  if ours != theirs:
    raise ValueError(
      f"the model in {settings.model} makes latents of {ours} channels, and the autoencoder in {settings.vae} takes "
      f"{theirs}: give the one that the model was trained with"
    )
  return vae


def _init(settings: Settings, shape: Sequence[int]) -> np.ndarray | None:
  if settings.init is None:
    return None
  images, _ = data.load_npz(settings.init, labelled=False)
  if images.shape[1:] != tuple(shape):
    raise ValueError(f"{settings.init} has images of shape {images.shape[1:]}, but the model makes {tuple(shape)}")
  return images[: settings.num]


def _first_step(settings: Settings, sigmas: Array) -> int:
  """Give the step of the grid at which a walk from an image begins."""
  levels = np.asarray(sigmas, np.float64)[:-1]
  if settings.init_level is None:
    if len(levels) < 2:
      raise ValueError(
        "without init_level half of the steps are walked, and there must be 2 or more: give steps or init_level"
      )
    return len(levels) // 2
  if not levels[-1] / 1.01 <= settings.init_level <= levels[0] * 1.01:
    raise ValueError(
      f"init_level must lie between the grid's least and first level, {levels[-1]:g} and {levels[0]:g}, got "
      f"{settings.init_level:g}"
    )
  return int(np.argmin(np.abs(np.log(levels) - np.log(settings.init_level))))


def by_number(settings: Settings, model: Model, classifier: Model | None) -> tuple[Settings, Sequence[str] | None]:
  """Replace names of classes in the settings by their numbers, and give the names of all classes."""
  names = names_of(model, classifier)
  if settings.guidance is not None:
    texts = tuple(_numbered(text, names) for text in settings.guidance)
    settings = dataclasses.replace(settings, guidance=texts)
  if settings.labels is None:
    return settings, names
  if classes_of(model, classifier) is None and model.config.label_size is None:
    raise ValueError("the model has no classes, and there is no classifier: leave out the labels (--label)")
  return dataclasses.replace(settings, labels=tuple(number_of(label, names) for label in settings.labels)), names


def _numbered(text: str, names: Sequence[str] | None) -> str:
  """Write the classes in the text of a guidance as numbers."""
  spec = specs.parse(text)
  if "labels" not in spec.options:
    return text
  options = {**spec.options, "labels": numbered(spec.options["labels"], names)}
  return f"{spec.name}:{','.join(f'{name}={value}' for name, value in options.items())}"


def _labels(settings: Settings, model: Model, classifier: Model | None) -> np.ndarray | None:
  classes = classes_of(model, classifier)
  if classes is None:
    return None
  labels = np.arange(classes) if settings.labels is None else np.asarray(settings.labels)
  return np.resize(checks.labels("label", labels, classes), settings.num).astype(np.int32)
