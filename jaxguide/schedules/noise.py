"""Noise schedules: time to noise level, and back.

Everything is in ``sigma``, the standard deviation of the noise on a clean example, ``x = x0 + sigma * eps``. Other
conventions are functions of it. With the variance-preserving ``x_vp = alpha * x``:

    alpha_bar = alpha² = 1 / (1 + sigma²)        log_snr = log(alpha² / (1 - alpha²)) = -2 log sigma

A *noise schedule* maps time to noise: ``sigma(t)``, its inverse ``time(sigma)``, and ``quantile(u)``, the level below
which a fraction ``u`` of the training draws fall when ``t`` is drawn uniformly, as DDPM's training does. Whatever has a
``quantile`` can say how training draws its noise levels; `LogNormal` does nothing else.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxguide._core import checks, struct
from jaxguide._core.typing import ArrayLike, Leaf

# --- conventions ----------------------------------------------------------------------------------


def alpha_bar_to_sigma(alpha_bar: ArrayLike) -> Array:
  """``sqrt((1 - alpha_bar) / alpha_bar)``: the level of DDPM's ``x_t = sqrt(ᾱ) x0 + sqrt(1-ᾱ) eps``.

  >>> float(alpha_bar_to_sigma(0.5))
  1.0
  """
  alpha_bar = jnp.asarray(alpha_bar)
  return jnp.sqrt((1 - alpha_bar) / alpha_bar)


def sigma_to_alpha_bar(sigma: ArrayLike) -> Array:
  """``1 / (1 + sigma²)``, the inverse of `alpha_bar_to_sigma`."""
  return 1 / (1 + jnp.square(sigma))


def log_snr_to_sigma(log_snr: ArrayLike) -> Array:
  """``exp(-log_snr / 2)``; ``log_snr`` is Ho & Salimans' λ (arXiv:2207.12598, section 2)."""
  return jnp.exp(-jnp.asarray(log_snr) / 2)


def sigma_to_log_snr(sigma: ArrayLike) -> Array:
  """``-2 log sigma``, the inverse of `log_snr_to_sigma`."""
  return -2 * jnp.log(sigma)


# --- noise schedules ------------------------------------------------------------------------------


@runtime_checkable
class NoiseLevels(Protocol):
  """How training draws noise levels: an inverse distribution function."""

  def quantile(self, u: ArrayLike) -> Array:
    """Give the ``sigma`` below which a fraction ``u`` in (0, 1) of the draws fall."""
    ...


