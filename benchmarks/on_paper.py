"""Training and sampling on 8, 64 and 512 chips, on paper: from bytes that were counted and figures that were published.

`benchmarks.scaling.sent` is the rule of what a device sends in a training step, and its `compared` holds the rule
against compiled programs. The rest is arithmetic with the figures of `CHIPS` and `NETWORKS` and the assumptions named
below. Nothing here was run on many chips.
"""

import dataclasses
from typing import Any, NamedTuple

from benchmarks import timing
from benchmarks.scaling import GATHERS, compared, measured

SHARE = 0.38
"""Assumed: the share of the chip's peak that a step reaches, for networks that were not measured on it."""

LINK_SHARE = 0.8
"""Assumed: the share of its published bandwidth that a link reaches."""

BYTES = 2
"""Bytes of a gathered parameter and of a gradient that is sent, in bfloat16."""

STATE_BYTES = 20
"""Bytes of a parameter with its gradient, two moments and one running mean, in float32."""

STATE_SHARE = 0.5
"""Assumed: the share of a chip's memory that the state may take, so that activations find room."""

CHIP_NUMBERS = (8, 64, 512)
GROUP = 8
"""Chips of a group that is connected best: a node of H100s, a block of 2x2x2 TPUs."""

SAMPLES = 50_000


class Chip(NamedTuple):
  """Published figures of a chip.

  Args:
    name: its name.
    peak: operations a second in dense bfloat16 products.
    near: bytes a second that it can send, at the same time as it receives, to its group of `GROUP`.
    far: bytes a second that it can send to other groups.
    memory: bytes.
    source: where the figures are from.
  """

  name: str
  peak: float
  near: float
  far: float
  memory: float
  source: str


CHIPS = (
  Chip(
    "H100 SXM",
    1979e12 / 2,
    900e9 / 2,
    400e9 / 8,
    80e9,
    "[NVIDIA H100 GPU](https://www.nvidia.com/en-us/data-center/h100/): 1,979 TFLOP/s of bfloat16 with sparsity, half "
    "of it without; NVLink 900 GB/s, half in each direction. [NVIDIA DGX BasePOD, core components]"
    "(https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/latest/"
    "core-components.html): a port of 400 Gb/s InfiniBand for each of a node's eight GPUs",
  ),
  Chip(
    "TPU v5p",
    459e12,
    1200e9 / 4,
    1200e9 / 4,
    95 * 2**30,
    "[Google Cloud, TPU v5p](https://docs.cloud.google.com/tpu/docs/v5p): 459 TFLOP/s of bfloat16; 1,200 GB/s between "
    "chips, half in each direction, over a torus of three dimensions. Three of a chip's six links stay in its block of "
    "2x2x2, and three leave it, so each has half of that",
  ),
)


class Network(NamedTuple):
  """Published figures of a network.

  Args:
    name: its name.
    parameters: number of parameters.
    forward: operations of a forward pass of one image; a multiplication and an addition are two.
    batch: images of a training step.
    evaluations: evaluations of the guided denoiser for a sample.
    source: where the figures are from, and what they count.
  """

  name: str
  parameters: float
  forward: float
  batch: int
  evaluations: int
  source: str


def adm_256() -> dict[str, Any]:
  """Give the measured training step of ADM-256 on an H100."""
  rows = measured("presets-h100")["tables"]["presets"]
  return next(row for row in rows if (row["network"], row["size"], row["remat"]) == ("unet", 256, "none"))


def multiply_adds(billions: float) -> float:
  """Give the operations of a number of multiply-adds, which papers count in billions."""
  return 2 * billions * 1e9


NETWORKS = (
  Network(
    "ADM-256",
    553_832_195,
    # Forward and backward together have three times the operations of the forward pass.
    adm_256()["TFLOP/s"] * 1e12 / adm_256()["examples/s"] / 3,
    256,
    250,
    "the preset `unet` of 256x256, by `jaxguide.training.describe.describe`: operations, two a multiply-add. Batch and "
    "250 steps: arXiv:2105.05233",
  ),
  Network(
    "DiT-XL/2",
    675e6,
    multiply_adds(118.6),
    256,
    250,
    "arXiv:2212.09748, Table 4 (latents of 256x256): 118.6 Gflops are multiply-adds, since its 28 blocks of 1,152 "
    "channels and 256 tokens have 118.6 billion of them. 250 steps of DDPM",
  ),
  Network(
    "EDM2-XXL",
    1.523e9,
    multiply_adds(552),
    2048,
    63,
    "arXiv:2312.02696, Table 2 (latents of 512x512): 552 Gflops are multiply-adds, since the layers of "
    "[its code](https://github.com/NVlabs/edm2) have 547 billion of them. 32 steps of Heun, 63 evaluations",
  ),
)


# --- many chips -----------------------------------------------------------------------------------


def over_all(chip: Chip, chips: int, size: float) -> float:
  """Give the seconds of an all-gather to, or a reduce-scatter from, ``size`` bytes over all chips.

  It goes through each group and, with the part that a chip has then, across the groups.
  """
  groups = chips // GROUP
  within = (GROUP - 1) / GROUP * size / chip.near
  return (within + (groups - 1) / groups * size / GROUP / chip.far) / LINK_SHARE


