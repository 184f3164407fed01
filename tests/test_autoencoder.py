"""The autoencoder of latent diffusion: published arrays, import, tiles, data sets of latents, pictures of samples."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxguide import data, generate, models, training
from jaxguide.generate.latents import Vae
from jaxguide.generate.plan import plan
from jaxguide.models import ModelConfig, importers
from jaxguide.models.importers import vae as family
from jaxguide.nn import AutoencoderKL
from jaxguide.nn.convolution import convolve
from jaxguide.nn.vae.tiles import Tiles, tiled

FIXTURE = Path(__file__).parent / "data/networks/vae_s1"
WEIGHTS = FIXTURE.with_suffix(".safetensors")
GIVEN = {"norm_num_groups": 8, "sample_size": 16}
DEVIATION = 2.203374340259412e-06  # fp32_vs_fp64_maxabs of the manifest.


def nhwc(array):
  return np.asarray(array).transpose(0, 2, 3, 1)


def assert_close(value, wanted):
  """Check within 5 times the published code's own float32 error, or 2e-5 of the largest value."""
  np.testing.assert_allclose(value, wanted, rtol=0, atol=max(5 * DEVIATION, 2e-5 * float(abs(wanted).max())))


@pytest.fixture(scope="module")
def published():
  return dict(np.load(FIXTURE.with_suffix(".npz")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The folder of the imported network."""
  folder = tmp_path_factory.mktemp("vae") / "model"
  importers.import_model(WEIGHTS, folder, **GIVEN)
  return folder


@pytest.fixture(scope="module")
def autoencoder(folder):
  return models.load(folder).autoencoder


@pytest.fixture(scope="module")
def small():
  """An autoencoder of one level, which compiles fast."""
  fields = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "mid_block_add_attention": False}
  config, rng = ModelConfig("autoencoder_kl", fields, (4, 4, 3), None), np.random.default_rng(0)
  draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) / np.float32(4)  # noqa: E731
  return models.Model(config, jax.tree.map(draw, models.model.shapes(config))).autoencoder


def with_fields(autoencoder, **fields):
  return dataclasses.replace(autoencoder, apply=dataclasses.replace(autoencoder.module, **fields).apply)


# --- the network against published arrays ---------------------------------------------------------


def test_decoding_and_its_gradient_are_the_published_ones(autoencoder, published):
  x, cotangent = (nhwc(published[name]).astype(np.float32) for name in ("x", "cotangent"))

  def total(x):
    out = autoencoder.decode(0.18215 * x)
    return (out * cotangent).sum(), out

  gradient, out = jax.jit(jax.grad(total, has_aux=True))(x)
  assert_close(out, nhwc(published["out"]))
  assert_close(gradient, nhwc(published["grad_x"]))


def test_encoding_is_the_published_one(autoencoder, published):
  images = nhwc(published["encode/image"]).astype(np.float32)
  mean, logvar = jax.device_get(autoencoder.moments(images))
  assert_close(mean, nhwc(published["encode/mean"]))
  assert_close(logvar, nhwc(published["encode/logvar"]))
  # The shift and the scale, and the sample of a key.
  np.testing.assert_allclose(autoencoder.encode(images), 0.18215 * mean, rtol=1e-6)
  key = jax.random.key(3)
  noise = autoencoder.encode(images, key) / 0.18215 - mean
  np.testing.assert_allclose(noise, np.exp(logvar / 2) * jax.random.normal(key, mean.shape), atol=1e-5)


def test_the_shift_and_the_scale_of_each_channel(autoencoder, small, published):
  shift, scale = [1.0, 2.0, 0.0, -1.0], [2.0, 1.0, -0.5, 4.0]
  model, _ = importers.read_model(WEIGHTS, **GIVEN, shift_factor=shift, scaling_factor=scale)
  images = nhwc(published["encode/image"]).astype(np.float32)
  mean, logvar = map(np.asarray, autoencoder.moments(images))
  found, std = model.autoencoder.posterior(images)
  np.testing.assert_allclose(found, (mean - np.array(shift)) * np.array(scale), atol=1e-4)
  np.testing.assert_allclose(std, np.exp(logvar / 2) * np.abs(scale), rtol=1e-4)
  shifted = with_fields(small, shift_factor=tuple(shift), scaling_factor=tuple(scale))
  assert shifted.module.shift_factor == model.autoencoder.module.shift_factor
  assert shifted.module.scaling_factor == model.autoencoder.module.scaling_factor
  np.testing.assert_allclose(shifted.decode(found), small.decode(0.18215 * mean), atol=1e-4)


def test_pixels_are_taken_as_the_floats_that_they_stand_for(autoencoder):
  pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  np.testing.assert_allclose(autoencoder.encode(pixels), autoencoder.encode(data.from_uint8(pixels)), atol=1e-6)


@pytest.mark.parametrize(
  ("method", "array", "wrong"),
  [
    ("encode", np.zeros((1, 16, 16, 4), np.float32), "images must be floats of shape"),
    ("encode", np.zeros((1, 15, 16, 3), np.float32), "multiples of 2, got 15x16"),
    ("decode", np.zeros((1, 8, 8, 3), np.float32), r"latents must be floats of shape \(n, height, width, 4\)"),
    ("decode", np.zeros((8, 8, 4), np.float32), "latents must be floats"),
    ("decode", np.zeros((1, 8, 8, 4), int), "latents must be floats"),
  ],
)
def test_other_shapes_are_refused(autoencoder, method, array, wrong):
  with pytest.raises(ValueError, match=wrong):
    getattr(autoencoder, method)(array)


def test_the_gradients_of_the_padded_convolution_are_those_of_jax():
  rng = np.random.default_rng(0)
  x, kernel = (rng.standard_normal(shape, np.float32) for shape in ((2, 8, 6, 3), (3, 3, 3, 5)))

  def plain(x, kernel):
    pads = ((0, 1), (0, 1))
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))

  cotangent = rng.standard_normal((2, 4, 3, 5), np.float32)

  def with_gradients(function):
    out, back = jax.vjp(function, x, kernel)
    return out, *back(cotangent)

  (out, *ours), (wanted, *theirs) = jax.jit(
    lambda: [with_gradients(function) for function in (lambda *args: convolve(*args, 2, (0, 1)), plain)]
  )()
  np.testing.assert_allclose(out, wanted, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


FIELDS = [
  {"block_out_channels": (8,), "latent_channels": 3, "layers_per_block": 2},
  {
    "block_out_channels": (8, 16, 24),
    "norm_num_groups": 8,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5,
    "shift_factor": 0.1,
  },
  {
    "block_out_channels": (8, 16),
    "mid_block_add_attention": False,
    "in_channels": 1,
    "out_channels": 1,
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
  },
]


@pytest.mark.torch
@pytest.mark.parametrize("fields", FIELDS)
def test_other_fields_and_tiles_are_those_of_diffusers(fields, tmp_path):
  torch = pytest.importorskip("torch")
  try:
    from diffusers import AutoencoderKL
  except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit PyTorch.
    pytest.skip(f"diffusers cannot be imported: {error}")
  torch.manual_seed(0)
  levels = len(fields["block_out_channels"])
  types = {
    "down_block_types": ("DownEncoderBlock2D",) * levels,
    "up_block_types": ("UpDecoderBlock2D",) * levels,
    "norm_num_groups": 4,
    "sample_size": 16,
  }
  network = AutoencoderKL(**types | fields).eval()
  network.save_pretrained(tmp_path / "vae")
  importers.import_model(tmp_path / "vae/diffusion_pytorch_model.safetensors", tmp_path / "model")
  ours, factor = models.load(tmp_path / "model").autoencoder, 2 ** (levels - 1)
  x = np.random.default_rng(0).standard_normal((1, 21 * factor, 17 * factor, fields.get("in_channels", 3)))
  x = x.astype(np.float32)
  for each in (ours, ours.tiled(8 * factor)):
    if each.tile:
      network.enable_tiling()
      network.tile_latent_min_size, network.tile_sample_min_size = 8, 8 * factor
    with torch.no_grad():
      posterior = network.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist
      out = network.decode(posterior.mean).sample
    for value, wanted in zip(each.moments(x), (posterior.mean, posterior.logvar), strict=True):
      np.testing.assert_allclose(value, nhwc(wanted), atol=2e-5)
    np.testing.assert_allclose(each.decode(each.encode(x)), nhwc(out), atol=5e-5)


# --- tiles ----------------------------------------------------------------------------------------


def test_tiles_of_a_local_function_are_the_whole():
  x = np.random.default_rng(0).standard_normal((1, 12, 18, 2), np.float32)

  @jax.jit
  def every(x):
    same = [tiled(jnp.square, x, tiles) for tiles in (Tiles(8, 2), Tiles(9, 0), Tiles(18, 3))]
    up = tiled(lambda tile: jnp.repeat(jnp.repeat(tile, 2, 1), 2, 2), x, Tiles(8, 2), up=2)
    return same, up, tiled(lambda tile: tile[:, ::2, ::2], x, Tiles(8, 4), down=2)

  same, up, down = every(x)
  for each in same:
    np.testing.assert_allclose(each, np.square(x), atol=1e-6)
  np.testing.assert_allclose(up, np.repeat(np.repeat(x, 2, 1), 2, 2), atol=1e-6)
  np.testing.assert_allclose(down, x[:, ::2, ::2], atol=1e-6)


def test_two_tiles_fade_into_each_other():
  # Each tile is its own mean: the steps of the fade are those of the rule.
  x = jnp.arange(6.0).reshape(1, 1, 6, 1)
  out = jax.jit(lambda x: tiled(lambda tile: jnp.full_like(tile, tile.mean()), x, Tiles(4, 2)))(x)
  # Tiles 0..3, 2..5 and 4..5 have the means 1.5, 3.5 and 4.5.
  np.testing.assert_allclose(out[0, 0, :, 0], [1.5, 1.5, 1.5, 2.5, 3.5, 4.0])


def test_an_image_in_one_tile_is_whole_and_a_smooth_one_is_close(autoencoder, published):
  latents = 0.18215 * nhwc(published["x"]).astype(np.float32)
  np.testing.assert_array_equal(autoencoder.tiled(16).decode(latents), autoencoder.decode(latents))
  smooth = np.broadcast_to(np.float32(0.18215 * np.arange(-1.5, 2)), (1, 12, 20, 4))
  whole, approximate = (np.asarray(each.decode(smooth)) for each in (autoencoder, autoencoder.tiled(32)))
  # The weights are random: what the tiles see differently is more than in a trained network.
  assert np.abs(whole - approximate).mean() < 0.5 * np.std(whole)


@pytest.mark.parametrize(
  ("size", "overlap", "wrong"),
  [(3, 0.25, "multiple of 2"), (1, 0.25, "tile"), (8, 1.0, "below 1"), (8, -0.5, "overlap")],
)
def test_tiles_that_cannot_be_are_refused(autoencoder, size, overlap, wrong):
  with pytest.raises(ValueError, match=wrong):
    autoencoder.tiled(size, overlap)


# --- import and export ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["vae", "vae-old", "vae-ldm"])
def test_the_round_trip_is_exact_under_each_form_of_names(form, folder, tmp_path):
  first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
  lines = importers.export_model(folder, first, form)
  assert "0.18215" in lines[-1]
  imported = importers.import_model(first, tmp_path / "model", **GIVEN)
  assert imported.family == form
  assert imported.config == models.load(folder).config
  importers.export_model(tmp_path / "model", second, form)
  one, two = load_file(first), load_file(second)
  assert one.keys() == two.keys()
  assert all(np.array_equal(one[name], two[name]) for name in one)
  if form == "vae":
    original = load_file(WEIGHTS)
    assert one.keys() == original.keys()
    assert all(np.array_equal(one[name], original[name]) for name in one)


def test_the_names_of_compvis(folder, tmp_path):
  importers.export_model(folder, tmp_path / "ldm.safetensors", "vae-ldm")
  found = load_file(tmp_path / "ldm.safetensors")
  assert found["decoder.up.1.block.0.conv1.weight"].shape == (32, 32, 3, 3)  # The last level comes first.
  assert found["decoder.up.0.block.0.nin_shortcut.weight"].shape == (16, 32, 1, 1)
  assert found["encoder.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)
  for name in ("decoder.up.1.upsample.conv.bias", "encoder.down.0.downsample.conv.bias", "encoder.norm_out.weight"):
    assert name in found
  # Beside the rest of a checkpoint, and what training leaves.
  whole = {f"first_stage_model.{name}": array for name, array in found.items()}
  extra = np.zeros(2, np.float32)
  whole |= {"model.diffusion_model.out.2.bias": extra, "first_stage_model.loss.logvar": extra}
  whole |= {"cond_stage_model.position_ids": np.arange(77), "model_ema.num_updates": np.asarray(3, np.int32)}
  save_file(whole, tmp_path / "whole.safetensors")
  assert importers.import_model(tmp_path / "whole.safetensors", tmp_path / "model", **GIVEN).parameters == 167_959


@pytest.mark.torch
def test_va_vae_with_attention_in_levels_and_statistics_of_latents(tmp_path):
  torch = pytest.importorskip("torch")
  fields = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "latent_channels": 32,
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
  }
  config = ModelConfig("autoencoder_kl", fields, (8, 8, 3), None)
  params = models.model.init_params(config, jax.random.key(0))
  models.save(tmp_path / "made", models.Model(config, params))
  importers.export_model(tmp_path / "made", tmp_path / "vavae.safetensors", "vae-ldm")
  assert "decoder.up.1.attn.0.proj_out.weight" in load_file(tmp_path / "vavae.safetensors")
  mean, std = (torch.rand(1, 32, 1, 1) + 0.5 for _ in range(2))
  torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
  stats = str(tmp_path / "latents_stats.pt")
  importers.import_model(tmp_path / "vavae.safetensors", tmp_path / "model", norm_num_groups=4, latents_stats=stats)
  loaded = models.load(tmp_path / "model").autoencoder
  images = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
  raw = np.asarray(loaded.moments(images)[0])
  np.testing.assert_allclose(
    loaded.encode(images), (raw - mean.numpy().ravel()) / std.numpy().ravel(), rtol=1e-4, atol=1e-5
  )


def test_channels_beside_the_quantisation_convolutions(tmp_path):
  fields = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 4, "z_channels": 3}
  config = ModelConfig("autoencoder_kl", fields, (8, 8, 3), None)
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), models.model.shapes(config))
  models.save(tmp_path / "made", models.Model(config, params))
  with pytest.raises(ValueError, match="export this network as family vae-ldm"):
    importers.export_model(tmp_path / "made", tmp_path / "z.safetensors")
  importers.export_model(tmp_path / "made", tmp_path / "z.safetensors", "vae-ldm")
  found, _ = importers.read_model(tmp_path / "z.safetensors", norm_num_groups=4)
  assert (found.config.fields["z_channels"], found.config.fields["latent_channels"]) == (3, 4)


def test_the_settings_of_a_config_beside_the_file(tmp_path):
  (tmp_path / "diffusion_pytorch_model.safetensors").symlink_to(WEIGHTS.resolve())
  config = {
    "_class_name": "AutoencoderKL",
    "norm_num_groups": 8,
    "scaling_factor": 0.5,
    "shift_factor": None,
    "force_upcast": True,
    "block_out_channels": [16, 32],
    "sample_size": 16,
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  found = importers.read_model(tmp_path / "diffusion_pytorch_model.safetensors")[0].config
  assert (found.fields["norm_num_groups"], found.fields["scaling_factor"], found.image_shape) == (8, 0.5, (16, 16, 3))
  (tmp_path / "config.json").write_text(json.dumps({**config, "spatial": 3}))
  with pytest.raises(ValueError, match="the field 'spatial', which is not known"):
    importers.read_model(tmp_path / "diffusion_pytorch_model.safetensors")


def without(prefix):
  return lambda tensors: {name: array for name, array in tensors.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
  ("change", "given", "wrong"),
  [
    (dict, {}, "give --field norm_num_groups=VALUE"),
    (dict, {"norm_num_groups": 7}, "must divide each of block_out_channels"),
    (dict, {**GIVEN, "heads": 2}, "no setting 'heads'"),
    (dict, {**GIVEN, "block_out_channels": [16, 64]}, r"block_out_channels is \(16, 32\) in the weights"),
    (dict, {**GIVEN, "act_fn": "relu"}, "act_fn must be silu"),
    (dict, {**GIVEN, "scaling_factor": 0}, "scaling_factor must not be 0"),
    (dict, {**GIVEN, "scaling_factor": [1.0, 2.0]}, "one for each of the 4 latent channels"),
    (without("encoder."), GIVEN, "there is no weight encoder.conv_out.weight"),
    (without("decoder.mid_block.resnets.1"), GIVEN, r"missing \(decoder.mid_block.resnets.1"),
    (lambda tensors: {**tensors, "encoder.down_blocks.999999999.x": np.zeros(1, np.float32)}, GIVEN, "at most 16"),
    (lambda tensors: {**tensors, "decoder.extra": np.zeros(1, np.float32)}, GIVEN, r"unknown \(decoder.extra\)"),
  ],
)
def test_files_and_settings_that_do_not_fit_are_refused(change, given, wrong, tmp_path):
  save_file(change(load_file(WEIGHTS)), tmp_path / "changed.safetensors")
  with pytest.raises(ValueError, match=wrong):
    importers.import_model(tmp_path / "changed.safetensors", tmp_path / "model", **given)
  assert not (tmp_path / "model").exists()


def test_networks_of_published_size_have_32_groups_and_ask_for_the_scale_of_wide_latents():
  shapes = {name: weight for name, weight in family._layout(family.PRESETS["sd-vae"], "vae").items()}
  assert family._infer(shapes).fields["norm_num_groups"] == 32
  wide = {name: weight for name, weight in family._layout(family.PRESETS["flux-vae"], "vae").items()}
  with pytest.raises(ValueError, match="give --field scaling_factor=VALUE"):
    family._infer(wide)
  assert family._infer(wide, scaling_factor=0.3611).fields["latent_channels"] == 16


def test_a_whole_number_within_the_autoencoder_is_refused(tmp_path):
  save_file({**load_file(WEIGHTS), "quant_conv.bias": np.zeros(8, np.int64)}, tmp_path / "whole.safetensors")
  with pytest.raises(ValueError, match=r"quant_conv.bias in .* is I64; weights must be one of float32"):
    importers.read_model(tmp_path / "whole.safetensors", **GIVEN)


def test_the_preset_of_edm2_gives_each_channel_the_mean_0_and_the_deviation_one_half(small):
  fields = {name: family.PRESETS["edm2-vae"].fields[name] for name in ("scaling_factor", "shift_factor")}
  edm2, raw = (with_fields(small, **given) for given in (fields, {"scaling_factor": 1.0}))
  mean, std = np.float32([5.81, 3.25, 0.12, -2.15]), np.float32([4.17, 4.62, 3.71, 3.28])
  standard = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
  np.testing.assert_allclose(edm2.decode(0.5 * standard), raw.decode(mean + std * standard), atol=1e-4)


# --- its role -------------------------------------------------------------------------------------


def test_an_autoencoder_is_neither_sampled_nor_trained(folder, tmp_path, run):
  with pytest.raises(ValueError, match="needs a denoiser"):
    _ = models.load(folder).denoiser
  status, _, errors = run("sample", "--model", folder, "--out", tmp_path / "a.npz")
  assert status
  assert "an autoencoder (autoencoder_kl), and samples are drawn from a denoiser" in errors
  status, _, errors = run("train", "--data", "digits", "--network", "autoencoder_kl", "--out", tmp_path / "run")
  assert status
  assert "an autoencoder cannot be trained here" in errors
  images = data.Images(np.zeros((2, 16, 16, 3), np.uint8), None, None, "black")
  with pytest.raises(ValueError, match="an autoencoder cannot be trained here"):
    training.fit(models.load(folder).config, training.TrainingConfig(steps=1), images, tmp_path / "run")
  with pytest.raises(ValueError, match="needs a autoencoder"):
    _ = models.load("animals").autoencoder


@pytest.mark.parametrize(
  "given", [{"num_classes": 2}, {"scale": 1.0}, {"encoder": "latents"}, {"image_shape": (15, 16, 3)}]
)
def test_configurations_that_are_no_autoencoders(given):
  with pytest.raises(ValueError, match=r"an autoencoder|multiples of 8"):
    ModelConfig(**{"network": "autoencoder_kl", "fields": {}, "image_shape": (16, 16, 3), "num_classes": None, **given})


# Values of each field that are of another type or out of range.
WRONG = {
  "block_out_channels": [None, 8, [], [0], [8.0], [8] * 17, "8", [10**9]],
  "layers_per_block": [None, 0, 1.5, True, 10**6],
  "latent_channels": [None, 0, 1.5, 10**9, []],
  "out_channels": [None, 0, 1.5, 10**9, []],
  "norm_num_groups": [None, 0, 3, 10**9, []],
  "down_block_types": [None, "DownEncoderBlock2D", ["DownEncoderBlock2D"], ["Down", "Down"], 1],
  "up_block_types": [None, ["DownEncoderBlock2D", "DownEncoderBlock2D"], [1, 2]],
  "use_quant_conv": [None, 1, []],
  "use_post_quant_conv": [None, 0, []],
  "mid_block_add_attention": [None, 0, []],
  "z_channels": [0, 1.5, True, []],
  "scaling_factor": [None, 0, float("nan"), float("inf"), "1", [1.0, 2.0], [1.0, 1.0, 1.0, 0.0], {"a": 1}, True],
  "shift_factor": [None, float("nan"), "0", [0.0], [0.0, 0.0, 0.0, None]],
  "use_checkpoint": [None, 1],
  "dtype": [None, 1, "int8"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_field_of_another_type_or_range_is_named(name):
  assert {*WRONG} == {field.name for field in dataclasses.fields(AutoencoderKL)} - {"parent", "name"}
  fields = {"block_out_channels": [8, 8], "norm_num_groups": 4}
  for value in WRONG[name]:
    with pytest.raises(ValueError, match=name):
      ModelConfig("autoencoder_kl", {**fields, name: value}, (16, 16, 3), None)


# --- data sets of latents -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """Ten pictures of two classes, in an .npz file."""
  path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
  images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
  np.savez(path, images=images, labels=np.arange(10) % 2, class_names=np.array(["cat", "dog"]))
  return path


def test_encode_train_and_sample(pictures, folder, tmp_path, run, autoencoder):
  latents = tmp_path / "latents.npz"
  status, printed, _ = run(
    "encode", pictures, "--vae", folder, "--out", latents, "--flip", "--batch-size", 4, "--no-progress"
  )
  assert status == 0
  assert "10 latents of 4x4x4" in printed
  assert not (tmp_path / "latents.npz.unfinished").exists()
  images = np.load(pictures)["images"]
  mean, logvar = autoencoder.moments(images)
  with np.load(latents) as arrays:
    np.testing.assert_allclose(arrays["latents"], 0.18215 * mean, atol=1e-5)
    np.testing.assert_allclose(arrays["std"], 0.18215 * np.exp(logvar / 2), rtol=1e-3)
    np.testing.assert_allclose(arrays["flipped"], 0.18215 * autoencoder.moments(images[:, :, ::-1])[0], atol=1e-5)
    both = np.stack([arrays["latents"], arrays["flipped"]])
    spread = np.stack([arrays["std"], arrays["flipped_std"]])
  std = float(printed.split("standard deviation is ")[1].split(".\n")[0])
  np.testing.assert_allclose(std, np.sqrt(both.var() + np.square(spread).mean()), rtol=1e-3)
  # Both variants and fresh noise are drawn.
  dataset = data.open_data(data.DataConfig(str(latents)))
  assert (dataset.image_shape, dataset.class_names, dataset.num_classes) == ((4, 4, 4), ["cat", "dog"], 2)
  rng = np.random.default_rng(0)
  drawn = np.stack([dataset.example(3, rng)[0] for _ in range(400)])
  error = 5 * np.sqrt((spread[:, 3] ** 2).max() + both[:, 3].var(0)) / 20
  assert (np.abs(drawn.mean(0) - both[:, 3].mean(0)) < error).all()
  np.testing.assert_allclose(drawn.var(0), (spread[:, 3] ** 2).mean(0) + both[:, 3].var(0), rtol=0.4)
  run_folder, out = tmp_path / "run", tmp_path / "samples.npz"
  small = ("--network", "tiny:Mlp", "--batch-size", 4, "--steps", 3, "--no-progress")
  status, printed, errors = run("train", "--data", latents, "--out", run_folder, *small)
  assert status == 0, errors
  assert "--vae FILE" in printed
  few = ("--num", 4, "--steps", 2, "--no-progress")
  status, _, errors = run("sample", "--model", run_folder, "--vae", folder, "--out", out, *few)
  assert status == 0, errors
  assert np.load(out)["arr_0"].shape == (4, 8, 8, 3)
  # They are the decoded latents of the same walk.
  settings = generate.Settings(run_folder, vae=folder, num=4, steps=2)
  x = autoencoder.decode(latent_samples(plan(settings)))
  assert np.abs(data.to_uint8(x).astype(int) - np.load(out)["arr_0"]).max() <= 1
  status, _, errors = run("sample", "--model", run_folder, "--out", tmp_path / "b.npz", *few)
  assert status
  assert "give their autoencoder" in errors
  status, _, errors = run("sample", "--model", "animals", "--vae", folder, "--out", tmp_path / "b.npz", *few)
  assert status
  assert "needs no autoencoder" in errors


def latent_samples(plan):
  from jaxguide import sampling
  from jaxguide._core import keys

  return sampling.sample_batch(
    plan.denoiser, keys.seed_key(0), plan.cond, num=4, shape=plan.image_shape, sigmas=plan.sigmas, solver=plan.solver
  )


def test_encoding_goes_on_where_it_was_stopped(pictures, folder, tmp_path, monkeypatch):
  how = generate.Encoding(folder, samples=True, seed=5, batch_size=4, dtype="float16")
  generate.encode(pictures, tmp_path / "unbroken.npz", how, progress=False)
  calls, moments = [], Vae.moments

  def stopped(self, images):
    calls.append(len(images))
    if len(calls) == 2:
      raise KeyboardInterrupt
    return moments(self, images)

  monkeypatch.setattr(Vae, "moments", stopped)
  with pytest.raises(KeyboardInterrupt):
    generate.encode(pictures, tmp_path / "broken.npz", how, progress=False)
  assert not (tmp_path / "broken.npz").exists()
  with pytest.raises(ValueError, match=r"encoding\.seed is 5 there, and 6 here"):
    generate.encode(pictures, tmp_path / "broken.npz", dataclasses.replace(how, seed=6), progress=False)
  generate.encode(pictures, tmp_path / "broken.npz", how, progress=False)
  assert calls == [4, 4, 4, 2]
  with np.load(tmp_path / "broken.npz") as one, np.load(tmp_path / "unbroken.npz") as two:
    assert sorted(one) == ["class_names", "labels", "latents", "settings"]
    assert one["latents"].dtype == np.float16
    np.testing.assert_array_equal(one["latents"], two["latents"])
  with pytest.raises(OSError, match="exists already"):
    generate.encode(pictures, tmp_path / "broken.npz", how, progress=False)


def test_what_cannot_be_encoded_is_refused(pictures, folder, tmp_path):
  out = tmp_path / "out.npz"
  np.savez(tmp_path / "odd.npz", images=np.zeros((2, 7, 7, 3), np.uint8))
  with pytest.raises(ValueError, match=r"7x7 pixels, and the autoencoder takes multiples of 2: give size"):
    generate.encode(tmp_path / "odd.npz", out, generate.Encoding(folder), progress=False)
  np.savez(tmp_path / "floats.npz", latents=np.zeros((2, 8, 8, 4), np.float32))
  with pytest.raises(ValueError, match="floats"):
    generate.encode(tmp_path / "floats.npz", out, generate.Encoding(folder), progress=False)
  with pytest.raises(ValueError, match=r"norm_num_groups.*jaxguide import takes settings"):
    generate.encode(pictures, out, generate.Encoding(WEIGHTS), progress=False)
  with pytest.raises(ValueError, match="vae must be an autoencoder"):
    generate.encode(pictures, out, generate.Encoding("animals"), progress=False)
  with pytest.raises(ValueError, match="seed is for samples"):
    generate.Encoding(folder, seed=1)


@pytest.mark.parametrize(
  ("arrays", "wrong"),
  [
    ({"std": np.zeros((2, 4, 4, 1), np.float32)}, "std must be floats of the shape of latents"),
    ({"flipped_std": np.zeros((2, 4, 4, 2), np.float32)}, "flipped_std needs the array flipped"),
    ({"flipped": np.zeros((2, 4, 4, 2)), "std": np.zeros((2, 4, 4, 2))}, "std and flipped_std belong together"),
  ],
)
def test_arrays_beside_latents_that_do_not_fit(arrays, wrong, tmp_path):
  np.savez(tmp_path / "latents.npz", latents=np.zeros((2, 4, 4, 2), np.float32), **arrays)
  with pytest.raises(ValueError, match=wrong):
    data.open_data(data.DataConfig(str(tmp_path / "latents.npz")))
