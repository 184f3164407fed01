"""Perturbed networks: the attention block against NumPy, and documented properties."""

import dataclasses
import functools
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import Perturbation, scaling, schedules
from jaxguide.models.importers.openai import constructor
from jaxguide.nn.layers import AttentionBlock
from jaxguide.nn.parameters import shapes_alone
from jaxguide.training import ModelConfig

# XLA's optimisations would take most of the time of these tests, for programs that run once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

MIDDLE = "middle_block_1"
SMALL = {"model_channels": 8, "num_res_blocks": 1, "num_head_channels": 4}
ONE_LEVEL = {**SMALL, "channel_mult": (1,), "attention_resolutions": (), "num_res_blocks": 0}
V = scaling.v(schedules.Cosine())


def put(array):
  """An array of JAX. For one of NumPy, `jnp.asarray` compiles a program for each shape and each type."""
  return jax.device_put(np.asarray(array, np.float32))


def random_params(module, *args, seed=0):
  """Random parameters. A new network has zeros, with which no residual block would change its input."""
  rng = np.random.default_rng(seed)

  def draw(leaf):
    fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
    return put(rng.normal(size=leaf.shape) / np.sqrt(fan_in))

  with shapes_alone():  # To trace initialisers would take a third of the time.
    return jax.tree.map(draw, jax.eval_shape(module.init, jax.random.key(0), *args))


