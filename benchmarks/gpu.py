"""Sampling and training of the large networks on one GPU, beside compiled PyTorch: time, matrix rate, memory, profile.

``benchmarks/on_gpu.sh`` runs all cases, each in its own process, on a machine that may be bare. All compile at the same
time. Then they are measured one at a time, in turns. A case is ``python -m benchmarks gpu CASE FOLDER``; what it finds
is a JSON file in the folder. ``python -m benchmarks gpu report FOLDER`` puts them together.

Weights are random and the same for both sides. One step of each side is held against the other.
"""

import contextlib
import dataclasses
import fcntl
import functools
import gzip
import itertools
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import networks, peers, roofline, sampling, timing, training, transformers
from jaxguide import checks
from jaxguide.denoisers.linen import param_shapes
from jaxguide.models.importers.openai import PRESETS
from jaxguide.training import Model, ModelConfig, TrainingConfig
from jaxguide.training.step import init_state, train_step
from jaxguide.training.transformer_presets import NAMED

SMALL = bool(os.environ.get("SMALL"))
"""Whether to try the cases with small networks, as on a CPU: then the figures mean nothing."""

STEPS = 1 if SMALL else 4
"""Steps of DDIM that are walked."""

ROUNDS = 2 if SMALL else 7
WAIT = 60 if SMALL else 300
"""Seconds after which a case is measured although others still compile."""

PLACES = 3
"""Programs of ours that are compiled at the same time."""

ADM = {
  "ADM-64": (PRESETS["64x64_diffusion"], PRESETS["64x64_classifier"], 64),
  "ADM-256": (PRESETS["256x256_diffusion"], PRESETS["256x256_classifier"], 16),
}
DIT = (NAMED["DiT-XL/2"].model_config((32, 32, 4), 1000), 64)
if SMALL:
  ADM = {name: (networks.SMALL, networks.SMALL_CLASSIFIER, 2) for name in ADM}
  DIT = (NAMED["DiT-S/8"].model_config((32, 32, 4), 1000), 2)


def drawn(config: ModelConfig) -> Model:
  """Give a network random weights, the same in every process, drawn without the device."""
  config = networks.prepared(config)
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    name = path[-1].key
    if name in getattr(config.module, "frozen", ()):
      return np.asarray(frozen[name])
    values = rng.standard_normal(leaf.shape, np.float32)
    fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 100
    return (values / np.sqrt(fan_in) + (name == "scale")).astype(np.float32)

  shapes = param_shapes(config.module, *config.role.inputs(config))
  frozen = {}
  if "pos_embed" in shapes["params"]:
    from jaxguide.nn.dit.positions import sincos

    sides = (config.image_shape[0] // config.module.patch_size,) * 2
    frozen["pos_embed"] = sincos(*sides, config.module.hidden_size)[None]
  return Model(config, jax.tree_util.tree_map_with_path(draw, shapes))


def adm_sampler(
  name: str, make: Callable[[ModelConfig], Model] = drawn
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Model], float]:
  """Return DDIM with classifier guidance, its arguments, the networks, and the operations of a step."""
  unet, classifier, batch = ADM[name]
  models = {"unet": make(unet), "classifier": make(classifier)}
  guided = jg.classifier(models["classifier"].log_prob, 1.0)(models["unet"].denoiser)
  function, args, sigmas = ddim(guided, unet, batch)
  step = sampling.plain(models, "classifier", sigmas)
  params = {name: model.params for name, model in models.items()}
  count = networks.operations(lambda params, x, labels: step(params, labels, 0, x), params, *args[1:])
  return function, args, models, count


def dit_sampler(
  make: Callable[[ModelConfig], Model] = drawn,
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Model], float]:
  """Return DDIM with classifier-free guidance of scale 1.5, its arguments, the network, and a step's operations."""
  config, batch = DIT
  model = make(config)
  guided = jg.classifier_free(config.null_cond, 1.5)(model.denoiser)
  function, args, _ = ddim(guided, config, batch)
  apply, t = model.config.module.apply, jnp.zeros(batch)
  count = 2 * networks.operations(lambda params, x, y: apply(params, x, t, y), model.params, *args[1:])
  return function, args, {"dit": model}, count


