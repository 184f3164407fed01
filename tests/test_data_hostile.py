"""Folders and archives of pictures, continued: other layouts, strange names, extremes, and parts of datasets."""

import functools
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxguide import data
from jaxguide.data import decode, resize
from jaxguide.data.prepared import Preparation
from jaxguide.data.records import BadRecord

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """The results of checks are kept in a folder of the test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def noise(height=8, width=8):
  return RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)


def encoded(picture, format_name="PNG", **options):
  file = io.BytesIO()
  (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, format_name, **options)
  return file.getvalue()


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return folder


def zipped(path, files):
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in files.items():
      archive.writestr(name, content)
  return path


def opened(source, **options):
  return data.open_data(data.DataConfig(source, **options), progress=False)


def chunk(kind, content):
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, colour, rows, extra=b""):
  """A PNG file, put together by its specification."""
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# --- pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_in_each_kind_of_png(colour, channels):
  """Grey, RGB, and both with an opaque alpha channel: 65535 is white, and the values in between are not clipped."""
  values = np.array([0, 0x4040, 0x8080, 0xFFFF], np.uint16)
  pixels = np.repeat(values[None, :, None], channels, axis=2)
  if channels in (2, 4):
    pixels[..., -1] = 0xFFFF
  picture = decode.decode(png(4, 1, 16, colour, pixels.astype(">u2")))
  np.testing.assert_array_equal(np.asarray(picture.convert("L"))[0], [0, 0x40, 0x80, 0xFF])


def packed(values, depth):
  """A row of PNG: numbers of some bits, one after the other."""
  bits = "".join(f"{value:0{depth}b}" for value in np.ravel(values))
  bits += "0" * (-len(bits) % 8)
  return np.array([int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)], np.uint8)


GREY = {
  1: [0, 1, 0],
  2: [0, 1, 3],
  4: [15, 5, 3],
  8: [5, 85, 255],
  16: [0, 0x0102, 0xFFFF],
}
"""Levels by depth. In Pillow's 8 bits, some are others' numbers: 3 of 2 bits is 255, and 1 of 2 bits is 85."""

COLOURS = {
  8: [[1, 2, 3], [3, 2, 1], [4, 5, 6]],
  16: [[0x1234, 0x5678, 0x9ABC], [0x1234, 0x5678, 0x9ABD], [0x3434, 0x7878, 0xBCBC]],
}
"""Colours by depth. Of 16 bits, the first two have one high byte, and the first and the last one low byte."""


@pytest.mark.parametrize("orientation", [None, 3])
@pytest.mark.parametrize("chosen", [0, 1, 2])
@pytest.mark.parametrize(
  ("colour", "depth", "values"),
  [*((0, depth, values) for depth, values in GREY.items()), *((2, depth, values) for depth, values in COLOURS.items())],
)
def test_the_transparent_colour_of_a_png(colour, depth, values, chosen, orientation):
  """By the specification of PNG: the pixels that are equal to it in the file, in all bits, and no others."""
  key, background = np.atleast_1d(values[chosen]), (255, 0, 0)
  extra = chunk(b"tRNS", key.astype(">u2").tobytes())
  if orientation:
    exif = Image.Exif()
    exif[0x0112] = orientation
    extra += chunk(b"eXIf", exif.tobytes()[6:])
  content = png(3, 1, depth, colour, [packed(values, depth)], extra)
  pixels = [np.broadcast_to(np.atleast_1d(value), 3) for value in values]
  scaled = [pixel // 256 if (colour, depth) == (2, 16) else np.rint(pixel * 255 / (2**depth - 1)) for pixel in pixels]
  behind = [value == values[chosen] for value in values]
  expected = np.array([background if each else pixel for each, pixel in zip(behind, scaled, strict=True)])
  expected = expected[::-1] if orientation else expected
  np.testing.assert_array_equal(np.asarray(decode.decode(content, background))[0], expected)
  grey = Preparation(channels=1, background=background).picture(content, RNG)[0, :, 0]
  rgb = Image.fromarray(expected[None].astype(np.uint8))
  np.testing.assert_array_equal(grey, np.asarray(rgb.convert("L"))[0])


def test_photos_of_telephones_with_several_pictures_are_their_first():
  first, second = (Image.new("RGB", (16, 16), colour) for colour in ("black", "white"))
  content = encoded(first, "MPO", save_all=True, append_images=[second])
  assert np.asarray(decode.decode(content)).max() < 10


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "TIFF"])
def test_animations_are_their_first_frame(format_name):
  frames = [Image.new("RGB", (16, 16), colour) for colour in ("black", "white")]
  content = encoded(frames[0], format_name, save_all=True, append_images=frames[1:])
  assert np.asarray(decode.decode(content)).max() < 10


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(1, 40_000_000), (40_000_000, 1)])
def test_a_picture_too_long_to_be_resized_is_no_way_to_fill_the_memory(crop, size):
  class Long:
    """What a Pillow image says of its size."""

  picture = Long()
  picture.size, (picture.width, picture.height) = size, size
  with pytest.raises(BadRecord, match="one side is so much longer than the other that it would have"):
    resize.CROPS[crop](picture, 64, "bicubic", np.random.default_rng(0))


def test_narrow_pictures_are_cropped():
  example = resize.center(Image.fromarray(noise(300, 1)), 8, "adm", np.random.default_rng(0))
  assert example.size == (8, 8)


# --- folders ----------------------------------------------------------------------------------------


def test_links_in_a_circle_are_bad_files_and_links_to_folders_are_not_followed(tmp_path):
  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.jfif": encoded(noise(), "JPEG")})
  (folder / "circle.png").symlink_to("circle.png")
  (folder / "up").symlink_to("..")
  warned = pytest.warns(UserWarning, match="is a link to a folder, which is not followed")
  refused = pytest.raises(ValueError, match=r"1 of 3 files of .*\n  circle.png: it cannot be read \(Too many levels")
  with warned, refused:
    opened(folder)


def test_names_that_are_not_utf_8(tmp_path):
  folder = write(tmp_path / "d", {f"{i}.png": encoded(noise()) for i in range(20)})
  try:
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
      file.write(encoded(noise()))
  except OSError:
    pytest.skip("this file system has names in UTF-8 alone")
  dataset = opened(folder)
  assert len(dataset) == 21
  train, held_out = data.split(dataset, 0.3)
  assert len(train) + len(held_out) == 21
  assert next(data.stream(dataset, 21, 0)).examples.shape == (21, 8, 8, 3)
  assert len(dataset.fingerprint) == 64


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "a\rb", "\u202egnp", "tab\t", "\u2028"])
@pytest.mark.parametrize("kind", ["folder", "archive"])
@pytest.mark.filterwarnings("ignore:.*(no pictures|without pictures|link to a folder)")
def test_names_in_messages_cannot_move_the_cursor(tmp_path, name, kind):
  files = {f"c{name}/{name}{end}": b"x" for end in (".png", ".txt")}
  files |= {f"c/{i}{name}.png": encoded(noise(8, 8 + i)) for i in range(2)}
  source = write(tmp_path / "d", files) if kind == "folder" else zipped(tmp_path / "d.zip", files)
  if kind == "folder":
    (source / f"empty{name}").mkdir()
    (source / f"link{name}").symlink_to(source / "c")
  messages = []
  for options in ({"size": 8}, {"size": 8, "skip_bad": True}, {"labels": "none"}):
    with warnings.catch_warnings(record=True) as warned:
      warnings.simplefilter("always")
      with pytest.raises(ValueError, match=r"cannot be used|have 2 sizes") as error:
        opened(source, **options)
    messages += [str(error.value), *(str(each.message) for each in warned)]
  unchecked = opened(source, check="none", size=8)
  with pytest.raises(ValueError, match="cannot be used") as error:
    unchecked.example(unchecked.records.names.index(f"c{name}/{name}.png"))
  messages.append(str(error.value))
  escaped = name.encode("unicode_escape").decode()
  assert all(escaped in message for message in messages)
  assert not any(name in message for message in messages)
  assert len(messages) > 6


def test_folders_of_splits_are_no_classes(tmp_path):
  files = {f"{split}/{name}/1.png": encoded(noise()) for split in ("train", "val") for name in ("cat", "dog")}
  folder = write(tmp_path / "d", files)
  for source in (folder, zipped(tmp_path / "d.zip", files)):
    with pytest.raises(ValueError, match="are train, val, which are splits and no classes: give one of them"):
      opened(source)
  assert opened(folder / "train").class_names == ["cat", "dog"]
  vehicles = write(tmp_path / "v", {f"{name}/1.png": encoded(noise()) for name in ("train", "car")})
  assert opened(vehicles).class_names == ["car", "train"]


def test_without_labels_pictures_may_stand_anywhere(tmp_path):
  files = {name: encoded(noise()) for name in ("1.png", "cat/1.png", "cat/more/2.png")}
  for source in (write(tmp_path / "d", files), zipped(tmp_path / "d.zip", files)):
    with pytest.raises(ValueError, match=r"pictures beside folders of pictures, such as 1\.png.*labels none"):
      opened(source)
    dataset = opened(source, labels="none")
    assert (len(dataset), dataset.num_classes, dataset.label_shape) == (3, None, None)


# --- archives ---------------------------------------------------------------------------------------


def test_only_a_file_named_dataset_json_describes_an_archive(tmp_path):
  files = {"a/1.png": encoded(noise()), "b/1.png": encoded(noise())}
  labels = json.dumps({"labels": [["a/1.png", 7], ["b/1.png", 0]]})
  others = {"my_dataset.json": "{", "__MACOSX/dataset.json": "{"}
  with pytest.warns(UserWarning, match=r"1 files that are no pictures and are left out: my_dataset\.json"):
    assert opened(zipped(tmp_path / "o.zip", {**files, **others})).num_classes == 2
  assert opened(zipped(tmp_path / "l.zip", {**files, "dataset.json": labels})).num_classes == 8
  assert opened(zipped(tmp_path / "n.zip", {**files, "dataset.json": "{"}), labels="none").num_classes is None


def test_links_and_encrypted_files_in_archives_are_bad(tmp_path):
  path = tmp_path / "d.zip"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("1.png", encoded(noise()))
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    archive.writestr(link, "/etc/passwd")
    archive.writestr("secret.png", encoded(noise()))
  content = path.read_bytes()
  # The flag of encryption, in the list of contents at the end of the file.
  entry = content.rindex(b"PK\1\2")
  flags = struct.unpack_from("<H", content, entry + 8)[0]
  path.write_bytes(content[: entry + 8] + struct.pack("<H", flags | 1) + content[entry + 10 :])
  with pytest.raises(ValueError, match=r"(?s)2 of 3 files.*link.png: it is not a picture.*secret.png: it is encrypted"):
    opened(path)


@pytest.mark.parametrize("name", ["d.zip", "d.npz", "d.array_record", "d.parquet"])
def test_a_pipe_is_no_file_of_data(tmp_path, name):
  os.mkfifo(tmp_path / name)
  with pytest.raises(OSError, match="it is not a regular file"):
    opened(tmp_path / name)


@pytest.mark.parametrize("odd", ["./c/x.png", "c//x.png", ".//c/./x.png"])
def test_names_in_archives_are_those_of_a_folder(tmp_path, odd):
  files = {"a/1.png": encoded(noise()), "b/1.png": encoded(noise()), odd: encoded(noise())}
  dataset = opened(zipped(tmp_path / "d.zip", files))
  assert (dataset.class_names, [*dataset.records.names]) == (["a", "b", "c"], ["a/1.png", "b/1.png", "c/x.png"])
  np.testing.assert_array_equal(dataset.example(2)[0], np.asarray(decode.decode(files[odd])))
  described = json.dumps({"labels": [["a/1.png", 2], ["b/1.png", 1], [odd, 0]]}).encode()
  labelled = opened(zipped(tmp_path / "l.zip", files | {"dataset.json": described}))
  assert [labelled.example(row)[1] for row in range(3)] == [2, 1, 0]
  with pytest.raises(ValueError, match=r"c/x\.png: the archive has it twice"):
    opened(zipped(tmp_path / "d.zip", files | {"c/x.png": encoded(noise())}))


LABELS = [["0.png", 0], ["1.png", 1], ["2.png", 1]]


@pytest.mark.parametrize("kind", ["folder", "archive"])
@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (json.dumps({"labels": [*LABELS, ["1.png", 2]]}), r"1\.png has two labels, 1 and 2"),
    ('{"labels": {"0.png": 0, "1.png": 1, "2.png": 1, "1.png": 0}}', r"it has '1\.png' twice"),
    ('{"labels": null, "labels": [["0.png", 0], ["1.png", 0], ["2.png", 0]]}', "it has 'labels' twice"),
    ('{"labels": ' + "[" * 100_000 + "]" * 100_000 + "}", "it is nested too deeply"),
    ('{"labels": ' + '{"a":' * 100_000, "it is nested too deeply"),
    (json.dumps({"labels": [*LABELS, [5, 2]]}), "5 is not the name of a picture"),
    (json.dumps({"labels": [*LABELS, [["a"], 2]]}), r"\['a'\] is not the name of a picture"),
    (json.dumps({"labels": [*LABELS, ["./1.png", 2]]}), r"1\.png has two labels, 1 and 2"),
    (json.dumps({"labels": LABELS[:2]}), r"2\.png has no label"),
    (b"\xff\xfe\xfd", "codec can't decode"),
  ],
)
def test_labels_that_are_damaged_name_their_file(tmp_path, kind, content, reason):
  files = {name: encoded(noise()) for name, _ in LABELS}
  files["dataset.json"] = content if isinstance(content, bytes) else content.encode()
  source = write(tmp_path / "d", files) if kind == "folder" else zipped(tmp_path / "d.zip", files)
  with pytest.raises(ValueError, match=rf"{source.name}: dataset\.json is not a valid list of labels \(.*{reason}"):
    opened(source)


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_labels_of_pictures_that_are_missing_are_counted(tmp_path, kind):
  described = json.dumps({"labels": [*LABELS, ["gone.png", 1], ["0.png", 0]]}).encode()
  files = {name: encoded(noise()) for name, _ in LABELS} | {"dataset.json": described}
  source = write(tmp_path / "d", files) if kind == "folder" else zipped(tmp_path / "d.zip", files)
  with pytest.raises(
    ValueError, match=r"1 of 4 files .*\n  gone\.png: dataset\.json names it, and there is no such pict"
  ):
    opened(source)
  with pytest.warns(UserWarning, match=r"1 of 4 files .* are left out"):
    dataset = opened(source, skip_bad=True)
  assert [dataset.example(row)[1] for row in range(len(dataset))] == [0, 1, 1]


def test_a_class_of_files_that_are_not_read_is_not_left_out(tmp_path):
  path = tmp_path / "d.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name in ("a/1.png", "a/2.png"):
      archive.writestr(name, encoded(noise()))
    archive.writestr("b/bomb.png", b"\0" * 10_000_000)
  with pytest.raises(ValueError, match=r"no picture would be left of the classes b:\n  b/bomb\.png: it would have"):
    opened(path, skip_bad=True)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nothing")])
def test_labels_that_are_no_regular_file_are_refused(tmp_path, make):
  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.png": encoded(noise())})
  make(folder / "dataset.json")
  with pytest.raises(ValueError, match=r"dataset\.json is not a regular file: give the labels in one, or remove it"):
    opened(folder)
  assert opened(folder, labels="none").num_classes is None


def test_damaged_labels_in_an_archive_name_it(tmp_path):
  path = tmp_path / "d.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("dataset.json", json.dumps({"labels": LABELS}))
    for name, _ in LABELS:
      archive.writestr(name, encoded(noise()))
  content = path.read_bytes()
  start = 30 + len("dataset.json")
  path.write_bytes(content[:start] + b"\xff" * 6 + content[start + 6 :])
  with pytest.raises(ValueError, match=r"d\.zip is not a valid zip file \(Error -3 while decompressing"):
    opened(path)


# --- parts of datasets ------------------------------------------------------------------------------


def test_a_cache_keeps_what_is_known_of_the_files(tmp_path):
  folder = write(tmp_path / "d", {f"{'ab'[i % 2]}/{i}.png": encoded(noise()) for i in range(30)})
  lazy, kept = opened(folder), opened(folder, cache=True)
  assert kept.fingerprint == lazy.fingerprint
  np.testing.assert_array_equal(kept.stamps, lazy.stamps)
  for part, of_kept in zip(data.split(lazy, 0.3), data.split(kept, 0.3), strict=True):
    assert isinstance(of_kept, data.Images)
    assert [part.example_name(i) for i in range(len(part))] == [of_kept.example_name(i) for i in range(len(of_kept))]
    assert part.fingerprint == of_kept.fingerprint != lazy.fingerprint
    for row in range(len(part)):
      np.testing.assert_array_equal(part.example(row)[0], of_kept.example(row)[0])
  write(folder, {"a/new.png": encoded(noise())})
  assert data.grown(kept.stamps, opened(folder, cache=True)) == 1


class Squares(data.Dataset):
  """A dataset of one's own."""

  name, image_shape, num_classes, class_names, label_shape = "squares", (1, 1, 1), 5, None, ()
  fingerprint, saturation = "0", None

  def __len__(self):
    return 50

  def example(self, row, rng):
    return np.full((1, 1, 1), row, np.uint8), row % 5

  def example_name(self, row):
    return f"square {row}"


