"""What every guidance method is made of: a formula and its parameters."""

from __future__ import annotations

from collections.abc import Callable

from jax.tree_util import Partial

from jaxguide import struct
from jaxguide.typing import Denoiser, Leaf


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
    TypeError: if it is not that.

  >>> import jaxguide as jg
  >>> check_denoiser(jg.clip_x0())
  Traceback (most recent call last):
  ...
  TypeError: denoise must be a denoiser, got a guidance: apply it to one first, guidance(denoise)
  """
  if isinstance(denoise, Rule):
    raise TypeError("denoise must be a denoiser, got a guidance: apply it to one first, guidance(denoise)")
  if isinstance(denoise, type) or not callable(denoise):
    raise TypeError(f"denoise must be a denoiser, a function (x, sigma, cond) -> x0 of one example; got {denoise!r}")
  return denoise
