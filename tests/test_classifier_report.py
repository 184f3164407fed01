"""The report on a noisy classifier: its figures against exact ones, its sentences, its page and its command."""

import base64
import dataclasses
import math
import re
import sys
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import save

import jaxguide as jg
from jaxguide import cli, data, evaluation, models
from jaxguide.evaluation import Gradients, gradients, pages
from jaxguide.evaluation.held_out_data import held_out_data
from jaxguide.evaluation.verdicts import verdicts, where
from jaxguide.training import ModelConfig, TrainingConfig, fit
from jaxguide.training.held_out import Levels

SIGMAS = np.array([0.1, 1.0, 10.0])


# --- gradients ------------------------------------------------------------------------------------


def test_an_exact_classifier_agrees_with_an_exact_diffusion_model(random_mixture):
  mixture = random_mixture(0, (3, 2, 1))
  labels = np.arange(50) % 3
  x0 = np.asarray(jax.jit(jax.vmap(mixture.sample))(jax.random.split(jax.random.key(1), 50), labels))
  got = gradients(
    mixture.log_prob,
    x0,
    labels,
    jax.random.key(0),
    [10.0, 0.5, 2.0],
    denoise=mixture.denoiser,
    null_cond=3,
    batch_size=16,
  )
  np.testing.assert_array_equal(got.sigmas, [0.5, 2.0, 10.0])
  assert (got.dimension, got.num) == (6, 50)
  np.testing.assert_allclose(got.cosine, 1, atol=2e-3)
  np.testing.assert_allclose(got.norm, got.implied_norm, rtol=5e-3)


def two(sharpness, x, sigma, cond):
  """Two Gaussians of width 0 at ±1 along the first axis, whose posterior log-odds are 2 x / sigma²."""
  return jax.nn.log_sigmoid(sharpness * (2 * cond - 1).astype(x.dtype) * 2 * x[0] / sigma**2)


def test_norms_are_those_of_the_formula():
  x0, labels = np.zeros((400, 3), np.float32), np.ones(400, int)
  sigma = 1.3
  got = gradients(jax.tree_util.Partial(two, 2.0), x0, labels, jax.random.key(0), [sigma])
  # d/dx log s(a x) = a s(-a x) with a = 4 / sigma², and x = sigma eps: quartiles of a falling function of eps.
  a = 4 / sigma**2
  wanted = [a / (1 + math.exp(a * sigma * eps)) for eps in (0.6745, 0.0, -0.6745)]
  np.testing.assert_allclose(got.norm[0], wanted, rtol=0.2)
  assert got.cosine is None
  assert got.implied_norm is None


def test_opposite_and_unrelated_gradients_have_their_cosines():
  x0, labels = np.zeros((64, 3), np.float32), np.ones(64, int)

  def denoise(direction, x, sigma, cond):
    """Moves x0 along a direction for label 1, and not for the null label 9."""
    return x + jnp.where(cond == 1, 1.0, 0.0) * direction

  for direction, cosine in (([1.0, 0, 0], 1), ([-2.0, 0, 0], -1), ([0, 5.0, 0], 0), ([1.0, 1.0, 0], 0.5**0.5)):
    partial = jax.tree_util.Partial(denoise, jnp.array(direction))
    log_prob = jax.tree_util.Partial(two, 1.0)
    got = gradients(log_prob, x0, labels, jax.random.key(0), [0.5, 3.0], denoise=partial, null_cond=9)
    np.testing.assert_allclose(got.cosine, cosine, atol=1e-4)
    np.testing.assert_allclose(got.implied_norm[:, 1], np.linalg.norm(direction) / got.sigmas**2, rtol=1e-4)


def test_what_has_no_gradients():
  with pytest.raises(ValueError, match="give the null_cond"):
    gradients(two, np.zeros((2, 3)), np.array([0, 1]), jax.random.key(0), SIGMAS, denoise=jg.ring(2).denoiser)
  with pytest.raises(ValueError, match="there are no examples"):
    gradients(two, np.zeros((0, 3)), np.zeros(0, int), jax.random.key(0), SIGMAS)
  with pytest.raises(ValueError, match="each of sigmas must be above 0"):
    gradients(two, np.zeros((2, 3)), np.array([0, 1]), jax.random.key(0), [0.0])


