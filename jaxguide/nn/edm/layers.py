"""What the networks of EDM share (Karras et al. 2022, arXiv:2206.00364, appendix F.2): blocks, embeddings, labels.

A submodule has its published name with underscores for dots: ``enc_8x8_block0`` is ``enc.8x8_block0``.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxguide._core import checks
from jaxguide.nn.layers import QKV, Conv, attend_to, check_cudnn
from jaxguide.nn.normalisation import GroupNorm
from jaxguide.nn.parameters import parameter
from jaxguide.nn.perturbation import Perturbation
from jaxguide.nn.resampling import double, halve

zeros = nn.initializers.zeros


class Inits(NamedTuple):
  """How the parameters of a network are drawn.

  Args:
    kernel: of most kernels.
    bias: ``fan_in -> initializer``, of their biases.
    last: of kernels whose output is added to a skip path.
    attention: of the kernel of queries, keys and values.
  """

  kernel: Any
  bias: Any
  last: Any
  attention: Any


def uniform_bias(fan_in: int) -> Any:
  """Return an initializer that draws from [-1, 1] divided by the root of ``fan_in``."""

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(fan_in)

  return init


def zero_bias(fan_in: int) -> Any:
  """Return the initializer that gives zeros."""
  del fan_in
  return zeros


XAVIER = Inits(
  nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"),
  zero_bias,
  nn.initializers.variance_scaling(1e-10, "fan_avg", "uniform"),
  nn.initializers.variance_scaling(0.2, "fan_avg", "uniform"),
)
"""Of DDPM++ and NCSN++."""

_KAIMING = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

KAIMING = Inits(_KAIMING, uniform_bias, zeros, _KAIMING)
"""Of EDM's ADM."""


