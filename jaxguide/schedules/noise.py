"""Noise schedules: time to noise level, and back.

Everything is in ``sigma``, the standard deviation of the noise on a clean example, ``x = x0 + sigma * eps``. Other
conventions are functions of it. With the variance-preserving ``x_vp = alpha * x``:

    alpha_bar = alpha² = 1 / (1 + sigma²)        log_snr = log(alpha² / (1 - alpha²)) = -2 log sigma

A *noise schedule* maps time to noise. It has ``sigma(t)``, the inverse ``time(sigma)``, and ``quantile(u)``, the level
below which a fraction ``u`` of the noise levels lies if ``t`` is drawn uniformly, as in DDPM's training. Training needs
only ``quantile`` to draw noise levels; `LogNormal` has no other method.
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
  """Return ``sqrt((1 - alpha_bar) / alpha_bar)``, the noise level of DDPM's ``x_t = sqrt(ᾱ) x0 + sqrt(1-ᾱ) eps``.

  >>> float(alpha_bar_to_sigma(0.5))
  1.0
  """
  alpha_bar = jnp.asarray(alpha_bar)
  return jnp.sqrt((1 - alpha_bar) / alpha_bar)


def sigma_to_alpha_bar(sigma: ArrayLike) -> Array:
  """Return ``1 / (1 + sigma²)``, the inverse of `alpha_bar_to_sigma`."""
  return 1 / (1 + jnp.square(sigma))


def log_snr_to_sigma(log_snr: ArrayLike) -> Array:
  """Return ``exp(-log_snr / 2)``. ``log_snr`` is Ho & Salimans' λ (arXiv:2207.12598, section 2)."""
  return jnp.exp(-jnp.asarray(log_snr) / 2)


def sigma_to_log_snr(sigma: ArrayLike) -> Array:
  """Return ``-2 log sigma``, the inverse of `log_snr_to_sigma`."""
  return -2 * jnp.log(sigma)


# --- noise schedules ------------------------------------------------------------------------------


@runtime_checkable
class NoiseLevels(Protocol):
  """A distribution of noise levels for training, given by its quantile function."""

  def quantile(self, u: ArrayLike) -> Array:
    """Return the ``sigma`` below which a fraction ``u`` in (0, 1) of the draws lies."""
    ...


@runtime_checkable
class NoiseSchedule(NoiseLevels, Protocol):
  """A map from time to noise level, and its inverse. Times are in [0, 1], or in [0, T-1] for tables."""

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at time ``t``."""
    ...

  def time(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level, clipped to the schedule's range of times."""
    ...


