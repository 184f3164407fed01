"""Records: what a source of data offers, before pictures are decoded and resized."""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np


class BadRecord(ValueError):
  """A record that cannot be used, such as a damaged picture. The message is the reason, without the record's name."""


class Unreadable(BadRecord):
  """A record that the system could not read this time, for want of a permission, a network or memory.

  Nothing is known of its content, so the result of the check is not kept.
  """


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
  """The records of a source. They are read one by one, from several threads.

  Args:
    name: the name of the source, such as its path.
    names: the name of each record in the source, such as its path in a folder; all different.
    labels: (n,) ``int32`` classes, (n, d) ``float32`` vectors, or None.
    class_names: the names of the classes; None if there are none, or they have no names.
    num_classes: number of classes; None without classes.
    read: ``row -> bytes`` of an encoded picture, or an array: ``uint8`` (h, w, c) or (h, w), or ``float32`` (h, w, c)
      or (variants, moments, h, w, c), see `jaxguide.data.prepared.Preparation.picture`.
      It raises BadRecord for a record that cannot be used.
    stamps: (n,) ``uint64``; a hash of what is known of each record without reading it, see `stamp`.
    bad: reasons by row, for records that are known to be unusable without reading them.
    state: what the file system knows of the files, see `state_of`. The result of the check holds as long as it stays.
    verify: reads all bytes and raises ValueError if some are not those that were written, for sources in which `read`
      does not see this.
  """

  name: str
  names: Sequence[str]
  labels: np.ndarray | None
  class_names: Sequence[str] | None
  num_classes: int | None
  read: Callable[[int], bytes | np.ndarray]
  stamps: np.ndarray
  bad: dict[int, str] = dataclasses.field(default_factory=dict)
  state: str = ""
  verify: Callable[[], None] | None = None

  def __len__(self) -> int:
    return len(self.names)


def stamp(*parts: object) -> int:
  """Return a 64-bit hash of what is known of a record, such as its name, size and time of change.

  >>> stamp("cat/1.png", 512) == stamp("cat/1.png", 512) != stamp("cat/1.png", 513)
  True
  """
  return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def shown(text: str) -> str:
  r"""Return a text for messages: what moves the cursor or cannot be printed is escaped, so that names are harmless.

  >>> shown("été\n\x1b[31m.png")
  'été\\n\\x1b[31m.png'
  """
  return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def state_of(statuses: Iterable[os.stat_result]) -> str:
  """Return a hash of what the file system knows of files, by which it is seen that one was changed or replaced.

  It changes more often than stamps do: also with permissions, and when the files are copied or moved.
  """
  return hashlib.sha256(b"".join(map(facts_of, statuses))).hexdigest()


def facts_of(status: os.stat_result) -> bytes:
  """Return what `state_of` hashes of a file."""
  facts = (status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
  return repr(facts).encode()


class OncePerProcess:
  """An object that each process makes when it needs it, such as an open file. Pickled, it is how to make it.

  >>> numbers = OncePerProcess(list, "ab")
  >>> numbers(), numbers() is numbers()
  (['a', 'b'], True)
  """

  def __init__(self, make: Callable[..., Any], *arguments: Any):
    self._make = make, arguments
    self._lock = threading.Lock()
    self._made: Any = None

  def __call__(self) -> Any:
    """Return the object."""
    if self._made is None:
      with self._lock:
        if self._made is None:
          make, arguments = self._make
          self._made = make(*arguments)
    return self._made

  def __reduce__(self) -> Any:
    make, arguments = self._make
    return OncePerProcess, (make, *arguments)