def groups_of(channels: int) -> int:
  """Return the number of groups of EDM's group normalisation: 32, or less so that a group has 4 channels.

  Raises:
    ValueError: if groups of equal size are not possible.

  >>> groups_of(256), groups_of(48)
  (32, 12)
  """
  groups = min(32, channels // 4)
  if not groups or channels % groups:
    raise ValueError(
      f"EDM's group normalisation divides {channels} channels into {groups} groups, which is not possible: choose "
      "channels that are a multiple of 4, and of 32 from 128 on"
    )
  return groups


class Block(nn.Module):
  """A residual block, followed by self-attention if it has heads (EDM's ``UNetBlock``).

  Args:
    features: channels of the output.
    heads: number of attention heads; 0 for a block without attention.
    resample: ``up`` doubles the sides, ``down`` halves them.
    dropout: probability of dropping an activation in training.
    skip_scale: factor on each sum of a skip path and a branch.
    epsilon: what is added to the variance in group normalisation.
    resample_filter: the filter of the resampling.
    resample_proj: whether a resampled skip path has a 1x1 convolution even with unchanged channels.
    adaptive_scale: whether the embedding scales and shifts the normalised activations; otherwise it is added.
    inits: how parameters are drawn.
    dtype: type of convolutions and matrix products.
    perturbation: makes the block worse on purpose, or None.
    cudnn_attention: whether to use cuDNN's kernel on a GPU. Default: where it can.
  """

  features: int
  heads: int = 0
  resample: str | None = None
  dropout: int | float = 0.0
  skip_scale: float = 1.0
  epsilon: float = 1e-5
  resample_filter: Sequence[int | float] = (1, 1)
  resample_proj: bool = False
  adaptive_scale: bool = True
  inits: Inits = KAIMING
  dtype: Any = jnp.float32
  perturbation: Perturbation | None = None
  cudnn_attention: bool | None = None

  @nn.compact
  def __call__(self, x, emb, train):
    """Map (n, h, w, c) and (n, emb) to (n, h, w, features), with the sides doubled or halved by ``resample``."""
    skipped = self.perturbation is not None and self.perturbation.kind == "skip"
    h = None if skipped else self.residual(x, emb, train)
    if self.resample is not None or x.shape[-1] != self.features:
      with_kernel = self.resample_proj or x.shape[-1] != self.features
      x = self.resized(x)
      x = self.linear(self.features, x.shape[-1], "skip")(x) if with_kernel else x
    x = x.astype(self.dtype)
    if h is None:
      return x
    x = (x + h) * self.skip_scale
    return self.attention(x) * self.skip_scale if self.heads else x

  @nn.nowrap
  def resized(self, x):
    """Double or halve the sides."""
    if self.resample is None:
      return x
    return (double if self.resample == "up" else halve)(x, self.resample_filter)

  @nn.nowrap
  def linear(self, features, fan_in, name, kernel=None, bias=None):
    """Make a dense layer, which is a 1x1 convolution."""
    kernel, bias = kernel or self.inits.kernel, bias or self.inits.bias(fan_in)
    return nn.Dense(features, dtype=self.dtype, kernel_init=kernel, bias_init=bias, name=name)

  @nn.nowrap
  def norm(self, channels, name, silu=False):
    """Make a group normalisation."""
    return GroupNorm(silu, groups_of(channels), self.epsilon, name=name)

  @nn.nowrap
  def residual(self, x, emb, train):
    """Return the residual, which is added to the skip path."""
    channels = x.shape[-1]
    h = self.resized(self.norm(channels, "norm0", silu=True)(x).astype(self.dtype))
    bias = self.inits.bias(9 * channels)
    h = Conv(self.features, kernel_init=self.inits.kernel, dtype=self.dtype, bias_init=bias, name="conv0")(h)
    width = 2 * self.features if self.adaptive_scale else self.features
    emb = self.linear(width, emb.shape[-1], "affine")(emb)[:, None, None]
    norm = self.norm(self.features, "norm1", silu=True)
    h = norm(h, jnp.split(emb, 2, axis=-1)) if self.adaptive_scale else norm(h + emb)
    h = nn.Dropout(self.dropout)(h, deterministic=not train)
    return Conv(self.features, kernel_init=self.inits.last, dtype=self.dtype, name="conv1")(h)

  @nn.nowrap
  def attention(self, x):
    """Add self-attention over the pixels."""
    n, h, w, c = x.shape
    normed = self.norm(c, "norm2")(x).reshape(n, h * w, c)
    inits = {"kernel_init": self.inits.attention, "bias_init": self.inits.bias(c)}
    q, k, v = QKV(self.heads, dtype=self.dtype, **inits, name="qkv")(normed)
    out = attend_to(q, k, v, self.perturbation, (h, w), self.cudnn_attention)
    out = self.linear(c, c, "proj", self.inits.last, zeros)(out)
    return x + out.reshape(x.shape)


class FourierEmbedding(nn.Module):
  """Random Fourier features of time (Tancik et al. 2020), as in NCSN++: cosines, then sines.

  The frequencies are drawn once and not trained.
  """

  features: int
  scale: float = 16.0

  @nn.compact
  def __call__(self, t):
    """Map (n,) to (n, features)."""
    freqs = parameter(self, "freqs", nn.initializers.normal(self.scale), (self.features // 2,))
    angles = jnp.outer(t, (2 * math.pi * jax.lax.stop_gradient(freqs)).astype(t.dtype))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def positional_embedding(t, features: int, endpoint: bool = False, max_positions: float = 1e4):
  """Return EDM's sinusoidal embedding of time, cosines first.

  Args:
    t: (n,) times.
    features: width of the embedding, even.
    endpoint: whether the longest period is ``2 pi max_positions`` itself, as in DDPM++, instead of the next after it.
    max_positions: the longest period, in units of ``2 pi``.

  >>> positional_embedding(jnp.zeros(1), 4).tolist()
  [[1.0, 1.0, 0.0, 0.0]]
  """
  half = features // 2
  steps = jnp.arange(half, dtype=jnp.float32) / max(half - endpoint, 1)
  angles = jnp.outer(t, ((1 / max_positions) ** steps).astype(t.dtype))
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def check_labels(module: Any, x: Any, t: Any, y: Any) -> None:
  """Check the inputs of one of EDM's or EDM2's networks.

  Args:
    module: the network, with the fields ``num_classes``, ``label_size``, ``null_class`` and ``channel_mult``.
    x: images.
    t: times.
    y: labels or None.

  Raises:
    ValueError: if the shapes do not fit, labels are missing or not expected, or a label is not one of the classes.
  """
  name = type(module).__name__
  if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f"{name} takes floating-point images of shape (n, height, width, channels), got {x.dtype}{x.shape}"
    )
  if t.shape != x.shape[:1]:
    raise ValueError(f"{name} takes one time for each of {x.shape[0]} images, got shape {t.shape}")
  factor = 2 ** (len(module.channel_mult) - 1)
  if x.shape[1] % factor or x.shape[2] % factor:
    raise ValueError(
      f"{name} halves the image {len(module.channel_mult) - 1} times, so its sides must be multiples of {factor}; got "
      f"{x.shape[1]}x{x.shape[2]}. Pad the image, or shorten channel_mult"
    )
  if (y is None) != (module.num_classes is None and module.label_size is None):
    raise ValueError(
      f"{name} with num_classes={module.num_classes} and label_size={module.label_size} was given "
      f"{'no' if y is None else 'unexpected'} labels"
    )
  expected = t.shape if module.label_size is None else (*t.shape, module.label_size)
  if y is not None and y.shape != expected:
    kind = "label" if module.label_size is None else f"label of {module.label_size} numbers"
    raise ValueError(f"{name} takes one {kind} for each of {x.shape[0]} images, got shape {y.shape}")
  if module.num_classes is not None:
    checks.labels("label", y, module.num_classes, module.null_class)


def label_vectors(module: Any, y: Any, dtype: Any) -> Any:
  """Return labels as the vectors that the network takes: one-hot for a class, zeros for the null class.

  Args:
    module: the network.
    y: (n,) classes or (n, label_size) vectors; None without labels.
    dtype: the type of the vectors.
  """
  if y is None:
    return None
  return jax.nn.one_hot(y, module.num_classes, dtype=dtype) if module.label_size is None else y.astype(dtype)


def check_fields(module: Any) -> None:
  """Check the fields that EDM's and EDM2's networks share, and turn lists into tuples, since a module has a hash.

  Raises:
    ValueError: if there is no level, classes and label vectors are both given, dropout is not in [0, 1), or cuDNN's
      attention is demanded without half precision.
  """
  name = type(module).__name__
  module.channel_mult, module.attn_resolutions = tuple(module.channel_mult), tuple(module.attn_resolutions)
  if not module.channel_mult:
    raise ValueError(f"{name} needs a channel_mult for at least one level")
  if module.label_size is not None and module.num_classes is not None:
    raise ValueError(
      f"{name} takes classes or label vectors, got num_classes={module.num_classes} and "
      f"label_size={module.label_size}: leave out one of them"
    )
  if checks.in_range("dropout", module.dropout, 0, 1) == 1:
    raise ValueError("dropout must be at least 0 and below 1, got 1")
  check_cudnn(module)


def perturbation_of(module: Any, name: str) -> Perturbation | None:
  """Return the perturbation of the named block of a network, or None; always None in ``init``."""
  perturbation = None if module.is_initializing() else module.perturbation
  return perturbation if perturbation is not None and name in perturbation.blocks else None


def check_perturbation(module: Any) -> None:
  """Raise ValueError unless the network has the blocks that its perturbation names."""
  if module.perturbation is not None and not module.is_initializing():
    module.perturbation.check(module.variables)
