"""What devices send to each other in a training step and in sampling, their memory, and the time on parts of one CPU.

``python -m benchmarks scaling`` compiles and runs a small UNet on 1, 2, 4 and 8 parts of this CPU: ``data`` copies the
parameters, ``fsdp`` splits them, ``both`` has two copies of split ones. The parts share the cores, so their times show
what dividing the work costs, and no gain. ``python -m benchmarks scaling v5p`` compiles the same programs for eight TPU
v5p chips, and ``v5p:4x4x4`` for 64; that needs ``pip install libtpu`` and no TPU, and runs nothing.
`benchmarks.on_paper` reads what both count.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

import jaxguide as jg
from benchmarks import networks, timing
from benchmarks.memory import guided_by_labels
from jaxguide import sampling
from jaxguide.distributed import MeshConfig, Placement
from jaxguide.distributed.collectives import collectives, totals
from jaxguide.training import Model, ModelConfig, TrainingConfig
from jaxguide.training.step import init_state, state_shapes, train_step

BATCH, STEPS, ROUNDS = 16, 4, 15
FIELDS = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "num_head_channels": 32}
TRAINING = TrainingConfig(steps=1000, batch_size=BATCH)
DEVICES = (1, 2, 4, 8)
CHIPS = {"v5p": "v5p:2x2x2"}
MEASURED = Path(__file__).parent / "measured"

GATHERS = 2
"""How often a step gathers parameters that are split: for the forward pass, and for the backward pass."""


def meshes(devices: int) -> dict[str, MeshConfig]:
  """Give the meshes of a number of devices by their name."""
  found = {"data": MeshConfig(data=devices)}
  if devices > 1:
    found["fsdp"] = MeshConfig(data=1, fsdp=devices)
  if devices > 2:
    found["both"] = MeshConfig(data=2, fsdp=devices // 2)
  return found


def network(dtype: str) -> ModelConfig:
  """Give the network that is counted."""
  return ModelConfig("unet", {**FIELDS, "dtype": dtype}, (8, 8, 3), 10)


def shaped(tree: Any, shardings: Any) -> Any:
  """Give the shapes of arrays with where they are placed."""

  def shape(leaf, sharding):
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  return jax.tree.map(shape, tree, shardings)


def rows_of(place: Placement, *arrays: Any) -> tuple[Any, ...]:
  """Give the shapes of arrays whose rows are split."""
  return shaped(arrays, jax.tree.map(lambda _: place.split, arrays))


def training_program(model: ModelConfig, place: Placement) -> Any:
  """Lower a training step on a mesh, with shapes only."""
  state = state_shapes(model, TRAINING)
  images, labels = np.zeros((BATCH, *model.image_shape), np.uint8), np.zeros(BATCH, np.int32)
  step: Any = train_step(model, TRAINING, place)
  return step.lower(shaped(state, place.shardings(state)), *rows_of(place, images, labels))


def sampling_program(model: ModelConfig, place: Placement) -> Any:
  """Lower classifier-free guidance with DPM-Solver++(2M) on a mesh, with shapes only."""
  denoise = guided_by_labels(Model(model, state_shapes(model, TRAINING).params))
  return sampling.lower_batch(
    denoise, np.zeros(BATCH, np.int32), num=BATCH, shape=model.image_shape, sigmas=jg.karras(STEPS),
    solver=jg.DPMpp2M(), devices=place.mesh,
  )  # fmt: skip


PROGRAMS = {"training step": training_program, "sampling": sampling_program}


def counted(model: ModelConfig, place: Placement, compiled: Any) -> dict[str, Any]:
  """Count what a compiled program sends and holds, on one device."""
  # TPU's compiler does not say how often the loop over the steps runs.
  found = [dataclasses.replace(one, runs=STEPS) if one.runs is None else one for one in collectives(compiled)]
  analysis = compiled.memory_analysis()
  params = [
    (leaf.shape, leaf.size * leaf.dtype.itemsize) for leaf in jax.tree.leaves(state_shapes(model, TRAINING).params)
  ]
  sums = {kind: total._asdict() for kind, total in totals(found).items()}
  for kind, total in sums.items():
    total["in a loop"] = sum(one.in_loop for one in found if one.kind == kind)
    total["asynchronous"] = sum(one.asynchronous for one in found if one.kind == kind)
  return {
    "collectives": sums,
    "parameters": sum(size for _, size in params),
    "split": sum(size for shape, size in params if any(place.spec(shape))),
    "arguments": analysis.argument_size_in_bytes,
    "temporaries": analysis.temp_size_in_bytes,
  }


def steps(model: ModelConfig, place: Placement, compiled: Any) -> tuple[list[float], float]:
  """Time training steps, each of which takes the state of the one before; give their seconds, and the CPU's for one."""
  state = [place.shards(init_state(model, TRAINING))]
  images = np.random.default_rng(0).integers(0, 256, (BATCH, *model.image_shape)).astype(np.uint8)
  batch = place.rows((images, (np.arange(BATCH) % 10).astype(np.int32)))

  def run():
    state[0], metrics = compiled(state[0], *batch)
    return state[0], metrics

  began = time.process_time()
  seconds = timing.measure({"step": run}, ROUNDS)["step"]
  return seconds, (time.process_time() - began) / (ROUNDS + 1)


