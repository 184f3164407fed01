"""The trained models of the animals that come with the package: their files, their figures and their picture.

``python -m benchmarks animals pack RUNS`` writes the files of the package from the trainings in ``RUNS/denoiser`` and
``RUNS/classifier``, which may be going on. ``python -m benchmarks animals figures [RUNS]`` measures the models of the
package; with ``RUNS`` also what the float16 of the files changes. ``python tests/readme.py`` then writes the table of
docs/animals.md.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxguide import data, evaluation, models, sampling
from jaxguide._core import keys
from jaxguide._core.files import write_atomically
from jaxguide.generate import Settings
from jaxguide.generate.plan import plan
from jaxguide.models import pretrained

NAME, CLASSIFIER = "animals", "animals-classifier"
FIGURES = pretrained.FOLDER / f"{NAME}-figures.json"
PICTURE = Path(__file__).parents[1] / "docs" / f"{NAME}.png"

SCALES = {"cfg": (0.0, 1.0, 2.0, 4.0), "classifier": (1.0, 2.0, 4.0, 8.0)}
PER_CLASS, PER_BATCH = 12, 40
MEASURES = ("accuracy", "frechet_distance", "diversity")
STEPS = 20
SEED = 0
GAP = 2


def main(command: str = "", runs: str = "") -> None:
  """Write the files of the package (``pack``), or measure them (``figures``).

  Raises:
    ValueError: for another command, or without the folder of the runs where it is needed.
  """
  if command == "pack" and runs:
    pack(Path(runs))
  elif command == "figures":
    figures(Path(runs) if runs else None)
  else:
    raise ValueError("give a command: pack RUNS, or figures [RUNS]")


def pack(runs: Path, into: Path = pretrained.FOLDER) -> None:
  """Write the files of the package from the runs."""
  for name, folder in ((NAME, runs / "denoiser"), (CLASSIFIER, runs / "classifier")):
    record = training_record(folder)
    size = pretrained.save(name, models.load(folder), record, into)
    print(f"{name}: {size / 1e6:.2f} MB, the model of {folder} at step {record['step']}")


def training_record(folder: Path) -> dict[str, Any]:
  """Return the record of a run's model, with the hours of training up to it and the mean loss of the last 400 steps."""
  record = json.loads((folder / "model" / "training.json").read_text())
  del record["model"]  # It is the configuration, which stands beside the record.
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  until = [line for line in lines if "loss" in line and line["step"] <= record["step"]]
  losses = [line["loss"] for line in until if line["step"] > record["step"] - 400]
  held_out = [line["held_out"] for line in lines if "held_out" in line and line["step"] == record["step"]]
  record |= {"hours": round(until[-1]["seconds"] / 3600, 2), "loss": round(float(np.mean(losses)), 4)}
  return record | ({"held_out": held_out[-1]} if held_out else {})


def draw(scale: float, by: str = "cfg", model: str = NAME, num: int = 10 * PER_CLASS) -> tuple[np.ndarray, np.ndarray]:
  """Sample the classes in turn, always with the same noise. Return the uint8 images and their labels."""
  made = plan(Settings(model=model, guidance=by, scale=scale, solver="dpmpp-2m", steps=STEPS, num=num))
  labels = np.arange(num) % 10
  x = sampling.sample_batch(
    made.denoiser,
    keys.seed_key(SEED),
    labels,
    shape=made.image_shape,
    sigmas=made.sigmas,
    solver=made.solver,
    batch_size=PER_BATCH,
  )
  return np.asarray(made.encoder.decode(x)), labels


def figures(runs: Path | None) -> None:
  """Measure the models of the package, and write the figures and the picture."""
  train, test = data.load(NAME, "train"), data.load(NAME, "test")
  judge = evaluation.Judge.fit(train.images, train.labels)
  pixels = evaluation.chosen_features("pixels", train.image_shape)
  reference = evaluation.open_reference(train, pixels, progress=False)

  def measured(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    found = evaluation.evaluate(
      images, reference, labels=labels, features=pixels, judge=judge, measures=MEASURES,
      options=evaluation.Options(interval="none"), progress=False,
    )  # fmt: skip
    return _rounded({name: found.figures[name].value for name in MEASURES})

  rows, drawn = [{"guidance": "real test images", "n": len(test), **measured(test.images, test.labels)}], {}
  for by, scales in SCALES.items():
    for scale in scales:
      images, labels = draw(scale, by)
      drawn[by, scale] = images
      rows.append({"guidance": by, "scale": scale, "n": len(images), **measured(images, labels)})
      print(rows[-1], flush=True)
  stored = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
  content = {
    "models": {name: pretrained.digest(name) for name in (NAME, CLASSIFIER)},
    "solver": f"DPM-Solver++(2M), {STEPS} steps, seed {SEED}",
    "rows": rows,
    "float16": stored.get("float16") if runs is None else float16(runs, judge),
  }
  write_atomically(FIGURES, (json.dumps(content, indent=2) + "\n").encode())
  picture(PICTURE, {scale: drawn["cfg", scale] for scale in SCALES["cfg"]}, train.class_names)


def float16(runs: Path, judge: evaluation.Judge) -> dict[str, float]:
  """Compare samples of the package's denoiser with those of the run that it was made from.

  Raises:
    ValueError: if it was made from another run, or from an earlier model of the run.
  """
  folder = runs / "denoiser"
  theirs, ours = models.load(folder), models.load(NAME)
  if not all(map(np.array_equal, *map(jax.tree.leaves, (pretrained.as_half(theirs.params), ours.params)))):
    raise ValueError(f"the model of {folder} is not the one that the package has: pack it first")
  (whole, labels), (half, _) = draw(2.0, model=str(folder)), draw(2.0)
  difference = np.abs(whole.astype(int) - half)
  return {
    "n": len(half),
    "mean difference in grey levels": round(float(difference.mean()), 4),
    "largest difference in grey levels": int(difference.max()),
    "share judged to be the same class": float((judge.predict(whole) == judge.predict(half)).mean()),
    "judged accuracy with float32": round(judge.accuracy(whole, labels), 4),
  }


def picture(path: Path, drawn: Mapping[float, np.ndarray], names: Sequence[str], across: int = 3) -> None:
  """Draw a panel for each scale, with a row for each class. Samples at the same place have the same noise."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, panels = pyplot.subplots(1, len(drawn), figsize=(2.4 * len(drawn) + 0.6, 8), layout="constrained")
  for panel, (scale, images) in zip(panels, drawn.items(), strict=True):
    rows = images[: across * len(names)].reshape(across, len(names), *images.shape[1:]).swapaxes(0, 1)
    grid = data.image_grid(rows.reshape(-1, *images.shape[1:]), across, GAP)
    panel.imshow(grid[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.set_title(f"scale {scale:g}")
    cell = images.shape[1] + GAP
    panel.set(xticks=[], yticks=[cell * row + cell / 2 for row in range(len(names))], yticklabels=[])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
  panels[0].set_yticklabels(names)
  figure.get_layout_engine().set(h_pad=0.12)  # In inches. Without it the titles touch the edge.
  content = io.BytesIO()
  figure.savefig(content, format="png", dpi=90)
  pyplot.close(figure)
  write_atomically(path, content.getvalue())


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
  return {name: round(value, 4) for name, value in values.items()}
