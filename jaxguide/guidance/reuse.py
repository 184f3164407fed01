r"""Gradients that are computed in every n-th step and reused in between: the option ``every``.

The gradient is computed in the steps 0, n, 2n, ... in which the guidance acts, so that the first step of an
`jaxguide.interval` computes it. In the steps between it is not computed at all. A step of a solver that evaluates
several times computes it at each of its evaluations or at none; the first one is kept. ``every=1`` keeps nothing.

What is kept is not the gradient ``g`` itself, since that grows while the noise falls, but the gradient in the variables
of DDPM, :math:`x_t = x / \sqrt{1 + \sigma^2}`,

.. math:: \nabla_{x_t} \log p(y | x_t) = \sqrt{1 + \sigma^2}\, g

and a later step at level ``σ'`` divides it by ``sqrt(1 + σ'²)``. The gradient of an exact classifier is the difference
of two denoised examples, ``g = (D_y - D) / σ²``. At high noise ``D_y - D`` is the difference of two means, so that
``g`` grows as ``1 / σ²`` while the class stays uncertain, and more slowly where it becomes certain; at low noise ``g``
hardly changes. What is kept lies between the two at high noise, and is ``g`` at low noise. Samples of the animals stay
closer to those of ``every=1`` with it than with ``g``, ``(1 + σ²) g`` or ``σ² g`` (the change of x0), and as close as
with ``σ g`` (the change of the predicted noise); ``docs/methods.md`` has the figures. The gradient of a log-probability
of ``D(x)`` through the denoiser is one in ``x``, too, and is kept in the same way. That of
`jaxguide.backward_guidance` is one in clean examples, and is kept as it is.

Compress Guidance (Dinh et al. 2024, arXiv:2408.11194) guides by a classifier in some of the steps, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Example, Leaf, Scalar
from jaxguide.guidance.state import GradientState


def of_noisy(sigma: Scalar) -> Scalar:
  """``sqrt(1 + σ²)``, by which gradients in ``x`` are multiplied before they are kept."""
  return jnp.sqrt(1 + sigma**2)


def of_clean(sigma: Scalar) -> Scalar:
  """1: gradients in ``x0`` are kept as they are."""
  return jnp.ones_like(sigma)


def acts_at(log_prob: Any, sigma: Scalar) -> Any:
  """Return whether a log-probability has a gradient at a noise level: within a classifier's ``noise_range``."""
  check = getattr(log_prob, "acts_at", None)
  return True if check is None else check(sigma)


@struct.dataclass
class Reused:
  """A gradient that is computed in every n-th step.

  Args:
    state: the kept gradient and the number of steps so far.
    n: the number of steps.
    weight: ``sigma -> factor`` on a gradient before it is kept; a module-level function.
  """

  state: Leaf
  n: int = struct.field(pytree_node=False)
  weight: Callable[[Scalar], Scalar] = struct.field(pytree_node=False)

  @classmethod
  def every(cls, n: int, weight: Callable[[Scalar], Scalar] = of_noisy) -> Reused | None:
    """Make one for a number of steps; None for 1, where nothing is kept.

    Raises:
      ValueError: if ``n`` is not a whole number of at least 1.

    >>> Reused.every(1), Reused.every(4).n
    (None, 4)
    """
    n = checks.at_least("every", n, 1)
    return None if n == 1 else cls(GradientState(), n, weight)

  def __call__(
    self,
    compute: Callable[[], tuple[Example, Any]],
    without: Callable[[], Any],
    x: Example,
    sigma: Scalar,
    acts: Any = True,
  ) -> tuple[Example, Any, dict[str, Any]]:
    """Compute the gradient or reuse the kept one.

    Args:
      compute: returns the gradient, of the shape of ``x``, and what else comes with it.
      without: returns what else comes with it, without the gradient.
      x: the example.
      sigma: the level at which the gradient is.
      acts: whether the guidance acts in this step. If not, the gradient is 0, and the step does not count.

    Returns:
      The gradient, what comes with it, and the `jaxguide.typing.Prediction.guidance_state`.
    """
    gradient, more, value = reuse(self.n, self.weight, self.state.or_zeros(x), compute, without, sigma, acts)
    return gradient, more, self.state.becomes(value)


def reuse(
  n: int,
  weight: Callable[[Scalar], Scalar],
  kept: tuple[Example, Any],
  compute: Callable[[], tuple[Example, Any]],
  without: Callable[[], Any],
  sigma: Scalar,
  acts: Any,
) -> tuple[Example, Any, tuple[Example, Any]]:
  """Compute a gradient or take the kept one, as `Reused` does with the value of its state, which it returns."""
  old, steps = kept
  factor = jnp.asarray(weight(jnp.asarray(sigma)), old.dtype)
  due = (steps % n == 0) & acts
  gradient, more = jax.lax.cond(due, compute, lambda: (old / factor, without()))
  new = jnp.where(due, factor * gradient, old)
  return jnp.where(acts, gradient, 0), more, (new, steps + jnp.asarray(acts, steps.dtype))
