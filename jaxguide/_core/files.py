"""Atomic writing of files, and locks that prevent two runs from writing to one place."""

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
"""The ending of a file's name while the file is being written."""

LONGEST = 200
"""The largest number of bytes in a file's name. Temporary files beside it have longer names."""


def check_writable(path: PathLike) -> None:
  """Check that a file can be written at ``path``. Call it before long work whose result is written there.

  Missing parent folders are allowed: the functions of this module that write files create them.

  Raises:
    OSError: if ``path`` is a folder or a device, one of its parents is a file, the folder is not writable, or the name
      has more than `LONGEST` bytes.

  >>> check_writable(os.curdir)
  Traceback (most recent call last):
  ...
  OSError: cannot write .: it is a folder; give the path of a file in it
  """
  path = Path(path)
  try:
    str(path).encode()
  except UnicodeEncodeError:
    raise OSError(f"cannot write {str(path)!a}: it is not UTF-8; choose another path") from None
  if len(os.fsencode(path.name)) > LONGEST:
    raise OSError(f"cannot write {path}: its name is longer than {LONGEST} bytes; choose a shorter one")
  if path.is_dir():
    raise OSError(f"cannot write {path}: it is a folder; give the path of a file in it")
  if os.path.exists(path) and not path.is_file():
    # Writing replaces the old file, which must not happen to a device such as /dev/null.
    raise OSError(f"cannot write {path}: it is not a regular file; give the path of one")
  folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
  if not folder.is_dir():
    raise OSError(f"cannot write {path}: {folder} is not a folder; choose another path")
  if not os.access(folder, os.W_OK | os.X_OK):
    raise OSError(f"cannot write {path}: no permission to write in {folder}; choose another path")


def check_readable(path: PathLike) -> None:
  """Check that ``path`` is a regular file if it exists. Opening a pipe, for instance, would block forever.

  Raises:
    OSError: if it exists and is not a regular file.

  >>> check_readable(os.curdir)
  Traceback (most recent call last):
  ...
  OSError: cannot read .: it is not a regular file; give the path of one
  """
  if os.path.exists(path) and not os.path.isfile(path):
    raise OSError(f"cannot read {path}: it is not a regular file; give the path of one")


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[IO[bytes]]:
  """Open a temporary file that is moved to ``path`` when the block ends without an error.

  The file is complete and on the disk before it is moved. Missing folders are created. If the process is killed before,
  a part file remains, whose name starts with a dot and ends in `PART`; see `remove_parts`. If ``path`` is a symbolic
  link, the link stays, and the file that it points to is replaced.

  Raises:
    OSError: if ``path`` cannot be written. The old file, if any, stays.
  """
  path = Path(os.path.realpath(path) if os.path.islink(path) else path)
  check_writable(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the folder of the target, since a rename is atomic only within one file system. Not by `tempfile`, since other
    # users could not read its files.
    part = path.with_name(f"{_part_of(path.name)}{uuid.uuid4().hex}{PART}")
    try:
      with part.open("wb") as file:
        yield file
        # The content reaches the disk before the new name, so that after a power loss the old or the new file is there.
        file.flush()
        os.fsync(file.fileno())
      part.replace(path)
      sync_folder(path.parent)
    finally:
      part.unlink(missing_ok=True)
  except OSError as error:
    raise OSError(f"cannot write {path}: {error.strerror or error}; choose another path") from error


def write_atomically(path: PathLike, content: bytes) -> None:
  """Write a file atomically: a reader sees the old file or the new one, never a part of it.

  Raises:
    OSError: if ``path`` cannot be written. The old file, if any, stays.
  """
  with replacing(path) as file:
    file.write(content)


def sync_folder(folder: PathLike) -> None:
  """Flush the file names in a folder to the disk. On systems other than POSIX this does nothing."""
  if os.name == "posix":
    descriptor = os.open(folder, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)


def is_part(path: PathLike) -> bool:
  """Whether this is a part file, which `replacing` leaves if its process is killed.

  >>> is_part("run/.89d2ac01-4c0f1e2d.part"), is_part("run/params.part")
  (True, False)
  """
  name = Path(path).name
  return name.startswith(".") and name.endswith(PART)


def _part_of(name: str) -> str:
  """Return the prefix of the names of a file's part files. It is short for a file name of any length."""
  return f".{zlib.crc32(name.encode()):08x}-"


def remove_parts(folder: PathLike, name: str | None = None) -> None:
  """Remove the part files that killed processes left in a folder. The caller must hold the `lock` of the written files.

  Args:
    folder: the folder.
    name: remove only part files of the file with this name. The default is part files of all files in the folder.
  """
  for path in filter(is_part, Path(folder).iterdir()):
    if name is None or path.name.startswith(_part_of(name)):
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: PathLike, what: PathLike) -> Iterator[None]:
  """Hold a lock against other processes while the block runs. It is released when the process ends, even if killed.

  Args:
    path: the lock file. It and missing folders are created at the start, and the file is removed at the end.
    what: what the lock protects, for the error message.

  Raises:
    OSError: if another process holds the lock (the message names it), or the lock file cannot be written.

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
  file_lock = filelock.FileLock(path)
  try:
    file_lock.acquire(blocking=False)
  except filelock.Timeout:
    holder = path.read_text(errors="replace").strip() or "another process"
    raise OSError(f"{what} is in use by {holder}: wait until it has ended, or choose another path") from None
  try:
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    with contextlib.suppress(OSError):  # On a full disk the holder's name is missing, but the lock is still valid.
      path.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}")
    yield
  finally:
    # The file is removed before the release. A process that has just opened it notices that the file has no name
    # any more, and creates a new one.
    with contextlib.suppress(OSError):
      path.unlink()
    file_lock.release()
