"""Settings that have to stand before JAX is imported, for the tests and the doctests alike."""

import itertools
import os

import pytest

# Four devices on one CPU, so that the code that spreads samples over devices runs wherever the tests do.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_programs():
  """Let go of compiled programs now and then: each is mapped into memory, and of mappings a process has 65,530.

  Past those the next program to be compiled is a segmentation fault.
  """
  yield
  if next(_tests) % 100 == 0:
    import jax

    jax.clear_caches()
