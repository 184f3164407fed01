r"""Combine rules: how guidance makes one prediction of two, the conditional one and the one to be pushed away from.

A rule is a function ``(x0, x0_base, scale, x, sigma) -> x0`` of one example: the conditional (or good) prediction, the
unconditional (or weak) one, γ, and where they were made. `jaxguide.classifier_free` and `jaxguide.autoguidance` take
it as ``combine``. `linear` is the papers' own; the others were made for large scales. All of them give ``x0`` at
``scale`` 1 (`zero_star` below its ``sigma_zero``); only `linear` gives ``x0_base`` at 0 whatever the arguments.

A rule that its paper defines for ε or for a flow's velocity is converted with ``x`` and ``sigma`` inside, and so means
the same for every network. Rules are pytrees with their numbers as leaves, so that one program serves a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import Partial

from jaxguide import checks, struct
from jaxguide.typing import Array, ArrayLike, Example, Scalar

Combine = Callable[..., Example]
"""``(x0, x0_base, scale, x, sigma) -> x0``."""


def linear(x0: Example, x0_base: Example, scale: ArrayLike, x: Example, sigma: Scalar) -> Example:
  """``x0_base + γ (x0 - x0_base)``: the rule of classifier-free guidance and of autoguidance.

  >>> float(linear(jnp.asarray(3.0), jnp.asarray(1.0), 2.0, jnp.asarray(0.0), jnp.asarray(1.0)))
  5.0
  """
  return x0_base + jnp.asarray(scale, x0.dtype) * (x0 - x0_base)


def rescaled(phi: ArrayLike = 0.7, of: Combine = linear) -> Combine:
  r"""The spread of the conditional prediction is kept (Lin et al. 2023, arXiv:2305.08891, section 3.4).

  .. math::
    D_{rescaled} = D_{cfg} \cdot std(D_y) / std(D_{cfg}), \qquad
    \tilde D = \phi D_{rescaled} + (1 - \phi) D_{cfg}

  The paper takes the standard deviations of what its network predicts, v, and libraries those of whatever their
  network predicts, so that one φ means something else for every parameterization. Here it is always that of ``x0``:
  of one example, over all its elements. Where it is 0, as for an example of one element, nothing is rescaled.

  Args:
    phi: φ, from 0 (off) to 1. The paper uses 0.7 with γ = 7.5.
    of: the rule whose result is rescaled.

  Raises:
    ValueError: if ``phi`` is not between 0 and 1.

  >>> x0, base = jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0])
  >>> rescaled(1.0)(x0, base, 5.0, x0, jnp.asarray(1.0)).tolist()
  [1.0, 3.0]
  """
  return Partial(_rescaled, checks.in_range("phi", phi, 0, 1), struct.as_tree(of))


def _rescaled(phi, of, x0, x0_base, scale, x, sigma):
  guided = of(x0, x0_base, scale, x, sigma)
  wanted, spread = _std(x0), _std(guided)
  factor = jnp.where(spread > 0, wanted / jnp.where(spread > 0, spread, 1), 1)
  phi = jnp.asarray(phi, x0.dtype)
  return (phi * factor + (1 - phi)) * guided


def projected(eta: ArrayLike = 0.0, norm_threshold: ArrayLike = math.inf) -> Combine:
  r"""Adaptive projected guidance, without its momentum (Sadat et al. 2024, arXiv:2410.02416).

  The difference is cut to a norm of at most r, and what of it is parallel to the conditional prediction, which is what
  saturates colours, is weakened:

  .. math::
    \Delta = (D_y - D_\varnothing) \min(1, r / \|D_y - D_\varnothing\|), \qquad
    \Delta_\parallel = \frac{\langle\Delta, D_y\rangle}{\langle D_y, D_y\rangle} D_y, \qquad
    \tilde D = D_y + (\gamma - 1) (\Delta - \Delta_\parallel + \eta \Delta_\parallel)

  It acts on ``x0``, as in the paper. With η = 1 and no threshold it is `linear`. At ``scale`` 0 it is not the
  unconditional prediction otherwise. (Libraries that write ``uncond + γ Δ`` give something else at 1, and elsewhere.)

  Args:
    eta: η, how much of the parallel part is kept. The paper uses 0.
    norm_threshold: r, above 0, in units of ``x0`` and for one example, so that it grows with the number of elements;
      infinite for none. The paper uses 2.5 for EDM2 and 15 for Stable Diffusion XL.

  Raises:
    ValueError: if ``eta`` is not finite, or ``norm_threshold`` is not above 0.

  >>> x0, base = jnp.array([2.0, 0.0]), jnp.array([1.0, -1.0])
  >>> projected(0.0)(x0, base, 3.0, x0, jnp.asarray(1.0)).tolist()
  [2.0, 2.0]
  """
  return Partial(_projected, checks.finite("eta", eta), checks.above("norm_threshold", norm_threshold, 0))


def _projected(eta, norm_threshold, x0, x0_base, scale, x, sigma):
  eta, most, scale = (jnp.asarray(number, x0.dtype) for number in (eta, norm_threshold, scale))
  off = x0 - x0_base
  long = _dot(off, off) > most**2
  off *= jnp.where(long, most / jnp.sqrt(jnp.where(long, _dot(off, off), 1)), 1)
  parallel = _ratio(_dot(off, x0), _dot(x0, x0)) * x0
  return x0 + (scale - 1) * (off + (eta - 1) * parallel)


def zero_star(sigma_zero: ArrayLike = math.inf) -> Combine:
  r"""CFG-Zero* (Fan et al. 2025, arXiv:2503.18886): the best multiple of the base's velocity, and none at first.

  For a flow, whose velocity is ``v = eps - x0`` and whose time is ``t = σ / (1 + σ)``, so that
  ``v = (x - (1 + σ) x0) / σ``,

  .. math::
    \tilde v = s^* v_\varnothing + \gamma (v_y - s^* v_\varnothing), \qquad
    s^* = \langle v_y, v_\varnothing\rangle / \|v_\varnothing\|^2

  and ``v = 0`` in the first steps. The result is that of a flow whatever the network predicts. Where the base's
  velocity is 0, so is the factor.

  Args:
    sigma_zero: from this noise level up the velocity is 0, that is ``x0 = x / (1 + σ)``, whatever the scale; at 1 too.
      The paper does so in the first step or few, for the first alone ``sigmas[0]`` of a grid. Infinite for nowhere.

  Raises:
    ValueError: if ``sigma_zero`` is not above 0.

  >>> x0, base = jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0])  # at x = 0 velocities are multiples of x0
  >>> zero_star()(x0, base, 3.0, jnp.zeros(2), jnp.asarray(1.0)).tolist()
  [1.0, 0.0]
  >>> zero_star(1.0)(x0, base, 3.0, jnp.array([4.0, 2.0]), jnp.asarray(1.0)).tolist()
  [2.0, 1.0]
  """
  return Partial(_zero_star, checks.above("sigma_zero", sigma_zero, 0))


def _zero_star(sigma_zero, x0, x0_base, scale, x, sigma):
  # σ v, which is finite where σ is 0; s* is the same.
  given, base = x - (1 + sigma) * x0, x - (1 + sigma) * x0_base
  base *= _ratio(_dot(given, base), _dot(base, base))
  guided = x0 - (jnp.asarray(scale, x0.dtype) - 1) * (given - base) / (1 + sigma)
  return jnp.where(sigma >= sigma_zero, x / (1 + sigma), guided)


def tangential(x0: Example, x0_base: Example, scale: ArrayLike, x: Example, sigma: Scalar) -> Example:
  r"""Tangential damping, TCFG (Kwon et al. 2025, arXiv:2503.18137).

  Of the unconditional score only what lies along the first right singular vector of the two scores is kept:

  .. math::
    (s_y, s_\varnothing)^T = U \Sigma V^T, \qquad \hat s_\varnothing = v_1 v_1^T s_\varnothing, \qquad
    \tilde s = \hat s_\varnothing + \gamma (s_y - \hat s_\varnothing)

  with ``s = (x0 - x) / σ²``, as the paper has it, whatever the network predicts. It takes no parameter. An example of
  one element has one direction, and the rule is `linear` there.

  >>> x0, base = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
  >>> tangential(x0, base, 3.0, jnp.zeros(2), jnp.asarray(1.0)).tolist()
  [6.0, 0.0]
  """
  given, base = x0 - x, x0_base - x
  # v_1 = (cos θ s_y + sin θ s_∅) / σ_1, where (cos θ, sin θ) is the first eigenvector of the matrix of their products,
  # and by that equation the projection has the factor sin θ. The difference of squares is that of the arguments of θ.
  across, along = 2 * _dot(given, base), _dot(given - base, given + base)
  none = (across == 0) & (along == 0)
  theta = 0.5 * jnp.arctan2(across, jnp.where(none, 1, along))
  base = jnp.sin(theta) * (jnp.cos(theta) * given + jnp.sin(theta) * base)
  return x0 + (jnp.asarray(scale, x0.dtype) - 1) * (given - base)


def _dot(a: Example, b: Example) -> Array:
  return jnp.sum(a * b)


def _ratio(a: Array, b: Array) -> Array:
  """``a / b``, and 0 where b is 0; with gradients that are finite there too."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _std(x: Example) -> Array:
  """The standard deviation over all elements, with a gradient of 0 where it is 0."""
  variance = jnp.var(x)
  return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
