"""The command ``train``, which trains a network on a folder of pictures or other data."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxguide.cli.help import DEVICES, Command
from jaxguide.cli.joining import join, joining_options, show
from jaxguide.cli.options import options_of, with_options
from jaxguide.data.config import DataConfig
from jaxguide.training.config import TrainingConfig
from jaxguide.training.run_config import RunConfig

app = typer.Typer()

DATA = ("source", "size", "channels", "flip", "skip_bad", "held_out", "workers")
TRAINING = ("steps", "batch_size", "learning_rate", "accumulation", "remat", "skip_nan", "seed", "save_every")
RUN = ("log_every", "sample_every", "patience", "writers", "mesh")
SECTIONS = {"data": DATA, "training": TRAINING, "run": RUN}

GROUPS = {
  "Training": ["network", "preset", "init-from", "steps", "batch-size", "learning-rate", "seed"],
  "All settings": ["config", "set", "print-config", "dry-run"],
  "Data": ["channels", "flip", "held-out", "skip-bad", "workers"],
  "Further training": ["accumulation", "remat", "skip-nan", "patience"],
  "Run": ["log-every", "sample-every", "save-every", "writer"],
  **DEVICES,
}

INTERRUPTED = 130


@app.command(cls=Command.grouped(GROUPS))
@with_options(
  *options_of(DataConfig, {"source": "data"}, DATA, unset=True),
  *options_of(TrainingConfig, {}, TRAINING, unset=True),
  *options_of(RunConfig, {"writers": "writer"}, RUN, unset=True),
  *joining_options(mesh=False),
  after="network",
)
def train(
  name: Annotated[
    str | None,
    typer.Argument(metavar="NAME", help="Model that comes with the package, such as animals: train it anew."),
  ] = None,
  out: Annotated[Path | None, typer.Option(help="Folder of the run; needed for all but --print-config.")] = None,
  network: Annotated[
    str | None,
    typer.Option(help="Network: unet (default), classifier, super_res_unet, or a Flax module as module:Class."),
  ] = None,
  preset: Annotated[
    str | None, typer.Option(help="Preset: size (default, by the images' size), none, or a name such as DiT-S/2.")
  ] = None,
  init_from: Annotated[
    Path | None, typer.Option(help="Folder of a trained or imported model to begin from, for fine-tuning.")
  ] = None,
  config: Annotated[Path | None, typer.Option(help="TOML file with all settings; other options come on top.")] = None,
  set_: Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.NAME=VALUE", help="Any setting, such as training.steps=200000; repeatable."),
  ] = None,
  print_config: Annotated[
    bool, typer.Option("--print-config", help="Print all settings with every default, and do not train.")
  ] = False,
  dry_run: Annotated[
    bool,
    typer.Option("--dry-run", help="Print parameters, memory, operations; draw the first batch; do not train."),
  ] = False,
  retrain: Annotated[bool, typer.Option("--retrain", help="Start over; an old model stays until then.")] = False,
  progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
  **options: Any,
) -> None:
  """Train a network on pictures. The settings are those of a preset for the size, unless given.

  Stop it with Ctrl-C or a kill, and start it again with --out alone: it goes on where it stopped.

  Example: jaxguide train --data ./photos --size 64 --out runs/photos

  With a NAME, the settings are those of that model: jaxguide train animals --out runs/animals
  """
  from jaxguide import training
  from jaxguide.training import program, toml

  join(options, mesh=False)
  given: dict[str, Any] = {
    section: {name: options[name] for name in names if options[name] is not None} for section, names in SECTIONS.items()
  }
  given["data"] = {name: str(value) if name == "source" else value for name, value in given["data"].items()}
  given["model"] = {} if network is None else {"network": network}
  if preset is not None:
    given["preset"] = preset
  if init_from is not None:
    given["init_from"] = str(init_from)
  for assignment in set_ or ():
    toml.assign(given, assignment)
  with said_at_once():
    if name is not None:
      config = _settings_of(name, config)
    recipe = training.recipe(_sections(config, out, given))
    if print_config:
      show(recipe.text().rstrip("\n"))
    elif out is None:
      raise ValueError("give the folder of the run: --out")
    elif dry_run:
      text, picture = program.dry_run(recipe, out, progress=progress)
      show(f"{text}\nThe first batch is in {picture}.")
    else:
      _train(recipe, out, retrain, progress)


def _settings_of(name: str, config: Path | None) -> Path:
  """Return the file of settings of a model that comes with the package."""
  from jaxguide.models import pretrained

  if config is not None:
    raise ValueError(f"{name} has settings of its own: leave out the name, or --config")
  if name not in pretrained.names():
    known = ", ".join(pretrained.names())
    raise ValueError(f"there is no model {name!r} in the package, only {known}; for data give --data {name}")
  return pretrained.settings(name)


def _sections(config: Path | None, out: Path | None, given: dict[str, Any]) -> dict[str, Any]:
  """Join the settings of a file, or of the run that is continued, with those of the command line."""
  from jaxguide.training import program, toml

  below = None
  if config is not None:
    below = toml.read(config)
  elif out is not None:
    below = program.stored_sections(out)
  if below is None:
    if isinstance(given["data"], dict) and "source" not in given["data"]:
      where = "" if out is None else f", and there is no run in {out} to continue"
      raise ValueError(f"there are no data{where}: give them (--data), or a file of settings (--config)")
    return given
  models = [sections.get("model") for sections in (below, given)]
  networks = [model["network"] for model in models if isinstance(model, dict) and "network" in model]
  if config is None and networks != networks[:1] * len(networks):
    # The settings of another network do not fit; the preset's are compared with those of the run.
    below = {name: value for name, value in below.items() if name in ("data", "run")}
  training = below.get("training")
  if "ema" in given["training"] and "ema_decay" not in given["training"] and isinstance(training, dict):
    training.pop("ema_decay", None)  # It belongs to the running mean that the other one replaces.
  return toml.merge(below, given)


def _train(recipe: Any, out: Path, retrain: bool, progress: bool) -> None:
  from jaxguide import distributed, training
  from jaxguide.generate.plan import base_samples_of

  try:
    model = training.train(recipe, out, retrain=retrain, progress=progress)
  except training.Interrupted as stop:
    if distributed.is_first():
      print(
        f"\njaxguide: stopped after step {stop.step}; everything is saved. To go on: "
        f"jaxguide train --out {shlex.quote(str(out))}",
        file=sys.stderr,
      )
    distributed.wait_for_all("everything is saved")
    raise SystemExit(stop.status) from stop
  except KeyboardInterrupt:
    begun = "the steps since the last checkpoint are lost. To go on: jaxguide train --out " + shlex.quote(str(out))
    if not (out / "config.toml").exists():
      begun = "the training had not begun. Start the same command again"
    print(f"\njaxguide: stopped at once; {begun}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(INTERRUPTED)  # Without waiting for what is being written.
  labels = model.config.class_names
  use = "--classifier" if recipe.is_classifier else "--model"
  label = f" --label {shlex.quote(labels[0])}" if labels is not None and not recipe.is_classifier else ""
  show(f"The model is in {out}. Its curves and pictures are in {out / 'index.html'}.")
  if recipe.is_classifier:
    show(f"Is it fit to guide? jaxguide classifier-report {shlex.quote(str(out))} --out report.html")
  elif model.config.encoder == "latents":
    show(f"Sample from it: jaxguide sample --model {shlex.quote(str(out))} --vae FILE{label} --out new.png")
  else:
    base = "" if model.config.low_res_shape is None else " --base-samples FILE"
    label = "" if base else label
    show(f"Sample from it: jaxguide sample {use} {shlex.quote(str(out))}{label}{base} --out new.png")
    if base:
      show(f"FILE has the low-resolution images: {base_samples_of(model.config)}.")


@contextmanager
def said_at_once() -> Iterator[None]:
  """Print warnings and messages of the training as lines on stderr, when they occur."""
  handler = logging.StreamHandler(sys.stderr)
  handler.setFormatter(logging.Formatter("jaxguide: %(message)s"))
  log = logging.getLogger("jaxguide.training")
  level, propagate = log.level, log.propagate
  log.addHandler(handler)
  log.setLevel(logging.INFO)
  log.propagate = False
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("always", UserWarning)
      warnings.showwarning = lambda message, *_: print(f"jaxguide: {message}", file=sys.stderr)
      yield
  finally:
    log.removeHandler(handler)
    log.setLevel(level)
    log.propagate = propagate
