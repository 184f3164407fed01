"""What solvers share: the state of one that remembers nothing, and the step that both order-one families take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxguide._core import struct
from jaxguide._core.typing import Denoiser, Example, Key, Leaf, Prediction, PyTree, Scalar, x0_of

Denoise = Callable[[Example, Scalar], Example]


class State(NamedTuple):
  """The sample so far, and what the denoiser last said of it (before the first step: the sample itself)."""

  x: Leaf
  x0: Leaf


MOST_ETA, MOST_S_NOISE = 100.0, 10.0
"""What lies above is a slip: at this ``eta`` nothing is left of a step's start, and ``s_noise`` is 1.0 to 1.1."""


class MultistepState(NamedTuple):
  """A `State` that also remembers the level of its ``x0``; infinite before the first step."""

  x: Leaf
  x0: Leaf
  sigma: Leaf


@struct.dataclass
class Conditioned:
  """A denoiser with its condition: what a solver is given by `jaxguide.sample`.

  It is ``(x, sigma) -> x0``; a solver that has a use for more asks it to `predict`, or for its ``cond``.
  """

  denoise: Denoiser
  cond: PyTree

  def __call__(self, x: Example, sigma: Scalar) -> Example:
    """Give ``x0``."""
    return x0_of(self.predict(x, sigma))

  def predict(self, x: Example, sigma: Scalar) -> Example | Prediction:
    """Give all that the denoiser says."""
    said = self.denoise(x, sigma, self.cond)
    if jnp.shape(x0_of(said)) != jnp.shape(x):
      raise ValueError(f"the denoiser gave shape {jnp.shape(x0_of(said))} for an example of shape {jnp.shape(x)}")
    return said


class Memoryless:
  """A solver whose step looks at nothing but the sample."""

  def init(self, x: Example) -> State:
    """Start from ``x``."""
    return State(x, x)


def move(x: Example, x0: Example, sigma: Scalar, sigma_next: Scalar) -> Example:
  """Keep ``eps`` and change its amount: ``x0 + sigma_next eps``, the exact solution if ``x0`` stood still."""
  return x0 + (sigma_next / sigma) * (x - x0)


def diffuse(
  x: Example, x0: Example, sigma: Scalar, sigma_next: Scalar, eta: Leaf, s_noise: Leaf, noise: Example
) -> Example:
  r"""Take the step of the SDE that is exact if ``x0`` stood still; with ``eta = 0`` it is `move`.

  In ``lambda = -log sigma`` and with ``W`` a Brownian motion,

  .. math:: dx = (1 + \eta) (D - x)\, d\lambda + \sqrt{2 \eta}\, \sigma\, dW

  Args:
    x: the sample.
    x0: D.
    sigma: the level now.
    sigma_next: the level after the step.
    eta: how much noise, at least 0.
    s_noise: factor on it.
    noise: standard normal: :math:`\int e^{-\eta (\lambda' - t)} dW_t` over the step, divided by its standard deviation.
  """
  eta, ratio = jnp.asarray(eta, x.dtype), sigma_next / sigma
  # ratio^eta without its infinite gradient at 0
  last = ratio <= 0
  log_shrink = eta * jnp.log(jnp.where(last, 1, ratio))
  kept = jnp.where(last, 0, ratio * jnp.exp(log_shrink))
  square = -jnp.expm1(2 * log_shrink)
  random = square > 0
  up = jnp.where(random, sigma_next * jnp.sqrt(jnp.where(random, square, 1)), 0)
  return x0 + kept * (x - x0) + jnp.asarray(s_noise, x.dtype) * up * noise


def draw(key: Key, x: Example) -> Example:
  """Draw the noise of a step for ``x``: in every solver the same of the same key."""
  return jax.random.normal(key, x.shape, x.dtype)
