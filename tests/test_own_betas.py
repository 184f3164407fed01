"""Models whose discrete process has betas of its own: configured, saved, sampled, trained, imported and exported."""

import dataclasses
import json
import tomllib

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from test_cli import TINY, save
from tiny import Mlp

import jaxguide as jg
from jaxguide import data, generate, training
from jaxguide.generate.plan import plan
from jaxguide.models import folders, importers
from jaxguide.models.importers import openai
from jaxguide.training import ModelConfig, describe

# Stable Diffusion's "scaled linear" betas, which have no name here.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 20) ** 2
IMAGES = data.Images(np.zeros((16, 4, 4, 1), np.uint8), np.arange(16) % 2, 2, "black")


def configured(schedule=BETAS, **more):
  return ModelConfig(Mlp, {}, (4, 4, 1), 2, "eps", schedule, **more)


@pytest.mark.parametrize(
  "given",
  [BETAS, list(BETAS), tuple(BETAS.tolist()), BETAS.astype(np.float32)],
  ids=["array", "list", "tuple", "float32"],
)
def test_the_process_is_that_of_the_betas(given):
  config = configured(given)
  betas = np.asarray(given, np.float64)
  alpha_bar = np.cumprod(1 - betas)
  np.testing.assert_allclose(config.noise_schedule.sigmas, np.sqrt((1 - alpha_bar) / alpha_bar), rtol=1e-12)
  assert config.diffusion_steps == 20
  assert config.schedule == tuple(betas.tolist())
  # The network's time is the step.
  np.testing.assert_allclose(config.scaling(config.noise_schedule.sigmas[7]).c_noise, 7, atol=1e-4)


def test_a_list_of_the_betas_of_a_name_is_that_schedule():
  named, listed = configured("linear", diffusion_steps=50), configured(jg.schedules.linear_betas(50))
  np.testing.assert_array_equal(named.noise_schedule.sigmas, listed.noise_schedule.sigmas)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"schedule": [0.1, 1.0]}, "schedule: betas must have one axis of numbers between 0 and 1, both excluded"),
    ({"schedule": [0.0, 0.1]}, "both excluded"),
    ({"schedule": [0.1, 1.5]}, "each of schedule must be .*1.5"),
    ({"schedule": [0.1, np.nan]}, "each of schedule must be"),
    ({"schedule": [0.1, "0.2"]}, "each of schedule must be a number"),
    ({"schedule": []}, "schedule must have 1 to 100,000 betas, got 0"),
    ({"schedule": [[0.1, 0.2]]}, "schedule must be a name or a list of betas; got"),
    ({"schedule": [[0.1], [0.1, 0.2]]}, r"each of schedule must be a number, got \[0.1\]"),
    ({"schedule": 0.1}, "schedule must be a name or a list of betas; got 0.1"),
    (
      {"schedule": jg.schedules.table("linear", 9)},
      "list of betas, which is table.betas of a jaxguide.schedules.Table",
    ),
    ({"diffusion_steps": 1000}, "diffusion_steps is 1000, and schedule has 20 betas: leave it out"),
    ({"prediction": "flow"}, "a network that predicts 'flow' has no discrete steps"),
  ],
  ids=range(12),
)
def test_what_is_no_list_of_betas_is_refused(given, message, monkeypatch):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # As a user has it.
  with pytest.raises(ValueError, match=message):
    ModelConfig(**{"network": Mlp, "fields": {}, "image_shape": (4, 4, 1), "num_classes": 2}
                | {"prediction": "eps", "schedule": BETAS} | given)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two models: with betas of its own, and with a name."""
  folder = tmp_path_factory.mktemp("models")
  save(folder / "own", configured())
  save(folder / "named", configured("linear", diffusion_steps=20))
  return folder


def test_betas_are_kept_exactly(folder):
  assert folders.load(folder / "own").config == configured()
  stored = {name: json.loads((folder / name / "config.json").read_text()) for name in ("own", "named")}
  assert stored["own"].pop("schedule") == BETAS.tolist()
  # A name is stored as before.
  assert stored["named"].pop("schedule") == "linear"
  assert stored["own"] == stored["named"]


def test_it_is_sampled_on_its_own_steps(folder, run, tmp_path):
  given = ("--model", folder / "own", "--num", 4, "--steps", 5, "--scale", 2)
  status, _, errors = run("sample", "--out", tmp_path / "own.npz", *given)
  assert status == 0, errors
  images, _ = data.load_npz(tmp_path / "own.npz")
  model = folders.load(folder / "own")
  steps = [0, 5, 10, 14, 19]  # Five at equal distances, as OpenAI's respacing rounds them.
  alpha_bar = np.cumprod(1 - BETAS)[steps]
  grid = jnp.asarray(np.append(np.sqrt((1 - alpha_bar) / alpha_bar)[::-1], 0), jnp.float32)
  made = plan(generate.Settings(model=folder / "own", steps=5))
  np.testing.assert_allclose(made.sigmas, grid, rtol=1e-6)
  guided = jg.chain(jg.classifier_free(2, 2.0), jg.clip_x0())(model.denoiser)
  wanted = jg.sample_batch(
    guided, jg.keys.seed_key(0), np.arange(4) % 2, shape=(4, 4, 1), sigmas=grid, solver=jg.DDIM()
  )
  assert np.abs(images.astype(int) - data.to_uint8(wanted)).max() <= 1
  # The record of the file names what differs, and not each beta of it.
  errors = run("sample", "--out", tmp_path / "own.npz", "--model", folder / "named", *given[2:])[2]
  assert "made with other settings" in errors
  errors = run("sample", "--out", tmp_path / "own.npz", *given[:-1], 3)[2]
  assert len(errors) < 400
  other = tmp_path / "model"
  save(other, configured([*BETAS[:-1], 0.02]))
  assert run("sample", "--out", tmp_path / "other.npz", *given[2:], "--model", other)[0] == 0
  save(other, configured())
  errors = run("sample", "--out", tmp_path / "other.npz", *given[2:], "--model", other)[2]
  assert "network.schedule is 20 values, 0.00085" in errors
  assert "to 0.02 there, and 20 values" in errors


RECIPE = """
[data]
source = "{source}"

