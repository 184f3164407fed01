"""The pictures and tables of the pages on tasks: a noisy classifier, inverse problems, image to image, inversion.

``python -m benchmarks tasks PART``, with PART one of ``classifier``, ``faults``, ``inverse``, ``images``, ``inversion``
and ``precision``, prints the tables of a part and draws its picture, docs/figures/do-PART.png. Without PART it does all
of them, in about half an hour on two cores. ``faults`` uses the digits, the others the animals of the package.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxguide as jg
from benchmarks import timing
from benchmarks.animals import CLASSIFIER, NAME
from jaxguide import data, evaluation, models, training
from jaxguide._core import checks
from jaxguide._core.files import write_atomically
from jaxguide.evaluation import pages
from jaxguide.evaluation.demo import DEMOS
from jaxguide.generate import Settings, run

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
NULL = 10
SHAPE = (28, 28, 1)
GAP = 2

Rows = list[dict[str, Any]]


def main(part: str = "") -> None:
  """Do one part, or all.

  Raises:
    ValueError: for an unknown part.
  """
  parts = {part: checks.lookup("part", part, PARTS)} if part else PARTS
  for name, make in parts.items():
    timing.report(f"tasks-{name}", make())


# --- a noisy classifier ---------------------------------------------------------------------------


def classifier() -> dict[str, Rows]:
  """Draw the curves of the report on the classifier of the animals."""
  report = _report(models.load(CLASSIFIER), data.load(NAME, "test"), models.load(NAME))
  print(*report.verdicts[:-1], sep="\n", flush=True)
  _curves(FIGURES / "do-classifier.png", {"animals-classifier": report}, alone=True)
  return {"the classifier of the animals": _levels(report)}


def faults() -> dict[str, Rows]:
  """Train a classifier of the digits well, and in four ways badly. Draw their curves and measure guided samples."""
  demo, train, test = DEMOS["digits"], data.load("digits", "train"), data.load("digits", "test")
  few = data.Images(train.images[:100], train.labels[:100], train.num_classes, "100 digits")
  good = demo.classifier_training
  trainings: dict[str, tuple[Any, training.TrainingConfig]] = {
    "good": (train, good),
    "clean images only": (train, dataclasses.replace(good, noise_mean=-5.0, noise_std=0.1)),
    "too short": (train, dataclasses.replace(good, steps=40)),
    "overfitted": (few, dataclasses.replace(good, steps=1500, weight_decay=0.0)),
  }
  with tempfile.TemporaryDirectory() as folder:

    def fitted(name: str, config: training.ModelConfig, on: Any, how: training.TrainingConfig) -> Any:
      return training.fit(config, how, on, Path(folder, name.replace(" ", "-")), progress=False)

    denoiser = fitted("denoiser", demo.denoiser, train, demo.denoiser_training)
    found = {name: fitted(name, demo.classifier, on, how) for name, (on, how) in trainings.items()}
  found["overconfident"] = dataclasses.replace(found["good"], params=_times(found["good"].params, 3.0))
  reports = {name: _report(model, test, denoiser) for name, model in found.items()}
  _curves(FIGURES / "do-faults.png", reports)

  judge = evaluation.Judge.fit(train.images, train.labels)
  labels, rows = np.arange(200, dtype=np.int32) % 10, []
  for name, model in found.items():
    row: dict[str, Any] = {"classifier": name}
    for scale in (1.0, 3.0, 10.0):
      guided = jg.chain(jg.unconditional(NULL), jg.clip_x0(), jg.classifier(model.log_prob, scale))(denoiser.denoiser)
      x = jg.sample_batch(
        guided, jax.random.key(0), labels, shape=train.image_shape, sigmas=jg.karras(25), solver=jg.DPMpp2M()
      )
      images = denoiser.config.data.decode(x)
      kinds = evaluation.evaluate(
        images, train, labels=labels, features="pixels", judge=judge, measures=("accuracy", "frechet_distance"),
        options=evaluation.Options(interval="none"), progress=False,
      ).figures  # fmt: skip
      row[f"accuracy, scale {scale:g}"] = f"{kinds['accuracy'].value:.2f}"
      row[f"Fréchet distance, scale {scale:g}"] = f"{kinds['frechet_distance'].value:.2f}"
    rows.append(row)
  tables = {f"the classifier of the digits: {name}": _levels(report) for name, report in reports.items()}
  return {"200 guided samples": rows, **tables}


def _times(params: Any, factor: float) -> Any:
  """Multiply the logits of a classifier by a factor: the parameters of its last layer."""

  def scaled(path: Any, leaf: jax.Array) -> jax.Array:
    names = jax.tree_util.keystr(path)
    return leaf * factor if "c_proj" in names else leaf

  return jax.tree_util.tree_map_with_path(scaled, params)


def _report(model: Any, test: Any, denoiser: Any) -> Any:
  with tempfile.TemporaryDirectory() as folder:
    return evaluation.classifier_report(
      Path(folder, "report.html"), model, test, denoiser=denoiser, samples_per_class=0, num=500, num_gradients=128
    )


def _levels(report: Any) -> Rows:
  levels, gradients = report.levels, report.gradients
  return [
    {
      "sigma": float(sigma),
      "accuracy": f"{levels.accuracy[i]:.3f}",
      "NLL": f"{levels.nll[i]:.3f}",
      "calibration error": f"{levels.calibration_error[i]:.3f}",
      "norm": float(gradients.norm[i, 1]),
      "implied norm": float(gradients.implied_norm[i, 1]),
      "cosine": f"{gradients.cosine[i, 1]:.3f}",
    }
    for i, sigma in enumerate(levels.sigmas)
  ]


def _curves(path: Path, reports: Mapping[str, Any], alone: bool = False) -> None:
  """Draw accuracy, likelihood, calibration, and norm and cosine of the gradient over the noise level."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(10, 5.4), dpi=90, layout="constrained")
  grid = figure.subplots(2, 3)
  accuracy, nll, calibration, norm, cosine, words = grid.flat
  for (name, report), (colour, marker) in zip(reports.items(), pages.STYLES, strict=False):
    levels, gradients = report.levels, report.gradients
    line = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6, "label": name}
    for axes, values in (
      (accuracy, levels.accuracy),
      (nll, levels.nll),
      (calibration, levels.calibration_error),
      (norm, gradients.norm[:, 1]),
      (cosine, gradients.cosine[:, 1]),
    ):
      axes.plot(levels.sigmas, values, **line)
    if alone:
      accuracy.plot(levels.sigmas, levels.confidence, color=colour, linestyle="--", linewidth=1.2)
      for axes, quartiles in ((norm, gradients.norm), (cosine, gradients.cosine)):
        axes.fill_between(levels.sigmas, quartiles[:, 0], quartiles[:, 2], color=colour, alpha=0.15, linewidth=0)
  report = next(iter(reports.values()))
  sigmas = report.levels.sigmas
  norm.plot(sigmas, report.gradients.implied_norm[:, 1], color="0.35", linestyle="--", label="diffusion model")
  accuracy.axhline(0.1, color="0.35", linestyle=":", label="guessing")
  nll.axhline(np.log(10), color="0.35", linestyle=":")
  calibration.axhline(0.1, color="0.35", linestyle=":")
  random = report.gradients.dimension**-0.5
  for value in (-random, random):
    cosine.axhline(value, color="0.35", linestyle=":")
  norm.set_yscale("log")
  if not alone:
    nll.set_yscale("log")
  for axes, title in zip(
    grid.flat,
    ("accuracy", "negative log-likelihood (nats)", "calibration error", "norm of the gradient", "cosine"),
    strict=False,
  ):
    axes.set_xscale("log")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("noise level σ", fontsize=9)
    pages.tidy(axes)
  accuracy.set_ylim(0, 1.02)
  words.axis("off")
  handles = {
    label: line for axes in (accuracy, norm) for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
  }
  names = list(handles)
  if alone:
    from matplotlib.lines import Line2D

    handles["mean confidence"] = Line2D([], [], color=pages.STYLES[0][0], linestyle="--", linewidth=1.2)
    names.append("mean confidence")
  names = [name.replace("guessing", "guessing, limit or chance") for name in names]
  words.legend(list(handles.values()), names, loc="center", frameon=False, fontsize=10)
  _write(path, figure)