def over_group(chip: Chip, size: float) -> float:
  """Give the seconds of the same within a group."""
  return over_all(chip, GROUP, size)


def across_groups(chip: Chip, chips: int, size: float) -> float:
  """Give the seconds of the same between the chips that have the same place in each group."""
  groups = chips // GROUP
  return (groups - 1) / groups * size / chip.far / LINK_SHARE


MESHES = ("data", "both", "fsdp")


def communication(network: Network, chip: Chip, chips: int, mesh: str) -> float:
  """Give the seconds in which a training step communicates.

  An all-reduce is a reduce-scatter and an all-gather. ``data`` all-reduces the gradient. ``fsdp`` gathers the
  parameters `GATHERS` times, and reduces and scatters the gradient. ``both`` does so within a group, and all-reduces
  each chip's part of the gradient across the groups.
  """
  size = BYTES * network.parameters
  if mesh == "data":
    return 2 * over_all(chip, chips, size)
  if mesh == "fsdp":
    return (GATHERS + 1) * over_all(chip, chips, size)
  return (GATHERS + 1) * over_group(chip, size) + 2 * across_groups(chip, chips, size / GROUP)


def share(network: Network, chip: Chip) -> float:
  """Give the share of the peak that is reached: measured for ADM-256 on an H100, and assumed elsewhere."""
  if (network.name, chip.name) == ("ADM-256", "H100 SXM"):
    return adm_256()["TFLOP/s"] * 1e12 / chip.peak
  return SHARE


def computation(network: Network, chip: Chip, images: float) -> float:
  """Give the seconds in which a chip computes a training step of some images."""
  return images * 3 * network.forward / (share(network, chip) * chip.peak)


def state(network: Network, mesh: str, chips: int) -> float:
  """Give the bytes of a chip's part of the state."""
  return network.parameters * STATE_BYTES / {"data": 1, "both": GROUP, "fsdp": chips}[mesh]


