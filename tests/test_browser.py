"""The pages in a real browser: what it says about them, how large they are, the slider, and accessibility."""

import base64
import dataclasses
import itertools
import json

import browser
import numpy as np
import pytest
import sweeps
from test_classifier_report import SIGMAS, said

from jaxguide.evaluation.classifier_report import _write as write_classifier_report
from jaxguide.evaluation.classifiers import Gradients
from jaxguide.evaluation.sweep_pictures import block
from jaxguide.evaluation.sweep_report import write_sweep_report
from jaxguide.training import page as training_page
from jaxguide.training import run_folder
from jaxguide.training.held_out import Levels

pytestmark = pytest.mark.slow

SIZES = {"laptop": browser.LAPTOP, "phone": browser.PHONE}


@pytest.fixture(scope="module")
def chromium():
  with browser.launched() as running:
    yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  """A page of each kind, by name."""
  folder = tmp_path_factory.mktemp("pages")
  digits = sweeps.digit_sweep()
  other = dataclasses.replace(digits.points[-1].evaluation, protocol={"features": "pixels"}, n=40)
  odd = [*digits.points[:-1], dataclasses.replace(digits.points[-1], evaluation=other)]
  write_sweep_report(folder / "sweep.html", dataclasses.replace(digits, points=odd))
  write_sweep_report(folder / "solvers.html", sweeps.solver_sweep())
  write_sweep_report(folder / "colour.html", sweeps.colour_sweep(32, 3, 4, 2, scales=(0.5, 1.0, 4.0)))
  classifier_page(folder / "classifier.html")
  run_page(folder / "run").rename(folder / "training.html")
  return folder


def classifier_page(path):
  """The page of a classifier, of numbers instead of networks."""
  curve = np.array([0.9, 0.6, 0.2])
  levels = Levels(SIGMAS, curve, 3 * (1 - curve), 0.1 * curve, curve, 100)
  three = np.repeat(curve[:, None], 3, 1)
  measured = Gradients(SIGMAS, three, three, three, 64, 50)
  pictures = {scale: sweep_png() for scale in (0.0, 3.0)}
  facts = {"classifier": "a network of 3 classes", "data": "digits, 100 held-out examples"}
  lines = {"accuracy": 0.1, "nll": 2.3}
  write_classifier_report(
    path, "Noisy classifier", levels, measured, said(cosine=(0.6, 0.7, 0.8)), pictures, facts, lines
  )


def sweep_png():
  """A small PNG image."""
  images, _ = sweeps.digits(20)
  return base64.b64decode(block("", images, 5, 8).source.partition(",")[2])


