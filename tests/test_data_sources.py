"""Arrays, ArrayRecord, Parquet and TFDS as sources of data: what is read, named and refused."""

import io
import itertools
import json
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxguide import data
from jaxguide._core import files
from jaxguide.data import DataConfig, decode, open_data
from jaxguide.data.records import BadRecord
from jaxguide.data.sources import array_record, arrays, catalogue, parquet
from jaxguide.data.sources.array_record import open_array_record
from jaxguide.data.sources.arrays import open_arrays
from jaxguide.data.sources.folder import describe_labels
from jaxguide.data.sources.parquet import open_parquet

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """The results of checks, and labels, are kept in a folder of the test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def noise(*shape):
  return RNG.integers(0, 256, shape).astype(np.uint8)


def encoded(array):
  file = io.BytesIO()
  Image.fromarray(array).save(file, "PNG")
  return file.getvalue()


def opened(source, **options):
  return data.open_data(data.DataConfig(source, **options), progress=False)


def npz(path, compressed=False, **values):
  (np.savez_compressed if compressed else np.savez)(path, **values)
  return path


# --- arrays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("names", [("arr_0", "arr_1"), ("images", "labels")])
@pytest.mark.parametrize("shape", [(5, 4, 6, 3), (5, 4, 6, 1), (5, 4, 6)])
def test_images_and_their_labels(tmp_path, compressed, names, shape):
  images = noise(*shape)
  path = npz(tmp_path / "d.npz", compressed, **dict(zip(names, (images, [2, 0, 1, 1, 0]), strict=True)))
  records = open_arrays(path)
  np.testing.assert_array_equal(np.stack([records.read(row) for row in range(5)]), images)
  assert (records.labels.tolist(), records.num_classes, records.class_names) == ([2, 0, 1, 1, 0], 3, None)
  dataset = opened(path)
  assert dataset.image_shape == (4, 6, shape[3] if len(shape) == 4 else 1)
  np.testing.assert_array_equal(dataset.example(3)[0].reshape(shape[1:]), images[3])


def test_samples_of_jaxguide_are_data(tmp_path):
  images = noise(3, 8, 8, 3)
  data.save_npz(tmp_path / "new.npz", images, np.array([1, 0, 1]), settings="{}")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    dataset = opened(tmp_path / "new.npz", size=4)
  assert (dataset.image_shape, dataset.num_classes) == ((4, 4, 3), 2)
  assert dataset.example_name(2) == f"{tmp_path / 'new.npz'}: image 2"


def test_rows_that_are_not_compressed_stay_in_the_file(tmp_path):
  path = npz(tmp_path / "d.npz", labels=np.arange(40), images=noise(40, 64, 64, 3))
  records = open_arrays(path)
  assert isinstance(records.read.__self__, arrays.FileRows)
  with ThreadPoolExecutor(8) as pool:
    rows = [row % 40 for row in range(400)]
    for row, image in zip(rows, pool.map(records.read, rows), strict=True):
      np.testing.assert_array_equal(image, np.load(path)["images"][row]) if row % 13 == 0 else None
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(BadRecord, match="the file ends before it"):
    records.read(39)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [">f4", "<f2", "<f8"])
@pytest.mark.parametrize("factors", [{}, {"scale": 0.5}, {"scale": [1.0, 2.0], "shift": 3}])
def test_latents(tmp_path, compressed, dtype, factors):
  latents = RNG.normal(size=(4, 3, 5, 2)).astype(dtype)
  path = npz(tmp_path / "d.npz", compressed, latents=latents, **factors)
  dataset = opened(path)
  assert (dataset.image_shape, dataset.label_shape, dataset.saturation) == ((3, 5, 2), None, None)
  wanted = (latents.astype(float) - factors.get("shift", 0)) * np.asarray(factors.get("scale", 1))
  batch = next(data.stream(dataset, 4, 0))
  assert batch.examples.dtype == np.float32
  np.testing.assert_allclose(batch.examples, wanted[batch.rows], rtol=1e-6, atol=1e-6)


def test_arrays_in_the_order_of_fortran(tmp_path):
  images = noise(3, 4, 5, 3)
  records = open_arrays(npz(tmp_path / "d.npz", images=np.asfortranarray(images)))
  np.testing.assert_array_equal(records.read(2), images[2])


@pytest.mark.parametrize(
  ("labels", "label_shape", "class_names", "first"),
  [
    ([1, 0, 3], (), None, 1),
    (np.array([1, 0, 3], np.uint8), (), None, 1),
    (np.array([True, False, True]), (), None, 1),
    (["dog", "cat", "dog"], (), ["cat", "dog"], 1),
    ([[0.5, 1], [2, 3], [4, 5]], (2,), None, [0.5, 1]),
    ([[0, 1], [1, 0], [1, 0]], (2,), None, [0, 1]),
  ],
)
def test_kinds_of_labels(tmp_path, labels, label_shape, class_names, first):
  dataset = opened(npz(tmp_path / "d.npz", images=noise(3, 4, 4, 3), labels=labels))
  assert (dataset.label_shape, dataset.class_names) == (label_shape, class_names)
  np.testing.assert_array_equal(dataset.example(0)[1], first)


def test_named_classes_of_arrays(tmp_path):
  path = npz(tmp_path / "d.npz", images=noise(2, 4, 4, 3), labels=[1, 0], class_names=["ant", "bee", "cow"])
  dataset = opened(path)
  assert (dataset.class_names, dataset.num_classes) == (["ant", "bee", "cow"], 3)


IMAGES = noise(3, 4, 4, 3)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"image": IMAGES}, "needs an array arr_0, images or latents; it has image: did you mean 'images' by 'image'"),
    ({"images": IMAGES, "arr_0": IMAGES}, "it has the arrays arr_0 and images: keep one"),
    (
      {"images": IMAGES.astype(np.float32)},
      "images must be uint8 .* got float32 .* jaxguide.data.to_uint8.*latents=array",
    ),
    ({"images": IMAGES.transpose(0, 3, 1, 2).copy()}, r"got uint8 of shape \(3, 3, 4, 4\). Move its channels"),
    ({"images": IMAGES[:0]}, r"images must be uint8 .* got uint8 of shape \(0, 4, 4, 3\)"),
    ({"images": IMAGES[0, 0]}, "images must be uint8"),
    ({"images": IMAGES, "labels": [0, 1]}, r"it has 3 examples, and labels of shape \(2,\)"),
    ({"images": IMAGES, "labels": 1}, r"it has 3 examples, and labels of shape \(\)"),
    ({"images": IMAGES, "labels": [0, 1, -1]}, "image 2: label -1 is not a whole number from 0 to 16777215"),
    ({"images": IMAGES, "labels": [0.0, 1, 2]}, "image 0: label 0.0 is not a whole number"),
    (
      {"images": IMAGES, "labels": [[0.0], [np.nan], [1]]},
      r"image 1: label \[nan\] is not .* a vector of 1 finite numbers",
    ),
    ({"images": IMAGES, "labels": [[0], [2], [1]]}, r"whole numbers of shape \(3, 1\): make them \(3,\)"),
    (
      {"images": IMAGES, "labels": [0, 1, 2], "class_names": ["a", "b"]},
      "image 2: label 2 is not one of the 2 classes",
    ),
    ({"images": IMAGES, "labels": [0, 1, 2], "class_names": [1, 2, 3]}, "class_names must be texts"),
    ({"images": IMAGES, "class_names": ["a"]}, "class_names must be texts.* there are no labels"),
    ({"images": IMAGES, "labels": np.array([0, "x", None])}, "contains pickled objects, which are not read"),
    ({"images": np.array([None, {}])}, "contains pickled objects, which are not read"),
    ({"latents": IMAGES}, "latents must be floats"),
    ({"latents": IMAGES[0].astype(float)}, "latents must be floats"),
    ({"latents": IMAGES.astype(float), "scale": [1.0, 2]}, "scale must be one finite number, or one for each of the 3"),
    ({"latents": IMAGES.astype(float), "scale": 0.0}, "scale must be one finite number.* not 0"),
    ({"latents": IMAGES.astype(float), "shift": np.inf}, "shift must be one finite number"),
  ],
)
def test_arrays_that_are_refused(tmp_path, values, message):
  with pytest.raises(ValueError, match=f"d.npz.*{message}"):
    open_arrays(npz(tmp_path / "d.npz", **values))


def test_pickled_code_does_not_run(tmp_path):
  class Hostile:
    def __reduce__(self):
      return pytest.fail, ("code of the file ran",)

  path = npz(tmp_path / "d.npz", images=IMAGES, labels=np.array([Hostile(), 1, 2], object))
  with pytest.raises(ValueError, match="pickled objects"):
    open_arrays(path)


def test_arrays_that_are_not_used_are_said(tmp_path):
  with pytest.warns(UserWarning, match=r"d.npz has arrays that are not used: label, mask"):
    open_arrays(npz(tmp_path / "d.npz", images=IMAGES, mask=IMAGES, label=[0, 1, 2]))
  with pytest.warns(UserWarning, match=r"not used: scale"):
    open_arrays(npz(tmp_path / "d.npz", images=IMAGES, scale=2))


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_arrays(tmp_path, compressed):
  path = npz(tmp_path / "d.npz", compressed, images=noise(10, 16, 16, 3))
  content = path.read_bytes()
  for wrong in (b"", b"text", content[: len(content) // 2], content[1000:]):
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r"d.npz is not a valid .npz file"):
      open_arrays(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("images.npy", b"no array")
  with pytest.raises(ValueError, match=r"d.npz is not a valid .npz file"):
    open_arrays(path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("values", ["images", "latents"])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_of_arrays_is_seen(tmp_path, compressed, values, place):
  made = {"images": noise(40, 8, 8, 3), "latents": RNG.normal(size=(40, 8, 8, 3)).astype(np.float32)}[values]
  path = npz(tmp_path / "d.npz", compressed, **{values: made})
  opened(path)
  content = bytearray(path.read_bytes())
  content[int(made.nbytes * place * (0.8 if compressed else 1))] ^= 1
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"d\.npz is (damaged: .* does not have the checksum|not a valid \.npz file)"):
    opened(path)


def test_latents_that_are_not_finite_are_named(tmp_path):
  latents = np.zeros((3, 2, 2, 1), np.float32)
  latents[1, 0, 0, 0] = np.nan
  with pytest.raises(ValueError, match="latent 1: it is not finite"):
    opened(npz(tmp_path / "d.npz", latents=latents))


def test_stamps_see_that_a_file_was_written_anew(tmp_path):
  path = npz(tmp_path / "d.npz", images=IMAGES)
  first = opened(path)
  assert len({*first.records.stamps.tolist()}) == 3
  assert opened(path).fingerprint == first.fingerprint
  npz(path, images=255 - IMAGES)
  assert opened(path).fingerprint != first.fingerprint


# --- ArrayRecord ------------------------------------------------------------------------------------


def pictures(number, size=6):
  return [noise(size, size, 3) for _ in range(number)]


def test_array_record(tmp_path):
  originals = pictures(40)
  path = tmp_path / "photos.array_record"
  labels, names = np.arange(40) % 2, [f"{i}.png" for i in range(40)]
  data.write_array_record(path, map(encoded, originals), labels, ["cat", "dog"], names)
  dataset = opened(path)
  assert (len(dataset), dataset.class_names) == (40, ["cat", "dog"])
  assert dataset.example_name(7) == f"{path}: 7.png"
  batch = next(data.stream(dataset, 40, 0, workers=8))
  np.testing.assert_array_equal(batch.examples, np.stack(originals)[batch.rows])
  np.testing.assert_array_equal(batch.labels, labels[batch.rows])


def test_array_record_alone_and_with_vectors(tmp_path):
  path = tmp_path / "p.array_record"
  data.write_array_record(path, map(encoded, pictures(3)), [[0.5, 1], [1, 2], [3, 4]])
  assert open_array_record(path).labels[2].tolist() == [3, 4]
  data.write_array_record(path, map(encoded, pictures(2)))
  records = open_array_record(path)
  assert (records.labels, records.num_classes, list(records.names)) == (None, None, ["record 0", "record 1"])


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"labels": [0, 1]}, "there are 3 records, and 2 labels"),
    ({"labels": 1}, "there are 3 records, and no list of labels"),
    ({"labels": [0, [1], 2]}, r"record 1: label \[1\] is not a whole number"),
    ({"labels": [0, 1, 2], "class_names": ["a"]}, "record 1: label 1 is not one of the 1 classes"),
    ({"labels": ["a", "b", "c"]}, "record 0: label 'a' is not a whole number"),
    ({"class_names": ["a"]}, "class_names need labels"),
    ({"labels": [0, 0, 0], "class_names": "a"}, "class_names must be a list of texts"),
    ({"names": ["a", "b", "a"]}, "names has 'a' twice"),
    ({"label": [0, 1, 2]}, "unknown field 'label'"),
    ([], "is damaged"),
  ],
)
def test_labels_that_do_not_fit_an_array_record(tmp_path, fields, message):
  path = tmp_path / "p.array_record"
  data.write_array_record(path, map(encoded, pictures(3)))
  array_record.side_file(path).write_text(json.dumps(fields))
  with pytest.raises(ValueError, match=rf"p.array_record.json.*{message}"):
    open_array_record(path)


def test_damaged_array_records(tmp_path):
  path = tmp_path / "p.array_record"
  data.write_array_record(path, [encoded(picture) for picture in pictures(200, 32)])
  content = path.read_bytes()
  for wrong in (b"", b"text", content[: len(content) // 2]):
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r"p.array_record is not a complete ArrayRecord file"):
      open_array_record(path)
  middle = len(content) // 2
  path.write_bytes(content[:middle] + bytes(200) + content[middle + 200 :])
  with pytest.raises(ValueError, match=r"(?s)of 200 files.*record \d+: it is damaged \(Corrupted"):
    opened(path)
  with pytest.warns(UserWarning, match="are left out"):
    assert 190 < len(opened(path, skip_bad=True)) < 200


@pytest.mark.parametrize(
  ("arguments", "error", "message"),
  [
    (("p.txt", [b"x"]), ValueError, "must end in .array_record"),
    (("p.array_record", []), ValueError, "no pictures"),
    (("p.array_record", [b"x"], [0, 1]), ValueError, "there are 1 pictures, and 2 labels"),
    (("p.array_record", iter(["x"])), TypeError, "picture 0 must be the bytes"),
  ],
)
def test_what_is_not_written_as_an_array_record(tmp_path, arguments, error, message):
  with pytest.raises(error, match=message):
    data.write_array_record(tmp_path / arguments[0], *arguments[1:])
  assert not list(tmp_path.iterdir())


# --- Parquet ----------------------------------------------------------------------------------------


def table(images, labels=None, label_names=None, image="image", label="label"):
  """A table as Hugging Face's datasets are stored."""
  structs = [{"bytes": content, "path": None} for content in images]
  columns = {image: pa.array(structs, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
  if labels is not None:
    columns[label] = labels if isinstance(labels, pa.Array) else pa.array(labels)
  features = {image: {"_type": "Image"}, label: {"names": label_names, "_type": "ClassLabel"}}
  metadata = {"huggingface": json.dumps({"info": {"features": features}})} if label_names else None
  return pa.table(columns).replace_schema_metadata(metadata)


def test_a_dataset_of_hugging_face(tmp_path):
  originals = pictures(50)
  labels = [i % 3 for i in range(50)]
  for part, rows in enumerate((slice(0, 30), slice(30, 50))):
    content = table([encoded(each) for each in originals[rows]], labels[rows], ["ant", "bee", "cow", "dog"])
    (tmp_path / "d" / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(content, tmp_path / "d" / "data" / f"train-0000{part}-of-00002.parquet", row_group_size=7)
  pq.write_table(content, tmp_path / "d" / "data" / "test-00000-of-00001.parquet")
  dataset = opened(tmp_path / "d")
  assert (len(dataset), dataset.num_classes, dataset.class_names) == (50, 4, ["ant", "bee", "cow", "dog"])
  assert dataset.example_name(31) == f"{tmp_path / 'd'}: train-00001-of-00002.parquet row 1"
  batch = next(data.stream(dataset, 50, 0, workers=8))
  np.testing.assert_array_equal(batch.examples, np.stack(originals)[batch.rows])
  np.testing.assert_array_equal(batch.labels, np.array(labels)[batch.rows])
  assert len(opened(tmp_path / "d", split="test")) == 20
  with pytest.raises(ValueError, match="no files of the split 'tset'; it has test, train"):
    opened(tmp_path / "d", split="tset")


WRONG_LABELS = [
  ([0, 2**24, 1], 1, "16777216"),
  ([0, 2**31, 1], 1, "2147483648"),
  ([0, 1, 2**33], 2, "8589934592"),
  ([2**63, 0, 1], 0, r"9\.?22337203685477\S+"),
  ([0, -1, -2], 1, "-1"),
  ([[0.5], [1e300], [1.0]], 1, r"\[1e\+300\]"),
  ([[1.0, 2.0], [1.0, 1e39], [1.0, 2.0]], 1, r"\[1.0, 1e\+39\]"),
  ([[], [], []], 0, r"\[\]"),
]
"""Labels, the first wrong record, and its label as it is written."""


@pytest.mark.parametrize(("labels", "row", "shown"), WRONG_LABELS)
@pytest.mark.parametrize("kind", ["json", "zip", "npz", "array_record", "parquet"])
def test_a_wrong_label_is_named_with_its_record(tmp_path, labels, row, shown, kind):
  contents = [encoded(each) for each in pictures(3)]
  names = [f"{number}.png" for number in range(3)]
  path, name = tmp_path / f"d.{kind}", {"npz": f"image {row}", "parquet": f"d.parquet row {row}"}.get(kind, names[row])
  described = json.dumps({"labels": [*zip(names, labels, strict=True)]})
  if kind == "json":
    path.mkdir()
    (path / "dataset.json").write_text(described)
    for each, content in zip(names, contents, strict=True):
      (path / each).write_bytes(content)
  elif kind == "zip":
    with zipfile.ZipFile(path, "w") as archive:
      for each, content in zip(["dataset.json", *names], [described, *contents], strict=True):
        archive.writestr(each, content)
  elif kind == "npz":
    np.savez(path, images=pictures(3), labels=np.array(labels))
  elif kind == "array_record":
    data.write_array_record(path, contents, labels, names=names)
  else:
    stored = pa.list_(pa.float64()) if isinstance(labels[0], list) else pa.uint64() if min(labels) >= 0 else pa.int64()
    pq.write_table(table(contents, pa.array(labels, stored)), path)
  with pytest.raises(ValueError, match=rf"{name}: label {shown} is not a whole number from 0 to 16777215, or a vector"):
    opened(path)


@pytest.mark.parametrize(
  ("labels", "row", "shown"),
  [
    ([0, 1.5, 1], 1, "1.5"),
    ([0, None, 1], 1, "None"),
    ([0, "1", 1], 1, "'1'"),
    ([0, float("nan"), 1], 1, "nan"),
    ([0, 10**30, 1], 1, "10{30}"),
    ([[1], [1, 2], [1]], 1, r"\[1, 2\]"),
    ([[1], 1, [1]], 1, "1"),
    ([[1], [float("inf")], [1]], 1, r"\[inf\]"),
    ([[[1]], [[1]], [[1]]], 0, r"\[\[1\]\]"),
    ([{}, {}, {}], 0, "{}"),
  ],
)
def test_a_wrong_label_of_json_is_named(labels, row, shown):
  with pytest.raises(ValueError, match=rf"name {row}: label {shown} is not a whole number"):
    describe_labels(labels, [f"name {number}" for number in range(3)])


@pytest.mark.parametrize("kind", ["npz", "array_record"])
def test_names_of_classes_stand_once(tmp_path, kind):
  names = ["ant", "bee", "ant"]
  if kind == "npz":
    path = npz(tmp_path / "d.npz", images=pictures(3), labels=[0, 1, 2], class_names=names)
  else:
    data.write_array_record(tmp_path / "d.array_record", map(encoded, pictures(3)), [0, 1, 2], names)
    path = tmp_path / "d.array_record"
  with pytest.raises(ValueError, match=r"d\.(npz|array_record\.json): class_names has 'ant' twice"):
    opened(path)


def test_plain_binary_and_no_labels(tmp_path):
  originals = pictures(5)
  content = pa.table({"jpg": pa.array([encoded(each) for each in originals], pa.large_binary())})
  pq.write_table(content, tmp_path / "d.parquet", row_group_size=2)
  dataset = opened(tmp_path / "d.parquet", image_column="jpg", labels="none")
  assert dataset.label_shape is None
  for row, picture in enumerate(originals):
    np.testing.assert_array_equal(dataset.example(row)[0], picture)


VECTORS = pa.array([[0.5, 1.0], [2.0, 3.0], [4.0, 5.0]], pa.list_(pa.float32(), 2))


@pytest.mark.parametrize(
  ("labels", "names", "label_shape", "class_names", "values"),
  [
    ([2, 0, 1], None, (), None, [2, 0, 1]),
    (pa.array([2, 0, 1], pa.uint8()), None, (), None, [2, 0, 1]),
    ([True, False, True], None, (), None, [1, 0, 1]),
    (["dog", "ant", "dog"], None, (), ["ant", "dog"], [1, 0, 1]),
    (pa.array(["dog", "ant", "dog"]).dictionary_encode(), None, (), ["ant", "dog"], [1, 0, 1]),
    (VECTORS, None, (2,), None, VECTORS.to_pylist()),
    (pa.array([[1, 2], [3, 4], [5, 6]]), None, (2,), None, [[1, 2], [3, 4], [5, 6]]),
  ],
)
def test_kinds_of_labels_in_parquet(tmp_path, labels, names, label_shape, class_names, values):
  pq.write_table(table([encoded(each) for each in pictures(3)], labels, names), tmp_path / "d.parquet")
  dataset = opened(tmp_path / "d.parquet")
  assert (dataset.label_shape, dataset.class_names) == (label_shape, class_names)
  np.testing.assert_array_equal([dataset.example(row)[1] for row in range(3)], values)


PICTURES = [encoded(each) for each in pictures(3)]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      table(PICTURES, [0, 1, 2], image="img"),
      "no column 'image': did you mean 'img'. It has img, label; .*image_column",
    ),
    (table(PICTURES, [0, 1, 2], label="labels"), "no column 'label': did you mean 'labels'.*labels none to train"),
    (table(PICTURES), "no column 'label'. It has image;"),
    (pa.table({"image": ["a.png"], "label": [0]}), "column 'image' must hold encoded pictures.*got string"),
    (pa.table({"image": [{"path": "a.png"}], "label": [0]}), "column 'image' must hold encoded pictures"),
    (table(PICTURES, [0, None, None]), "row 1 has no 'label', and 1 others"),
    (table(PICTURES, [0, -1, 1]), "column 'label': d.parquet row 1: label -1 is not a whole number"),
    (table(PICTURES, [0, 2, 1], ["a", "b"]), "column 'label': d.parquet row 1: label 2 is not one of the 2 classes"),
    (
      table(PICTURES, [0.5, 1.0, 2.0]),
      "column 'label' must hold whole numbers, texts, or lists of numbers, got double",
    ),
    (table(PICTURES, [[1.0], [1.0, 2.0], [3.0]]), "must hold lists of one length"),
    (table(PICTURES, [[1.0], [None], [3.0]]), "must hold lists of one length without missing"),
    (table(PICTURES, [{"a": 1}] * 3), "column 'label' must hold whole numbers"),
    (table(PICTURES, [0, 1, 2]).slice(0, 0), "contains no rows"),
  ],
)
def test_parquet_that_is_refused(tmp_path, content, message):
  pq.write_table(content, tmp_path / "d.parquet")
  with pytest.raises(ValueError, match=rf"d.parquet.*{message}"):
    opened(tmp_path / "d.parquet")


