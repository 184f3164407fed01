"""A reader of the pickles that EDM and EDM2 publish (``network-snapshot-*.pkl``), which runs nothing of them.

Such a file is a pickled dictionary, whose ``ema`` is a whole network as a Python object. It holds the source code of
the network's classes, which NVIDIA's ``torch_utils.persistence`` runs to make the objects again. Here the objects are
read as data: the name of the class, the arguments of its call, and the state, in which the weights are. The source code
is left aside. Only the constructors of `_Objects` are allowed, and each of them makes data.
"""

import dataclasses
import io
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import pickles
from jaxguide._core.files import PathLike, check_readable
from jaxguide.models.importers import torch_files
from jaxguide.models.importers.torch_files import StoredTensor

NETWORKS = ("ema", "net", "G_ema", "model")
"""Where a file has its network, the first that is there."""

MOST_PARTS, MOST_LETTERS = 10_000, 1000
"""The largest number of a network's modules and of its tensors, and of letters in their names."""

MODULES = re.compile(r"(torch\.nn\.modules|training|torch_utils|dnnlib)(\.\w+)+\Z")
"""The modules whose classes may occur. They are not imported: an object of theirs is read as data."""


@dataclasses.dataclass(frozen=True)
class PickledNetwork:
  """A network from a pickle.

  Args:
    tensors: its parameters and buffers by name, as in its state dict.
    name: the name of its class.
    arguments: the arguments of the class's call by name, as far as the file has them.
  """

  tensors: dict[str, StoredTensor]
  name: str
  arguments: dict[str, Any]


def read(path: PathLike) -> PickledNetwork:
  """Read the network of a published pickle.

  Args:
    path: a file that holds a network, or a dictionary with one under ``ema``.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is truncated or damaged, holds no network, or needs anything but data and the classes of PyTorch
      and of EDM, which are read as data. Nothing of it is run.
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}")
  check_readable(path)
  with path.open("rb") as file:
    try:
      pickled = torch_files.checked(file, os.fstat(file.fileno()).st_size)
      content = pickles.read(io.BytesIO(pickled), path, _Objects(path))
      return _network(content)
    except OSError:
      raise
    except Exception as error:  # A damaged file leads to many kinds of errors.
      reason = str(error) or type(error).__name__
      forbidden = re.search(r"it needs (\S+), which is not allowed", reason)
      if forbidden:
        raise ValueError(
          f"{path} contains code or objects besides a network of EDM's ({forbidden[1]}); no code was run"
        ) from error
      reason = reason.removeprefix(f"{path} cannot be read: ")
      raise ValueError(f"{path} is truncated or not a network of EDM's ({reason})") from error


# --- what a pickle may make ----------------------------------------------------------------------------


class _Object:
  """An object of a class that is not imported.

  `name` is the class's name, and `state` what the file states of the object.
  """

  __slots__ = ("name", "state")
  name: str
  state: Any

  def __new__(cls, *args: Any, **kwargs: Any) -> "_Object":
    """Make an object; the arguments are left aside."""
    made = super().__new__(cls)
    made.name, made.state = cls.__name__, None
    return made

  def __init__(self, *args: Any, **kwargs: Any):
    """Leave the arguments aside."""

  def __setstate__(self, state: Any) -> None:
    """Keep the state."""
    self.state = state


class _Dict(dict):
  """What an ``OrderedDict`` or ``EasyDict`` becomes. Attributes are left aside."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    """Leave the attributes aside."""


class _Maker:
  """A function that a pickle may call, whose attributes a pickle cannot set."""

  __slots__ = ("_function",)

  def __init__(self, function: Callable[..., Any]):
    self._function = function

  def __call__(self, *args: Any) -> Any:
    """Call the function."""
    return self._function(*args)

  def __setstate__(self, state: Any) -> None:
    """Refuse to be changed."""
    raise ValueError("it changes a constructor")


class _Objects(Mapping):
  """The constructors that a pickle may use, by module and name."""

  def __init__(self, path: Path):
    tensors = torch_files.Tensors(lambda *_: _no_storage())
    self.path, self.classes = path, dict[tuple[str, str], Any]()
    self.makers: dict[tuple[str, str], Any] = {
      ("torch_utils.persistence", "_reconstruct_persistent_obj"): _Maker(_persistent),
      ("collections", "OrderedDict"): _Dict,
      ("dnnlib.util", "EasyDict"): _Dict,
      ("dnnlib", "EasyDict"): _Dict,
      ("builtins", "set"): _Maker(_items),
      ("builtins", "frozenset"): _Maker(_items),
      ("copyreg", "_reconstructor"): _Maker(_plain_object),
      ("_codecs", "encode"): _Maker(_encoded),
      ("torch._utils", "_rebuild_tensor_v2"): _Maker(tensors.tensor),
      ("torch._utils", "_rebuild_tensor"): _Maker(tensors.tensor),
      ("torch._utils", "_rebuild_parameter"): _Maker(tensors.parameter),
      ("torch.nn.parameter", "Parameter"): _Maker(tensors.parameter),
      ("torch.storage", "_load_from_bytes"): _Maker(self.storage),
      # Arrays and numbers of NumPy stand in the data set's description and in the encoder, which are not needed.
      **{(f"numpy.{core}.multiarray", name): _Unread for core in ("core", "_core") for name in _NUMPY},
      **{(f"numpy.{core}.numeric", "_frombuffer"): _Unread for core in ("core", "_core")},
      ("numpy", "ndarray"): _Unread,
      ("numpy", "dtype"): _Unread,
      **{("torch", name): _Unread for name in ("device", "Size", *_DTYPES)},
    }

  def __getitem__(self, key: tuple[str, str]) -> Any:
    """Return a constructor.

    Raises:
      KeyError: if it is not allowed.
    """
    if key in self.makers:
      return self.makers[key]
    if key not in self.classes:
      module, name = key
      if not MODULES.match(module) or not name.isidentifier():
        raise KeyError(key)
      self.classes[key] = type(name, (_Object,), {"__slots__": ()})
    return self.classes[key]

  def __contains__(self, key: object) -> bool:
    """Return whether a constructor is allowed."""
    try:
      self[key]  # type: ignore[index]
    except KeyError:
      return False
    return True

  def __iter__(self) -> Any:
    """Return the names."""
    return iter(self.makers)

  def __len__(self) -> int:
    """Return the number of the names."""
    return len(self.makers)

  def storage(self, content: Any) -> "_Bytes":
    """Return the storage in the bytes of a file of PyTorch."""
    if not isinstance(content, bytes):
      raise ValueError("a storage in it does not consist of bytes")
    found = torch_files.read_old(self.path, io.BytesIO(content))
    if not isinstance(found, torch_files.Storage):
      raise ValueError("the bytes of a storage in it hold something else")
    return _Bytes(content, found)


_NUMPY = ("_reconstruct", "scalar")
_DTYPES = ("float16", "float32", "float64", "bfloat16", "int64", "int32", "uint8", "bool", "contiguous_format")


class _Unread(_Object):
  """An object that is not needed."""

  __slots__ = ()


class _Bytes(torch_files.Storage):
  """A storage whose numbers are in memory."""

  def __init__(self, content: bytes, stored: torch_files.Storage):
    super().__init__(stored.path, stored.dtype, stored.numel, stored.start)
    self.content = content

  def read(self) -> np.ndarray:
    """Return the numbers."""
    return np.frombuffer(self.content, self.dtype, self.numel, self.start or 0)


def _persistent(*arguments: Any) -> _Object:
  """Return what an object of NVIDIA's ``persistence`` is, from its description. The source code there is not run."""
  if len(arguments) != 1 or not isinstance(arguments[0], dict):
    raise ValueError("an object in it has no description")
  description = arguments[0]
  name = description.get("class_name")
  if description.get("type") != "class" or not isinstance(name, str):
    raise ValueError("the description of an object in it has no class")
  made = _Object()
  made.name, made.state = name, description.get("state")
  return made


