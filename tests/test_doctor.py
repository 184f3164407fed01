"""The command ``doctor``: what it shows, and what it finds wrong."""

import importlib.metadata
import os
import sys

import jax
import pytest

from jaxguide import cli
from jaxguide.cli import doctor


@pytest.fixture
def run(monkeypatch, capsys):
  def run():
    monkeypatch.setattr(sys, "argv", ["jaxguide", "doctor"])
    with pytest.raises(SystemExit) as exit:
      cli.main()
    return exit.value.code, capsys.readouterr().out

  return run


def problems(**environment):
  return doctor.examine(environment)[1]


@pytest.fixture
def sound(monkeypatch, tmp_path):
  """A machine on which nothing is wrong, whatever the machine of the test is."""
  monkeypatch.setattr(doctor, "driver", lambda: None)
  monkeypatch.setattr(doctor, "plugins", list)
  monkeypatch.setattr(doctor, "_usable_cores", lambda: 4)
  monkeypatch.setattr(os, "cpu_count", lambda: 4)
  monkeypatch.setattr(doctor, "_quota", lambda: None)
  monkeypatch.setattr(doctor, "_memory", lambda: (2**34, 2**33))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))  # The command then sets no other.
  old = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
  yield tmp_path / "cache"
  jax.config.update("jax_compilation_cache_dir", old)


def test_a_sound_machine(sound, run, monkeypatch):
  sound.mkdir()
  (sound / "program").write_bytes(bytes(2**20))
  monkeypatch.setenv("JAX_SOMETHING", "7")
  monkeypatch.setenv("JAX_API_KEY", "abc")
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  status, printed = run()
  assert status == 0
  for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
    assert f"  {name}: {importlib.metadata.version(name)}\n" in printed
  assert f"  backend: {jax.default_backend()}\n" in printed
  assert printed.count(", computes (") == len(jax.local_devices())
  assert f"folder: {sound}, 1 files, 1.0 MiB" in printed
  assert "JAX_SOMETHING: 7" in printed
  assert "abc" not in printed
  assert "PATH:" not in printed.replace("LD_LIBRARY_PATH:", "")
  assert printed.endswith("Nothing is wrong.\n")


def test_a_driver_without_a_plugin(sound, run, monkeypatch):
  monkeypatch.setattr(doctor, "driver", lambda: "580.95.05")
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  if jax.default_backend() == "cpu":
    status, printed = run()
    assert status == 1
    assert "JAX has no plugin for it and computes on the CPU: pip install -U 'jax[cuda13]'" in printed
  (found,) = doctor.missing_plugin("cpu", "535.1", [], {})
  assert "jax[cuda12]" in found
  (found,) = doctor.missing_plugin("cpu", "535.1", ["jax-cuda12-plugin"], {"JAX_PLATFORMS": "cpu"})
  assert "JAX_PLATFORMS=cpu keeps JAX from it" in found
  (found,) = doctor.missing_plugin("cpu", "535.1", ["jax-cuda12-plugin"], {})
  assert "nvidia-smi" in found
  assert list(doctor.missing_plugin("gpu", "535.1", ["jax-cuda12-plugin"], {})) == []
  assert list(doctor.missing_plugin("cpu", None, [], {})) == []


def test_versions_that_do_not_fit():
  versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.1", "libtpu": "0.0.1", "numpy": "2.4.6"}
  (found,) = doctor.mismatches(versions)
  assert found.startswith("jax is 0.10.2 and jax-cuda12-plugin is 0.10.1")


def test_a_cache_that_cannot_be_written(sound):
  sound.write_text("a file where the folder should be")
  (found,) = problems()
  assert f"the cache folder {sound} cannot be written (Not a directory)" in found
  assert "JAX_COMPILATION_CACHE_DIR" in found


def test_limits(sound, monkeypatch):
  assert problems() == []
  (found,) = problems(XLA_FLAGS="--xla_cpu_multi_thread_eigen=false")
  assert "remove it" in found
  (found,) = problems(NPROC="2")
  assert "NPROC=2 limits JAX to 2 of 4 cores" in found
  with jax.enable_x64(True):
    (found,) = problems()
  assert "64-bit types are enabled" in found
  monkeypatch.setattr(doctor, "_memory", lambda: (2**34, 2**29))
  (found,) = problems()
  assert "only 512.0 MiB of memory are free" in found
  monkeypatch.setattr(doctor, "_memory", lambda: (None, None))
  monkeypatch.setattr(doctor, "_quota", lambda: 0.5)
  (found,) = problems()
  assert "may use one of 4 cores" in found


def test_a_device_that_fails(sound, monkeypatch):
  def fail(device):
    raise RuntimeError("CUDNN_STATUS_NOT_INITIALIZED\nmore")

  monkeypatch.setattr(doctor, "_compute", fail)
  found = problems()
  assert len(found) == len(jax.local_devices())
  assert "fails: CUDNN_STATUS_NOT_INITIALIZED more." in found[0]


def test_no_device(sound, monkeypatch):
  def none():
    raise RuntimeError("Unable to initialize backend 'cuda'")

  monkeypatch.setattr(jax, "local_devices", none)
  (found,) = problems()
  assert "JAX finds no device (Unable to initialize backend 'cuda')" in found
