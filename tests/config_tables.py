"""The tables of ``docs/config.md``: every field of every configuration, from the dataclasses and their docstrings."""

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxguide import nn, schedules, training
from jaxguide._core import keys
from jaxguide._core.specs import described_fields
from jaxguide.cli import train as command
from jaxguide.data import DataConfig, resize
from jaxguide.data import config as data_config
from jaxguide.denoisers import scaling
from jaxguide.denoisers.variational import LOSSES
from jaxguide.distributed import MeshConfig
from jaxguide.evaluation import evidence
from jaxguide.generate import Settings, encoding, settings
from jaxguide.models import ModelConfig, networks
from jaxguide.models import config as model_config
from jaxguide.models.encoders import ENCODERS
from jaxguide.nn.adm.classifier import POOLS
from jaxguide.nn.edm import song
from jaxguide.schedules.posterior import VARIANCES
from jaxguide.training import config as training_config
from jaxguide.training import program, recipes, run_config, run_folder
from jaxguide.training.run_config import RunConfig
from jaxguide.training.writers import WRITERS

SECTIONS = {"data": DataConfig, "model": ModelConfig, "training": training.TrainingConfig, "run": RunConfig}
"""The sections of a recipe."""

BOUNDS: dict[type, Mapping[str, tuple[int | float, int | float]]] = {
  DataConfig: data_config.BOUNDS,
  ModelConfig: model_config.BOUNDS,
  training.TrainingConfig: training_config.TRAINING_BOUNDS,
  RunConfig: run_config.BOUNDS,
  Settings: {
    "init_level": (0, math.inf),
    "vae_tile": (1, math.inf),
    "num": (1, settings.MAX_NUM),
    "steps": (1, math.inf),
    "seed": (0, keys.MAX_SEED),
    "batch_size": (1, math.inf),
  },
  evidence.Options: {
    "resamples": (2, math.inf),
    "neighbours": (1, math.inf),
    "density_neighbours": (1, math.inf),
    "subsets": (1, math.inf),
    "subset_size": (2, math.inf),
    "splits": (1, math.inf),
    "figures_seed": (0, math.inf),
  },
  encoding.Encoding: {"seed": (0, math.inf), "batch_size": (1, math.inf)},
}
"""The least and the largest value of numbers. A test compares them with what the configurations accept."""

OTHER_VALUES = {
  (DataConfig, "channels"): "1 or 3",
  **{(MeshConfig, axis): "-1, or 1 to 2^20" for axis in ("data", "fsdp", "tensor")},
}

CHOICES: dict[type, Mapping[str, Iterable[str]]] = {
  DataConfig: {
    "crop": resize.CROPS,
    "filter": resize.FILTERS,
    "check": data_config.CHECKS,
    "labels": data_config.LABELS,
  },
  ModelConfig: {
    "network": networks.NETWORKS,
    "prediction": scaling.PREDICTIONS,
    "schedule": schedules.SCHEDULES,
    "variance": VARIANCES,
    "encoder": ENCODERS,
  },
  training.TrainingConfig: {
    "loss": LOSSES,
    "remat": training_config.REMAT,
    "low_res_filter": training_config.LOW_RES_FILTERS,
    "matmul_precision": training_config.MATMUL_PRECISIONS,
  },
  RunConfig: {"writers": WRITERS},
  Settings: {
    "join": settings.JOINS,
    "dtype": settings.DTYPES,
    "matmul_precision": training_config.MATMUL_PRECISIONS,
  },
  evidence.Options: {"interval": evidence.INTERVALS},
  encoding.Encoding: {"dtype": encoding.DTYPES},
}
"""The names that a field may have."""

FAMILIES = {
  "adm": ("unet", "super_res_unet", "classifier"),
  "transformers": ("dit", "sit", "repa", "lightningdit"),
  "edm": ("song_unet", "dhariwal_unet", "edm2_unet"),
  "autoencoder": ("autoencoder_kl",),
}

OF_NETWORKS = {
  "dtype": model_config.DTYPES,
  "pool": POOLS,
  "embedding_type": song.EMBEDDINGS,
  "encoder_type": song.ENCODERS,
  "decoder_type": song.DECODERS,
}
"""The names that a field of a network may have."""

NEEDED: dict[type, dict[str, Any]] = {
  DataConfig: {"source": "digits"},
  training.TrainingConfig: {"steps": training_config.STEPS, "batch_size": 2**20},
  RunConfig: {},
  Settings: {"vae": "vae", "init": "samples.npz"},
  evidence.Options: {},
  encoding.Encoding: {"vae": "vae", "samples": True},
}
"""What has to be given, and what else lets every field have its largest value."""

KINDS = {int: "whole number", float: "number", str: "text", bool: "true, false", np.ndarray: "list of numbers"}


def meaning(cls: type, name: str) -> str:
  """Give the text of a field: its entry under Args of its class, of one that this derives from, or of one it names.

  Raises:
    KeyError: if there is none.
  """
  for each in inspect.getmro(cls):
    found = described_fields(each).get(name)
    if found is not None:
      return found
  for other in re.findall(r"other fields are those\s+of `(\w+)`", cls.__doc__ or ""):
    return meaning(getattr(nn, other), name)
  raise KeyError(f"{cls.__name__} does not say what {name} is")


