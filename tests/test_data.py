import io
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from jaxguide import data
from jaxguide._core import files


class ColourSquares(tfds.core.GeneratorBasedBuilder):
  """A dataset like those of the catalogue: registered by name, images stored as PNG, with an additional id."""

  VERSION = tfds.core.Version("1.0.0")
  fail = False

  def _info(self):
    image = tfds.features.Image(shape=(4, 4, 3))
    label = tfds.features.ClassLabel(num_classes=3)
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict({"id": tfds.features.Text(), "image": image, "label": label})
    )

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(6), "validation": self._generate_examples(3)}

  def _generate_examples(self, n):
    for i in range(n):
      if self.fail and i == 2:
        raise KeyboardInterrupt
      file = io.BytesIO()
      Image.new("RGB", (4, 4), (i, 0, 200)).save(file, "PNG")
      file.seek(0)
      yield i, {"id": str(i), "image": file, "label": i % 3}


class NoLabels(ColourSquares):
  def _info(self):
    features = {"image": tfds.features.Image(shape=(4, 4, 3)), "caption": tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


class ArraySquares(ColourSquares):
  """Images given as arrays, like those of MNIST and CIFAR-10; TFDS needs TensorFlow to encode them."""

  def _generate_examples(self, n):
    for i in range(n):
      yield i, {"id": str(i), "image": np.zeros((4, 4, 3), np.uint8), "label": 0}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  data.load("digits", data_dir=folder)
  return folder


@pytest.fixture
def copied(data_dir, tmp_path):
  """A copy of data_dir for one test, and the folder of the prepared digits in it."""
  shutil.copytree(data_dir, tmp_path / "tfds")
  return tmp_path / "tfds", tmp_path / "tfds" / "jaxguide_digits" / "1.0.0"


def make_images(n, num_classes=10):
  images = np.arange(n, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2)
  return data.Images(images, np.arange(n, dtype=np.int32) % num_classes, num_classes, "made")


def test_importing_is_light():
  heavy = "{'tensorflow_datasets', 'sklearn', 'PIL', 'matplotlib', 'grain', 'pyarrow', 'tqdm'}"
  code = f"import sys, jaxguide.data; assert not {heavy} & set(sys.modules)"
  subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# -- datasets


def test_digits_are_scikit_learns(data_dir):
  train, test = (data.load("digits", split, data_dir) for split in ("train", "test"))
  assert (len(train), len(test)) == (1437, 360)
  assert train.image_shape == (8, 8, 1)
  assert train.images.max() == 255

  def rows(images, labels):
    return sorted((label, image.tobytes()) for label, image in zip(labels, images, strict=True))

  # Compare as multisets: no image is lost, repeated, or in both splits.
  original = load_digits()
  scaled = np.rint(original.images * 255 / 16).astype(np.uint8)
  both = rows(np.concatenate([train.images, test.images]), np.concatenate([train.labels, test.labels]))
  assert both == rows(scaled, original.target)
  shares = np.bincount(test.labels, minlength=10) / np.bincount(original.target)
  np.testing.assert_allclose(shares, 0.2, atol=0.01)


def test_digits_are_prepared_the_same_again(data_dir, tmp_path, capfd):
  again = data.load("digits", "test", tmp_path)
  assert capfd.readouterr() == ("", "")
  before = data.load("digits", "test", data_dir)
  np.testing.assert_array_equal(again.images, before.images)
  np.testing.assert_array_equal(again.labels, before.labels)


def test_a_catalogue_dataset(tmp_path):
  images = data.load("colour_squares", "validation", tmp_path)
  assert images.images.shape == (3, 4, 4, 3)
  assert images.labels.dtype == np.int32
  assert (images.num_classes, images.name) == (3, "colour_squares")
  assert (images.images[..., 0].max((1, 2)) == images.labels).all()
  assert (images.images[..., 2] == 200).all()


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("digit", r"unknown dataset 'digit': did you mean 'digits'\?"),
    ("mnst", r"did you mean 'mnist'\?"),
    ("mnist:9.9.9", "cannot be loaded at version 9.9.9"),
    ("no_labels", "must have the features image and label; it has image, caption"),
    ("chexpert", "must have a class as its label"),
    ("imagenet2012", "uint8 images of one size"),
    ("../mnist", "TFDS cannot open dataset '../mnist'"),
  ],
)
def test_invalid_datasets(name, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    data.load(name, data_dir=tmp_path)
  assert not os.listdir(tmp_path)


def test_unknown_split(data_dir):
  with pytest.raises(ValueError, match=r"unknown split 'tset': did you mean 'test'\?"):
    data.load("digits", "tset", data_dir)


def test_data_dir_that_cannot_be_written(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(OSError, match=r"cannot prepare dataset 'digits' in .*Not a directory"):
    data.load("digits", data_dir=tmp_path / "file")


def test_a_missing_library_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
  with pytest.raises(ImportError, match=r"'array_squares' needs .*tensorflow.*pip install"):
    data.load("array_squares", data_dir=tmp_path)


def test_interrupted_preparation_leaves_nothing_broken(tmp_path, monkeypatch):
  monkeypatch.setattr(ColourSquares, "fail", True)
  with pytest.raises(KeyboardInterrupt):
    data.load("colour_squares", data_dir=tmp_path)
  monkeypatch.setattr(ColourSquares, "fail", False)
  # A killed process would also have left this folder.
  (tmp_path / "colour_squares" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
  assert len(data.load("colour_squares", data_dir=tmp_path)) == 6


def test_another_process_prepares_the_dataset_first(tmp_path, monkeypatch):
  generate = ColourSquares._generate_examples

  def slow(self, n):
    monkeypatch.setattr(ColourSquares, "_generate_examples", generate)
    data.load("colour_squares", data_dir=tmp_path)  # the other process finishes first
    yield from generate(self, n)

  monkeypatch.setattr(ColourSquares, "_generate_examples", slow)
  assert len(data.load("colour_squares", data_dir=tmp_path)) == 6
  assert os.listdir(tmp_path / "colour_squares") == ["1.0.0"]


@pytest.mark.parametrize("name", ["digits", "jaxguide_digits"])
@pytest.mark.parametrize("damage", ["empty", "no info", "half an info", "half the records"])
def test_damaged_directories(name, damage, copied):
  data_dir, prepared = copied
  records = prepared / "jaxguide_digits-train.array_record-00000-of-00001"
  info = prepared / "dataset_info.json"
  if damage == "empty":
    shutil.rmtree(prepared)
    prepared.mkdir()
  elif damage == "no info":
    info.unlink()
  else:
    file = info if damage == "half an info" else records
    os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(OSError, match=r"cannot read dataset .* delete that directory") as caught:
    data.load(name, data_dir=data_dir)
  assert str(data_dir) in str(caught.value)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"images": np.zeros((2, 4, 4, 1), np.float32)}, "uint8 of shape"),
    ({"images": np.zeros((2, 4, 4), np.uint8)}, "uint8 of shape"),
    ({"images": np.zeros((0, 4, 4, 1), np.uint8)}, "uint8 of shape"),
    ({"labels": np.zeros(3, np.int32)}, "one whole number for each of the 2 images"),
    ({"labels": np.zeros((2, 1), np.int32)}, "one whole number for each of the 2 images"),
    ({"labels": np.zeros(2)}, "one whole number for each of the 2 images"),
    ({"labels": np.array([0, 3], np.int32)}, "label 3 is not one of the 3 classes"),
    ({"labels": np.array([0, -1], np.int32)}, "label -1 is not one of the 3 classes"),
  ],
)
def test_invalid_images(change, message):
  fields = {"images": np.zeros((2, 4, 4, 1), np.uint8), "labels": np.zeros(2, np.int32)}
  data.Images(**fields, num_classes=3, name="made")
  with pytest.raises(ValueError, match=message):
    data.Images(**{**fields, **change}, num_classes=3, name="made")


