"""Parameters that are split are not kept whole from the forward pass to the backward pass."""

import jax
import jax.numpy as jnp
import pytest

from jaxguide.distributed import placement
from jaxguide.distributed.placing import not_gathered


def gathers(dtype, policy):
  """How often a program of three layers gathers a kernel, for its gradient by all kernels and the input."""
  place = placement("fsdp=4")

  def loss(kernels, x):
    for kernel in place.whole(kernels):
      x = jnp.tanh(x @ kernel.astype(dtype))
    return jnp.square(x.astype(jnp.float32)).sum()

  kernels, x = [jnp.ones((128, 128), jnp.float32)] * 3, jnp.ones((8, 128), dtype)
  gradient = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1)))
  text = gradient.lower(place.shards(kernels), x).as_text()
  return text.count("sharding_constraint") - len(kernels)  # Each gradient is split again, by one more.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_kernel_is_gathered_for_both_passes(dtype):
  assert gathers(jnp.dtype(dtype), not_gathered) == 6
  assert gathers(jnp.dtype(dtype), jax.checkpoint_policies.everything_saveable) == 3
