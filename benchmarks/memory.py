"""Memory of guided sampling against steps, batch and resolution; and throughput on 1, 2 and 4 devices.

Memory is the work space that XLA plans for, beside weights and results; of one run, what the process holds at its peak
as well. On a CPU the devices are parts of it (``--xla_force_host_platform_device_count``), and the work is the same.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

import jaxguide as jg
from benchmarks import networks, timing
from jaxguide import sampling
from jaxguide.training import Model

BATCH, STEPS, ROUNDS = 16, 4, 3
MIB = 2**20


def guided_by_labels(model: Model) -> jg.Denoiser:
  """Guide a network by its labels."""
  return jg.classifier_free(model.null_cond, 2.0)(model.denoiser)


def work_space(steps: int, batch: int, side: int) -> float:
  """Give the MiB that a compiled sampling program plans for."""
  return sampling_program(steps, batch, side).compile().memory_analysis().temp_size_in_bytes / MIB


def sampling_program(steps: int, batch: int, side: int) -> jax.stages.Lowered:
  """Lower classifier-free guidance with DPM++ 2M, weights as shapes."""
  labels = np.zeros(batch, np.int32)
  guided = guided_by_labels(networks.abstract_model(networks.SMALL))
  return sampling.lower_batch(
    guided, labels, num=batch, shape=(side, side, 3), sigmas=jg.karras(steps), solver=jg.DPMpp2M(),
    devices=jax.local_devices()[:1],
  )  # fmt: skip


def draw(steps: int) -> float:
  """Draw a batch, compiled before; give the seconds."""
  model = networks.random_model(networks.SMALL)
  for _ in range(2):
    began = time.perf_counter()
    jg.sample_batch(
      guided_by_labels(model), jax.random.key(0), np.arange(BATCH) % 10, shape=model.config.image_shape,
      sigmas=jg.karras(steps), solver=jg.DPMpp2M(),
    )  # fmt: skip
    seconds = time.perf_counter() - began
  return seconds


def work(steps: str) -> None:
  """Draw in a process of its own; print the seconds, the most memory it held in KiB, and the number of devices."""
  seconds = draw(int(steps))
  status = Path("/proc/self/status").read_text()
  print(seconds, next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")), jax.device_count())


def process(steps: int, devices: int | None = None) -> tuple[float, float, int]:
  """Run `work`; give seconds, MiB, and the number of devices."""
  flags = {} if devices is None else {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  code = f"from benchmarks import memory; memory.work('{steps}')"
  out = subprocess.run(
    [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | flags
  )
  seconds, peak, count = out.stdout.split()[-3:]
  return float(seconds), int(peak) / 1024, int(count)


def main() -> None:
  """Print the tables."""
  planned = [
    {"steps": steps, "batch": batch, "side": side, "work space, MiB": work_space(steps, batch, side)}
    for steps, batch, side in [
      *((steps, 4, 32) for steps in (5, 50, 500)),
      *((10, batch, 32) for batch in (1, 2, 8, 16)),
      *((10, 4, side) for side in (16, 64)),
    ]
  ]
  held = []
  for steps in (2, 8):
    seconds, peak, _ = process(steps)
    held.append({"steps": steps, "batch": BATCH, "s": seconds, "peak of the process, MiB": peak})

  tables = {"planned": planned, "held": held}
  if networks.ON_CPU:
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
      for devices in (1, 2, 4):
        seconds, _, count = process(STEPS, devices)
        assert count == devices, f"asked for {devices} devices, got {count}"
        times.setdefault(str(devices), []).append(seconds)
    rows = timing.summary(times, "1", label="devices")
    tables["devices"] = [{**row, "images/s at 50 steps": BATCH * STEPS / 50 / row["ms"] * 1e3} for row in rows]
  timing.report("memory", tables, [f"{networks.DTYPE}, CFG, DPM-Solver++(2M), the network of 32x32"])
