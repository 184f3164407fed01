"""The keys of samples: sample ``i`` has the key ``fold_in(key, i)``."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxguide._core import checks, keys
from jaxguide._core.typing import Key


def sample_keys(key: Key, num: int, start: int = 0) -> Key:
  """Give the keys of samples ``start`` to ``start + num - 1``: ``fold_in(key, i)``.

  Args:
    key: a random key of any kind; those of the samples are Threefry's.
    num: how many.
    start: index of the first.

  Raises:
    ValueError: if an index is above `jaxguide.keys.MAX_INDEX`, or a number below 0.

  >>> sample_keys(jax.random.key(0), 3).shape
  (3,)
  """
  num, start = check_indices(num, start, 0)
  return keys_of(keys.threefry(key), start + np.arange(num, dtype=np.int64))


def check_indices(num, start, least):
  """Give the number of samples and the index of the first, if no index is above `jaxguide.keys.MAX_INDEX`."""
  num, start = checks.at_least("num", num, least), checks.at_least("start", start, 0)
  if start + num - 1 > keys.MAX_INDEX:
    raise ValueError(
      f"start + num must be at most {keys.MAX_INDEX + 1}, since an index is one word of 32 bits; got {start} + {num}"
    )
  return num, start


def keys_of(key, indices):
  """Give the keys of samples ``indices``."""
  return jax.vmap(functools.partial(jax.random.fold_in, key))(indices.astype(np.uint32))
