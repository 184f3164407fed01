"""A classifier's input gradient and a weight gradient, inside a scan and outside, against JAX's own convolution rules.

On a CPU the rules that JAX derives crawl inside a loop; `jaxguide.nn.convolution` says why. Times are for one gradient.
"""

from unittest import mock

import jax
import jax.numpy as jnp

import jaxguide as jg
from benchmarks import timing
from jaxguide.nn import layers

STEPS = 4


def derived(x, kernel, stride=1):
  """The same convolution with the gradients that JAX derives."""
  pads = [(side // 2, side // 2) for side in kernel.shape[:2]]
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def main() -> None:
  """Print the table."""
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
  tables = {
    f"gradient of the {kind}": timing.summary(
      {name: taken for name, taken in each.items() if kind in name}, f"jax, {kind} outside"
    )
    for kind in ("input", "weights")
  }
  timing.report("scan_gradient", tables)
