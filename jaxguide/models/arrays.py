"""Writing trees of arrays to disk and reading them back, with checksums against damage and one-line errors."""

import contextlib
import errno
import gc
import glob
import io
import logging
import os
import re
import shutil
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core.typing import PyTree
from jaxguide.distributed.processes import gathered, several

# A failed write counts as ended once Orbax's threads have printed nothing for this many seconds.
PATIENCE = 1.0

# The number of arrays that `read` reads side by side.
AT_A_TIME = 32

# Upper bound on the size of a checkpoint's files without its arrays, in bytes.
MARGIN = 2**20


def leaves(tree: PyTree) -> dict[str, Any]:
  """Return the leaves of a tree by their paths.

  >>> leaves({"params": {"kernel": 1.0, "bias": 2.0}})
  {'params/bias': 2.0, 'params/kernel': 1.0}
  """
  with_path = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in with_path}


def not_finite(tree: PyTree) -> str | None:
  """Return the path of the first array that contains an infinity or a NaN; None if there is none.

  >>> not_finite({"bias": np.zeros(2), "kernel": np.array([1.0, np.inf])})
  'kernel'
  """
  for path, leaf in leaves(tree).items():
    # One array at a time, because all arrays together may not fit into the host's memory.
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not _is_finite(leaf):
      return path
  return None


def _spans_processes(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable


def _is_finite(leaf: Any) -> bool:
  if _spans_processes(leaf):
    return bool(_all_finite(leaf))
  return bool(np.isfinite(np.asarray(leaf)).all())


@jax.jit
def _all_finite(leaf):
  return jnp.isfinite(leaf).all()


def checksum(leaf: Any) -> dict[str, Any]:
  """Return a checksum of an array: its type, shape and CRC-32.

  The CRC detects any change within 32 consecutive bits, and misses one in 2**32 of the other changes. An array that
  spans processes has a weighted sum in its place, `sum32`, since no process has the bytes in their order.

  >>> checksum(np.zeros(3, np.float32))
  {'dtype': 'float32', 'shape': [3], 'crc32': '7bd5c66f'}
  """
  if _spans_processes(leaf):
    return {"dtype": leaf.dtype.name, "shape": list(leaf.shape), "sum32": sum32(leaf)}
  array = np.ascontiguousarray(leaf)
  crc = zlib.crc32(array.reshape(-1).view(np.uint8).data)
  return {"dtype": array.dtype.name, "shape": list(np.shape(leaf)), "crc32": f"{crc:08x}"}


def sum32(leaf: Any) -> str:
  """Return a checksum that devices compute together: the sum of ``(2 i + 1) w_i`` modulo 2**32 over the words ``w_i``.

  A word is a number of an array, or each 32 bits of it. The sum does not depend on how the array is split. It detects
  any change of one word, since the factors are odd.

  >>> sum32(np.ones(2, np.float32)), sum32(np.array([1.0, 1.0000001], np.float32))
  ('fe000000', 'fe000003')
  """
  return f"{int(_sum32(leaf)):08x}"


@jax.jit
def _sum32(leaf):
  size = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
  leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
  words = jax.lax.bitcast_convert_type(leaf, size).astype(jnp.uint32)
  position = jnp.zeros(words.shape, jnp.uint32)
  for axis, length in enumerate(words.shape):
    position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  return jnp.sum(words * (2 * position + jnp.uint32(1)), dtype=jnp.uint32)


def checksums(tree: PyTree) -> dict[str, dict[str, Any]]:
  """Return the checksum of each array of a tree, by its path."""
  return {path: checksum(leaf) for path, leaf in leaves(tree).items()}


def check(tree: PyTree, expected: Mapping[str, Any]) -> None:
  """Compare arrays with their stored `checksums`.

  Raises:
    ValueError: if an array differs from its checksum or has none, naming the first such array.

  >>> check({"bias": np.ones(2)}, checksums({"bias": np.zeros(2)}))
  Traceback (most recent call last):
  ...
  ValueError: bias does not match its checksum
  """
  for path, leaf in leaves(tree).items():
    if path not in expected:
      raise ValueError(f"there is no checksum of {path}")
    if _checksum_as(expected[path], leaf) != expected[path]:
      raise ValueError(f"{path} does not match its checksum")


def _checksum_as(stored: Any, leaf: Any) -> dict[str, Any]:
  """Return the checksum of an array by the method of a stored one."""
  if isinstance(stored, Mapping) and "sum32" in stored:
    return {"dtype": np.dtype(leaf.dtype).name, "shape": list(np.shape(leaf)), "sum32": sum32(leaf)}
  return checksum(gathered(leaf) if _spans_processes(leaf) else leaf)


def reason(error: BaseException) -> str:
  """Return the original cause of an error from Orbax or TensorStore, in one line.

  >>> reason(ValueError("NOT_FOUND: no manifest [tensorstore_spec='...']"))
  'NOT_FOUND: no manifest'
  """
  while error.__cause__ is not None:
    error = error.__cause__
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  first_line = next(iter(str(error).strip().splitlines()), "").partition(" [tensorstore_spec")[0]
  # The message of a KeyError is the key alone.
  message = f"{type(error).__name__} {first_line}" if isinstance(error, KeyError) or not first_line else first_line
  return textwrap.shorten(message, 300, placeholder=" ...")


def attempt(call: Callable[[], Any], patience: float = 0.0) -> tuple[Any, str | None]:
  """Call Orbax, and turn a failure into one line without tracebacks on stderr.

  When Orbax fails, its threads print a traceback for each array, some of them after the first exception was raised. Its
  asyncio tasks print theirs when they are garbage-collected. This output is discarded. If the call succeeds, everything
  that it printed to stderr is passed on.

  Args:
    call: the call, without arguments.
    patience: after a failure, wait until the threads have printed nothing for this many seconds.

  Returns:
    The result and None; or None and the reason of the failure.
  """
  captured, result, failure = io.StringIO(), None, None
  with _STDERR, without_tracebacks():
    with contextlib.redirect_stderr(captured):
      try:
        result = call()
      except Exception as error:  # Orbax and TensorStore raise many kinds of exceptions.
        failure = reason(error)
      if failure is not None:
        # This filter is not removed, because tasks with an unread exception may be garbage-collected at any later time.
        logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
        length = -1
        while length != (length := captured.tell()):
          gc.collect()  # The exception no longer refers to the tasks, so they are collected here.
          time.sleep(patience)
    if failure is None:
      sys.stderr.write(captured.getvalue())
  return result, failure


# sys.stderr belongs to all threads: one at a time may redirect it.
_STDERR = threading.RLock()


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
  """Discard the tracebacks that Orbax's threads and tasks print while the block runs."""
  absl, hook = logging.getLogger("absl"), sys.unraisablehook

  def has_no_traceback(record: logging.LogRecord) -> bool:
    return not record.exc_info

  absl.addFilter(has_no_traceback)
  sys.unraisablehook = lambda event: None if _is_of_orbax(event.object) else hook(event)
  try:
    yield
  finally:
    absl.removeFilter(has_no_traceback)
    sys.unraisablehook = hook


def _is_of_orbax(coroutine: Any) -> bool:
  return "orbax" in getattr(getattr(coroutine, "cr_code", None), "co_filename", "")


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return not (record.exc_info and "OCDBT" in str(record.exc_info[1]))


def checkpointer() -> Any:
  """Return Orbax's writer and reader of a tree of arrays, for this process alone: it does not wait for others."""
  import orbax.checkpoint as ocp

  own = jax.process_index()
  options = ocp.options.MultiprocessingOptions(
    primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
  )
  return ocp.StandardCheckpointer(**({"multiprocessing_options": options} if several() else {}))


def read(path: Path, expected: Mapping[str, Any], sharding: Any) -> dict[str, jax.Array] | None:
  """Read arrays that Orbax wrote by TensorStore, in a tenth of the time that Orbax takes to be imported and to read.

  Args:
    path: the folder of the arrays.
    expected: the checksum of each, by its path in the tree.
    sharding: where they are placed.

  Returns:
    The arrays by their paths; None if they are not all there as they should be. Orbax reads them then, and says why.
  """
  names = list(expected)
  if several() or any("." in name for name in names):
    return None
  found = {}
  try:
    import tensorstore

    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}
    for start in range(0, len(names), AT_A_TIME):
      some = names[start : start + AT_A_TIME]
      specs = [{"driver": "zarr", "kvstore": {**files, "path": f"{name.replace('/', '.')}/"}} for name in some]
      stores = [store.result() for store in [tensorstore.open(spec, open=True, read=True) for spec in specs]]
      for name, future in zip(some, [store.read() for store in stores], strict=True):
        array = future.result()
        if _checksum_as(expected[name], array) != expected[name]:
          return None
        found[name] = jax.device_put(array, sharding)
  except Exception:  # TensorStore raises many kinds; Orbax tells them apart.
    return None
  return found


