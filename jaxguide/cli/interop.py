"""The commands ``import-adm`` and ``export-adm``, which read and write weights of OpenAI's guided-diffusion."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxguide.cli.options import options_of, with_options
from jaxguide.models.importers.structure import Options

app = typer.Typer()


@app.command()
@with_options(*options_of(Options), after="preset")
def import_adm(
  file: Annotated[Path, typer.Argument(help="State dict of OpenAI's guided-diffusion, .safetensors or .pt.")],
  out: Annotated[Path, typer.Option(help="Folder for the model, new or empty.")],
  preset: Annotated[
    str | None, typer.Option(help="Published model, such as 256x256_diffusion; it has all of the following settings.")
  ] = None,
  **options: Any,
) -> None:
  """Import weights of OpenAI's guided-diffusion: UNet, super-resolution UNet, or classifier.

  Without a preset, the command reads names and shapes, and asks for the settings that they do not show.

  Example: jaxguide import-adm 256x256_classifier.pt --preset 256x256_classifier --out runs/adm/classifier
  """
  from jaxguide.models.importers import openai

  options = {name: value for name, value in options.items() if value is not None}
  imported = openai.import_model(file, out, preset, **options)
  print(f"{file}: {imported}. The model is in {out}.")
  if imported.config.scale is not None:
    also = f"; {openai.UNCONDITIONAL_SCALE:g} with 256x256_diffusion_uncond" if preset == "256x256_classifier" else ""
    print(f"Its recommended scale is {imported.config.scale:g}{also}.")


@app.command()
def export_adm(
  folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the model.")],
  out: Annotated[Path, typer.Option(help="File to write, .safetensors or .pt.")],
  overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
  """Export a model as a state dict of OpenAI's guided-diffusion, for use in PyTorch."""
  from jaxguide.models.importers import openai

  if out.exists() and not overwrite:
    raise ValueError(f"{out} exists already: choose another file, or --overwrite it")
  exported = openai.export_model(folder, out)
  print(f"The state dict is in {out}. The network that takes it:\n{exported.constructor}")
  if exported.flags is not None:
    print(f"Its process: {exported.flags}")
  for note in exported.notes:
    print(f"Note: {note}.")
