"""The commands ``import``, ``export``, ``import-adm`` and ``export-adm``, which read and write published weights."""

from pathlib import Path
from typing import Annotated, Any

import typer

from jaxguide._core.specs import HelpRow
from jaxguide.cli.help import Command
from jaxguide.cli.options import options_of, with_options
from jaxguide.models.importers.structure import Options

app = typer.Typer()

File = Annotated[
  Path, typer.Argument(metavar="FILE", help="Published weights, .safetensors, .pt, .pth, .ckpt, .bin or .pkl.")
]
Out = Annotated[Path, typer.Option(help="Folder for the model, new or empty.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the model.")]
Exported = Annotated[Path, typer.Option(help="File to write, .safetensors or .pt.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")]


def family_rows() -> dict[str, list[HelpRow]]:
  """Give the families of published weights with their settings, for the help."""
  from jaxguide.models.importers import families

  rows = [HelpRow(name, family.title, ", ".join(family.settings)) for name, family in families().items()]
  return {"Families and their settings": rows}


@app.command(name="import", cls=Command.grouped({}, family_rows))
def import_(
  file: File,
  out: Out,
  family: Annotated[str | None, typer.Option(help="Family; by default it is recognised by names.")] = None,
  preset: Annotated[str | None, typer.Option(help="Published model, whose settings are known.")] = None,
  heads: Annotated[int | None, typer.Option(help="Number of attention heads, which shapes do not show.")] = None,
  field: Annotated[
    list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another setting that names and shapes do not show.")
  ] = None,
) -> None:
  """Import published weights. The family of the network is recognised by its names and shapes.

  The command asks for what they do not show. Nothing in the file is run.

  Example: jaxguide import SiT-XL-2-256x256.pt --heads 16 --out runs/sit
  """
  from jaxguide.training import toml

  settings: dict[str, Any] = {} if heads is None else {"heads": heads}
  for assignment in field or []:
    name, equals, text = assignment.partition("=")
    if not equals or not name.strip():
      raise ValueError(f"--field must be given as NAME=VALUE, such as image_size=64, got {assignment!r}")
    settings[name.strip()] = toml.value(text.strip())
  _import(file, out, preset, family, settings)


def _import(file: Path, out: Path, preset: str | None, family: str | None, settings: dict[str, Any]) -> None:
  from jaxguide.models import importers

  imported = importers.import_model(file, out, preset, family, **settings)
  print(f"{file}: {imported}. The model is in {out}.")
  if imported.config.role.name != "autoencoder":
    print(f"It takes {imported.takes}.")
  else:
    module = imported.config.module
    print(
      f"Its latents are (z - {module.shift_factor}) * {module.scaling_factor}, and its normalisations have "
      f"{module.norm_num_groups} groups: weights do not show this; --preset, --field or a config.json beside them does."
    )
  if imported.config.scale is not None:
    unconditional = f"; {importers.openai.UNCONDITIONAL_SCALE:g} with 256x256_diffusion_uncond"
    also = unconditional if preset == "256x256_classifier" else ""
    print(f"Its recommended scale is {imported.config.scale:g}{also}.")


@app.command(cls=Command)
@with_options(*options_of(Options), after="preset")
def import_adm(
  file: File,
  out: Out,
  preset: Annotated[
    str | None, typer.Option(help="Published model, such as 256x256_diffusion; it has all of the following settings.")
  ] = None,
  **options: Any,
) -> None:
  """Import weights of OpenAI's guided-diffusion: UNet, super-resolution UNet, or classifier.

  It is `jaxguide import --family adm`, with an option for each setting. Without a preset, the command reads names and
  shapes, and asks for the settings that they do not show.

  Example: jaxguide import-adm 256x256_classifier.pt --preset 256x256_classifier --out runs/adm/classifier
  """
  _import(file, out, preset, "adm", {name: value for name, value in options.items() if value is not None})


@app.command(cls=Command)
def export(
  folder: Folder,
  out: Exported,
  family: Annotated[str | None, typer.Option(help="Form of the names, where the network has several.")] = None,
  overwrite: Overwrite = False,
) -> None:
  """Export a model as a state dict with the published names of its network, for use in PyTorch.

  Example: jaxguide export runs/dit --out dit.safetensors
  """
  from jaxguide.models import importers

  if out.exists() and not overwrite:
    raise ValueError(f"{out} exists already: choose another file, or --overwrite it")
  lines = importers.export_model(folder, out, family)
  print(f"The state dict is in {out}.", *lines, sep="\n")


@app.command(cls=Command)
def export_adm(folder: Folder, out: Exported, overwrite: Overwrite = False) -> None:
  """Export a model as a state dict of OpenAI's guided-diffusion, for use in PyTorch. It is `jaxguide export`.

  Example: jaxguide export-adm runs/mine --out mine.pt
  """
  export(folder, out, "adm", overwrite)
