"""The report of a sweep: its sentences against the figures, its pictures against the pixels, and its limits."""

import base64
import dataclasses
import io
import itertools
import re
from html import unescape

import matplotlib
import numpy as np
import pytest
import sweeps
from PIL import Image, ImageFont

from jaxguide.evaluation import sweep_pictures as pictures
from jaxguide.evaluation import sweep_plots as plots
from jaxguide.evaluation.results import Evaluation, Figure, Point, Sweep
from jaxguide.evaluation.sweep_curves import axis_of, best_point, compare, curves_of, starred
from jaxguide.evaluation.sweep_findings import findings, troubles
from jaxguide.evaluation.sweep_panels import panels_of, view_of
from jaxguide.evaluation.sweep_report import write_sweep_report
from jaxguide.evaluation.sweep_words import describe


def evaluation(n=500, warnings=(), protocol=None, **values):
  figures = {name: value if isinstance(value, Figure) else Figure(float(value)) for name, value in values.items()}
  return Evaluation(n, figures, {"features": "pixels"} if protocol is None else protocol, warnings)


def point(scale, method="cfg", images=None, labels=None, seconds=10.0, values=None, **fields):
  images = np.zeros((4, 8, 8, 1), np.uint8) if images is None else images
  return Point(method, {"scale": scale, **(values or {})}, evaluation(**fields), images, labels, seconds)


def sweep(*points, **fields):
  return Sweep("A sweep", points, **fields)


def page_of(tmp_path, made):
  write_sweep_report(tmp_path / "r.html", made)
  return (tmp_path / "r.html").read_text("utf-8")


def text_of(page):
  page = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
  return re.sub(r"\s+", " ", unescape(page))


def decoded(source):
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


@pytest.fixture(scope="module")
def digits():
  return sweeps.digit_sweep()


@pytest.fixture(scope="module")
def page(digits, tmp_path_factory):
  return page_of(tmp_path_factory.mktemp("report"), digits)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_self_contained(page):
  assert not re.search(r"https?:|<script|<link|<iframe|@import|url\(|\bon\w+=|{{|{%", page)
  assert "default-src 'none'" in page
  sources = re.findall(r'<img[^>]*src="([^"]*)"', page)
  assert len(sources) > 200
  assert all(source.startswith("data:image/png;base64,") for source in sources)
  assert len(re.findall(r'<img[^>]*alt="[^"]{8,}"', page)) == len(sources)
  assert len(page) < 1_000_000


def test_the_parts_come_in_order(page):
  titles = [unescape(title) for title in re.findall(r"<h2[^>]*>(.*?)</h2>", page)]
  assert titles == [
    "Samples: classifier-free guidance, scale 1.5",
    "Real images",
    "The figures over the guidance scale",
    "Walk along the guidance scale",
    "Guidance scale by class",
    "All figures",
    "What went wrong",
    "Nearest training images",
    "How the figures are computed",
    "How it was made",
  ]
  levels = [int(level) for level in re.findall(r"<h(\d)", page)]
  assert all(below <= above + 1 for above, below in itertools.pairwise(levels))


def test_the_table_has_the_figures_and_marks_the_best(page, digits):
  table = re.search(r'<table class="all">.*?</table>', page, re.DOTALL)[0]
  bodies = re.findall(r"<tbody.*?</tbody>", table, re.DOTALL)
  assert len(bodies) == 3
  for curve, body in zip(curves_of(digits), bodies, strict=False):
    for row, shown in zip(curve.points, re.findall(r"<tr>.*?</tr>", body, re.DOTALL), strict=True):
      cells = [text_of(cell).split() for cell in re.findall(r"<td>(.*?)</td>", shown, re.DOTALL)]
      distance = row.evaluation.figures["frechet_distance"]
      assert float(cells[1][0]) == pytest.approx(distance.value, rel=5e-3)
      ends = [float(cells[1][-3]), float(cells[1][-1])]
      assert ends == pytest.approx(distance.interval, rel=5e-3)
      is_least = distance.value == min(p.evaluation.figures["frechet_distance"].value for p in digits.points)
      assert ("★" in cells[1]) == is_least
      assert float(cells[-1][0]) == pytest.approx(5000 / row.seconds, rel=5e-3)
  assert text_of(bodies[2]).split()[:3] == ["real", "images", "60"]
  # Neither direction is better for two of the columns.
  described = {name: describe(name, {}).better for name in digits.points[0].evaluation.figures}
  assert table.count("★") == sum(len(starred(digits.points, *pair)) for pair in described.items())


