"""The base class of the guidance methods, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax.tree_util import Partial

from jaxguide._core import struct
from jaxguide._core.typing import Denoiser, Guidance, Leaf, LogProb


@struct.dataclass
class Rule:
  """A guidance method: a formula with its parameters, ``formula(denoise, *parameters, x, sigma, cond) -> x0``.

  A call with a denoiser returns the guided denoiser. The formula is a module-level function, so two rules of the same
  kind share one compiled program. Everything that can change from call to call is a parameter.
  """

  formula: Callable[..., Leaf] = struct.field(pytree_node=False)
  parameters: tuple[Leaf, ...]

  def __call__(self, denoise: Denoiser) -> Denoiser:
    """Return the guided denoiser."""
    return Partial(self.formula, check_denoiser(denoise), *self.parameters)


@struct.dataclass
class Composition(Rule):
  """A guidance method whose formula returns the guided denoiser, ``formula(denoise, *parameters) -> guided``.

  The guided denoiser then has its own type with its own methods, such as ``check_cond``.
  """

  def __call__(self, denoise: Denoiser) -> Denoiser:
    """Return the guided denoiser."""
    return self.formula(check_denoiser(denoise), *self.parameters)


def check_denoiser(denoise: Denoiser) -> Denoiser:
  """Return ``denoise`` if it can be a denoiser.

  Raises:
    TypeError: if it is a guidance, a network or a class, or cannot be called.

  >>> import jaxguide as jg
  >>> check_denoiser(jg.clip_x0())
  Traceback (most recent call last):
  ...
  TypeError: denoise must be a denoiser, got a guidance: apply it to one first, guidance(denoise)
  """
  if isinstance(denoise, Rule):
    raise TypeError("denoise must be a denoiser, got a guidance: apply it to one first, guidance(denoise)")
  if isinstance(denoise, nn.Module):
    raise TypeError(
      f"denoise must be a denoiser, got the network {type(denoise).__name__}: make one of it, "
      "jaxguide.NetworkDenoiser(params, network.apply, scaling)"
    )
  if isinstance(denoise, type) or not callable(denoise):
    raise TypeError(f"denoise must be a denoiser, a function (x, sigma, cond) -> x0 of one example; got {denoise!r}")
  return denoise


def check_guidances(guidances: tuple[Guidance, ...]) -> tuple[Guidance, ...]:
  """Return ``guidances`` if each of them can be a guidance.

  Raises:
    TypeError: if one is a denoiser or a class, or cannot be called.

  >>> import jaxguide as jg
  >>> check_guidances((jg.ring(4).denoiser,))
  Traceback (most recent call last):
  ...
  TypeError: guidance must be a function from a denoiser to a guided one, got a denoiser: apply guidance(denoise)
  """
  for guidance in guidances:
    if hasattr(guidance, "check_cond"):
      raise TypeError(
        "guidance must be a function from a denoiser to a guided one, got a denoiser: apply guidance(denoise)"
      )
    if not callable(guidance) or isinstance(guidance, type):
      raise TypeError(f"guidance must be a function from a denoiser to a guided one, got {guidance!r}")
  return guidances


def check_log_prob(log_prob: Any) -> LogProb:
  """Return ``log_prob`` if it can be a log-probability.

  Raises:
    TypeError: if it is a guidance, a network or a class, or cannot be called.

  >>> check_log_prob(2.0)
  Traceback (most recent call last):
  ...
  TypeError: log_prob must be a function (x, sigma, cond) -> log p(cond | x) of one example, got 2.0
  """
  if isinstance(log_prob, Rule | type | nn.Module) or not callable(log_prob):
    raise TypeError(f"log_prob must be a function (x, sigma, cond) -> log p(cond | x) of one example, got {log_prob!r}")
  return log_prob
