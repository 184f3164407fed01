"""Weights of published networks: the file, its hash, and names and shapes that have to fit."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxguide._core.files import PathLike
from jaxguide.models.importers import state_dicts

DIGITS = 16
"""How many digits of the SHA-256 of a file are kept."""

SHOWN = 3
"""How many names an error lists."""


def digest(path: PathLike) -> str:
  """Return the first 16 digits of the SHA-256 of a file.

  Raises:
    OSError: if the file cannot be read.

  >>> import tempfile, os
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = os.path.join(folder, "weights.pth")
  ...   _ = open(path, "wb").close()
  ...   digest(path)
  'e3b0c44298fc1c14'
  """
  with Path(path).open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def check(
  path: PathLike,
  network: str,
  tensors: Mapping[str, state_dicts.Tensor],
  expected: Mapping[str, Sequence[int]],
  unused: Sequence[str] = (),
) -> None:
  """Check that a file has the tensors of a network: all of them, no others, each of its shape.

  Args:
    path: the file, for the error.
    network: the name of the network, for the error.
    tensors: the tensors of the file by name.
    expected: the shapes of the network's tensors by name.
    unused: names of tensors that the file may have besides.

  Raises:
    ValueError: if they differ; the message has the first differences of each kind.

  >>> check("w.pth", "Inception", {}, {"fc.weight": (1008, 2048)})
  Traceback (most recent call last):
  ...
  ValueError: w.pth does not hold the weights of Inception: 1 missing (fc.weight)
  """
  missing = [name for name in expected if name not in tensors]
  surplus = [name for name in tensors if name not in expected and name not in unused]
  other = [
    f"{name} has shape {tensors[name].shape}, expected {tuple(shape)}"
    for name, shape in expected.items()
    if name in tensors and tuple(tensors[name].shape) != tuple(shape)
  ]
  kinds = [(missing, "missing"), (surplus, "unknown"), (other, "of another shape")]
  found = [f"{len(names)} {kind} ({_few(names)})" for names, kind in kinds if names]
  if found:
    raise ValueError(f"{path} does not hold the weights of {network}: {'; '.join(found)}")


def _few(names: Sequence[str]) -> str:
  return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def read(path: PathLike, name: str, tensor: state_dicts.Tensor) -> np.ndarray:
  """Read a tensor as float32.

  Args:
    path: the file, for the error.
    name: the name of the tensor, for the error.
    tensor: the tensor.

  Raises:
    ValueError: if it is damaged, or has numbers that are not finite.
  """
  array = np.asarray(tensor)
  if not np.isfinite(array).all():
    raise ValueError(f"{name} in {path} has numbers that are not finite: get the file anew")
  return array
