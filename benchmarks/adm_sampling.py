"""Guided sampling from ADM-64 and ADM-256 with their classifiers, full size, in bfloat16: images a second.

Weights are random: they cost as much as others. A few steps are timed, and what 250 of DDPM and 25 of DDIM make of them
is printed. On a CPU, ADM-64 alone, one image at a time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import timing
from jaxguide.interop.openai import PRESETS
from jaxguide.training import Model, ModelConfig
from jaxguide.training.model import init_params

STEPS = 4
BATCHES = {"64x64": 64, "256x256": 16}


def random_model(config: ModelConfig) -> Model:
  """Make a published network, to compute in bfloat16, with weights drawn on the device."""
  config = dataclasses.replace(config, fields={**config.fields, "dtype": "bfloat16", "dropout": 0.0})
  params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
  # The layers that start at zero would keep everything else from mattering.
  return Model(
    config, jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(jax.random.key(1), leaf.shape), params)
  )


def main() -> None:
  """Print a table for each size."""
  on_cpu = jax.default_backend() == "cpu"
  print(f"{jax.devices()[0].device_kind}, {'ADM-64 only, one image at a time' if on_cpu else 'bfloat16'}")
  for size, batch in list(BATCHES.items())[: 1 if on_cpu else None]:
    batch_size = 1 if on_cpu else batch
    diffusion, classifier = (random_model(PRESETS[f"{size}_{kind}"]) for kind in ("diffusion", "classifier"))
    scale, table = classifier.config.scale, diffusion.config.noise_schedule
    labels = np.arange(batch_size) % 1000
    clipped = jg.clip_x0()(diffusion.denoiser)
    runs = {
      "DDPM, mean shift": (250, clipped, jg.DDPM("learned_range", classifier.log_prob, scale)),
      "DDIM, ε form": (25, jg.classifier(classifier.log_prob, scale)(clipped), jg.DDIM()),
      "DDIM, unguided": (25, clipped, jg.DDIM()),
    }
    grid = jnp.append(jg.respaced(table, 250)[:STEPS], 0)

    def draw(denoise, solver, grid=grid, labels=labels, shape=diffusion.config.image_shape):
      return jg.sample_batch(denoise, jax.random.key(0), labels, shape=shape, sigmas=grid, solver=solver)

    seconds = timing.medians({name: lambda run=run: draw(*run[1:]) for name, run in runs.items()}, rounds=3)
    print(f"\n{size}, batches of {batch_size}, {STEPS} steps")
    print(timing.table(seconds, "DDIM, unguided"))
    for name, (steps, *_) in runs.items():
      print(f"{name}: {batch_size * STEPS / seconds[name] / steps:.3g} images a second at {steps} steps")
