"""The commands: parse, call, print."""

import os
from pathlib import Path
from typing import Annotated

import typer

from jaxguide.cli import interop

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


@app.command()
def demo(
  out: Annotated[Path, typer.Option(help="Folder for models, samples, table and report.")] = DEMO,
  retrain: Annotated[bool, typer.Option("--retrain", help="Train anew what an earlier run has trained.")] = False,
  seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
  progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> None:
  """Train on digits, sample with both kinds of guidance over a range of scales, and report.

  Scale is the power in p(x) p(y|x)^scale for both: 0 unconditional, 1 conditional, more is sharper and less diverse.
  (The classifier-free guidance paper's w is scale - 1.)
  """
  from jaxguide import demo as program
  from jaxguide import evaluation

  result = program.run(out, retrain=retrain, seed=seed, progress=progress)
  print(evaluation.table(result.rows))
  print(
    f"\nThe judge is right about {result.real.accuracy:.1%} of real test digits; their Fréchet distance is "
    f"{result.real.frechet_distance:.3f}, their diversity {result.real.diversity:.3f}."
  )
  print(f"The report is {result.report}: open it in a browser.")


@app.command()
def sample(
  out: Annotated[Path, typer.Option(help="File to write: .npz (arr_0 uint8 NHWC, arr_1 labels) or .png (a grid).")],
  label: Annotated[
    list[int] | None, typer.Option(help="Class to sample; repeat for several. All classes in turn if left out.")
  ] = None,
  num: Annotated[int, typer.Option(help="Number of samples.")] = 16,
  guidance: Annotated[str, typer.Option(help="cfg, classifier or none.")] = "cfg",
  scale: Annotated[
    float | None,
    typer.Option(
      help="Power in p(x) p(y|x)^scale: 0 unconditional, 1 conditional, more is sharper and less diverse. "
      "For cfg the paper's w is scale - 1; classifier guides the unconditional denoiser. [default: 2]"
    ),
  ] = None,
  solver: Annotated[str, typer.Option(help="euler, ddim, ddpm, heun or dpmpp-2m.")] = "ddim",
  steps: Annotated[int, typer.Option(help="Steps of the solver.")] = 50,
  eta: Annotated[float | None, typer.Option(help="Randomness of ddim: 0 none, 1 as ddpm.")] = None,
  grid: Annotated[str, typer.Option(help="Noise levels: karras or log-snr.")] = "karras",
  sigma_min: Annotated[float, typer.Option(help="Last noise level above 0.")] = 0.01,
  sigma_max: Annotated[float, typer.Option(help="First noise level.")] = 80.0,
  seed: Annotated[int, typer.Option(help="Seed: sample i depends on seed, i and its label alone.")] = 0,
  batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 256,
  model: Annotated[Path, typer.Option(help="Folder of the denoiser.")] = DEMO / "denoiser",
  classifier: Annotated[
    Path | None, typer.Option(help="Folder of the classifier; the one beside the model if left out.")
  ] = None,
  progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
  """Sample from a trained model, guided, into an .npz or .png file."""
  from jaxguide import generate

  generate.run(
    out,
    labels=label,
    num=num,
    guidance=guidance,
    scale=scale,
    solver=solver,
    steps=steps,
    eta=eta,
    grid=grid,
    sigmas=(sigma_min, sigma_max),
    seed=seed,
    batch_size=batch_size,
    model=model,
    classifier=classifier,
    progress=progress,
  )
  print(f"{num} samples are in {out}.")
