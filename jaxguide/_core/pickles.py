"""Pickles that hold data alone. A pickle can run any code when it is read, so only named constructors are allowed."""

import codecs
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# The functions that NumPy names in its pickles, of the protocols 0 to 4 and 5, and of a single number.
_ARRAY, _BUFFER, _SCALAR = (
  make[0] for make in (np.zeros(1).__reduce__(), np.zeros(1).__reduce_ex__(5), np.float64(1).__reduce__())
)

ARRAYS: dict[tuple[str, str], Any] = {
  **{(f"numpy.{core}.multiarray", "_reconstruct"): _ARRAY for core in ("core", "_core")},
  **{(f"numpy.{core}.numeric", "_frombuffer"): _BUFFER for core in ("core", "_core")},
  **{(f"numpy.{core}.multiarray", "scalar"): _SCALAR for core in ("core", "_core")},
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
  ("_codecs", "encode"): codecs.encode,
}
"""What a pickle of NumPy arrays, numbers, texts, lists and dictionaries needs, by module and name."""


class _DataAlone(pickle.Unpickler):
  def __init__(self, file: Any, allowed: Mapping[tuple[str, str], Any], load: Callable[[Any], Any] | None):
    super().__init__(file)
    self.allowed, self.load_by_id = allowed, load

  def find_class(self, module: str, name: str) -> Any:
    """Return an allowed constructor."""
    if (module, name) not in self.allowed:
      raise ValueError(f"it needs {module}.{name}, which is not allowed in a file of data alone")
    return self.allowed[module, name]

  def persistent_load(self, pid: Any) -> Any:
    """Return what the file keeps outside the pickle."""
    if self.load_by_id is None:
      raise ValueError("it refers to something outside the pickle")
    return self.load_by_id(pid)


def read(
  file: Any,
  name: object,
  allowed: Mapping[tuple[str, str], Any] = ARRAYS,
  persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
  """Read one pickle that holds data alone. Nothing else in it is run.

  Args:
    file: an open file, at the beginning of the pickle. It is left behind the pickle's end.
    name: the name of the file, for error messages.
    allowed: what the pickle may construct, by module and name.
    persistent_load: gives what the pickle refers to by an identifier; None if it may refer to nothing.

  Raises:
    ValueError: if the pickle needs something else, is truncated or damaged, or holds arrays of Python objects.

  >>> import io
  >>> read(io.BytesIO(pickle.dumps({"mu": np.arange(3)})), "stats.pkl")
  {'mu': array([0, 1, 2])}
  >>> read(io.BytesIO(pickle.dumps(print)), "stats.pkl")
  Traceback (most recent call last):
  ...
  ValueError: stats.pkl cannot be read: it needs builtins.print, which is not allowed in a file of data alone
  """
  try:
    content = _DataAlone(file, allowed, persistent_load).load()
    _check_no_objects(content)
  except OSError:
    raise
  except Exception as error:
    raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from error
  return content


def _check_no_objects(content: Any) -> None:
  """Check that no array in nested lists, tuples and dictionaries has elements that are Python objects."""
  stack, seen = [content], set()
  while stack:
    part = stack.pop()
    if id(part) in seen:  # A part may be in many places, and a list even in itself.
      continue
    seen.add(id(part))
    if isinstance(part, np.ndarray) and part.dtype.hasobject:
      raise ValueError("it has an array of Python objects")
    if isinstance(part, dict):
      stack.extend(part.values())
    elif isinstance(part, list | tuple):
      stack.extend(part)
