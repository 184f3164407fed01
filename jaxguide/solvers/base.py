"""What solvers share: the state of one that remembers nothing, and the step that both order-one families take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxguide.typing import Example, Leaf, Scalar

Denoise = Callable[[Example, Scalar], Example]


class State(NamedTuple):
  """The sample so far, and what the denoiser last said of it (before the first step: the sample itself)."""

  x: Leaf
  x0: Leaf


class Memoryless:
  """A solver whose step looks at nothing but the sample."""

  def init(self, x: Example) -> State:
    """Start from ``x``."""
    return State(x, x)


def move(x: Example, x0: Example, sigma: Scalar, sigma_next: Scalar) -> Example:
  """Keep ``eps`` and change its amount: ``x0 + sigma_next eps``, the exact solution if ``x0`` stood still."""
  return x0 + (sigma_next / sigma) * (x - x0)