def kind(annotation: Any) -> str:
  """Say what type a field has, as TOML knows it."""
  members = typing.get_args(annotation)
  if typing.get_origin(annotation) in (typing.Union, types.UnionType):
    kinds = {member: None for member in members if member is not type(None)}
    if int in kinds and float in kinds:
      del kinds[int]
    if str in kinds and len(kinds) > 1:  # A path, or a text or a number.
      kinds = {member: None for member in kinds if getattr(member, "__module__", "") != "os"}
    return " or ".join(dict.fromkeys(map(kind, kinds)))
  if typing.get_origin(annotation) in (list, tuple) or annotation is Sequence:
    return f"list of {kind(members[0])}s"
  if typing.get_origin(annotation) is Sequence:
    element = kind(members[0])
    return "list of " + {"whole number or text": "whole numbers or texts"}.get(element, f"{element}s")
  if typing.get_origin(annotation) is Mapping:
    return "section"
  return KINDS.get(annotation, "any")


def value(thing: Any) -> str:
  """Write a default as TOML has it."""
  if thing is dataclasses.MISSING:
    return "needed"
  if thing is None:
    return ""
  if isinstance(thing, bool):
    return f"`{str(thing).lower()}`"
  if isinstance(thing, tuple | list):
    return f"`[{', '.join(value(item).strip('`') for item in thing)}]`"
  if isinstance(thing, str):
    return f'`"{thing}"`'
  if isinstance(thing, int | float):
    return f"`{thing}`"
  return f'`"{np.dtype(thing).name}"`'


def number(thing: float) -> str:
  """Write a bound."""
  for text, shift in (("", 0), (" - 1", 1)):
    exponent = math.log2(thing + shift) if thing > 0 else 0
    if thing > 2**16 and exponent == int(exponent) and 2 ** int(exponent) - shift == thing:
      return f"2^{int(exponent)}{text}"
  if 0 < thing < 0.01 and math.log2(thing) == int(math.log2(thing)):
    return f"1/{int(1 / thing):,}"
  return f"{int(thing):,}" if thing == int(thing) else f"{thing:g}"


def span(low: float, high: float, above: bool = False, below: bool = False) -> str:
  """Write a range."""
  if math.isinf(low):
    return ""
  start = f"above {number(low)}" if above else number(low)
  if math.isinf(high):
    return start if above else f"at least {start}"
  end = f"below {number(high)}" if below else number(high)
  return f"{start}, {'' if below else 'at most '}{end}" if above else f"{start} to {end}"


def allowed(cls: type, name: str) -> str:
  """Write what values a field may have, beyond its type."""
  if (cls, name) in OTHER_VALUES:
    return OTHER_VALUES[cls, name]
  if name in CHOICES.get(cls, {}):
    return ", ".join(f"`{choice}`" for choice in CHOICES[cls][name])
  if name not in BOUNDS.get(cls, {}):
    return ""
  low, high = BOUNDS[cls][name]
  if cls not in NEEDED:
    return span(low, high)
  return span(low, high, not accepts(cls, name, low), not accepts(cls, name, high))


def accepts(cls: type, name: str, given: float) -> bool:
  """Whether a configuration may have a value, which can be infinite."""
  if math.isinf(given):
    return True
  try:
    made(cls, name, given)
  except ValueError:
    return False
  return True


def made(cls: type, name: str, given: Any) -> Any:
  """Make a configuration with one value, as its annotation has numbers."""
  hint = typing.get_type_hints(cls)[name]
  if typing.get_origin(hint) is Sequence:
    given = (given,)
  elif hint is float or (float in typing.get_args(hint) and int not in typing.get_args(hint)):
    given = float(given)
  return cls(**{**NEEDED[cls], name: given})


def text(words: str) -> str:
  """Write a docstring's words as Markdown, on one line of a table."""
  words = words.replace("``", "`")
  words = re.sub(r"arXiv:([0-9.]+[0-9])", r"[\1](https://arxiv.org/abs/\1)", words)
  if not re.match(r"\w\b", words):  # A letter of the field's, such as k, stays small.
    words = words[:1].upper() + words[1:]
  return words.replace("|", "\\|").replace("**", "\\*\\*")


def option(section: str, name: str) -> str:
  """Give the option of ``jaxguide train`` that sets a field; empty if it has none of its own."""
  own = {"data.source": "data", "run.writers": "writer", "model.network": "network"}
  if name in command.SECTIONS.get(section, ()) or f"{section}.{name}" in own:
    return f"`--{own.get(f'{section}.{name}', name).replace('_', '-')}`"
  return ""


HEAD = ["field", "value", "meaning"]


def entry(kind_of: str, default: str, values: str, own_option: str = "") -> str:
  """Say in one cell what a field takes: its type and values, its default, and its option."""
  is_names = values.startswith("`")
  is_text = kind_of == "text" or kind_of.startswith("text or ")
  takes = values + kind_of.removeprefix("text") if is_names and is_text else ", ".join(filter(None, (kind_of, values)))
  default = {"": "", "needed": "needed"}.get(default, f"default {default}")
  return "; ".join(filter(None, (takes, default, own_option)))


