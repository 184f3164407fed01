"""What docs/choosing.md advises, measured on the animals of the package: solvers, grids, and remedies at a high scale.

``python -m benchmarks choosing`` measures all in some 15 minutes of CPU time; ``python -m benchmarks choosing solvers``
(or ``grids``, ``high``) measures one. The figures go to benchmarks/measured/choosing.json. ``python tests/readme.py``
writes the tables of docs/choosing.md from it, and ``python -m benchmarks choosing picture`` its picture. The same noise
and the same labels serve every row. An evaluation is one of the guided denoiser: two passes of the network with
classifier-free guidance.

A row is what `jaxguide sample` draws with the same settings. Here one step is compiled and used for every number of
steps, so that a solver is compiled once.
"""

import datetime
import functools
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.animals import NAME
from jaxguide import data, evaluation, models, sampling
from jaxguide._core import checks, keys
from jaxguide._core.files import write_atomically
from jaxguide.generate import Settings
from jaxguide.generate.plan import Plan, plan
from jaxguide.solvers.base import Conditioned

FILE = Path(__file__).parent / "measured" / "choosing.json"
PICTURE = Path(__file__).parents[1] / "docs" / "choosing.png"
NUM, PER_BATCH, FOR_DISTANCE = 60, 20, 20
SCALE, STEPS, HIGH = 2.0, 12, 8.0
EVALUATIONS, JUDGED = (6, 8, 12, 20, 50), (6, 12, 20)
DETERMINISTIC = ("ddim", "heun", "dpmpp-2m", "dpmpp-3m", "unipc")
SOLVERS = {"dpmpp-2m": JUDGED, "ddim": JUDGED, "heun": JUDGED, "dpmpp-3m": (), "unipc": ()}
SOLVERS |= {"dpmpp-2m-sde": (12,)}
"""The solvers, and at how many evaluations their samples are judged."""
TITLES = {
  "ddim": "DDIM",
  "heun": "Heun",
  "dpmpp-2m": "DPM-Solver++(2M)",
  "dpmpp-3m": "DPM-Solver++(3M)",
  "unipc": "UniPC",
  "dpmpp-2m-sde": "SDE-DPM-Solver++(2M)",
}
"""How the picture calls the solvers."""
GRIDS = ("karras", "log-snr", "cosine-time")
AT_HIGH = {
  "cfg": (SCALE, HIGH),
  "cfg:sigma_lo=0.3,sigma_hi=3": (HIGH,),
  "cfg:profile=powered-cosine,power=4": (HIGH,),
  "cfg:combine=projected,norm_threshold=2.5": (HIGH,),
  "pag": (4.0,),
}
MEASURES = ("accuracy", "frechet_distance", "diversity")

Row = dict[str, Any]


def planned(num: int = NUM, **settings: Any) -> Plan:
  """Plan samples of all classes in turn."""
  return plan(Settings(model=NAME, num=num, **settings))


def walked(made: Plan, per_batch: int = PER_BATCH) -> tuple[np.ndarray, float]:
  """Draw the samples of a plan as `jaxguide.sample_batch` does. Return x0, and the CPU seconds without compilation."""
  num = len(made.labels) if made.labels is not None else made.settings.num
  sample_keys = sampling.sample_keys(keys.seed_key(made.settings.seed), num)
  sigmas, parts, seconds = np.asarray(made.sigmas), [], 0.0
  for first in range(0, num, per_batch):
    rows = slice(first, first + per_batch)
    each, cond = sample_keys[rows], jnp.asarray(made.cond[rows])
    states = _start(made.solver, each, sigmas[0], tuple(made.image_shape))
    levels = list(zip(np.arange(len(sigmas) - 1), sigmas[:-1], sigmas[1:], strict=True))
    if not first:
      jax.block_until_ready(_step(made.denoiser, made.solver, states, *levels[0], each, cond))
    began = time.process_time()
    for level in levels:
      states = _step(made.denoiser, made.solver, states, *level, each, cond)
    parts.append(np.asarray(states.x))
    seconds += time.process_time() - began
  return np.concatenate(parts), seconds


@functools.partial(jax.jit, static_argnames="shape")
def _start(solver, sample_keys, sigma, shape):
  def one(key):
    return solver.init(sigma * jax.random.normal(jax.random.split(key)[0], shape))

  return jax.vmap(one)(sample_keys)


@jax.jit
def _step(denoise, solver, states, i, sigma, sigma_next, sample_keys, cond):
  def one(state, key, cond):
    key = jax.random.fold_in(jax.random.split(key)[1], i)
    return solver.step(Conditioned(denoise, cond), state, sigma, sigma_next, key)

  return jax.vmap(one)(states, sample_keys, cond)


@functools.cache
def converged() -> np.ndarray:
  """Draw the samples from which distances are measured: DPM-Solver++(3M) in 100 steps."""
  return walked(planned(FOR_DISTANCE, guidance="cfg", scale=SCALE, solver="dpmpp-3m", steps=100))[0]


def distance(x: np.ndarray, exact: np.ndarray, resamples: int = 1000) -> Row:
  """Give the root mean square difference per pixel, where black is -1 and white is 1, with its bootstrap interval."""
  squares = np.mean((x[: len(exact)] - exact) ** 2, axis=(1, 2, 3))
  chosen = np.random.default_rng(0).integers(len(squares), size=(resamples, len(squares)))
  low, high = np.quantile(np.sqrt(squares[chosen].mean(1)), (0.025, 0.975))
  found = {"distance": np.sqrt(squares.mean()), "distance_low": low, "distance_high": high}
  return {name: float(f"{value:.4g}") for name, value in found.items()}


