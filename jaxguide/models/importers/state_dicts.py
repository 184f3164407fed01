"""Files of PyTorch state dicts. Reading loads one tensor at a time; writing replaces the whole file.

``.safetensors``, ``.pkl`` and PyTorch's files (``.pt``, ``.pth``, ``.ckpt``, ``.bin``) are read without PyTorch, and
nothing in them is run. Writing PyTorch's files needs PyTorch, and ``.pkl`` files are not written.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import PathLike, replacing
from jaxguide.models.importers import network_pickles, torch_files

FLOATS = ("float32", "float16", "bfloat16", "float64")

COUNTER = "num_batches_tracked"
"""The last part of the name of BatchNorm's counter of training steps, a whole number that no network computes with."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file. ``np.asarray`` reads it as float32.

  Args:
    shape: its shape.
    dtype: the type that it is stored in.
    read: reads it, and returns it as float32.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Read the tensor, with the arguments of NumPy's array protocol."""
    return np.array(self.read(), dtype, copy=copy)


class StateDict(dict[str, Tensor]):
  """The tensors of a file by name.

  Args:
    tensors: the tensors.
    network: the name of the network's class and the arguments of its call, of a ``.pkl`` file; None for others.
  """

  def __init__(self, tensors: Mapping[str, Tensor], network: tuple[str, Mapping[str, Any]] | None = None):
    super().__init__(tensors)
    self.network = network


def read(path: PathLike, *, any_type: bool = False) -> StateDict:
  """Open a state dict.

  Args:
    path: a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file; or a ``.pkl`` file, as EDM and EDM2 publish
      their networks.
    any_type: whether tensors of other types than floating-point numbers may be among them, for a file that holds more
      than the network; `check_types` checks those that are wanted.

  Returns:
    Its tensors by name, without BatchNorm's counters of training steps (``num_batches_tracked``). Each is read from the
    file when it is converted to an array; a file of PyTorch that is damaged there gives a ValueError then.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if its extension is unknown, it is truncated, it contains something else than tensors, or a tensor's
      type is not a floating-point type.
  """
  path = Path(path)
  _, opener = _format(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path}")
  found = opener(path)
  tensors = {name: tensor for name, tensor in found.items() if name.rpartition(".")[2] != COUNTER}
  if not tensors:
    raise ValueError(f"{path} contains no tensors")
  if not any_type:
    check_types(path, tensors)
  return StateDict(without_prefix(tensors), getattr(found, "network", None))


def check_types(path: PathLike, tensors: Mapping[str, Tensor]) -> None:
  """Check that all tensors of a file are of a floating-point type.

  Raises:
    ValueError: if one is not.
  """
  for name, tensor in tensors.items():
    if tensor.dtype not in FLOATS:
      raise ValueError(f"{name} in {path} is {tensor.dtype}; weights must be one of {', '.join(FLOATS)}")


WRAPPERS = ("ema", "model", "state_dict")
"""Under which names a training's checkpoint holds its state dicts; the first that there is counts, the running mean."""

PREFIXES = ("module.", "_orig_mod.")
"""What PyTorch puts before all names of a network on several devices, or of a compiled one."""


def unwrapped(content: Any) -> Any:
  """Return the state dict within a training's checkpoint; anything else as it is.

  >>> unwrapped({"opt": {}, "ema": {"weight": 1}})
  {'weight': 1}
  """
  if isinstance(content, dict):
    for name in WRAPPERS:
      if isinstance(content.get(name), dict):
        return content[name]
  return content


