"""The demo: all files of a shortened run, and the results of the networks as shipped, in half of the steps."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sweeps import unplotted

from jaxguide import cli, data, evaluation
from jaxguide.evaluation import demo, sweep_plots
from jaxguide.models import load
from jaxguide.models import model as models

ROOT = Path(__file__).parent.parent


def table(out):
  """The rows of the table, by method and scale; values are numbers where they are."""
  with open(out / "sweep.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  return {(row["method"], float(row["scale"])): row for row in rows}


def by_method(rows, column):
  values = {}
  for (method, scale), row in rows.items():
    values.setdefault(method, {})[scale] = float(row[column])
  return values


def called(*args):
  """Run the command in this process; return what it wrote to stdout and to stderr."""
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
    patch.setattr(sys, "argv", ["jaxguide", *map(str, args)])
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as exit:
      cli.main()
  assert exit.value.code in (0, None), err.getvalue()
  return out.getvalue(), err.getvalue()


# --- a shortened demo: its files, and that they agree -----------------------------------------------


@pytest.fixture(scope="module")
def short():
  """Shorten the demo: networks of a few layers with 3 steps of training, fewer scales and samples, and no plots."""
  small = {"model_channels": 8, "channel_mult": (1,), "attention_resolutions": (), "num_head_channels": 8}
  changed = {
    "scales": (0.0, 2.0, 30.0),
    "num": 40,
    "steps": 3,
    "batch_size": 20,
  }
  for name in ("denoiser", "classifier"):
    config, training = getattr(demo.DIGITS, name), getattr(demo.DIGITS, f"{name}_training")
    changed[name] = dataclasses.replace(config, fields={**config.fields, **small})
    # A batch of 3 runs on one device.
    changed[f"{name}_training"] = dataclasses.replace(training, steps=3, batch_size=3)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sweep_plots, "plot", unplotted)
    patch.setitem(demo.DEMOS, "digits", demo.DIGITS._replace(**changed))
    yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  return tmp_path_factory.mktemp("demo") / "runs" / "demo"


@pytest.fixture(scope="module")
def ran(short, out):
  return called("demo", "--out", out)


def files_of(out):
  return sorted((out / "samples").glob("*.npz"))


def test_it_prints_the_table_and_the_path_of_the_report(ran, out):
  printed, progress = ran
  assert str(out / "report.html") in printed
  for text in ("method", "Fréchet distance", "judged accuracy", "real images"):
    assert text in printed
  assert "loss=" in progress  # the progress bar
  assert "step/s" in progress or "s/step" in progress


def test_the_sweep_has_every_method_and_scale(ran, out):
  rows = table(out)
  assert list(rows) == [(method, scale) for method in ("cfg", "classifier") for scale in (0.0, 2.0, 30.0)]
  assert all(row["n"] == "40" and float(row["samples_per_second"]) > 0 for row in rows.values())


def test_samples_have_the_same_labels_and_other_images(ran, out):
  seen = []
  for path in files_of(out):
    images, labels = data.load_npz(path)
    assert images.shape == (40, 8, 8, 1)
    assert labels.tolist() == [i % 10 for i in range(40)]
    seen.append(images)
  assert len(seen) == 6
  # Without guidance both methods are the unconditional model. All others differ.
  assert len({images.tobytes() for images in seen}) == 5


def test_the_figures_are_those_of_the_samples(ran, out):
  train = data.load("digits", "train")
  judge = evaluation.Judge.fit(train.images, train.labels)
  rows = table(out)
  points = [json.loads(path.read_text()) for path in (out / "points").glob("*.json")]
  assert len(points) == len(rows)
  for path in (out / "points").glob("*.json"):
    point = json.loads(path.read_text())
    images, labels = data.load_npz(out / "samples" / f"{path.stem}.npz")
    row = rows[point["method"], point["settings"]["scale"]]
    assert float(row["accuracy"]) == judge.accuracy(images, labels)
    pixels = evaluation.pixel_features(images), evaluation.pixel_features(train.images)
    assert float(row["frechet_distance"]) == pytest.approx(evaluation.frechet_distance(*pixels), rel=1e-4)
    assert float(row["diversity"]) == pytest.approx(evaluation.diversity(images, labels), rel=1e-5)


def test_a_second_run_reuses_models_and_samples(ran, out):
  watched = [out / "denoiser" / "model" / "config.json", *files_of(out)]
  before = [path.stat().st_mtime_ns for path in watched]
  _, progress = called("demo", "--out", out, "--no-progress")
  assert "training" not in progress
  assert [path.stat().st_mtime_ns for path in watched] == before


def test_a_report_of_another_seed_is_kept_unless_it_may_be_replaced(ran, out):
  before = (out / "report.html").read_bytes()
  with pytest.raises(ValueError, match=r"seed is 0 there, and 1 here\): choose another folder, or --overwrite"):
    demo.run(out, seed=1, progress=False)
  assert (out / "report.html").read_bytes() == before
  first = {path.read_bytes() for path in files_of(out)}
  demo.run(out, seed=1, overwrite=True, progress=False)
  assert len(files_of(out)) == 6
  assert not first & {path.read_bytes() for path in files_of(out)}


def test_the_networks_of_the_animals_are_those_that_come_with_the_package():
  for name, config in (("animals", demo.ANIMALS.denoiser), ("animals-classifier", demo.ANIMALS.classifier)):
    ours, shipped = models.shapes(config), models.shapes(load(name).config)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(params)) for params in (ours, shipped)]
    assert sizes[0] == sizes[1], name


def test_an_unknown_demo_is_refused():
  with pytest.raises(ValueError, match="unknown demo 'animal': did you mean 'animals'"):
    demo.run(name="animal")


# --- the demo's networks as shipped: its results ----------------------------------------------------

HALF_OF_THE_DEMO = """
import dataclasses
from jaxguide import cli
from jaxguide.evaluation import demo
whole = demo.DIGITS
trainings = {
  name: dataclasses.replace(training, steps=training.steps // 2)
  for name, training in whole._asdict().items() if name.endswith("_training")
}
demo.DEMOS["digits"] = whole._replace(num=200, **trainings)
cli.main()
"""


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
  """The folder of the demo with the networks as shipped, run in its own process with one device, as a user runs it.

  Half of the steps, and 200 samples a scale instead of 500, are enough for what the tests below ask of it.
  """
  out = tmp_path_factory.mktemp("shipped") / "demo"
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
  env.pop("XLA_FLAGS", None)
  command = [sys.executable, "-c", HALF_OF_THE_DEMO, "demo", "--out", str(out)]
  result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
  assert result.returncode == 0, result.stderr
  assert "loss=" in result.stderr
  return out


SCALES = (0, 1, 2, 4, 8)


@pytest.mark.slow
def test_the_shipped_sweep_is_whole(shipped):
  rows = table(shipped)
  assert list(rows) == [(method, scale) for method in ("cfg", "classifier") for scale in SCALES]
  assert all(row["n"] == "200" and float(row["samples_per_second"]) > 0 for row in rows.values())
  for path in files_of(shipped):
    images, labels = data.load_npz(path)
    assert images.shape == (200, 8, 8, 1)
    assert np.bincount(labels).tolist() == [20] * 10


@pytest.mark.slow
def test_fidelity_rises_with_scale(shipped):
  accuracy = by_method(table(shipped), "accuracy")
  assert 0.05 <= accuracy["cfg"][0] <= 0.20
  assert accuracy["cfg"][1] >= 0.85
  assert accuracy["cfg"][4] >= 0.97
  classifier = [accuracy["classifier"][scale] for scale in SCALES]
  assert 0.05 <= classifier[0] <= 0.20
  assert max(classifier) >= 0.90
  assert classifier[0] < classifier[1] < classifier[2] < max(classifier)


@pytest.mark.slow
def test_the_distance_is_least_before_the_largest_scale_and_diversity_falls(shipped):
  for method, distances in by_method(table(shipped), "frechet_distance").items():
    assert min(distances, key=distances.get) < max(distances), method
  for method, values in by_method(table(shipped), "diversity").items():
    assert np.all(np.diff([values[scale] for scale in sorted(values)]) < 0), method


@pytest.mark.slow
def test_sample_finds_the_trained_model(shipped, tmp_path):
  common = ("--model", shipped / "denoiser", "--label", 3, "--num", 15, "--no-progress")
  train = data.load("digits", "train")
  judge = evaluation.Judge.fit(train.images, train.labels)
  for guidance, scale in (("cfg", 2), ("classifier", 5)):
    out = tmp_path / f"{guidance}.npz"
    called("sample", "--out", out, "--guidance", guidance, "--scale", scale, *common)
    assert judge.accuracy(*data.load_npz(out)) >= 0.75
