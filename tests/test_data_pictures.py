"""Folders and archives of pictures, as messy as people's are: what is read, resized, refused and left out."""

import io
import json
import os
import struct
import zipfile
import zlib
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from jaxguide import data, training
from jaxguide.data import config as data_config
from jaxguide.data import decode, resize
from jaxguide.data.records import BadRecord
from jaxguide.data.sources import folder as data_folder

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """The results of checks are kept in a folder of the test."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(array, ending="png", **options):
  file = io.BytesIO()
  picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
  picture.save(file, {"jpg": "JPEG"}.get(ending, ending.upper()), **options)
  return file.getvalue()


def noise(height=8, width=8, channels=3):
  return RNG.integers(0, 256, (height, width, channels) if channels > 1 else (height, width)).astype(np.uint8)


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return folder


def opened(source, **options):
  return data.open_data(data.DataConfig(source, **options), progress=False)


# --- decoding -------------------------------------------------------------------------------------


def pixels(content, mode="RGB", **options):
  return np.asarray(decode.decode(content, **options).convert(mode))


@pytest.mark.parametrize("ending", ["png", "webp", "bmp", "tiff"])
def test_lossless_formats(ending):
  array = noise()
  np.testing.assert_array_equal(pixels(encoded(array, ending, **{"webp": {"lossless": True}}.get(ending, {}))), array)


def test_jpeg_and_the_first_frame_of_a_gif():
  ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (1, 64, 3))
  assert abs(pixels(encoded(ramp, "jpg", quality=95)).astype(int) - ramp).max() < 6
  frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (10, 200)]
  content = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
  assert (pixels(content) == 10).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparent_pixels_show_the_background(mode):
  """Left half transparent, right half black: the left half has the background's colour."""
  array = np.zeros((4, 8, 4), np.uint8)
  array[:, 4:, 3] = 255
  picture = Image.fromarray(array)
  if mode in ("P", "PA"):
    plain = Image.new("P", (8, 4), 0)
    plain.putpalette([255, 0, 0, 0, 0, 0])
    plain.paste(1, (4, 0, 8, 4))
    content = encoded(plain, "png", transparency=0)
  else:
    content = encoded(picture.convert(mode), "png")
  result = pixels(content, background=(10, 200, 30))
  assert (result[:, 4:] == 0).all()
  assert (result[:, :4] == (10, 200, 30)).all()


def test_half_transparent_pixels_are_mixed():
  array = np.zeros((1, 1, 4), np.uint8)
  array[..., 3] = 128
  assert abs(int(pixels(encoded(array), background=(255, 255, 255))[0, 0, 0]) - 127) <= 1


def test_cmyk_is_converted():
  cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # Red.
  red = pixels(encoded(cmyk, "jpg", quality=95))
  assert red[..., 0].min() > 240
  assert red[..., 1:].max() < 15


def test_sixteen_bits_become_eight():
  array = np.array([[0, 257, 32896, 65535]], np.uint16)
  assert pixels(encoded(array), "L").tolist() == [[0, 1, 128, 255]]


def test_one_bit():
  assert pixels(encoded(Image.fromarray(np.array([[True, False]]))), "L").tolist() == [[255, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
  """Each of the eight orientations of the same upright picture, against NumPy."""
  upright = np.zeros((16, 24, 3), np.uint8)
  upright[:8, :8] = 255
  stored = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: np.rot90,
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
  }[orientation](upright)
  exif = Image.Exif()
  exif[0x0112] = orientation
  result = pixels(encoded(np.ascontiguousarray(stored), "jpg", exif=exif, quality=98))
  assert result.shape == upright.shape
  assert abs(result.astype(int) - upright).max() < 20


def bomb(width=60_000, height=60_000):
  """A PNG of a few bytes whose header states billions of pixels."""

  def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  body = zlib.compress(b"\0" * 100)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


BAD = {
  "empty.png": (b"", "it is empty"),
  "text.jpg": (b"this is a text\n" * 9, "it is not a picture of the formats JPEG, PNG, WEBP, GIF, BMP, TIFF"),
  "truncated.jpg": (encoded(noise(64, 64), "jpg")[:900], "it is damaged"),
  "truncated.png": (encoded(noise(64, 64))[:900], "it is damaged"),
  "bomb.png": (bomb(), "it has far too many pixels; a picture may have at most 67,108,864"),
  "large.png": (bomb(10_000, 7_000), "it has 10000x7000 pixels; a picture may have at most"),
  "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is not a picture"),
  "floats.tiff": (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "tiff"), "neither 8-bit nor 16-bit"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture(name):
  content, reason = BAD[name]
  with pytest.raises(BadRecord, match=reason.replace("(", r"\(")):
    decode.decode(content)


# --- resizing ---------------------------------------------------------------------------------------


def adm_center(array, size):
  """The resizing of guided-diffusion, written anew: halve by box means, then bicubic, then the middle."""
  while min(array.shape[:2]) >= 2 * size:
    height, width = array.shape[0] // 2, array.shape[1] // 2
    array = np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BOX))
  scale = size / min(array.shape[:2])
  shape = (round(array.shape[1] * scale), round(array.shape[0] * scale))
  array = np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.BICUBIC))
  top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
  return array[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(8, 8), (16, 16), (17, 40), (100, 33), (5, 9), (8, 13)])