@runtime_checkable
class NoiseSchedule(NoiseLevels, Protocol):
  """Time to noise and back. Continuous schedules run over ``t`` in [0, 1], tables over [0, T-1]."""

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at time ``t``."""
    ...

  def time(self, sigma: ArrayLike) -> Array:
    """Give the time at which the level is ``sigma``; beyond the ends, the nearest end."""
    ...


class _Continuous:
  """Time in [0, 1]: a uniform draw of ``t`` is its own quantile."""

  def sigma(self, t: ArrayLike) -> Array:
    raise NotImplementedError

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    raise NotImplementedError

  def time(self, sigma: ArrayLike) -> Array:
    """Give the time in [0, 1] of a noise level; beyond the ends, the nearest end."""
    return jnp.clip(self.inverse(sigma), 0, 1)

  def quantile(self, u: ArrayLike) -> Array:
    """Give ``sigma(u)``: training draws ``t`` uniformly from [0, 1]."""
    return self.sigma(u)


@struct.dataclass
class Linear(_Continuous):
  r"""``beta(t)`` linear in ``t``, the continuous limit of DDPM's table (Song et al. 2021, arXiv:2011.13456, eq. 32).

  .. math:: \sigma(t)^2 = \exp(\tfrac12 (\beta_{max} - \beta_{min}) t^2 + \beta_{min} t) - 1

  >>> schedule = Linear()
  >>> round(float(schedule.time(schedule.sigma(0.25))), 4)
  0.25
  """

  beta_min: Leaf = 0.1
  beta_max: Leaf = 20.0

  def __post_init__(self):
    checks.rising(self, "beta_min", "beta_max", 0)

  @classmethod
  def between(cls, sigma_min: ArrayLike, sigma_max: ArrayLike, t_min: ArrayLike = 1e-3) -> "Linear":
    """Make the schedule that has ``sigma(t_min) = sigma_min`` and ``sigma(1) = sigma_max``.

    Karras et al. (2022, arXiv:2206.00364, appendix C.1) bring Song et al.'s sampler to any range of noise so.

    Args:
      sigma_min: above 0.
      sigma_max: above ``sigma_min``.
      t_min: in (0, 1).

    >>> schedule = Linear.between(0.02, 100.0)
    >>> [round(float(schedule.sigma(t)), 3) for t in (1e-3, 1.0)]
    [0.02, 100.0]
    """
    ends = checks.above("sigma_min", sigma_min, 0), checks.finite("sigma_max", sigma_max)
    if checks.is_concrete(ends) and not np.less(*ends).all():
      raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")
    low, high = (jnp.log1p(jnp.square(sigma)) for sigma in ends)
    spread = 2 * (high - low / t_min) / (1 - t_min)
    start = high - spread / 2
    return cls(start, start + spread)

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at ``t`` in [0, 1]."""
    t = jnp.asarray(t)
    return jnp.sqrt(jnp.expm1(0.5 * (self.beta_max - self.beta_min) * t**2 + self.beta_min * t))

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    log = jnp.log1p(jnp.square(sigma))
    root = jnp.sqrt(jnp.square(self.beta_min) + 2 * (self.beta_max - self.beta_min) * log)
    return 2 * log / (root + self.beta_min)


@struct.dataclass
class Cosine(_Continuous):
  r"""Nichol & Dhariwal's cosine schedule (2021, arXiv:2102.09672, eq. 17), cut off at ``sigma_max``.

  .. math:: \bar\alpha(t) = \cos^2(\tfrac{t + s}{1 + s} \tfrac\pi2) / \cos^2(\tfrac{s}{1 + s} \tfrac\pi2)

  Without a cut the level at ``t = 1`` is infinite; the paper's table bounds each ``beta`` by 0.999 for the same end.

  >>> float(Cosine().sigma(0.0)), round(float(Cosine().sigma(1.0)))
  (0.0, 10000)
  """

  s: Leaf = 0.008
  sigma_max: Leaf = 1e4

  def __post_init__(self):
    checks.written(self, "s", checks.in_range, 0)
    checks.written(self, "sigma_max", checks.above, 0)

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at ``t`` in [0, 1]."""
    quarter = jnp.pi / 2
    # 1 - ᾱ as a product of sines: the difference of cosines would cancel at small t.
    start, now = (jnp.asarray(u + self.s) / (1 + self.s) * quarter for u in (0.0, jnp.asarray(t)))
    noise = jnp.sin(now - start) * jnp.sin(now + start)
    return jnp.minimum(jnp.sqrt(noise) / jnp.maximum(jnp.cos(now), 1e-30), self.sigma_max)

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    quarter = jnp.pi / 2
    start = jnp.asarray(self.s) / (1 + self.s) * quarter
    # tan² now = sigma² + (1 + sigma²) tan² start, from ᾱ = cos² now / cos² start.
    now = jnp.arctan(jnp.sqrt(jnp.square(sigma) / jnp.cos(start) ** 2 + jnp.tan(start) ** 2))
    return now / quarter * (1 + self.s) - self.s


@struct.dataclass
class Sigmoid(_Continuous):
  r"""Sigmoid schedule (Jabri et al. 2022, arXiv:2212.11972, Algorithm 1 of Chen 2023, arXiv:2301.10972).

  .. math::
    \bar\alpha(t) = \frac{S(e/\tau) - S((s + t (e - s))/\tau)}{S(e/\tau) - S(s/\tau)}, \quad
    S(u) = \frac{1}{1 + e^{-u}}

  with ``s = start``, ``e = end``, and ``ᾱ`` kept at ``alpha_bar_min`` or above.
  """

  start: Leaf = -3.0
  end: Leaf = 3.0
  tau: Leaf = 1.0
  alpha_bar_min: Leaf = 1e-9

  def __post_init__(self):
    checks.rising(self, "start", "end")
    checks.written(self, "tau", checks.above, 0)
    checks.written(self, "alpha_bar_min", checks.in_range, 0, 1)

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at ``t`` in [0, 1]."""
    first, last = self._ends()
    now = jax.nn.sigmoid((self.start + jnp.asarray(t) * (self.end - self.start)) / self.tau)
    return jnp.sqrt((now - first) / jnp.maximum(last - now, jnp.asarray(self.alpha_bar_min) * (last - first)))

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    first, last = self._ends()
    now = last - (last - first) * sigma_to_alpha_bar(sigma)
    logit = jnp.log(now) - jnp.log1p(-now)
    return (logit * self.tau - self.start) / (self.end - self.start)

  def _ends(self) -> tuple[Array, Array]:
    return jax.nn.sigmoid(self.start / self.tau), jax.nn.sigmoid(self.end / self.tau)


