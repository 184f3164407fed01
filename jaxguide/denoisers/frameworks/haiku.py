"""Networks of Haiku, and classes with the methods ``init`` and ``apply``."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import jax

from jaxguide.denoisers.frameworks.own import Variables, constructor_fields


@dataclasses.dataclass(frozen=True)
class HaikuParts:
  """A transformed Haiku function.

  Args:
    apply: its ``apply``.
    arguments: the names of the arguments of ``apply`` before the network's: of ``params``, ``state`` and ``rng``.
    options: keyword arguments that it always gets.
    arrays: the shapes and types of its parameters and its state, as leaves and tree; None where it makes them itself.
  """

  apply: Any
  arguments: tuple[str, ...]
  options: tuple[tuple[str, Any], ...] = ()
  arrays: tuple[Any, Any] | None = None

  def shapes(self) -> Variables:
    """Return the shapes and types of the network's arrays."""
    leaves, tree = self.arrays or ((), jax.tree.structure({}))
    return jax.tree.unflatten(tree, leaves)

  def run(self, variables: Variables, key: Any, train: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call the function with its parameters, its state and a key for dropout."""
    given = {"params": variables.get("params", {}), "state": variables.get("state", {}), "rng": key}
    try:
      output = self.apply(*(given[name] for name in self.arguments), *args, **dict(self.options), **options)
    except ValueError as error:
      if type(error).__name__ != "MissingRNGError":
        raise
      raise ValueError(
        "the Haiku network draws random numbers outside of training: a denoiser is a function. Let dropout depend on "
        "an argument is_training"
      ) from error
    if "state" not in self.arguments:
      return output
    output, after = output
    if _changed(given["state"], after):
      raise ValueError(
        f"the Haiku network changes its state in {'training' if train else 'evaluation'}, which is not supported: a "
        "denoiser is a function. Let batch statistics depend on an argument is_training"
      )
    return output


def _changed(before: Any, after: Any) -> bool:
  """Whether an array of a state was replaced. Arrays that are new are no part of the state that was given."""
  return any(after[module][name] is not leaf for module, values in before.items() for name, leaf in values.items())


def arguments(apply: Any) -> tuple[tuple[str, ...], inspect.Signature]:
  """Divide the arguments of a transformed function's ``apply`` into Haiku's and the network's."""
  signature = inspect.signature(apply)
  every = list(signature.parameters.values())
  first = next((i for i, one in enumerate(every) if one.name not in ("params", "state", "rng")), len(every))
  return tuple(one.name for one in every[:first]), signature.replace(parameters=every[first:])


class HaikuMaker:
  """How networks of a `haiku.Module` class are made."""

  batched = True

  def fields(self, cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of the constructor without ``name``."""
    return constructor_fields(cls, ("name",))

  def _transformed(self, cls: type, fields: Mapping[str, Any]) -> Any:
    import haiku

    def run(*args, **options):
      return cls(**fields)(*args, **options)  # Haiku makes modules only inside.

    return haiku.transform_with_state(run)

  def parts(self, cls: type, fields: Mapping[str, Any]) -> HaikuParts:
    """Return the network of these fields."""
    return HaikuParts(self._transformed(cls, fields).apply, ("params", "state", "rng"))

  def initial(self, cls: type, fields: Mapping[str, Any], key: Any, args: tuple[Any, ...], options: Any) -> Variables:
    """Draw the initial arrays of the network of these fields."""
    params, state = self._transformed(cls, fields).init(key, *args, **options)
    return {"params": dict(params), **({"state": dict(state)} if state else {})}


@dataclasses.dataclass(frozen=True)
class PlainParts:
  """An object with the methods ``init(key, x, t, cond) -> params`` and ``apply(params, x, t, cond)``."""

  network: Any

  def shapes(self) -> Variables:
    """Return nothing: the object makes its parameters itself."""
    return {}

  def run(self, variables: Variables, key: Any, train: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call ``apply``."""
    return self.network.apply(variables.get("params", {}), *args, **options)


class PlainMaker:
  """How networks of a class with the methods ``init`` and ``apply`` are made."""

  batched = True

  def fields(self, cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of the constructor."""
    return constructor_fields(cls, ())

  def parts(self, cls: type, fields: Mapping[str, Any]) -> PlainParts:
    """Return the network of these fields."""
    return PlainParts(cls(**fields))

  def initial(self, cls: type, fields: Mapping[str, Any], key: Any, args: tuple[Any, ...], options: Any) -> Variables:
    """Draw the initial parameters of the network of these fields."""
    params = cls(**fields).init(key, *args)
    if not isinstance(params, Mapping):
      raise TypeError(f"{cls.__name__}.init must return a dictionary of parameters, got {type(params).__name__}")
    return {"params": dict(params)}
