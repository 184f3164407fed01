"""Exported samplers, read from a file and called; see `jaxguide.generate.export`."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide._core import checks, keys
from jaxguide._core.files import PathLike, check_readable

FORMAT, VERSION = "jaxguide sampler", 1

PLATFORMS = {"gpu": ("cuda", "rocm")}
"""The platforms of JAX's backends, where they have other names."""


class Sampler:
  """A sampler that `jaxguide.generate.export_sampler` wrote.

  Args:
    path: the file.
    weights: the file of its weights, if they are not in it.
    platform: the platform; that of JAX's default backend if it is None.

  Attributes:
    header: what the file says of itself: its arguments, results, settings and weights.
    platform: the platform.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is no such file or damaged, is of another version, has no program for the platform, or the weights
      are not those that it needs.
  """

  def __init__(self, path: PathLike, weights: PathLike | None = None, platform: str | None = None):
    names = _names(platform)
    with _opened(path) as file:
      self.header = _header(path, file)
      known: Any = self.header["platforms"]
      found = next((name for name in names if name in known), None)
      if found is None:
        raise ValueError(f"{path} has programs for {', '.join(known)}, not for {' or '.join(names)}")
      self.platform = found
      program = _member(path, file, f"programs/{found}")
      inside = self.header["weights_inside"]
      if inside is (weights is not None):
        raise ValueError(f"the weights are in {path}: leave out weights" if inside else f"give the weights of {path}")
      arrays = {name: _member(path, file, f"weights/{name}") for name in self.header["weights"]} if inside else {}
    if weights is not None:
      with _opened(weights) as file:
        arrays = {name: _member(weights, file, name) for name in self.header["weights"]}
    arrays = {name: _typed(name, array, self.header["weights"][name]) for name, array in arrays.items()}
    self._weights = jax.device_put(arrays)
    self._call = jax.jit(_deserialized(path, program, self.header).call)

  def __call__(
    self,
    num: int | None = None,
    label: Any = None,
    *,
    scale: float | int | None = None,
    seed: int = 0,
    first: int = 0,
  ) -> np.ndarray:
    """Draw samples ``first`` to ``first + num - 1`` of a seed, those of ``jaxguide sample``.

    Args:
      num: number of samples; that of the labels, or of the program's batch, if it is None.
      label: a class for each, or one for all; needed where the model has classes.
      scale: the scale of the guidance; that of the header if it is None.
      seed: from 0 to 2**64 - 1.
      first: the index of the first sample.

    Returns:
      (num, height, width, channels) uint8.

    Raises:
      ValueError: for a value that is out of range, or a number of samples that the program is not for.
      TypeError: for an argument that the program does not have, or without one that it needs.
      FloatingPointError: if a sample is not finite.
    """
    arguments = self.header["arguments"]
    if (label is None) is ("label" in arguments):
      raise TypeError("the sampler takes no label" if label is not None else "the sampler needs label")
    if scale is not None and "scale" not in arguments:
      raise TypeError("the sampler takes no scale")
    default = self.header["batch"] or 1
    if num is None:
      num = len(label) if isinstance(label, Sequence | np.ndarray) else default
    num = checks.at_least("num", num, 1)
    if self.header["batch"] not in (None, num):
      raise ValueError(f"the program draws {self.header['batch']} samples at a time, and {num} are asked for")
    checks.whole("first", first, 0, keys.MAX_INDEX + 1 - num)
    given: dict[str, Any] = {"seed": np.array(divmod(keys.check_seed("seed", seed), 2**32), np.uint32)}
    given["index"] = (first + np.arange(num, dtype=np.int64)).astype(np.uint32)
    if label is not None:
      labels = np.asarray(label)
      if labels.ndim and len(labels) != num:
        raise ValueError(f"label must be one class, or one for each of {num} samples; got {len(labels)}")
      checked = checks.labels("label", labels, arguments["label"]["largest"] + 1)
      given["label"] = np.broadcast_to(checked, (num,)).astype(np.int32)
    if "scale" in arguments:
      value = checks.finite("scale", checks.number("scale", arguments["scale"]["default"] if scale is None else scale))
      given["scale"] = np.float32(value)
    results = self._call(self._weights, **given)
    ok = np.asarray(results["ok"])
    if not ok.all():
      raise FloatingPointError(f"{(~ok).sum()} of {num} samples are not finite, the first at {int(np.argmin(ok))}")
    return np.asarray(results["images"])


def _names(platform: str | None) -> Sequence[str]:
  if platform is not None:
    return (platform,)
  backend = jax.default_backend()
  return PLATFORMS.get(backend, (backend,))


def _opened(path: PathLike) -> Any:
  """Open a zip archive as NumPy reads it."""
  if not Path(path).exists():
    raise FileNotFoundError(f"there is no {path}")
  check_readable(path)
  try:
    file = np.load(path, allow_pickle=False)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} is damaged, or no archive ({error})") from error
  if not isinstance(file, np.lib.npyio.NpzFile):
    raise ValueError(f"{path} is no archive")
  return file


def _member(path: PathLike, file: Any, name: str) -> Any:
  """Read a member of an archive: an array, or bytes."""
  try:
    return file[name]
  except KeyError:
    raise ValueError(f"{path} is damaged: it has no {name}") from None
  except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
    raise ValueError(f"{path} is damaged: {name} cannot be read ({error})") from error


def _header(path: PathLike, file: Any) -> dict[str, Any]:
  """Read the header, and check that it is one."""
  if "header.json" not in file.files:
    raise ValueError(f"{path} is no exported sampler: jaxguide export-sampler writes one")
  try:
    header = json.loads(_member(path, file, "header.json"))
    if header["format"] != FORMAT:
      raise ValueError(f"its format is {header['format']!r}")
    if header["version"] != VERSION:
      raise ValueError(f"it is of version {header['version']!r}, and this jaxguide reads {VERSION}")
    kinds = {"platforms": Mapping, "arguments": Mapping, "weights": Mapping, "weights_inside": bool}
    for name, kind in kinds.items():
      if not isinstance(header[name], kind):
        raise ValueError(f"its {name} are {header[name]!r}")
    checks.at_least("batch", header["batch"] or 1, 1)
  except (KeyError, TypeError, ValueError, RecursionError) as error:
    raise ValueError(f"{path} has a header that cannot be read: {error}") from error
  return header


def _typed(name: str, array: Any, described: Any) -> np.ndarray:
  """Give an array its type, after a check that it is the one described."""
  dtype = jax.numpy.dtype(described["dtype"])
  fits = isinstance(array, np.ndarray) and [*array.shape] == described["shape"]
  if not fits or array.dtype.itemsize != dtype.itemsize:
    raise ValueError(f"the weight {name} must be {described['dtype']} of shape {described['shape']}")
  return array.view(dtype)


def _deserialized(path: PathLike, program: Any, header: Mapping[str, Any]) -> Any:
  try:
    return jax.export.deserialize(bytearray(program))
  except ImportError as error:
    raise ImportError(f"jax.export needs the package flatbuffers: pip install flatbuffers ({error})") from error
  except Exception as error:
    raise ValueError(
      f"{path} has a program that jax {jax.__version__} cannot read; it was written by jax {header.get('jax')}: {error}"
    ) from error