def test_the_page_has_protocol_facts_command_and_descriptions(page, digits):
  text = text_of(page)
  for name, value in (*digits.facts.items(), ("reference.data", "digits, train"), ("precision.k", "3")):
    assert f"{name} {value}" in text
  assert digits.command in unescape(page)
  assert "Interval of the FID: 95 % of 200 bootstrap resamples." in text
  assert "FID (lower is better) The distance between two Gaussians" in text


def test_what_the_reader_gives_is_escaped(tmp_path):
  hostile = '<script>alert("&")</script>'
  made = sweep(
    point(1.0, hostile, labels=np.zeros(4, int), frechet_distance=1, warnings=(hostile,)),
    point(2.0, hostile, labels=np.zeros(4, int), **{"protocol": {hostile: hostile}, hostile: 3}),
    class_names=(hostile,), facts={hostile: hostile}, command=hostile,
  )  # fmt: skip
  page = page_of(tmp_path, dataclasses.replace(made, title=hostile))
  assert "<script" not in page
  assert page.count("&lt;script&gt;") > 10


# --- names of figures -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("features", "titles"),
  [
    ("inception", ["FID", "sFID", "KID", "Inception score"]),
    ("inception:resize=clean", ["FID", "sFID", "KID", "Inception score"]),
    ("dinov2", [
      "Fréchet distance (dinov2)", "spatial Fréchet distance (dinov2)", "kernel distance (dinov2)",
      "classifier score (dinov2)",
    ]),
  ],
)  # fmt: skip
def test_only_distances_on_inception_features_are_called_fid(features, titles, tmp_path):
  names = ["frechet_distance", "spatial_frechet_distance", "kid", "inception_score"]
  assert [describe(name, {"features": features}).title for name in names] == titles
  values = dict.fromkeys(names, 1.0)
  page = page_of(tmp_path, sweep(point(0.0, **values, protocol={"features": features}), point(1.0, **values)))
  assert ("FID" in text_of(page)) == features.startswith("inception")


def test_a_description_with_a_value_of_real_images_needs_them():
  assert "0.972" in describe("accuracy", {}, evaluation(accuracy=0.972)).description
  assert "nan" not in describe("accuracy", {}).description
  assert describe("something_new", {}).title == "something new"


# --- findings -------------------------------------------------------------------------------------


def test_findings_name_the_best_value_of_each_curve():
  made = sweep(
    point(4.0, frechet_distance=3, precision=0.9, recall=0.5),
    point(0.0, frechet_distance=9, precision=0.2, recall=0.5),
    point(1.0, frechet_distance=3, precision=0.5, recall=0.5),
    point(1.0, "mine", accuracy=0.5),
  )
  first, second = findings(made)
  assert first == (
    "With classifier-free guidance the Fréchet distance (pixels) is least at scales 1 and 4 (3.00), the precision is "
    "highest at scale 4 (0.900) and the recall is 0.500 everywhere."
  )
  assert second == "With mine, scale 1, the judged accuracy is 0.500."


def test_overlapping_intervals_are_said():
  made = sweep(
    point(1.0, frechet_distance=Figure(3.0, (2.5, 3.5))),
    point(2.0, frechet_distance=Figure(3.8, (3.4, 4.2))),
    point(3.0, frechet_distance=Figure(9.0, (8.0, 9.9))),
  )
  assert findings(made)[0].endswith("least at scale 1 (3.00; the interval overlaps that of scale 2).")


def test_axes_of_numbers_infinity_and_words():
  made = sweep(*(point(value, frechet_distance=i) for i, value in enumerate(["heun", float("inf"), 2, 0.5, "ddim"])))
  axis = axis_of(made)
  assert axis.values == [0.5, 2, float("inf"), "heun", "ddim"]
  assert (axis.is_numeric, axis.is_ordered) == (False, False)
  assert "least with scale heun (0.00)" in findings(made)[0]
  assert axis_of(sweep(point(2.0), point("inf"))).is_ordered
  assert [p.values["scale"] for p in curves_of(made)[0].points] == axis.values


