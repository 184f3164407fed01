"""Features of arrays, files and datasets of any size, against the same arithmetic in NumPy."""

import threading
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from jaxguide import data
from jaxguide.evaluation.features import base, extraction, resizing

SIDE = 12
PROJECTION = np.random.default_rng(0).standard_normal((SIDE * SIDE * 3, 5)).astype(np.float32) / 100


def project(params, images):
  pool = images.reshape(len(images), -1) @ params
  return {"pool": pool, "logits": pool[:, :2], "extremes": jnp.stack([images.min((1, 2, 3)), images.max((1, 2, 3))], 1)}


def features(function=project, params=PROJECTION, resize=resizing.square(SIDE, resizing.pillow), channels=3):  # noqa: B008
  return base.Features("projection", 1, "", function, params, resize, channels, "Projection")


def pictures(*shapes):
  return [np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8) for i, shape in enumerate(shapes)]


def wanted(images):
  """What `project` gives, in float64."""
  rows = []
  for image in images:
    y, x = (resizing.pillow(side, SIDE) for side in image.shape[:2])
    resized = np.clip(np.stack([y @ image[..., c] @ x.T for c in range(image.shape[-1])], -1), 0, 255)
    rows.append(np.broadcast_to(resized, (SIDE, SIDE, 3)).ravel() @ PROJECTION.astype(np.float64))
  return np.stack(rows)


ONE_SIZE = np.stack(pictures(*[(20, 9, 3)] * 11))
SIZES = pictures((20, 9, 3), (5, 70, 3), (12, 12, 1), (130, 40, 3), (20, 9, 1), (20, 9, 3), (1, 1, 3))


class Folder(data.Dataset):
  """Examples that are read one by one."""

  name, num_classes, class_names, label_shape, fingerprint, saturation = "folder", None, None, None, "", None
  image_shape = (20, 9, 3)

  def __init__(self, images):
    self.images, self.read, self.threads = images, 0, set()

  def __len__(self):
    return len(self.images)

  def example(self, row, rng):
    self.read = max(self.read, row + 1)
    self.threads.add(threading.get_ident())
    return self.images[row], None

  def example_name(self, row):
    return f"{row}.png"


@pytest.mark.parametrize(
  "images",
  [ONE_SIZE, list(ONE_SIZE), Folder(ONE_SIZE), jnp.asarray(ONE_SIZE), data.Images(ONE_SIZE, None, None, "eleven")],
  ids=["array", "list", "dataset", "jax", "images"],
)
@pytest.mark.parametrize("batch_size", [1, 4, 6, 64])
def test_images_of_one_size(images, batch_size):
  found = extraction.extract(features(), images, outputs=("pool", "logits"), batch_size=batch_size)
  assert [*found] == ["pool", "logits"]
  assert found["pool"].dtype == np.float32
  np.testing.assert_allclose(found["pool"], wanted(ONE_SIZE), rtol=1e-5, atol=1e-3)
  np.testing.assert_array_equal(found["logits"], found["pool"][:, :2])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_images_of_many_sizes_from_an_iterator(batch_size):
  found = extraction.extract(features(), iter(SIZES), total=len(SIZES), batch_size=batch_size)["pool"]
  np.testing.assert_allclose(found, wanted(SIZES), rtol=1e-5, atol=1e-3)


def test_features_do_not_depend_on_the_batch():
  together = extraction.extract(features(), SIZES)["pool"]
  alone = np.concatenate([extraction.extract(features(), [image])["pool"] for image in SIZES])
  backwards = extraction.extract(features(), SIZES[::-1], batch_size=4)["pool"][::-1]
  np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(backwards, together, rtol=1e-5, atol=1e-4)


def test_resized_images_stay_in_0_to_255():
  checks = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((3, 3)))[..., None] * 255
  low, high = extraction.extract(features(), [checks.astype(np.uint8)], outputs=("extremes",))["extremes"][0]
  assert (low, high) == (0, 255)
  rows = resizing.pillow(24, SIDE)
  assert (rows @ checks[..., 0] @ rows.T).max() > 255 + 1


def test_a_thousand_sizes_compile_a_handful_of_programs():
  traced = []

  def counted(params, images):
    traced.append(images.shape)
    return project(params, images)

  rng = np.random.default_rng(0)
  sizes = (np.broadcast_to(np.uint8(i % 256), (*rng.integers(2, 257, 2), 3)) for i in range(1000))
  before = extraction._resized._cache_size()
  found = extraction.extract(features(counted), sizes, total=1000, outputs=("extremes",))["extremes"]
  assert traced == [(64, SIDE, SIDE, 3)]
  assert extraction._resized._cache_size() - before <= 10
  np.testing.assert_allclose(found, np.repeat(np.arange(1000) % 256, 2).reshape(1000, 2), atol=1e-3)


