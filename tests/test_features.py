"""Features by name: the table, texts with options, a classifier, pixels and functions of one's own."""

import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Classify, Mlp

from jaxguide import models
from jaxguide.evaluation import features
from jaxguide.evaluation.features import base, efficientnet, own, pixels, registry
from jaxguide.evaluation.features.classifier import classifier, least_level
from jaxguide.models import Model, ModelConfig
from jaxguide.models.model import init_params

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1)).astype(np.uint8)


def outputs(found, images=IMAGES):
  return jax.tree.map(np.asarray, jax.jit(found.function)(found.params, jnp.float32(images)))


# --- texts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "options"),
  [
    ("inception", {}),
    ("inception:weights=a/b.pth,resize=clean", {"weights": "a/b.pth", "resize": "clean"}),
    ("inception:download=true", {"download": True}),
    ("dinov2:weights=/a,b/c,d.pth,preprocess=squash", {"weights": "/a,b/c,d.pth", "preprocess": "squash"}),
    ("dinov2:weights=/a=b/c.pth", {"weights": "/a=b/c.pth"}),
    ("dinov2:weights=C:/a.pth", {"weights": "C:/a.pth"}),
    ("efficientnet-lite0:weights=w.pth", {"weights": "w.pth"}),
    ("classifier:model=runs/a", {"model": "runs/a"}),
  ],
)
def test_texts(text, options):
  make, chosen = registry.parse(text)
  assert make is registry.FEATURES[text.partition(":")[0]]
  assert chosen == options


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("inceptoin", "unknown features 'inceptoin': did you mean 'inception'"),
    ("", "unknown features ''"),
    ("inception:weight=a.pth", "'inception' has no option 'weight'; it has weights, resize, download"),
    ("inception:download=yes", "download of 'inception' must be true or false, got 'yes'"),
    ("inception:", "must be written NAME:option=value"),
    ("inception:clean", "must be written NAME:option=value,option=value; 'clean' is not option=value"),
    ("inception:resize=tf1,resize=clean", "has the option resize twice"),
    ("dinov2", "the features dinov2 need the option weights: dinov2:weights=..."),
    ("classifier:", "must be written NAME:option=value"),
    ("pixels:size=3", "'pixels' has no option 'size'; it has none"),
    ("pixel:size=3", "unknown features 'pixel': did you mean 'pixels'"),
    ("no_such_module:embed", "cannot be imported"),
    ("math:no_such", "cannot be imported"),
    ("math:pi", "must be a function of a batch of images, got float"),
  ],
)
def test_texts_that_are_wrong(text, message):
  with pytest.raises(ValueError, match=message.replace(".", r"\.")):
    features.load(text)


def test_wrong_types():
  with pytest.raises(TypeError):
    features.load(None)
  with pytest.raises(TypeError):
    own.own(3)


def test_inception_is_called_with_its_options(monkeypatch):
  called = []
  inception = types.SimpleNamespace(inception=lambda *args: called.append(args) or pixels.pixels())
  monkeypatch.setitem(sys.modules, "jaxguide.evaluation.features.inception", inception)
  features.load("inception:weights=a.pth,resize=clean")
  features.load("inception:download=true")
  assert called == [("a.pth", "clean", False), (None, "tf1", True)]


def test_the_help_names_all():
  rows = {row.name: row for row in features.help_rows()}
  assert [*rows] == [*registry.FEATURES, "module:function"]
  assert rows["dinov2"].options == "weights, preprocess=crop, positions=meta"
  assert all(row.text.endswith(".") for row in rows.values())


def test_the_default(monkeypatch):
  called = []
  monkeypatch.setattr(registry, "efficientnet_lite0", lambda: called.append("efficientnet") or pixels.pixels())
  features.default((256, 256, 3))
  features.default((28, 28, 1))
  assert called == ["efficientnet"] * 2
  assert features.default((8, 8, 2)).name == "pixels"
  with pytest.raises(ValueError, match=r"networks take images of 1 or 3 channels.*give a function of your own"):
    features.default((64, 64, 4))
  monkeypatch.setattr(registry, "is_installed", lambda: False)
  assert features.default((28, 28, 1)).name == "pixels"
  with pytest.raises(ImportError, match=r"pip install 'jaxguide\[features\]'"):
    features.default((256, 256, 3))
  with pytest.raises(ValueError, match="image_shape must be"):
    features.default((28, 28))
  assert len(called) == 2


def test_importing_features_imports_no_weights():
  assert efficientnet.PACKAGE not in sys.modules
  assert efficientnet.is_installed()
  assert efficientnet.PACKAGE not in sys.modules


# --- pixels -----------------------------------------------------------------------------------------


def test_pixels():
  found = features.load("pixels")
  assert isinstance(found, base.Features)
  assert (found.resize, found.channels, found.protocol) == (
    None,
    None,
    {"features": "pixels", "version": 1, "weights": ""},
  )
  np.testing.assert_allclose(outputs(found)["pool"], features.pixel_features(IMAGES), atol=1e-7)
  assert jax.eval_shape(found.function, {}, jnp.zeros((2, 64, 64, 1)))["pool"].shape == (2, 4096)
  with pytest.raises(ValueError, match=r"has 12,288 numbers, and pixels are features up to 4,096: use the features"):
    jax.eval_shape(found.function, {}, jnp.zeros((2, 64, 64, 3)))


# --- a function of one's own ------------------------------------------------------------------------


