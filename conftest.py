"""Settings that have to stand before NumPy and JAX are imported, for the tests and the doctests alike."""

import gc
import importlib.metadata
import itertools
import os
from pathlib import Path

import pytest

# Four devices on one CPU, so that the code that spreads samples over devices runs wherever the tests do.
_FLAGS = ["--xla_force_host_platform_device_count=4"]
# Most programs of the tests are small and run once: XLA takes longer to compile them than they take to run.
_FLAGS += ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # XLA aborts at flags that it does not know.
  _FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests run in as many processes as there are cores. More threads of linear algebra than that wait for each other in
# loops that take all of the cores: figures of 500 samples then took five times the CPU. Commands inherit this.
for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
  os.environ.setdefault(_name, "1")
# What mixes types or ranks unasked is an error for users who have set JAX so, and here.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")

# Tracing makes many objects and few cycles of them: Python's search for cycles takes a tenth of the time.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish():
  """Leave what the imports made out of all searches: it stays until the end."""
  gc.collect()
  gc.freeze()


_tests = itertools.count(1)
_MAPPINGS = 40_000  # of the 65,530 that a process may have
_KILOBYTES = 4_000_000  # of memory that a process holds
_MORE = 1_000_000  # that it may hold after programs were let go, since not all memory returns to the system
_limit = [_KILOBYTES]


@pytest.fixture(autouse=True)
def forget_programs():
  """Let go of compiled programs where there are too many: each is mapped into memory, and there are 65,530 mappings.

  Past the limit the next program to be compiled is a segmentation fault. Until then programs are kept, since the next
  test may need them again.
  """
  yield
  if next(_tests) % 10 == 0 and (_mappings() > _MAPPINGS or _resident() > _limit[0]):
    import jax

    jax.clear_caches()
    _limit[0] = max(_KILOBYTES, min(_resident() + _MORE, 2 * _KILOBYTES))


def _mappings():
  maps = Path("/proc/self/maps")
  return maps.read_bytes().count(b"\n") if maps.exists() else 0


def _resident():
  status = Path("/proc/self/status")
  lines = status.read_text().splitlines() if status.exists() else []
  return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)
