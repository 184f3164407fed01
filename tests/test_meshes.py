"""Networks and guided sampling under meshes of Explicit axes, which `jax.make_mesh` has, as under Auto ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxguide as jg
from jaxguide import scaling, schedules

SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_head_channels": 32}
NETWORKS = {
  "unet": jg.UNet(num_classes=3, **SMALL),
  "attention": jg.Classifier(out_channels=3, **SMALL),
  "spatial": jg.Classifier(out_channels=3, pool="spatial", **SMALL),
}
RNG = np.random.default_rng(0)
X, T, Y = RNG.normal(size=(4, 8, 8, 1)).astype(np.float32), np.arange(4, dtype=np.float32), np.array([0, 1, 2, 3])


def inputs(name):
  return (X, T, Y) if name == "unet" else (X, T)


def random_params(name):
  shapes = jax.eval_shape(NETWORKS[name].init, jax.random.key(0), *inputs(name))
  return jax.tree.map(lambda leaf: jnp.asarray(0.1 * RNG.normal(size=leaf.shape), leaf.dtype), shapes)


@pytest.fixture(params=["explicit", "auto", "two axes"])
def mesh(request):
  kind = AxisType.Auto if request.param == "auto" else AxisType.Explicit
  shape, names = ((2, 2), ("batch", "model")) if request.param == "two axes" else ((4,), ("batch",))
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def spread(mesh, tree):
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("batch")))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_their_gradients(name, mesh):
  module, params = NETWORKS[name], random_params(name)

  @jax.jit
  def both(params, x, *rest):
    def loss(params, x):
      out = module.apply(params, x, *rest)
      return jnp.square(out).mean(), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, gradients

  wanted = both(params, *inputs(name))
  with jax.set_mesh(mesh):
    same = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = both(same, *spread(mesh, inputs(name)))
  chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), atol=1e-4, rtol=1e-3)


def test_guided_sampling(mesh):
  scaled = scaling.v(schedules.Cosine())
  denoise = jg.NetworkDenoiser(random_params("unet"), NETWORKS["unet"].apply, scaled)
  guided = jg.classifier_free(3, 2.0)(denoise)
  draw = jax.jit(jax.vmap(lambda key, y: jg.sample(guided, key, (8, 8, 1), jg.karras(2, 0.1, 5.0), jg.DDIM(1.0), y)[0]))
  keys, labels = jg.sample_keys(jax.random.key(0), 4), np.arange(4) % 3
  wanted = draw(keys, labels)
  with jax.set_mesh(mesh):
    got = draw(*spread(mesh, (keys, labels)))
  np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=1e-3, rtol=1e-3)
