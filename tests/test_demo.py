"""The demo: all files of a shortened run, and the results of a full run as in the README."""

import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxguide import cli, data, evaluation
from jaxguide.evaluation import demo

ROOT = Path(__file__).parent.parent


def by_method(rows, column):
  values = defaultdict(dict)
  for row in rows:
    values[row.method][row.scale] = getattr(row, column)
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
  """Shorten the demo: small networks with 3 steps of training, fewer scales and samples."""
  with pytest.MonkeyPatch.context() as patch:
    for name in ("DENOISER", "CLASSIFIER"):
      config, training = getattr(demo, name), getattr(demo, f"{name}_TRAINING")
      fields = {
        **config.fields,
        "model_channels": 8,
        "channel_mult": (1,),
        "attention_resolutions": (),
        "num_head_channels": 8,
      }
      patch.setattr(demo, name, dataclasses.replace(config, fields=fields))
      # A batch of 3 runs on one device.
      patch.setattr(demo, f"{name}_TRAINING", dataclasses.replace(training, steps=3, batch_size=3))
    for name, value in (("NUM", 40), ("STEPS", 3), ("BATCH", 20)):
      patch.setattr(demo, name, value)
    patch.setattr(demo, "SCALES", {"cfg": (0.0, 2.0), "classifier": (1.0, 30.0)})
    yield


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  return tmp_path_factory.mktemp("demo") / "runs" / "demo"


@pytest.fixture(scope="module")
def ran(short, out):
  return called("demo", "--out", out)


@pytest.fixture(scope="module")
def rows(ran, out):
  return evaluation.read_csv(out / "sweep.csv")


def samples(out, row):
  return data.load_npz(out / "samples" / f"{row.method}_{row.scale:g}.npz")


def test_it_prints_the_table_and_the_path_of_the_report(ran, rows, out):
  printed, progress = ran
  assert evaluation.table(rows) in printed
  assert str(out / "report.html") in printed
  assert "loss=" in progress  # the progress bar
  assert "step/s" in progress or "s/step" in progress


def test_the_sweep_has_every_method_and_scale(rows):
  assert [(row.method, row.scale) for row in rows] == [(m, s) for m, scales in demo.SCALES.items() for s in scales]
  assert all(row.n == 40 and row.samples_per_second > 0 for row in rows)


def test_the_samples_the_plot_and_the_report_are_written(rows, out):
  seen = []
  for row in rows:
    images, labels = samples(out, row)
    assert images.shape == (40, 8, 8, 1)
    assert labels.tolist() == [i % 10 for i in range(40)]
    assert Image.open(out / "samples" / f"{row.method}_{row.scale:g}.png").size[0] > 150
    assert not any(np.array_equal(images, other) for other in seen)  # Each row has another method or scale.
    seen.append(images)
  assert Image.open(out / "fidelity.png").size[0] > 800
  report = (out / "report.html").read_text()
  assert report.count("data:image/png;base64,") == len(rows) + 1
  assert "http" not in report.replace("http-equiv", "")


def test_the_figures_are_those_of_the_samples(rows, out):
  train = data.load("digits", "train")
  judge = evaluation.Judge.fit(train.images, train.labels)
  for row in rows:
    again = evaluation.measure(*samples(out, row), judge, train.images)
    assert again.accuracy == row.accuracy
    assert again.frechet_distance == pytest.approx(row.frechet_distance)
    assert again.diversity == pytest.approx(row.diversity)


def test_a_second_run_reuses_the_models_and_has_the_same_results(ran, rows, out):
  trained = (out / "denoiser" / "model" / "config.json").stat().st_mtime_ns
  before = [samples(out, row)[0] for row in rows]
  _, progress = called("demo", "--out", out, "--no-progress")
  assert "training" not in progress
  assert (out / "denoiser" / "model" / "config.json").stat().st_mtime_ns == trained
  again = evaluation.read_csv(out / "sweep.csv")
  assert [row.accuracy for row in again] == [row.accuracy for row in rows]
  for row, images in zip(rows, before, strict=True):
    np.testing.assert_array_equal(samples(out, row)[0], images)


