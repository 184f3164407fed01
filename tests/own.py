"""Small networks in five frameworks, as users write them: a denoiser and a classifier of each, with dropout."""

from typing import Any, ClassVar

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

SHAPE, CLASSES, WIDTH = (2, 2, 1), 3, 8
SIZE = 4


class NnxNet(nnx.Module):
  """NNX, on a batch."""

  null_class = True
  perturbable: ClassVar = {"skip": ["middle"]}

  def __init__(self, width: int = WIDTH, num_classes: int = CLASSES, *, rngs: nnx.Rngs):
    self.num_classes = num_classes
    self.first, self.last = nnx.Linear(SIZE, width, rngs=rngs), nnx.Linear(width, SIZE, rngs=rngs)
    self.middle = nnx.Linear(width, width, rngs=rngs)
    self.label = nnx.Embed(num_classes + 1, width, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x, t, cond, perturbation=None):
    """Predict."""
    hidden = self.first(x.reshape(x.shape[0], -1)) + self.label(cond) + t[:, None]
    if perturbation is None:
      hidden = hidden + self.middle(hidden)
    return self.last(self.dropout(nnx.silu(hidden))).reshape(x.shape)


class NnxClassifier(nnx.Module):
  """NNX, on a batch, with batch statistics if it is told so."""

  role = "classifier"

  def __init__(self, width: int = WIDTH, out_channels: int = CLASSES, norm: bool = False, *, rngs: nnx.Rngs):
    self.out_channels = out_channels
    self.first, self.last = nnx.Linear(SIZE, width, rngs=rngs), nnx.Linear(width, out_channels, rngs=rngs)
    self.norm = nnx.BatchNorm(width, rngs=rngs) if norm else None

  def __call__(self, x, t):
    """Return logits."""
    hidden = self.first(x.reshape(x.shape[0], -1)) + t[:, None]
    return self.last(nnx.silu(hidden if self.norm is None else self.norm(hidden)))


class EqxNet(eqx.Module):
  """Equinox, on one example."""

  first: eqx.nn.Linear
  middle: eqx.nn.Linear
  last: eqx.nn.Linear
  label: eqx.nn.Embedding
  dropout: eqx.nn.Dropout
  num_classes: int = eqx.field(static=True)

  null_class = True
  perturbable: ClassVar = {"skip": ["middle"]}

  def __init__(self, width: int = WIDTH, num_classes: int = CLASSES, *, key: Any):
    keys = jax.random.split(key, 4)
    self.first, self.last = eqx.nn.Linear(SIZE, width, key=keys[0]), eqx.nn.Linear(width, SIZE, key=keys[1])
    self.middle = eqx.nn.Linear(width, width, key=keys[2])
    self.label = eqx.nn.Embedding(num_classes + 1, width, key=keys[3])
    self.dropout, self.num_classes = eqx.nn.Dropout(0.5), num_classes

  def __call__(self, x, t, cond, *, key=None, perturbation=None):
    """Predict."""
    hidden = self.first(x.ravel()) + self.label(cond) + t
    if perturbation is None:
      hidden = hidden + self.middle(hidden)
    return self.last(self.dropout(jax.nn.silu(hidden), key=key)).reshape(x.shape)


class EqxClassifier(eqx.Module):
  """Equinox, on one example, with batch statistics if it is told so."""

  first: eqx.nn.Linear
  last: eqx.nn.Linear
  norm: eqx.nn.BatchNorm | None

  role = "classifier"

  def __init__(self, width: int = WIDTH, out_channels: int = CLASSES, norm: bool = False, *, key: Any):
    keys = jax.random.split(key)
    self.first, self.last = eqx.nn.Linear(SIZE, width, key=keys[0]), eqx.nn.Linear(width, out_channels, key=keys[1])
    self.norm = eqx.nn.BatchNorm(width, "batch", mode="batch") if norm else None

  def __call__(self, x, t, state=None):
    """Return logits, and the state if there is one."""
    hidden = self.first(x.ravel()) + t
    if self.norm is None:
      return self.last(jax.nn.silu(hidden))
    hidden, state = self.norm(hidden, state)
    return self.last(jax.nn.silu(hidden)), state


