"""Sweeps: nothing is drawn twice, a stopped sweep goes on, and a folder is widened."""

import csv
import dataclasses
import functools
import json
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from sweeps import unplotted
from tiny import Classify, Mlp

import jaxguide
from jaxguide import data, evaluation, generate, sampling
from jaxguide.evaluation import Options, sweep_plots
from jaxguide.generate import Settings
from jaxguide.models import folders as models
from jaxguide.models.model import shapes
from jaxguide.sampling import batches
from jaxguide.training import ModelConfig

SHAPE = (4, 4, 1)
FEW = Options(resamples=20)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
  """A denoiser and a classifier of three classes, with random parameters."""
  folder = tmp_path_factory.mktemp("networks")
  rng = np.random.default_rng(0)
  for name, network in (("model", Mlp), ("classifier", Classify)):
    config = ModelConfig(network, {}, SHAPE, 3, class_names=("ant", "bee", "cow"))
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), shapes(config))
    models.save(folder / name, models.Model(config, params))
  return folder


@pytest.fixture(scope="module")
def real():
  rng = np.random.default_rng(1)
  return data.Images(rng.integers(0, 256, (60, *SHAPE)).astype(np.uint8), np.arange(60) % 3, 3, "noise")


@pytest.fixture(scope="module")
def sweep(networks, real):
  """``(out, ...) -> Sweep``. One device draws, and the report is without its plots unless they are asked for."""
  base = Settings(model=networks / "model", num=24, steps=3, batch_size=8, solver="ddim")
  common = {"guidance": ["cfg", "classifier"], "reference": real, "features": "pixels", "progress": False}
  common |= {"options": FEW, "devices": jax.devices()[:1]}

  def run(out, scales=(0, 2), settings=base, plots=False, **options):
    with mock.patch.object(sweep_plots, "plot", sweep_plots.plot if plots else unplotted):
      return evaluation.sweep(out, settings, scales=scales, **{**common, **options})

  run.base = base
  return run


@pytest.fixture(scope="module")
def swept(sweep, tmp_path_factory):
  out = tmp_path_factory.mktemp("swept")
  return out, sweep(out, plots=True)


def changed(settings, **values):
  return dataclasses.replace(settings, **values)


def files(out):
  return {path.name: path.read_bytes() for path in (out / "samples").glob("*.npz")}


def test_every_method_at_every_scale_from_the_same_noise(swept):
  out, found = swept
  assert [(point.method, point.values) for point in found.points] == [
    (method, {"scale": scale}) for method in ("cfg", "classifier") for scale in (0.0, 2.0)
  ]
  for point in found.points:
    images, labels = data.load_npz(point.path)
    assert labels.tolist() == [i % 3 for i in range(24)]
    np.testing.assert_array_equal(images, point.images)
    assert point.seconds > 0
    assert point.evaluation.protocol["sampling"]["seed"] == 0
    assert point.evaluation.protocol["sampling"]["scale"] == point.values["scale"]
  # At scale 0 both are the unconditional model.
  np.testing.assert_array_equal(found.points[0].images, found.points[2].images)
  assert found.class_names == ("ant", "bee", "cow")
  assert found.neighbours.shape == (8, 3, *SHAPE)
  rows = list(csv.DictReader((out / "sweep.csv").open()))
  assert [float(row["frechet_distance"]) for row in rows] == [
    point.evaluation.figures["frechet_distance"].value for point in found.points
  ]
  assert "classifier-free guidance" in (out / "report.html").read_text()


def test_figures_are_those_of_evaluate(swept, real):
  for point in swept[1].points:
    images, labels = data.load_npz(point.path)
    again = evaluation.evaluate(images, real, labels=labels, features="pixels", options=FEW, progress=False)
    assert again.figures == point.evaluation.figures


def test_the_nearest_training_images_are_those_of_the_closest_samples(swept, real):
  found = swept[1]
  best = min(found.points, key=lambda point: point.evaluation.figures["frechet_distance"].value)
  a, b = evaluation.pixel_features(best.images), evaluation.pixel_features(real.images)
  distances = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
  closest = np.argsort(distances.min(1), kind="stable")[:8]
  assert sorted(found.neighbour_rows) == sorted(closest)
  for row, pictures in zip(found.neighbour_rows, found.neighbours, strict=True):
    np.testing.assert_array_equal(pictures, real.images[np.argsort(distances[row])[:3]])


