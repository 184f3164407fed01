r"""Combine rules: how guidance makes one prediction of two, the conditional one and the one to be pushed away from.

A rule is a function ``(x0, x0_base, scale, x, sigma) -> x0`` of one example: the conditional (or good) prediction, the
unconditional (or weak) one, γ, and where they were made. `jaxguide.classifier_free` and `jaxguide.autoguidance` take
it as ``combine``. `linear` is the papers' own; the others were made for large scales. All of them give ``x0`` at
``scale`` 1 (`zero_star` below its ``sigma_zero``); only `linear` gives ``x0_base`` at 0 whatever the arguments.

A rule that its paper defines for ε or for a flow's velocity is converted with ``x`` and ``sigma`` inside, and so means
the same for every network. Rules are pytrees with their numbers as leaves, so that one program serves a sweep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jaxguide._core import checks, struct
from jaxguide._core.typing import Array, ArrayLike, Example, Prediction, Scalar, map_x0
from jaxguide.guidance.state import GuidanceState

Combine = Callable[..., Example | Prediction]
"""``(x0, x0_base, scale, x, sigma) -> x0``, or a `Prediction` of one that remembers."""


def linear(x0: Example, x0_base: Example, scale: ArrayLike, x: Example, sigma: Scalar) -> Example:
  """``x0_base + γ (x0 - x0_base)``: the rule of classifier-free guidance and of autoguidance.

  >>> float(linear(jnp.asarray(3.0), jnp.asarray(1.0), 2.0, jnp.asarray(0.0), jnp.asarray(1.0)))
  5.0
  """
  return x0_base + jnp.asarray(scale, x0.dtype) * (x0 - x0_base)


def rescaled(phi: ArrayLike = 0.7, of: Combine = linear) -> Combine:
  r"""The spread of the conditional prediction is kept (Lin et al. 2023, arXiv:2305.08891, section 3.4).

  .. math::
    D_{rescaled} = D_{cfg} \cdot std(D_y) / std(D_{cfg}), \qquad
    \tilde D = \phi D_{rescaled} + (1 - \phi) D_{cfg}

  The paper takes the standard deviations of what its network predicts, v, and libraries those of whatever their
  network predicts, so that one φ means something else for every parameterization. Here it is always that of ``x0``:
  of one example, over all its elements. Where it is 0, as for an example of one element, nothing is rescaled.

  Args:
    phi: φ, from 0 (off) to 1. The paper uses 0.7 with γ = 7.5.
    of: the rule whose result is rescaled.

  Raises:
    ValueError: if ``phi`` is not between 0 and 1.

  >>> x0, base = jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0])
  >>> rescaled(1.0)(x0, base, 5.0, x0, jnp.asarray(1.0)).tolist()
  [1.0, 3.0]
  """
  return Partial(_rescaled, checks.in_range("phi", checks.single("phi", phi), 0, 1), check_rule(of))


def _rescaled(phi, of, x0, x0_base, scale, x, sigma):
  phi, wanted = jnp.asarray(phi, x0.dtype), _std(x0)

  def back(guided):
    spread = _std(guided)
    factor = jnp.where(spread > 0, wanted / jnp.where(spread > 0, spread, 1), 1)
    return (phi * factor + (1 - phi)) * guided

  return map_x0(back, of(x0, x0_base, scale, x, sigma))


def projected(eta: ArrayLike = 0.0, norm_threshold: ArrayLike = math.inf, momentum: ArrayLike | None = None) -> Combine:
  r"""Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, section 4 and algorithm 1).

  The difference is averaged with those of earlier steps, cut to a norm of at most r, and what of it is parallel to the
  conditional prediction, which is what saturates colours, is weakened:

  .. math::
    \bar\Delta_t = D_y - D_\varnothing + \beta \bar\Delta_{t+1}, \qquad
    \Delta = \bar\Delta \min(1, r / \|\bar\Delta\|), \qquad
    \Delta_\parallel = \frac{\langle\Delta, D_y\rangle}{\langle D_y, D_y\rangle} D_y, \qquad
    \tilde D = D_y + (\gamma - 1) (\Delta - \Delta_\parallel + \eta \Delta_\parallel)

  It acts on ``x0``, as in the paper. With η = 1, no threshold and no momentum it is `linear`. At ``scale`` 0 it is not
  the unconditional prediction otherwise. (Libraries that write ``uncond + γ Δ`` give something else at 1, and
  elsewhere.)

  Args:
    eta: η, how much of the parallel part is kept. The paper uses 0.
    norm_threshold: r, above 0, in units of ``x0`` and for one example, so that it grows with the number of elements;
      infinite for none. The paper uses 2.5 for EDM2 and 15 for Stable Diffusion XL.
    momentum: β, between -1 and 1; None remembers nothing. Negative pushes away from where earlier steps went: the paper
      uses -0.75 for EDM2 and -0.5 for Stable Diffusion XL. It works inside `jaxguide.sample`, which carries what is
      remembered; a denoiser that is called by itself is at its first step.

  Raises:
    ValueError: if ``eta`` is not finite, ``norm_threshold`` is not above 0, or ``momentum`` not between -1 and 1.

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
  off = x0 - x0_base
  long = _dot(off, off) > most**2
  off *= jnp.where(long, most / jnp.sqrt(jnp.where(long, _dot(off, off), 1)), 1)
  parallel = _ratio(_dot(off, x0), _dot(x0, x0)) * x0
  return x0 + (scale - 1) * (off + (eta - 1) * parallel)


