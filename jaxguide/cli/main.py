"""The commands: parse, call, print."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from jaxguide.cli import interop
from jaxguide.schedules import GRIDS
from jaxguide.solvers import SOLVERS

app = typer.Typer(
  name="jaxguide",
  help="Guided diffusion in JAX.",
  no_args_is_help=True,
  add_completion=False,
  pretty_exceptions_enable=False,
)

app.add_typer(interop.app)

DEMO = Path("runs/demo")


@app.callback()
def setup() -> None:
  """Keep compiled programs from run to run, where JAX was not told otherwise."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxguide"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    # JAX would keep only what takes a second to compile, and of the rest there is more.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@app.command()
def demo(
  out: Annotated[Path, typer.Option(help="Folder for models, samples, table and report.")] = DEMO,
  retrain: Annotated[bool, typer.Option("--retrain", help="Train anew what an earlier run has trained.")] = False,
  seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
  overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace samples and report of another seed.")] = False,
  progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
  """Train on digits, sample with both kinds of guidance over a range of scales, and report.

  Scale is the power in p(x) p(y|x)^scale for both: 0 unconditional, 1 conditional, more is sharper and less diverse.
  (The classifier-free guidance paper's w is scale - 1.)
  """
  from jaxguide import evaluation
  from jaxguide.evaluation import demo as program

  result = program.run(out, retrain=retrain, seed=seed, overwrite=overwrite, progress=progress)
  print(evaluation.table(result.rows))
  print(
    f"\nThe judge is right about {result.real.accuracy:.1%} of real test digits; their Fréchet distance is "
    f"{result.real.frechet_distance:.3f}, their diversity {result.real.diversity:.3f}."
  )
  print(f"The report is {result.report}: open it in a browser.")


class SampleCommand(typer.core.TyperCommand):
  """A command whose help lists what has a name."""

  def format_help(self, ctx: Any, formatter: Any) -> None:
    """Write the options, and then all names with what they do and their own options."""
    from jaxguide import generate

    super().format_help(ctx, formatter)
    for title, rows in generate.overview().items():
      with formatter.section(title):
        formatter.write_dl([(name, f"{does} [{options}]" if options else does) for name, does, options in rows])


@app.command(cls=SampleCommand)
def sample(
  out: Annotated[Path, typer.Option(help="File to write: .npz (arr_0 uint8 NHWC, arr_1 labels) or .png (a grid).")],
  model: Annotated[Path, typer.Option(help="Folder of the denoiser.")] = DEMO / "denoiser",
  classifier: Annotated[
    Path | None,
    typer.Option(help="Folder of the classifier; for guidance classifier, the one beside the model if left out."),
  ] = None,
  base_samples: Annotated[
    Path | None, typer.Option(help=".npz of low-resolution samples, for a model of super-resolution.")
  ] = None,
  init: Annotated[
    Path | None, typer.Option(help=".npz of images to start from, taken in turn, instead of from noise.")
  ] = None,
  init_level: Annotated[
    float | None,
    typer.Option(
      help="Noise level sigma that --init's images are given, nearest of the grid: the higher, the less is left of "
      "them. [default: half of the steps are walked]"
    ),
  ] = None,
  label: Annotated[
    list[int] | None, typer.Option(help="Class to sample; repeat for several. All classes in turn if left out.")
  ] = None,
  num: Annotated[int, typer.Option(help="Number of samples.")] = 16,
  guidance: Annotated[
    list[str] | None,
    typer.Option(
      help="NAME or NAME:option=value,option=value, listed below, or none; repeat for several, innermost first. "
      "[default: classifier with --classifier, else cfg where the model can]"
    ),
  ] = None,
  join: Annotated[str, typer.Option(help="How several guidances are put together: chain or parallel.")] = "chain",
  scale: Annotated[
    float | None,
    typer.Option(
      help="Power in p(x) p(y|x)^scale: 0 unconditional, 1 conditional, more is sharper and less diverse. "
      "For cfg the paper's w is scale - 1; classifier guides the unconditional network, and where the model cannot be "
      "one, the conditional, whose power then is 1 + scale. For backward it is the step size, for schedule cfg++ "
      "its lambda. [default: as recommended for the classifier, or 2]"
    ),
  ] = None,
  solver: Annotated[
    str,
    typer.Option(
      help=f"NAME or NAME:option=value: {', '.join(SOLVERS)}. With ddpm a classifier shifts the mean (Dhariwal & "
      "Nichol's Algorithm 1), with the others it bends the score (their Algorithm 2)."
    ),
  ] = "ddim",
  steps: Annotated[
    str, typer.Option(help="Steps of the solver; for the grid respaced also ddim25 or 10,10,10.")
  ] = "50",
  grid: Annotated[
    str | None,
    typer.Option(
      help=f"Noise levels, NAME or NAME:option=value: respaced (of a discrete process), {', '.join(GRIDS)}. "
      "[default: by the model]"
    ),
  ] = None,
  dtype: Annotated[str, typer.Option(help="What the networks compute in: float32 or bfloat16.")] = "float32",
  matmul_precision: Annotated[
    str, typer.Option(help="Of products: default, high, highest and others; on a GPU default is TF32 for float32.")
  ] = "default",
  cudnn_attention: Annotated[
    bool, typer.Option(help="Attend by cuDNN's fused kernel, on an NVIDIA GPU and in bfloat16; elsewhere no change.")
  ] = False,
  clip: Annotated[bool, typer.Option(help="Keep x0 in [-1, 1].")] = True,
  seed: Annotated[int, typer.Option(help="Seed: sample i depends on seed, i and its label alone.")] = 0,
  batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 256,
  overwrite: Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished file that was made with other options.")
  ] = False,
  progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
  """Sample from a trained model, guided, into an .npz or .png file.

  Killed and started again with the same options, it goes on where it stopped.
  """
  from jaxguide import generate

  settings = generate.Settings(
    model=str(model),
    classifier=None if classifier is None else str(classifier),
    base_samples=None if base_samples is None else str(base_samples),
    init=None if init is None else str(init),
    init_level=init_level,
    labels=label,
    num=num,
    guidance=guidance,
    join=join,
    scale=scale,
    solver=solver,
    steps=steps,
    grid=grid,
    dtype=dtype,
    matmul_precision=matmul_precision,
    cudnn_attention=cudnn_attention,
    clip=clip,
    seed=seed,
    batch_size=batch_size,
  )
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    drawn = generate.run(out, settings, overwrite=overwrite, progress=progress)
  for warning in caught:
    print(f"jaxguide: {warning.message}", file=sys.stderr)
  print(f"{num} samples are in {out}{'' if drawn else ' already, made with these options'}.")
