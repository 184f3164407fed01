"""Distributions of noise levels for training, given by their quantile functions.

A noise schedule is one as well: its levels at uniformly drawn times.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxguide._core import checks, specs, struct
from jaxguide._core.typing import Array, ArrayLike, Leaf
from jaxguide.schedules.noise import LogSNRCosine, NoiseLevels, NoiseSchedule


@struct.dataclass
class LogNormal:
  r"""Noise levels with ``log sigma ~ N(mean, std²)``, as in EDM's training (arXiv:2206.00364, table 1)."""

  mean: Leaf = -1.2
  std: Leaf = 1.2

  def __post_init__(self):
    checks.number_field(self, "mean", checks.finite)
    checks.number_field(self, "std", checks.in_range, 0)

  def quantile(self, u: ArrayLike) -> Array:
    """Return the level below which a fraction ``u`` in (0, 1) of the draws lies."""
    return jnp.exp(self.mean + self.std * jax.scipy.special.ndtri(jnp.asarray(u)))


@struct.dataclass
class UniformTime:
  """Noise levels of a schedule at uniformly drawn times in [t_min, t_max]. Song et al. draw from [1e-5, 1].

  Args:
    schedule: a continuous noise schedule.
    t_min: the smallest time, at least 0.
    t_max: the largest time, at most 1.

  >>> from jaxguide.schedules import LogSNR
  >>> UniformTime(LogSNR(-20.0, 20.0), 0.5, 1.0).quantile(0.0).item()
  1.0
  """

  schedule: Leaf
  t_min: Leaf = 1e-5
  t_max: Leaf = 1.0

  def __post_init__(self):
    if isinstance(self.schedule, str | type):
      checks.schedule(self.schedule)
    checks.rising(self, "t_min", "t_max", 0)
    checks.number_field(self, "t_max", checks.in_range, 0, 1)

  def quantile(self, u: ArrayLike) -> Array:
    """Return the level below which a fraction ``u`` in [0, 1] of the draws lies."""
    return self.schedule.sigma(self.t_min + jnp.asarray(u) * (self.t_max - self.t_min))


@struct.dataclass
class LogitNormal:
  r"""Noise levels of a schedule at times with ``logit t ~ N(mean, std²)``.

  Esser et al. (2024, arXiv:2403.03206, eq. 19) train flows with it.
  For the schedule `Flow`, where ``sigma = t / (1 - t)``, this is `LogNormal`.

  Args:
    schedule: a continuous noise schedule.
    mean: the mean of ``logit t``; above 0 the times are biased towards noise.
    std: the standard deviation of ``logit t``, at least 0.

  >>> from jaxguide.schedules import Flow
  >>> bool(jnp.isclose(LogitNormal(Flow(), 0.5, 1.5).quantile(0.7), LogNormal(0.5, 1.5).quantile(0.7)))
  True
  """

  schedule: Leaf
  mean: Leaf = 0.0
  std: Leaf = 1.0

  def __post_init__(self):
    if isinstance(self.schedule, str | type):
      checks.schedule(self.schedule)
    checks.number_field(self, "mean", checks.finite)
    checks.number_field(self, "std", checks.in_range, 0)

  def quantile(self, u: ArrayLike) -> Array:
    """Return the level below which a fraction ``u`` in (0, 1) of the draws lies."""
    return self.schedule.sigma(jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(jnp.asarray(u))))


def _log_normal(schedule: NoiseSchedule, *, mean: float = -0.6, std: float = 1.2) -> NoiseLevels:
  """Log of sigma is normal (EDM)."""
  del schedule
  return LogNormal(mean, std)


def _uniform(schedule: NoiseSchedule, *, t_min: float = 1e-5, t_max: float = 1.0) -> NoiseLevels:
  """Uniform in the time of the network's noise schedule."""
  return UniformTime(schedule, t_min, t_max)


def _log_snr_cosine(schedule: NoiseSchedule, *, log_snr_min: float = -20.0, log_snr_max: float = 20.0) -> NoiseLevels:
  """The log-SNR of a cosine schedule that is truncated at both ends (classifier-free guidance's paper)."""
  del schedule
  return LogSNRCosine(log_snr_min, log_snr_max)


def _logit_normal(schedule: NoiseSchedule, *, mean: float = 0.0, std: float = 1.0) -> NoiseLevels:
  """Logit of the time of the network's noise schedule is normal (Stable Diffusion 3)."""
  return LogitNormal(schedule, mean, std)


LEVELS: dict[str, Callable[..., NoiseLevels]] = {
  "log-normal": _log_normal,
  "uniform": _uniform,
  "log-snr-cosine": _log_snr_cosine,
  "logit-normal": _logit_normal,
}
"""Distributions by name: functions of the network's noise schedule and options."""


def levels(text: str, schedule: NoiseSchedule) -> NoiseLevels:
  """Return a distribution of noise levels by name.

  Args:
    text: ``NAME`` or ``NAME:option=value,...``, with a name of `LEVELS`.
    schedule: the noise schedule of the network.

  Raises:
    ValueError: for an unknown name (with the nearest known one), an unknown option, or a value out of range.

  >>> round(float(levels("log-normal:mean=0,std=1", LogSNRCosine()).quantile(0.5)), 4)
  1.0
  """
  function, options = specs.resolve("distribution of noise levels", text, LEVELS, "schedule")
  return function(schedule, **options)
