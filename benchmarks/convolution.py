"""Convolutions and their gradients against JAX's own and PyTorch's; and a classifier's gradients inside a scan.

On a CPU XLA keeps large convolutions to one core, and the gradients that JAX derives crawl inside a loop;
`jaxguide.nn.convolution` says why. Times are for one convolution or one gradient. Beside them is XLA's matrix product
of as many operations, over patches that are there already.
"""

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jaxguide as jg
from benchmarks import networks, peers, timing
from jaxguide.nn import layers
from jaxguide.nn.convolution import convolve

STEPS, ROUNDS = 4, 9
SHAPES = [  # batch, side, channels of the image and of the result: of the networks of 32x32 and 64x64
  (16, 32, 64, 64), (16, 32, 192, 64), (16, 16, 128, 128), (16, 8, 128, 128),
  (4, 64, 192, 192), (4, 32, 384, 384), (4, 16, 576, 576), (4, 8, 768, 768), (4, 8, 1536, 768),
]  # fmt: skip


def derived(x, kernel, stride=1, padding=None):
  """The same convolution as `convolve`, with the gradients that JAX derives."""
  pads = [(side // 2, side // 2) if padding is None else padding for side in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def passes(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
  """Give a convolution and its two gradients as functions of (x, kernel, cotangent)."""
  return {
    "forward": lambda x, kernel, cotangent: function(x, kernel),
    "input gradient": lambda x, kernel, cotangent: jax.vjp(lambda x: function(x, kernel), x)[1](cotangent)[0],
    "weight gradient": lambda x, kernel, cotangent: jax.vjp(lambda k: function(x, k), kernel)[1](cotangent)[0],
  }


def their_passes(x: np.ndarray, kernel: np.ndarray, cotangent: np.ndarray) -> dict[str, Callable[[], Any]]:
  """Give the same of PyTorch; empty where it is not at hand."""
  if (torch := peers.find("torch")) is None:
    return {}
  # Seen as images, (out, height, width, in) become PyTorch's kernels, (out, in, height, width).
  carried = peers.tensors((x, kernel.transpose(3, 0, 1, 2), cotangent))
  x, kernel, cotangent = (tensor.to(getattr(torch, networks.DTYPE)) for tensor in carried)
  sizes = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
  backward = functools.partial(
    torch.ops.aten.convolution_backward, cotangent, x, kernel, None, **sizes, transposed=False, output_padding=[0, 0]
  )
  runs = {
    "forward": lambda: torch.nn.functional.conv2d(x, kernel, **sizes),
    "input gradient": lambda: backward(output_mask=[True, False, False])[0],
    "weight gradient": lambda: backward(output_mask=[False, True, False])[1],
  }
  return {what: peers.finished(run) for what, run in runs.items()}


def as_products(x: np.ndarray, cotangent: np.ndarray) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
  """Give the shapes of the products that a convolution of 3x3 and its gradients are, over patches."""
  pixels, channels, features = x.size // x.shape[3], x.shape[3], cotangent.shape[3]
  return {
    "forward": ((pixels, 9 * channels), (9 * channels, features)),
    "input gradient": ((pixels, 9 * features), (9 * features, channels)),
    "weight gradient": ((9 * channels, pixels), (pixels, features)),
  }


def alone() -> list[dict[str, Any]]:
  """Measure one convolution at a time."""
  rows = []
  for batch, side, channels, features in SHAPES:
    rng = np.random.default_rng(0)
    shapes = (batch, side, side, channels), (3, 3, channels, features), (batch, side, side, features)
    drawn = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    args = [jnp.asarray(each, networks.DTYPE) for each in drawn]
    theirs, operations = their_passes(*drawn), 2 * 9 * channels * features * batch * side**2
    ours, jaxs = passes(convolve), passes(derived)
    for what in ours:
      made = {"jaxguide": ours[what], "JAX's rule": jaxs[what]}
      runs = {name: functools.partial(jax.jit(run), *args) for name, run in made.items()}
      peers.check("JAX's rule", runs["jaxguide"](), runs["JAX's rule"]())
      factors = [rng.standard_normal(shape, np.float32) for shape in as_products(drawn[0], drawn[2])[what]]
      runs["XLA's product"] = functools.partial(
        jax.jit(jnp.matmul), *(jnp.asarray(each, networks.DTYPE) for each in factors)
      )
      if theirs:
        runs["PyTorch"] = theirs[what]
        wanted = peers.array(theirs[what]())
        if what == "weight gradient":
          wanted = wanted.transpose(1, 2, 3, 0)
        peers.check("PyTorch", runs["jaxguide"](), wanted)
      measured = timing.summary(timing.measure(runs, ROUNDS), "jaxguide")
      row = {"batch, side, channels": f"{batch}, {side}, {channels} to {features}", "pass": what}
      row |= {"ms": measured[0]["ms"], "GFLOP/s": operations / measured[0]["ms"] / 1e6}
      rows.append(row | {f"{each['run']} / jaxguide": each["/ jaxguide"] for each in measured[1:]})
  return rows


def inside() -> dict[str, list[dict[str, Any]]]:
  """Measure the gradients of a classifier inside a scan and outside."""
  classifier = jg.Classifier(model_channels=32, num_res_blocks=1, num_head_channels=32)
  x = jax.random.normal(jax.random.key(0), (16, 16, 16, 3))
  t, labels = jnp.zeros(16), jnp.zeros(16, int)
  params = jax.jit(classifier.init)(jax.random.key(1), x, t)

  def loss(params, x):
    return -jax.nn.log_softmax(classifier.apply(params, x, t))[jnp.arange(16), labels].sum()

  def runs():
    for name, argument in (("input", 1), ("weights", 0)):
      gradient = jax.grad(loss, argument)

      def loop(params, x, gradient=gradient, argument=argument):
        def step(carry, _):
          moved = jax.tree.map(lambda a, g: a - 1e-6 * g, carry[1 - argument], gradient(*carry[::-1]))
          return (moved, carry[1]) if argument else (carry[0], moved), None

        return jax.lax.scan(step, (x, params), None, length=STEPS)[0]

      yield f"{name} outside", jax.jit(gradient).lower(params, x).compile()
      yield f"{name} inside", jax.jit(loop).lower(params, x).compile()

  with mock.patch.object(layers, "convolve", derived):
    theirs = dict(runs())
  ours = dict(runs())
  both = {f"{who}, {name}": run for who, made in (("jax", theirs), ("jaxguide", ours)) for name, run in made.items()}
  seconds = timing.measure({name: lambda run=run: run(params, x) for name, run in both.items()}, rounds=5)
  each = {name: [value / (STEPS if "inside" in name else 1) for value in taken] for name, taken in seconds.items()}
  return {
    f"a classifier's gradient of the {kind}": timing.summary(
      {name: taken for name, taken in each.items() if kind in name}, f"jax, {kind} outside"
    )
    for kind in ("input", "weights")
  }


def main() -> None:
  """Print the tables."""
  timing.report("convolution", {f"one convolution of 3x3, {networks.DTYPE}": alone(), **inside()})
