"""Grids: the ``steps + 1`` noise levels that a sampler visits. They decrease and end in 0.

If the ends are plain numbers, the levels are computed in NumPy's float64 and then rounded. In float32, powers have
errors of several units in the last place, which are visible in a trajectory at large noise.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxguide._core import checks
from jaxguide._core.typing import ArrayLike
from jaxguide.schedules.noise import NoiseSchedule
from jaxguide.schedules.tables import Table, at_most, check_table, cosine_betas, spaced_timesteps

MOST_RHO = 1000.0
"""The largest rho. At some hundreds the grid is close to `log_snr_uniform`; far above, rounding errors dominate."""


def _check_steps_and_ends(steps: int, sigma_min: ArrayLike, sigma_max: ArrayLike) -> int:
  ends = checks.finite("sigma_min", sigma_min), checks.finite("sigma_max", sigma_max)
  if checks.is_concrete(ends) and not 0 < np.asarray(sigma_min) < np.asarray(sigma_max):
    raise ValueError(f"sigma_min must be above 0 and below sigma_max, got {sigma_min} and {sigma_max}")
  return at_most("steps", steps)


def _append_zero(sigmas: ArrayLike) -> Array:
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
    sigma_max: the first level. At 80, data in [-1, 1] are invisible under the noise.
    rho: 1 is uniform in sigma. A larger rho places more of the steps at small noise.

  Returns:
    (steps + 1,) decreasing levels.

  Raises:
    ValueError: unless steps is at least 1, 0 < sigma_min < sigma_max and 1 <= rho <= `MOST_RHO`.

  >>> [round(float(s), 3) for s in karras(3)]
  [80.0, 2.515, 0.002, 0.0]
  """
  ramp = np.linspace(0, 1, _check_steps_and_ends(steps, sigma_min, sigma_max))
  rho = checks.in_range("rho", rho, 1)
  if checks.is_concrete(rho) and np.max(rho) > MOST_RHO:
    raise ValueError(f"rho must be at most {MOST_RHO:g}, got {rho}: use log_snr_uniform, the limit of large rho")
  first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  return _append_zero((first + ramp * (last - first)) ** rho)


def log_snr_uniform(steps: int, sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0) -> Float[Array, " levels"]:
  """The exponential grid: uniform in ``log_snr = -2 log sigma`` (geometric in sigma), then 0.

  k-diffusion and diffusers call it exponential; diffusers' ``use_lu_lambdas`` is the same grid. Lu et al. (2022,
  arXiv:2206.00927) use it. Its steps have equal length in ``log sigma``, which suits multistep solvers. From 100 to
  0.02 it is the grid of Song et al.'s VE sampler (table 1 in arXiv:2206.00364).

  Args:
    steps: number of steps, at least 1.
    sigma_min: the last level above 0.
    sigma_max: the first level.

  Returns:
    (steps + 1,) decreasing levels.

  >>> [round(float(s), 3) for s in log_snr_uniform(3, 0.01, 100.0)]
  [100.0, 1.0, 0.01, 0.0]
  """
  ramp = np.linspace(0, 1, _check_steps_and_ends(steps, sigma_min, sigma_max))
  return _append_zero(sigma_max * (sigma_min / sigma_max) ** ramp)


def cosine_time(steps: int, sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0) -> Float[Array, " levels"]:
  """A grid uniform in the cosine schedule's time, the angle ``atan(sigma)``, then 0.

  The schedule (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17) is taken without its offset: ``Cosine(s=0)`` has
  ``sigma = tan(t pi / 2)``. ``from_schedule(Cosine(), steps)`` has the offset and other ends: its first level is the
  schedule's largest, 1e4, and its last level above 0 is the level at time ``1 / steps``.

  Args:
    steps: number of steps, at least 1.
    sigma_min: the last level above 0.
    sigma_max: the first level.

  Returns:
    (steps + 1,) decreasing levels.

  >>> [round(float(s), 3) for s in cosine_time(3, 0.01, 100.0)]
  [100.0, 1.0, 0.01, 0.0]
  """
  ramp = np.linspace(0, 1, _check_steps_and_ends(steps, sigma_min, sigma_max))
  xp = np if checks.is_concrete((sigma_min, sigma_max)) else jnp
  angle = xp.arctan(sigma_max) - xp.arctan(sigma_min)
  # The tangent of the angle, as a ratio of sines: near 90 degrees jnp.tan would lose digits in float32.
  high, low = (xp.sin(part * angle) / (1 + end**2) ** 0.5 for part, end in ((1 - ramp, sigma_max), (ramp, sigma_min)))
  return _append_zero((high * sigma_max + low * sigma_min) / (high + low))


