r"""Scalings: a network's parameterization as four functions of ``sigma``; and the weights of losses.

A network ``F`` trained in any convention becomes a denoiser with (Karras et al. 2022, arXiv:2206.00364, eq. 7)

    x0 = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, c_noise(sigma))        x = x0 + sigma eps

Here ``alpha = 1 / sqrt(1 + sigma²)``, so ``x_vp = alpha x`` is the input of a variance-preserving network, and ``s`` is
the standard deviation of the data:

    =======  ======================  ================  ========================  ================  =============
    name     F                       c_skip            c_out                     c_in              c_noise
    =======  ======================  ================  ========================  ================  =============
    eps      eps                     1                 -sigma                    alpha             time
    x0       x0                      0                 1                         alpha             time
    v        alpha (eps - sigma x0)  alpha²            -alpha sigma              alpha             time
    edm      mix of eps and x0       s² / (s²+sigma²)  s sigma / √(s²+sigma²)    1 / √(s²+sigma²)  log(sigma) / 4
    flow     eps - x0                1 / (1+sigma)     -sigma / (1+sigma)        1 / (1+sigma)     time
    to_data  x0 - eps                1 / (1+sigma)     sigma / (1+sigma)         1 / (1+sigma)     1 - time
    ve       -eps                    1                 sigma                     1                 log(sigma / 2)
    =======  ======================  ================  ========================  ================  =============

``to_data`` stands for ``flow_to_data``. ``consistency`` is ``edm`` with a boundary condition, see there.

The network's regression target is ``(x0 - c_skip x) / c_out``; `jaxguide.losses` uses it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxguide._core import checks
from jaxguide._core.typing import ArrayLike, Leaf
from jaxguide.schedules import NoiseSchedule, Table, nearest_step, sigma_to_alpha_bar
from jaxguide.schedules.tables import check_table


class Coefficients(NamedTuple):
  """The four coefficients at one noise level, or at each of an array of levels."""

  c_skip: Leaf
  c_out: Leaf
  c_in: Leaf
  c_noise: Leaf


Scaling = Callable[[ArrayLike], Coefficients]
"""``sigma -> Coefficients``, for ``sigma`` of any shape, above 0. It must be a pytree, since a denoiser contains it."""


def coefficients(scaling: Any, sigma: ArrayLike) -> Coefficients:
  """Return the four coefficients at ``sigma``.

  Raises:
    TypeError: if ``scaling`` is not a scaling, for example a name, a schedule or a function that makes a scaling.

  >>> coefficients("v", 1.0)
  Traceback (most recent call last):
  ...
  TypeError: scaling must be a function of sigma, got 'v': make one, such as ...
  """
  makers = (*PREDICTIONS.values(), iddpm)
  if not callable(scaling) or isinstance(scaling, type) or any(scaling is maker for maker in makers):
    shown = f"the function {scaling.__name__}" if hasattr(scaling, "__name__") else repr(scaling)
    raise TypeError(
      f"scaling must be a function of sigma, got {shown}: make one, such as "
      "jaxguide.scaling.eps(jaxguide.schedules.table('linear', 1000))"
    )
  return Coefficients(*scaling(sigma))


def eps(schedule: NoiseSchedule, time_scale: ArrayLike | None = None) -> Scaling:
  """The network predicts the noise (Ho et al. 2020, arXiv:2006.11239, eq. 11).

  Args:
    schedule: the noise schedule that defines the network's time.
    time_scale: the network's time input ``c_noise`` is ``time_scale`` times the schedule's time. The default is 1 for
      a `Table`, so the input is the step. For a continuous schedule it is 1000, since sinusoidal embeddings are
      designed for a thousand steps.

  >>> from jaxguide import schedules
  >>> float(eps(schedules.Cosine())(2.0).c_out)
  -2.0
  """
  return Partial(_eps, schedule, _time_scale(schedule, time_scale))


def _eps(schedule, time_scale, sigma):
  sigma = jnp.asarray(sigma)
  return Coefficients(jnp.ones_like(sigma), -sigma, _alpha(sigma), time_scale * schedule.time(sigma))


def x0(schedule: NoiseSchedule, time_scale: ArrayLike | None = None) -> Scaling:
  """The network predicts the clean example.

  Args:
    schedule: the noise schedule that defines the network's time.
    time_scale: as in `eps`.
  """
  return Partial(_x0, schedule, _time_scale(schedule, time_scale))


def _x0(schedule, time_scale, sigma):
  sigma = jnp.asarray(sigma)
  return Coefficients(jnp.zeros_like(sigma), jnp.ones_like(sigma), _alpha(sigma), time_scale * schedule.time(sigma))


def v(schedule: NoiseSchedule, time_scale: ArrayLike | None = None) -> Scaling:
  """The network predicts the velocity v (Salimans & Ho 2022, arXiv:2202.00512, appendix D).

  Args:
    schedule: the noise schedule that defines the network's time.
    time_scale: as in `eps`.
  """
  return Partial(_v, schedule, _time_scale(schedule, time_scale))


def _v(schedule, time_scale, sigma):
  sigma = jnp.asarray(sigma)
  alpha = _alpha(sigma)
  return Coefficients(alpha**2, -alpha * sigma, alpha, time_scale * schedule.time(sigma))


def edm(sigma_data: ArrayLike = 0.5, time_scale: ArrayLike = 1.0) -> Scaling:
  """The preconditioning of Karras et al. (2022, arXiv:2206.00364, table 1).

  Args:
    sigma_data: standard deviation of the data, above 0.
    time_scale: the network's time input ``c_noise`` is ``time_scale * log(sigma) / 4``. It is 1 for the networks of
      EDM and EDM2, and 1000 for those of OpenAI's consistency models that were trained in this way.

  >>> [round(float(c), 3) for c in edm(0.5)(0.5)]
  [0.5, 0.354, 1.414, -0.173]
  """
  return Partial(_edm, _positive("sigma_data", sigma_data), checks.finite("time_scale", time_scale))


def _positive(name, value):
  value = checks.finite(name, value)
  if checks.is_concrete(value) and not np.all(np.asarray(value) > 0):
    raise ValueError(f"{name} must be above 0, got {value}")
  return value


def _edm(sigma_data, time_scale, sigma):
  sigma = jnp.asarray(sigma)
  total = jnp.sqrt(sigma**2 + sigma_data**2)
  time = time_scale * (_log(sigma) / 4)
  return Coefficients((sigma_data / total) ** 2, sigma * sigma_data / total, 1 / total, time)


def consistency(sigma_data: ArrayLike = 0.5, sigma_min: ArrayLike = 0.002, time_scale: ArrayLike = 1000.0) -> Scaling:
  r"""A consistency model: `edm` with a boundary condition (Song et al. 2023, arXiv:2303.01469, appendix C).

  .. math::
    c_{skip} = \frac{s^2}{(\sigma - \sigma_{min})^2 + s^2}, \qquad
    c_{out} = \frac{s (\sigma - \sigma_{min})}{\sqrt{\sigma^2 + s^2}}

  At ``sigma_min`` the denoiser gives its input. At other levels it gives the end of the path through ``x`` instead of
  the mean of x0, so one evaluation is a sample.

  Args:
    sigma_data: s, standard deviation of the data, above 0.
    sigma_min: the smallest noise level, above 0.
    time_scale: the network's time input is ``time_scale * log(sigma) / 4``; 1000 for OpenAI's networks.

  >>> [round(float(c), 3) for c in consistency()(0.002)]
  [1.0, 0.0, 2.0, -1553.652]
  """
  numbers = _positive("sigma_data", sigma_data), _positive("sigma_min", sigma_min)
  return Partial(_consistency, *numbers, checks.finite("time_scale", time_scale))


def _consistency(sigma_data, sigma_min, time_scale, sigma):
  sigma = jnp.asarray(sigma)
  total, above = jnp.sqrt(sigma**2 + sigma_data**2), sigma - sigma_min
  c_skip = sigma_data**2 / (above**2 + sigma_data**2)
  return Coefficients(c_skip, above * sigma_data / total, 1 / total, time_scale * (_log(sigma) / 4))


def flow(time_scale: ArrayLike | None = None) -> Scaling:
  """The network predicts the velocity ``eps - x0`` of a straight path (Lipman et al. 2023, arXiv:2210.02747).

  The path is ``x_t = (1 - t) x0 + t eps``, so ``t = sigma / (1 + sigma)`` and ``x_t = x / (1 + sigma)``.

  Args:
    time_scale: the network's time input ``c_noise`` is ``time_scale * t``. It is 1000 for networks with times up to a
      thousand, such as those of Stable Diffusion 3 and of `jaxguide.training`, and 1 for networks with ``t`` in [0, 1].
      There is no default, because a wrong value gives wrong samples without an error.

  Raises:
    TypeError: if ``time_scale`` is None.
  """
  if time_scale is None:
    raise TypeError("flow needs a time_scale: 1.0 for a network with times in [0, 1], 1000.0 for one with 1000 t")
  return Partial(_flow, checks.finite("time_scale", time_scale))


def _flow(time_scale, sigma):
  sigma = jnp.asarray(sigma)
  keep = 1 / (1 + sigma)
  return Coefficients(keep, -sigma * keep, keep, time_scale * sigma * keep)


def flow_to_data(time_scale: ArrayLike = 1.0) -> Scaling:
  """The network predicts the velocity ``x0 - eps``, and its time is 1 at the data and 0 at the noise.

  It is the convention of SiT (Ma et al. 2024, arXiv:2401.08740) and of LightningDiT (Yao et al. 2025,
  arXiv:2501.01423): their ``x_t = t x0 + (1 - t) eps``. In the convention of `flow` the time and the velocity have the
  other direction. A wrong choice gives noise without an error.

  Args:
    time_scale: the network's time input ``c_noise`` is ``time_scale * t``.

  >>> [round(float(c), 3) for c in flow_to_data()(3.0)]
  [0.25, 0.75, 0.25, 0.25]
  """
  return Partial(_flow_to_data, checks.finite("time_scale", time_scale))


def _flow_to_data(time_scale, sigma):
  sigma = jnp.asarray(sigma)
  keep = 1 / (1 + sigma)
  return Coefficients(keep, sigma * keep, keep, time_scale * keep)


def ve() -> Scaling:
  """The network's input is ``x``, and it predicts ``-eps``: VE in table 1 of Karras et al. (2022, arXiv:2206.00364).

  This is the score network of Song et al. (2021, arXiv:2011.13456), whose output is divided by sigma.

  >>> [round(float(c), 3) for c in ve()(4.0)]
  [1.0, 4.0, 1.0, 0.693]
  """
  return Partial(_ve)


def _ve(sigma):
  sigma = jnp.asarray(sigma)
  return Coefficients(jnp.ones_like(sigma), sigma, jnp.ones_like(sigma), jnp.log(sigma / 2))


def iddpm(table: Table) -> Scaling:
  """`eps` whose time input is the nearest step of a table, a whole number.

  It is iDDPM in table 1 of Karras et al. (2022, arXiv:2206.00364). At the levels of the table it equals ``eps(table)``;
  between two levels the time input of ``eps(table)`` is a fraction.

  >>> from jaxguide import schedules
  >>> float(iddpm(schedules.table("linear", 1000))(0.3).c_noise)
  88.0
  """
  return Partial(_iddpm, check_table(table))


def _iddpm(table, sigma):
  sigma = jnp.asarray(sigma)
  return Coefficients(jnp.ones_like(sigma), -sigma, _alpha(sigma), nearest_step(table, sigma).astype(sigma.dtype))


def _log(sigma):
  """Return ``log(sigma)``, also finite at 0."""
  return jnp.log(jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny))


def _alpha(sigma):
  return jnp.sqrt(sigma_to_alpha_bar(sigma))


def _time_scale(schedule, time_scale):
  checks.schedule(schedule, "time")
  if time_scale is None:
    return 1.0 if isinstance(schedule, Table) else 1000.0
  return checks.finite("time_scale", time_scale)


PREDICTIONS: dict[str, Callable[..., Scaling]] = {
  "eps": eps,
  "x0": x0,
  "v": v,
  "edm": edm,
  "consistency": consistency,
  "flow": flow,
  "flow_to_data": flow_to_data,
  "ve": ve,
}


def scaling(prediction: str, schedule: NoiseSchedule, time_scale: ArrayLike | None = None) -> Scaling:
  """Make a scaling from the name of the network's prediction.

  Args:
    prediction: ``eps``, ``x0``, ``v``, ``edm``, ``consistency``, ``flow``, ``flow_to_data`` or ``ve``.
    schedule: the noise schedule that defines the network's time; used by ``eps``, ``x0`` and ``v`` alone. The time of
      the others is a function of sigma.
    time_scale: as in `eps` or `flow_to_data`; required by ``flow``. Not used by ``edm``, ``consistency`` and ``ve``,
      whose time is the logarithm of sigma: `edm` and `consistency` take a factor of their own.

  Raises:
    ValueError: if the name is unknown; the message names the nearest one.
    TypeError: if ``time_scale`` is None for ``flow``.
  """
  make = checks.lookup("prediction", prediction, PREDICTIONS)
  if make in (edm, consistency, ve):
    return make()
  given = {} if time_scale is None else {"time_scale": time_scale}
  return make(**given) if make in (flow, flow_to_data) else make(schedule, **given)


# --- weights of the loss, on |x0 - D|² -------------------------------------------------------------


def eps_weight(sigma: ArrayLike) -> Leaf:
  """``1 / sigma²``: the loss is the mean squared error of eps (DDPM's simple loss)."""
  return 1 / jnp.square(sigma)


def x0_weight(sigma: ArrayLike) -> Leaf:
  """1: the loss is the mean squared error of x0."""
  return jnp.ones_like(sigma)


def min_snr_weight(sigma: ArrayLike, gamma: ArrayLike = 5.0) -> Leaf:
  """``min(1 / sigma², gamma)`` (Hang et al. 2023, arXiv:2303.09556, eq. 8): the eps loss, bounded at low noise.

  Raises:
    ValueError: if ``gamma`` is not finite and above 0.
  """
  return jnp.minimum(1 / jnp.square(sigma), checks.above("gamma", checks.finite("gamma", gamma), 0))


def edm_weight(sigma: ArrayLike, sigma_data: ArrayLike = 0.5) -> Leaf:
  """``(sigma² + s²) / (sigma s)²`` (Karras et al. 2022, arXiv:2206.00364, table 1): weight 1 on the output of `edm`.

  Args:
    sigma: noise levels.
    sigma_data: ``s``, standard deviation of the data.

  Raises:
    ValueError: if ``sigma_data`` is not finite and above 0.
  """
  sigma_data = checks.above("sigma_data", checks.finite("sigma_data", sigma_data), 0)
  return 1 / jnp.square(sigma) + 1 / jnp.square(sigma_data)


WEIGHTS: dict[str, Callable[..., Leaf]] = {
  "eps": eps_weight,
  "x0": x0_weight,
  "min-snr": min_snr_weight,
  "edm": edm_weight,
}
