"""Optax's optimisers by name, with their options. Optax takes time to import, and is imported where one is made."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxguide._core import checks, promotion, specs
from jaxguide.training.rates import Schedule

# Parameters of Optax's optimisers that have fields of their own in the training's configuration.
OWN = ("learning_rate", "weight_decay")


@functools.cache
def optimizers() -> Mapping[str, Callable[..., Any]]:
  """Return Optax's optimisers by name: its functions, and those of ``optax.contrib``, that take a ``learning_rate``.

  >>> {"adam", "adamw", "lion", "muon", "sgd"} <= set(optimizers())
  True
  """
  import optax
  from optax import contrib

  return {
    name: function
    for module in (contrib, optax)
    for name, function in vars(module).items()
    if not name.startswith(("_", "scale_by_")) and inspect.isfunction(function)
    if next(iter(inspect.signature(function).parameters), None) == "learning_rate"
  }


def optimizer(text: str, learning_rate: float | Schedule, weight_decay: float = 0.0) -> Any:
  """Return an optimiser by name.

  Args:
    text: ``NAME`` or ``NAME:option=value,...``, such as ``adamw`` or ``lion:b1=0.95``. The names and the options are
      those of Optax; options are its parameters that are numbers, texts or flags.
    learning_rate: a number, or a function of the step.
    weight_decay: the weight decay; 0 for an optimiser without one.

  Raises:
    ValueError: for an unknown name (with the nearest known one), an unknown option, or a weight decay for an optimiser
      without one.

  >>> optimizer("adam:b2=0.99", 1e-3).init({"w": jnp.ones(2)})[0].mu["w"].tolist()
  [0.0, 0.0]
  """
  table, spec = optimizers(), specs.parse(text)
  function = checks.lookup("optimizer", spec.name, table)
  parameters = inspect.signature(function).parameters
  chosen = specs.choose(spec, specs.options_of(function, *OWN))
  options = {name: _as_default(parameters[name].default, value) for name, value in chosen.items()}
  if "weight_decay" in parameters:
    options["weight_decay"] = weight_decay
  elif weight_decay:
    raise ValueError(f"{spec.name!r} has no weight decay: set weight_decay to 0, or choose another such as adamw")
  try:
    made = function(learning_rate, **options)
    with promotion.standard():
      jax.eval_shape(lambda params: made.update(params, made.init(params), params), {"w": jnp.zeros((2, 2))})
  except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
    # Some take more than gradients in each step, such as the loss or its curvature.
    raise ValueError(f"Optax cannot run {text!r} with gradients alone: {error}") from error
  return made


def _as_default(default: Any, value: Any) -> Any:
  """Convert a number to ``int`` where the default is one, such as the number of Newton-Schulz steps of Muon."""
  is_whole = type(default) is int and isinstance(value, float) and value.is_integer()
  return int(value) if is_whole else value
