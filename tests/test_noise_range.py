"""A classifier that was trained on a range of noise levels guides at these levels alone; and classes by name."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_cli import QUICK, TINY, save

import jaxguide as jg
from jaxguide import data, generate, scaling
from jaxguide.generate import methods
from jaxguide.generate.identity import identity
from jaxguide.generate.plan import by_number, plan
from jaxguide.generate.settings import Settings
from jaxguide.models import folders as models
from jaxguide.training import ModelConfig

RANGE = (0.4, 5.0)
NAMES = ("cat", "dog", "horse")


def denoise(x, sigma, cond):
  del cond
  return x / (1 + sigma**2)


def network(params, x, c_noise):
  return jnp.tanh(x @ params) * jnp.cos(c_noise)[:, None]


@pytest.fixture
def both():
  """The same classifier without a range and with one."""
  weights = jax.random.normal(jax.random.key(0), (2, 3))
  return tuple(jg.ClassifierLogProb(weights, network, scaling.edm(), noise_range=levels) for levels in (None, RANGE))


@pytest.mark.parametrize("sigma", [0.1, 0.39, 0.4, 1.0, 5.0, 5.01, 60.0])
def test_outside_its_range_a_classifier_is_a_uniform_guess(both, sigma):
  anywhere, narrow = both
  x, sigma = jnp.array([0.3, -1.2]), jnp.asarray(sigma)
  inside = RANGE[0] <= float(sigma) <= float(np.float32(RANGE[1]))
  got, gradient = jax.value_and_grad(narrow)(x, sigma, 1)
  wanted, wanted_gradient = jax.value_and_grad(anywhere)(x, sigma, 1) if inside else (-np.log(3), np.zeros(2))
  np.testing.assert_allclose(got, wanted, rtol=1e-6)
  np.testing.assert_allclose(gradient, wanted_gradient, rtol=1e-6)
  assert inside == bool(np.any(gradient))


def test_guidance_from_python_is_off_outside_the_range(both):
  anywhere, narrow = both
  guided = jg.classifier(narrow, 3.0)(denoise)
  wanted = jg.interval(jg.classifier(anywhere, 3.0), 0.399, 5.001)(denoise)
  x = jnp.array([0.3, -1.2])
  for sigma in jnp.array([0.1, 0.39, 0.41, 1.0, 4.9, 5.1, 60.0]):
    np.testing.assert_allclose(guided(x, sigma, 1), wanted(x, sigma, 1), rtol=1e-6)


def test_the_solvers_shift_of_the_mean_is_off_outside_the_range(both):
  anywhere, narrow = both
  key, cond = jax.random.key(0), jnp.int32(1)

  def step(log_prob, sigma, sigma_next):
    solver = jg.DDPM(log_prob=log_prob, scale=4.0)
    sigmas = jnp.array([sigma, sigma_next, 0.0])
    return jg.sample(Partial(denoise), key, (2,), sigmas, solver, cond)[0]

  Partial = jax.tree_util.Partial
  for levels, same in (((60.0, 20.0), None), ((0.2, 0.1), None), ((3.0, 1.0), anywhere)):
    np.testing.assert_allclose(step(narrow, *levels), step(same, *levels), rtol=1e-5)
  assert not np.allclose(step(anywhere, 60.0, 20.0), step(None, 60.0, 20.0), rtol=1e-3)


def test_the_network_does_not_run_outside_the_range():
  calls = []

  def counted(params, x, c_noise):
    jax.debug.callback(lambda: calls.append(1))
    return network(params, x, c_noise)

  weights = jax.random.normal(jax.random.key(0), (2, 3))
  log_prob = jg.ClassifierLogProb(weights, counted, scaling.edm(), noise_range=RANGE)
  many = jax.jit(jax.vmap(jax.grad(log_prob), (0, None, 0)))
  for sigma, runs in ((20.0, False), (1.0, True), (0.01, False)):
    calls.clear()
    many(jnp.ones((4, 2)), jnp.asarray(sigma), jnp.arange(4) % 3)
    jax.effects_barrier()
    assert bool(calls) == runs


@pytest.mark.parametrize("levels", [(2.0, 1.0), (1.0, 1.0), (-1.0, 2.0), (0.0, float("nan"))])
def test_ranges_that_are_refused(levels):
  with pytest.raises(ValueError, match="noise_range"):
    jg.ClassifierLogProb({}, network, scaling.edm(), noise_range=levels)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A model with names of classes, and classifiers with a range: of the same names, of others, and of no names."""
  folder = tmp_path_factory.mktemp("models")
  shared = {"image_shape": (8, 8, 1), "num_classes": 3}
  tiny = {**TINY, "num_head_channels": 8}
  save(folder / "denoiser", ModelConfig("unet", tiny, **shared, class_names=NAMES))
  save(folder / "classifier", ModelConfig("classifier", tiny, **shared, noise_range=RANGE, class_names=NAMES))
  save(folder / "other", ModelConfig("classifier", tiny, **shared, class_names=("cat", "wolf", "horse")))
  save(folder / "nameless", ModelConfig("unet", tiny, **shared))
  return folder


