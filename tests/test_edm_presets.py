"""The presets of EDM and EDM2: every one is trainable, and the sizes are the published numbers of parameters."""

import jax
import numpy as np
import pytest

from jaxguide.models.importers.families import of_network
from jaxguide.models.model import shapes
from jaxguide.training.edm_presets import NAMED, named
from jaxguide.training.recipes import recipe

# Numbers of parameters in millions: table 7 of arXiv:2206.00364, table 6 of arXiv:2312.02696.
MILLIONS = {
  "edm-cifar10-vp": 56,
  "edm-ffhq-ve": 63,
  "edm-imagenet64-adm": 296,
  "edm2-img512-xs": 125,
  "edm2-img512-s": 280,
  "edm2-img512-m": 498,
  "edm2-img512-l": 777,
  "edm2-img512-xl": 1119,
  "edm2-img512-xxl": 1523,
}


def config_of(name):
  size, classes = (32, 10) if "cifar" in name else (64, 1000 if "im" in name else None)
  return named(name).model_config((size, size, 4 if "512" in name else 3), classes)


@pytest.mark.parametrize("name", ["edm-cifar10-vp", "edm-imagenet64-adm", "edm2-img512-xs", "edm2-img512-xxl"])
def test_the_numbers_of_parameters_are_the_published_ones(name):
  count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config_of(name))))
  assert round(float(count) / 1e6) == pytest.approx(MILLIONS[name], abs=1)


@pytest.mark.parametrize("name", NAMED)
def test_every_preset_is_a_training(name):
  config = config_of(name)
  training = named(name).training_config(config)
  assert training.steps * training.batch_size == pytest.approx(
    {"cifar": 200e6, "ffhq-": 200e6, "afhqv": 200e6, "image": 2.5e9}.get(name[4:9], training.steps * 2048), rel=1e-3
  )
  assert "arXiv:22" in named(name).source or "arXiv:23" in named(name).source
  assert of_network(config.network).name in ("edm", "edm2")


def test_a_training_takes_a_preset_by_name():
  sections = {"data": {"source": "digits"}, "preset": "edm2-img64-xs", "training": {"steps": 10_000}}
  sections["model"] = {"fields": {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1}}
  made = recipe(sections)
  assert (made.model["network"], made.model["prediction"]) == ("edm2_unet", "edm")
  assert (made.training.uncertainty, made.training.noise_mean, made.training.steps) == (True, -0.8, 10_000)
  with pytest.raises(ValueError, match="did you mean 'edm2-img64-s'"):
    recipe({**sections, "preset": "edm2-img64-sx"})
