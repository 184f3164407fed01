"""Features of DINOv2 (Oquab et al. 2023, arXiv:2304.07193): a vision transformer trained without labels.

Stein et al. (2023, arXiv:2306.04675) found that the Fréchet distance of these features ranks generators as people do,
where Inception's often does not. The features are the class token after the last normalisation. The weights are read
from a file that the user has: Meta's ``dinov2_vitl14_pretrain.pth`` and the like, or ``model.safetensors`` of Hugging
Face's ``facebook/dinov2-large`` and the like, of any of the sizes S, B, L and g, with registers or without.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jaxguide._core import checks
from jaxguide._core.files import PathLike
from jaxguide._core.typing import PyTree
from jaxguide.evaluation.features import weights as files
from jaxguide.evaluation.features.base import Features, Resize
from jaxguide.evaluation.features.resizing import pillow, shorter_side_then_crop, square
from jaxguide.models.importers import state_dicts

VERSION = 1

SIZE, PATCH, HEAD = 224, 14, 64
"""The side of the images, of a patch, and the channels of a head of attention, in all sizes of the network."""

EPSILON = 1e-6
"""What the normalisations add to the variance."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels in [0, 1]."""

PREPROCESS: dict[str, Resize] = {
  "crop": shorter_side_then_crop(256, SIZE, pillow),
  "squash": square(SIZE, pillow),
}
"""How images become 224 times 224 pixels; see `dinov2`."""

_dense = functools.partial(nn.Dense, precision=jax.lax.Precision.HIGHEST)
_norm = functools.partial(nn.LayerNorm, epsilon=EPSILON)


