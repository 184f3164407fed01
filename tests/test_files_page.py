"""The page of the file formats: what it lists is what there is, no more and no less."""

import dataclasses
import json
import re
import shutil
import tomllib

import jax
import numpy as np
import public_names
import pytest
from PIL import Image
from tiny import Mlp

from jaxguide import evaluation, generate, models, training

PAGE = (public_names.DOCS / "files.md").read_text()


def listed(name):
  """Give the names in the first column of a table of the page."""
  table = re.search(rf"<!-- files: {name} -->\n(.*?)<!-- end of files -->", PAGE, flags=re.DOTALL)
  rows = [line.split("|")[1] for line in table[1].splitlines() if line.startswith("| `")]
  return {found for row in rows for found in re.findall(r"`([^`]+)`", row)}


def found(folder, whole=()):
  """Give the files of a folder with the page's words for numbers; of the folders in ``whole`` their name alone."""
  names = set()
  for path in sorted(folder.rglob("*")):
    name = str(path.relative_to(folder))
    if path.is_dir() or name.startswith(tuple(f"{part}/" for part in whole)):
      if name in whole:
        names.add(f"{name}/")
      continue
    name = re.sub(r"(snapshots/)\d+-[\d.]+(\.safetensors)", r"\1STEP-STD\2", name)
    name = re.sub(r"(samples/)\d+(\.png)", r"\1STEP\2", name)
    names.add(re.sub(r"^(checkpoints/)\d+/.*", r"\1STEP/", name))
  return names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("files")
  rng = np.random.default_rng(0)
  for label in ("cat", "dog"):
    (folder / "photos" / label).mkdir(parents=True)
    for number in range(4):
      Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(folder / "photos" / label / f"{number}.png")
  sections = {
    "preset": "none",
    "data": {"source": str(folder / "photos")},
    "model": {"network": "tiny:Mlp"},
    "training": {"steps": 2, "batch_size": 4, "save_every": 1, "ema": ["power:std=0.05", "power:std=0.1"]},
    "run": {"sample_every": 1, "log_every": 1, "sample_steps": 1, "samples_per_class": 1, "snapshot_every": 1},
  }
  training.train(training.recipe(sections), folder / "run", progress=False)
  return folder / "run"


@pytest.fixture(scope="module")
def swept(run):
  base = generate.Settings(run, num=4, steps=2, labels=["cat", "dog"])
  evaluation.sweep(run / "sweep", base, scales=[2.0], features="pixels", judge=None, progress=False)
  return run / "sweep"


def test_a_run_has_the_files_that_the_page_lists(run):
  names = found(run, ("model", "sweep")) - {"sweep/"}
  assert names == listed("run")


def test_a_model_has_the_files_that_the_page_lists(run, tmp_path):
  assert found(run / "model", ("params",)) == listed("model")
  models.save(tmp_path, models.load(run))
  assert found(tmp_path, ("params",)) == listed("model") - {"training.json"}


def test_a_model_alone_is_enough(run, tmp_path):
  (run / "model").rename(tmp_path / "kept")
  try:
    assert isinstance(models.load(tmp_path / "kept").config.module, Mlp)
  finally:
    (tmp_path / "kept").rename(run / "model")


def test_a_model_that_was_deleted_is_made_from_the_checkpoint(run, tmp_path):
  shutil.copytree(run, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "model")
  recipe = training.recipe(tomllib.loads((run / "config.toml").read_text()))
  training.train(recipe, tmp_path / "run", progress=False)
  for ours, theirs in zip(
    *(jax.tree.leaves(models.load(each).params) for each in (run, tmp_path / "run")), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_samples_have_the_keys_that_the_page_lists(swept):
  with np.load(next((swept / "samples").iterdir())) as file:
    assert set(file) == listed("samples")
    assert (file["arr_0"].dtype, file["arr_1"].dtype, file["settings"].dtype.kind) == (np.uint8, np.int64, "U")
    record = json.loads(str(file["settings"]))
  assert {"settings", "network", "classifier_network", "data", "jaxguide"} <= set(record)
  assert set(record["data"]) == {"crc32"}
  assert set(record["settings"]) == {field.name for field in dataclasses.fields(generate.Settings)}


def test_a_sweep_has_the_files_that_the_page_lists(swept):
  names = {re.sub(r"/.*(\.\w+)$", r"/POINT\1", name) for name in found(swept)}
  assert names == listed("sweep")


def test_statistics_have_the_keys_that_the_page_lists(swept):
  spatial = {"mu_s", "sigma_s"}  # Pixels have no spatial features.
  with np.load(swept / "reference.npz") as file:
    assert set(file) == listed("statistics") - spatial
    assert file["mu"].dtype == file["sigma"].dtype == np.float64
  assert spatial < listed("statistics")


def test_a_missing_file_would_be_noticed(run):
  (run / "new.json").write_text("{}")
  try:
    assert found(run, ("model", "sweep")) - {"sweep/"} != listed("run")
  finally:
    (run / "new.json").unlink()
