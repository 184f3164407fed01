"""The commands ``import-adm`` and ``export-adm``, which read and write weights of OpenAI's guided-diffusion."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def import_adm(
  file: Annotated[Path, typer.Argument(help="State dict of OpenAI's guided-diffusion, .safetensors or .pt.")],
  out: Annotated[Path, typer.Option(help="Folder for the model, new or empty.")],
  preset: Annotated[
    str | None, typer.Option(help="Published model that it is, such as 256x256_diffusion; tells all that follows.")
  ] = None,
  network: Annotated[str | None, typer.Option(help="unet or super_res_unet, where shapes do not tell.")] = None,
  image_size: Annotated[int | None, typer.Option(help="Side of the image.")] = None,
  low_res_size: Annotated[int | None, typer.Option(help="Side of the low-resolution image.")] = None,
  num_res_blocks: Annotated[int | None, typer.Option(help="Blocks a level, where shapes do not tell.")] = None,
  num_heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
  num_head_channels: Annotated[int | None, typer.Option(help="Channels of a head, in place of their number.")] = None,
  num_heads_upsample: Annotated[int | None, typer.Option(help="Attention heads on the way up, if others.")] = None,
  use_new_attention_order: Annotated[bool | None, typer.Option(help="Layout of queries, keys and values.")] = None,
  dropout: Annotated[float | None, typer.Option(help="Probability in training. [default: 0]")] = None,
  null_class: Annotated[bool | None, typer.Option(help="The last class stands for none. [default: no]")] = None,
  noise_schedule: Annotated[str | None, typer.Option(help="linear or cosine.")] = None,
  diffusion_steps: Annotated[
    int | None, typer.Option(help="Steps that it was trained on; 0 for continuous time.")
  ] = None,
  rescale_timesteps: Annotated[
    bool | None, typer.Option(help="Steps are told as if there were 1000. [default: no]")
  ] = None,
  prediction: Annotated[str | None, typer.Option(help="eps or x0, or jaxguide's v, edm, flow. [default: eps]")] = None,
  variance: Annotated[str | None, typer.Option(help="small or large, where none was learned. [default: large]")] = None,
  scale: Annotated[float | None, typer.Option(help="Scale of guidance recommended for a classifier.")] = None,
) -> None:
  """Import weights of OpenAI's guided-diffusion: UNet, super-resolution UNet, or classifier.

  Without a preset, the command reads names and shapes, and asks for what they do not show.
  """
  from jaxguide.models.importers import openai

  options = {name: value for name, value in locals().items() if name in openai.OPTIONS and value is not None}
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