def from_schedule(schedule: NoiseSchedule, steps: int, t_min: ArrayLike | None = None) -> Float[Array, " levels"]:
  """A grid uniform in the time of a continuous schedule: ``sigma(1), sigma(1 - 1/steps), ..., sigma(1/steps), 0``.

  Args:
    schedule: a continuous noise schedule. Song et al.'s sampler (2021, arXiv:2011.13456; the VP column of table 1 in
      arXiv:2206.00364) uses `Linear` and a ``t_min`` of 1e-3.
    steps: number of steps, at least 1.
    t_min: the last time above 0, at most 1. The default is ``1 / steps``.

  Returns:
    (steps + 1,) decreasing levels.

  Raises:
    ValueError: for steps below 1, or a ``t_min`` outside (0, 1].
    TypeError: if ``schedule`` is a table or not a schedule.

  >>> from jaxguide.schedules import Linear
  >>> [round(float(s), 1) for s in from_schedule(Linear(), 2)]
  [152.2, 3.4, 0.0]
  """
  steps = at_most("steps", steps)
  if isinstance(schedule, Table):
    raise TypeError("schedule must be continuous, with times in [0, 1], got a table: use respaced(table, steps)")
  checks.schedule(schedule)
  t_min = 1 / steps if t_min is None else checks.finite("t_min", t_min)
  if checks.is_concrete(t_min) and not 0 < np.asarray(t_min) <= 1:
    raise ValueError(f"t_min must be above 0 and at most 1, got {t_min}")
  return _append_zero(schedule.sigma(jnp.linspace(1, t_min, steps)))


SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
  "linspace": lambda total, count: spaced_timesteps(total, str(count)) if count > 1 else np.array([total - 1]),
  "leading": lambda total, count: np.arange(count) * (total // count),
  "trailing": lambda total, count: np.round(total - np.arange(count) * (total / count)).astype(int) - 1,
}
"""Functions that choose ``count`` of a table's ``total`` steps, by name; see `respaced`."""


def respaced(
  table: Table, steps: int | str | Sequence[int] | np.ndarray, spacing: str | None = None
) -> Float[Array, " levels"]:
  """A grid of chosen steps of a discrete process, from the noisiest down, then 0.

  Args:
    table: the process that the network was trained on.
    steps: the number of steps, which ``spacing`` distributes; or a text, ``ddim25`` or ``10,10,10``, as in
      `spaced_timesteps` ("1" visits step 0); or the steps themselves, (n,) whole numbers in [0, T-1] in any order.
    spacing: how a number of steps is distributed (table 2 of Lin et al. 2024, arXiv:2305.08891, and diffusers). All but
      ``leading``, which leaves out the noisiest levels, visit T-1. Only the first two visit 0.

      - ``linspace``, the default: evenly from 0 to T-1, rounded to whole steps as in OpenAI's code. (diffusers does not
        round; it interpolates the levels between two steps.) A single step is T-1.
      - ``leading``: 0, k, 2k, ... with the whole stride ``k = T // steps``, as in DDIM.
      - ``trailing``: T-1, T-1-k, ... with the stride ``k = T / steps``, rounded.

  Returns:
    (n + 1,) decreasing levels.

  Raises:
    TypeError: if ``table`` is not a `Table`.
    ValueError: for more steps than the table has, a step outside the table, a step that occurs twice, an unknown
      spacing (the message has the nearest name), or a spacing together with chosen steps.

  >>> from jaxguide.schedules import linear_betas
  >>> table = Table.from_betas(linear_betas(1000))
  >>> respaced(table, [0, 999]).shape, respaced(table, "ddim25").shape
  ((3,), (26,))
  """
  if not isinstance(table, Table):
    raise TypeError(f"table must be a Table, such as jaxguide.schedules.table('linear', 1000), got {table!r}")
  total = table.num_steps
  choose = checks.lookup("spacing", "linspace" if spacing is None else spacing, SPACINGS)
  if spacing is not None and not isinstance(steps, int | np.integer):
    raise ValueError(f"a spacing needs a number of steps, but steps chooses them itself: leave out {spacing!r}")
  if isinstance(steps, str):
    chosen = spaced_timesteps(total, steps)
  elif isinstance(steps, int | np.integer):
    count = checks.at_least("steps", steps, 1)
    if count > total:
      raise ValueError(f"steps must be at most the {total} steps of the table, got {count}")
    chosen = choose(total, count)
  else:
    chosen = np.asarray(steps)
    if chosen.ndim != 1:
      raise ValueError(f"chosen steps must have one axis, got shape {chosen.shape}")
    if chosen.size == 0:
      raise ValueError("chosen steps must be at least one step, got none")
    if not np.issubdtype(chosen.dtype, np.integer):
      raise ValueError(f"chosen steps must be whole numbers, got {chosen.dtype}")
    if chosen.min() < 0 or chosen.max() >= total:
      raise ValueError(f"chosen steps must lie in 0 to {total - 1}, got {chosen.min()} to {chosen.max()}")
    if np.unique(chosen).size != chosen.size:
      raise ValueError("chosen steps must differ from each other, but one occurs twice")
  decreasing = np.sort(chosen.astype(int))[::-1].copy()
  return _append_zero(jnp.asarray(table.sigmas)[decreasing])