@dataclasses.dataclass(frozen=True)
class Step:
  """A training step on paper.

  Args:
    network: the network.
    chip: the chip.
    chips: their number.
  """

  network: Network
  chip: Chip
  chips: int

  @property
  def images(self) -> int:
    """The images of a chip: its part of the published batch, and at least one."""
    return max(1, self.network.batch // self.chips)

  @property
  def larger(self) -> int:
    """How much larger than the published batch the batch is."""
    return self.images * self.chips // self.network.batch

  @property
  def computes(self) -> float:
    """The seconds of computing."""
    return computation(self.network, self.chip, self.images)

  def communicates(self, mesh: str) -> float:
    """Give the seconds of communicating."""
    return communication(self.network, self.chip, self.chips, mesh)

  @property
  def best(self) -> str:
    """The mesh that communicates least, of those whose state fits; on one group ``both`` is ``fsdp``."""
    fits = [mesh for mesh in MESHES if state(self.network, mesh, self.chips) <= STATE_SHARE * self.chip.memory] or [
      "fsdp"
    ]
    return min(fits, key=self.communicates)

  def efficiency(self, *, hidden: bool) -> float:
    """Give the share of the time in which a chip computes, on the best mesh.

    Args:
      hidden: whether it communicates while it computes; otherwise one comes after the other.
    """
    talks = self.communicates(self.best)
    return self.computes / (max(self.computes, talks) if hidden else self.computes + talks)


def fewest(network: Network, chip: Chip, chips: int, mesh: str) -> float:
  """Give the images of a chip with which a step computes as long as it communicates."""
  return communication(network, chip, chips, mesh) / computation(network, chip, 1)


def chip_hours(network: Network, chip: Chip, evaluations: int) -> float:
  """Give the chip-hours of `SAMPLES` guided samples: two passes of the network an evaluation."""
  return SAMPLES * evaluations * 2 * network.forward / (share(network, chip) * chip.peak) / 3600


FEW = 20
"""Evaluations of a sampler with few steps, such as DPM-Solver++(2M)."""


# --- tables ---------------------------------------------------------------------------------------


def number(value: float) -> str:
  """Format a number with three digits."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def of_networks() -> list[dict[str, str]]:
  """The figures of the networks."""
  return [
    {
      "network": network.name,
      "parameters": f"{network.parameters / 1e6:,.0f} million",
      "forward pass of an image": f"{network.forward / 1e9:,.0f} GFLOP",
      "images a step": f"{network.batch:,}",
      "evaluations a sample": str(network.evaluations),
      "source": network.source,
    }
    for network in NETWORKS
  ]


def of_chips() -> list[dict[str, str]]:
  """The figures of the chips."""
  return [
    {
      "chip": chip.name,
      "bfloat16": f"{chip.peak / 1e12:,.4g} TFLOP/s",
      "to its eight": f"{chip.near / 1e9:,.0f} GB/s",
      "to others": f"{chip.far / 1e9:,.0f} GB/s",
      "memory": f"{chip.memory / 1e9:,.0f} GB",
      "source": chip.source,
    }
    for chip in CHIPS
  ]


def of_rule() -> list[dict[str, str]]:
  """What programs send, beside the rule."""
  rows = []
  for name, device in (("scaling-cpu", "CPU"), ("scaling-v5p", "TPU v5p")):
    for row in compared(name):
      rows.append(
        {
          "compiled for": device,
          "mesh": f"`{row['axes']}`",
          "type": row["type"],
          "parameters are gathered": f"{row['gathers']} x" if row["gathers"] else "",
          "gradient by": row["reduced by"],
          **{
            f"{what} sent, KiB (by the rule)": f"{number(row[what] / 1024)} ({number(row[f'{what}, rule'] / 1024)})"
            for what in ("gathered", "reduced")
          },
          "state of a device, KiB": number(row["arguments"] / 1024),
          "temporaries, KiB": number(row["temporaries"] / 1024),
        }
      )
  return rows


def of_sampling() -> list[dict[str, str]]:
  """What sampling programs send."""
  rows = []
  for name, device in (("scaling-cpu", "CPU"), ("scaling-v5p", "TPU v5p")):
    tables = measured(name)["tables"]
    for memory in tables["memory, sampling"]:
      found = [
        row
        for row in tables["collectives, sampling"]
        if all(row[key] == memory[key] for key in ("devices", "mesh", "type"))
      ]
      rows.append(
        {
          "compiled for": device,
          "mesh": f"`{memory['axes']}`",
          "type": memory["type"],
          "collectives": ", ".join(f"{row['number']} {row['kind']}" for row in found) or "none",
          "of them in the loop": str(sum(row["in a loop"] for row in found)),
          "received, of the split parameters": (
            f"{sum(row['result_bytes'] for row in found) / memory['split']:.3g} x" if found else ""
          ),
          "parameters of a device, KiB": number(memory["arguments"] / 1024),
        }
      )
  return rows


def of_times() -> list[dict[str, str]]:
  """The times on this CPU."""
  return [
    {
      "devices and mesh": row["devices and mesh"],
      "ms a step": number(row["ms"]),
      "spread": row["spread"],
      "/ one device": f"{row['/ 1 data']:.2f}",
      "of the cores, ms a step": number(row["CPU, ms"]),
      "of the cores, / one device": f"{row['CPU, / 1 data']:.2f}",
    }
    for row in measured("scaling-cpu")["tables"]["time of a training step"]
  ]


def of_steps() -> list[dict[str, str]]:
  """Training steps on many chips."""
  return [
    {
      "network": network.name,
      "chips": f"{chips} {chip.name}",
      "images a chip": str(step.images) + (f" ({step.larger} x the batch)" if step.larger > 1 else ""),
      "computes, ms": number(step.computes * 1e3),
      **{f"`{mesh}` sends, ms": number(step.communicates(mesh) * 1e3) for mesh in MESHES},
      "best": f"`{step.best}`",
      "step, ms": f"{number(max(step.computes, talks) * 1e3)} to {number((step.computes + talks) * 1e3)}",
      "efficiency": f"{step.efficiency(hidden=False):.0%} to {step.efficiency(hidden=True):.0%}",
    }
    for network in NETWORKS
    for chip in CHIPS
    for chips in CHIP_NUMBERS
    for step in [Step(network, chip, chips)]
    for talks in [step.communicates(step.best)]
  ]


def of_bounds() -> list[dict[str, str]]:
  """Images of a chip below which the network bounds a step on the most chips, and the memory of the state."""
  most = CHIP_NUMBERS[-1]
  return [
    {
      "network": network.name,
      "chip": chip.name,
      **{f"images, `{mesh}`": f"{fewest(network, chip, most, mesh):.2g}" for mesh in MESHES},
      **{f"state, `{mesh}`": f"{state(network, mesh, most) / 1e9:.3g} GB" for mesh in MESHES},
    }
    for network in NETWORKS
    for chip in CHIPS
  ]


def of_samples() -> list[dict[str, str]]:
  """The cost of many guided samples."""
  return [
    {
      "network": network.name,
      "chip": chip.name,
      f"{SAMPLES:,} samples as published": f"{number(chip_hours(network, chip, network.evaluations))} chip-hours",
      f"in {FEW} evaluations": f"{number(chip_hours(network, chip, FEW))} chip-hours",
      "an evaluation of 32 images": f"{number(32e3 * 2 * network.forward / (share(network, chip) * chip.peak))} ms",
      "its gather, `fsdp=8`": f"{number(1e3 * over_group(chip, BYTES * network.parameters))} ms",
    }
    for network in NETWORKS
    for chip in CHIPS
  ]


TABLES = {
  "rule": of_rule,
  "sampling": of_sampling,
  "times": of_times,
  "chips": of_chips,
  "networks": of_networks,
  "steps": of_steps,
  "bounds": of_bounds,
  "samples": of_samples,
}
"""The tables of docs/scaling.md by their name there."""


def main() -> None:
  """Print the tables."""
  for name, make in TABLES.items():
    print(f"\n{name}\n\n{timing.table(make())}")
