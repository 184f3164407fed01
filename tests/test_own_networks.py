"""Networks of one's own, and labels that are vectors: configured, trained, saved, loaded and guided."""

import json
import math
import subprocess
import sys
import tomllib
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import data, generate, training
from jaxguide.models import networks
from jaxguide.models.model import init_params, shapes
from jaxguide.training import ModelConfig, TrainingConfig

RNG = np.random.default_rng(0)
IMAGES = data.Images(RNG.integers(0, 256, (32, 4, 4, 1)).astype(np.uint8), np.arange(32) % 2, 2, "noise")


class Plain(nn.Module):
  """A network as other libraries have it: without ``train`` and without a field for the classes."""

  width: int = 8
  null_class = True

  @nn.compact
  def __call__(self, x, t, cond):
    """Predict from the pixels, the time and the label."""
    hidden = nn.Dense(self.width)(x.reshape(x.shape[0], -1)) + nn.Embed(3, self.width)(cond)
    return nn.Dense(math.prod(x.shape[1:]))(nn.silu(hidden * jnp.cos(t)[:, None])).reshape(x.shape)


class PlainClassifier(nn.Module):
  """A classifier of one's own."""

  out_channels: int
  role = "classifier"

  @nn.compact
  def __call__(self, x, t, *, train: bool = False):
    """Predict the class."""
    hidden = nn.Dropout(0.5, deterministic=not train)(nn.silu(nn.Dense(8)(x.reshape(x.shape[0], -1))))
    return nn.Dense(self.out_channels)(hidden + t[:, None])


class Normalised(nn.Module):
  """A network with batch statistics."""

  @nn.compact
  def __call__(self, x, t, cond):
    """Predict nothing of use."""
    del t, cond
    return nn.BatchNorm(use_running_average=True)(x)


class Fields(nn.Module):
  """A network with the fields that Flax's own layers have, and others."""

  features: tuple[int, ...] = (8, 8)
  activation: Callable[..., Any] = nn.silu
  kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
  dtype: Any = None
  param_dtype: Any = jnp.float32
  rates: list[float] | None = None
  anything: Any = None
  unknown: "NoSuchName" = 1  # noqa: F821

  @nn.compact
  def __call__(self, x, t, cond):
    """Predict from the pixels, the time and the label."""
    hidden = x.reshape(x.shape[0], -1) + nn.Embed(3, 16)(cond) + t[:, None]
    for width in self.features:
      dense = nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
      hidden = self.activation(dense(hidden))
    return nn.Dense(x[0].size, dtype=jnp.float32)(hidden).reshape(x.shape)


@pytest.mark.parametrize(
  ("network", "stored"),
  [
    (Fields(), {}),
    (Fields(features=(4,), dtype=jnp.bfloat16), {"features": (4,), "dtype": "bfloat16"}),
    (Fields(dtype=np.float32, param_dtype=jnp.bfloat16), {"dtype": "float32", "param_dtype": "bfloat16"}),
    (Fields(rates=[0.5, 1]), {"rates": (0.5, 1)}),
    (Fields(anything=[1, "two", None], unknown=2), {"anything": (1, "two", None), "unknown": 2}),
    (Fields(anything={"a": np.float32(0.5)}), {"anything": {"a": 0.5}}),
  ],
  ids=range(6),
)
def test_fields_of_other_types_are_stored_as_plain_data(network, stored):
  config = ModelConfig(network, {}, (4, 4, 1), 2)
  assert config.fields == stored
  again = ModelConfig(config.network, json.loads(json.dumps(stored)), (4, 4, 1), 2)
  assert again == config
  assert shapes(again)


