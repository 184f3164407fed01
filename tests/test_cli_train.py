"""``jaxguide train``: from a folder of pictures to samples, settings from files and options, and going on."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import tomllib
from types import SimpleNamespace

import jax
import numpy as np
import once
import pytest
import tiny

import jaxguide
from jaxguide import cli, data, models, training
from jaxguide._core import devices
from jaxguide.data import DataConfig
from jaxguide.training import ModelConfig, RunConfig, TrainingConfig, loop, program, recipes

# A network that compiles fast; the presets are for UNets. Three examples run on one of the four devices, for which a
# step compiles in half the time.
FAST = ("--network", "tiny:Mlp", "--batch-size", 3, "--set", "run.sample_steps=2")


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
  """Compile the step of a configuration once for all tests, and not in each command."""
  with once.compiled():
    yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder with pictures of cats, light at the top, and dogs, light at the bottom."""
  folder = tmp_path_factory.mktemp("data") / "photos"
  tiny.draw_photos(folder, 20, 8)
  return folder


@pytest.fixture
def run(monkeypatch, capsys):
  """Run the command; give its exit status, what it printed, and its errors."""

  def run(*args):
    monkeypatch.setattr(sys, "argv", ["jaxguide", *map(str, args), "--no-progress"])
    try:
      cli.main()
      status = 0
    except SystemExit as exit:
      status = exit.code
    return status, *capsys.readouterr()

  return run


@pytest.fixture
def train(run):
  """Run ``jaxguide train``."""
  return lambda *args: run("train", *args)


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
  """A finished run of 4 steps. Tests that change it copy it first."""
  folder = tmp_path_factory.mktemp("trained") / "run"
  sections = {
    "data": {"source": str(photos), "size": 8},
    "model": {"network": "tiny:Mlp"},
    "training": {"steps": 4, "batch_size": 3},
    "run": {"sample_every": 0},
  }
  training.train(training.recipe(sections), folder, progress=False)
  return folder


def settings_of(text):
  return tomllib.loads(text)


# --- from a folder to samples ---------------------------------------------------------------------


def test_from_a_folder_of_pictures_to_samples_of_a_named_class(run, train, photos, tmp_path):
  out = tmp_path / "run"
  status, printed, errors = train("--data", photos, "--size", 8, "--out", out, "--steps", 4, *FAST)
  assert (status, errors) == (0, "jaxguide: compiling the training step, once; this can take minutes\n")
  assert f"jaxguide sample --model {out} --label cat --out new.png" in printed
  assert {"config.toml", "metrics.jsonl", "samples", "checkpoints", "model", "index.html"} <= {*os.listdir(out)}
  assert len(list((out / "samples").iterdir())) == 4
  assert models.load(out).config.class_names == ("cat", "dog")
  status, printed, errors = run(
    "sample", "--model", out, "--label", "dog", "--num", 3, "--steps", 2, "--out", tmp_path / "a.npz"
  )
  assert (status, printed) == (0, f"3 samples are in {tmp_path / 'a.npz'}.\n")
  assert data.load_npz(tmp_path / "a.npz")[1].tolist() == [1, 1, 1]


def test_the_command_is_a_thin_caller(train, trained, photos, tmp_path):
  given = ("--data", photos, "--size", 8, "--steps", 4, *FAST, "--sample-every", 0)
  assert train("--out", tmp_path / "run", *given)[0] == 0
  ours, theirs = (models.load(folder).params for folder in (tmp_path / "run", trained))
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))


