"""The axis ``tensor``: transformers whose heads and widths are split over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide.distributed import placement
from jaxguide.models.model import shapes
from jaxguide.training import ModelConfig, TrainingConfig
from jaxguide.training.step import init_state, train_step

SHAPE = (4, 4, 4)
FIELDS = {"hidden_size": 32, "depth": 1, "num_heads": 4}
MESHES = ["data=2,tensor=2", "fsdp=2,tensor=2"]


@pytest.fixture(scope="module")
def model():
  """A small SiT with random parameters: new ones have zeros, with which no block does anything."""
  config = ModelConfig("sit", FIELDS, SHAPE, 3, "flow_to_data", "flow")
  rng = np.random.default_rng(0)
  draw = lambda leaf: np.asarray(rng.normal(size=leaf.shape) / 4, np.float32)  # noqa: E731
  return config, jax.tree.map(draw, shapes(config))


def split_names(params):
  """The names of the layers that are split over ``tensor``."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {path[-2].key for path, leaf in leaves if "tensor" in leaf.sharding.spec}


@pytest.fixture(scope="module")
def sampled(model):
  config, params = model

  @functools.cache
  def samples(mesh):
    devices = jax.devices()[:1] if mesh is None else mesh
    denoise = jg.NetworkDenoiser(params, config.module.apply, config.scaling)
    guided = jg.classifier_free(3, 2.0)(denoise)
    arguments = {"shape": SHAPE, "sigmas": jg.schedules.flow(3), "solver": jg.Euler(), "devices": devices}
    return jg.sample_batch(guided, jax.random.key(1), np.arange(4) % 3, **arguments)

  return samples


@pytest.mark.parametrize("mesh", MESHES)
def test_samples_are_the_same(sampled, mesh):
  np.testing.assert_allclose(sampled(mesh), sampled(None), atol=2e-5)


@pytest.fixture(scope="module")
def trained(model):
  config, params = model
  # Adam would divide the gradient of the keys' bias, which is rounding alone, by its own size.
  how = TrainingConfig(steps=3, batch_size=4, warmup=1, optimizer="sgd", learning_rate=0.1)
  rng = np.random.default_rng(1)
  batches = [(rng.integers(0, 256, (4, *SHAPE)).astype(np.uint8), np.arange(4) % 3) for _ in range(3)]

  @functools.cache
  def after(mesh):
    place = placement(jax.devices()[:1] if mesh is None else mesh)
    step, state = train_step(config, how, place), place.shards(init_state(config, how, params))
    layers = split_names(state.params)
    for batch in batches:
      state, metrics = step(state, *place.rows(batch))
    assert split_names(state.params) == layers
    return layers, jax.device_get(state.params), float(metrics["loss"])

  return after


@pytest.mark.parametrize("mesh", MESHES)
def test_three_steps_are_the_same(model, trained, mesh):
  _, params = model
  layers, ours, loss = trained(mesh)
  none, wanted, expected = trained(None)
  assert layers == {"qkv", "proj", "fc1", "fc2", "adaLN_modulation_1"}
  assert not none
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), ours, wanted)
  assert max(jax.tree.leaves(differences)) < 2e-5
  np.testing.assert_array_equal(ours["params"]["pos_embed"], params["params"]["pos_embed"])


def test_each_device_has_a_part_of_the_heads(model):
  _, params = model
  placed = placement("data=2,tensor=2").shards(params)["params"]["blocks_0"]
  assert placed["attn"]["qkv"]["kernel"].addressable_shards[0].data.shape == (32, 48)
  assert placed["attn"]["proj"]["kernel"].addressable_shards[0].data.shape == (16, 32)
  assert placed["mlp"]["fc2"]["bias"].sharding.is_fully_replicated
  assert isinstance(placed["mlp"]["fc1"]["kernel"], jnp.ndarray)
