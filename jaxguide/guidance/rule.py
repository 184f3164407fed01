"""What every guidance method is made of: a formula and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jax.tree_util import Partial

from jaxguide._core import struct
from jaxguide._core.typing import Denoiser, Guidance, Leaf, LogProb


@struct.dataclass
class Rule:
  """A guidance method with its parameters: ``formula(denoise, *parameters, x, sigma, cond) -> x0``.

  Applied to a denoiser it is the guided one. The formula is a function of a module, so that two rules of one kind are
  one program; whatever may change from call to call is a parameter.
  """

  formula: Callable[..., Leaf] = struct.field(pytree_node=False)
  parameters: tuple[Leaf, ...]

  def __call__(self, denoise: Denoiser) -> Denoiser:
    """Give the guided denoiser."""
    return Partial(self.formula, check_denoiser(denoise), *self.parameters)


@struct.dataclass
class Composition(Rule):
  """A rule that gives the guided denoiser itself, ``formula(denoise, *parameters)``, where others wait for ``x``.

  What it is made of can then be seen, by the check of conditions for one.
  """

  def __call__(self, denoise: Denoiser) -> Denoiser:
    """Give the guided denoiser."""
    return self.formula(check_denoiser(denoise), *self.parameters)


def check_denoiser(denoise: Denoiser) -> Denoiser:
  """Give a denoiser back if it can be called and is no guidance that waits for one.

  Raises:
    TypeError: if it is a guidance or a network, or cannot be called.

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
  """Give guidances back if each can be applied to a denoiser, and is none itself.

  Raises:
    TypeError: if one is not that.

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
  """Give a log-probability back if it can be called.

  Raises:
    TypeError: if it cannot, or is a guidance, a network or a class.

  >>> check_log_prob(2.0)
  Traceback (most recent call last):
  ...
  TypeError: log_prob must be a function (x, sigma, cond) -> log p(cond | x) of one example, got 2.0
  """
  if isinstance(log_prob, Rule | type | nn.Module) or not callable(log_prob):
    raise TypeError(f"log_prob must be a function (x, sigma, cond) -> log p(cond | x) of one example, got {log_prob!r}")
  return log_prob
