r"""Scales that change with the noise level: functions ``sigma -> scale`` for every argument called ``scale``.

A number is a constant scale; a function of ``sigma`` is a scale that changes. The functions here return pytrees whose
leaves are their numbers, so one compiled program serves a sweep. Your own function is static in a compiled program,
unless it is a ``jax.tree_util.Partial(function, *parameters)`` with ``function(*parameters, sigma)``.

The schedules of Wang et al. (2024, arXiv:2404.13040) are functions of the training time ``t``, from 1 (noise) to 0.
They multiply ``γ - 1``, the factor of the change that is *added* to the conditional prediction, so a scale of 1 stays 1
at every level. The paper finds that a scale that rises as the noise falls is better than a constant one.

>>> import jax.numpy as jnp
>>> import jaxguide as jg
>>> guided = jg.classifier_free(4, jg.scales.raised_cosine(3.0, jg.schedules.Cosine()))(jg.ring(4).denoiser)
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
from jaxguide.guidance import passes
from jaxguide.schedules import NoiseSchedule, Table
from jaxguide.schedules.posterior import ancestral


def static(scale: float | int) -> Scale:
  """A constant scale that is a part of the program: at 0 and 1 it leaves out the passes that are not needed.

  A number is an argument of a compiled program, which serves all numbers and runs all passes at each of them. With this
  scale another number is another program. Inside your own ``jit`` a number that is written there is static, too. The
  commands take it at 0 and 1.

  Args:
    scale: γ, a number.

  Raises:
    ValueError: if it is not one finite number that is known here.

  >>> import jaxguide as jg
  >>> denoise = lambda x, sigma, cond: x * cond
  >>> jax.make_jaxpr(jg.classifier_free(0, static(1.0))(denoise))(3.0, 1.0, 2.0).eqns[0].primitive
  mul
  """
  return passes.Static(checks.number("scale", scale))


def branching(scale: Scale) -> Scale:
  """A scale that is looked at while the program runs: where it is 0 or 1, passes that are not needed do not run.

  It is for one program that serves a sweep with 0 and 1 in it, and for functions of ``sigma`` that are 0 or 1 at some
  levels. Classifier-free guidance then has the network twice in its program, once for one pass and once for two: that
  of the animals took 1.5 times as long to compile, and twice as long to trace. Under ``vmap`` over scales all passes
  run. Where the scale is 0 or 1, the derivative with respect to the scale is 0.

  Args:
    scale: γ, a number or a function of ``sigma``.

  Raises:
    ValueError: if a number is not finite.

  >>> import jaxguide as jg
  >>> denoise = lambda x, sigma, cond: x * cond
  >>> at = jnp.asarray(3.0), jnp.asarray(1.0), 2.0
  >>> guided = jax.jit(lambda scale: jg.classifier_free(0, branching(scale))(denoise)(*at))
  >>> [float(guided(scale)) for scale in (0.0, 1.0, 2.0)]
  [0.0, 6.0, 12.0]
  """
  return passes.Branching(checks.scale("scale", scale))


def linear(scale: ArrayLike, schedule: NoiseSchedule, floor: ArrayLike | None = None) -> Scale:
  r"""A scale that rises linearly in time, :math:`\gamma(t) = 1 + 2 (1 - t) (\gamma - 1)`, with an optional minimum.

  Args:
    scale: γ, the mean over ``t`` without a floor. 1 is 1 at every level.
    schedule: the noise schedule that defines the time; the network's own, or ``LogSNR`` between two levels.
    floor: the smallest γ. With it, this is the clamped schedule of Wang et al. (2024, arXiv:2404.13040), the best of
      those that they tuned.

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
  value = 1 + 2 * (1 - _time(schedule, sigma)) * (scale - 1)
  return value if floor is None else jnp.maximum(value, floor)


