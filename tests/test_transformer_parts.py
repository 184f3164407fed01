"""Parts of the transformers against NumPy, their perturbations, and options that no recorded network has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide.models import ModelConfig
from jaxguide.nn.dit import layers, positions

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SMALL = {"hidden_size": 16, "depth": 3, "num_heads": 2}


def random_params(module, *args, seed=0):
  """Random parameters: a new network has zeros, with which no block would change its input."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), shapes)


def inputs(n=2, h=4, w=4, c=4, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(n, h, w, c)), jnp.float32), jnp.asarray(rng.uniform(size=n), jnp.float32)


def attention(params, x, heads, change=lambda q, k, v: (q, k, v)):
  """Multi-head attention in float64, with ``change`` of the (n, t, heads, c) queries, keys and values."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
  qkv = np.asarray(x, np.float64) @ p["qkv"]["kernel"] + p["qkv"]["bias"]
  q, k, v = np.moveaxis(qkv.reshape(*qkv.shape[:2], 3, heads, -1), 2, 0)
  q, k, v = change(q, k, v)
  logits = np.einsum("nqhc,nkhc->nhqk", q, k) / np.sqrt(v.shape[-1])
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  out = np.einsum("nhqk,nkhc->nqhc", weights / weights.sum(-1, keepdims=True), v)
  return out.reshape(*x.shape) @ p["proj"]["kernel"] + p["proj"]["bias"]


@pytest.fixture(scope="module")
def tokens():
  return jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 16)), jnp.float32)


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


def test_identity_and_smooth_attention(tokens):
  """Identity gives the values; smooth blurs the queries over the tokens, to their mean for an infinite width."""
  params = random_params(layers.Attention(2), tokens, (2, 3))

  def run(perturbation):
    return layers.Attention(2, perturbation=perturbation).apply(params, tokens, (2, 3))

  p = params["params"]
  values = tokens @ p["qkv"]["kernel"][:, 32:] + p["qkv"]["bias"][None, None, 32:]
  close(run(jg.Perturbation("identity", "b")), values @ p["proj"]["kernel"] + p["proj"]["bias"][None, None])
  close(run(None), attention(params, tokens, 2))
  mean = attention(params, tokens, 2, lambda q, k, v: (np.broadcast_to(q.mean(1, keepdims=True), q.shape), k, v))
  close(run(jg.Perturbation("smooth", "b")), mean)
  rows, columns = (jg.nn.perturbation.blur_matrix(side, 0.7) for side in (2, 3))

  def blur(q, k, v):
    return np.einsum("ih,jw,nhwac->nijac", rows, columns, q.reshape(2, 2, 3, 2, 8)).reshape(q.shape), k, v

  close(run(jg.Perturbation("smooth", "b", width=0.7)), attention(params, tokens, 2, blur))


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_normalised_and_turned_queries(tokens, kind):
  """Queries and keys are normalised per head, and then each pair of channels turns by row and column."""
  angles = positions.rotary_angles(2, 3, 8)
  rope = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
  module = layers.Attention(2, qk_norm=kind)
  params = random_params(module, tokens, (2, 3), rope)

  def change(q, k, v):
    found = []
    for name, each in (("q_norm", q), ("k_norm", k)):
      p = params["params"][name]
      centred = each - each.mean(-1, keepdims=True) if kind == "layer" else each
      eps = 1e-5 if kind == "layer" else 1e-6
      normed = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + eps)
      normed = normed * np.asarray(p["scale"], np.float64) + np.asarray(p.get("bias", 0.0), np.float64)
      z = normed[..., ::2] + 1j * normed[..., 1::2]
      z = z * np.exp(1j * angles[:, ::2])[:, None]
      found.append(np.stack([z.real, z.imag], -1).reshape(normed.shape))
    return *found, v

  close(module.apply(params, tokens, (2, 3), rope), attention(params, tokens, 2, change))


def test_a_skipped_block_is_left_out():
  sit, (x, t) = jg.SiT(**SMALL), inputs()
  params = random_params(sit, x, t)
  rest = dict(params["params"])
  rest["blocks_1"] = rest.pop("blocks_2")
  shorter = jg.SiT(**{**SMALL, "depth": 2}).apply({"params": rest}, x, t)
  skipped = sit.clone(perturbation=jg.Perturbation("skip", "blocks_1")).apply(params, x, t)
  np.testing.assert_allclose(skipped, shorter, atol=1e-5)


def test_perturbed_networks_by_the_names_of_blocks():
  sit, (x, t) = jg.SiT(**SMALL), inputs()
  params = random_params(sit, x, t)
  denoise = jg.NetworkDenoiser(params, sit.apply, jg.scaling.flow_to_data())
  good = quick_jit(denoise)(x[0], jnp.asarray(1.0))
  for kind in ("identity", "smooth", "skip"):
    weak = jg.perturbed(denoise, jg.Perturbation(kind, ["blocks_0", "blocks_2"]))
    assert float(jnp.abs(quick_jit(weak)(x[0], jnp.asarray(1.0)) - good).max()) > 1e-3
  for wrong in ("blocks_3", "attn", "blocks_0/attn"):
    with pytest.raises(ValueError, match="blocks_"):
      jg.perturbed(denoise, jg.Perturbation("identity", wrong))


def test_oblong_images_and_no_labels():
  """A token at row r and column c has the table of r and c, also where the image is no square."""
  x, t = inputs(h=4, w=12)
  sit = jg.SiT(**SMALL, patch_size=2)
  table = sit.init(jax.random.key(0), x, t)["params"]["pos_embed"][0].reshape(2, 6, 16)
  np.testing.assert_array_equal(table, positions.sincos(6, 6, 16).reshape(6, 6, 16)[:2])
  assert sit.apply(random_params(sit, x, t), x, t).shape == x.shape
  network = jg.LightningDiT(**SMALL, patch_size=1, use_rope=True, use_rmsnorm=True, use_qknorm=True, wo_shift=True)
  assert network.apply(random_params(network, x, t), x, t).shape == x.shape


def test_learned_variance_and_its_second_half():
  x, t = inputs()
  dit = jg.DiT(**SMALL)
  params = random_params(dit, x, t)
  np.testing.assert_array_equal(dit.apply(params, x, t)[..., :4], jg.SiT(**SMALL).apply(params, x, t))
  with pytest.raises(ValueError, match="needs a network that has one"):
    ModelConfig("sit", SMALL, (4, 4, 4), None, "eps", "linear", 1000, variance="learned_range")
  ModelConfig("dit", SMALL, (4, 4, 4), None, "eps", "linear", 1000, variance="learned_range")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"hidden_size": 18}, "multiple of 4"),
    ({"num_heads": 3}, "hidden_size must be a multiple of 4 and of the 3 num_heads"),
  ],
)
def test_fields_that_contradict_each_other(fields, message):
  with pytest.raises(ValueError, match=message):
    ModelConfig("sit", {**SMALL, **fields}, (4, 4, 4), None, "flow_to_data", "flow")


def test_rematerialised_blocks_are_the_same():
  sit, (x, t) = jg.SiT(**SMALL), inputs()
  params = random_params(sit, x, t)

  def gradient(module):
    return jax.grad(lambda params: jnp.square(module.apply(params, x, t)).sum())(params)

  pairs = zip(jax.tree.leaves(gradient(sit)), jax.tree.leaves(gradient(sit.clone(use_checkpoint=True))), strict=True)
  assert all(np.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)
