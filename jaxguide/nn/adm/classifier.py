"""The noise-aware classifier of Dhariwal & Nichol 2021: the UNet's downsampling half, followed by a pool."""

import flax.linen as nn
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide.nn.adm.encoder import Encoder
from jaxguide.nn.layers import AttentionPool
from jaxguide.nn.normalisation import GroupNorm

POOLS = ("attention", "adaptive", "spatial", "spatial_v2")


class Classifier(Encoder):
  """The classifier of Dhariwal & Nichol (2021, arXiv:2105.05233, section 4.3): it classifies images at any noise level.

  ``classifier.apply(params, x, t)`` returns logits (n, out_channels).

  Args:
    out_channels: number of classes.
    pool: ``attention`` (as published: the mean of the pixels attends to all pixels), ``adaptive`` (mean of the pixels),
      or ``spatial`` and ``spatial_v2`` (a small network on the mean output of every block).

  The other fields are those of `UNet`. ``pool="attention"`` has a positional embedding for each pixel of the coarsest
  level, so it accepts one image size only; it needs ``num_head_channels``.

  >>> import jax
  >>> classifier = Classifier(model_channels=32, out_channels=10, num_head_channels=32)
  >>> x, t = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2)
  >>> params = jax.eval_shape(classifier.init, jax.random.key(0), x, t)
  >>> jax.eval_shape(classifier.apply, params, x, t).shape
  (2, 10)
  """

  out_channels: int = 10
  pool: str = "attention"

  @nn.compact
  def __call__(self, x, t, *, train: bool = False):
    """Return the logits of noisy images.

    Args:
      x: (n, height, width, channels), noisy images multiplied by ``c_in``.
      t: (n,) the encoded noise level, ``c_noise``.
      train: whether to apply dropout; needs ``rngs={"dropout": key}``.

    Returns:
      (n, out_channels) logits.

    Raises:
      ValueError: if the shapes do not fit, a side cannot be halved at every level, the pool is unknown, or
        ``pool="attention"`` has no ``num_head_channels``.
    """
    checks.lookup("pool", self.pool, dict.fromkeys(POOLS))
    self.check_input(x, t)
    emb = self.embed_time(t)
    outputs = self.encode(x, emb, train)
    h = self.middle(outputs[-1], emb, train).astype(x.dtype)

    if self.pool.startswith("spatial"):
      h = jnp.concatenate([output.astype(x.dtype).mean((1, 2)) for output in [*outputs, h]], axis=-1)
      h = nn.Dense(2048, name="out_0")(h)
      if self.pool == "spatial":
        return nn.Dense(self.out_channels, name="out_2")(nn.relu(h))
      h = GroupNorm(silu=True, name="out_1")(h)
      return nn.Dense(self.out_channels, name="out_3")(h)

    h = GroupNorm(silu=True, name="out_0")(h)
    if self.pool == "attention":
      if self.num_head_channels == -1:
        raise ValueError("pool 'attention' needs the number of channels per head: give num_head_channels")
      return AttentionPool(self.out_channels, self.num_head_channels, name="out_2")(h)
    return nn.Dense(self.out_channels, kernel_init=nn.initializers.zeros, name="out_3")(h.mean((1, 2)))
