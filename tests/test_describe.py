"""What a training takes, against what XLA counts and against sums done by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxguide import data
from jaxguide.evaluation import demo
from jaxguide.models.model import init_params
from jaxguide.training import ModelConfig, TrainingConfig, describe, operations, step

TINY = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 0, "num_head_channels": 8}
UNET = ModelConfig("unet", TINY, (4, 4, 1), 2)
HOW = TrainingConfig(steps=10, batch_size=8)


@pytest.fixture(scope="module")
def taken():
  """What the training of the UNet takes."""
  return describe.describe(UNET, HOW)


def shape(*sides, dtype="float32"):
  return jax.ShapeDtypeStruct(sides, dtype)


def by_xla(function, *args):
  """The count of XLA, before it optimises; it includes every other operation."""
  return jax.jit(function).lower(*args).cost_analysis()["flops"]


# --- operations -----------------------------------------------------------------------------------


def convolution(x, kernel, stride=1):
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((1, 1), (2, 0))])
@pytest.mark.parametrize(("stride", "spread"), [(1, 1), (2, 1), (1, 2)])
def test_convolutions_are_counted_as_xla_does(stride, spread, padding):
  def convolve(x, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), padding, lhs_dilation=(spread, spread), dimension_numbers=layout
    )

  args = shape(4, 9, 7, 3), shape(3, 3, 3, 16)
  assert operations.operations(convolve, *args) == by_xla(convolve, *args)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_both_of_its_gradients(stride):
  x, kernel = shape(4, 9, 9, 3), shape(3, 3, 3, 16)
  side = (9 - 3) // stride + 1
  forward = 2 * 4 * side * side * 3 * 3 * 3 * 16
  assert operations.operations(lambda x, k: convolution(x, k, stride), x, kernel) == forward
  loss = lambda x, k: convolution(x, k, stride).sum()  # noqa: E731
  assert operations.operations(jax.grad(loss, 1), x, kernel) == 2 * forward
  assert operations.operations(jax.grad(loss, (0, 1)), x, kernel) == 3 * forward


def test_loops_and_branches():
  a, x = shape(5, 5), shape(5)
  loop = lambda a, x: jax.lax.scan(lambda x, _: (a @ x, None), x, length=7)[0]  # noqa: E731
  assert operations.operations(loop, a, x) == 7 * 50
  branch = lambda a, x: jax.lax.cond(x.sum() > 0, lambda: a @ x, lambda: a @ (a @ x))  # noqa: E731
  assert operations.operations(branch, a, x) == 100


def test_a_network_has_as_many_as_xla_counts():
  x, t, y = shape(2, 8, 8, 1), shape(2), shape(2, dtype="int32")
  params = jax.eval_shape(lambda key: init_params(demo.DIGITS.denoiser, key), jax.random.key(0))
  args = (params, x, t, y)
  ours = operations.operations(demo.DIGITS.denoiser.module.apply, *args)
  # XLA's count has sums, norms and activation functions as well.
  assert 0.85 < ours / by_xla(demo.DIGITS.denoiser.module.apply, *args) < 1.0


def test_a_step_is_three_passes_and_accumulation_changes_nothing(taken):
  whole = taken.operations
  x, t, y = shape(8, 4, 4, 1), shape(8), shape(8, dtype="int32")
  params = jax.eval_shape(lambda key: init_params(UNET, key), jax.random.key(0))
  forward = operations.operations(UNET.module.apply, params, x, t, y)
  assert 2.6 < whole / forward < 3.4
  parts = describe.describe(UNET, dataclasses.replace(HOW, accumulation=4))
  assert parts.operations == pytest.approx(whole, rel=0.02)
  assert parts.part == 2
  assert parts.activations < 0.5 * taken.activations


def test_attention_by_cudnn_is_counted_like_any_other():
  half = ModelConfig("unet", {**TINY, "dtype": "bfloat16"}, (4, 4, 1), 2)
  fused = ModelConfig("unet", {**half.fields, "cudnn_attention": True}, (4, 4, 1), 2)
  assert describe.describe(fused, HOW).operations == describe.describe(half, HOW).operations


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "copies"), [({}, 2), ({"optimizer": "sgd"}, 0), ({"ema": ("power:std=0.05", "power:std=0.1")}, 2)]
)
def test_the_state_is_counted_exactly(changes, copies):
  how = dataclasses.replace(HOW, **changes)
  taken = describe.describe(UNET, how)
  state = step.init_state(UNET, how)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
  assert taken.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert taken.bytes["parameters"] == taken.bytes["gradient"] == size
  assert taken.bytes["optimiser"] == sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
  assert taken.bytes["optimiser"] // size == copies
  assert taken.bytes["means"] == len(how.means) * size


def test_what_is_kept_for_a_gradient():
  x, w = shape(3, 5), shape(5, 7)
  # exp keeps its result; the product keeps x, and w, which is a parameter.
  assert operations.kept(lambda w, x: jnp.exp(x @ w).sum(), w, x) == 4 * (3 * 7 + 3 * 5)


@pytest.mark.slow
@pytest.mark.parametrize("config", [demo.DIGITS.denoiser, demo.DIGITS.classifier], ids=["denoiser", "classifier"])
def test_the_estimate_is_near_what_xla_plans(config):
  how = TrainingConfig(steps=10, batch_size=64)
  estimate, compiled = describe.describe(config, how), describe.describe(config, how, compile=True)
  assert compiled.compiled
  assert 0.5 < estimate.activations / compiled.activations < 1.5


@pytest.mark.slow
def test_rematerialisation_keeps_less(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  jax.clear_caches()
  deep = ModelConfig("unet", {**TINY, "num_res_blocks": 3}, (8, 8, 1), 2)
  kept = {
    remat: describe.describe(deep, dataclasses.replace(HOW, remat=remat)).activations for remat in ("none", "blocks")
  }
  assert kept["blocks"] < 0.7 * kept["none"]
  jax.clear_caches()


# --- text and picture -----------------------------------------------------------------------------


def test_the_text(taken):
  text = str(describe.describe(UNET, dataclasses.replace(HOW, steps=100), examples=40))
  assert "unet for 4x4 images of 1 channel, 2 classes, v-prediction, cosine schedule in continuous time" in text
  assert "40 examples an epoch, which is 5.0 steps of 8; 100 steps are 20.0 epochs" in text
  assert "estimated from shapes" in text
  assert "epoch" not in str(taken)


@pytest.mark.parametrize(
  "config",
  [
    ModelConfig("classifier", TINY, (4, 4, 1), 2),
    ModelConfig("unet", TINY, (4, 4, 1), None),
    ModelConfig("super_res_unet", TINY, (4, 4, 1), 2, low_res_shape=(2, 2, 1)),
    ModelConfig("unet", TINY, (4, 4, 1), 2, prediction="eps", schedule="linear", diffusion_steps=50),
  ],
  ids=["classifier", "unconditional", "super resolution", "discrete"],
)
def test_every_network_can_be_described(config):
  assert describe.describe(config, HOW).operations > 0


def test_settings_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match="p_uncond needs a network with a null class"):
    describe.describe(dataclasses.replace(UNET, num_classes=None), dataclasses.replace(HOW, p_uncond=0.1))


def test_the_first_batch_is_the_one_that_is_trained_on(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  images = data.Images(rng.integers(0, 256, (20, 4, 4, 1)).astype(np.uint8), np.arange(20) % 2, 2, "noise")
  seen = {}
  monkeypatch.setattr(data, "save_png", lambda path, *args, **options: seen.update(args=args, options=options))
  named = dataclasses.replace(UNET, class_names=("cat", "dog"))
  describe.save_first_batch(tmp_path / "batch.png", images, named, dataclasses.replace(HOW, seed=3))
  examples, labels = next(data.batches(images, 8, 3))
  np.testing.assert_array_equal(seen["args"][0], examples)
  np.testing.assert_array_equal(seen["args"][1], labels)
  assert seen["options"]["names"] == ("cat", "dog")


def test_the_picture_is_a_png(tmp_path):
  rng = np.random.default_rng(0)
  images = data.Images(rng.integers(0, 256, (200, 4, 4, 4)).astype(np.uint8), np.arange(200) % 2, 2, "noise")
  describe.save_first_batch(tmp_path / "batch.png", images, UNET, dataclasses.replace(HOW, batch_size=100))
  with Image.open(tmp_path / "batch.png") as picture:
    assert picture.format == "PNG"
    assert picture.height > 2 * 48
  floats = np.linspace(-3, 5, 32).reshape(2, 2, 2, 4)
  visible = describe._visible(floats)
  assert (visible.dtype, visible.shape, visible.min()) == (np.uint8, (2, 2, 2, 3), 0)
