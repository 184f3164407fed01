"""Everything runs under JAX's strict dtype promotion, and with rank promotion as an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import scaling, schedules

X, T, Y = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
SMALL = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 0, "num_head_channels": 8}
NETWORKS = {
  "unet": (jg.UNet(num_classes=3, **SMALL), (X, T, Y)),
  "unet of the first release": (
    jg.UNet(num_classes=3, **{**SMALL, "num_head_channels": -1}, use_scale_shift_norm=False, resblock_updown=False),
    (X, T, Y),
  ),
  "super-resolution": (
    jg.SuperResUNet(num_classes=3, **SMALL),
    (X, T, {"label": Y, "low_res": jnp.zeros((2, 4, 4, 1))}),
  ),
  **{pool: (jg.Classifier(pool=pool, **SMALL), (X, T)) for pool in ("attention", "adaptive", "spatial", "spatial_v2")},
}
GRID = jg.karras(3, 0.05, 10.0)


@pytest.fixture(autouse=True)
def strict():
  with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
    yield


def traced(function, *args):
  return jax.eval_shape(function, *args)


def zeros(module, *args):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), traced(module.init, jax.random.key(0), *args))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_their_gradients(name, dtype):
  module, args = NETWORKS[name]
  module = module.clone(dtype=dtype)
  params = zeros(module, *args)

  def total(params, x, *rest):
    return module.apply(params, x, *rest).astype(jnp.float32).sum()

  of_params, of_x = traced(jax.grad(total, argnums=(0, 1)), params, *args)
  assert jax.tree.structure(of_params) == jax.tree.structure(params)
  assert of_x.shape == X.shape


def draw(guided, solver, shape=(2,)):
  return traced(lambda key: jg.sample(guided, key, shape, GRID, solver, 1)[0], jax.random.key(0))


def test_every_guidance(make_guidance, random_mixture):
  mixture = random_mixture(0, (2,))
  assert draw(make_guidance(mixture, 2.0)(mixture.denoiser), jg.DPMpp2M()).shape == (2,)


def test_every_solver(solver, random_mixture):
  assert draw(random_mixture(0, (2,)).denoiser, solver).shape == (2,)


@pytest.mark.parametrize("schedule", [*schedules.SCHEDULES, "table"])
@pytest.mark.parametrize("prediction", scaling.PREDICTIONS)
def test_every_prediction_and_schedule(prediction, schedule):
  levels = schedules.table("linear", 100) if schedule == "table" else schedules.schedule(schedule)
  scaled = scaling.scaling(prediction, levels, 1.0)
  network = lambda params, x, t, y: params * x + t.astype(x.dtype)[:, None]  # noqa: E731
  denoise = jg.NetworkDenoiser(jnp.ones(()), network, scaled)
  assert draw(jg.classifier_free(3, 2.0)(denoise), jg.Heun()).shape == (2,)
  losses = traced(
    lambda key: jg.denoising_loss(
      jnp.ones(()), network, key, jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32), scaling=scaled, noise_levels=levels,
      null_cond=3, p_uncond=0.1,
    ),
    jax.random.key(0),
  )  # fmt: skip
  assert losses.shape == ()


def test_particles_and_classifiers(random_mixture):
  mixture = random_mixture(0, (2,))
  product = jg.tempered(mixture.denoiser, 3, 2.0)
  particles, _ = jax.jit(lambda key: jg.sample_product(product, key, 5, (2,), GRID, jg.DDPM(), 1))(jax.random.key(0))
  assert np.isfinite(particles).all()
  table = schedules.table("linear", 100)

  @jax.jit
  def of_classifier(key):
    params, x0, labels = jnp.ones((3, 3)), jnp.zeros((4, 3)), jnp.zeros(4, jnp.int32)
    network = lambda params, x, t: x @ params  # noqa: E731
    return jg.classifier_loss(params, network, key, x0, labels, scaling=scaling.eps(table), noise_levels=table)

  loss, _ = of_classifier(jax.random.key(0))
  assert np.isfinite(loss)
