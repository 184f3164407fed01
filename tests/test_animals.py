"""The animals: their data, the trained models that come with the package, and the commands that use them."""

import gzip
import hashlib
import importlib.util
import json
import pickle
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from tiny import Classify, Mlp

from benchmarks import animals as program
from jaxguide import data, models, training
from jaxguide._core import keys
from jaxguide.data.sources import animals
from jaxguide.evaluation.held_out_data import held_out_data
from jaxguide.generate import Settings
from jaxguide.generate.plan import plan
from jaxguide.models import folders, pretrained

NAMES = ("animals", "animals-classifier")

needs_data = pytest.mark.skipif(
  importlib.util.find_spec("animal_mnist") is None, reason="needs pip install --no-deps animal-mnist"
)


@pytest.fixture
def tiny():
  """A tiny denoiser."""
  return drawn(models.ModelConfig(Mlp(), {}, (8, 8, 1), 3))


def drawn(config):
  return models.Model(config, models.model.init_params(config, keys.seed_key(0)))


@pytest.fixture
def installed(tmp_path, monkeypatch):
  """A package animal_mnist with black images, and one white pixel whose place is the number of the image."""
  folder = tmp_path / "animal_mnist" / "data" / "Animal_MNIST"
  folder.mkdir(parents=True)
  (tmp_path / "animal_mnist" / "__init__.py").write_text("raise RuntimeError('it was imported')\n")
  images = np.zeros((10_000, 784), np.uint8)
  images[np.arange(10_000), np.arange(10_000) % 784] = 1 + np.arange(10_000) // 784
  write(folder, images.reshape(-1, 28, 28), np.repeat(np.arange(10), 1000))
  monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
  return folder


def write(folder, images, labels):
  for name, array in zip(animals.FILES, (images, labels), strict=True):
    (folder / name).write_bytes(gzip.compress(pickle.dumps(array), 1))


# Data


@needs_data
def test_the_splits_are_these_images():
  train, test = data.load("animals"), data.load("animals", "test")

  assert train.fingerprint == "1628c139f17b70b1e10ce3395899bf1e4fdbe6988a51fb47aa1703c4de09a0c1"
  assert test.fingerprint == "21b02509f0fc9ebf04a09694984a66604ced6af3ac5107002271bbb69fbb1cd3"
  assert train.image_shape == (28, 28, 1)
  np.testing.assert_array_equal(np.bincount(train.labels), np.full(10, 900))
  np.testing.assert_array_equal(np.bincount(test.labels), np.full(10, 100))


@needs_data
def test_the_animals_are_white_on_black_and_named():
  images = data.load("animals", "test")

  assert images.class_names[:3] == ("bear", "bird", "cat")
  assert images.images[:, [0, -1]][:, :, [0, -1]].mean() < 50  # The corners.
  assert images.images[:, 10:18, 10:18].mean() > 128


@needs_data
def test_a_test_image_has_no_copy_anywhere():
  train, test = ({image.tobytes() for image in data.load("animals", split).images} for split in ("train", "test"))

  assert not train & test
  assert len(test) == 1000
  assert len(train) < 9000


def test_the_split_follows_the_hash_of_the_pixels(installed):
  images, _ = animals._read(installed)
  first = sorted(range(1000), key=lambda row: hashlib.sha256(images[row].tobytes()).hexdigest())

  test = data.load("animals", "test")

  expected = {images[row].tobytes() for row in first[:100]}
  assert {image.tobytes() for image in test.images[test.labels == 0]} == expected


def test_a_copy_is_not_a_test_image(installed):
  images, labels = animals._read(installed)
  chosen = np.flatnonzero(animals._test_rows(images, labels))[0]
  other = chosen + 1 if chosen + 1 < 1000 else chosen - 1
  images = images.copy()
  images[other] = images[chosen]

  is_test = animals._test_rows(images, labels)

  assert not is_test[chosen]
  assert not is_test[other]
  assert is_test.sum() == 1000


def test_the_code_of_the_package_is_not_run(installed):
  assert len(data.load("animals", "train")) == 9000
  assert "animal_mnist" not in sys.modules


