"""Discrete processes: tables of noise levels, computed from betas as in DDPM."""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxguide._core import checks, struct
from jaxguide._core.typing import ArrayLike, Leaf
from jaxguide.schedules.noise import Cosine, NoiseSchedule, sigma_to_alpha_bar


@struct.dataclass
class Table:
  """A discrete process of ``T`` steps, as in DDPM's training: ``t`` in [0, T-1], with increasing ``sigmas``.

  ``sigma`` and ``time`` interpolate ``log sigma`` linearly between the steps, so that a network trained on the table
  can be evaluated at any level between them. Training draws whole steps, all with the same probability.

  >>> table = Table.from_betas(linear_betas(1000))
  >>> float(table.time(table.sigma(250)))
  250.0
  """

  sigmas: Leaf

  def __post_init__(self):
    if isinstance(self.sigmas, np.ndarray) or checks.is_concrete(self.sigmas):
      levels = np.asarray(self.sigmas)
      if levels.ndim != 1 or not levels.size or not (np.diff(levels) >= 0).all() or not (levels >= 0).all():
        raise ValueError("the sigmas of a table must have one axis of increasing levels, the first at least 0")

  @classmethod
  def from_betas(cls, betas: ArrayLike) -> "Table":
    """Make the table of ``ᾱ_t = prod_{s<=t} (1 - beta_s)`` (Ho et al. 2020, arXiv:2006.11239), in float64.

    A process that ends without signal (Lin et al. 2024, arXiv:2305.08891) has a last beta of 1 and an infinite last
    level. Pass ``1 - 1e-6`` instead: sampling from its large level gives the same.

    Args:
      betas: (T,), each in (0, 1).

    Raises:
      ValueError: if a beta lies outside (0, 1), or betas is not one axis of at least one number.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0 or not ((betas > 0) & (betas < 1)).all():
      raise ValueError("betas must have one axis of numbers between 0 and 1, both excluded")
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return cls(np.sqrt(np.expm1(-log_alpha_bar)))

  def respaced(self, spec: str) -> "Table":
    """Make the process of some of the steps, which `spaced_timesteps` chooses.

    >>> Table.from_betas(linear_betas(1000)).respaced("ddim25").num_steps
    25
    """
    return Table(self.sigmas[spaced_timesteps(self.num_steps, spec)])

  @property
  def alpha_bar(self) -> np.ndarray:
    """ᾱ, the cumulative products of ``1 - beta`` in the papers: (T,) in float64."""
    return 1 / (1 + np.square(np.asarray(self.sigmas, np.float64)))

  @property
  def betas(self) -> np.ndarray:
    """The betas, (T,) in float64. This is the inverse of `from_betas`."""
    sigmas = np.asarray(self.sigmas, np.float64)
    sigmas_before = np.append(0, sigmas[:-1])
    return (sigmas - sigmas_before) * (sigmas + sigmas_before) / (1 + sigmas**2)

  @property
  def num_steps(self) -> int:
    """The number of steps, T."""
    return self.sigmas.shape[0]

  def sigma(self, t: ArrayLike) -> Array:
    """Return the noise level at step ``t`` in [0, T-1], which may be fractional."""
    t = jnp.clip(jnp.asarray(t, float), 0, self.num_steps - 1)
    step = jnp.floor(t).astype(int)
    level, log_ratio = self._level_and_log_ratio(step)
    return level * jnp.exp((t - step.astype(t.dtype)) * log_ratio)

  def time(self, sigma: ArrayLike) -> Array:
    """Return the fractional step in [0, T-1] of a noise level. It is exactly whole for a level of the table."""
    sigmas = jnp.asarray(self.sigmas)
    sigma = jnp.clip(jnp.asarray(sigma, sigmas.dtype), sigmas[0], sigmas[-1])
    step = jnp.searchsorted(sigmas, sigma, side="right") - 1
    level, log_ratio = self._level_and_log_ratio(step)
    return step.astype(level.dtype) + jnp.log1p((sigma - level) / level) / jnp.where(log_ratio > 0, log_ratio, 1)

  def quantile(self, u: ArrayLike) -> Array:
    """Return the level of step ``floor(u T)``: training draws the steps uniformly."""
    return jnp.asarray(self.sigmas)[self.step(u)]

  def step(self, u: ArrayLike) -> Array:
    """Return the step ``floor(u T)``, a whole number, for ``u`` in [0, 1]."""
    return jnp.clip(jnp.floor(jnp.asarray(u) * self.num_steps).astype(int), 0, self.num_steps - 1)

  def _level_and_log_ratio(self, step):
    """Return the level of a step, and the logarithm of the next level over it, which is 0 for the last step."""
    sigmas = jnp.asarray(self.sigmas)
    level = sigmas[step]
    return level, jnp.log1p((sigmas[jnp.minimum(step + 1, self.num_steps - 1)] - level) / level)


def check_table(table: Any) -> Table:
  """Check that ``table`` is a `Table`, not a name or a continuous schedule, and return it.

  Raises:
    TypeError: if it is something else.

  >>> check_table("linear")
  Traceback (most recent call last):
  ...
  TypeError: table must be a schedule of discrete steps, such as jaxguide.schedules.table('linear', 1000), got 'linear'
  """
  if not isinstance(table, Table):
    raise TypeError(
      "table must be a schedule of discrete steps, such as jaxguide.schedules.table('linear', 1000), got "
      f"{table if isinstance(table, type) else repr(table)}"
    )
  return table


def spaced_timesteps(total: int, spec: str) -> np.ndarray:
  """Choose steps of a discrete process by a text, in the syntax of OpenAI's guided-diffusion.

  Args:
    total: number of steps of the process, T.
    spec: ``250`` is 250 steps at equal distances from 0 to T-1. ``10,15,20`` is 10, 15 and 20 steps in three sections
      of equal length. ``ddim25`` is 0, k, 2k, ... with the smallest whole stride k that gives 25 steps, as in the DDIM
      paper; it usually does not visit T-1.

  Returns:
    The steps, increasing, rounded half to even.

  Raises:
    ValueError: for a spec of another form, more steps in a section than it has, or ``ddim`` with a number of steps for
      which there is no whole stride.

  >>> spaced_timesteps(1000, "ddim5").tolist(), spaced_timesteps(9, "2,1").tolist()
  ([0, 200, 400, 600, 800], [0, 4, 5])
  """
  total = checks.at_least("total", total, 1)
  if re.fullmatch(r"ddim[0-9]+", spec):
    count = checks.at_least("the count after ddim", int(spec[4:]), 1)
    for stride in range(1, total + 1):
      if len(range(0, total, stride)) == count:
        return np.arange(0, total, stride)
    raise ValueError(f"no whole stride visits exactly {count} of {total} steps, got {spec!r}: choose another number")
  if not re.fullmatch(r"[0-9]+(,[0-9]+)*", spec):
    raise ValueError(f"steps must be a number (250), a number for each section (10,15,20) or like ddim25, got {spec!r}")
  counts = [checks.at_least("each count", int(count), 1) for count in spec.split(",")]
  size, longer = divmod(total, len(counts))
  chosen: list[int] = []
  first = 0
  for section, count in enumerate(counts):
    length = size + (section < longer)
    if count > length:
      raise ValueError(f"section {section} of {spec!r} has only {length} steps, so {count} of them cannot be chosen")
    distance = (length - 1) / max(count - 1, 1)
    # The distances are added up, not multiplied: the published steps have the rounding errors of the sum.
    chosen += [first + round(position) for position in itertools.accumulate([0.0] + [distance] * (count - 1))]
    first += length
  return np.array(chosen)


MOST_STEPS = 1_000_000
"""The largest number of steps of a table or a grid."""


def at_most(name: str, steps: int) -> int:
  """Check that a number of steps is a whole number from 1 to `MOST_STEPS`, and return it."""
  if checks.at_least(name, steps, 1) > MOST_STEPS:
    raise ValueError(f"{name} must be a whole number from 1 to {MOST_STEPS}, got {steps}")
  return int(steps)


def linear_betas(steps: int) -> np.ndarray:
  """Return Ho et al.'s betas (arXiv:2006.11239, section 4): 1e-4 to 0.02 for 1000 steps, scaled for other numbers.

  Returns:
    (steps,) in float64.

  >>> linear_betas(1000)[[0, -1]]
  array([0.0001, 0.02  ])
  """
  scale = 1000 / at_most("steps", steps)
  return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, steps), 0.999)


def betas_of(schedule: NoiseSchedule, steps: int, max_beta: ArrayLike = 0.999) -> np.ndarray:
  """Return the betas of a continuous schedule, ``beta_i = 1 - ᾱ((i+1)/T) / ᾱ(i/T)``, each at most ``max_beta``.

  Returns:
    (steps,) betas for `Table.from_betas`.

  Raises:
    TypeError: if ``schedule`` is not a schedule, for instance a name.
  """
  checks.schedule(schedule)
  steps = at_most("steps", steps)
  # The values are computed at once, even if this is called while jit traces a function.
  with jax.enable_x64(True), jax.ensure_compile_time_eval():
    t = jnp.linspace(0, 1, steps + 1, dtype=jnp.float64)
    alpha_bar = np.asarray(sigma_to_alpha_bar(schedule.sigma(t)))
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def cosine_betas(steps: int) -> np.ndarray:
  """Return Nichol & Dhariwal's betas (arXiv:2102.09672, eq. 17): `Cosine` without ``sigma_max``, betas at most 0.999.

  Returns:
    (steps,) in float64.

  >>> float(cosine_betas(1000)[-1])
  0.999
  """
  return betas_of(Cosine(sigma_max=np.inf), steps)


BETAS: dict[str, Callable[[int], np.ndarray]] = {"linear": linear_betas, "cosine": cosine_betas}


def table(name: str, steps: int) -> Table:
  """Make a discrete process by the name of its betas, ``linear`` or ``cosine``.

  Raises:
    ValueError: for an unknown name (the message has the nearest one), or fewer than one step.

  >>> table("linear", 1000).num_steps
  1000
  """
  return Table.from_betas(checks.lookup("schedule of discrete steps", name, BETAS)(steps))
