"""Discrete processes: tables of noise levels, made of betas as DDPM has them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxguide import checks, struct
from jaxguide.schedules.noise import Cosine, NoiseSchedule, sigma_to_alpha_bar
from jaxguide.typing import ArrayLike, Leaf


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

  @classmethod
  def from_betas(cls, betas: ArrayLike) -> "Table":
    """Make the table of ``ᾱ_t = prod_{s<=t} (1 - beta_s)`` (Ho et al. 2020, arXiv:2006.11239), in float64.

    Args:
      betas: (T,), each in (0, 1).

    Raises:
      ValueError: if a beta lies outside (0, 1) or there is no axis of at least one.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0 or not ((betas > 0) & (betas < 1)).all():
      raise ValueError("betas must be one axis of numbers between 0 and 1, both excluded")
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return cls(jnp.asarray(np.sqrt(np.expm1(-log_alpha_bar))))

  @property
  def num_steps(self) -> int:
    """The number of steps, T."""
    return self.sigmas.shape[0]

  def sigma(self, t: ArrayLike) -> Array:
    """Give the noise level at step ``t`` in [0, T-1], which need not be whole."""
    steps = jnp.arange(self.num_steps, dtype=self.sigmas.dtype)
    return jnp.exp(jnp.interp(jnp.asarray(t, self.sigmas.dtype), steps, jnp.log(self.sigmas)))

  def time(self, sigma: ArrayLike) -> Array:
    """Give the (fractional) step in [0, T-1] of a noise level."""
    steps = jnp.arange(self.num_steps, dtype=self.sigmas.dtype)
    return jnp.interp(jnp.log(jnp.asarray(sigma, self.sigmas.dtype)), jnp.log(self.sigmas), steps)

  def quantile(self, u: ArrayLike) -> Array:
    """Give the level of step ``floor(u T)``: training draws the steps uniformly."""
    step = jnp.floor(jnp.asarray(u) * self.num_steps).astype(int)
    return jnp.asarray(self.sigmas)[jnp.clip(step, 0, self.num_steps - 1)]


def linear_betas(steps: int) -> np.ndarray:
  """Ho et al.'s betas, 1e-4 to 0.02 over 1000 steps, scaled to any number of steps (arXiv:2006.11239, section 4).

  Returns:
    (steps,) in float64.

  >>> linear_betas(1000)[[0, -1]]
  array([0.0001, 0.02  ])
  """
  scale = 1000 / checks.at_least("steps", steps, 1)
  return np.minimum(np.linspace(scale * 1e-4, scale * 0.02, steps), 0.999)


def betas_of(schedule: NoiseSchedule, steps: int, max_beta: ArrayLike = 0.999) -> np.ndarray:
  """Cut a continuous schedule into a table: ``beta_i = 1 - ᾱ((i+1)/T) / ᾱ(i/T)``, at most ``max_beta``.

  Returns:
    (steps,) betas for `Table.from_betas`.
  """
  steps = checks.at_least("steps", steps, 1)
  with jax.enable_x64(True):
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
