"""What a dataset is: examples that can be read one by one, in any order, from several threads."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

MOST_CLASSES = 2**24
"""The largest number of classes, as for models."""


class Dataset:
  """Examples that can be read one by one: `jaxguide.data.Images` in memory, or files on a disk. Derive yours from it.

  Attributes:
    name: a name for messages.
    image_shape: (height, width, channels) of an example.
    num_classes: number of classes; None if the examples have no labels, or labels that are vectors.
    class_names: the names of the classes, or None if they have none.
    label_shape: ``()`` if labels are classes, ``(d,)`` if they are vectors of ``d`` numbers, None if there are none.
    fingerprint: a text that is the same for the same examples. What it is computed from depends on the dataset.
    saturation: the share of pixel values that are 0 or 255, perhaps of a part of the examples; None if there are no
      pixels.
  """

  if TYPE_CHECKING:  # A subclass has fields or properties of these names.
    # ruff: noqa: D102

    @property
    def name(self) -> str: ...

    @property
    def image_shape(self) -> Sequence[int]: ...

    @property
    def num_classes(self) -> int | None: ...

    @property
    def class_names(self) -> Sequence[str] | None: ...

    @property
    def label_shape(self) -> tuple[int, ...] | None: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def saturation(self) -> float | None: ...

  def __len__(self) -> int:
    """Return the number of examples."""
    raise NotImplementedError

  def example(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
    """Return an example and its label.

    Args:
      row: its number, from 0.
      rng: the randomness of augmentations, such as flips.

    Returns:
      The example, ``uint8`` or finite ``float32`` of `image_shape`, of the same type in all examples; and its label: a
      whole number from 0 to ``num_classes - 1``, or finite numbers of `label_shape`, or None if both are None.
    """
    raise NotImplementedError

  def example_name(self, row: int) -> str:
    """Return a name of an example for messages, such as its file."""
    raise NotImplementedError

  def subset(self, rows: np.ndarray) -> "Dataset":
    """Return the examples of some rows, as a dataset."""
    return Subset(self, rows)


class Subset(Dataset):
  """Some examples of another dataset.

  Args:
    whole: the other dataset.
    rows: (n,) the numbers of the examples.
  """

  def __init__(self, whole: Dataset, rows: np.ndarray):
    self.whole = whole
    self.rows = np.asarray(rows)

  def __len__(self) -> int:
    return len(self.rows)

  def __getattr__(self, name: str) -> Any:
    if name == "whole":  # It is missing while a copy is made.
      raise AttributeError(name)
    return getattr(self.whole, name)

  @property
  def fingerprint(self) -> str:
    """A hash of the other dataset's fingerprint and the rows."""
    return hashlib.sha256(self.whole.fingerprint.encode() + self.rows.astype("<i8").tobytes()).hexdigest()

  def example(self, row: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
    """Return an example and its label."""
    return self.whole.example(int(self.rows[row]), rng)

  def example_name(self, row: int) -> str:
    """Return the name that the example has in the other dataset."""
    return self.whole.example_name(int(self.rows[row]))


class Batch(NamedTuple):
  """Examples of a dataset.

  Args:
    examples: (n, *image_shape), as the dataset stores them.
    labels: (n,) ``int32`` classes, (n, d) ``float32`` vectors, or None.
    rows: (n,) the numbers of the examples in the dataset.
  """

  examples: np.ndarray
  labels: np.ndarray | None
  rows: np.ndarray