def test_nothing_is_drawn_or_measured_twice(swept, sweep, tmp_path, monkeypatch):
  out = shutil.copytree(swept[0], tmp_path / "again")
  before, told = files(out), []
  monkeypatch.setattr(sampling, "sample_shares", lambda *_, **__: pytest.fail("drawn"))
  monkeypatch.setattr(evaluation.points.Measured, "__call__", lambda *_: told.append(1))
  found = sweep(out)
  assert files(out) == before
  assert not told
  assert [point.evaluation.figures for point in found.points] == [point.evaluation.figures for point in swept[1].points]


def test_a_folder_is_widened(swept, sweep, tmp_path):
  out = shutil.copytree(swept[0], tmp_path / "wider")
  before = files(out)
  more = sweep(out, scales=(1,), guidance="cfg")
  assert [(point.method, point.values["scale"]) for point in more.points] == [
    *[("cfg", 1.0)],
    *sorted([("cfg", 0.0), ("cfg", 2.0), ("classifier", 0.0), ("classifier", 2.0)]),
  ]
  other = sweep(out, scales=(0, 1), guidance="cfg", settings=changed(sweep.base, solver="heun"))
  assert {point.values["solver"] for point in other.points} == {"ddim", "heun"}
  assert len(other.points) == 5 + 2
  assert before.items() <= files(out).items()


def test_more_samples_begin_with_those_that_are_there(swept, sweep, tmp_path):
  out = shutil.copytree(swept[0], tmp_path / "more")
  wider = sweep(out, settings=changed(sweep.base, num=40))
  fresh = sweep(tmp_path / "fresh", settings=changed(sweep.base, num=40))
  for old, new, whole in zip(swept[1].points, wider.points, fresh.points, strict=True):
    images, _ = data.load_npz(new.path)
    assert len(images) == 40 == new.evaluation.n
    np.testing.assert_array_equal(images[:24], data.load_npz(old.path)[0])
    np.testing.assert_array_equal(images, data.load_npz(whole.path)[0])
    assert new.evaluation.figures == whole.evaluation.figures
  # Fewer samples than there are: the first of them.
  narrow = sweep(out, settings=changed(sweep.base, num=24))
  assert [point.evaluation.figures for point in narrow.points] == [
    point.evaluation.figures for point in swept[1].points
  ]


def test_a_stopped_sweep_goes_on(swept, sweep, tmp_path, monkeypatch):
  drawn = []
  real_batches = sampling.sample_shares

  def stopping(*args, **options):
    for batch in real_batches(*args, **options):
      drawn.append(batch.num)
      yield batch
      if sum(drawn) == 40:
        raise KeyboardInterrupt

  monkeypatch.setattr(sampling, "sample_shares", stopping)
  out = tmp_path / "stopped"
  with pytest.raises(KeyboardInterrupt):
    sweep(out)
  found = sweep(out)
  assert sum(drawn) == 4 * 24
  assert files(out) == files(swept[0])
  assert [point.evaluation.figures for point in found.points] == [point.evaluation.figures for point in swept[1].points]


def test_each_guidance_is_compiled_once(sweep, tmp_path):
  sizes = []
  for scales in ((0.5,), (0.7, 3)):
    sweep(tmp_path / "sweep", scales=scales, over=["cfg:sigma_hi=2,5"])
    sizes.append(batches._sample_many._cache_size())
  assert sizes[0] == sizes[1]


def test_options_and_fields_are_swept(sweep, tmp_path):
  over = ["steps=2,3", "cfg:sigma_hi=1,inf"]
  found = sweep(tmp_path, scales=(2,), guidance="cfg", over=over, measures=["frechet_distance", "recall"], plots=True)
  assert [dict(point.values) for point in found.points] == [
    {"scale": 2.0, "steps": steps, "cfg:sigma_hi": high} for steps in (2, 3) for high in ("1", "inf")
  ]
  assert found.axis == "steps"
  assert len({point.images.tobytes() for point in found.points}) == 4


