"""The points that a sweep's folder has from earlier sweeps: which are those of a new sweep, and which belong beside it.

A point is what its settings amount to (`jaxguide.generate.identity`), however they were written.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxguide import generate
from jaxguide.evaluation import evaluations
from jaxguide.evaluation.grid import Cell
from jaxguide.evaluation.points import read_point
from jaxguide.generate import Settings
from jaxguide.generate.identity import place
from jaxguide.generate.plan import Load
from jaxguide.generate.run import WITHOUT_EFFECT

NETWORKS = ("network", "classifier_network", "other_networks", "data")
"""The parts of a record that say which networks drew the samples."""

OF_SWEEP = ("num", *WITHOUT_EFFECT)
"""The settings that a point takes from the sweep that draws it again: its samples do not depend on them."""


class Earlier(NamedTuple):
  """A point of an earlier sweep whose samples the networks of today would draw.

  Args:
    cell: the point, with the name of its files and the path to the model that this sweep has.
    content: its file.
    identity: what its settings amount to.
  """

  cell: Cell
  content: Mapping[str, Any]
  identity: str


class Points(NamedTuple):
  """The points of a sweep and of its folder.

  Args:
    shown: the points of the sweep, each once, with the names of their files where they are there.
    drawn: the same points with the settings that are in their files, which may be written in another way.
    others: the points of the folder that are not in the sweep, by name.
    left_out: the names of those that are not current: their samples were replaced, or an older jaxguide drew them.
    larger: the largest number of samples that the figures of a point have been of, if it is above that of the sweep.
  """

  shown: list[Cell]
  drawn: list[Cell]
  others: list[Cell]
  left_out: list[str]
  larger: int | None


def find_points(out: Path, found: Sequence[Cell], load: Load) -> Points:
  """Find the points of a sweep in its folder. Of several with the same samples, one is taken, that with the most.

  Args:
    out: the folder.
    found: the points of the sweep.
    load: loads the model of a folder.

  Raises:
    ValueError: if the folder has points of another model or classifier.
  """
  stored, left_out = _read(out, found, load)
  known = {one.identity: one for one in reversed(stored)}
  shown: dict[str, Cell] = {}
  drawn, larger = [], None
  for cell in found:
    identity = generate.identity(cell.settings, load)
    if identity in shown:
      continue
    one: Earlier | None = known.get(identity)
    shown[identity] = cell if one is None else dataclasses.replace(cell, file=one.cell.file)
    settings = cell.settings
    if one is not None:
      settings = dataclasses.replace(one.cell.settings, **{name: getattr(settings, name) for name in OF_SWEEP})
      n = one.content["evaluation"]["n"]
      larger = max(n, larger or n) if n > settings.num else larger
    drawn.append(dataclasses.replace(shown[identity], settings=settings))
  left_out = [name for name in left_out if name not in {cell.name for cell in drawn}]
  others = sorted((one.cell for identity, one in known.items() if identity not in shown), key=lambda cell: cell.name)
  return Points([*shown.values()], drawn, others, left_out, larger)


def _read(out: Path, found: Sequence[Cell], load: Load) -> tuple[list[Earlier], list[str]]:
  """Read the current points of a folder, those with more samples first, and the names of the others."""
  stored, left_out = [], []
  models = {place(cell.settings.model): cell.settings.model for cell in found}
  for path in sorted((out / "points").glob("*.json")):
    content, samples = read_point(path), out / "samples" / f"{path.stem}.npz"
    if content is None or not samples.exists():
      continue
    settings = Settings(**content["settings"])
    own = models.get(place(settings.model))
    drawn_by = _drawn_by(samples, settings, models.values() if own is None else [own], load)
    if isinstance(drawn_by, str):
      raise ValueError(
        f"{out} has points of another model: {path.stem} {_why(settings, own, models.values(), drawn_by)}: "
        "choose another folder, or --overwrite them"
      )
    if drawn_by is None or not _has_figures_of(samples, content):
      left_out.append(path.stem)
    else:
      cell = Cell(content["method"], drawn_by, path.stem)
      stored.append(Earlier(cell, content, generate.identity(drawn_by, load)))
  # Of points that are the same, that with the most samples is the first, and then that with the name of today.
  stored.sort(
    key=lambda one: (-one.content["evaluation"]["n"], dataclasses.replace(one.cell, file=None).name != one.cell.file)
  )
  return stored, left_out


def _drawn_by(samples: Path, settings: Settings, models: Any, load: Load) -> Settings | str | None:
  """Return the settings with the model that draws these samples; else a text, in what its networks differ.

  None if the networks are the same, but the samples are not: other software drew them, or a file is missing.
  """
  reason: str | None = None
  for model in models:
    ours = dataclasses.replace(settings, model=model)
    try:
      different = generate.unlike(samples, ours, load)
    except (ValueError, TypeError, OSError) as error:
      reason = reason if place(model) == place(settings.model) else str(error)
      continue
    if not different:
      return ours
    of_networks = [one for one in different if one.name.partition(".")[0] in NETWORKS]
    if of_networks:
      shapes = [str(one) for one in of_networks if one.name != "data.crc32"]
      reason = "; ".join(shapes[:3]) or f"other weights{' or images' if settings.init or settings.base_samples else ''}"
  return reason


def _why(settings: Settings, own: Any, models: Any, reason: str) -> str:
  if own is None:
    return f"is of {settings.model}, and this sweep of {', '.join(map(str, models))} ({reason})"
  return f"is of {settings.model} as it was, or of an older classifier ({reason})"


def _has_figures_of(samples: Path, content: Mapping[str, Any]) -> bool:
  """Return whether the figures of a point are of its samples."""
  measured = content["evaluation"]
  try:
    images, _, _ = evaluations.open_images(samples)
  except (ValueError, TypeError, OSError):
    return False
  return evaluations.hash_of(images[: measured["n"]]) == measured["protocol"].get("samples_hash")
