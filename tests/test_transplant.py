"""Parameters for a network from a trained one: what has to be equal is equal, and the rest is said."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguide.models import Model, ModelConfig, arrays
from jaxguide.models.importers import openai
from jaxguide.models.model import check, init_params, shapes
from jaxguide.models.transplant import config_from, transplant
from jaxguide.training import TrainingConfig, step

TINY = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 0, "num_head_channels": 8}
RGB, GREY = (4, 4, 3), (4, 4, 1)
KEY = jax.random.key(7)


def config(network="unet", shape=RGB, classes=3, **rest):
  return ModelConfig(network, {**TINY, **rest.pop("fields", {})}, shape, classes, **rest)


def trained(config):
  """A model whose parameters are all at random, also those that start at zero."""
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype)  # noqa: E731
  return Model(config, jax.tree.map(draw, shapes(config)))


def initial(config, *paths):
  """The parameters with these paths that the module draws from the key."""

  def draw(key):
    every = arrays.leaves(init_params(config, key)["params"])
    return {path: every[path] for path in paths}

  return jax.jit(draw)(KEY)


def initial_table(config):
  return np.asarray(initial(config, "label_emb/embedding")["label_emb/embedding"])


def images(shape=RGB, number=3):
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.normal(size=(number, *shape)), jnp.float32), jnp.asarray(
    rng.uniform(0, 9, number), jnp.float32
  )


def table(params):
  return np.asarray(params["params"]["label_emb"]["embedding"])


@functools.cache
def compiled(module):
  return jax.jit(module.apply)


def outputs(model, x, t, *cond):
  return np.asarray(compiled(model.config.module)(model.params, x, t, *cond))


def moved(new, source):
  params, report = transplant(new, source, KEY)
  model = Model(new, params)
  check(model)
  total = sum(report.kept.values()) + sum(change.number for change in (*report.adapted, *report.new))
  assert total == sum(leaf.size for leaf in jax.tree.leaves(params))
  return model, report


def test_the_same_network_is_kept_bit_for_bit():
  source = trained(config())
  model, report = moved(config(fields={"dropout": 0.1, "use_checkpoint": True}), source)
  for path, leaf in arrays.leaves(source.params).items():
    np.testing.assert_array_equal(arrays.leaves(model.params)[path], leaf)
  assert (*report.adapted, *report.new, *report.left_out) == ()
  assert str(report).splitlines() == [
    f"kept     {sum(report.kept.values()):>13,} parameters in {len(report.kept)} arrays"
  ]


def test_classes_of_the_same_name_and_the_null_label_are_kept():
  source = trained(config(class_names=("cat", "dog", "fox")))
  new = config(classes=4, class_names=("ant", "dog", "bee", "cat"))
  model, report = moved(new, source)
  ours, theirs, random = table(model.params), table(source.params), initial_table(new)
  np.testing.assert_array_equal(ours[[1, 3, 4]], theirs[[1, 0, 3]])
  np.testing.assert_allclose(ours[[0, 2]], random[[0, 2]], rtol=1e-6)
  (change,) = report.adapted
  assert change == ("label_emb/embedding", ours.size, "dog, cat kept, 2 new classes, null label kept")
  assert set(report.kept) == set(arrays.leaves(source.params["params"])) - {"label_emb/embedding"}
  x, t = images()
  for label, old in ((1, 1), (3, 0), (4, 3)):
    got = outputs(model, x, t, jnp.full(3, label))
    np.testing.assert_array_equal(got, outputs(source, x, t, jnp.full(3, old)))


def test_classes_without_names():
  source = trained(config(fields={"null_class": False}))
  model, report = moved(config(), source)  # As many: kept by position, with a new null label.
  np.testing.assert_array_equal(table(model.params)[:3], table(source.params))
  assert report.adapted[0].how == "3 classes kept by position, null label new"
  model, report = moved(config(classes=5), source)
  assert report.new[0].how == "5 new classes, null label new"
  np.testing.assert_allclose(table(model.params), initial_table(config(classes=5)), rtol=1e-6)


@pytest.mark.parametrize("new", [config(), config(classes=None, label_size=5)], ids=["classes", "vectors"])
def test_an_unconditional_network_made_conditional_starts_as_it_is(new):
  source = trained(config(classes=None))
  model, report = moved(new, source)
  x, t = images()
  labels = jnp.arange(3) + 1 if new.num_classes else jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)))
  np.testing.assert_array_equal(outputs(model, x, t, labels), outputs(source, x, t))
  assert [change.path.partition("/")[0] for change in report.adapted] == ["label_emb"]


def test_a_conditional_network_made_unconditional_is_its_null_label():
  source = trained(config())
  model, report = moved(config(classes=None), source)
  x, t = images()
  expected = outputs(source, x, t, jnp.full(3, 3))
  np.testing.assert_allclose(outputs(model, x, t), expected, rtol=1e-4, atol=1e-5)
  assert report.left_out == ["label_emb/embedding"]
  bias = lambda model: model.params["params"]["time_embed_2"]["bias"]  # noqa: E731
  source = trained(config(fields={"null_class": False}))
  model, _ = moved(config(classes=None), source)
  np.testing.assert_allclose(bias(model), bias(source) + table(source.params).mean(0), rtol=1e-6)


def test_grey_from_rgb_is_the_mean_of_the_channels():
  source = trained(config())
  model, report = moved(config(shape=GREY), source)
  x, t = images(GREY)
  y = jnp.arange(3)
  expected = outputs(source, jnp.repeat(x, 3, -1), t, y).mean(-1, keepdims=True)
  np.testing.assert_allclose(outputs(model, x, t, y), expected, rtol=1e-4, atol=1e-5)
  assert {change.how for change in report.adapted} == {"3 -> 1 image channels, averaged"}


def test_rgb_from_grey_is_grey_for_grey():
  source = trained(config(shape=GREY))
  model, _ = moved(config(), source)
  x, t = images(GREY)
  y = jnp.arange(3)
  got = outputs(model, jnp.repeat(x, 3, -1), t, y)
  np.testing.assert_allclose(got, np.repeat(outputs(source, x, t, y), 3, -1), rtol=1e-4, atol=1e-5)


def test_further_channels_have_no_influence():
  source = trained(config())
  model, _ = moved(config(shape=(4, 4, 4)), source)
  x, t = images((4, 4, 4))
  y = jnp.arange(3)
  got = outputs(model, x, t, y)
  np.testing.assert_allclose(got[..., :3], outputs(source, x[..., :3], t, y), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got[..., 3], 0)


def test_a_learned_variance_is_added_and_dropped():
  plain = config(shape=GREY)
  learned = config(shape=GREY, fields={"out_channels": 2}, variance="learned_range")
  x, t = images(GREY)
  y = jnp.arange(3)
  model, report = moved(learned, trained(plain))
  got = outputs(model, x, t, y)
  np.testing.assert_allclose(got[..., :1], outputs(trained(plain), x, t, y), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got[..., 1], 0)
  assert "learned variance" in report.adapted[0].how
  model, _ = moved(plain, trained(learned))
  np.testing.assert_allclose(outputs(model, x, t, y), outputs(trained(learned), x, t, y)[..., :1], rtol=1e-5, atol=1e-6)
  # With other channels at the same time, the mean and the variance are converted each for itself.
  rgb = trained(config(fields={"out_channels": 6}, variance="learned_range"))
  model, _ = moved(learned, rgb)
  expected = outputs(rgb, jnp.repeat(x, 3, -1), t, y).reshape(3, 4, 4, 2, 3).mean(-1)
  np.testing.assert_allclose(outputs(model, x, t, y), expected, rtol=1e-4, atol=1e-5)


def test_a_super_resolution_network_starts_as_the_unet():
  source = trained(config())
  new = config_from(source.config, num_classes=3, network="super_res_unet")
  model, report = moved(new, source)
  x, t = images()
  low = images((1, 1, 3))[0]
  got = outputs(model, x, t, {"label": jnp.arange(3), "low_res": low})
  np.testing.assert_allclose(got, outputs(source, x, t, jnp.arange(3)), rtol=1e-5, atol=1e-6)
  assert "no influence yet" in report.adapted[0].how


@pytest.mark.parametrize(
  ("pool", "last"), [("attention", "out_2/c_proj"), ("adaptive", "out_3"), ("spatial_v2", "out_3")]
)
def test_a_classifier_of_other_classes_keeps_the_logits_that_it_has(pool, last):
  fields = {"pool": pool}
  source = trained(config("classifier", fields=fields, class_names=("cat", "dog", "fox")))
  model, report = moved(config("classifier", classes=2, fields=fields, class_names=("ant", "fox")), source)
  x, t = images()
  np.testing.assert_allclose(outputs(model, x, t)[:, 1], outputs(source, x, t)[:, 2], rtol=1e-4, atol=1e-5)
  assert {change.path for change in report.adapted} == {f"{last}/kernel", f"{last}/bias"}


def test_a_classifier_from_the_encoder_of_a_unet():
  source = trained(config(fields={"out_channels": 6}, variance="learned_range"))
  new = config_from(source.config, num_classes=2, class_names=("a", "b"), network="classifier")
  model, report = moved(new, source)
  ours, theirs = arrays.leaves(model.params["params"]), arrays.leaves(source.params["params"])
  encoder = {path for path in theirs if path.startswith(("input_blocks", "middle_block", "time_embed"))}
  assert set(report.kept) == encoder - {"time_embed_2/bias"}
  for path in report.kept:
    np.testing.assert_array_equal(ours[path], theirs[path])
  np.testing.assert_allclose(
    ours["time_embed_2/bias"], theirs["time_embed_2/bias"] + table(source.params)[3], rtol=1e-6
  )
  random = initial(new, *(change.path for change in report.new))
  for change in report.new:
    np.testing.assert_allclose(ours[change.path], random[change.path], rtol=1e-6)
    assert change.path.startswith("out_")


@pytest.mark.parametrize(
  "change",
  [
    {},
    pytest.param({"num_classes": None}, marks=pytest.mark.slow),
    pytest.param({"network": "classifier"}, marks=pytest.mark.slow),
  ],
  ids=["conditional", "unconditional", "classifier"],
)
def test_an_imported_network_can_be_fine_tuned(change):
  """ADM's structure with weights at random, to other classes in grey: one step of training changes every part."""
  adm = config(
    fields={"channel_mult": (1,), "num_res_blocks": 1, "out_channels": 6, "null_class": False},
    prediction="eps",
    schedule="linear",
    diffusion_steps=100,
    variance="learned_range",
  )
  rng = np.random.default_rng(0)
  weights = {name: rng.normal(0, 0.1, shape).astype(np.float16) for name, shape in openai.shapes(adm).items()}
  source = Model(adm, openai.to_params(weights, adm))
  new = config_from(adm, GREY, **{"num_classes": 2, **change})
  model, report = moved(new, source)
  assert "3 -> 1 image channels" in str(report)
  training = TrainingConfig(steps=4, batch_size=4, warmup=0)
  state = step.init_state(new, training, model.params)
  pixels = rng.integers(0, 256, (4, *GREY)).astype(np.uint8)
  labels = np.array([0, 1, 0, 1], np.int32)
  state, metrics = step.train_step(new, training)(state, pixels, labels)
  assert np.isfinite(metrics["loss"])
  before = arrays.leaves(model.params)
  unchanged = [path for path, leaf in arrays.leaves(state.params).items() if np.array_equal(leaf, before[path])]
  assert unchanged == []


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("new", "message"),
  [
    (config(prediction="eps"), r"prediction is 'v' there, and 'eps' here.*set prediction 'v', schedule 'cosine'"),
    (config(schedule="linear", prediction="eps", diffusion_steps=10), r"schedule is 'cosine' there, and 'linear' here"),
    (config(fields={"model_channels": 16}), r"model_channels is 8 there, and 16 here.*config_from"),
    (config(fields={"channel_mult": (1, 2, 2)}, shape=(8, 8, 3)), r"channel_mult is \(1, 2\) there, and \(1, 2, 2\)"),
    # The same shapes, and other attention: they would be taken without a word.
    (config(fields={"num_head_channels": 4}), r"num_head_channels is 8 there, and 4 here"),
    (config(fields={"use_new_attention_order": True}), r"use_new_attention_order is False there, and True here"),
  ],
)
def test_what_does_not_fit_is_refused(new, message):
  with pytest.raises(ValueError, match=message):
    transplant(new, trained(config()), KEY)


