"""Layouts: which parameter here a tensor of a published state dict is, and how its numbers are arranged in both.

A network's submodules have the names of the published checkpoints, with underscores for dots, so most of a layout
follows from the network itself: `layout` makes it from a rule that gives the published name of a path. Float32 weights
are the same bit for bit after import and export.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide._core.typing import PyTree
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import shapes


class Weight(NamedTuple):
  """The correspondence between a tensor of a state dict and a parameter here.

  Args:
    path: the path of the parameter, without ``params``.
    ours: the shape of the parameter.
    shape: the shape of the tensor.
    grouped: the shape that the tensor is viewed in before its axes are permuted; axes of length 1 are left out.
    axes: the permutation of the axes of ``grouped``; the result is viewed in the shape ``ours``.
  """

  path: tuple[str, ...]
  ours: tuple[int, ...]
  shape: tuple[int, ...]
  grouped: tuple[int, ...]
  axes: tuple[int, ...]

  def read(self, tensor: Any) -> np.ndarray:
    """Convert a tensor from the published layout to ours, as a new float32 array."""
    with np.errstate(over="ignore"):  # A value beyond float32 becomes infinite, which the caller checks.
      array = np.asarray(tensor).astype(np.float32, copy=False)
    return np.array(array.reshape(self.grouped).transpose(self.axes).reshape(self.ours), order="C")

  def write(self, leaf: Any) -> np.ndarray:
    """Convert a parameter from our layout to the published one, as a new array."""
    permuted = tuple(self.grouped[axis] for axis in self.axes)
    array = np.asarray(leaf).reshape(permuted).transpose(np.argsort(self.axes).tolist())
    return np.array(array.reshape(self.shape), order="C")


class Fixed(NamedTuple):
  """A tensor of a state dict that is no parameter here, because its value is always the same.

  Args:
    value: the value, which is compared at import and written at export.
  """

  value: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the tensor."""
    return self.value.shape


Layout = Mapping[str, Weight | Fixed]
"""The tensors of a network's state dict, by their names there."""


def weight(path: Sequence[str], ours: Sequence[int], ones: int = 0) -> Weight:
  """Return the usual correspondence of a parameter, by its name and its number of axes.

  A ``kernel`` of four axes is a convolution: (out, in, height, width) there, (height, width, in, out) here. A
  ``kernel`` of two axes is a linear layer: (out, in) there, (in, out) here. Other parameters are the same.

  Args:
    path: the path of the parameter.
    ours: the shape of the parameter.
    ones: the number of axes of length 1 at the end of the tensor's shape: 2 for a 1x1 convolution there that is a
      linear layer here.

  >>> weight(("proj", "kernel"), (32, 64), ones=2).shape
  (64, 32, 1, 1)
  """
  path, ours = tuple(path), tuple(ours)
  axes = tuple(range(len(ours)))
  if path[-1] == "kernel":
    # There: out, in, and the axes of space. Here: the axes of space, in, out.
    back = (len(ours) - 1, len(ours) - 2, *range(len(ours) - 2))
    axes = tuple(np.argsort(back).tolist())
    grouped = tuple(ours[axis] for axis in back)
  else:
    grouped = ours
  return Weight(path, ours, (*grouped, *(1,) * ones), grouped, axes)


