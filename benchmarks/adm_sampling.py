"""Guided sampling from ADM-64 and ADM-256 with their classifiers, full size, in bfloat16: images a second.

Weights are random: they cost as much as others. A few steps are timed, and what 250 of DDPM and 25 of DDIM make of them
is printed. On a CPU, ADM-64 alone, one image at a time.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import networks, timing
from jaxguide.interop.openai import PRESETS

STEPS = 4
BATCHES = {"64x64": 64, "256x256": 16}


def main() -> None:
  """Print a table for each size."""
  tables = {}
  for size, batch in list(BATCHES.items())[: 1 if networks.ON_CPU else None]:
    batch_size = 1 if networks.ON_CPU else batch
    diffusion, classifier = (
      networks.random_model(PRESETS[f"{size}_{kind}"], "bfloat16") for kind in ("diffusion", "classifier")
    )
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

    seconds = timing.measure({name: lambda run=run: draw(*run[1:]) for name, run in runs.items()}, rounds=3)
    rows = timing.summary(seconds, "DDIM, unguided")
    for row in rows:
      steps, *_ = runs[row["run"]]
      rate = batch_size * STEPS / steps / statistics.median(seconds[row["run"]])
      row |= {"steps of all": steps, "images/s at as many": rate}
    tables[f"{size}, batches of {batch_size}, {STEPS} steps"] = rows
  timing.report("adm_sampling", tables, ["bfloat16"])
