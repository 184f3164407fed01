"""Guided sampling, images a second: against OpenAI's and diffusers' loops, and a plain batched JAX loop.

The peers walk the same grid with the same networks from the same noise, and what they give is held against ours first.
The plain loop is what one would write for this network alone, ``lax.fori_loop`` around ``unet.apply`` on the batch with
DDIM's formula: the floor. Of DDIM's steps the first few are walked, and the time is scaled. Both kinds of guidance at
32x32, and ADM-64 and ADM-256 with their classifiers, of random weights, which cost as much as others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import networks, peers, timing
from jaxguide import checks
from jaxguide.models.importers.openai import PRESETS
from jaxguide.training import Model, ModelConfig

ROUNDS = 3 if networks.ON_CPU else 9
SCALE = {"CFG": 2.0, "classifier": 1.0}
SOLVERS = {"DDIM": jg.DDIM(), "DPM++ 2M": jg.DPMpp2M()}


class Case(NamedTuple):
  """What is sampled from: ``steps`` of each solver, so many of which are ``walked``."""

  kind: str
  unet: ModelConfig
  classifier: ModelConfig
  batch: int
  steps: Mapping[str, int]
  walked: Mapping[str, int]


def adm(side: int, batch: int) -> Case:
  """Give one of the published pairs."""
  unet, classifier = (PRESETS[f"{side}x{side}_{part}"] for part in ("diffusion", "classifier"))
  return Case("classifier", unet, classifier, batch, {"DDIM": 25}, {"DDIM": 4})


SMALL = (networks.SMALL, networks.SMALL_CLASSIFIER, 4 if networks.ON_CPU else 256)
STEPS, WALKED = {"DDIM": 50, "DPM++ 2M": 20}, {"DDIM": 10, "DPM++ 2M": 20}
CASES = {
  "CFG": Case("CFG", *SMALL, STEPS, WALKED),
  "classifier": Case("classifier", *SMALL, STEPS, WALKED),
  "ADM-64": adm(64, 1 if networks.ON_CPU else 64),
  "ADM-256": adm(256, 1 if networks.ON_CPU else 16),
}


def plain(models: dict[str, Model], kind: str, sigmas: jax.Array) -> Callable[..., jax.Array]:
  """Write a step of guided DDIM for a batch out: no vmap, no solver, no denoiser."""
  config, scale = models["unet"].config, SCALE[kind]
  unet, classifier = config.module, models["classifier"].config.module
  times, null = config.noise_schedule.time(sigmas[:-1]), config.null_cond

  def step(params, labels, i, x):
    sigma = sigmas[i]
    seen = x / jnp.sqrt(1 + sigma**2)
    t = jnp.full(len(x), times[i])
    if kind == "CFG":
      both = jnp.concatenate([labels, jnp.full_like(labels, null)])
      out = unet.apply(params["unet"], jnp.concatenate([seen, seen]), jnp.concatenate([t, t]), both)
      cond, uncond = jnp.split(out, 2)
      eps = uncond + scale * (cond - uncond)
    else:

      def log_prob(x):
        logits = classifier.apply(params["classifier"], x / jnp.sqrt(1 + sigma**2), t)
        return jax.nn.log_softmax(logits)[jnp.arange(len(x)), labels].sum()

      # A learned variance is more channels, which DDIM has no use for.
      eps = unet.apply(params["unet"], seen, t, labels)[..., : x.shape[-1]] - scale * sigma * jax.grad(log_prob)(x)
    return x + (sigmas[i + 1] - sigma) * eps

  return step


def openai_model(theirs: dict[str, Any], kind: str, null: int) -> tuple[Any, Any]:
  """Give the functions that OpenAI's loop is called with: the model, and for classifier guidance its gradient."""
  torch = peers.find("torch")

  def cfg(x, t, y):
    with peers.precision():
      out = theirs["unet"](torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)]))
    cond, uncond = out.float().chunk(2)
    return uncond + SCALE[kind] * (cond - uncond)

  def conditional(x, t, y):
    with peers.precision():
      return theirs["unet"](x, t, y).float()

  def cond_fn(x, t, y):
    with torch.enable_grad(), peers.precision():
      leaf = x.detach().requires_grad_()
      log_prob = torch.log_softmax(theirs["classifier"](leaf, t).float(), -1)
      chosen = log_prob[torch.arange(len(leaf)), y].sum()
      return torch.autograd.grad(chosen, leaf)[0] * SCALE[kind]

  return (cfg, None) if kind == "CFG" else (conditional, cond_fn)


def openai_loop(theirs: dict[str, Any], kind: str, config: ModelConfig, visited: np.ndarray, args):
  """Give a run of OpenAI's own DDIM loop."""
  process, respace = peers.find("guided_diffusion.gaussian_diffusion"), peers.find("guided_diffusion.respace")
  diffusion = respace.SpacedDiffusion(
    use_timesteps=visited.tolist(),
    betas=config.noise_schedule.betas,
    model_mean_type=process.ModelMeanType.EPSILON,
    model_var_type=getattr(
      process.ModelVarType, "FIXED_LARGE" if config.variance == "small" else config.variance.upper()
    ),
    loss_type=process.LossType.MSE,
  )
  model, cond_fn = openai_model(theirs, kind, config.null_cond)
  noise, labels = args

  def run():
    return diffusion.ddim_sample_loop(
      model, tuple(noise.shape), noise=noise, clip_denoised=False, cond_fn=cond_fn, model_kwargs={"y": labels},
      device=peers.device(),
    )  # fmt: skip

  return run


