"""Conversions between the quantities that a network can predict: x0, eps, score and v.

With ``x = x0 + sigma eps``: ``score = grad log p(x; sigma) = -eps / sigma`` and ``v = alpha (eps - sigma x0)``.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxguide._core.typing import Array, ArrayLike


def x0_to_eps(x: Array, x0: Array, sigma: ArrayLike) -> Array:
  """``(x - x0) / sigma``."""
  return (x - x0) / sigma


def eps_to_x0(x: Array, eps: Array, sigma: ArrayLike) -> Array:
  """``x - sigma eps``."""
  return x - sigma * eps


def x0_to_score(x: Array, x0: Array, sigma: ArrayLike) -> Array:
  """``(x0 - x) / sigma²``: the inverse of Tweedie's formula (Efron 2011, eq. 1.4).

  >>> float(x0_to_score(jnp.asarray(3.0), jnp.asarray(1.0), 2.0))
  -0.5
  """
  return (x0 - x) / jnp.square(sigma)


def score_to_x0(x: Array, score: Array, sigma: ArrayLike) -> Array:
  """``x + sigma² score``: Tweedie's formula."""
  return x + jnp.square(sigma) * score


def x0_to_v(x: Array, x0: Array, sigma: ArrayLike) -> Array:
  """``alpha (eps - sigma x0)`` with ``alpha = 1 / sqrt(1 + sigma²)`` (Salimans & Ho 2022, arXiv:2202.00512)."""
  return ((x - x0) / sigma - sigma * x0) / jnp.sqrt(1 + jnp.square(sigma))


def v_to_x0(x: Array, v: Array, sigma: ArrayLike) -> Array:
  """``alpha² x - alpha sigma v``, the inverse of `x0_to_v`."""
  alpha = 1 / jnp.sqrt(1 + jnp.square(sigma))
  return alpha**2 * x - alpha * sigma * v
