"""A small EDM2 that is trained on the digits learns to draw them by class, and its own uncertainty."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import data
from jaxguide.models import ModelConfig
from jaxguide.models.model import Model
from jaxguide.training import TrainingConfig
from jaxguide.training.objectives import objective
from jaxguide.training.step import init_state, train_step

STEPS, BATCH = 300, 64


@pytest.mark.slow
def test_a_small_edm2_draws_digits_of_the_class_that_is_asked_for():
  images = data.load("digits", "train")
  fields = {"model_channels": 16, "channel_mult": (1, 1), "num_blocks": 1, "attn_resolutions": (4,)}
  model = ModelConfig("edm2_unet", {**fields, "channels_per_head": 16}, (8, 8, 1), 10, "edm", sigma_data=0.5)
  training = TrainingConfig(
    steps=STEPS,
    batch_size=BATCH,
    learning_rate=0.02,
    rate="inverse-sqrt:decay_start=100",
    optimizer="adam:b2=0.99",
    clip_norm=1e9,
    ema=("power:std=0.1", "power:std=0.05"),
    uncertainty=True,
    noise_mean=-0.8,
    noise_std=1.4,
  )
  state, step = init_state(model, training), train_step(model, training)
  rng, losses = np.random.default_rng(0), []
  x, labels = np.asarray(images.images), np.asarray(images.labels)
  for _ in range(STEPS):
    rows = rng.integers(len(x), size=BATCH)
    state, metrics = step(state, x[rows], labels[rows].astype(np.int32))
    losses.append(float(metrics["loss"]))
  assert np.mean(losses[-50:]) < np.mean(losses[:20]) - 0.5

  params = {"params": state.ema_params["params"]}
  denoise = Model(model, params).denoiser
  asked = jnp.arange(100) % 10
  guided = jg.classifier_free(model.null_cond, 1.5)(denoise)
  keys = jg.sample_keys(jax.random.key(0), 100)
  grid = jg.karras(8, 0.01, 20.0)
  drawn = jax.jit(jax.vmap(lambda key, y: jg.sample(guided, key, (8, 8, 1), grid, jg.Heun(), y)[0]))(keys, asked)
  clean = np.asarray(model.data.encode(x)).reshape(len(x), -1)
  distances = np.square(np.asarray(drawn).reshape(100, 1, -1) - clean[None]).mean(2)
  # The nearest training image has the class, and is near; another digit or noise has 0.5.
  assert (labels[distances.argmin(1)] == np.asarray(asked)).mean() > 0.85
  assert np.median(distances.min(1)) < 0.2

  # exp(u) is the mean of the weighted loss at its level: within a factor of 1.5 over the levels that were trained.
  plain = objective(model, TrainingConfig(steps=STEPS, noise="log-normal:mean=-0.8,std=1.4", p_uncond=0.0))
  batch = plain.draw(jax.random.key(1), model.data.encode(x[:1000]), labels[:1000].astype(np.int32))
  errors, _ = jax.jit(plain.errors)(params, batch, jax.random.key(2))
  u = np.asarray(model.module.logvar(params, jnp.log(batch.sigma) / 4))
  for low, high in ((0.1, 0.3), (0.3, 1.0), (1.0, 3.0)):
    rows = (np.asarray(batch.sigma) > low) & (np.asarray(batch.sigma) < high)
    assert abs(np.log(np.asarray(errors)[rows].mean()) - u[rows].mean()) < np.log(1.5)
