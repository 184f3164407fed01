"""Keys of samples and runs, the same whatever JAX is configured to draw random numbers with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.typing import Key

MAX_SEED = 2**64 - 1
"""The largest seed: a key of the Threefry generator is two words of 32 bits."""


MAX_INDEX = 2**32 - 2
"""The largest index of a sample: an index is one word, and the last is left to what belongs to no sample."""


def threefry(key: Any) -> Key:
  """Give a key of the Threefry generator: the key itself if it is one, else one made of all of its words.

  The draws of other generators (``rbg``, ``unsafe_rbg``) depend on the batch that they are drawn in, by ``vmap``, and
  sample ``i`` would not be sample ``i`` any more. Threefry's do not.

  Args:
    key: one key, typed or raw, of any kind.

  Raises:
    TypeError: if it is no key.
    ValueError: if it is several.

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
    raise ValueError(f"key must be one random key, got keys of shape {shape}: use vmap over several")
  words = jax.random.key_data(key) if typed else jnp.asarray(key)
  made = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
  for word in range(2, words.shape[0]):
    made = jax.random.fold_in(made, words[word])
  return made


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