def iddpm(
  steps: int, sigma_min: float | int = 0.002, sigma_max: float | int = 81.0, table: Table | None = None
) -> Float[Array, " levels"]:
  """A grid of some of a table's levels between two ends, at equal distances of their indices in the table.

  It is the iDDPM + DDIM column of table 1 in Karras et al. (2022, arXiv:2206.00364).

  Args:
    steps: number of steps, at least 1.
    sigma_min: smaller levels of the table are left out.
    sigma_max: larger levels of the table are left out.
    table: the process. The default is Nichol & Dhariwal's cosine table of 1000 steps.

  Returns:
    (steps + 1,) decreasing levels, the last one 0.

  Raises:
    ValueError: unless steps is at least 1, 0 < sigma_min < sigma_max, and at least ``steps`` levels lie between them.

  >>> [round(float(sigma), 3) for sigma in iddpm(3)]
  [80.204, 1.0, 0.006, 0.0]
  """
  steps = _check_steps_and_ends(steps, sigma_min, sigma_max)
  levels = np.asarray((Table.from_betas(cosine_betas(1000)) if table is None else check_table(table)).sigmas)[::-1]
  levels = levels[(levels >= sigma_min) & (levels <= sigma_max)]
  if levels.size < steps:
    raise ValueError(
      f"the table has {levels.size} levels from {sigma_min} to {sigma_max}, too few for {steps} steps: "
      "take fewer steps, or a longer table"
    )
  visited = np.round((levels.size - 1) / max(steps - 1, 1) * np.arange(steps)).astype(int)
  return _append_zero(jnp.asarray(levels[visited]))


def nearest_step(table: Table, sigma: ArrayLike) -> Int[Array, "*shape"]:
  """Return the step of a table whose level is nearest to ``sigma``, or -1 if 0 is nearer than every level.

  In table 1 of Karras et al. (2022, arXiv:2206.00364) it is ``M - 1 - argmin_j |u_j - sigma|``, with ``u_M = 0``.

  >>> from jaxguide.schedules import linear_betas
  >>> nearest_step(Table.from_betas(linear_betas(1000)), jnp.array([0.0, 157.0])).tolist()
  [-1, 999]
  """
  levels = jnp.append(0, check_table(table).sigmas)
  return jnp.searchsorted((levels[1:] + levels[:-1]) / 2, jnp.asarray(sigma, levels.dtype), side="right") - 1


def round_sigma(table: Table, sigma: ArrayLike) -> Float[Array, "*shape"]:
  """Round ``sigma`` to the nearest level of a table or to 0. A network of discrete steps is trained on these levels.

  >>> from jaxguide.schedules import linear_betas
  >>> round_sigma(Table.from_betas(linear_betas(1000)), jnp.array([0.004, 0.009])).round(4)
  Array([0.  , 0.01], dtype=float32)
  """
  return jnp.append(check_table(table).sigmas, 0)[nearest_step(table, sigma)]


