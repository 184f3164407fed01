"""Weights of ADM-64, its classifier and DiT-XL/2, full size, at random: importing them, and one guided step of ADM-64.

Linux only: the peak of memory is read in /proc.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jaxguide as jg
from benchmarks import timing
from jaxguide import training
from jaxguide.models import ModelConfig, importers
from jaxguide.models.importers import openai, state_dicts
from jaxguide.training.transformer_presets import NAMED

ADM = ("64x64_diffusion", "64x64_classifier")

# Each network's configuration, and how it is imported.
CASES = {
  **{name: (openai.PRESETS[name], {"preset": name}) for name in ADM},
  "DiT-XL/2": (NAMED["DiT-XL/2"].model_config((32, 32, 4), 1000), {"family": "dit", "heads": 16}),
}
MIB = 2**20


def random_state_dict(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
  """Draw weights that keep activations near one: kernels by their fan-in, norms at one, biases near zero."""
  rng, layout = np.random.default_rng(seed), importers.of_network(config.network).layout(config)

  def draw(name, shape):
    if len(shape) == 1:
      return np.full(shape, name.endswith("weight"), np.float32) + 0.02 * rng.standard_normal(shape, np.float32)
    return rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:])).astype(np.float32)

  return {name: draw(name, entry.shape) for name, entry in layout.items()}


def work(file: str, out: str, name: str) -> None:
  """Import, in a process of its own, and print the most memory that it held, in KiB."""
  importers.import_model(file, out, **CASES[name][1])
  status = Path("/proc/self/status").read_text()
  print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> None:
  """Measure."""
  rows, facts = [], []
  with tempfile.TemporaryDirectory() as folder:
    for name, (config, _) in CASES.items():
      file, out = Path(folder, "weights.safetensors"), Path(folder, name.replace("/", "-"))
      state_dicts.write(file, random_state_dict(config))
      code = "import sys; from benchmarks import importing; importing.work(*sys.argv[1:])"
      began = time.perf_counter()
      child = subprocess.run(
        [sys.executable, "-c", code, str(file), str(out), name], check=True, stdout=subprocess.PIPE, text=True
      )
      seconds = time.perf_counter() - began
      size, peak = file.stat().st_size / MIB, int(child.stdout) / 1024
      rows.append({"network": name, "file, MiB": size, "import, s": seconds, "peak, MiB": peak, "/ file": peak / size})
      file.unlink()

    began = time.perf_counter()
    diffusion, classifier = (training.load(Path(folder, preset)) for preset in ADM)
    facts.append(f"both loaded in {time.perf_counter() - began:.1f} s")

  guided = jg.chain(jg.clip_x0(), jg.classifier(classifier.log_prob, classifier.config.scale))(diffusion.denoiser)
  grid = jg.respaced(diffusion.config.noise_schedule, 1)
  for what in ("compiled and taken", "taken again"):
    began = time.perf_counter()
    jg.sample_batch(
      guided, jax.random.key(0), np.array([7]), shape=diffusion.config.image_shape, sigmas=grid, solver=jg.DDIM()
    )
    facts.append(f"one guided step of DDIM, one image: {what} in {time.perf_counter() - began:.1f} s")
  timing.report("importing", {"import": rows}, facts)
