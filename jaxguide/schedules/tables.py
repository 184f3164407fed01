"""Discrete processes: tables of noise levels, made of betas as DDPM has them."""

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
  """A discrete process of ``T`` steps, as DDPM trains it: ``t`` in [0, T-1], ``sigmas`` rising.

  ``sigma`` and ``time`` interpolate ``log sigma`` linearly between the steps, so that a network trained on the table
  can be asked about any level between; training draws the steps themselves, each as often.

  >>> table = Table.from_betas(linear_betas(1000))
  >>> float(table.time(table.sigma(250)))
  250.0
  """

  sigmas: Leaf

  def __post_init__(self):
    if isinstance(self.sigmas, np.ndarray) or checks.is_concrete(self.sigmas):
      levels = np.asarray(self.sigmas)
      if levels.ndim != 1 or not levels.size or not (np.diff(levels) >= 0).all() or not (levels >= 0).all():
        raise ValueError("sigmas of a table must be one axis of levels that rise, the first at least 0")

  @classmethod
  def from_betas(cls, betas: ArrayLike) -> "Table":
    """Make the table of ``ᾱ_t = prod_{s<=t} (1 - beta_s)`` (Ho et al. 2020, arXiv:2006.11239), in float64.

    Where no signal is left at the end (Lin et al. 2024, arXiv:2305.08891) the last beta is 1 and its level infinite. A
    walk from a large one is the same: give ``1 - 1e-6`` in its stead.

    Args:
      betas: (T,), each in (0, 1).

    Raises:
      ValueError: if a beta lies outside (0, 1) or there is no axis of at least one.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0 or not ((betas > 0) & (betas < 1)).all():
      raise ValueError("betas must be one axis of numbers between 0 and 1, both excluded")
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return cls(np.sqrt(np.expm1(-log_alpha_bar)))

  def respaced(self, spec: str) -> "Table":
    """Make the process that visits some of the steps, as `spaced_timesteps` chooses them.

    >>> Table.from_betas(linear_betas(1000)).respaced("ddim25").num_steps
    25
    """
    return Table(self.sigmas[spaced_timesteps(self.num_steps, spec)])

  @property
  def alpha_bar(self) -> np.ndarray:
    """(T,) the papers' cumulative products of ``1 - beta``, in float64."""
    return 1 / (1 + np.square(np.asarray(self.sigmas, np.float64)))

  @property
  def betas(self) -> np.ndarray:
    """(T,) in float64, the inverse of `from_betas`."""
    sigmas = np.asarray(self.sigmas, np.float64)
    below = np.append(0, sigmas[:-1])
    return (sigmas - below) * (sigmas + below) / (1 + sigmas**2)

  @property
  def num_steps(self) -> int:
    """The number of steps, T."""
    return self.sigmas.shape[0]

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at step ``t`` in [0, T-1], which need not be whole."""
    t = jnp.clip(jnp.asarray(t, float), 0, self.num_steps - 1)
    below = jnp.floor(t).astype(int)
    level, log_ratio = self._rise(below)
    return level * jnp.exp((t - below.astype(t.dtype)) * log_ratio)

  def time(self, sigma: ArrayLike) -> Array:
    """Give the (fractional) step in [0, T-1] of a noise level; exactly whole for the table's own."""
    sigmas = jnp.asarray(self.sigmas)
    sigma = jnp.clip(jnp.asarray(sigma, sigmas.dtype), sigmas[0], sigmas[-1])
    below = jnp.searchsorted(sigmas, sigma, side="right") - 1
    level, log_ratio = self._rise(below)
    return below.astype(level.dtype) + jnp.log1p((sigma - level) / level) / jnp.where(log_ratio > 0, log_ratio, 1)

  def quantile(self, u: ArrayLike) -> Array:
    """Give the level of step ``floor(u T)``: training draws the steps uniformly."""
    return jnp.asarray(self.sigmas)[self.step(u)]

  def step(self, u: ArrayLike) -> Array:
    """Give step ``floor(u T)``, a whole number, for ``u`` in [0, 1]."""
    return jnp.clip(jnp.floor(jnp.asarray(u) * self.num_steps).astype(int), 0, self.num_steps - 1)

  def _rise(self, step):
    """Level of a step, and by how much the logarithm of the next is greater; 0 after the last."""
    sigmas = jnp.asarray(self.sigmas)
    level = sigmas[step]
    return level, jnp.log1p((sigmas[jnp.minimum(step + 1, self.num_steps - 1)] - level) / level)