@struct.dataclass
class EDM(_Continuous):
  r"""The levels of Karras et al. (2022, arXiv:2206.00364, eq. 5) as a function of continuous time.

  .. math:: \sigma(t) = (\sigma_{min}^{1/\rho} + t (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho}))^\rho

  Time runs upwards with noise, as in every schedule here; the paper's ``i / (N-1)`` is ``1 - t``.
  """

  sigma_min: Leaf = 0.002
  sigma_max: Leaf = 80.0
  rho: Leaf = 7.0

  def __post_init__(self):
    checks.rising(self, "sigma_min", "sigma_max", 0)
    checks.written(self, "rho", checks.above, 0)

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at ``t`` in [0, 1]."""
    low, high = self._ends()
    return (low + jnp.asarray(t) * (high - low)) ** self.rho

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    low, high = self._ends()
    return (jnp.asarray(sigma) ** (1 / self.rho) - low) / (high - low)

  def _ends(self) -> tuple[Array, Array]:
    power = 1 / self.rho
    return jnp.asarray(self.sigma_min) ** power, jnp.asarray(self.sigma_max) ** power


@struct.dataclass
class LogSNR(_Continuous):
  r"""``log_snr`` linear in time: ``sigma(t)`` is geometric between two ends.

  .. math:: \lambda(t) = \lambda_{max} + t (\lambda_{min} - \lambda_{max}), \quad \sigma = e^{-\lambda / 2}

  >>> float(LogSNR(-20.0, 20.0).sigma(0.5))
  1.0
  """

  log_snr_min: Leaf = -20.0
  log_snr_max: Leaf = 20.0

  def __post_init__(self):
    checks.rising(self, "log_snr_min", "log_snr_max")

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at ``t`` in [0, 1]."""
    return log_snr_to_sigma(self.log_snr_max + jnp.asarray(t) * self._span())

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    return (sigma_to_log_snr(sigma) - self.log_snr_max) / self._span()

  def _span(self) -> Leaf:
    return self.log_snr_min - self.log_snr_max


