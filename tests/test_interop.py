"""Import and export of weights: published networks, all names and shapes, and invalid files."""

import functools
import json
import lzma
import math
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxguide import cli, training
from jaxguide.models import folders as models
from jaxguide.models import importers
from jaxguide.models.importers import openai, state_dicts
from jaxguide.models.importers.structure import alike, structure
from jaxguide.models.model import init_params
from jaxguide.training import ModelConfig

DATA = Path(__file__).parent / "data"
PROCESS = {"noise_schedule": "linear", "diffusion_steps": 1000}

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def random_state_dict(config, seed=0):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(shape, np.float32) for name, shape in openai.shapes(config).items()}


def same_bits(ours, theirs):
  """Whether two trees of float32 arrays are the same to the bit."""
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))
  return True


def config(network="classifier", shape=(8, 8, 3), num_classes=10, **fields):
  """A small network with OpenAI's diffusion process."""
  rest = {"low_res_shape": (4, 4, shape[-1])} if network == "super_res_unet" else {}
  fields = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": (1, 1), "num_head_channels": 16, **fields}
  return ModelConfig(network, fields, shape, num_classes, "eps", "linear", 1000, **rest)


# --- published networks, through files -----------------------------------------------------------------


# Options that names and shapes do not determine. tests/data/README.md describes the origin of the arrays.
PUBLISHED = {
  "unet_blocks_resample": {"num_head_channels": 8},
  "unet_mean_resample": {"num_heads": 2, "num_heads_upsample": 4},
  "unet_resample": {"num_heads": 4, "use_new_attention_order": True},
  "classifier_attention": {"num_head_channels": 8},
  "classifier_adaptive": {"num_heads": 4},
  "classifier_spatial": {"num_heads": 2, "use_new_attention_order": True},
}


def nhwc(array):
  return jnp.asarray(array.transpose(0, 2, 3, 1) if array.ndim == 4 else array)


def assert_close(value, wanted, deviation):
  """Check within 5 times the published code's own float32 error, or 2e-5 of the largest value."""
  np.testing.assert_allclose(value, wanted, rtol=0, atol=max(5 * float(deviation), 2e-5 * float(abs(wanted).max())))


def log_probability(model, t, y):
  def of(x):
    logits = model.config.module.apply(model.params, x, t)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).sum(), logits

  return of


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_network_is_imported_and_gives_its_numbers(name, tmp_path):
  with np.load(DATA / f"{name}.npz") as file:
    arrays = dict(file)
  weights = {key.removeprefix("weights/"): arrays.pop(key) for key in list(arrays) if key.startswith("weights/")}
  save_file(weights, tmp_path / "weights.safetensors")
  options = {"use_new_attention_order": False, **PUBLISHED[name], **PROCESS}
  if name != "classifier_attention":
    options["image_size"] = arrays["x"].shape[2]
  imported = importers.import_model(tmp_path / "weights.safetensors", tmp_path / "model", **options)
  assert imported.dtypes == {"float16": len(weights)}
  assert imported.parameters == sum(weight.size for weight in weights.values())
  model = training.load(tmp_path / "model")
  assert model.config == imported.config
  x, t = nhwc(arrays["x"]), nhwc(arrays["t"])
  y = nhwc(arrays["y"]) if "y" in arrays else None
  if model.config.network == "unet":
    output = quick_jit(model.config.module.apply)(model.params, x, t, y)
  else:
    gradient, output = quick_jit(jax.grad(log_probability(model, t, y), has_aux=True))(x)
    assert_close(gradient, nhwc(arrays["gradient"]), arrays["gradient_deviation"])
  assert_close(output, nhwc(arrays["output"]), arrays["output_deviation"])


B1 = {"num_head_channels": 16, "use_new_attention_order": False, **PROCESS}


