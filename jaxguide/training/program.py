"""Training from a recipe: what ``jaxguide train`` does."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, NamedTuple

from jaxguide import data as datasets
from jaxguide._core import keys, records
from jaxguide._core.files import PathLike, check_writable
from jaxguide.data.sources import NAMED
from jaxguide.distributed.placing import for_batches
from jaxguide.models import Model, ModelConfig
from jaxguide.training import checkpoints, describe, loop, run_folder, toml
from jaxguide.training.recipes import Recipe, absolute, initial_params

LOG = logging.getLogger("jaxguide.training")

SAME_DATA = ("split", "size", "channels", "crop", "filter", "background", "flip", "labels", "contents", "held_out")
"""The settings of the data that cannot change in a run."""


class Parts(NamedTuple):
  """What a recipe describes, opened.

  Args:
    data: the data to train on.
    held_out: the data to evaluate on, or None.
    model: the configuration of the network.
  """

  data: Any
  held_out: Any
  model: ModelConfig


def train(
  recipe: Recipe,
  out: PathLike,
  *,
  callback: loop.Callback | None = None,
  retrain: bool = False,
  progress: bool = True,
) -> Model:
  """Train a network on data from files, continue an interrupted training, or load the model if it is trained already.

  Args:
    recipe: data, network, training and run; see `jaxguide.training.recipes`.
    out: the folder of the run; it keeps the recipe as ``config.toml``.
    callback: see `fit`.
    retrain: see `fit`.
    progress: whether to show progress bars.

  Returns:
    The trained model, as `fit` returns it.

  Raises:
    ValueError: if the data cannot be used, or do not fit the network; and those of `fit`.
    OSError: if the data cannot be read, or ``out`` cannot be written.

  A folder of pictures with a sub-folder for each class::

    recipe = training.recipe({"data": {"source": "photos", "size": 64}, "training": {"steps": 20_000}})
    model = training.train(recipe, "runs/photos")
  """
  check_writable(Path(out) / run_folder.RECORD)
  recipe = absolute(recipe)
  _check_apart(recipe, Path(out))
  begun = None if retrain else _begun(recipe, Path(out))
  parts = open_parts(recipe, progress)
  init = None
  if recipe.init_from is not None and begun is None:
    init, report = initial_params(recipe, parts.model, keys.seed_key(recipe.training.seed))
    LOG.info("beginning with the parameters of %s:\n%s", recipe.init_from, report)
  short = describe.shortage(parts.model, recipe.training, recipe.run.mesh)
  if short is not None:
    LOG.warning("%s", short)
  run = recipe.run if parts.held_out is not None else dataclasses.replace(recipe.run, patience=None)
  return loop.fit_with(
    recipe.text(),
    parts.model,
    recipe.training,
    parts.data,
    out,
    run,
    parts.held_out,
    init,
    callback,
    begun=begun,
    retrain=retrain,
    progress=progress,
  )


def _check_apart(recipe: Recipe, out: Path) -> None:
  """Check that the folder of the run is not in the folder of the data, whose pictures its own would become."""
  source = Path(str(recipe.data.source))
  if str(source) not in NAMED and source.is_dir() and out.resolve().is_relative_to(source.resolve()):
    raise ValueError(f"the folder of the run, {out}, is in the folder of the data, {source}: choose one outside it")


def _begun(recipe: Recipe, out: Path) -> str | None:
  """Return the checksum of the parameters that the run in a folder began with, if it has begun; None if there is none.

  Raises:
    ValueError: if the data were read or divided otherwise then.
  """
  if not checkpoints.steps(out / run_folder.CHECKPOINTS):
    return None
  sections = stored_sections(out) or {}
  stored = sections.get("data", {})
  default = records.defaults(datasets.DataConfig)
  for name in SAME_DATA:
    now, then = toml.plain(getattr(recipe.data, name)), stored.get(name, default.get(name))
    if now != then:
      raise ValueError(
        f"data.{name} is {then!r} in the run in {out}, and {now!r} here: leave it as it was, retrain the run, or "
        "choose another folder"
      )
  if sections.get("init_from") != recipe.init_from:
    return None  # Then it is compared with the parameters that are given here.
  return records.read(out / run_folder.RECORD).get("init")


def open_parts(recipe: Recipe, progress: bool = True) -> Parts:
  """Open the data of a recipe, split off what is held out, and make the configuration of the network.

  A classifier is evaluated on held-out data. They are not mirrored or cropped at random.
  """
  data, held_out = datasets.open_data(recipe.data, progress), None
  share = recipe.held_out
  if share:
    data, rest = datasets.split(data, share)
    held_out = rest if recipe.is_classifier else None
    if held_out is not None and (recipe.data.flip or recipe.data.crop == "random"):
      crop = "center" if recipe.data.crop == "random" else recipe.data.crop
      plain = dataclasses.replace(recipe.data, flip=False, crop=crop)
      held_out = datasets.split(datasets.open_data(plain, progress), share)[1]
  return Parts(data, held_out, recipe.model_config(data))


def dry_run(recipe: Recipe, out: PathLike, progress: bool = True) -> tuple[str, Path]:
  """Describe a run without training, and write a picture of its first batch.

  Returns:
    Parameters, memory, operations and epochs in words, and the path of the picture, ``out/first_batch.png``.
  """
  parts = open_parts(recipe, progress)
  text = str(describe.describe(parts.model, recipe.training, len(parts.data)))
  place = for_batches(recipe.training.batch_size, recipe.run.mesh)
  if len(place.devices) > 1:
    text += f"\n{describe.on_mesh(parts.model, recipe.training, place)}"
  short = describe.shortage(parts.model, recipe.training, recipe.run.mesh)
  if short is not None:
    text += f"\ntoo large   {short[0].upper()}{short[1:]}"
  if recipe.source:
    text += f"\npreset      {recipe.source}"
  if parts.model.class_names is not None:
    text += f"\nclasses     {', '.join(parts.model.class_names)}"
  if recipe.init_from is not None:
    _, report = initial_params(recipe, parts.model, keys.seed_key(recipe.training.seed))
    text += f"\n\nFrom {recipe.init_from}:\n{report}"
  path = Path(out) / "first_batch.png"
  describe.save_first_batch(path, parts.data, parts.model, recipe.training)
  return text, path


def stored_sections(out: PathLike) -> dict[str, Any] | None:
  """Return the configuration of the run in a folder; None if there is no run.

  Raises:
    ValueError: if the run was started from Python with data in memory, or its configuration is damaged.
  """
  path = Path(out) / run_folder.CONFIG
  if not path.exists():
    return None
  sections = toml.read(path)
  if "data" not in sections:
    raise ValueError(
      f"the run in {out} was started from Python with data in memory: continue it there, by the same call of fit"
    )
  return sections
