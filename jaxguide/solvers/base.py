"""Functions and states that several solvers use, such as the first-order steps of the ODE and of the SDE."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxguide._core import struct
from jaxguide._core.typing import Denoiser, Example, Key, Leaf, Prediction, PyTree, Scalar, x0_of

Denoise = Callable[[Example, Scalar], Example]


class State(NamedTuple):
  """The sample, and the denoiser's last prediction. Before the first step, ``x0`` is the sample itself."""

  x: Leaf
  x0: Leaf


MOST_ETA, MOST_S_NOISE = 100.0, 10.0
"""Upper bounds, to catch mistakes. With ``eta = 100`` a step forgets its start; ``s_noise`` is usually 1.0 to 1.1."""


class MultistepState(NamedTuple):
  """A `State` with the noise level at which ``x0`` was predicted. The level is infinite before the first step."""

  x: Leaf
  x0: Leaf
  sigma: Leaf


@struct.dataclass
class Conditioned:
  """A denoiser with its condition, ``(x, sigma) -> x0``. `jaxguide.sample` passes it to the solver.

  A solver that uses the learned variance or the condition calls `predict`, or reads ``cond``.
  """

  denoise: Denoiser
  cond: PyTree

  def __call__(self, x: Example, sigma: Scalar) -> Example:
    """Predict ``x0``."""
    return x0_of(self.predict(x, sigma))

  def predict(self, x: Example, sigma: Scalar) -> Example | Prediction:
    """Return the denoiser's whole output, ``x0`` or a `Prediction`.

    Raises:
      ValueError: if the predicted example does not have the shape of ``x``.
    """
    prediction = self.denoise(x, sigma, self.cond)
    shape = jnp.shape(x0_of(prediction))
    if shape != jnp.shape(x):
      raise ValueError(f"the denoiser returned shape {shape} for an example of shape {jnp.shape(x)}")
    return prediction


class Memoryless:
  """A solver whose step depends on the sample alone, not on earlier steps."""

  def init(self, x: Example) -> State:
    """Return the state before the first step."""
    return State(x, x)


def move(x: Example, x0: Example, sigma: Scalar, sigma_next: Scalar) -> Example:
  """Return ``x0 + sigma_next eps``, with the ``eps`` of ``x``. It is the exact ODE solution for a constant ``x0``."""
  return x0 + (sigma_next / sigma) * (x - x0)


def diffuse(
  x: Example, x0: Example, sigma: Scalar, sigma_next: Scalar, eta: Leaf, s_noise: Leaf, noise: Example
) -> Example:
  r"""Take a step of the SDE that is exact for a constant ``x0``. With ``eta = 0`` it is `move`.

  In ``lambda = -log sigma`` and with a Brownian motion ``W``, the SDE is

  .. math:: dx = (1 + \eta) (D - x)\, d\lambda + \sqrt{2 \eta}\, \sigma\, dW

  Args:
    x: the sample.
    x0: D, the predicted clean example.
    sigma: the level before the step.
    sigma_next: the level after the step.
    eta: amount of noise, at least 0.
    s_noise: factor on the noise.
    noise: standard normal: :math:`\int e^{-\eta (\lambda' - t)} dW_t` over the step, divided by its standard deviation.
  """
  eta, ratio = jnp.asarray(eta, x.dtype), sigma_next / sigma
  # ratio^eta, without its infinite gradient at 0.
  last = ratio <= 0
  log_shrink = eta * jnp.log(jnp.where(last, 1, ratio))
  factor = jnp.where(last, 0, ratio * jnp.exp(log_shrink))
  square = -jnp.expm1(2 * log_shrink)
  random = square > 0
  up = jnp.where(random, sigma_next * jnp.sqrt(jnp.where(random, square, 1)), 0)
  return x0 + factor * (x - x0) + jnp.asarray(s_noise, x.dtype) * up * noise


def draw(key: Key, x: Example) -> Example:
  """Draw the standard normal noise of a step, of the shape of ``x``. All solvers draw the same noise from one key."""
  return jax.random.normal(key, x.shape, x.dtype)
