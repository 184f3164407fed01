"""A reader of PyTorch's ``.pt`` and ``.pth`` files that needs no PyTorch. It reads tensors and plain data alone.

``torch.save`` writes a pickle, which says what there is, and the numbers of the tensors beside it. Since PyTorch 1.6
both are parts of a zip file. Before, they follow each other in one file, after a magic number, the version of the
format and facts on the system. Both formats are read here.

A pickle can run any code when it is read. Here it constructs dictionaries, lists, tuples, texts, numbers and tensors;
anything else is an error. The pickle is checked before it is read, and a tensor must lie within its storage, and a
storage within the file. So a damaged or hostile file needs no more memory than its own size.
"""

import dataclasses
import io
import math
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from jaxguide._core import pickles
from jaxguide._core.files import PathLike, check_readable

MAGIC = 0x1950A86A20F9469CFC6C
"""The number at the beginning of a file of PyTorch before 1.6."""

VERSION = 1001
"""The version of the format of these files."""

DTYPES: dict[str, np.dtype] = {
  "DoubleStorage": np.dtype("float64"),
  "FloatStorage": np.dtype("float32"),
  "HalfStorage": np.dtype("float16"),
  "BFloat16Storage": np.dtype(jnp.bfloat16),
  "LongStorage": np.dtype("int64"),
  "IntStorage": np.dtype("int32"),
  "ShortStorage": np.dtype("int16"),
  "CharStorage": np.dtype("int8"),
  "ByteStorage": np.dtype("uint8"),
  "BoolStorage": np.dtype("bool"),
}
"""The type of a tensor's elements, by the name of its storage in PyTorch."""

MOST_AXES = 32
"""The largest number of a tensor's axes."""

LONGEST_TEXT = 2**24
"""The largest number of bytes in one text of a pickle."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # Of a part of a zip file: signature, length of the name, of extra fields.


@dataclasses.dataclass
class Storage:
  """A row of numbers in a file, which tensors are cut from."""

  path: Path
  dtype: np.dtype
  numel: int
  start: int | None = None
  checksum: int | None = None
  swapped: bool = False

  @property
  def size(self) -> int:
    """Its size in bytes."""
    return self.numel * self.dtype.itemsize

  def read(self) -> np.ndarray:
    """Read it, and compare it with its checksum."""
    if self.size:
      with self.path.open("rb") as file:
        file.seek(self.start or 0)
        raw = np.fromfile(file, np.uint8, self.size)
    else:
      raw = np.zeros(0, np.uint8)
    if len(raw) < self.size or (self.checksum is not None and zlib.crc32(raw.data) != self.checksum):
      raise ValueError(f"{self.path} is damaged: the numbers of a tensor do not have the checksum that the file states")
    if self.swapped:
      raw = raw.view(f"u{self.dtype.itemsize}").byteswap().view(np.uint8)
    return raw.view(self.dtype)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file.

  Args:
    shape: its shape.
    dtype: the type of its elements.
    offset: where it begins in its storage, in elements.
    strides: the steps from one element to the next along each axis, in elements.
    storage: the numbers that it is cut from.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  offset: int
  strides: tuple[int, ...]
  storage: Any = dataclasses.field(repr=False)

  def read(self) -> np.ndarray:
    """Read the tensor from the file, in its own type.

    Raises:
      ValueError: if its numbers do not have the checksum that the file states.
      OSError: if the file cannot be read.
    """
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    numbers = self.storage.read()[self.offset :]
    steps = [step * self.dtype.itemsize for step in self.strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(numbers, self.shape, steps)).reshape(self.shape)


def read(path: PathLike) -> Any:
  """Read what ``torch.save`` wrote, without PyTorch. Tensors stay in the file until they are read one by one.

  Args:
    path: a file of any version of PyTorch since 0.4. A file without checksums, which
      ``torch.serialization.set_crc32_options(False)`` makes, is taken for damaged.

  Returns:
    What the file holds: mostly a dictionary of `StoredTensor` by name, or one that has such a dictionary among others.
    A parameter is a tensor here, and an ``OrderedDict`` a dictionary.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is truncated, damaged or no file of PyTorch; or if it holds other objects than dictionaries,
      lists, tuples, texts, numbers, tensors and an ``argparse.Namespace``. Nothing of it is run.

  >>> import tempfile, pathlib
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = pathlib.Path(folder, "weights.pt")
  ...   _ = path.write_bytes(b"no weights")
  ...   read(path)
  Traceback (most recent call last):
  ...
  ValueError: ...weights.pt is truncated or not a state dict of PyTorch (...)
  """
  path = Path(path)
  if not path.exists():
    raise FileNotFoundError(f"there is no file {path}")
  check_readable(path)
  with path.open("rb") as file:
    try:
      zipped = file.read(4) == b"PK\x03\x04"
      file.seek(0)
      return (_read_zip if zipped else read_old)(path, file)
    except Exception as error:  # A damaged file leads to many kinds of errors, in zipfile and struct as well.
      reason = str(error) or type(error).__name__
      forbidden = re.search(r"it needs (\S+), which is not allowed", reason)
      if forbidden:
        raise ValueError(
          f"{path} contains code or objects besides weights ({forbidden[1]}); no code was run. "
          "Save its state dict alone"
        ) from error
      reason = reason.removeprefix(f"{path} cannot be read: ")
      raise ValueError(f"{path} is truncated or not a state dict of PyTorch ({reason})") from error


# --- the two formats ------------------------------------------------------------------------------


def _read_zip(path: Path, file: BinaryIO) -> Any:
  """Read a file of PyTorch since 1.6: ``data.pkl``, and each storage as ``data/KEY``, in one folder of a zip file."""
  length = os.fstat(file.fileno()).st_size
  with zipfile.ZipFile(file) as archive:
    parts = {info.filename: info for info in archive.infolist()}
  found = [name for name in parts if name.endswith("/data.pkl") and name.count("/") == 1]
  if len(found) != 1:
    raise ValueError(f"it must have one part data.pkl, and has {len(found)}")
  folder = found[0].removesuffix("data.pkl")

  def locate(name: str) -> tuple[int, zipfile.ZipInfo]:
    """Return where a part's content begins, and the part."""
    info = parts.get(folder + name)
    if info is None:
      raise ValueError(f"it has no part {name}")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
      raise ValueError(f"its part {name} is compressed, which PyTorch's files are not")
    file.seek(info.header_offset)
    signature, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if signature != b"PK\x03\x04" or file.read(name_length) != (folder + name).encode():
      raise ValueError(f"its part {name} is not where its directory says")
    if start + info.file_size > length:
      raise ValueError(f"its part {name} of {info.file_size:,} bytes ends behind the file's {length:,} bytes")
    return start, info

  def content(name: str) -> bytes:
    start, info = locate(name)
    file.seek(start)
    found = file.read(info.file_size)
    if zlib.crc32(found) != info.CRC:
      raise ValueError(f"its part {name} does not have its checksum")
    return found

  order = content("byteorder") if folder + "byteorder" in parts else b"little"
  if order not in (b"little", b"big"):
    raise ValueError(f"its byte order is {order!r}")

  def storage(key: str, dtype: np.dtype, numel: int) -> Storage:
    start, info = locate(f"data/{key}")
    if info.file_size != numel * dtype.itemsize:
      raise ValueError(
        f"its part data/{key} has {info.file_size:,} bytes, but {numel:,} numbers of {dtype} belong there"
      )
    return Storage(path, dtype, numel, start, info.CRC, order == b"big" and dtype.itemsize > 1)

  return _unpickle(io.BytesIO(content("data.pkl")), path, storage)