def ddim(guided: Any, config: ModelConfig, batch: int) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
  """Return DDIM of a guided denoiser, its arguments, and its levels."""
  if config.diffusion_steps is None:
    sigmas = jg.karras(STEPS)
  else:
    table = config.noise_schedule
    sigmas = jg.respaced(table, np.arange(STEPS) * (table.num_steps // STEPS))
  noise, labels = inputs(config, batch)

  def sampler(guided, x, labels):
    draw = lambda x, y: jg.sample(  # noqa: E731
      guided, jax.random.key(0), config.image_shape, sigmas, jg.DDIM(), y, x_init=x
    )
    return jax.vmap(draw)(x, labels)[0]

  return sampler, (guided, noise * np.sqrt(1 + np.float32(sigmas[0]) ** 2), labels), sigmas


def inputs(config: ModelConfig, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """Draw noise and labels."""
  noise = np.random.default_rng(1).standard_normal((batch, *config.image_shape)).astype(np.float32)
  return noise, np.arange(batch, dtype=np.int32) % 10


def sampler(
  name: str, make: Callable[[ModelConfig], Model] = drawn
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Model], float]:
  """Return the sampler of a case, its arguments, the networks, and the operations of a step."""
  name = network_of(name)
  return dit_sampler(make) if name == "DiT-XL-2" else adm_sampler(name, make)


def network_of(name: str) -> str:
  """Return a case's name without the peer and the conditions."""
  return name.partition("@")[0].partition("/")[0]


# --- cases ----------------------------------------------------------------------------------------


def ours(name: str, folder: Path) -> dict[str, Any]:
  """Compile one of our samplers."""
  function, args, _, count = sampler(name)
  args = jax.device_put(args)
  lowered = jax.jit(function).lower(*args)
  with compiling(folder):
    began = time.perf_counter()
    compiled = lowered.compile()
    facts = {"compile, s": time.perf_counter() - began, **memory(compiled)}
  program = compiled.as_text()
  with gzip.open(folder / f"{label(name)}.hlo.txt.gz", "wt") as file:
    file.write(program)
  facts["GB moved"] = roofline.traffic(program)[-2]["GB"]
  batch = len(args[2])
  return {
    "run": lambda: jax.block_until_ready(compiled(*args)),
    "operations": STEPS * count,
    "steps": STEPS,
    "batch": batch,
    "facts": facts,
    "profile": True,
  }


def theirs(name: str, folder: Path, half: bool = False) -> dict[str, Any]:
  """Compile PyTorch's step of the same: channels last, by autocast or with bfloat16 weights as by ``use_fp16``."""
  del folder
  torch = peers.find("torch")
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  compile_ = (lambda network: network) if SMALL else torch.compile
  _, args, models, count = sampler(name)
  x, labels = peers.tensors((args[1], args[2].astype(np.int64)))
  if "dit" in models:
    return _their_dit(torch, compile_, models["dit"], x, labels, count)
  nets = {}
  for part, model in models.items():
    network = peers.openai_network(model).requires_grad_(False).to(memory_format=torch.channels_last)
    if half:
      network.dtype = torch.bfloat16
      for blocks in (network.input_blocks, network.middle_block, *([network.output_blocks] if part == "unet" else [])):
        for module in blocks.modules():
          if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d):
            module.to(torch.bfloat16)
    nets[part] = compile_(network)
  precision = contextlib.nullcontext if half else functools.partial(torch.autocast, peers.device(), torch.bfloat16)
  x = x.contiguous(memory_format=torch.channels_last)
  t = torch.full((len(x),), 500.0, device=x.device)

  def run():
    for _ in range(STEPS):
      with torch.no_grad(), precision():
        eps = nets["unet"](x, t, labels).float()[:, :3]
      with torch.enable_grad(), precision():
        leaf = x.detach().requires_grad_()
        chosen = torch.log_softmax(nets["classifier"](leaf, t).float(), -1)[torch.arange(len(leaf)), labels].sum()
        gradient = torch.autograd.grad(chosen, leaf)[0]
      out = x + 0.1 * (eps - 0.5 * gradient)
    return out

  return {"run": peers.finished(run), "operations": STEPS * count, "steps": STEPS, "batch": len(x), "facts": {}}


def _their_dit(torch: Any, compile_: Any, model: Model, x: Any, labels: Any, count: float) -> dict[str, Any]:
  network = compile_(transformers.torch_network(model).to(torch.bfloat16))
  both = torch.cat([labels, torch.full_like(labels, 1000)])
  t = torch.full((2 * len(x),), 500.0, device=x.device)

  def run():
    with torch.no_grad():
      for _ in range(STEPS):
        out = network(torch.cat([x, x]).bfloat16(), t, both).float()
        cond, uncond = out[:, :4].chunk(2)
        mixed = x + 0.1 * (uncond + 1.5 * (cond - uncond))
    return mixed

  return {"run": peers.finished(run), "operations": STEPS * count, "steps": STEPS, "batch": len(x), "facts": {}}


def _training() -> tuple[Model, TrainingConfig, int]:
  config, batch = (networks.SMALL, 2) if SMALL else training.CASES["ADM-64"]
  return drawn(config), training.TRAINING, batch


def our_training(name: str, folder: Path) -> dict[str, Any]:
  """Compile our training step of ADM-64."""
  del name
  model, how, batch = _training()
  images, labels = training.batch_of(model.config, batch)
  function: Any = train_step(model.config, how)
  state = jax.device_put(init_state(model.config, how, model.params), jax.devices()[0])
  lowered = function.lower(state, images, labels)
  count = networks.operations(function, state, images, labels)
  with compiling(folder):
    began = time.perf_counter()
    compiled = lowered.compile()
    facts = {"compile, s": time.perf_counter() - began, **memory(compiled)}
  holder = {"state": state}

  def run():
    holder["state"], metrics = compiled(holder["state"], images, labels)
    return jax.block_until_ready((holder["state"], metrics))

  return {"run": run, "operations": count, "steps": 1, "batch": batch, "facts": facts, "profile": True}


def their_training(name: str, folder: Path) -> dict[str, Any]:
  """Compile PyTorch's training step of ADM-64, channels last."""
  del name, folder
  torch = peers.find("torch")
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  model, _, batch = _training()
  network = peers.openai_network(model).to(memory_format=torch.channels_last).train()
  step = training.peer_step(
    model, network if SMALL else torch.compile(network), *training.batch_of(model.config, batch)
  )

  def held() -> dict[str, float]:
    return {"memory, GiB": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}

  return {"run": step, "operations": None, "steps": 1, "batch": batch, "facts": {}, "after": held}


def numerics(name: str, folder: Path) -> dict[str, Any]:
  """Hold outputs of ADM-64 and the classifier's gradient on the GPU against the CPU's float32."""
  del name, folder
  unet, classifier, _ = ADM["ADM-64"]
  cpu, here = jax.devices("cpu")[0], jax.devices()[0]
  values: dict[str, dict[str, np.ndarray]] = {}
  kinds = {"CPU": ("float32", "highest", cpu), "highest": ("float32", "highest", here)}
  kinds |= {"TF32": ("float32", "default", here), "bfloat16": ("bfloat16", "default", here)}
  for kind, (dtype, precision, device) in kinds.items():
    nets = []
    for config in (unet, classifier):
      fields = {"dtype": dtype, "dropout": 0.0}
      nets.append(Model(dataclasses.replace(config, fields={**config.fields, **fields}), drawn(config).params))
    x, labels = inputs(unet, 2)
    t = np.asarray([100.0, 900.0], np.float32)
    args = jax.device_put(((nets[0].params, nets[1].params), x, t, labels), device)

    def both(params, x, t, labels, nets=tuple(nets)):
      def log_prob(x):
        logits = nets[1].config.module.apply(params[1], x, t)
        return jax.nn.log_softmax(logits)[jnp.arange(len(x)), labels].sum()

      return nets[0].config.module.apply(params[0], x, t, labels), jax.grad(log_prob)(x)

    with jax.default_matmul_precision(precision), jax.default_device(device):
      out, gradient = jax.jit(both)(*args)
    values[kind] = {"output": np.asarray(out, np.float32), "gradient": np.asarray(gradient, np.float32)}
  facts = {}
  for kind in ("highest", "TF32", "bfloat16"):
    for what, wanted in values["CPU"].items():
      error = np.linalg.norm(values[kind][what] - wanted) / np.linalg.norm(wanted)
      facts[f"{kind}, {what}"] = float(error)
  return {"run": None, "facts": facts}


def initialisation(name: str, folder: Path) -> dict[str, Any]:
  """Time how long random parameters of ADM-64 take, with compiling."""
  del name, folder
  from jaxguide.models.model import init_params

  config, began = networks.prepared(ADM["ADM-64"][0]), time.perf_counter()
  jax.block_until_ready(init_params(config, jax.random.key(0)))
  return {"run": None, "facts": {"seconds": time.perf_counter() - began}}


def ceilings(name: str, folder: Path) -> dict[str, Any]:
  """Measure the largest matrix product's rate and the memory's."""
  del name, folder
  side, rate = (256 if SMALL else 8192), 0.0
  rng = np.random.default_rng(0)
  a = jnp.asarray(rng.standard_normal((side, side), np.float32), jnp.bfloat16)
  product = jax.jit(lambda a: a @ a)
  runs = {"XLA": lambda: jax.block_until_ready(product(a))}
  if (torch := peers.find("torch")) is not None:
    b = torch.from_numpy(np.asarray(a, np.float32)).to(peers.device()).bfloat16()
    runs["PyTorch"] = peers.finished(lambda: b @ b)
  facts = {}
  for kind, run in runs.items():
    times = timing.measure({"run": lambda run=run: [run() for _ in range(10)] and None}, 5)["run"]
    facts[f"TFLOP/s, {kind}"] = 10 * 2.0 * side**3 / statistics.median(times) / 1e12
    rate = max(rate, facts[f"TFLOP/s, {kind}"])
  c = jnp.ones((2**20 if SMALL else 2**30,), jnp.float32)
  add = jax.jit(lambda c: c + 1)
  times = timing.measure({"run": lambda: [add(c) for _ in range(5)]}, 5)["run"]
  facts["TB/s"] = 5 * 2 * c.nbytes / statistics.median(times) / 1e12
  return {"run": None, "facts": {**facts, "TFLOP/s": rate}}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
  "ceilings": ceilings,
  "ADM-64": ours,
  "ADM-64/PyTorch": functools.partial(theirs, half=True),
  "DiT-XL-2": ours,
  "DiT-XL-2/PyTorch": theirs,
  "ADM-256": ours,
  "ADM-256/PyTorch": functools.partial(theirs, half=True),
  "training": our_training,
  "training/PyTorch": their_training,
  "ADM-64/PyTorch, autocast": theirs,
  "numerics": numerics,
  "initialisation": initialisation,
}
"""The most useful first. ``NAME@WHAT`` is a case under other conditions; `on_gpu.sh` says which."""


