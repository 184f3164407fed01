"""The command ``classifier-report``, which shows whether a noisy classifier is fit to guide."""

from pathlib import Path
from typing import Annotated

import typer

from jaxguide.cli.help import Command
from jaxguide.cli.train import said_at_once

app = typer.Typer()


@app.command(cls=Command)
def classifier_report(
  model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the classifier, or of its training.")],
  out: Annotated[Path, typer.Option(help="File to write, .html.")],
  denoiser: Annotated[
    Path | None,
    typer.Option(
      help="Folder of a diffusion model of the same images, for the samples; if it has a null class, its implied "
      "gradient is compared with that of the classifier."
    ),
  ] = None,
  data: Annotated[
    str | None,
    typer.Option(
      help="Held-out data: digits, tfds:NAME, a folder of pictures, or a file. Default: what the training held out."
    ),
  ] = None,
  scale: Annotated[
    list[float] | None, typer.Option(help="Guidance scale of samples; give it again for more. Default: 0, 1, 3, 10.")
  ] = None,
  num: Annotated[int, typer.Option(help="Largest number of held-out examples.")] = 1000,
  samples: Annotated[int, typer.Option(help="Samples of each class at each scale, of at most ten classes.")] = 6,
  steps: Annotated[int, typer.Option(help="Steps of the solver for the samples.")] = 25,
  seed: Annotated[int, typer.Option(help="Seed of the choice of examples, of the noise and of the samples.")] = 0,
  overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
  progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
  """Report on a noisy classifier: is it trained long enough, and does its gradient lead where it should.

  The page shows accuracy, likelihood, calibration and gradient by noise level, and guided samples, each with what good
  and bad look like.

  Example: jaxguide classifier-report runs/demo/classifier --denoiser runs/demo/denoiser --out report.html
  """
  from jaxguide import evaluation, models
  from jaxguide._core import checks
  from jaxguide.evaluation.classifier_report import SCALES
  from jaxguide.evaluation.held_out_data import held_out_data
  from jaxguide.models.networks import CLASSIFIER

  if out.suffix != ".html":
    raise ValueError(f"out must be a file that ends in .html, got {out}")
  for value in scale or ():
    checks.finite("scale", value)
  if out.exists() and not overwrite:
    raise ValueError(f"{out} exists already: choose another file, or --overwrite it")
  with said_at_once():
    classifier = models.load(model)
    if classifier.config.role is not CLASSIFIER:
      raise ValueError(f"{model} is a {classifier.config.network}, and the report is for a classifier: give one")
    report = evaluation.classifier_report(
      out,
      classifier,
      held_out_data(model, classifier.config, data),
      denoiser=None if denoiser is None else models.load(denoiser),
      scales=scale or SCALES,
      num=num,
      samples_per_class=samples,
      steps=steps,
      seed=seed,
      title=f"Noisy classifier {model}",
      progress=progress,
    )
  said = report.verdicts
  print("\n".join([said.accuracy, said.nll, said.cosine, said.summary]))
  print(f"The report is {report.path}: open it in a browser.")
