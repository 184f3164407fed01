"""Kill a training at random points, saves among them, and compare its final weights with those of an unbroken run.

``python tests/kills.py 50`` kills it 50 times. Each process is killed by SIGKILL: half of them after a random time, the
others while a checkpoint or the model is being written. After each kill the newest model must load, with all its
checksums right. At the end parameters, optimiser state and running mean must be those of the unbroken run, bit for bit.
``python tests/kills.py 10 --steps 500 --save-every 20 --devices 8 --mesh fsdp=8`` does it on a mesh.
"""

import argparse
import dataclasses
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SAVE_EVERY = 5
STEP_SECONDS = 0.02
"""What a step takes besides its computation, so that kills fall between saves as well."""


def child(folder: Path, steps: int, save_every: int, mesh: str | None) -> None:
  """Train in this process. The number of each step is written to ``progress`` before the next one starts."""
  import jax
  import numpy as np

  from jaxguide import training
  from jaxguide.data import Images

  jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  width = 8 if mesh is None else 32  # Small arrays are not split.
  fields = {"model_channels": width, "channel_mult": (1,), "num_res_blocks": 1, "num_head_channels": 8}
  model = training.ModelConfig("unet", fields, (4, 4, 1), 2)
  how = training.TrainingConfig(steps=steps, batch_size=4 if mesh is None else 8, save_every=save_every)
  pixels = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
  data = Images(pixels, np.arange(40) % 2, 2, "mine")
  progress = os.open(folder.parent / f"{folder.name}.progress", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
  first = []

  def callback(step, state, metrics):
    first.append(step) if not first else None
    os.pwrite(progress, json.dumps([first[0], step]).ljust(40).encode(), 0)
    time.sleep(STEP_SECONDS)

  run = training.RunConfig(log_every=10, sample_every=0, mesh=mesh)
  training.fit(model, how, data, folder, run=run, callback=callback, progress=False)


@dataclasses.dataclass
class Report:
  """What happened.

  Args:
    kills: number of kills.
    in_checkpoint: how many of them left a checkpoint half written.
    in_model: how many of them left a model half written or half replaced.
    lost: the largest number of steps that were taken again after a kill.
    memory: the memory of the unbroken run in MiB, at a tenth of its steps and at the end.
    warnings: lines that the processes printed.
    equal: whether the final state and the final model are those of the unbroken run.
  """

  kills: int = 0
  in_checkpoint: int = 0
  in_model: int = 0
  lost: int = 0
  memory: tuple[float, float] = (0.0, 0.0)
  warnings: list[str] = dataclasses.field(default_factory=list)
  equal: bool = False


def kill(
  folder: Path,
  number: int,
  steps: int,
  seed: int = 0,
  *,
  save_every: int = SAVE_EVERY,
  devices: int = 1,
  mesh: str | None = None,
) -> Report:
  """Train in processes that are killed, then to the end, and compare with an unbroken run.

  Args:
    folder: an empty folder for both runs.
    number: number of kills. The training must be long enough for them.
    steps: number of training steps.
    seed: seed of the times of the kills.
    save_every: number of steps between checkpoints.
    devices: number of devices of the process.
    mesh: the mesh.

  Raises:
    AssertionError: if a process fails, a model cannot be loaded, or the training ends before all kills.
  """
  from jaxguide import models

  rng, report = random.Random(seed), Report()
  broken, whole = folder / "broken", folder / "whole"
  begin = functools.partial(start, steps=steps, save_every=save_every, devices=devices, mesh=mesh)
  assert begin(whole).wait() == 0
  used = [json.loads(line)["memory"] / 2**20 for line in (whole / "metrics.jsonl").read_text().splitlines()]
  report.memory = (used[len(used) // 10], used[-1])
  taken = 0
  while report.kills < number:
    process = begin(broken)
    progress = wait_for_first_step(broken, process)
    if report.kills:
      report.lost = max(report.lost, taken - (progress[0] - 1))
    if report.kills % 2:
      time.sleep(rng.uniform(0.0, 1.2))
    else:
      wait_for_save(broken, process, rng)
    assert process.poll() is None, "the training ended before all kills: give more steps"
    process.send_signal(signal.SIGKILL)
    process.wait()
    report.kills += 1
    taken = read_progress(broken)[1]
    report.in_checkpoint += any("orbax-checkpoint-tmp" in path.name for path in (broken / "checkpoints").iterdir())
    report.in_model += any(path.name in ("model.new", "model.old") for path in broken.iterdir())
    if models.exists(broken):
      models.load(broken)
    report.warnings += collected(process)
  process = begin(broken)
  assert process.wait() == 0
  report.warnings += collected(process)
  report.equal = same(broken, whole, steps)
  return report


def start(folder: Path, steps: int, save_every: int, devices: int, mesh: str | None) -> subprocess.Popen:
  """Start a process that trains."""
  (folder.parent / f"{folder.name}.progress").unlink(missing_ok=True)
  errors = (folder.parent / "errors").open("w+")
  command = [sys.executable, __file__, "--child", str(folder), "--steps", str(steps), "--save-every", str(save_every)]
  command += [] if mesh is None else ["--mesh", mesh]
  env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  process = subprocess.Popen(command, stderr=errors, env=env)
  process.errors = errors
  return process


def collected(process: subprocess.Popen) -> list[str]:
  """Return the lines that a process printed to stderr."""
  process.errors.seek(0)
  return [line for line in process.errors.read().splitlines() if line.strip()]


def read_progress(folder: Path) -> list[int]:
  """Return the first and the last step of the newest process; none before its first step."""
  try:
    return json.loads((folder.parent / f"{folder.name}.progress").read_text())
  except (OSError, ValueError):
    return []


def wait_for_first_step(folder: Path, process: subprocess.Popen) -> list[int]:
  while not (progress := read_progress(folder)):
    assert process.poll() is None, "\n".join(collected(process))
    time.sleep(0.005)
  return progress


def wait_for_save(folder: Path, process: subprocess.Popen, rng: random.Random) -> None:
  """Wait until a checkpoint or a model is being written, and then a moment."""
  number, seen = rng.randint(1, 6), 0
  is_model = rng.random() < 0.4
  while process.poll() is None:
    folders = [folder] if is_model else [folder / "checkpoints"]
    names = [path.name for path in folders[0].iterdir()] if folders[0].exists() else []
    if any("orbax-checkpoint-tmp" in name or name in ("model.new", "model.old") for name in names):
      seen += 1
      if seen >= number:
        time.sleep(rng.uniform(0, 0.01))
        return
      time.sleep(0.03)


def same(broken: Path, whole: Path, steps: int) -> bool:
  """Whether two finished runs have the same model and the same last checkpoint, bit for bit."""
  records = [json.loads((folder / "model" / "checksums.json").read_text()) for folder in (broken, whole)]
  states = [(folder / "checkpoints" / str(steps) / "checksums" / "metadata").read_text() for folder in (broken, whole)]
  return records[0] == records[1] and json.loads(states[0]) == json.loads(states[1])


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("number", type=int, nargs="?", default=50, help="number of kills")
  parser.add_argument("--steps", type=int, help="number of training steps; by default 50 for each kill")
  parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
  parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
  parser.add_argument("--save-every", type=int, default=SAVE_EVERY, help="number of steps between checkpoints")
  parser.add_argument("--devices", type=int, default=1, help="number of devices")
  parser.add_argument("--mesh", help="their mesh, such as fsdp=8")
  options = parser.parse_args()
  if options.child:
    child(options.child, options.steps, options.save_every, options.mesh)
  else:
    with tempfile.TemporaryDirectory() as where:
      began = time.time()
      steps, how = options.steps or 50 * options.number, {"devices": options.devices, "mesh": options.mesh}
      result = kill(Path(where), options.number, steps, options.seed, save_every=options.save_every, **how)
      print(
        f"{result.kills} kills in {time.time() - began:.0f} s, {result.in_checkpoint} of them while a checkpoint was "
        f"written and {result.in_model} while the model was; at most {result.lost} steps were taken again; the "
        f"unbroken run had {result.memory[0]:.0f} MiB after a tenth and {result.memory[1]:.0f} at its end; the final "
        f"weights are {'equal to those of the unbroken run, bit for bit' if result.equal else 'NOT EQUAL'}"
      )
      print(*(f"  {line}" for line in sorted(set(result.warnings))), sep="\n")
      sys.exit(not result.equal)
