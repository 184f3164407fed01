r"""Running means of parameters whose profile is a power of time, chosen after the training (Karras et al. 2024).

"Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3 and appendix C. At time
``t`` of the training such a mean is

.. math:: \hat\theta_\gamma(t) = \int_0^t p_\gamma(\tau; t)\, \theta(\tau)\, d\tau, \quad
  p_\gamma(\tau; t) = \frac{\gamma + 1}{t} \Big(\frac{\tau}{t}\Big)^\gamma

It forgets the random start by itself, and its width stays the same part of the training, however long that is. The
paper names a profile by this width, ``std``, its standard deviation relative to ``t``: 0.05 and 0.10 are what it keeps
while training. From snapshots of the two, `posthoc_coefficients` and `combine` make the mean of any other width.

>>> means = PowerFunctionEMA(stds=(0.05, 0.1))
>>> emas = means.init({"w": jnp.zeros(2)})
>>> emas = means.update(emas, {"w": jnp.ones(2)}, t_next=128, t_delta=128)     # the first step fills the mean
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
"""The width of the plain mean: exponent 0."""


def exponent_to_std(exponent: Numbers) -> Float64:
  """Give the width of a profile: ``√((γ + 1) / ((γ + 2)² (γ + 3)))`` (eq. 123).

  Args:
    exponent: γ, at least 0, of any shape.

  >>> round(float(exponent_to_std(6.94)), 4)
  0.1
  """
  gamma = np.asarray(checks.in_range("exponent", exponent, 0), np.float64)
  return np.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def std_to_exponent(std: Numbers) -> Float64:
  """Give the exponent γ of the profile of a width, the inverse of `exponent_to_std` (eq. 126).

  Args:
    std: above 0 and at most 1/√12 = 0.2887, of any shape.

  Raises:
    ValueError: if a width is outside.

  >>> round(float(std_to_exponent(0.1)), 2)
  6.94
  """
  std = np.asarray(std, np.float64)
  # With 1 / std² = v it is the largest root of (g - 1) v = g² (g + 1), where g = γ + 2. A rounded 1/√12 is one.
  if not ((std > 0) & (std <= UNIFORM * (1 + 1e-6))).all():
    raise ValueError(f"std must be above 0 and at most 1/√12 = {UNIFORM:.4f}, the width of the plain mean; got {std}")
  roots = [np.roots([1, 1, -v, v]).real.max() for v in std.ravel() ** -2.0]
  return np.maximum(np.reshape(roots, std.shape) - 2, 0)


def response(time: Numbers, t: Numbers, std: Numbers) -> Float64:
  """Give the profile ``p(time; t)``, how much a mean at time ``t`` remembers of an earlier time (eq. 121).

  Args:
    time: at least 0; 0 comes out where it is after ``t``. It broadcasts with ``t`` and ``std``.
    t: when the mean is taken, above 0.
    std: the profile's width.

  Returns:
    A density: its integral over ``time`` is 1.
  """
  time, t, gamma = checks.in_range("time", np.asarray(time, np.float64), 0), _times("t", t), std_to_exponent(std)
  return np.where(time <= t, (gamma + 1) / t * np.minimum(time / t, 1) ** gamma, 0)


def _times(name: str, t: Numbers) -> Float64:
  return checks.above(name, checks.finite(name, np.asarray(t, np.float64)), 0)


def correlation(t_a: Numbers, std_a: Numbers, t_b: Numbers, std_b: Numbers) -> Float64:
  """Give the inner products of profiles, ``∫ p_a p_b dτ`` (eq. 151); all four broadcast with each other.

  >>> round(float(correlation(2.0, UNIFORM, 1.0, UNIFORM)), 6)  # of 1/2 on [0, 2] and 1 on [0, 1]
  0.5
  """
  t_a, t_b = _times("t_a", t_a), _times("t_b", t_b)
  a, b = std_to_exponent(std_a), std_to_exponent(std_b)
  # The integral runs to the earlier time, where the later profile has risen to (earlier / later)^γ.
  earlier, later, of_later = np.minimum(t_a, t_b), np.maximum(t_a, t_b), np.where(t_a < t_b, b, a)
  return (a + 1) * (b + 1) / (a + b + 1) / later * (earlier / later) ** of_later


class Profiles(NamedTuple):
  """Some profiles: when each mean was taken, and its width."""

  t: Numbers
  """(n,), in images seen or in steps."""

  std: Numbers
  """(n,)."""


def posthoc_coefficients(snapshots: Profiles, wanted: Profiles) -> np.ndarray:
  """Give the sums of snapshots that are nearest to other profiles in the mean square (Algorithm 3).

  Args:
    snapshots: the n profiles that there are, each another.
    wanted: the m profiles to make, not after the last snapshot.

  Returns:
    (n, m) in float64, each column with the sum 1, for `combine`.

  Raises:
    ValueError: if two snapshots have the same profile, or a wanted one comes after the last.

  >>> kept = Profiles(t=np.repeat([100, 200, 300, 400], 2), std=np.tile([0.05, 0.10], 4))
  >>> posthoc_coefficients(kept, Profiles(t=[400], std=[0.10]))[:, 0].round(6)[-1].item()   # it is there already
  1.0
  """
  t, std = (np.atleast_1d(a).astype(np.float64) for a in np.broadcast_arrays(*snapshots))
  t_wanted, std_wanted = (np.atleast_1d(a).astype(np.float64) for a in np.broadcast_arrays(*wanted))
  if np.unique([t, std], axis=1).shape[1] != t.size:
    raise ValueError("two of the snapshots have the same time and std: leave one out")
  if t_wanted.max() > t.max():
    raise ValueError(f"the last snapshot is of time {t.max():g}: nothing is known of time {t_wanted.max():g}")
  among = correlation(t[:, None], std[:, None], t, std)
  across = correlation(t[:, None], std[:, None], t_wanted, std_wanted)
  coefficients = np.linalg.solve(among, across)
  return coefficients / coefficients.sum(0)


def weighted_sum(snapshots: Iterable[PyTree], coefficients: Numbers) -> PyTree:
  """Give ``Σ_i c_i snapshot_i``, a mean made after the training.

  Args:
    snapshots: n trees of parameters of one structure. They may come one by one, as they are read from a disk: only the
      sum is held.
    coefficients: (n,), a column of `posthoc_coefficients`.

  Returns:
    A tree of NumPy arrays of the snapshots' types; the sums are made in float64.

  Raises:
    ValueError: if there are not as many snapshots as coefficients, or none, or more than one axis of them.

  >>> weighted_sum([{"w": np.float32(1.0)}, {"w": np.float32(3.0)}], [0.5, 0.5])["w"].item()
  2.0
  """
  weights = np.asarray(coefficients, np.float64)
  if weights.ndim != 1 or not weights.size:
    raise ValueError(f"coefficients must have one axis, as a column of posthoc_coefficients, got shape {weights.shape}")
  total, like = None, None
  for coefficient, tree in zip(weights, snapshots, strict=True):
    part = jax.tree.map(lambda leaf: coefficient * np.asarray(leaf, np.float64), tree)  # noqa: B023
    total = part if total is None else jax.tree.map(np.add, total, part)
    like = jax.tree.map(jnp.result_type, tree)
  return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), total, like)


def step_weight(std: float | int, t_next: ArrayLike, t_delta: ArrayLike) -> Array:
  """Give ``1 - beta``, what the newest parameters count in a mean: ``1 - (1 - t_delta / t_next)^(γ + 1)`` (eq. 127).

  Args:
    std: the mean's width.
    t_next: the time after the step, in images or in steps; may be traced.
    t_delta: the length of the step in the same unit, at most ``t_next``; the batch size, or 1.

  >>> [round(float(step_weight(0.1, step, 1)), 4) for step in (1, 2, 1000)]
  [1.0, 0.9959, 0.0079]
  """
  if checks.is_concrete((t_next, t_delta)):
    share = np.asarray(t_delta, np.float64) / t_next
    if not ((share >= 0) & (share <= 1)).all():
      raise ValueError(f"t_delta must lie between 0 and t_next, got {t_delta} and {t_next}")
  # Not as 1 - beta: late in the training beta is so near 1 that float32 has few digits of the difference.
  return -jnp.expm1((float(std_to_exponent(std)) + 1) * jnp.log1p(-jnp.asarray(t_delta) / t_next))


def _constant(step: Any, decay: float) -> Any:
  """The share is ``1 - decay``, and larger early on: the mean would otherwise remember the random start."""
  return 1 - jnp.minimum(decay, (1 + step) / (10 + step))


def _power(step: Any, decay: float, *, std: float = 0.1) -> Any:
  """The share of EDM2's power-function mean, whose width is ``std`` times the length of the training so far."""
  del decay
  return step_weight(std, jnp.asarray(step + 1, float), 1.0)