@pytest.mark.parametrize(
  ("network", "message"),
  [
    (Fields(activation=nn.gelu), "activation must be plain data .*make a subclass that has it as its default"),
    (Fields(anything=np.ones(2)), "anything must be plain data"),
    (Fields(anything=[nn.Dense]), "each of anything must be plain data"),
    (Fields(anything=[1.0, np.inf]), "each of anything must be finite"),
    (Fields(features=(8, 2.5)), "each of features must be a whole number"),
  ],
)
def test_fields_that_cannot_be_stored_are_refused(network, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig(network, {}, (4, 4, 1), 2)


def test_a_run_with_such_fields_is_continued_and_written_down(tmp_path):
  np.savez(tmp_path / "data.npz", images=IMAGES.images, labels=IMAGES.labels)
  sections = {
    "data": {"source": str(tmp_path / "data.npz")},
    "model": {"network": "test_own_networks:Fields", "fields": {"features": [4]}},
    "training": {"steps": 2, "batch_size": 3},
    "run": {"sample_every": 0},
  }
  for steps in (2, 4):
    sections["training"]["steps"] = steps
    model = training.train(training.recipe(sections), tmp_path / "run", progress=False)
  assert model.config.fields == {"features": (4,)}
  written = tomllib.loads((tmp_path / "run" / "config.toml").read_text())["model"]["fields"]
  assert written == {"features": [4], "param_dtype": "float32", "unknown": 1}


@pytest.mark.parametrize("network", [Plain, "test_own_networks:Plain"])
def test_a_class_and_its_name_stand_for_an_object(network):
  config = ModelConfig(network, {"width": 4}, (4, 4, 1), 2)
  assert config == ModelConfig(Plain(width=4), {}, (4, 4, 1), 2)
  assert config.network == f"{__name__}:Plain"
  assert config.module == Plain(width=4)
  assert ModelConfig(network, {}, (4, 4, 1), 2).module == Plain()


def test_a_network_of_ones_own_is_trained_saved_and_guided(tmp_path):
  config = ModelConfig(Plain(width=4), {}, (4, 4, 1), 2)
  assert config.network == f"{__name__}:Plain"
  assert config.null_cond == 2
  trained = training.fit(config, TrainingConfig(steps=4, batch_size=8), IMAGES, tmp_path, progress=False)
  loaded = training.load(tmp_path)
  assert loaded.config == config
  chex.assert_trees_all_equal(loaded.params, trained.params)
  guided = jg.classifier_free(loaded.null_cond, 2.0)(loaded.denoiser)
  x = jg.sample_batch(
    guided, jax.random.key(0), cond=1, num=2, shape=(4, 4, 1), sigmas=jg.karras(3), solver=jg.DPMpp2M()
  )
  assert np.isfinite(x).all()


def test_a_classifier_of_ones_own(tmp_path):
  config = ModelConfig(PlainClassifier, {}, (4, 4, 1), 2)
  assert config.role is networks.CLASSIFIER
  model = training.fit(config, TrainingConfig(steps=4, batch_size=3), IMAGES, tmp_path, progress=False)
  assert jax.jit(model.log_prob)(jnp.zeros((4, 4, 1)), jnp.asarray(1.0), jnp.asarray(1)) < 0


@pytest.mark.parametrize(
  ("network", "message"),
  [
    ("no_such_module:Net", r"network 'no_such_module:Net' cannot be imported .*No module named"),
    ("test_own_networks:Nothing", r"cannot be imported .*no attribute 'Nothing'"),
    ("math:pi", r"must be a name, a Flax linen module or its class, .*got 3.14"),
    (":Net", "cannot be imported"),
    (math.sqrt, "network must be a text, got"),
  ],
)
def test_what_is_no_network(network, message):
  with pytest.raises((ValueError, TypeError), match=message):
    ModelConfig(network, {}, (4, 4, 1), 2)


def test_a_model_whose_class_is_not_found_is_not_sent_to_training_again(tmp_path):
  record = {"network": "no_such_module:Net", "fields": {}, "image_shape": [4, 4, 1], "num_classes": 2}
  (tmp_path / "config.json").write_text(json.dumps(record))
  with pytest.raises(ValueError, match="cannot be imported") as error:
    training.load(tmp_path)
  assert "train it again" not in str(error.value)


def test_a_network_that_is_not_supported_is_refused_before_training(tmp_path):
  with pytest.raises(ValueError, match="has the Flax collections batch_stats, params, and only params is supported"):
    training.fit(
      ModelConfig(Normalised, {}, (4, 4, 1), 2), TrainingConfig(steps=1, batch_size=2), IMAGES, tmp_path, progress=False
    )


def test_a_model_of_another_process_needs_its_class(tmp_path):
  training.save(tmp_path, untrained(Plain()))
  code = f"from jaxguide import training; training.load({str(tmp_path)!r})"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
  assert "start Python where it finds the module 'test_own_networks' with the class 'Plain'" in done.stderr


def random_params(config):
  return jax.tree.map(lambda leaf: RNG.normal(0.1, 0.3, leaf.shape).astype(leaf.dtype), shapes(config))


UNET = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_head_channels": 8}


def test_labels_that_are_vectors():
  """The losses of a batch depend on the vectors, except where these are dropped: then they are zeros."""
  config = ModelConfig("unet", UNET, (4, 4, 1), None, label_size=3)
  chex.assert_trees_all_equal(config.null_cond, np.zeros(3, np.float32))
  params = random_params(config)
  examples, vectors = RNG.integers(0, 256, (7, 4, 4, 1)).astype(np.uint8), RNG.normal(size=(7, 3)).astype(np.float32)

  def losses(step, vectors):
    state = training.init_state(config, how, {"params": params["params"]})
    return np.asarray(step(state, examples, vectors)[1]["losses"])

  how = TrainingConfig(steps=2, batch_size=7, p_uncond=0.5)
  step = training.train_step(config, how)
  same = losses(step, vectors) == losses(step, 0 * vectors)
  assert 0 < same.sum() < 7
  denoise = training.Model(config, {"params": params["params"]}).denoiser
  guided = jg.classifier_free(config.null_cond, 2.0)(denoise)
  x = jg.sample_batch(
    guided, jax.random.key(0), cond=vectors[:2], shape=(4, 4, 1), sigmas=jg.karras(3), solver=jg.DPMpp2M(),
    devices=jax.devices()[:1],
  )  # fmt: skip
  assert np.isfinite(x).all()


def test_vectors_cannot_be_given_to_the_command(tmp_path):
  config = ModelConfig("unet", UNET, (4, 4, 1), None, label_size=3)
  training.save(tmp_path / "m", training.Model(config, random_params(config)))
  with pytest.raises(ValueError, match=r"takes labels that are vectors of 3 numbers.*sample_batch"):
    generate.run(tmp_path / "x.npz", generate.Settings(model=str(tmp_path / "m"), num=2), progress=False)


def test_vectors_and_classes_exclude_each_other():
  with pytest.raises(ValueError, match="label_size is for labels that are vectors, and there are 2 classes"):
    ModelConfig("unet", UNET, (4, 4, 1), 2, label_size=3)
  with pytest.raises(ValueError, match="takes classes or label vectors"):
    jg.UNet(num_classes=2, label_size=3)
  with pytest.raises(ValueError, match="takes one label of 3 numbers for each of 2 images"):
    jax.eval_shape(
      jg.UNet(label_size=3).init, jax.random.key(0), jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), jnp.zeros((2, 4))
    )


