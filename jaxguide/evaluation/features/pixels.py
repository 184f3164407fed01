"""Checks of images and labels, and feature vectors of images."""

import numpy as np


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
