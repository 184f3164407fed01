r"""Power-function running means of parameters, whose width can be chosen after the training (Karras et al. 2024).

"Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3 and appendix C. At time
``t`` of the training such a mean is

.. math:: \hat\theta_\gamma(t) = \int_0^t p_\gamma(\tau; t)\, \theta(\tau)\, d\tau, \quad
  p_\gamma(\tau; t) = \frac{\gamma + 1}{t} \Big(\frac{\tau}{t}\Big)^\gamma

The weight of the random initial parameters goes to 0, and the width of the mean is a constant fraction of the training
time. The paper describes a profile by this width, ``std``, its standard deviation relative to ``t``. It keeps means of
the widths 0.05 and 0.10 during training. `posthoc_coefficients` and `weighted_sum` approximate the mean of any other
width by snapshots of these two.

>>> means = PowerFunctionEMA(stds=(0.05, 0.1))
>>> emas = means.init({"w": jnp.zeros(2)})
>>> emas = means.update(emas, {"w": jnp.ones(2)}, t_next=128, t_delta=128)  # after the first step: its parameters alone
>>> emas[0]["w"].tolist()
[1.0, 1.0]
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, specs
from jaxguide._core.typing import Array, ArrayLike, PyTree

Numbers = ArrayLike | Sequence[float | int]
Float64 = np.ndarray | np.float64

UNIFORM = 12**-0.5
"""The width of the uniform mean, which has the exponent 0."""


def exponent_to_std(exponent: Numbers) -> Float64:
  """Return the width of the profile with exponent γ: ``√((γ + 1) / ((γ + 2)² (γ + 3)))`` (eq. 123).

  Args:
    exponent: γ, at least 0, of any shape.

  >>> round(float(exponent_to_std(6.94)), 4)
  0.1
  """
  gamma = np.asarray(checks.in_range("exponent", exponent, 0), np.float64)
  return np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def std_to_exponent(std: Numbers) -> Float64:
  """Return the exponent γ of the profile with a width, the inverse of `exponent_to_std` (eq. 126).

  Args:
    std: widths above 0 and at most 1/√12 = 0.2887, of any shape.

  Raises:
    ValueError: if a width is out of range.

  >>> round(float(std_to_exponent(0.1)), 2)
  6.94
  """
  std = np.asarray(std, np.float64)
  # With v = 1 / std², g = γ + 2 is the largest root of (g - 1) v = g² (g + 1). The tolerance accepts a rounded 1/√12.
  if not ((std > 0) & (std <= UNIFORM * (1 + 1e-6))).all():
    raise ValueError(f"std must be above 0 and at most 1/√12 = {UNIFORM:.4f}, the width of the uniform mean, got {std}")
  roots = [np.roots([1, 1, -v, v]).real.max() for v in std.ravel() ** -2.0]
  return np.maximum(np.reshape(roots, std.shape) - 2, 0)


def response(time: Numbers, t: Numbers, std: Numbers) -> Float64:
  """Return the profile ``p(time; t)``: the weight that a mean at time ``t`` gives to an earlier time (eq. 121).

  Args:
    time: at least 0; the result is 0 if it is after ``t``. It broadcasts with ``t`` and ``std``.
    t: the time of the mean, above 0.
    std: the width of the profile.

  Returns:
    A density: its integral over ``time`` is 1.
  """
  time, t, gamma = checks.in_range("time", np.asarray(time, np.float64), 0), _times("t", t), std_to_exponent(std)
  return np.where(time <= t, (gamma + 1) / t * np.minimum(time / t, 1) ** gamma, 0)


def _times(name: str, t: Numbers) -> Float64:
  return checks.above(name, checks.finite(name, np.asarray(t, np.float64)), 0)


def correlation(t_a: Numbers, std_a: Numbers, t_b: Numbers, std_b: Numbers) -> Float64:
  """Return the inner products of profiles, ``∫ p_a p_b dτ`` (eq. 151); all four arguments broadcast.

  >>> round(float(correlation(2.0, UNIFORM, 1.0, UNIFORM)), 6)  # of 1/2 on [0, 2] and 1 on [0, 1]
  0.5
  """
  t_a, t_b = _times("t_a", t_a), _times("t_b", t_b)
  a, b = std_to_exponent(std_a), std_to_exponent(std_b)
  # The integral ends at the earlier time, where the later profile is (earlier / later)^γ of its final value.
  earlier, later, of_later = np.minimum(t_a, t_b), np.maximum(t_a, t_b), np.where(t_a < t_b, b, a)
  return (a + 1) * (b + 1) / (a + b + 1) / later * (earlier / later) ** of_later


class Profiles(NamedTuple):
  """A list of profiles: the time of each mean, and its width."""

  t: Numbers
  """(n,), in training images or in steps."""

  std: Numbers
  """(n,)."""


def posthoc_coefficients(snapshots: Profiles, wanted: Profiles) -> np.ndarray:
  """Return the coefficients of the sums of snapshots that approximate other profiles by least squares (Algorithm 3).

  Args:
    snapshots: the n profiles of the snapshots; no two may be equal.
    wanted: the m profiles to approximate, at times not after the last snapshot.

  Returns:
    (n, m) in float64. Each column sums to 1, and is the argument of `weighted_sum`.

  Raises:
    ValueError: if two snapshots have the same profile, or a wanted profile is after the last snapshot.

  >>> snapshots = Profiles(t=np.repeat([100, 200, 300, 400], 2), std=np.tile([0.05, 0.10], 4))
  >>> coefficients = posthoc_coefficients(snapshots, Profiles(t=[400], std=[0.10]))  # equals the last snapshot
  >>> coefficients[:, 0].round(6)[-1].item()
  1.0
  """
  t, std = (np.atleast_1d(a).astype(np.float64) for a in np.broadcast_arrays(*snapshots))
  t_wanted, std_wanted = (np.atleast_1d(a).astype(np.float64) for a in np.broadcast_arrays(*wanted))
  if np.unique([t, std], axis=1).shape[1] != t.size:
    raise ValueError("two of the snapshots have the same time and std: leave one out")
  if t_wanted.max() > t.max():
    raise ValueError(f"wanted times must not be after the last snapshot's, {t.max():g}, got {t_wanted.max():g}")
  among = correlation(t[:, None], std[:, None], t, std)
  across = correlation(t[:, None], std[:, None], t_wanted, std_wanted)
  coefficients = np.linalg.solve(among, across)
  return coefficients / coefficients.sum(0)


def weighted_sum(snapshots: Iterable[PyTree], coefficients: Numbers) -> PyTree:
  """Return ``Σ_i c_i snapshot_i``, a mean computed after the training.

  Args:
    snapshots: n trees of parameters with the same structure. They can be a generator that reads one after another from
      disk: only the sum is kept in memory.
    coefficients: (n,), a column of `posthoc_coefficients`.

  Returns:
    A tree of NumPy arrays of the snapshots' types. Sums are computed in float64.

  Raises:
    ValueError: if the number of snapshots is not that of the coefficients, or the coefficients are empty or do not have
      exactly one axis.

  >>> weighted_sum([{"w": np.float32(1.0)}, {"w": np.float32(3.0)}], [0.5, 0.5])["w"].item()
  2.0
  """
  weights = np.asarray(coefficients, np.float64)
  if weights.ndim != 1 or not weights.size:
    raise ValueError(
      f"coefficients must have one axis, like a column of posthoc_coefficients, got shape {weights.shape}"
    )
  total, dtypes = None, None
  for coefficient, tree in zip(weights, snapshots, strict=True):
    term = jax.tree.map(lambda leaf: coefficient * np.asarray(leaf, np.float64), tree)  # noqa: B023
    total = term if total is None else jax.tree.map(np.add, total, term)
    dtypes = jax.tree.map(jnp.result_type, tree)
  return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), total, dtypes)


def step_weight(std: float | int, t_next: ArrayLike, t_delta: ArrayLike) -> Array:
  """Return ``1 - beta``, the weight of the newest parameters: ``1 - (1 - t_delta / t_next)^(γ + 1)`` (eq. 127).

  Args:
    std: the width of the mean.
    t_next: the time after the step, in images or in steps; it may be traced.
    t_delta: the duration of the step in the same unit (the batch size, or 1), at most ``t_next``; it may be traced.

  >>> [round(float(step_weight(0.1, step, 1)), 4) for step in (1, 2, 1000)]
  [1.0, 0.9959, 0.0079]
  """
  if checks.is_concrete((t_next, t_delta)):
    share = np.asarray(t_delta, np.float64) / t_next
    if not ((share >= 0) & (share <= 1)).all():
      raise ValueError(f"t_delta must lie between 0 and t_next, got {t_delta} and {t_next}")
  # By expm1 and not as 1 - beta: late in the training beta is so close to 1 that float32 would lose most digits.
  return -jnp.expm1((float(std_to_exponent(std)) + 1) * jnp.log1p(-jnp.asarray(t_delta) / t_next))


def _constant(step: Any, decay: float) -> Any:
  """Return the weight ``1 - decay`` of an exponential mean; in early steps it is larger, to forget the random start."""
  return 1 - jnp.minimum(decay, (1 + step) / (10 + step))


def _power(step: Any, decay: float, *, std: float = 0.1) -> Any:
  """Return the weight of EDM2's power-function mean, whose width is ``std`` times the training time so far."""
  del decay
  return step_weight(std, jnp.asarray(step + 1, float), 1.0)