def of_section(section: str) -> Callable[[], list[list[str]]]:
  """The fields of a section of a recipe."""

  def make() -> list[list[str]]:
    cls = SECTIONS[section]
    left_out = (*recipes.FROM_DATA, "fields") if section == "model" else ()
    hints, rows = typing.get_type_hints(cls), [HEAD]
    for field in dataclasses.fields(cls):
      if field.name in left_out:
        continue
      is_network = (section, field.name) == ("model", "network")
      facts = ("text", '`"unet"`') if is_network else (kind(hints[field.name]), value(field.default))
      takes = entry(*facts, allowed(cls, field.name), option(section, field.name))
      rows.append([f"`{field.name}`", takes, text(meaning(cls, field.name))])
    return rows

  return make


def of_class(cls: type) -> Callable[[], list[list[str]]]:
  """The fields of a dataclass."""

  def make() -> list[list[str]]:
    hints, rows = typing.get_type_hints(cls), [HEAD]
    for field in dataclasses.fields(cls):
      takes = entry(kind(hints[field.name]), value(field.default), allowed(cls, field.name))
      rows.append([f"`{field.name}`", takes, text(meaning(cls, field.name))])
    return rows

  return make


def of_data_model() -> list[list[str]]:
  """The fields of a model that follow from the data."""
  hints, rows = typing.get_type_hints(ModelConfig), [HEAD]
  for name in recipes.FROM_DATA:
    takes = entry(kind(hints[name]), "", allowed(ModelConfig, name))
    rows.append([f"`{name}`", takes, text(meaning(ModelConfig, name))])
  return rows


def own_fields(network: str) -> dict[str, dataclasses.Field[Any]]:
  """Give the fields of a network that a configuration may set."""
  found = networks.find(network)
  left_out = (*model_config.NOT_FIELDS, found.role.classes, "label_size", "perturbation")
  return {field.name: field for field in dataclasses.fields(found.module) if field.name not in left_out}


def of_networks(family: str) -> Callable[[], list[list[str]]]:
  """The fields of the networks of a family. What differs between the networks is said for each."""

  def make() -> list[list[str]]:
    names = FAMILIES[family]
    rows = [HEAD]
    for field in dict.fromkeys(field for name in names for field in own_fields(name)):
      texts: dict[str, list[str]] = {}
      for name in names:
        if field in own_fields(name):
          texts.setdefault(meaning(networks.find(name).module, field), []).append(name)
      for words, having in texts.items():
        hints = typing.get_type_hints(networks.find(having[0]).module)
        which = "" if len(having) == len(names) else f" of {', '.join(f'`{name}`' for name in having)}"
        type_of = "text" if field == "dtype" else kind(hints[field])
        takes = entry(type_of, _defaults(field, having), _values(field, having[0]))
        rows.append([f"`{field}`{which}", takes, text(words)])
    return rows

  return make


def _defaults(field: str, names: Sequence[str]) -> str:
  found: dict[str, list[str]] = {}
  for name in names:
    found.setdefault(value(own_fields(name)[field].default), []).append(name)
  if len(found) == 1:
    return next(iter(found))
  return ", ".join(
    f"{default or 'none'} ({', '.join(f'`{each}`' for each in having)})" for default, having in found.items()
  )


def _values(field: str, network: str) -> str:
  if field in OF_NETWORKS:
    return ", ".join(f"`{name}`" for name in OF_NETWORKS[field])
  bounds = networks.find(network).bounds.get(field)
  return "" if bounds is None else span(*bounds)


def of_changeable() -> list[list[str]]:
  """The settings that may differ when a run is continued."""
  rows = [["section", "may change"]]
  for section in ("training", "data", "run"):
    names = sorted(name.partition(".")[2] for name in run_folder.CHANGEABLE if name.startswith(f"{section}."))
    if section == "data":
      free = [field.name for field in dataclasses.fields(DataConfig) if field.name not in program.SAME_DATA]
      texts = [*(f"`{name}`" for name in free), "if the examples of before are all there; there may be more"]
    elif section == "run":
      texts = ["all"]
    else:
      texts = [f"`{name}`" for name in names]
    rows.append([f"`[{section}]`", ", ".join(texts)])
  return rows


TABLES: dict[str, Callable[[], list[list[str]]]] = {
  **{f"section {section}": of_section(section) for section in SECTIONS},
  "model from data": of_data_model,
  **{f"networks {family}": of_networks(family) for family in FAMILIES},
  "continued": of_changeable,
  "sample": of_class(Settings),
  "figures": of_class(evidence.Options),
  "encode": of_class(encoding.Encoding),
  "mesh": of_class(MeshConfig),
}


def example() -> str:
  """Give the recipe that ``jaxguide train --data digits --print-config`` prints."""
  return f"```toml\n{recipes.recipe({'data': {'source': 'digits'}}).text()}```"