def flow(steps: int, shift: float | int = 1.0, sigma_max: float | int = 1000.0) -> Float[Array, " levels"]:
  """The grid of flow matching: uniform in the time ``t`` of `Flow`, from 1 down, then 0.

  Flow matching (Lipman et al. 2023, arXiv:2210.02747) visits ``t = 1, 1 - 1/steps, ..., 1/steps, 0``. A shift above 1
  places more of the steps at high noise, for large images (Esser et al. 2024, arXiv:2403.03206, eq. 23). It multiplies
  each level.

  LightningDiT (arXiv:2501.01423) has ``t = 1`` at the data and shifts ``t`` to ``S t / (1 + (S - 1) t)``. That divides
  each level by S: its S of 0.3 is a shift of ``1 / 0.3`` here.

  Args:
    steps: number of steps, at least 1.
    shift: s, above 0. 1 is no shift; Stable Diffusion 3 uses 3 for 1024x1024.
    sigma_max: the first level, in place of the infinite level at time 1. It must be above the second level. From 1000
      the path differs from that from time 1 by about a thousandth; from 1e7, with ``x = (1 + sigma_max) noise``, by
      less than the rounding of float32. `Heun` and `EDMStochastic` average slopes in sigma, and their first step from
      such a level is wrong by orders of magnitude: use `karras` with them.

  Returns:
    (steps + 1,) decreasing levels.

  Raises:
    ValueError: for steps below 1, a shift that is not above 0, or a sigma_max that is not above the second level.

  >>> [round(float(s), 3) for s in flow(4, shift=3.0)]
  [1000.0, 9.0, 3.0, 1.0, 0.0]
  """
  steps = at_most("steps", steps)
  shift, sigma_max = checks.above("shift", checks.finite("shift", shift), 0), checks.finite("sigma_max", sigma_max)
  t = 1 - np.arange(1, steps) / steps
  levels = np.append(sigma_max, shift * t / (1 - t))
  if levels[0] <= (levels[1] if steps > 1 else 0):
    raise ValueError(f"sigma_max must be above the second level, {levels[1] if steps > 1 else 0:g}, got {sigma_max:g}")
  return _append_zero(levels)


def consistency(
  steps: int,
  sigma_min: ArrayLike = 0.002,
  sigma_max: ArrayLike = 80.0,
  rho: ArrayLike = 7.0,
  ts: str = "",
  levels: int = 40,
) -> Float[Array, " levels"]:
  """The grid of consistency models (Song et al. 2023, arXiv:2303.01469): some of the levels of `karras`, then 0.

  Args:
    steps: number of steps, at least 1.
    sigma_min: the last of the levels.
    sigma_max: the first of the levels.
    rho: as for `karras`.
    ts: the numbers of the levels among `levels`, joined by ``-``, from 0 (``sigma_max``) on. The last may be that of
      ``sigma_min``, ``levels - 1``, which stands for the end: OpenAI's ``ts="0,22,39"`` is ``ts=0-22-39`` in two steps.
      Default: ``steps`` levels at equal distances.
    levels: number of the levels to choose from; 40 for OpenAI's networks that were distilled, 201 for those trained
      alone.

  Returns:
    (steps + 1,) decreasing levels, the last one 0.

  Raises:
    ValueError: if ``ts`` are not ``steps`` increasing numbers below ``levels - 1``, with or without ``levels - 1``.

  >>> [round(float(s), 3) for s in consistency(2, ts="0-22-39")]
  [80.0, 1.382, 0.0]
  """
  checks.at_least("steps", steps, 1)
  checks.at_least("levels", levels, 2)
  known = karras(levels, sigma_min, sigma_max, rho)[:-1]
  if not ts:
    if steps > levels - 1:
      raise ValueError(f"{steps} steps need at least {steps + 1} levels, got levels {levels}: take fewer, such as 2")
    chosen = np.round(np.arange(steps) * (levels - 1) / steps).astype(int)
  else:
    parts = str(ts).split("-")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if numbers and numbers[-1] == levels - 1 and len(numbers) == steps + 1:
      numbers = numbers[:-1]
    if len(numbers) != steps or not all(part.isdecimal() for part in parts):
      raise ValueError(f"ts must be {steps} whole numbers for {steps} steps, and may end in {levels - 1}; got {ts!r}")
    chosen = np.asarray(numbers)
  if chosen[0] < 0 or chosen[-1] >= levels - 1 or (np.diff(chosen) <= 0).any():
    raise ValueError(f"ts must increase and lie below {levels - 1}, the number of the last level, got {ts!r}")
  return _append_zero(known[chosen])


GRIDS: dict[str, Callable[..., Array]] = {
  "karras": karras,
  "log-snr": log_snr_uniform,
  "cosine-time": cosine_time,
  "flow": flow,
  "consistency": consistency,
}
"""Grids by their names on the command line. Each is a function of the number of steps and of options."""
