"""Sampling: the loop over a grid of noise levels, its keys, and batches of any size on any number of devices.

`sample` draws one example; use it inside your own ``jit`` and ``vmap``. `sample_batch` compiles itself, draws any
number of examples and spreads them over the devices. Sample ``i`` depends on the key, ``i`` and its condition alone. It
is the same alone, in a batch of any size and on any number of devices and processes, to the rounding of the network's
sums.
"""

from jaxguide.sampling.batches import Share, lower_batch, sample_batch, sample_batches, sample_shares
from jaxguide.sampling.keys import sample_keys
from jaxguide.sampling.loop import invert, sample
from jaxguide.sampling.products import sample_product, tempered

__all__ = [
  "Share",
  "invert",
  "lower_batch",
  "sample",
  "sample_batch",
  "sample_batches",
  "sample_keys",
  "sample_product",
  "sample_shares",
  "tempered",
]