def test_other_swept_values_are_curves_of_their_own():
  made = sweep(*(point(s, values={"steps": n, "seed": 0}) for s in (2.0, 1.0) for n in (10, 20)))
  assert [(c.title, [p.values["scale"] for p in c.points]) for c in curves_of(made)] == [
    ("classifier-free guidance, steps 10", [1.0, 2.0]),
    ("classifier-free guidance, steps 20", [1.0, 2.0]),
  ]


# --- what went wrong ------------------------------------------------------------------------------


GOOD = {"frechet_distance": 5, "recall": 0.8, "accuracy": 0.97, "saturated": 0.10}


def test_nothing_went_wrong(tmp_path):
  made = sweep(point(1.0, **GOOD), point(2.0, **{**GOOD, "frechet_distance": 6}), real=evaluation(**GOOD))
  assert troubles(made) == []
  assert "What went wrong Nothing, as far as the figures tell." in text_of(page_of(tmp_path, made))


@pytest.mark.parametrize(
  ("values", "sentence"),
  [
    ({"saturated": 0.2}, r"many pixels are at 0 or 255 at scale 1: up to 20.0% \(at scale 1\); of the real images 10"),
    ({"recall": 0.59}, r"diversity is lost at scale 1: the recall falls to 0.590 .* real images is 0.800"),
    ({"accuracy": 0.9}, r"recognised less often than those of real images \(0.970\) at scale 1; .* \(0.900\)"),
    ({"frechet_distance": 4}, r"at scale 1 is below that of the real images \(5.00\). Copies of training images"),
    ({"warnings": ("Too few samples.",)}, r"^Too few samples. This concerns classifier-free guidance at scale 1.$"),
  ],
)
def test_what_goes_wrong_is_said(values, sentence):
  made = sweep(point(1.0, **{**GOOD, **values}), point(2.0, **{**GOOD, "frechet_distance": 6}), real=evaluation(**GOOD))
  (said,) = troubles(made)
  assert re.search(sentence, said)


def test_the_most_diverse_setting_has_lost_nothing():
  """Also where it is far below the real images; and what is clearly below it has."""
  scales = ((0.0, 0.5), (1.0, 0.45), (4.0, 0.2))
  made = sweep(*(point(scale, recall=value) for scale, value in scales), real=evaluation(recall=0.8))
  (said,) = troubles(made)
  assert "diversity is lost at scale 4: the recall falls to 0.200 (at scale 4)" in said
  assert "at most it is 0.500 (at scale 0), and that of the real images is 0.800." in said
  (said,) = troubles(sweep(point(0.0, recall=0.3), point(1.0, recall=0.29), real=evaluation(recall=0.8)))
  assert "lost" not in said
  assert "the recall is at most 0.300 (at scale 0), and that of the real images is 0.800" in said
  wide = Figure(0.2, (0.1, 0.7))
  assert troubles(sweep(point(0.0, recall=0.8), point(4.0, recall=wide), real=evaluation(recall=0.8))) == []


@pytest.mark.parametrize(("method", "said"), [("cfg", 0), ("classifier+clip", 0), ("pag", 1)])
def test_unguided_samples_need_not_show_a_class(method, said):
  made = sweep(point(0.0, method, accuracy=0.3), point(1.0, method, accuracy=0.98), real=evaluation(accuracy=0.97))
  assert len(troubles(made)) == said


def test_a_distance_within_the_interval_of_the_real_images_is_no_trouble():
  figures = {"frechet_distance": Figure(47.1, (41.0, 53.0))}
  real = evaluation(frechet_distance=Figure(47.4, (41.5, 53.5)))
  assert troubles(sweep(point(0.0, **figures), point(1.0, frechet_distance=60.0), real=real)) == []
  low = Figure(30.0, (25.0, 35.0))
  assert "Copies of training images" in troubles(sweep(point(0.0, frechet_distance=low), real=real))[0]


def test_stars_mark_what_the_intervals_do_not_tell_apart(tmp_path):
  ends = [(3.0, (2.5, 3.5)), (3.8, (3.4, 4.2)), (9.0, (8.0, 9.9))]
  made = sweep(
    *(
      point(float(i), frechet_distance=Figure(*each), recall=Figure(0.5 + i / 9, (0, 1))) for i, each in enumerate(ends)
    )
  )
  assert starred(made.points, "frechet_distance", "lower") == list(made.points[:2])
  assert starred(made.points, "recall", "higher") == []
  page = page_of(tmp_path, made)
  assert page.count("★") == 2
  assert "those whose interval overlaps its interval" in text_of(page)


