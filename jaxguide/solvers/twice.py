"""DPM-Solver++ of second order in one step, with two evaluations."""

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
  """Step with the x0 of half-way in ``log sigma``; straight to x0 where the way is infinite."""
  x0 = denoise(x, sigma)
  inner = sigma_next > 0

  def again(x0):
    half = jnp.sqrt(sigma * jnp.where(inner, sigma_next, sigma))
    return denoise(to_half(x, x0, sigma, half), half)

  return State(whole(x, jax.lax.cond(inner, again, lambda x0: x0, x0), sigma, sigma_next), x0)


@struct.dataclass
class DPMpp2S(Memoryless):
  r"""DPM-Solver++(2S) (Lu et al. 2022, arXiv:2211.01095, Algorithm 1, with ``r = 1/2``).

  With ``D_s`` at ``s = sqrt(sigma sigma')``, where `Euler` (their first order) takes it,

  .. math::
    x' = \frac{\sigma'}{\sigma} x + (1 - e^{-h}) D_s, \quad h = \log(\sigma / \sigma')

  Two evaluations a step, and one in the last, where ``s`` would be 0.
  """

  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = False

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step."""
    del key
    return midpoint(denoise, state.x, sigma, sigma_next)


@struct.dataclass
class DPMpp2SAncestral(Memoryless):
  r"""`DPMpp2S` to a level below, and noise up to the next one: k-diffusion's ``sample_dpmpp_2s_ancestral``.

  The level below and the noise are those of `EulerAncestral`. The order is that of the variance of Gaussian data.

  Args:
    eta: 0 `DPMpp2S`, 1 as random as `DDPM`; in [0, 1].
    s_noise: factor on the noise that is added, at least 0.

  >>> DPMpp2SAncestral().eta
  1.0
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.written(self, "eta", checks.in_range, 0, 1)
    checks.written(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step: two evaluations, and one in the last."""
    down, up = ancestral(self.eta, sigma, sigma_next)
    x, x0 = midpoint(denoise, state.x, sigma, down)
    return State(x + jnp.asarray(self.s_noise, x.dtype) * up * draw(key, x), x0)


@struct.dataclass
class DPMpp2SSDE(Memoryless):
  r"""SDE-DPM-Solver++(2S): `DPMpp2S` for the SDE of Lu et al. (2022, arXiv:2211.01095, eq. 18; with ``eta``).

  Half-way, at ``s = sqrt(sigma sigma')``, stands the first-order step; the whole step has the x0 found there:

  .. math::
    x_s = D + \frac{s}{\sigma} e^{-\eta h / 2} (x - D) + s \sqrt{1 - e^{-\eta h}}\, z_s, \quad
    x' = D_s + \frac{\sigma'}{\sigma} e^{-\eta h} (x - D_s) + \sigma' \sqrt{1 - e^{-2 \eta h}}\, z

  Both noises are of one Brownian motion (see `jaxguide.solvers`): ``z`` is what every solver draws from the key, and
  ``z_s`` is made of it and of one draw more, with the correlation ``ρ`` of the two integrals of the noise:

  .. math:: z_s = \rho z + \sqrt{1 - \rho^2}\, z_1, \quad \rho^2 = 1 / (1 + e^{\eta h})

  Independent noises would leave a method of first order. At ``eta = 1`` k-diffusion's ``sample_dpmpp_sde`` takes the
  same step, with the noises of a Brownian motion in sigma, whose ``ρ²`` is ``σ / (σ + s)``: in small steps both are
  1/2. The order is that of the variance of Gaussian data.

  Args:
    eta: how much noise; 0 `DPMpp2S`, 1 as random as `DDPM`. At least 0.
    s_noise: factor on the noise that is added, at least 0.

  >>> DPMpp2SSDE(eta=0.5).eta
  0.5
  """

  eta: Leaf = 1.0
  s_noise: Leaf = 1.0
  order: ClassVar[int] = 2
  evaluations: ClassVar[int] = 2
  stochastic: ClassVar[bool] = True

  def __post_init__(self):
    checks.written(self, "eta", checks.in_range, 0, MOST_ETA)
    checks.written(self, "s_noise", checks.in_range, 0, MOST_S_NOISE)

  def step(self, denoise: Denoise, state: State, sigma: Scalar, sigma_next: Scalar, key: Key) -> State:
    """Take one step: two evaluations, and one in the last."""
    x, z = state.x, draw(key, state.x)
    # The last step has no half; at 0 the gradient would not be finite.
    h = jnp.log(sigma / jnp.where(sigma_next > 0, sigma_next, sigma))
    shared = jax.nn.sigmoid(-jnp.asarray(self.eta, x.dtype) * h)
    z_half = jnp.sqrt(shared) * z + jnp.sqrt(1 - shared) * draw(jax.random.fold_in(key, 1), x)
    to_half, whole = (functools.partial(diffuse, eta=self.eta, s_noise=self.s_noise, noise=n) for n in (z_half, z))
    return midpoint(denoise, x, sigma, sigma_next, to_half, whole)
