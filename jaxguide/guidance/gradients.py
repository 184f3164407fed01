"""Guidance by gradients: of a classifier that knows noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxguide import checks
from jaxguide.guidance.rule import Rule
from jaxguide.typing import Guidance, LogProb, Scale, map_x0, scale_at


def classifier(log_prob: LogProb, scale: Scale) -> Guidance:
  r"""Classifier guidance (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

  The gradient of a classifier that knows noisy examples is added to the score. In every form that the literature
  writes, with ``γ = scale``, ``x = x_t / alpha`` and ``σ_t = sqrt(1 - ᾱ_t) = alpha sigma``,

  .. math::
    \tilde s(x) &= s(x) + \gamma \nabla_x \log p(y | x; \sigma) \\
    \tilde D(x) &= D(x) + \gamma \sigma^2 \nabla_x \log p(y | x; \sigma) \quad (x_0) \\
    \tilde\epsilon(x_t) &= \epsilon(x_t) - \gamma \sigma_t \nabla_{x_t} \log p(y | x_t) \quad \text{(Algorithm 2)}

  Some lecture notes drop the ``σ_t`` of the last; without it the three are not one.

  Args:
    log_prob: ``(x, sigma, cond) -> log p(cond | x; sigma)``, a scalar; see `ClassifierLogProb`.
    scale: γ. On an unconditional denoiser 0 is unconditional and 1 conditional (for an exact classifier); on a
      conditional one the power is ``1 + scale``. The paper uses 1 to 10. A number, or a function of ``sigma``; see
      `jaxguide.scales`.

  Returns:
    A `Guidance`. The guided denoiser costs one evaluation, and one of the classifier with its gradient.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> guided = classifier(lambda x, sigma, cond: -0.5 * (x - cond) ** 2, 2.0)(lambda x, sigma, cond: x)
  >>> float(guided(jnp.asarray(0.0), jnp.asarray(0.5), 1.0))
  0.5
  """
  return Rule(_classifier, (log_prob, checks.scale("scale", scale)))


def _classifier(denoise, log_prob, scale, x, sigma, cond):
  gradient = jax.grad(log_prob)(x, sigma, cond)
  scale = jnp.asarray(scale_at(scale, sigma), x.dtype)
  return map_x0(lambda x0: x0 + scale * sigma**2 * gradient, denoise(x, sigma, cond))