def test_the_centre_crop_of_guided_diffusion(tmp_path, shape):
  array = noise(*shape)
  folder = write(tmp_path / "d", {"a.png": encoded(array)})
  example, label = opened(folder, size=8).example(0)
  np.testing.assert_array_equal(example, adm_center(array, 8))
  assert label is None


@pytest.mark.parametrize(
  ("crop", "filter_name", "check"),
  [
    ("squash", "box", lambda x, a: np.testing.assert_allclose(x, a.reshape(4, 2, 4, 4, 3).mean((1, 3)), atol=1.01)),
    ("center", "nearest", lambda x, a: {*map(tuple, x.reshape(-1, 3))} <= {*map(tuple, a.reshape(-1, 3))}),
    ("center", "lanczos", lambda x, a: x.std() > 0),
  ],
)
def test_named_filters_and_crops(tmp_path, crop, filter_name, check):
  array = noise(8, 16)
  folder = write(tmp_path / "d", {"a.png": encoded(array)})
  example, _ = opened(folder, size=4, crop=crop, filter=filter_name).example(0)
  assert example.shape == (4, 4, 3)
  assert check(example.astype(float), array.astype(float)) in (None, True)


def test_random_crops_and_flips_depend_on_the_seed_and_the_position_alone(tmp_path):
  ramp = np.arange(20 * 20, dtype=np.uint16).reshape(20, 20).astype(np.uint8)
  folder = write(tmp_path / "d", {f"{i}.png": encoded(ramp) for i in range(3)})
  dataset = opened(folder, size=8, crop="random", filter="bilinear", flip=True, channels=1)
  one, again, other = (
    np.concatenate([batch.examples for batch in islice(data.stream(dataset, 4, seed, workers=workers), 3)])
    for seed, workers in ((1, 1), (1, 5), (2, 5))
  )
  np.testing.assert_array_equal(one, again)
  assert not np.array_equal(one, other)
  assert len({example.tobytes() for example in one}) > 6


def test_half_of_the_pictures_are_mirrored(tmp_path):
  array = noise()
  dataset = opened(write(tmp_path / "d", {"a.png": encoded(array)}), flip=True)
  examples = np.concatenate([batch.examples for batch in islice(data.stream(dataset, 50, 0), 2)])
  mirrored = [np.array_equal(example, array[:, ::-1]) for example in examples]
  assert all(flag or np.array_equal(example, array) for flag, example in zip(mirrored, examples, strict=True))
  assert 30 < sum(mirrored) < 70


# --- folders ----------------------------------------------------------------------------------------


def test_sub_folders_are_classes(tmp_path):
  folder = write(
    tmp_path / "d",
    {
      "cat/1.png": encoded(noise()),
      "cat/deeper/2.JPG": encoded(noise(), "jpg"),
      "été/1.webp": encoded(noise(), "webp"),
      ".DS_Store": b"x",
      ".hidden/1.png": encoded(noise()),
      "__MACOSX/cat/1.png": b"x",
      "cat/.DS_Store": b"x",
      "cat/Thumbs.db": b"x",
    },
  )
  dataset = opened(folder)
  assert (dataset.class_names, dataset.num_classes, len(dataset)) == (["cat", "été"], 2, 3)
  assert dataset.image_shape == (8, 8, 3)
  assert [dataset.example(row)[1] for row in range(3)] == [0, 0, 1]
  assert dataset.example_name(1) == f"{folder}: cat/deeper/2.JPG"
  alone = opened(folder, labels="none")
  assert (alone.num_classes, alone.label_shape) == (None, None)


