"""Maps of the clean example, which keep it where images live."""

from __future__ import annotations

import jax.numpy as jnp

from jaxguide import checks
from jaxguide.guidance.rule import Rule
from jaxguide.typing import ArrayLike, Guidance, map_x0


def clip_x0(bound: ArrayLike = 1.0) -> Guidance:
  """Keep ``x0`` in ``[-bound, bound]``, where images live (DDPM's ``clip_denoised``).

  Last in a `chain` it clips what guidance made; first, what the network said, as OpenAI's code does.

  Raises:
    ValueError: if ``bound`` is negative or not finite.

  >>> float(clip_x0(1.0)(lambda x, sigma, cond: 2 * x)(jnp.asarray(3.0), jnp.asarray(1.0), None))
  1.0
  """
  return Rule(_clip_x0, (checks.in_range("bound", bound, 0),))


def _clip_x0(denoise, bound, x, sigma, cond):
  bound = jnp.asarray(bound, x.dtype)
  return map_x0(lambda x0: jnp.clip(x0, -bound, bound), denoise(x, sigma, cond))
