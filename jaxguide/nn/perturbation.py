"""Perturbations that make a network worse on purpose without changing its parameters.

The perturbed network is a weak model for guidance that needs no training.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.typing import Array, Float, PyTree

# The blocks that each kind of perturbation applies to: name of the block type -> the submodules of which one identifies
# such a block among the parameters. A UNet's attention block holds ``qkv``, a transformer's block ``attn/qkv``.
BlockTypes = dict[str, tuple[str, ...]]
ATTENTION: BlockTypes = {"attention": ("attn/qkv", "qkv", "attn_qkv")}
RESIDUAL: BlockTypes = {"residual": ("out_layers_3", "conv1", "conv_res1"), **ATTENTION}
KINDS: dict[str, BlockTypes] = {"identity": ATTENTION, "smooth": ATTENTION, "skip": RESIDUAL}


@dataclasses.dataclass(frozen=True)
class Perturbation:
  """A perturbation of some blocks of a `UNet` or a transformer, for `jaxguide.perturbed`.

  It is a static part of a network's configuration, hashed and compared by value: each value, also of ``width``, needs
  its own compiled program. (The width sets the size of the blur kernel, and an infinite width needs less attention than
  any other.) The guidance scale, in contrast, can change without a new compilation.

  Args:
    kind: the kind of perturbation.

      - ``identity``: each pixel or token attends to itself only. Used in perturbed-attention guidance (PAG; Ahn et al.
        2024, arXiv:2403.17377) and as the attention skip of spatiotemporal skip guidance (Hyung et al. 2024,
        arXiv:2411.18664).
      - ``smooth``: the queries are blurred over the pixels. This also blurs the attention weights before the softmax
        and so flattens the attention energy. Smoothed energy guidance (SEG; Hong 2024, arXiv:2408.00760).
      - ``skip``: a block's residual is left out; of a transformer, the whole block. Skip layer guidance, as in Stable
        Diffusion 3.5, and the residual skip of Hyung et al.
    blocks: names of the blocks, as in the parameters. ``identity`` and ``smooth`` accept attention blocks only,
      ``skip`` also residual blocks. A skipped residual block still resamples, and still changes the number of channels
      by its 1x1 convolution. For the ImageNet-256 network of Dhariwal & Nichol, PAG's code uses ``input_blocks_14_1``,
      ``input_blocks_16_1``, ``input_blocks_17_1`` and ``middle_block_1``; for Stable Diffusion, PAG and SEG use the
      middle block. A transformer's blocks are ``blocks_0``, ``blocks_1`` and so on; the rules are those of diffusers'
      guiders, and a smooth query is blurred before it is normalised and turned.
    width: standard deviation of the blur in pixels of the block's feature map, for ``smooth`` only. If it is infinite
      (SEG's default), all queries are replaced by their mean; a width of up to 1/6 has no effect. The kernel is that of
      SEG's code: it is cut off after three standard deviations, and where it would be wider than the feature map, whose
      sides reflect. Therefore even a very large finite width does not equal the mean.

  Raises:
    ValueError: if the kind is unknown, no block is named, the width is not above 0, or a width is given for another
      kind than ``smooth``.

  >>> Perturbation("skip", ["middle_block_0", "middle_block_1"]).blocks
  ('middle_block_0', 'middle_block_1')
  """

  kind: str = "identity"
  blocks: Sequence[str] = ("middle_block_1",)
  width: float | int = math.inf

  def __post_init__(self):
    checks.lookup("perturbation", self.kind, KINDS)
    object.__setattr__(self, "blocks", (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks))
    if not self.blocks:
      raise ValueError("a perturbation needs the name of at least one block, got none")
    object.__setattr__(self, "width", checks.above("width", self.width, 0))
    if self.kind != "smooth" and self.width != math.inf:
      raise ValueError(f"only the perturbation 'smooth' has a width: leave it out for {self.kind!r}, got {self.width}")

  def check(self, params: PyTree, perturbable: Mapping[str, Sequence[str]] | None = None) -> None:
    """Raise ValueError unless the network with these parameters has all named blocks, each of a suitable type.

    Args:
      params: the parameters, whose names show which blocks there are.
      perturbable: the names of the blocks by kind, if the network says them itself.
    """
    if perturbable is not None:
      checks.lookup("perturbation of this network", self.kind, perturbable)
      for name in self.blocks:
        checks.lookup(f"block for {self.kind!r}", name, dict.fromkeys(perturbable[self.kind]))
      return
    block_types = KINDS[self.kind]
    suitable: dict[str, None] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
      modules = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[0]
      for part in (part for parts in block_types.values() for part in parts):
        if modules.endswith(f"/{part}"):
          suitable[modules.removesuffix(f"/{part}").rpartition("/")[2]] = None
          break
    for name in self.blocks:
      checks.lookup(f"{' or '.join(block_types)} block", name, suitable)


def blur_matrix(side: int, width: int | float) -> np.ndarray:
  """Return the (side, side) matrix of a Gaussian blur along one axis, with the kernel described in `Perturbation`.

  >>> blur_matrix(4, 0.5).round(2).tolist()
  [[0.79, 0.21, 0.0, 0.0], [0.11, 0.79, 0.11, 0.0], [0.0, 0.11, 0.79, 0.11], [0.0, 0.0, 0.21, 0.79]]
  """
  # The kernel has 2 half + 1 pixels: ceil(6 width), rounded up to an odd number, but at most the side, also rounded up.
  half = min(math.ceil(6 * width), side) // 2
  offsets = np.arange(-half, half + 1)
  weights = np.exp(-0.5 * np.square(offsets / width))
  pixels = np.arange(side)[:, None] + offsets
  # Indices outside the map are reflected about the centre of the first or the last pixel.
  pixels = side - 1 - np.abs(side - 1 - np.abs(pixels))
  matrix = np.zeros((side, side))
  np.add.at(matrix, (np.arange(side)[:, None], pixels), weights / weights.sum())
  return matrix


def smooth(q: Float[Array, "n h w heads c"], width: int | float) -> Float[Array, "n hh ww heads c"]:
  """Blur queries over the pixels, in float32. With an infinite width the result is one pixel, the mean."""
  if width == math.inf:
    return q.mean((1, 2), keepdims=True)
  rows, columns = (jnp.asarray(blur_matrix(side, width), jnp.float32) for side in q.shape[1:3])
  return jnp.einsum("ih,jw,nhwkc->nijkc", rows, columns, q.astype(jnp.float32)).astype(q.dtype)