def test_logarithmic_axes_say_so():
  made = sweep(*(point(scale, kid=value) for scale, value in ((1.0, 1.0), (2.0, 30.0), (16.0, 5.0))))
  page = text_of_svg(made)
  assert "guidance scale (log)" in page
  assert "(lower is better) (log)" in page
  plain = text_of_svg(sweep(point(1.0, kid=1.0), point(2.0, kid=2.0)))
  assert "(log)" not in plain


def text_of_svg(made):
  view = view_of(made)
  return " ".join(size.svg for panel in panels_of(view)["large"] for size in panel["sizes"])


def test_the_table_scrolls_in_its_box(page):
  assert re.search(r'<div class="scroll"[^>]*>\s*<table class="all">', page)
  assert "::-webkit-scrollbar" in page
  assert "<caption>A star" not in page


def test_the_limits_of_what_is_wrong():
  quiet = {"saturated": 0.149, "recall": 0.61, "accuracy": Figure(0.96, (0.95, 0.98))}
  assert troubles(sweep(point(1.0, **{**GOOD, **quiet}), point(2.0, **GOOD), real=evaluation(**GOOD))) == []
  rising = sweep(point(1.0, frechet_distance=9), point(2.0, frechet_distance=7))
  assert "least at the end of what was tried (scale 2)" in troubles(rising)[0]


def test_copies_of_training_images_are_counted(digits):
  best = best_point(digits)[0]
  copied = digits.neighbours.copy()
  copied[2, 0] = best.images[digits.neighbour_rows[2]]
  before, after = troubles(digits), troubles(dataclasses.replace(digits, neighbours=copied))
  assert {*after} - {*before} == {"1 of 8 samples are equal to a training image, pixel by pixel."}


# --- points that do not compare -------------------------------------------------------------------


def test_points_of_another_protocol_are_marked_and_not_the_best(tmp_path):
  made = sweep(
    point(1.0, frechet_distance=5, protocol={"features": "pixels", "scale": 1.0, "samples": {"file": "a"}}),
    point(2.0, frechet_distance=6, protocol={"features": "pixels", "scale": 2.0, "samples": {"file": "b"}}),
    point(3.0, frechet_distance=1, protocol={"features": "inception"}),
  )
  assert compare(made).odd == {2}
  assert compare(made).differences == ["features: pixels at 2 points, inception at 1 point"]
  assert best_point(made) == (made.points[0], "frechet_distance")
  page = page_of(tmp_path, made)
  table = re.search(r'<table class="all">.*?</table>', page, re.DOTALL)[0]
  assert re.search(r"3<span[^>]*>&thinsp;†", table)
  assert table.count("★") == table.count("†") == 1
  assert page.index("Not all points have the same protocol") < page.index(table)
  assert len(re.findall(r'<use [^>]*"fill: var\(--page\); stroke: var\(--k0\)', page)) == 2
  assert not compare(sweep(point(1.0), point(2.0))).differences
  assert compare(sweep(point(1.0, n=5), point(2.0), point(3.0))).odd == {0}


# --- the best point -------------------------------------------------------------------------------


def test_the_best_point_is_that_of_the_first_measure_there_is():
  one, two = point(1.0, accuracy=0.9, recall=0.2), point(2.0, accuracy=0.8, recall=0.3)
  assert best_point(sweep(one, two)) == (two, "recall")
  assert best_point(sweep(point(1.0, diversity=2.0), two))[1] == "recall"
  nothing = sweep(point(1.0), point(2.0))
  assert best_point(nothing) == (nothing.points[0], "")


# --- pictures -------------------------------------------------------------------------------------


