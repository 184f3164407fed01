"""Presets of the transformers, REPA's loss, and a small SiT that learns the digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import data, training
from jaxguide.models.model import shapes
from jaxguide.training import TrainingConfig, objectives
from jaxguide.training.transformer_presets import NAMED, named

# Millions of parameters: DiT (arXiv:2212.09748), table 4 (its patches of 2); LightningDiT-XL/1 (arXiv:2501.01423).
MILLIONS = {"DiT-S/2": 33, "DiT-B/2": 130, "DiT-L/2": 458, "DiT-XL/2": 675, "SiT-XL/2": 675, "LightningDiT-XL/1": 675}


@pytest.mark.parametrize("name", MILLIONS)
def test_presets_have_the_published_size(name):
  channels, side = (32, 16) if name.startswith("Lightning") else (4, 32)
  config = named(name).model_config((side, side, channels), 1000)
  found = shapes(config)["params"]
  tables = {**found, "pos_embed": None, "feat_rope": None}
  millions = sum(leaf.size for leaf in jax.tree.leaves(tables)) / 1e6
  assert millions == pytest.approx(MILLIONS[name], abs=1)


def test_every_preset_can_be_trained():
  for name, preset in NAMED.items():
    model = preset.model_config((16, 16, 4), 10)
    how = preset.training_config(model)
    assert (how.p_uncond, how.learning_rate) == (0.1, 2e-4 if name.startswith("Light") else 1e-4)
    objectives.objective(model, how)


def test_a_recipe_by_the_name_of_a_preset():
  recipe = training.recipe({"data": {"source": "digits"}, "preset": "SiT-S/2", "training": {"steps": 5}})
  assert recipe.model["network"] == "sit"
  assert recipe.model["prediction"] == "flow_to_data"
  assert recipe.training.steps == 5
  assert recipe.training.noise == "uniform"
  with pytest.raises(ValueError, match="the preset is for a sit, and the network is dit"):
    training.recipe({"data": {"source": "digits"}, "preset": "SiT-S/2", "model": {"network": "dit"}})


@pytest.mark.slow
def test_a_small_sit_learns_the_digits(tmp_path):
  """Its guided samples carry their labels, as the UNet's do: most are nearest to the mean image of their label."""
  digits = data.load("digits", "train")
  fields = {"hidden_size": 48, "depth": 2, "num_heads": 4, "patch_size": 2}
  config = training.ModelConfig("sit", fields, (8, 8, 1), 10, "flow_to_data", "flow")
  how = TrainingConfig(steps=600, learning_rate=3e-3, noise="logit-normal", p_uncond=0.1, save_every=600)
  model = training.fit(config, how, digits, tmp_path / "run", progress=False)
  labels = np.arange(100) % 10
  guided = jg.classifier_free(10, 3.0)(model.denoiser)
  arguments = {"shape": (8, 8, 1), "sigmas": jg.schedules.flow(20), "solver": jg.Euler(), "devices": jax.devices()[:1]}
  samples = jg.sample_batch(guided, jax.random.key(0), labels, **arguments)
  images = np.asarray(digits.images, np.float32) / 127.5 - 1
  means = np.stack([images[np.asarray(digits.labels) == label].mean(0) for label in range(10)])
  nearest = np.square(samples[:, None] - means[None]).sum((2, 3, 4)).argmin(1)
  right = (nearest == labels).mean()
  of_data = np.square(images[:200, None] - means[None]).sum((2, 3, 4)).argmin(1) == np.asarray(digits.labels)[:200]
  assert right > 0.6, (
    f"{right:.0%} of the samples and {of_data.mean():.0%} of the data are nearest to their label's mean"
  )


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_alignment_is_the_mean_negative_cosine(sign):
  rng = np.random.default_rng(0)
  z, features = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
  want = -np.mean(np.sum(z * features, -1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(features, axis=-1), 1)
  ours = jg.losses.alignment([jnp.asarray(sign * z)], [jnp.asarray(features)])
  np.testing.assert_allclose(ours, sign * want, rtol=1e-5, atol=1e-6)
  with pytest.raises(ValueError, match="an array for each image encoder"):
    jg.losses.alignment([jnp.asarray(z)], [])
