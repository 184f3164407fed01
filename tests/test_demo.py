"""The main job, run as the README says, and what it has to show."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxguide import data, demo, evaluation

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("demo")]

ROOT = Path(__file__).parent.parent


def jaxguide(*args):
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
  env.pop("XLA_FLAGS", None)  # one device, as a user has it
  command = [sys.executable, "-m", "jaxguide.cli", *map(str, args)]
  return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
  return tmp_path_factory.mktemp("demo") / "runs" / "demo"


@pytest.fixture(scope="module")
def ran(out):
  result = jaxguide("demo", "--out", out)
  assert result.returncode == 0, result.stderr
  return result


@pytest.fixture(scope="module")
def rows(ran, out):
  return evaluation.read_csv(out / "sweep.csv")


def by_method(rows, column):
  values = defaultdict(dict)
  for row in rows:
    values[row.method][row.scale] = getattr(row, column)
  return values


def test_it_says_what_it_made(ran, rows, out):
  assert evaluation.table(rows) in ran.stdout
  assert str(out / "report.html") in ran.stdout
  assert "loss=" in ran.stderr  # the progress bar
  assert "step/s" in ran.stderr or "s/step" in ran.stderr


def test_the_sweep_is_whole(rows):
  assert [(row.method, row.scale) for row in rows] == [(m, s) for m, scales in demo.SCALES.items() for s in scales]
  assert all(row.n == 500 and row.samples_per_second > 0 for row in rows)


def test_fidelity_rises_with_scale(rows):
  accuracy = by_method(rows, "accuracy")
  assert 0.05 <= accuracy["cfg"][0] <= 0.20
  assert accuracy["cfg"][1] >= 0.85
  assert accuracy["cfg"][4] >= 0.97
  classifier = [accuracy["classifier"][scale] for scale in demo.SCALES["classifier"]]
  assert 0.05 <= classifier[0] <= 0.20
  assert max(classifier) >= 0.90
  assert classifier[0] < classifier[1] < classifier[2] < max(classifier)


def test_the_distance_is_least_before_the_largest_scale_and_diversity_falls(rows):
  for method, distances in by_method(rows, "frechet_distance").items():
    assert min(distances, key=distances.get) < max(distances), method
  for method, values in by_method(rows, "diversity").items():
    assert np.all(np.diff([values[scale] for scale in sorted(values)]) < 0), method


def test_the_files_are_what_they_should_be(rows, out):
  for row in rows:
    stem = out / "samples" / f"{row.method}_{row.scale:g}"
    images, labels = data.load_npz(f"{stem}.npz")
    assert images.shape == (500, 8, 8, 1)
    assert np.bincount(labels).tolist() == [50] * 10
    assert Image.open(f"{stem}.png").size[0] > 400
  assert Image.open(out / "fidelity.png").size[0] > 800
  report = (out / "report.html").read_text()
  assert report.count("data:image/png;base64,") == len(rows) + 1
  assert "http" not in report.replace("http-equiv", "")


def test_the_figures_are_those_of_the_samples(rows, out):
  train = data.load("digits", "train")
  judge = evaluation.Judge.fit(train.images, train.labels)
  for row in rows[::4]:
    images, labels = data.load_npz(out / "samples" / f"{row.method}_{row.scale:g}.npz")
    again = evaluation.measure(images, labels, judge, train.images)
    assert again.accuracy == row.accuracy
    assert again.frechet_distance == pytest.approx(row.frechet_distance)
    assert again.diversity == pytest.approx(row.diversity)


def test_run_again_it_reuses_what_it_trained_and_gives_the_same(ran, rows, out):
  trained = (out / "denoiser" / "config.json").stat().st_mtime_ns
  result = jaxguide("demo", "--out", out, "--no-progress")
  assert result.returncode == 0, result.stderr
  assert (out / "denoiser" / "config.json").stat().st_mtime_ns == trained
  again = evaluation.read_csv(out / "sweep.csv")
  assert [row.accuracy for row in again] == [row.accuracy for row in rows]


def test_sample_finds_the_trained_model(ran, out, tmp_path):
  common = ("--model", out / "denoiser", "--label", 3, "--num", 16)
  train = data.load("digits", "train")
  judge = evaluation.Judge.fit(train.images, train.labels)
  for guidance, scale in (("cfg", 2), ("classifier", 5)):
    made = jaxguide("sample", "--out", tmp_path / "s.npz", "--guidance", guidance, "--scale", scale, *common)
    assert made.returncode == 0, made.stderr
    assert judge.accuracy(*data.load_npz(tmp_path / "s.npz")) >= 0.75
