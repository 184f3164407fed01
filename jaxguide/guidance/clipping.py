"""Guidances that keep ``x0`` in the range of images: clipping and dynamic thresholding."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.typing import ArrayLike, Guidance, map_x0
from jaxguide.guidance.rule import Rule


def clip_x0(bound: ArrayLike = 1.0) -> Guidance:
  """Clip ``x0`` to ``[-bound, bound]``, the range of images (DDPM's ``clip_denoised``).

  Last in a `chain` it clips the guided ``x0``. First in a `chain` it clips the network's ``x0``, as in OpenAI's code.

  Raises:
    ValueError: if ``bound`` is not above 0 or not finite.

  >>> float(clip_x0(1.0)(lambda x, sigma, cond: 2 * x)(jnp.asarray(3.0), jnp.asarray(1.0), None))
  1.0
  """
  return Rule(_clip_x0, (checks.above("bound", checks.finite("bound", bound), 0),))


def _clip_x0(denoise, bound, x, sigma, cond):
  bound = jnp.asarray(bound, x.dtype)
  return map_x0(lambda x0: jnp.clip(x0, -bound, bound), denoise(x, sigma, cond))


def dynamic_threshold(quantile: ArrayLike = 0.995, bound: ArrayLike = 1.0, most: ArrayLike = math.inf) -> Guidance:
  r"""Dynamic thresholding (Imagen; Saharia et al. 2022, arXiv:2205.11487, section 2.3).

  .. math::
    s = \min(\max(Q_p(|x_0|), b), s_{max}), \qquad \tilde x_0 = \frac{b}{s} clip(x_0, -s, s)

  ``Q_p`` is the quantile over all elements and channels of one example. Large scales push many elements out of
  ``[-b, b]``. `clip_x0` saturates these elements; this guidance shrinks all elements instead. Put it last in a `chain`.

  The predicted noise follows from the new ``x0``, ``eps = (x - x0) / σ``, as for every guidance. (DDIM in diffusers
  keeps the eps of the old ``x0``, unless ``use_clipped_model_output`` is set.)

  Args:
    quantile: p, from 0 to 1. 1 takes the largest element. 0 is `clip_x0`, unless all elements are outside ``bound``.
    bound: b, above 0. While at most a fraction ``1 - p`` of the elements is outside, these are clipped and the others
      do not change.
    most: the largest s, at least ``bound``. If the two are equal, this is `clip_x0`. The default of diffusers is 1.

  Raises:
    ValueError: if ``quantile`` is not between 0 and 1, if ``bound`` is not finite and above 0, or if ``most`` is below
      ``bound``.

  >>> guided = dynamic_threshold(0.75)(lambda x, sigma, cond: x)
  >>> guided(jnp.array([0.5, -2.0, 1.0, 4.0, 0.0]), jnp.asarray(1.0), None).tolist()
  [0.25, -1.0, 0.5, 1.0, 0.0]
  """
  bound = checks.above("bound", checks.finite("bound", bound), 0)
  most = checks.above("most", most, 0)
  if checks.is_concrete((bound, most)) and (np.asarray(most) < np.asarray(bound)).any():
    raise ValueError(f"most must be at least bound, got {most} and {bound}")
  return Rule(_dynamic_threshold, (checks.in_range("quantile", quantile, 0, 1), bound, most))


def _dynamic_threshold(denoise, quantile, bound, most, x, sigma, cond):
  quantile, bound, most = (jnp.asarray(number, x.dtype) for number in (quantile, bound, most))

  def threshold(x0):
    s = jnp.clip(jnp.quantile(jnp.abs(x0), quantile), bound, most)
    return jnp.clip(x0, -s, s) * (bound / s)

  return map_x0(threshold, denoise(x, sigma, cond))
