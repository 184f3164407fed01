"""Networks that compile fast, for tests of what surrounds a network."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from PIL import Image


def draw_photos(folder, number, side):
  """Write pictures of cats, light at the top, and as many of dogs, light at the bottom, in a folder for each."""
  rng = np.random.default_rng(0)
  for name, light in (("cat", slice(side // 2)), ("dog", slice(side // 2, side))):
    (folder / name).mkdir(parents=True)
    for i in range(number):
      pixels = rng.integers(0, 60, (side, side, 3)).astype(np.uint8)
      pixels[light] += 180
      Image.fromarray(pixels).save(folder / name / f"{i}.png")


class Mlp(nn.Module):
  """A denoiser."""

  width: int = 8
  num_classes: int | None = None
  null_class: bool = True
  dropout: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, t, label=None, *, train: bool = False):
    """Predict from the pixels, the time and the label."""
    hidden = nn.Dense(self.width, dtype=self.dtype)(x.reshape(x.shape[0], -1))
    hidden += nn.Dense(self.width, dtype=self.dtype)(jnp.log1p(t)[:, None])
    if label is not None:
      hidden += nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype)(label)
    hidden = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(hidden))
    return nn.Dense(math.prod(x.shape[1:]), dtype=self.dtype)(hidden).reshape(x.shape)


class Classify(nn.Module):
  """A classifier."""

  width: int = 8
  out_channels: int = 2
  role = "classifier"

  @nn.compact
  def __call__(self, x, t):
    """Return logits."""
    hidden = nn.Dense(self.width)(x.reshape(x.shape[0], -1)) + nn.Dense(self.width)(jnp.log1p(t)[:, None])
    return nn.Dense(self.out_channels)(nn.silu(hidden))
