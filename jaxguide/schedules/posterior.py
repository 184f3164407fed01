r"""The steps of the discrete process backwards: ``q(x' | x, x0)``, and the variances that DDPM gives its own steps.

From ``x`` at level ``sigma`` to ``x'`` at ``sigma'`` below it (Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7), with
``x = x0 + sigma eps``,

.. math::
  q(x' | x, x_0) = N\Big(x_0 + \frac{\sigma'^2}{\sigma^2} (x - x_0),\;
    \frac{\sigma'^2}{\sigma^2} (\sigma^2 - \sigma'^2)\Big)

The papers write it for ``x_t = alpha x``: their means are ``alpha' = 1 / sqrt(1 + sigma'²)`` times these and their
variances ``alpha'²`` times. Their betas are those of the levels that are visited (the *respaced* process):
``beta = 1 - alpha² / alpha'² = (sigma² - sigma'²) / (1 + sigma²)``.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide._core.typing import Leaf, Scalar

VARIANCES = ("small", "large", "learned_range")
"""What the variance of a step can be; see `reverse_variance`."""


class Variance(NamedTuple):
  """The variance of a step, and its logarithm, which is finite where the variance is 0."""

  value: Leaf
  log: Leaf


def posterior_mean(x: Leaf, x0: Leaf, sigma: Leaf, sigma_next: Leaf) -> Leaf:
  """Mean of ``q(x' | x, x0)``, of the shape of ``x``.

  >>> float(posterior_mean(jnp.asarray(3.0), jnp.asarray(1.0), 2.0, 1.0))
  1.5
  """
  return x0 + (sigma_next / sigma) ** 2 * (x - x0)


def posterior_variance(sigma: Leaf, sigma_next: Leaf) -> Leaf:
  """Variance of ``q(x' | x, x0)``; 0 where ``sigma_next`` is.

  >>> float(posterior_variance(2.0, 1.0))
  0.75
  """
  ratio = sigma_next / sigma
  return jnp.square(sigma_next) * (1 - ratio) * (1 + ratio)


def posterior_std(sigma: Leaf, sigma_next: Leaf) -> Leaf:
  """Standard deviation of ``q(x' | x, x0)``; its gradient is finite at ``sigma_next = 0``."""
  ratio = sigma_next / sigma
  return sigma_next * jnp.sqrt((1 - ratio) * (1 + ratio))


def reverse_variance(
  kind: str,
  sigma: Leaf,
  sigma_next: Leaf,
  sigma_last: Leaf,
  learned: Leaf | None = None,
) -> Variance:
  r"""Variance of a step of the reverse process, as OpenAI's code has it.

  - ``small``: that of ``q(x' | x, x0)``, right where the data are one point (``FIXED_SMALL``).
  - ``large``: ``beta``, right where the data are ``N(0, I)`` (``FIXED_LARGE``).
  - ``learned_range``: between the two in the logarithm, by what the network says (Nichol & Dhariwal 2021,
    arXiv:2102.09672, eq. 15): :math:`\log\Sigma = \frac{1 + v}2 \log\beta + \frac{1 - v}2 \log\tilde\beta`.

  The small variance of the last step, to ``sigma_next = 0``, is 0; where its logarithm is needed, and throughout for
  the other two kinds, the variance of the step before it stands in: that is what ``sigma_last`` is for.

  Args:
    kind: one of these.
    sigma: the level now.
    sigma_next: the level after the step, below ``sigma``.
    sigma_last: the level before ``sigma``, above it; ``inf`` if there was none.
    learned: v, of the shape of ``x``, for ``learned_range``; -1 is small, 1 large, and what lies beyond is let be.

  Raises:
    ValueError: for an unknown kind, with the nearest, or a learned range without ``learned``.

  >>> small, large = (float(reverse_variance(kind, 1.0, 0.5, 2.0).value) for kind in ("small", "large"))
  >>> round(small, 4), round(large, 4)
  (0.1875, 0.4688)
  """
  checks.lookup("variance", kind, dict.fromkeys(VARIANCES))
  last = jnp.asarray(sigma_next) <= 0
  sum_and_difference = (sigma - sigma_next) * (sigma + sigma_next)
  small = posterior_variance(sigma, sigma_next)
  beta = (1 + jnp.square(sigma_next)) * sum_and_difference / (1 + jnp.square(sigma))
  # At the last step alpha' is 1, so that the papers' variance of the step before it is the one in our units.
  before = posterior_variance(sigma_last, sigma) / (1 + jnp.square(sigma))
  log_small = jnp.log(jnp.where(last, before, small))
  if kind == "small":
    return Variance(small, log_small)
  # log(beta / small): the difference of the two logarithms would cancel at large sigma.
  inner = jnp.where(last, sigma, sigma_next)
  log_ratio = jnp.log1p(sum_and_difference / (1 + jnp.square(sigma)) / jnp.square(inner))
  if kind == "large":
    log = jnp.where(last, log_small, log_small + log_ratio)
    return Variance(jnp.exp(log), log)
  if learned is None:
    raise ValueError(
      "a learned_range needs the network's variance: make the denoiser with learned_variance=True, of a network with "
      "twice the channels of x"
    )
  log = log_small + (1 + learned) / 2 * jnp.where(last, jnp.log(beta) - log_small, log_ratio)
  return Variance(jnp.exp(log), log)


def ancestral(eta: Leaf, sigma: Scalar, sigma_next: Scalar) -> tuple[Scalar, Scalar]:
  r"""Split a step in two: down to a level below ``sigma_next``, and up to it again with new noise.

  The noise is ``eta`` times that of DDPM's step, :math:`\sigma_{up} = \eta \sigma' \sqrt{1 - \sigma'^2 / \sigma^2}`.

  Returns:
    The level below, and the standard deviation of the noise; their squares add up to that of ``sigma_next``.
  """
  eta = jnp.asarray(eta, sigma.dtype)
  # sqrt(sigma'^2 - up^2), without its cancellation, and with a finite gradient at sigma' = 0
  square = (1 - eta) * (1 + eta) + (eta * sigma_next / sigma) ** 2
  down = sigma_next * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  return down, eta * posterior_std(sigma, sigma_next)
