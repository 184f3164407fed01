"""The command ``export-sampler``, which writes a program that runs without jaxguide."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxguide import generate
from jaxguide.cli.help import SAMPLING, Command
from jaxguide.cli.options import options_of, with_options
from jaxguide.cli.train import said_at_once
from jaxguide.generate import Settings

app = typer.Typer()

OPTIONS = [
  "classifier",
  "vae",
  "vae_tile",
  "guidance",
  "join",
  "scale",
  "solver",
  "steps",
  "grid",
  "dtype",
  "matmul_precision",
  "clip",
]


@app.command(cls=Command.grouped(SAMPLING, generate.overview))
@with_options(*options_of(Settings, only=OPTIONS), after="out")
def export_sampler(
  model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of the denoiser, or its name, such as animals.")],
  out: Annotated[Path, typer.Option(help="File to write, such as sampler.jaxexport.")],
  platforms: Annotated[
    str, typer.Option(help="Platforms that the program is for, of cpu, cuda, rocm and tpu, with commas.")
  ] = "cpu,cuda,tpu",
  batch: Annotated[
    int | None, typer.Option(help="Number of samples of a call. If left out, the program takes any number.")
  ] = None,
  weights: Annotated[
    Path | None, typer.Option(help="File for the weights, .npz. If left out, they are in the sampler's file.")
  ] = None,
  **options: Any,
) -> None:
  """Write the program that draws samples, with its weights, for use without jaxguide.

  It runs wherever JAX is installed, on CPU, CUDA and TPU, and draws the samples of jaxguide sample with the same
  options. Label, scale and seed are its arguments; a given scale is the default. See docs/serving.md.

  Example: jaxguide export-sampler runs/photos --guidance cfg --scale 2 --steps 25 --out sampler.jaxexport
  """
  names = [name.strip() for name in platforms.split(",")]
  with said_at_once():
    header = generate.export_sampler(
      out, Settings(model=model, **options), platforms=names, batch=batch, weights=weights
    )
  size = out.stat().st_size / 2**20
  number = "any number of samples" if batch is None else f"{batch} samples"
  print(f"{out} ({size:.1f} MiB) draws {number} at a time, on {', '.join(header['platforms'])}.")
  print(f"Its arguments are {', '.join(header['arguments'])}; docs/serving.md shows how to call it.")
