"""The commands ``evaluate``, ``sweep`` and ``reference``: they parse options, call the package and print the result."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxguide.cli.help import DEVICES, FIGURES, SAMPLING, Command
from jaxguide.cli.joining import join, joining_options, show
from jaxguide.cli.options import options_of, with_options
from jaxguide.cli.train import said_at_once
from jaxguide.evaluation.evidence import Options
from jaxguide.generate import Settings

app = typer.Typer()

Reference = Annotated[
  str | None,
  typer.Option(
    help="What samples are compared with: a folder of pictures, a file of statistics (.npz, .pkl), an .npz of images, "
    "tfds:NAME, digits or animals."
  ),
]
FeaturesOption = Annotated[
  str | None,
  typer.Option(
    "--features",
    help="Features: a name with its options, such as inception:weights=FILE, or module:function. Default: "
    "efficientnet-lite0 where it is installed, else pixels for small images.",
  ),
]
JudgeOption = Annotated[
  str, typer.Option(help="Judge of classes, fitted on the reference: auto, pixels, features or none.")
]
MeasuresOption = Annotated[
  str | None, typer.Option(help="Measures, with commas between them. Default: all that can be computed.")
]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]


def _feature_rows() -> dict[str, Any]:
  from jaxguide.evaluation import features

  return {"--features": features.help_rows()}


def _measure_rows() -> dict[str, Any]:
  from jaxguide import generate
  from jaxguide.evaluation.features import help_rows

  return {"--features": help_rows(), **generate.overview()}


def _names(text: str | None) -> list[str] | None:
  return None if text is None else [name.strip() for name in text.split(",")]


@app.command(cls=Command.grouped(FIGURES | DEVICES, _feature_rows))
@with_options(*options_of(Options), *joining_options(mesh=False), after="measures")
def evaluate(
  samples: Annotated[
    list[str], typer.Argument(metavar="SAMPLES", help="Samples to measure: .npz files, folders of pictures, zips.")
  ],
  reference: Reference = None,
  features: FeaturesOption = None,
  judge: JudgeOption = "auto",
  measures: MeasuresOption = None,
  size: Annotated[
    int | None, typer.Option(help="Side of the square that pictures of a folder of samples are resized to.")
  ] = None,
  channels: Annotated[
    int | None, typer.Option(help="3 for RGB, 1 for grey, for a folder of samples. Default: 3.")
  ] = None,
  batch_size: Annotated[int, typer.Option(help="Images at a time in the network of the features.")] = 64,
  out: Annotated[Path | None, typer.Option(help="File for the figures with their protocols, .json.")] = None,
  progress: Progress = True,
  **options: Any,
) -> None:
  """Measure samples: distance to real images, precision and recall, diversity, class accuracy.

  Example: jaxguide evaluate samples.npz --reference ./photos
  """
  from jaxguide import distributed, evaluation
  from jaxguide._core.files import check_writable, write_atomically

  join(options, mesh=False)
  if out is not None:
    if out.suffix != ".json":
      raise ValueError(f"out must be a file that ends in .json, got {out}")
    check_writable(out)
  with said_at_once():
    results = evaluation.evaluate_files(
      samples,
      reference,
      features=features,
      judge=judge,
      measures=_names(measures),
      options=Options(**options),
      batch_size=batch_size,
      size=size,
      channels=channels,
      progress=progress,
    )
  if not distributed.is_first():
    return
  print(evaluation.table(results))
  for warning in dict.fromkeys(warning for result in results.values() for warning in result.warnings):
    print(f"jaxguide: {warning}", file=sys.stderr)
  if out is None:
    protocols = {name: result.protocol for name, result in results.items()}
    print(f"\n{evaluation.protocols_text(protocols)}")
  else:
    content = evaluation.as_plain(results)
    write_atomically(out, json.dumps(content, indent=2, default=list).encode())
    print(f"\nThe figures and their protocols are in {out}.")


MEASURING = {"Measures": ["reference", "features", "judge", "measures"]}

OWN = ("guidance", "scale", "labels", "model")
"""The settings that ``sweep`` takes in its own way."""


@app.command(cls=Command.grouped(SAMPLING | MEASURING | FIGURES | DEVICES, _measure_rows))
@with_options(
  *options_of(Settings, only=[f.name for f in dataclasses.fields(Settings) if f.name not in OWN]),
  *options_of(Options),
  *joining_options(),
  after="title",
)
def sweep(
  model: Annotated[str, typer.Option(help="Folder of the denoiser, or a name such as animals.")],
  out: Annotated[Path, typer.Option(help="Folder for samples, figures, table and report.")],
  guidance: Annotated[
    list[str] | None,
    typer.Option(
      help="Guidances to compare, with commas between them; + joins those of a chain. Default: cfg where the model has "
      "a null class, and classifier where there is a classifier."
    ),
  ] = None,
  scales: Annotated[str | None, typer.Option(help="Guidance scales, with commas. Default: 0,1,1.5,2,4.")] = None,
  over: Annotated[
    list[str] | None,
    typer.Option(help="What else to sweep: steps=10,20,50, solver=ddim,heun or cfg:sigma_hi=2,5,inf. Give it again."),
  ] = None,
  label: Annotated[list[str] | None, typer.Option(help="Class to sample; give it again. Default: all.")] = None,
  reference: Reference = None,
  features: FeaturesOption = None,
  judge: JudgeOption = "auto",
  measures: MeasuresOption = None,
  title: Annotated[str | None, typer.Option(help="Title of the report.")] = None,
  overwrite: Annotated[
    bool, typer.Option("--overwrite", help="Remove what earlier sweeps left in the folder.")
  ] = False,
  progress: Progress = True,
  **options: Any,
) -> None:
  """Sample with each guidance at each scale, measure, and report.

  The reference is by default what the model was trained on. Start the command again after it was stopped: nothing is
  drawn twice. Start it with more scales, samples or solvers to add to what is there.

  Example: jaxguide sweep --model runs/photos --guidance cfg --scales 0,1,2,4 --num 1000 --out runs/photos/sweep
  """
  from jaxguide import evaluation

  mesh = join(options)
  figures = {field.name: options.pop(field.name) for field in dataclasses.fields(Options)}
  try:
    numbers = None if scales is None else [float(text) for text in scales.split(",")]
  except ValueError:
    raise ValueError(f"scales must be numbers with commas between them, such as 0,1,2.5, got {scales!r}") from None
  with said_at_once():
    swept = evaluation.sweep(
      out,
      Settings(model=model, labels=label, **options),
      guidance=guidance,
      scales=numbers,
      over=over or (),
      reference=reference,
      features=features,
      judge=judge,
      measures=_names(measures),
      options=Options(**figures),
      title=title,
      command=shlex.join(["jaxguide", *sys.argv[1:]]),
      overwrite=overwrite,
      progress=progress,
      devices=mesh,
    )
  show(evaluation.table(swept))
  show(f"\nThe report is {out / 'report.html'}: open it in a browser. The figures are in {out / 'sweep.csv'}.")


@app.command(cls=Command.grouped({}, _feature_rows))
def reference(
  source: Annotated[str, typer.Argument(metavar="SOURCE", help="Images: a folder, .zip, .npz, tfds:NAME or digits.")],
  out: Annotated[Path, typer.Option(help="File to write, .npz.")],
  features: FeaturesOption = None,
  size: Annotated[
    int | None, typer.Option(help="Side of the square that pictures are resized to: that of the samples.")
  ] = None,
  channels: Annotated[int | None, typer.Option(help="3 for RGB, 1 for grey. Default: 3 for pictures.")] = None,
  split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
  batch_size: Annotated[int, typer.Option(help="Images at a time in the network of the features.")] = 64,
  overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
  progress: Progress = True,
) -> None:
  """Compute the statistics of real images once, for ``evaluate --reference`` and ``sweep --reference``.

  Example: jaxguide reference ./photos --size 64 --out photos-stats.npz
  """
  from jaxguide import data, evaluation
  from jaxguide._core.files import check_writable
  from jaxguide.evaluation.reference import has_moments_and_images, images_beside_moments

  if out.suffix != ".npz":
    raise ValueError(f"out must be a file that ends in .npz, got {out}")
  if out.exists() and not overwrite:
    raise ValueError(f"{out} exists already: choose another file, or --overwrite it")
  check_writable(out)
  with said_at_once():
    if has_moments_and_images(source):
      dataset = images_beside_moments(source)
      shape = dataset.image_shape
      if size not in (None, shape[0]) or channels not in (None, shape[-1]) or split != "train":
        raise ValueError(f"{source} has moments of its images as they are: leave out size, channels and split")
      chosen = evaluation.chosen_features(features, shape)
      statistics = evaluation.open_reference(source, chosen, batch_size=batch_size, progress=progress).statistics
    else:
      dataset = data.open_data(data.DataConfig(source, split=split, size=size, channels=channels), progress)
      chosen = evaluation.chosen_features(features, dataset.image_shape)
      statistics = evaluation.statistics_of(dataset, chosen, name=source, progress=progress, batch_size=batch_size)
    evaluation.write_statistics(out, statistics)
  if statistics.n is None:  # The file's own moments, which are of a number of images that it does not tell.
    print(f"The moments of {source} and the features of its {len(dataset)} images ({chosen.name}) are in {out}.")
  else:
    print(f"The statistics of {len(dataset)} images ({chosen.name}) are in {out}.")