def test_other_measures_and_features_are_measured_anew_without_drawing(swept, sweep, tmp_path, monkeypatch):
  out = shutil.copytree(swept[0], tmp_path / "measured")
  monkeypatch.setattr(sampling, "sample_shares", lambda *_, **__: pytest.fail("drawn"))
  found = sweep(out, measures=["kid"], options=Options(subset_size=10))
  assert all(list(point.evaluation.figures) == ["kid"] for point in found.points)
  assert found.points[0].evaluation.protocol["options"]["subset_size"] == 10


def test_a_damaged_or_missing_file_of_figures_is_made_again(swept, sweep, tmp_path):
  out = shutil.copytree(swept[0], tmp_path / "damaged")
  first, second, third, _ = sorted((out / "points").glob("*.json"))
  first.write_text("{")
  second.unlink()
  third.write_text(json.dumps({**json.loads(third.read_text()), "evaluation": {}}))
  (out / "reference.npz").write_bytes(b"PK")
  assert [point.evaluation.figures for point in sweep(out).points] == [
    point.evaluation.figures for point in swept[1].points
  ]


def test_samples_that_are_not_finite_leave_out_their_point(sweep, tmp_path, monkeypatch, capsys):
  draw = sampling.sample_shares

  def failing(denoise, *args, **options):
    if any(leaf == 7 for leaf in jax.tree.leaves(denoise) if np.ndim(leaf) == 0):
      raise FloatingPointError("sample 3 is not finite")
    return draw(denoise, *args, **options)

  monkeypatch.setattr(sampling, "sample_shares", failing)
  with pytest.warns(UserWarning, match="is left out: sample 3 is not finite"):
    found = sweep(tmp_path, scales=(1, 7), guidance="cfg", progress=True)
  assert "| 96/96 [" in capsys.readouterr().err  # The bar goes on to its end.
  assert [point.values["scale"] for point in found.points] == [1.0]
  assert "cfg at scale 7" in found.facts["failed"]


def test_a_retrained_model_is_not_mixed_with_samples_of_the_old_one(networks, sweep, real, tmp_path):
  folder = shutil.copytree(networks, tmp_path / "networks")
  run = functools.partial(sweep, tmp_path / "out", settings=changed(sweep.base, model=folder / "model"))
  run(guidance="cfg")
  model = models.load(folder / "model")
  models.save(folder / "model", models.Model(model.config, jax.tree.map(lambda leaf: leaf * 1.01, model.params)))
  for scales in ((0, 2), (3,)):
    with pytest.raises(ValueError, match=r"has points of another model: cfg_0_.*as it was.*other weights.*--overwrite"):
      run(guidance="cfg", scales=scales)
  before = files(tmp_path / "out")
  run(guidance="cfg", overwrite=True)
  assert not set(before.values()) & set(files(tmp_path / "out").values())


def test_a_stopped_point_goes_on_with_more_samples_and_other_batches(sweep, tmp_path, monkeypatch):
  draw = sampling.sample_shares

  def stopping(*args, **options):
    for i, batch in enumerate(draw(*args, **options)):
      yield batch
      if i == 1:
        raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(sampling, "sample_shares", stopping)
    with pytest.raises(KeyboardInterrupt):
      sweep(tmp_path / "a", scales=(1,), guidance="cfg")
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  more = changed(sweep.base, num=40, batch_size=12)
  (point,) = sweep(tmp_path / "a", scales=(1,), guidance="cfg", settings=more).points
  (whole,) = sweep(tmp_path / "whole", scales=(1,), guidance="cfg", settings=more).points
  np.testing.assert_array_equal(point.images, whole.images)
  other = changed(sweep.base, seed=3)
  sweep(tmp_path / "b", scales=(1,), guidance="cfg", settings=other, overwrite=True)
  assert len(list((tmp_path / "b" / "samples").iterdir())) == 1


def test_points_of_an_older_jaxguide_are_left_out(swept, sweep, tmp_path, monkeypatch):
  out = shutil.copytree(swept[0], tmp_path / "out")
  monkeypatch.setattr(jaxguide, "__version__", "0.0")
  found = sweep(out, scales=(3,), guidance="cfg")
  assert [point.values["scale"] for point in found.points] == [3.0]
  assert "cfg_0_" in found.facts["left out"]
  with pytest.raises(ValueError, match="exists already, made with other settings"):
    sweep(out, scales=(2,), guidance="cfg")