def test_equal_sizes_compile_once_and_a_second_call_not_at_all():
  traced = []

  def counted(params, images):
    traced.append(images.shape)
    return project(params, images)

  counting = features(counted)
  before = extraction._resized._cache_size()
  for number in (11, 9, 8):  # Of which the last batch has 3 images, 1 and 4.
    extraction.extract(counting, ONE_SIZE[:number], batch_size=4)
  assert traced == [(4, SIDE, SIDE, 3)]
  assert extraction._resized._cache_size() - before <= 1


def test_a_batch_is_a_multiple_of_the_devices():
  shapes = []

  def counted(params, images):
    shapes.append(len(images))
    return project(params, images)

  extraction.extract(features(counted), ONE_SIZE, batch_size=5)
  extraction.extract(features(counted), ONE_SIZE[:2], batch_size=500)
  assert shapes == [8, 4]


def test_grey_is_kept_where_the_features_take_any_channels():
  images = np.stack(pictures(*[(6, 6, 1)] * 3))
  plain = features(lambda params, x: {"pool": x.reshape(len(x), -1)}, (), None, None)
  np.testing.assert_array_equal(extraction.extract(plain, images)["pool"], images.reshape(3, 36))


def test_an_array_is_not_copied():
  images = np.zeros((3000, 64, 64, 3), np.uint8)
  mean = features(lambda params, x: {"pool": x.mean((1, 2))}, ())
  extraction.extract(mean, images[:64])
  tracemalloc.start()
  extraction.extract(mean, images)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < images.nbytes / 4


def test_a_dataset_is_read_in_threads_not_far_ahead():
  folder = Folder(np.zeros((40, 20, 9, 3), np.uint8))
  batches = extraction._from_dataset(folder, 4)
  next(batches)
  next(batches)
  assert folder.read <= 16
  batches.close()
  extraction.extract(features(), folder)
  assert folder.read == 40
  assert threading.get_ident() not in folder.threads


def test_a_bar_counts_images(capsys):
  extraction.extract(features(), ONE_SIZE, progress=True, title="features of eleven")
  shown = capsys.readouterr().err
  assert "features of eleven" in shown
  assert "11/11" in shown
  assert "image" in shown


def spoilt(params, images):
  pool = images.mean((1, 2))
  return {"pool": jnp.where(pool > 200, jnp.nan, pool)}


@pytest.mark.parametrize(
  ("source", "name"), [(lambda images: images, "image 9"), (Folder, "9.png"), (lambda images: [*images], "image 9")]
)
def test_features_that_are_not_finite_name_the_image(source, name):
  images = np.zeros((11, 20, 9, 3), np.uint8)
  images[9] = 255
  with pytest.raises(FloatingPointError, match=f"pool of projection is not finite for {name}"):
    extraction.extract(features(spoilt), source(images), batch_size=4)


@pytest.mark.parametrize(
  ("images", "options", "message"),
  [
    (ONE_SIZE[:0], {}, "at least one image"),
    (ONE_SIZE / 255, {}, "images must be uint8"),
    (ONE_SIZE[..., 0], {}, "images must be uint8"),
    ([*ONE_SIZE, ONE_SIZE[0] / 255], {}, "image 11 must be uint8 of shape .* got float64 of shape"),
    ([ONE_SIZE[0, ..., 0]], {}, "image 0 must be uint8 of shape"),
    ([[1, 2]], {}, "image 0 must be uint8 of shape .* got list"),
    (np.zeros((2, 4, 4, 4), np.uint8), {}, "image 0 has 4 channels, but the features projection need 3"),
    (iter(SIZES), {}, "give their number as total"),
    (iter(SIZES), {"total": 6}, "total is 6, but there are more images"),
    (iter(SIZES), {"total": 9}, "total is 9, but there are only 7 images"),
    (SIZES, {"total": 9}, "total is 9, but there are 7 images"),
    (ONE_SIZE, {"outputs": ("spatial",)}, "unknown output of the features 'spatial'"),
    (ONE_SIZE, {"outputs": "pool"}, "outputs must be a tuple of names"),
    (ONE_SIZE, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
  ],
)
def test_mistakes(images, options, message):
  with pytest.raises(ValueError, match=message):
    extraction.extract(features(), images, **options)


def test_images_of_several_sizes_need_a_resizing():
  with pytest.raises(ValueError, match=r"image 1 is \(5, 70, 3\) and the first one \(20, 9, 3\)"):
    extraction.extract(features(resize=None), SIZES)
  with pytest.raises(ValueError, match="image 2 has 1 channels and the first one 3"):
    extraction.extract(features(channels=None), SIZES)
  with pytest.raises(TypeError, match="images must be an array, a dataset, or an iterable of arrays, got int"):
    extraction.extract(features(), 3)