# --- one case -------------------------------------------------------------------------------------


def memory(compiled: Any) -> dict[str, float]:
  """Return XLA's figure of the memory of a program."""
  found = compiled.memory_analysis()
  size = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return {"memory, GiB": (size + found.temp_size_in_bytes) / 2**30}


def label(name: str) -> str:
  """Return a case's name as part of a file's."""
  return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)


@contextlib.contextmanager
def compiling(folder: Path) -> Iterator[None]:
  """Hold one of the places for compiling: XLA tries kernels on the card, and many at a time would mislead it."""
  for number in itertools.cycle(range(PLACES)):
    with open(folder / f"place-{number}", "w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        time.sleep(0.2)
        continue
      yield
      return


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
  """Hold the lock of the measurements."""
  with open(folder / "lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
  time.sleep(0.05)  # The lock is not fair: the others get their turn.


def profile(run: Callable[[], Any], folder: Path) -> str:
  """Return a table of the kernels of one run: share, time, number, name."""
  with jax.profiler.trace(str(folder)):
    run()
  data = jax.profiler.ProfileData.from_file(
    str(max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime))
  )
  sums: dict[str, list[float]] = {}
  for plane in data.planes:
    if "GPU" not in plane.name:
      continue
    for line in plane.lines:
      if not line.name.startswith("Stream"):
        continue
      for event in line.events:
        entry = sums.setdefault(event.name, [0.0, 0])
        entry[0] += event.duration_ns / 1e6
        entry[1] += 1
  total = sum(time for time, _ in sums.values()) or 1.0
  rows = sorted(sums.items(), key=lambda item: -item[1][0])
  return "\n".join(f"{time / total:7.2%} {time:9.3f} ms {number:6.0f} {name}" for name, (time, number) in rows)


def case(name: str, folder: Path) -> None:
  """Compile a case, wait until all are compiled, measure it in turns with the others, and write what was found."""
  base = name.partition("@")[0]
  path = folder / f"{label(name)}.json"
  result: dict[str, Any] = {"case": name}
  try:
    if base == "ceilings":  # While nothing else runs.
      with alone(folder):
        made = CASES[base](name, folder)
    else:
      made = CASES[base](name, folder)
    result["facts"] = made["facts"]
    if (run := made["run"]) is not None:
      run()
      (folder / f"{label(name)}.ready").touch()
      began = time.perf_counter()
      while not (folder / "go").exists() and time.perf_counter() - began < WAIT:
        time.sleep(0.1)
      times = []
      for turn in itertools.count():
        with alone(folder):
          run()
          start = time.perf_counter()
          run()
          times.append(time.perf_counter() - start)
        median = statistics.median(times)
        rate = made["operations"] / median / 1e12 if made["operations"] else None
        result |= {"ms a step": median / made["steps"] * 1e3, "rounds": times, "TFLOP/s": rate, "batch": made["batch"]}
        result["images a second and step"] = made["batch"] * made["steps"] / median
        path.write_text(json.dumps(result, indent=2))
        if turn + 1 >= ROUNDS:
          break
      result["facts"] |= made.get("after", dict)()
      path.write_text(json.dumps(result, indent=2))
      if made.get("profile"):
        with alone(folder):
          (folder / f"{label(name)}.profile.txt").write_text(profile(run, folder / f"trace-{label(name)}"))
  except Exception as error:  # The other cases go on.
    result["error"] = f"{type(error).__name__}: {error}"[:2000]
    traceback.print_exc()
  finally:
    path.write_text(json.dumps(result, indent=2))
    (folder / f"{label(name)}.ready").touch()


def report(folder: Path) -> None:
  """Print and write the table of all cases, with the peer's time over ours."""
  found = {
    data["case"]: data for path in sorted(folder.glob("*.json")) if "case" in (data := json.loads(path.read_text()))
  }
  ceiling = found.get("ceilings", {}).get("facts", {}).get("TFLOP/s")
  rows, facts = [], []
  for name, data in found.items():
    if "ms a step" in data:
      base = found.get(network_of(name), {})
      rate = data["TFLOP/s"] or (base.get("TFLOP/s") or 0) * base.get("ms a step", 0) / data["ms a step"]
      row = {"case": name, "batch": data["batch"], "ms a step": data["ms a step"], "TFLOP/s": rate}
      row["of matrix rate"] = f"{rate / ceiling:.0%}" if ceiling else ""
      row["/ ours"] = data["ms a step"] / base["ms a step"] if "ms a step" in base else ""
      rows.append({**row, **{key: data["facts"].get(key, "") for key in ("memory, GiB", "GB moved", "compile, s")}})
    else:
      facts.append(
        f"{name}: " + ", ".join(f"{key} {timing.cell(value)}" for key, value in data.get("facts", {}).items())
      )
    if "error" in data:
      facts.append(f"{name} failed: {data['error'][:300]}")
  title = "one step of small networks on a CPU, which tries the script" if SMALL else "one step on one GPU"
  timing.report("gpu", {title: rows}, facts)
  (folder / "gpu.json").write_text((timing.RESULTS / "gpu.json").read_text())


def main(name: str = "", folder: str = "") -> None:
  """Run one case, or ``report``."""
  if name != "report":
    checks.lookup("case", name.partition("@")[0], CASES)
  where = Path(folder or timing.RESULTS / "gpu")
  where.mkdir(parents=True, exist_ok=True)
  report(where) if name == "report" else case(name, where)
