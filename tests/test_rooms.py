"""The plan of the package: every room imports from those before it alone, and the mathematics needs few libraries."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import readme
from tiny import Mlp

import jaxguide
from jaxguide import data, generate, models, solvers, training
from jaxguide._core import specs, struct
from jaxguide._core.typing import Leaf
from jaxguide.generate import methods
from jaxguide.models import networks
from jaxguide.models.model import init_params
from jaxguide.solvers.base import Memoryless, State, move

PACKAGE = Path(jaxguide.__file__).parent
MATHEMATICS = ["_core", "distributed", "schedules", "nn", "denoisers", "guidance", "solvers", "sampling"]
PROGRAMS = ["data", "models", "training", "generate", "evaluation", "cli"]
ROOMS = [*MATHEMATICS, *PROGRAMS]
LIBRARIES = {"flax", "jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
# Files that need a library when they are used and not before.
LATER = {
  "_core/files.py imports filelock",
  "_core/bars.py imports tqdm",
  "denoisers/frameworks/__init__.py imports equinox",
  "denoisers/frameworks/equinox.py imports equinox",
  "denoisers/frameworks/haiku.py imports haiku",
}


def imports(path):
  """The modules that a file imports, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files():
  return [(room, path) for room in ROOMS for path in (PACKAGE / room).rglob("*.py")]


def test_the_rooms_are_those_of_the_plan():
  assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == {*ROOMS}
  assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py"]


def test_a_room_imports_from_those_before_it_alone():
  upward = []
  for room, path in files():
    for name in imports(path):
      parts = name.split(".")
      if parts[0] == "jaxguide" and len(parts) > 1 and parts[1] in ROOMS and ROOMS.index(parts[1]) > ROOMS.index(room):
        upward.append(f"{path.relative_to(PACKAGE)} imports {name}")
  assert upward == []


def test_the_mathematics_needs_jax_and_flax_alone():
  further = []
  for room, path in files():
    if room in MATHEMATICS:
      libraries = {name.partition(".")[0] for name in imports(path)}
      further += [f"{path.relative_to(PACKAGE)} imports {name}" for name in libraries - LIBRARIES - {"jaxguide"}]
  assert {*further} == LATER


def test_heavy_libraries_are_imported_where_they_are_used():
  """``import jaxguide`` brings none of them, nor does the command's help."""
  heavy = [
    "optax",
    "orbax",
    "tensorflow_datasets",
    "sklearn",
    "matplotlib",
    "PIL",
    "jinja2",
    "torch",
    "tensorflow",
    "equinox",
    "haiku",
  ]
  code = "import sys, jaxguide; before = set(sys.modules); import jaxguide.cli; print(*before, '|', *sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  library, command = ({name.partition(".")[0] for name in part.split()} for part in out.split("|"))
  assert not library & {*heavy}
  assert not command & {*heavy}


def test_a_model_is_loaded_without_optax_and_orbax(tmp_path, monkeypatch):
  config = models.ModelConfig("dit", {"hidden_size": 16, "depth": 1, "num_heads": 2}, (4, 4, 1), 2)
  models.save(tmp_path, models.Model(config, init_params(config, jax.random.key(0))))
  code = f"import sys; from jaxguide import training; training.load({str(tmp_path)!r}); print(*sys.modules)"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
  assert not {"optax", "orbax"} & {name.partition(".")[0] for name in out.split()}
  quick = models.load(tmp_path)
  monkeypatch.setattr(models.arrays, "read", lambda *_: None)
  chex.assert_trees_all_equal(quick.params, models.load(tmp_path).params)


# --- what is new is one file and one entry --------------------------------------------------------