def write(path: Path, tree: PyTree, call: Callable[[], Any]) -> None:
  """Write a tree to ``path`` by a call to Orbax. If the call fails, its incomplete files are removed.

  Args:
    path: the folder that the call writes.
    tree: the arrays, to estimate the space that is needed.
    call: the call to Orbax, without arguments.

  Raises:
    OSError: if the call fails or there is too little space, with the path and the reason.
  """
  check_space(path, tree)
  _, failure = attempt(call, PATIENCE)
  if failure is not None:
    remove_unfinished(path.parent, path.name)
    raise cannot_write(path, failure)


def check_space(path: Path, tree: PyTree) -> None:
  """Check that there is space for a tree at ``path``. This saves the time of an attempt, and Orbax's error output.

  Raises:
    OSError: if there is too little space.
  """
  if (failure := shortage(path, tree)) is not None:
    raise cannot_write(path, failure)


def shortage(path: Path, tree: PyTree) -> str | None:
  """Say how much space is missing for a tree at ``path``; None if there is enough."""
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + MARGIN
  free = shutil.disk_usage(path.parent).free
  if free >= needed:
    return None
  return f"{os.strerror(errno.ENOSPC)}, it needs {needed:,} bytes and {free:,} are free"


def cannot_write(path: Path, failure: str) -> OSError:
  """Return the error for a folder that cannot be written, with the reason."""
  return OSError(f"cannot write {path}: {failure}; free some space there, or choose another path")


def remove_unfinished(folder: Path, name: str = "") -> None:
  """Remove incomplete files of Orbax, which an interrupted process left in a folder."""
  for unfinished in folder.glob(f"{glob.escape(name)}*.orbax-checkpoint-tmp*"):
    shutil.rmtree(unfinished, ignore_errors=True)
