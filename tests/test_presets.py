"""The presets against the published configurations, and against the sizes of the published networks."""

import os
import subprocess
import sys

import jax
import pytest
import readme

from jaxguide.evaluation import demo
from jaxguide.models.importers.openai import PRESETS
from jaxguide.models.model import shapes
from jaxguide.training import TrainingConfig, objectives
from jaxguide.training.presets import PUBLISHED, preset

ALL = [(network, size) for network, sizes in PUBLISHED.items() for size in sizes]

# Millions of parameters: the name of improved-diffusion's checkpoint (cifar10_uncond_50M), and Tables 11, 12 and 14 of
# arXiv:2105.05233; 64x64_diffusion and its classifier from their files. Ours have no learned variance and a null label.
MILLIONS = {
  ("unet", 32): 50,
  ("unet", 64): 296,
  ("unet", 128): 422,
  ("unet", 256): 554,
  ("super_res_unet", 256): 312,
  ("classifier", 64): 65,
  ("classifier", 128): 43,
  ("classifier", 256): 54,
}


def config(network, size, classes=1000):
  return preset(network, size).model_config((size, size, 3), classes)


@pytest.mark.parametrize(("network", "size"), MILLIONS)
def test_networks_have_the_published_size(network, size):
  classes = None if size == 32 else 1000
  millions = sum(leaf.size for leaf in jax.tree.leaves(shapes(config(network, size, classes)))) / 1e6
  if size == 32:
    assert 50 < millions < 55  # Theirs counts 52.5 as 50.
  else:
    assert millions == pytest.approx(MILLIONS[network, size], abs=1.0)


@pytest.mark.parametrize(("network", "size"), ALL)
def test_presets_can_be_trained(network, size):
  chosen = preset(network, size)
  for classes in (None, 3) if network != "classifier" else (3,):
    model = chosen.model_config((size, size, 3), classes, [str(i) for i in range(classes)] if classes else None)
    training = chosen.training_config(model)
    objectives.objective(model, training)
    assert training.steps == chosen.training["steps"]
    assert ("p_uncond" in chosen.training) == (network != "classifier")
    assert (training.p_uncond is None) == (model.null_cond is None)
  assert chosen.training_config(model, steps=10, batch_size=8).steps == 10


@pytest.mark.parametrize(
  ("network", "size", "name"),
  [
    *(("unet", size, f"{size}x{size}_diffusion") for size in (64, 128, 256)),
    ("super_res_unet", 256, "64_256_upsampler"),
    *(("classifier", size, f"{size}x{size}_classifier") for size in (64, 128, 256)),
  ],
)
def test_fields_are_the_published_ones(network, size, name):
  ours, theirs = config(network, size).module, PRESETS[name].module
  for field in theirs.__dataclass_fields__.keys() - {"out_channels", "null_class", "parent", "name"}:
    assert getattr(ours, field) == getattr(theirs, field), field


def test_the_smallest_are_those_of_the_demo():
  for network, model, training in (
    ("unet", demo.DIGITS.denoiser, demo.DIGITS.denoiser_training),
    ("classifier", demo.DIGITS.classifier, demo.DIGITS.classifier_training),
  ):
    chosen = preset(network, 8)
    assert chosen.model_config((8, 8, 1), 10) == model
    assert chosen.training_config(model) == training


def test_guided_diffusions_batches_and_rates():
  rows = {size: preset("unet", size).training for size in (32, 64, 128, 256)}
  assert [rows[size]["batch_size"] for size in rows] == [128, 2048, 256, 256]
  assert [rows[size]["learning_rate"] for size in rows] == [1e-4, 3e-4, 1e-4, 1e-4]
  assert {row["ema_decay"] for row in rows.values()} == {0.9999}
  classifier = preset("classifier", 128).training
  assert (classifier["batch_size"], classifier["learning_rate"], classifier["weight_decay"]) == (256, 3e-4, 0.05)


def test_other_sizes_have_the_levels_that_they_allow():
  assert preset("unet", 28).model["fields"]["channel_mult"] == (1, 2, 2)
  assert "with 3 of its 4 levels, since the sides can be halved 2 times" in preset("unet", 28).source
  assert preset("unet", 20).model["fields"]["attention_resolutions"] == (2, 4)
  odd = preset("unet", 33)
  assert (odd.model["fields"]["channel_mult"], odd.model["fields"]["attention_resolutions"]) == ((1,), ())
  assert "the sides cannot be halved" in odd.source
  assert preset("unet", (48, 40)).model["fields"]["channel_mult"] == (1, 2, 3, 4)
  assert preset("unet", (48, 36)).model["fields"]["channel_mult"] == (1, 2, 3)
  shapes(preset("unet", (12, 20)).model_config((12, 20, 3), 2))
  shapes(preset("classifier", 28).model_config((28, 28, 1), 10))
  # One preset does not change another.
  preset("unet", 32).model["fields"]["dropout"] = 0.9
  assert preset("unet", 32).model["fields"]["dropout"] == 0.3


def test_single_fields_can_be_replaced():
  model = preset("unet", 64).model_config((64, 64, 3), 5, fields={"dtype": "bfloat16"}, prediction="x0")
  assert (model.fields["dtype"], model.fields["model_channels"], model.prediction) == ("bfloat16", 192, "x0")


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("unett", 32), "unknown network of the presets 'unett'.*did you mean 'unet'"),
    (("unet", 512), "the largest preset of a unet is for images of 256x256, got size 512"),
    (("super_res_unet", 90), "must be multiples of 4, got size 90"),
    (("unet", 0), "size must be a whole number of at least 1"),
  ],
)
def test_what_has_no_preset_is_refused(args, message):
  with pytest.raises(ValueError, match=message):
    preset(*args)


def test_sources_have_a_link():
  for network, size in ALL:
    source = preset(network, size).source
    assert size == 8 or ("arXiv:" in source and "https://github.com/openai/" in source)
    assert TrainingConfig(**preset(network, size).training).steps >= 500


@pytest.mark.slow
def test_the_table_is_that_of_the_code():
  # In a process of its own: the checks of types that the tests install would take twice the time. A quick test checks
  # the other tables.
  command = [sys.executable, "tests/readme.py", "--check", "--slow"]
  env = {**os.environ, "PYTHONPATH": str(readme.ROOT)}
  result = subprocess.run(command, cwd=readme.ROOT, env=env, capture_output=True, text=True, check=False)
  assert result.returncode == 0, result.stderr