def without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Remove the prefixes that PyTorch puts before the names of a network, where all names have them.

  >>> without_prefix({"module.fc.weight": 1, "module.fc.bias": 2})
  {'fc.weight': 1, 'fc.bias': 2}
  """
  tensors = dict(tensors)
  for prefix in PREFIXES:
    if tensors and all(name.startswith(prefix) for name in tensors):
      tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
  return tensors


def write(path: PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
  """Write a state dict to a file. A file that is already there is replaced.

  Args:
    path: a ``.safetensors``, ``.pt`` or ``.pth`` file.
    state_dict: the tensors by name.

  Raises:
    ValueError: if the extension is unknown.
    ImportError: for a ``.pt`` or ``.pth`` file if PyTorch is not installed.
    OSError: if the file cannot be written.
  """
  writer, _ = _format(Path(path))
  with replacing(path) as file:
    writer(file, {name: np.asarray(array, order="C") for name, array in state_dict.items()})  # Scalars stay scalars.


def check_format(path: PathLike) -> None:
  """Check that files with this extension can be written; to be called before long work.

  Raises:
    ValueError: if the extension is unknown.
    ImportError: for a ``.pt`` or ``.pth`` file if PyTorch is not installed.
  """
  writer, _ = _format(Path(path))
  if writer is _no_pickle:
    _no_pickle(None, {})
  if writer is _write_torch:
    _torch()


def _format(path: Path) -> tuple[Callable[..., None], Callable[[Path], dict[str, Tensor]]]:
  return checks.lookup("extension of a state dict", path.suffix, FORMATS)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
  from safetensors import SafetensorError, safe_open

  def load(name: str, dtype: str) -> np.ndarray:
    # The "numpy" framework does not support bfloat16. The file is opened again for each tensor, so that pages of other
    # tensors, which were read before, do not stay in memory.
    with safe_open(path, framework="flax" if dtype == "bfloat16" else "numpy") as file:
      return np.asarray(file.get_tensor(name)).astype(np.float32, copy=False)

  def tensor(name: str, header: Any) -> Tensor:
    # Convert the names F32 and BF16 to float32 and bfloat16.
    dtype = re.sub(r"F(?=\d)", "float", header.get_dtype()).replace("Bf", "bf")
    return Tensor(tuple(header.get_shape()), dtype, lambda: load(name, dtype))

  try:
    with safe_open(path, framework="numpy") as file:
      return {name: tensor(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118, it is no dictionary
  except SafetensorError as error:
    raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def _write_safetensors(file: Any, state_dict: dict[str, np.ndarray]) -> None:
  from safetensors.numpy import save_file

  save_file(state_dict, file.name, metadata={"format": "pt"})


def _read_torch(path: Path) -> dict[str, Tensor]:
  content = unwrapped(torch_files.read(path))
  if not isinstance(content, dict):
    raise ValueError(f"{path} must contain a state dict, got {type(content).__name__}")
  for name, value in content.items():
    if not isinstance(name, str):
      raise ValueError(
        f"{path} must contain a state dict of tensors by name, but a name is of type {type(name).__name__}"
      )
    if not isinstance(value, torch_files.StoredTensor):
      kind = "dict" if isinstance(value, dict) else type(value).__name__
      raise ValueError(f"{path} must contain a state dict of tensors, but {name!r} is of type {kind}")
  return {name: of_torch(value) for name, value in content.items()}


def of_torch(stored: torch_files.StoredTensor) -> Tensor:
  """Return a tensor of `jaxguide.models.importers.torch_files.read`, which is read as float32."""
  return Tensor(stored.shape, stored.dtype.name, lambda: stored.read().astype(np.float32, copy=False))


def _read_pickle(path: Path) -> StateDict:
  found = network_pickles.read(path)
  return StateDict({name: of_torch(value) for name, value in found.tensors.items()}, (found.name, found.arguments))


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      "writing a .pt file needs PyTorch: pip install '.[torch]' in the clone, or use a .safetensors file"
    ) from error
  return torch


def _write_torch(file: Any, state_dict: dict[str, np.ndarray]) -> None:
  torch = _torch()
  torch.save({name: torch.from_numpy(array) for name, array in state_dict.items()}, file)


def _no_pickle(file: Any, state_dict: dict[str, np.ndarray]) -> None:
  raise ValueError("a .pkl file holds a network's source code, which is not written: choose a .safetensors file")


FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], dict[str, Tensor]]]] = {
  ".safetensors": (_write_safetensors, _read_safetensors),
  ".pt": (_write_torch, _read_torch),
  ".pth": (_write_torch, _read_torch),
  ".ckpt": (_write_torch, _read_torch),  # Stable Diffusion's.
  ".bin": (_write_torch, _read_torch),  # Those of diffusers before safetensors.
  ".pkl": (_no_pickle, _read_pickle),
}
