"""What takes long to find and depends on the installation alone, kept on disk beside JAX's compiled programs.

An entry is a file of JSON in the folder of JAX's compilation cache. Its name is a checksum of the question, of the
versions of JAX and Flax, and of sizes and times of jaxguide's source files, so that no other installation finds it.

Only the commands keep anything. A process of the user's own may replace parts of the package while it runs, and its
answers would then be wrong for others. Nothing is kept, either, where JAX keeps no compiled programs, or where a source
file was changed after the process had begun.
"""

import contextlib
import functools
import hashlib
import json
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax
import jax

from jaxguide._core import files

FOLDER = "kept"

_BEGAN = time.time()
_BY_COMMAND = threading.Event()


def keep() -> None:
  """Keep answers from now on, as the commands do."""
  _BY_COMMAND.set()


def kept(question: str, find: Callable[[], Any]) -> Any:
  """Return the answer to a question: the one that an earlier process kept, or else what ``find`` returns.

  A file that cannot be read or written, or is damaged, is as good as none.

  Args:
    question: what is asked, with all that the answer depends on beside the installation.
    find: finds the answer, which JSON can hold.

  >>> kept("how many colours has a traffic light", lambda: 3)
  3
  """
  folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
  if not (_BY_COMMAND.is_set() and enabled and folder) or "://" in folder or (installation := _installation()) is None:
    return find()
  name = hashlib.sha256(f"{question}\n{installation}".encode()).hexdigest()
  path = Path(folder) / FOLDER / f"{name}.json"
  with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
    entry = json.loads(path.read_bytes())
    if entry["crc32"] == _checksum(question, entry["answer"]):
      return entry["answer"]
  answer = find()
  with contextlib.suppress(OSError, ValueError):
    entry = {"question": question, "answer": answer, "crc32": _checksum(question, answer)}
    files.write_atomically(path, json.dumps(entry).encode())
  return answer


def _checksum(question: str, answer: Any) -> int:
  return zlib.crc32(json.dumps([question, answer]).encode())


@functools.cache
def _installation() -> str | None:
  """Describe what an answer depends on beside its question; None if that is not known.

  It is not known where the files of the package are not found, or where one is newer than this process.
  """
  package = Path(__file__).parents[1]
  try:
    sources = [(str(path.relative_to(package)), path.stat()) for path in sorted(package.rglob("*.py"))]
  except OSError:
    return None
  if not sources or max(stat.st_mtime for _, stat in sources) >= _BEGAN:
    return None
  return str([jax.__version__, flax.__version__, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sources]])