class Own(data.Dataset):
  """A dataset of one's own, of which one part is replaced."""

  name, image_shape, num_classes, class_names, label_shape = "own", (8, 8, 1), 3, None, ()
  fingerprint, saturation = "0", None

  def __init__(self, example=None, label=None, **parts):
    self.made = example or (lambda row: np.zeros((8, 8, 1), np.uint8))
    self.label = label or (lambda row: row % 3)
    self.__dict__.update(parts)

  def __len__(self):
    return 16

  def example(self, row, rng):
    return self.made(row), self.label(row)

  def example_name(self, row):
    return f"own {row}"


VECTORS = {"num_classes": None, "label_shape": (2,)}

UNLABELLED = {"num_classes": None, "label_shape": None}


@pytest.mark.parametrize("batch_size", [16, 13])
@pytest.mark.parametrize(
  ("label", "expected", "parts"),
  [
    *((label, "a whole number from 0 to 2", {}) for label in (-1, 3, 1.7, float("nan"), "1", 2**40, 10**30, None)),
    *((label, "a whole number from 0 to 2", {}) for label in (np.zeros(2), np.array([1]), [1], 1.0)),
    *((label, r"an array of finite numbers of shape \(2,\)", VECTORS) for label in ([1], [1, 2, 3], 1, None, "12")),
    *((label, r"an array of finite numbers", VECTORS) for label in ([1, np.nan], np.array([1e300, 0]), [[1, 2]])),
    *((label, "None, because the dataset has neither", UNLABELLED) for label in (0, "a", [1.0])),
  ],
)
def test_a_wrong_label_of_ones_own_dataset_is_named(label, expected, parts, batch_size):
  good = {"a whole number from 0 to 2": 0, "None, because the dataset has neither": None}.get(expected, (0, 0.5))
  dataset = Own(label=lambda row: label if row == 5 else good, **parts)
  with pytest.raises(ValueError, match=rf"own 5 has the label .*, expected {expected}"):
    list(itertools.islice(data.stream(dataset, batch_size, 0), 2))


