"""How the cost of sampling grows with batch, resolution, steps, guidance and devices: one table and one picture.

Each row changes one thing. Work is the number of operations of all products, relative to the first row. Where time
over work is 1, the cost is linear. The picture is ``benchmarks/results/growth.png``. Several devices are measured where
there are several; ``XLA_FLAGS=--xla_force_host_platform_device_count=2`` parts a CPU.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxguide as jg
from benchmarks import networks, timing
from jaxguide.training import Model

ROUNDS = 3 if networks.ON_CPU else 7


class Case(NamedTuple):
  """What is drawn: samples at a time, side in pixels, steps, guidance, and the number of devices."""

  batch: int = 8 if networks.ON_CPU else 256
  side: int = 16 if networks.ON_CPU else 32
  steps: int = 10
  guidance: str = "CFG"
  devices: int = 1


BASE = Case()
VALUES: dict[str, tuple[Any, ...]] = {
  "batch": tuple(BASE.batch * 2**power // 8 for power in range(6)),
  "side": (8, 16, 32) if networks.ON_CPU else (16, 32, 64),
  "steps": (5, 10, 20, 40),
  "guidance": ("none", "CFG", "CFG, a third of the steps", "perturbed attention", "classifier", "CFG and classifier"),
  "devices": tuple(2**power for power in range(4) if 2**power <= len(jax.local_devices())),
}
SIGMAS = (0.02, 80.0)


def guidances(unet: Model, classifier: Model, sigmas: np.ndarray) -> Mapping[str, jg.Denoiser]:
  """Return the guided denoisers. A third of the steps are in the middle."""
  low, high = float(sigmas[2 * (len(sigmas) - 1) // 3]), float(sigmas[(len(sigmas) - 1) // 3])
  cfg, by_class = jg.classifier_free(unet.null_cond, 2.0), jg.classifier(classifier.log_prob, 1.0)
  plain = unet.denoiser
  weak = jg.perturbed(plain, jg.Perturbation("identity"))
  return {
    "none": plain,
    "CFG": cfg(plain),
    "CFG, a third of the steps": jg.interval(cfg, low * 1.0001, high)(plain),
    "perturbed attention": jg.autoguidance(weak, 2.0)(plain),
    "classifier": by_class(plain),
    "CFG and classifier": jg.chain(cfg, by_class)(plain),
  }


def prepare(case: Case, unet: Model, classifier: Model) -> tuple[Callable[[], Any], float]:
  """Return a run of a case, and its operations."""
  sigmas = jg.karras(case.steps, *SIGMAS)
  guided = guidances(unet, classifier, np.asarray(sigmas))[case.guidance]
  labels, shape = np.arange(case.batch) % 10, (case.side, case.side, 3)

  def run() -> Any:
    return jg.sample_batch(
      guided, jax.random.key(0), labels, shape=shape, sigmas=sigmas, solver=jg.DPMpp2M(),
      devices=jax.local_devices()[: case.devices],
    )  # fmt: skip

  part = {"CFG, a third of the steps": "none"}.get(case.guidance, case.guidance)
  one = guidances(unet, classifier, np.asarray(sigmas))
  count = lambda name: networks.operations(one[name], jax.ShapeDtypeStruct(shape, np.float32), 1.0, 0)  # noqa: E731
  work = count(part)
  if part != case.guidance:
    inside = np.count_nonzero((sigmas[:-1] > sigmas[2 * case.steps // 3]) & (sigmas[:-1] <= sigmas[case.steps // 3]))
    work += (count("CFG") - work) * float(inside) / case.steps
  return run, work * case.batch * case.steps


def draw_picture(rows: list[dict[str, Any]]) -> None:
  """Draw images a second against each axis, with the line on which the cost is linear."""
  from matplotlib.figure import Figure

  axes = [axis for axis in VALUES if sum(row["axis"] == axis for row in rows) > 1]
  figure = Figure(figsize=(3.6 * len(axes), 3.8), layout="constrained")
  for number, axis in enumerate(axes):
    panel = figure.add_subplot(1, len(axes), number + 1)
    shown = [row for row in rows if row["axis"] == axis]
    values = [row["value"] for row in shown]
    measured, linear = [row["images/s"] for row in shown], [row["linear, images/s"] for row in shown]
    if axis == "guidance":
      places = np.arange(len(shown))
      panel.barh(places, measured, color="tab:blue", label="measured")
      panel.plot(linear, places, "k|", markersize=16, label="as the work")
      panel.set_yticks(places, values)
      panel.invert_yaxis()
      panel.set_xlabel("images a second")
    else:
      panel.plot(values, measured, "o-", label="measured")
      panel.plot(values, linear, "k--", label="as the work")
      panel.set_xscale("log", base=2)
      panel.set_yscale("log", base=2)
      panel.set_xticks(values, [str(value) for value in values])
      panel.set_xlabel({"side": "side, pixels"}.get(axis, axis))
      panel.set_ylabel("images a second")
    panel.legend(fontsize=8)
  timing.RESULTS.mkdir(exist_ok=True)
  figure.savefig(timing.RESULTS / "growth.png", dpi=110)


def main(*axes: str) -> None:
  """Measure the axes that are named (batch, side, steps, guidance, devices), or all."""
  from jaxguide import checks

  for axis in axes:
    checks.lookup("axis", axis, VALUES)
  seen = dataclasses.replace(networks.SMALL_CLASSIFIER, image_shape=(BASE.side, BASE.side, 3))
  unet, classifier = networks.random_model(networks.SMALL), networks.random_model(seen)
  cases = {BASE: None}
  for axis in axes or VALUES:
    cases |= {BASE._replace(**{axis: value}): None for value in VALUES[axis]}
  runs = {case: prepare(case, unet, classifier) for case in cases}
  seconds = timing.measure({repr(case): run for case, (run, _) in runs.items()}, ROUNDS)
  medians = {case: statistics.median(seconds[repr(case)]) for case in cases}
  rows = []
  for axis in axes or VALUES:
    for value in VALUES[axis]:
      case = BASE._replace(**{axis: value})
      work = runs[case][1] / runs[BASE][1]
      ideal = medians[BASE] * work / (case.devices / BASE.devices)
      rows.append({
        "axis": axis, "value": value, "ms": medians[case] * 1e3, "work": work,
        "images/s": case.batch / medians[case], "linear, images/s": case.batch / ideal,
        "time / work": medians[case] / ideal,
      })  # fmt: skip
  draw_picture(rows)
  base = ", ".join(f"{name} {value}" for name, value in BASE._asdict().items())
  timing.report(
    "growth", {f"one thing changed from {base}": rows}, [f"{networks.DTYPE}, DPM-Solver++(2M), 32x32's UNet"]
  )