# --- inverse problems -----------------------------------------------------------------------------

NOISE = 0.05
CHOSEN = [0, 2, 5, 6, 7]  # bear, cat, elephant, giraffe, horse


def left_half(x0: jax.Array) -> jax.Array:
  """The left half of an image."""
  return x0[:, :14]


def quarter(x0: jax.Array) -> jax.Array:
  """The means over squares of 4x4 pixels."""
  return x0.reshape(7, 4, 7, 4, 1).mean((1, 3))


def blurred(x0: jax.Array) -> jax.Array:
  """A Gaussian blur with a standard deviation of 2 pixels."""
  kernel = jnp.exp(-0.5 * (jnp.arange(-6, 7) / 2.0) ** 2)
  kernel = kernel / kernel.sum()
  rows = jax.vmap(lambda line: jnp.convolve(line, kernel, mode="same"))(x0[..., 0])
  return jax.vmap(lambda line: jnp.convolve(line, kernel, mode="same"))(rows.T).T[..., None]


# What is measured, and the number of pixels that a measured number is the mean of.
OPERATORS: dict[str, tuple[Callable[..., Any], float]] = {
  "left half": (left_half, 1),
  "7x7 pixels": (quarter, 16),
  "blur": (blurred, 16 * np.pi),
}


SPREADS = {"unit variance": (None, 1.0), "0 (DPS)": (0.0, 1.0), "sigma": (1.0, np.inf)}
"""A factor, and a bound: the spread is the factor times sigma, up to the bound. None is one over sqrt(pixels)."""


