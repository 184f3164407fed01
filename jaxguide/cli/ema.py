"""The command ``ema``, which makes a running mean of another width from the snapshots of a training."""

from pathlib import Path
from typing import Annotated

import typer

from jaxguide.cli.help import Command

app = typer.Typer()


@app.command(cls=Command)
def ema(
  run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the training.")],
  std: Annotated[float, typer.Option(help="Width of the mean, relative to the training's duration; 0 to 0.2887.")],
  out: Annotated[Path, typer.Option(help="Folder for the model, new or empty.")],
  step: Annotated[int | None, typer.Option(help="Training step at which the mean ends. Default: the last.")] = None,
  overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
  """Make the running mean of another width from what a training kept (Karras et al. 2024, arXiv:2312.02696).

  The training must have had two power-function means, and have kept snapshots of them.

  Example: jaxguide ema runs/photos --std 0.08 --out runs/photos-0.08
  """
  from jaxguide._core import records
  from jaxguide.models import Model, ModelConfig, folders
  from jaxguide.models.model import shapes
  from jaxguide.training import snapshots

  if (out / "config.json").exists() and not overwrite:
    raise ValueError(f"{out} contains a model already: choose another folder, or --overwrite it")
  record = run / "training.json"
  try:
    config = ModelConfig(**records.read(record)["model"])
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no training in {run}: give the folder of one, which has training.json") from None
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{record} does not describe a training ({error}): restore it from a copy") from error
  if out.resolve() in (run.resolve(), (run / "model").resolve()):
    raise ValueError(f"{out} belongs to the training, which goes on from it: choose another folder")
  mean = snapshots.reconstruct(run / snapshots.FOLDER, std, step, shapes(config))
  folders.save(out, Model(config, mean.params))
  print(
    f"The mean of width {std:g} at step {mean.step} is in {out}. It is made from {mean.number} snapshots; "
    f"the weights of the training steps in it are within {mean.error:.1%} of the exact ones."
  )