def read_old(path: Path, file: Any) -> Any:
  """Read a file of PyTorch before 1.6: five pickles one after the other, and then the storages."""
  start = file.tell()
  length = file.seek(0, os.SEEK_END)
  file.seek(start)
  if _unpickle(file, path) != MAGIC:
    raise ValueError("it does not begin with PyTorch's number")
  version = _unpickle(file, path)
  if version != VERSION:
    raise ValueError(f"its format has version {version}, expected {VERSION}")
  _unpickle(file, path)  # Facts on the system. Numbers are little-endian on every system.
  storages: dict[str, Storage] = {}

  def storage(key: str, dtype: np.dtype, numel: int) -> Storage:
    known = storages.setdefault(key, Storage(path, dtype, numel))
    if (known.dtype, known.numel) != (dtype, numel):
      raise ValueError(f"its storage {key} occurs with two types or sizes")
    return known

  content = _unpickle(file, path, storage)
  keys = _unpickle(file, path)
  if not isinstance(keys, list) or len(keys) != len(storages) or {*keys} != {*storages}:
    raise ValueError("the list of its storages does not fit its tensors")
  for key in keys:
    known = storages[key]
    (numel,) = struct.unpack("<q", file.read(8))
    known.start = file.tell()
    if numel != known.numel or known.start + known.size > length:
      raise ValueError(f"its storage {key} of {known.numel:,} numbers does not lie in the file")
    file.seek(known.size, os.SEEK_CUR)
  return content


# --- the pickle -----------------------------------------------------------------------------------