def run_page(folder):
  """The page of a finished training; returns its path."""
  (folder / run_folder.SAMPLES).mkdir(parents=True)
  for step in (50, 100):
    (folder / run_folder.SAMPLES / f"{step:06d}.png").write_bytes(sweep_png())
  lines = [
    {
      "step": step, "loss": 1 / step, "gradient_norm": 2.0 / step, "rate": 1e-3, "images_per_second": 100.0 + step,
      "loss_by_noise_level": {"sigma": [0.1, 1.0, 10.0], "loss": [0.5 / step, 0.3]},
    }
    for step in (20, 40, 60, 80, 100)
  ]  # fmt: skip
  (folder / run_folder.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
  training_page.write(folder, {"network": "UNet", "data": "digits"}, 100, 100)
  return folder / run_folder.PAGE


NAMES = ["sweep", "solvers", "colour", "classifier", "training"]

# What axe-core does not check: alternatives that say something, headings without gaps, headings of tables.
FAULTS = """() => {
  const faults = [], levels = [0, ...[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])];
  levels.slice(1).forEach((level, i) => { if (level > levels[i] + 1) faults.push(`h${level} after h${levels[i]}`) });
  for (const image of document.querySelectorAll('img'))
    if (image.alt.length < 8 || !image.naturalWidth) faults.push(`img ${image.alt}`);
  for (const svg of document.querySelectorAll('svg[role=img]'))
    if (svg.getAttribute('aria-label').length < 10) faults.push('svg without a label');
  for (const input of document.querySelectorAll('input'))
    if (!input.labels.length || !input.closest('fieldset').querySelector('legend')) faults.push(`input ${input.id}`);
  for (const th of document.querySelectorAll('th')) if (!th.scope) faults.push(`th ${th.textContent}`);
  for (const table of document.querySelectorAll('table'))
    if (!table.closest('[tabindex="0"][role=region]')) faults.push('a table in no box that scrolls by keyboard');
  if (document.querySelectorAll('h1').length != 1) faults.push('h1');
  return faults;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_pages_are_accessible_and_quiet(chromium, pages, name, scheme):
  with browser.opened(chromium, pages / f"{name}.html", scheme=scheme) as opened:
    assert opened.page.evaluate(FAULTS) == []
    assert opened.violations() == []
    assert opened.messages == []
    assert opened.requests == []
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 25, 30)"
    assert dark == (scheme == "dark")


def test_the_policy_of_the_page_forbids_scripts(chromium, pages):
  """The checks above run with the policy off; with it, the page itself is as quiet, and another script does not run."""
  page = chromium.new_page()
  messages = []
  page.on("console", lambda message: messages.append(message.text))
  page.goto(f"file://{pages / 'sweep.html'}")
  assert messages == []
  page.evaluate(
    "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
  )
  assert page.evaluate("window.ran") is None
  assert len(messages) == 1
  page.close()


@pytest.mark.parametrize("name", NAMES)
def test_no_page_is_wider_than_a_phone(chromium, pages, name):
  with browser.opened(chromium, pages / f"{name}.html", browser.PHONE) as opened:
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_picture_is_large_and_beside_the_real_images(chromium, pages):
  sections = "[...document.querySelectorAll('.pair')[0].children].map(e => e.getBoundingClientRect().toJSON())"
  with browser.opened(chromium, pages / "sweep.html") as opened:
    samples, real = opened.page.evaluate(sections)
    assert samples["width"] >= 600
    assert real["width"] >= 600
    assert samples["top"] == real["top"]
    assert real["bottom"] < 800
    style = "getComputedStyle(document.querySelector('.blocks img')).imageRendering"
    assert opened.page.evaluate(style) == "pixelated"
  with browser.opened(chromium, pages / "sweep.html", browser.PHONE) as opened:
    samples, real = opened.page.evaluate(sections)
    assert samples["bottom"] < real["top"]
    assert samples["width"] > 320


SHOWN = """[...document.querySelectorAll('.walk')].map(walk =>
  [...walk.querySelectorAll('.frames > *')].filter(e => e.offsetHeight > 0).map(e => e.querySelector('img').alt))"""


def test_the_slider_goes_by_keyboard(chromium, pages):
  with browser.opened(chromium, pages / "sweep.html") as opened:
    page = opened.page

    def shown():
      frames = page.evaluate(SHOWN)
      assert [len(alts) for alts in frames] == [1, 1]
      return [alts[0].partition(" at ")[2] for alts in frames]

    assert shown() == ["scale 1.5: zero", "scale 2: zero"]
    while page.evaluate("document.activeElement.id") != "walk0-2":
      page.keyboard.press("Tab")
    before = page.screenshot()
    page.keyboard.press("ArrowRight")
    assert shown() == ["scale 2: zero", "scale 2: zero"]
    assert page.screenshot() != before
    outline = page.evaluate("getComputedStyle(document.querySelector('label[for=walk0-3]')).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert shown() == ["scale 1: zero", "scale 2: zero"]
    page.locator("label[for=walk1-5]").click()
    assert shown() == ["scale 1: zero", "scale 8: zero"]
    names = page.get_by_role("radio").evaluate_all("all => all.map(e => e.labels[0].textContent)")
    assert names[:3] == ["scale 0", "scale 1", "scale 1.5"]
    assert page.get_by_role("group", name="Guidance scale of classifier-free guidance").count() == 1


def test_texts_in_plots_can_be_read(chromium, pages):
  """Texts in a plot do not run into each other, on both sizes of window, and are at least 9 pixels high."""
  boxes = """[...document.querySelectorAll('svg[role=img]')].filter(e => e.getBoundingClientRect().width > 0).map(svg =>
    [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect().toJSON()]))"""
  for size in SIZES.values():
    with browser.opened(chromium, pages / "sweep.html", size) as opened:
      plots = opened.page.evaluate(boxes)
    assert len(plots) > 5
    for texts in plots:
      assert min(box["height"] for _, box in texts) > 9
      for (one, a), (other, b) in itertools.combinations(texts, 2):
        apart = a["right"] <= b["left"] or b["right"] <= a["left"] or a["bottom"] <= b["top"] or b["bottom"] <= a["top"]
        overlap = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
        assert apart or overlap < 4, (one, other)


def test_colours_of_plots_stand_out(chromium, pages):
  """Labels in the colour of their curve have a contrast of 4.5 with the page; axe-core does not look at SVG."""
  background = "getComputedStyle(document.body).backgroundColor"
  fills = "[...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill)"
  for scheme in ("light", "dark"):
    with browser.opened(chromium, pages / "sweep.html", scheme=scheme) as opened:
      page, texts = opened.page.evaluate(background), {*opened.page.evaluate(fills)}
    assert len(texts) >= 4
    assert min(contrast(page, text) for text in texts) >= 4.5


def contrast(one, other):
  """The contrast of two colours as WCAG 2 defines it."""

  def luminance(color):
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

  low, high = sorted((luminance(one), luminance(other)))
  return (high + 0.05) / (low + 0.05)


def test_what_is_printed_is_light_and_has_all_figures(chromium, pages):
  with browser.opened(chromium, pages / "sweep.html", (794, 1123), "dark", "print") as opened:
    table = opened.page.evaluate("(b => [b.scrollWidth, b.clientWidth])(document.querySelector('.all').parentElement)")
    assert table[0] <= table[1]
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
