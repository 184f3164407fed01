"""How many bytes a step of guided sampling moves on a GPU, and what the least would be. No GPU is needed.

The program is compiled for one H200 without the card, where JAX's CUDA plugin is installed
(``pip install 'jax[cuda13]'``), or it is read from a file, as ``benchmarks gpu`` writes it. Of each kernel the bytes of
its inputs and outputs are counted. Products are convolutions, matrix products and attention. The least is what the
products read and write: all else could be done while they do so. ``python -m benchmarks roofline [NAME or FILE ...]``.
"""

import collections
import functools
import gzip
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import timing
from jaxguide import checks
from jaxguide.nn.normalisation import group_norm
from jaxguide.training.describe import state_shapes
from jaxguide.training.edm_presets import NAMED
from jaxguide.training.step import train_step

PRODUCTS = {
  "__cudnn$conv": "convolutions",
  "__cublas": "matrix products",
  "__cudnn$fmha": "attention",
}
SIZES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
"""What XLA has to know of the card that it compiles for."""

FLAGS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
"""Without a card nothing can be tried. Products by the library are what a card chooses mostly."""


def bytes_of(shape: str) -> int:
  """Return the bytes of an array or of a tuple of them, as XLA writes its type."""
  arrays = re.findall(rf"\b({'|'.join(SIZES)})\[([\d,]*)\]", shape)
  return sum(SIZES[kind] * math.prod(int(side) for side in sides.split(",") if side) for kind, sides in arrays)


def kernels(program: str, once: bool = False) -> list[dict[str, Any]]:
  """Return the kernels of a program.

  Each has its kind, the bytes that it reads and writes, and the name of what it is part of.

  Args:
    program: a compiled program, as ``compiled.as_text()`` gives it.
    once: whether to count what runs once, outside of loops, and not the bodies of the loops.
  """
  heading = re.compile(r"^(?:ENTRY )?%([\w.\-]+) .*\{$")
  instruction = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
  computations: dict[str, list[tuple[str, str, str, str]]] = {}
  shapes: dict[str, str] = {}
  current = entry = ""
  for line in program.splitlines():
    if head := heading.match(line):
      current = head[1]
      entry = current if line.startswith("ENTRY") else entry
    elif found := instruction.match(line):
      name, shape, call, rest = found.groups()
      computations.setdefault(current, []).append((name, shape, call, rest))
      shapes[name] = shape
  waiting = [entry] if once else re.findall(r"\bbody=%([\w.\-]+)", program)
  inside: list[tuple[str, str, str, str]] = []
  while waiting:
    for each in computations.pop(waiting.pop(), []):
      inside.append(each)
      if each[2] in ("call", "async-start", "conditional"):
        waiting += re.findall(r"(?:to_apply|calls)=%([\w.\-]+)", each[3])
  rows = []
  for name, shape, call, rest in inside:
    if call not in ("fusion", "custom-call", "copy"):
      continue
    target = re.search(r'custom_call_target="([^"]*)"', rest)
    if call == "custom-call":
      kind = next((kind for prefix, kind in PRODUCTS.items() if target and target[1].startswith(prefix)), "other calls")
      shape = re.sub(r",? ?s8\[\d+\]\{0\}", "", shape)  # noqa: PLW2901 - the library's own workspace is left out
    elif "gemm_fusion" in name:
      kind = "matrix products"
    else:
      kind = "sums and elementwise" if "reduce" in name else "elementwise"
    inputs = set(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
    size = bytes_of(shape) + sum(bytes_of(shapes.get(each, "")) for each in inputs)
    part = re.search(r'op_name="([^"]*)"', rest)
    rows.append({"kind": kind, "bytes": size, "part": part[1] if part else ""})
  return rows


def traffic(program: str, once: bool = False) -> list[dict[str, Any]]:
  """Return a row for each kind of kernel: their number and their gigabytes."""
  sums: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  for row in kernels(program, once):
    sums[row["kind"]][0] += 1
    sums[row["kind"]][1] += row["bytes"] / 1e9
  rows = [{"kind": kind, "kernels": number, "GB": size} for kind, (number, size) in sorted(sums.items())]
  least = sum(row["GB"] for row in rows if row["kind"] in PRODUCTS.values())
  return [*rows, {"kind": "all", "GB": sum(row["GB"] for row in rows)}, {"kind": "the least", "GB": least}]


def compile_for_gpu(function: Callable[..., Any], *args: Any) -> Any:
  """Compile a function for one H200 that need not be there.

  Args:
    function: the function.
    *args: its arguments, arrays or their shapes and types.

  Raises:
    ImportError: if JAX's CUDA plugin is not installed.
  """
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  try:
    import jax_plugins.xla_cuda13
  except ImportError as error:
    raise ImportError("to compile for a GPU needs JAX's plugin and no card: pip install 'jax[cuda13]'") from error
  from jax._src import xla_bridge
  from jax.experimental import topologies

  if "cuda" not in xla_bridge._topology_factories:
    jax_plugins.xla_cuda13.initialize()
  card = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
  place = jax.sharding.NamedSharding(topologies.make_mesh(card, (1,), ("card",)), jax.sharding.PartitionSpec())

  def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(jax.typeof(leaf).dtype), sharding=place)

  with mock.patch.object(jax, "default_backend", return_value="gpu"):
    lowered = jax.jit(function).lower(*jax.tree.map(placed, args))
  return lowered.compile(FLAGS)