def test_a_run_goes_on_by_its_folder_alone(train, trained, photos, tmp_path, monkeypatch):
  monkeypatch.chdir(photos.parent)
  out = tmp_path / "run"
  given = ("--data", photos.name, "--size", 8, "--steps", 4, *FAST, "--sample-every", 0)
  assert train("--out", out, *given)[0] == 0
  monkeypatch.chdir(tmp_path)  # The run knows its data from any folder.
  monkeypatch.setattr(loop, "train_step", None)
  assert train("--out", "run")[0] == 0
  monkeypatch.undo()
  monkeypatch.chdir(photos.parent)
  assert train("--out", out, *given)[0] == 0
  status, _, errors = train("--out", out, "--steps", 6, "--learning-rate", 1e-3)
  assert status == 0
  assert "jaxguide: from step 4 on, training.steps is 6 instead of 4" in errors
  assert "jaxguide: from step 4 on, training.learning_rate is 0.001 instead of 0.002" in errors
  assert settings_of((out / "config.toml").read_text())["training"]["steps"] == 6
  status, _, errors = train("--out", out, "--set", "training.seed=1", "--steps", 8)
  assert (status, "training.seed is 0 there, and 1 here" in errors) == (2, True)
  status, _, errors = train("--out", out, "--network", "classifier")
  assert status == 2
  assert "model.network is 'tiny:Mlp' there, and 'classifier' here" in errors
  # A run that was refused keeps its own settings.
  assert (
    settings_of((out / "config.toml").read_text())["training"] | {"seed": 0, "steps": 6}
    == (settings_of((out / "config.toml").read_text())["training"])
  )