# --- verdicts -------------------------------------------------------------------------------------


def said(
  accuracy=(0.9, 0.5, 0.3), nll=(0.3, 1.0, 2.0), error=(0.01, 0.02, 0.03), confidence=None, cosine=None, ratio=1.0
):
  arrays = [np.array(values) for values in (accuracy, nll, error, accuracy if confidence is None else confidence)]
  three = lambda values: np.repeat(np.array(values, float)[:, None], 3, 1)  # noqa: E731
  norm = three([1.0, 1.0, 1.0])
  implied = None if cosine is None else norm / np.reshape(ratio, (-1, 1))
  measured = Gradients(SIGMAS, norm, implied, None if cosine is None else three(cosine), 64, 10)
  return verdicts(Levels(SIGMAS, *arrays, 10), measured, classes=10, chance=0.1)


def test_a_good_classifier_is_called_good():
  good = said(cosine=(0.6, 0.7, 0.8))
  assert good.summary == "Guidance by this classifier is of use at every noise level."
  assert "nowhere near chance, which is 10%" in good.accuracy
  assert "Nowhere is it much worse than a uniform guess (2.30)" in good.nll
  assert "at most 0.03, at sigma 10" in good.calibration
  assert "highest at sigma 10 (0.80), and at least 0.5 at every noise level" in good.cosine
  assert good.useful.all()


def test_accuracy_near_chance_is_named():
  poor = said(accuracy=(0.9, 0.5, 0.12))
  assert "near chance (10%) at sigma 10 and above: the classifier hardly sees the class" in poor.accuracy
  assert poor.accuracy.endswith("guidance there pushes in no useful direction.")
  assert poor.summary.endswith("of use at sigma 1 and below (--guidance classifier:sigma_hi=1.01).")
  # The gradient can point right where the class is nearly invisible.
  right = said(accuracy=(0.9, 0.5, 0.12), cosine=(0.6, 0.7, 0.8))
  assert "guidance there decides little, though its direction agrees" in right.accuracy
  assert right.useful.all()


def test_a_likelihood_worse_than_guessing_is_named():
  poor = said(nll=(0.3, 2.5, 4.0), cosine=(0.6, 0.7, 0.8))
  assert "worse than that of a uniform guess (2.30 nats) at sigma 1 and above, up to 4.00 nats" in poor.nll
  assert poor.useful.tolist() == [True, False, False]


def test_miscalibration_has_a_direction():
  both = said(error=(0.3, 0.02, 0.2), confidence=(0.6, 0.5, 0.5))
  assert "The classifier is overconfident at sigma 10 and above" in both.calibration
  assert "It is underconfident at sigma 0.1" in both.calibration
  assert "largest at sigma 0.1 (0.30)" in both.calibration


def test_gradients_of_another_length_and_direction_are_named():
  poor = said(cosine=(0.1, 0.3, 0.15), ratio=(0.2, 1.5, 7.0))
  assert "within a factor 2 of the diffusion model's at sigma 1." in poor.norm
  assert "less than half of the diffusion model's at sigma 0.1." in poor.norm
  assert "more than twice the diffusion model's at sigma 10 and above: there a smaller scale would do." in poor.norm
  assert "nowhere as high as 0.5" in poor.cosine
  assert "below 0.2 at sigma 0.1 and 10." in poor.cosine
  assert poor.useful.tolist() == [False, True, False]
  assert poor.summary.endswith("(--guidance classifier:sigma_lo=0.99,sigma_hi=1.01).")
  assert "of use at no noise level" in said(cosine=(0.1, 0.1, 0.1)).summary


def test_levels_are_described():
  def at(*mask):
    return where(np.array(mask, bool), np.array([0.1, 1.0, 10.0, 80.0]))

  assert at(1, 1, 1, 1) == "at every noise level"
  assert at(0, 1, 1, 0) == "at sigma 1 to 10"
  assert at(0, 1, 0, 0) == "at sigma 1"
  assert at(1, 1, 0, 1) == "at sigma 0.1 to 1 and 80"
  with pytest.raises(ValueError, match="the same noise levels"):
    verdicts(
      Levels(SIGMAS, *np.ones((4, 3)), 1),
      Gradients(2 * SIGMAS, np.ones((3, 3)), None, None, 1, 1),
      classes=2,
      chance=0.5,
    )


