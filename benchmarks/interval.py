"""What guidance costs: none, classifier-free on every step, and on a third of the steps only.

Outside the interval the second evaluation is not executed, so a third of the steps should cost a third of the extra.
"""

import jax
import jax.numpy as jnp

import jaxguide as jg
from benchmarks import timing

STEPS, BATCH = 18, 64


def main() -> None:
  """Measure."""
  unet = jg.UNet(model_channels=32, num_res_blocks=1, num_head_channels=32, num_classes=10)
  x, t, y = jnp.zeros((1, 16, 16, 3)), jnp.zeros(1), jnp.zeros(1, int)
  params = jax.jit(unet.init)(jax.random.key(0), x, t, y)
  denoise = jg.NetworkDenoiser(params, unet.apply, jg.scaling.v(jg.schedules.Cosine()))
  sigmas = jg.karras(STEPS)
  guidance = jg.classifier_free(10, 2.0)
  third = jg.interval(guidance, float(sigmas[2 * STEPS // 3]), float(sigmas[STEPS // 3]))
  keys, labels = jg.sample_keys(jax.random.key(1), BATCH), jnp.arange(BATCH) % 10

  @jax.jit
  def draw(denoise):
    return jax.vmap(lambda key, y: jg.sample(denoise, key, (16, 16, 3), sigmas, jg.DPMpp2M(), y)[0])(keys, labels)

  runs = {"none": denoise, "every step": guidance(denoise), "a third of the steps": third(denoise)}
  seconds = timing.measure({name: lambda guided=guided: draw(guided) for name, guided in runs.items()}, rounds=7)
  timing.report("interval", {"guidance": timing.summary(seconds, "every step")})
