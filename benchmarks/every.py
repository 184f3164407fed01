"""Reused gradients on the animals of the package: classifier guidance with `every=n`, its quality and its time.

`python -m benchmarks every` compares n = 1, 2, 4 and 8 at two scales. `python -m benchmarks every kept` compares what
is kept of a gradient g at level sigma: g itself, sqrt(1 + sigma²) g (the gradient in the variables of DDPM), sigma g
(its change of the predicted noise), (1 + sigma²) g, or sigma² g (its change of x0). The same noise and labels serve
every row, in turns of one batch. The judge is that of docs/animals.md. The distance is the root mean square difference
from the samples with n = 1, where black is -1 and white is 1.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.animals import NAME
from jaxguide import data, evaluation, sampling
from jaxguide._core import keys
from jaxguide.generate import Settings
from jaxguide.generate.plan import Plan, plan
from jaxguide.guidance.reuse import Reused

EVERY, SCALES, STEPS, PER_BATCH = (1, 2, 4, 8), (2.0, 8.0), 20, 20
NUM = {"": 80, "kept": 80}
KEPT: dict[str, Callable[..., Any]] = {
  "g": jnp.ones_like,
  "sqrt(1 + sigma²) g": lambda sigma: jnp.sqrt(1 + sigma**2),
  "sigma g": lambda sigma: sigma,
  "(1 + sigma²) g": lambda sigma: 1 + sigma**2,
  "sigma² g": jnp.square,
}


def planned(every: int, scale: float, kept: Callable[..., Any] | None = None) -> Plan:
  """Plan samples guided by the classifier. With ``kept``, gradients are kept times this function of their level."""
  guidance = f"classifier:every={every}"
  made = plan(Settings(model=NAME, guidance=guidance, scale=scale, solver="dpmpp-2m", steps=STEPS, num=PER_BATCH))

  def change(node):
    return dataclasses.replace(node, weight=kept) if kept and isinstance(node, Reused) else node

  return made._replace(denoiser=jax.tree.map(change, made.denoiser, is_leaf=lambda node: isinstance(node, Reused)))


def drawn(plans: Mapping[str, Plan], num: int) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
  """Draw the same samples by each plan, a batch in turns. Return x0, and the seconds of each batch but the first."""
  parts: dict[str, list[np.ndarray]] = {name: [] for name in plans}
  seconds: dict[str, list[float]] = {name: [] for name in plans}
  for first in range(0, num, PER_BATCH):
    for name, made in plans.items():
      began = time.perf_counter()
      x = sampling.sample_batch(
        made.denoiser,
        keys.seed_key(0),
        np.arange(first, first + PER_BATCH) % 10,
        start=first,
        shape=made.image_shape,
        sigmas=made.sigmas,
        solver=made.solver,
      )
      parts[name].append(x)
      if first:  # The first batch may hold a compilation.
        seconds[name].append(time.perf_counter() - began)
  return {name: np.concatenate(batches) for name, batches in parts.items()}, seconds


def main(which: str = "") -> None:
  """Measure n, or what is kept.

  Raises:
    ValueError: for another argument than ``kept``.
  """
  if which not in NUM:
    raise ValueError("every takes no argument, or kept")
  train = data.load(NAME, "train")
  judge = evaluation.Judge.fit(train.images, train.labels)
  pixels = evaluation.chosen_features("pixels", train.image_shape)
  reference = evaluation.open_reference(train, pixels, progress=False)
  rows, num = [], NUM[which]
  labels = np.arange(num) % 10

  def figures(images: np.ndarray, interval: str, *measures: str) -> Any:
    options = evaluation.Options(interval=interval)
    arguments = dict(labels=labels, features=pixels, judge=judge, measures=measures, options=options, progress=False)
    return evaluation.evaluate(images, reference, **arguments).figures

  for scale in SCALES:
    plans = {f"n = {n}": planned(n, scale) for n in (EVERY if not which else (1,))}
    if which:
      plans |= {f"n = 4, {name}": planned(4, scale, kept) for name, kept in KEPT.items()}
    found, seconds = drawn(plans, num)
    images = {name: data.to_uint8(x) for name, x in found.items()}
    for name, made in images.items():
      accuracy = figures(made, "bootstrap", "accuracy")["accuracy"]
      others = figures(made, "none", "frechet_distance", "diversity")
      ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds["n = 1"], strict=True)]
      low, high = accuracy.interval or (0.0, 1.0)
      rows.append(
        {
          "scale": f"{scale:g}",
          "gradient": name,
          "accuracy": f"{accuracy.value:.3f} ({low:.2f} to {high:.2f})",
          "judged as with n = 1": f"{(judge.predict(made) == judge.predict(images['n = 1'])).mean():.3f}",
          "distance from n = 1": f"{np.sqrt(np.mean((found[name] - found['n = 1']) ** 2)):.3f}",
          "Fréchet distance": f"{others['frechet_distance'].value:.1f}",
          "diversity": f"{others['diversity'].value:.2f}",
          "time / n = 1": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        }
      )
      print(rows[-1], flush=True)
  facts = [f"{num} samples a row, DPM-Solver++(2M), {STEPS} steps, accuracy with its 95 % interval of Wilson's score"]
  timing.report("every_kept" if which else "every", {"classifier guidance": rows}, facts)
