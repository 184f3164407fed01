"""Parameters in the type that a network computes in, converted once for a walk and not in each of its steps.

A network in half precision converts its float32 parameters wherever it uses them. Inside a loop XLA does so in each
step: DiT-XL/2 would move 2.7 GB for that, of 73 GB in all.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxguide.denoisers.linen import module_of
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser

T = TypeVar("T")

NETWORKS = (NetworkDenoiser, ClassifierLogProb)

SHAPING = ("broadcast_in_dim", "expand_dims", "reshape", "rev", "slice", "split", "squeeze", "transpose")
"""Operations that give the same numbers in another shape, before or after a conversion."""


def ahead(denoise: T, function: Callable[[T], Any]) -> T:
  """Convert the parameters that a function uses in half precision alone. It computes the same from them, to the bit.

  Args:
    denoise: a denoiser, guided or not. Without a Flax network in half precision it is returned as it is.
    function: a function of the denoiser that can be traced, such as a step of a sampler.
  """
  found = jax.tree.leaves(denoise, is_leaf=lambda node: isinstance(node, NETWORKS))
  types = {getattr(module_of(node.apply), "dtype", None) for node in found if isinstance(node, NETWORKS)}
  if not any(jnp.dtype(kind).itemsize < 4 for kind in types - {None}):
    return denoise
  leaves, structure = jax.tree.flatten(denoise)
  jaxpr = jax.make_jaxpr(lambda leaves: function(jax.tree.unflatten(structure, leaves)))(leaves).jaxpr

  def convert(leaf: Any, variable: Any) -> Any:
    kinds = set(_types(jaxpr, variable))
    (kind,) = kinds if len(kinds) == 1 else (None,)
    given = variable.aval.dtype
    if kind is None or not jnp.issubdtype(given, jnp.floating) or jnp.dtype(kind).itemsize >= given.itemsize:
      return leaf
    return jnp.asarray(leaf).astype(kind)

  return jax.tree.unflatten(structure, map(convert, leaves, jaxpr.invars))


def _types(jaxpr: core.Jaxpr, variable: core.Var) -> Iterator[Any]:
  """Yield the types that a variable is converted to, and None for a use of the variable as it is."""
  if any(out is variable for out in jaxpr.outvars):
    yield None
  for equation in jaxpr.eqns:
    for position, operand in enumerate(equation.invars):
      if operand is not variable:
        continue
      name = equation.primitive.name
      if name == "convert_element_type":
        yield equation.params["new_dtype"]
      elif name in SHAPING:
        for out in equation.outvars:
          yield from _types(jaxpr, out)
      else:
        yield from _inside(equation, position)


def _inside(equation: core.JaxprEqn, position: int) -> Iterator[Any]:
  """Yield what `_types` does for an operand of an operation that calls others; None for other operations."""
  name, params = equation.primitive.name, equation.params
  if name == "cond":
    inner, position = params["branches"], position - 1
  elif name == "scan" and position >= params["num_consts"]:
    inner = ()
  else:
    inner = [params[key] for key in ("jaxpr", "call_jaxpr") if key in params]
  bodies = [getattr(each, "jaxpr", each) for each in inner]
  if position < 0 or not bodies or any(len(body.invars) <= position for body in bodies):
    yield None
    return
  for body in bodies:
    yield from _types(body, body.invars[position])
