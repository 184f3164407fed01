"""The interface of features: uint8 images of any size in, feature vectors out.

A `Features` is a pure function with its parameters, and the resizing that comes before it. `extract` runs it in batches
on all devices of this process.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxguide._core.typing import PyTree

Resize = Callable[[int, int], tuple[np.ndarray, np.ndarray]]
"""``(height, width) -> (rows, columns)``: two matrices, of shapes (size, height) and (size, width). The resized image
is ``rows @ image @ columns.T``, channel by channel."""


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
  """A network, or another function, that maps images to feature vectors.

  Args:
    name: the name with its options, such as ``"inception"`` or ``"inception:resize=clean"``.
    version: the version of the computation. It changes when the same images get other features.
    weights: the first 16 digits of the SHA-256 of the file of the weights; empty if there are none.
    function: ``(params, images) -> outputs``: images are float32 ``(b, size, size, channels)`` in [0, 255], and the
      outputs are arrays of ``b`` rows by name. ``"pool"`` ``(b, d)``, the features, is always there; ``"spatial"``
      ``(b, e)`` (for the sFID) and ``"logits"`` ``(b, k)`` (for the Inception score) may be.
    params: the parameters, a pytree of arrays.
    resize: the resizing; None if images stay as they are, and must all have one size.
    channels: 3 if grey images are repeated to RGB; None if the number of channels stays.
    title: the name in figures and tables, such as ``"Inception"``.
    outputs: the names of the outputs.
  """

  name: str
  version: int
  weights: str
  function: Callable[[PyTree, jax.Array], Mapping[str, jax.Array]]
  params: PyTree
  resize: Resize | None
  channels: int | None
  title: str
  outputs: Sequence[str] = ("pool",)

  @property
  def protocol(self) -> dict[str, Any]:
    """What features depend on, as plain data."""
    return {"features": self.name, "version": self.version, "weights": self.weights}