def work(mesh: str, topology: str, dtype: str) -> None:
  """Count the programs of a mesh in a process of its own, and print what was found as JSON."""
  if topology:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    config = MeshConfig.parse(mesh)
    arranged = np.array(devices).reshape(config.sizes(len(devices)))
    place = Placement(Mesh(arranged, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3))
  else:
    place = Placement(MeshConfig.parse(mesh).make())
  model, found = network(dtype), {}
  # The networks choose their operations by the backend.
  with mock.patch.object(jax, "default_backend", return_value="tpu" if topology else jax.default_backend()):
    lowered = {name: lower(model, place) for name, lower in PROGRAMS.items()}
  for name, program in lowered.items():
    compiled = program.compile()
    found[name] = counted(model, place, compiled)
    if name == "training step" and not topology:
      found[name]["seconds"], found[name]["CPU seconds"] = steps(model, place, compiled)
  print(json.dumps(found))


def process(mesh: MeshConfig, devices: int, topology: str = "", dtype: str = "float32") -> dict[str, Any]:
  """Run `work`; give what it found."""
  flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
  # libtpu would ask the network what machine it is on.
  flags |= {"TPU_SKIP_MDS_QUERY": "1"} if topology else {}
  code = f"from benchmarks import scaling; scaling.work({str(mesh)!r}, {topology!r}, {dtype!r})"
  out = subprocess.run(
    [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, env=os.environ | flags
  )
  return json.loads(out.stdout.splitlines()[-1])


def row(devices: int, name: str, mesh: MeshConfig, dtype: str) -> dict[str, Any]:
  """Give what names a mesh in a row."""
  return {"devices": devices, "mesh": name, "axes": str(mesh), "type": dtype}


def tables(found: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
  """Lay what was found out in tables."""
  made: dict[str, list[dict[str, Any]]] = {}
  for program in PROGRAMS:
    of_program = [(head, counts[program]) for head, counts in found]
    made[f"collectives, {program}"] = [
      {**head, "kind": kind, **total} for head, counts in of_program for kind, total in counts["collectives"].items()
    ]
    made[f"memory, {program}"] = [
      {**head, **{key: counts[key] for key in ("parameters", "split", "arguments", "temporaries")}}
      for head, counts in of_program
    ]
  timed = {
    f"{head['devices']} {head['mesh']}": counts["training step"]
    for head, counts in found
    if "seconds" in counts["training step"]
  }
  if timed:
    rows = timing.summary({name: one["seconds"] for name, one in timed.items()}, "1 data", label="devices and mesh")
    first = timed["1 data"]["CPU seconds"]
    made["time of a training step"] = [
      {**row, "CPU, ms": one["CPU seconds"] * 1e3, "CPU, / 1 data": one["CPU seconds"] / first}
      for row, one in zip(rows, timed.values(), strict=True)
    ]
  return made


def main(*args: str) -> None:
  """Count and time on this CPU; or count for TPU chips, if their topology is given."""
  report = functools.partial(timing.report, f"scaling-{args[0].replace(':', '-')}" if args else "scaling")
  facts = [
    f"UNet of 32 channels, 8x8x3, batch {BATCH}; sampling is CFG, DPM-Solver++(2M), {STEPS} steps; bytes of a device"
  ]
  found: list[tuple[dict[str, Any], dict[str, Any]]] = []
  if args:
    topology = CHIPS.get(args[0], args[0])
    devices = int(np.prod([int(side) for side in topology.partition(":")[2].split("x")]))
    facts.append(f"compiled for a TPU {topology} by libtpu on this machine, and not run")
    for dtype in ("float32", "bfloat16"):
      for name, mesh in meshes(devices).items():
        found.append((row(devices, name, mesh, dtype), process(mesh, devices, topology, dtype)))
        report(tables(found), facts)
    return
  assert networks.ON_CPU, "the parts of a CPU are measured: set JAX_PLATFORMS=cpu"
  facts.append("the devices are parts of one CPU and share its cores: times show what dividing the work costs, no gain")
  for devices in DEVICES:
    for name, mesh in meshes(devices).items():
      found.append((row(devices, name, mesh, "float32"), process(mesh, devices)))
      report(tables(found), facts)


# --- the rule, and what programs contain ----------------------------------------------------------


def measured(name: str) -> dict[str, Any]:
  """Read a file of ``benchmarks/measured``."""
  return json.loads((MEASURED / f"{name}.json").read_text())


def sent(
  data: int, fsdp: int, parameters: float, split: float, *, gathers: int = GATHERS, scatter: bool = True
) -> dict[str, float]:
  """Give the bytes that a device sends in a training step, by ring algorithms.

  Over ``data`` the gradient is all-reduced. Over ``fsdp`` the split parameters are gathered, and their gradient is
  reduced and scattered, so that over ``data`` each device all-reduces its part alone.

  Args:
    data: copies of the parameters.
    fsdp: parts of the parameters.
    parameters: bytes of all parameters, and of the gradient.
    split: bytes of the parameters that are split.
    gathers: how often a step gathers them.
    scatter: whether the compiler writes a reduce-scatter; otherwise it is an all-reduce, of which a part is kept.

  Returns:
    The bytes of gathering ``parameters`` and of reducing the ``gradient``.
  """
  split = split if fsdp > 1 else 0.0
  of_fsdp, of_data, of_all = ((number - 1) / number for number in (fsdp, data, data * fsdp))
  return {
    "parameters": gathers * of_fsdp * split,
    "gradient": (1 if scatter else 2) * of_fsdp * split
    + 2 * of_data * split / fsdp
    + 2 * of_all * (parameters - split),
  }


def compared(name: str) -> list[dict[str, Any]]:
  """Compare the training steps of a measured file with the rule.

  The rule's ``gathers`` and ``scatter`` are those of the program: how often XLA kept the gathers apart, and whether it
  wrote a reduce-scatter.
  """
  tables, rows = measured(name)["tables"], []
  for memory in tables["memory, training step"]:
    kinds = {
      row["kind"]: row
      for row in tables["collectives, training step"]
      if all(row[key] == memory[key] for key in ("devices", "mesh", "type"))
    }
    if memory["devices"] == 1:
      continue
    axes = dict(part.split("=") for part in memory["axes"].split(","))
    data, fsdp = int(axes.get("data", 1)), int(axes.get("fsdp", 1))
    gathered, reduced = (sum(kinds[kind]["sent"] for kind in of if kind in kinds) for of in REDUCED)
    size = memory["parameters"] * (0.5 if memory["type"] == "bfloat16" else 1)
    split = memory["split"] * size / memory["parameters"]
    once = sent(data, fsdp, size, split, gathers=1)["parameters"]
    gathers = round(gathered / once) if once else 0
    rule = sent(data, fsdp, size, split, gathers=gathers, scatter="reduce-scatter" in kinds)
    rows.append(
      {
        **{key: memory[key] for key in ("devices", "mesh", "axes", "type", "arguments", "temporaries")},
        "gathers": gathers,
        "reduced by": "reduce-scatter" if "reduce-scatter" in kinds else "all-reduce",
        "gathered": gathered,
        "reduced": reduced,
        "gathered, rule": rule["parameters"],
        "reduced, rule": rule["gradient"],
      }
    )
  return rows


REDUCED = (("all-gather",), ("all-reduce", "reduce-scatter"))
"""What belongs to the parameters, and what to the gradient."""