MEANS: dict[str, Callable[..., Any]] = {"constant": _constant, "power": _power}


def newest_share(text: str, decay: float) -> Callable[[Any], Any]:
  """Return the weight of the newest parameters in the running mean, as a function of the step.

  Args:
    text: ``constant`` or ``power:std=0.1``, with any width.
    decay: the weight of the previous mean, for ``constant``.

  Raises:
    ValueError: for an unknown name (with the nearest known one), an unknown option, or a width out of range.

  >>> round(float(newest_share("power:std=0.1", 0.995)(999)), 4)
  0.0079
  """
  function, options = specs.resolve("running mean", text, MEANS, "step", "decay")
  if "std" in options:
    std_to_exponent(options["std"])
  return functools.partial(function, decay=decay, **options)


@dataclasses.dataclass(frozen=True)
class PowerFunctionEMA:
  """Running means of parameters with several widths. Call ``init(params)`` once and ``update`` after each step.

  Args:
    stds: the widths, relative to the duration of the training so far; above 0 and at most 0.2887.

  Raises:
    ValueError: if a width is out of range, or there is none.
  """

  stds: tuple[float, ...] = (0.05, 0.1)

  def __post_init__(self):
    if not self.stds or any(isinstance(std, str) for std in self.stds):
      raise ValueError(f"stds must be at least one width, got {self.stds!r}")
    std_to_exponent(self.stds)

  def init(self, params: PyTree) -> tuple[PyTree, ...]:
    """Return the means before the first step: the initial parameters, one tree per width."""
    return tuple(params for _ in self.stds)

  def update(
    self, emas: tuple[PyTree, ...], params: PyTree, t_next: ArrayLike, t_delta: ArrayLike
  ) -> tuple[PyTree, ...]:
    """Return the means after a step: ``ema + (1 - beta) (params - ema)``.

    Args:
      emas: the means before the step.
      params: the parameters after the step.
      t_next: the time after the step; see `step_weight`.
      t_delta: the duration of the step; see `step_weight`.
    """

    def interpolate(weight, ema):
      return jax.tree.map(lambda mean, p: mean + (weight * (p - mean)).astype(mean.dtype), ema, params)

    weights = (step_weight(std, t_next, t_delta) for std in self.stds)
    return tuple(interpolate(weight, ema) for weight, ema in zip(weights, emas, strict=True))