def test_the_name_and_the_configuration_open_the_same(installed):
  opened = data.open_data(data.DataConfig("animals", split="test"))

  assert opened.fingerprint == data.load("animals", "test").fingerprint


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

  with pytest.raises(ImportError, match=r"pip install 'jaxguide\[animals\]'"):
    data.load("animals")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"split": "tset"}, "unknown split 'tset': did you mean 'test'"),
    ({"data_dir": "somewhere"}, "data_dir is not a setting for 'animals'"),
    ({"name": "animals:cats"}, "has no part 'cats'"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    data.load(**{"name": "animals", **arguments})


def test_settings_of_other_sources_are_refused():
  with pytest.raises(ValueError, match="image_column is not a setting for animals"):
    data.open_data(data.DataConfig("animals", image_column="picture"))


def test_a_mistyped_name_gets_the_nearest():
  with pytest.raises(FileNotFoundError, match="did you mean 'animals'"):
    data.open_data(data.DataConfig("animal"))


@pytest.mark.parametrize("labels", [np.zeros(10_000, np.int64), np.repeat(np.arange(10), 1000).astype(np.int32)])
def test_other_arrays_are_refused(installed, labels):
  write(installed, np.zeros((10_000, 28, 28), np.uint8), labels)

  with pytest.raises(ValueError, match=r"must contain 10,000 images of 28x28"):
    data.load("animals")


def test_damaged_files_are_named(installed):
  path = installed / animals.FILES[0]
  path.write_bytes(path.read_bytes()[:-100])

  with pytest.raises(OSError, match=r"animal_data_version_3.gz is damaged"):
    data.load("animals")


def test_a_pickle_that_runs_code_is_refused(installed):
  (installed / animals.FILES[0]).write_bytes(gzip.compress(pickle.dumps(print)))

  with pytest.raises(ValueError, match="which is not allowed"):
    data.load("animals")


def test_a_folder_of_the_same_name_is_not_the_data_set(installed, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "animals").mkdir()
  recipe = training.recipe({"data": {"source": "animals"}})

  assert training.recipes.absolute(recipe).data.source == "animals"


# The models that come with the package


def test_the_models_are_those_that_are_listed():
  assert models.names() == NAMES
  assert [models.load(name).config.role.name for name in NAMES] == ["denoiser", "classifier"]


def test_the_weights_are_small_and_have_their_settings():
  files = list(pretrained.FOLDER.iterdir())

  assert sum(file.stat().st_size for file in files) < 6_000_000
  assert {file.name for file in files} >= {f"{name}.{ending}" for name in NAMES for ending in ("json", "toml")}
  for name in NAMES:
    stored = load_file(pretrained.FOLDER / f"{name}.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(np.float16)}


def test_loaded_parameters_are_the_stored_numbers_in_float32():
  model = models.load("animals")
  stored = load_file(pretrained.FOLDER / "animals.safetensors")

  kernel = model.params["params"]["label_emb"]["embedding"]
  assert kernel.dtype == jnp.float32
  np.testing.assert_array_equal(kernel, stored["params/label_emb/embedding"].astype(np.float32))


def test_the_record_says_how_the_model_was_trained():
  record = pretrained.training("animals")

  assert record["data"]["name"] == "animals"
  assert record["step"] > 0
  assert pretrained.training("runs/animals") is None


def test_the_settings_beside_the_weights_are_those_of_the_training():
  for name in NAMES:
    settings = tomllib.loads(pretrained.settings(name).read_text())
    record = pretrained.training(name)["training"]
    for key in set(settings["training"]) - {"steps", "ema", "save_every"}:  # A training may be ended earlier.
      assert record[key] == settings["training"][key]
    config = models.load(name).config
    assert config.network == settings["model"]["network"]
    for key, value in settings["model"]["fields"].items():
      assert config.fields[key] == (tuple(value) if isinstance(value, list) else value)


def test_the_figures_are_those_of_these_weights():
  measured = json.loads(program.FIGURES.read_text())

  assert measured["models"] == {name: pretrained.digest(name) for name in NAMES}
  assert [row["guidance"] for row in measured["rows"]] == ["real test images"] + ["cfg"] * 4 + ["classifier"] * 4


def test_a_folder_of_that_name_wins(tiny, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  models.save("animals", tiny)

  assert models.load("animals").config == tiny.config
  assert pretrained.name_of("animals") is None
  assert pretrained.classifier_of("animals") is None


def test_an_unknown_name_gets_the_names(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match="with jaxguide come animals, animals-classifier"):
    models.load("animls")
  with pytest.raises(ValueError, match="unknown model of the package 'animls': did you mean 'animals'"):
    pretrained.load("animls")


@pytest.fixture
def copied(tmp_path, monkeypatch):
  """A copy of the folder of the weights, to be damaged."""
  for path in pretrained.FOLDER.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
  return tmp_path


def test_damaged_weights_are_found(copied):
  content = bytearray((copied / "animals.safetensors").read_bytes())
  content[-1] ^= 1
  (copied / "animals.safetensors").write_bytes(bytes(content))

  with pytest.raises(ValueError, match=r"animals.safetensors is damaged .*SHA-256.*install jaxguide again"):
    models.load("animals")


def test_a_configuration_that_does_not_fit_is_found(copied):
  record = json.loads((copied / "animals.json").read_text())
  record["config"]["fields"]["model_channels"] = 64
  (copied / "animals.json").write_text(json.dumps(record))

  with pytest.raises(ValueError, match=r"animals.safetensors is damaged"):
    models.load("animals")


def test_saving_gives_the_nearest_float16(tiny, tmp_path, monkeypatch):
  size = pretrained.save("own", tiny, {"data": {"name": "digits"}}, tmp_path)
  monkeypatch.setattr(pretrained, "FOLDER", tmp_path)

  loaded = models.load("own")

  assert size == (tmp_path / "own.safetensors").stat().st_size
  assert models.names() == ("own",)
  assert loaded.config == tiny.config
  for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(tiny.params), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=2**-11, atol=2**-25)  # Half a unit in the last place.


def test_weights_too_large_for_float16_are_refused(tiny, tmp_path):
  params = jax.tree.map(lambda leaf: leaf + 1e5, tiny.params)

  with pytest.raises(ValueError, match="is not finite"):
    pretrained.save("own", models.Model(tiny.config, params), {}, tmp_path)
  assert not list(tmp_path.iterdir())


# What uses them


def test_guidance_by_a_classifier_finds_the_one_that_belongs_to_the_model():
  made = plan(Settings(model="animals", guidance="classifier", labels=("cat",), num=2))

  assert made.record["classifier_network"]["network"] == "classifier"
  assert list(made.labels) == [2, 2]


def test_classifier_report_has_the_test_split_by_default(installed):
  config = models.load("animals-classifier").config
  for source in (None, "animals"):
    assert held_out_data("animals-classifier", config, source).fingerprint == data.load("animals", "test").fingerprint


def test_the_command_draws_a_cat(run, tmp_path):
  out = tmp_path / "cats.npz"
  status, _, errors = run(
    "sample", "--model", "animals", "--label", "cat", "--scale", 3, "--num", 2, "--steps", 4, "--out", out
  )

  assert status == 0, errors
  images, labels = data.load_npz(out)
  assert list(labels) == [2, 2]
  # A silhouette: bright in the middle, dark in the corners.
  assert images[:, 10:18, 10:18].mean() > 100 + images[:, [0, -1]][:, :, [0, -1]].mean()


def test_train_takes_the_name_of_a_model(run, installed):
  for name in NAMES:
    status, said, errors = run("train", name, "--steps", 107, "--print-config")
    assert status == 0, errors
    assert 'source = "animals"' in said
    assert f'network = "{models.load(name).config.network}"' in said
    assert "steps = 107" in said


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("photos",), "there is no model 'photos' in the package, only animals, animals-classifier; for data give --data"),
    (("animals", "--config", "mine.toml"), "animals has settings of its own"),
  ],
)
def test_train_says_what_is_wrong_with_a_name(run, arguments, message):
  status, _, errors = run("train", *arguments, "--print-config")

  assert status != 0
  assert message in errors


