r"""Solvers: one step from ``sigma`` to ``sigma_next``.

In ``x = x0 + sigma eps`` the probability flow is ``dx / dsigma = (x - D(x, sigma)) / sigma`` (Karras et al. 2022,
arXiv:2206.00364, eq. 1 with s = 1), and its stochastic relatives add noise while they remove as much more. A solver is
``init(x) -> state`` and ``step(denoise, state, sigma, sigma_next, key) -> state``; it calls ``denoise(x, sigma) -> x0``
as often as it needs to. The last step, to ``sigma_next = 0``, lands on ``x0`` in every one of them (unless
`EDMStochastic` is told to step straight in another time or scale).

Each class declares its ``order``, how often a step evaluates (``evaluations``), and whether it has noise to add
(``stochastic``; with ``eta`` or ``gamma`` at 0 it adds none).

**The same key, the same noise.** The stochastic ones solve ``dx = (1 + η) (D - x) dλ + sqrt(2 η) σ dW`` in
``λ = -log σ``, and what a step to ``σ'`` adds is ``σ' sqrt(2 η) ∫ exp(-η (λ' - t)) dW``: a standard normal ``z`` times
its standard deviation. All of them draw ``z`` from the step's key alike, and `jaxguide.sample` makes the steps' keys of
the sample's: on the same grid, one key is one Brownian motion for every solver, so that samples differ by what the
solvers do and not by chance. At ``η = 1`` they come together in proportion to the length of the steps. (With ``eta``
between 0 and 1 `DDIM`, `EulerAncestral` and `DPMpp2SAncestral` take the SDE whose ``η`` is its square. `EDMStochastic`
puts the same draws to another use: it adds noise before the step, as much as ``gamma`` says.)
"""

from typing import Any

from jaxguide._core import checks
from jaxguide._core.typing import Solver
from jaxguide.solvers.base import Conditioned, MultistepState, State
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
}


def solver(name: str, **options: Any) -> Solver:
  """Make a solver by name.

  Raises:
    ValueError: for an unknown name (with the nearest), or an option that the solver does not have.

  >>> solver("ddim", eta=1.0)
  DDIM(eta=1.0)
  >>> solver("huen")
  Traceback (most recent call last):
  ...
  ValueError: unknown solver 'huen': did you mean 'heun'? There are ddim, ddpm, ...
  """
  cls = checks.lookup("solver", name, SOLVERS)
  return cls(**checks.options(name, cls, options))


__all__ = [
  "DDIM",
  "DDPM",
  "SOLVERS",
  "Conditioned",
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
