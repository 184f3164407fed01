"""Ancestral sampling, with the variances and the classifier guidance of the papers."""

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

  With ``variance="small"`` and no classifier it is `DDIM` with ``eta = 1``. Guidance of the denoiser reaches the mean
  through ``D``. Here a classifier can also shift the mean by ``s Σ g``, as Dhariwal & Nichol do it (2021,
  arXiv:2105.05233, Algorithm 1); `jaxguide.classifier` is their Algorithm 2, the ε form. The two agree in the limit of
  small steps. Where ``g``, the gradient of ``log p(y | x)``, is taken differs between the paper and its code:

  - ``gradient_at="x"``: at the sample before the step and its level, as in the released code; a classifier that
    costs no more than one gradient a step in either.
  - ``gradient_at="mean"``: at μ and the level after the step, as in the paper's derivation (eq. 5). In the last step,
    which leaves no noise, the level before it.

  Args:
    variance: Σ: ``small``, ``large`` or ``learned_range``; see `jaxguide.posterior.reverse_variance`. The last needs a
      denoiser made with ``learned_variance=True``. OpenAI's models without a learned variance use ``large``.
    log_prob: a classifier, ``(x, sigma, cond) -> log p(cond | x; sigma)``, or None.
    scale: s, the power γ in ``p(x) p(y|x)^γ``. 0 is unguided. A number, or a function of ``sigma`` (a pytree, as those
      of `jaxguide.scales` are).
    gradient_at: ``x`` or ``mean``.

  Raises:
    ValueError: for an unknown variance or point (naming the nearest), or a scale that is not finite.

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
    checks.written(self, "scale", checks.finite)

  def init(self, x: Example) -> MultistepState:
    """Start from ``x``, with no step behind."""
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
        raise TypeError("a mean shift needs the condition: run the solver in sample, or hand step a Conditioned")
      if self.gradient_at == "mean":
        gradient = jax.grad(self.log_prob)(mean, jnp.where(last, sigma, sigma_next), denoise.cond)
      else:
        # The papers' gradient is with respect to alpha x, and shifts alpha' x'.
        gradient = jax.grad(self.log_prob)(x, sigma, denoise.cond)
        gradient *= jnp.sqrt((1 + sigma**2) / (1 + sigma_next**2))
      mean += scale_at(self.scale, sigma, x) * variance.value * gradient
    std = jnp.where(last, 0, jnp.exp(0.5 * variance.log))
    return MultistepState(mean + std * draw(key, x), x0, sigma)
