"""DDPM's ancestral sampling, with the papers' variances and their classifier guidance by a shift of the mean."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Example, Key, Leaf, LogProb, Prediction, Scalar, scale_at, x0_of
from jaxguide.guidance.passes import known
from jaxguide.guidance.reuse import acts_at, of_noisy, reuse
from jaxguide.guidance.state import GradientState
from jaxguide.schedules.posterior import VARIANCES, posterior_mean, reverse_variance
from jaxguide.solvers.base import Conditioned, Denoise, MultistepState, draw

GRADIENTS = ("x", "mean")


class ShiftState(NamedTuple):
  """A `MultistepState` with the kept gradient of the classifier and the number of steps so far, for ``every``."""

  x: Leaf
  x0: Leaf
  sigma: Leaf
  kept: Leaf


@struct.dataclass
class DDPM:
  r"""Ancestral sampling (Ho et al. 2020, arXiv:2006.11239, Algorithm 2).

  .. math::
    x' \sim N(\mu + s \Sigma g,\; \Sigma), \quad \mu = D + \frac{\sigma'^2}{\sigma^2} (x - D)

  With ``variance="small"`` and no classifier it is `DDIM` with ``eta = 1``. Guidance of the denoiser changes the mean
  through ``D``. In addition, a classifier can shift the mean by ``s Σ g`` (Dhariwal & Nichol 2021, arXiv:2105.05233,
  Algorithm 1). `jaxguide.classifier` is their Algorithm 2, the ε form. The two agree in the limit of small steps.

  ``g`` is the gradient of ``log p(y | x)``. The paper and its code compute it at different points. Both cost one
  gradient a step:

  - ``gradient_at="x"``: at the sample and the level before the step, as in the released code.
  - ``gradient_at="mean"``: at μ and the level after the step, as in the paper's derivation (eq. 5). In the last step,
    whose level after the step is 0, the level before it is used.

  Args:
    variance: Σ: ``small``, ``large`` or ``learned_range``; see `jaxguide.posterior.reverse_variance`. ``learned_range``
      needs a denoiser made with ``learned_variance=True``. OpenAI's models without a learned variance use ``large``.
    log_prob: a classifier, ``(x, sigma, cond) -> log p(cond | x; sigma)``, or None.
    scale: s, the power γ in ``p(x) p(y|x)^γ``; 0 is unguided. A number, or a function of ``sigma`` that is a pytree,
      such as those of `jaxguide.scales`.
    gradient_at: ``x`` or ``mean``.
    every: n; the gradient is computed in every n-th step and reused in between; static. See `jaxguide.guidance.reuse`.

  Raises:
    ValueError: for an unknown variance or point (the message has the nearest name), a scale that is not finite, or an
      ``every`` that is not a whole number of at least 1; when it is used, for an ``every`` without ``log_prob``.

  >>> DDPM(variance="large").variance
  'large'
  """

  variance: str = struct.field(pytree_node=False, default="small")
  log_prob: LogProb | Leaf | None = None
  scale: Leaf = 1.0
  gradient_at: str = struct.field(pytree_node=False, default="x")
  every: int = struct.field(pytree_node=False, default=1)
  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.lookup("variance", self.variance, dict.fromkeys(VARIANCES))
    checks.lookup("point for the gradient", self.gradient_at, dict.fromkeys(GRADIENTS))
    checks.number_field(self, "scale", checks.finite)
    object.__setattr__(self, "every", checks.at_least("every", self.every, 1))

  def init(self, x: Example) -> MultistepState | ShiftState:
    """Return the state before the first step."""
    state = MultistepState(x, x, jnp.asarray(jnp.inf, x.dtype))
    if self.every == 1:
      return state
    if self.log_prob is None:
      raise ValueError(f"every={self.every} reuses the gradient of log_prob, and there is none: leave it out")
    return ShiftState(*state, GradientState().or_zeros(x))

  def step(
    self, denoise: Denoise, state: MultistepState | ShiftState, sigma: Scalar, sigma_next: Scalar, key: Key
  ) -> MultistepState | ShiftState:
    """Take one step, with one evaluation."""
    x = state.x
    prediction = denoise.predict(x, sigma) if isinstance(denoise, Conditioned) else denoise(x, sigma)
    learned = prediction.variance if isinstance(prediction, Prediction) else None
    x0 = x0_of(prediction)
    mean = posterior_mean(x, x0, sigma, sigma_next)
    variance = reverse_variance(self.variance, sigma, sigma_next, state.sigma, learned)
    last = sigma_next <= 0
    kept = ()
    if self.log_prob is not None and known(self.scale) != 0:
      if not isinstance(denoise, Conditioned):
        raise TypeError("a mean shift needs the condition: use jaxguide.sample, or pass a Conditioned to step")
      at, level = (mean, jnp.where(last, sigma, sigma_next)) if self.gradient_at == "mean" else (x, sigma)
      gradient, kept = self._gradient(denoise.cond, state, at, level)
      if self.gradient_at == "x":
        # The paper's gradient is with respect to alpha x, and it shifts alpha' x'.
        gradient *= jnp.sqrt((1 + sigma**2) / (1 + sigma_next**2))
      mean += scale_at(self.scale, sigma, x) * variance.value * gradient
    std = jnp.where(last, 0, jnp.exp(0.5 * variance.log))
    state_next = MultistepState(mean + std * draw(key, x), x0, sigma)
    return ShiftState(*state_next, kept or state.kept) if isinstance(state, ShiftState) else state_next

  def _gradient(self, cond, state, x, sigma):
    """Return the gradient of the log-probability, and what is kept of it."""
    log_prob: Any = self.log_prob
    if not isinstance(state, ShiftState):
      return jax.grad(log_prob)(x, sigma, cond), ()

    def compute():
      return jax.grad(log_prob)(x, sigma, cond), None

    acts = acts_at(self.log_prob, sigma)
    gradient, _, kept = reuse(self.every, of_noisy, state.kept, compute, lambda: None, sigma, acts)
    return gradient, kept
