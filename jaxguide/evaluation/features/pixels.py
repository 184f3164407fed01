"""Checks of images and labels, and pixels as features."""

import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxguide._core.typing import PyTree
from jaxguide.evaluation.features.base import Features

VERSION = 1

LARGEST = 4096
"""The largest number of numbers in an image whose pixels are features: 64 times 64 in grey, 36 times 36 in colour."""


def check_images(images: np.ndarray) -> None:
  """Check that images are uint8 of shape (n, height, width, channels).

  Raises:
    ValueError: if they are not.
  """
  if images.dtype != np.uint8 or images.ndim != 4:
    raise ValueError(
      "images must be uint8 of shape (n, height, width, channels), "
      f"got {images.dtype} of shape {images.shape}; quantise them to 0..255 first"
    )


def check_labelled(images: np.ndarray, labels: np.ndarray) -> None:
  """Check that images are uint8 of shape (n, height, width, channels), n at least 1, and labels int of shape (n,).

  Raises:
    ValueError: if they are not.
  """
  check_images(images)
  if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer) or not len(labels):
    raise ValueError(
      f"labels must be whole numbers, one for each of the {len(images)} images (at least one), "
      f"got {labels.dtype} of shape {labels.shape}"
    )


def pixel_features(images: np.ndarray) -> np.ndarray:
  """Flatten each image to a vector of its pixels, as the features of that image.

  Args:
    images: uint8 of shape (n, height, width, channels).

  Returns:
    float64 of shape (n, height * width * channels), in [0, 1].

  Raises:
    ValueError: if the images do not have that type and number of axes.

  >>> pixel_features(np.array([[[[0], [255]]]], np.uint8))
  array([[0., 1.]])
  """
  images = np.asarray(images)
  check_images(images)
  return images.reshape(len(images), int(np.prod(images.shape[1:]))) / 255.0


def pixels() -> Features:
  """The pixels themselves, divided by 255; for small images, such as digits, and quick tests.

  A Fréchet distance needs the covariance of all features, so an image may have at most `LARGEST` = 4,096 numbers. The
  check is made when features are computed. Images are not resized, so all must have one size.

  Returns:
    Features with the output ``pool``, of as many numbers as an image has.

  >>> features, images = pixels(), jax.numpy.full((2, 8, 8, 1), 51.0)
  >>> features.function(features.params, images)["pool"].shape
  (2, 64)
  """
  return Features("pixels", VERSION, "", _pixels, {}, None, None, "Pixels")


def _pixels(params: PyTree, images: jax.Array) -> Mapping[str, jax.Array]:
  del params
  check_small(images.shape[1:])
  return {"pool": images.reshape(len(images), -1) / 255}


def check_small(image_shape: tuple[int, ...]) -> None:
  """Check that the pixels of an image of this shape can be its features.

  Raises:
    ValueError: if they are more than `LARGEST` numbers.

  >>> check_small((64, 64, 3))
  Traceback (most recent call last):
  ...
  ValueError: an image of shape (64, 64, 3) has 12,288 numbers, and pixels are features up to 4,096: use ...
  """
  size = math.prod(image_shape)
  if size > LARGEST:
    raise ValueError(
      f"an image of shape {tuple(image_shape)} has {size:,} numbers, and pixels are features up to {LARGEST:,}: use "
      "the features of a network, efficientnet-lite0, inception or dinov2, or smaller images"
    )