def test_new_pictures_may_be_added_to_a_run(train, photos, tmp_path):
  folder, out = tmp_path / "photos", tmp_path / "run"
  for name in ("cat", "dog"):
    (folder / name).mkdir(parents=True)
    for i in range(8):
      os.link(photos / name / f"{i}.png", folder / name / f"{i}.png")
  given = ("--data", folder, "--size", 8, "--steps", 4, *FAST, "--sample-every", 0)
  assert train("--out", out, *given)[0] == 0
  os.link(photos / "cat" / "9.png", folder / "cat" / "9.png")
  status, _, errors = train("--out", out, "--steps", 6)
  assert status == 0
  assert "from step 4 on, data.number is 17 instead of 16" in errors
  folder.rename(tmp_path / "moved")
  assert train("--out", out, "--data", tmp_path / "moved")[0] == 0
  (tmp_path / "moved" / "cat" / "0.png").unlink()
  status, _, errors = train("--out", out, "--data", tmp_path / "moved", "--steps", 8)
  assert (status, "data.fingerprint is" in errors) == (2, True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_status_and_says_how_to_go_on(train, photos, tmp_path, monkeypatch, number, status):
  make = loop.train_step

  def interrupted(*args):
    step = make(*args)

    def run(state, *batch):
      if int(state.step) == 1:
        signal.raise_signal(number)
      return step(state, *batch)

    return run

  out = tmp_path / "my run"
  given = ("--data", photos, "--size", 8, "--steps", 4, *FAST, "--sample-every", 0)
  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_step", interrupted)
    got, _, errors = train("--out", out, *given)
  assert got == status
  assert f"stopped after step 2; everything is saved. To go on: jaxguide train --out '{out}'" in errors
  assert "Start the same command again" not in errors
  assert train("--out", out)[0] == 0
  assert json.loads((out / "model" / "training.json").read_text())["finished"]


# --- settings -------------------------------------------------------------------------------------


def test_the_printed_settings_give_the_same_run(train, photos, tmp_path):
  given = ("--data", photos, "--size", 8, "--learning-rate", 0.5, "--set", "run.keep=7")
  status, printed, errors = train(*given, "--print-config")
  assert (status, errors) == (0, "")
  settings = settings_of(printed)
  for section, cls in (("data", DataConfig), ("training", TrainingConfig), ("run", RunConfig)):
    for field in dataclasses.fields(cls):  # Every default is there, or a comment for a name without a value.
      assert field.name in settings[section] or f"# {field.name} =" in printed
  assert settings["training"]["learning_rate"] == 0.5
  assert settings["training"]["steps"] == 1200
  assert settings["run"]["keep"] == 7
  assert settings["model"]["fields"]["channel_mult"] == [1, 2]
  assert settings["model"]["fields"]["dropout"] == 0.0
  (tmp_path / "run.toml").write_text(printed)
  again = train("--config", tmp_path / "run.toml", "--print-config")[1]
  assert settings_of(again) == settings
  ours, theirs = (training.recipe(sections) for sections in (settings, settings_of(again)))
  assert ours == theirs
  assert program.open_parts(ours, False).model == program.open_parts(theirs, False).model
  changed = train("--config", tmp_path / "run.toml", "--steps", 9, "--set", "training.steps=8", "--print-config")[1]
  assert settings_of(changed)["training"]["steps"] == 8


def test_a_classifier_has_held_out_data_and_early_stopping_by_default(train, photos):
  recipe = training.recipe({"data": {"source": str(photos), "size": 8}, "model": {"network": "classifier"}})
  assert (recipe.held_out, recipe.run.patience) == (0.1, 5)
  parts = program.open_parts(recipe, False)
  assert len(parts.data) + len(parts.held_out) == 40
  assert 0 < len(parts.held_out) < 12
  printed = train("--data", photos, "--size", 8, "--network", "classifier", "--held-out", 0, "--print-config")[1]
  assert "# patience =" in printed
  denoiser = training.recipe({"data": {"source": str(photos), "size": 8, "held_out": 0.2}})
  parts = program.open_parts(denoiser, False)
  assert len(parts.data) < 40
  assert parts.held_out is None


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (["--set", "trainin.steps=3"], "unknown section 'trainin': did you mean 'training'"),
    (["--set", "training.step=3"], r"unknown name in [training] 'step': did you mean 'steps'"),
    (["--set", "data.sise=8"], r"unknown name in [data] 'sise': did you mean 'size'"),
    (["--set", "run.keap=8"], r"unknown name in [run] 'keap': did you mean 'keep'"),
    (["--set", "model.predicton=v"], r"unknown name in [model] 'predicton': did you mean 'prediction'"),
    (["--set", "model.model_channels=8"], "[model] has no 'model_channels': write model.fields.model_channels"),
    (["--set", "run.steps=8"], "[run] has no 'steps': write training.steps"),
    (["--set", "model.fields.model_chanels=8"], "unknown field of UNet 'model_chanels': did you mean 'model_channels'"),
    (["--set", "model.image_shape=[8, 8, 1]"], "model.image_shape follows from the data: leave it out"),
    (["--set", "steps"], "set must be given as section.name=value"),
    (["--set", "data=3"], "[data] must be a section"),
    (["--set", "training=3"], "[training] must be a section"),
    (["--steps", 0], "steps must be a whole number from 1"),
    (["--set", "preset=sixe"], "unknown preset 'sixe': did you mean 'size'"),
    (["--network", "unett"], "unknown network 'unett': did you mean 'unet'"),
    (["--size", 512], "the largest preset of a unet is for images of 256x256"),
    (["--held-out", 1], "held_out must be below 1"),
    (["--init-from", "nowhere"], "there is no model in"),
    (["--data", "nowhere"], "nowhere"),
  ],
)
def test_wrong_settings_are_named(train, photos, tmp_path, given, message):
  status, printed, errors = train("--data", photos, "--size", 8, "--out", tmp_path / "run", "--print-config", *given)
  assert (status, printed) == (2, "")
  assert message in errors
  assert not (tmp_path / "run").exists()


def test_a_wrong_file_is_named_with_its_line(train, photos, tmp_path):
  path = tmp_path / "run.toml"
  path.write_text("[data]\nsource = photos\n")
  status, _, errors = train("--config", path, "--print-config")
  assert status == 2
  assert errors.startswith(f"jaxguide: {path} is not valid TOML: ")
  assert "line 2" in errors
  status, _, errors = train("--config", tmp_path / "other.toml", "--print-config")
  assert (status, f"there is no configuration file {tmp_path / 'other.toml'}" in errors) == (2, True)
  status, _, errors = train("--out", tmp_path / "nothing")
  assert (status, "there are no data, and there is no run in" in errors) == (2, True)
  status, _, errors = train("--data", photos, "--size", 8)
  assert (status, "give the folder of the run: --out" in errors) == (2, True)