@struct.dataclass
class LogSNRCosine(_Continuous):
  r"""The cosine schedule truncated in log-SNR, from which the classifier-free guidance paper draws its noise levels.

  Ho & Salimans 2021 (arXiv:2207.12598, section 4): for ``u`` uniform in [0, 1],

  .. math::
    \lambda = -2 \log\tan(a u + b), \quad b = \arctan e^{-\lambda_{max} / 2}, \quad
    a = \arctan e^{-\lambda_{min} / 2} - b

  so that ``sigma = tan(a u + b)``.
  """

  log_snr_min: Leaf = -20.0
  log_snr_max: Leaf = 20.0

  def __post_init__(self):
    checks.rising(self, "log_snr_min", "log_snr_max")

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at ``t`` in [0, 1]."""
    low, high = self._ends()
    span = jnp.pi / 2 - low - high
    t = jnp.asarray(t)
    # tan of the angle as sin / cos, and cos by the angle left to pi / 2: each is exact at its own end.
    return jnp.sin(low + t * span) / jnp.sin(high + (1 - t) * span)

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    low, high = self._ends()
    return (jnp.arctan(sigma) - low) / (jnp.pi / 2 - low - high)

  def _ends(self) -> tuple[Array, Array]:
    """Give the angle at the least noise, and what the angle at the most leaves to pi / 2."""
    least = jnp.arctan(log_snr_to_sigma(self.log_snr_max))
    most = jnp.arctan(1 / log_snr_to_sigma(self.log_snr_min))
    return least, most


@struct.dataclass
class Flow(_Continuous):
  r"""The straight path of flow matching (Lipman et al. 2023, arXiv:2210.02747), ``(1 - t) x0 + t eps``.

  .. math:: \sigma(t) = \frac{t'}{1 - t'} = s \frac{t}{1 - t}, \quad t' = \frac{s t}{1 + (s - 1) t}

  with the time shift ``s`` of Esser et al. (2024, arXiv:2403.03206, eq. 23). Time 1 is the noise, whose level is
  infinite; it is cut off at ``sigma_max``.

  >>> [float(Flow(shift=3.0).sigma(t)) for t in (0.0, 0.5)]
  [0.0, 3.0]
  """

  shift: Leaf = 1.0
  sigma_max: Leaf = 1e4

  def __post_init__(self):
    checks.written(self, "shift", checks.above, 0)
    checks.written(self, "sigma_max", checks.above, 0)

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at ``t`` in [0, 1]."""
    t = jnp.asarray(t)
    return jnp.minimum(self.shift * t / jnp.maximum(1 - t, 1e-30), self.sigma_max)

  def inverse(self, sigma: ArrayLike) -> Array:
    """Give the time of a noise level; beyond the ends, where the formula leads."""
    sigma = jnp.asarray(sigma)
    return sigma / (self.shift + sigma)


@struct.dataclass
class LogNormal:
  r"""``log sigma ~ N(mean, std²)``, how EDM draws its training noise (arXiv:2206.00364, table 1)."""

  mean: Leaf = -1.2
  std: Leaf = 1.2

  def __post_init__(self):
    checks.written(self, "mean", checks.finite)
    checks.written(self, "std", checks.in_range, 0)

  def quantile(self, u: ArrayLike) -> Array:
    """Give the level below which a fraction ``u`` in (0, 1) of the draws fall."""
    return jnp.exp(self.mean + self.std * jax.scipy.special.ndtri(jnp.asarray(u)))


@struct.dataclass
class UniformTime:
  """Training draws the time of a schedule uniformly from a part of it, as Song et al. do from [1e-5, 1].

  Args:
    schedule: any continuous one.
    t_min: least time.
    t_max: largest time.

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
    checks.written(self, "t_max", checks.in_range, 0, 1)

  def quantile(self, u: ArrayLike) -> Array:
    """Give the level below which a fraction ``u`` in [0, 1] of the draws fall."""
    return self.schedule.sigma(self.t_min + jnp.asarray(u) * (self.t_max - self.t_min))


SCHEDULES: dict[str, type] = {
  "linear": Linear,
  "cosine": Cosine,
  "sigmoid": Sigmoid,
  "edm": EDM,
  "log-snr": LogSNR,
  "log-snr-cosine": LogSNRCosine,
  "flow": Flow,
}


def schedule(name: str, **options: ArrayLike) -> NoiseSchedule:
  """Make a continuous noise schedule by name.

  Raises:
    ValueError: for an unknown name or option (with the nearest), or one that is not finite.

  >>> schedule("log-snr", log_snr_min=-10.0).log_snr_min
  -10.0
  >>> schedule("cosin")
  Traceback (most recent call last):
  ...
  ValueError: unknown schedule 'cosin': did you mean 'cosine'? There are cosine, edm, flow, linear, ...
  """
  cls = checks.lookup("schedule", name, SCHEDULES)
  return cls(**checks.options(name, cls, {key: checks.finite(key, value) for key, value in options.items()}))