def test_a_block_has_the_pixels():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 6, 5, 3)).astype(np.uint8)
  got = decoded(pictures.block("x", images, 2, 64).source)
  zoom, gap = 8, 3
  for i, image in enumerate(images):
    top, left = i // 2 * (6 * zoom + gap), i % 2 * (5 * zoom + gap)
    cell = got[top : top + 6 * zoom : zoom, left : left + 5 * zoom : zoom]
    np.testing.assert_array_equal(cell[..., :3], image)
    assert (cell[..., 3] == 255).all()
  assert (got[-1, -1] == 0).all()
  assert got.shape[:2] == (2 * 6 * zoom + gap, 2 * 5 * zoom + gap)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_of_a_single_image(channels):
  image = np.random.default_rng(1).integers(0, 256, (1, 7, 9, channels)).astype(np.uint8)
  got = decoded(pictures.block("x", image, 1, 64).source)
  np.testing.assert_array_equal(got if channels > 1 else got[..., None], pictures._shown(image)[0])


def test_shrinking_takes_means():
  image = np.random.default_rng(2).integers(0, 256, (1, 64, 32, 3)).astype(np.uint8)
  got = pictures.shrunk(image, 16)[0].astype(float)
  mean = image[0].reshape(16, 4, 8, 4, 3).mean((1, 3))
  np.testing.assert_allclose(got, mean, atol=1)


def test_classes_are_common_and_even():
  assert pictures.chosen_classes([np.arange(10), np.array([1, 3, 5, 12])], 10) == ([1, 3, 5], 3)
  assert pictures.chosen_classes([np.arange(1000)], 4) == ([0, 333, 666, 999], 1000)


def test_the_samples_at_the_top_are_those_of_the_best_point(page, digits):
  best = best_point(digits)[0]
  source = re.search(
    r'<img[^>]*src="([^"]*)"[^>]*alt="Samples with classifier-free guidance at scale 1.5: three"', page
  )[1]
  first = best.images[np.asarray(best.labels) == 3][0, ..., 0]
  np.testing.assert_array_equal(decoded(source)[:48:6, :48:6, 0], first)
  assert "their FID is the least of all: 9.11 (8.41 to 9.81)" in text_of(page)


def test_the_slider_and_the_grid_keep_noise_and_label(page, digits):
  for scale in sweeps.SCALES:
    chosen = next(p for p in digits.points if p.method == "classifier" and p.values["scale"] == scale)
    alt = f"classifier guidance at scale {scale:g}: seven"
    (walk,) = re.findall(rf'src="([^"]*)"[^>]*alt="{alt}"', page)
    np.testing.assert_array_equal(decoded(walk)[:48:6, :48:6, 0], chosen.images[7, ..., 0])
    cells = re.findall(rf'src="([^"]*)"[^>]*alt="seven at scale {scale:g}"', page)
    np.testing.assert_array_equal(decoded(cells[1]), chosen.images[7, ..., 0])
  assert page.count(" checked>") == 2


def test_a_large_sweep_says_what_it_leaves_out_and_stays_small(tmp_path):
  made = sweeps.colour_sweep(64, 3, 12, 1, ("cfg", "classifier", "pag", "seg", "slg", "a", "b"), range(14), noise=60)
  page = page_of(tmp_path, made)
  assert len(page) < 10_000_000
  text = text_of(page)
  assert "There are pictures of 6 of 7 curves." in text
  assert "At most 12 points of a curve are shown" in text
  assert re.search(r"\d+ of 12 classes are shown. Images of 64 pixels are shown at \d+ pixels", text)
  assert len(re.findall(r"<th scope=\"row\">\d+</th><td>500</td>", page)) == 7 * 14
  walk = re.search(r'<fieldset class="walk".*?</fieldset>', page, re.DOTALL)[0]
  labels = re.findall(r"</span>(\d+)</label>", walk)
  assert len(labels) == 12
  assert {"0", "2", "13"} <= {*labels}


def test_an_image_of_512_pixels_is_shown_smaller(tmp_path):
  images = np.stack([sweeps.picture(512, i, i) for i in range(2)])
  page = page_of(tmp_path, sweep(point(1.0, images=images), point(2.0, images=images)))
  assert "Images of 512 pixels are shown at 192 pixels." in text_of(page)
  assert len(page) < 1_500_000