def test_a_run_that_was_started_from_python_goes_on_there(train, tmp_path, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  images = data.Images(np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) % 2, 2, "black")
  model, how = ModelConfig(tiny.Mlp, {}, (8, 8, 3), 2), TrainingConfig(steps=4, batch_size=3)
  with monkeypatch.context() as patch:
    patch.setattr(loop, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
      training.fit(model, how, images, tmp_path / "run", progress=False)
  status, _, errors = train("--out", tmp_path / "run")
  assert (status, "was started from Python with data in memory: continue it there" in errors) == (2, True)


def test_a_dry_run_describes_and_draws_and_does_not_train(train, photos, tmp_path):
  fields = {"model_channels": 8, "num_head_channels": 8, "num_res_blocks": 0, "channel_mult": [1]}
  small = [part for name, value in fields.items() for part in ("--set", f"model.fields.{name}={value}")]
  status, printed, errors = train("--data", photos, "--size", 8, "--out", tmp_path / "run", "--dry-run", *small)
  assert (status, errors) == (0, "")
  shapes = training.recipe({"data": {"source": str(photos), "size": 8}, "model": {"fields": fields}})
  number = sum(leaf.size for leaf in jax.tree.leaves(models.model.shapes(program.open_parts(shapes, False).model)))
  assert f"{number:,}" in printed
  for name in ("memory", "operations", "40 examples an epoch", "cat, dog", "jaxguide demo"):
    assert name in printed
  assert os.listdir(tmp_path / "run") == ["first_batch.png"]


def test_latents(run, train, tmp_path):
  z = np.random.default_rng(0).normal(3, 2, (20, 2, 2, 4)).astype(np.float32)
  np.savez(tmp_path / "latents.npz", latents=z, labels=np.arange(20) % 2, shift=3, scale=0.5)
  given = ("--data", tmp_path / "latents.npz", "--out", tmp_path / "run", "--steps", 2, *FAST)
  status, _, errors = train(*given, "--set", "model.encoder=pixels")
  assert (status, "holds floats, and the network's encoder is pixels: give encoder 'latents'" in errors) == (2, True)
  status, printed, errors = train(*given)
  assert (status, "--vae FILE --label" in printed or "--vae FILE --out" in printed) == (0, True), errors
  model = models.load(tmp_path / "run")
  examples = data.open_data(DataConfig(tmp_path / "latents.npz")).example(7)[0][None]
  np.testing.assert_allclose(model.config.data.encode(examples), (z[7:8] - 3) * 0.5, rtol=1e-6)
  latents = jaxguide.sample_batch(
    model.denoiser, jax.random.key(0), np.arange(3) % 2, shape=model.config.image_shape,
    sigmas=jaxguide.schedules.karras(3), solver=jaxguide.solvers.DPMpp2M(),
  )  # fmt: skip
  assert latents.shape == (3, 2, 2, 4)
  status, _, errors = run("sample", "--model", tmp_path / "run", "--out", tmp_path / "s.npz")
  assert (status, "makes latents, which are no pictures yet: give their autoencoder" in errors) == (2, True)


def test_pixels_are_no_latents(train, photos, tmp_path):
  given = (
    "--data",
    photos,
    "--size",
    8,
    "--out",
    tmp_path / "run",
    "--steps",
    1,
    *FAST,
    "--set",
    "model.encoder=latents",
  )
  status, _, errors = train(*given)
  assert (status, "holds pixels, and the network's encoder is latents" in errors) == (2, True)


@pytest.mark.parametrize("classes", [None, 2])
def test_the_hint_for_super_resolution_names_the_images_it_needs(tmp_path, monkeypatch, capsys, classes):
  config = ModelConfig("super_res_unet", {}, (8, 8, 3), classes, low_res_shape=(4, 4, 3))
  monkeypatch.setattr(training, "train", lambda *_, **__: SimpleNamespace(config=config))
  cli.train._train(SimpleNamespace(is_classifier=False), tmp_path / "sr", False, False)
  printed = capsys.readouterr().out
  assert f"jaxguide sample --model {tmp_path / 'sr'} --base-samples FILE --out new.png" in printed
  assert "uint8 images of shape (images, 4, 4, 3) as arr_0" in printed
  assert ("their labels (images,) as arr_1" in printed) == (classes is not None)


def test_bad_files_are_refused_or_left_out(train, photos, tmp_path):
  folder = tmp_path / "photos"
  for name in ("cat", "dog"):
    (folder / name).mkdir(parents=True)
    for i in range(4):
      os.link(photos / name / f"{i}.png", folder / name / f"{i}.png")
  (folder / "cat" / "note.png").write_text("no picture")
  given = ("--data", folder, "--size", 8, "--steps", 4, *FAST, "--sample-every", 0, "--out", tmp_path / "run")
  status, _, errors = train(*given)
  assert (status, "note.png" in errors) == (2, True)
  assert not (tmp_path / "run").exists()
  status, _, errors = train(*given, "--skip-bad")
  assert (status, "note.png" in errors) == (0, True)


def test_fine_tuning_begins_with_another_model(train, photos, tmp_path):
  fields = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 0, "num_head_channels": 8}
  config = ModelConfig("unet", fields, (8, 8, 3), 3, class_names=("dog", "bird", "cat"))
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), models.model.shapes(config))
  models.save(tmp_path / "source", models.Model(config, params))
  given = ("--data", photos, "--size", 8, "--init-from", tmp_path / "source")
  status, printed, errors = train(*given, "--out", tmp_path / "run", "--dry-run")
  assert (status, errors) == (0, "")
  assert f"From {tmp_path / 'source'}:" in printed
  assert "kept" in printed
  settings = settings_of(train(*given, "--print-config")[1])
  assert settings["init_from"] == str(tmp_path / "source")
  assert settings["model"]["fields"]["channel_mult"] == [1]
  recipe = training.recipe(settings)
  begun, _ = recipes.initial_params(recipe, program.open_parts(recipe, False).model, jax.random.key(0))
  assert begun["params"]["label_emb"]["embedding"].shape == (3, 32)