def batch(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return put(rng.normal(size=shape)), put(rng.uniform(0, 1000, shape[0]))


@pytest.fixture(scope="module")
def small():
  unet = jg.UNet(**SMALL)
  x, t = batch(2, 8, 4, 3)
  return unet, random_params(unet, x, t), x, t


def with_blocks(unet):
  """The network's function, compiled, which also returns the outputs of its blocks by name."""
  run = quick_jit(functools.partial(unet.apply, capture_intermediates=True, mutable=["intermediates"]))

  def apply(params, x, t):
    out, state = jax.device_get(run(params, x, t))
    return out, {name: parts["__call__"][0] for name, parts in state["intermediates"].items() if name in BLOCKS}

  return apply


@pytest.fixture(scope="module")
def plain_apply(small):
  return with_blocks(small[0])


@pytest.fixture(scope="module")
def one_level():
  unet = jg.UNet(**ONE_LEVEL)
  x, t = batch(2, 4, 2, 3)
  return unet, random_params(unet, x, t), x, t


def error(got, wanted):
  got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
  assert got.shape == wanted.shape
  return abs(got - wanted).max() / abs(wanted).max()


# --- The attention block, in NumPy ---


def blurred(logits, height, width_of_map, width):
  """Blur attention weights, (queries, keys), over the pixels of the queries, tap by tap."""
  images = logits.reshape(height, width_of_map, -1)
  for axis, side in enumerate((height, width_of_map)):
    size = math.ceil(6 * width)
    size += 1 - size % 2
    size = min(size, side + 1 if side % 2 == 0 else side)
    half = (size - 1) // 2
    padding = [(half, half) if i == axis else (0, 0) for i in range(3)]
    padded = np.pad(images, padding, mode="reflect")
    taps = [math.exp(-((i - half) ** 2) / (2 * width**2)) for i in range(size)]
    images = sum(tap / sum(taps) * np.take(padded, np.arange(i, i + side), axis=axis) for i, tap in enumerate(taps))
  return images.reshape(logits.shape)


def attention_block(params, x, heads, new_order, perturbation):
  """Group normalisation, attention head by head, and the residual connection, in float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
  _, height, width, channels = x.shape
  out = np.empty(x.shape)
  for i, image in enumerate(np.asarray(x, np.float64)):
    grouped = image.reshape(-1, math.gcd(32, channels), channels // math.gcd(32, channels))
    grouped = (grouped - grouped.mean((0, 2), keepdims=True)) / np.sqrt(grouped.var((0, 2), keepdims=True) + 1e-5)
    normed = grouped.reshape(-1, channels) * params["norm"]["scale"] + params["norm"]["bias"]
    qkv = normed @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    c = channels // heads
    attended = []
    for head in range(heads):
      starts = [part * channels + head * c if new_order else (3 * head + part) * c for part in range(3)]
      q, k, v = (qkv[:, start : start + c] for start in starts)
      weights = q @ k.T / np.sqrt(c)
      if perturbation.kind == "identity":
        weights = np.where(np.eye(len(weights)), 0, -np.inf)
      elif perturbation.width == math.inf:
        weights = np.broadcast_to(weights.mean(0), weights.shape)
      else:
        weights = blurred(weights, height, width, perturbation.width)
      weights = np.exp(weights - weights.max(1, keepdims=True))
      attended.append(weights / weights.sum(1, keepdims=True) @ v)
    h = np.concatenate(attended, 1) @ params["proj_out"]["kernel"] + params["proj_out"]["bias"]
    out[i] = image + h.reshape(image.shape)
  return out


# Widths with a kernel of one pixel, one that fits, one cut off along one side, one cut off along both, and no kernel.
# The order of the heads is undone before anything is perturbed.
@pytest.mark.parametrize(("sides", "new_order"), [((6, 4), False), ((1, 7), True)])
@pytest.mark.parametrize(
  ("kind", "width"), [("identity", math.inf), *(("smooth", width) for width in (0.1, 0.5, 0.8, 20, math.inf))]
)
def test_attention_agrees_with_numpy(kind, width, sides, new_order):
  x, _ = batch(2, *sides, 12)
  perturbation = Perturbation(kind, width=width)
  block = AttentionBlock(3, use_new_attention_order=new_order, perturbation=perturbation)
  params = random_params(block, x)
  assert error(quick_jit(block.apply)(params, x), attention_block(params, x, 3, new_order, perturbation)) < 2e-6


def test_a_blur_differs_from_the_mean_and_from_no_blur():
  x, _ = batch(1, 6, 4, 8)
  block = AttentionBlock(2)
  params = random_params(block, x)

  def out(width):
    return quick_jit(block.clone(perturbation=Perturbation("smooth", width=width)).apply)(params, x)

  plain = quick_jit(block.apply)(params, x)
  assert error(out(1e-3), plain) < 1e-6
  assert error(out(1 / 6), plain) < 1e-6
  assert error(out(1.0), plain) > 1e-2
  assert error(out(1e9), out(math.inf)) > 1e-4


def dots(perturbation):
  block = AttentionBlock(2, perturbation=perturbation)
  x, _ = batch(1, 8, 4, 8)
  jaxpr = jax.make_jaxpr(block.apply)(random_params(AttentionBlock(2), x), x)
  return list(shapes_of_dots(jaxpr.jaxpr))


def shapes_of_dots(jaxpr):
  """Shapes of matrix products over pixels; those of the normalisation have no pixel axis."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general" and len(shape := equation.outvars[0].aval.shape) > 2:
      yield shape
    for value in equation.params.values():
      if hasattr(value, "jaxpr"):
        yield from shapes_of_dots(value.jaxpr)


def test_perturbed_attention_skips_unneeded_products():
  plain, mean = dots(None), dots(Perturbation("smooth"))
  assert len(plain) == 4  # queries, keys and values; attention weights; weighted values; projection
  assert max(map(np.prod, plain)) == 2 * 32 * 32
  assert len(mean) == 4
  assert max(map(np.prod, mean)) == 32 * 3 * 8  # the weights of one query are fewer than the queries, keys and values
  assert len(dots(Perturbation("identity"))) == 2
  assert len(dots(Perturbation("skip"))) == 0


# --- In the network ---


def test_parameters_are_those_of_the_plain_network(one_level):
  unet, _, x, t = one_level
  plain, *others = (
    str(jax.make_jaxpr(unet.clone(perturbation=kind and Perturbation(kind)).init)(jax.random.key(0), x, t))
    for kind in (None, "identity", "smooth", "skip")
  )
  for other in others:
    assert plain == other
  assert "dot_general" in plain


BLOCKS = {
  "input_blocks_1_0": "out_layers_3",
  "input_blocks_2_0": "out_layers_3",  # halves the sides
  "input_blocks_3_0": "out_layers_3",  # changes the channels
  "input_blocks_3_1": "proj_out",
  "middle_block_0": "out_layers_3",
  "middle_block_1": "proj_out",
  "output_blocks_1_0": "out_layers_3",
  "output_blocks_1_1": "proj_out",
  "output_blocks_1_2": "out_layers_3",  # doubles the sides
}


# A block that resamples, an attention block and a block that changes the channels; all blocks together.
@pytest.mark.parametrize(
  "blocks", [("input_blocks_2_0", MIDDLE, "output_blocks_1_0"), tuple(BLOCKS)], ids=lambda blocks: blocks[-1]
)
def test_a_skipped_block_adds_nothing(small, plain_apply, blocks):
  unet, params, x, t = small
  zeroed = {"params": dict(params["params"])}
  for name in blocks:
    block = dict(zeroed["params"][name])
    block[BLOCKS[name]] = jax.tree.map(jnp.zeros_like, block[BLOCKS[name]])
    zeroed["params"][name] = block
  wanted, _ = plain_apply(zeroed, x, t)
  got = quick_jit(unet.clone(perturbation=Perturbation("skip", blocks)).apply)(params, x, t)
  assert error(got, wanted) < 2e-6
  assert error(got, plain_apply(params, x, t)[0]) > 1e-3


def test_only_the_named_block_is_perturbed(small, plain_apply):
  unet, params, x, t = small
  perturbed = unet.clone(perturbation=Perturbation("smooth", [MIDDLE, "output_blocks_1_1"]))
  plain, weak = (apply(params, x, t)[1] for apply in (plain_apply, with_blocks(perturbed)))
  for name in plain:
    if name.startswith("input") or name == "middle_block_0":
      np.testing.assert_array_equal(weak[name], plain[name])
    else:
      assert error(weak[name], plain[name]) > 1e-4
  assert plain.keys() == BLOCKS.keys()


@pytest.mark.parametrize("kind", ["identity", "smooth"])
def test_perturbed_attention_of_a_single_pixel_changes_nothing(kind):
  unet = jg.UNet(**ONE_LEVEL)
  x, t = batch(2, 1, 1, 3)
  params = random_params(unet, x, t)
  weak = unet.clone(perturbation=Perturbation(kind))
  assert error(*quick_jit(lambda *args: [each.apply(*args) for each in (weak, unet)])(params, x, t)) < 1e-6


@pytest.mark.parametrize(
  "perturbation", [Perturbation("smooth", width=0.7), Perturbation("skip", [MIDDLE, "middle_block_0"])]
)
def test_checkpoints_and_half_precision(one_level, perturbation):
  unet, params, x, t = one_level

  def value_and_gradient(**fields):
    weak = unet.clone(perturbation=perturbation, **fields)

    def loss(params):
      out = weak.apply(params, x, t)
      return jnp.square(out).sum(), out

    return jax.device_get(quick_jit(jax.value_and_grad(loss, has_aux=True))(params))

  ((plain, wanted), gradient), ((value, _), remat) = value_and_gradient(), value_and_gradient(use_checkpoint=True)
  np.testing.assert_allclose(value, plain, rtol=1e-5)
  norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
  assert 0 < norm < np.inf
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * norm), remat, gradient)
  half = quick_jit(unet.clone(perturbation=perturbation, dtype=jnp.bfloat16).apply)(params, x, t)
  assert half.dtype == x.dtype
  assert 0 < error(half, wanted) < 0.1