def _items(*arguments: Any) -> list[Any]:
  return list(arguments[0]) if len(arguments) == 1 and isinstance(arguments[0], list | tuple) else []


def _plain_object(cls: Any, *rest: Any) -> Any:
  del rest
  if not (isinstance(cls, type) and issubclass(cls, _Object | _Dict)):
    raise ValueError("it makes an object of no class")
  return cls()


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
  if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
    raise ValueError("it encodes something else than a text")
  return text.encode("latin1")


def _no_storage() -> Any:
  raise ValueError("it refers to a storage outside the pickle")


# --- the network ---------------------------------------------------------------------------------------


def _network(content: Any) -> PickledNetwork:
  """Return the network in what a pickle holds."""
  found = content
  if isinstance(content, dict):
    found = next((content[key] for key in NETWORKS if isinstance(content.get(key), _Object)), None)
    if found is None:
      keys = [str(key)[:40] for key in list(content)[:5]]
      raise ValueError(f"it holds no network under {NETWORKS[0]!r}; it has {', '.join(keys) or 'nothing'}")
  if not isinstance(found, _Object) or not _attributes(found):
    raise ValueError("it holds no network")
  tensors = _collect(found)
  if not tensors:
    raise ValueError("its network has no parameters")
  attributes = _attributes(found)
  arguments = attributes.get("_init_kwargs")
  # A network's attributes say as much as the arguments that it was made with, which may be positions without names.
  known = {key: value for key, value in attributes.items() if not key.startswith("_") and _is_plain(value)}
  if isinstance(arguments, dict):
    known |= {key: value for key, value in arguments.items() if isinstance(key, str) and _is_plain(value)}
  return PickledNetwork(tensors, found.name, known)


def _attributes(found: _Object) -> dict[str, Any]:
  state = found.state
  state = state[0] if isinstance(state, tuple) and state else state
  return {key: value for key, value in state.items() if isinstance(key, str)} if isinstance(state, dict) else {}


def _is_plain(value: Any) -> bool:
  if isinstance(value, list | tuple):
    return len(value) < 100 and all(isinstance(each, int | float | str | bool) for each in value)
  return value is None or isinstance(value, int | float | str | bool)


def _collect(network: _Object) -> dict[str, StoredTensor]:
  """Return the parameters and buffers of a module and of those within it, by name."""
  tensors: dict[str, StoredTensor] = {}
  stack, number = [(network, "")], 0
  while stack:
    module, prefix = stack.pop()
    number += 1
    if number > MOST_PARTS or len(tensors) > MOST_PARTS or len(prefix) > MOST_LETTERS:
      raise ValueError(f"its network has more than {MOST_PARTS:,} parts, or one with a name of {MOST_LETTERS} letters")
    attributes = _attributes(module)
    hidden = attributes.get("_non_persistent_buffers_set")
    hidden = hidden if isinstance(hidden, set | frozenset | list) else ()
    for kind, expected in (("_parameters", StoredTensor), ("_buffers", StoredTensor), ("_modules", _Object)):
      parts = attributes.get(kind)
      for key, value in (parts if isinstance(parts, dict) else {}).items():
        if value is None or (kind == "_buffers" and key in hidden):
          continue
        if not isinstance(key, str) or not isinstance(value, expected):
          raise ValueError(f"{prefix}{str(key)[:40]} of its network is no {kind[1:-1]}")
        if isinstance(value, _Object):
          stack.append((value, f"{prefix}{key}."))
        else:
          tensors[prefix + key] = value
  return tensors
