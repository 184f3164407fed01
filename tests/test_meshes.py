"""Networks and guided sampling under meshes with Explicit axes (the default of `jax.make_mesh`) and Auto axes."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxguide as jg
from jaxguide import scaling, schedules
from jaxguide.nn.layers import GroupNorm

SMALL = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_head_channels": 32}
NETWORKS = {
  "unet": jg.UNet(num_classes=3, **SMALL),
  "attention": jg.Classifier(out_channels=3, **SMALL),
  # It differs in its pool, so that one level without attention is enough.
  "spatial": jg.Classifier(
    out_channels=3, pool="spatial", **{**SMALL, "channel_mult": (1,), "attention_resolutions": ()}
  ),
}
RNG = np.random.default_rng(0)
X, T, Y = RNG.normal(size=(4, 8, 8, 1)).astype(np.float32), np.arange(4, dtype=np.float32), np.array([0, 1, 2, 3])


def inputs(name):
  return (X, T, Y) if name == "unet" else (X, T)


@functools.cache
def shapes_of(name):
  return jax.eval_shape(NETWORKS[name].init, jax.random.key(0), *inputs(name))


def random_params(name):
  return jax.tree.map(lambda leaf: (0.1 * RNG.normal(size=leaf.shape)).astype(leaf.dtype), shapes_of(name))


MESHES = {
  "explicit": (AxisType.Explicit, (4,), ("batch",)),
  "carried": (AxisType.Explicit, (4,), ("batch",)),  # only the arrays have the mesh; no mesh is set
  "two axes": (AxisType.Explicit, (2, 2), ("batch", "model")),
  "auto": (AxisType.Auto, (4,), ("batch",)),
}


@pytest.fixture(params=MESHES)
def mesh(request):
  kind, shape, names = MESHES[request.param]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


@pytest.fixture
def within(request, mesh):
  """The context that a program runs in."""
  return contextlib.nullcontext if request.node.callspec.params["mesh"] == "carried" else lambda: jax.set_mesh(mesh)


def spread(mesh, tree):
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("batch")))


@functools.cache
def with_gradients(name):
  """The program of a network's results and gradients, which all meshes share: one device compiles it once."""

  def loss(params, x, *rest):
    out = NETWORKS[name].apply(params, x, *rest)
    return jnp.square(out).mean(), out

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


# The programs of a mesh of two axes, and of arrays that carry their mesh, are traced in the last test alone.
of_both_kinds = pytest.mark.parametrize("mesh", ["explicit", "auto"], indirect=True)


@pytest.mark.slow
@of_both_kinds
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_their_gradients(name, mesh, within):
  params, both = random_params(name), with_gradients(name)
  wanted = both(params, *inputs(name))
  with within():
    same = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = both(same, *spread(mesh, inputs(name)))
  chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), atol=1e-4, rtol=1e-3)


@of_both_kinds
@pytest.mark.parametrize("axis", [1, 3], ids=["pixels", "channels"])
def test_group_norm_of_split_images(mesh, within, axis):
  x = jnp.asarray(RNG.normal(size=(2, 4, 6, 8)), jnp.float32)
  params = {"params": {"scale": jnp.full(8, 2.0), "bias": jnp.ones(8)}}
  gradient = jax.jit(jax.grad(lambda x: jnp.sin(GroupNorm(True, 4).apply(params, x)).sum()))
  wanted = gradient(x)
  with within():
    split = NamedSharding(mesh, PartitionSpec(*[None] * axis, "batch"))
    got = gradient(jax.device_put(x, split))
  np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=1e-5)


SCALED = scaling.v(schedules.Cosine())


def guided(params, of_classifier):
  denoise = jg.NetworkDenoiser(params, NETWORKS["unet"].apply, SCALED)
  log_prob = jg.ClassifierLogProb(of_classifier, NETWORKS["attention"].apply, SCALED)
  return jg.chain(jg.classifier_free(3, 2.0), jg.classifier(log_prob, 1.5))(denoise)


@jax.jit
def draw(params, keys, labels):
  one = lambda key, y: jg.sample(guided(*params), key, (8, 8, 1), jg.karras(2, 0.1, 5.0), jg.DDIM(1.0), y)[0]  # noqa: E731
  return jax.vmap(one)(keys, labels)


@pytest.mark.slow
@of_both_kinds
def test_guided_sampling(mesh, within):
  params = random_params("unet"), random_params("attention")
  keys, labels = jg.sample_keys(jax.random.key(0), 4), np.arange(4) % 3
  wanted = draw(params, keys, labels)
  with within():
    same = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = draw(same, *spread(mesh, (keys, labels)))
  np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=1e-3, rtol=1e-3)


def loss(params, x, y):
  return jg.denoising_loss(
    params, NETWORKS["unet"].apply, jax.random.key(1), x, y,
    scaling=SCALED, noise_levels=schedules.Cosine(), null_cond=3, p_uncond=0.5,
  )  # fmt: skip


step = jax.jit(jax.value_and_grad(loss))


@pytest.mark.slow
@of_both_kinds
def test_training(mesh, within):
  params = random_params("unet")
  wanted = step(params, X, Y % 3)
  with within():
    same = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    got = step(same, *spread(mesh, (X, Y % 3)))
  chex.assert_trees_all_close(jax.device_get(got), jax.device_get(wanted), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_drawn_as_without_a_mesh(name, mesh, within):
  draw, shapes = NETWORKS[name].init, shapes_of(name)
  with within():
    drawn = jax.jit(draw).trace(jax.random.key(0), *spread(mesh, inputs(name))).out_info
  chex.assert_trees_all_equal_shapes_and_dtypes(drawn, shapes)


def test_axes_fit_in_every_program(mesh, within):
  """Mismatched axes are errors at trace time, so tracing is enough here. The slow tests check the results."""
  params = {name: random_params(name) for name in NETWORKS}
  with within():
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    keys, x, labels = spread(mesh, (jax.random.split(jax.random.key(0), 4), X, Y % 3))
    for name in ("attention", "spatial"):  # the UNet's gradients are in the step
      with_gradients(name).trace(params[name], *spread(mesh, inputs(name)))
    draw.trace((params["unet"], params["attention"]), keys, labels)
    step.trace(params["unet"], x, labels)
