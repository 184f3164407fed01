"""Time to import, to the first image without and with the persistent compilation cache, and to compile ADM's sampling.

The first image is drawn by jaxguide, and by an exported sampler, which needs JAX alone.

Each start is a process of its own. ADM's programs are compiled from shapes alone, and not run.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxguide as jg
from benchmarks import networks, timing
from jaxguide import generate, sampling, training
from jaxguide.evaluation import demo
from jaxguide.models.importers.openai import PRESETS

ROUNDS = 3
STEPS = 24

FIRST_IMAGE = """
import gc, json, time
gc.set_threshold(50_000, 20, 20)  # as the commands have it
marks = {"start": time.time()}
import jax, flax.linen
marks["jax and flax"] = time.time()
import jaxguide as jg
marks["jaxguide"] = time.time()
from jaxguide import training
from jaxguide._core import kept
kept.keep()
model = training.load(FOLDER)
marks["model"] = time.time()
guided = jg.classifier_free(model.null_cond, 2.0)(model.denoiser)
for which in ("first image", "second image"):
  jg.sample_batch(
    guided, jax.random.key(0), 3, num=1, shape=model.config.image_shape, sigmas=jg.karras(STEPS), solver=jg.DPMpp2M()
  )
  marks[which] = time.time()
print(json.dumps(marks))
"""

SERVED = """
import json, time
marks = {"start": time.time()}
import jax, numpy as np
marks["jax"] = time.time()
file = np.load(FOLDER + "/sampler")
header = json.loads(file["header.json"])
(platform,) = header["platforms"]
program = jax.jit(jax.export.deserialize(bytearray(file[f"programs/{platform}"])).call)
weights = jax.device_put({name: file[f"weights/{name}"] for name in header["weights"]})
marks["program and weights"] = time.time()
given = {"index": np.zeros(1, np.uint32), "label": np.full(1, 3, np.int32), "scale": np.float32(2)}
for which in ("first image", "second image"):
  np.asarray(program(weights, seed=np.zeros(2, np.uint32), **given)["images"])
  marks[which] = time.time()
print(json.dumps(marks))
"""


def start(folder: Path, cache: Path | None, code: str = FIRST_IMAGE) -> dict[str, float]:
  """Start a process that draws a digit; give the seconds that its parts took."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
  if cache is not None:
    # As the commands have it.
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  code = code.replace("FOLDER", repr(str(folder))).replace("STEPS", str(STEPS))
  began = time.time()
  out = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=environment)
  marks = json.loads(out.stdout.splitlines()[-1])
  times = list(marks.values())
  parts = dict(zip(list(marks)[1:], np.diff(times).tolist(), strict=True))
  return {**parts, "all, to the first image": marks["first image"] - began}


def sampling_program(size: str, steps: int, batch: int) -> Any:
  """Lower classifier-guided DDIM from a published network, weights and all as shapes."""
  diffusion, classifier = (networks.abstract_model(PRESETS[f"{size}_{kind}"]) for kind in ("diffusion", "classifier"))
  guided = jg.chain(jg.clip_x0(), jg.classifier(classifier.log_prob, 1.0))(diffusion.denoiser)
  labels = np.zeros(batch, np.int32)
  grid = jg.respaced(diffusion.config.noise_schedule, steps)
  shape = diffusion.config.image_shape
  one = jax.local_devices()[:1]
  return sampling.lower_batch(guided, labels, num=batch, shape=shape, sigmas=grid, solver=jg.DDIM(), devices=one)


def _rows(taken: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
  """Give the medians of some kinds of starts, and the range of the whole."""
  rows: list[dict[str, Any]] = []
  for what, starts in taken.items():
    totals = [each["all, to the first image"] for each in starts]
    medians = {f"{part}, s": statistics.median(each[part] for each in starts) for part in starts[0]}
    rows.append({"start": what, **medians, "range, s": f"{min(totals):.1f} to {max(totals):.1f}"})
  return rows


def main(*sizes: str) -> None:
  """Print the tables; name sizes of ADM, ``64x64`` or ``256x256``, to leave the others out, or ``none``."""
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    training.save(folder / "model", networks.random_model(demo.DIGITS.denoiser, "float32"))
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    settings = generate.Settings(folder / "model", guidance="cfg", steps=STEPS, solver="dpmpp-2m", grid="karras")
    generate.export_sampler(folder / "sampler", settings, platforms=[platform])
    taken: dict[str, list[dict[str, float]]] = {"no cache": [], "cache, empty": [], "cache, filled": []}
    served: dict[str, list[dict[str, float]]] = {"cache, empty": [], "cache, filled": []}
    for turn in range(ROUNDS):
      taken["no cache"].append(start(folder / "model", None))
      for what in ("cache, empty", "cache, filled"):
        taken[what].append(start(folder / "model", folder / f"cache-{turn}"))
        served[what].append(start(folder, folder / f"served-{turn}", SERVED))

  compiled = []
  for size in sizes or ("64x64", "256x256"):
    if size == "none":
      continue
    began = time.perf_counter()
    lowered = sampling_program(size, 25, 1)
    traced = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    compiled.append(
      {
        "program": f"ADM {size}, classifier-guided DDIM, 1 image",
        "trace and lower, s": traced - began,
        "compile, s": time.perf_counter() - traced,
        "weights, MiB": memory.argument_size_in_bytes / 2**20,
        "work space, MiB": memory.temp_size_in_bytes / 2**20,
      }
    )
  tables = {"a process that draws a digit": _rows(taken), "the same by an exported sampler": _rows(served)}
  tables |= {"compilation": compiled} if compiled else {}
  timing.report("startup", tables, [f"medians of {ROUNDS} starts; {STEPS} steps of DPM-Solver++(2M), CFG"])
