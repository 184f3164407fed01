"""PyTorch's files read without PyTorch: written here byte by byte, PyTorch's own, damaged and hostile ones."""

import argparse
import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import warnings
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxguide.models.importers import state_dicts, torch_files

STORAGES = {
  np.dtype("float64"): "DoubleStorage",
  np.dtype("float32"): "FloatStorage",
  np.dtype("float16"): "HalfStorage",
  np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
  np.dtype("int64"): "LongStorage",
  np.dtype("uint8"): "ByteStorage",
  np.dtype("bool"): "BoolStorage",
}

# --- pickles and files, byte by byte ----------------------------------------------------------------


def plain(value):
  """A value without the beginning and the end of its pickle."""
  return pickle.dumps(value, 2)[2:-1]


def several(*parts):
  return b"(" + b"".join(parts) + b"t"


def named(module, name):
  return f"c{module}\n{name}\n".encode()


ORDERED = named("collections", "OrderedDict") + b")R"


def stored(array, key, numel=None, *view):
  kind = named("torch", STORAGES[array.dtype])
  pid = several(plain("storage"), kind, plain(key), plain("cpu"), plain(array.size if numel is None else numel), *view)
  return pid + b"Q"


def tensor(storage, shape, strides, offset=0):
  cut = several(storage, plain(offset), plain(tuple(shape)), plain(tuple(strides)), b"\x89", ORDERED)
  return named("torch._utils", "_rebuild_tensor_v2") + cut + b"R"


def parameter(tensor):
  return named("torch._utils", "_rebuild_parameter") + several(tensor, b"\x88", ORDERED) + b"R"


def ordered(items):
  """An OrderedDict with the attribute that the state dict of a module has."""
  pairs = b"".join(plain(name) + value for name, value in items.items())
  return ORDERED + b"(" + pairs + b"u" + plain({"_metadata": {"": {"version": 1}}}) + b"b"