def test_files_that_are_no_pictures_and_folders_without_pictures_are_said(tmp_path):
  folder = write(tmp_path / "d", {"cat/1.png": encoded(noise()), "cat/notes.txt": b"x", "empty/notes.md": b"x"})
  with pytest.warns(UserWarning, match=r"2 files that are no pictures and are left out: cat/notes.txt, empty/notes.md"):
    dataset = opened(folder)
  with pytest.warns(UserWarning, match="folders without pictures, which are no classes: empty"):
    opened(folder)
  assert dataset.class_names == ["cat"]


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"a.txt": b"x"}, "contains no pictures; their names end in .jpg"),
    ({"1.png": encoded(noise()), "cat/1.png": encoded(noise())}, "pictures beside folders of pictures, such as 1.png"),
  ],
)
@pytest.mark.filterwarnings("ignore:.*no pictures and are left out")
def test_folders_that_are_refused(tmp_path, files, message):
  with pytest.raises(ValueError, match=message):
    opened(write(tmp_path / "d", files))


def messy(tmp_path):
  files = {f"{'ab'[i % 2]}/{i}.png": encoded(noise()) for i in range(12)}
  folder = write(tmp_path / "d", files | {f"a/{name}": content for name, (content, _) in BAD.items()})
  write(tmp_path, {"outside.png": encoded(noise())})
  (folder / "b" / "link.png").symlink_to(tmp_path / "outside.png")
  (folder / "b" / "inside.png").symlink_to(folder / "b" / "1.png")
  (folder / "b" / "dangling.png").symlink_to(folder / "nothing.png")
  os.mkfifo(folder / "b" / "pipe.png")
  return folder


def test_bad_files_are_named_before_anything_else(tmp_path):
  with pytest.raises(ValueError, match=r"11 of 24 files of .*d cannot be used:\n  a/bomb.png: it has far") as error:
    opened(messy(tmp_path))
  assert "and 6 more" in str(error.value)
  assert "skip_bad" in str(error.value)


@pytest.mark.parametrize("name", BAD)
def test_a_first_file_that_is_bad_does_not_hide_the_others(tmp_path, name):
  """Without a check, as a recipe opens the data to choose its preset."""
  folder = write(tmp_path / "d", {f"0{name}": BAD[name][0], "1.png": encoded(noise()), "2.png": encoded(noise())})
  assert training.recipe({"data": {"source": str(folder)}}).source is not None
  assert opened(folder, check="none").image_shape == (8, 8, 3)
  with pytest.raises(ValueError, match=rf"1 of 3 files of .*\n  0{name}: "):
    opened(folder)
  for number in (1, 2):
    (folder / f"{number}.png").write_bytes(b"x")
  with pytest.raises(ValueError, match=rf"none of the 3 files of .*d can be used, such as 0{name}: its? "):
    opened(folder, check="none")


def test_bad_files_are_left_out_and_counted(tmp_path):
  folder = messy(tmp_path)
  with pytest.warns(UserWarning, match="11 of 24 files of .* are left out"):
    dataset = opened(folder, skip_bad=True)
  assert len(dataset) == 13
  names = [dataset.example_name(row).rpartition("/")[2] for row in range(13)]
  assert "inside.png" in names
  assert not {"link.png", "dangling.png", "pipe.png", *BAD} & {*names}
  for batch in islice(data.stream(dataset, 4, 0), 5):
    assert batch.examples.shape == (4, 8, 8, 3)


def test_the_check_is_made_once(tmp_path, monkeypatch):
  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.png": b"x"})
  for _ in range(2):
    with pytest.raises(ValueError, match="1 of 2 files"):
      opened(folder)
    monkeypatch.setattr(data_config.prepared, "check", None)  # A second check would fail.
  monkeypatch.undo()


def damaged_in_a_zip(path, folder):
  """Other bytes where the list of contents says that a picture is, so that its stamp stays."""
  content = path.read_bytes()
  path.write_bytes(content[:60] + bytes(20) + content[80:])


