"""Initial parameters, array by array, are those of Flax's ``module.init``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jaxguide import training
from jaxguide._core import keys
from jaxguide.models import initial
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import init_params
from jaxguide.training import step

KEY = jax.random.key(3)

UNET = {"model_channels": 32, "channel_mult": (1,), "num_res_blocks": 0}
BLOCKS = {"hidden_size": 16, "depth": 1, "num_heads": 2}

NETWORKS = {
  "unet": ModelConfig("unet", UNET, (8, 8, 3), 4),
  "dit": ModelConfig("dit", BLOCKS, (8, 8, 4), 4),
  "lightningdit": ModelConfig("lightningdit", BLOCKS, (8, 8, 4), 4),
  "edm2": ModelConfig("edm2_unet", {"model_channels": 32, "channel_mult": (1,), "num_blocks": 0}, (8, 8, 3), 4),
}


@functools.partial(jax.jit, static_argnums=0, compiler_options=initial.OPTIONS)
def by_flax(name, key):
  # With the level of `initial`: the tests run without optimisations, which change the last bit.
  config = NETWORKS[name]
  return config.module.init(key, *config.role.inputs(config))


def assert_same(made, expected):
  assert jax.tree.structure(made) == jax.tree.structure(expected)
  for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(*map(numbers, (a, b)))


def numbers(array):
  return jax.random.key_data(array) if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key) else array


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_those_of_flax(name):
  config = NETWORKS[name]
  assert_same(init_params(config, KEY), by_flax(name, KEY))


def test_programs_are_shared():
  initial._compiled.clear()
  made = init_params(NETWORKS["dit"], KEY)
  shapes = {leaf.shape for leaf in jax.tree.leaves(made)}
  assert len(initial._compiled) <= len(shapes)
  assert len(initial._compiled) < len(jax.tree.leaves(made)) / 2
  before = dict(initial._compiled)
  other = init_params(NETWORKS["dit"], jax.random.key(4))
  assert initial._compiled == before
  assert_same(other, by_flax("dit", jax.random.key(4)))


def test_old_keys_and_traces():
  config, old = NETWORKS["dit"], jax.random.PRNGKey(3)
  assert_same(init_params(config, old), by_flax("dit", old))
  closed_over = jax.jit(lambda: init_params(config, KEY), compiler_options=initial.OPTIONS)()
  assert_same(closed_over, by_flax("dit", KEY))
  shapes = jax.eval_shape(lambda: init_params(config, KEY))
  assert isinstance(jax.tree.leaves(shapes)[0], jax.ShapeDtypeStruct)


class Layer(linen.Module):
  @linen.compact
  def __call__(self, x, _):
    return linen.Dense(x.shape[-1], kernel_init=linen.initializers.orthogonal())(x), None


class Odd(linen.Module):
  """A network with lifted transformations, tables, and initialisers that no other one shares."""

  @linen.compact
  def __call__(self, x):
    x, _ = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()(x, None)
    x = linen.remat(linen.Dense)(4)(linen.jit(linen.Dense)(4)(x))
    x = x[0]
    for number in (1.0, 2.0):
      table = np.full(4, number, np.float32)
      # Traced anew for each table, and of the same text.
      x += self.param(f"table_{number:g}", jax.jit(lambda key, table=table: table * jax.random.uniform(key, (4,))))
    whole = self.param("whole", lambda _: np.arange(4, dtype=np.float32))
    two = self.param("two", lambda key: tuple(jax.random.normal(each, (4,)) for each in jax.random.split(key)))
    zeros = self.param("number", linen.initializers.zeros, ()), self.param("zeros", lambda _: jnp.zeros(4))
    for std in (0.01, 2.0):  # Of one shape, with other numbers.
      x += self.param(f"normal_{std:g}", linen.initializers.normal(std), (4,))
    return x + whole + two[0] + zeros[0] + zeros[1]


def test_any_module():
  def init(key):
    return Odd().init(key, jnp.zeros((2, 4)))

  made = initial.by_array(init, KEY)
  assert_same(made, jax.jit(init, compiler_options=initial.OPTIONS)(KEY))
  assert (made["params"]["table_2"] > made["params"]["table_1"]).any()


@pytest.mark.parametrize("how", ["in pieces", "whole", "another generator", "not partitionable"])
def test_bits_of_arrays_of_all_sizes(how, monkeypatch):
  shapes = ((), (7,), (4096,), (17, 241), (3, 5, 65536 // 15 + 1), (150_001,))
  if how not in ("in pieces", "whole"):  # Then no array is drawn by the package, whatever its size.
    shapes = shapes[:4:3]

  def init(key):
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]

  key = jax.random.key(3, impl="rbg") if how == "another generator" else KEY
  if how == "whole":
    monkeypatch.setattr(initial, "_in_pieces", lambda: False)
  drawn = []
  monkeypatch.setattr(initial._Bits, "draw", lambda bits, draw=initial._Bits.draw: drawn.append(bits) or draw(bits))
  with jax.threefry_partitionable(how != "not partitionable"):
    made, expected = initial.by_array(init, key), jax.jit(init, compiler_options=initial.OPTIONS)(key)
  assert_same(made, expected)
  assert len(drawn) == (len(shapes) if how == "in pieces" else 0)


def test_arrays_are_where_the_key_is():
  last = jax.devices()[-1]

  def init(key):
    return {"a": jax.random.normal(key, (3, 2)), "b": jnp.ones(4), "key": jax.random.fold_in(key, 1)}

  made = initial.by_array(init, jax.device_put(KEY, last))
  for leaf in jax.tree.leaves(made):
    assert leaf.devices() == {last}
    assert leaf.committed
  here = initial.by_array(init, KEY)
  assert not here["a"].committed
  assert_same(jax.tree.map(np.asarray, (made["a"], made["b"])), (here["a"], here["b"]))
  assert_same(numbers(made["key"]), numbers(jax.random.fold_in(KEY, 1)))
  for device in (last, jax.devices()[0]):
    moved = initial.by_array(init, jax.device_put(KEY, device))
    assert {leaf.committed for leaf in jax.tree.leaves(moved)} == {True}
    assert {device for leaf in jax.tree.leaves(moved) for device in leaf.devices()} == {device}
  several = jax.sharding.NamedSharding(jax.make_mesh((4,), ("data",)), jax.sharding.PartitionSpec())
  assert len(initial.by_array(init, jax.device_put(KEY, several))["a"].devices()) == 4
  with jax.default_device(last):
    assert initial.by_array(init, jax.random.key(3))["a"].devices() == {last}


def test_no_two_arrays_share_memory():
  given = {"a": jnp.ones((64, 64))}
  made = initial.by_array(lambda tree: (tree, tree["a"], jnp.copy(tree["a"]), jnp.zeros(64), jnp.zeros(64)), given)
  places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((given, made))]
  assert len(set(places)) == len(places)


@pytest.mark.filterwarnings("ignore:Specifying a key")
@pytest.mark.parametrize(("optimizer", "given"), [("adamw", True), ("schedule_free_adamw", False), ("noisy_sgd", True)])
def test_states_begin_as_optax_has_them(optimizer, given):
  config = NETWORKS["dit"]
  settings = training.TrainingConfig(steps=10, optimizer=optimizer, weight_decay=0.0, uncertainty=True, seed=3)
  params = init_params(config, jax.random.key(5)) if given else None
  state = step.init_state(config, settings, params)
  network = {name: state.params[name] for name in ("params",)}
  assert_same(network, params if given else by_flax("dit", keys.seed_key(3)))
  assert "uncertainty" in state.params
  assert_same(state.ema_params, state.params)
  assert_same(state.opt_state, jax.jit(step.optimizer(settings).init)(state.params))
  leaves = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state, params))]
  assert len(set(leaves)) == len(leaves)