@pytest.mark.slow
def test_the_presets_of_small_pictures_are_trained(train, photos, tmp_path):
  """A UNet and a classifier, all of whose settings are the preset's. Commands of the documentation run elsewhere."""
  # Three examples run on one of the four devices, for which a step compiles in half the time.
  given = ("--data", photos, "--size", 8, "--batch-size", 3, "--steps", 2, "--sample-every", 0)
  assert train("--out", tmp_path / "run", *given)[0] == 0
  out = tmp_path / "run-classifier"
  assert train("--network", "classifier", "--out", out, *given)[0] == 0
  lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  assert [line for line in lines if "held_out" in line]


def test_a_section_that_is_no_table_is_refused(train, tmp_path):
  for name, value in (("data", "5"), ("model", '"classifier"'), ("training", "5"), ("run", '"x"')):
    path = tmp_path / "c.toml"
    path.write_text(f"{name} = {value}\n" + ('[data]\nsource = "digits"\n' if name != "data" else ""))
    status, _, errors = train("--config", path, "--print-config")
    assert status == 2
    assert f"[{name}] must be a section with names and values" in errors


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ('preset = "none"\n[model]\nfields = 5', "[fields] must be a section"),
    ('[model]\nnetwork = ["unet"]', "model.network must be a text"),
    ("[run]\npatience = 3", "run.patience is for a classifier with held-out data: leave it out"),
    ("[run]\nheld_out_every = 3", "run.held_out_every is for a classifier with held-out data: leave it out"),
    ("[training]\nema = " + 3000 * "[" + 3000 * "]", "is not valid TOML: it is nested too deeply"),
  ],
  ids=range(5),
)
def test_files_of_settings_that_are_refused(train, tmp_path, content, message):
  path = tmp_path / "c.toml"
  path.write_text(content + '\n[data]\nsource = "digits"\n')
  status, _, errors = train("--config", path, "--print-config")
  assert status == 2
  assert message in errors
  assert "Traceback" not in errors


