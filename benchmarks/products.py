"""What part of a pass is matrix products and convolutions, in XLA and in PyTorch, and what all the rest takes.

The products and convolutions of a pass are found in its traced program. Each is then timed alone, in XLA as the network
calls it and in PyTorch's fastest form of several, and counted as often as the pass has it. What a network takes beyond
them is its normalisation, activations, softmax and traffic. Times are of the CPU, all cores together, the least of
several rounds: they depend less on other programs than seconds do. Products are timed last, and the process then keeps
what is freed, so that their results are not written to fresh pages. What the system took to hand out fresh pages to the
whole network, in a call, is given beside.
``python -m benchmarks products [NAME ...]``.
"""

import ctypes
import functools
import math
import resource
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from benchmarks import edm2, networks, peers, timing, transformers
from benchmarks.unet import our_passes, their_passes
from jaxguide import checks
from jaxguide.nn import convolution
from jaxguide.training import Model

ROUNDS, SMALLEST = 5, 1e7  # Products of fewer operations take as long as the call; they belong to the rest.
Product = tuple[str, tuple[tuple[int, ...], ...], tuple[tuple[str, Any], ...]]
"""The name of an operation, the shapes of what it takes, and its settings."""

CASES = {
  **{name: (config, 4) for name, config in transformers.CASES.items()},
  "EDM2-XS": (edm2.CONFIG, 1),
  **{
    f"{kind} {name}": (getattr(size, kind), size.batch)
    for name, size in networks.SIZES.items()
    for kind in ("unet", "classifier")
  },
}


def products(jaxpr: Any, times: int = 1) -> Iterator[tuple[Product, int]]:
  """Find the products and convolutions of a program, each with the number of times that it is done."""
  for eqn in jaxpr.eqns:
    shapes = tuple(tuple(each.aval.shape) for each in eqn.invars if hasattr(each.aval, "shape"))
    if eqn.primitive.name == "dot_general":
      yield ("product", shapes, (("dimensions", eqn.params["dimension_numbers"]),)), times
    elif eqn.params.get("name") == convolution.weight_gradient.__name__:
      (out,) = eqn.outvars
      yield ("weight gradient", shapes, (("sides", tuple(out.aval.shape[:2])),)), times
    elif eqn.primitive is convolution._convolve_p:
      yield ("convolution", shapes, tuple(sorted(eqn.params.items()))), times
    else:
      for inner in jax.extend.core.jaxprs_in_params(eqn.params):
        yield from products(inner, times * eqn.params.get("length", 1))


def in_xla(product: Product, arrays: list[np.ndarray]) -> Callable[[], Any]:
  """Make the operation as the network calls it."""
  kind, _, settings = product
  if kind == "convolution":
    run = functools.partial(convolution._convolve_p.bind, **dict(settings))
  elif kind == "weight gradient":
    run = lambda x, cotangent: convolution.weight_gradient(x, cotangent, *_geometry(product))  # noqa: E731
  else:
    run = functools.partial(jax.lax.dot_general, dimension_numbers=dict(settings)["dimensions"])
  compiled, args = jax.jit(run), [jnp.asarray(each) for each in arrays]
  return lambda: compiled(*args)


