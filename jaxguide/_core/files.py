"""Writing files so that nothing is ever half there, and locks so that two runs do not write in one place."""

import contextlib
import datetime
import os
import socket
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PathLike = str | os.PathLike[str]

PART = ".part"
"""How the name of a file ends while it is being written."""

LONGEST = 200
"""The most bytes in the name of a file. While it is made there are others beside it, with longer names."""


def check_writable(path: PathLike) -> None:
  """Check, before long work, that a file could be written at ``path`` after it.

  Missing parent folders are no obstacle: the writers of this module make them.

  Raises:
    OSError: if ``path`` is a folder or a device, lies under a file, may not be written, or has a name above `LONGEST`.

  >>> check_writable(os.curdir)
  Traceback (most recent call last):
  ...
  OSError: cannot write .: it is a folder; name a file in it
  """
  path = Path(path)
  if len(os.fsencode(path.name)) > LONGEST:
    raise OSError(f"cannot write {path}: its name is longer than {LONGEST} bytes; choose a shorter one")
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


def check_readable(path: PathLike) -> None:
  """Check that what lies at ``path``, if anything, is a file: to open a pipe would wait for ever.

  Raises:
    OSError: if it is not.

  >>> check_readable(os.curdir)
  Traceback (most recent call last):
  ...
  OSError: cannot read .: it is not a regular file; name one
  """
  if os.path.exists(path) and not os.path.isfile(path):
    raise OSError(f"cannot read {path}: it is not a regular file; name one")


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
  """Open a file that takes its place at ``path`` only once it is whole and on the disk; missing folders are made.

  A process that is killed meanwhile leaves a file whose name starts with a dot and ends in `PART`; see `remove_parts`.
  Where ``path`` is a symbolic link, it stays one, and the file is what it leads to.

  Raises:
    OSError: if ``path`` cannot be written; what was there stays.
  """
  path = Path(os.path.realpath(path) if os.path.islink(path) else path)
  check_writable(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, since a rename is atomic only within one file system; not `tempfile`, whose
    # files no one else may read.
    part = path.with_name(f"{_part_of(path.name)}{uuid.uuid4().hex}{PART}")
    try:
      with part.open("wb") as file:
        yield file
        # The content reaches the disk before the name does: after a power loss there is the old file or the new one.
        file.flush()
        os.fsync(file.fileno())
      part.replace(path)
      sync_folder(path.parent)
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


def sync_folder(folder: PathLike) -> None:
  """Bring the names in a folder to the disk, where the system can (POSIX)."""
  if os.name == "posix":
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def is_part(path: PathLike) -> bool:
  """Whether this is what `replacing` had begun to write when its process was killed.

  >>> is_part("run/.89d2ac01-4c0f1e2d.part"), is_part("run/params.part")
  (True, False)
  """
  name = Path(path).name
  return name.startswith(".") and name.endswith(PART)


def _part_of(name: str) -> str:
  """How the name of a file's part begins: the same for every part of the file, and short, whatever its name."""
  return f".{zlib.crc32(name.encode()):08x}-"


def remove_parts(folder: PathLike, name: str | None = None) -> None:
  """Remove what processes that were killed had begun to write in a folder. Call it under the `lock` of what they write.

  Args:
    folder: where.
    name: the file that they were writing; all files in the folder if left out.
  """
  for path in filter(is_part, Path(folder).iterdir()):
    if name is None or path.name.startswith(_part_of(name)):
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: PathLike, what: PathLike) -> Iterator[None]:
  """Keep other processes out while the block runs. The lock ends with the process, however that ends.

  Args:
    path: the lock file. It is made here, missing folders too, and removed at the end.
    what: what the lock protects, for the error.

  Raises:
    OSError: if somebody else holds the lock, saying who; or if the lock file cannot be written.

  >>> import tempfile
  >>> with tempfile.TemporaryDirectory() as folder, lock(Path(folder, ".lock"), "the model"):
  ...   with lock(Path(folder, ".lock"), "the model"):
  ...     pass
  Traceback (most recent call last):
  ...
  OSError: the model is in use by process ...: wait until it has ended, or choose another path
  """
  import filelock

  path = Path(path)
  check_writable(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  held = filelock.FileLock(path)
  try:
    held.acquire(blocking=False)
  except filelock.Timeout:
    holder = path.read_text(errors="replace").strip() or "another process"
    raise OSError(f"{what} is in use by {holder}: wait until it has ended, or choose another path") from None
  try:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    with contextlib.suppress(OSError):  # On a full disk the lock holds all the same.
      path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}")
    yield
  finally:
    # Removed while it is held: who opens it at this moment finds that it has no name any more, and makes a new one.
    with contextlib.suppress(OSError):
      path.unlink()
    held.release()