def test_a_network_without_fields_needs_none(train, photos, tmp_path):
  path = tmp_path / "c.toml"
  path.write_text(
    f'preset = "none"\n[data]\nsource = "{photos}"\nsize = 8\n[model]\nnetwork = "tiny:Mlp"\n'
    "[training]\nsteps = 4\nbatch_size = 3\n[run]\nsample_every = 0\n"
  )
  assert train("--config", path, "--out", tmp_path / "run")[0] == 0


@pytest.mark.parametrize(("width", "heads"), [(16, 16), (24, 8), (128, 64)])
def test_heads_fit_a_width_that_is_given(train, width, heads):
  options = ("--data", "digits", "--network", "classifier", "--set", f"model.fields.model_channels={width}")
  status, out, _ = train(*options, "--set", "data.size=16", "--print-config")
  assert (status, f"num_head_channels = {heads}\n" in out) == (0, True)


def test_another_running_mean_replaces_the_decay_of_a_file(train, tmp_path):
  path = tmp_path / "c.toml"
  path.write_text(train("--data", "digits", "--set", "training.ema_decay=0.9", "--print-config")[1])
  status, out, _ = train("--config", path, "--set", 'training.ema="power:std=0.1"', "--print-config")
  assert (status, 'ema = "power:std=0.1"' in out) == (0, True)


def test_data_that_were_read_otherwise_are_refused_by_name(train, trained, tmp_path):
  out = shutil.copytree(trained, tmp_path / "run")
  for option, message in (
    (("--held-out", 0.3), "data.held_out is None in the run in {}, and 0.3 here"),
    (("--size", 4), "data.size is 8 in the run in {}, and 4 here"),
    (("--set", "data.contents=true"), "data.contents is False in the run in {}, and True here"),
  ):
    status, _, errors = train("--out", out, "--steps", 8, *option)
    assert status == 2
    assert message.format(out) in errors


def test_a_run_goes_on_without_the_model_that_it_began_with(train, photos, trained, tmp_path):
  start, out = shutil.copytree(trained, tmp_path / "start"), tmp_path / "run"
  first = ("--data", photos, "--size", 8, *FAST, "--init-from", start, "--set", "run.sample_every=0")
  assert train(*first, "--out", out, "--steps", 4)[0] == 0
  other = training.load(start)
  training.save(tmp_path / "other", dataclasses.replace(other, params=jax.tree.map(np.ones_like, other.params)))
  status, _, errors = train("--out", out, "--steps", 6, "--init-from", tmp_path / "other")
  assert (status, "init is " in errors) == (2, True)
  shutil.rmtree(start)
  status, _, errors = train("--out", out, "--steps", 6)
  assert (status, "from step 4 on, training.steps is 6 instead of 4" in errors) == (0, True)


def test_a_step_that_needs_more_memory_than_there_is_is_said(train, photos, tmp_path, monkeypatch):
  monkeypatch.setattr(devices, "free_bytes", lambda: 1000)
  options = ("--data", photos, "--size", 8, *FAST, "--steps", 4, "--set", "run.sample_every=0", "--out", tmp_path)
  message = "a step needs about .* and 1,000 bytes of memory are free: give a smaller network"
  assert re.search(message, train(*options, "--dry-run")[1].lower())
  status, _, errors = train(*options)
  assert status == 0
  assert re.search(message, errors)


def test_a_run_inside_its_data_is_refused(train, photos):
  status, _, errors = train("--data", photos, "--size", 8, *FAST, "--steps", 2, "--out", photos / "run")
  assert (status, "is in the folder of the data" in errors, (photos / "run").exists()) == (2, True, False)


def test_models_beside_a_folder_without_one_are_named(run, trained, tmp_path):
  shutil.copytree(trained, tmp_path / "cats")
  status, _, errors = run("sample", "--model", tmp_path / "cat", "--out", tmp_path / "x.png")
  assert (status, "beside it there are cats" in errors) == (2, True)


def test_class_names_of_several_lines_are_drawn(tmp_path):
  names = ["a", "new\nline\x1b[31m"]
  data.save_png(tmp_path / "x.png", np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), names=names)
  assert (tmp_path / "x.png").exists()
