"""Second-order DPM-Solver++ with two evaluations a step ("2S")."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxguide._core import checks, struct
from jaxguide._core.typing import Example, Key, Leaf, Scalar
from jaxguide.schedules.posterior import ancestral
from jaxguide.solvers.base import MOST_ETA, MOST_S_NOISE, Denoise, Memoryless, State, diffuse, draw, move

Step = Callable[[Example, Example, Scalar, Scalar], Example]


def midpoint(
  denoise: Denoise, x: Example, sigma: Scalar, sigma_next: Scalar, to_half: Step = move, whole: Step = move
) -> State:
  """Take a step with the x0 that is predicted at the midpoint in ``log sigma``.

  The last step, whose midpoint would be at level 0, uses the x0 at its start.

  Args:
    denoise: the denoiser with its condition.
    x: the sample.
    sigma: the level before the step.
    sigma_next: the level after the step.
    to_half: the first-order step to the midpoint.
    whole: the first-order step from ``sigma`` to ``sigma_next``.

  Returns:
    The new sample, and the x0 at the start of the step.
  """
  x0 = denoise(x, sigma)
  not_last = sigma_next > 0

  def at_midpoint(x0):
    half = jnp.sqrt(sigma * jnp.where(not_last, sigma_next, sigma))
    return denoise(to_half(x, x0, sigma, half), half)

  return State(whole(x, jax.lax.cond(not_last, at_midpoint, lambda x0: x0, x0), sigma, sigma_next), x0)


@struct.dataclass
class DPMpp2S(Memoryless):
  r"""DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, Algorithm 1, with ``r = 1/2``).

  `Euler`, their first-order step, leads to the level ``s = sqrt(sigma sigma')``. With the prediction ``D_s`` there,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + (1 - e^{-h}) D_s, \quad h = \log(\sigma / \sigma')

  A step has two evaluations. The last step, where ``s`` would be 0, has one.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = False

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with two evaluations. The last step has one."""
    del key
    return midpoint(denoise, state.x, sigma, sigma_next)


@struct.dataclass
class DPMpp2SAncestral(Memoryless):
  r"""`DPMpp2S` to a level below the next one, then new noise: k-diffusion's ``sample_dpmpp_2s_ancestral``.

  The level below and the noise are those of `EulerAncestral`. ``order`` is the order at which the variance converges
  for Gaussian data.

  Args:
    eta: amount of noise in [0, 1]: 0 is `DPMpp2S`, 1 has the noise of `DDPM`.
    s_noise: factor on the added noise, at least 0.

  >>> DPMpp2SAncestral().eta
  1.0
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "eta", checks.in_range, 0, 1)
    checks.number_field(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with two evaluations. The last step has one."""
    down, up = ancestral(self.eta, sigma, sigma_next)
    x, x0 = midpoint(denoise, state.x, sigma, down)
    return State(x + jnp.asarray(self.s_noise, x.dtype) * up * draw(key, x), x0)


@struct.dataclass
class DPMpp2SSDE(Memoryless):
  r"""SDE-DPM-Solver++(2S): `DPMpp2S` for the SDE of Lu et al. (2022, arXiv:2211.01095, eq. 18; with ``eta``).

  A first-order step leads to the midpoint ``s = sqrt(sigma sigma')``. The whole step uses the prediction ``D_s`` there:

  .. math::
    x_s = D + \frac{s}{\sigma} e^{-\eta h / 2} (x - D) + s \sqrt{1 - e^{-\eta h}}\, z_s, \quad
    x' = D_s + \frac{\sigma'}{\sigma} e^{-\eta h} (x - D_s) + \sigma' \sqrt{1 - e^{-2 \eta h}}\, z

  Both noises belong to one Brownian motion (see `jaxguide.solvers`). ``z`` is the noise that every solver draws from
  the key. ``z_s`` is a combination of ``z`` and a second draw ``z_1``, with the correlation ``ρ`` of the two integrals
  of the noise:

  .. math:: z_s = \rho z + \sqrt{1 - \rho^2}\, z_1, \quad \rho^2 = 1 / (1 + e^{\eta h})

  With independent noises the method would be of first order. At ``eta = 1`` k-diffusion's ``sample_dpmpp_sde`` takes
  the same step with the noises of a Brownian motion in sigma. Its ``ρ²`` is ``σ / (σ + s)``; for small steps both are
  1/2.
  ``order`` is the order at which the variance converges for Gaussian data.

  Args:
    eta: amount of noise, at least 0: 0 is `DPMpp2S`, 1 has the noise of `DDPM`.
    s_noise: factor on the added noise, at least 0.

  >>> DPMpp2SSDE(eta=0.5).eta
  0.5
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.number_field(self, "eta", checks.in_range, 0, MOST_ETA)
    checks.number_field(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step, with two evaluations. The last step has one."""
    x, z = state.x, draw(key, state.x)
    # The last step has no midpoint. There h is set to 0, since the gradient of the logarithm would not be finite.
    h = jnp.log(sigma / jnp.where(sigma_next > 0, sigma_next, sigma))
    rho_squared = jax.nn.sigmoid(-jnp.asarray(self.eta, x.dtype) * h)
    z_half = jnp.sqrt(rho_squared) * z + jnp.sqrt(1 - rho_squared) * draw(jax.random.fold_in(key, 1), x)
    to_half, whole = (functools.partial(diffuse, eta=self.eta, s_noise=self.s_noise, noise=n) for n in (z_half, z))
    return midpoint(denoise, x, sigma, sigma_next, to_half, whole)
