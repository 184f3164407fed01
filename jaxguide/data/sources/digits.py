"""scikit-learn's handwritten digits as a TFDS dataset: real images that need no download.

This module imports TFDS, which is slow, because a builder is a subclass of a TFDS class. Import it inside functions.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds


class JaxguideDigits(tfds.core.GeneratorBasedBuilder):
  """1,797 handwritten digits of 8x8 pixels, split 80/20 into ``train`` and ``test``.

  The split is the same on every machine and stratified by digit. Pixels are ``uint8`` from 0 to 255, rounded from the
  17 grey levels of the original. The image feature is a `tfds.features.Tensor` and not an ``Image``, which would need
  TensorFlow to prepare.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES: dict[str, str] = {"1.0.0": "First version."}  # noqa: RUF012, TFDS expects a mutable class attribute

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="The 1,797 handwritten 8x8 digits that come with scikit-learn.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    labels = digits.target
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return {
      "train": self._generate_examples(train, images, labels),
      "test": self._generate_examples(test, images, labels),
    }

  def _generate_examples(
    self, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for i in indices:
      yield int(i), {"image": images[i], "label": int(labels[i])}
