"""Models whose files were changed or damaged after they were saved: each change is noticed or has no effect."""

import dataclasses
import json
import random
import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxguide import training
from jaxguide.models import arrays
from jaxguide.models import folders as model
from jaxguide.training import ModelConfig

pytestmark = [
  pytest.mark.usefixtures("only_new_objects"),
  # Orbax leaves files open when it fails.
  pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = ModelConfig(
  "unet",
  {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 0, "attention_resolutions": (), "num_head_channels": 8},
  (4, 4, 1),
  2,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A model with random parameters, and its folder. Tests that change the folder copy it first."""
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), model.shapes(CONFIG))
  folder = tmp_path_factory.mktemp("rot") / "model"
  training.save(folder, training.Model(CONFIG, params))
  return params, folder


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved[1], tmp_path / "copy")


def same_bits(ours, theirs):
  return all(
    a.dtype == b.dtype and np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  )


def save_params(folder, params):
  """Replace the parameters in a model's folder, without updating checksums."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "params", params, force=True)


def test_a_saved_model_is_loaded_unchanged(saved):
  loaded = training.load(saved[1])
  assert same_bits(loaded.params, saved[0])
  assert loaded.config == CONFIG
  stored = json.loads((saved[1] / "checksums.json").read_text())["params"]["params/out_2/bias"]
  bias = saved[0]["params"]["out_2"]["bias"]
  assert stored == {"dtype": "float32", "shape": [1], "crc32": f"{zlib.crc32(bias.tobytes()):08x}"}


def test_a_changed_array_is_named(saved, copy):
  params = jax.tree.map(np.copy, saved[0])
  params["params"]["middle_block_0"]["in_layers_2"]["kernel"][0, 0, 0, 0] *= 1 + 2**-23  # change its last bit
  save_params(copy, params)
  with pytest.raises(
    ValueError, match=r"params/middle_block_0/in_layers_2/kernel does not match its checksum"
  ) as error:
    training.load(copy)
  assert str(copy / "params") in str(error.value)
  params["params"]["middle_block_0"]["in_layers_2"]["kernel"][0, 0, 0, 0] = np.inf
  save_params(copy, params)
  with pytest.raises(ValueError, match="the parameter params/middle_block_0/in_layers_2/kernel is not finite"):
    training.load(copy, verify=False)


@pytest.mark.parametrize(
  "change",
  [
    {"prediction": "eps"},
    {"schedule": "linear"},
    {"num_classes": 3},
    {"fields": {**CONFIG.fields, "num_res_blocks": 2}},
  ],
  ids=lambda change: next(iter(change)),
)
def test_an_edited_config_is_noticed(saved, copy, change):
  stored = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(stored))  # Whitespace does not matter.
  assert training.load(copy).config == CONFIG
  (copy / "config.json").write_text(json.dumps({**stored, **change}))
  with pytest.raises(ValueError, match=r"copy/config\.json was changed after it was saved.*verify=False and save it"):
    training.load(copy)


def test_an_intended_edit_can_be_saved_again(saved, copy):
  stored = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps({**stored, "prediction": "eps"}))
  training.save(copy, training.load(copy, verify=False))
  assert training.load(copy).config == dataclasses.replace(CONFIG, prediction="eps")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (None, r"has no checksums\.json, so its parameters cannot be verified.*verify=False and save it again"),
    (lambda stored: stored[: len(stored) // 2], r"checksums\.json is damaged or belongs to another model"),
    (lambda stored: "[]", "is not a JSON object"),
    (lambda stored: '{"version": 1}', "contains no checksums"),
    (lambda stored: stored.replace('"version": 1', '"version": 2'), "use a newer one"),
    (lambda stored: stored.replace("out_2/bias", "out_9/bias"), "out_2/bias"),
    (lambda stored: stored.replace('"dtype": "float32"', '"dtype": "float3"'), "float3"),
    (lambda stored: stored.replace('"dtype": "float32"', '"dtype": "float16"'), "damaged or belong to another model"),
    (lambda stored: stored.replace('"crc32": "', '"crc32": "0'), "does not match its checksum"),
  ],
  ids=range(9),
)
def test_invalid_checksum_files(copy, change, message):
  path = copy / "checksums.json"
  stored = path.read_text()
  path.unlink() if change is None else path.write_text(change(stored))
  with pytest.raises(ValueError, match=message) as error:
    training.load(copy)
  assert str(copy) in str(error.value)
  assert len(str(error.value)) < 700


def damage(folder, rng):
  """Flip a bit of a file, cut it, or remove it. Half of the time it is the largest file, which has the arrays."""
  files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
  path = rng.choice([files[-1], rng.choice(files)])
  content, kind = bytearray(path.read_bytes()), rng.choice(["flip", "flip", "cut", "remove"])
  if kind == "remove":
    path.unlink()
    return
  where = rng.randrange(len(content))
  if kind == "flip":
    content[where] ^= 1 << rng.randrange(8)
  path.write_bytes(content if kind == "flip" else content[:where])


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 48), marks=pytest.mark.slow)], ids=["8", "40"])
def test_a_damaged_file_is_noticed_or_has_no_effect(saved, tmp_path, seeds, capfd):
  messages = []
  for seed in seeds:
    folder = shutil.copytree(saved[1], tmp_path / str(seed))
    damage(folder, random.Random(seed))
    try:
      loaded = training.load(folder)
    except (ValueError, FileNotFoundError) as error:
      messages.append(str(error).replace(str(folder), "FOLDER"))
    else:
      assert same_bits(loaded.params, saved[0])
      assert loaded.config == CONFIG
  assert messages
  assert all("FOLDER" in text and len(text) < 700 for text in messages)
  assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_are_loaded_unchanged(saved, tmp_path, dtype):
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), saved[0])
  training.save(tmp_path, training.Model(CONFIG, params))
  assert same_bits(training.load(tmp_path).params, params)


def test_different_arrays_have_different_checksums():
  zeros = np.zeros((2, 3), np.float32)
  flipped = zeros.copy()
  flipped.view(np.uint8)[1, 5] ^= 1
  others = [zeros, flipped, zeros.T, zeros.astype(jnp.bfloat16), zeros.view(np.int32), zeros[:1], zeros[None], -zeros]
  assert len({json.dumps(arrays.checksum(other)) for other in others}) == len(others)
  strided = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
  assert arrays.checksum(strided) == arrays.checksum(strided.copy()) == arrays.checksum(jnp.asarray(strided))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
def test_parameters_that_are_not_finite_are_not_saved(saved, tmp_path, dtype, value):
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), saved[0])
  params["params"]["out_2"]["bias"] = params["params"]["out_2"]["bias"].at[0].set(value)
  with pytest.raises(ValueError, match="the parameter params/out_2/bias is not finite"):
    training.save(tmp_path / "bad", training.Model(CONFIG, params))
  assert not (tmp_path / "bad").exists()