def check_table(table: Any) -> Table:
  """Give ``table`` back if it is a `Table`, and not its name or a continuous schedule.

  Raises:
    TypeError: if it is none.

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
  """Choose steps of a discrete process as OpenAI's guided-diffusion writes it on its command lines.

  Args:
    total: number of steps of the process, T.
    spec: ``250``: as many, spread evenly from 0 to T-1; ``10,15,20``: as many in each of three equal sections;
      ``ddim25``: with the first whole stride from 0 that makes as many, as the DDIM paper has it (as a rule T-1 is not
      visited).

  Returns:
    The steps, rising; rounded half to even.

  Raises:
    ValueError: for a spec of another form, more steps in a section than it has, or a count that no whole stride makes.

  >>> spaced_timesteps(1000, "ddim5").tolist(), spaced_timesteps(9, "2,1").tolist()
  ([0, 200, 400, 600, 800], [0, 4, 5])
  """
  total = checks.at_least("total", total, 1)
  if re.fullmatch(r"ddim[0-9]+", spec):
    count = checks.at_least("the count after ddim", int(spec[4:]), 1)
    for stride in range(1, total + 1):
      if len(range(0, total, stride)) == count:
        return np.arange(0, total, stride)
    raise ValueError(f"no whole stride through {total} steps visits {count} of them, as {spec!r} asks")
  if not re.fullmatch(r"[0-9]+(,[0-9]+)*", spec):
    raise ValueError(
      f"timesteps are chosen by a count (250), a count for each section (10,15,20) or ddim25; got {spec!r}"
    )
  counts = [checks.at_least("each count", int(count), 1) for count in spec.split(",")]
  size, longer = divmod(total, len(counts))
  chosen: list[int] = []
  first = 0
  for section, count in enumerate(counts):
    length = size + (section < longer)
    if count > length:
      raise ValueError(f"section {section} of {spec!r} has {length} steps, of which {count} cannot be chosen")
    fraction = (length - 1) / max(count - 1, 1)
    # Summed up and not multiplied: the rounding of the published steps depends on it.
    chosen += [first + round(position) for position in itertools.accumulate([0.0] + [fraction] * (count - 1))]
    first += length
  return np.array(chosen)


MOST_STEPS = 1_000_000
"""The most steps of a table or a grid."""


def at_most(name: str, steps: int) -> int:
  """Give a number of steps back if it is a whole number from 1 to `MOST_STEPS`."""
  if checks.at_least(name, steps, 1) > MOST_STEPS:
    raise ValueError(f"{name} must be a whole number from 1 to {MOST_STEPS}, got {steps}")
  return int(steps)


def linear_betas(steps: int) -> np.ndarray:
  """Ho et al.'s betas, 1e-4 to 0.02 over 1000 steps, scaled to any number of steps (arXiv:2006.11239, section 4).

  Returns:
    (steps,) in float64.

  >>> linear_betas(1000)[[0, -1]]
  array([0.0001, 0.02  ])
  """
  scale = 1000 / at_most("steps", steps)
  return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, steps), 0.999)


def betas_of(schedule: NoiseSchedule, steps: int, max_beta: ArrayLike = 0.999) -> np.ndarray:
  """Cut a continuous schedule into a table: ``beta_i = 1 - ᾱ((i+1)/T) / ᾱ(i/T)``, at most ``max_beta``.

  Returns:
    (steps,) betas for `Table.from_betas`.

  Raises:
    TypeError: for a schedule's name.
  """
  checks.schedule(schedule)
  steps = at_most("steps", steps)
  # Also while a program that a table is made in is being traced.
  with jax.enable_x64(True), jax.ensure_compile_time_eval():
    t = jnp.linspace(0, 1, steps + 1, dtype=jnp.float64)
    alpha_bar = np.asarray(sigma_to_alpha_bar(schedule.sigma(t)))
  return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def cosine_betas(steps: int) -> np.ndarray:
  """Nichol & Dhariwal's table (arXiv:2102.09672, eq. 17): the uncut `Cosine`, each beta at most 0.999.

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
    ValueError: for an unknown name, with the nearest, or fewer than one step.

  >>> table("linear", 1000).num_steps
  1000
  """
  return Table.from_betas(checks.lookup("schedule of discrete steps", name, BETAS)(steps))
