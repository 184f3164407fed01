"""Noise levels of a range alone, for networks that are trained on a part of the levels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxguide._core import checks, struct
from jaxguide._core.typing import ArrayLike, Leaf
from jaxguide.schedules.noise import NoiseLevels

LEAST_SHARE = 1e-3
"""The least share of a distribution that must lie in the range; float32 has few numbers for a smaller one."""

# A share in float32 has 24 bits; this many halvings find it.
HALVINGS = 30


@struct.dataclass
class Truncated:
  r"""The distribution of noise levels, given that they lie in ``[sigma_lo, sigma_hi]``.

  With the quantile function ``Q`` and the cumulative distribution function ``F`` of ``noise_levels``,

  .. math:: Q_{trunc}(u) = Q(F(\sigma_{lo}) + u (F(\sigma_{hi}) - F(\sigma_{lo})))

  ``F`` is found by bisection of ``Q``, so that any distribution with a quantile function can be truncated.

  Args:
    noise_levels: the distribution, such as `LogNormal` or a schedule.
    sigma_lo: the least level, at least 0.
    sigma_hi: the largest level, above ``sigma_lo``.

  Raises:
    TypeError: if ``noise_levels`` has no quantile function.
    ValueError: if the range is empty, or has less than `LEAST_SHARE` of the distribution.

  >>> from jaxguide.schedules import LogSNR
  >>> levels = Truncated(LogSNR(-20.0, 20.0), 1.0, jnp.e)  # log sigma is uniform
  >>> jnp.log(levels.quantile(jnp.array([0.0, 0.5, 1.0]))).round(3).tolist()
  [0.0, 0.5, 1.0]
  """

  noise_levels: Leaf
  sigma_lo: Leaf
  sigma_hi: Leaf

  def __post_init__(self):
    if isinstance(self.noise_levels, str | type):
      checks.schedule(self.noise_levels, "quantile")
    checks.rising(self, "sigma_lo", "sigma_hi", 0)
    if isinstance(self.sigma_lo, int | float) and checks.is_concrete(self.noise_levels):
      with jax.ensure_compile_time_eval():
        low, high = map(float, _shares(self.noise_levels, self.sigma_lo, self.sigma_hi))
      if high - low < LEAST_SHARE:
        raise ValueError(
          f"only {max(high - low, 0):.2%} of the noise levels lie between {self.sigma_lo:g} and {self.sigma_hi:g}: "
          "choose a wider range, or a distribution of levels that has more of them there"
        )

  def quantile(self, u: ArrayLike) -> Array:
    """Return the level below which a fraction ``u`` in [0, 1] of the draws lies."""
    low, high = _shares(self.noise_levels, self.sigma_lo, self.sigma_hi)
    u = jnp.asarray(u)
    share = (low + u * (high - low)).astype(u.dtype)
    # The ends of the range are exact, and an infinite level at share 0 or 1 is replaced by them.
    return jnp.clip(self.noise_levels.quantile(share), self.sigma_lo, self.sigma_hi)


def _shares(noise_levels: NoiseLevels, sigma_lo: ArrayLike, sigma_hi: ArrayLike) -> tuple[Array, Array]:
  """Return the share of the levels below ``sigma_lo``, and the share of those up to ``sigma_hi``."""

  def halve(_, ends):
    # Each pair encloses the share at which the quantile function passes a level.
    below, above = ends
    middle = (below + above) / 2
    sigma = noise_levels.quantile(middle)
    passed = jnp.stack([sigma[0] >= sigma_lo, sigma[1] > sigma_hi])
    return jnp.where(passed, below, middle), jnp.where(passed, middle, above)

  zeros = jnp.zeros(2)
  below, above = jax.lax.fori_loop(0, HALVINGS, halve, (zeros, zeros + 1))
  # A level that no share passes lies beyond the distribution: the bisection then ends at 0 or 1.
  return jnp.where(below[0] > 0, above[0], 0), jnp.where(above[1] < 1, below[1], 1)