def test_a_function_of_ones_own(monkeypatch):
  seen = []

  def means(images):
    seen.append((type(images), images.dtype, images.shape))
    return images.reshape(len(images), -1, 2).mean(1)

  found = own.own(means, name="means", weights="abc")
  assert found.protocol == {"features": "means", "version": 1, "weights": "abc"}
  np.testing.assert_allclose(outputs(found)["pool"], IMAGES.reshape(3, 8, 2).mean(1), rtol=1e-6)
  assert {*seen} == {(np.ndarray, np.dtype(np.uint8), IMAGES.shape)}
  many = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 4)).astype(np.uint8)
  np.testing.assert_allclose(outputs(found, many)["pool"], means(many), rtol=1e-6)
  monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(inside=types.SimpleNamespace(means=means)))
  named = features.load("mine:inside.means")
  assert named.name == "mine:inside.means"
  np.testing.assert_array_equal(outputs(named)["pool"], outputs(found)["pool"])


def test_a_function_of_ones_own_that_does_not_fit():
  with pytest.raises(ValueError, match="the function has no name that tells it from others"):
    own.own(lambda images: images)
  with pytest.raises(ValueError, match="a function is named module:function"):
    own.own("embed")
  flat = own.own(lambda images: images.mean((1, 2, 3)), name="flat")
  with pytest.raises(ValueError, match=r"the features flat must give numbers of shape \(3, d\) for 3 images"):
    outputs(flat)
  with pytest.raises(ValueError, match=r"must give numbers of shape"):
    outputs(own.own(lambda images: np.array([["a"]] * len(images)), name="text"))


# --- a trained classifier ---------------------------------------------------------------------------


def saved(folder, config, seed=0):
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
  params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
  models.save(folder, Model(config, params))
  return Model(config, params)


def test_a_network_of_ones_own(tmp_path):
  config = ModelConfig(Classify, {}, (4, 4, 1), 5, noise_range=(0.25, 2.0))
  model = saved(tmp_path, config)
  found = features.load(f"classifier:model={tmp_path}")
  got = outputs(found)
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params["params"])
  _, _, c_in, c_noise = (float(number) for number in config.scaling(jnp.asarray(0.25)))
  x = c_in * (IMAGES.reshape(3, -1) / 127.5 - 1)
  hidden = x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
  hidden = hidden + np.log1p([[c_noise]]) @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
  hidden = hidden / (1 + np.exp(-hidden))
  np.testing.assert_allclose(got["pool"], hidden, atol=1e-5)
  np.testing.assert_allclose(got["logits"], hidden @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"], atol=1e-5)
  assert (found.name, found.resize, found.channels, len(found.weights)) == ("classifier", None, None, 16)
  again, other = classifier(tmp_path), tmp_path / "other"
  saved(other, config, seed=1)
  assert again.weights == found.weights != classifier(other).weights


@pytest.mark.parametrize("pool", ["attention", "spatial_v2"])
def test_the_published_classifiers(pool, tmp_path):
  fields = {"model_channels": 8, "num_res_blocks": 1, "channel_mult": (1,), "num_head_channels": 8, "pool": pool}
  config = ModelConfig("classifier", fields, (4, 4, 1), 5, "eps", "linear", 1000)
  model = saved(tmp_path, config)
  assert least_level(config) == pytest.approx(np.sqrt(1 / (1 - 1e-4) - 1), rel=1e-3)  # beta_1 is 1e-4
  got = outputs(classifier(tmp_path))
  last = model.params["params"]["out_2"]["c_proj"] if pool == "attention" else model.params["params"]["out_3"]
  np.testing.assert_allclose(got["pool"] @ last["kernel"] + last["bias"], got["logits"], atol=1e-4)
  assert got["pool"].shape == (3, 8 if pool == "attention" else 2048)
  level = jnp.asarray(least_level(config))
  wanted = jax.jit(jax.vmap(models.load(tmp_path).log_prob.logits, (0, None)))(jnp.float32(IMAGES / 127.5 - 1), level)
  np.testing.assert_allclose(got["logits"], wanted, atol=1e-4)


class Twice(nn.Module):
  """A classifier whose logits are no layer's output."""

  out_channels: int = 2
  role = "classifier"

  @nn.compact
  def __call__(self, x, t):
    return 2 * nn.Dense(self.out_channels)(x.reshape(len(x), -1)) + t[:, None]


def test_classifiers_that_do_not_fit(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no model"):
    classifier(tmp_path / "nothing")
  saved(tmp_path / "twice", ModelConfig(Twice, {}, (4, 4, 1), 5))
  with pytest.raises(ValueError, match=r"are not the output of a flax\.linen\.Dense layer"):
    classifier(tmp_path / "twice")
  saved(tmp_path / "denoiser", ModelConfig(Mlp, {}, (4, 4, 1), 5))
  with pytest.raises(ValueError, match="this needs a classifier, but the model is a"):
    classifier(tmp_path / "denoiser")
  saved(tmp_path / "good", ModelConfig(Classify, {}, (4, 4, 1), 5))
  found = classifier(tmp_path / "good")
  with pytest.raises(ValueError, match=r"trained on images of shape \(4, 4, 1\), got images of shape \(8, 8, 1\)"):
    outputs(found, np.zeros((2, 8, 8, 1), np.uint8))
  assert np.isfinite(outputs(found)["pool"]).all()
