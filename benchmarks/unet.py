"""Forward pass and input gradient of the UNet and the classifier at three sizes, against PyTorch and diffusers.

The peers are OpenAI's networks, the same architecture with the same weights, eager and compiled, whose outputs are held
against ours first; and diffusers' UNet2DModel of the same levels, which counts its own operations. All take turns with
a large matrix product, whose best rate is the machine's. ``python -m benchmarks unet`` measures all sizes; on a CPU
the largest takes half an hour.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks, peers, timing
from jaxguide import checks
from jaxguide.training import Model, ModelConfig

PASSES = ("forward", "input gradient")


def our_passes(model: Model) -> dict[str, Callable[..., Any]]:
  """Give the two passes as functions of (params, cotangent, x, t, ...)."""
  apply = model.config.module.apply

  def forward(params, cotangent, x, *rest):
    return apply(params, x, *rest)

  def gradient(params, cotangent, x, *rest):
    return jax.grad(lambda x: jnp.vdot(apply(params, x, *rest), cotangent))(x)

  return dict(zip(PASSES, (forward, gradient), strict=True))


def their_passes(network: Any, cotangent: Any, x: Any, *rest: Any) -> dict[str, Callable[[], Any]]:
  """Give the two passes of a PyTorch network."""
  torch, predict = peers.find("torch"), peers.predict(network.requires_grad_(False))

  def forward():
    with torch.no_grad(), peers.precision():
      return predict(x, *rest)

  def gradient():
    leaf = x.detach().requires_grad_()
    with peers.precision():
      out = predict(leaf, *rest)
    out.backward(cotangent.to(out.dtype))
    return leaf.grad

  return {what: peers.finished(run) for what, run in zip(PASSES, (forward, gradient), strict=True)}


def count(run: Callable[[], Any]) -> float:
  """Count the operations of a PyTorch run."""
  from torch.utils.flop_counter import FlopCounterMode

  with FlopCounterMode(display=False) as counter:
    run()
  return float(counter.get_total_flops())


def case(config: ModelConfig, batch: int, rounds: int, facts: list[str]) -> list[dict[str, Any]]:
  """Measure one network."""
  model = networks.random_model(config)
  args = networks.inputs(model.config, batch)
  shape = jax.eval_shape(model.config.module.apply, model.params, *args).shape
  cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
  ours = our_passes(model)
  operations = {what: networks.operations(run, model.params, cotangent, *args) for what, run in ours.items()}
  runs = {
    what: {"jaxguide": functools.partial(jax.jit(run), model.params, cotangent, *args)} for what, run in ours.items()
  }
  counts = {what: {"jaxguide": operations[what]} for what in PASSES}

  candidates = {}
  if (network := peers.openai_network(model)) is not None:
    candidates = {"OpenAI's, eager": network, "OpenAI's, compiled": peers.find("torch").compile(network)}
  if config.network == "unet" and (other := peers.diffusers_network(model.config)) is not None:
    candidates["diffusers', eager"] = other
  for name, candidate in candidates.items():
    for what, run in their_passes(candidate, *peers.tensors((cotangent, *args))).items():
      if "OpenAI" in name:
        difference = peers.check(name, runs[what]["jaxguide"](), peers.array(run()))
        facts.append(f"{config.network} {config.image_shape}, {what}: {name} differs from ours by {difference:.1g}")
        counts[what][name] = operations[what]
      else:
        counts[what][name] = count(run)
      runs[what][name] = run

  rows = []
  for what in PASSES:
    seconds, best = peers.measure(runs[what], rounds)
    for row in timing.summary(seconds, "jaxguide"):
      rates = peers.rates(counts[what][row["run"]], row["ms"] / 1e3, best)
      rows.append({"network": config.network, "pass": what, **row, **rates})
    rows.append({"network": config.network, "pass": what, "run": "matrix product", "GFLOP/s": best / 1e9})
  return rows


def main(*names: str) -> None:
  """Measure the sizes that are named, or all."""
  tables, facts = {}, [f"{networks.DTYPE}, attention of OpenAI's networks not rematerialised"]
  for name in names or networks.SIZES:
    size = checks.lookup("size", name, networks.SIZES)
    title = f"{name}, batch {size.batch}"
    tables[title] = []
    for config in (size.unet, size.classifier):
      tables[title] += case(config, size.batch, size.rounds, facts)
      timing.report("unet", tables, facts)  # The next may take long.