# --- labels that the embedding does not have ------------------------------------------------------


class NoNull(Plain):
  """It has two labels, and no third that means none."""

  null_class = False


class WithoutRow(nn.Module):
  """It says that label 2 means no label, and its embedding has no row for it."""

  null_class = True

  @nn.compact
  def __call__(self, x, t, cond):
    """Predict from the pixels and the label."""
    del t
    return nn.Dense(1)(x) + nn.Embed(2, 1)(cond)[:, None, None]


class Odd(nn.Module):
  """A classifier whose number of classes is in its code."""

  role = "classifier"

  @nn.compact
  def __call__(self, x, t):
    """Return logits."""
    return nn.Dense(2)(x.reshape(x.shape[0], -1)) + t[:, None]


WALK = {"shape": (4, 4, 1), "sigmas": jg.karras(2), "solver": jg.Euler(), "num": 2, "devices": jax.devices()[:1]}


def untrained(network):
  config = ModelConfig(network, {}, (4, 4, 1), 2)
  return training.Model(config, init_params(config, jax.random.key(0)))


@pytest.mark.parametrize(
  ("network", "label", "null", "message"),
  [
    (Plain, 3, None, r"label 3 is not one of the 2 classes, 0 to 1 \(or 2, the null class\)$"),
    (Plain, 0, 3, "label 3 is not one of the 2 classes"),
    (NoNull, 2, None, "label 2 is not one of the 2 classes, 0 to 1; if it means no label, .* null_class = True"),
    (NoNull, 0, 2, "label 2 is not one of the 2 classes"),
    (NoNull, -1, None, "label -1 is not one of the 2 classes, 0 to 1$"),
  ],
)
def test_a_model_knows_its_labels_where_the_network_does_not(network, label, null, message):
  denoise = untrained(network).denoiser
  guided = denoise if null is None else jg.classifier_free(null, 2.0)(denoise)
  with pytest.raises(ValueError, match=message):
    jg.sample_batch(guided, jax.random.key(0), label, **WALK)