# -- batches


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 23])
def test_batches_contain_every_image_once_per_epoch(batch_size):
  images = make_images(10)
  count = 3 * 10  # batches, that is 3 * batch_size epochs
  drawn = list(islice(data.batches(images, batch_size, seed=1), count))
  assert all(x.shape == (batch_size, 4, 4, 1) and x.dtype == np.uint8 for x, _ in drawn)
  assert all((x[:, 0, 0, 0] == labels).all() and labels.dtype == np.int32 for x, labels in drawn)
  epochs = np.concatenate([labels for _, labels in drawn]).reshape(-1, 10)
  assert (np.sort(epochs) == np.arange(10)).all()
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("batch_size", [3, 10, 23])
@pytest.mark.parametrize("start", [1, 3, 10, 17])
def test_batches_resume(batch_size, start):
  images = make_images(10)
  whole = islice(data.batches(images, batch_size, seed=4), start, start + 12)
  resumed = data.batches(images, batch_size, seed=4, start=start)
  for (x, labels), (y, others) in zip(whole, resumed, strict=False):
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(labels, others)


def test_batches_depend_on_the_seed_and_skip_to_a_late_start_quickly():
  images = make_images(100)
  first = next(data.batches(images, 100, seed=0))[1]
  assert (first == next(data.batches(images, 100, seed=0))[1]).all()
  assert (first != next(data.batches(images, 100, seed=1))[1]).any()
  next(data.batches(images, 100, seed=0, start=10**12))  # to compute all earlier batches would take too long


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"seed": -1}, {"start": -1}])
def test_batches_check_before_the_first(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    data.batches(make_images(3), **{"batch_size": 2, "seed": 0, **bad})


# -- pixels


def test_pixels_round_trip_exactly():
  pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  floats = data.from_uint8(pixels)
  assert floats.dtype == np.float32
  assert (floats.min(), floats.max()) == (-1, 1)
  np.testing.assert_array_equal(data.to_uint8(floats), pixels)
  np.testing.assert_array_equal(data.to_uint8(jnp.asarray(floats)), pixels)


def test_to_uint8_rounds_and_clips():
  levels = np.array([-np.inf, -3, 9.4, 9.6, 127.4, 254.6, 900, np.inf])
  wanted = [0, 0, 9, 10, 127, 255, 255, 255]
  assert data.to_uint8(levels / 127.5 - 1).tolist() == wanted
  assert data.to_uint8(jnp.array([-1, 1], jnp.bfloat16)).tolist() == [0, 255]


def test_invalid_pixels():
  with pytest.raises(ValueError, match="1 NaN"):
    data.to_uint8(np.array([0.0, np.nan]))
  with pytest.raises(ValueError, match="takes floats"):
    data.to_uint8(np.zeros(3, np.uint8))
  with pytest.raises(ValueError, match="takes uint8"):
    data.from_uint8(np.zeros(3))


# -- files


def test_npz_has_the_evaluators_format_and_round_trips(tmp_path):
  images = make_images(5)
  path = tmp_path / "new" / "folder" / "samples"  # no suffix is added
  data.save_npz(path, images.images, images.labels)
  assert os.listdir(path.parent) == ["samples"]
  with np.load(path) as arrays:
    assert (arrays["arr_0"].dtype, arrays["arr_1"].dtype) == (np.uint8, np.int64)
    assert arrays["arr_0"].shape == (5, 4, 4, 1)
  loaded, labels = data.load_npz(path)
  np.testing.assert_array_equal(loaded, images.images)
  np.testing.assert_array_equal(labels, images.labels)
  (path.parent / "plain").touch()
  assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_npz_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  images = make_images(5)
  path = tmp_path / "samples.npz"
  data.save_npz(path, images.images, images.labels)

  def fill_the_disk(file, **arrays):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", fill_the_disk)
  with pytest.raises(OSError, match=r"cannot write .*samples\.npz: No space left"):
    data.save_npz(path, images.images[:2], images.labels[:2])
  assert os.listdir(tmp_path) == ["samples.npz"]
  assert len(data.load_npz(path)[0]) == 5


def test_npz_refuses_invalid_images_and_labels(tmp_path):
  images = make_images(5)
  with pytest.raises(ValueError, match="uint8"):
    data.save_npz(tmp_path / "a.npz", data.from_uint8(images.images), images.labels)
  with pytest.raises(ValueError, match="5 images"):
    data.save_npz(tmp_path / "a.npz", images.images, images.labels[:4])
  assert not os.listdir(tmp_path)


def test_npz_that_cannot_be_read(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no file"):
    data.load_npz(tmp_path / "none.npz")
  with pytest.raises(OSError, match="cannot read"):
    data.load_npz(tmp_path)
  images = make_images(5)
  path = tmp_path / "a.npz"
  data.save_npz(path, images.images, images.labels)
  whole = path.read_bytes()
  for content in (b"", b"text", whole[:100], whole[: len(whole) // 2]):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not an \.npz file with images"):
      data.load_npz(path)
  with path.open("wb") as file:
    np.save(file, images.images)
  with pytest.raises(ValueError, match=r"is not an \.npz file with images"):
    data.load_npz(path)
  np.savez(path, arr_0=images.images)
  with pytest.raises(ValueError, match="arr_1"):
    data.load_npz(path)
  np.savez(path, arr_0=images.images.astype(np.float32), arr_1=images.labels)
  with pytest.raises(ValueError, match="contains no labelled images"):
    data.load_npz(path)


def test_check_writable(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  files.check_writable(tmp_path / "file")
  files.check_writable(tmp_path / "new" / "folder" / "samples.npz")
  assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]
  for path, message in [
    (tmp_path, "it is a folder"),
    (os.devnull, "not a regular file"),
    (tmp_path / "file" / "samples.npz", "file is not a folder"),
    (tmp_path / "file" / "under" / "samples.npz", "file is not a folder"),
    (tmp_path / "dangling" / "samples.npz", "dangling is not a folder"),
  ]:
    with pytest.raises(OSError, match=f"cannot write .*{message}"):
      files.check_writable(path)
    with pytest.raises(OSError, match=f"cannot write .*{message}"):
      data.save_npz(path, make_images(2).images, make_images(2).labels)
    with pytest.raises(OSError, match=f"cannot write .*{message}"):
      data.save_png(path, make_images(2).images)


def test_check_writable_checks_permissions(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
  with pytest.raises(OSError, match="no permission"):
    files.check_writable(tmp_path / "samples.npz")


# -- pictures


def test_image_grid():
  images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
  grid = data.image_grid(images, columns=2)
  assert grid.dtype == np.uint8
  # fmt: off
  wanted = [
    [10, 10, 10, 255, 20, 20, 20],
    [10, 10, 10, 255, 20, 20, 20],
    [255] * 7,
    [30, 30, 30, 255, 255, 255, 255],
    [30, 30, 30, 255, 255, 255, 255],
  ]
  # fmt: on
  assert (grid == np.array(wanted)[..., None]).all()
  assert grid.shape == (5, 7, 3)
  assert data.image_grid(images, columns=9).shape == (2, 11, 3)
  assert data.image_grid(images, columns=1, gap=0).shape == (6, 3, 3)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_shows_every_pixel(channels, mode, tmp_path):
  images = np.random.default_rng(0).integers(0, 255, (3, 4, 4, channels), np.uint8)
  data.save_png(tmp_path / "new" / "grid.png", images, columns=2, zoom=5)
  with Image.open(tmp_path / "new" / "grid.png") as picture:
    assert picture.mode == mode
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
  assert pixels.shape == (6 + 2 * 20 + 4 + 6, 6 + 2 * 20 + 4 + 6, channels)
  np.testing.assert_array_equal(pixels[6:26:5, 6:26:5], images[0])
  np.testing.assert_array_equal(pixels[30:50:5, 6:26:5], images[2])
  assert (pixels[26:, 26:] == 255).all()


def test_png_has_a_row_for_each_label(tmp_path):
  images = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2)
  labels = np.array([7, 2, 7, 2, 7, 5])
  data.save_png(tmp_path / "plain.png", images[:1])
  data.save_png(tmp_path / "rows.png", images, labels, columns=2, title="σ = 1")
  with Image.open(tmp_path / "rows.png") as picture, Image.open(tmp_path / "plain.png") as plain:
    pixels = np.asarray(picture)
    assert plain.size == (60, 60)  # 48 pixels and the margins
  left, top = pixels.shape[1] - 6 - (2 * 48 + 4), pixels.shape[0] - 6 - (3 * 48 + 2 * 4)
  first = pixels[top + 1 :: 52, left + 1 :: 52][:3, :2]
  assert first.tolist() == [[1, 3], [5, 255], [0, 2]]
  assert (pixels[:top, left:] < 128).any(), "the title is missing"
  for i in range(3):
    row = pixels[top + i * 52 : top + i * 52 + 48, :left]
    assert (row < 128).any(), "a label is missing"


def test_png_refuses_other_channels(tmp_path):
  with pytest.raises(ValueError, match=r"1 \(gray\) or 3 \(RGB\)"):
    data.save_png(tmp_path / "a.png", np.zeros((2, 4, 4, 2), np.uint8))


def test_public_names():
  assert all(hasattr(data, name) for name in data.__all__)
  assert data.sources.load is data.load


def test_the_error_for_an_invalid_npz_does_not_recommend_pickle(tmp_path):
  (tmp_path / "junk.npz").write_bytes(b"junk")
  with pytest.raises(ValueError, match="it contains no arrays") as error:
    data.load_npz(tmp_path / "junk.npz")
  assert "pickle" not in str(error.value)


def test_labels_may_be_missing_if_none_are_required(tmp_path):
  images = np.zeros((2, 4, 4, 1), np.uint8)
  data.save_npz(tmp_path / "s.npz", images)
  assert data.load_npz(tmp_path / "s.npz", labelled=False)[1] is None
  with pytest.raises(ValueError, match="labels in arr_1"):
    data.load_npz(tmp_path / "s.npz")


# --- datasets of other kinds ------------------------------------------------------------------------


class Lazy(data.Dataset):
  """A dataset whose examples are read one by one, with a random number in each."""

  name, image_shape, num_classes, class_names, label_shape = "lazy", (1, 1, 1), 5, None, ()
  fingerprint, saturation = "0", None

  def __len__(self):
    return 10

  def example(self, row, rng):
    return np.full((1, 1, 1), rng.integers(256), np.uint8), row % 5

  def example_name(self, row):
    return f"lazy/{row}"


def test_a_lazy_dataset_is_read_in_the_order_of_images_in_memory():
  images = data.Images(np.zeros((10, 1, 1, 1), np.uint8), np.arange(10) % 5, 5, "same")
  for lazy, whole in zip(data.stream(Lazy(), 7, 3), islice(data.stream(images, 7, 3), 5), strict=False):
    np.testing.assert_array_equal(lazy.rows, whole.rows)
    np.testing.assert_array_equal(lazy.labels, whole.labels)
    assert lazy.labels.dtype == np.int32


@pytest.mark.parametrize("workers", [1, 3])
def test_a_batch_depends_on_the_seed_and_its_number_alone(workers):
  """Random augmentations too, for any number of workers, and from any start."""
  whole = [batch.examples for batch in islice(data.stream(Lazy(), 4, 2**40, workers=8), 9)]
  for start in (0, 5):
    for batch, expected in zip(data.stream(Lazy(), 4, 2**40, start, workers=workers), whole[start:], strict=False):
      np.testing.assert_array_equal(batch.examples, expected)
  assert np.unique(np.concatenate(whole)).size > 20
  other = next(data.stream(Lazy(), 4, 2**40 + 2**32)).examples
  assert not np.array_equal(other, whole[0])


def test_label_vectors_and_images_without_labels():
  pixels, vectors = np.zeros((6, 2, 2, 1), np.uint8), np.arange(12).reshape(6, 2)
  attributes, alone = data.Images(pixels, vectors, None, "a"), data.Images(pixels, None, None, "b")
  assert (attributes.label_shape, alone.label_shape) == ((2,), None)
  batch = next(data.stream(attributes, 4, 0))
  assert batch.labels.dtype == np.float32
  np.testing.assert_array_equal(batch.labels, vectors[batch.rows])
  assert next(data.stream(alone, 4, 0)).labels is None
  assert attributes.fingerprint != data.Images(pixels, vectors + 1, None, "a").fingerprint
  assert attributes.example_name(3) == "a[3]"


@pytest.mark.parametrize(
  ("labels", "num_classes", "names", "message"),
  [
    (None, 2, None, "images of 2 classes need labels"),
    ([0, 1], None, None, r"labels must be a vector of numbers for each of the 2 images, of shape \(2, d\)"),
    ([[1.0], [np.nan]], None, None, "labels must be finite float32 numbers, got .nan. for image 1"),
    ([[1.0], [1e300]], None, None, r"labels must be finite float32 numbers, got \[1e\+300\] for image 1"),
    ([0, 2**33], 2**34, None, "num_classes must be at most 16777216, got 17179869184"),
    ([0, 1], 2, ["a"], "class_names must have one name for each of 2 classes, got 1"),
    (None, None, ["a"], "class_names must have one name for each of None classes"),
    ([0, 1], 2, "ab", "class_names must be a list"),
  ],
)
def test_labels_that_do_not_fit(labels, num_classes, names, message):
  with pytest.raises(ValueError, match=message):
    data.Images(np.zeros((2, 2, 2, 1), np.uint8), labels, num_classes, "bad", names)