@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize(
  ("example", "got"),
  [
    (np.zeros((8, 8, 1), np.int64), "int64 of shape"),
    (np.zeros((8, 8, 1)), "float64 of shape"),
    (np.zeros((8, 8, 1), np.float16), "float16 of shape"),
    (np.zeros((8, 8, 1), bool), "bool of shape"),
    (np.zeros((8, 8, 1), object), "object of shape"),
    (np.zeros((8, 1, 1), np.uint8), r"uint8 of shape \(8, 1, 1\)"),
    (np.zeros((8, 8), np.uint8), r"uint8 of shape \(8, 8\)"),
    (np.zeros((8, 8, 3), np.float32), r"float32 of shape \(8, 8, 3\)"),
    ([[[0]] * 8] * 8, "list"),
    (None, "NoneType"),
  ],
)
def test_a_wrong_example_of_ones_own_dataset_is_named(example, got, rows):
  dataset = Own(lambda row: example if rows == "all" or row == 5 else np.zeros((8, 8, 1), np.uint8))
  name = "5" if rows == "one" else r"\d+"
  with pytest.raises(
    ValueError, match=rf"own {name} is {got}.*, expected an array of uint8 or float32 of shape \(8, 8, 1"
  ):
    next(data.stream(dataset, 16, 0))


