"""DDPM's ancestral sampling, with the papers' variances and their classifier guidance by a shift of the mean."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Example, Key, Leaf, LogProb, Prediction, Scalar, scale_at, x0_of
from jaxguide.schedules.posterior import VARIANCES, posterior_mean, reverse_variance
from jaxguide.solvers.base import Conditioned, Denoise, MultistepState, draw

GRADIENTS = ("x", "mean")


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

  Raises:
    ValueError: for an unknown variance or point (the message has the nearest name), or a scale that is not finite.

  >>> DDPM(variance="large").variance
  'large'
  """

  variance: str = struct.field(pytree_node=False, default="small")
  log_prob: LogProb | Leaf | None = None
  scale: Leaf = 1.0
  gradient_at: str = struct.field(pytree_node=False, default="x")
  order: ClassVar[int] = 1
  evaluations: ClassVar[int] = 1
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.lookup("variance", self.variance, dict.fromkeys(VARIANCES))
    checks.lookup("point for the gradient", self.gradient_at, dict.fromkeys(GRADIENTS))
    checks.number_field(self, "scale", checks.finite)

  def init(self, x: Example) -> MultistepState:
    """Return the state before the first step."""
    return MultistepState(x, x, jnp.asarray(jnp.inf, x.dtype))

  def step(
    self, denoise: Denoise, state: MultistepState, sigma: Scalar, sigma_next: Scalar, key: Key
  ) -> MultistepState:
    """Take one step, with one evaluation."""
    x = state.x
    prediction = denoise.predict(x, sigma) if isinstance(denoise, Conditioned) else denoise(x, sigma)
    learned = prediction.variance if isinstance(prediction, Prediction) else None
    x0 = x0_of(prediction)
    mean = posterior_mean(x, x0, sigma, sigma_next)
    variance = reverse_variance(self.variance, sigma, sigma_next, state.sigma, learned)
    last = sigma_next <= 0
    if self.log_prob is not None:
      if not isinstance(denoise, Conditioned):
        raise TypeError("a mean shift needs the condition: use jaxguide.sample, or pass a Conditioned to step")
      if self.gradient_at == "mean":
        gradient = jax.grad(self.log_prob)(mean, jnp.where(last, sigma, sigma_next), denoise.cond)
      else:
        # The paper's gradient is with respect to alpha x, and it shifts alpha' x'.
        gradient = jax.grad(self.log_prob)(x, sigma, denoise.cond)
        gradient *= jnp.sqrt((1 + sigma**2) / (1 + sigma_next**2))
      mean += scale_at(self.scale, sigma, x) * variance.value * gradient
    std = jnp.where(last, 0, jnp.exp(0.5 * variance.log))
    return MultistepState(mean + std * draw(key, x), x0, sigma)