def likelihood(operator: Any, x0: jax.Array, sigma: jax.Array, cond: Any) -> jax.Array:
  """The log-probability of a measurement, with a spread that is a part of the condition."""

  def spread(sigma: jax.Array) -> jax.Array:
    return cond["factor"] * sigma / jnp.sqrt(1 + (sigma / cond["bound"]) ** 2)

  return jg.measurement(operator, NOISE, spread)(x0, sigma, cond["y"])


def inverse() -> dict[str, Rows]:
  """Solve three inverse problems on images of the test split, with three spreads."""
  denoise, test = models.load(NAME).denoiser, data.load(NAME, "test")
  truth = _one_of_each(test)[CHOSEN]
  rows, panels = [], {}
  for problem, (operator, pixels) in OPERATORS.items():
    noise = NOISE * jax.random.normal(jax.random.key(1), (len(truth), *operator(truth[0]).shape))
    ys = np.asarray(jax.vmap(operator)(truth) + noise)
    # All spreads in one batch, and twice the first, for its second sample.
    names = [*SPREADS, next(iter(SPREADS))]
    factors = [pixels**-0.5 if SPREADS[name][0] is None else SPREADS[name][0] for name in names]
    cond = {
      "y": np.tile(ys, (len(names), *[1] * (ys.ndim - 1))),
      "factor": np.repeat(np.float32(factors), len(truth)),
      "bound": np.repeat(np.float32([SPREADS[name][1] for name in names]), len(truth)),
    }
    guidance = jg.reconstruction(Partial(likelihood, Partial(operator)), 1.0)
    guided = jg.chain(guidance, jg.clip_x0())(jg.given("label", denoise))
    cond["label"] = np.full(len(cond["factor"]), NULL)
    x = jg.sample_batch(guided, jax.random.key(0), cond, shape=SHAPE, sigmas=jg.karras(40), solver=jg.DDIM(1.0))
    parts = x.reshape(len(names), *truth.shape)
    for name, part in zip(SPREADS, parts, strict=False):
      residual = np.asarray(jax.vmap(operator)(part) - ys)
      rows.append(
        {
          "measured": problem,
          "spread": name,
          "error of the measurement / noise": float(np.sqrt(np.mean(residual**2)) / NOISE),
          "error of the image": float(np.sqrt(np.mean((part - truth) ** 2))),
        }
      )
      print(rows[-1], flush=True)
    panels[f"measured: {problem}"] = [truth, _as_image(ys), parts[0], parts[-1]]
  titles = ["truth", "measured", "sample 1", "sample 2"]
  _panels(FIGURES / "do-inverse.png", panels, dict.fromkeys(panels, titles))
  return {f"inverse problems, {len(truth)} images": rows}


