"""What a device has of a large training whose parameters are split, by shapes alone."""

import math

import jax
import pytest

from jaxguide.distributed.placing import split_axis
from jaxguide.training.presets import preset
from jaxguide.training.step import state_shapes


@pytest.fixture(scope="module")
def state():
  """The state of a training of ADM-64, as shapes."""
  chosen = preset("unet", 64)
  model = chosen.model_config((64, 64, 3), 1000)
  return state_shapes(model, chosen.training_config(model))


def bytes_of(tree, parts):
  """The bytes of a tree on one device."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = list(leaf.shape)
    axis = split_axis(shape, parts)
    if axis is not None:
      assert shape[axis] % parts == 0
      shape[axis] //= parts
    total += math.prod(shape) * leaf.dtype.itemsize
  return total


@pytest.mark.parametrize("part", ["params", "opt_state", "means"])
@pytest.mark.parametrize("parts", [2, 8, 64])
def test_a_device_has_its_share_and_little_more(state, part, parts):
  tree = getattr(state, part)
  share = bytes_of(tree, parts) / bytes_of(tree, 1)
  # Biases and norms are not split, and with 64 parts an array has to have an axis that 64 divides.
  assert 1 / parts <= share <= 1.05 / parts if parts <= 8 else share < 0.03


def test_the_whole_state_with_eight_parts(state):
  parts = [state.params, state.opt_state, state.means]
  numbers = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert numbers == pytest.approx(296e6, abs=1e6)
  # Parameters, two moments and one mean, in float32.
  assert bytes_of(parts, 1) == pytest.approx(4 * 4 * numbers, rel=1e-6)
  assert bytes_of(parts, 8) <= (1 / 8 + 0.05) * bytes_of(parts, 1)