def test_the_benchmark_needs_a_command():
  with pytest.raises(ValueError, match=r"pack RUNS, or figures \[RUNS\]"):
    program.main("pack")


def test_packing_writes_what_the_runs_have(tiny, tmp_path, monkeypatch):
  classifier = drawn(models.ModelConfig(Classify(), {}, (8, 8, 1), 2))
  for folder, model in (("denoiser", tiny), ("classifier", classifier)):
    run, record = tmp_path / "runs" / folder, {"model": {}, "data": {"name": "animals"}, "step": 600}
    folders.publish(run, model, record)
    lines = [{"step": step, "loss": step / 1000, "seconds": 6.0 * step} for step in (100, 300, 500, 600, 700)]
    lines.insert(4, {"step": 600, "held_out": {"accuracy": [0.5]}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  packed = tmp_path / "packed"

  program.pack(tmp_path / "runs", packed)

  monkeypatch.setattr(pretrained, "FOLDER", packed)
  for name, model in zip(NAMES, (tiny, classifier), strict=True):
    for ours, theirs in zip(*map(jax.tree.leaves, (models.load(name).params, model.params)), strict=True):
      np.testing.assert_array_equal(ours, np.float16(theirs))
    assert pretrained.training(name) == {
      **{"data": {"name": "animals"}, "step": 600, "hours": 1.0, "loss": 0.4667, "held_out": {"accuracy": [0.5]}}
    }


def test_the_picture_has_a_panel_for_each_scale(tmp_path):
  drawn = {scale: np.full((30, 4, 4, 1), int(60 * scale), np.uint8) for scale in (0.0, 1.0, 2.0, 4.0)}
  program.picture(tmp_path / "picture.png", drawn, animals.CLASSES)

  assert Image.open(tmp_path / "picture.png").width >= 600