[model]
network = "tiny:Mlp"
prediction = "eps"
schedule = {betas}

[training]
steps = {steps}
batch_size = 3

[run]
sample_every = 0
"""


def recipe(source, betas=BETAS, steps=2):
  text = RECIPE.format(source=source, betas=np.asarray(betas).tolist(), steps=steps)
  return training.recipe(tomllib.loads(text))


def test_it_is_trained_goes_on_and_is_the_start_of_another(tmp_path):
  np.savez(tmp_path / "data.npz", images=IMAGES.images, labels=IMAGES.labels)
  asked = recipe(tmp_path / "data.npz")
  assert "schedule of its own betas in 20 steps" in str(describe.describe(configured(), asked.training))
  model = training.train(asked, tmp_path / "run", progress=False)
  assert model.config.schedule == tuple(BETAS.tolist())
  # What the run has written down is the same recipe.
  written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
  read = training.recipe(written).model_config(IMAGES)
  assert dataclasses.replace(read, fields={}, class_names=None) == dataclasses.replace(model.config, class_names=None)
  again = training.train(recipe(tmp_path / "data.npz", steps=4), tmp_path / "run", progress=False)
  assert again.config == model.config
  with pytest.raises(ValueError, match=r"schedule is 20 values, 0\.00085.* there, and 20 values") as error:
    training.train(recipe(tmp_path / "data.npz", BETAS[::-1], 4), tmp_path / "run", progress=False)
  assert len(str(error.value)) < 500
  new = training.recipe({"data": written["data"], "init_from": str(tmp_path / "run"), "training": {"steps": 1}})
  assert new.model["schedule"] == model.config.schedule


@pytest.mark.parametrize("network", ["unet", "classifier"])
def test_a_preset_takes_a_list_for_a_discrete_process_as_it_takes_steps(network):
  listed, named = (
    training.recipe({"data": {"source": "digits"}, "model": {"network": network, "prediction": "eps", **process}})
    for process in ({"schedule": BETAS.tolist()}, {"schedule": "linear", "diffusion_steps": 20})
  )
  assert listed.training == named.training
  assert listed.model_config(IMAGES).diffusion_steps == 20


def test_it_is_imported_and_exported(tmp_path):
  fields = {**TINY, "num_res_blocks": 1, "num_heads": 1, "num_head_channels": -1, "null_class": False}
  config = ModelConfig("unet", fields, (8, 8, 1), 10, "eps", BETAS, variance="large")
  save(tmp_path / "model", config)
  lines = importers.export_model(tmp_path / "model", tmp_path / "weights.safetensors")
  assert any("the network predicts eps on the schedule of its own betas in 20 steps" in line for line in lines)
  assert not any("--noise_schedule" in line for line in lines)
  options = {"image_size": 8, "num_heads": 1, "use_new_attention_order": False, "noise_schedule": BETAS.tolist()}
  imported = importers.import_model(tmp_path / "weights.safetensors", tmp_path / "again", None, "adm", **options)
  assert imported.config.noise_schedule.sigmas.tolist() == config.noise_schedule.sigmas.tolist()
  assert imported.config == dataclasses.replace(config, fields=imported.config.fields)
  with pytest.raises(ValueError, match="diffusion_steps is 1000, and schedule has 20 betas"):
    openai.infer(openai.shapes(config), **options, diffusion_steps=1000)
