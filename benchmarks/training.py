"""One training step of the diffusion model and of the classifier, against PyTorch eager and compiled.

A step is forward, backward, the norm of the gradient clipped, AdamW, and the running mean of the parameters. The peers
are OpenAI's networks with the same weights and PyTorch's fused optimiser; the gradient of one loss with respect to
every weight is held against ours first. At 32x32, and of ADM-64: on a CPU that takes long, and has to be named. Of each
network there is a second table: our step in parts of the batch, and with each kind of rematerialisation, time and
XLA's figure of memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import networks, peers, timing
from jaxguide import checks
from jaxguide.models.importers import openai
from jaxguide.training import Model, ModelConfig, TrainingConfig
from jaxguide.training.step import init_state, train_step

ROUNDS = 7 if networks.ON_CPU else 15
TRAINING = TrainingConfig(steps=1000, weight_decay=0.01)
ADM = networks.SIZES["ADM-64"].unet
# The network, and how many images a step has.
CASES = {
  "unet": (networks.SMALL, 16 if networks.ON_CPU else 256),
  "classifier": (networks.SMALL_CLASSIFIER, 16 if networks.ON_CPU else 256),
  # Without its learned variance, which would make the loss another one for each side.
  "ADM-64": (
    dataclasses.replace(ADM, fields={**ADM.fields, "out_channels": None}, variance="small"),
    networks.SIZES["ADM-64"].batch,
  ),
}


def target_loss(logits_or_eps: Any, labels: Any, noise: Any, xp: Any) -> Any:
  """Give the loss: cross-entropy of logits, squared error of predicted noise. ``xp`` is what knows both."""
  return xp(logits_or_eps, labels) if logits_or_eps.ndim == 2 else ((logits_or_eps - noise) ** 2).mean()


def check(model: Model, network: Any) -> float:
  """Hold the weights' gradient of one loss against ours; give the largest difference."""
  torch = peers.find("torch")
  x, t, *rest = networks.inputs(model.config, 4)
  labels, noise = np.arange(4) % 10, np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)

  @jax.jit
  @jax.grad
  def gradient(params):
    entropy = lambda logits, y: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()  # noqa: E731
    return target_loss(model.config.module.apply(params, x, t, *rest), labels, noise, entropy)

  ours = openai.to_state_dict(gradient(model.params), model.config)
  noise, labels, *args = peers.tensors((noise, labels, x, t, *rest))
  with peers.precision():
    loss = target_loss(network(*args), labels, noise, torch.nn.functional.cross_entropy)
  loss.backward()
  theirs = {name: weight.grad.float().cpu().numpy() for name, weight in network.named_parameters()}
  network.zero_grad()
  flat = [np.concatenate([np.ravel(tree[name]) for name in ours]) for tree in (ours, theirs)]
  return peers.check("OpenAI's gradient", *flat)


def peer_step(model: Model, network: Any, images: np.ndarray, labels: np.ndarray) -> Any:
  """Give one step of training in PyTorch, with what ours does."""
  torch, (images, labels) = peers.find("torch"), peers.tensors((images, labels.astype(np.int64)))
  # The compiled network holds the same parameters.
  weights = list(network.parameters())
  means = [weight.detach().clone() for weight in weights]
  adamw = torch.optim.AdamW(weights, lr=1e-6, weight_decay=TRAINING.weight_decay, fused=True)
  alpha_bar = torch.as_tensor(model.config.noise_schedule.alpha_bar, dtype=torch.float32).to(peers.device())
  null, is_unet = model.config.null_cond, model.config.network == "unet"

  def step():
    x0 = images.float() / 127.5 - 1
    t = torch.randint(0, len(alpha_bar), (len(x0),), device=x0.device)
    level, noise = alpha_bar[t].view(-1, 1, 1, 1), torch.randn_like(x0)
    x = level.sqrt() * x0 + (1 - level).sqrt() * noise
    y = labels
    if null is not None:
      y = torch.where(torch.rand(len(x0), device=x0.device) < 0.15, null, labels)
    with peers.precision():
      out = network(x, t.float(), y) if is_unet else network(x, t.float())
    loss = target_loss(out.float(), y, noise, torch.nn.functional.cross_entropy)
    adamw.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, TRAINING.clip_norm)
    adamw.step()
    with torch.no_grad():
      torch._foreach_lerp_(means, weights, 1 - TRAINING.ema_decay)
    return loss

  return peers.finished(step)


