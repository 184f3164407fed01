"""The command ``encode``, which makes a data set of latents."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxguide.cli.help import Command
from jaxguide.cli.options import options_of, with_options
from jaxguide.cli.train import said_at_once
from jaxguide.generate import Encoding

app = typer.Typer()


@app.command(cls=Command)
@with_options(*options_of(Encoding), after="out")
def encode(
  data: Annotated[str, typer.Argument(metavar="DATA", help="Pictures: all that jaxguide train takes as --data.")],
  out: Annotated[Path, typer.Option(help="File to write, .npz.")],
  progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
  **options: Any,
) -> None:
  """Encode pictures by an autoencoder, as a data set of latents for jaxguide train.

  The file holds the mean and the standard deviation of each latent, so that the training draws a fresh sample each time
  it reads one. If the command is stopped and started again with the same options, it goes on where it stopped.

  Example: jaxguide encode ./photos --vae runs/vae --size 256 --out latents.npz
  """
  from jaxguide import generate

  with said_at_once():
    facts = generate.encode(data, out, Encoding(**options), progress=progress)
  height, width, channels = facts.shape
  print(
    f"{facts.number} latents of {height}x{width}x{channels} are in {out}. Their standard deviation is {facts.std:.4g}."
  )
  print(f"Train on them: jaxguide train --data {out} --out runs/latents")