def test_super_resolution_can_be_perturbed():
  unet = jg.SuperResUNet(**ONE_LEVEL)
  x, t = batch(1, 8, 8, 3)
  cond = {"low_res": batch(1, 4, 4, 3)[0]}
  params = random_params(unet, x, t, cond)
  denoise = jg.NetworkDenoiser(params, unet.apply, V)
  weak = jg.perturbed(denoise, Perturbation("skip", [MIDDLE]))
  args = (x[0], jnp.asarray(1.0), {"low_res": cond["low_res"][0]})
  assert error(quick_jit(weak)(*args), quick_jit(denoise)(*args)) > 1e-4


# --- As the weak denoiser ---


def denoiser(network, seed=0):
  unet, params, x, t = network
  params = random_params(unet, x, t, seed=seed) if seed else params
  # A new module, which is equal to the others by value.
  return jg.NetworkDenoiser(params, unet.clone().apply, V, learned_variance=False)


def test_the_weak_denoiser_differs_in_the_network_alone(small):
  good = denoiser(small)
  weak = jg.perturbed(good, Perturbation())
  assert all(a is b for a, b in zip(jax.tree.leaves(good), jax.tree.leaves(weak), strict=True))
  assert weak.apply.module == good.apply.module.clone(perturbation=Perturbation())
  again = jg.perturbed(weak, Perturbation("skip"))
  assert again.apply.module.perturbation == Perturbation("skip")
  variance = jg.perturbed(dataclasses.replace(good, learned_variance=True), Perturbation())
  assert variance.learned_variance


