"""What solvers share: the state of one that remembers nothing, and the step that both order-one families take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxguide import struct
from jaxguide.typing import Denoiser, Example, Leaf, Prediction, PyTree, Scalar, x0_of

Denoise = Callable[[Example, Scalar], Example]


class State(NamedTuple):
  """The sample so far, and what the denoiser last said of it (before the first step: the sample itself)."""

  x: Leaf
  x0: Leaf


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
    return self.denoise(x, sigma, self.cond)


class Memoryless:
  """A solver whose step looks at nothing but the sample."""

  def init(self, x: Example) -> State:
    """Start from ``x``."""
    return State(x, x)


def move(x: Example, x0: Example, sigma: Scalar, sigma_next: Scalar) -> Example:
  """Keep ``eps`` and change its amount: ``x0 + sigma_next eps``, the exact solution if ``x0`` stood still."""
  return x0 + (sigma_next / sigma) * (x - x0)