def test_another_seed_draws_other_samples(ran, rows, out, monkeypatch):
  before = samples(out, rows[0])[0]
  monkeypatch.setattr(demo, "SCALES", {"cfg": (0.0,), "classifier": ()})
  ((*_, images, _),) = demo._sweep(*_sweep_inputs(out), seed=1, progress=False)
  assert (images != before).any()


def test_a_report_of_another_seed_is_kept_unless_it_may_be_replaced(ran, rows, out, monkeypatch):
  before = (out / "report.html").read_bytes()
  with pytest.raises(
    ValueError, match=r"samples\.seed is 0 there, and 1 here\): choose another folder, or --overwrite"
  ):
    demo.run(out, seed=1, progress=False)
  assert (out / "report.html").read_bytes() == before

  def interrupted(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(demo, "train", interrupted)
  with pytest.raises(KeyboardInterrupt):
    demo.run(out, seed=1, overwrite=True, progress=False)


def _sweep_inputs(out):
  denoiser, classifier = demo.train(out, progress=False)
  return denoiser.denoiser, demo.guidances(denoiser, classifier), np.arange(40, dtype=np.int32) % 10


# --- the full demo: its results ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
  """The folder of the full demo, run in its own process with one device, as a user runs it."""
  out = tmp_path_factory.mktemp("shipped") / "demo"
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
  env.pop("XLA_FLAGS", None)
  command = [sys.executable, "-m", "jaxguide.cli", "demo", "--out", str(out)]
  result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
  assert result.returncode == 0, result.stderr
  rows = evaluation.read_csv(out / "sweep.csv")
  assert evaluation.table(rows) in result.stdout
  assert "loss=" in result.stderr
  return out


@pytest.fixture(scope="module")
def figures(shipped):
  return evaluation.read_csv(shipped / "sweep.csv")


@pytest.mark.slow
def test_the_shipped_sweep_is_whole(figures, shipped):
  # Not from demo.SCALES, which may be shortened in this process.
  scales = {"cfg": (0, 1, 2, 4, 8), "classifier": (0, 1, 2, 5, 10)}
  assert [(row.method, row.scale) for row in figures] == [(m, s) for m in scales for s in scales[m]]
  assert all(row.n == 500 and row.samples_per_second > 0 for row in figures)
  for row in figures:
    images, labels = samples(shipped, row)
    assert images.shape == (500, 8, 8, 1)
    assert np.bincount(labels).tolist() == [50] * 10
    assert Image.open(shipped / "samples" / f"{row.method}_{row.scale:g}.png").size[0] > 400


@pytest.mark.slow
def test_fidelity_rises_with_scale(figures):
  accuracy = by_method(figures, "accuracy")
  assert 0.05 <= accuracy["cfg"][0] <= 0.20
  assert accuracy["cfg"][1] >= 0.85
  assert accuracy["cfg"][4] >= 0.97
  classifier = [accuracy["classifier"][scale] for scale in (0, 1, 2, 5, 10)]
  assert 0.05 <= classifier[0] <= 0.20
  assert max(classifier) >= 0.90
  assert classifier[0] < classifier[1] < classifier[2] < max(classifier)


@pytest.mark.slow
def test_the_distance_is_least_before_the_largest_scale_and_diversity_falls(figures):
  for method, distances in by_method(figures, "frechet_distance").items():
    assert min(distances, key=distances.get) < max(distances), method
  for method, values in by_method(figures, "diversity").items():
    assert np.all(np.diff([values[scale] for scale in sorted(values)]) < 0), method


@pytest.mark.slow
def test_sample_finds_the_trained_model(shipped, tmp_path):
  common = ("--model", shipped / "denoiser", "--label", 3, "--num", 16, "--no-progress")
  train = data.load("digits", "train")
  judge = evaluation.Judge.fit(train.images, train.labels)
  for guidance, scale in (("cfg", 2), ("classifier", 5)):
    out = tmp_path / f"{guidance}.npz"
    called("sample", "--out", out, "--guidance", guidance, "--scale", scale, *common)
    assert judge.accuracy(*data.load_npz(out)) >= 0.75
