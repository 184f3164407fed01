"""Sweeps to show: digits that are degraded as guidance degrades samples, with figures as an evaluation has them."""

import numpy as np

from jaxguide.evaluation import sweep_plots
from jaxguide.evaluation.results import Evaluation, Figure, Point, Sweep

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SCALES = (0.0, 1.0, 1.5, 2.0, 4.0, 8.0)
PROTOCOL = {
  "features": "inception",
  "weights": "0123456789abcdef",
  "reference": {"data": "digits, train", "n": 1437},
  "precision": {"k": 3},
}
KINDS = {
  "frechet_distance": "95 % of 200 bootstrap resamples",
  "precision": "95 % of 1000 bootstrap resamples",
  "recall": "95 % of 1000 bootstrap resamples",
  "accuracy": "95 %, Wilson's score interval",
}


def unplotted(curves, titles, real, summary, size, **_):
  """Stand for `sweep_plots.plot` in tests of small sweeps, where drawing the plots would take longer than all else."""
  return sweep_plots.Plot(*size, "", summary, sum(map(len, curves)))


def digits(m=200):
  """Real digits, sorted so that sample ``i`` has class ``i % 10``."""
  from sklearn.datasets import load_digits

  data = load_digits()
  rows = [np.flatnonzero(data.target == c)[: -(-m // 10)] for c in range(10)]
  order = np.stack(rows, 1).reshape(-1)[:m]
  images = np.clip(data.images[order] * 255 / 16, 0, 255).astype(np.uint8)[..., None]
  return images, data.target[order]


def guided(images, labels, strength, seed=0):
  """Pull images to the mean of their class and raise the contrast, and add noise where guidance is weak."""
  rng = np.random.default_rng(seed)
  floats = images.astype(float)
  means = np.stack([floats[labels == label].mean(0) for label in labels])
  wrong = floats[rng.permutation(len(floats))]
  pull, off = min(0.85, 0.12 * strength), max(0.0, 0.6 - 0.5 * strength)
  mixed = (1 - pull) * floats + pull * means
  mixed = (1 - off) * mixed + off * wrong + rng.normal(size=floats.shape) * 30 * max(0.15, 1 - strength)
  return np.clip((mixed - 128) * (1 + 0.22 * strength) + 128, 0, 255).astype(np.uint8)


def figures(strength, shift=0.0, intervals=True):
  """Plausible figures of an evaluation: the distance has a minimum, and precision is paid for with recall."""
  s = float(strength)
  values = {
    "frechet_distance": 9 + shift + 14 * abs(np.log2((s + 0.35) / 1.9)) ** 1.5,
    "kid": 0.004 + 0.002 * (s - 1.7) ** 2,
    "precision": 0.93 - 0.45 * np.exp(-1.1 * s) - 0.01 * shift,
    "recall": 0.78 * np.exp(-0.21 * s) + 0.02 * shift,
    "accuracy": 0.99 - 0.88 * np.exp(-2.2 * s),
    "diversity": 2.6 - 0.2 * s - 0.05 * shift,
    "saturated": 0.31 + 0.03 * s,
  }
  widths = {"frechet_distance": 0.7, "precision": 0.02, "recall": 0.025, "accuracy": 0.012}
  made = {}
  for name, value in values.items():
    width = widths.get(name) if intervals else None
    interval = None if width is None else (value - width, min(value + width, 1.0) if width < 0.5 else value + width)
    made[name] = Figure(float(value), interval, KINDS[name] if interval else "")
  return made


def real(images):
  """The figures of real images."""
  values = {
    "frechet_distance": 4.1, "kid": 0.0002, "precision": 0.86, "recall": 0.84, "accuracy": 0.972, "diversity": 2.7,
    "saturated": 0.36,
  }  # fmt: skip
  return Evaluation(
    len(images), {name: Figure(value) for name, value in values.items()}, {**PROTOCOL, "n": len(images)}
  )


def digit_sweep(methods=("cfg", "classifier"), scales=SCALES, m=60, **fields):
  """Two methods at six scales on ten classes."""
  images, labels = digits(m)
  points = []
  for i, method in enumerate(methods):
    for scale in scales:
      made = guided(images, labels, scale * (1 - 0.15 * i))
      warned = ("5,000 samples are few for a Fréchet distance: it is about 4 too large.",)
      evaluation = Evaluation(5000, figures(scale * (1 - 0.15 * i), i), PROTOCOL, warned)
      points.append(Point(method, {"scale": scale, "steps": 20}, evaluation, made, labels, 41.5 + 30 * i + scale))
  rows = np.arange(0, min(8, m))
  flat = images.reshape(m, -1).astype(float)
  best = points[min(3, len(points) - 1)].images.reshape(m, -1).astype(float)
  order = np.argsort(((best[rows, None] - flat[None]) ** 2).sum(-1), axis=1)[:, :5]
  return Sweep(
    **{
      "title": "Guided digits",
      "points": points,
      "real": real(images),
      "real_images": images[::-1].copy(),
      "real_labels": labels[::-1].copy(),
      "class_names": NAMES,
      "neighbours": images[order],
      "neighbour_rows": rows,
      "facts": {
        "data": "scikit-learn's 8x8 digits, 1,437 for training and 360 held out",
        "network": "UNet of 312,000 parameters, 1,200 steps of batch size 128",
        "sampling": "DPM-Solver++(2M), 20 steps from sigma 80 to 0.01, seed 0",
        "machine": "cpu, 2 cores",
      },
      "command": "jaxguide sweep runs/digits --guidance cfg --guidance classifier --scales 0 1 1.5 2 4 8 --num 5000 "
      "--features inception --out runs/digits/sweep",
      **fields,
    }
  )


def solver_sweep(m=40):
  """A sweep over the names of solvers, without real images and intervals, on pixels."""
  images, labels = digits(m)
  points = []
  for i, solver in enumerate(("ddim", "heun", "dpmpp-2m", "ddpm")):
    evaluation = Evaluation(1000, figures(1.5 + i / 3, 0, intervals=False), {"features": "pixels"})
    points.append(
      Point("cfg", {"scale": 2.0, "solver": solver}, evaluation, guided(images, labels, i / 2), labels, 3.0)
    )
  return Sweep("Solvers", points, axis="solver")


def picture(size, hue, seed):
  """A picture of a disc on a gradient, ``(size, size, 3)`` uint8."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[0 : 1 : 1j * size, 0 : 1 : 1j * size]
  color, ground = np.abs(np.sin(hue + np.array([0.0, 1.1, 2.3]))), rng.uniform(0.2, 0.7, 3)
  cx, cy, r = rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65), rng.uniform(0.18, 0.3)
  disc = 1 / (1 + np.exp((np.hypot(x - cx, y - cy) - r) * 60))[..., None]
  floats = disc * color * (1.2 - y[..., None] * 0.6) + (1 - disc) * ground * (0.5 + x[..., None])
  return np.clip(floats * 255, 0, 255).astype(np.uint8)


def colour_sweep(size=64, channels=3, classes=10, each=3, methods=("cfg",), scales=(1.0, 2.0, 4.0), noise=12):
  """Pictures with 1 to 4 channels of any size."""
  labels = np.tile(np.arange(classes), each)
  base = np.stack([picture(size, label * 0.6, i) for i, label in enumerate(labels)])
  base = np.concatenate([base, np.full_like(base[..., :1], 255)], -1)[..., :channels]
  rng, points = np.random.default_rng(0), []
  for method in methods:
    for scale in scales:
      noisy = base + rng.normal(size=base.shape) * noise / (0.5 + scale)
      images = np.clip((noisy - 128) * (0.8 + 0.15 * scale) + 128, 0, 255).astype(np.uint8)
      points.append(Point(method, {"scale": scale}, Evaluation(500, figures(scale), {"features": "dinov2"}), images,
                          labels, 20.0))  # fmt: skip
  return Sweep(
    "Discs", points, real_images=base, real_labels=labels, class_names=[f"disc of colour {i}" for i in range(classes)]
  )