# --- the page -------------------------------------------------------------------------------------

NAMES = ("cat", "<dog>", "horse")


class Linear(nn.Module):
  """A classifier that is quick to compile."""

  out_channels: int = 3
  role = "classifier"

  @nn.compact
  def __call__(self, x, t):
    """Return the logits."""
    return nn.Dense(self.out_channels)(x.reshape(len(x), -1)) * jnp.cos(t)[:, None]


class Blur(nn.Module):
  """A diffusion model that is quick to compile."""

  num_classes: int | None = None
  null_class: bool = True

  @nn.compact
  def __call__(self, x, t, label=None):
    """Predict from the pixels and the label."""
    shift = 0 if label is None else nn.Embed(self.num_classes + 1, x[0].size)(label).reshape(x.shape)
    return nn.Dense(1)(x) * jnp.cos(t)[:, None, None, None] + shift


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Models of random parameters."""
  folder = tmp_path_factory.mktemp("models")
  for name, network, shape, classes, options in (
    ("denoiser", Blur, (8, 8, 1), 3, {}),
    ("unconditional", Blur, (8, 8, 1), None, {}),
    ("classifier", Linear, (8, 8, 1), 3, {"class_names": NAMES}),
    ("narrow", Linear, (8, 8, 1), 3, {"noise_range": (0.5, 2.0)}),
    ("larger", Blur, (16, 16, 1), 3, {}),
  ):
    save(folder / name, ModelConfig(network, {}, shape, classes, **options))
  return folder


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return data.Images(rng.integers(0, 256, (20, 8, 8, 1)).astype(np.uint8), np.arange(20) % 3, 3, "noise & <b>")


QUICK = {"num": 8, "num_gradients": 4, "samples_per_class": 2, "steps": 2}


@pytest.fixture(scope="module")
def report(folders, images, tmp_path_factory):
  out = tmp_path_factory.mktemp("report") / "r.html"
  classifier, denoiser = (models.load(folders / name) for name in ("classifier", "denoiser"))
  return evaluation.classifier_report(out, classifier, images, denoiser=denoiser, facts={"Run": "7 <i>"}, **QUICK)


@pytest.fixture
def unrendered(monkeypatch, report):
  """Give all figures the picture of one, for what a report takes the longest for is to render them."""
  picture = re.search(r'src="data:image/png;base64,([^"]*)"', report.path.read_text("utf-8"))[1]
  monkeypatch.setattr(pages, "png_of", lambda figure: base64.b64decode(picture))


def test_a_bar_counts_batches_gradients_and_scales(folders, images, tmp_path, capsys, unrendered):
  classifier, denoiser = (models.load(folders / name) for name in ("classifier", "denoiser"))
  for show in (True, False):
    evaluation.classifier_report(
      tmp_path / "r.html", classifier, images, denoiser=denoiser, scales=(0.0, 1.0), progress=show, **QUICK
    )
    assert ("4/4" in capsys.readouterr().err) == show


def test_the_page_is_self_contained(report):
  page = report.path.read_text("utf-8")
  assert not re.search(r"https?:|<script|<link|<iframe|@import|url\(|\bon\w+=", page)
  sources = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
  assert len(sources) == 5 + 4
  assert all(base64.b64decode(source).startswith(b"\x89PNG") for source in sources)
  assert len(re.findall(r'alt="[^"]{20,}"', page)) == len(sources)
  assert "prefers-color-scheme: dark" in page
  assert "{{" not in page
  assert "{%" not in page
  assert not re.search("<b>|<i>", page)
  assert "noise &amp; &lt;b&gt;" in page


def test_the_page_has_the_numbers_and_the_sentences(report):
  page = re.sub(r"\s+", " ", report.path.read_text("utf-8"))
  titles = re.findall(r"<h2>(.*?)</h2>", page)
  assert titles[:5] == [
    "Accuracy",
    "Negative log-likelihood, in nats",
    "Calibration error",
    "Norm of the gradient",
    "Cosine with the diffusion model",
  ]
  assert page.count("Good:") == page.count("Bad:") == 6
  text = page.replace("&#39;", "'")
  for name, sentence in report.verdicts._asdict().items():
    assert name == "useful" or sentence in text
  rows = re.findall(r"<tr>(<td>.*?)</tr>", page)
  assert len(rows) == 12
  assert re.findall(r'<th scope="col">(.*?)</th>', page)[0] == "noise level σ"
  cells = re.findall(r"<td>(.*?)</td>", rows[3])
  assert cells[1] == f"{report.levels.accuracy[3]:.3f}"
  assert cells[-1] == f"{report.gradients.cosine[3, 1]:.3f}"


def test_without_a_diffusion_model_there_are_no_cosines_and_no_samples(folders, images, tmp_path, unrendered):
  narrow = models.load(folders / "narrow")
  alone = evaluation.classifier_report(tmp_path / "r.html", narrow, images, **QUICK)
  assert alone.gradients.cosine is None
  page = alone.path.read_text("utf-8")
  assert len(re.findall("<img", page)) == 4
  assert "they need a diffusion model" in page
  # Only the levels of its training are measured, unless others are given; there the network is not off.
  assert alone.levels.sigmas[[0, -1]] == pytest.approx((0.5, 2.0))
  outside = evaluation.classifier_report(tmp_path / "r.html", narrow, images, sigmas=[0.1, 9.0], **QUICK)
  assert (outside.gradients.norm > 0).all()


def test_an_unconditional_diffusion_model_gives_samples_alone(folders, images, tmp_path, unrendered):
  classifier, denoiser = (models.load(folders / name) for name in ("classifier", "unconditional"))
  report = evaluation.classifier_report(
    tmp_path / "r.html", classifier, images, denoiser=denoiser, scales=[1.0], **QUICK
  )
  assert report.gradients.cosine is None
  assert len(re.findall("<img", report.path.read_text("utf-8"))) == 4 + 1


def test_what_is_refused(folders, images, tmp_path):
  classifier, denoiser, larger = (models.load(folders / name) for name in ("classifier", "denoiser", "larger"))
  out = tmp_path / "r.html"
  with pytest.raises(ValueError, match=r"classifier must be a classifier, got a .*Blur"):
    evaluation.classifier_report(out, denoiser, images)
  with pytest.raises(ValueError, match=r"denoiser must be a denoiser, got a .*Linear"):
    evaluation.classifier_report(out, classifier, images, denoiser=classifier)
  with pytest.raises(ValueError, match=r"but the denoiser has \(16, 16, 1\) in 3"):
    evaluation.classifier_report(out, classifier, images, denoiser=larger)
  with pytest.raises(TypeError, match="Model"):
    evaluation.classifier_report(out, "runs", images)
  other = data.Images(np.zeros((4, 8, 8, 1), np.uint8), [0, 1, 2, 3], 4, "four")
  with pytest.raises(ValueError, match="in 3 classes, but four has"):
    evaluation.classifier_report(out, classifier, other)
  renamed = dataclasses.replace(images, class_names=("cat", "dog", "horse"))
  with pytest.raises(ValueError, match="classes are cat, <dog>, horse, but noise & <b> has cat, dog, horse"):
    evaluation.classifier_report(out, classifier, renamed)
  assert not out.exists()


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
  def run(*args):
    monkeypatch.setattr(sys, "argv", ["jaxguide", "classifier-report", *map(str, args)])
    try:
      cli.main()
      status = 0
    except SystemExit as exit:
      status = exit.code
    return status, *capsys.readouterr()

  return run


def test_the_command_is_the_function(folders, images, run, tmp_path, monkeypatch):
  seen: dict = {}

  def report(out, classifier, held_out, **options):
    seen.update(options, out=out, classifier=classifier.config.network, data=held_out.name)
    said = SimpleNamespace(accuracy="High.", nll="Low.", cosine="Near 1.", summary="It is of use.")
    return SimpleNamespace(path=out, verdicts=said)

  monkeypatch.setattr(evaluation, "classifier_report", report)
  out = tmp_path / "r.html"
  options = ["--data", "digits", "--denoiser", folders / "denoiser", "--scale", 2, "--scale", 4, "--samples", 3]
  status, printed, _ = run(folders / "classifier", "--out", out, *options, "--num", 9, "--seed", 5, "--steps", 7)
  assert (status, printed.splitlines()[:4]) == (0, ["High.", "Low.", "Near 1.", "It is of use."])
  denoiser = seen.pop("denoiser")
  assert denoiser.config.network.endswith(":Blur")
  assert seen == {
    "out": out,
    "classifier": f"{__name__}:Linear",
    "data": "digits",
    "scales": [2.0, 4.0],
    "samples_per_class": 3,
    "num": 9,
    "seed": 5,
    "steps": 7,
    "title": f"Noisy classifier {folders / 'classifier'}",
    "progress": True,
  }


def test_what_the_command_refuses(folders, run, tmp_path):
  out = tmp_path / "r.html"
  status, _, errors = run(folders / "classifier", "--out", out)
  assert status == 2
  assert "does not say what held-out data there are" in errors
  status, _, errors = run(folders / "classifier", "--out", out, "--data", "digits")
  assert status == 2
  assert "in 3 classes, but digits has (8, 8, 1) in 10" in errors
  status, _, errors = run(folders / "classifier", "--out", tmp_path / "r.txt")
  assert status == 2
  assert "must be a file that ends in .html" in errors
  out.write_text("mine")
  status, _, errors = run(folders / "classifier", "--out", out, "--data", "digits")
  assert status == 2
  assert "exists already: choose another file, or --overwrite it" in errors
  assert out.read_text() == "mine"


# --- held-out data --------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
  """A folder of pictures of two classes."""
  from PIL import Image

  for name in ("cat", "dog"):
    (tmp_path / "pictures" / name).mkdir(parents=True)
    for i in range(20):
      Image.new("L", (10, 12), 3 * i).save(tmp_path / "pictures" / name / f"{i}.png")
  return tmp_path / "pictures"


def config_of(run, pictures, held_out):
  run.mkdir(exist_ok=True)
  share = "" if held_out is None else f"held_out = {held_out}"
  (run / "config.toml").write_text(f'[data]\nsource = "{pictures}"\nsize = 8\nchannels = 1\nflip = true\n{share}\n')


def test_what_a_training_held_out_is_found(pictures, tmp_path):
  run, shape = tmp_path / "run", ModelConfig(Linear, {}, (8, 8, 1), 3)
  whole = data.DataConfig(str(pictures), size=8, channels=1)
  for share in (0.3, None):
    config_of(run, pictures, share)
    _, wanted = data.split(data.open_data(whole), 0.1 if share is None else share)
    for folder, source in ((run, None), (run / "model", None), (run, str(pictures))):
      got = held_out_data(folder, shape, source)
      rows = range(len(wanted))
      assert [got.example_name(row) for row in rows] == [wanted.example_name(row) for row in rows]
      assert len(got) == len(wanted) < 40
  rng = np.random.default_rng(0)
  np.testing.assert_array_equal(got.example(0, rng)[0], wanted.example(0, rng)[0])
  config_of(run, pictures, 0)
  with pytest.raises(ValueError, match="held no data out: give other data"):
    held_out_data(run, shape)
  (run / "config.toml").write_text("[data]\nsauce = 3\n")
  with pytest.raises(ValueError, match=r"the section \[data\] of .* does not describe data"):
    held_out_data(run, shape)


def test_other_data_and_older_trainings(pictures, tmp_path):
  shape = ModelConfig(Linear, {}, (8, 8, 1), 3)
  assert held_out_data(tmp_path, shape, str(pictures)).image_shape == (8, 8, 1)
  assert len(held_out_data(tmp_path, shape, "digits")) == len(data.load("digits", "test"))
  (tmp_path / "training.json").write_text('{"version": 1, "data": {"name": "digits"}}')
  assert len(held_out_data(tmp_path, shape)) == len(data.load("digits", "test"))


# --- classifiers of the digits --------------------------------------------------------------------


class Dense(nn.Module):
  """A classifier of the digits that is compiled and trained in seconds."""

  out_channels: int = 10
  role = "classifier"

  @nn.compact
  def __call__(self, x, t):
    """Return the logits."""
    h = jnp.concatenate([x.reshape(len(x), -1), times(t)], -1)
    for _ in range(2):
      h = nn.silu(nn.Dense(128)(h))
    return nn.Dense(self.out_channels)(h)


class DenseDenoiser(nn.Module):
  """A diffusion model of the digits that is compiled and trained in seconds."""

  num_classes: int
  null_class: bool = True

  @nn.compact
  def __call__(self, x, t, label):
    """Predict from the pixels, the time and the label."""
    h = jnp.concatenate([x.reshape(len(x), -1), times(t), nn.Embed(self.num_classes + 1, 16)(label)], -1)
    for _ in range(3):
      h = nn.silu(nn.Dense(256)(h))
    return nn.Dense(x[0].size)(h).reshape(x.shape)


def times(t):
  """What a network sees of the time, which is between 0 and 1000."""
  return jnp.concatenate([f(t[:, None] / part) for part in (320, 80, 20) for f in (jnp.cos, jnp.sin)], -1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
  """Reports on classifiers that are trained, stopped after 40 steps, and trained on clean images alone."""
  folder = tmp_path_factory.mktemp("digits")
  images, test = data.load("digits", "train"), data.load("digits", "test")
  denoiser, classifier = (ModelConfig(network, {}, (8, 8, 1), 10) for network in (DenseDenoiser, Dense))
  # Batches that four devices cannot share, so that one computes.
  how = TrainingConfig(steps=1000, batch_size=63, p_uncond=0.15)
  diffusion = fit(denoiser, how, images, folder / "denoiser", progress=False)
  how = TrainingConfig(steps=600, batch_size=255, learning_rate=2e-3, weight_decay=1.0, noise_mean=1.0, noise_std=2.0)
  trainings = {
    "trained": how,
    "stopped": dataclasses.replace(how, steps=40, warmup=10),
    "clean": dataclasses.replace(how, steps=400, learning_rate=6e-3, weight_decay=0.0, noise_mean=-4.0, noise_std=0.3),
  }
  reports = {}
  for name, training in trainings.items():
    trained = fit(classifier, training, images, folder / name, progress=False)
    reports[name] = evaluation.classifier_report(
      folder / f"{name}.html", trained, test, denoiser=diffusion, num=300, num_gradients=128, samples_per_class=0
    )
  return reports


@pytest.mark.slow
def test_a_classifier_stopped_after_40_steps_is_worse(digits):
  trained, stopped = digits["trained"], digits["stopped"]
  assert (stopped.levels.nll > trained.levels.nll).all()
  visible = trained.levels.sigmas < 2
  assert (stopped.levels.accuracy < trained.levels.accuracy)[visible].all()
  assert stopped.levels.mean_nll > trained.levels.mean_nll + 0.3
  decisive = (trained.levels.accuracy > 0.2) & (trained.levels.accuracy < 0.98)
  assert decisive.sum() >= 3
  assert (stopped.gradients.cosine < trained.gradients.cosine)[decisive].all()
  assert "underconfident" in stopped.verdicts.calibration
  assert stopped.verdicts.useful.sum() < trained.verdicts.useful.sum()


@pytest.mark.slow
def test_a_classifier_of_clean_images_fails_at_high_noise(digits):
  trained, clean = digits["trained"], digits["clean"]
  low, high = trained.levels.sigmas < 0.2, trained.levels.sigmas > 3
  assert (clean.levels.accuracy[low] > 0.95).all()
  assert (clean.levels.nll[high] > 1.2 * math.log(10)).all()
  assert (trained.levels.nll[high] < 1.1 * math.log(10)).all()
  assert (clean.levels.calibration_error[high] > 0.2).all()
  assert (clean.gradients.cosine[high, 1] < trained.gradients.cosine[high, 1] - 0.2).all()
  assert "worse than that of a uniform guess" in clean.verdicts.nll
  assert "overconfident" in clean.verdicts.calibration
  assert not clean.verdicts.useful[high].any()
  assert clean.verdicts.useful[low].all()