def raised_cosine(scale: ArrayLike, schedule: NoiseSchedule) -> Scale:
  r"""A scale that rises as a cosine in time, :math:`\gamma(t) = 1 + (1 + \cos \pi t) (\gamma - 1)`.

  From Wang et al. (2024, arXiv:2404.13040).

  Args:
    scale: γ, the mean over ``t``. 1 is 1 at every level.
    schedule: the noise schedule that defines the time.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> import jax.numpy as jnp
  >>> from jaxguide.schedules import Cosine
  >>> [round(float(raised_cosine(3.0, Cosine())(jnp.asarray(sigma))), 1) for sigma in (1e4, 1.0, 0.0)]
  [1.0, 3.0, 5.0]
  """
  return Partial(_raised_cosine, checks.finite("scale", scale), checks.schedule(schedule, "time"))


def _raised_cosine(scale, schedule, sigma):
  return 1 + (1 + jnp.cos(math.pi * _time(schedule, sigma))) * (scale - 1)


def powered_cosine(scale: ArrayLike, schedule: NoiseSchedule, power: ArrayLike = 1.0) -> Scale:
  r"""A scale that rises as a cosine of a power of time, up to ``scale``.

  .. math:: \gamma(t) = 1 + \tfrac12 (1 - \cos(\pi (1 - t)^s)) (\gamma - 1)

  The last schedule of Wang et al. (2024, arXiv:2404.13040), after Gao et al. (2023, arXiv:2303.14389).

  Args:
    scale: γ at ``t = 0``, without noise. 1 is 1 at every level.
    schedule: the noise schedule that defines the time.
    power: s, above 0. With a larger power the scale rises later. Gao et al. use 4 for ImageNet.

  Raises:
    ValueError: if ``scale`` is not finite, or if ``power`` is not above 0.

  >>> import jax.numpy as jnp
  >>> from jaxguide.schedules import Cosine
  >>> [round(float(powered_cosine(3.0, Cosine(), 4.0)(jnp.asarray(sigma))), 1) for sigma in (1e4, 1.0, 0.0)]
  [1.0, 1.0, 3.0]
  """
  return Partial(
    _powered_cosine, checks.finite("scale", scale), checks.schedule(schedule, "time"), checks.above("power", power, 0)
  )


def _powered_cosine(scale, schedule, power, sigma):
  elapsed = 1 - _time(schedule, sigma)
  # A power of 0 has no finite gradient, hence the inner `where`.
  raised = jnp.where(elapsed > 0, jnp.where(elapsed > 0, elapsed, 1) ** power, 0)
  return 1 + 0.5 * (1 - jnp.cos(math.pi * raised)) * (scale - 1)


def cfg_pp(scale: ArrayLike, sigmas: ArrayLike, eta: ArrayLike = 0.0) -> Scale:
  r"""CFG++ (Chung et al. 2024, arXiv:2406.08070, Algorithm 2) as a scale for `jaxguide.classifier_free`.

  A step of CFG++ takes the guided ``x0`` and adds the *unconditional* noise again,

  .. math::
    x' = \tilde D + \sigma' \epsilon_\varnothing, \quad \tilde D = D_\varnothing + \lambda (D_y - D_\varnothing), \quad
    \epsilon_\varnothing = (x - D_\varnothing) / \sigma

  This equals the step of `jaxguide.Euler`, :math:`x' = D + \sigma' (x - D) / \sigma`, with classifier-free guidance and
  the scale

  .. math:: \gamma(\sigma) = \frac{\lambda}{1 - \sigma' / \sigma}

  So CFG++ needs no solver of its own, only a scale that depends on the grid of noise levels. This scale works with any
  solver; with Euler and DDIM the result *is* CFG++. Solvers with several evaluations a step also evaluate between the
  levels of the grid; there the scale is interpolated in ``log sigma``. γ grows with the number of steps, so a value of
  λ fits one grid only.

  Args:
    scale: λ. 0 is unconditional. 1 takes the conditional x0 with the unconditional noise. The paper uses 0.2 to 1,
      where other methods use γ from 2 to 12.5.
    sigmas: (steps + 1,) the grid used for sampling.
    eta: the ``eta`` of `jaxguide.DDIM` or `jaxguide.EulerAncestral`, in [0, 1]; 1 for `jaxguide.DDPM`. With a larger
      eta a step keeps less of the old noise.

  Raises:
    ValueError: if ``scale`` is not finite, if ``eta`` is not in [0, 1], or if ``sigmas`` is not a grid.

  >>> import jax.numpy as jnp
  >>> [round(float(cfg_pp(0.5, jnp.array([4.0, 1.0, 0.5, 0.0]))(jnp.asarray(sigma))), 3) for sigma in (4.0, 1.0, 0.5)]
  [0.667, 1.0, 0.5]
  """
  grid = jnp.asarray(checks.sigmas(sigmas))
  return Partial(_cfg_pp, checks.finite("scale", scale), grid, checks.in_range("eta", eta, 0, 1))


