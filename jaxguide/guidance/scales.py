r"""Scales that change with the noise: functions ``sigma -> scale`` for whatever takes a ``scale``.

A number is a constant scale; any function of ``sigma`` is one that changes. Those here are pytrees with their numbers
as leaves, so that one compiled program serves a sweep. A function of your own is static, unless it is a
``jax.tree_util.Partial(function, *parameters)`` with ``function(*parameters, sigma)``.

The schedules of Wang et al. (2024, arXiv:2404.13040) are over the time ``t`` of training, from 1 (noise) to 0, and
scale what is *added* to the conditional prediction, ``γ - 1``, so that a scale of 1 stays 1 at every level. They find
that what grows as the noise falls is better than a constant.

>>> import jax.numpy as jnp
>>> import jaxguide as jg
>>> guided = jg.classifier_free(4, jg.scales.cosine(3.0, jg.schedules.Cosine()))(jg.ring(4).denoiser)
>>> guided(jnp.zeros(2), jnp.asarray(1.0), jnp.asarray(0)).shape
(2,)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxguide._core import checks
from jaxguide._core.typing import Array, ArrayLike, Scalar, Scale
from jaxguide.schedules import NoiseSchedule, Table
from jaxguide.schedules.posterior import ancestral


def linear(scale: ArrayLike, schedule: NoiseSchedule, floor: ArrayLike | None = None) -> Scale:
  r"""Rise linearly, :math:`\gamma(t) = 1 + 2 (1 - t) (\gamma - 1)`, but not below a floor.

  Args:
    scale: γ, the mean over ``t`` but for the floor. 1 is 1 at every level.
    schedule: whose time counts; a network's own, or ``LogSNR`` between two levels.
    floor: the least γ, for Wang et al.'s clamped schedule (2024, arXiv:2404.13040), the best that they tuned.

  Raises:
    ValueError: if ``scale`` or ``floor`` is not finite.

  >>> import jax.numpy as jnp
  >>> from jaxguide.schedules import Cosine
  >>> [round(float(linear(3.0, Cosine())(jnp.asarray(sigma))), 1) for sigma in (1e4, 1.0, 0.0)]
  [1.0, 3.0, 5.0]
  """
  floor = None if floor is None else checks.finite("floor", floor)
  return Partial(_linear, checks.finite("scale", scale), checks.schedule(schedule, "time"), floor)


def _linear(scale, schedule, floor, sigma):
  risen = 1 + 2 * (1 - _time(schedule, sigma)) * (scale - 1)
  return risen if floor is None else jnp.maximum(risen, floor)


def cosine(scale: ArrayLike, schedule: NoiseSchedule) -> Scale:
  r"""Rise as a cosine, :math:`\gamma(t) = 1 + (1 + \cos \pi t) (\gamma - 1)` (Wang et al. 2024, arXiv:2404.13040).

  Args:
    scale: γ, the mean over ``t``. 1 is 1 at every level.
    schedule: whose time counts.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> import jax.numpy as jnp
  >>> from jaxguide.schedules import Cosine
  >>> [round(float(cosine(3.0, Cosine())(jnp.asarray(sigma))), 1) for sigma in (1e4, 1.0, 0.0)]
  [1.0, 3.0, 5.0]
  """
  return Partial(_cosine, checks.finite("scale", scale), checks.schedule(schedule, "time"))


def _cosine(scale, schedule, sigma):
  return 1 + (1 + jnp.cos(math.pi * _time(schedule, sigma))) * (scale - 1)


def powered_cosine(scale: ArrayLike, schedule: NoiseSchedule, power: ArrayLike = 1.0) -> Scale:
  r"""Rise as a cosine of a power of time, to ``scale`` at the end.

  .. math:: \gamma(t) = 1 + \tfrac12 (1 - \cos(\pi (1 - t)^s)) (\gamma - 1)

  The last of Wang et al.'s schedules (2024, arXiv:2404.13040), after Gao et al. (2023, arXiv:2303.14389).

  Args:
    scale: γ at the end. 1 is 1 at every level.
    schedule: whose time counts.
    power: s, above 0: the larger, the later it rises. Gao et al. use 4 for ImageNet.

  Raises:
    ValueError: if ``scale`` is not finite, or ``power`` is not above 0.

  >>> import jax.numpy as jnp
  >>> from jaxguide.schedules import Cosine
  >>> [round(float(powered_cosine(3.0, Cosine(), 4.0)(jnp.asarray(sigma))), 1) for sigma in (1e4, 1.0, 0.0)]
  [1.0, 1.0, 3.0]
  """
  return Partial(
    _powered_cosine, checks.finite("scale", scale), checks.schedule(schedule, "time"), checks.above("power", power, 0)
  )


def _powered_cosine(scale, schedule, power, sigma):
  gone = 1 - _time(schedule, sigma)
  # The power of 0 has no finite gradient.
  raised = jnp.where(gone > 0, jnp.where(gone > 0, gone, 1) ** power, 0)
  return 1 + 0.5 * (1 - jnp.cos(math.pi * raised)) * (scale - 1)


def cfg_pp(scale: ArrayLike, sigmas: ArrayLike, eta: ArrayLike = 0.0) -> Scale:
  r"""CFG++ (Chung et al. 2024, arXiv:2406.08070, Algorithm 2), as a scale for `jaxguide.classifier_free`.

  CFG++ goes to the guided ``x0`` and puts the *unconditional* noise back,

  .. math::
    x' = \tilde D + \sigma' \epsilon_\varnothing, \quad \tilde D = D_\varnothing + \lambda (D_y - D_\varnothing), \quad
    \epsilon_\varnothing = (x - D_\varnothing) / \sigma

  which is the step of `jaxguide.Euler`, :math:`x' = D + \sigma' (x - D) / \sigma`, with classifier-free guidance of

  .. math:: \gamma(\sigma) = \frac{\lambda}{1 - \sigma' / \sigma}

  So what looks like another renoising, and would need another solver, is a scale that knows the grid. It works with
  any solver, and with Euler and DDIM it *is* CFG++. Between the levels of the grid, where solvers of several
  evaluations ask as well, it is interpolated in ``log sigma``. γ grows with the number of steps: λ belongs to a grid.

  Args:
    scale: λ. 0 is unconditional; 1 lands on the conditional x0 and keeps the unconditional noise. The paper uses 0.2 to
      1, where others use γ from 2 to 12.5.
    sigmas: (steps + 1,) the grid that will be walked.
    eta: of `jaxguide.DDIM` or `jaxguide.EulerAncestral`, in [0, 1], and 1 for `jaxguide.DDPM`: what is put back of the
      old noise is less then.

  Raises:
    ValueError: if ``scale`` is not finite, ``eta`` not in [0, 1], or ``sigmas`` is no grid.

  >>> import jax.numpy as jnp
  >>> [round(float(cfg_pp(0.5, jnp.array([4.0, 1.0, 0.5, 0.0]))(jnp.asarray(sigma))), 3) for sigma in (4.0, 1.0, 0.5)]
  [0.667, 1.0, 0.5]
  """
  grid = jnp.asarray(checks.sigmas(sigmas))
  return Partial(_cfg_pp, checks.finite("scale", scale), grid, checks.in_range("eta", eta, 0, 1))


def _cfg_pp(scale, grid, eta, sigma):
  return scale * _on_grid(1 / _weight(eta, grid), grid, sigma)


def dps(scale: ArrayLike, sigmas: ArrayLike, eta: ArrayLike = 1.0) -> Scale:
  r"""DPS (Chung et al. 2023, arXiv:2209.14687, Algorithm 1), as a scale for `jaxguide.reconstruction`.

  DPS takes an unguided step, and moves where it got to, in the variables ``x_t = x / sqrt(1 + σ²)``, along the gradient
  at where it came from,

  .. math:: x'_t \leftarrow x'_t + \zeta \nabla_{x_t} \log p(y | x_0 = D(x))

  which is guidance of that step's denoiser by

  .. math:: \gamma(\sigma) = \frac{\zeta \sqrt{1 + \sigma^2} \sqrt{1 + \sigma'^2}}{\sigma^2 w}

  with ``w`` the weight of ``D`` in the step, ``1 - σ'² / σ²`` in DDPM's. With `jaxguide.DDPM` or `jaxguide.DDIM` and
  `jaxguide.distance` it *is* DPS: ``reconstruction(distance(A), scales.dps(1.0, sigmas))``. Between the levels of the
  grid it is interpolated in ``log sigma``. ζ belongs to a grid, as for `cfg_pp`; the paper's have 1,000 steps.

  Args:
    scale: ζ, on the gradient of what is guided by: with `jaxguide.distance` the ``scale`` of the released code, and
      twice the paper's ζ'.
    sigmas: (steps + 1,) the grid that will be walked.
    eta: of `jaxguide.DDIM` or `jaxguide.EulerAncestral`, in [0, 1]. 1 is DDPM.

  Raises:
    ValueError: if ``scale`` is not finite, ``eta`` not in [0, 1], or ``sigmas`` is no grid.

  >>> import jax.numpy as jnp
  >>> round(float(dps(0.5, jnp.array([4.0, 1.0, 0.0]))(jnp.asarray(1.0))), 3)
  0.707
  """
  grid = jnp.asarray(checks.sigmas(sigmas))
  return Partial(_dps, checks.finite("scale", scale), grid, checks.in_range("eta", eta, 0, 1))


def _dps(scale, grid, eta, sigma):
  sigma = jnp.asarray(sigma)
  after = _on_grid(jnp.sqrt(1 + grid[1:] ** 2) / _weight(eta, grid), grid, sigma)
  return scale * jnp.sqrt(1 + sigma**2) / sigma**2 * after


def _weight(eta: ArrayLike, grid: Array) -> Array:
  """Give the weight of the denoised example in each step of DDIM, which puts the rest of the old noise back."""
  down, _ = jax.vmap(ancestral, (None, 0, 0))(eta, grid[:-1], grid[1:])
  return 1 - down / grid[:-1]


def _on_grid(values: Array, grid: Array, sigma: Scalar) -> Array:
  sigma = jnp.asarray(sigma)
  # Ascending, and no shorter than float32, as interpolation wants it.
  return jnp.interp(jnp.log(sigma.astype(grid.dtype)), jnp.log(grid[-2::-1]), values[::-1]).astype(sigma.dtype)


def _time(schedule: NoiseSchedule, sigma: Scalar) -> Array:
  """Give the time in [0, 1], of tables too."""
  last = schedule.num_steps - 1 if isinstance(schedule, Table) else 1
  return jnp.clip(schedule.time(sigma) / last, 0, 1)