def test_a_sweep_is_one_program_and_scale_one_is_unguided(one_level, caplog):
  options = dict(num=2, shape=(4, 2, 3), sigmas=jg.karras(3), solver=jg.Euler(), devices=jax.devices()[:1])

  def images(scale, seed):
    good = denoiser(one_level, seed)
    guided = jg.autoguidance(jg.perturbed(good, Perturbation("smooth", [MIDDLE], 1)), scale)(good)
    return jg.sample_batch(guided, jax.random.key(0), **options)

  at_one = images(1.0, 0)
  with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
    at_three = images(3.0, 0)
    other = images(2.0, 1)
  assert not [record for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
  unguided = jg.sample_batch(denoiser(one_level), jax.random.key(0), **options)
  assert error(at_one, unguided) < 1e-6
  assert error(at_three, unguided) > 1e-3
  assert np.isfinite(other).all()


# --- Errors ---


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("identty",), "unknown perturbation 'identty': did you mean 'identity'"),
    (("identity", ()), "at least one block, got none"),
    (("smooth", (MIDDLE,), 0), "width must be above 0, got 0"),
    (("smooth", (MIDDLE,), math.nan), "width must be above 0, got nan"),
    (("skip", (MIDDLE,), 2.0), "only the perturbation 'smooth' has a width: leave it out for 'skip', got 2.0"),
  ],
)
def test_invalid_perturbations(arguments, message):
  with pytest.raises(ValueError, match=message):
    Perturbation(*arguments)


def test_perturbations_are_compared_and_hashed_by_value():
  listed, single = Perturbation("smooth", ["a"], 1), Perturbation("smooth", "a", 1.0)
  assert listed == single
  assert hash(listed) == hash(single)


@pytest.mark.parametrize(
  ("kind", "name", "message"),
  [
    ("identity", "middle_blok_1", "unknown attention block 'middle_blok_1': did you mean 'middle_block_1'"),
    (
      "identity",
      "middle_block_0",
      "unknown attention block 'middle_block_0'.*There are input_blocks_3_1, middle_block_1",
    ),
    ("smooth", "input_blocks_1_1", "unknown attention block 'input_blocks_1_1'"),
    ("skip", "input_blocks_0_0", "unknown residual or attention block 'input_blocks_0_0'"),
    ("skip", "out_2", "unknown residual or attention block 'out_2'.*middle_block_0, middle_block_1, middle_block_2"),
  ],
)
def test_blocks_that_do_not_exist(small, kind, name, message):
  unet, params, x, t = small
  perturbation = Perturbation(kind, [name])
  with pytest.raises(ValueError, match=message):
    jg.perturbed(denoiser(small), perturbation)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(unet.clone(perturbation=perturbation).apply, params, x, t)


class Linear(nn.Module):
  @nn.compact
  def __call__(self, x, t, y):
    return nn.Dense(x.shape[-1])(x)


@pytest.mark.parametrize(("apply", "what"), [(lambda p, x, t, y: x, "NetworkDenoiser"), (Linear().apply, "Linear")])
def test_denoisers_that_cannot_be_perturbed(apply, what):
  with pytest.raises(ValueError, match=f"perturbed takes a NetworkDenoiser of a UNet.*got {what}"):
    jg.perturbed(jg.NetworkDenoiser({}, apply, V), Perturbation())


def test_exported_constructors_have_no_perturbation():
  assert "perturbation" not in constructor(ModelConfig("unet", {}, (8, 8, 1), None))