@pytest.mark.parametrize("batch_size", [16, 13])
def test_examples_of_ones_own_dataset_have_one_type_and_are_finite(batch_size):
  def example(row, value=0.0):
    return np.full((8, 8, 1), value if row == 5 else 0, np.float32)

  mixed = Own(lambda row: example(row) if row == 5 else np.zeros((8, 8, 1), np.uint8))
  with pytest.raises(ValueError, match=r"is (float32|uint8) and .* is (float32|uint8): make them one type"):
    list(itertools.islice(data.stream(mixed, batch_size, 0), 2))
  for value in (np.nan, np.inf):
    dataset = Own(functools.partial(example, value=value))
    with pytest.raises(ValueError, match="own 5 has values that are not finite"):
      list(itertools.islice(data.stream(dataset, batch_size, 0), 2))


@pytest.mark.parametrize(
  ("label", "dtype", "parts"),
  [
    (lambda row: row % 3, np.int32, {}),
    (lambda row: (np.int64, np.uint64)[row % 2](row % 3), np.int32, {}),
    (lambda row: np.array(row % 3), np.int32, {}),
    (lambda row: row % 2 == 0, np.int32, {}),
    (lambda row: (row, 0.5), np.float32, VECTORS),
    (lambda row: np.array([row, 1]), np.float32, VECTORS),
    (lambda row: None, None, UNLABELLED),
  ],
)
def test_labels_of_ones_own_dataset(label, dtype, parts):
  batch = next(data.stream(Own(label=label, **parts), 16, 0))
  if dtype is None:
    assert batch.labels is None
  else:
    np.testing.assert_array_equal(batch.labels, [np.asarray(label(row), dtype) for row in batch.rows])
    assert batch.labels.dtype == dtype


