"""The commands ``demo``, ``sample`` and ``methods``: they parse options, call the package and print the result."""

import gc
import os
import sys
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import typer

from jaxguide import generate
from jaxguide._core import kept
from jaxguide.cli import classifier, completion, doctor, ema, encode, exporting, interop, measure, train
from jaxguide.cli.help import DEVICES, SAMPLING, Command, Group, table_text
from jaxguide.cli.joining import join, joining_options, show
from jaxguide.cli.options import options_of, with_options
from jaxguide.generate import Settings


class Program(Group):
  """The commands by what they are for."""

  groups = MappingProxyType(
    {
      "Draw": ["demo", "sample", "methods", "export-sampler"],
      "Train": ["train", "encode", "ema", "classifier-report"],
      "Measure": ["evaluate", "sweep", "reference"],
      "Published weights": ["import", "export", "import-adm", "export-adm"],
      "This installation": ["doctor", "completion"],
    }
  )


app = typer.Typer(
  name="jaxguide",
  cls=Program,
  help="Guided diffusion in JAX. Each command has --help.\n\n"
  "Example: jaxguide sample --model animals --label cat --out cats.png",
  no_args_is_help=True,
  add_completion=False,  # It would start Python, and import JAX, for each Tab; the command completion does not.
  rich_markup_mode=None,
  pretty_exceptions_enable=False,
)

app.add_typer(train.app)
app.add_typer(interop.app)
app.add_typer(encode.app)
app.add_typer(exporting.app)
app.add_typer(ema.app)
app.add_typer(classifier.app)
app.add_typer(measure.app)
app.add_typer(doctor.app)
app.add_typer(completion.app)


def show_version(asked: bool) -> bool:
  """Print the version for ``--version``."""
  if asked:
    import jaxguide

    print(f"jaxguide {jaxguide.__version__}")
    raise typer.Exit
  return asked


@app.callback()
def setup(
  version: Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
  ] = False,
) -> None:
  """Keep compiled programs on disk between runs, unless JAX is configured otherwise."""
  import jax

  # Tracing makes many objects and few cycles of them: Python's search for cycles would take a tenth of the time.
  gc.set_threshold(50_000, 20, 20)
  if os.getcwd() not in sys.path:
    sys.path.append(os.getcwd())  # For networks of one's own, module:Class.

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxguide"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # By default JAX keeps only programs that take a second to compile. Most programs here are faster.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  kept.keep()


@app.command(cls=Command)
def demo(
  name: Annotated[
    str, typer.Option("--data", help="digits (minutes on two cores) or animals (half an hour).")
  ] = "digits",
  out: Annotated[
    Path | None, typer.Option(help="Folder for models, samples, table and report. Default: runs/demo, or runs/animals.")
  ] = None,
  retrain: Annotated[bool, typer.Option("--retrain", help="Train anew what an earlier run has trained.")] = False,
  seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
  overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace samples and report of another seed.")] = False,
  progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
  """Train on digits or animals, sample with both kinds of guidance over a range of scales, and report.

  Scale is the power in p(x) p(y|x)^scale for both: 0 unconditional, 1 conditional, more is sharper and less diverse.
  (The classifier-free guidance paper's w is scale - 1.)

  Example: jaxguide demo
  """
  from jaxguide import evaluation, training
  from jaxguide.evaluation import demo as program

  try:
    result = program.run(out, name, retrain=retrain, seed=seed, overwrite=overwrite, progress=progress)
  except training.Interrupted as stop:
    print("\njaxguide: stopped. Start the same command again to go on where it stopped.", file=sys.stderr)
    raise SystemExit(stop.status) from stop
  print(evaluation.table(result.sweep))
  print(f"\nThe report is {result.report}: open it in a browser.")


@app.command(cls=Command.grouped(SAMPLING | DEVICES, generate.overview))
@with_options(*options_of(Settings, {"labels": "label"}), *joining_options(), after="out")
def sample(
  out: Annotated[Path, typer.Option(help="File to write: .npz (arr_0 uint8 NHWC, arr_1 labels) or .png (a picture).")],
  overwrite: Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished file that was made with other options.")
  ] = False,
  progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
  **options: Any,
) -> None:
  """Sample from a trained model, guided, into an .npz or .png file.

  Give --label and --guidance again for each further value. If the command is stopped and started again with the same
  options, it goes on where it stopped.

  Example: jaxguide sample --out threes.png --label 3 --guidance cfg:scale=4
  """
  mesh = join(options)
  settings = Settings(**options)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    drawn = generate.run(out, settings, overwrite=overwrite, progress=progress, devices=mesh)
  for warning in caught:
    print(f"jaxguide: {warning.message}", file=sys.stderr)
  show(f"{settings.num} samples are in {out}{'' if drawn else ' already, made with these options'}.")


@app.command(cls=Command)
def methods(
  names: Annotated[
    list[str] | None, typer.Argument(metavar="NAME...", help="Names to show, such as cfg, solver or dit. Default: all.")
  ] = None,
) -> None:
  """List the names that options take, with what they do, their papers and their own options.

  They are guidances, combine rules, profiles of scales, solvers, grids, features, and families of published weights.

  Example: jaxguide methods solver
  """
  from jaxguide.evaluation import features

  tables = {**generate.overview(), "--features": features.help_rows(), **interop.family_rows()}
  for name in names or ():
    heading = f"--{name.removeprefix('--')}"
    found = {
      title: [row for row in rows if row.name == name or title == heading or title.startswith(f"{name}=")]
      for title, rows in tables.items()
    }
    found = {title: rows for title, rows in found.items() if rows}
    if not found:
      raise ValueError(f"there is no {name!r}: jaxguide methods lists all names")
    print(table_text(found))
  if not names:
    print(table_text(tables))
