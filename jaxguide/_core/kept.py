"""What takes long to find and depends on the installation alone, kept on disk beside JAX's compiled programs.

An entry is a file of JSON in the folder of JAX's compilation cache. Its name is a checksum of the question, of the
versions of JAX and Flax, and of sizes and times of jaxguide's source files, so that no other installation finds it.
Where JAX keeps no compiled programs, nothing is kept.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxguide._core import files

FOLDER = "kept"


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
  if not folder or "://" in folder:
    return find()
  name = hashlib.sha256(f"{question}\n{_installation()}".encode()).hexdigest()
  path = Path(folder).expanduser() / FOLDER / f"{name}.json"
  try:
    entry = json.loads(path.read_bytes())
    if entry["question"] == question:
      return entry["answer"]
  except (OSError, ValueError, TypeError, KeyError):
    pass
  answer = find()
  with contextlib.suppress(OSError):
    files.write_atomically(path, json.dumps({"question": question, "answer": answer}).encode())
  return answer


@functools.cache
def _installation() -> str:
  """Describe what an answer depends on beside its question."""
  package = Path(__file__).parents[1]
  sources = [(str(path.relative_to(package)), path.stat()) for path in sorted(package.rglob("*.py"))]
  versions = [importlib.metadata.version(name) for name in ("jax", "flax")]
  return str([versions, [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sources]])