def test_a_dataset_of_ones_own_is_split():
  parts = data.split(Squares(), 0.3)
  rows = [[part.example(i, RNG)[0].item() for i in range(len(part))] for part in parts]
  assert sorted(rows[0] + rows[1]) == list(range(50))
  assert 5 < len(parts[1]) < 25
  assert [part.example_name(0) for part in parts] == [f"square {each[0]}" for each in rows]
  assert len({part.fingerprint for part in (*parts, Squares())}) == 3
  assert parts[0].num_classes == 5
  batch = next(data.stream(parts[1], 8, 0))
  np.testing.assert_array_equal(batch.examples[:, 0, 0, 0] % 5, batch.labels)


# --- the end ----------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
from jaxguide import data

if __name__ == "__main__":
  dataset = data.open_data(data.DataConfig(sys.argv[1]), progress=False)
  threads, processes = data.stream(dataset, 4, 0), data.stream(dataset, 4, 0, processes=1)
  kept = next(processes)
  assert (kept.rows == next(threads).rows).all()
  for number in (signal.SIGINT, signal.SIGTERM):  # As a terminal and a cluster send them, to all processes.
    signal.signal(number, lambda *_: None)
    os.killpg(0, number)
  for _ in range(30):
    kept = next(processes)
    assert (kept.rows == next(threads).rows).all()
"""


def test_processes_survive_signals_and_end_with_the_program(tmp_path):
  """Without errors of Grain's processes, although the iterators and a batch are in use at the end."""
  folder = write(tmp_path / "d", {f"{i}.png": encoded(noise()) for i in range(9)})
  (tmp_path / "program.py").write_text(PROGRAM)
  run = [sys.executable, str(tmp_path / "program.py"), str(folder)]
  ended = subprocess.run(run, check=False, capture_output=True, text=True, timeout=300, start_new_session=True)
  assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_batches_can_be_closed(tmp_path):
  folder = write(tmp_path / "d", {f"{i}.png": encoded(noise()) for i in range(9)})
  stream = data.stream(opened(folder), 4, 0)
  before = {*threading.enumerate()}
  next(stream)
  started = {*threading.enumerate()} - before
  assert started
  stream.close()
  stream.close()
  assert next(stream, None) is None
  for thread in started:
    thread.join(60)
    assert not thread.is_alive()