def test_a_new_network_is_an_entry(tmp_path, monkeypatch):
  monkeypatch.setitem(networks.NETWORKS, "mlp", networks.Network(Mlp, networks.DENOISER, {"width": (1, 64)}))
  config = training.ModelConfig("mlp", {"width": 4}, (4, 4, 1), 2)
  images = data.Images(np.arange(128, dtype=np.uint8).reshape(8, 4, 4, 1), np.arange(8) % 2, 2, "steps")
  how = training.TrainingConfig(steps=3, batch_size=4)
  trained = training.fit(config, how, images, tmp_path / "mlp", progress=False)
  again = training.fit(config, how, images, tmp_path / "mlp", progress=False)
  chex.assert_trees_all_equal(again.params, trained.params)
  loaded = training.load(tmp_path / "mlp")
  chex.assert_trees_all_equal(loaded.params, trained.params)
  settings = generate.Settings(model=str(tmp_path / "mlp"), num=2, steps=2, guidance="cfg:scale=2")
  assert generate.run(tmp_path / "s.npz", settings, progress=False)
  assert data.load_npz(tmp_path / "s.npz")[0].shape == (2, 4, 4, 1)
  with pytest.raises(ValueError, match="width must be a whole number from 1 to 64"):
    training.ModelConfig("mlp", {"width": 65}, (4, 4, 1), 2)


def test_a_new_solver_is_an_entry(monkeypatch):
  @struct.dataclass
  class Halfway(Memoryless):
    """Half of an Euler step. A solver for this test."""

    share: Leaf = 0.5
    order, evaluations, stochastic = 1, 1, False

    def step(self, denoise, state, sigma, sigma_next, key):
      return State(state.x + self.share * (move(state.x, denoise(state.x, sigma), sigma, sigma_next) - state.x), None)

  monkeypatch.setitem(solvers.SOLVERS, "halfway", Halfway)
  settings = generate.Settings(solver="halfway:share=0.25")
  assert settings.solver_spec.build(3).share == 0.25
  (row,) = [row for row in generate.overview()["--solver"] if row.name == "halfway"]
  assert (row.text, row.options) == ("Half of an Euler step. A solver for this test.", "share=0.5")
  assert "| `halfway` | `Halfway` | 1 | 1 | no | `share=0.5` |" in readme.of_solvers()


def test_a_new_guidance_is_an_entry(monkeypatch):
  def shrink(networks, scale, *, towards: float = 0.0):
    """Shrink x0 towards a number. A guidance for this test."""
    del networks
    return lambda denoise: lambda x, sigma, cond: towards + scale * (denoise(x, sigma, cond) - towards)

  monkeypatch.setitem(methods.METHODS, "shrink", methods.Method(shrink, "clip_x0", "1", 0.5))
  (spec,) = generate.Settings(guidance="shrink:towards=0.5,sigma_hi=3").guidance_specs
  assert spec.options == {"towards": 0.5, "sigma_hi": 3.0}
  (row,) = [row for row in generate.overview()["--guidance"] if row.name == "shrink"]
  assert row.options == "scale=0.5, towards=0"
  assert "| `shrink` | Shrink x0 towards a number. A guidance for this test |" in readme.of_guidances()


def test_a_new_setting_is_an_option():
  @dataclasses.dataclass(frozen=True)
  class More(generate.Settings):
    """Settings.

    Args:
      brightness: How bright the samples are.
    """

    brightness: float = 1.0

  described = {**specs.described_fields(generate.Settings), **specs.described_fields(More)}
  assert described["brightness"] == "How bright the samples are."
  assert {*specs.described_fields(generate.Settings)} == {f.name for f in dataclasses.fields(generate.Settings)}


def test_a_new_source_of_data_is_an_entry(monkeypatch):
  def blank(name, split, data_dir):
    assert (split, data_dir) == ("test", None)
    return data.Images(np.zeros((2, 4, 4, 1), np.uint8), [0, 1], 2, name)

  monkeypatch.setitem(data.sources.SOURCES, "blank", blank)
  assert data.load("blank:some", "test").name == "some"
  assert len(data.load("tfds:digits", "test")) == len(data.load("digits", "test"))
