"""Answers that a later process finds on disk: the shapes of our networks' parameters."""

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from test_parameters import CASES

from jaxguide._core import kept
from jaxguide.denoisers import linen
from jaxguide.nn.layers import Conv
from jaxguide.nn.normalisation import GroupNorm


@pytest.fixture
def folder(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
  linen._param_shapes.cache_clear()
  monkeypatch.setattr(kept, "_BY_COMMAND", threading.Event())
  kept.keep()
  monkeypatch.setattr(kept, "_installation", lambda: "this one")
  yield tmp_path / "cache" / kept.FOLDER
  jax.config.update("jax_compilation_cache_dir", before)
  jax.config.update("jax_enable_compilation_cache", True)
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


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A copy of the package's files, an hour old, as the one that asks."""
  package = tmp_path / "jaxguide"
  shutil.copytree(Path(kept.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__", "weights"))
  for path in package.rglob("*.py"):
    os.utime(path, (kept._BEGAN - 3600,) * 2)
  monkeypatch.setattr(kept, "__file__", str(package / "_core" / "kept.py"))
  return package


def describe():
  return kept._installation.__wrapped__()


def test_an_installation_is_its_versions_and_sources(package):
  before = describe()
  assert all(name in before for name in ("nn/convolution.py", "denoisers/linen.py", jax.__version__))
  os.utime(package / "nn" / "linear.py", (kept._BEGAN - 1800,) * 2)
  assert describe() != before


def test_sources_that_are_newer_than_the_process_may_not_be_those_that_run(package):
  (package / "nn" / "linear.py").touch()
  assert describe() is None


@pytest.mark.parametrize("fault", ["no sources", "a link to nowhere"])
def test_sources_that_are_not_found_are_no_installation(fault, package):
  if fault == "no sources":
    shutil.rmtree(package)
  else:
    (package / "nn" / "lock.py").symlink_to("nowhere")
  assert describe() is None


@pytest.mark.parametrize("why", ["not by a command", "no installation", "no cache", "a mesh"])
def test_nothing_is_kept(why, folder, traced, monkeypatch):
  if why == "not by a command":
    monkeypatch.setattr(kept, "_BY_COMMAND", threading.Event())
  if why == "no cache":
    jax.config.update("jax_enable_compilation_cache", False)
  if why == "no installation":
    monkeypatch.setattr(kept, "_installation", lambda: None)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh) if why == "a mesh" else contextlib.nullcontext():
    linen.param_shapes(GroupNorm(groups=2), jnp.zeros((1, 4, 4, 2)))
  assert not folder.exists()


def test_the_commands_keep(run, monkeypatch):
  monkeypatch.setattr(kept, "_BY_COMMAND", threading.Event())
  assert run("methods", "heun")[0] == 0
  assert kept._BY_COMMAND.is_set()


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


@pytest.mark.parametrize(
  "damage", ["", "{", "[]", "null", '{"question": "another", "answer": 3}', "\0", "float64", "[" * 200_000]
)
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
