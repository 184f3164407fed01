r"""Combine rules: functions that make one guided prediction from two predictions.

A rule is a function ``(x0, x0_base, scale, x, sigma) -> x0`` of one example. ``x0`` is the conditional (or good)
prediction, ``x0_base`` the unconditional (or weak) one that guidance moves away from, ``scale`` is γ, and ``x`` and
``sigma`` are the inputs of both predictions. `jaxguide.classifier_free` and `jaxguide.autoguidance` take a rule as
``combine``. `linear` is the rule of their papers; the others are made for large scales. At ``scale`` 1 every rule gives
``x0`` (`zero_star` only below its ``sigma_zero``). At ``scale`` 0 only `linear` gives ``x0_base`` for all arguments.

Some papers define their rule for ε or for the velocity of a flow. Such a rule converts from ``x0`` with ``x`` and
``sigma``, so it means the same for every network. Rules are pytrees and their numbers are leaves, so one compiled
program serves a sweep over them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxguide._core import checks, struct
from jaxguide._core.typing import Array, ArrayLike, Example, Prediction, Scalar, map_x0, x0_of
from jaxguide.guidance import state as guidance_state
from jaxguide.guidance.state import GuidanceState

Combine = Callable[..., Example | Prediction]
"""``(x0, x0_base, scale, x, sigma) -> x0``; a rule with state gives a `Prediction`."""


def linear(x0: Example, x0_base: Example, scale: ArrayLike, x: Example, sigma: Scalar) -> Example:
  """``x0_base + γ (x0 - x0_base)``: the rule of classifier-free guidance and of autoguidance.

  >>> float(linear(jnp.asarray(3.0), jnp.asarray(1.0), 2.0, jnp.asarray(0.0), jnp.asarray(1.0)))
  5.0
  """
  return x0_base + jnp.asarray(scale, x0.dtype) * (x0 - x0_base)


def rescaled(phi: ArrayLike = 0.7, of: Combine = linear) -> Combine:
  r"""Rescale to the standard deviation of the conditional prediction (Lin et al. 2023, arXiv:2305.08891, section 3.4).

  .. math::
    D_{rescaled} = D_{cfg} \cdot std(D_y) / std(D_{cfg}), \qquad
    \tilde D = \phi D_{rescaled} + (1 - \phi) D_{cfg}

  ``std`` is the standard deviation of ``x0`` over all elements of one example. The paper takes it of its network's
  output, v, and other libraries take it of their network's output, so the meaning of φ there depends on the
  parameterization. If ``std(D_cfg)`` is 0, as for an example of one element, nothing is rescaled.

  Args:
    phi: φ, from 0 (off) to 1. The paper uses 0.7 with γ = 7.5.
    of: the rule that gives ``D_cfg``.

  Raises:
    ValueError: if ``phi`` is not between 0 and 1.

  >>> x0, base = jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0])
  >>> rescaled(1.0)(x0, base, 5.0, x0, jnp.asarray(1.0)).tolist()
  [1.0, 3.0]
  """
  return Partial(_rescaled, checks.in_range("phi", checks.single("phi", phi), 0, 1), check_rule(of))


def _rescaled(phi, of, x0, x0_base, scale, x, sigma):
  phi, target_std = jnp.asarray(phi, x0.dtype), _std(x0)

  def rescale(guided):
    std = _std(guided)
    factor = jnp.where(std > 0, target_std / jnp.where(std > 0, std, 1), 1)
    return (phi * factor + (1 - phi)) * guided

  return map_x0(rescale, of(x0, x0_base, scale, x, sigma))


def projected(eta: ArrayLike = 0.0, norm_threshold: ArrayLike = math.inf, momentum: ArrayLike | None = None) -> Combine:
  r"""Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, section 4 and algorithm 1).

  The rule changes the difference of the two predictions in three ways. It adds a momentum of earlier steps, it limits
  the norm to r, and it weakens the part parallel to the conditional prediction, which saturates colours:

  .. math::
    \bar\Delta_t = D_y - D_\varnothing + \beta \bar\Delta_{t+1}, \qquad
    \Delta = \bar\Delta \min(1, r / \|\bar\Delta\|), \qquad
    \Delta_\parallel = \frac{\langle\Delta, D_y\rangle}{\langle D_y, D_y\rangle} D_y, \qquad
    \tilde D = D_y + (\gamma - 1) (\Delta - \Delta_\parallel + \eta \Delta_\parallel)

  The rule acts on ``x0``, as in the paper. With η = 1, no threshold and no momentum it is `linear`; otherwise
  ``scale`` 0 does not give the unconditional prediction. (Some libraries compute ``uncond + γ Δ``, which gives other
  results, also at scale 1.)

  Args:
    eta: η, the factor of the parallel part. The paper uses 0.
    norm_threshold: r, above 0, in units of ``x0``; infinite for no limit. It limits the norm over one example, so
      larger examples need a larger r. The paper uses 2.5 for EDM2 and 15 for Stable Diffusion XL.
    momentum: β, between -1 and 1, or None for no momentum. Negative values move away from the direction of earlier
      steps. The paper uses -0.75 for EDM2 and -0.5 for Stable Diffusion XL. Momentum needs `jaxguide.sample`, which
      carries the state from step to step; in a separate call the denoiser is always at its first step.

  Raises:
    ValueError: if ``eta`` is not finite, if ``norm_threshold`` is not above 0, or if ``momentum`` is not between -1
      and 1.

  >>> x0, base = jnp.array([2.0, 0.0]), jnp.array([1.0, -1.0])
  >>> projected(0.0)(x0, base, 3.0, x0, jnp.asarray(1.0)).tolist()
  [2.0, 2.0]
  """
  numbers = checks.single("eta", eta), checks.above("norm_threshold", norm_threshold, 0)
  if momentum is None:
    return Partial(_projected, *numbers)
  return Partial(
    _averaged,
    checks.in_range("momentum", checks.single("momentum", momentum), -1, 1),
    GuidanceState(),
    Partial(_projected, *numbers),
  )


def _projected(eta, norm_threshold, x0, x0_base, scale, x, sigma):
  eta, most, scale = (jnp.asarray(number, x0.dtype) for number in (eta, norm_threshold, scale))
  delta = x0 - x0_base
  too_long = _dot(delta, delta) > most**2
  delta *= jnp.where(too_long, most / jnp.sqrt(jnp.where(too_long, _dot(delta, delta), 1)), 1)
  parallel = _ratio(_dot(delta, x0), _dot(x0, x0)) * x0
  return x0 + (scale - 1) * (delta + (eta - 1) * parallel)


def _averaged(momentum, state, of, x0, x0_base, scale, x, sigma):
  delta = x0 - x0_base + jnp.asarray(momentum, x0.dtype) * state.or_zeros(x0)
  next_state = state.becomes(delta)
  return map_x0(lambda guided: Prediction(guided, guidance_state=next_state), of(x0, x0 - delta, scale, x, sigma))


def zero_star(sigma_zero: ArrayLike = math.inf) -> Combine:
  r"""CFG-Zero* (Fan et al. 2025, arXiv:2503.18886): an optimal factor on the base's velocity, zero velocity at first.

  The paper has a flow with velocity ``v = eps - x0`` and time ``t = σ / (1 + σ)``. In this library's variables
  ``v = (x - (1 + σ) x0) / σ``. The rule is

  .. math::
    \tilde v = s^* v_\varnothing + \gamma (v_y - s^* v_\varnothing), \qquad
    s^* = \langle v_y, v_\varnothing\rangle / \|v_\varnothing\|^2

  and ``v = 0`` in the first steps. The rule means the same for every network, not only for flows. If the base's
  velocity is 0, the factor ``s*`` is 0.

  Args:
    sigma_zero: at this noise level and above the velocity is 0, that is ``x0 = x / (1 + σ)``, at every scale, also 1.
      The paper does this in the first one or few steps; ``sigmas[0]`` of a grid selects the first step alone. Infinite
      for no such steps.

  Raises:
    ValueError: if ``sigma_zero`` is not above 0.

  >>> x0, base = jnp.array([1.0, 0.0]), jnp.array([2.0, 0.0])  # at x = 0 velocities are multiples of x0
  >>> zero_star()(x0, base, 3.0, jnp.zeros(2), jnp.asarray(1.0)).tolist()
  [1.0, 0.0]
  >>> zero_star(1.0)(x0, base, 3.0, jnp.array([4.0, 2.0]), jnp.asarray(1.0)).tolist()
  [2.0, 1.0]
  """
  return Partial(_zero_star, checks.above("sigma_zero", sigma_zero, 0))


def _zero_star(sigma_zero, x0, x0_base, scale, x, sigma):
  # σ v in place of v: it is finite at σ = 0, and s* does not change.
  velocity, base = x - (1 + sigma) * x0, x - (1 + sigma) * x0_base
  base *= _ratio(_dot(velocity, base), _dot(base, base))
  guided = x0 - (jnp.asarray(scale, x0.dtype) - 1) * (velocity - base) / (1 + sigma)
  return jnp.where(sigma >= sigma_zero, x / (1 + sigma), guided)


def tangential(x0: Example, x0_base: Example, scale: ArrayLike, x: Example, sigma: Scalar) -> Example:
  r"""Tangential damping, TCFG (Kwon et al. 2025, arXiv:2503.18137).

  The unconditional score is projected on the first right singular vector of the two scores:

  .. math::
    (s_y, s_\varnothing)^T = U \Sigma V^T, \qquad \hat s_\varnothing = v_1 v_1^T s_\varnothing, \qquad
    \tilde s = \hat s_\varnothing + \gamma (s_y - \hat s_\varnothing)

  with the scores ``s = (x0 - x) / σ²`` of the paper, for every network. The rule has no parameters. For an example of
  one element it is `linear`.

  >>> x0, base = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
  >>> tangential(x0, base, 3.0, jnp.zeros(2), jnp.asarray(1.0)).tolist()
  [6.0, 0.0]
  """
  score, base = x0 - x, x0_base - x
  # v_1 = (cos θ s_y + sin θ s_∅) / σ_1, where (cos θ, sin θ) is the first eigenvector of the 2 x 2 Gram matrix of the
  # scores. The eigenvector equation gives the projection the factor sin θ, and
  # tan 2θ = 2 <s_y, s_∅> / (|s_y|² - |s_∅|²) = across / along.
  across, along = 2 * _dot(score, base), _dot(score - base, score + base)
  undefined = (across == 0) & (along == 0)
  theta = 0.5 * jnp.arctan2(across, jnp.where(undefined, 1, along))
  base = jnp.sin(theta) * (jnp.cos(theta) * score + jnp.sin(theta) * base)
  return x0 + (jnp.asarray(scale, x0.dtype) - 1) * (score - base)


def frequency_decoupled(*ratios: ArrayLike) -> Combine:
  r"""Frequency-decoupled guidance (Sadat et al. 2025, arXiv:2506.19713): one scale for each band of frequencies.

  Both predictions are decomposed into Laplacian pyramids (Burt & Adelson 1983). Each level is guided with its own
  scale, and the guided pyramid is put together again:

  .. math::
    L_k(\tilde D) = L_k(D_\varnothing) + \gamma_k (L_k(D_y) - L_k(D_\varnothing)), \qquad
    \gamma_k = 1 + \rho_k (\gamma - 1)

  The paper finds that strong guidance of low frequencies reduces diversity and saturates, while strong guidance of high
  frequencies improves quality. The rule is linear and the pyramid is exact. So ratios of 1 give `linear`, and a
  ``scale`` of 1 gives the conditional prediction.

  Args:
    *ratios: ρ for each level, finest first, at least one. The last one is for the coarsest level, the rest of the
      image. The paper has ``γ_high`` well above ``γ_low``. Other libraries use scales 10 and 5 for two levels; here
      that is a ``scale`` of 10 with ratios ``(1, 4 / 9)``.

  Returns:
    A rule for examples of shape (*space, channels), or (space,) with one axis. Every side must be at least
    ``2**(levels - 1)``.

  Raises:
    ValueError: if there are no ratios or one is not finite; when called, if the example is too small.

  >>> x0, base = jnp.arange(16.0).reshape(4, 4, 1), jnp.zeros((4, 4, 1))
  >>> rule = frequency_decoupled(1.0, 0.5)
  >>> bool(jnp.allclose(rule(x0, base, 1.0, x0, jnp.asarray(1.0)), x0, atol=1e-5))
  True
  """
  if not ratios:
    raise ValueError("frequency_decoupled needs a ratio for at least one level, got none")
  return Partial(_frequency_decoupled, tuple(checks.single("ratio", ratio) for ratio in ratios))


def _frequency_decoupled(ratios, x0, x0_base, scale, x, sigma):
  space = range(max(1, x0.ndim - 1)) if x0.ndim else ()
  least = 2 ** (len(ratios) - 1)
  if any(x0.shape[axis] < least for axis in space):
    raise ValueError(
      f"{len(ratios)} levels of frequencies need an example with sides of at least {least}, got shape {x0.shape}: "
      "give fewer ratios"
    )
  # The pyramid is linear, so it is enough to decompose the difference and to add it, weighted, to x0.
  rest = x0 - x0_base
  parts: list[Array] = []
  for _ in ratios[1:]:
    coarse = _resized(_blurred(rest, space), [max(1, x0.shape[axis] // 2 ** (len(parts) + 1)) for axis in space])
    parts.append(rest - _enlarged(coarse, rest.shape, space))
    rest = coarse
  changed = jnp.asarray(ratios[-1], x0.dtype) * rest
  for ratio, part in zip(ratios[-2::-1], parts[::-1], strict=True):
    changed = _enlarged(changed, part.shape, space) + jnp.asarray(ratio, x0.dtype) * part
  return x0 + (jnp.asarray(scale, x0.dtype) - 1) * changed


def channels(n: int, of: Combine = linear) -> Combine:
  """Guide the first channels only; the others are those of the conditional prediction.

  The samplers of DiT (arXiv:2212.09748), SiT (arXiv:2401.08740) and LightningDiT (arXiv:2501.01423) guide the first
  three channels of their latents, for historical reasons. Each of x0, eps and velocity of a channel depends on that
  channel alone, so the rule means the same for each of them.

  Args:
    n: number of guided channels, the first of the last axis; at least 1.
    of: the rule for these channels. It receives these channels alone: what it measures, such as a norm, is theirs.

  Raises:
    ValueError: if ``n`` is below 1; when called, if an example has fewer channels.

  >>> x0, base = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 0.0]])
  >>> channels(1)(x0, base, 5.0, x0, jnp.asarray(1.0)).tolist()
  [[5.0, 1.0]]
  """
  return Partial(_channels, _Count(checks.at_least("n", n, 1)), check_rule(of))


@struct.dataclass
class _Count:
  """A whole number that is static in a compiled program."""

  n: int = struct.field(pytree_node=False)


def _channels(count, of, x0, x0_base, scale, x, sigma):
  n, width = count.n, x0.shape[-1] if x0.ndim else 0
  if n > width:
    raise ValueError(f"channels guides the first {n} channels, and the example has shape {x0.shape}: give a smaller n")
  of = guidance_state.map_states(
    lambda state: state if state.value is None else dataclasses.replace(state, value=state.value[..., :n]), of
  )
  guided = of(x0[..., :n], x0_base[..., :n], scale, x[..., :n], sigma)
  whole = jnp.concatenate([x0_of(guided), x0[..., n:]], -1)
  if not isinstance(guided, Prediction):
    return whole
  states = {slot: jnp.zeros_like(x0).at[..., :n].set(value) for slot, value in guided.guidance_state.items()}
  return Prediction(whole, guidance_state=states)


def _blurred(x: Array, space: Sequence[int]) -> Array:
  """Convolve with Burt & Adelson's kernel (1, 4, 6, 4, 1) / 16 along the axes ``space``, mirrored at the borders."""
  for axis in space:
    pads = [(2, 2) if other == axis else (0, 0) for other in range(x.ndim)]
    padded, size = jnp.pad(x, pads, mode="reflect"), x.shape[axis]
    parts = [jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in range(5)]
    x = (parts[0] + parts[4] + 4 * (parts[1] + parts[3]) + 6 * parts[2]) / 16
  return x