def test_a_classifier_knows_its_labels_where_the_network_does_not():
  log_prob = untrained(Odd).log_prob
  guided = jg.classifier(log_prob, 1.0)(jg.unconditional(None)(jg.ring(4).denoiser))
  with pytest.raises(ValueError, match=r"label 2 is not one of the 2 classes, 0 to 1$"):
    jg.sample_batch(guided, jax.random.key(0), 2, **WALK)
  unknown = jg.ClassifierLogProb(log_prob.params, log_prob.apply, log_prob.scaling)
  for label in (2, -1):  # JAX takes the nearest row, or counts from the end.
    with pytest.raises(ValueError, match=f"label {label} is not one of the 2 classes"):
      unknown(jnp.zeros((4, 4, 1)), jnp.asarray(1.0), label)


def shifted(params, x, t, label):
  return x + params[label][:, None, None, None]


def test_a_function_may_say_its_number_of_classes(monkeypatch):
  denoise = jg.NetworkDenoiser(jnp.zeros(3), shifted, jg.scaling.edm(), num_classes=2)
  message = "label 2 is not one of the 2 classes"
  with pytest.raises(ValueError, match=message):
    jg.sample_batch(denoise, jax.random.key(0), 2, **WALK)
  monkeypatch.setattr(shifted, "null_class", True, raising=False)
  assert np.isfinite(jg.sample_batch(denoise, jax.random.key(0), 2, **WALK)).all()
  monkeypatch.setattr(shifted, "num_classes", 1, raising=False)
  with pytest.raises(ValueError, match=r"label 2 is not one of the 1 classes, 0 to 0 \(or 1, the null class\)"):
    jg.sample_batch(jg.NetworkDenoiser(jnp.zeros(3), shifted, jg.scaling.edm()), jax.random.key(0), 2, **WALK)
  with pytest.raises(ValueError, match="num_classes must be a whole number of at least 1"):
    jg.NetworkDenoiser(jnp.zeros(3), shifted, jg.scaling.edm(), num_classes=0)


@pytest.mark.parametrize(
  ("cond", "named"),
  [
    (np.array([1, 7]), ": check the parameters and the scale, and that the network has label 7 and the null label of"),
    (np.array([[0, 1], [0, 7]]), "has labels 0, 7 and the null label"),
  ],
)
def test_samples_that_are_not_finite_name_their_label(cond, named):
  module = nn.Embed(3, 1)

  def apply(params, x, t, label):
    return x + module.apply(params, label).reshape(len(x), -1).sum(1)[:, None, None, None]

  denoise = jg.NetworkDenoiser(module.init(jax.random.key(0), jnp.zeros(1, int)), apply, jg.scaling.edm())
  with pytest.raises(FloatingPointError, match=f"1 of 2 samples are not finite; sample 1 first at step 0 .*{named}"):
    jg.sample_batch(denoise, jax.random.key(0), cond, **WALK)
  with pytest.raises(FloatingPointError, match=r"check the parameters and the scale$"):
    jg.sample_batch(
      jg.NetworkDenoiser(jnp.nan, lambda p, x, t, cond: p * x, jg.scaling.edm()), jax.random.key(0), **WALK
    )


def test_a_training_names_the_labels_that_its_network_gets(tmp_path):
  config = ModelConfig(WithoutRow, {}, (4, 4, 1), 2)
  settings = TrainingConfig(steps=4, batch_size=8, p_uncond=0.9)
  message = "lower learning_rate, and see that the network's embedding has the labels 0 to 1, and 2 for no label$"
  with pytest.raises(FloatingPointError, match=message):
    training.fit(config, settings, IMAGES, tmp_path, progress=False)