def _as_image(ys: np.ndarray) -> np.ndarray:
  """Draw measurements in the size of the image; what is not measured is grey."""
  if ys.shape[1:3] == (28, 14):
    return np.concatenate([ys, np.zeros_like(ys)], axis=2)
  factor = 28 // ys.shape[1]
  return ys.repeat(factor, 1).repeat(factor, 2)


# --- image to image, and inversion ----------------------------------------------------------------

LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0)


def images() -> dict[str, Rows]:
  """Draw from images of the test split, from several noise levels, with the own label and with another."""
  denoise, train, test = models.load(NAME).denoiser, data.load(NAME, "train"), data.load(NAME, "test")
  guided = jg.chain(jg.classifier_free(NULL, 3.0), jg.clip_x0())(denoise)
  judge, names = _judge(), train.class_names
  truth, own = _one_of_each(test), np.arange(10)
  other = (own + 5) % 10
  rows, panels = [], {}
  for label, labels in (("own", own), ("another", other)):
    columns = [truth[CHOSEN]]
    for level in LEVELS:
      sigmas = jg.karras(12, sigma_max=level)
      x = jg.sample_batch(
        guided, jax.random.key(0), labels, shape=SHAPE, sigmas=sigmas, solver=jg.DPMpp2M(), x_init=truth, add_noise=True
      )
      columns.append(x[CHOSEN])
      said = judge.predict(_pixels(x))
      rows.append(
        {
          "label": label,
          "level": level,
          "distance from the image": float(np.sqrt(np.mean((x - truth) ** 2))),
          "judged as the label": f"{np.mean(said == labels):.2f}",
          "judged as before": f"{np.mean(said == own):.2f}",
        }
      )
      print(rows[-1], flush=True)
    kinds = [names[labels[row]] for row in CHOSEN]
    panels["its own label" if label == "own" else f"the labels {', '.join(kinds)}"] = columns
  titles = ["image", *(f"σ = {level:g}" for level in LEVELS)]
  _panels(FIGURES / "do-images.png", panels, dict.fromkeys(panels, titles))
  return {f"image to image, {len(truth)} images, scale 3": rows}


WALKS = ((jg.Euler(), 20), (jg.Heun(), 10), (jg.Heun(), 25))


def inversion() -> dict[str, Rows]:
  """Walk up to the noise and down again: the error by solver, steps and scale; and edit by another label."""
  denoise, train, test = models.load(NAME).denoiser, data.load(NAME, "train"), data.load(NAME, "test")
  truth, own = _one_of_each(test)[CHOSEN], jnp.array(CHOSEN)

  def guided(scale: Any) -> Any:
    return jg.classifier_free(NULL, scale)(denoise)

  @jax.jit
  def there(denoise: Any, sigmas: Any, solver: Any, x0: Any, labels: Any) -> Any:
    return jax.vmap(lambda x0, label: jg.invert(denoise, x0, sigmas, solver, label))(x0, labels)

  @jax.jit
  def back(denoise: Any, sigmas: Any, solver: Any, x: Any, labels: Any) -> Any:
    def one(x, label):
      return jg.sample(denoise, jax.random.key(0), SHAPE, sigmas, solver, label, x_init=x)[0]

    return jax.vmap(one)(x, labels)

  rows = []
  for solver, steps in WALKS:
    sigmas = jg.karras(steps)
    row: dict[str, Any] = {"solver": type(solver).__name__, "steps": steps}
    for scale in (1.0, 2.0, 4.0):
      noise = there(guided(scale), sigmas, solver, truth, own)
      again = back(guided(scale), sigmas, solver, noise, own)
      row[f"error, scale {scale:g}"] = float(jnp.sqrt(jnp.mean((again - truth) ** 2)))
    rows.append(row)
    print(row, flush=True)
  sigmas, solver, names = jg.karras(25), jg.Heun(), train.class_names
  noise = there(guided(1.0), sigmas, solver, truth, own)
  columns = [truth, np.asarray(noise) / 80 / 2, np.asarray(back(guided(1.0), sigmas, solver, noise, own))]
  titles = ["image", "its noise", "back"]
  judge, found, labels = _judge(), [], (own + 5) % 10
  for scale in (1.0, 3.0):
    edited = np.asarray(back(guided(scale), sigmas, solver, noise, labels))
    columns.append(edited)
    titles.append(f"other, {scale:g}")
    said = judge.predict(_pixels(edited))
    found.append(
      {
        "scale": scale,
        "distance from the image": float(np.sqrt(np.mean((edited - truth) ** 2))),
        "judged as the new label": f"{np.mean(said == np.asarray(labels)):.2f}",
        "judged as before": f"{np.mean(said == np.asarray(own)):.2f}",
      }
    )
  title = f"other labels: {', '.join(names[(row + 5) % 10] for row in CHOSEN)}; scales 1 and 3"
  _panels(FIGURES / "do-inversion.png", {title: columns}, {title: titles}, zoom=1.2)
  return {"there and back, 5 images": rows, "edited by another label, 5 images": found}