def zipped(value, storages, order="little", **how):
  """A file of PyTorch since 1.6."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", **how) as archive:
    archive.writestr("archive/data.pkl", b"\x80\x02" + value + b".")
    if order:
      archive.writestr("archive/byteorder", order)
    for key, array in storages.items():
      swapped = array.view(f"u{array.itemsize}").byteswap() if order == "big" else array
      archive.writestr(f"archive/data/{key}", swapped.tobytes())
    archive.writestr("archive/version", "3\n")
  return file.getvalue()


def old(value, storages, magic=torch_files.MAGIC, version=1001):
  """A file of PyTorch before 1.6."""
  system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
  head = [pickle.dumps(part, 2) for part in (magic, version, system)]
  keys = pickle.dumps(sorted(storages), 2)
  data = [struct.pack("<q", storages[key].size) + storages[key].tobytes() for key in sorted(storages)]
  return b"".join([*head, b"\x80\x02" + value + b".", keys, *data])


FORMATS = {"zip": zipped, "old": old}


@pytest.fixture
def write(tmp_path):
  def write(content, name="weights.pth"):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name

  return write


def example(rng):
  """The storages of a file, its pickle, and the arrays that it holds."""
  storages = {
    "0": rng.normal(size=24).astype(np.float32),
    "7": rng.normal(size=6).astype(ml_dtypes.bfloat16),
    "12": np.array([41]),
    "3": rng.normal(size=5).astype(np.float16),
    "4": rng.normal(size=(4,)),
    "5": np.array([True, False]),
  }
  at = {key: stored(array, key) for key, array in storages.items()}
  value = ordered(
    {
      "whole": tensor(at["0"], (2, 3, 4), (12, 4, 1)),
      "turned": parameter(tensor(at["0"], (4, 3), (1, 4), 8)),
      "half": tensor(at["7"], (6,), (1,)),
      "bn.num_batches_tracked": tensor(at["12"], (), ()),
      "small": tensor(at["3"], (2,), (2,), 1),
      "wide": tensor(at["4"], (2, 2), (2, 1)),
      "mask": tensor(at["5"], (2,), (1,)),
      "none": tensor(at["0"], (0, 3), (3, 1), 24),
    }
  )
  whole = storages["0"].reshape(2, 3, 4)
  arrays = {
    "whole": whole,
    "turned": whole.ravel()[8:20].reshape(3, 4).T,
    "half": storages["7"],
    "bn.num_batches_tracked": np.array(41),
    "small": storages["3"][1:4:2],
    "wide": storages["4"].reshape(2, 2),
    "mask": storages["5"],
    "none": np.zeros((0, 3), np.float32),
  }
  return value, storages, arrays


def same(got, wanted):
  assert list(got) == list(wanted)
  for name, array in wanted.items():
    value = got[name].read()
    assert (got[name].shape, value.shape, value.dtype, got[name].dtype) == (*[array.shape] * 2, *[array.dtype] * 2)
    np.testing.assert_array_equal(value, array)


@pytest.mark.parametrize("make", [zipped, old, lambda *args: zipped(*args, "big"), lambda *args: zipped(*args, None)])
def test_tensors_of_all_types_with_strides_and_offsets(make, write):
  value, storages, arrays = example(np.random.default_rng(0))
  same(torch_files.read(write(make(value, storages))), arrays)


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_a_state_dict_is_read_as_float32_without_counters(make, write):
  value, storages, arrays = example(np.random.default_rng(0))
  path = write(make(value, storages))
  with pytest.raises(ValueError, match=r"mask in .*weights.pth is bool; weights must be one of float32"):
    state_dicts.read(path)
  path = write(make(value.replace(plain("mask"), plain("num_batches_tracked")), storages), "weights.pt")
  read = state_dicts.read(path)
  assert [*read] == ["whole", "turned", "half", "small", "wide", "none"]
  assert [read[name].dtype for name in ("whole", "half", "small", "wide")] == [
    *("float32", "bfloat16", "float16", "float64")
  ]
  for name, found in read.items():
    assert np.asarray(found).dtype == np.float32
    np.testing.assert_array_equal(found, arrays[name].astype(np.float32))


def test_nested_checkpoints_and_plain_data(write):
  storages = {"0": np.arange(3.0)}
  state = ordered({"w": tensor(stored(storages["0"], "0"), (3,), (1,))})
  value = b"}(" + plain("teacher") + state + plain("epoch") + plain(3) + plain("sizes") + plain([1, (2.5, None)]) + b"u"
  content = torch_files.read(write(zipped(value, storages)))
  assert (content["epoch"], content["sizes"]) == (3, [1, (2.5, None)])
  np.testing.assert_array_equal(content["teacher"]["w"].read(), [0, 1, 2])
  with pytest.raises(ValueError, match="must contain a state dict of tensors, but 'teacher' is of type dict"):
    state_dicts.read(write(zipped(value, storages)))


def test_settings_beside_the_weights_of_a_checkpoint(write):
  storages = {"0": np.arange(3.0)}
  state = ordered({"w": tensor(stored(storages["0"], "0"), (3,), (1,))})
  settings = argparse.Namespace(model="SiT-XL/2", betas=(0.9, 0.95), results={"dir": None})
  value = b"}(" + plain("ema") + state + plain("args") + plain(settings) + b"u"
  np.testing.assert_array_equal(state_dicts.read(write(zipped(value, storages)))["w"], [0, 1, 2])


# --- PyTorch's own files ----------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("new", [True, False])
def test_files_of_pytorch(new, tmp_path):
  torch = pytest.importorskip("torch")
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
  wide = torch.arange(60.0).reshape(3, 4, 5)
  tensors = {
    **module.state_dict(),
    **{f"parameter.{name}": value for name, value in module.named_parameters()},
    "turned": wide.permute(2, 0, 1)[1:, :, ::2],
    "column": wide[:, 1],
    "number": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
    **{name: torch.tensor([[1, 0, 1]]).to(getattr(torch, name)) for name in ("bfloat16", "float16", "float64", "bool")},
    **{name: torch.tensor([1, 2, 100]).to(getattr(torch, name)) for name in ("int8", "uint8", "int16", "int32")},
  }
  for saved in (tensors, module.state_dict()):
    torch.save(saved, tmp_path / "weights.pt", _use_new_zipfile_serialization=new)
    got = torch_files.read(tmp_path / "weights.pt")
    assert list(got) == list(saved)
    for name, value in saved.items():
      assert (got[name].shape, got[name].dtype.name) == (tuple(value.shape), str(value.dtype).removeprefix("torch."))
      np.testing.assert_array_equal(got[name].read().astype(np.float64), value.detach().double().numpy())
  torch.save(list(module.parameters()), tmp_path / "weights.pt", _use_new_zipfile_serialization=new)
  assert [part.shape for part in torch_files.read(tmp_path / "weights.pt")] == [(4, 3, 3, 3), (4,), (4,), (4,)]


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch._utils._rebuild_sparse_tensor", "torch.load"])
def test_other_objects_are_refused_and_not_run(make, name, write):
  module, _, function = name.rpartition(".")
  path = write(make(named(module, function) + several(plain("echo run")) + b"R", {}))
  with pytest.raises(ValueError, match=rf"contains code or objects besides weights \({name}\); no code was run"):
    torch_files.read(path)


NUMBERS = np.zeros(24, np.float32)
HOSTILE = {
  "offset outside": (tensor(stored(NUMBERS, "0"), (4,), (1,), 21), "ends outside its storage of 24 numbers"),
  "stride outside": (tensor(stored(NUMBERS, "0"), (2, 2), (1, 23)), "ends outside its storage"),
  "offset below 0": (tensor(stored(NUMBERS, "0"), (2,), (1,), -1), "no whole numbers of at least 0"),
  "stride below 0": (tensor(stored(NUMBERS, "0"), (2,), (-1,), 5), "no whole numbers of at least 0"),
  "side below 0": (tensor(stored(NUMBERS, "0"), (-2,), (1,)), "no whole numbers of at least 0"),
  "fractions": (tensor(stored(NUMBERS, "0"), (2.5,), (1,)), "no whole numbers of at least 0"),
  "repeated without end": (tensor(stored(NUMBERS, "0"), (10**9, 10**9), (0, 0)), "repeats the 24 numbers"),
  "nothing of great size": (tensor(stored(NUMBERS, "0"), (0, 2**59, 2**59), (1, 1, 1)), "beyond all memory"),
  "one stride for two sides": (tensor(stored(NUMBERS, "0"), (2, 2), (1,)), "has 2 sides and 1 strides"),
  "many sides": (tensor(stored(NUMBERS, "0"), (1,) * 33, (1,) * 33), "at most 32"),
  "a huge storage": (tensor(stored(NUMBERS, "0", 2**62), (4,), (1,)), r"(belong there|does not lie in the file)"),
  "a storage of another size": (
    tensor(stored(NUMBERS, "0", 23), (4,), (1,)),
    r"(belong there|does not lie in the file)",
  ),
  "a storage below 0": (tensor(stored(NUMBERS, "0", -1), (4,), (1,)), "something else than the storage of a tensor"),
  "a view of a storage": (stored(NUMBERS, "0", None, plain((1, 2))), "something else than the storage of a tensor"),
  "a storage that is missing": (tensor(stored(NUMBERS, "1"), (4,), (1,)), r"(no part data/1|list of its storages)"),
  "another identifier": (plain("module") + b"Q", "something else than the storage of a tensor"),
  "no storage": (tensor(plain("0"), (4,), (1,)), "not described by a storage"),
  "a parameter of nothing": (parameter(plain(None)), "not made of a tensor"),
  "attributes of a function": (named("torch._utils", "_rebuild_tensor_v2") + b"N" + plain({"a": 1}) + b"\x86b", ""),
  "a huge memo": (plain("a") + b"r\xff\xff\xff\x7f", "an object with the number 2,147,483,647"),
  "a huge text": (b"X\xff\xff\xff\x7fabc", "has a text of 2,147,483,647 bytes"),
  "huge bytes": (b"\x8e" + struct.pack("<Q", 2**62) + b"abc", "has a text of"),
  "a huge frame": (b"\x95" + struct.pack("<Q", 2**62) + plain("a"), ""),
  "nothing on the stack": (b"t", ""),
  "no pickle": (b"\xff\xff", "unknown"),
}


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_give_one_error_and_need_little_memory(make, name, write):
  value, message = HOSTILE[name]
  path = write(make(value, {"0": NUMBERS}))
  with contextlib.ExitStack() as stack:
    tracemalloc.start()
    stack.callback(tracemalloc.stop)
    with pytest.raises(ValueError, match=rf"weights.pth is truncated or not a state dict of PyTorch \(.*{message}"):
      torch_files.read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**21


GOOD = tensor(stored(NUMBERS, "0"), (24,), (1,))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "pickle exhausted"),
    (zipped(GOOD, {"0": NUMBERS}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    (zipped(GOOD, {"0": NUMBERS}, order="middle"), "its byte order is b'middle'"),
    (zipped(GOOD, {"0": NUMBERS}).replace(b"data.pkl", b"data.txt"), "one part data.pkl, and has 0"),
    (old(GOOD, {"0": NUMBERS}, magic=5), "does not begin with PyTorch's number"),
    (old(GOOD, {"0": NUMBERS}, version=1002), "version 1002, expected 1001"),
    (
      old(GOOD + plain(0) + b"\x86" + GOOD.replace(plain(24), plain(23)) + b"\x86", {"0": NUMBERS}),
      "two types or sizes",
    ),
  ],
)
def test_files_that_are_not_pytorchs(content, message, write):
  with pytest.raises(ValueError, match=message):
    torch_files.read(write(content))


def test_sizes_beyond_the_file(write):
  """The directory of a zip file claims more than there is, or another place."""
  content = bytearray(zipped(GOOD, {"0": NUMBERS}))
  entry = content.index(b"archive/data/0", content.index(b"PK\x01\x02")) - 46
  assert content[entry : entry + 4] == b"PK\x01\x02"
  huge, moved = bytearray(content), bytearray(content)
  huge[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
  moved[entry + 42 : entry + 46] = struct.pack("<I", 0)
  with pytest.raises(ValueError, match="2,147,483,648 bytes ends behind the file's"):
    torch_files.read(write(huge))
  with pytest.raises(ValueError, match="data/0 is not where its directory says"):
    torch_files.read(write(moved))


def read_all(path):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # zipfile warns of what it repairs.
    return {name: found.read() for name, found in torch_files.read(path).items()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_gives_an_error_or_the_right_arrays(name, write):
  rng = np.random.default_rng(1)
  value, storages, arrays = example(rng)
  content, refused = FORMATS[name](value, storages), 0
  for case in range(200):
    damaged = bytearray(content)
    place = int(rng.integers(len(content)))
    damaged[place] ^= int(rng.integers(1, 256))
    if case % 4 == 0:
      damaged = damaged[:place]
    try:
      got = read_all(write(damaged))
    except ValueError:
      refused += 1
      continue
    if name == "zip":  # The old format has no checksums.
      assert list(got) == list(arrays)
      assert all(np.array_equal(got[key], arrays[key]) for key in arrays)
  assert refused > (120 if name == "zip" else 80)


def test_a_changed_number_fails_its_checksum(write):
  value, storages, _ = example(np.random.default_rng(0))
  content = zipped(value, storages)
  place = content.index(storages["0"].tobytes())
  read = torch_files.read(write(content[:place] + b"\x00" + content[place + 1 :]))
  with pytest.raises(ValueError, match=r"weights\.pth is damaged: the numbers of a tensor do not have the checksum"):
    read["whole"].read()
  np.testing.assert_array_equal(read["small"].read(), storages["3"][1:4:2])


def test_missing_files_and_pipes(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no file"):
    torch_files.read(tmp_path / "nothing.pt")
  with pytest.raises(OSError, match="is not a regular file"):
    torch_files.read(tmp_path)
  if hasattr(os, "mkfifo"):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(OSError, match="is not a regular file"):
      torch_files.read(tmp_path / "pipe.pt")