def encrypted_in_a_zip(path, folder):
  content = path.read_bytes()
  entry = content.index(b"PK\1\2")
  path.write_bytes(content[: entry + 8] + b"\1\0" + content[entry + 10 :])


def replaced_by_a_link(path, folder):
  """A link out of the folder to a file of the same size and time."""
  picture = path / "0.png"
  picture.rename(folder / "outside.png")
  picture.symlink_to(folder / "outside.png")


def damaged_in_place(path, folder):
  picture = path / "0.png"
  status, content = picture.stat(), picture.read_bytes()
  picture.write_bytes(bytes(len(content)))
  os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (damaged_in_a_zip, "it cannot be read from the archive"),
    (encrypted_in_a_zip, "it is encrypted"),
    (replaced_by_a_link, "it is a link out of the folder"),
    (damaged_in_place, "it is not a picture"),
  ],
)
@pytest.mark.filterwarnings("ignore:.*are left out")
def test_the_check_is_made_again_for_files_that_changed(tmp_path, change, reason):
  files = {f"{number}.png": encoded(noise()) for number in range(3)}
  path = archive(tmp_path / "d.zip", files) if "zip" in change.__name__ else write(tmp_path / "d", files)
  before = opened(path)
  change(path, tmp_path)
  if change is not replaced_by_a_link:
    np.testing.assert_array_equal(opened(path, check="none", skip_bad=True).records.stamps, before.stamps)
  with pytest.raises(ValueError, match=rf"1 of 3 files of .*\n  0.png: {reason}"):
    opened(path)


def test_a_link_that_leads_elsewhere_now_is_checked_again(tmp_path):
  """To the same file by another way, which was out of the folder."""
  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.png": encoded(noise())})
  outside = write(tmp_path, {"outside/3.png": encoded(noise())}) / "outside"
  (folder / "link.png").symlink_to(outside / "3.png")
  with pytest.raises(ValueError, match=r"1 of 3 files .*\n  link.png: it is a link out of the folder"):
    opened(folder)
  outside.rename(folder / "inside")
  (folder / "link.png").unlink()
  (folder / "link.png").symlink_to(folder / "inside" / "3.png")
  assert len(opened(folder, labels="none")) == 4


@pytest.mark.parametrize(("first", "then"), [({"crop": "squash"}, {}), ({}, {"crop": "squash"})])
def test_the_check_is_made_again_for_another_crop(tmp_path, monkeypatch, first, then):
  monkeypatch.setattr(resize, "LARGEST", 10_000)
  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.png": encoded(noise(1, 300))})
  for options in (first, then):
    if options:
      assert len(opened(folder, size=8, **options)) == 2
    else:
      with pytest.raises(ValueError, match=r"2.png: it has 300x1 pixels: one side is so much longer"):
        opened(folder, size=8)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_could_not_be_read_is_checked_again(tmp_path, monkeypatch, error):
  def refused(*_, **__):
    raise error

  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.png": encoded(noise())})
  with monkeypatch.context() as patch:
    patch.setattr(data_folder, "open", refused, raising=False)
    with pytest.raises(ValueError, match=rf"2 of 2 files.*\n  1.png: it cannot be read \({error.strerror}"):
      opened(folder)
  assert len(opened(folder)) == 2


def test_a_file_for_which_there_was_no_memory_is_checked_again(tmp_path, monkeypatch):
  def full(*_):
    raise MemoryError

  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.png": encoded(noise())})
  with monkeypatch.context() as patch:
    patch.setattr(decode, "to_mode", full)
    with pytest.raises(ValueError, match=r"2 of 2 files.*\n  1.png: there is not enough memory to decode it"):
      opened(folder)
  assert len(opened(folder)) == 2