MEANS: dict[str, Callable[..., Any]] = {"constant": _constant, "power": _power}


def newest_share(text: str, decay: float) -> Callable[[Any], Any]:
  """Give how much the newest parameters count in the running mean, as a function of the step.

  Args:
    text: ``constant``, or ``power:std=0.1`` with another width.
    decay: how much the mean of before counts, for ``constant``.

  Raises:
    ValueError: for an unknown name, naming the nearest, an option that the mean does not have, or a width out of range.

  >>> round(float(newest_share("power:std=0.1", 0.995)(999)), 4)
  0.0079
  """
  function, options = specs.made("running mean", text, MEANS, "step", "decay")
  if "std" in options:
    std_to_exponent(options["std"])
  return functools.partial(function, decay=decay, **options)


@dataclasses.dataclass(frozen=True)
class PowerFunctionEMA:
  """Several means of one set of parameters, kept while training: ``init(params)``, then ``update`` after each step.

  Args:
    stds: their widths, relative to the length of the training so far; above 0 and at most 0.2887.

  Raises:
    ValueError: if a width is outside.
  """

  stds: tuple[float, ...] = (0.05, 0.1)

  def __post_init__(self):
    if not self.stds or any(isinstance(std, str) for std in self.stds):
      raise ValueError(f"stds must be at least one width, got {self.stds!r}")
    std_to_exponent(self.stds)

  def init(self, params: PyTree) -> tuple[PyTree, ...]:
    """Give the means before the first step: the parameters, one tree for each width."""
    return tuple(params for _ in self.stds)

  def update(
    self, emas: tuple[PyTree, ...], params: PyTree, t_next: ArrayLike, t_delta: ArrayLike
  ) -> tuple[PyTree, ...]:
    """Give the means after a step that led to ``params``: ``ema + (1 - beta) (params - ema)``.

    Args:
      emas: the means before it.
      params: the parameters after it.
      t_next: as in `step_weight`.
      t_delta: as in `step_weight`.
    """

    def towards(weight, ema):
      return jax.tree.map(lambda mean, p: mean + (weight * (p - mean)).astype(mean.dtype), ema, params)

    weights = (step_weight(std, t_next, t_delta) for std in self.stds)
    return tuple(towards(*both) for both in zip(weights, emas, strict=True))
