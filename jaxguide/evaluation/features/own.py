"""Features of one's own: a Python function, given as it is or by its name."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core.typing import PyTree
from jaxguide.evaluation.features import weights as files
from jaxguide.evaluation.features.base import Features

VERSION = 1

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""How the name of a function is written: ``module:function``."""


def own(function: Callable[[np.ndarray], Any] | str, name: str = "", weights: str = "") -> Features:
  """Features by a function of your own, in NumPy, PyTorch or whatever runs in Python.

  The function gets images as they are, without resizing; they must all have one size. It is called outside of JAX, with
  NumPy arrays, as often as there are batches.

  Args:
    function: maps a batch of images, uint8 (b, height, width, channels), to b feature vectors, (b, d). Or its name,
      ``module:function``, where Python finds it; the module is imported, so its code runs. By its name the features
      depend on the file of the module: when that changes, they are others.
    name: the name of the features, under which results are kept. It should change when the function does. The default
      is the name of the function with its module.
    weights: what else the features depend on, such as a part of the hash of a file of weights.

  Raises:
    TypeError: if ``function`` is neither a function nor a text.
    ValueError: if there is no such function, or a function without a name is given no name.

  >>> own(lambda images: images.mean((1, 2)), name="mean-colour").protocol
  {'features': 'mean-colour', 'version': 1, 'weights': ''}
  """
  if isinstance(function, str):
    name = name or function
    function = _import(function)
    weights = weights or _source_hash(function)
  if not callable(function):
    raise TypeError(f"function must be a function of a batch of images, or its name module:function, got {function!r}")
  label = getattr(function, "__qualname__", "")
  if not name and (not label or "<" in label):
    raise ValueError("the function has no name that tells it from others: give name, such as name='mean-colour'")
  name = name or f"{function.__module__}:{label}"
  return Features(name, VERSION, weights, _Function(function, name), {}, None, None, name)


def _source_hash(function: Any) -> str:
  """Return the hash of the file that a function is defined in; empty if there is none."""
  try:
    path = inspect.getsourcefile(function)
  except TypeError:
    return ""
  return files.digest(path) if path is not None and Path(path).is_file() else ""


def _import(text: str) -> Any:
  """Return the function of a name ``module:function``."""
  module, _, path = text.partition(":")
  if not NAME.fullmatch(text):
    raise ValueError(f"a function is named module:function, such as my_features:embed, got {text!r}")
  try:
    found: Any = importlib.import_module(module)
    for part in path.split("."):
      found = getattr(found, part)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"features {text!r} cannot be imported ({error}): start Python where it finds the module {module!r} with the "
      f"function {path!r}"
    ) from error
  if not callable(found):
    raise ValueError(f"features {text!r} must be a function of a batch of images, got {type(found).__name__}")
  return found


@dataclasses.dataclass(frozen=True)
class _Function:
  function: Callable[[np.ndarray], Any]
  name: str

  def __call__(self, params: PyTree, images: jax.Array) -> Mapping[str, jax.Array]:
    """Return the output of images in [0, 255]. The function is called once more first, to find out its length."""
    del params
    probe = self._call(np.zeros(images.shape, np.float32))
    pool = jax.pure_callback(self._call, jax.ShapeDtypeStruct(probe.shape, jnp.float32), images)
    return {"pool": pool}

  def _call(self, images: Any) -> np.ndarray:
    images = np.asarray(images)
    found = np.asarray(self.function(np.rint(images).clip(0, 255).astype(np.uint8)))
    if found.ndim != 2 or len(found) != len(images) or found.dtype.kind not in "fiu":
      raise ValueError(
        f"the function of the features {self.name} must give numbers of shape ({len(images)}, d) for "
        f"{len(images)} images, got {found.dtype} of shape {found.shape}"
      )
    return found.astype(np.float32)