def test_a_published_file_gives_its_numbers(tmp_path):
  importers.import_model(DATA / "classifier_b1.safetensors", tmp_path, **B1)
  model = training.load(tmp_path)
  assert model.config.image_shape == (16, 16, 3)  # determined by the positional embedding of its pool
  with np.load(DATA / "classifier_b1.npz") as file:
    arrays = {key: nhwc(value) for key, value in file.items()}
  x, t, y = (arrays[key] for key in "xty")
  gradient, logits = quick_jit(jax.grad(log_probability(model, t, y), has_aux=True))(x)
  # The published code's own deviations from float64, recorded with the arrays.
  assert_close(logits, arrays["logits"], 2.6e-6)
  assert_close(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y], arrays["log_probs_selected"], 2.6e-6)
  for scale in (1, 4, 10):
    assert_close(scale * gradient, arrays[f"grad_scale_{scale}"], scale * 1.085e-6)


# --- published shapes ----------------------------------------------------------------------------------

with lzma.open(DATA / "adm_shapes.json.xz") as file:
  OFFICIAL = {model: {name: tuple(shape) for name, shape in found.items()} for model, found in json.load(file).items()}


# Numbers of parameters and tensors in the published code's networks.
TOTALS = {
  "64x64_diffusion": (295904454, 541),
  "128x128_diffusion": (421529606, 493),
  "256x256_diffusion": (553838086, 567),
  "256x256_diffusion_uncond": (552814086, 566),
  "512x512_diffusion": (558997638, 645),
  "64_256_upsampler": (311795910, 567),
  "128_512_upsampler": (308835270, 537),
  "64x64_classifier": (65438568, 307),
  "128x128_classifier": (42568040, 221),
  "256x256_classifier": (54096360, 249),
  "512x512_classifier": (54448360, 281),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_names_and_shapes_of_published_models(name):
  found = openai.shapes(openai.PRESETS[name])
  assert found == OFFICIAL[name]
  parameters, tensors = TOTALS[name]
  assert (sum(map(math.prod, found.values())), len(found)) == (parameters, tensors)
  # Conversely, names and shapes identify the model, or the group of models with the same structure.
  like = alike(structure(OFFICIAL[name]))
  lsun = ["lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"]
  assert like == [name, *(lsun if name.endswith("uncond") else [])]


def test_presets_agree_with_the_readme_of_guided_diffusion():
  presets = openai.PRESETS
  assert presets.keys() - OFFICIAL.keys() == {"lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout"}
  for name, preset in presets.items():
    assert preset.prediction == "eps"
    assert preset.diffusion_steps == 1000
    assert not preset.rescale_timesteps
    assert preset.schedule == ("cosine" if name.startswith("64x64") else "linear")
    assert preset.module.use_new_attention_order == (name == "64x64_diffusion")
    assert preset.module.dropout == (0.1 if name in {"64x64_diffusion", *(f"lsun_{x}" for x in LSUN)} else 0)
    assert (preset.scale is None) == (preset.network != "classifier")
    if preset.network != "classifier":
      assert preset.variance == "learned_range"
      assert not preset.module.null_class
  heads = {name: preset.module.num_heads for name, preset in presets.items() if preset.module.num_head_channels == -1}
  assert heads == {"128x128_diffusion": 4, "64_256_upsampler": 4}
  scales = [presets[f"{side}x{side}_classifier"].scale for side in (64, 128, 256, 512)]
  assert scales == [1.0, 0.5, 1.0, 4.0]
  low = {name: preset.low_res_shape for name, preset in presets.items() if preset.low_res_shape}
  assert low == {"64_256_upsampler": (64, 64, 3), "128_512_upsampler": (128, 128, 3)}
  assert openai.shapes(presets["lsun_cat"]) == OFFICIAL["256x256_diffusion_uncond"]


LSUN = ("bedroom", "cat", "horse")

# --- import and export ------------------------------------------------------------------------------------

NETWORKS = {
  "unet": config("unet", null_class=False),
  "null class": config("unet", null_class=True),
  "unconditional, added embedding": config(
    "unet", num_classes=None, null_class=False, use_scale_shift_norm=False, resblock_updown=False
  ),
  "no convolution in resampling": config(
    "unet", null_class=False, resblock_updown=False, conv_resample=False, channel_mult=(1, 0.5, 2), num_res_blocks=2
  ),
  "learned variance": config("unet", (8, 8, 1), null_class=False, out_channels=2, attention_resolutions=(1, 2)),
  "heads by number": config("unet", num_head_channels=-1, num_heads=2, num_heads_upsample=4, null_class=False),
  "rematerialised": config("unet", null_class=False, use_checkpoint=True),
  "super resolution": config("super_res_unet", null_class=False),
  "attention": config(),
  "adaptive": config(pool="adaptive", attention_resolutions=(1,)),
  "spatial": config(pool="spatial", resblock_updown=False, channel_mult=(1, 1, 2)),
  "spatial_v2": config(pool="spatial_v2", channel_mult=(1,), attention_resolutions=(), num_res_blocks=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_there_and_back_is_the_identity(name):
  network = NETWORKS[name]
  state_dict = random_state_dict(network)
  params = openai.to_params(state_dict, network)
  back = openai.to_state_dict(params, network)
  same_bits(back, state_dict)
  same_bits(openai.to_params(back, network), params)


def test_layers_that_the_published_arrays_do_not_hold():
  found = openai.shapes(NETWORKS["spatial_v2"])
  assert [found[f"out.{name}"] for name in ("0.weight", "1.weight", "1.bias", "3.weight")] == [
    (2048, 32 * 4),  # the means of four blocks of 32 channels: the first convolution, two of the level, the middle
    (2048,),
    (2048,),
    (10, 2048),
  ]


def open_options(network):
  """Options that `infer` needs for a network."""
  module = network.module
  heads = "num_heads" if module.num_head_channels == -1 else "num_head_channels"
  return {
    heads: getattr(module, heads),
    "use_new_attention_order": module.use_new_attention_order,
    "image_size": network.image_shape[0],
    **PROCESS,
  }


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"rematerialised"}))
def test_infer_finds_the_configuration(name):
  network, more = NETWORKS[name], {}
  if name == "super resolution":
    more["low_res_size"] = 4
  if name == "null class":
    more["null_class"] = True
  if network.module.num_head_channels == -1:
    more["num_heads_upsample"] = 4
  found = openai.infer(openai.shapes(network), **open_options(network), **more)
  for field in ("network", "image_shape", "low_res_shape", "num_classes", "prediction", "schedule", "diffusion_steps"):
    assert getattr(found, field) == getattr(network, field), field
  different = {
    field: (value, getattr(found.module, field))
    for field, value in vars(network.module).items()
    if not field.startswith("_") and getattr(found.module, field) != value
  }
  if name == "spatial_v2":  # one level, without resampling
    different.pop("resblock_updown")
  if found.network != "classifier":
    channels = network.image_shape[-1]
    assert found.module.out_channels == (network.module.out_channels or channels)
    assert found.variance == ("learned_range" if found.module.out_channels == 2 * channels else "large")
    different.pop("out_channels", None)
  assert not different


