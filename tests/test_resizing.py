"""Matrices of resizings against Pillow, and against TensorFlow 1's rule written anew."""

import functools
import itertools

import numpy as np
import pytest
from PIL import Image

from jaxguide.evaluation.features import resizing

SIZES = [1, 2, 3, 7, 16, 28, 32, 63, 64, 100, 299]


def picture(height, width):
  return np.random.default_rng(height * 1000 + width).uniform(0, 255, (height, width)).astype(np.float32)


@pytest.mark.parametrize("name", ["box", "bilinear", "bicubic", "lanczos"])
def test_pillow_is_pillow(name):
  """Up and down, by whole and by broken factors; Pillow rounds to float32 between its two passes."""
  for (height, width), (new_height, new_width) in itertools.product(
    zip(SIZES, SIZES[::-1], strict=True), zip(SIZES[3:] + SIZES[:3], SIZES, strict=True)
  ):
    image = picture(height, width)
    wanted = Image.fromarray(image).resize((new_width, new_height), Image.Resampling[name.upper()])
    rows, columns = resizing.pillow(height, new_height, name), resizing.pillow(width, new_width, name)
    np.testing.assert_allclose(rows @ image @ columns.T, np.asarray(wanted), rtol=0, atol=1e-4)


def tensorflow_1(image, height, width):
  """``ResizeBilinear`` of TensorFlow 1 with align_corners=False, pixel by pixel, in float32 as there."""
  out = np.empty((height, width), np.float32)
  y_scale, x_scale = (np.float32(a) / np.float32(b) for a, b in zip(image.shape, out.shape, strict=True))
  for i, j in np.ndindex(out.shape):
    y, x = np.float32(i) * y_scale, np.float32(j) * x_scale
    top, left = int(np.floor(y)), int(np.floor(x))
    bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
    dy, dx = y - np.float32(top), x - np.float32(left)
    upper = image[top, left] + (image[top, right] - image[top, left]) * dx
    lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
    out[i, j] = upper + (lower - upper) * dy
  return out


@pytest.mark.parametrize(
  ("before", "after"),
  [((32, 48), (60, 75)), ((64, 31), (29, 29)), ((1, 5), (7, 3)), ((9, 9), (9, 9)), ((7, 3), (1, 2))],
)
def test_tf1_is_tensorflows_rule(before, after):
  image = picture(*before)
  rows, columns = (resizing.tf1_bilinear(*lengths) for lengths in zip(before, after, strict=True))
  np.testing.assert_allclose(rows @ image @ columns.T, tensorflow_1(image, *after), rtol=0, atol=1e-4)


@pytest.mark.parametrize("matrix", [resizing.tf1_bilinear, resizing.pillow])
def test_rows_sum_to_one_and_a_part_of_them_is_a_part(matrix):
  for n_in, n_out in itertools.product(SIZES, SIZES):
    whole = matrix(n_in, n_out)
    assert whole.shape == (n_out, n_in)
    assert whole.dtype == np.float64
    np.testing.assert_allclose(whole.sum(1), 1, rtol=1e-12)
    np.testing.assert_array_equal(matrix(n_in, n_out, rows=slice(1, 5)), whole[1:5])
  np.testing.assert_array_equal(matrix(12, 12), np.eye(12))


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (50, 50), (31, 90)])
@pytest.mark.parametrize("crop", [33, 35, 40])  # Of which two leave an odd number of pixels.
def test_the_crop_is_the_middle_of_the_resized_picture(shape, crop):
  height, width = shape
  image = picture(*shape)
  new = (40, int(40 * width / height)) if height <= width else (int(40 * height / width), 40)
  resized = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BICUBIC))
  top, left = (round((side - crop) / 2) for side in new)
  rows, columns = resizing.shorter_side_then_crop(40, crop, resizing.pillow)(height, width)
  wanted = resized[top : top + crop, left : left + crop]
  np.testing.assert_allclose(rows @ image @ columns.T, wanted, rtol=0, atol=1e-4)


def test_a_panorama_needs_no_large_matrix():
  rows, columns = resizing.shorter_side_then_crop(224, 224, resizing.pillow)(2, 40_000)
  assert rows.shape == (224, 2)
  assert columns.shape == (224, 40_000)
  np.testing.assert_allclose(columns.sum(1), 1)


def test_square_takes_each_side_by_itself():
  rows, columns = resizing.square(9, functools.partial(resizing.pillow, filter="box"))(4, 30)
  np.testing.assert_array_equal(rows, resizing.pillow(4, 9, "box"))
  np.testing.assert_array_equal(columns, resizing.pillow(30, 9, "box"))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: resizing.pillow(4, 2, "bicubick"), "bicubic"),
    (lambda: resizing.pillow(0, 2), "n_in must be a whole number of at least 1"),
    (lambda: resizing.tf1_bilinear(2, 0), "n_out must be a whole number of at least 1"),
    (lambda: resizing.square(0, resizing.pillow), "size must be a whole number of at least 1"),
    (lambda: resizing.shorter_side_then_crop(224, 256, resizing.pillow), "crop must be at most size = 224, got 256"),
  ],
)
def test_mistakes(call, message):
  with pytest.raises(ValueError, match=message):
    call()