@pytest.mark.parametrize("kind", ["folder", "archive", "json"])
def test_a_class_of_bad_files_alone_is_not_left_out(tmp_path, kind):
  files = {"a/1.png": encoded(noise()), "b/1.png": b"x", "b/2.png": b"x", "c/1.png": encoded(noise())}
  files |= {"c/2.png": encoded(noise())}
  if kind == "json":
    files["dataset.json"] = json.dumps({"labels": [[name, "abc".index(name[0])] for name in files]}).encode()
  source = archive(tmp_path / "d.zip", files) if kind == "archive" else write(tmp_path / "d", files)
  name = 1 if kind == "json" else "b"
  lost = rf"2 of 5 files .*no picture would be left of the classes {name}:\n  b/1.png: it is not"
  with pytest.raises(ValueError, match=lost):
    opened(source, skip_bad=True)
  assert opened(source, check="none").num_classes == 3
  without = opened(source, skip_bad=True, labels="none") if kind != "json" else None
  assert without is None or len(without) == 3


@pytest.mark.parametrize(("good", "bad"), [(1, 2), (3, 4), (0, 2)])
def test_most_of_the_files_are_not_left_out(tmp_path, good, bad):
  files = {f"{number}.png": b"x" for number in range(bad)} | {f"good{i}.png": encoded(noise()) for i in range(good)}
  folder = write(tmp_path / "d", files)
  with pytest.raises(ValueError, match=rf"{bad} of {good + bad} files .* at most half of them:\n  0.png: it is not a"):
    opened(folder, skip_bad=True)
  write(folder, {f"more{number}.png": encoded(noise()) for number in range(bad - good)})
  with pytest.warns(UserWarning, match=f"{bad} of {2 * bad} files .* are left out"):
    assert len(opened(folder, skip_bad=True)) == bad


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("others", [{}, {"0.png": b"x"}])
def test_pictures_of_several_sizes_need_a_size(tmp_path, skip_bad, others):
  """A picture of another size is no bad file."""
  sizes = {"1.png": (8, 8), "2.png": (8, 8), "3.png": (4, 6), "4.png": (5, 5)}
  folder = write(tmp_path / "d", {name: encoded(noise(*size)) for name, size in sizes.items()} | others)
  message = r"have 3 sizes: 1.png has 8x8 pixels and 3.png has 6x4. Give the side to which .*: size \(--size\)"
  with pytest.raises(ValueError, match=message):
    opened(folder, skip_bad=skip_bad)
  if not others:
    assert len(opened(folder, size=4, skip_bad=skip_bad)) == 4
    with pytest.raises(ValueError, match=r"3.png has shape \(4, 6, 3\), expected \(8, 8, 3\): give size \(--size\)"):
      opened(folder, skip_bad=skip_bad, check="none").example(2)


def test_a_file_that_breaks_later_is_named(tmp_path):
  folder = write(tmp_path / "d", {"1.png": encoded(noise())})
  dataset = opened(folder)
  (folder / "1.png").write_bytes(b"x")
  with pytest.raises(ValueError, match=r"d: 1.png cannot be used: it is not a picture"):
    dataset.example(0)


def test_grey_and_rgb(tmp_path):
  folder = write(tmp_path / "d", {"1.png": encoded(noise(channels=1)), "2.png": encoded(noise())})
  assert opened(folder).image_shape == (8, 8, 3)
  grey = opened(folder, channels=1)
  assert grey.image_shape == (8, 8, 1)
  assert grey.example(1)[0].shape == (8, 8, 1)


def test_pictures_kept_in_memory_are_the_same(tmp_path):
  folder = write(tmp_path / "d", {f"{'ab'[i % 2]}/{i}.png": encoded(noise(9, 11)) for i in range(6)})
  lazy, kept = opened(folder, size=8), opened(folder, size=8, cache=True)
  assert isinstance(kept, data.Images)
  for one, other in zip(islice(data.stream(lazy, 4, 0), 3), data.stream(kept, 4, 0), strict=False):
    for a, b in zip(one, other, strict=True):
      np.testing.assert_array_equal(a, b)
  with pytest.raises(ValueError, match="cache keeps decoded pictures"):
    opened(folder, size=8, cache=True, flip=True)


def test_a_cache_that_does_not_fit(tmp_path, monkeypatch):
  folder = write(tmp_path / "d", {"1.png": encoded(noise())})
  monkeypatch.setattr(data_config.prepared.devices, "free_host_bytes", lambda: 100)
  with pytest.raises(ValueError, match=r"cache needs 0\.0 GB for 1 pictures"):
    opened(folder, cache=True)


# --- archives ---------------------------------------------------------------------------------------


def archive(path, files):
  with zipfile.ZipFile(path, "w") as file:
    for name, content in files.items():
      file.writestr(name, content)
  return path


