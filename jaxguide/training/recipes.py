"""Everything that a run is made of, as a TOML file: data, network, training, and how it logs, saves and draws.

The sections of the file are the dataclasses: ``[data]`` is `jaxguide.data.DataConfig`, ``[model]`` is
`jaxguide.models.ModelConfig` without what follows from the data, ``[training]`` is `TrainingConfig` and ``[run]`` is
`RunConfig`. Above them stand ``init_from`` and ``preset``. What the file leaves out is taken from the preset for the
network and the size of the images, and then from the defaults.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxguide import data as datasets
from jaxguide._core import checks, records
from jaxguide.data import DataConfig
from jaxguide.data.config import holds_floats
from jaxguide.data.sources import NAMED
from jaxguide.models import Model, folders, networks, transplant
from jaxguide.models.config import NOT_FIELDS, ModelConfig, default_fields
from jaxguide.models.networks import AUTOENCODER, CLASSIFIER
from jaxguide.training import edm_presets, presets, toml, transformer_presets
from jaxguide.training.config import TrainingConfig
from jaxguide.training.run_config import RunConfig

FROM_DATA = ("image_shape", "num_classes", "class_names", "label_size")
"""The fields of a model that follow from the data."""

PRESETS = ("size", "none")

PUBLISHED = {**transformer_presets.NAMED, **edm_presets.NAMED}
"""The presets of published networks, by name."""

HELD_OUT = 0.1
"""The share of the data that is held out for a classifier by default."""

PATIENCE = 5
"""How many evaluations a classifier trains on by default without getting better on held-out data."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A whole run. `recipe` makes one, with the settings of a preset.

  Args:
    data: the data.
    model: the fields of `ModelConfig` that do not follow from the data.
    training: the training.
    run: how the run logs, saves and draws.
    init_from: the folder of a trained or imported model whose parameters the training begins with, or the name of a
      model of `jaxguide.models.names`.
    source: where the numbers of the preset are from; None without a preset.
  """

  data: DataConfig
  model: Mapping[str, Any]
  training: TrainingConfig
  run: RunConfig = dataclasses.field(default_factory=RunConfig)
  init_from: str | None = None
  source: str | None = None

  @property
  def is_classifier(self) -> bool:
    """Whether the network is a classifier."""
    return networks.find(self.model["network"]).role is CLASSIFIER

  @property
  def held_out(self) -> float:
    """The share of the data that is held out."""
    default = HELD_OUT if self.is_classifier else 0.0
    return default if self.data.held_out is None else self.data.held_out

  def model_config(self, data: Any) -> ModelConfig:
    """Return the configuration of the network for a dataset."""
    return ModelConfig(**self.model, **_from_data(data))

  def text(self) -> str:
    """Return the recipe as a TOML file with every default, which gives the same run again."""
    head = (
      [f"# All settings of a preset, whose values are written out below. Preset: {self.source}\n"]
      if self.source
      else []
    )
    above: dict[str, Any] = {"preset": "none", "init_from": self.init_from}
    parts = [*head, _section("", above, ())]
    for name, values in (("data", self.data), ("model", _complete(self.model)), ("training", self.training)):
      parts.append(_section(name, values, ("fields",)))
    return "\n".join([*parts, _section("run", self.run, ())])


def _section(name: str, values: Any, last: Sequence[str]) -> str:
  """Return a section as TOML. Names without a value are comments, because TOML has no such value."""
  if dataclasses.is_dataclass(values) and not isinstance(values, type):
    values = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
  given = {key: value for key, value in values.items() if value is not None and key not in last}
  text = (f"[{name}]\n" if name else "") + toml.dumps(given)
  text += "".join(f"# {key} =\n" for key, value in values.items() if value is None)
  for key in last:
    if values.get(key):
      text += f"\n[{name}.{key}]\n" + toml.dumps(values[key])
  return text


def _complete(model: Mapping[str, Any]) -> dict[str, Any]:
  """Return the fields of a model with all defaults, also those of the network's own fields."""
  known = default_fields(networks.find(model["network"]))
  fields = {name: value for name, value in known.items() if value is not None}
  defaults = {name: value for name, value in records.defaults(ModelConfig).items() if name not in FROM_DATA}
  return {"network": model["network"], **defaults, **model, "fields": {**fields, **model.get("fields", {})}}