def diffusers_loop(theirs: dict[str, Any], kind: str, solver: str, config: ModelConfig, visited: np.ndarray, args):
  """Give a run of diffusers' scheduler around OpenAI's network; None where it is not at hand."""
  torch, diffusers = peers.find("torch"), peers.find("diffusers")
  if diffusers is None:
    return None
  model, cond_fn = openai_model(theirs, kind, config.null_cond)
  noise, labels = args
  table = config.noise_schedule
  common = {"trained_betas": table.betas, "prediction_type": "epsilon"}
  if solver == "DDIM":
    scheduler = diffusers.DDIMScheduler(**common, clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(len(visited))
  else:
    scheduler = diffusers.DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=visited[::-1].tolist())
  alpha_bar = torch.as_tensor(table.alpha_bar, dtype=torch.float32).to(peers.device())

  def run():
    x = noise
    if solver != "DDIM":
      scheduler.set_timesteps(timesteps=visited[::-1].tolist())  # It forgets its history.
    with torch.no_grad():
      for t in scheduler.timesteps:
        times = torch.full((len(x),), int(t), device=x.device)
        eps = model(x, times, labels)[:, : x.shape[1]]
        if cond_fn is not None:
          eps = eps - (1 - alpha_bar[int(t)]).sqrt() * cond_fn(x, times, labels)
        x = scheduler.step(eps, t, x).prev_sample
    return x

  return run


def measure(case: Case, models: dict[str, Model], theirs: dict[str, dict[str, Any]], solver: str, facts: list[str]):
  """Measure one case with one solver. ``theirs`` are OpenAI's networks by how they run."""
  kind, config = case.kind, models["unet"].config
  table, null, walked = config.noise_schedule, config.null_cond, case.walked[solver]
  # A coarser grid of as many steps as are walked costs what the first of more steps do. It is the one spacing at which
  # diffusers' DDIM steps to the next level that it visits.
  visited = np.arange(walked) * (table.num_steps // walked)
  sigmas = jg.respaced(table, visited)
  noise = np.random.default_rng(0).standard_normal((case.batch, *config.image_shape)).astype(np.float32)
  labels = np.arange(case.batch, dtype=np.int32) % 10
  start = jnp.asarray(noise) * jnp.sqrt(1 + sigmas[0] ** 2)

  if kind == "CFG":
    guidance = jg.classifier_free(null, SCALE[kind])
  else:
    guidance = jg.classifier(models["classifier"].log_prob, SCALE[kind])
  guided = guidance(models["unet"].denoiser)

  @jax.jit
  def ours(guided, x, labels):
    draw = lambda x, y: jg.sample(  # noqa: E731
      guided, jax.random.key(0), config.image_shape, sigmas, SOLVERS[solver], y, x_init=x
    )
    return jax.vmap(draw)(x, labels)[0]

  step, params = plain(models, kind, sigmas), {name: model.params for name, model in models.items()}
  operations = networks.operations(step, params, labels, 0, start)

  @jax.jit
  def floor(params, x, labels, steps):
    return jax.lax.fori_loop(0, steps, lambda i, x: step(params, labels, i, x), x)

  runs: dict[str, Callable[[], Any]] = {
    "jaxguide": lambda: ours(guided, start, labels),
    "sample_batch": lambda: jg.sample_batch(
      guided, jax.random.key(0), labels, shape=config.image_shape, sigmas=sigmas, solver=SOLVERS[solver]
    ),
    "plain loop": lambda: floor(params, start, labels, walked),
    "one plain step x steps": lambda: floor(params, start, labels, 1),
  }
  held = {"plain loop": lambda: np.asarray(runs["plain loop"]())} if solver == "DDIM" else {}
  args = peers.tensors((noise, labels.astype(np.int64))) if theirs else ()
  for how, nets in theirs.items():
    loops = {"diffusers' loop, OpenAI's network": diffusers_loop(nets, kind, solver, config, visited, args)}
    if solver == "DDIM":
      loops = {"OpenAI's loop": openai_loop(nets, kind, config, visited, args), **loops}
    for loop, run in loops.items():
      if run is not None:
        runs[f"{loop}, {how}"] = peers.finished(run)
        held[f"{loop}, {how}"] = lambda run=run: peers.array(run())
  mine = runs["jaxguide"]()
  for name, run in held.items():
    difference = peers.check(name, mine, run(), 10 * peers.TOLERANCE)
    facts.append(f"{kind}, {solver}: what the {name} gives differs from ours by {difference:.1g} of the largest number")

  seconds, best = peers.measure(runs, ROUNDS)
  seconds["one plain step x steps"] = [walked * value for value in seconds["one plain step x steps"]]
  rows = timing.summary(seconds, "jaxguide")
  for row in rows:
    median = row["ms"] / 1e3
    row["images/s"] = case.batch / (median * case.steps[solver] / walked)
    row.update(peers.rates(operations * walked, median, best))
  return rows


def main(*names: str) -> None:
  """Measure the cases that are named, or all; on a CPU ADM-256 only where it is."""
  tables: dict[str, Any] = {}
  facts = [f"{networks.DTYPE}; operations are those of the plain step, before XLA optimises"]
  for name in names or [name for name in CASES if not (networks.ON_CPU and name == "ADM-256")]:
    case = checks.lookup("case", name, CASES)
    models = {part: networks.random_model(getattr(case, part)) for part in ("unet", "classifier")}
    eager = {part: peers.openai_network(model) for part, model in models.items()}
    theirs = {}
    if None not in eager.values():
      eager = {part: network.requires_grad_(False) for part, network in eager.items()}
      compiled = {part: peers.find("torch").compile(network) for part, network in eager.items()}
      theirs = {"eager": eager, "compiled": compiled}
    for solver, steps in case.steps.items():
      title = f"{name}, {solver} {steps}, batches of {case.batch}, {case.walked[solver]} steps walked"
      tables[title] = measure(case, models, theirs, solver, facts)
      timing.report("sampling", tables, facts)  # The next may take long.