# --- what may be missing --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "made",
  [
    sweep(point(1.0)),
    sweep(point(1.0, seconds=0.0), point(2.0)),
    sweep(point(1.0, images=np.zeros((0, 8, 8, 1), np.uint8), kid=-0.001), point(2.0, kid=0.0)),
    sweep(point(1.0, precision=0.5), point(2.0, recall=0.5), point(3.0, precision=0.5, recall=0.5)),
    sweep(point(1.0, "a", coverage=0.2, accuracy=0.5), point(1.0, "b", coverage=0.3, accuracy=0.4)),
    sweep(point(1.0, density=1.0), point(2.0, "b", density=1.0, labels=np.array([5, 5, 7, 7])), class_names=("a", "b")),
    sweep(point(1.0), point(2.0), real=evaluation(saturated=0.1), real_images=np.zeros((3, 9, 9, 3), np.uint8)),
    sweep(point(1.0, diversity=0.0, images=np.zeros((1, 8, 8, 4), np.uint8)), point("inf", diversity=0.0)),
  ],
)  # fmt: skip
def test_nothing_but_the_points_is_needed(made, tmp_path):
  page = page_of(tmp_path, made)
  assert "<h1>A sweep</h1>" in page
  assert not re.search(r"\bnan\b|\bNone\b|\[\]", text_of(page))


def test_what_is_refused(tmp_path):
  out = tmp_path / "r.html"
  images = np.zeros((4, 8, 8, 1), np.uint8)
  for error, message, made in (
    (TypeError, "Sweep", [point(1.0)]),
    (ValueError, "no points to show", sweep()),
    (ValueError, "has no value of the axis 'steps'", sweep(point(1.0), axis="steps")),
    (ValueError, "two points at one scale", sweep(point(1.0), point(1.0))),
    (ValueError, "must be uint8 of shape", sweep(point(1.0, images=images / 255))),
    (ValueError, "1 to 4 channels", sweep(point(1.0, images=np.zeros((4, 8, 8, 5), np.uint8)))),
    (ValueError, "one for each of the 4 images", sweep(point(1.0, labels=np.zeros(3, int)))),
    (ValueError, "must be finite, got nan", sweep(point(1.0, kid=float("nan")))),
    (ValueError, "must be finite", sweep(point(1.0, kid=Figure(1.0, (0.0, float("inf")))))),
    (ValueError, "neighbours must be uint8", sweep(point(1.0), neighbours=images)),
    (
      ValueError,
      "neighbour_rows must have 1 rows",
      sweep(point(1.0), neighbours=images[None], neighbour_rows=np.array([4])),
    ),
  ):
    with pytest.raises(error, match=message):
      write_sweep_report(out, made)
  with pytest.raises(OSError, match="is a folder"):
    write_sweep_report(tmp_path, sweep(point(1.0)))
  assert not out.exists()


# --- plots ----------------------------------------------------------------------------------------


def drawn(svg, tag, attributes="x y"):
  """The attributes and the text of each element of an SVG."""
  found = re.findall(rf"<{tag} ([^>]*)>([^<]*)", svg)
  return [(*(float(re.search(rf'\b{name}="([^"]*)"', one)[1]) for name in attributes.split()), text)
          for one, text in found]  # fmt: skip


def test_labels_cover_no_label_and_no_marker():
  rng = np.random.default_rng(3)
  values = [plots.Value(*rng.uniform(0, 1, 2).tolist(), None, None, f"{i / 4:g}", "") for i in range(60)]
  plot = plots.plot([values], ("across", "up"), (0.5, 0.5), "what", plots.WIDE, is_joined=False)
  labels = drawn("".join(re.findall('<g class="at">.*?</g>', plot.svg)), "text")
  assert len(labels) == plot.labels
  assert plot.labels > 50
  font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf", 12)
  boxes = [(x - font.getlength(text) / 2, y - 9, x + font.getlength(text) / 2, y) for x, y, text in labels]
  for box, other in itertools.combinations(boxes, 2):
    assert box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
  marks = drawn(plot.svg, "use")
  assert len(marks) == 61
  for left, top, right, bottom in boxes:
    assert all(not (left - 4 < x < right + 4 and top - 4 < y < bottom + 4) for x, y, _ in marks)
    assert left > 0
    assert right < plots.WIDE[0]


def lines_of(svg, style):
  """The ends x1, y1, x2, y2 of straight lines of a style."""
  found = re.findall(rf'd="M (\S+) (\S+) L (\S+) (\S+) " style="fill: none; [^"]*stroke: {style}', svg)
  return np.array(found, float)


