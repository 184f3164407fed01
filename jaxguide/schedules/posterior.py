r"""Reverse steps of the discrete process: the posterior ``q(x' | x, x0)``, and the variances of DDPM's steps.

For a step from ``x`` at level ``sigma`` to ``x'`` at a smaller level ``sigma'`` (Ho et al. 2020, arXiv:2006.11239,
eq. 6 and 7), with ``x = x0 + sigma eps``,

.. math::
  q(x' | x, x_0) = N\Big(x_0 + \frac{\sigma'^2}{\sigma^2} (x - x_0),\;
    \frac{\sigma'^2}{\sigma^2} (\sigma^2 - \sigma'^2)\Big)

The papers write it for ``x_t = alpha x``. With ``alpha' = 1 / sqrt(1 + sigma'²)``, their means are ``alpha'`` times the
means here, and their variances ``alpha'²`` times the variances here. Their betas are those of the visited levels (the
*respaced* process): ``beta = 1 - alpha² / alpha'² = (sigma² - sigma'²) / (1 + sigma²)``.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide._core.typing import Leaf, Scalar

VARIANCES = ("small", "large", "learned_range")
"""The kinds of variance of a step; see `reverse_variance`."""


class Variance(NamedTuple):
  """The variance of a step, and a logarithm that is finite even if the variance is 0."""

  value: Leaf
  log: Leaf


def posterior_mean(x: Leaf, x0: Leaf, sigma: Leaf, sigma_next: Leaf) -> Leaf:
  """Return the mean of ``q(x' | x, x0)``, of the shape of ``x``.

  >>> float(posterior_mean(jnp.asarray(3.0), jnp.asarray(1.0), 2.0, 1.0))
  1.5
  """
  return x0 + (sigma_next / sigma) ** 2 * (x - x0)


def posterior_variance(sigma: Leaf, sigma_next: Leaf) -> Leaf:
  """Return the variance of ``q(x' | x, x0)``. It is 0 if ``sigma_next`` is 0.

  >>> float(posterior_variance(2.0, 1.0))
  0.75
  """
  ratio = sigma_next / sigma
  return jnp.square(sigma_next) * (1 - ratio) * (1 + ratio)


def posterior_std(sigma: Leaf, sigma_next: Leaf) -> Leaf:
  """Return the standard deviation of ``q(x' | x, x0)``. Its gradient is finite at ``sigma_next = 0``."""
  ratio = sigma_next / sigma
  return sigma_next * jnp.sqrt((1 - ratio) * (1 + ratio))


def reverse_variance(
  kind: str,
  sigma: Leaf,
  sigma_next: Leaf,
  sigma_last: Leaf,
  learned: Leaf | None = None,
) -> Variance:
  r"""Return the variance of a step of the reverse process, as in OpenAI's code.

  - ``small``: the variance of ``q(x' | x, x0)``. It is exact if the data are a single point (``FIXED_SMALL``).
  - ``large``: ``beta``. It is exact if the data are ``N(0, I)`` (``FIXED_LARGE``).
  - ``learned_range``: the network's output v interpolates between the logarithms of the two (Nichol & Dhariwal 2021,
    arXiv:2102.09672, eq. 15): :math:`\log\Sigma = \frac{1 + v}2 \log\beta + \frac{1 - v}2 \log\tilde\beta`.

  In the last step, to ``sigma_next = 0``, the small variance is 0. The small variance of the step before, which depends
  on ``sigma_last``, replaces it in the logarithm and in ``learned_range``, and is also the last variance of ``large``.

  Args:
    kind: ``small``, ``large`` or ``learned_range``.
    sigma: the level before the step.
    sigma_next: the level after the step, below ``sigma``.
    sigma_last: the level before ``sigma``, above it; ``inf`` in the first step.
    learned: v, of the shape of ``x``, for ``learned_range``. -1 is small and 1 large; values outside are not clipped.

  Raises:
    ValueError: for an unknown kind (the message has the nearest), or a learned range without ``learned``.

  >>> small, large = (float(reverse_variance(kind, 1.0, 0.5, 2.0).value) for kind in ("small", "large"))
  >>> round(small, 4), round(large, 4)
  (0.1875, 0.4688)
  """
  checks.lookup("variance", kind, dict.fromkeys(VARIANCES))
  last = jnp.asarray(sigma_next) <= 0
  sum_and_difference = (sigma - sigma_next) * (sigma + sigma_next)
  small = posterior_variance(sigma, sigma_next)
  beta = (1 + jnp.square(sigma_next)) * sum_and_difference / (1 + jnp.square(sigma))
  # In the last step alpha' is 1, so that the papers' variance of the step before needs no conversion.
  small_before = posterior_variance(sigma_last, sigma) / (1 + jnp.square(sigma))
  log_small = jnp.log(jnp.where(last, small_before, small))
  if kind == "small":
    return Variance(small, log_small)
  # log(beta / small). The difference of the two logarithms would lose its digits at large sigma.
  nonzero_next = jnp.where(last, sigma, sigma_next)
  log_ratio = jnp.log1p(sum_and_difference / (1 + jnp.square(sigma)) / jnp.square(nonzero_next))
  if kind == "large":
    log = jnp.where(last, log_small, log_small + log_ratio)
    return Variance(jnp.exp(log), log)
  if learned is None:
    raise ValueError(
      "learned_range needs a denoiser that predicts the variance: make it with learned_variance=True from a network "
      "whose output has twice the channels of x"
    )
  log = log_small + (1 + learned) / 2 * jnp.where(last, jnp.log(beta) - log_small, log_ratio)
  return Variance(jnp.exp(log), log)


def ancestral(eta: Leaf, sigma: Scalar, sigma_next: Scalar) -> tuple[Scalar, Scalar]:
  r"""Split a step in two: down to a level below ``sigma_next``, and up to ``sigma_next`` with new noise.

  The noise is ``eta`` times the noise of DDPM's step,
  :math:`\sigma_{up} = \eta \sigma' \sqrt{1 - \sigma'^2 / \sigma^2}`.

  Returns:
    The level below, and the standard deviation of the noise. The sum of their squares is ``sigma_next²``.
  """
  eta = jnp.asarray(eta, sigma.dtype)
  # sqrt(sigma'^2 - up^2), in a form that loses no digits and has a finite gradient at sigma' = 0.
  square = (1 - eta) * (1 + eta) + (eta * sigma_next / sigma) ** 2
  down = sigma_next * jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  return down, eta * posterior_std(sigma, sigma_next)
