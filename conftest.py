"""Settings that have to stand before JAX is imported, for the tests and the doctests alike."""

import os

# Four devices on one CPU, so that the code that spreads samples over devices runs wherever the tests do.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