def batch_of(config: ModelConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
  """Draw a batch of images and labels."""
  images = np.random.default_rng(0).integers(0, 256, (number, *config.image_shape)).astype(np.uint8)
  return images, (np.arange(number) % 10).astype(np.int32)


class Ours:
  """Our step, compiled, as a run that takes its own state on."""

  def __init__(self, model: Model, training: TrainingConfig, batch: int):
    self.batch = tuple(map(jnp.asarray, batch_of(model.config, batch)))
    self.function: Any = train_step(model.config, training)
    self.state = jax.device_put(init_state(model.config, training, model.params), jax.devices()[0])
    self.step = self.function.lower(self.state, *self.batch).compile()

  def __call__(self):
    """Take a step."""
    self.state, metrics = self.step(self.state, *self.batch)
    return self.state, metrics

  @property
  def memory(self) -> float:
    """XLA's figure of the memory of a step with the training's state, in MiB."""
    found = self.step.memory_analysis()
    outside = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return (outside + found.temp_size_in_bytes) / 2**20


def case(name: str, config: ModelConfig, batch: int, facts: list[str]) -> list[dict[str, Any]]:
  """Measure one network beside the peers."""
  model = networks.random_model(config)
  images, labels = batch_of(config, batch)
  ours = Ours(model, TRAINING, batch)
  operations = networks.operations(train_step(model.config, TRAINING), ours.state, images, labels)
  runs: dict[str, Any] = {"jaxguide": ours}
  if (network := peers.openai_network(model)) is not None:
    facts.append(f"{name}: the gradients of all weights differ by {check(model, network):.1g} of the largest")
    network.train()
    runs["OpenAI's network, eager"] = peer_step(model, network, images, labels)
    runs["OpenAI's network, compiled"] = peer_step(model, peers.find("torch").compile(network), images, labels)
  seconds, best = peers.measure(runs, ROUNDS)
  rows = timing.summary(seconds, "jaxguide", label="step")
  for row in rows:
    row.update(peers.rates(operations, row["ms"] / 1e3, best))
  return rows


VARIANTS: dict[str, dict[str, Any]] = {
  "whole batch": {},
  "accumulation 4": {"accumulation": 4},
  "remat blocks": {"remat": "blocks"},
  "remat all": {"remat": "all"},
  "accumulation 4, remat blocks": {"accumulation": 4, "remat": "blocks"},
}


def variants(config: ModelConfig, batch: int) -> list[dict[str, Any]]:
  """Measure our step in parts of the batch and with rematerialisation."""
  model = networks.random_model(config)
  runs = {name: Ours(model, dataclasses.replace(TRAINING, **changes), batch) for name, changes in VARIANTS.items()}
  rows = timing.summary(timing.measure(runs, ROUNDS), "whole batch", label="step")
  for row, run in zip(rows, runs.values(), strict=True):
    row["memory, MiB"] = run.memory
  return rows


def main(*names: str) -> None:
  """Measure the networks that are named, or all; on a CPU ADM-64 only where it is."""
  facts = [f"{networks.DTYPE}, parameters and AdamW in float32"]
  tables: dict[str, Any] = {}
  for name in names or [name for name in CASES if not (networks.ON_CPU and name == "ADM-64")]:
    config, batch = checks.lookup("network", name, CASES)
    title = f"{name}, {config.image_shape[0]}x{config.image_shape[1]}, batch {batch}"
    tables[title] = case(name, config, batch, facts)
    timing.report("training", tables, facts)  # The next may take long.
    tables[f"{title}, our step"] = variants(config, batch)
    timing.report("training", tables, facts)