class _Dict(dict):
  """What an ``OrderedDict`` becomes. Its attributes, such as the ``_metadata`` of a state dict, are left out."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    """Leave the attributes out."""


class _Settings:
  """What an ``argparse.Namespace`` becomes: the settings of a training, which checkpoints hold beside the weights."""

  def __setstate__(self, state: Any) -> None:
    """Leave the settings out."""


class Tensors:
  """What a pickle of PyTorch may construct besides plain data."""

  def __init__(self, storage: Callable[[str, np.dtype, int], Storage]):
    self.storage = storage

  @property
  def allowed(self) -> Mapping[tuple[str, str], Any]:
    """The constructors by module and name. Those of storages are names here, since they are only looked up."""
    return {
      ("collections", "OrderedDict"): _Dict,
      ("argparse", "Namespace"): _Settings,
      ("torch._utils", "_rebuild_tensor"): self.tensor,
      ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
      ("torch._utils", "_rebuild_parameter"): self.parameter,
      **{("torch", name): name for name in DTYPES},
    }

  def load(self, pid: Any) -> Storage:
    """Return the storage of a persistent identifier: ``("storage", type, key, device, numel)`` and, before 1.6, None.

    The device on which a tensor was does not matter.
    """
    match pid:
      case ("storage", str(kind), str(key), str(), int(numel), *view):
        if kind in DTYPES and numel >= 0 and view in ([], [None]):
          return self.storage(key, DTYPES[kind], numel)
    raise ValueError("it refers to something else than the storage of a tensor")

  def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *grad_hooks_and_metadata: Any) -> StoredTensor:
    """Cut a tensor from its storage. Whether it has gradients does not matter."""
    del grad_hooks_and_metadata
    if not isinstance(storage, Storage) or not (type(shape) is type(strides) is tuple):
      raise ValueError("a tensor in it is not described by a storage, an offset, a shape and strides")
    if not all(type(number) is int and 0 <= number < 2**60 for number in (offset, *shape, *strides)):
      raise ValueError("a tensor in it has an offset, a shape or strides that are no whole numbers of at least 0")
    if len(shape) != len(strides) or len(shape) > MOST_AXES:
      raise ValueError(
        f"a tensor in it has {len(shape)} sides and {len(strides)} strides; at most {MOST_AXES} are read"
      )
    last = offset + sum((side - 1) * step for side, step in zip(shape, strides, strict=True))
    numel = math.prod(shape)
    if numel == 0:
      if math.prod(filter(None, shape)) >= 2**60:
        raise ValueError("a tensor in it has a shape beyond all memory")
    elif last >= storage.numel:
      raise ValueError(f"a tensor of shape {shape} in it ends outside its storage of {storage.numel:,} numbers")
    elif numel > storage.numel:
      raise ValueError(f"a tensor of shape {shape} in it repeats the {storage.numel:,} numbers of its storage")
    return StoredTensor(shape, storage.dtype, offset, strides, storage)

  def parameter(self, tensor: Any, *grad_and_hooks: Any) -> StoredTensor:
    """Return the tensor of a parameter."""
    del grad_and_hooks
    if not isinstance(tensor, StoredTensor):
      raise ValueError("a parameter in it is not made of a tensor")
    return tensor


def _unpickle(file: Any, path: Path, storage: Callable[[str, np.dtype, int], Storage] | None = None) -> Any:
  """Read the pickle at the position of an open file, with tensors only if there is a function for storages."""
  pickled = io.BytesIO(checked(file))
  if storage is None:
    return pickles.read(pickled, path, {})
  tensors = Tensors(storage)
  return pickles.read(pickled, path, tensors.allowed, tensors.load)


def checked(file: Any, longest: int = LONGEST_TEXT) -> bytes:
  """Return the bytes of the pickle at the position of an open file, whose sizes and indices are sensible.

  Python's reader allocates what a pickle claims before it finds that the pickle is shorter.

  Args:
    file: an open file. It is left behind the pickle's end.
    longest: the largest number of bytes in one text.

  Raises:
    ValueError: if a text is longer, the pickle is truncated, or an index is beyond its length.
  """
  start = file.tell()
  limited: Any = _Limited(file, longest)
  memo = ("PUT", "BINPUT", "LONG_BINPUT")
  largest = max((int(at or 0) for operation, at, _ in pickletools.genops(limited) if operation.name in memo), default=0)
  length = file.tell() - start
  if largest > length:
    raise ValueError(f"its pickle of {length:,} bytes has an object with the number {largest:,}")
  file.seek(start)
  return file.read(length)


class _Limited:
  """A file that is asked for no more than it holds, and for no more than ``longest`` bytes at once."""

  def __init__(self, file: Any, longest: int):
    position = file.tell()
    self.file, self.longest, self.end = file, longest, file.seek(0, os.SEEK_END)
    file.seek(position)

  def read(self, size: int) -> bytes:
    """Read up to ``size`` bytes."""
    if size > self.longest:
      raise ValueError(f"its pickle has a text of {size:,} bytes; at most {self.longest:,} are read")
    return self.file.read(min(size, self.end - self.file.tell()))

  def readline(self) -> bytes:
    """Read up to the end of a line."""
    return self.file.readline(self.longest)

  def tell(self) -> int:
    """Return the position."""
    return self.file.tell()