# --- precision ------------------------------------------------------------------------------------


def precision() -> dict[str, Rows]:
  """Draw the same 10 samples of the animals in other batches and other types, and compare their pixels."""
  ways: dict[str, dict[str, Any]] = {
    "batches of 10": {},
    "again": {},
    "batches of 3": {"batch_size": 3},
    "batches of 1": {"batch_size": 1},
    "--dtype bfloat16": {"dtype": "bfloat16"},
    "--matmul-precision bfloat16": {"matmul_precision": "bfloat16"},
  }
  rows, first = [], None
  with tempfile.TemporaryDirectory() as folder:
    for name, settings in ways.items():
      out = Path(folder, f"{name.replace(' ', '-')}.npz")
      made = Settings(model=NAME, num=10, steps=20, solver="dpmpp-2m", **{"batch_size": 10, **settings})
      run(out, made, progress=False)
      pixels = data.load_npz(out)[0].astype(int)
      first = pixels if first is None else first
      difference = np.abs(pixels - first)
      rows.append(
        {
          "drawn": name,
          "pixels that differ": f"{np.mean(difference > 0):.2%}",
          "mean difference in grey levels": float(difference.mean()),
          "largest difference in grey levels": int(difference.max()),
        }
      )
      print(rows[-1], flush=True)
  return {"10 samples of the animals, of 256 grey levels": rows}


# --- all of them ----------------------------------------------------------------------------------


@functools.cache
def _judge() -> evaluation.Judge:
  """The judge of the animals, which is that of docs/animals.md."""
  train = data.load(NAME, "train")
  return evaluation.Judge.fit(train.images, train.labels)


def _one_of_each(test: Any) -> np.ndarray:
  """Return the first image of each class, in [-1, 1], in the order of the classes."""
  rows = [int(np.flatnonzero(test.labels == label)[0]) for label in range(10)]
  return np.asarray(data.from_uint8(test.images[rows]))


def _pixels(x: np.ndarray) -> np.ndarray:
  return np.asarray(data.to_uint8(x))


def _panels(
  path: Path, panels: Mapping[str, Sequence[np.ndarray]], titles: Mapping[str, Sequence[str]], zoom: float = 0.62
) -> None:
  """Draw panels side by side; each has columns of images."""
  from matplotlib.figure import Figure

  across, down = [len(columns) for columns in panels.values()], max(len(each[0]) for each in panels.values())
  figure = Figure(figsize=(zoom * sum(across) + 0.25 * len(panels), zoom * down + 0.75), dpi=120, layout="constrained")
  row = figure.subplots(1, len(panels), width_ratios=across, squeeze=False)[0]
  for axes, (name, columns) in zip(row, panels.items(), strict=True):
    cells = np.stack([_pixels(np.asarray(column)) for column in columns], 1)
    grid = data.image_grid(cells.reshape(-1, *cells.shape[2:]), len(columns), GAP)
    axes.imshow(grid[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_title(name, fontsize=9 if zoom < 1 else 12)
    cell = cells.shape[3] + GAP
    axes.xaxis.tick_bottom()
    axes.set(yticks=[], xticks=[cell * column + cell / 2 for column in range(len(columns))])
    axes.set_xticklabels(titles[name], fontsize=7 if zoom < 1 else 11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
  _write(path, figure)


def _write(path: Path, figure: Any) -> None:
  path.parent.mkdir(exist_ok=True)
  write_atomically(path, pages.png_of(figure))


PARTS: dict[str, Callable[[], dict[str, Rows]]] = {
  "classifier": classifier,
  "faults": faults,
  "inverse": inverse,
  "images": images,
  "inversion": inversion,
  "precision": precision,
}