def settings(folders, **options):
  return generate.Settings(**{"model": folders / "denoiser", "num": 3, "steps": 3, **options})


def test_a_loaded_classifier_has_its_range(folders):
  assert models.load(folders / "classifier").log_prob.noise_range == RANGE


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_samples_are_those_of_guidance_in_an_interval(folders, tmp_path, solver):
  """Where the whole walk is outside the range but for one level, only its step is guided."""
  guided = settings(folders, guidance="classifier", scale=50.0, solver=solver, grid="karras:sigma_max=50")
  without = settings(folders, guidance="classifier", scale=0.0, solver=solver, grid="karras:sigma_max=50")
  p, q = plan(guided), plan(without)
  x, label = jnp.full((8, 8, 1), 0.3), jnp.int32(2)

  @jax.jit
  def take(denoiser, solver, sigma):
    conditioned = jg.solvers.base.Conditioned(denoiser, label)
    return solver.step(conditioned, solver.init(x), sigma, sigma / 2, jax.random.key(0)).x

  def step(plan, sigma):
    return take(plan.denoiser, plan.solver, jnp.asarray(sigma))

  for sigma in (50.0, 0.1):
    np.testing.assert_allclose(step(p, sigma), step(q, sigma), rtol=1e-6)
  assert not np.allclose(step(p, 2.0), step(q, 2.0), rtol=1e-4)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"guidance": "reconstruction"},
      "trained on noise levels from 0.4 to 5, and level 0.01 is outside: give level=0.4",
    ),
    ({"guidance": "backward:level=9"}, "and level 9 is outside"),
    ({"guidance": "classifier", "grid": "karras:sigma_min=6"}, "no level of the grid lies between the classifier's"),
    ({"guidance": "classifier:sigma_lo=5.5"}, "no level of the grid lies between"),
    ({"labels": ["cot"]}, "unknown class 'cot': did you mean 'cat'"),
    ({"labels": ["3"]}, "label 3 is not one of the 3 classes"),
    ({"guidance": "classifier", "classifier": "other"}, "class 1 is 'wolf', but 'dog' in the model"),
    ({"labels": ["cat"], "model": "nameless"}, "have no names: give label as a number, got 'cat'"),
  ],
  ids=str,
)
def test_what_is_refused(folders, options, message):
  for name in ("classifier", "model"):
    if name in options:
      options = {**options, name: folders / options[name]}
  with pytest.raises(ValueError, match=message):
    plan(settings(folders, **options))


def test_a_level_in_the_range_is_taken(folders):
  networks = methods.Networks(
    models.load(folders / "denoiser"), models.load(folders / "classifier"), models.load, jg.karras(4)
  )
  assert networks.clean(0.5) is not None


def test_classes_by_name_and_by_number(folders, tmp_path):
  options = {"num": 4, "batch_size": 4, "steps": QUICK[1]}
  generate.run(tmp_path / "names.npz", settings(folders, labels=["horse", "cat"], **options), progress=False)
  generate.run(tmp_path / "numbers.npz", settings(folders, labels=[2, "0"], **options), progress=False)
  (named, labels), (numbered, _) = (data.load_npz(tmp_path / f"{name}.npz") for name in ("names", "numbers"))
  assert labels.tolist() == [2, 0, 2, 0]
  np.testing.assert_array_equal(named, numbered)
  records = [json.loads(data.settings_of(tmp_path / f"{name}.npz")) for name in ("names", "numbers")]
  assert records[0] == records[1]
  assert records[0]["settings"]["labels"] == [2, 0]


