"""State dicts of PyTorch in files, read one tensor after another and written whole.

``.safetensors`` needs no PyTorch. ``.pt`` does, and is read in its safe mode only, which runs no code that such a file
may carry.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import PathLike, replacing

FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file; ``np.asarray`` reads it, as float32.

  Args:
    shape: its shape.
    dtype: the type it is stored in.
    read: gives it, as float32.
  """

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Read it; ``copy`` is NumPy's business."""
    return np.array(self.read(), dtype, copy=copy)


def read(path: PathLike) -> dict[str, Tensor]:
  """Open a state dict.

  Args:
    path: a ``.safetensors`` or ``.pt`` file.

  Returns:
    Its tensors by name, which are read when they are asked for.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if its extension is not known, it is truncated, carries anything but tensors, or holds weights that are
      not floating-point numbers.
    ImportError: for a ``.pt`` where PyTorch is not installed.
  """
  path = Path(path)
  _, opener = _format(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {path}")
  tensors = opener(path)
  if not tensors:
    raise ValueError(f"{path} holds no tensors")
  for name, tensor in tensors.items():
    if tensor.dtype not in FLOATS:
      raise ValueError(f"{name} in {path} is {tensor.dtype}; weights must be one of {', '.join(FLOATS)}")
  return tensors


def write(path: PathLike, state_dict: Mapping[str, np.ndarray]) -> None:
  """Write a state dict, in place of one that was there.

  Args:
    path: a ``.safetensors`` or ``.pt`` file.
    state_dict: its tensors by name.

  Raises:
    ValueError: if the extension is not known.
    ImportError: for a ``.pt`` where PyTorch is not installed.
    OSError: if the file cannot be written.
  """
  writer, _ = _format(Path(path))
  with replacing(path) as file:
    writer(file, {name: np.ascontiguousarray(array) for name, array in state_dict.items()})


def check_format(path: PathLike) -> None:
  """Check, before long work, that files of this kind can be read and written.

  Raises:
    ValueError: if the extension is not known.
    ImportError: for a ``.pt`` where PyTorch is not installed.
  """
  if _format(Path(path)) is FORMATS[".pt"]:
    _torch()


def _format(path: Path) -> tuple[Callable[..., None], Callable[[Path], dict[str, Tensor]]]:
  return checks.lookup("extension of a state dict", path.suffix, FORMATS)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
  from safetensors import SafetensorError, safe_open

  def load(name: str, dtype: str) -> np.ndarray:
    # NumPy alone does not know bfloat16. Opened anew each time, so that pages that were read do not stay in memory.
    with safe_open(path, framework="flax" if dtype == "bfloat16" else "numpy") as file:
      return np.asarray(file.get_tensor(name)).astype(np.float32, copy=False)

  def tensor(name: str, header: Any) -> Tensor:
    # F32 and BF16 there, float32 and bfloat16 elsewhere.
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


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      "a .pt file needs PyTorch: pip install 'jaxguide[torch]', or use .safetensors, which does not"
    ) from error
  return torch


def _read_pt(path: Path) -> dict[str, Tensor]:
  torch = _torch()
  with path.open("rb") as file:
    zipped = file.read(2) == b"PK"  # what PyTorch wrote before 1.6 is not, and cannot be mapped into memory
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # What it would warn of, TorchScript, it then refuses.
      content = torch.load(path, weights_only=True, mmap=zipped, map_location="cpu")
  except Exception as error:  # PyTorch raises many kinds for a file that is not whole, KeyError among them.
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
      raise ValueError(
        f"{path} carries code or objects besides weights ({found[1]}); nothing of it was run. Save its state dict alone"
      ) from error
    reason = re.split(r"\. |\n", str(error))[0]
    raise ValueError(f"{path} is truncated or not a state dict of PyTorch ({reason})") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} must hold a state dict, but holds {type(content).__name__}")
  for name, value in content.items():
    if not isinstance(value, torch.Tensor):
      raise ValueError(f"{path} must hold a state dict of tensors, but {name!r} is of type {type(value).__name__}")
    if value.layout is not torch.strided or value.device.type != "cpu":
      raise ValueError(f"{path} must hold plain tensors, but {name!r} is {value.layout} on {value.device}")

  def tensor(value: Any) -> Tensor:
    dtype = str(value.dtype).removeprefix("torch.")
    return Tensor(tuple(value.shape), dtype, lambda: value.detach().to(torch.float32).numpy())

  return {str(name): tensor(value) for name, value in content.items()}


def _write_pt(file: Any, state_dict: dict[str, np.ndarray]) -> None:
  torch = _torch()
  torch.save({name: torch.from_numpy(array) for name, array in state_dict.items()}, file)


FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path], dict[str, Tensor]]]] = {
  ".safetensors": (_write_safetensors, _read_safetensors),
  ".pt": (_write_pt, _read_pt),
}
