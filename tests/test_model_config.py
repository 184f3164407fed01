"""Configurations: each field is checked for type and range, and is converted to plain data."""

import dataclasses
import json
import math
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxguide import training
from jaxguide.models import folders as model
from jaxguide.models.importers.presets import PRESETS
from jaxguide.models.networks import AUTOENCODER, NETWORKS
from jaxguide.training import ModelConfig, TrainingConfig

FIELDS = {
  "model_channels": 8,
  "channel_mult": (1,),
  "num_res_blocks": 1,
  "attention_resolutions": (),
  "num_head_channels": 8,
}
UNET = {"network": "unet", "fields": FIELDS, "image_shape": (4, 4, 1), "num_classes": 2}

# Values that are invalid for every field.
ALIEN = [{"a": {}}, [[1]], [None], ["a"], b"x", 1 + 2j, object(), [[[[]]]], "nonsense", float("nan")]
# Values that are valid for some fields, but not for the field they are listed under.
WRONG = {
  "network": [None, 1, []],
  "fields": [None, [], 1, "x", {"name": "x"}, {"parent": None}],
  "image_shape": [None, [], 8, [8, 8, 0], [0, 8, 1], [8, 8], [8, 8.0, 1], [10**9] * 3, [2**16, 2**16, 1], [8, True, 1]],
  "num_classes": [0, -1, 10**12, 1e3, True, 0.5, []],
  "prediction": [None, 1, []],
  "schedule": [None, 1, []],
  "diffusion_steps": [0, -1, 10**10, 1e3, True, []],
  "rescale_timesteps": [None, 1, "true", []],
  "variance": [None, 1, []],
  "scale": [True, math.inf, 10**400, []],
  "low_res_shape": [[], [2, 2, 0], 2, [10**9] * 3],
  "encoder": [None, 1, []],
  "class_names": ["ab", [], ["a"], ["a", "a"], ["a", ""], [1, 2]],
  "label_size": [0, -1, 1.5, True, [], 3],
  "time_scale": [True, math.inf, 1e9, "1", []],
  "sigma_data": [0, -1, True, math.inf, 0.5, []],
  "noise_range": [1.0, [], [1.0], [2.0, 1.0], [-1.0, 1.0], [0.1, math.inf], [0.1, 1.0]],
  "model_channels": [None, -32, 0, 10**9, 32.0, True, "32", []],
  "out_channels": [0, -1, 10**9, 1.0, True, []],
  "num_res_blocks": [None, -1, 10**6, 1.0, True, []],
  "attention_resolutions": [1, [0], [1.5], [True]],
  "dropout": [None, -0.1, 1.5, True, []],
  "channel_mult": [None, 1, "1", [], [0], [-1], [1e9], [1e-9], [math.inf], [True]],
  "conv_resample": [None, 1, []],
  "num_heads": [None, 0, -1, 10**9, 1.0, True, []],
  "num_head_channels": [None, 0, -2, 10**9, 8.0, True, []],
  "use_scale_shift_norm": [None, 0, []],
  "resblock_updown": [None, 0, []],
  "use_new_attention_order": [None, 0, []],
  "use_checkpoint": [None, 0, []],
  "dtype": [None, 1, [], "int8", "float8", np.int32, "bfloat16 "],
  "cudnn_attention": [0, "auto", []],
  "null_class": [None, 0, []],
  "num_heads_upsample": [None, 0, -2, 1.0, True, []],
  "pool": [None, 1, []],
}
TRAINING_WRONG = {
  "steps": [None, 0, -1, 2**31, 1.0, True, []],
  "batch_size": [None, 0, 10**9, 1.0, []],
  "learning_rate": [None, -1, math.inf, 10**400, True, []],
  "warmup": [-1, 1, 1.5, 2**31, []],
  "weight_decay": [None, -1, math.inf, []],
  "clip_norm": [None, -1, math.inf, []],
  "ema_decay": [None, -0.1, 1.1, []],
  "p_uncond": [-0.1, 1.1, True, []],
  "noise_mean": [math.inf, True, []],
  "noise_std": [-1, math.inf, []],
  "loss": [1, [], "mse2"],
  "seed": [None, -1, 2**64, 2**70, 0.5, True, []],
  "save_every": [None, 0, 1.5, 2**31, []],
  "matmul_precision": [None, 1, [], "lowest"],
  "rate": [None, 1, [], "cosin", "cosine-decay:x=1", "inverse-sqrt:decay_start=-1"],
  "ema": [None, 1, [], "mean", "power:std=0.5", ["constant", 1], ["constant", "constant"], ["power:std=0.1", "mean"]],
  "weight": [None, 1, [], "snr", "min-snr:gamma=x", "min-snr:gamma=-5", "edm:sigma_data=0", "edm:sigma_data=inf"],
  "uncertainty": [None, 0, []],
  "noise": [
    1,
    [],
    "normal",
    "log-normal:mean=x",
    "log-normal:std=-1",
    "uniform:t_min=0.5,t_max=0.2",
    "logit-normal:a=1",
  ],
  "optimizer": [None, 1, [], "adamww", "adam:b9=1", "adamw:weight_decay=1", "lbfgs", "sophia"],
  "accumulation": [None, 0, 3, 1.0, True, []],
  "remat": [None, 1, [], "some"],
  "label_smoothing": [None, -0.1, 1, 1.5, True, []],
  "skip_nan": [None, -1, 1.5, True, []],
  "low_res_filter": [None, 1, [], "nearest"],
  "low_res_noise": [None, -0.1, True, math.inf, []],
}


