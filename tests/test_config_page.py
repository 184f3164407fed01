"""The page of the configurations: its tables say what the code accepts, and its examples are read."""

import dataclasses
import math
import re
import tomllib

import config_tables
import numpy as np
import public_names
import pytest

from jaxguide import data, training
from jaxguide.models import networks

PAGE = (public_names.DOCS / "config.md").read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)

CHOICES = [
  (cls, name) for cls, fields in config_tables.CHOICES.items() if cls in config_tables.NEEDED for name in fields
]
RANGES = [(cls, name) for cls, fields in config_tables.BOUNDS.items() if cls in config_tables.NEEDED for name in fields]


def made(cls, **given):
  return cls(**{**config_tables.NEEDED[cls], **given})


@pytest.mark.parametrize(("cls", "name"), CHOICES, ids=str)
def test_names_are_those_that_the_code_takes(cls, name):
  with pytest.raises(ValueError, match="There are ") as error:
    made(cls, **{name: "none such"})
  assert str(error.value).endswith(f"There are {', '.join(sorted(config_tables.CHOICES[cls][name]))}")


@pytest.mark.parametrize("cls", config_tables.NEEDED)
def test_no_field_with_a_list_of_names_is_left_out(cls):
  hints = {field.name for field in dataclasses.fields(cls)} - set(config_tables.CHOICES.get(cls, ()))
  named = {}
  for name in hints:
    try:
      made(cls, **{name: "none such"})
    except (ValueError, TypeError) as error:
      named[name] = str(error)
  specs = {"rate", "ema", "weight", "noise", "optimizer", "solver", "grid", "guidance", "mesh"}  # Names with options.
  assert {name for name, message in named.items() if "There are" in message} <= specs


@pytest.mark.parametrize(("cls", "name"), RANGES, ids=str)
def test_ranges_are_those_that_the_code_takes(cls, name):
  low, high = config_tables.BOUNDS[cls][name]
  for value in (low - 1, high + 1):
    if not math.isinf(value):
      with pytest.raises(ValueError, match=name):
        config_tables.made(cls, name, value)


def test_every_network_is_on_the_page():
  assert {name for names in config_tables.FAMILIES.values() for name in names} == set(networks.NETWORKS)


def test_a_field_without_a_text_is_noticed():
  @dataclasses.dataclass(frozen=True)
  class Silent(training.RunConfig):
    """A configuration.

    Args:
      loud: how loud it is.
    """

    loud: int = 3
    quiet: int = 0

  assert config_tables.meaning(Silent, "loud") == "how loud it is."
  assert config_tables.meaning(Silent, "keep").startswith("Number of checkpoints")  # Of the class it derives from.
  with pytest.raises(KeyError, match="Silent does not say what quiet is"):
    config_tables.meaning(Silent, "quiet")


def test_there_are_two_examples():
  assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["short", "whole"])
def test_examples_are_read(example):
  sections = tomllib.loads(example)
  shape = (64, 64, 3) if sections["data"]["source"] == "photos" else (8, 8, 1)
  images = data.Images(np.zeros((4, *shape), np.uint8), np.arange(4), 4, "zeros")
  recipe = training.recipe(sections, images)
  given = {**sections, "model": {"network": "unet", **sections["model"]}}
  for section, values in given.items():
    if section == "preset":
      continue
    for name, value in values.items():
      part = getattr(recipe, section)
      found = part[name] if section == "model" else getattr(part, name)
      if name == "fields":
        assert (
          value.items() <= {key: list(item) if isinstance(item, tuple) else item for key, item in found.items()}.items()
        )
      else:
        assert (list(found) if isinstance(value, list) else found) == value
  again = training.recipe(tomllib.loads(recipe.text()), images)
  assert again.text().partition("[data]")[2] == recipe.text().partition("[data]")[2]
