"""Metrics against closed forms, the table of measures, sweep tables, the plot and the report."""

import base64
import copy
import io
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from jaxguide import evaluation
from jaxguide.evaluation import Judge, Measures, Row


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


# --- rows ---


def test_evaluate_measures_samples_as_the_metrics_do(judge, digits):
  (reference, _), (images, labels) = digits
  row = evaluation.evaluate("cfg", 2, images, labels, seconds=4, judge=judge, reference_images=reference)
  assert row == Row(
    method="cfg",
    scale=2.0,
    n=500,
    figures={
      "accuracy": judge.accuracy(images, labels),
      "frechet_distance": evaluation.frechet_distance(
        evaluation.pixel_features(images), evaluation.pixel_features(reference)
      ),
      "diversity": evaluation.diversity(images, labels),
    },
    samples_per_second=125.0,
  )
  inputs = {"judge": judge, "reference_images": reference}
  with pytest.raises(ValueError, match="seconds must be more than 0"):
    evaluation.evaluate("cfg", 2, images, labels, seconds=0, **inputs)
  with pytest.raises(ValueError, match="scale must be finite"):
    evaluation.evaluate("cfg", float("inf"), images, labels, seconds=1, **inputs)


def figures(accuracy, frechet_distance, diversity):
  return {"accuracy": accuracy, "frechet_distance": frechet_distance, "diversity": diversity}


@pytest.fixture
def rows():
  scales = (4.0, 0.0, 1.0)  # not sorted: the report sorts them
  cfg = [Row("cfg", s, 500, figures(0.5 + s / 8, 0.3 + (s - 1) ** 2, 2 - s / 10), 100 / 3) for s in scales]
  other = [Row('odd, "<b>"', s, 400, figures(0.9, 1.5 - s / 8, 1.5), 12345.6) for s in scales]
  return cfg + other


def test_csv_round_trip(rows, tmp_path):
  path = tmp_path / "new" / "sweep.csv"
  evaluation.write_csv(path, rows)
  assert evaluation.read_csv(path) == rows
  assert path.read_text().splitlines()[0] == ("method,scale,n,accuracy,frechet_distance,diversity,samples_per_second")
  evaluation.write_csv(path, rows[:1])
  assert evaluation.read_csv(path) == rows[:1]
  assert list(path.parent.iterdir()) == [path]


def test_rows_may_come_from_a_generator(rows, tmp_path):
  evaluation.write_csv(tmp_path / "t.csv", (row for row in rows))
  assert evaluation.read_csv(tmp_path / "t.csv") == rows


def test_a_failed_write_leaves_the_old_file(rows, tmp_path, monkeypatch):
  path = tmp_path / "sweep.csv"
  evaluation.write_csv(path, rows)

  def full(self, target):
    raise OSError("no space left on device")

  monkeypatch.setattr("pathlib.Path.replace", full)
  with pytest.raises(OSError, match="no space"):
    evaluation.write_csv(path, rows[:1])
  assert evaluation.read_csv(path) == rows
  assert list(tmp_path.iterdir()) == [path]


def test_read_csv_refuses(rows, tmp_path):
  path = tmp_path / "sweep.csv"
  path.write_text("a,b\n1,2\n")
  with pytest.raises(ValueError, match="not a sweep table: its first line must be 'method,scale,"):
    evaluation.read_csv(path)
  evaluation.write_csv(path, rows)
  path.write_text(path.read_text() + "cfg,two,500,1,1,1,1\n")
  with pytest.raises(ValueError, match=f"line {len(rows) + 2} of .*'two'"):
    evaluation.read_csv(path)
  with pytest.raises(FileNotFoundError):
    evaluation.read_csv(tmp_path / "absent.csv")


def test_table_is_aligned(rows):
  lines = evaluation.table(rows).splitlines()
  assert len({len(line) for line in lines}) == 1
  assert not any(line.endswith(" ") for line in lines)  # numbers are aligned on the right
  assert lines[1].split() == ["cfg", "4", "500", "1.000", "9.300", "1.600", "33.3"]


# --- the report ---


def png(gray):
  from PIL import Image

  file = io.BytesIO()
  Image.fromarray(np.full((9, 9), gray, np.uint8)).save(file, "png")
  return file.getvalue()


REAL = Measures(450, figures(0.987, 0.0625, 2.125))


@pytest.fixture
def grids(rows):
  return {(row.method, row.scale): png(i) for i, row in enumerate(rows)}


