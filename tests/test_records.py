"""Records of runs, fingerprints of data, and keys of seeds."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxguide import keys
from jaxguide._core import records
from jaxguide.data import Images, batches


@dataclasses.dataclass
class Model:
  width: int
  scale: float = 1.0
  shape: tuple = (8, 8)


@dataclasses.dataclass
class Training:
  steps: int
  scale: float = 1.0
  loss: str | None = None


DEFAULT = {"model": records.defaults(Model), "training": records.defaults(Training)}


def written(**parts):
  """A record as it is read from its file."""
  return json.loads(json.dumps(records.record(**parts)))


def test_equal_runs_have_equal_records():
  requested = records.record(model=Model(4, shape=[8, 8]), training=Training(5, scale=1))
  assert records.differences(written(model=Model(4), training=Training(5)), requested, DEFAULT) == []


def test_each_field_that_differs_is_named_with_both_values():
  stored = written(model=Model(4, scale=2.0), training=Training(5), data={"name": "a"})
  requested = records.record(model=Model(8, scale=2.0), training=Training(5, scale=3.0, loss="kl"), data={"name": "b"})
  assert records.differences(stored, requested, DEFAULT) == [
    "model.width is 4 there, and 8 here",
    "training.scale is 1.0 there, and 3.0 here",
    "training.loss is None there, and 'kl' here",
    "data.name is 'a' there, and 'b' here",
  ]


def test_a_field_that_an_old_record_does_not_have_has_its_default():
  stored = written(model=Model(4), training=Training(5))
  for part, name in (("training", "loss"), ("training", "scale"), ("model", "shape")):
    del stored[part][name]
  assert records.differences(stored, records.record(model=Model(4), training=Training(5)), DEFAULT) == []
  requested = records.record(model=Model(4), training=Training(5, loss="kl"))
  assert records.differences(stored, requested, DEFAULT) == ["training.loss is None there, and 'kl' here"]
  del stored["model"]["width"]
  requested = records.record(model=Model(4), training=Training(5))
  assert records.differences(stored, requested, DEFAULT) == ["model.width is absent there, and 4 here"]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is damaged"),
    (b'{"version": 1', "is damaged"),
    (b"\xff{}", "is damaged"),
    (b"[1]", "it is not a JSON object"),
    (b"null", "it is not a JSON object"),
    (b'{"a": {"b": 1, "b": 2}}', "it has the field 'b' twice"),
    (b'{"a": Infinity}', "Infinity is not a number of JSON"),
    (b"[" * 200_000, "nested too deeply"),
    (b'{"a": ' + b"1" * 10_000 + b"}", "is damaged"),
  ],
  ids=range(9),
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
  (tmp_path / "record.json").write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    records.read(tmp_path / "record.json")
  assert str(tmp_path / "record.json") in str(error.value)
  assert len(str(error.value)) < 500


def test_a_file_that_is_too_large_or_missing_or_a_folder(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "LARGEST", 10)
  (tmp_path / "a").write_text('{"a":    1}')
  with pytest.raises(ValueError, match="larger than 10 bytes"):
    records.read(tmp_path / "a")
  with pytest.raises(FileNotFoundError):
    records.read(tmp_path / "b")
  with pytest.raises(FileNotFoundError):
    records.read(tmp_path / "a" / "b")
  with pytest.raises(ValueError, match="not a regular file"):
    records.read(tmp_path)


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True, [], 2, 10**30])
def test_unknown_versions_are_refused(version):
  with pytest.raises(ValueError, match="the record has version"):
    records.check_version({"version": version})
  records.check_version({"version": 1})


# --- fingerprints ---------------------------------------------------------------------------------


def test_a_fingerprint_depends_on_the_data_and_not_on_their_name_or_layout():
  rng = np.random.default_rng(0)
  pixels, labels = rng.integers(0, 256, (6, 4, 2, 1)).astype(np.uint8), np.arange(6, dtype=np.int32) % 2
  mine = Images(pixels, labels, 2, "mine").fingerprint
  assert mine == Images(pixels.copy(), labels.copy(), 2, "other name").fingerprint
  assert mine == Images(np.asfortranarray(pixels), labels, 2, "mine").fingerprint
  flipped, moved = pixels.copy(), labels.copy()
  flipped[5, 3, 1, 0] ^= 1
  moved[5] = 0
  others = [
    Images(flipped, labels, 2, "mine"),
    Images(pixels, moved, 2, "mine"),
    Images(pixels, labels, 3, "mine"),
    Images(pixels[::-1], labels, 2, "mine"),
    Images(pixels[:5], labels[:5], 2, "mine"),
    Images(pixels.reshape(6, 2, 4, 1), labels, 2, "mine"),
  ]
  assert len({mine, *(images.fingerprint for images in others)}) == 7


# --- seeds ----------------------------------------------------------------------------------------

SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1]


def test_a_seeds_key_uses_all_64_bits_and_is_jaxs():
  words = [tuple(jax.random.key_data(keys.seed_key(seed)).tolist()) for seed in SEEDS]
  assert len({*words}) == len(SEEDS)
  for seed, data in zip(SEEDS, words, strict=True):
    if seed < 2**32:
      assert tuple(jax.random.key_data(jax.random.key(seed)).tolist()) == data
    if seed < 2**63:  # With 64-bit types JAX uses all bits too.
      with jax.enable_x64(True):
        assert tuple(jax.random.key_data(jax.random.key(seed)).tolist()) == data


def test_a_seeds_key_does_not_depend_on_the_default_generator():
  key = keys.seed_key(5)
  with jax.default_prng_impl("rbg"):
    other = jax.jit(lambda: keys.seed_key(5))()
  assert jax.random.key_impl(other) == jax.random.key_impl(key)
  assert (jax.random.key_data(other) == jax.random.key_data(key)).all()


@pytest.mark.parametrize("seed", [-1, 2**64, 2**70, 0.5, True, None, "7"])
def test_values_that_are_not_seeds_are_refused(seed):
  # Without the run-time type checks of the tests, which would raise first.
  with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to 18446744073709551615 \(2\*\*64 - 1\)"):
    keys.check_seed.__wrapped__("seed", seed)


def orders(seed, epochs=4):
  """The order of 40 images in each epoch."""
  images = Images(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.zeros(40, np.int32), 1, "mine")
  source = batches(images, 40, seed)
  return [tuple(next(source)[0].ravel().tolist()) for _ in range(epochs)]


def test_batches_depend_on_all_bits_of_the_seed():
  assert len({order for seed in SEEDS for order in orders(seed)}) == 4 * len(SEEDS)
  wanted = [tuple(np.random.default_rng((7, epoch)).permutation(40).tolist()) for epoch in range(4)]
  assert orders(7) == wanted