def test_a_picture_that_is_only_a_path_is_bad(tmp_path):
  (tmp_path / "1.png").write_bytes(PICTURES[0])
  structs = [{"bytes": PICTURES[0], "path": None}, {"bytes": None, "path": str(tmp_path / "1.png")}, None]
  content = pa.table({"image": pa.array(structs, pa.struct({"bytes": pa.binary(), "path": pa.string()}))})
  pq.write_table(content, tmp_path / "d.parquet")
  with pytest.raises(ValueError, match=r"(?s)2 of 3 files.*row 1: the picture's bytes are not in the file"):
    opened(tmp_path / "d.parquet", labels="none")


def test_damaged_parquet(tmp_path):
  path = tmp_path / "d.parquet"
  pq.write_table(table([encoded(each) for each in pictures(20, 32)], [0, 1] * 10), path, compression="none")
  content = path.read_bytes()
  for wrong in (b"", b"text", content[: len(content) // 2], content[:-1]):
    path.write_bytes(wrong)
    with pytest.raises(ValueError, match=r"d.parquet is not a complete Parquet file"):
      opened(path)
  path.write_bytes(content[:20] + b"\xff" * 500 + content[520:])
  with pytest.raises((ValueError, BadRecord), match=r"d.parquet"):
    opened(path)


def test_names_of_classes_that_differ_between_files(tmp_path):
  for name, classes in (("a", ["x", "y"]), ("b", ["y", "x"])):
    pq.write_table(table(PICTURES, [0, 1, 1], classes), tmp_path / f"{name}.parquet")
  with pytest.raises(ValueError, match=r"a.parquet and .*b.parquet have other names for the classes"):
    opened(tmp_path)


@pytest.mark.parametrize(
  ("first", "second", "message"),
  [
    ([0, 1, 0], ["x", "y", "x"], r"whole numbers in .*a\.parquet and texts in .*b\.parquet"),
    (["x", "y", "x"], [0, 1, 0], r"texts in .*a\.parquet and whole numbers in .*b\.parquet"),
    ([0, 1, 0], [[1.0, 2.0]] * 3, "whole numbers in .* and lists of 2 numbers in"),
    ([[1.0] * 3] * 3, [[1.0, 2.0]] * 3, "lists of 3 numbers in .* and lists of 2 numbers in"),
  ],
)
def test_kinds_of_labels_that_differ_between_files(tmp_path, first, second, message):
  for name, labels in (("a", first), ("b", second)):
    pq.write_table(table(PICTURES, labels), tmp_path / f"{name}.parquet")
  with pytest.raises(ValueError, match=rf"column 'label' has {message}"):
    opened(tmp_path)


@pytest.mark.parametrize(
  ("there", "missing"),
  [
    ([0], r"lacks 1 of the 2 files of the split 'train': train-00001-of-00002\.parquet"),
    ([1], r"lacks 1 of the 2 files of the split 'train': train-00000-of-00002\.parquet"),
    ([0, 1], None),
  ],
)
@pytest.mark.parametrize("folder", [".", "data"])
def test_parts_of_a_split_that_are_missing_are_named(tmp_path, there, missing, folder):
  (tmp_path / folder).mkdir(exist_ok=True)
  for name in (*(f"train-0000{number}-of-00002" for number in there), "test-00000-of-00001"):
    pq.write_table(table(PICTURES, [0, 1, 1]), tmp_path / folder / f"{name}.parquet")
  if missing is None:
    assert len(opened(tmp_path)) == 6
  else:
    with pytest.raises(ValueError, match=missing):
      opened(tmp_path)
    assert len(opened(tmp_path / folder / f"train-0000{there[0]}-of-00002.parquet")) == 3
  assert len(opened(tmp_path, split="test")) == 3


@pytest.mark.parametrize("name", ["image", "label"])
def test_columns_of_one_name_are_refused(tmp_path, name):
  columns = {"image": pa.array(PICTURES), "label": pa.array([0, 1, 2])}
  names = [*columns, name]
  pq.write_table(pa.table([columns[each] for each in names], names=names), tmp_path / "d.parquet")
  with pytest.raises(
    ValueError, match=rf"d\.parquet has several columns '{name}': rename them, or .* as {name}_column"
  ):
    opened(tmp_path / "d.parquet")


def test_row_groups_are_kept_within_bounds(tmp_path, monkeypatch):
  contents = [encoded(each) for each in pictures(60, 32)]
  pq.write_table(table(contents), tmp_path / "d.parquet", row_group_size=10)
  monkeypatch.setattr(parquet, "CACHE", 25 * len(contents[0]))
  loads, sizes, keep = [], [], parquet._Groups._keep

  def counted(self, key, column):
    loads.append(key)
    keep(self, key, column)
    sizes.append(self.size)

  monkeypatch.setattr(parquet._Groups, "_keep", counted)
  with pytest.warns(UserWarning, match="in row groups of 10 pictures"):
    records = open_parquet(tmp_path / "d.parquet", label_column=None)
  with ThreadPoolExecutor(8) as pool:
    assert list(pool.map(records.read, range(60))) == contents
  assert len(loads) < 20  # Each group about once, though 8 threads needed it.
  assert 0 < max(sizes) <= 25 * len(contents[0])
  assert len({*loads}) == 6


def test_decoding_in_threads_leaves_the_filters_of_warnings_as_they_are():
  decode.decode(PICTURES[0])
  before = list(warnings.filters)
  for _ in range(20):
    with ThreadPoolExecutor(16) as pool:
      list(pool.map(decode.decode, PICTURES * 20))
    assert warnings.filters == before


# --- TFDS -------------------------------------------------------------------------------------------


class Photos(tfds.core.GeneratorBasedBuilder):
  """Photos of any size with named classes, as ImageNet has them."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(9):
      yield i, {"image": io.BytesIO(encoded(np.full((8 + i, 12, 3), 20 * i, np.uint8))), "label": i % 2}


class Labelled(Photos):
  """The same, of one size."""

  def _info(self):
    features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _generate_examples(self):
    for i in range(9):
      yield i, {"image": io.BytesIO(encoded(np.full((8, 8, 3), 20 * i, np.uint8))), "label": i % 2}


def test_photos_of_tfds_are_read_when_they_are_needed(tmp_path, monkeypatch):
  dataset = opened("tfds:photos", size=8, data_dir=tmp_path)
  assert (len(dataset), dataset.class_names, dataset.num_classes) == (9, ["cat", "dog"], 2)
  for row in range(9):
    example, label = dataset.example(row)
    number = int(example[0, 0, 0]) // 20
    assert (example.shape, label) == ((8, 8, 3), number % 2)
  assert len({*dataset.records.stamps.tolist()}) == len({*dataset.records.names}) == 9
  assert isinstance(dataset.records.read(0), bytes)
  again = opened("tfds:photos", size=8, data_dir=tmp_path)
  assert again.fingerprint == dataset.fingerprint
  with pytest.raises(ValueError, match=r"images of one size.*open it with jaxguide.data.open_data, source tfds:photos"):
    data.load("photos", data_dir=tmp_path)


def test_small_datasets_of_tfds_stay_in_memory(tmp_path, monkeypatch):
  small = opened("tfds:labelled", data_dir=tmp_path)
  assert isinstance(small, data.Images)
  monkeypatch.setattr(catalogue, "LARGEST_IN_MEMORY", 100)
  large = opened("tfds:labelled", data_dir=tmp_path)
  assert not isinstance(large, data.Images)
  for row in range(9):
    for a, b in zip(small.example(row), large.example(row), strict=True):
      np.testing.assert_array_equal(a, b)


def test_labels_of_tfds_are_kept(tmp_path, monkeypatch):
  first = opened("tfds:photos", size=8, data_dir=tmp_path)
  (kept,) = (tmp_path / "cache" / "jaxguide" / "labels").iterdir()
  np.testing.assert_array_equal(np.load(kept), first.records.labels)
  kept.write_bytes(b"torn")
  again = opened("tfds:photos", size=8, data_dir=tmp_path)
  np.testing.assert_array_equal(again.records.labels, first.records.labels)


# --- threads and processes ----------------------------------------------------------------------------


def make_sources(folder):
  """Write the same pictures and labels to each kind of file."""
  originals = [noise(9, 8, 3) for _ in range(12)]
  contents, labels = [encoded(each) for each in originals], [row % 2 for row in range(12)]
  for row, content in enumerate(contents):
    (folder / "pictures" / "ab"[labels[row]]).mkdir(parents=True, exist_ok=True)
    (folder / "pictures" / "ab"[labels[row]] / f"{row:02}.png").write_bytes(content)
  with zipfile.ZipFile(folder / "d.zip", "w") as archive:
    for file in sorted((folder / "pictures").glob("*/*")):
      archive.write(file, file.relative_to(folder / "pictures"))
  npz(folder / "d.npz", images=np.stack(originals), labels=labels)
  npz(folder / "compressed.npz", True, images=np.stack(originals), labels=labels)
  npz(folder / "latents.npz", latents=np.stack(originals) / 9, labels=labels, scale=2)
  data.write_array_record(folder / "d.array_record", contents, labels)
  pq.write_table(table(contents, labels), folder / "d.parquet", row_group_size=5)


SOURCES = ["pictures", "d.zip", "d.npz", "compressed.npz", "latents.npz", "d.array_record", "d.parquet"]


@pytest.mark.parametrize("source", [*SOURCES, "tfds:photos"])
def test_every_source_can_be_sent_to_another_process(tmp_path, source):
  make_sources(tmp_path)
  size = None if source == "latents.npz" else 8
  named = ":" in source
  dataset = opened(source if named else tmp_path / source, size=size, data_dir=tmp_path if named else None)
  dataset.example(0)
  sent = cloudpickle.loads(cloudpickle.dumps(dataset))
  for row in range(9):
    for a, b in zip(dataset.example(row), sent.example(row), strict=True):
      np.testing.assert_array_equal(a, b)


def take(source, number):
  """Return the first batches of a stream, and end it."""
  batches = [tuple(np.array(part) for part in batch) for batch in itertools.islice(source, number)]
  source.close()
  return batches


@pytest.mark.parametrize("batch_size", [1, 7, 8, 12])
def test_batches_do_not_depend_on_the_number_of_threads(tmp_path, batch_size):
  make_sources(tmp_path)
  dataset = opened(tmp_path / "pictures", size=8, crop="random", flip=True)
  first = take(data.stream(dataset, batch_size, 3, workers=1), 5)
  for start, workers in ((0, 4), (2, 3)):
    later = take(data.stream(dataset, batch_size, 3, start, workers=workers), 5 - start)
    for one, other in zip(first[start:], later, strict=True):
      for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)
  # Every example occurs once in an epoch.
  rows = np.concatenate([batch[2] for batch in take(data.stream(dataset, batch_size, 3), -(-24 // batch_size))])
  for epoch in (rows[:12], rows[12:24]):
    assert sorted(epoch.tolist()) == list(range(12))


def test_batches_do_not_depend_on_the_number_of_processes(tmp_path):
  make_sources(tmp_path)
  dataset = opened(tmp_path / "d.array_record", size=8, crop="random", flip=True, processes=2)
  assert dataset.processes == 2
  in_threads = take(data.stream(dataset, 5, 3, processes=0), 5)
  in_processes = take(data.stream(dataset, 5, 3, start=2), 3)
  for one, other in zip(in_threads[2:], in_processes, strict=True):
    for a, b in zip(one, other, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("kind", "given"),
  [
    ("folder", {"split": "test"}),
    ("folder", {"image_column": "picture"}),
    ("npz", {"label_column": "class"}),
    ("npz", {"data_dir": "."}),
    ("digits", {"image_column": "picture"}),
  ],
)
def test_settings_of_other_sources_are_refused(tmp_path, kind, given):
  source = {"folder": tmp_path / "pictures", "npz": tmp_path / "data.npz", "digits": "digits"}[kind]
  (tmp_path / "pictures" / "a").mkdir(parents=True)
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "pictures" / "a" / "0.png")
  np.savez(tmp_path / "data.npz", images=np.zeros((2, 4, 4, 1), np.uint8), labels=np.arange(2))
  with pytest.raises(ValueError, match=f"{next(iter(given))} is not a setting for .*: leave it out"):
    open_data(DataConfig(str(source), **given))


def test_paths_that_are_not_utf8_are_refused(tmp_path):
  folder = os.fsdecode(os.fsencode(tmp_path) + b"/d\xff")
  os.mkdir(folder)
  with pytest.raises(ValueError, match=r"d\\udcff' is not UTF-8 and cannot be stored: rename it"):
    open_data(DataConfig(folder))
  with pytest.raises(OSError, match="is not UTF-8; choose another path"):
    files.check_writable(os.path.join(folder, "x.png"))
