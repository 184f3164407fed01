"""One training step of each preset: its time and its memory, with and without rematerialisation by block.

On a CPU the presets for 8x8 and 32x32 are measured, on a GPU all, in bfloat16. The most useful come first, and the
results are written after each, so that a run can be cut off: ``python -m benchmarks presets 330`` starts no program
after 330 seconds. The batch is one that fits one device; the published one is larger.
"""

import concurrent.futures
import contextlib
import io
import itertools
import os
import shutil
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from jaxguide.models.config import ModelConfig
from jaxguide.training import presets
from jaxguide.training.config import TrainingConfig
from jaxguide.training.describe import Description, describe, state_shapes
from jaxguide.training.step import train_step

# What is measured, in this order: network, image size, the largest batch for one device, rematerialisation.
ON_GPU = (
  ("unet", 64, 64, "none"),
  ("unet", 64, 64, "blocks"),
  ("classifier", 64, 128, "none"),
  ("unet", 32, 128, "none"),
  ("unet", 256, 8, "none"),
  ("unet", 256, 8, "blocks"),
  ("unet", 128, 16, "none"),
  ("super_res_unet", 256, 8, "none"),
  ("classifier", 256, 16, "none"),
  ("classifier", 128, 32, "none"),
  ("unet", 64, 64, "all"),
  ("unet", 32, 128, "blocks"),
  ("classifier", 64, 128, "blocks"),
  ("unet", 128, 16, "blocks"),
  ("classifier", 32, 256, "none"),
  ("unet", 8, 64, "none"),
  ("classifier", 8, 64, "none"),
)
# XLA's CPU backend computes nothing again, so rematerialisation changes nothing there.
ON_CPU = (
  ("unet", 8, 64, "none"),
  ("classifier", 8, 64, "none"),
  ("classifier", 32, 4, "none"),
  ("unet", 32, 4, "none"),
)

COMPILED_AT_ONCE = 4
"""The number of programs that are compiled at the same time. None is timed meanwhile."""

SHARE = 0.7
"""The share of the device's memory that a step without rematerialisation may need by the estimate."""

ENOUGH = 2.0
"""The seconds for which a step is timed, at least three times."""


class Program(NamedTuple):
  """A step that is measured."""

  model: ModelConfig
  training: TrainingConfig
  remat: str
  size: int
  operations: float
  published_batch: int


def plan(network: str, size: int, batch: int, remat: str) -> Program:
  """Return the step of a preset, with a batch that fits the device's memory by the estimate."""
  fields: dict[str, Any] = {}
  preset = presets.preset(network, size)
  if jax.default_backend() != "cpu" and size > presets.DEMO:
    # cuDNN's attention takes heads of at most 128 channels.
    fields = {"dtype": "bfloat16", "cudnn_attention": preset.model["fields"].get("num_head_channels", -1) != -1}
  model = preset.model_config((size, size, 3), 1000 if size > 32 else 10, fields=fields)
  description = described(model, preset.training_config(model, batch_size=batch, steps=10_000))
  memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))
  state, operations = sum(description.bytes.values()), description.operations / description.batch_size
  while batch > 1 and state + description.activations * batch / description.part > SHARE * memory:
    batch //= 2
  training = preset.training_config(model, batch_size=batch, steps=10_000, remat=remat)
  published = preset.training.get("batch_size", TrainingConfig.batch_size)
  return Program(model, training, remat, size, operations * batch, published)


_DESCRIPTIONS: dict[tuple[str, tuple[int, ...]], Description] = {}


def described(model: ModelConfig, training: TrainingConfig) -> Description:
  """Describe a training once for all kinds of rematerialisation."""
  key = (model.network, tuple(model.image_shape))
  if key not in _DESCRIPTIONS:
    _DESCRIPTIONS[key] = describe(model, training)
  return _DESCRIPTIONS[key]


def lower(program: Program) -> Any:
  """Trace and lower a step."""
  step: Any = train_step(program.model, program.training)
  batch = program.training.batch_size
  images = jax.ShapeDtypeStruct((batch, *program.model.image_shape), jnp.uint8)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return step.lower(state_shapes(program.model, program.training), images, labels)


