"""Trees of arrays on their way to a disk and back: checksums, by which rot is told, and errors in one sentence."""

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
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core.typing import PyTree

# How long a failed write has to be silent to be over, in seconds.
PATIENCE = 1.0

# What a checkpoint takes beside its arrays, in bytes, and some more.
MARGIN = 2**20


def leaves(tree: PyTree) -> dict[str, Any]:
  """Give the leaves of a tree by their paths.

  >>> leaves({"params": {"kernel": 1.0, "bias": 2.0}})
  {'params/bias': 2.0, 'params/kernel': 1.0}
  """
  with_path = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in with_path}


def not_finite(tree: PyTree) -> str | None:
  """Give the path of the first array that holds an infinity or a NaN; None if there is none.

  >>> not_finite({"bias": np.zeros(2), "kernel": np.array([1.0, np.inf])})
  'kernel'
  """
  for path, leaf in leaves(tree).items():
    # One at a time: all together they need not fit into the host's memory.
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and not np.isfinite(np.asarray(leaf)).all():
      return path
  return None


def checksum(leaf: Any) -> dict[str, Any]:
  """Describe an array so that another one has, as good as surely, another description: type, shape, and CRC-32.

  Any change of up to 32 bits that lie together is told, and all but one in 2**32 of the others.

  >>> checksum(np.zeros(3, np.float32))
  {'dtype': 'float32', 'shape': [3], 'crc32': '7bd5c66f'}
  """
  array = np.ascontiguousarray(leaf)
  crc = zlib.crc32(array.reshape(-1).view(np.uint8).data)
  return {"dtype": array.dtype.name, "shape": list(np.shape(leaf)), "crc32": f"{crc:08x}"}


def checksums(tree: PyTree) -> dict[str, dict[str, Any]]:
  """Give the checksum of each array of a tree by its path."""
  return {path: checksum(leaf) for path, leaf in leaves(tree).items()}


def check(tree: PyTree, wanted: Mapping[str, Any]) -> None:
  """Hold arrays against the `checksums` that were kept of them.

  Raises:
    ValueError: naming the first array that is another one, or of which there is no checksum.

  >>> check({"bias": np.ones(2)}, checksums({"bias": np.zeros(2)}))
  Traceback (most recent call last):
  ...
  ValueError: bias does not match its checksum
  """
  for path, leaf in leaves(tree).items():
    if path not in wanted:
      raise ValueError(f"there is no checksum of {path}")
    if checksum(leaf) != wanted[path]:
      raise ValueError(f"{path} does not match its checksum")


def reason(error: BaseException) -> str:
  """Give in one line what went wrong at the root of what Orbax or its storage raised.

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
  first = next(iter(str(error).strip().splitlines()), "").partition(" [tensorstore_spec")[0]
  named = f"{type(error).__name__} {first}" if isinstance(error, KeyError) or not first else first
  return textwrap.shorten(named, 300, placeholder=" ...")


def attempt(call: Callable[[], Any], patience: float = 0.0) -> tuple[Any, str | None]:
  """Call Orbax; give what it gives, or why it failed, in one line.

  Where it fails its threads print a traceback for each array, some after the first was raised, and its tasks when they
  are collected. Those are not let through; what it prints where nothing goes wrong is.

  Args:
    call: what to do.
    patience: where it fails, how long the threads have to be silent to be over, in seconds.
  """
  heard, absl = io.StringIO(), logging.getLogger("absl")
  result, failed, hook = None, None, sys.unraisablehook
  absl.addFilter(_has_no_traceback)
  sys.unraisablehook = lambda ignored: None if _is_of_orbax(ignored.object) else hook(ignored)
  try:
    with contextlib.redirect_stderr(heard):
      try:
        result = call()
      except Exception as error:  # Orbax and its storage raise many kinds.
        failed = reason(error)
      if failed is not None:
        # It stays: tasks that nobody asked for their error may be collected at any time.
        logging.getLogger("asyncio").addFilter(_is_not_of_orbax)
        length = -1
        while length != (length := heard.tell()):
          gc.collect()  # The error is gone by now, and lets go of the tasks.
          time.sleep(patience)
  finally:
    absl.removeFilter(_has_no_traceback)
    sys.unraisablehook = hook
  if failed is None:
    sys.stderr.write(heard.getvalue())
  return result, failed


def _has_no_traceback(record: logging.LogRecord) -> bool:
  return not record.exc_info


def _is_of_orbax(coroutine: Any) -> bool:
  return "orbax" in getattr(getattr(coroutine, "cr_code", None), "co_filename", "")


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
  return not (record.exc_info and "OCDBT" in str(record.exc_info[1]))


def write(path: Path, tree: PyTree, call: Callable[[], Any]) -> None:
  """Let Orbax write a tree to ``path``; where it fails, nothing of it stays on the disk.

  Raises:
    OSError: with the path and the reason.
  """
  needed = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) + MARGIN
  free = shutil.disk_usage(path.parent).free
  # Known before, it costs no time, and Orbax is quiet.
  failed = f"{os.strerror(errno.ENOSPC)}, it needs {needed:,} bytes and {free:,} are free" if free < needed else None
  if failed is None:
    _, failed = attempt(call, PATIENCE)
  if failed is not None:
    remove_unfinished(path.parent, path.name)
    raise OSError(f"cannot write {path}: {failed}; make room there, or choose another path")


def remove_unfinished(folder: Path, name: str = "") -> None:
  """Remove what Orbax had begun to write in a folder when it was ended."""
  for begun in folder.glob(f"{glob.escape(name)}*.orbax-checkpoint-tmp*"):
    shutil.rmtree(begun, ignore_errors=True)