@pytest.mark.parametrize("start", ["", "photos/", "a/b/"])
def test_an_archive_is_a_folder(tmp_path, start):
  files = {"cat/1.png": encoded(noise()), "dog/1.png": encoded(noise()), "dog/2.png": encoded(noise())}
  path = archive(tmp_path / "d.zip", {start + name: content for name, content in files.items()} | {"__MACOSX/x": b"1"})
  zipped, folder = opened(path), opened(write(tmp_path / "d", files))
  assert zipped.class_names == folder.class_names == ["cat", "dog"]
  for row in range(3):
    np.testing.assert_array_equal(zipped.example(row)[0], folder.example(row)[0])
  assert next(data.stream(zipped, 3, 0, workers=3)).labels.sum() == 2


def test_an_archive_of_pictures_alone_has_no_classes(tmp_path):
  assert opened(archive(tmp_path / "d.zip", {"photos/1.png": encoded(noise())})).num_classes is None


def test_a_dataset_of_edm(tmp_path):
  files = {f"00000/img{i}.png": encoded(noise()) for i in range(3)}
  labels = [["00000/img0.png", 4], ["00000/img1.png", 0], ["00000/img2.png", 2]]
  path = archive(tmp_path / "edm.zip", {**files, "dataset.json": json.dumps({"labels": labels})})
  dataset = opened(path)
  assert (dataset.num_classes, dataset.class_names) == (5, None)
  assert [dataset.example(row)[1] for row in range(3)] == [4, 0, 2]
  vectors = [[name, [0.5, label]] for name, label in labels]
  attributes = opened(archive(tmp_path / "v.zip", {**files, "dataset.json": json.dumps({"labels": vectors})}))
  assert (attributes.num_classes, attributes.label_shape) == (None, (2,))
  np.testing.assert_allclose(attributes.example(0)[1], [0.5, 4])
  none = opened(archive(tmp_path / "n.zip", {**files, "dataset.json": json.dumps({"labels": None})}))
  assert none.label_shape is None


@pytest.mark.parametrize(
  "content", ['{"labels": [["00000/img0.png", 4]]}', "{}", "[]", '{"labels": [["00000/img0.png", "x"]]}', "{"]
)
def test_a_dataset_of_edm_with_wrong_labels(tmp_path, content):
  files = {f"00000/img{i}.png": encoded(noise()) for i in range(2)}
  with pytest.raises(ValueError, match=r"dataset.json is not a valid list of labels"):
    opened(archive(tmp_path / "edm.zip", {**files, "dataset.json": content}))


def test_hostile_archives(tmp_path):
  path = tmp_path / "d.zip"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
    file.writestr("a/1.png", encoded(noise()))
    file.writestr("a/../../2.png", encoded(noise()))
    file.writestr("a/bomb.png", b"\0" * 10_000_000)
  with pytest.raises(ValueError, match=r"(?s)2 of 3 files.*its path leads out of the archive.*would have 10,000,000"):
    opened(path)
  path.write_bytes(b"PK\3\4 nothing")
  with pytest.raises(ValueError, match="is not a valid zip file"):
    opened(path)