def saved(folder, config, factor=1.0):
  params = jax.tree.map(lambda leaf: factor * np.ones(leaf.shape, leaf.dtype), shapes(config))
  models.save(folder, models.Model(config, params))
  return folder


def test_a_folder_of_another_model_is_refused_before_any_work(swept, sweep, networks, tmp_path, monkeypatch):
  out = shutil.copytree(swept[0], tmp_path / "out")
  config = models.load(networks / "model").config
  with monkeypatch.context() as patch:
    patch.setattr(sampling, "sample_shares", lambda *_, **__: pytest.fail("drawn"))
    for shape, message in (((4, 4, 1), "other weights"), ((6, 6, 1), r"network.image_shape is \[4, 4, 1\]")):
      other = saved(tmp_path / "other", dataclasses.replace(config, image_shape=shape))
      reference = data.Images(np.zeros((9, *shape), np.uint8), np.arange(9) % 3, 3, "others")
      with pytest.raises(ValueError, match=rf"is of .*model, and this sweep of .*other \({message}.*another folder"):
        sweep(out, guidance="cfg", settings=changed(sweep.base, model=other), reference=reference)
      shutil.rmtree(other)
    # The same model in another place is the same model.
    moved = shutil.copytree(networks, tmp_path / "moved")
    assert len(sweep(out, settings=changed(sweep.base, model=moved / "model")).points) == 4


def test_samples_that_were_replaced_are_not_shown_beside_old_figures(swept, sweep, tmp_path):
  out = shutil.copytree(swept[0], tmp_path / "replaced")
  path = next((out / "samples").glob("cfg_0_*.npz"))
  images, labels = data.load_npz(path)
  data.save_npz(path, 255 - images, labels, data.settings_of(path))
  found = sweep(out, scales=(2,))
  assert sorted((point.method, point.values["scale"]) for point in found.points) == [
    ("cfg", 2.0), ("classifier", 0.0), ("classifier", 2.0),
  ]  # fmt: skip
  again = sweep(out)
  assert again.points[0].evaluation.figures != swept[1].points[0].evaluation.figures


def test_another_choice_of_labels_is_another_curve(swept, sweep, tmp_path):
  out = shutil.copytree(swept[0], tmp_path / "labels")
  found = sweep(out, scales=(2,), guidance="cfg", settings=changed(sweep.base, labels=(1,)))
  assert {point.values["labels"] for point in found.points} == {"all", "1"}
  assert len(sweep(out).points) == 5


def test_a_statistics_file_that_changed_is_another_reference(sweep, tmp_path):
  pixels = evaluation.chosen_features("pixels", SHAPE)
  values = []
  for mean in (0.0, 5.0):
    statistics = evaluation.Statistics(np.full(16, mean), np.eye(16), protocol=pixels.protocol)
    evaluation.write_statistics(tmp_path / "stats.npz", statistics)
    found = sweep(tmp_path / "out", scales=(1,), guidance="cfg", reference=tmp_path / "stats.npz")
    values.append(found.points[0].evaluation.figures["frechet_distance"].value)
  assert values[1] > values[0] + 100


def test_a_scale_in_the_text_of_a_guidance(sweep, tmp_path):
  found = sweep(tmp_path, scales=None, guidance="cfg:scale=3,none", devices=None)
  assert [point.values["scale"] for point in found.points] == [3.0, 1.0]