class _Continuous:
  """A schedule with times in [0, 1]. Training draws ``t`` uniformly, so that its quantile function is ``sigma``."""

  def sigma(self, t: ArrayLike) -> Array:
    raise NotImplementedError

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
    raise NotImplementedError

  def time(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level, clipped to [0, 1]."""
    return jnp.clip(self.inverse(sigma), 0, 1)

  def quantile(self, u: ArrayLike) -> Array:
    """Return ``sigma(u)``: training draws ``t`` uniformly from [0, 1]."""
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
    """Make the schedule with ``sigma(t_min) = sigma_min`` and ``sigma(1) = sigma_max``.

    Karras et al. (2022, arXiv:2206.00364, appendix C.1) adapt Song et al.'s sampler to other noise ranges in this way.

    Args:
      sigma_min: the noise level at ``t_min``, above 0.
      sigma_max: the noise level at time 1, above ``sigma_min``.
      t_min: the time of ``sigma_min``, in (0, 1).

    Raises:
      ValueError: unless 0 < sigma_min < sigma_max.

    >>> schedule = Linear.between(0.02, 100.0)
    >>> [round(float(schedule.sigma(t)), 3) for t in (1e-3, 1.0)]
    [0.02, 100.0]
    """
    ends = checks.above("sigma_min", sigma_min, 0), checks.finite("sigma_max", sigma_max)
    if checks.is_concrete(ends) and not np.less(*ends).all():
      raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}")
    # The integrals of beta from 0 to t_min and to 1.
    integral_min, integral_max = (jnp.log1p(jnp.square(sigma)) for sigma in ends)
    slope = 2 * (integral_max - integral_min / t_min) / (1 - t_min)
    beta_min = integral_max - slope / 2
    return cls(beta_min, beta_min + slope)

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at time ``t`` in [0, 1]."""
    t = jnp.asarray(t)
    return jnp.sqrt(jnp.expm1(0.5 * (self.beta_max - self.beta_min) * t**2 + self.beta_min * t))

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
    integral = jnp.log1p(jnp.square(sigma))  # of beta from 0 to the time
    root = jnp.sqrt(jnp.square(self.beta_min) + 2 * (self.beta_max - self.beta_min) * integral)
    return 2 * integral / (root + self.beta_min)


@struct.dataclass
class Cosine(_Continuous):
  r"""Nichol & Dhariwal's cosine schedule (2021, arXiv:2102.09672, eq. 17), clipped to at most ``sigma_max``.

  .. math:: \bar\alpha(t) = \cos^2(\tfrac{t + s}{1 + s} \tfrac\pi2) / \cos^2(\tfrac{s}{1 + s} \tfrac\pi2)

  Without clipping, the level at ``t = 1`` is infinite. The paper's table avoids this with betas of at most 0.999.

  >>> float(Cosine().sigma(0.0)), round(float(Cosine().sigma(1.0)))
  (0.0, 10000)
  """

  s: Leaf = 0.008
  sigma_max: Leaf = 1e4

  def __post_init__(self):
    checks.number_field(self, "s", checks.in_range, 0)
    checks.number_field(self, "sigma_max", checks.above, 0)

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at time ``t`` in [0, 1]."""
    quarter = jnp.pi / 2
    # 1 - ᾱ as a product of sines. The difference of the cosines would lose its digits at small t.
    start, now = (jnp.asarray(u + self.s) / (1 + self.s) * quarter for u in (0.0, jnp.asarray(t)))
    noise = jnp.sin(now - start) * jnp.sin(now + start)
    return jnp.minimum(jnp.sqrt(noise) / jnp.maximum(jnp.cos(now), 1e-30), self.sigma_max)

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
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

  with ``s = start``, ``e = end``, and ``ᾱ`` clipped to at least ``alpha_bar_min``.
  """

  start: Leaf = -3.0
  end: Leaf = 3.0
  tau: Leaf = 1.0
  alpha_bar_min: Leaf = 1e-9

  def __post_init__(self):
    checks.rising(self, "start", "end")
    checks.number_field(self, "tau", checks.above, 0)
    checks.number_field(self, "alpha_bar_min", checks.in_range, 0, 1)

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at time ``t`` in [0, 1]."""
    first, last = self._ends()
    now = jax.nn.sigmoid((self.start + jnp.asarray(t) * (self.end - self.start)) / self.tau)
    return jnp.sqrt((now - first) / jnp.maximum(last - now, jnp.asarray(self.alpha_bar_min) * (last - first)))

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
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

  The noise increases with time, as in every schedule here. The paper's ``i / (N-1)`` is ``1 - t``.
  """

  sigma_min: Leaf = 0.002
  sigma_max: Leaf = 80.0
  rho: Leaf = 7.0

  def __post_init__(self):
    checks.rising(self, "sigma_min", "sigma_max", 0)
    checks.number_field(self, "rho", checks.above, 0)

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at time ``t`` in [0, 1]."""
    low, high = self._ends()
    return (low + jnp.asarray(t) * (high - low)) ** self.rho

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
    low, high = self._ends()
    return (jnp.asarray(sigma) ** (1 / self.rho) - low) / (high - low)

  def _ends(self) -> tuple[Array, Array]:
    power = 1 / self.rho
    return jnp.asarray(self.sigma_min) ** power, jnp.asarray(self.sigma_max) ** power


@struct.dataclass
class LogSNR(_Continuous):
  r"""A schedule whose ``log_snr`` is linear in time, so that ``log sigma`` is linear in time too.

  .. math:: \lambda(t) = \lambda_{max} + t (\lambda_{min} - \lambda_{max}), \quad \sigma = e^{-\lambda / 2}

  >>> float(LogSNR(-20.0, 20.0).sigma(0.5))
  1.0
  """

  log_snr_min: Leaf = -20.0
  log_snr_max: Leaf = 20.0

  def __post_init__(self):
    checks.rising(self, "log_snr_min", "log_snr_max")

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at time ``t`` in [0, 1]."""
    return log_snr_to_sigma(self.log_snr_max + jnp.asarray(t) * self._span())

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
    return (sigma_to_log_snr(sigma) - self.log_snr_max) / self._span()

  def _span(self) -> Leaf:
    return self.log_snr_min - self.log_snr_max


@struct.dataclass
class LogSNRCosine(_Continuous):
  r"""The cosine schedule truncated in log-SNR, which the paper on classifier-free guidance trains with.

  In Ho & Salimans 2021 (arXiv:2207.12598, section 4), for ``u`` uniform in [0, 1],

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
    """Return the noise level at time ``t`` in [0, 1]."""
    low, high = self._ends()
    span = jnp.pi / 2 - low - high
    t = jnp.asarray(t)
    # tan as sin / cos, with the cosine as the sine of the rest to pi / 2: each sine is accurate at its end of time.
    return jnp.sin(low + t * span) / jnp.sin(high + (1 - t) * span)

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
    low, high = self._ends()
    return (jnp.arctan(sigma) - low) / (jnp.pi / 2 - low - high)

  def _ends(self) -> tuple[Array, Array]:
    """Return the angle at the smallest noise, and the difference of pi / 2 and the angle at the largest noise."""
    smallest = jnp.arctan(log_snr_to_sigma(self.log_snr_max))
    rest = jnp.arctan(1 / log_snr_to_sigma(self.log_snr_min))
    return smallest, rest


@struct.dataclass
class Flow(_Continuous):
  r"""The straight path of flow matching (Lipman et al. 2023, arXiv:2210.02747), ``(1 - t) x0 + t eps``.

  .. math:: \sigma(t) = \frac{t'}{1 - t'} = s \frac{t}{1 - t}, \quad t' = \frac{s t}{1 + (s - 1) t}

  with the time shift ``s`` of Esser et al. (2024, arXiv:2403.03206, eq. 23). At time 1 the path is pure noise, whose
  level is infinite; the levels are clipped to at most ``sigma_max``.

  >>> [float(Flow(shift=3.0).sigma(t)) for t in (0.0, 0.5)]
  [0.0, 3.0]
  """

  shift: Leaf = 1.0
  sigma_max: Leaf = 1e4

  def __post_init__(self):
    checks.number_field(self, "shift", checks.above, 0)
    checks.number_field(self, "sigma_max", checks.above, 0)

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at time ``t`` in [0, 1]."""
    t = jnp.asarray(t)
    return jnp.minimum(self.shift * t / jnp.maximum(1 - t, 1e-30), self.sigma_max)

  def inverse(self, sigma: ArrayLike) -> Array:
    """Return the time of a noise level. For levels out of range, the formula may give times outside [0, 1]."""
    sigma = jnp.asarray(sigma)
    return sigma / (self.shift + sigma)


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
    ValueError: for an unknown name (the message has the nearest one), an unknown option, or a value that is not finite
      or out of range.

  >>> schedule("log-snr", log_snr_min=-10.0).log_snr_min
  -10.0
  >>> schedule("cosin")
  Traceback (most recent call last):
  ...
  ValueError: unknown schedule 'cosin': did you mean 'cosine'? There are cosine, edm, flow, linear, ...
  """
  cls = checks.lookup("schedule", name, SCHEDULES)
  return cls(**checks.options(name, cls, {key: checks.finite(key, value) for key, value in options.items()}))