def write(path, rows, grids, **changes):
  evaluation.write_report(
    path,
    **{
      "title": "A sweep",
      "rows": rows,
      "grids": grids,
      "plot": png(255),
      "real": REAL,
      "facts": {"Seed": "7"},
      **changes,
    },
  )
  return path.read_text("utf-8")


def test_report_is_self_contained(rows, grids, tmp_path):
  page = write(tmp_path / "report.html", rows, grids)
  assert not re.search(r"https?:|<script|<link|<iframe|@import|url\(|\bon\w+=", page)
  sources = re.findall(r'src="([^"]*)"', page)
  assert len(sources) == len(grids) + 1
  embedded = {base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in sources}
  assert embedded == {*grids.values(), png(255)}
  assert "{{" not in page
  assert "{%" not in page


def test_report_summarises_the_rows(rows, grids, tmp_path):
  def text(rows):
    html = write(tmp_path / "report.html", rows, grids)
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", "", html, flags=re.DOTALL))

  page = text(rows)
  assert (
    "With classifier-free guidance, judged accuracy is highest at scale 4 (1.000); Fréchet distance on pixels is "
    "lowest at scale 1 (0.300); diversity within a class is 2.000 at scale 0 and 1.600 at scale 4."
  ) in page
  assert "highest at scales 0, 1 and 4 (0.900)" in page
  assert "For the real test split, judged accuracy is 0.987; Fréchet distance on pixels is 0.062; diversity" in page
  assert "here 400, 500 per row" in page
  assert "On the real test split its accuracy is 98.7%" in page
  better = [replace(r, figures={**r.figures, "frechet_distance": 0.01}) if r.scale == 4 else r for r in rows]
  assert "lowest at scale 4 (0.010)" in text(better)
  assert "lowest at scale 1" not in text(better)


def test_report_escapes_html(rows, grids, tmp_path):
  hostile = '<script>alert("x")</script>'
  page = write(tmp_path / "r.html", rows, grids, title=hostile, facts={hostile: hostile})
  assert "<script" not in page
  assert page.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;") == 4
  assert "odd, &#34;&lt;b&gt;&#34;" in page
  assert "<b>" not in page


def test_report_refuses(rows, grids, tmp_path):
  path = tmp_path / "report.html"
  with pytest.raises(ValueError, match="there are no rows"):
    write(path, [], {})
  with pytest.raises(ValueError, match="grid of 'cfg' at scale 3 but no such row"):
    write(path, rows, {("cfg", 3.0): png(0)})
  with pytest.raises(ValueError, match="grid of 'cfg' at scale 4 must be the bytes of a PNG"):
    write(path, rows, {("cfg", 4.0): b"\xff\xd8\xff\xe0JFIF"})
  assert not path.exists()


def test_plot_shows_every_row_and_the_real_data(rows, monkeypatch):
  from matplotlib.figure import Figure
  from PIL import Image

  plots = []
  save = Figure.savefig
  monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (plots.append(self), save(self, *a, **k))[1])
  image = Image.open(io.BytesIO(evaluation.fidelity_plot(rows, REAL)))
  assert image.format == "PNG"
  assert min(image.size) > 800
  (figure,) = plots
  accuracy, frechet, diversity, plane = figure.axes
  by_scale = sorted((r for r in rows if r.method == "cfg"), key=lambda r: r.scale)
  for axes, column in ((accuracy, "accuracy"), (frechet, "frechet_distance"), (diversity, "diversity")):
    real, line, _ = axes.lines
    assert set(real.get_ydata()) == {getattr(REAL, column)}
    np.testing.assert_array_equal(line.get_xdata(), [0, 1, 4])
    np.testing.assert_array_equal(line.get_ydata(), [getattr(r, column) for r in by_scale])
  assert [t.get_text() for t in plane.texts] == ["0", "1", "4"] * 2
  names = [t.get_text() for t in figure.legends[0].get_texts()]
  assert names == ["real test split", "classifier-free guidance", 'odd, "<b>"']
  titles = [axes.get_title() for axes in figure.axes]
  assert titles == [
    "judged accuracy (higher is better)",
    "Fréchet distance on pixels (lower is better)",
    "diversity within a class",
    "fidelity against diversity, points labelled by γ",
  ]
  assert evaluation.fidelity_plot(rows[:1])[:4] == b"\x89PNG"
  with pytest.raises(ValueError, match="there are no rows"):
    evaluation.fidelity_plot([])


@pytest.fixture
def brightness(monkeypatch):
  """A new measure: one function and one entry in the table."""

  def function(evidence):
    return evidence.images.mean()

  description = "The mean pixel, {real:.0f} for real digits."
  entry = evaluation.Measure(function, "brightness", description, "lower", high=255.0, number_format=".1f")
  monkeypatch.setitem(evaluation.MEASURES, "brightness", entry)


