"""The keys of samples: sample ``i`` has the key ``fold_in(key, i)``."""

from __future__ import annotations

import functools

import jax
import numpy as np

from jaxguide._core import checks, keys
from jaxguide._core.typing import Key


def sample_keys(key: Key, num: int, start: int = 0) -> Key:
  """Return the keys of samples ``start`` to ``start + num - 1``: ``fold_in(key, i)``.

  Args:
    key: a random key of any kind. The keys of the samples are Threefry keys.
    num: number of keys.
    start: index of the first sample.

  Raises:
    ValueError: if an index is above `jaxguide.keys.MAX_INDEX`, or if ``num`` or ``start`` is below 0.

  >>> sample_keys(jax.random.key(0), 3).shape
  (3,)
  """
  num, start = check_indices(num, start, 0)
  return keys_of(keys.threefry(key), start + np.arange(num, dtype=np.int64))


def check_indices(num, start, least):
  """Return ``num`` and ``start`` as integers, after a check that no index is above `jaxguide.keys.MAX_INDEX`."""
  num, start = checks.at_least("num", num, least), checks.at_least("start", start, 0)
  if start + num - 1 > keys.MAX_INDEX:
    raise ValueError(
      f"start + num must be at most {keys.MAX_INDEX + 1}, since an index has 32 bits; got {start} + {num}"
    )
  return num, start


def keys_of(key, indices):
  """Return the keys of the samples with these indices."""
  return jax.vmap(functools.partial(jax.random.fold_in, key))(indices.astype(np.uint32))
