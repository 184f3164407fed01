"""Keys made of seeds, the same whatever JAX is configured to draw random numbers with."""

import jax
import jax.numpy as jnp

from jaxguide import checks
from jaxguide.typing import Key

MAX_SEED = 2**64 - 1
"""The largest seed: a key of the Threefry generator is two words of 32 bits."""


def check_seed(name: str, seed: int) -> int:
  """Give a seed back if it is a whole number from 0 to `MAX_SEED`.

  >>> check_seed("seed", 2**70)
  Traceback (most recent call last):
  ...
  ValueError: seed must be a whole number from 0 to 18446744073709551615 (2**64 - 1), got 1180591620717411303424
  """
  try:
    number = checks.at_least(name, seed, 0)
  except ValueError:
    number = -1
  if not 0 <= number <= MAX_SEED:
    raise ValueError(f"{name} must be a whole number from 0 to {MAX_SEED} (2**64 - 1), got {seed!r}")
  return number


def seed_key(seed: int) -> Key:
  """Make the key of a seed, every digit of which counts.

  ``jax.random.key`` takes the last 32 bits of a seed alone, unless 64-bit types are enabled, and makes a key of
  whatever kind is the default. This is the key that it makes with 64-bit types and Threefry: for seeds below 2**32 the
  same without them.

  Args:
    seed: a whole number from 0 to `MAX_SEED`.

  Raises:
    ValueError: if it is not that.

  >>> [jax.random.key_data(seed_key(seed)).tolist() for seed in (5, 2**32 + 5)]
  [[0, 5], [1, 5]]
  """
  words = jnp.array(divmod(check_seed("seed", seed), 2**32), jnp.uint32)
  return jax.random.wrap_key_data(words, impl="threefry2x32")