class HaikuNet(hk.Module):
  """Haiku, on a batch."""

  null_class = True
  perturbable: ClassVar = {"skip": ["middle"]}

  def __init__(self, width: int = WIDTH, num_classes: int = CLASSES, name: str | None = None):
    super().__init__(name)
    self.width, self.num_classes = width, num_classes

  def __call__(self, x, t, cond, is_training, perturbation=None):
    """Predict."""
    hidden = hk.Linear(self.width, name="first")(x.reshape(x.shape[0], -1)) + t[:, None]
    hidden = hidden + hk.Embed(self.num_classes + 1, self.width)(cond)
    if perturbation is None:
      hidden = hidden + hk.Linear(self.width, name="middle")(hidden)
    if is_training:
      hidden = hk.dropout(hk.next_rng_key(), 0.5, hidden)
    return hk.Linear(SIZE, name="last")(jax.nn.silu(hidden)).reshape(x.shape)


class HaikuClassifier(hk.Module):
  """Haiku, on a batch, with batch statistics if it is told so."""

  role = "classifier"

  def __init__(self, width: int = WIDTH, out_channels: int = CLASSES, norm: bool = False, name: str | None = None):
    super().__init__(name)
    self.width, self.out_channels, self.norm = width, out_channels, norm

  def __call__(self, x, t, is_training=False):
    """Return logits."""
    hidden = hk.Linear(self.width)(x.reshape(x.shape[0], -1)) + t[:, None]
    if self.norm:
      hidden = hk.BatchNorm(True, True, 0.9)(hidden, is_training)
    return hk.Linear(self.out_channels)(jax.nn.silu(hidden))


class PlainNet:
  """Two functions of the parameters, on a batch."""

  null_class = True
  perturbable: ClassVar = {"skip": ["middle"]}

  def __init__(self, width: int = WIDTH, num_classes: int = CLASSES):
    self.width, self.num_classes = width, num_classes

  def init(self, key, x, t, cond):
    """Draw parameters."""
    shapes = {"first": (SIZE, self.width), "middle": 2 * (self.width,), "last": (self.width, SIZE)}
    shapes["label"] = (self.num_classes + 1, self.width)
    keys = jax.random.split(key, 4)
    return {name: 0.5 * jax.random.normal(one, shape) for one, (name, shape) in zip(keys, shapes.items(), strict=True)}

  def apply(self, params, x, t, cond, perturbation=None):
    """Predict."""
    hidden = x.reshape(x.shape[0], -1) @ params["first"] + params["label"][cond] + t[:, None]
    if perturbation is None:
      hidden = hidden + hidden @ params["middle"]
    return (jax.nn.silu(hidden) @ params["last"]).reshape(x.shape)


class PlainClassifier:
  """Two functions of the parameters, on a batch."""

  role = "classifier"

  def __init__(self, width: int = WIDTH, out_channels: int = CLASSES):
    self.width, self.out_channels = width, out_channels

  def init(self, key, x, t):
    """Draw parameters."""
    first, last = jax.random.split(key)
    return {
      "first": jax.random.normal(first, (SIZE, self.width)),
      "last": jax.random.normal(last, (self.width, self.out_channels)),
    }

  def apply(self, params, x, t):
    """Return logits."""
    return jax.nn.silu(x.reshape(x.shape[0], -1) @ params["first"] + t[:, None]) @ params["last"]


class LinenNet(nn.Module):
  """Flax linen, on a batch."""

  width: int = WIDTH
  num_classes: int = CLASSES
  null_class: bool = True

  @nn.compact
  def __call__(self, x, t, cond):
    """Predict."""
    hidden = nn.Dense(self.width)(x.reshape(x.shape[0], -1)) + nn.Embed(self.num_classes + 1, self.width)(cond)
    return nn.Dense(SIZE)(nn.silu(hidden + t[:, None])).reshape(x.shape)


def batch(n: int = 4) -> Any:
  """Return inputs of networks."""
  return jnp.ones((n, *SHAPE)), jnp.ones(n), jnp.zeros(n, int)