def test_a_classifier_gives_no_unet():
  with pytest.raises(ValueError, match="a unet cannot start from a classifier: start it from a unet"):
    transplant(config(), trained(config("classifier")), KEY)
  with pytest.raises(ValueError, match="start it from a super_res_unet or from a unet"):
    transplant(config_from(config(), num_classes=3, network="super_res_unet"), trained(config("classifier")), KEY)


def test_unused_fields_do_not_count():
  source = trained(config())
  moved(config(fields={"num_heads": 3, "conv_resample": False}), source)


def test_other_sides_of_an_attention_pool_do_not_fit():
  source = trained(config("classifier"))
  with pytest.raises(
    ValueError, match=r"out_2/positional_embedding is of shape \(5, 8\) there, and of shape \(17, 8\)"
  ):
    transplant(config("classifier", shape=(8, 8, 3)), source, KEY)


def test_a_configuration_from_another():
  adm = openai.PRESETS["256x256_diffusion"]
  new = config_from(adm, (64, 64, 1), 2, ["cat", "dog"])
  assert (new.prediction, new.schedule, new.diffusion_steps) == ("eps", "linear", 1000)
  assert (new.fields["out_channels"], new.null_cond, new.class_names) == (2, 2, ("cat", "dog"))
  assert config_from(new, num_classes=2, class_names=["cat", "dog"]) == new
  unlabelled = config_from(adm)
  assert (unlabelled.num_classes, unlabelled.image_shape) == (None, adm.image_shape)
  classifier = config_from(openai.PRESETS["128x128_diffusion"], num_classes=2, network="classifier")
  assert (classifier.fields["pool"], classifier.variance) == ("adaptive", "small")  # It has heads, not their channels.
  assert dataclasses.replace(classifier, fields={**classifier.fields}).role.name == "classifier"
