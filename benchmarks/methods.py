"""Every solver and every guidance method on the demo's digits, at 10 and 20 evaluations a sample: accuracy, distance.

An evaluation is one of the guided denoiser, however many passes of the network that takes; the same noise and labels
serve every row. The networks are those of `jaxguide demo` in runs/demo, which are trained first if they are not there,
and a weak one for autoguidance, trained for an eighth of the steps.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import jaxguide as jg
from benchmarks import timing
from jaxguide import data, evaluation, scales, training
from jaxguide._core.typing import Guidance, Solver
from jaxguide.evaluation import demo
from jaxguide.generate.methods import Networks
from jaxguide.generate.walks import SolverSpec

MEASURES = ("frechet_distance", "accuracy", "diversity")
FOLDER = Path("runs/demo")
NUM, EVALUATIONS, MODERATE, LARGE = 500, (10, 20), 2.0, 8.0
SIGMAS = dict(zip(("sigma_min", "sigma_max"), demo.DIGITS.sigmas, strict=True))


def solver_of(name: str, steps: int) -> Solver:
  """Make a solver; the stochastic one of EDM with a little noise."""
  return SolverSpec.parse("edm-stochastic:churn=2,s_noise=1.003" if name == "edm-stochastic" else name).build(steps)


def guidances(models: Mapping[str, training.Model], grid: jax.Array) -> dict[str, Guidance]:
  """Give what is compared, at a moderate scale and at a large one."""
  denoiser, weak, log_prob = models["denoiser"].denoiser, models["weak"].denoiser, models["classifier"].log_prob
  schedule, null = models["denoiser"].config.noise_schedule, models["denoiser"].null_cond
  assert null is not None
  cfg = lambda scale, rule=jg.combine.linear: jg.classifier_free(null, scale, rule)  # noqa: E731
  clean = Networks(models["denoiser"], models["classifier"], training.load, grid).clean(0.05)
  perturbed = lambda kind: jg.autoguidance(jg.perturbed(denoiser, jg.Perturbation(kind)), MODERATE)  # noqa: E731
  bare = jg.unconditional(null)
  table: dict[str, Guidance] = {"none (conditional)": jg.chain(), "none (unconditional)": bare}
  for scale in (MODERATE, LARGE):
    of = f"cfg {scale:g}"
    table |= {
      of: cfg(scale),
      f"{of}, clip": jg.chain(cfg(scale), jg.clip_x0()),
      f"{of}, dynamic threshold 0.9": jg.chain(cfg(scale), jg.dynamic_threshold(0.9)),
      f"{of}, dynamic threshold 0.995": jg.chain(cfg(scale), jg.dynamic_threshold(0.995)),
      f"{of}, rescaled 0.7": cfg(scale, jg.rescaled(0.7)),
      f"{of}, APG": cfg(scale, jg.projected(0.0, 2.5, -0.5)),
      f"{of}, zero star": cfg(scale, jg.zero_star()),
      f"{of}, tangential": cfg(scale, jg.tangential),
      f"{of}, frequencies 1, 0.5": cfg(scale, jg.frequency_decoupled(1.0, 0.5)),
      f"{of}, interval 0.3 to 3": jg.interval(cfg(scale), 0.3, 3.0),
      f"{of}, raised cosine": cfg(scales.raised_cosine(scale, schedule)),
      f"{of}, powered cosine 4": cfg(scales.powered_cosine(scale, schedule, 4.0)),
      f"classifier {scale:g}": jg.chain(bare, jg.classifier(log_prob, scale)),
    }
  return table | {
    "CFG++ 0.5 (with ddim)": cfg(scales.cfg_pp(0.5, grid)),
    "CFG++ 1 (with ddim)": cfg(scales.cfg_pp(1.0, grid)),
    f"autoguidance {MODERATE:g}": jg.autoguidance(weak, MODERATE),
    f"PAG {MODERATE:g}": perturbed("identity"),
    f"SEG {MODERATE:g}": perturbed("smooth"),
    f"SLG {MODERATE:g}": perturbed("skip"),
    f"cfg {MODERATE:g} beside autoguidance {MODERATE:g}": jg.parallel(cfg(MODERATE), jg.autoguidance(weak, MODERATE)),
    f"cfg {MODERATE:g}, then classifier 1": jg.chain(cfg(MODERATE), jg.classifier(log_prob, 1.0)),
    "classifier, length 0.3": jg.chain(bare, jg.normalized(jg.classifier(log_prob, 1.0), 0.3)),
    "reconstruction 1": jg.chain(bare, jg.reconstruction(clean, 1.0)),
    "reconstruction, length 0.3": jg.chain(bare, jg.normalized(jg.reconstruction(clean, 1.0), 0.3)),
  }


def main() -> None:
  """Print the tables."""
  denoiser, classifier = demo.train(FOLDER)
  train, test = data.load("digits", "train"), data.load("digits", "test")
  weak = training.fit(
    demo.DIGITS.denoiser,
    dataclasses.replace(demo.DIGITS.denoiser_training, steps=demo.DIGITS.denoiser_training.steps // 8),
    train,
    FOLDER / "weak",
  )
  models = {"denoiser": denoiser, "classifier": classifier, "weak": weak}
  judge = evaluation.Judge.fit(train.images, train.labels)
  labels = np.arange(NUM, dtype=np.int32) % train.num_classes
  pixels = evaluation.chosen_features("pixels", train.image_shape)
  reference = evaluation.open_reference(train, pixels, progress=False)

  def measured(images: np.ndarray, labels: np.ndarray) -> dict[str, str]:
    found = evaluation.evaluate(
      images, reference, labels=labels, features=pixels, judge=judge, measures=MEASURES,
      options=evaluation.Options(interval="none"), progress=False,
    )  # fmt: skip
    return {name: evaluation.MEASURES[name].text(figure.value) for name, figure in found.figures.items()}

  def cells(guidance: Guidance, solver: str, evaluations: int) -> dict[str, str]:
    each = solver_of(solver, 1).evaluations
    steps = evaluations // each
    grid = jg.karras(steps, **SIGMAS)
    images = data.to_uint8(
      jg.sample_batch(
        guidance(denoiser.denoiser), jax.random.key(0), labels, shape=demo.DIGITS.denoiser.image_shape, sigmas=grid,
        solver=solver_of(solver, steps), batch_size=NUM,
      )
    )  # fmt: skip
    return {f"{name} at {evaluations}": text for name, text in measured(images, labels).items()}

  fact = "real test digits: " + ", ".join(f"{name} {text}" for name, text in measured(test.images, test.labels).items())
  moderate = jg.classifier_free(denoiser.null_cond, MODERATE)
  solvers = [
    {"solver": name} | cells(moderate, name, EVALUATIONS[0]) | cells(moderate, name, EVALUATIONS[1])
    for name in jg.solvers.SOLVERS
  ]
  compared = [guidances(models, jg.karras(count, **SIGMAS)) for count in EVALUATIONS]
  guided = []
  for name in compared[0]:
    solver = "ddim" if "ddim" in name else "dpmpp-2m"
    made = [cells(each[name], solver, count) for each, count in zip(compared, EVALUATIONS, strict=True)]
    guided.append({"guidance": name} | made[0] | made[1])
  tables = {f"solvers, classifier-free guidance of {MODERATE:g}": solvers, "guidance, DPM-Solver++(2M)": guided}
  timing.report("methods", tables, [fact])