def test_what_is_refused_before_anything_is_drawn(sweep, networks, tmp_path):
  for options, message in (
    ({"guidance": "cgf"}, "did you mean 'cfg'"),
    ({"scales": (1,), "over": ["cfg:sigma_lo=1e9"]}, "sigma_lo"),
    ({"reference": None}, "the data that .* was trained on are not known.*give a reference"),
    ({"reference": "no/such"}, "there is no file or folder"),
    ({"features": "incption"}, "did you mean 'inception'"),
    ({"measures": ["inception_score"]}, "inception_score needs logits"),
    ({"judge": "nobody"}, "unknown judge"),
    ({"settings": Settings(model=networks / "model", num=1)}, "num must be"),
    ({"settings": changed(sweep.base, num=4), "measures": ["recall"]}, "recall needs more than 5 images"),
    ({"settings": Settings(model=tmp_path / "none")}, "there is no model"),
    ({"settings": Settings(model=networks / "model", labels=("dog",))}, "unknown class 'dog'"),
    ({"settings": changed(sweep.base, steps="2,3")}, r"sweep several by over \(--over steps=2,3\)"),
  ):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      sweep(tmp_path / "out", **options)
    assert not list((tmp_path / "out" / "samples").glob("*")), options
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"out must be a folder, and .*file is a file"):
    sweep(tmp_path / "file")


# --- one point, however its settings are written ---------------------------------------------------

SAME = {
  "a text": {"settings": {"steps": "3"}},
  "in the guidance": {"guidance": "cfg:scale=2", "scales": None},
  "the defaults": {"guidance": "cfg:combine=linear,profile=constant"},
  "options": {"settings": {"solver": "ddim:eta=0", "grid": "karras"}},
  "swept": {"settings": {"steps": 5}, "over": {"steps": [3], "solver": ["ddim:eta=0.0"]}},
  "swept scales": {"over": ["cfg:scale=2"], "scales": None},
  "names": {"settings": {"labels": ("ant", 1, "cow")}},
}


@pytest.fixture(scope="module")
def one_point(sweep, tmp_path_factory):
  """A folder with one point."""
  out = tmp_path_factory.mktemp("one")
  sweep(out, scales=(2,), guidance="cfg")
  return out


@pytest.mark.parametrize("how", SAME)
def test_a_point_is_what_its_settings_amount_to(one_point, sweep, tmp_path, monkeypatch, how):
  out = shutil.copytree(one_point, tmp_path / "out")
  (before,) = files(out)
  monkeypatch.setattr(sampling, "sample_shares", lambda *_, **__: pytest.fail("drawn"))
  monkeypatch.setattr(evaluation.points.Measured, "__call__", lambda *_: pytest.fail("measured"))
  chosen = {"guidance": "cfg", "scales": (2,), **SAME[how]}
  (point,) = sweep(out, **{**chosen, "settings": changed(sweep.base, **chosen.get("settings", {}))}).points
  assert list(files(out)) == [before]
  assert point.values == {"scale": 2.0}


@pytest.mark.parametrize(
  "other",
  [
    {"scale": 3},
    {"guidance": "cfg:sigma_hi=inf"},
    {"guidance": ("cfg", "clip")},
    {"solver": "euler"},
    {"solver": "ddim:eta=0.5"},
    {"steps": 4},
    {"seed": 1},
    {"clip": False},
    {"grid": "cosine-time"},
    {"labels": (0, 1)},
  ],
)
def test_what_is_not_the_same_is_another_point(sweep, other):
  base = changed(sweep.base, guidance="cfg", scale=2)
  assert generate.identity(base) != generate.identity(changed(base, **other))


def test_defaults_that_follow_from_the_networks(networks, tmp_path):
  config = models.load(networks / "model").config
  learned = saved(tmp_path / "model", dataclasses.replace(config, variance="large"))
  saved(tmp_path / "classifier", dataclasses.replace(models.load(networks / "classifier").config, scale=5.0))
  base = Settings(model=learned, guidance="classifier", solver="ddpm")
  for same, other in (
    ({"solver": "ddpm:variance=large"}, {"solver": "ddpm:variance=small"}),
    ({"scale": 5}, {"scale": 2}),
    ({"classifier": tmp_path / "classifier"}, {"classifier": networks / "classifier"}),
  ):
    assert generate.identity(base) == generate.identity(changed(base, **same))
    assert generate.identity(base) != generate.identity(changed(base, **other))