def _from_data(data: Any) -> dict[str, Any]:
  """Return the fields of a model that follow from the data."""
  shape = data.label_shape
  return {
    "image_shape": tuple(data.image_shape),
    "num_classes": data.num_classes,
    "class_names": data.class_names,
    "label_size": shape[0] if shape else None,
  }


def recipe(sections: Mapping[str, Any], data: Any = None) -> Recipe:
  """Make a recipe from nested data, such as a TOML file has it, with the settings of a preset.

  Args:
    sections: ``{"data": {"source": ...}, "model": {...}, "training": {...}, "run": {...}}``; all but ``data`` may be
      left out.
    data: the dataset of ``sections["data"]``, if it is open already; otherwise it is opened, without a check of its
      files, to see its images and classes.

  Raises:
    ValueError: for an unknown section or name, naming the nearest; for a value that is out of range; or if there is no
      preset for the images and no settings instead.
  """
  known = ("data", "model", "training", "run", "init_from", "preset")
  for name in sections:
    checks.lookup("section", name, dict.fromkeys(known))
  named = PUBLISHED.get(str(sections.get("preset")))
  if named is not None:
    sections = {**sections, "model": {"network": named.model["network"], **_table(sections, "model")}}
  _check_places(sections)
  where = toml.fill(DataConfig, "data", sections.get("data", {}))
  model, training, run = ({**_table(sections, name)} for name in ("model", "training", "run"))
  network = model.setdefault("network", "unet")
  model["fields"] = {**_table(model, "fields")} if "fields" in model else {}
  role = networks.find(network).role
  if role is AUTOENCODER:
    raise ValueError("an autoencoder cannot be trained here: import a published one with jaxguide import")
  classifies = role is CLASSIFIER
  init_from = sections.get("init_from")
  if init_from is not None and not isinstance(init_from, str):
    raise ValueError(f"init_from must be the folder of a model, got {init_from!r}")
  for name in model:
    if name in FROM_DATA:
      raise ValueError(f"model.{name} follows from the data: leave it out")
    checks.lookup("name in [model]", name, {field.name: None for field in dataclasses.fields(ModelConfig)})
  source = None
  presets_known = {name: name for name in (*PRESETS, *PUBLISHED)}
  chosen = checks.lookup("preset", sections.get("preset", "size"), presets_known)
  if chosen == "size" or named is not None:
    data = _glance(where) if data is None else data
    if holds_floats(data):
      model.setdefault("encoder", "latents")
    source = _fill_from_preset(model, training, data, init_from, named)
    share = HELD_OUT if where.held_out is None else where.held_out
    if classifies and share and "patience" not in run:
      run["patience"] = PATIENCE
  made = Recipe(
    where,
    model,
    toml.fill(TrainingConfig, "training", training),
    toml.fill(RunConfig, "run", run),
    init_from,
    source,
  )
  for name in ("patience", "held_out_every"):
    if getattr(made.run, name) is not None and not (made.is_classifier and made.held_out):
      raise ValueError(f"run.{name} is for a classifier with held-out data: leave it out")
  return made


def _check_places(sections: Mapping[str, Any]) -> None:
  """Check that no name stands in a section to which it does not belong, such as ``model.steps``."""
  classes = {"data": DataConfig, "model": ModelConfig, "training": TrainingConfig, "run": RunConfig}
  network = networks.find(checks.field("model.network", _table(sections, "model").get("network", "unet"), str)).module
  names = {section: {field.name for field in dataclasses.fields(cls)} for section, cls in classes.items()}
  names["model.fields"] = {field.name for field in dataclasses.fields(network) if field.name not in NOT_FIELDS}
  for section in classes:
    for name in {*_table(sections, section)} - names[section]:
      homes = [home for home, known in names.items() if name in known]
      if homes:
        raise ValueError(f"[{section}] has no {name!r}: write {homes[0]}.{name}")