def test_a_new_measure_is_measured_and_checked(brightness, digits, judge):
  (reference, _), (images, labels) = digits
  measures = evaluation.measure(images, labels, judge, reference)
  assert list(measures.figures) == ["accuracy", "frechet_distance", "diversity", "brightness"]
  assert measures.brightness == images.mean()
  assert dict(evaluation.measure(images, labels, judge, reference, names=["brightness"]).figures) == {
    "brightness": images.mean()
  }
  for value in (-1.0, 256.0, float("nan")):
    with pytest.raises(ValueError, match="brightness must be"):
      Measures(500, {"brightness": value})


def test_a_new_measure_is_in_the_table_the_plot_and_the_report(
  brightness, rows, grids, digits, judge, tmp_path, monkeypatch
):
  from matplotlib.figure import Figure

  (reference, _), (images, labels) = digits
  real = evaluation.measure(images, labels, judge, reference)
  rows = [replace(row, figures={**row.figures, "brightness": 60 + row.scale / 2}) for row in rows]

  path = tmp_path / "sweep.csv"
  evaluation.write_csv(path, rows)
  header, first = path.read_text().splitlines()[:2]
  assert header == "method,scale,n,accuracy,frechet_distance,diversity,brightness,samples_per_second"
  assert first.split(",")[6] == "62.0"
  assert evaluation.read_csv(path) == rows
  path.write_text(path.read_text().replace(",62.0,", ",256,"))
  with pytest.raises(ValueError, match=r"line 2 of .*brightness must be between 0.0 and 255.0"):
    evaluation.read_csv(path)

  lines = evaluation.table(rows).splitlines()
  assert lines[0].split()[-2:] == ["brightness", "samples/s"]
  assert lines[1].split()[-2] == "62.0"

  plots = []
  monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: plots.append(self))
  evaluation.fidelity_plot(rows, real)
  *_, panel, _plane = plots[0].axes
  assert panel.get_title() == "brightness (lower is better)"
  reference_line, line, _ = panel.lines
  assert set(reference_line.get_ydata()) == {images.mean()}
  np.testing.assert_array_equal(line.get_ydata(), [60, 60.5, 62])

  html = write(tmp_path / "report.html", rows, grids, real=real)
  assert "<th>brightness</th>" in html
  assert html.count("<td>62.0</td>") == 2
  assert "<br>brightness 62.0<" in html
  assert "brightness is lowest at scale 0 (60.0)" in html
  assert f"brightness is {images.mean():.1f}." in html
  assert f"The mean pixel, {images.mean():.0f} for real digits." in html


def test_tables_with_only_some_of_the_measures(rows, tmp_path):
  path = tmp_path / "sweep.csv"
  fewer = [replace(row, figures={"diversity": row.diversity}) for row in rows]
  evaluation.write_csv(path, fewer)
  assert evaluation.read_csv(path) == fewer
  assert evaluation.fidelity_plot(fewer)[:4] == b"\x89PNG"
  with pytest.raises(ValueError, match="all rows must have the same measures"):
    evaluation.write_csv(path, [*rows, *fewer])
  with pytest.raises(AttributeError, match="there is no measure 'accuracy' in this Row, only diversity"):
    fewer[0].accuracy
  path.write_text("method,scale,n,diversity,accuracy,samples_per_second\ncfg,1,2,3,0.5,6\n")
  assert evaluation.read_csv(path) == [Row("cfg", 1.0, 2, {"accuracy": 0.5, "diversity": 3.0}, 6.0)]
  path.write_text("method,scale,n,acuracy,samples_per_second\n")
  with pytest.raises(ValueError, match="unknown measure 'acuracy': did you mean 'accuracy'"):
    evaluation.read_csv(path)
  path.write_text("method,scale,n,accuracy,accuracy,samples_per_second\n")
  with pytest.raises(ValueError, match="has the column 'accuracy' twice"):
    evaluation.read_csv(path)


def test_rows_are_copied_and_pickled(rows):
  assert pickle.loads(pickle.dumps(rows)) == copy.deepcopy(rows) == rows
  assert len({*rows, *rows}) == len(rows)


def test_importing_evaluation_loads_nothing_heavy():
  code = (
    "import sys, jaxguide.evaluation; "
    "print([m for m in ('sklearn', 'scipy', 'matplotlib', 'jinja2', 'PIL') if m in sys.modules])"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "[]"
