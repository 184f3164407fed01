"""Learning rates over the steps of a training, as optax takes them."""

import jax.numpy as jnp
import optax

from jaxguide._core import checks


def inverse_sqrt(peak: float | int, decay_start: float | int = 70_000, rampup: float | int = 0) -> optax.Schedule:
  """A linear ramp, a plateau, and a decay with the square root of time (Karras et al. 2024, arXiv:2312.02696).

  ``peak * min(step / rampup, 1) / √max(step / decay_start, 1)``. It has no end that would have to be known beforehand,
  which suits `jaxguide.training.ema`.

  Args:
    peak: the largest rate. EDM2's networks for ImageNet-512 have 0.0120 (XS) to 0.0065 (XXL).
    decay_start: steps after which it falls; 0 for never. EDM2 has 70,000 of 2048 images for ImageNet-512, and
      35,000 for ImageNet-64.
    rampup: steps over which it rises from 0; 0 for none. EDM2 has 10 million images, which are 4,883 steps of 2048.

  Raises:
    ValueError: if a number is negative.

  >>> rate = inverse_sqrt(0.01, decay_start=100, rampup=10)
  >>> [round(float(rate(step)), 4) for step in (0, 5, 50, 400)]
  [0.0, 0.005, 0.01, 0.005]
  """
  peak = checks.in_range("peak", peak, 0)
  decay_start, rampup = checks.in_range("decay_start", decay_start, 0), checks.in_range("rampup", rampup, 0)

  def rate(step):
    rise = jnp.minimum(step / rampup, 1) if rampup else 1
    fall = jnp.sqrt(jnp.maximum(step / decay_start, 1)) if decay_start else 1
    return peak * rise / fall

  return rate