def fields_of(*classes):
  return {field.name for cls in classes for field in dataclasses.fields(cls)}


def test_the_tables_have_every_field():
  modules = [NETWORKS[name].module for name in ("unet", "super_res_unet", "classifier")]
  assert {*WRONG} == fields_of(ModelConfig, *modules) - {"perturbation", "parent", "name"}
  assert {*TRAINING_WRONG} == fields_of(TrainingConfig)


@pytest.fixture
def as_users_run_it(monkeypatch):
  """Turn off the checks of argument types, which only the tests turn on."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def refused(make, name, value):
  with pytest.raises(ValueError, match=rf"\b{name}") as error:
    make(value)
  assert len(str(error.value)) < 700


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_field_of_another_type_or_range_is_named(name):
  def make(value):
    if name in fields_of(ModelConfig):
      return ModelConfig(**{**UNET, name: value})
    network = "classifier" if name == "pool" else "unet"
    return ModelConfig(**{**UNET, "network": network, "fields": {**FIELDS, name: value}})

  for value in [*ALIEN, *WRONG[name]]:
    refused(make, "field" if name == "fields" else name, value)


# The smallest networks that are not those of guided-diffusion, by name: their images, and the fields that they need.
OTHERS = {
  "dit": ((8, 8, 4), {"hidden_size": 32, "num_heads": 4, "depth": 1}),
  "sit": ((8, 8, 4), {"hidden_size": 32, "num_heads": 4, "depth": 1}),
  "repa": ((8, 8, 4), {"hidden_size": 32, "num_heads": 4, "depth": 1}),
  "lightningdit": ((8, 8, 4), {"hidden_size": 32, "num_heads": 4, "depth": 1}),
  "song_unet": ((8, 8, 3), {}),
  "dhariwal_unet": ((8, 8, 3), {}),
  "edm2_unet": ((8, 8, 3), {}),
  "autoencoder_kl": ((8, 8, 3), {}),
}


def bad_values(network, name):
  """Values that a field of a network cannot have, by its type and its bounds."""
  annotation = str(typing.get_type_hints(network.module).get(name))
  is_list, low, high = "Sequence" in annotation, *network.bounds.get(name, (None, None))
  values = [None, 0, 1.0, [], "yes"] if annotation == "<class 'bool'>" else []
  if low is not None:
    beyond = [low - 1] + ([10 * high + 1] if high < math.inf else [math.inf])
    values += [[value] for value in beyond] if is_list else [*beyond, True, []]
  return values


@pytest.mark.parametrize("network", OTHERS)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_field_of_another_network_of_another_type_or_range_is_named(network):
  shape, fields = OTHERS[network]
  role = NETWORKS[network].role
  rest = {"image_shape": shape, "num_classes": None if role is AUTOENCODER else 10}
  ModelConfig(network, fields, **rest)
  names = fields_of(NETWORKS[network].module) - {"perturbation", "parent", "name", "label_size", role.classes}
  for name in sorted(names):
    for value in [*ALIEN, *bad_values(NETWORKS[network], name)]:
      refused(lambda value, name=name: ModelConfig(network, {**fields, name: value}, **rest), name, value)


def test_other_networks_are_all_tried():
  assert {*OTHERS} == {*NETWORKS} - {"unet", "super_res_unet", "classifier"}


def test_every_network_but_the_autoencoder_says_who_computes_its_attention():
  """So that ``jaxguide sample --cudnn-attention`` takes them all."""
  assert {name for name in NETWORKS if "cudnn_attention" not in fields_of(NETWORKS[name].module)} == {"autoencoder_kl"}


@pytest.mark.parametrize("name", TRAINING_WRONG)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_training_field_of_another_type_or_range_is_named(name):
  for value in [*ALIEN, *TRAINING_WRONG[name]]:
    refused(lambda value: TrainingConfig(**{"steps": 1, name: value}), name, value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype(jnp.bfloat16), jnp.zeros(1, jnp.bfloat16).dtype, "bfloat16"])
def test_a_dtype_is_stored_by_its_name(dtype):
  config = ModelConfig(**{**UNET, "fields": {**FIELDS, "dtype": dtype}})
  assert json.loads(json.dumps(dataclasses.asdict(config)))["fields"]["dtype"] == "bfloat16"
  assert jnp.dtype(config.module.dtype) == jnp.bfloat16


@pytest.mark.usefixtures("as_users_run_it")
def test_numbers_of_numpy_become_plain_data():
  config = ModelConfig(
    "unet", {**FIELDS, "model_channels": np.int64(8), "channel_mult": np.array([1])}, np.array([4, 4, 1]), np.int32(2)
  )
  assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config == ModelConfig(**UNET)
  how = TrainingConfig(steps=np.int64(3), learning_rate=np.float32(0.5), p_uncond=jnp.float32(0.25))
  assert json.loads(json.dumps(dataclasses.asdict(how)))["learning_rate"] == 0.5
  assert how == TrainingConfig(steps=3, learning_rate=0.5, p_uncond=0.25)


@pytest.mark.parametrize("name", PRESETS)
def test_published_networks_pass(name):
  config = PRESETS[name]
  assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_network_that_is_too_large_is_refused():
  config = ModelConfig("unet", {**FIELDS, "model_channels": 2**16}, (4, 4, 1), 2)
  with pytest.raises(
    ValueError, match=r"would have [\d,]+ parameters, but at most 17,179,869,184 are allowed: reduce model_channels"
  ):
    model.shapes(config)
  large = ModelConfig("unet", {**FIELDS, "model_channels": 2**13}, (4, 4, 1), 2)  # It has 6 billion parameters.
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes(large))) > 5e9


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[" * 100_000, "nested too deeply"),
    ('{"network": ' + '{"a":' * 5000 + "1" + "}" * 5001, "nested too deeply"),
    ("[]", "is not a JSON object"),
    ("", "damaged"),
    ('{"network": "unet"', "damaged"),
    ('{"network": "unet", "network": "classifier"}', "has the field 'network' twice"),
    ('{"scale": NaN}', "NaN is not a number of JSON"),
    ('{"num_classes": ' + "9" * 5000 + "}", "damaged"),
    ('{"network": "unet"}', "fields"),
    (json.dumps({**UNET, "colour": "red"}), "colour"),
  ],
  ids=range(10),
)
def test_invalid_config_files(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match="does not describe a model") as error:
    training.load(tmp_path)
  assert message in str(error.value)
  assert len(str(error.value)) < 700


def test_a_config_that_is_not_a_file(tmp_path):
  (tmp_path / "config.json").mkdir()
  with pytest.raises(ValueError, match=r"config\.json is damaged \(it is not a regular file\)"):
    training.load(tmp_path)
  (tmp_path / "file").touch()
  with pytest.raises(FileNotFoundError, match="there is no model in"):
    training.load(tmp_path / "file")