def _averaged(momentum, state, of, x0, x0_base, scale, x, sigma):
  off = x0 - x0_base + jnp.asarray(momentum, x0.dtype) * state.or_zeros(x0)
  return map_x0(lambda guided: Prediction(guided, guidance_state=off), of(x0, x0 - off, scale, x, sigma))


def zero_star(sigma_zero: ArrayLike = math.inf) -> Combine:
  r"""CFG-Zero* (Fan et al. 2025, arXiv:2503.18886): the best multiple of the base's velocity, and none at first.

  For a flow, whose velocity is ``v = eps - x0`` and whose time is ``t = σ / (1 + σ)``, so that
  ``v = (x - (1 + σ) x0) / σ``,

  .. math::
    \tilde v = s^* v_\varnothing + \gamma (v_y - s^* v_\varnothing), \qquad
    s^* = \langle v_y, v_\varnothing\rangle / \|v_\varnothing\|^2

  and ``v = 0`` in the first steps. The result is that of a flow whatever the network predicts. Where the base's
  velocity is 0, so is the factor.

  Args:
    sigma_zero: from this noise level up the velocity is 0, that is ``x0 = x / (1 + σ)``, whatever the scale; at 1 too.
      The paper does so in the first step or few, for the first alone ``sigmas[0]`` of a grid. Infinite for nowhere.

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
  # σ v, which is finite where σ is 0; s* is the same.
  given, base = x - (1 + sigma) * x0, x - (1 + sigma) * x0_base
  base *= _ratio(_dot(given, base), _dot(base, base))
  guided = x0 - (jnp.asarray(scale, x0.dtype) - 1) * (given - base) / (1 + sigma)
  return jnp.where(sigma >= sigma_zero, x / (1 + sigma), guided)


def tangential(x0: Example, x0_base: Example, scale: ArrayLike, x: Example, sigma: Scalar) -> Example:
  r"""Tangential damping, TCFG (Kwon et al. 2025, arXiv:2503.18137).

  Of the unconditional score only what lies along the first right singular vector of the two scores is kept:

  .. math::
    (s_y, s_\varnothing)^T = U \Sigma V^T, \qquad \hat s_\varnothing = v_1 v_1^T s_\varnothing, \qquad
    \tilde s = \hat s_\varnothing + \gamma (s_y - \hat s_\varnothing)

  with ``s = (x0 - x) / σ²``, as the paper has it, whatever the network predicts. It takes no parameter. An example of
  one element has one direction, and the rule is `linear` there.

  >>> x0, base = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
  >>> tangential(x0, base, 3.0, jnp.zeros(2), jnp.asarray(1.0)).tolist()
  [6.0, 0.0]
  """
  given, base = x0 - x, x0_base - x
  # v_1 = (cos θ s_y + sin θ s_∅) / σ_1, where (cos θ, sin θ) is the first eigenvector of the matrix of their products,
  # and by that equation the projection has the factor sin θ. The difference of squares is that of the arguments of θ.
  across, along = 2 * _dot(given, base), _dot(given - base, given + base)
  none = (across == 0) & (along == 0)
  theta = 0.5 * jnp.arctan2(across, jnp.where(none, 1, along))
  base = jnp.sin(theta) * (jnp.cos(theta) * given + jnp.sin(theta) * base)
  return x0 + (jnp.asarray(scale, x0.dtype) - 1) * (given - base)


def frequency_decoupled(*ratios: ArrayLike) -> Combine:
  r"""Frequency-decoupled guidance (Sadat et al. 2025, arXiv:2506.19713): a scale for each band of frequencies.

  Both predictions are taken apart into a Laplacian pyramid (Burt & Adelson 1983), guided level by level, and put
  together again:

  .. math::
    L_k(\tilde D) = L_k(D_\varnothing) + \gamma_k (L_k(D_y) - L_k(D_\varnothing)), \qquad
    \gamma_k = 1 + \rho_k (\gamma - 1)

  The paper finds that low frequencies, guided much, lose diversity and saturate, and that high ones gain quality. As it
  is linear and the pyramid is exact, ratios of 1 give `linear`, and a ``scale`` of 1 the conditional prediction.

  Args:
    *ratios: ρ for each level, finest first, at least one; the last is of all that is left. The paper has
      ``γ_high`` well above ``γ_low``; libraries have 10 and 5 for two levels, here a ``scale`` of 10 and
      ``(1, 4 / 9)``.

  Returns:
    A rule for examples (*space, channels) (of one axis: (space,)) whose sides are at least ``2**(levels - 1)``.

  Raises:
    ValueError: if there are no ratios, or one is not finite; when called, for an example that is too small.

  >>> x0, base = jnp.arange(16.0).reshape(4, 4, 1), jnp.zeros((4, 4, 1))
  >>> rule = frequency_decoupled(1.0, 0.5)
  >>> bool(jnp.allclose(rule(x0, base, 1.0, x0, jnp.asarray(1.0)), x0, atol=1e-5))
  True
  """
  if not ratios:
    raise ValueError("frequency_decoupled needs a ratio for at least one level")
  return Partial(_frequency_decoupled, tuple(checks.single("ratio", ratio) for ratio in ratios))


def _frequency_decoupled(ratios, x0, x0_base, scale, x, sigma):
  space = range(max(1, x0.ndim - 1)) if x0.ndim else ()
  least = 2 ** (len(ratios) - 1)
  if any(x0.shape[axis] < least for axis in space):
    raise ValueError(f"{len(ratios)} levels of frequencies need sides of at least {least}, got shape {x0.shape}")
  # The pyramid is linear: the difference is taken apart, and its parts are added to the conditional prediction.
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


def _blurred(x: Array, space: Sequence[int]) -> Array:
  """Convolve with Burt & Adelson's kernel (1, 4, 6, 4, 1) / 16 along every axis of space, mirrored at the borders."""
  for axis in space:
    pads = [(2, 2) if each == axis else (0, 0) for each in range(x.ndim)]
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
  """``a / b``, and 0 where b is 0; with gradients that are finite there too."""
  return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _std(x: Example) -> Array:
  """The standard deviation over all elements, with a gradient of 0 where it is 0."""
  variance = jnp.var(x)
  return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)


def check_rule(combine: Any) -> Combine:
  """Give a combine rule as a pytree, if it is one and not the name or the maker of one.

  Raises:
    TypeError: if it is none.

  >>> check_rule(rescaled)
  Traceback (most recent call last):
  ...
  TypeError: combine must be a rule, got what makes one: call it, rescaled(...)
  """
  for make in (rescaled, projected, zero_star, frequency_decoupled):
    if combine is make:
      raise TypeError(f"combine must be a rule, got what makes one: call it, {make.__name__}(...)")
  if not callable(combine) or isinstance(combine, type):
    raise TypeError(f"combine must be a rule, such as jaxguide.combine.rescaled(0.7), got {combine!r}")
  return struct.as_tree(combine)
