"""Families of published networks: how each is recognised, which configuration it has, and where its weights go.

To add a family, write a file with its `Family` beside this one, and add it to `FAMILIES`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxguide._core import checks
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers.layouts import Infer, Layout, first


class Family(NamedTuple):
  """Networks whose state dicts have the same form of names.

  Args:
    name: its name, for ``--family``.
    title: what it is, for messages.
    networks: the names in `jaxguide.models.networks.NETWORKS` that it covers.
    claims: ``names -> bool``, whether a state dict with these names is one of the family. It looks at a few names that
      no other family has, so that an incomplete file is recognised too. Where several families claim one, the user is
      asked.
    infer: ``(tensors, **given) -> ModelConfig``. ``tensors`` are the tensors by name: each has a ``shape``, and
      ``np.asarray`` reads it. ``given`` are the settings that names and shapes do not determine: ``heads``, the number
      of attention heads, and others by the names of fields. It raises ValueError if a name that it needs is missing, if
      a setting is missing (`jaxguide.models.importers.layouts.required`), or if one is unknown.
    layout: ``config -> Layout``.
    settings: what each setting is that ``infer`` takes, by name.
    usage: ``config -> lines``, what a user of exported weights must know: the call in Python that makes the published
      network, and differences. It raises ValueError if the network cannot be exported.
    presets: configurations of published models, by name.
    prepare: ``tensors -> tensors``: removes what a published file holds beside the network, such as a prefix of all
      names, before anything else; or gives the tensors the names of another form of the network.
    restore: ``(state_dict, config) -> state_dict``, the inverse of ``prepare``, for export.
    complete: ``(tensors, config) -> tensors``: adds what some published files leave out because it follows from the
      configuration, such as a table of positions.
    beside: ``file -> settings``: settings that published files beside the weights hold, such as a configuration. Those
      that are given replace them. It raises ValueError if such a file is damaged.
    stated: ``(class, arguments) -> settings``, the settings for ``infer`` that a pickled network states: the name of
      its class, and the arguments that it was made with by name. It raises ValueError for a class of another network.
  """

  name: str
  title: str
  networks: tuple[str, ...]
  claims: Callable[[Collection[str]], bool]
  infer: Infer
  layout: Callable[[ModelConfig], Layout]
  settings: Mapping[str, str] = MappingProxyType({})
  usage: Callable[[ModelConfig], Sequence[str]] = lambda config: ()
  presets: Mapping[str, ModelConfig] = MappingProxyType({})
  prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda tensors: tensors
  beside: Callable[[Path], Mapping[str, Any]] = lambda file: {}
  restore: Callable[[Mapping[str, Any], ModelConfig], Mapping[str, Any]] = lambda state_dict, config: state_dict
  complete: Callable[[Mapping[str, Any], ModelConfig], Mapping[str, Any]] = lambda tensors, config: tensors
  stated: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] = lambda name, arguments: {}


def families() -> dict[str, Family]:
  """Return the families by name."""
  from jaxguide.models.importers import dit, dit_diffusers, edm, edm2, openai, vae

  found = (
    openai.FAMILY,
    *dit.FAMILIES,
    dit_diffusers.FAMILY,
    edm.FAMILY,
    edm2.FAMILY,
    *vae.FAMILIES,
  )
  return {family.name: family for family in found}


def recognise(names: Collection[str]) -> Family:
  """Return the family that a state dict belongs to, by its names.

  Raises:
    ValueError: if it is none of them, naming its first names; or if it can be one of several.

  >>> recognise(["time_embed.0.weight", "input_blocks.0.0.weight"]).name
  'adm'
  """
  found = [family for family in families().values() if family.claims(names)]
  if len(found) > 1:
    options = "; ".join(f"--family {family.name} ({family.title})" for family in found)
    raise ValueError(f"names and shapes are the same in several families, so the family must be given: {options}")
  if found:
    return found[0]
  known = ", ".join(family.title for family in families().values())
  raise ValueError(f"its names ({first(list(names))}) are of no family that can be imported; known are {known}")


def of_network(network: str, family: str | None = None) -> Family:
  """Return the family whose names a model is exported under.

  Args:
    network: the name of the model's network.
    family: the name of the family; None for the first that has the network.

  Raises:
    ValueError: if no family has it.
  """
  fitting = {name: each for name, each in families().items() if network in each.networks}
  if not fitting:
    raise ValueError(f"a {network} has no published form that it could be exported to")
  return checks.lookup(f"family of a {network}", family or next(iter(fitting)), fitting)
