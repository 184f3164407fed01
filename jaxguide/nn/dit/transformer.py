"""DiT, SiT, REPA's SiT and LightningDiT: one transformer with the options of each."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide.nn.dit import layers, positions
from jaxguide.nn.layers import check_cudnn, count_heads
from jaxguide.nn.perturbation import Perturbation


class Transformer(nn.Module):
  """What the four networks share. Fields have the names of the published classes."""

  patch_size: int = 2
  hidden_size: int = 1152
  depth: int = 28
  num_heads: int = 16
  mlp_ratio: float | int = 4.0
  learn_sigma: bool = False
  use_checkpoint: bool = False
  dtype: Any = jnp.float32
  cudnn_attention: bool | None = None
  num_classes: int | None = None
  null_class: bool = True
  perturbation: Perturbation | None = None

  frozen: ClassVar[tuple[str, ...]] = ("pos_embed", "freqs_cos", "freqs_sin")
  """Parameters that keep their values in training."""

  split_by_heads: ClassVar[bool] = True
  """Whether the layers can be split over the axis ``tensor`` of a mesh."""

  keeps_variance: ClassVar[bool] = False
  """Whether the second half of the output, with ``learn_sigma``, is given back: DiT's learned variance."""

  block_options: ClassVar[tuple[str, ...]] = ()
  """Fields that a block takes by the same name."""

  def __post_init__(self):
    super().__post_init__()
    check_cudnn(self)

  @property
  def learned_variance(self) -> bool:
    """Whether the output has twice the image's channels, the second half being the learned variance."""
    return self.learn_sigma and self.keeps_variance

  @nn.nowrap
  def block_fields(self) -> dict[str, Any]:
    """Return the fields of a block beside those that all networks have."""
    return {}

  @nn.nowrap
  def embed(self, t, y, number: str = "", freq_shift: int = 0):
    """Return the (n, hidden_size) vector of time and label."""
    of_time = layers.TimestepEmbedder(self.hidden_size, freq_shift, self.dtype, name=f"t_embedder{number}")
    c = of_time(t)
    if self.num_classes is not None:
      labels = self.num_classes + self.null_class
      c += layers.LabelEmbedder(labels, self.hidden_size, self.dtype, name=f"y_embedder{number}")(y)
    return c

  @nn.nowrap
  def vectors(self, t, y):
    """Return the vector that modulates each block, and the last layer's at the end."""
    return [self.embed(t, y)] * (self.depth + 1)

  @nn.nowrap
  def check_input(self, x, t, y) -> None:
    """Raise ValueError unless x is a batch of images that can be cut into patches, with a time and a label for each."""
    name, p = type(self).__name__, self.patch_size
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name} takes floats of shape (n, height, width, channels), got {x.dtype} of shape {x.shape}")
    if t.shape != x.shape[:1]:
      raise ValueError(f"{name} takes one time for each of {x.shape[0]} images, got shape {t.shape}")
    if x.shape[1] % p or x.shape[2] % p:
      raise ValueError(
        f"{name} cuts the image into patches of {p}x{p}, so its sides must be multiples of {p}; got "
        f"{x.shape[1]}x{x.shape[2]}. Pad the image, or change patch_size"
      )
    if (y is None) != (self.num_classes is None):
      raise ValueError(
        f"{name} with num_classes={self.num_classes} was given {'no' if y is None else 'unexpected'} labels"
      )
    if y is not None and self.num_classes is not None:
      if y.shape != t.shape:
        raise ValueError(f"{name} takes one label for each of {x.shape[0]} images, got shape {y.shape}")
      checks.labels("label", y, self.num_classes, self.null_class)
    count_heads(self.hidden_size, self.num_heads, -1)
    if self.perturbation is not None and not self.is_initializing():
      self.perturbation.check(self.variables)

  @nn.nowrap
  def rope(self, sides):
    """Return cosines and sines of rotary positions, or None."""
    del sides

  @nn.nowrap
  def run(self, x, t, y, after_block=lambda number, tokens: None):
    """Run the network.

    Args:
      x: (n, height, width, channels).
      t: (n,) times.
      y: (n,) labels or None.
      after_block: called with the number of a block, from 1, and its tokens.

    Returns:
      (n, height, width, channels), or twice the channels with a learned variance, in the type of ``x``.

    Raises:
      ValueError: if the shapes do not fit, a label is not one of the network's, or the network has no block that the
        perturbation names.
    """
    self.check_input(x, t, y)
    sides = (x.shape[1] // self.patch_size, x.shape[2] // self.patch_size)
    channels = x.shape[-1]
    # Its own dtype: the published table is float32, and a table in half precision would merge neighbours.
    table = functools.partial(positions.sincos, *sides, self.hidden_size)
    place = self.param("pos_embed", lambda _: jnp.asarray(table())[None])
    h = layers.PatchEmbedder(self.hidden_size, self.patch_size, self.dtype, name="x_embedder")(x)
    h = (h + jax.lax.stop_gradient(place)).astype(self.dtype)
    *of_blocks, of_last = self.vectors(t, y)
    rope = self.rope(sides)
    block = nn.remat(layers.Block, static_argnums=(3,)) if self.use_checkpoint else layers.Block
    for number, c in enumerate(of_blocks):
      name = f"blocks_{number}"
      perturbation = None if self.is_initializing() else self.perturbation
      fields: dict[str, Any] = {
        "num_heads": self.num_heads,
        "dtype": self.dtype,
        "cudnn_attention": self.cudnn_attention,
        "perturbation": perturbation if perturbation is not None and name in perturbation.blocks else None,
        "mlp_width": layers.mlp_width(self.hidden_size, self.mlp_ratio, False),
        **self.block_fields(),
      }
      h = block(**fields, name=name)(h, c, sides, rope)
      after_block(number + 1, h)
    rmsnorm = bool(self.block_fields().get("rmsnorm", False))
    features = self.patch_size**2 * channels * (2 if self.learn_sigma else 1)
    h = layers.FinalLayer(features, rmsnorm, self.dtype, name="final_layer")(h, of_last)
    out = layers.to_image(h, sides, self.patch_size)
    return (out if self.learned_variance else out[..., :channels]).astype(x.dtype)


class DiT(Transformer):
  """DiT (Peebles & Xie 2023, arXiv:2212.09748): it predicts the noise, and a learned variance.

  Its time is a step of the linear table of 1000 steps.

  Args:
    patch_size: side of the square that becomes one token.
    hidden_size: numbers of a token, a multiple of 4 and of ``num_heads``.
    depth: number of blocks.
    num_heads: number of attention heads.
    mlp_ratio: hidden width of a block's second part, in units of ``hidden_size``.
    learn_sigma: whether the output has a second half, the learned variance.
    use_checkpoint: whether blocks are computed again in the backward pass, to save memory.
    dtype: type of matrix products and of tokens, ``jnp.float32`` or ``jnp.bfloat16``. Parameters and normalisation stay
      float32.
    cudnn_attention: whether to use cuDNN's fused attention kernel on an NVIDIA GPU; as for `jaxguide.UNet`.
    num_classes: number of classes, or None for an unconditional network.
    null_class: whether label ``num_classes`` means "no label"; the published classes have it if ``class_dropout_prob``
      is above 0.
    perturbation: makes some blocks, ``blocks_0`` and so on, worse on purpose; see `jaxguide.perturbed`.
    qkv_bias: whether queries, keys and values have a bias; diffusers calls it ``attention_bias``.
    norm_eps: the number that the second normalisation of a block adds to the variance: 1e-6, in diffusers 1e-5.
    freq_shift: 1 for the frequencies of the time in diffusers, 0 for those of the original.
    embedder_per_block: whether each block has its own embedders of time and label, as in diffusers' files. The last
      layer has the first block's.

  >>> dit = DiT(hidden_size=32, depth=1, num_heads=4, num_classes=10)
  >>> x, t, y = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.array([3, 10])
  >>> params = jax.eval_shape(dit.init, jax.random.key(0), x, t, y)
  >>> jax.eval_shape(dit.apply, params, x, t, y).shape
  (2, 8, 8, 8)
  """

  learn_sigma: bool = True
  qkv_bias: bool = True
  norm_eps: float | int = 1e-6
  freq_shift: int = 0
  embedder_per_block: bool = False

  keeps_variance: ClassVar[bool] = True

  @nn.nowrap
  def block_fields(self) -> dict[str, Any]:
    """Return the fields of a block."""
    return {"qkv_bias": self.qkv_bias, "norm_eps": self.norm_eps}

  @nn.nowrap
  def vectors(self, t, y):
    """Return the vector that modulates each block, and the last layer's at the end."""
    if not self.embedder_per_block:
      return [self.embed(t, y, freq_shift=self.freq_shift)] * (self.depth + 1)
    each = [self.embed(t, y, number=f"s_{number}", freq_shift=self.freq_shift) for number in range(self.depth)]
    return [*each, each[0]]

  @nn.compact
  def __call__(self, x, t, y=None):
    """Return the network's raw output ``F``, as `Transformer.run`."""
    return self.run(x, t, y)


class SiT(Transformer):
  """SiT (Ma et al. 2024, arXiv:2401.08740): DiT's network, which predicts the velocity of a flow.

  Its time is 1 at the data and 0 at the noise: prediction ``flow_to_data``. With ``learn_sigma`` the network has a
  second half of channels, as published, which is dropped. The other fields are those of `DiT`.

  >>> sit = SiT(hidden_size=32, depth=1, num_heads=4, num_classes=10)
  >>> x, t, y = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2), jnp.array([3, 10])
  >>> params = jax.eval_shape(sit.init, jax.random.key(0), x, t, y)
  >>> jax.eval_shape(sit.apply, params, x, t, y).shape
  (2, 8, 8, 4)
  """

  learn_sigma: bool = True

  @nn.compact
  def __call__(self, x, t, y=None):
    """Return the network's raw output ``F``, as `Transformer.run`."""
    return self.run(x, t, y)


class RepaSiT(Transformer):
  """REPA's SiT (Yu et al. 2024, arXiv:2410.06940): its hidden tokens are aligned with features of an image encoder.

  Its time is 0 at the data and 1 at the noise, unlike SiT's: prediction ``flow`` with a time_scale of 1. The
  projectors, which map hidden tokens to features, are for training only. ``apply(..., features=True)`` returns the
  output and the projected tokens, for `jaxguide.losses.alignment`.

  Args:
    encoder_depth: the number of the block whose tokens are projected.
    z_dims: length of the features of each image encoder; ``()`` for a network without projectors.
    projector_dim: hidden width of the projectors.
    qk_norm: whether queries and keys are normalised by layer normalisation.

  The other fields are those of `DiT`.

  >>> sit = RepaSiT(hidden_size=32, depth=2, num_heads=4, encoder_depth=1, z_dims=(16,), projector_dim=32)
  >>> x, t = jnp.zeros((2, 8, 8, 4)), jnp.zeros(2)
  >>> params = sit.init(jax.random.key(0), x, t)
  >>> out, (z,) = sit.apply(params, x, t, features=True)
  >>> out.shape, z.shape
  ((2, 8, 8, 4), (2, 16, 16))
  """

  encoder_depth: int = 8
  z_dims: Sequence[int] = (768,)
  projector_dim: int = 2048
  qk_norm: bool = False

  def __post_init__(self):
    self.z_dims = tuple(self.z_dims)  # A configuration read from a file has lists, but a module must be hashable.
    super().__post_init__()
    if self.z_dims and not 1 <= self.encoder_depth <= self.depth:
      raise ValueError(
        f"encoder_depth must be the number of one of the {self.depth} blocks, from 1, got {self.encoder_depth}"
      )

  @nn.nowrap
  def block_fields(self) -> dict[str, Any]:
    """Return the fields of a block."""
    return {"qk_norm": "layer" if self.qk_norm else ""}

  @nn.compact
  def __call__(self, x, t, y=None, *, features: bool = False):
    """Return the network's raw output ``F``, as `Transformer.run`; with ``features`` also the projected tokens."""
    projected: list[Any] = []

    def project(number, tokens):
      if number == self.encoder_depth and (features or self.is_initializing()):
        projected.extend(self.projected(tokens))

    out = self.run(x, t, y, project)
    return (out, projected) if features else out

  @nn.nowrap
  def projected(self, tokens):
    """Return the projection of (n, t, hidden_size) tokens to the features of each image encoder, (n, t, z_dim)."""
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=layers.xavier)
    found = []
    for number, z_dim in enumerate(self.z_dims):
      h = nn.silu(dense(self.projector_dim, name=f"projectors_{number}_0")(tokens))
      h = nn.silu(dense(self.projector_dim, name=f"projectors_{number}_2")(h))
      found.append(dense(z_dim, name=f"projectors_{number}_4")(h))
    return found