def test_points_of_a_plot_are_where_their_values_are():
  axis = axis_of(sweep(*(point(scale) for scale in (0.0, 1.0, 3.0))))
  curve = [plots.Value(x, y, None, (y - 1, y + 1), "", "tip") for x, y in ((0.0, 2.0), (1.0, 6.0), (3.0, 4.0))]
  svg = plots.plot([[], curve], ("x", "y"), (None, 3.0), "what", plots.NARROW, axis=axis).svg
  texts = [text for *_, text in drawn(svg, "text")]
  assert texts[:4] == ["0", "1", "3", "x"]
  grid = lines_of(svg, r"var\(--line\)")
  across, up = grid[grid[:, 0] == grid[:, 2], 0], grid[grid[:, 1] == grid[:, 3], 1]
  x, y, _ = (np.array(values) for values in zip(*drawn(svg, "use"), strict=True))
  np.testing.assert_allclose(x, across, atol=0.02)
  np.testing.assert_allclose((across[1] - across[0]) / (across[2] - across[0]), 1 / 3, atol=1e-3)
  # Two ticks give the map from values to pixels.
  ticks = [float(text) for text in texts[4:-1]]

  def values(pixels):
    return ticks[0] + (pixels - up[0]) / (up[-1] - up[0]) * (ticks[-1] - ticks[0])

  np.testing.assert_allclose(values(y), [2, 6, 4], atol=0.01)
  bars = lines_of(svg, r"var\(--k1\); stroke-opacity")
  np.testing.assert_allclose(values(bars[:, [1, 3]]), [[1, 3], [5, 7], [3, 5]], atol=0.01)
  np.testing.assert_allclose(values(lines_of(svg, r"var\(--soft\)")[0, 1]), 3, atol=0.01)


def test_a_wide_axis_is_linear_up_to_its_least_value_and_logarithmic_above():
  axis = axis_of(sweep(*(point(scale) for scale in (0.0, 0.5, 1.0, 4.0, 8.0))))
  curve = [plots.Value(x, 1.0, None, None, "", "") for x in plots.places(axis)]
  x = np.array([x for x, *_ in drawn(plots.plot([curve], ("", ""), None, "", plots.WIDE, axis=axis).svg, "use")])
  np.testing.assert_allclose((x - x[0]) / (x[1] - x[0]), [0, 1, 2, 4, 5], atol=1e-3)


def test_texts_of_ticks_do_not_run_into_each_other():
  axis = axis_of(sweep(*(point(name) for name in ("first" * 4, "second" * 4, "third" * 4, "last" * 4))))
  curve = [plots.Value(x, 1.0, None, None, "", "") for x in plots.places(axis)]
  svg = plots.plot([curve], ("x", "y"), None, "", plots.NARROW, axis=axis).svg
  texts = [text for *_, text in drawn(svg, "text")]
  assert texts[: texts.index("x")] == ["first" * 4, "last" * 4]


def test_svg_is_inline_unique_and_reproducible(page):
  ids = re.findall(r'\bid="([^"]*)"', page)
  assert len(ids) == len(set(ids))
  assert {*re.findall('href="#([^"]*)"', page)} <= {*ids}
  assert not re.search("<style type|<metadata|clip-path=|xlink|<!--|#0[01]ff0", page)
  assert plots.swatch(1) == plots.swatch(1)


def test_texts_in_plots_are_escaped():
  hostile = r'<b>"\1 & $x_1$'
  axis = axis_of(sweep(point(hostile), point("b")))
  curve = [plots.Value(x, 1.0, None, None, "", hostile) for x in plots.places(axis)]
  svg = plots.plot([curve], (hostile, hostile), None, "", plots.WIDE, axis=axis).svg
  assert "<b>" not in svg
  assert [unescape(text) for *_, text in drawn(svg, "text")].count(hostile) == 3
  assert [unescape(text) for text in re.findall("<title>(.*?)</title>", svg)] == [hostile] * 2


def test_words_on_the_axis_are_not_joined(tmp_path):
  page = page_of(tmp_path, sweeps.solver_sweep())
  assert 'class="curve"' not in page
  assert "<use " in page
  assert 'class="curve"' in page_of(tmp_path, sweep(point(1.0, kid=1), point(2.0, kid=2)))