def _glance(where: DataConfig) -> Any:
  """Open data to see their images and classes alone; what is wrong with files is said when they are opened to train."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    return datasets.open_data(dataclasses.replace(where, check="none", contents=False, cache=False), False)


def _table(sections: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  values = sections.get(name, {})
  if not isinstance(values, Mapping):
    raise ValueError(f"[{name}] must be a section with names and values, got {values!r}")
  return values


def _fill_from_preset(
  model: dict[str, Any], training: dict[str, Any], data: Any, init_from: str | None, named: presets.Preset | None = None
) -> str | None:
  """Add to what is given of a model and its training what the preset for the images has, and return its source.

  The network of a model to begin from takes the place of the preset's.
  """
  network, derived = model["network"], _from_data(data)
  preset, sides = named, tuple(data.image_shape[:2])
  if named is not None and network != named.model["network"]:
    raise ValueError(
      f"the preset is for a {named.model['network']}, and the network is {network}: leave out one of them"
    )
  if named is None and network in presets.PUBLISHED:
    complete = bool(model["fields"]) and "steps" in training
    # Images that are too large for the presets need all settings; this raises the error otherwise.
    if not complete or max(sides) <= max(presets.PUBLISHED[network]):
      preset = presets.preset(network, sides)
  given = model.pop("fields", {})
  if init_from is not None:
    config = transplant.config_from(folders.load(init_from).config, **derived, network=network)
    base = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    _add(model, {name: value for name, value in base.items() if name not in FROM_DATA and value is not None})
    model["fields"] = {**config.fields, **given}
  elif preset is not None:
    config = preset.model_config(derived["image_shape"], derived["num_classes"])
    _add(model, {"low_res_shape": config.low_res_shape} if config.low_res_shape else {})
    _add(model, {name: value for name, value in preset.model.items() if name != "fields"})
    model["fields"] = {**preset.model["fields"], **_fitting_heads(preset.model["fields"], given), **given}
  else:
    model["fields"] = given
  if preset is None:
    return None
  null = ModelConfig(**model, **derived).null_cond
  dropped = {"p_uncond"} if null is None else set()
  discrete = model.get("diffusion_steps") is not None or not isinstance(model.get("schedule", ""), str)
  if "noise" in training or discrete:
    dropped |= {"noise_mean", "noise_std"}
  if "ema" in training:
    dropped |= {"ema_decay"}
  _add(training, {name: value for name, value in preset.training.items() if name not in dropped})
  return preset.source


def _fitting_heads(fields: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """Return the channels of an attention head, if those of the preset do not divide the width that is given."""
  width, heads = given.get("model_channels"), fields.get("num_head_channels", -1)
  if type(width) is not int or width < 1 or heads == -1 or width % heads == 0:
    return {}
  return {"num_head_channels": math.gcd(width, heads)}


def _add(values: dict[str, Any], further: Mapping[str, Any]) -> None:
  """Add values under names that have none."""
  for name, value in further.items():
    values.setdefault(name, value)


def absolute(recipe: Recipe) -> Recipe:
  """Return a recipe whose paths are absolute, so that a run can be continued from another folder."""

  def of(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).exists() else path

  source = str(recipe.data.source)
  data = recipe.data if source in NAMED else dataclasses.replace(recipe.data, source=of(source))
  init_from = None if recipe.init_from is None else of(recipe.init_from)
  return dataclasses.replace(recipe, data=data, init_from=init_from)


def initial_params(recipe: Recipe, config: ModelConfig, key: Any) -> tuple[Any, str]:
  """Return the parameters that a run begins with, made from those of ``init_from``, and what became of them."""
  source: Model = folders.load(str(recipe.init_from))
  params, report = transplant.transplant(config, source, key)
  return params, str(report)
