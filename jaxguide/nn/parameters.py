"""The parameters of our layers, made so that networks are quick to trace."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError

_shapes_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("shapes alone", default=False)


def parameter(module: nn.Module, name: str, init: Any, shape: Sequence[int]) -> Any:
  """Return a parameter of a module, float32 if it is new, as ``module.param`` does.

  Where the parameter exists, Flax traces its initialiser to learn its shape. This is a sixth of the time that it takes
  to trace a UNet. Here the shape is known.

  Args:
    module: the module, whose method is being called.
    name: name of the parameter.
    init: an initialiser, which maps a key, a shape and a type to an array.
    shape: shape of the parameter.

  Raises:
    ScopeParamShapeError: if the parameter exists with another shape.
  """
  if module.is_initializing() or not module.has_variable("params", name):
    init = nn.initializers.zeros if _shapes_alone.get() else init
    return module.param(name, init, tuple(shape), jnp.float32)
  value = nn.meta.unbox(module.get_variable("params", name))
  if jnp.shape(value) != tuple(shape):
    raise ScopeParamShapeError(name, "/".join(module.path), jnp.shape(value), tuple(shape))
  return value


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
  """Make parameters of zeros: to trace random numbers takes a third of the time that it takes to trace ``init``."""
  token = _shapes_alone.set(True)
  try:
    yield
  finally:
    _shapes_alone.reset(token)