def _cfg_pp(scale, grid, eta, sigma):
  return scale * _on_grid(1 / _weight(eta, grid), grid, sigma)


def dps(scale: ArrayLike, sigmas: ArrayLike, eta: ArrayLike = 1.0) -> Scale:
  r"""DPS (Chung et al. 2023, arXiv:2209.14687, Algorithm 1) as a scale for `jaxguide.reconstruction`.

  DPS takes an unguided step. Then it moves the result along the gradient at the start of the step, in the variables
  ``x_t = x / sqrt(1 + σ²)``,

  .. math:: x'_t \leftarrow x'_t + \zeta \nabla_{x_t} \log p(y | x_0 = D(x))

  This equals a step with the guided denoiser and the scale

  .. math:: \gamma(\sigma) = \frac{\zeta \sqrt{1 + \sigma^2} \sqrt{1 + \sigma'^2}}{\sigma^2 w}

  where ``w`` is the weight of ``D`` in the step, ``1 - σ'² / σ²`` for DDPM. With `jaxguide.DDPM` or `jaxguide.DDIM` and
  `jaxguide.distance` the result *is* DPS: ``reconstruction(distance(A), scales.dps(1.0, sigmas))``. Between the levels
  of the grid the scale is interpolated in ``log sigma``. A value of ζ fits one grid only, as for `cfg_pp`; the grids of
  the paper have 1,000 steps.

  Args:
    scale: ζ, the factor of the gradient of the log-probability. With `jaxguide.distance` it is the ``scale`` of the
      released code, which is twice the paper's ζ'.
    sigmas: (steps + 1,) the grid used for sampling.
    eta: the ``eta`` of `jaxguide.DDIM` or `jaxguide.EulerAncestral`, in [0, 1]. 1 is DDPM.

  Raises:
    ValueError: if ``scale`` is not finite, if ``eta`` is not in [0, 1], or if ``sigmas`` is not a grid.

  >>> import jax.numpy as jnp
  >>> round(float(dps(0.5, jnp.array([4.0, 1.0, 0.0]))(jnp.asarray(1.0))), 3)
  0.707
  """
  grid = jnp.asarray(checks.sigmas(sigmas))
  return Partial(_dps, checks.finite("scale", scale), grid, checks.in_range("eta", eta, 0, 1))


def _dps(scale, grid, eta, sigma):
  sigma = jnp.asarray(sigma)
  grid_factor = _on_grid(jnp.sqrt(1 + grid[1:] ** 2) / _weight(eta, grid), grid, sigma)
  return scale * jnp.sqrt(1 + sigma**2) / sigma**2 * grid_factor


def _weight(eta: ArrayLike, grid: Array) -> Array:
  """Return the weight of the denoised example in each step of DDIM; the rest of the weight is on the old ``x``."""
  down, _ = jax.vmap(ancestral, (None, 0, 0))(eta, grid[:-1], grid[1:])
  return 1 - down / grid[:-1]


def _on_grid(values: Array, grid: Array, sigma: Scalar) -> Array:
  """Interpolate ``values``, one for each step of the grid, in ``log sigma``."""
  sigma = jnp.asarray(sigma)
  # `interp` needs ascending levels; it runs in the type of the grid, since `sigma` can be bfloat16.
  return jnp.interp(jnp.log(sigma.astype(grid.dtype)), jnp.log(grid[-2::-1]), values[::-1]).astype(sigma.dtype)


def _time(schedule: NoiseSchedule, sigma: Scalar) -> Array:
  """Return the time in [0, 1]; for a `Table` the step divided by the last step."""
  last = schedule.num_steps - 1 if isinstance(schedule, Table) else 1
  return jnp.clip(schedule.time(sigma) / last, 0, 1)
