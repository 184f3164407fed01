r"""Measurements of a clean example as log-probabilities: inverse problems, to be solved by guidance.

A measurement is ``y = A(x0) + std * noise``, with any differentiable ``A`` of one example; the condition is ``y``. The
network needs to know nothing of it: `jaxguide.reconstruction` guides an unconditional one.

>>> import jax
>>> import jaxguide as jg
>>> ring, mask = jg.ring(8), jnp.array([1.0, 0.0])                # inpainting: the first number is known
>>> known = jax.tree_util.Partial(jnp.multiply, mask)
>>> guidance = jg.chain(jg.unconditional(None), jg.reconstruction(jg.measurement(known, 0.1), 1.0))
>>> ys = jnp.tile(jnp.array([0.0, 0.0]), (16, 1))                 # one measurement for each of 16 samples
>>> xs = jg.sample_batch(
...   guidance(ring.denoiser), jax.random.key(0), ys, shape=(2,), sigmas=jg.karras(40), solver=jg.DDIM(1.0)
... )
>>> bool((abs(xs[:, 0]) < 0.5).all() and (abs(xs[:, 1]) > 0.5).all())     # the two that are at 0, above and below
True

Other operators: ``lambda x0: x0.reshape(h, 2, w, 2, c).mean((1, 3))`` for super-resolution by 2, a convolution for
deblurring. An operator with arrays of its own, as ``known`` above, is a ``jax.tree_util.Partial`` of them: they are no
constants of the program then. A mask for each sample is part of the condition, and the measurement is made where it is
used; with a label for the network next to it, `jaxguide.given` hands each its part:

>>> def inpainting(x0, sigma, cond):
...   return jg.measurement(lambda x0: cond["mask"] * x0, 0.1)(x0, sigma, cond["y"])
>>> guided = jg.reconstruction(inpainting, 1.0)(jg.given("label", ring.denoiser))
>>> cond = {"label": 2, "mask": mask, "y": jnp.array([0.1, 0.0])}
>>> guided(jnp.zeros(2), jnp.asarray(1.0), cond).shape
(2,)
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import Partial

from jaxguide._core import checks, struct
from jaxguide._core.typing import Array, ArrayLike, Example, LogProb, Scale

Operator = Callable[[Example], Array]
"""What is measured of a clean example, ``x0 -> y``."""


def measurement(operator: Operator, std: ArrayLike, spread: Scale = 0.0) -> LogProb:
  r"""What a measurement with Gaussian noise says: a `LogProb` for `jaxguide.reconstruction`, whose condition is ``y``.

  .. math:: \log p(y | x; \sigma) = \log N(y; A(D(x)), s^2 + r(\sigma)^2)

  With ``spread`` 0 this is DPS's likelihood (Chung et al. 2023, arXiv:2209.14687, eq. 10 to 16), which takes ``D(x)``
  for the example itself, and where that is wrong, at high noise, guides too much. ``lambda sigma: sigma /
  jnp.sqrt(1 + sigma**2)`` is the posterior's spread for data of unit variance, as in ΠGDM (Song et al. 2023,
  "Pseudoinverse-guided diffusion models for inverse problems", section 3) where ``A A^T`` is the identity, as for
  inpainting. For the mean of n such elements divide it by ``sqrt(n)``. Ho et al. (2022, arXiv:2204.03458, eq. 8) have
  ``lambda sigma: sigma``, as for data without bounds, and no noise.

  With the right spread and a linear operator, `jaxguide.reconstruction` at γ = 1 is exact for Gaussian data.

  Args:
    operator: A, ``x0 -> y`` of one example, differentiable; linear or not.
    std: s, the standard deviation of the measurement's noise, above 0: a number, or of the shape of ``y``.
    spread: r, the standard deviation of ``A(x0)`` given ``x``: a number, or a function of ``sigma``, which may give an
      array of the shape of ``y``.

  Returns:
    ``(x0, sigma, y) -> log-density``, a pytree.

  Raises:
    ValueError: if ``std`` is not finite and above 0, ``spread`` is not finite or, once called, if ``y`` has not the
      shape of what the operator gives.

  >>> log_prob = measurement(lambda x0: x0[:1], 0.5)
  >>> round(float(log_prob(jnp.array([1.0, 7.0]), jnp.asarray(1.0), jnp.array([1.5]))), 4)  # log N(1.5; 1, 0.25)
  -0.7258
  """
  std = checks.above("std", checks.finite("std", std), 0)
  return Partial(_measurement, struct.as_tree(operator), std, checks.scale("spread", spread))


def _measurement(operator, std, spread, x0, sigma, y):
  off = _residual(operator, x0, y)
  std, spread = jnp.asarray(std, off.dtype), jnp.asarray(spread(sigma) if callable(spread) else spread, off.dtype)
  variance = jnp.broadcast_to(std**2 + spread**2, off.shape)
  return -0.5 * jnp.sum(off**2 / variance + jnp.log(2 * jnp.pi * variance))


def distance(operator: Operator) -> LogProb:
  r"""Minus the distance from the measurement, :math:`-\|y - A(x_0)\|`: a `LogProb` up to a factor.

  DPS's own energy (Chung et al. 2023, arXiv:2209.14687): its steps :math:`\zeta' \nabla \|y - A\|^2 / \|y - A\|` are
  ``2 ζ'`` times the gradient of this; the released code's ``scale`` is the factor of the gradient itself. See
  `jaxguide.scales.dps`.

  Args:
    operator: A, ``x0 -> y`` of one example, differentiable.

  Returns:
    ``(x0, sigma, y) -> -distance``, a pytree. Its gradient is 0 where the distance is.

  Raises:
    ValueError: once called, if ``y`` has not the shape of what the operator gives.

  >>> float(distance(lambda x0: 2 * x0)(jnp.zeros(2), jnp.asarray(1.0), jnp.array([3.0, 4.0])))
  -5.0
  """
  return Partial(_distance, struct.as_tree(operator))


def _distance(operator, x0, sigma, y):
  square = jnp.sum(jnp.square(_residual(operator, x0, y)))
  return -jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _residual(operator: Operator, x0: Example, y: ArrayLike) -> Array:
  measured = operator(x0)
  if jnp.shape(y) != measured.shape:
    raise ValueError(f"the operator gives shape {measured.shape}, but the measurement has shape {jnp.shape(y)}")
  return jnp.asarray(y, measured.dtype) - measured
