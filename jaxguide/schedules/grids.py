"""Grids: the noise levels that samplers walk, ``steps + 1`` of them, decreasing and ending in 0."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxguide import checks
from jaxguide.schedules.noise import EDM, NoiseSchedule
from jaxguide.schedules.tables import Table, spaced_timesteps
from jaxguide.typing import ArrayLike


def _bounds(steps: int, sigma_min: ArrayLike, sigma_max: ArrayLike) -> int:
  ends = checks.finite("sigma_min", sigma_min), checks.finite("sigma_max", sigma_max)
  if checks.is_concrete(ends) and not 0 < np.asarray(sigma_min) < np.asarray(sigma_max):
    raise ValueError(f"sigma_min must be above 0 and below sigma_max, got {sigma_min} and {sigma_max}")
  return checks.at_least("steps", steps, 1)


def _end_in_zero(sigmas: Array) -> Array:
  return jnp.append(sigmas, 0)


def karras(
  steps: int,
  sigma_min: ArrayLike = 0.002,
  sigma_max: ArrayLike = 80.0,
  rho: ArrayLike = 7.0,
) -> Float[Array, " levels"]:
  """The grid of Karras et al. (2022, arXiv:2206.00364, eq. 5): uniform in ``sigma**(1/rho)``, then 0.

  Args:
    steps: number of steps, at least 1.
    sigma_min: the last level above 0.
    sigma_max: the first level. Data in [-1, 1] are drowned at 80.
    rho: 1 is uniform in sigma; more puts more of the steps at small noise.

  Returns:
    (steps + 1,) decreasing levels.

  Raises:
    ValueError: for steps below 1, or not 0 < sigma_min < sigma_max, or rho below 1.

  >>> [round(float(s), 3) for s in karras(3)]
  [80.0, 2.515, 0.002, 0.0]
  """
  steps = _bounds(steps, sigma_min, sigma_max)
  grid = EDM(sigma_min, sigma_max, checks.in_range("rho", rho, 1))
  return _end_in_zero(grid.sigma(jnp.linspace(1, 0, steps)))


def log_snr_uniform(steps: int, sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0) -> Float[Array, " levels"]:
  """A grid uniform in ``log_snr = -2 log sigma`` (geometric in sigma), then 0.

  Lu et al. (2022, arXiv:2206.00927) walk it; its steps in ``log sigma`` are equal, which multistep solvers like.

  Args:
    steps: number of steps, at least 1.
    sigma_min: the last level above 0.
    sigma_max: the first level.

  Returns:
    (steps + 1,) decreasing levels.

  >>> [round(float(s), 3) for s in log_snr_uniform(3, 0.01, 100.0)]
  [100.0, 1.0, 0.01, 0.0]
  """
  steps = _bounds(steps, sigma_min, sigma_max)
  low, high = jnp.log(sigma_min), jnp.log(sigma_max)
  return _end_in_zero(jnp.exp(high + jnp.linspace(0, 1, steps) * (low - high)))


def from_schedule(schedule: NoiseSchedule, steps: int) -> Float[Array, " levels"]:
  """A grid uniform in the time of a continuous schedule: ``sigma(1), sigma(1 - 1/steps), ..., sigma(1/steps), 0``.

  >>> from jaxguide.schedules import Linear
  >>> [round(float(s), 1) for s in from_schedule(Linear(), 2)]
  [152.2, 3.4, 0.0]
  """
  steps = checks.at_least("steps", steps, 1)
  if isinstance(schedule, Table):
    raise TypeError("a table's time is a step and not in [0, 1]: use respaced(table, steps)")
  return _end_in_zero(schedule.sigma(jnp.linspace(1, 1 / steps, steps)))


def respaced(table: Table, steps: int | str | Sequence[int] | np.ndarray) -> Float[Array, " levels"]:
  """A grid that visits chosen steps of a discrete process, from the noisiest down, then 0.

  Args:
    table: the process that the network was trained on.
    steps: how many, spread evenly from 0 to T-1 (1 visits the last); or a text, ``ddim25`` or ``10,10,10``, as in
      `spaced_timesteps`; or the steps themselves, (n,) whole numbers in [0, T-1] in any order.

  Returns:
    (n + 1,) decreasing levels.

  Raises:
    ValueError: for more steps than the table has, a step outside it, or one named twice.

  >>> from jaxguide.schedules import linear_betas
  >>> table = Table.from_betas(linear_betas(1000))
  >>> respaced(table, [0, 999]).shape, respaced(table, "ddim25").shape
  ((3,), (26,))
  """
  total = table.num_steps
  if isinstance(steps, str):
    chosen = spaced_timesteps(total, steps)
  elif isinstance(steps, int | np.integer):
    count = checks.at_least("steps", steps, 1)
    if count > total:
      raise ValueError(f"steps must be at most the {total} of the table, got {count}")
    chosen = spaced_timesteps(total, str(count)) if count > 1 else np.array([total - 1])
  else:
    chosen = np.asarray(steps)
    if chosen.size == 0:
      raise ValueError("there must be at least one step to visit")
    if not np.issubdtype(chosen.dtype, np.integer):
      raise ValueError(f"the steps to visit must be whole numbers, got {chosen.dtype}")
    if chosen.min() < 0 or chosen.max() >= total:
      raise ValueError(f"the steps to visit must lie in 0 to {total - 1}")
    if np.unique(chosen).size != chosen.size:
      raise ValueError("the steps to visit must differ from each other")
  order = np.sort(chosen.astype(int))[::-1]
  return _end_in_zero(jnp.asarray(table.sigmas)[order.copy()])


GRIDS = {"karras": karras, "log-snr": log_snr_uniform}
"""Grids by the names that the command line takes; each is a function of ``(steps, sigma_min, sigma_max)``."""
