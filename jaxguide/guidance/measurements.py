r"""Inverse problems solved by guidance: measurements of a clean example as log-probabilities.

A measurement is ``y = A(x0) + std * noise``, where ``A`` is any differentiable function of one example. The condition
is ``y``. The network does not need ``y``: `jaxguide.reconstruction` guides an unconditional network.

>>> import jax
>>> import jaxguide as jg
>>> ring, mask = jg.ring(8), jnp.array([1.0, 0.0])                # inpainting: the first number is known
>>> known = jax.tree_util.Partial(jnp.multiply, mask)
>>> guidance = jg.chain(jg.unconditional(None), jg.reconstruction(jg.measurement(known, 0.1), 1.0))
>>> ys = jnp.tile(jnp.array([0.0, 0.0]), (16, 1))                 # one measurement for each of 16 samples
>>> xs = jg.sample_batch(
...   guidance(ring.denoiser), jax.random.key(0), ys, shape=(2,), sigmas=jg.karras(40), solver=jg.DDIM(1.0)
... )
>>> bool((abs(xs[:, 0]) < 0.5).all() and (abs(xs[:, 1]) > 0.5).all())     # the two modes whose first number is 0
True

Other operators are ``lambda x0: x0.reshape(h, 2, w, 2, c).mean((1, 3))`` for super-resolution by 2, or a convolution
for deblurring. If an operator has arrays of its own, as ``known`` has, make it a ``jax.tree_util.Partial`` with these
arrays; then they are arguments of the compiled program and not constants. A mask that differs between samples is part
of the condition; in this case, make the measurement inside the log-probability. If the network has a label as its
condition, `jaxguide.given` passes the label to it:

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
"""The measured quantity as a function of a clean example, ``x0 -> y``."""


def measurement(operator: Operator, std: ArrayLike, spread: Scale = 0.0) -> LogProb:
  r"""The log-density of a measurement with Gaussian noise: a `LogProb` for `jaxguide.reconstruction`.

  .. math:: \log p(y | x; \sigma) = \log N(y; A(D(x)), s^2 + r(\sigma)^2)

  The condition is ``y``. ``spread`` accounts for the error of ``D(x)`` as an estimate of ``x0``:

  - 0 is the likelihood of DPS (Chung et al. 2023, arXiv:2209.14687, eq. 10 to 16). It assumes that ``D(x)`` is ``x0``.
    At high noise this is wrong, and the guidance is too strong.
  - ``lambda sigma: sigma / jnp.sqrt(1 + sigma**2)`` is the posterior's standard deviation for data of unit variance, as
    in ΠGDM (Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", section 3). It fits
    operators for which ``A A^T`` is the identity, such as inpainting. For the mean of n such elements, divide it by
    ``sqrt(n)``.
  - ``lambda sigma: sigma``, without noise, is the choice of Ho et al. (2022, arXiv:2204.03458, eq. 8). It fits data of
    unlimited variance.

  For Gaussian data, a linear operator and the right spread, `jaxguide.reconstruction` at γ = 1 is exact.

  Args:
    operator: A, ``x0 -> y`` of one example, differentiable; linear or not.
    std: s, the standard deviation of the measurement's noise, above 0: a number, or an array of the shape of ``y``.
    spread: r, the standard deviation of ``A(x0)`` given ``x``: a number, or a function of ``sigma`` that gives a number
      or an array of the shape of ``y``.

  Returns:
    ``(x0, sigma, y) -> log-density``, a pytree.

  Raises:
    ValueError: if ``std`` is not finite and above 0, or if ``spread`` is not finite; when called, if the shape of ``y``
      is not that of the operator's output.

  >>> log_prob = measurement(lambda x0: x0[:1], 0.5)
  >>> round(float(log_prob(jnp.array([1.0, 7.0]), jnp.asarray(1.0), jnp.array([1.5]))), 4)  # log N(1.5; 1, 0.25)
  -0.7258
  """
  std = checks.above("std", checks.finite("std", std), 0)
  return Partial(_measurement, struct.as_tree(operator), std, checks.scale("spread", spread))


def _measurement(operator, std, spread, x0, sigma, y):
  residual = _residual(operator, x0, y)
  spread = spread(sigma) if callable(spread) else spread
  std, spread = jnp.asarray(std, residual.dtype), jnp.asarray(spread, residual.dtype)
  variance = jnp.broadcast_to(std**2 + spread**2, residual.shape)
  return -0.5 * jnp.sum(residual**2 / variance + jnp.log(2 * jnp.pi * variance))


def distance(operator: Operator) -> LogProb:
  r"""Minus the distance from the measurement, :math:`-\|y - A(x_0)\|`, for use in place of a `LogProb`.

  This is the energy of DPS (Chung et al. 2023, arXiv:2209.14687). A step of the paper,
  :math:`\zeta' \nabla \|y - A\|^2 / \|y - A\|`, is ``2 ζ'`` times the gradient of the distance. The ``scale`` of the
  paper's released code multiplies the gradient of the distance. See `jaxguide.scales.dps`.

  Args:
    operator: A, ``x0 -> y`` of one example, differentiable.

  Returns:
    ``(x0, sigma, y) -> -distance``, a pytree. Its gradient is 0 where the distance is 0.

  Raises:
    ValueError: when called, if the shape of ``y`` is not that of the operator's output.

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
