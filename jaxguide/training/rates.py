"""Learning rates over the steps of a training, as optax takes them."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from jaxguide._core import checks, specs


def _cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
  """A linear rise over the warm-up, then a fall along a cosine to 0 at the last step."""
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def _constant(peak: float, steps: int, warmup: int) -> optax.Schedule:
  """A linear rise over the warm-up, and no fall."""
  del steps
  return optax.warmup_constant_schedule(0.0, peak, warmup)


def _inverse_sqrt(peak: float, steps: int, warmup: int, *, decay_start: float = 70_000.0) -> optax.Schedule:
  """A linear rise over the warm-up, then `inverse_sqrt`."""
  del steps
  return inverse_sqrt(peak, decay_start, warmup)


RATES: dict[str, Callable[..., optax.Schedule]] = {
  "cosine": _cosine,
  "constant": _constant,
  "inverse-sqrt": _inverse_sqrt,
}


def rate(text: str, peak: float, steps: int, warmup: int) -> optax.Schedule:
  """Give the learning rate of a training, ``step -> rate``, by name.

  Args:
    text: ``NAME`` or ``NAME:option=value``; ``cosine``, ``constant`` or ``inverse-sqrt``.
    peak: the largest rate.
    steps: number of steps of the training.
    warmup: number of steps over which it rises.

  Raises:
    ValueError: for an unknown name, naming the nearest, or an option that the rate does not have.

  >>> schedule = rate("inverse-sqrt:decay_start=25", 0.1, steps=100, warmup=10)
  >>> [round(float(schedule(step)), 4) for step in (5, 20, 100)]
  [0.05, 0.1, 0.05]
  """
  make, options = specs.made("learning rate", text, RATES, "peak", "steps", "warmup")
  return make(peak, steps, min(warmup, steps - 1), **options)


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
