"""Writing files so that nothing is ever half there."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PathLike = str | os.PathLike[str]


def check_writable(path: PathLike) -> None:
  """Check, before long work, that a file could be written at ``path`` after it.

  Missing parent folders are no obstacle: the writers of this module make them.

  Raises:
    OSError: if ``path`` is a folder or a device, lies under a file, or may not be written.

  >>> check_writable(os.curdir)
  Traceback (most recent call last):
  ...
  OSError: cannot write .: it is a folder; name a file in it
  """
  path = Path(path)
  if path.is_dir():
    raise OSError(f"cannot write {path}: it is a folder; name a file in it")
  if os.path.exists(path) and not path.is_file():
    # The writers replace what was there, which must not happen to /dev/null.
    raise OSError(f"cannot write {path}: it is not a regular file; name one")
  folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
  if not folder.is_dir():
    raise OSError(f"cannot write {path}: {folder} is not a folder; choose another path")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise OSError(f"cannot write {path}: no permission to write in {folder}; choose another path")


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
  """Open a file that takes its place at ``path`` only once it is whole; missing folders are made.

  Raises:
    OSError: if ``path`` cannot be written; what was there stays.
  """
  path = Path(path)
  check_writable(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic only within one file system; not `tempfile`, whose
    # files no one else may read.
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
      with part.open("wb") as file:
        yield file
      part.replace(path)
    finally:
      part.unlink(missing_ok=True)
  except OSError as error:
    raise OSError(f"cannot write {path}: {error.strerror or error}; choose another path") from error


def write_atomically(path: PathLike, content: bytes) -> None:
  """Write a file so that a reader finds the old one or the new one, never half of it.

  Raises:
    OSError: if ``path`` cannot be written; what was there stays.
  """
  with replacing(path) as file:
    file.write(content)