def compiled(lowered: Any) -> tuple[Any, float]:
  """Compile a step; return it and how long that took."""
  began = time.perf_counter()
  return lowered.compile(), time.perf_counter() - began


def measure(program: Program, step: Any) -> dict[str, Any]:
  """Time a step, and return its row."""

  # Neither the time nor the memory depends on the parameters' values.
  @jax.jit
  def filled():
    def fill(leaf):
      return jnp.full(leaf.shape, 0.01 if jnp.issubdtype(leaf.dtype, jnp.floating) else 0, leaf.dtype)

    return jax.tree.map(fill, state_shapes(program.model, program.training))

  batch, state = program.training.batch_size, filled()
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.integers(0, 256, (batch, *program.model.image_shape)).astype(np.uint8))
  labels = jnp.asarray(np.arange(batch) % 10, jnp.int32)
  seconds: list[float] = []
  for turn in itertools.count():
    began = time.perf_counter()
    state, metrics = step(state, images, labels)
    jax.block_until_ready((state, metrics))
    if turn > 1:
      seconds.append(time.perf_counter() - began)
    if len(seconds) >= 3 and sum(seconds) > ENOUGH:
      break
  median = statistics.median(seconds)
  low, _, high = statistics.quantiles(seconds, n=4)
  analysis: Any = step.memory_analysis()
  memory = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return {
    "network": program.model.network,
    "size": program.size,
    "batch": batch,
    "type": program.model.fields.get("dtype", "float32"),
    "remat": program.remat,
    "ms a step": median * 1e3,
    "spread": f"{(high - low) / median:.0%}",
    "examples/s": batch / median,
    "TFLOP/s": program.operations / median / 1e12,
    "memory, GiB": (memory + analysis.temp_size_in_bytes) / 2**30,
    "published batch": program.published_batch,
    "its step, s": program.published_batch * median / batch,
  }


def main(*args: str) -> None:
  """Measure; the argument is after how many seconds no further program is started."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  began, limit = time.perf_counter(), float(args[0]) if args else float("inf")
  waiting = list(ON_CPU if jax.default_backend() == "cpu" else ON_GPU)
  rows: list[dict[str, Any]] = []
  facts = [
    "the preset's network and optimiser on one device; memory is XLA's figure of a step with the training's state",
    "its step: the published batch on this device alone, by accumulation",
  ]
  with concurrent.futures.ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
    while waiting and time.perf_counter() - began < limit:
      group, waiting = waiting[:COMPILED_AT_ONCE], waiting[COMPILED_AT_ONCE:]
      programs = [plan(*case) for case in group]
      compiling = [(program, pool.submit(compiled, lower(program))) for program in programs]
      concurrent.futures.wait([future for _, future in compiling])
      for program, future in compiling:
        try:
          step, seconds = future.result()
          rows.append({**measure(program, step), "compile, s": seconds})
          print(*(f"{name} {timing.cell(value)}," for name, value in rows[-1].items()), flush=True)
        except Exception as error:  # It does not fit, or the backend does not support it: the others go on.
          facts.append(f"{program.model.network} {program.size}, {program.remat}: {type(error).__name__} {error}"[:300])
          print(facts[-1], flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
          write(rows, facts)
      print(f"{len(rows)} rows after {time.perf_counter() - began:.0f} s", flush=True)
  if waiting:
    left = ", ".join(f"{network} {size} ({remat})" for network, size, _, remat in waiting)
    facts.append(f"not measured, for lack of time: {left}")
  write(rows, facts)


def write(rows: list[dict[str, Any]], facts: list[str]) -> None:
  """Write the rows so far, also to the folder of the environment variable OUT."""
  timing.report("presets", {"presets": rows}, facts)
  if os.environ.get("OUT"):
    shutil.copy(timing.RESULTS / "presets.json", os.environ["OUT"])


if __name__ == "__main__":
  main(*sys.argv[1:])
