r"""Guidance by gradients: of a classifier of noisy examples, or of any log-probability of clean examples.

The guidances differ in where they take the gradient of a `LogProb`. `classifier` takes it at ``x``, `reconstruction` at
``D(x)`` and through the denoiser, `backward_guidance` at ``D(x)`` only. They chain with each other and with guidance by
two predictions. An example is classifier-free guidance followed by a noisy classifier; their changes add up:

>>> import jax.numpy as jnp
>>> import jaxguide as jg
>>> ring = jg.ring(4)
>>> both = jg.chain(jg.classifier_free(4, 2.0), jg.classifier(ring.log_prob, 1.5))(ring.denoiser)
>>> at = jnp.array([0.3, 0.2]), jnp.asarray(1.0), 0
>>> bool(jnp.allclose(both(*at), jg.classifier_free(4, 3.5)(ring.denoiser)(*at)))  # for an exact classifier
True
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import (
  Example,
  Guidance,
  Leaf,
  LogProb,
  Prediction,
  PyTree,
  Scalar,
  Scale,
  map_x0,
  scale_at,
  x0_of,
)
from jaxguide.guidance import passes
from jaxguide.guidance.reuse import Reused, acts_at, of_clean
from jaxguide.guidance.rule import Rule, check_guidances, check_log_prob


def classifier(log_prob: LogProb, scale: Scale, every: int = 1) -> Guidance:
  r"""Classifier guidance (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

  The gradient of a classifier of noisy examples is added to the score. With ``γ = scale``, ``x = x_t / alpha`` and
  ``σ_t = sqrt(1 - ᾱ_t) = alpha sigma``, the forms in the literature are

  .. math::
    \tilde s(x) &= s(x) + \gamma \nabla_x \log p(y | x; \sigma) \\
    \tilde D(x) &= D(x) + \gamma \sigma^2 \nabla_x \log p(y | x; \sigma) \quad (x_0) \\
    \tilde\epsilon(x_t) &= \epsilon(x_t) - \gamma \sigma_t \nabla_{x_t} \log p(y | x_t) \quad \text{(Algorithm 2)}

  The three are equivalent. Some lecture notes omit the ``σ_t`` in the last form; without it they are not.

  Args:
    log_prob: ``(x, sigma, cond) -> log p(cond | x; sigma)``, a scalar; see `ClassifierLogProb`.
    scale: γ, a number or a function of ``sigma`` (see `jaxguide.scales`). On an unconditional denoiser 0 is
      unconditional and 1 is conditional, if the classifier is exact. On a conditional denoiser the power is
      ``1 + scale``. The paper uses 1 to 10.
    every: n; the gradient is computed in every n-th step and reused in between; static. See `jaxguide.guidance.reuse`.

  Returns:
    A `Guidance`. The guided denoiser costs one evaluation of the denoiser, and in every n-th step one of the classifier
    with its gradient. A scale of 0 costs no gradient if it is known when the program is made, or is looked at while it
    runs (`jaxguide.scales.static`, `branching`).

  Raises:
    ValueError: if ``scale`` is not finite, or if ``every`` is not a whole number of at least 1.

  >>> guided = classifier(lambda x, sigma, cond: -0.5 * (x - cond) ** 2, 2.0)(lambda x, sigma, cond: x)
  >>> float(guided(jnp.asarray(0.0), jnp.asarray(0.5), 1.0))
  0.5
  """
  parameters = check_log_prob(log_prob), checks.scale("scale", scale)
  if (reused := Reused.every(every)) is None:
    return Rule(_classifier, parameters)
  return Rule(_classifier_reused, (*parameters, reused))


def _classifier(denoise, log_prob, scale, x, sigma, cond):
  def change(scale):
    return scale * sigma**2 * jax.grad(log_prob)(x, sigma, cond)

  change = passes.at(scale, sigma, x, {0.0: lambda: jnp.zeros_like(x)}, change)
  return map_x0(lambda x0: x0 + change, denoise(x, sigma, cond))


def _classifier_reused(denoise, log_prob, scale, reused, x, sigma, cond):
  acts = acts_at(log_prob, sigma) & passes.differs(scale, sigma, x, 0.0)
  gradient, _, state = reused(lambda: (jax.grad(log_prob)(x, sigma, cond), None), lambda: None, x, sigma, acts)
  factor = scale_at(scale, sigma, x) * sigma**2
  return map_x0(lambda x0: Prediction(x0 + factor * gradient, guidance_state=state), denoise(x, sigma, cond))


def reconstruction(log_prob: LogProb, scale: Scale, every: int = 1) -> Guidance:
  r"""Guidance by a log-probability of clean examples, with the gradient taken through the denoiser.

  .. math:: \tilde D(x) = D(x) + \gamma \sigma^2 \nabla_x \log p(y | x_0 = D(x))

  ``log_prob`` is a classifier of clean images, a measurement (`jaxguide.measurement`) or minus any energy. Special
  cases are

  - diffusion posterior sampling, DPS (Chung et al. 2023, arXiv:2209.14687, eq. 10 to 16). Its Algorithm 1 moves the
    sample after the step along the gradient of the distance; that is `jaxguide.distance` with `jaxguide.scales.dps`;
  - forward universal guidance (Bansal et al. 2023, arXiv:2302.07121, eq. 6), with the paper's
    ``s(t) = γ sqrt(1 - ᾱ_t)``: 10 for CLIP, 400 for segmentation;
  - reconstruction guidance (Ho et al. 2022, arXiv:2204.03458, eq. 8), for a measurement without noise whose ``spread``
    is σ; γ is the paper's w_r.

  The method replaces the distribution ``p(x0 | x)`` by its mean ``D(x)``. `jaxguide.measurement` can take the spread of
  ``p(x0 | x)`` into account.

  The papers' per-step self-recurrence, which adds noise and denoises again in each step, would be a part of the
  sampling loop and is not included.

  Args:
    log_prob: ``(x0, sigma, cond) -> log p(cond | x0)``, a scalar; it receives the denoised example.
    scale: γ, a number or a function of ``sigma``. 0 is the bare denoiser.
    every: n; the gradient is computed in every n-th step and reused in between; static. See `jaxguide.guidance.reuse`.

  Returns:
    A `Guidance`. The guided denoiser costs one evaluation of the denoiser with its gradient (the time of about three
    evaluations and the memory of one training example), and one of ``log_prob`` with its gradient. Steps that reuse a
    gradient, and a scale of 0 as in `classifier`, cost one evaluation of the denoiser.

  Raises:
    ValueError: if ``scale`` is not finite, or if ``every`` is not a whole number of at least 1.

  >>> log_prob = lambda x0, sigma, cond: -0.5 * (x0 - cond) ** 2
  >>> guided = reconstruction(log_prob, 1.0)(lambda x, sigma, cond: 0.5 * x)
  >>> float(guided(jnp.asarray(0.0), jnp.asarray(2.0), 1.0))  # σ² · 0.5 · (1 - 0)
  2.0
  """
  parameters = check_log_prob(log_prob), checks.scale("scale", scale)
  if (reused := Reused.every(every)) is None:
    return Rule(_reconstruction, parameters)
  return Rule(_reconstruction_reused, (*parameters, reused))


def _through(denoise, log_prob, x, sigma, cond):
  """Return the gradient through the denoiser, and the prediction."""

  def value(x):
    prediction = denoise(x, sigma, cond)
    return log_prob(x0_of(prediction), sigma, cond), prediction

  return jax.grad(value, has_aux=True)(x)


def _reconstruction(denoise, log_prob, scale, x, sigma, cond):
  def guided(scale):
    gradient, prediction = _through(denoise, log_prob, x, sigma, cond)
    return map_x0(lambda x0: x0 + scale * sigma**2 * gradient, prediction)

  return passes.at(scale, sigma, x, {0.0: lambda: denoise(x, sigma, cond)}, guided)


def _reconstruction_reused(denoise, log_prob, scale, reused, x, sigma, cond):
  gradient, prediction, state = reused(
    lambda: _through(denoise, log_prob, x, sigma, cond),
    lambda: denoise(x, sigma, cond),
    x,
    sigma,
    passes.differs(scale, sigma, x, 0.0),
  )
  factor = scale_at(scale, sigma, x) * sigma**2
  return map_x0(lambda x0: Prediction(x0 + factor * gradient, guidance_state=state), prediction)


def backward_guidance(log_prob: LogProb, step_size: Scale, steps: int = 1, every: int = 1) -> Guidance:
  r"""Gradient ascent on the denoised example itself (Bansal et al. 2023, arXiv:2302.07121, eq. 7 to 9).

  .. math:: x_0 \leftarrow x_0 + \eta \nabla_{x_0} \log p(y | x_0), \quad m \text{ times, from } x_0 = D(x)

  "Backward" as in the backward Euler method. No gradient goes through the network. The paper adds this guidance to
  forward guidance if the latter follows the condition too weakly:
  ``chain(reconstruction(log_prob, scale), backward_guidance(log_prob, step_size, steps))``. In Algorithm 1 of the paper
  the steps start from ``D(x)``, and the change of forward guidance is added afterwards. Here the steps start from the
  output of the guidances before it in the chain.

  Args:
    log_prob: ``(x0, sigma, cond) -> log p(cond | x0)``, a scalar; it receives the denoised example.
    step_size: η, a number or a function of ``sigma``, in units of ``x0`` squared per nat. 0 changes nothing. It is
      stable up to 1 over the largest curvature, which is ``std²`` if `jaxguide.measurement` has the identity as
      its operator.
    steps: m, the number of steps; static. More steps follow the condition more closely.
    every: n; the gradients are computed in every n-th step of the solver, and their sum is reused in between; static.
      See `jaxguide.guidance.reuse`.

  Returns:
    A `Guidance`. The guided denoiser costs one evaluation of the denoiser, and ``steps`` evaluations of ``log_prob``
    with its gradient in every n-th step of the solver. A step size of 0 costs none, as in `classifier`.

  Raises:
    ValueError: if ``step_size`` is not finite, or if ``steps`` or ``every`` is not a whole number of at least 1.

  >>> log_prob = lambda x0, sigma, cond: -0.5 * (x0 - cond) ** 2
  >>> guided = backward_guidance(log_prob, 0.5, steps=2)(lambda x, sigma, cond: x)
  >>> float(guided(jnp.asarray(0.0), jnp.asarray(2.0), 1.0))  # half the way, twice
  0.75
  """
  climb = _Climb(log_prob, checks.at_least("steps", steps, 1))
  parameters = climb, checks.scale("step_size", step_size)
  if (reused := Reused.every(every, of_clean)) is None:
    return Rule(_backward_guidance, parameters)
  return Rule(_backward_guidance_reused, (*parameters, reused))


def _backward_guidance(denoise, climb, step_size, x, sigma, cond):
  def climbed(x0):
    return passes.at(step_size, sigma, x, {0.0: lambda: x0}, lambda step_size: climb(x0, step_size, sigma, cond))

  return map_x0(climbed, denoise(x, sigma, cond))


def _backward_guidance_reused(denoise, climb, step_size, reused, x, sigma, cond):
  acts, step_size = passes.differs(step_size, sigma, x, 0.0), scale_at(step_size, sigma, x)

  def climbed(x0):
    total, _, state = reused(lambda: (climb.total(x0, step_size, sigma, cond), None), lambda: None, x, sigma, acts)
    return Prediction(x0 + step_size * total, guidance_state=state)

  return map_x0(climbed, denoise(x, sigma, cond))


@struct.dataclass
class _Climb:
  log_prob: Leaf
  steps: int = struct.field(pytree_node=False)

  def __call__(self, x0: Example, step_size: Scalar, sigma: Scalar, cond: PyTree) -> Example:
    climb = jax.grad(self.log_prob)
    return jax.lax.fori_loop(0, self.steps, lambda _, x0: x0 + step_size * climb(x0, sigma, cond), x0)

  def total(self, x0: Example, step_size: Scalar, sigma: Scalar, cond: PyTree) -> Example:
    """Return the sum of the gradients on the way."""

    def step(_, total):
      return total + jax.grad(self.log_prob)(x0 + step_size * total, sigma, cond)

    return jax.lax.fori_loop(0, self.steps, step, jnp.zeros_like(x0))


def normalized(guidance: Guidance, ratio: Scale) -> Guidance:
  r"""Rescale the change that a guidance makes to ``ratio`` times the norm of the predicted noise.

  .. math::
    \tilde D = D + \rho \|x - D\| \frac{\Delta}{\|\Delta\|}, \qquad \Delta = \text{guided} - D

  The norms are over one example. Any guidance can be normalised. For `classifier` this is norm-based guidance (Kim et
  al. 2022, Guided-TTS, arXiv:2111.11755): it scales the classifier's gradient g to ρ times the norm of the score,
  :math:`\tilde s = s + \rho \|s\| g / \|g\|`, since ``D = x + σ² s``. This helps if the gradient of a classifier,
  especially of a classifier of clean examples, vanishes or explodes.

  Only the sign of the scale inside ``guidance`` matters. The scale must be large enough for a change above the rounding
  error (in float32, 1e-7 of ``x0``). If the guidance changes nothing, or if no noise is left, the result is that of the
  bare denoiser.

  Args:
    guidance: the guidance to normalise. For a `chain`, its total change is normalised.
    ratio: ρ, a number or a function of ``sigma``. 0 is the bare denoiser. The paper uses 0.3 for speech.

  Returns:
    A `Guidance`. The guided denoiser costs one evaluation of the denoiser, and what ``guidance`` evaluates beside it:
    that of the bare denoiser at the same inputs is not repeated.

  Raises:
    ValueError: if ``ratio`` is negative or not finite.

  >>> inside = classifier(lambda x, sigma, cond: jnp.sum(x * cond), 5.0)
  >>> guided = normalized(inside, 0.1)(lambda x, sigma, cond: 0 * x)
  >>> guided(jnp.array([3.0, 4.0]), jnp.asarray(2.0), jnp.array([0.0, 2.0])).tolist()  # 0.1 of 5, along the gradient
  [0.0, 0.5]
  """
  ratio = checks.scale("ratio", ratio) if callable(ratio) else checks.in_range("ratio", ratio, 0)
  return Rule(_normalized, (*check_guidances((guidance,)), ratio))


def _normalized(denoise, guidance, ratio, x, sigma, cond):
  ratio = scale_at(ratio, sigma, x)

  def rescale(x0, guided):
    _, length = _polar(x - x0)
    direction, _ = _polar(guided - x0)
    return x0 + ratio * length * direction

  bare, denoise = passes.evaluated(denoise, x, sigma, cond)
  return map_x0(rescale, bare, guidance(denoise)(x, sigma, cond))


def _polar(v: Example) -> tuple[Example, Scalar]:
  """Return the direction and the length of ``v``; both are 0, with finite gradients, if ``v`` is 0."""
  # Divided by the largest element first, so that the squares of small numbers do not underflow.
  unit = jax.lax.stop_gradient(jnp.max(jnp.abs(v), initial=0))
  zero = unit == 0
  unit = jnp.where(zero, 1, unit)
  length = jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, jnp.sum(jnp.square(v / unit)))))
  return v / unit / jnp.where(zero, 1, length), unit * length
