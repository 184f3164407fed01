"""Pickles of data alone: arrays are read, and nothing is run."""

import io
import os
import pickle

import numpy as np
import pytest

from jaxguide._core import pickles


def read(content):
  return pickles.read(io.BytesIO(content), "f.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_numbers_and_containers(protocol):
  arrays = {"mu": np.random.default_rng(0).normal(size=(3, 4)), "n": np.int64(5), "names": ["a", "ü"], "x": (1.5, None)}
  got = read(pickle.dumps(arrays, protocol))
  np.testing.assert_array_equal(got["mu"], arrays["mu"])
  assert (got["n"], got["names"], got["x"]) == (5, ["a", "ü"], (1.5, None))


class Runs:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("call", [(os.mkdir,), (eval, "1"), (np.load, "x"), (pickle.loads, b"")])
def test_nothing_is_run(call, tmp_path):
  args = call[1:] or (str(tmp_path / "made"),)
  with pytest.raises(ValueError, match=r"f\.pkl cannot be read: it needs .* which is not allowed"):
    read(pickle.dumps([Runs(call[0], *args)]))
  assert not (tmp_path / "made").exists()


def test_objects_and_damage():
  with pytest.raises(ValueError, match="an array of Python objects"):
    read(pickle.dumps({"a": [np.array([{}], object)]}))
  whole = pickle.dumps({"mu": np.arange(100)})
  for end in range(0, len(whole) - 1, 7):
    with pytest.raises(ValueError, match=r"f\.pkl cannot be read"):
      read(whole[:end])


def test_parts_in_many_places_are_visited_once():
  inside = []
  inside.append(inside)
  assert read(pickle.dumps(inside))[0][0] is not None
  doubled = []
  for _ in range(60):
    doubled = [doubled, doubled]
  assert len(read(pickle.dumps(doubled))) == 2