def test_ambiguous_names_and_shapes_need_an_option():
  # Equal blocks without attention: one level of three, or two levels of one with a residual block that resamples.
  twofold = config(num_classes=10, attention_resolutions=(), pool="adaptive")
  shapes, options = openai.shapes(twofold), open_options(twofold)
  with pytest.raises(ValueError, match=r"give num_res_blocks \(residual blocks per level\); jaxguide import takes"):
    openai.infer(shapes, **options)
  assert openai.infer(shapes, **options, num_res_blocks=1).module.channel_mult == (1, 1)
  assert openai.infer(shapes, **options, num_res_blocks=3).module.channel_mult == (1,)
  with pytest.raises(ValueError, match="num_res_blocks must be 3 or 1 according to names and shapes, got 2"):
    openai.infer(shapes, **options, num_res_blocks=2)
  # Six input and six output channels: images of six channels, or an upsampler of three with a learned variance.
  upsampler = config("super_res_unet", out_channels=6, null_class=False)
  shapes, options = openai.shapes(upsampler), open_options(upsampler)
  with pytest.raises(ValueError, match=r"give network \(unet or super_res_unet"):
    openai.infer(shapes, **options)
  assert openai.infer(shapes, **options, network="unet").image_shape == (8, 8, 6)
  assert openai.infer(shapes, **options, low_res_size=4).low_res_shape == (4, 4, 3)