# --- configuration, split and fingerprint -------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"size": 0}, "size must be a whole number from 1"),
    ({"channels": 2}, "channels must be 1 for grey or 3 for RGB"),
    ({"channels": 4}, "channels must be a whole number from 1 to 3"),
    ({"crop": "centre"}, "did you mean 'center'"),
    ({"filter": "cubic"}, "unknown filter 'cubic': did you mean 'bicubic'"),
    ({"background": "octarine"}, "background must be a colour such as white"),
    *(({"background": name}, "which is transparent itself") for name in ("#ff000080", "#f008", "rgba(1,2,3,0)")),
    *(({"background": name}, "not all from 0 to 255") for name in ("rgb(300,0,0)", "rgb(0,0,256)", "rgb(101%,0%,0%)")),
    ({"held_out": 1.0}, "held_out must be below 1"),
    ({"workers": 0}, "workers must be"),
    ({"check": "some"}, "unknown check 'some'"),
    ({"crop": "random"}, "crop 'random' needs the side of the square: give size"),
  ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    opened(write(tmp_path / "d", {"1.png": encoded(noise())}), **options)


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("nowhere", "there is no file or folder nowhere: give a folder of pictures"),
    ("digit", "did you mean 'digits'"),
    ("x.rar", "there is no file or folder"),
    (__file__, "is not a file of data; their names end in .zip, .npz"),
  ],
)
def test_sources_that_do_not_exist(source, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    opened(source)


def test_the_digits_in_another_size_and_mirrored():
  digits = opened("digits", size=16, flip=True)
  assert (digits.image_shape, digits.num_classes, digits.class_names[7]) == ((16, 16, 1), 10, "7")
  assert opened("digits", channels=3).image_shape == (8, 8, 3)


def test_a_split_stays_when_files_are_added(tmp_path):
  folder = write(tmp_path / "d", {f"{i}.png": encoded(noise()) for i in range(40)})
  train, held_out = data.split(opened(folder), 0.25)
  write(folder, {f"0{i}.png": encoded(noise()) for i in range(20)})
  more_train, more_held_out = data.split(opened(folder), 0.25)
  names = [{dataset.example_name(row) for row in range(len(dataset))} for dataset in (train, held_out)]
  more = [{dataset.example_name(row) for row in range(len(dataset))} for dataset in (more_train, more_held_out)]
  assert names[0] < more[0]
  assert names[1] <= more[1]
  assert not more[0] & more[1]
  assert len(more[0] | more[1]) == 60
  with pytest.raises(ValueError, match="none would be held out with held_out=1e-09"):
    data.split(train, 1e-9)


def test_the_fingerprint_sees_other_files_and_another_preparation(tmp_path):
  content = encoded(noise())
  folder = write(tmp_path / "d", {"a/1.png": content, "b/2.png": encoded(noise())})
  first = opened(folder, size=8)
  same = opened(folder, size=8)
  assert first.fingerprint == same.fingerprint
  assert len({opened(folder, size=8, **other).fingerprint for other in ({}, {"flip": True}, {"filter": "box"})}) == 3
  moved = folder.rename(tmp_path / "moved")
  assert opened(moved, size=8).fingerprint == first.fingerprint
  stat = (moved / "a/1.png").stat()
  (moved / "a/1.png").write_bytes(content[:-1] + b"x")
  os.utime(moved / "a/1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
  same_facts = opened(moved, size=8, check="none")
  assert same_facts.fingerprint == first.fingerprint  # As documented: only the contents differ.
  os.utime(moved / "a/1.png")
  assert opened(moved, size=8, check="none").fingerprint != first.fingerprint


def test_contents_are_part_of_the_fingerprint_on_request(tmp_path):
  folder = write(tmp_path / "d", {"1.png": encoded(noise(), compress_level=0)})
  before = opened(folder, contents=True).fingerprint
  stat = (folder / "1.png").stat()
  (folder / "1.png").write_bytes(encoded(noise(), compress_level=0))
  os.utime(folder / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert (folder / "1.png").stat().st_size == stat.st_size
  assert opened(folder, contents=True, check="none").fingerprint != before


def test_contents_of_files_that_cannot_be_read(tmp_path):
  path = archive(tmp_path / "d.zip", {f"{number}.png": encoded(noise()) for number in range(3)})
  damaged_in_a_zip(path, tmp_path)
  assert opened(path, contents=True, check="none").image_shape == (8, 8, 3)
  with pytest.raises(ValueError, match=r"1 of 3 files .*\n  0.png: it cannot be read from the archive"):
    opened(path, contents=True)
  folder = write(tmp_path / "d", {"1.png": encoded(noise()), "2.png": encoded(noise())})
  (folder / "0.png").symlink_to(folder / "2.png")
  dataset = opened(folder)
  (folder / "2.png").unlink()
  with pytest.raises(ValueError, match=r"d: 0.png cannot be used: it cannot be read \(No such file"):
    data_config._contents(dataset.records, dataset.rows)


def test_data_that_have_grown(tmp_path):
  folder = write(tmp_path / "d", {"a/1.png": encoded(noise()), "c/2.png": encoded(noise())})
  before = opened(folder).stamps
  write(folder, {"b/3.png": encoded(noise())})  # A new class between the others.
  assert data.grown(before, opened(folder)) == 1
  (folder / "a/1.png").unlink()
  assert data.grown(before, opened(folder)) is None
