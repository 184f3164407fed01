"""Random keys of samples and runs. They do not depend on JAX's configured random number generator."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.typing import Key

MAX_SEED = 2**64 - 1
"""The largest seed: a key of the Threefry generator has two words of 32 bits."""


MAX_INDEX = 2**32 - 2
"""The largest index of a sample. An index is one word of 32 bits; 2**32 - 1 is reserved for keys of no sample."""


def threefry(key: Any) -> Key:
  """Return a key of the Threefry generator. A key of another generator is converted, and all of its words are used.

  Under ``vmap``, draws of other generators (``rbg``, ``unsafe_rbg``) depend on the batch, so that sample ``i`` would
  change with its batch. Draws of Threefry do not.

  Args:
    key: one key, typed or raw, of any generator.

  Raises:
    TypeError: if ``key`` is not a random key.
    ValueError: if it is an array of several keys.

  >>> jax.random.key_data(threefry(jax.random.key(0, impl="rbg"))).shape
  (2,)
  >>> threefry(0)
  Traceback (most recent call last):
  ...
  TypeError: key must be a random key, got 0: make one with jax.random.key(0)
  """
  dtype = getattr(key, "dtype", None)
  typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if not typed and (dtype != np.uint32 or np.ndim(key) == 0 or np.shape(key)[-1] not in (2, 4)):
    shown = f"{dtype} of shape {np.shape(key)}" if hasattr(key, "shape") else repr(key)
    seed = key if isinstance(key, int) and not isinstance(key, bool) else 0
    raise TypeError(f"key must be a random key, got {shown}: make one with jax.random.key({seed})")
  shape = np.shape(key) if typed else np.shape(key)[:-1]
  if shape:
    raise ValueError(f"key must be one random key, got keys of shape {shape}: use vmap for several keys")
  words = jax.random.key_data(key) if typed else jnp.asarray(key)
  threefry_key = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
  for i in range(2, words.shape[0]):
    threefry_key = jax.random.fold_in(threefry_key, words[i])
  return threefry_key


def check_seed(name: str, seed: int) -> int:
  """Check that a seed is a whole number from 0 to `MAX_SEED`, and return it.

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
  """Make the Threefry key of a seed from all 64 bits of the seed.

  ``jax.random.key`` uses only the last 32 bits of a seed, unless 64-bit types are enabled, and its generator is JAX's
  configured one. This function returns the key that ``jax.random.key`` returns with 64-bit types and Threefry. For
  seeds below 2**32, 64-bit types make no difference.

  Args:
    seed: a whole number from 0 to `MAX_SEED`.

  Raises:
    ValueError: if ``seed`` is anything else.

  >>> [jax.random.key_data(seed_key(seed)).tolist() for seed in (5, 2**32 + 5)]
  [[0, 5], [1, 5]]
  """
  words = jnp.array(divmod(check_seed("seed", seed), 2**32), jnp.uint32)
  return jax.random.wrap_key_data(words, impl="threefry2x32")