def test_all_missing_options_are_listed_together():
  with pytest.raises(ValueError, match="do not determine the whole configuration") as error:
    openai.infer(OFFICIAL["64_256_upsampler"], low_res_size=64, noise_schedule="linear")
  listed = re.findall(r"(\w+) \(", str(error.value))
  assert listed == ["num_heads", "use_new_attention_order", "image_size", "diffusion_steps"]
  assert str(error.value).endswith("--preset 64_256_upsampler")


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ({"num_haeds": 2}, "unknown option 'num_haeds': did you mean 'num_heads'?"),
    ({"num_heads": 2}, "num_heads cannot be chosen for this classifier"),
    ({"variance": "large"}, "variance cannot be chosen for this classifier"),
    ({"num_head_channels": 0}, "num_head_channels must be a whole number of at least 1, got 0"),
    ({"num_head_channels": -1}, "give num_head_channels (channels per attention head)"),
    ({"scale": math.nan}, "scale must be finite, got nan"),
    ({"image_size": 32}, "the attention pool is for images of side 8, got image_size 32"),
    ({"noise_schedule": "cosin"}, "unknown schedule of discrete steps 'cosin': did you mean 'cosine'?"),
  ],
)
def test_invalid_options(more, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    openai.infer(openai.shapes(NETWORKS["attention"]), **{**open_options(NETWORKS["attention"]), **more})


def test_continuous_time_and_x0():
  options = {**open_options(NETWORKS["unet"]), "diffusion_steps": 0, "noise_schedule": "sigmoid", "prediction": "x0"}
  found = openai.infer(openai.shapes(NETWORKS["unet"]), **options)
  assert (found.diffusion_steps, found.schedule, found.prediction) == (None, "sigmoid", "x0")


# --- types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_cast_and_reported(dtype, tmp_path):
  network = NETWORKS["attention"]
  stored = {name: array.astype(dtype) for name, array in random_state_dict(network).items()}
  save_file(stored, tmp_path / "half.safetensors")
  options = {name: value for name, value in open_options(network).items() if name != "image_size"}
  imported = importers.import_model(tmp_path / "half.safetensors", tmp_path / "model", **options)
  assert str(imported).endswith(f"in {len(stored)} tensors of {np.dtype(dtype).name}, cast to float32")
  wanted = openai.to_params({name: array.astype(np.float32) for name, array in stored.items()}, network)
  same_bits(training.load(tmp_path / "model").params, wanted)


def test_float32_is_not_cast(tmp_path):
  save_file(random_state_dict(NETWORKS["attention"]), tmp_path / "full.safetensors")
  imported = importers.import_model(tmp_path / "full.safetensors", tmp_path / "model", **B1)
  assert "cast" not in str(imported)


# --- bad input -----------------------------------------------------------------------------------------

GOOD = random_state_dict(NETWORKS["attention"])
FIRST = "input_blocks.0.0.weight"
BROKEN = {
  "another architecture": (
    {"conv1.weight": np.ones((8, 3, 7, 7), np.float32), "fc.bias": np.ones(10, np.float32)},
    "incomplete, or not a network of guided-diffusion: there is no time_embed.0.weight among conv1.weight, fc.bias",
  ),
  "a name is missing": (
    {name: array for name, array in GOOD.items() if name != "middle_block.0.in_layers.0.bias"},
    "the weights do not fit Classifier: 1 name is missing (middle_block.0.in_layers.0.bias)",
  ),
  "a name that tells the structure is missing": (
    {name: array for name, array in GOOD.items() if name != "input_blocks.3.0.in_layers.2.weight"},
    "incomplete, or not a network of guided-diffusion: there is no input_blocks.3.0.in_layers.2.weight among",
  ),
  "names are missing and unknown": (
    {name.replace("middle_block.2", "middle_block.9"): array for name, array in GOOD.items()},
    "names are missing (middle_block.2.emb_layers.1.bias, middle_block.2.emb_layers.1.weight, "
    "middle_block.2.in_layers.0.bias and 7 more) and 10 names are unknown (middle_block.9.",
  ),
  "a shape differs": (
    {**GOOD, "time_embed.2.weight": np.ones((128, 127), np.float32)},
    "time_embed.2.weight has shape (128, 127), expected (128, 128)",
  ),
  "axes are missing": (
    {**GOOD, FIRST: np.ones((32, 27), np.float32)},
    f"not a network of guided-diffusion: {FIRST} has shape (32, 27), expected 4 axes",
  ),
  "not finite": ({**GOOD, FIRST: np.full_like(GOOD[FIRST], np.nan)}, f"{FIRST} contains numbers that are not finite"),
  "whole numbers": (
    {**GOOD, FIRST: np.ones(GOOD[FIRST].shape, np.int32)},
    f"{FIRST} in {{file}} is I32; weights must be one of float32",
  ),
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
  """Run ``import-adm`` on a file; check that it fails with a one-line error and writes nothing."""

  def refused(file, *options, out=tmp_path / "new" / "model"):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--num-head-channels", "16", "--no-use-new-attention-order", "--noise-schedule", "linear"]
    arguments = options or [*arguments, "--diffusion-steps", "1000"]
    monkeypatch.setattr(sys, "argv", ["jaxguide", "import-adm", str(file), "--out", str(out), *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
      cli.main()
    printed, errors = capsys.readouterr()
    assert (exit.value.code, printed) == (2, "")
    assert sorted(tmp_path.rglob("*")) == before
    assert "Traceback" not in errors
    assert errors.count("\n") == 1
    return errors

  return refused


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_dict_is_refused(name, refused, tmp_path):
  state_dict, message = BROKEN[name]
  file = tmp_path / "weights.safetensors"
  save_file(state_dict, file)
  assert message.replace("{file}", str(file)) in refused(file)


@pytest.mark.parametrize("keep", [0, 5, 1000, -4])
def test_a_truncated_file_is_refused(keep, refused, tmp_path):
  file = tmp_path / "weights.safetensors"
  file.write_bytes((DATA / "classifier_b1.safetensors").read_bytes()[:keep])
  assert f"{file} is truncated or not a safetensors file" in refused(file)


def test_a_preset_that_does_not_fit_or_is_unknown(refused):
  file = DATA / "classifier_b1.safetensors"
  error = refused(file, "--preset", "256x256_classifier")
  assert (
    f"{file} cannot be imported as preset 256x256_classifier: the weights do not fit Classifier: 180 names" in error
  )
  assert "unknown preset '64x64_clasifier': did you mean '64x64_classifier'?" in refused(
    file, "--preset", "64x64_clasifier"
  )
  both = refused(file, "--preset", "64x64_classifier", "--num-head-channels", 16)
  assert "a preset is a complete configuration: leave out num_head_channels" in both


def test_a_preset_of_the_same_names_and_other_shapes(refused, tmp_path):
  save_file({n: np.zeros(s, np.float16) for n, s in openai.shapes(HALVED).items()}, tmp_path / "halved.safetensors")
  error = refused(tmp_path / "halved.safetensors", "--preset", "128x128_classifier")
  assert "input_blocks.0.0.bias has shape (32,), expected (128,), and 220 more shapes differ" in error


HALVED = ModelConfig(
  "classifier",
  {**openai.PRESETS["128x128_classifier"].fields, "model_channels": 32, "num_head_channels": 32},
  (128, 128, 3),
  1001,
)


def test_heads_that_do_not_divide_the_channels(refused):
  options = ["--no-use-new-attention-order", "--noise-schedule", "linear", "--diffusion-steps", 1000]
  error = refused(DATA / "classifier_b1.safetensors", *options, "--num-head-channels", 24)
  assert "num_head_channels 24 must divide the 32 channels that attend" in error


def test_an_output_folder_that_is_not_empty(refused, tmp_path):
  file = DATA / "classifier_b1.safetensors"
  (tmp_path / "held").mkdir()
  (tmp_path / "held" / "notes.txt").touch()
  assert "held is not empty: choose a new folder" in refused(file, out=tmp_path / "held")
  assert "notes.txt is not a folder" in refused(file, out=tmp_path / "held" / "notes.txt")


def test_missing_files_and_unknown_extensions(refused, tmp_path):
  assert "there is no file" in refused(tmp_path / "missing.safetensors")
  assert "there is no file" in refused(DATA.with_suffix(".pt"))
  (tmp_path / "weights.h5").touch()
  assert "unknown extension of a state dict '.h5'" in refused(tmp_path / "weights.h5")


def test_pt_without_torch(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "torch", None)
  ways = [importers.import_model(DATA / f"classifier_b1{end}", tmp_path / end, **B1) for end in (".pt", ".safetensors")]
  assert ways[0] == ways[1]
  same_bits(*(training.load(tmp_path / end).params for end in (".pt", ".safetensors")))
  with pytest.raises(ImportError, match=r"writing a \.pt file needs PyTorch: pip install '\.\[torch\]'"):
    importers.export_model(tmp_path / ".pt", tmp_path / "out.pt")


class Code:
  """An object that creates a folder when it is unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return os.mkdir, (str(self.mark),)


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pt_is_refused_and_not_run(torch, refused, tmp_path, zipped):
  file, mark = tmp_path / "weights.pt", tmp_path / "mark"
  torch.save({"weight": torch.ones(2), "more": Code(mark)}, file, _use_new_zipfile_serialization=zipped)
  assert f"contains code or objects besides weights ({os.mkdir.__module__}.mkdir); no code was run" in refused(file)
  assert not mark.exists()
  torch.load(file, weights_only=False)  # without the safe mode the code runs
  assert mark.exists()


@pytest.mark.parametrize("keep", [0, 1, 1000, 200_000, -30])
def test_a_truncated_pt_is_refused(refused, tmp_path, keep):
  file = tmp_path / "weights.pt"
  file.write_bytes((DATA / "classifier_b1.pt").read_bytes()[:keep])
  assert f"{file} is truncated or not a state dict of PyTorch" in refused(file)


@pytest.mark.torch
def test_a_pt_that_contains_something_else(torch, refused, tmp_path):
  file = tmp_path / "weights.pt"
  torch.save([torch.ones(2)], file)
  assert "must contain a state dict, got list" in refused(file)
  torch.save({"teacher": {"weight": torch.ones(2)}}, file)
  assert "must contain a state dict of tensors, but 'teacher' is of type dict" in refused(file)
  torch.save(torch.nn.Linear(2, 2), file)
  assert "contains code or objects besides weights (torch.nn.modules.linear.Linear)" in refused(file)


# --- PyTorch's files -----------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pt_in_every_precision(torch, tmp_path, dtype, zipped):
  network, file = NETWORKS["attention"], tmp_path / "weights.pt"
  tensors = {name: torch.tensor(array).to(getattr(torch, dtype)) for name, array in GOOD.items()}
  torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
  read = state_dicts.read(file)
  assert {tensor.dtype for tensor in read.values()} == {dtype}
  same_bits(
    openai.to_params(read, network), openai.to_params({k: v.float().numpy() for k, v in tensors.items()}, network)
  )


@pytest.mark.torch
def test_export_to_pt_gives_what_safetensors_gives(torch, tmp_path):
  network = NETWORKS["super resolution"]
  params = openai.to_params(random_state_dict(network), network)
  models.save(tmp_path / "model", models.Model(network, params))
  for end in (".pt", ".safetensors"):
    importers.export_model(tmp_path / "model", tmp_path / f"out{end}")
  loaded = torch.load(tmp_path / "out.pt", weights_only=True)
  assert all(tensor.dtype == torch.float32 for tensor in loaded.values())
  same_bits({name: tensor.numpy() for name, tensor in loaded.items()}, load_file(tmp_path / "out.safetensors"))
  same_bits(openai.to_params(state_dicts.read(tmp_path / "out.pt"), network), params)


# --- the commands --------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
  def run(*args):
    monkeypatch.setattr(sys, "argv", ["jaxguide", *map(str, args)])
    with pytest.raises(SystemExit) as exit:
      cli.main()
    assert exit.value.code == 0
    return capsys.readouterr().out

  return run


def test_commands(run, tmp_path, monkeypatch, capsys):
  printed = run(
    *("import-adm", DATA / "classifier_b1.safetensors", "--out", tmp_path / "model", "--num-head-channels", 16),
    *("--no-use-new-attention-order", "--noise-schedule", "cosine", "--diffusion-steps", 1000, "--scale", 2),
  )
  assert "Classifier, 134,282 parameters in 75 tensors of float32." in printed
  assert "recommended scale is 2" in printed
  exported = tmp_path / "new" / "back.safetensors"
  printed = run("export-adm", tmp_path / "model", "--out", exported)
  assert (
    "EncoderUNetModel(image_size=16, in_channels=3, model_channels=16, out_channels=10, num_res_blocks=1, "
    "attention_resolutions=(2,), dropout=0.0, channel_mult=(2, 2), conv_resample=True, num_heads=1, "
    "num_head_channels=16, use_scale_shift_norm=True, resblock_updown=True, use_new_attention_order=False, "
    "use_checkpoint=False, pool='attention')"
  ) in printed
  assert "--noise_schedule cosine --diffusion_steps 1000 --rescale_timesteps False" in printed
  assert "Note" not in printed
  same_bits(load_file(exported), load_file(DATA / "classifier_b1.safetensors"))

  # An existing file is kept unless --overwrite is given.
  exported.write_bytes(b"something else")
  monkeypatch.setattr(sys, "argv", ["jaxguide", "export-adm", str(tmp_path / "model"), "--out", str(exported)])
  with pytest.raises(SystemExit) as exit:
    cli.main()
  assert exit.value.code == 2
  assert f"{exported} exists already: choose another file, or --overwrite it" in capsys.readouterr().err
  assert exported.read_bytes() == b"something else"
  run("export-adm", tmp_path / "model", "--out", exported, "--overwrite")
  same_bits(load_file(exported), load_file(DATA / "classifier_b1.safetensors"))


def test_a_preset_by_command(run, monkeypatch, tmp_path):
  monkeypatch.setitem(openai.PRESETS, "256x256_classifier", training.ModelConfig(**{**vars(HALVED), "scale": 1.0}))
  file = tmp_path / "weights.safetensors"
  save_file({name: np.zeros(shape, np.float16) for name, shape in openai.shapes(HALVED).items()}, file)
  printed = run("import-adm", file, "--preset", "256x256_classifier", "--out", tmp_path / "model")
  assert "cast to float32" in printed
  assert "recommended scale is 1; 10 with 256x256_diffusion_uncond" in printed


def test_export_notes_differences_to_guided_diffusion(run, tmp_path):
  trained = ModelConfig(
    "unet", {"model_channels": 16, "num_res_blocks": 1}, image_shape=(8, 8, 1), num_classes=10
  )  # predicts v in continuous time, has a null class, and normalises in 16 groups
  params = jax.jit(lambda key: init_params(trained, key))(jax.random.key(0))
  models.save(tmp_path / "model", models.Model(trained, params))
  printed = run("export-adm", tmp_path / "model", "--out", tmp_path / "out.safetensors")
  assert "UNetModel(image_size=8, in_channels=1, model_channels=16, out_channels=1," in printed
  assert "num_classes=11" in printed
  assert "the network predicts v on the cosine schedule in continuous time" in printed
  assert "class 10 is the null class" in printed
  assert "32 groups, which do not divide 16 channels" in printed
  assert "Its process" not in printed


def test_export_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no model"):
    importers.export_model(tmp_path, tmp_path / "out.safetensors")
  with pytest.raises(ValueError, match="unknown extension of a state dict"):
    importers.export_model(tmp_path, tmp_path / "out.h5")
  params = openai.to_params(GOOD, NETWORKS["attention"])
  with pytest.raises(ValueError, match=r"the parameters do not fit Classifier: params/.* has shape None, expected"):
    openai.to_state_dict(params, NETWORKS["adaptive"])


def test_networks_with_label_vectors_are_not_exported():
  fields = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1}
  assert "label_size" not in openai.constructor(ModelConfig("unet", fields, (4, 4, 1), None))
  with pytest.raises(ValueError, match="this one takes labels of 5 numbers: it cannot be exported"):
    openai.constructor(ModelConfig("unet", fields, (4, 4, 1), None, label_size=5))