def paths(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Return the shape of each parameter of a network by its path, without ``params``.

  >>> config = ModelConfig("unet", {"model_channels": 32}, (8, 8, 1), 10)
  >>> paths(config)["time_embed_0", "kernel"]
  (32, 128)
  """
  leaves = jax.tree_util.tree_leaves_with_path(shapes(config)["params"])
  return {tuple(part.key for part in path): tuple(leaf.shape) for path, leaf in leaves}


def to_params(state_dict: Mapping[str, Any], layout: Layout, network: str) -> PyTree:
  """Convert a state dict to the parameters of a network here.

  Args:
    state_dict: arrays by name, or objects that ``np.asarray`` converts, of any floating-point type. They are converted
      one after another.
    layout: the tensors that the network has.
    network: the network's name, for messages.

  Returns:
    ``{"params": ...}`` of float32 arrays.

  Raises:
    ValueError: if names are missing or unknown, a shape differs, a weight is not finite, or a fixed tensor has other
      values than always.
  """
  check_names_and_shapes(state_dict, layout, network)
  params: dict[str, Any] = {}
  for name, entry in layout.items():
    if isinstance(entry, Fixed):
      if not np.allclose(np.asarray(state_dict[name]), entry.value, rtol=1e-5, atol=1e-6):
        raise ValueError(f"{name} is not what every {network} has there: the weights are damaged or of another network")
      continue
    array = entry.read(state_dict[name])
    if not np.isfinite(array).all():
      raise ValueError(f"{name} contains numbers that are not finite in float32: the weights are damaged")
    *parents, last = entry.path
    functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, params)[last] = jax.device_put(array)
  return {"params": params}


def check_names_and_shapes(state_dict: Mapping[str, Any], layout: Layout, network: str) -> None:
  """Check that a state dict has the names and shapes of a network.

  Raises:
    ValueError: if not, naming the first names or shapes that differ.
  """
  missing, unknown = [key for key in layout if key not in state_dict], [key for key in state_dict if key not in layout]
  if len(missing) == len(layout):
    raise ValueError(
      f"the weights are of another architecture: {network} has none of their {len(unknown)} names ({first(unknown)})"
    )
  if missing or unknown:
    problems = [
      f"{len(names)} {'name is' if len(names) == 1 else 'names are'} {problem} ({first(names)})"
      for problem, names in (("missing", missing), ("unknown", unknown))
      if names
    ]
    raise ValueError(f"the weights do not fit {network}: {' and '.join(problems)}")
  differing = [key for key, entry in layout.items() if np.shape(state_dict[key]) != entry.shape]
  if differing:
    key, *others = differing
    more = f", and {len(others)} more shapes differ" if others else ""
    raise ValueError(
      f"the weights do not fit {network}: {key} has shape {np.shape(state_dict[key])}, expected {layout[key].shape}"
      f"{more}"
    )


def to_state_dict(params: PyTree, layout: Layout, network: str) -> dict[str, np.ndarray]:
  """Convert the parameters of a network here to a state dict. The inverse of `to_params`.

  Args:
    params: ``{"params": ...}``.
    layout: the tensors that the network has.
    network: the network's name, for messages.

  Raises:
    ValueError: if the parameters do not fit the network.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  by_path = {tuple(part.key for part in path)[1:]: leaf for path, leaf in leaves}
  weights = {name: entry for name, entry in layout.items() if isinstance(entry, Weight)}
  actual = {path: np.shape(leaf) for path, leaf in by_path.items()}
  expected = {entry.path: entry.ours for entry in weights.values()}
  for path in [*expected, *actual]:
    if actual.get(path) != expected.get(path):
      raise ValueError(
        f"the parameters do not fit {network}: {'/'.join(('params', *path))} has shape {actual.get(path)}, expected "
        f"{expected.get(path)} (None: no such parameter)"
      )
  return {
    name: entry.write(by_path[entry.path]) if isinstance(entry, Weight) else np.array(entry.value)
    for name, entry in layout.items()
  }


def first(names: Sequence[str], count: int = 3) -> str:
  """Return the first few names, and the number of the others."""
  rest = f" and {len(names) - count} more" if len(names) > count else ""
  return ", ".join(names[:count]) + rest


def counted(what: str, numbers: Iterable[int], names: Collection[str]) -> int:
  """Return how many parts there are, from their numbers in the names, each of which counts from 0.

  Args:
    what: the parts, for the message.
    numbers: the numbers.
    names: all names of the file.

  Raises:
    ValueError: if there are more parts than names, so that some have no weights. Memory would not suffice for all.

  >>> counted("blocks", [0, 1], ["blocks.0.weight", "blocks.1.weight"])
  2
  """
  count = 1 + max(numbers, default=-1)
  if count > len(names):
    raise ValueError(
      f"the weights are incomplete: the names are of {count:,} {what}, and there are {len(names):,} names"
    )
  return count


def required(given: Mapping[str, Any], needed: Mapping[str, str]) -> None:
  """Check that settings which names and shapes do not determine are given.

  Args:
    given: the settings by name.
    needed: what each needed setting is, by name.

  Raises:
    ValueError: if some are missing, with how to give them.
  """
  missing = [f"{option(name)} ({what})" for name, what in needed.items() if given.get(name) is None]
  if missing:
    raise ValueError(f"names and shapes do not determine the whole configuration: give {', '.join(missing)}")


def option(name: str) -> str:
  """Return the option of ``jaxguide import`` that gives a setting.

  >>> option("heads"), option("image_size")
  ('--heads N', '--field image_size=VALUE')
  """
  return "--heads N" if name == "heads" else f"--field {name}=VALUE"


def square(tokens: int, what: str) -> int:
  """Return the side of a square of so many tokens.

  Raises:
    ValueError: if it is no square.
  """
  side = math.isqrt(tokens)
  if side * side != tokens:
    raise ValueError(f"{what} has {tokens} rows, which is not the number of tokens of a square image")
  return side


Infer = Callable[..., ModelConfig]
"""``(tensors, **given) -> ModelConfig``; see `jaxguide.models.importers.families.Family`."""
