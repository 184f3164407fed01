"""Guided sampling at 32x32, images a second: against OpenAI's and diffusers' loops, and a plain batched JAX loop.

The peers walk the same grid with the same networks from the same noise, and what they give is held against ours first.
The plain loop is what one would write for this network alone, ``lax.fori_loop`` around ``unet.apply`` on the batch with
DDIM's formula: the floor. Of DDIM's 50 steps ten are walked, and the time is scaled.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import networks, peers, timing
from jaxguide.training import Model

BATCH, ROUNDS = (4, 3) if networks.ON_CPU else (256, 9)
WALKED = 10
SCALE = {"CFG": 2.0, "classifier": 1.0}
STEPS = {"DDIM": 50, "DPM++ 2M": 20}
SOLVERS = {"DDIM": jg.DDIM(), "DPM++ 2M": jg.DPMpp2M()}


def plain(models: dict[str, Model], kind: str, sigmas: jax.Array) -> Callable[..., jax.Array]:
  """Write guided DDIM for a batch out: no vmap, no solver, no denoiser. ``steps`` of it are walked."""
  config, scale = models["unet"].config, SCALE[kind]
  unet, classifier = config.module, models["classifier"].config.module
  times, null = config.noise_schedule.time(sigmas[:-1]), config.null_cond

  def run(params, x, labels, steps):
    both = jnp.concatenate([labels, jnp.full_like(labels, null)])

    def step(i, x):
      sigma = sigmas[i]
      seen = x / jnp.sqrt(1 + sigma**2)
      t = jnp.full(len(x), times[i])
      if kind == "CFG":
        out = unet.apply(params["unet"], jnp.concatenate([seen, seen]), jnp.concatenate([t, t]), both)
        cond, uncond = jnp.split(out, 2)
        eps = uncond + scale * (cond - uncond)
      else:

        def log_prob(x):
          logits = classifier.apply(params["classifier"], x / jnp.sqrt(1 + sigma**2), t)
          return jax.nn.log_softmax(logits)[jnp.arange(len(x)), labels].sum()

        eps = unet.apply(params["unet"], seen, t, labels) - scale * sigma * jax.grad(log_prob)(x)
      return x + (sigmas[i + 1] - sigma) * eps

    return jax.lax.fori_loop(0, steps, step, x)

  return jax.jit(run)


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


def openai_loop(theirs: dict[str, Any], kind: str, table: jg.schedules.Table, visited: np.ndarray, null: int, args):
  """Give a run of OpenAI's own DDIM loop; None for another solver or where it is not at hand."""
  process, respace = peers.find("guided_diffusion.gaussian_diffusion"), peers.find("guided_diffusion.respace")
  diffusion = respace.SpacedDiffusion(
    use_timesteps=visited.tolist(),
    betas=table.betas,
    model_mean_type=process.ModelMeanType.EPSILON,
    model_var_type=process.ModelVarType.FIXED_LARGE,
    loss_type=process.LossType.MSE,
  )
  model, cond_fn = openai_model(theirs, kind, null)
  noise, labels = args

  def run():
    return diffusion.ddim_sample_loop(
      model, tuple(noise.shape), noise=noise, clip_denoised=False, cond_fn=cond_fn, model_kwargs={"y": labels},
      device=peers.device(),
    )  # fmt: skip

  return run


def diffusers_loop(theirs: dict[str, Any], kind: str, solver: str, table, visited: np.ndarray, null: int, args):
  """Give a run of diffusers' scheduler around OpenAI's network; None where it is not at hand."""
  torch, diffusers = peers.find("torch"), peers.find("diffusers")
  if diffusers is None:
    return None
  model, cond_fn = openai_model(theirs, kind, null)
  noise, labels = args
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
        eps = model(x, times, labels)
        if cond_fn is not None:
          eps = eps - (1 - alpha_bar[int(t)]).sqrt() * cond_fn(x, times, labels)
        x = scheduler.step(eps, t, x).prev_sample
    return x

  return run


def case(models: dict[str, Model], theirs: dict[str, Any], kind: str, solver: str, facts: list[str]):
  """Measure one kind of guidance with one solver."""
  config = models["unet"].config
  table, null, steps = config.noise_schedule, config.null_cond, STEPS[solver]
  walked = WALKED if solver == "DDIM" else steps
  # A coarser grid of as many steps as are walked costs what the first of more steps do. It is the one spacing at which
  # diffusers' DDIM steps to the next level that it visits.
  visited = np.arange(walked) * (table.num_steps // walked)
  sigmas = jg.respaced(table, visited)
  noise = np.random.default_rng(0).standard_normal((BATCH, *config.image_shape)).astype(np.float32)
  labels = np.arange(BATCH, dtype=np.int32) % 10
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

  floor, params = plain(models, kind, sigmas), {name: model.params for name, model in models.items()}
  runs: dict[str, Callable[[], Any]] = {
    "jaxguide": lambda: ours(guided, start, labels),
    "sample_batch": lambda: jg.sample_batch(
      guided, jax.random.key(0), labels, shape=config.image_shape, sigmas=sigmas, solver=SOLVERS[solver]
    ),
    "plain loop": lambda: floor(params, start, labels, walked),
    "one plain step x steps": lambda: floor(params, start, labels, 1),
  }
  held = {"plain loop": lambda: np.asarray(runs["plain loop"]())} if solver == "DDIM" else {}
  if theirs:
    args = peers.tensors((noise, labels.astype(np.int64)))
    if solver == "DDIM":
      runs["OpenAI's loop, eager"] = openai_loop(theirs, kind, table, visited, null, args)
    if (run := diffusers_loop(theirs, kind, solver, table, visited, null, args)) is not None:
      runs["diffusers' loop, OpenAI's network"] = run
    for name in list(runs)[4:]:
      runs[name] = peers.finished(runs[name])
      held[name] = lambda run=runs[name]: peers.array(run())
  mine = runs["jaxguide"]()
  for name, run in held.items():
    difference = peers.check(name, mine, run(), 10 * peers.TOLERANCE)
    facts.append(f"{kind}, {solver}: what the {name} gives differs from ours by {difference:.1g} of the largest number")

  seconds = timing.measure(runs, ROUNDS)
  seconds["one plain step x steps"] = [walked * value for value in seconds["one plain step x steps"]]
  rows = timing.summary(seconds, "jaxguide")
  for row in rows:
    median = statistics.median(seconds[row["run"]])
    row["images/s"] = BATCH / (median * steps / walked)
  return rows


def main(*kinds: str) -> None:
  """Measure the kinds of guidance that are named, ``CFG`` or ``classifier``, or both."""
  models = {
    "unet": networks.random_model(networks.SMALL),
    "classifier": networks.random_model(networks.SMALL_CLASSIFIER),
  }
  theirs = {name: peers.openai_network(model) for name, model in models.items()}
  theirs = {} if None in theirs.values() else {name: net.requires_grad_(False) for name, net in theirs.items()}
  tables, facts = {}, [f"{networks.DTYPE}, batches of {BATCH}; of DDIM's {STEPS['DDIM']} steps {WALKED} were walked"]
  for kind in kinds or SCALE:
    for solver in SOLVERS:
      tables[f"{kind}, {solver} {STEPS[solver]}"] = case(models, theirs, kind, solver, facts)
      timing.report("sampling", tables, facts)  # The next may take long.