def test_a_name_that_looks_like_a_number_is_a_name(folders, tmp_path):
  config = ModelConfig("unet", {**TINY, "num_head_channels": 8}, (8, 8, 1), 3, class_names=("10", "2", "7"))
  save(tmp_path / "model", config)
  planned = plan(settings(folders, model=tmp_path / "model", labels=["2", 2, "10"]))
  assert planned.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
  ("names", "labels", "numbers"),
  [
    (("Ha\u0308user", "Boote", "O"), ("Ha\u0308user", "H\u00e4user"), (0, 0)),
    (("H\u00e4user", "Boote", "O"), ("Ha\u0308user", "H\u00e4user"), (0, 0)),
    (("a\u0308", "\u00e4", "b"), ("a\u0308", "\u00e4"), (0, 1)),  # The exact name comes before another spelling.
  ],
  ids=["two", "one", "exact"],
)
def test_an_umlaut_is_one_character_or_two(tmp_path, names, labels, numbers):
  config = ModelConfig("unet", {**TINY, "num_head_channels": 8}, (8, 8, 1), 3, class_names=names)
  save(tmp_path / "model", config)
  model, text = models.load(tmp_path / "model"), "compose:labels={},scales=1/1"
  asked = Settings(model=tmp_path / "model", labels=labels, guidance=text.format("/".join(labels)))
  found, _ = by_number(asked, model, None)
  assert found.labels == numbers
  assert found.guidance == (text.format("/".join(map(str, numbers))),)


@pytest.mark.parametrize(
  ("names", "labels", "numbers"),
  [
    (("zero", "one", "two"), "two/1/+0", [2, 1, 0]),
    (("2", "1", "0"), "2/1/0", [0, 1, 2]),  # As for --label, a name comes before a number.
    (("zero", "one", "2"), "2/two", "unknown class 'two'"),
    (("zero", "one", "two"), "won/two", "unknown class 'won': did you mean 'one'?"),
    (None, "one/2", "the classes of the model have no names: give label as a number, got 'one'"),
    (("zero", "one", "two"), "two/3", "label 3 is not one of the 3 classes"),
  ],
  ids=range(6),
)
def test_composition_takes_classes_by_name_as_label_does(tmp_path, names, labels, numbers):
  config = ModelConfig("unet", {**TINY, "num_head_channels": 8}, (8, 8, 1), 3, class_names=names)
  save(tmp_path / "model", config)
  count = 1 + labels.count("/")
  asked = Settings(model=tmp_path / "model", guidance=f"compose:labels={labels},scales={'/'.join('1' * count)}")
  if isinstance(numbers, str):
    with pytest.raises(ValueError, match=re.escape(numbers)):
      plan(asked)
    return
  made = plan(asked)
  again = plan(made.settings)
  assert again.settings == made.settings  # Numbers are written so that they are not taken for other names.
  for each in (made, again):
    (found,) = (
      leaf for leaf in jax.tree.leaves(each.denoiser) if np.shape(leaf) == (count,) and leaf.dtype == np.int32
    )
    assert found.tolist() == numbers
  assert identity(asked) == identity(made.settings)


def test_names_stand_beside_the_rows_of_a_picture(tmp_path):
  images, labels = np.zeros((3, 8, 8, 1), np.uint8), np.array([0, 2, 2])
  data.save_png(tmp_path / "numbers.png", images, labels)
  data.save_png(tmp_path / "names.png", images, labels, names=("a long name", "b", "c"))
  numbers, names = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("numbers", "names"))
  assert names.shape[0] == numbers.shape[0]
  assert names.shape[1] > numbers.shape[1] + 40
  with pytest.raises(ValueError, match="names for 2 classes, but labels from 0 to 2"):
    data.save_png(tmp_path / "few.png", images, labels, names=("a", "b"))


def test_pictures_of_a_run_have_the_names(folders, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(data, "save_png", lambda *args, **options: drawn.append(options))
  options = {"batch_size": 4, "steps": QUICK[1]}
  generate.run(tmp_path / "all.png", settings(folders, **options), progress=False)
  generate.run(tmp_path / "dogs.png", settings(folders, labels=["dog"], **options), progress=False)
  assert drawn[0]["names"] == NAMES
  assert drawn[1]["title"] == "dog"
