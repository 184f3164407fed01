"""EDM's and EDM2's networks: the published code's arrays, the papers in NumPy, import and export, training."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edm_reference import EDM, EDM2
from safetensors.numpy import load_file, save_file

from jaxguide import models
from jaxguide.denoisers.linen import param_shapes
from jaxguide.models import ModelConfig, importers
from jaxguide.models.importers import layouts
from jaxguide.models.importers.families import of_network
from jaxguide.models.model import shapes
from jaxguide.models.networks import NETWORKS
from jaxguide.nn import SongUNet
from jaxguide.nn.edm2.layers import MPConv
from jaxguide.training import TrainingConfig
from jaxguide.training.objectives import objective
from jaxguide.training.step import init_state, train_step

DATA = Path(__file__).parent / "data" / "networks"

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

# Settings that names and shapes do not show, and the published code's own error in float32.
PUBLISHED = {
  "edmnet_s1_ddpmpp": ({}, 8.2e-7),
  "edmnet_s2_ncsnpp": ({}, 8.3e-7),
  "edmnet_s3_adm": ({}, 5.6e-7),
  "edm2net_s1": ({"channels_per_head": 16}, 3.7e-7),
}


def nhwc(array):
  return jax.device_put(np.asarray(np.moveaxis(array, 1, -1), np.float32))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
  """Each published network, imported once."""
  folder = tmp_path_factory.mktemp("models")

  @functools.cache
  def get(name):
    importers.import_model(DATA / f"{name}.safetensors", folder / name, **PUBLISHED[name][0])
    return folder / name, models.load(folder / name)

  return get


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_gives_the_published_numbers(name, imported):
  _, model = imported(name)
  with np.load(DATA / f"{name}.npz") as file:
    arrays = dict(file)
  x, cotangent = nhwc(arrays["x"]), nhwc(arrays["cotangent"])
  sigma, labels = jax.device_put((arrays["sigma"], arrays["labels"].argmax(1)))

  @quick_jit
  def denoise(x, sigma, labels):
    def weighted(x):
      out = jax.vmap(model.denoiser)(x, sigma, labels)
      return (out * cotangent).sum(), out

    return jax.grad(weighted, has_aux=True)(x)

  gradient, out = denoise(x, sigma, labels)
  atol = max(5 * PUBLISHED[name][1], 2e-5 * abs(arrays["out"]).max())
  np.testing.assert_allclose(out, nhwc(arrays["out"]), rtol=0, atol=atol)
  np.testing.assert_allclose(gradient, nhwc(arrays["grad_x"]), rtol=0, atol=atol)
  if "logvar" in arrays:
    u = quick_jit(model.config.module.logvar)(model.params, np.log(arrays["sigma"]) / 4)
    np.testing.assert_allclose(u, arrays["logvar"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_export_gives_back_every_bit(name, imported, tmp_path):
  lines = importers.export_model(imported(name)[0], tmp_path / "out.safetensors")
  theirs, ours = load_file(DATA / f"{name}.safetensors"), load_file(tmp_path / "out.safetensors")
  assert theirs.keys() == ours.keys()
  for key in theirs:
    assert theirs[key].shape == ours[key].shape, key
    assert theirs[key].tobytes() == ours[key].tobytes(), key
  assert "Precond(img_resolution=8" in lines[0]


# --- other fields, against the papers in NumPy -----------------------------------------------------------

SMALL = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (8,)}
EDM2_SMALL = {**SMALL, "channels_per_head": 8, "logvar_channels": 8}
OTHERS = {
  "skips": ("song_unet", {**SMALL, "encoder_type": "skip", "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)}, 3),
  "residual_skip": (
    "song_unet",
    {**SMALL, "channel_mult": (2, 1, 2), "encoder_type": "residual", "decoder_type": "skip", "augment_dim": 9}
    | {"resample_filter": (1, 2, 5, 4, 2, 1), "channel_mult_noise": 3, "num_blocks": 0, "channel_mult_emb": 2},
    None,
  ),
  "fourier": ("song_unet", {**SMALL, "embedding_type": "fourier", "channel_mult": (1,), "num_blocks": 2}, 4),
  "adm_heads": ("dhariwal_unet", {**SMALL, "model_channels": 64, "num_blocks": 0, "augment_dim": 9}, 5),
  "adm_plain": ("dhariwal_unet", {**SMALL, "model_channels": 16, "channel_mult": (2, 1)}, None),
  "edm2_other": (
    "edm2_unet",
    {**EDM2_SMALL, "resample_filter": (1, 3, 3, 1), "label_balance": 0.3, "concat_balance": 0.6, "res_balance": 0.4}
    | {"attn_balance": 0.2, "clip_act": 0.8, "channel_mult_noise": 2, "channel_mult_emb": 3},
    6,
  ),
  "edm2_uncond": ("edm2_unet", {**EDM2_SMALL, "channel_mult": (2, 1), "num_blocks": 2, "clip_act": None}, None),
}


def random_weights(config, seed=0):
  """Weights of every tensor of a layout; gains are not 0, so that every part counts."""
  rng, found = np.random.default_rng(seed), {}
  for name, entry in of_network(config.network).layout(config).items():
    if isinstance(entry, layouts.Fixed):
      found[name] = entry.value
    else:
      fan_in = np.prod(entry.shape[1:]) if len(entry.shape) > 1 else 4
      found[name] = np.asarray(rng.standard_normal(entry.shape) / np.sqrt(fan_in), np.float32)
  return found


@pytest.mark.parametrize("name", OTHERS)
def test_other_fields_are_read_from_names_and_shapes_and_follow_the_papers(name, tmp_path):
  network, fields, classes = OTHERS[name]
  config = ModelConfig(network, fields, (8, 8, 3), classes, "edm", sigma_data=0.5)
  weights = random_weights(config)
  save_file(weights, tmp_path / "weights.safetensors")
  told = ("channels_per_head", "resample_filter", "label_balance", "concat_balance", "res_balance", "attn_balance")
  told = (*told, "clip_act") if network == "edm2_unet" else ()
  given = {name: fields[name] for name in told if name in fields}
  importers.import_model(tmp_path / "weights.safetensors", tmp_path / "model", **given)
  model = models.load(tmp_path / "model")
  for field, value in fields.items():
    found = getattr(model.config.module, field)
    if field not in ("attn_resolutions", "model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb"):
      assert found == value, field

  rng = np.random.default_rng(1)
  x, c_noise = rng.standard_normal((2, 3, 8, 8)), np.array([-1.3, 0.6])
  labels = None if classes is None else np.eye(classes)[[1, 0]] * [[1], [0]]  # A class, and no label.
  y = None if classes is None else jnp.array([1, classes])
  arguments = {key: value for key, value in fields.items() if key not in SMALL or key in ("channel_mult", "num_blocks")}
  for name in ("channel_mult_noise", "channel_mult_emb", "logvar_channels", "augment_dim"):
    arguments.pop(name, None)
  edm2 = network == "edm2_unet"
  reference = EDM2(weights, **arguments) if edm2 else EDM(weights, network == "dhariwal_unet", **arguments)
  wanted = reference(x, c_noise, labels)
  out = quick_jit(model.config.module.apply)(model.params, nhwc(x), c_noise.astype(np.float32), y)
  np.testing.assert_allclose(out, nhwc(wanted), rtol=0, atol=2e-5 * abs(wanted).max())
  if edm2:
    u = quick_jit(model.config.module.logvar)(model.params, np.asarray(c_noise, np.float32))
    np.testing.assert_allclose(u, reference.logvar(c_noise), rtol=0, atol=1e-5)


# --- files that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "change", "message"),
  [
    ("edmnet_s1_ddpmpp", lambda w: w.pop("model.enc.4x4_block0.conv1.weight"), "enc.4x4_block0.conv1.weight"),
    ("edmnet_s1_ddpmpp", lambda w: w.pop("model.map_layer0.weight"), "there is no map_layer0.weight"),
    ("edmnet_s2_ncsnpp", lambda w: w.pop("model.dec.8x8_up.skip.resample_filter"), "1 name is missing"),
    ("edmnet_s3_adm", lambda w: [w.pop(k) for k in list(w) if ".dec." in k], "no block of its decoder"),
    ("edmnet_s3_adm", lambda w: w.update(more=w["model.out_conv.bias"]), "unknown (more)"),
    ("edm2net_s1", lambda w: w.pop("unet.out_gain"), "missing (unet.out_gain)"),
    ("edm2net_s1", lambda w: w.pop("unet.emb_noise.weight"), "there is no emb_noise.weight"),
    ("edm2net_s1", lambda w: [w.pop(k) for k in list(w) if ".enc." in k], "there is no enc.8x8_conv.weight"),
  ],
)
def test_a_torn_file_is_refused_with_the_first_name(name, change, message, tmp_path):
  weights = load_file(DATA / f"{name}.safetensors")
  change(weights)
  save_file(weights, tmp_path / "torn.safetensors")
  with pytest.raises(ValueError, match=re.escape(message)):
    importers.import_model(tmp_path / "torn.safetensors", tmp_path / "model", **PUBLISHED[name][0])
  assert not (tmp_path / "model" / "config.json").exists()


def test_a_filter_that_differs_in_one_block_is_refused(tmp_path):
  weights = load_file(DATA / "edmnet_s2_ncsnpp.safetensors")
  weights["model.dec.8x8_up.skip.resample_filter"] = np.full((1, 1, 4, 4), 1 / 16, np.float32)
  save_file(weights, tmp_path / "weights.safetensors")
  with pytest.raises(ValueError, match=r"dec\.8x8_up\.skip\.resample_filter is not what every SongUNet has"):
    importers.import_model(tmp_path / "weights.safetensors", tmp_path / "model")


def test_edm2_asks_for_the_channels_of_a_head(tmp_path):
  file = DATA / "edm2net_s1.safetensors"
  with pytest.raises(ValueError, match=re.escape("--field channels_per_head=VALUE")):
    importers.import_model(file, tmp_path / "model")
  with pytest.raises(ValueError, match="heads must divide"):
    importers.import_model(file, tmp_path / "model", heads=5)
  with pytest.raises(ValueError, match="does not fit the channels that attend"):
    importers.import_model(file, tmp_path / "model", channels_per_head=64)
  importers.import_model(file, tmp_path / "model", heads=2)
  assert models.load(tmp_path / "model").config.fields["channels_per_head"] == 16


@pytest.mark.parametrize(
  ("name", "given", "message"),
  [
    ("edmnet_s3_adm", {"heads": 2}, "attention heads do not apply"),
    ("edmnet_s1_ddpmpp", {"img_resolution": 16}, "img_resolution must be 8"),
    ("edmnet_s1_ddpmpp", {"prediction": "v"}, "prediction must be edm, ve or eps"),
    ("edmnet_s1_ddpmpp", {"num_heads": 2}, "unknown field of SongUNet 'num_heads'"),
    ("edmnet_s1_ddpmpp", {"attn_resolutions": (8,)}, "the weights do not fit SongUNet"),
  ],
)
def test_settings_that_do_not_fit_are_refused(name, given, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    importers.import_model(DATA / f"{name}.safetensors", tmp_path / "model", **given)


# --- training ----------------------------------------------------------------------------------------------

TINY = {"model_channels": 8, "channel_mult": (1,), "num_blocks": 0, "channels_per_head": 8, "logvar_channels": 8}


def tiny():
  """A tiny network of EDM2, and parameters as new ones are, with a gain of the output that is not 0."""
  model = ModelConfig("edm2_unet", TINY, (4, 4, 2), 3, "edm", encoder="latents", sigma_data=0.5)
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32) if leaf.ndim else np.zeros((), np.float32)  # noqa: E731
  params = jax.tree.map(draw, shapes(model))
  params["params"]["out_gain"] = np.float32(0.5)
  return model, params


@pytest.mark.parametrize("side", [1, 8])
@pytest.mark.parametrize("kernel_size", [0, 3])
def test_a_magnitude_preserving_layer_is_eq_47_whether_weights_or_outputs_are_multiplied(side, kernel_size):
  # With 4 inputs there are 4 or 36 weights for each output, so that both ways are taken among 1 and 64 pixels.
  rng = np.random.default_rng(0)
  x, cotangent = (jax.device_put(rng.standard_normal((2, side, side, c), np.float32)) for c in (4, 5))
  kernel = 3 * rng.standard_normal((*(kernel_size,) * (2 if kernel_size else 0), 4, 5), np.float32)

  def layer(kernel, gain):
    return MPConv(5, kernel_size).apply({"params": {"kernel": kernel}}, x, gain)

  def published(kernel, gain):
    inputs = tuple(range(kernel.ndim - 1))
    length = jnp.sqrt(jnp.square(kernel).sum(inputs, keepdims=True))
    count = kernel.size // 5
    kernel = kernel / (1e-4 + length / count**0.5) * (gain / count**0.5)
    kernel = kernel if kernel.ndim == 4 else kernel[None, None]
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  def with_gradients(function, *args):
    out, back = jax.vjp(function, *args)
    return out, *back(cotangent)

  both = quick_jit(lambda *args: [with_gradients(function, *args) for function in (layer, published)])
  (out, *ours), (published_out, *theirs) = both(kernel, np.float32(0.7))
  np.testing.assert_allclose(out, published_out, rtol=1e-5, atol=1e-5)
  for mine, wanted in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)


def test_a_step_of_edm2_begins_with_normalised_weights_and_trains_its_own_uncertainty():
  model, before = tiny()
  means = ("power:std=0.05", "power:std=0.1")
  config = TrainingConfig(steps=10, batch_size=8, warmup=0, rate="constant", learning_rate=0.01, uncertainty=True)
  config = dataclasses.replace(config, ema=means, optimizer="adam:b2=0.99", matmul_precision="highest")
  long = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * 3 if path[-1].key == "kernel" else leaf, before)
  start = jax.device_get(quick_jit(model.module.forced)(before))
  step, rng = train_step(model, config), np.random.default_rng(0)
  batch = rng.standard_normal((8, 4, 4, 2), np.float32), np.arange(8, dtype=np.int32) % 3
  state, metrics = jax.device_get(step(init_state(model, config, long), *batch))
  of_normal, same = jax.device_get(step(init_state(model, config, start), *batch))
  # The length of a kernel changes neither the loss nor the step.
  np.testing.assert_allclose(metrics["loss"], same["loss"], rtol=1e-4)
  for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(of_normal.params), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-3)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    old = functools.reduce(lambda tree, part: tree[part.key], path, before)
    if path[-1].key == "kernel":
      norms = np.sqrt(np.square(leaf).mean(tuple(range(leaf.ndim - 1))))
      np.testing.assert_allclose(norms, 1, atol=0.05)  # 1 before the step of 0.01 per weight.
      assert np.abs(norms - 1).max() > 1e-6
    elif path[-1].key in ("freqs", "phases"):
      np.testing.assert_array_equal(leaf, old)
  assert state.params.keys() == {"params"}
  moved = state.params["params"]["logvar_linear"]["kernel"] - start["params"]["logvar_linear"]["kernel"]
  assert np.abs(moved).max() > 5e-3
  # After the first step a power-function mean is the parameters of that step, as they are after the optimiser.
  for mean in state.means:
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(state.params), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_the_loss_with_uncertainty_is_edm2s():
  model, params = tiny()
  config = TrainingConfig(steps=10, batch_size=8, uncertainty=True, noise_mean=-0.4, noise_std=1.0, p_uncond=0.0)
  goal, examples = objective(model, config), np.random.default_rng(2).standard_normal((4, 4, 4, 2), np.float32)

  @quick_jit
  def drawn(params):
    batch = goal.draw(jax.random.key(1), jnp.asarray(examples), jnp.arange(4) % 3)
    return goal.errors(params, batch, jax.random.key(3))[0], batch

  errors, batch = drawn(params)
  # Equation 14, 15 of arXiv:2312.02696 in NumPy.
  weights = layouts.to_state_dict(params, of_network("edm2_unet").layout(model), "EDM2UNet")
  reference = EDM2(weights, channel_mult=(1,), num_blocks=0, channels_per_head=8)
  x0, x, sigma, labels = (np.asarray(leaf, np.float64) for leaf in batch)
  s = sigma[:, None, None, None]
  total = np.sqrt(s**2 + 0.25)
  f = reference(np.moveaxis(x / total, -1, 1), np.log(sigma) / 4, np.eye(3)[labels.astype(int)])
  denoised = 0.25 / total**2 * x + s * 0.5 / total * np.moveaxis(f, 1, -1)
  u = reference.logvar(np.log(sigma) / 4)
  weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
  wanted = weight / np.exp(u) * np.square(denoised - x0).mean((1, 2, 3)) + u
  np.testing.assert_allclose(errors, wanted, rtol=2e-4)


def test_dropout_and_dropped_labels_are_for_training_alone():
  fields = {**SMALL, "channel_mult": (1,), "num_blocks": 0, "attn_resolutions": ()}
  module = SongUNet(**fields, num_classes=3, label_dropout=1.0)
  x, t, y = jnp.ones((2, 4, 4, 3)), jnp.zeros(2), jnp.array([1, 3])
  rng = np.random.default_rng(0)
  draw = lambda leaf: rng.normal(0.1, leaf.size**-0.25, leaf.shape).astype(np.float32)  # noqa: E731
  params = jax.tree.map(draw, param_shapes(module, x, t, y))

  @quick_jit
  def outputs(params):
    plain = module.clone(dropout=0.0)
    trained = plain.apply(params, x, t, y, train=True, rngs={"dropout": jax.random.key(1)})
    dropped = module.clone(label_dropout=0.0).apply(params, x, t, y, train=True, rngs={"dropout": jax.random.key(1)})
    return module.apply(params, x, t, y), trained, dropped

  sampled, trained, dropped = jax.device_get(outputs(params))
  assert np.abs(sampled[0] - sampled[1]).max() > 1e-3  # The label counts,
  np.testing.assert_allclose(trained[0], trained[1], atol=1e-5)  # unless it is dropped,
  np.testing.assert_allclose(trained[1], sampled[1], atol=1e-5)  # which is the null label.
  assert np.abs(dropped - sampled).max() > 1e-3


@pytest.mark.parametrize("name", ["skips", "residual_skip", "adm_plain", "edm2_other"])
def test_other_types_and_rematerialised_blocks_have_the_same_shapes(name):
  network, fields, classes = OTHERS[name]
  fields = {**fields, "num_blocks": 0, "dtype": "bfloat16", "use_checkpoint": True}
  config = ModelConfig(network, fields, (8, 8, 3), classes, "edm")
  x, t, y = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2), None if classes is None else jnp.array([1, classes])
  of_params = param_shapes(config.module, x, t, y)
  assert {leaf.dtype for leaf in jax.tree.leaves(of_params)} == {np.dtype("float32")}

  def loss(params):
    return config.module.apply(params, x, t, y, train=True, rngs={"dropout": jax.random.key(0)}).sum()

  gradient = jax.eval_shape(jax.grad(loss), of_params)
  assert jax.tree.structure(gradient) == jax.tree.structure(of_params)


WRONG = {
  "img_resolution": [0, 1.5, []],
  "augment_dim": [None, -1, 1.5],
  "model_channels": [None, 0, 8.5],
  "channel_mult": [None, 1, [], [-1]],
  "channel_mult_emb": [-1, "x"],
  "num_blocks": [None, -1, 1.5, [1]],
  "attn_resolutions": [1, [0], [1.5]],
  "dropout": [None, -0.1, 1.5],
  "label_dropout": [None, -0.1, 1.5],
  "embedding_type": [None, 1, "sines"],
  "encoder_type": ["residuals", []],
  "decoder_type": ["residual", None],
  "resample_filter": [1, [], [1], [1, 2, 1], [1, -1], [0, 0], ["x"]],
  "channels_per_head": [0, None, 8.5],
  "label_balance": [-0.1, 2, None],
  "clip_act": [-1, "x"],
  "logvar_channels": [0, None],
  "cudnn_attention": [0, "auto", []],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_field_of_another_type_or_range_is_named(name):
  networks = ("song_unet", "dhariwal_unet", "edm2_unet")
  having = [network for network in networks if name in {f.name for f in dataclasses.fields(NETWORKS[network].module)}]
  for value in WRONG[name]:
    for network in having:
      with pytest.raises(ValueError, match=rf"\b{name}"):
        ModelConfig(network, {name: value}, (8, 8, 3), 3, "edm")


@pytest.mark.parametrize("given", [{}, {"label_dropout": 0.1}, {"null_class": True}])
def test_there_is_a_null_label_where_labels_were_dropped_in_training(given, tmp_path):
  importers.import_model(DATA / "edmnet_s1_ddpmpp.safetensors", tmp_path / "model", **given)
  assert models.load(tmp_path / "model").null_cond == (10 if given else None)