class Judged:
  """Measures samples against the training images of the animals."""

  def __init__(self) -> None:
    train = data.load(NAME, "train")
    self.judge = evaluation.Judge.fit(train.images, train.labels)
    self.pixels = evaluation.chosen_features("pixels", train.image_shape)
    self.reference = evaluation.open_reference(train, self.pixels, progress=False)

  def __call__(self, made: Plan, x: np.ndarray) -> Row:
    """Give the figures of samples, each with the ends of its interval where it has one."""
    found = evaluation.evaluate(
      np.asarray(made.encoder.decode(x)), self.reference, labels=made.labels[: len(x)], features=self.pixels,
      judge=self.judge, measures=MEASURES, options=evaluation.Options(resamples=100), progress=False,
    )  # fmt: skip
    row: Row = {"n": len(x)}
    for name, figure in found.figures.items():
      row[name] = round(float(figure.value), 4)
      if figure.interval:
        row |= {
          f"{name}_{end}": round(float(value), 4) for end, value in zip(("low", "high"), figure.interval, strict=True)
        }
    return row


def solvers() -> Iterator[Row]:
  """Solvers by their evaluations: the distance from the converged sample of the same noise, and the figures."""
  judged = Judged()
  exact = converged()
  other, _ = walked(planned(FOR_DISTANCE, guidance="cfg", scale=SCALE, solver="unipc", steps=100))
  yield {"solver": "unipc", "evaluations": 100, "steps": 100, **distance(other, exact)}
  for name, to_judge in SOLVERS.items():
    for count in EVALUATIONS:
      if name not in DETERMINISTIC and count not in to_judge:
        continue
      num = NUM if count in to_judge else FOR_DISTANCE
      each = planned(1, solver=name, steps=1).solver.evaluations
      made = planned(num, guidance="cfg", scale=SCALE, solver=name, steps=count // each)
      x, seconds = walked(made)
      row = {"solver": name, "evaluations": count, "steps": count // each, "cpu_ms": round(1e3 * seconds / num, 1)}
      far = distance(x, exact) if name in DETERMINISTIC else {}
      yield row | far | (judged(made, x) if count in to_judge else {})


def grids() -> Iterator[Row]:
  """Grids with DPM-Solver++(2M): the distance from the converged sample of the same noise."""
  exact = converged()
  for grid in GRIDS:
    for steps in (8, 12):
      made = planned(FOR_DISTANCE, guidance="cfg", scale=SCALE, solver="dpmpp-2m", steps=steps, grid=grid)
      yield {"grid": grid, "steps": steps, **distance(walked(made)[0], exact)}


def high() -> Iterator[Row]:
  """What is made against a high scale, beside a moderate one and beside perturbed attention; DPM-Solver++(2M)."""
  judged = Judged()
  for guidance, scales in AT_HIGH.items():
    for scale in scales:
      made = planned(guidance=guidance, scale=scale, solver="dpmpp-2m", steps=STEPS)
      yield {"guidance": guidance, "scale": scale, **judged(made, walked(made)[0])}


PARTS = {"solvers": solvers, "grids": grids, "high": high}


def picture() -> None:
  """Draw the distance and the Fréchet distance of each solver over its evaluations."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  rows = json.loads(FILE.read_text())["solvers"]["rows"]
  figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
  for each, (name, title) in enumerate(TITLES.items()):
    for panel, figure_name in zip(panels, ("distance", "frechet_distance"), strict=True):
      of = [row for row in rows if row["solver"] == name and figure_name in row and row["evaluations"] in EVALUATIONS]
      if of:
        at = [
          row["evaluations"] * (1 + 0.012 * (each - 3)) for row in of
        ]  # Side by side, so that no bar hides another.
        ends = [[abs(row[figure_name] - row[f"{figure_name}_{end}"]) for row in of] for end in ("low", "high")]
        look = {"color": f"C{each}", "marker": "osD^vPX"[each], "capsize": 2, "markersize": 5, "linewidth": 1.3}
        panel.errorbar(at, [row[figure_name] for row in of], ends, label=title, **look)
  titles = {"distance from the converged sample": EVALUATIONS, "Fréchet distance (pixels)": JUDGED}
  for panel, (title, counts) in zip(panels, titles.items(), strict=True):
    panel.set(xscale="log", yscale="log", xlabel="evaluations of the guided denoiser", title=title)
    panel.set_xticks(counts, counts)
    panel.minorticks_off()
    panel.grid(color="0.9")
  panels[1].set_yticks([30, 50, 100], [30, 50, 100])
  handles = {name: handle for panel in panels for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)}
  panels[0].legend(handles.values(), handles, loc="lower left", fontsize=8)
  content = io.BytesIO()
  figure.savefig(content, format="png", dpi=100)
  pyplot.close(figure)
  write_atomically(PICTURE, content.getvalue())


def main(part: str = "") -> None:
  """Measure all parts, or one, or draw the picture.

  Raises:
    ValueError: for a part that is not there.
  """
  if part == "picture":
    picture()
    return
  for name in [part] if part else PARTS:
    rows = []
    for row in checks.lookup("part", name, PARTS)():
      rows.append(row)
      print(row, flush=True)
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    stored[name] = {
      "date": datetime.date.today().isoformat(),
      "machine": f"{os.cpu_count()} cores; JAX {jax.__version__} on {jax.devices()[0].device_kind}",
      "model": models.pretrained.digest(NAME),
      "rows": rows,
    }
    write_atomically(FILE, (json.dumps(stored, indent=1) + "\n").encode())
    print(timing.table(rows))
