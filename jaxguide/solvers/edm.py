"""The stochastic sampler of EDM, and the second-order methods around it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, struct
from jaxguide._core.typing import ArrayLike, Key, Leaf, Scalar
from jaxguide.schedules import Table
from jaxguide.solvers.base import MOST_S_NOISE, Denoise, Memoryless, State, draw

MOST_GAMMA = math.sqrt(2) - 1
MOST_CHURN = 10_000.0  # An upper bound, to catch mistakes; the paper's largest S_churn is 100.


@struct.dataclass
class EDMStochastic(Memoryless):
  r"""The stochastic sampler of Karras et al. (2022, arXiv:2206.00364, Algorithm 2): add noise, then step down.

  .. math::
    \hat\sigma = (1 + \gamma) \sigma, \quad
    \hat x = x + S_{noise} \sqrt{\hat\sigma^2 - \sigma^2}\, z, \quad
    x' = \hat x + (\sigma' - \hat\sigma)
      \Big(\big(1 - \tfrac{1}{2 \alpha}\big) d(\hat x, \hat\sigma)
      + \tfrac{1}{2 \alpha} d(x_\alpha, \sigma_\alpha)\Big)

  with the slope ``d(x, σ) = (x - D(x, σ)) / σ``. ``x_α`` is the point that the first slope reaches from ``x̂`` after the
  fraction ``α`` of the step. The last step uses only the first slope. With ``gamma = 0`` and the other defaults it is
  `Heun`.

  The paper's ``S_churn`` is divided by the number of steps of the grid: see `from_churn`.

  Args:
    gamma: relative increase of the noise level before a step, in [0, √2 - 1].
    s_min: the level is increased only from ``s_min`` on; at least 0.
    s_max: the level is increased only up to ``s_max``; may be infinite.
    s_noise: factor on the added noise, at least 0. The paper uses slightly more than 1, to compensate for a denoiser
      that removes too much noise.
    alpha: where the second slope is evaluated, in (0, 1]: 1 is Heun's method, 1/2 the midpoint method (appendix D.2).
      None is Euler's method, which has no second slope and is of order 1.
    schedule: the time variable in which steps are straight lines, a continuous schedule with level 0 at time 0. The
      default None is sigma itself, as in EDM and DDIM. Song et al.'s samplers (table 1) use ``Linear()`` and
      ``EDM(0, 1, 1/2)``, which is ``σ = √t``. With a schedule, the last step need not end on x0.
    variance_preserving: whether steps are straight lines in ``x / √(1 + σ²)`` instead of ``x`` (VP of table 1).

  Raises:
    ValueError: if a number is out of range, or ``s_min`` is above ``s_max``.
    TypeError: if ``schedule`` is a table.

  >>> EDMStochastic.from_churn(40, num_steps=256, s_min=0.05, s_max=50.0, s_noise=1.003).gamma
  0.15625
  """

  gamma: Leaf = 0.0
  s_min: Leaf = 0.0
  s_max: Leaf = math.inf
  s_noise: Leaf = 1.0
  alpha: Leaf = 1.0
  schedule: Leaf = None
  variance_preserving: bool = struct.field(pytree_node=False, default=False)
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "gamma", checks.in_range, 0, MOST_GAMMA)
    checks.number_field(self, "s_min", checks.in_range, 0)
    checks.number_field(self, "s_max", _not_negative)
    checks.number_field(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)
    checks.number_field(self, "alpha", _fraction)
    bounds = self.s_min, self.s_max
    if all(isinstance(bound, float) for bound in bounds) and bounds[0] > bounds[1]:
      raise ValueError(f"s_min must be at most s_max, got {bounds[0]} and {bounds[1]}: no noise would be added")
    if isinstance(self.schedule, Table):
      raise TypeError("schedule must be continuous, got a table: give a schedule, or None for sigma itself")

  @classmethod
  def from_churn(cls, s_churn: ArrayLike, num_steps: int, **options: Any) -> EDMStochastic:
    """Make the solver with the paper's ``gamma``, ``min(S_churn / N, √2 - 1)``.

    Args:
      s_churn: amount of noise that all steps add together, at least 0. The paper uses 40 for ImageNet-64 in 256 steps,
        and 30 to 80 for CIFAR-10.
      num_steps: N, the number of steps of the grid (one less than its number of levels).
      **options: the other fields.

    Raises:
      ValueError: if ``s_churn`` is negative or above `MOST_CHURN`, or ``num_steps`` below 1.
    """
    s_churn = checks.in_range("s_churn", s_churn, 0)
    if checks.is_concrete(s_churn) and np.max(s_churn) > MOST_CHURN:
      raise ValueError(f"s_churn must be at most {MOST_CHURN:g}, got {s_churn}: the paper uses at most 100")
    gamma = s_churn / checks.at_least("num_steps", num_steps, 1)
    return cls(min(gamma, MOST_GAMMA) if isinstance(gamma, float) else jnp.minimum(gamma, MOST_GAMMA), **options)

  @property
  def order(self) -> int:
    """The order of the deterministic part."""
    return 1 if self.alpha is None else 2

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with two evaluations. The last step has one."""
    x, sigma_hat = self._churn(state.x, sigma, key)

    def slope(y, t):
      """Return dy/dt by equation 4 of the paper for ``y = s(t) x``, and x0."""
      (sigma, s), (sigma_rate, s_rate) = jax.jvp(self._path, (t,), (jnp.ones_like(t),))
      x0 = denoise(y / s, sigma)
      return (s_rate / s + sigma_rate / sigma) * y - sigma_rate * s / sigma * x0, x0

    t = self._time(sigma_hat)
    y, h = self._scale(sigma_hat) * x, self._time(sigma_next) - t
    d, x0 = slope(y, t)

    def correct(y):
      alpha = jnp.asarray(self.alpha, x.dtype)
      d_alpha, _ = slope(y + alpha * h * d, t + alpha * h)
      return y + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_alpha)

    def euler(y):
      return y + h * d

    y = euler(y) if self.alpha is None else jax.lax.cond(sigma_next > 0, correct, euler, y)
    return State(y / self._scale(sigma_next), x0)

  def _churn(self, x, sigma, key):
    """Add noise to ``x``, and return it with its increased level."""
    gamma, s_min, s_max, s_noise = (jnp.asarray(a, x.dtype) for a in (self.gamma, self.s_min, self.s_max, self.s_noise))
    gamma = jnp.where((s_min <= sigma) & (sigma <= s_max), gamma, 0)
    # Without the conditions the gradient of the root would be infinite at 0.
    rise = jnp.where(gamma > 0, jnp.sqrt(jnp.where(gamma > 0, gamma * (2 + gamma), 1)), 0)
    return x + s_noise * rise * sigma * draw(key, x), sigma * (1 + gamma)

  def _time(self, sigma):
    if self.schedule is None:
      return sigma
    # Level 0 is time 0. There the formula of the inverse need not be defined.
    positive = sigma > 0
    return jnp.where(positive, self.schedule.inverse(jnp.where(positive, sigma, 1)), 0)

  def _scale(self, sigma):
    return 1 / jnp.sqrt(1 + sigma**2) if self.variance_preserving else jnp.ones_like(sigma)

  def _path(self, t):
    """Return ``sigma(t)`` and ``s(t)``."""
    sigma = t if self.schedule is None else self.schedule.sigma(t)
    return sigma, self._scale(sigma)


def _not_negative(name, value):
  value = checks.as_float(name, value)
  if not value >= 0:
    raise ValueError(f"{name} must be at least 0, got {value}")
  return value


def _fraction(name, value):
  value = checks.as_float(name, value)
  if not 0 < value <= 1:
    raise ValueError(f"{name} must be above 0 and at most 1, or None for Euler's method; got {value}")
  return value