def test_a_folder_with_the_same_point_twice_is_read_with_one(one_point, sweep, tmp_path):
  """Folders from before have points of steps 3 and "3". The report of another solver needs each value once."""
  out = shutil.copytree(one_point, tmp_path / "out")
  (path,) = (out / "points").glob("*.json")
  samples = out / "samples" / f"{path.stem}.npz"
  for name in ("cfg_2_0123456789", "cfg_2_fedcba9876"):
    content = json.loads(path.read_text())
    content["settings"]["steps"] = "3"
    (out / "points" / f"{name}.json").write_text(json.dumps(content))
    record = json.loads(data.settings_of(samples))
    record["settings"]["steps"] = "3"
    data.save_npz(out / "samples" / f"{name}.npz", *data.load_npz(samples), json.dumps(record))
  before = files(out)
  found = sweep(out, scales=(2,), guidance="cfg", settings=changed(sweep.base, solver="heun"), plots=True)
  assert sorted(point.values["solver"] for point in found.points) == ["ddim", "heun"]
  assert before.items() <= files(out).items()
  path.unlink()
  samples.unlink()
  for steps in ("3", 3):
    (again,) = (p for p in sweep(out, scales=(2,), guidance="cfg", settings=changed(sweep.base, steps=steps)).points
                if p.values["solver"] == "ddim")  # fmt: skip
    assert again.path.stem == "cfg_2_0123456789"
  assert len(files(out)) == 3


def test_another_classifier_is_another_curve(networks, sweep, tmp_path):
  folder = shutil.copytree(networks, tmp_path / "networks")
  other = shutil.copytree(networks / "classifier", folder / "other")
  for classifier in (None, folder / "classifier", other):
    settings = changed(sweep.base, model=folder / "model", classifier=classifier)
    found = sweep(tmp_path / "out", scales=(2,), guidance="classifier", settings=settings)
  assert len(found.points) == 2
  assert len({str(dict(point.values)) for point in found.points}) == 2


def test_figures_of_more_samples_are_not_replaced_without_a_word(one_point, sweep, tmp_path):
  out = shutil.copytree(one_point, tmp_path / "out")
  with pytest.warns(UserWarning, match="has figures of 24 samples, and num is 12: .* give num 24 again"):
    sweep(out, scales=(2,), guidance="cfg", settings=changed(sweep.base, num=12))


def test_a_model_without_classes_takes_no_scales_and_no_labels(sweep, tmp_path):
  model = saved(tmp_path / "model", ModelConfig(Mlp, {}, SHAPE, None))
  settings = changed(sweep.base, model=model)
  with pytest.raises(ValueError, match=r"no guidance takes a scale, leave out scales \(--scales\)"):
    sweep(tmp_path / "out", settings=settings, guidance=None)
  for label in ("cat", 3):
    with pytest.raises(ValueError, match=r"the model has no classes, .* leave out the labels"):
      sweep(tmp_path / "out", settings=changed(settings, labels=(label,)), guidance=None, scales=None)


def test_the_bar_says_what_is_done(sweep, tmp_path, monkeypatch):
  told, totals = [], []

  class Bar:
    __enter__ = lambda self: self  # noqa: E731
    __exit__ = lambda self, *_: None  # noqa: E731
    update = lambda self, number: told.append(number)  # noqa: E731
    set_postfix_str = lambda self, text: told.append(text)  # noqa: E731

  def bar(total, **_):
    totals.append(total)
    return Bar()

  monkeypatch.setattr(evaluation.points, "progress_bar", bar)
  options = {"guidance": "cfg", "measures": ["frechet_distance", "diversity"], "settings": changed(sweep.base, num=12)}
  sweep(tmp_path, scales=(1, 2), **options)
  titles = [evaluation.MEASURES[name].title for name in options["measures"]]

  def measured(scale):
    at = f"cfg, scale {scale}, measuring"
    # The features are half of the work, and each figure half of the rest.
    return [0, at, f"{at}: features", 6, f"{at}: {titles[0]}", 0, f"{at}: {titles[1]}", 3, 3]

  first = ["cfg, scale 1", "cfg, scale 1, compiling", 0, "cfg, scale 1", 8, 4, *measured(1)]
  assert told == [*first, "cfg, scale 2", 0, 8, 4, *measured(2)]
  assert sum(step for step in told if not isinstance(step, str)) == totals.pop() == 2 * 2 * 12
  told.clear()
  sweep(tmp_path, scales=(1,), **options)  # All is there.
  assert told == ["cfg, scale 1", 12, "cfg, scale 1, measuring", 12]
  assert totals == [24]