def _geometry(product: Product) -> tuple[tuple[int, int], int, convolution.Padding]:
  """Give the sides of a weight gradient, its stride, and its padding, which is half a kernel here."""
  _, ((_, rows, *_), (_, out_rows, *_)), settings = product
  height, width = dict(settings)["sides"]
  return (height, width), round(rows / out_rows), ((height // 2,) * 2, (width // 2,) * 2)


def in_torch(product: Product, arrays: list[np.ndarray]) -> list[Callable[[], Any]]:
  """Make the operation in PyTorch, in more than one form where it is not known which is the fastest."""
  torch = peers.find("torch")
  (kind, _, settings), (a, b) = product, map(torch.from_numpy, arrays)
  if kind == "product":
    (a_sum, b_sum), (a_batch, b_batch) = dict(settings)["dimensions"]
    sides = []
    for each, summed, batch, last in ((a, a_sum, a_batch, True), (b, b_sum, b_batch, False)):
      free = [axis for axis in range(each.ndim) if axis not in (*summed, *batch)]
      order = [*batch, *((*free, *summed) if last else (*summed, *free))]
      size = math.prod(each.shape[axis] for axis in summed)
      moved = each.permute(order).flatten(0, len(batch) - 1) if batch else each.permute(order)[None]
      sides.append(moved.reshape(moved.shape[0], *((-1, size) if last else (size, -1))))
    if sides[0].shape[0] == 1:
      sides = [each[0] for each in sides]
    return [lambda: sides[0] @ sides[1], lambda: torch.einsum("...mk,...kn->...mn", *sides)]
  if kind == "weight gradient":
    (height, width), step, padding = _geometry(product)
    kernel = torch.empty(b.shape[3], a.shape[3], height, width)
    sizes = {"stride": [step] * 2, "padding": [pad for pad, _ in padding], "dilation": [1, 1], "groups": 1}
    sizes |= {"transposed": False, "output_padding": [0, 0], "output_mask": [False, True, False]}
    runs = []
    for form in (torch.contiguous_format, torch.channels_last):
      x, cotangent = (each.permute(0, 3, 1, 2).contiguous(memory_format=form) for each in (a, b))
      like = kernel.contiguous(memory_format=form)
      backward = functools.partial(torch.ops.aten.convolution_backward, cotangent, x, like, None, **sizes)
      runs.append(lambda backward=backward: backward()[1])
    return runs
  given: dict[str, Any] = dict(settings)
  stride, flipped = [given["stride"]] * 2, given["flipped"]
  (top, bottom), (left, right) = given["padding"]
  a, b = a.permute(0, 3, 1, 2), b.permute(2, 3, 0, 1) if flipped else b.permute(3, 2, 0, 1)
  if (top, left) != (bottom, right):
    a, top, left = torch.nn.functional.pad(a, (left, right, top, bottom)), 0, 0
  runs = []
  for form in (torch.contiguous_format, torch.channels_last):
    x, kernel = a.contiguous(memory_format=form), b.contiguous(memory_format=form)
    if flipped:
      pads = [kernel.shape[2] - 1 - top, kernel.shape[3] - 1 - left]
      runs.append(functools.partial(torch.nn.functional.conv_transpose2d, x, kernel.transpose(0, 1), padding=pads))
    turned = kernel.flip(2, 3).contiguous(memory_format=form) if flipped else kernel
    runs.append(functools.partial(torch.nn.functional.conv2d, x, turned, stride=stride, padding=(top, left)))
  return runs


def least(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, tuple[float, float, int]]:
  """Give each run's least CPU time, the mean of the system's part of it, both in ms, and its page faults, in turns."""
  taken: dict[str, list[tuple[float, float, int]]] = {name: [] for name in runs}
  for turn in range(rounds + 1):
    for name, run in runs.items():
      before = resource.getrusage(resource.RUSAGE_SELF)
      jax.block_until_ready(run())
      after = resource.getrusage(resource.RUSAGE_SELF)
      if turn:
        system = after.ru_stime - before.ru_stime
        user = after.ru_utime - before.ru_utime
        taken[name].append(((user + system) * 1e3, system * 1e3, after.ru_minflt - before.ru_minflt))
  means = {name: tuple(map(statistics.mean, list(zip(*values, strict=True))[1:])) for name, values in taken.items()}
  return {name: (min(values)[0], means[name][0], round(means[name][1])) for name, values in taken.items()}


def keep_pages() -> None:
  """Have the C library keep memory that is freed: M_MMAP_MAX, M_TRIM_THRESHOLD of glibc."""
  libc = ctypes.CDLL(None)
  if hasattr(libc, "mallopt"):
    libc.mallopt(-4, 0)
    libc.mallopt(-1, 2**31 - 1)


@functools.cache
def alone(product: Product) -> dict[str, float]:
  """Give the CPU time of one product alone, in ms, in XLA and in PyTorch."""
  rng = np.random.default_rng(0)
  arrays = [rng.standard_normal(shape, np.float32) for shape in product[1]]
  candidates = in_torch(product, arrays) if peers.find("torch") is not None else []
  ours = in_xla(product, arrays)
  for run in candidates:
    peers.check(f"{product}", np.linalg.norm(ours()), np.linalg.norm(run()))
  best = least({"jaxguide": ours} | {f"{i}": run for i, run in enumerate(candidates)})
  mine = best.pop("jaxguide")[0]
  return {"jaxguide": mine, "PyTorch": min((each[0] for each in best.values()), default=math.nan)}


def operations(found: Counter[Product]) -> float:
  """Count the operations of products."""
  total = 0
  for (kind, shapes, settings), times in found.items():
    if kind == "convolution":
      out = jax.eval_shape(
        functools.partial(convolution._plain, **dict(settings)),
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
      )
      total += times * 2 * out.size * math.prod(shapes[1][:2]) * shapes[0][3]
    elif kind == "weight gradient":
      total += times * 2 * math.prod(shapes[1]) * math.prod(dict(settings)["sides"]) * shapes[0][3]
    else:
      (_, b_sum), (_, b_batch) = dict(settings)["dimensions"]
      free = [size for axis, size in enumerate(shapes[1]) if axis not in (*b_sum, *b_batch)]
      total += times * 2 * math.prod(shapes[0]) * math.prod(free)
  return total


def peer(name: str, model: Model) -> Any:
  """Make the peer of a network, or None."""
  if name in transformers.CASES:
    return transformers.torch_network(model)
  if name == "EDM2-XS":
    return edm2.torch_network(model)
  return peers.openai_network(model) or (
    peers.diffusers_network(model.config) if model.config.network == "unet" else None
  )


def our_weights(model: Model) -> Callable[..., Any]:
  """Give the gradient of all weights, most of a training step, as a function of (params, cotangent, x, ...)."""
  return jax.grad(lambda params, cotangent, *args: jnp.vdot(model.config.module.apply(params, *args), cotangent))


def their_weights(network: Any, cotangent: Any, *args: Any) -> Callable[[], Any]:
  """Give the same of a PyTorch network."""
  predict = peers.predict(network.requires_grad_(True))

  def gradient():
    network.zero_grad()
    predict(*args).backward(cotangent)

  return peers.finished(gradient)


def case(name: str) -> list[tuple[dict[str, Any], Counter[Product]]]:
  """Measure one network: a row of each pass and run, with the products of the pass."""
  config, batch = CASES[name]
  model = networks.random_model(config)
  args = networks.inputs(model.config, batch)
  if config.network not in ("unet", "classifier"):
    args = (args[0], jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % 1000)
  shape = jax.eval_shape(model.config.module.apply, model.params, *args).shape
  cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
  network, rows = peer(name, model), []
  theirs = {}
  if network is not None:
    compiled_network, tensors = peers.find("torch").compile(network), peers.tensors((cotangent, *args))
    theirs["PyTorch, compiled"] = their_passes(compiled_network, *tensors)
  for what, run in {**our_passes(model), "weight gradient": our_weights(model)}.items():
    if what == "weight gradient" and theirs:
      theirs["PyTorch, compiled"][what] = their_weights(compiled_network, *tensors)
    found: Counter[Product] = Counter()
    for product, times in products(jax.make_jaxpr(run)(model.params, cotangent, *args).jaxpr):
      if operations(Counter([product])) >= SMALLEST:
        found[product] += times
    compiled = jax.jit(run).lower(model.params, cotangent, *args).compile()
    whole = least(
      {"jaxguide": functools.partial(compiled, model.params, cotangent, *args)}
      | {kind: passes[what] for kind, passes in theirs.items()}
    )
    for kind, (taken, system, faults) in whole.items():
      row = {"pass": what, "run": kind, "CPU, ms": taken, "/ jaxguide": taken / whole["jaxguide"][0]}
      rows.append((row | {"system, ms": system, "page faults": faults}, found))
    if not theirs:
      rows.append(({"pass": what, "run": "PyTorch's products"}, found))
  return rows


def with_products(row: dict[str, Any], found: Counter[Product]) -> dict[str, Any]:
  """Give a row with the time of its products alone."""
  library = "jaxguide" if row["run"] == "jaxguide" else "PyTorch"
  part, taken = sum(times * alone(product)[library] for product, times in found.items()), row.get("CPU, ms", math.nan)
  row = {**row, "its products alone, ms": part, "the rest, ms": taken - part, "of all": f"{1 - part / taken:.0%}"}
  return row | {"GFLOP": operations(found) / 1e9}


def main(*names: str) -> None:
  """Measure the networks that are named, or all."""
  for name in names:
    checks.lookup("network", name, CASES)
  rows = {f"{name}, batch {CASES[name][1]}": case(name) for name in names or CASES}
  # Last, since the C library cannot be told to forget what it was told.
  keep_pages()
  tables: dict[str, Any] = {}
  for name, each in rows.items():
    tables[name] = [with_products(*pair) for pair in each]
    timing.report("products", tables)  # The next may take long.