class LightningDiT(Transformer):
  """LightningDiT (Yao et al. 2025, arXiv:2501.01423): a flow in the latents of an autoencoder that vision models align.

  Its time is 1 at the data and 0 at the noise: prediction ``flow_to_data``.

  Args:
    use_qknorm: whether queries and keys are normalised.
    use_swiglu: whether the second part of a block is gated; its width is then two thirds.
    use_rope: whether queries and keys are turned by their position, beside the table that is added.
    use_rmsnorm: whether tokens, queries and keys are normalised by RMSNorm instead of layer normalisation.
    wo_shift: whether blocks have no shift.

  The other fields are those of `DiT`; with ``learn_sigma`` the second half of the channels is dropped.

  >>> network = LightningDiT(patch_size=1, hidden_size=32, depth=1, num_heads=4, use_rope=True, num_classes=10)
  >>> x, t, y = jnp.zeros((2, 4, 4, 32)), jnp.zeros(2), jnp.array([3, 10])
  >>> params = jax.eval_shape(network.init, jax.random.key(0), x, t, y)
  >>> jax.eval_shape(network.apply, params, x, t, y).shape
  (2, 4, 4, 32)
  """

  use_qknorm: bool = False
  use_swiglu: bool = False
  use_rope: bool = False
  use_rmsnorm: bool = False
  wo_shift: bool = False

  @nn.nowrap
  def block_fields(self) -> dict[str, Any]:
    """Return the fields of a block."""
    norm = "rms" if self.use_rmsnorm else "layer"
    return {
      "mlp_width": layers.mlp_width(self.hidden_size, self.mlp_ratio, self.use_swiglu),
      "qk_norm": norm if self.use_qknorm else "",
      "swiglu": self.use_swiglu,
      "rmsnorm": self.use_rmsnorm,
      "wo_shift": self.wo_shift,
    }

  @nn.nowrap
  def rope(self, sides):
    """Return cosines and sines of rotary positions, each (tokens, head channels), or None."""
    if not self.use_rope:
      return None
    return _RotaryTables(self.hidden_size // self.num_heads, name="feat_rope")(sides)

  @nn.compact
  def __call__(self, x, t, y=None):
    """Return the network's raw output ``F``, as `Transformer.run`."""
    return self.run(x, t, y)


class _RotaryTables(nn.Module):
  """The tables of rotary positions, which published files hold."""

  head_channels: int

  @nn.compact
  def __call__(self, sides):
    def table(wave):
      return lambda _: jnp.asarray(wave(positions.rotary_angles(*sides, self.head_channels)), jnp.float32)

    tables = self.param("freqs_cos", table(np.cos)), self.param("freqs_sin", table(np.sin))
    return tuple(map(jax.lax.stop_gradient, tables))
