"""Answers that a later process finds on disk: the shapes of our networks' parameters."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from test_parameters import CASES

from jaxguide._core import kept
from jaxguide.denoisers import linen
from jaxguide.nn.layers import Conv
from jaxguide.nn.normalisation import GroupNorm


@pytest.fixture
def folder(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
  linen._param_shapes.cache_clear()
  yield tmp_path / "cache" / kept.FOLDER
  jax.config.update("jax_compilation_cache_dir", before)
  linen._param_shapes.cache_clear()


def as_a_later_process():
  linen._param_shapes.cache_clear()


def inputs(shape):
  return jnp.zeros((1, *shape)), jnp.zeros(1)


@pytest.fixture
def traced(monkeypatch):
  """How often a network was traced."""
  traces, shapes = [], linen.shapes_alone
  monkeypatch.setattr(linen, "shapes_alone", lambda: traces.append(1) or shapes())
  return traces


@pytest.mark.parametrize("name", CASES)
def test_a_later_process_does_not_trace(name, folder, traced):
  module, shape = CASES[name]
  module = module.clone(dtype="float32")
  first = linen.param_shapes(module, *inputs(shape))
  as_a_later_process()
  assert (
    linen.param_shapes(module, *inputs(shape))
    == first
    == jax.eval_shape(module.init, jax.random.key(0), *inputs(shape))
  )
  assert len(traced) == 1
  assert len(list(folder.iterdir())) == 1


def test_another_field_or_input_is_another_question(folder, traced):
  module, x = GroupNorm(groups=2), jnp.zeros((1, 4, 4, 4))
  for each, given in ((module, x), (module.clone(groups=1), x), (module, x[..., :2]), (module, x.astype("bfloat16"))):
    wanted = jax.eval_shape(each.init, jax.random.key(0), given)
    assert linen.param_shapes(each, given) == wanted
    as_a_later_process()
    assert linen.param_shapes(each, given) == wanted
    as_a_later_process()
  assert len(traced) == 4


def test_another_installation_asks_again(folder, traced, monkeypatch):
  module, x = GroupNorm(groups=2), jnp.zeros((1, 4, 4, 2))
  linen.param_shapes(module, x)
  as_a_later_process()
  monkeypatch.setattr(kept, "_installation", lambda: "another version")
  linen.param_shapes(module, x)
  assert len(traced) == 2


def test_an_installation_is_its_versions_and_sources():
  assert all(name in kept._installation() for name in ("nn/convolution.py", "denoisers/linen.py", jax.__version__))


class Own(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.features)(x)


@pytest.mark.parametrize("module", [Own(3), Conv(3)], ids=["own", "function"])
def test_a_network_of_ones_own_or_with_functions_is_traced_each_time(module, folder, traced):
  for _ in range(2):
    linen.param_shapes(module, jnp.zeros((1, 4, 4, 2)))
    as_a_later_process()
  assert len(traced) == 2
  assert not folder.exists()


def test_an_error_is_not_kept(folder):
  module = CASES["UNet"][0].clone(dtype="float32")
  for _ in range(2):
    with pytest.raises((TypeError, ValueError)):
      linen.param_shapes(module, jnp.zeros((1, 4, 4, 1)), jnp.zeros((2, 3)))
    as_a_later_process()
  assert not folder.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"question": "another", "answer": 3}', "\0", "float64"])
def test_a_damaged_entry_is_found_anew(damage, folder, traced):
  module, x = GroupNorm(groups=2), jnp.zeros((1, 4, 4, 2))
  wanted = linen.param_shapes(module, x)
  (entry,) = folder.iterdir()
  whole = entry.read_text()
  entry.write_text(whole.replace("float32", damage) if damage == "float64" else damage)
  as_a_later_process()
  assert linen.param_shapes(module, x) == wanted
  assert entry.read_text() == whole
  assert len(traced) == 2


def test_nothing_is_kept_without_a_folder_or_where_it_cannot_be_written(folder, traced):
  module, x = GroupNorm(groups=2), jnp.zeros((1, 4, 4, 2))
  folder.parent.write_text("a file")
  wanted = linen.param_shapes(module, x)
  jax.config.update("jax_compilation_cache_dir", None)
  as_a_later_process()
  assert linen.param_shapes(module, x) == wanted
  jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
  as_a_later_process()
  assert linen.param_shapes(module, x) == wanted
  assert len(traced) == 3


def test_an_entry_says_what_it_answers(folder):
  linen.param_shapes(GroupNorm(groups=2), jnp.zeros((1, 4, 4, 2)))
  (entry,) = folder.iterdir()
  assert json.loads(entry.read_bytes())["answer"]["params"]["scale"] == ["float32", 2]
