"""Learning-rate schedules, as functions of the step for optax."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxguide._core import checks, specs

Schedule = Callable[[Any], Any]
"""``step -> rate``, as Optax's schedules are."""


def _cosine_decay(peak: float, steps: int, warmup: int) -> Schedule:
  """Return a linear warm-up followed by a cosine decay to 0 at the last step."""
  import optax

  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)


def _constant(peak: float, steps: int, warmup: int) -> Schedule:
  """Return a linear warm-up followed by a constant rate."""
  import optax

  del steps
  # Without a warm-up, Optax's schedule stays at the initial 0.
  return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)


def _inverse_sqrt(peak: float, steps: int, warmup: int, *, decay_start: float = 70_000.0) -> Schedule:
  """Return `inverse_sqrt` with a linear warm-up."""
  del steps
  return inverse_sqrt(peak, decay_start, warmup)


RATES: dict[str, Callable[..., Schedule]] = {
  "cosine-decay": _cosine_decay,
  "constant": _constant,
  "inverse-sqrt": _inverse_sqrt,
}


def rate(text: str, peak: float, steps: int, warmup: int) -> Schedule:
  """Return a learning-rate schedule, ``step -> rate``, by name.

  Args:
    text: ``NAME`` or ``NAME:option=value``; the names are ``cosine-decay``, ``constant`` and ``inverse-sqrt``.
    peak: the largest rate.
    steps: number of training steps.
    warmup: number of steps over which the rate rises from 0, below ``steps``.

  Raises:
    ValueError: for an unknown name (with the nearest known one), an unknown option, or a warm-up that does not fit.

  >>> schedule = rate("inverse-sqrt:decay_start=25", 0.1, steps=100, warmup=10)
  >>> [round(float(schedule(step)), 4) for step in (5, 20, 100)]
  [0.05, 0.1, 0.05]
  """
  make, options = specs.resolve("learning rate", text, RATES, "peak", "steps", "warmup")
  if not 0 <= warmup < steps:
    raise ValueError(f"warmup must be at least 0 and below the {steps} steps, got {warmup}")
  return make(peak, steps, warmup, **options)


def inverse_sqrt(peak: float | int, decay_start: float | int = 70_000, rampup: float | int = 0) -> Schedule:
  """Return a schedule with a linear ramp, a plateau and an inverse-square-root decay (Karras et al. 2024).

  The rate is ``peak * min(step / rampup, 1) / √max(step / decay_start, 1)`` (arXiv:2312.02696). It does not depend on
  the number of training steps, so a training can be extended, as with the means of `jaxguide.training.ema`.

  Args:
    peak: the largest rate. EDM2's networks for ImageNet-512 use 0.0120 (XS) to 0.0065 (XXL).
    decay_start: the step at which the decay starts; 0 for no decay. EDM2 uses 70,000 steps of 2048 images for
      ImageNet-512, and 35,000 for ImageNet-64.
    rampup: number of steps over which the rate rises from 0; 0 for no ramp. EDM2 uses 10 million images, which are
      4,883 steps of 2048 images.

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
