"""Rows of one file: their names and stamps."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

from jaxguide.data.records import stamp

_STRIDE = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio: the multiples of this odd number are spread over all 64-bit numbers."""


class Numbered(Sequence[str]):
  """The names of rows, such as ``image 7``. They are made when they are needed, so a million of them takes no memory.

  >>> Numbered("image ", 3)[1], len(Numbered("image ", 3))
  ('image 1', 3)
  """

  def __init__(self, prefix: str, number: int):
    self.prefix = prefix
    self.number = number

  def __len__(self) -> int:
    return self.number

  @overload
  def __getitem__(self, row: int) -> str: ...

  @overload
  def __getitem__(self, row: slice) -> Sequence[str]: ...

  def __getitem__(self, row: int | slice) -> str | Sequence[str]:
    numbers = range(self.number)[row]
    return f"{self.prefix}{numbers}" if isinstance(numbers, int) else [f"{self.prefix}{each}" for each in numbers]


class Joined(Sequence[str]):
  """The names of the rows of several files, one after the other.

  >>> Joined([Numbered("a ", 2), Numbered("b ", 1)])[1:]
  ['a 1', 'b 0']
  """

  def __init__(self, parts: Sequence[Sequence[str]]):
    self.parts = parts
    self.starts = np.cumsum([0, *map(len, parts)])

  def __len__(self) -> int:
    return int(self.starts[-1])

  @overload
  def __getitem__(self, row: int) -> str: ...

  @overload
  def __getitem__(self, row: slice) -> Sequence[str]: ...

  def __getitem__(self, row: int | slice) -> str | Sequence[str]:
    rows = range(len(self))[row]
    if not isinstance(rows, int):
      return [self[each] for each in rows]
    part = part_of(self.starts, rows)
    return self.parts[part][rows - int(self.starts[part])]


def part_of(starts: np.ndarray, row: int) -> int:
  """Return the part that contains a row, by the first row of each part.

  >>> [part_of(np.array([0, 2, 2, 5]), row) for row in (0, 1, 2, 4)]
  [0, 0, 2, 2]
  """
  return int(np.searchsorted(starts, row, "right")) - 1


def stamps_of_rows(path: Path, number: int) -> np.ndarray:
  """Return a stamp of each row of a file: a hash of the file's name, size and time of change, and the row's number.

  It sees that the file was written anew, and then every row has another stamp, even if its content is the same. It does
  not see the path of the file's folder, so the file may be moved with its time.

  Args:
    path: the file.
    number: the number of its rows.

  Returns:
    (number,) ``uint64``.
  """
  status = os.stat(path)
  return spread(stamp(path.name, status.st_size, status.st_mtime_ns), number)


def spread(first: int, number: int) -> np.ndarray:
  """Return different 64-bit hashes of 0, 1, ... and a hash of what they have in common.

  >>> len({*spread(5, 1000).tolist()})
  1000
  """
  mixed = np.uint64(first) + np.arange(number, dtype=np.uint64) * _STRIDE  # Modulo 2**64, as unsigned numbers are.
  # The finalizer of SplitMix64 (Steele et al., 2014, https://doi.org/10.1145/2660193.2660195), a bijection.
  mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return mixed ^ (mixed >> np.uint64(31))