def normalisation() -> tuple[Callable[..., Any], ...]:
  """Return the input gradient of normalisation with SiLU, and its arguments: 64 images of 64x64 with 128 channels."""
  x = jax.ShapeDtypeStruct((64, 64, 64, 128), jnp.bfloat16)
  weights = jax.ShapeDtypeStruct((128,), jnp.float32)
  shift = jax.ShapeDtypeStruct((64, 1, 1, 128), jnp.bfloat16)

  def gradient(x, cotangent, scale, bias, scale_shift):
    norm = lambda x: group_norm(x, scale, bias, scale_shift, True, 32, 1e-5, jnp.bfloat16)  # noqa: E731
    return jax.vjp(norm, x)[1](cotangent)[0]

  return gradient, x, x, weights, weights, (shift, shift)


def training_step() -> tuple[Callable[..., Any], ...]:
  """Return the training step of ADM-64 for 64 images, and its arguments."""
  from benchmarks import networks, training  # They import this.

  config = networks.abstract_model(training.CASES["ADM-64"][0], "bfloat16").config
  batch = training.batch_of(config, 64)
  return train_step(config, training.TRAINING), state_shapes(config, training.TRAINING), *batch


def sampler(name: str) -> tuple[Callable[..., Any], ...]:
  """Return a sampler of `benchmarks.gpu`, and its arguments."""
  from benchmarks import gpu, networks  # They import this.

  function, args, *_ = gpu.sampler(name, functools.partial(networks.abstract_model, dtype="bfloat16"))
  return function, *args


def edm(batch: int, shape: tuple[int, int, int], good: str, weak: str | None = None) -> tuple[Callable[..., Any], ...]:
  """Return DDIM of a network of EDM or EDM2, and its arguments; with autoguidance if a weak network is named."""
  from benchmarks import gpu, networks  # They import this.

  configs = [NAMED[name].model_config(shape, 1000) for name in (good, weak) if name is not None]
  denoiser, *other = (networks.abstract_model(config, "bfloat16").denoiser for config in configs)
  guided = jg.autoguidance(*other, 2.1)(denoiser) if other else denoiser
  function, args, _ = gpu.ddim(guided, configs[0], batch)
  return function, *args


CASES: dict[str, Callable[[], tuple[Callable[..., Any], ...]]] = {
  **{name: functools.partial(sampler, name) for name in ("ADM-64", "ADM-256", "DiT-XL-2")},
  "EDM-ADM": functools.partial(edm, 64, (64, 64, 3), "edm-imagenet64-adm"),
  "EDM2-S": functools.partial(edm, 32, (64, 64, 4), "edm2-img512-s", "edm2-img512-xs"),
  "training": training_step,
  "normalisation": normalisation,
}


ONCE = ("training", "normalisation")
"""The cases whose step is the whole program, and not the body of a loop."""


def main(*names: str) -> None:
  """Count the bytes of the steps that are named, or of those in files."""
  tables = {}
  for name in names or CASES:
    if Path(name).is_file():
      with gzip.open(name, "rt") if name.endswith(".gz") else open(name) as file:
        program = file.read()
    else:
      program = compile_for_gpu(*checks.lookup("case", name, CASES)()).as_text()
    tables[f"{name}, one step"] = traffic(program, name in ONCE)
  timing.report("roofline", tables, ["bytes of each kernel's inputs and outputs, as if nothing were kept in a cache"])