class Block(nn.Module):
  """A block of a vision transformer: attention and a small network, each normalised before and scaled after.

  Args:
    hidden: the width of the small network.
    gated: whether it is SwiGLU (Shazeer 2020, arXiv:2002.05202) and not one hidden layer with GELU.
  """

  hidden: int
  gated: bool

  @nn.compact
  def __call__(self, x):
    """Map (n, tokens, width) to the same shape."""
    width = x.shape[-1]
    qkv = _dense(3 * width, name="qkv")(_norm(name="norm1")(x))
    attended = _dense(width, name="proj")(attention(qkv, width // HEAD))
    x = x + attended * self.param("scale1", nn.initializers.ones, (width,))[None, None]
    hidden = _norm(name="norm2")(x)
    if self.gated:
      gate, hidden = jnp.split(_dense(2 * self.hidden, name="fc1")(hidden), 2, axis=-1)
      hidden = nn.silu(gate) * hidden
    else:
      hidden = nn.gelu(_dense(self.hidden, name="fc1")(hidden), approximate=False)
    return x + _dense(width, name="fc2")(hidden) * self.param("scale2", nn.initializers.ones, (width,))[None, None]


def attention(qkv: jax.Array, heads: int) -> jax.Array:
  """Return the softmax attention of all tokens to all tokens (Vaswani et al. 2017, eq. 1).

  Args:
    qkv: (n, tokens, 3 * width): queries, keys and values, each by head.
    heads: number of heads.

  Returns:
    (n, tokens, width).

  >>> attention(jnp.ones((2, 5, 12)), heads=2).shape
  (2, 5, 4)
  """
  n, tokens, width = qkv.shape
  query, key, value = jnp.moveaxis(qkv.reshape(n, tokens, 3, heads, width // 3 // heads), 2, 0)
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  weights = jax.nn.softmax(product("nqhc,nkhc->nhqk", query, key) / math.sqrt(query.shape[-1]), axis=-1)
  return product("nhqk,nkhc->nqhc", weights, value).reshape(n, tokens, width // 3)


class VisionTransformer(nn.Module):
  """DINOv2's network for images of one size.

  Args:
    width: channels of a token, a multiple of 64.
    depth: number of blocks.
    hidden: the width of the small network in a block.
    gated: whether that is SwiGLU, as in the size g.
    registers: number of register tokens (Darcet et al. 2023, arXiv:2309.16588).
  """

  width: int
  depth: int
  hidden: int
  gated: bool
  registers: int

  @nn.compact
  def __call__(self, x):
    """Return the class token.

    Args:
      x: (n, h, w, 3), normalised; the sides are multiples of 14.

    Returns:
      (n, width).
    """
    side = (PATCH, PATCH)
    patches = nn.Conv(self.width, side, side, "VALID", precision=jax.lax.Precision.HIGHEST, name="patches")(x)
    n, rows, columns, width = patches.shape
    patches = patches.reshape(n, rows * columns, width)
    normal = nn.initializers.normal(0.02)
    token = self.param("token", normal, (1, 1, width))
    tokens = jnp.concatenate([jnp.broadcast_to(token, (n, 1, width)), patches], axis=1)
    tokens = tokens + self.param("positions", normal, (1, 1 + rows * columns, width))
    if self.registers:
      registers = self.param("registers", normal, (1, self.registers, width))
      registers = jnp.broadcast_to(registers, (n, self.registers, width))
      tokens = jnp.concatenate([tokens[:, :1], registers, tokens[:, 1:]], axis=1)
    for number in range(self.depth):
      tokens = Block(self.hidden, self.gated, name=f"block_{number}")(tokens)
    return _norm(name="norm")(tokens[:, 0])


def dinov2(weights: PathLike, preprocess: str = "crop", positions: str = "meta") -> Features:
  """Features of DINOv2, whose weights you have downloaded; FD-DINOv2 is the Fréchet distance of them.

  Args:
    weights: the file: ``.pth``, ``.pt`` or ``.safetensors``, with the names of Meta or of Hugging Face. The size of the
      network is found from the shapes.
    preprocess: ``"crop"``: the shorter side is resized to 256 pixels by Pillow's bicubic filter, and the central 224
      times 224 are taken, as DINOv2 was published. ``"squash"``: both sides are resized to 224, as in Stein et al.'s
      ``dgm-eval`` and in EDM2's FD-DINOv2 (Karras et al. 2023, arXiv:2312.02696), whose published figures use the size
      L. Both filters overshoot: here, what lies outside 0 to 255 is clipped; EDM2 keeps it, ``dgm-eval`` clips and
      rounds it.
    positions: how the embeddings of positions, of 37 times 37 patches in published files, become those of 16 times 16.
      ``"meta"``: by PyTorch's bicubic filter as Meta's code calls it: without antialiasing and with a grid 0.1 larger
      than the patches; with antialiasing and without the 0.1 if there are registers. ``"huggingface"``: the same
      without the 0.1. Figures are published with Meta's.

  Returns:
    Features with the output ``pool``: the class token after the last normalisation, of 384 (S), 768 (B), 1,024 (L) or
    1,536 numbers (g).

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file does not hold the weights of such a network, or a name is unknown.
  """
  resize = checks.lookup("preprocess", preprocess, PREPROCESS)
  offset = checks.lookup("positions", positions, {"meta": 0.1, "huggingface": 0.0})
  path = Path(weights)
  network, params = _load(path, offset)
  options = [f"preprocess={preprocess}"] * (preprocess != "crop") + [f"positions={positions}"] * (positions != "meta")
  sizes = {384: "S", 768: "B", 1024: "L", 1536: "g"}
  return Features(
    name=":".join(["dinov2", *filter(None, [",".join(options)])]),
    version=VERSION,
    weights=files.digest(path),
    function=_Function(network),
    params={"params": params},
    resize=resize,
    channels=3,
    title=f"DINOv2 {sizes.get(network.width, f'of width {network.width}')}",
  )


@dataclasses.dataclass(frozen=True)
class _Function:
  network: VisionTransformer

  def __call__(self, params: PyTree, images: jax.Array) -> Mapping[str, jax.Array]:
    """Return the output of images in [0, 255]."""
    mean, std = (jnp.asarray(values)[None, None, None] for values in (MEAN, STD))
    return {"pool": self.network.apply(params, (images / 255 - mean) / std)}  # type: ignore[dict-item]


# --- positions ------------------------------------------------------------------------------------


def bicubic(n_in: int, n_out: int, offset: float = 0.0) -> np.ndarray:
  """Return the matrix of PyTorch's bicubic ``interpolate`` without antialiasing.

  Row ``i`` is Keys' filter with a = -3/4, centred at ``(i + 1/2) n_in / (n_out + offset) - 1/2``. Outside the border
  the last pixel is repeated.

  Args:
    n_in: number of pixels before.
    n_out: number of pixels after.
    offset: what Meta's code adds to ``n_out`` where the scale is computed.

  Returns:
    float64 of shape (n_out, n_in). Each row sums to 1.

  >>> bicubic(2, 2)
  array([[1., 0.],
         [0., 1.]])
  """
  centres = (np.arange(n_out) + 0.5) * n_in / (n_out + offset) - 0.5
  matrix = np.zeros((n_out, n_in))
  for shift in range(-1, 3):
    pixels = np.floor(centres).astype(int) + shift
    distance = np.abs(centres - pixels)
    near = 1.25 * distance**3 - 2.25 * distance**2 + 1
    far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    np.add.at(matrix, (np.arange(n_out), pixels.clip(0, n_in - 1)), np.where(distance < 1, near, far))
  return matrix


def _resized(positions: np.ndarray, side: int, registers: int, offset: float) -> np.ndarray:
  """Resize embeddings of positions (1, 1 + n * n, width), the first of them that of the class token."""
  before = math.isqrt(positions.shape[1] - 1)
  if before == side:
    return positions
  matrix = pillow(before, side) if registers else bicubic(before, side, offset)
  grid = positions[0, 1:].reshape(before, before, -1).astype(np.float64)
  grid = np.einsum("yr,rcw->ycw", matrix, np.einsum("xc,rcw->rxw", matrix, grid))
  return np.concatenate([positions[:, :1], grid.reshape(1, side * side, -1).astype(np.float32)], axis=1)


# --- files ----------------------------------------------------------------------------------------

HUGGING_FACE = (
  (r"embeddings\.cls_token", "cls_token"),
  (r"embeddings\.mask_token", "mask_token"),
  (r"embeddings\.register_tokens", "register_tokens"),
  (r"embeddings\.position_embeddings", "pos_embed"),
  (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
  (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attn.proj"),
  (r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)", r"blocks.\1.attn.\2"),
  (r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1", r"blocks.\1.ls\2.gamma"),
  (r"encoder\.layer\.(\d+)\.mlp\.weights_in", r"blocks.\1.mlp.w12"),
  (r"encoder\.layer\.(\d+)\.mlp\.weights_out", r"blocks.\1.mlp.w3"),
  (r"encoder\.layer\.(\d+)\.(mlp\.fc\d|norm\d)", r"blocks.\1.\2"),
  (r"layernorm", "norm"),
)
"""Hugging Face's names as patterns, and Meta's."""


def _meta_name(name: str) -> str:
  """Return Meta's name of a tensor; any name that is not Hugging Face's stays."""
  name = name.removeprefix("dinov2.").removeprefix("dinov2_with_registers.")
  stem, dot, last = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
  for pattern, meta in HUGGING_FACE:
    match = re.fullmatch(pattern, stem)
    if match:
      return match.expand(meta) + dot + last
  return name


def _load(path: Path, offset: float) -> tuple[VisionTransformer, PyTree]:
  """Read a file: the network that its shapes belong to, and the parameters."""
  found = {_meta_name(name): tensor for name, tensor in state_dicts.read(path).items()}
  network, side = _structure(path, found)
  width, hidden = network.width, network.hidden
  separate = "blocks.0.attn.query.weight" in found
  gated = network.gated
  parts = ("query", "key", "value") if separate else ("qkv",)
  # Meta's names of a block's layers: ours, inputs and outputs.
  layers = {
    **{f"attn.{part}": ("qkv", width, 3 * width // len(parts)) for part in parts},
    "attn.proj": ("proj", width, width),
    "mlp.w12" if gated else "mlp.fc1": ("fc1", width, (1 + gated) * hidden),
    "mlp.w3" if gated else "mlp.fc2": ("fc2", hidden, width),
  }
  expected: dict[str, tuple[int, ...]] = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, 1 + side * side, width),
    "patch_embed.proj.weight": (width, 3, PATCH, PATCH),
    "patch_embed.proj.bias": (width,),
    "norm.weight": (width,),
    "norm.bias": (width,),
  }
  if network.registers:
    expected["register_tokens"] = (1, network.registers, width)
  for block in (f"blocks.{number}" for number in range(network.depth)):
    vectors = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    expected.update({f"{block}.{name}": (width,) for name in vectors})
    for name, (_, inputs, outputs) in layers.items():
      expected.update({f"{block}.{name}.weight": (outputs, inputs), f"{block}.{name}.bias": (outputs,)})
  files.check(path, "DINOv2", found, expected, unused=("mask_token",))

  def read(name: str) -> np.ndarray:
    return files.read(path, name, found[name])

  def joined(block: str, ours: str, last: str) -> np.ndarray:
    return np.concatenate([read(f"{block}.{name}.{last}") for name, (layer, *_) in layers.items() if layer == ours])

  params = {
    "token": read("cls_token"),
    "positions": _resized(read("pos_embed"), SIZE // PATCH, network.registers, offset),
    "patches/kernel": read("patch_embed.proj.weight").transpose(2, 3, 1, 0),
    "patches/bias": read("patch_embed.proj.bias"),
    "norm/scale": read("norm.weight"),
    "norm/bias": read("norm.bias"),
  }
  if network.registers:
    params["registers"] = read("register_tokens")
  for number in range(network.depth):
    ours, block = f"block_{number}", f"blocks.{number}"
    for layer in ("qkv", "proj", "fc1", "fc2"):
      params[f"{ours}/{layer}/kernel"] = joined(block, layer, "weight").T
      params[f"{ours}/{layer}/bias"] = joined(block, layer, "bias")
    for which in ("1", "2"):
      params[f"{ours}/norm{which}/scale"] = read(f"{block}.norm{which}.weight")
      params[f"{ours}/norm{which}/bias"] = read(f"{block}.norm{which}.bias")
      params[f"{ours}/scale{which}"] = read(f"{block}.ls{which}.gamma")
  return network, unflatten_dict(params, sep="/")


def _structure(path: Path, tensors: Mapping[str, state_dicts.Tensor]) -> tuple[VisionTransformer, int]:
  """Return the network that shapes belong to, and the patches along a side of its images in training."""
  gated = "blocks.0.mlp.w3.weight" in tensors
  ends = [tensors.get(name) for name in ("pos_embed", "blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight")]
  positions, last = (tensor.shape if tensor is not None else () for tensor in ends)
  if len(positions) != 3 or len(last) != 2 or positions[2] % HEAD or positions[1] < 2:
    raise ValueError(
      f"{path} does not hold the weights of DINOv2: it has no embeddings of positions and first block of a width that "
      f"is a multiple of {HEAD}, by Meta's names (pos_embed, blocks.0.mlp.fc2.weight) or Hugging Face's; it has "
      f"{', '.join(list(tensors)[:3])}, ..."
    )
  numbers = [int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", name) for name in tensors) if match]
  registers = tensors["register_tokens"].shape[-2] if "register_tokens" in tensors else 0
  depth = len({*numbers})
  return VisionTransformer(positions[2], depth, last[1], gated, registers), math.isqrt(positions[1] - 1)
