r"""Solvers: one step from ``sigma`` to ``sigma_next``.

A solver has two methods, ``init(x) -> state`` and ``step(denoise, state, sigma, sigma_next, key) -> state``. A step
calls ``denoise(x, sigma) -> x0`` one or more times.

In ``x = x0 + sigma eps`` the probability flow ODE is ``dx / dsigma = (x - D(x, sigma)) / sigma`` (Karras et al. 2022,
arXiv:2206.00364, eq. 1 with s = 1). Stochastic solvers add noise in a step, and remove the same amount in addition. The
last step, to ``sigma_next = 0``, ends on ``x0`` for every solver, except `EDMStochastic` with a ``schedule`` or
``variance_preserving``.

Each class has the attributes ``order``, ``evaluations`` (calls of the denoiser in a step), and ``stochastic`` (whether
it can add noise; with ``eta`` or ``gamma`` at 0 it adds none).

**The same key, the same noise.** The stochastic solvers solve ``dx = (1 + η) (D - x) dλ + sqrt(2 η) σ dW`` in
``λ = -log σ``. The noise of a step to ``σ'`` is ``σ' sqrt(2 η) ∫ exp(-η (λ' - t)) dW``, which is a standard normal
``z`` times its standard deviation. All solvers draw ``z`` from the step's key in the same way, and `jaxguide.sample`
derives the steps' keys from the sample's key. So on the same grid, a key gives the same Brownian motion for every
solver, and samples of one key differ only by the solvers. At ``η = 1`` their difference goes to 0 in proportion to the
length of the steps.

Exceptions: with ``eta`` between 0 and 1, `DDIM`, `EulerAncestral` and `DPMpp2SAncestral` solve the SDE with
``η = eta²``. `EDMStochastic` uses the same draws, but adds the noise before the step; ``gamma`` sets its amount.
`Consistency` adds noise to x0 and keeps none of the sample's.
"""

from typing import Any

from jaxguide._core import checks
from jaxguide._core.typing import Solver
from jaxguide.solvers.base import Conditioned, MultistepState, State
from jaxguide.solvers.consistency import Consistency
from jaxguide.solvers.ddim import DDIM, Euler, EulerAncestral
from jaxguide.solvers.ddpm import DDPM
from jaxguide.solvers.edm import EDMStochastic
from jaxguide.solvers.heun import Heun
from jaxguide.solvers.multistep import DPMpp2M, DPMpp2MSDE, DPMpp3M, DPMpp3MSDE, UniPC
from jaxguide.solvers.twice import DPMpp2S, DPMpp2SAncestral, DPMpp2SSDE

SOLVERS: dict[str, type] = {
  "euler": Euler,
  "ddim": DDIM,
  "ddpm": DDPM,
  "heun": Heun,
  "dpmpp-2m": DPMpp2M,
  "euler-ancestral": EulerAncestral,
  "dpmpp-3m": DPMpp3M,
  "dpmpp-2m-sde": DPMpp2MSDE,
  "dpmpp-3m-sde": DPMpp3MSDE,
  "unipc": UniPC,
  "dpmpp-2s": DPMpp2S,
  "dpmpp-2s-ancestral": DPMpp2SAncestral,
  "dpmpp-2s-sde": DPMpp2SSDE,
  "edm-stochastic": EDMStochastic,
  "consistency": Consistency,
}


def solver(name: str, **options: Any) -> Solver:
  """Make a solver by name.

  Raises:
    ValueError: for an unknown name (the message has the nearest one), an option that the solver does not have, or a
      value out of range.

  >>> solver("ddim", eta=1.0)
  DDIM(eta=1.0)
  >>> solver("huen")
  Traceback (most recent call last):
  ...
  ValueError: unknown solver 'huen': did you mean 'heun'? There are consistency, ddim, ...
  """
  cls = checks.lookup("solver", name, SOLVERS)
  return cls(**checks.options(name, cls, options))


__all__ = [
  "DDIM",
  "DDPM",
  "SOLVERS",
  "Conditioned",
  "Consistency",
  "DPMpp2M",
  "DPMpp2MSDE",
  "DPMpp2S",
  "DPMpp2SAncestral",
  "DPMpp2SSDE",
  "DPMpp3M",
  "DPMpp3MSDE",
  "EDMStochastic",
  "Euler",
  "EulerAncestral",
  "Heun",
  "MultistepState",
  "State",
  "UniPC",
  "solver",
]