def _resized(x: Array, sides: Sequence[int]) -> Array:
  return jax.image.resize(x, (*sides, *x.shape[len(sides) :]), "bilinear", antialias=False)


def _enlarged(x: Array, shape: Sequence[int], space: Sequence[int]) -> Array:
  return _blurred(_resized(x, shape[: len(space)]), space)


def _dot(a: Example, b: Example) -> Array:
  return jnp.sum(a * b)


def _ratio(a: Array, b: Array) -> Array:
  """``a / b`` for ``b >= 0``, and 0 if ``b`` is 0. Its gradient is finite there too."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _std(x: Example) -> Array:
  """The standard deviation over all elements; its gradient is 0 where it is 0."""
  variance = jnp.var(x)
  return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def gives_x0_at_1(rule: Combine) -> bool:
  """Whether a rule is known to give ``x0`` at scale 1 whatever the base is, without state.

  >>> gives_x0_at_1(check_rule(rescaled(of=tangential))), gives_x0_at_1(zero_star())
  (True, False)
  """
  function = getattr(rule, "func", rule)
  if function in (_rescaled, _channels):
    return gives_x0_at_1(rule.args[1])  # type: ignore[attr-defined]
  return function in (linear, _projected, tangential, _frequency_decoupled)


def of_base_at_0(rule: Combine) -> bool:
  """Whether a rule is known to give the base at scale 0 whatever ``x0`` is."""
  return getattr(rule, "func", rule) is linear


def check_rule(combine: Any) -> Combine:
  """Return a combine rule as a pytree.

  Raises:
    TypeError: if ``combine`` is not a function, or is a function that makes a rule, such as `rescaled`.

  >>> check_rule(rescaled)
  Traceback (most recent call last):
  ...
  TypeError: combine must be a rule, got the function that makes one: call it, rescaled(...)
  """
  for make in (rescaled, projected, zero_star, frequency_decoupled, channels):
    if combine is make:
      raise TypeError(f"combine must be a rule, got the function that makes one: call it, {make.__name__}(...)")
  if not callable(combine) or isinstance(combine, type):
    raise TypeError(f"combine must be a rule, such as jaxguide.combine.rescaled(0.7), got {combine!r}")
  return struct.as_tree(combine)
