"""What makes a network worse on purpose, with the same parameters: a weak model for guidance that costs no training."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.typing import Array, Float, PyTree

# What a kind can be done to: the submodule by which the parameters tell such a block.
ATTENTION = {"attention": "qkv"}
KINDS = {"identity": ATTENTION, "smooth": ATTENTION, "skip": {"residual": "out_layers_3", **ATTENTION}}


@dataclasses.dataclass(frozen=True)
class Perturbation:
  """What is done to some blocks of a `UNet`, for `jaxguide.perturbed`.

  It is part of a network's configuration, hashed and compared by value, so that each value of it is one compiled
  program. That holds for ``width`` too: it decides how large a kernel is, and an infinite one costs less attention than
  any other. What sweeps without compiling is the scale of the guidance.

  Args:
    kind: what is done.

      - ``identity``: each pixel attends to itself alone. Perturbed-attention guidance (PAG; Ahn et al. 2024,
        arXiv:2403.17377), and the attention skip of spatiotemporal skip guidance (Hyung et al. 2024, arXiv:2411.18664).
      - ``smooth``: the queries are blurred over the pixels, and so are the attention's weights before the softmax,
        which flattens its energy. Smoothed energy guidance (SEG; Hong 2024, arXiv:2408.00760).
      - ``skip``: what a block adds to its input is left out. Skip layer guidance, as Stable Diffusion 3.5 has it, and
        the residual skip of Hyung et al.
    blocks: names of the blocks, as the parameters have them; only attention blocks, unless they are skipped. A residual
      block that is skipped still resamples, and changes channels by its 1x1 convolution. For the ImageNet-256 network
      of Dhariwal & Nichol PAG's code has ``input_blocks_14_1``, ``input_blocks_16_1``, ``input_blocks_17_1`` and
      ``middle_block_1``; for Stable Diffusion PAG and SEG take the middle.
    width: standard deviation of the blur in pixels of the block's own map, for ``smooth`` alone. If it is infinite, as
      SEG has it unless told otherwise, one mean query serves every pixel; up to 1/6 nothing is blurred. The kernel is
      that of SEG's code: cut off after three deviations and where it would be wider than the map, whose sides reflect,
      so that not even a very wide one is the mean.

  Raises:
    ValueError: for a kind that is not known, no block, a width that is not above 0, or one for another kind than
      ``smooth``.

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
      raise ValueError(f"width is for the perturbation 'smooth': leave it out for {self.kind!r}, got {self.width}")

  def check(self, params: PyTree) -> None:
    """Raise ValueError where a block is none of the network with these parameters, or not one of this kind."""
    fits = KINDS[self.kind]
    table: dict[str, None] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
      *_, block, part, _ = ("", "", *jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
      if part in fits.values():
        table[block] = None
    for name in self.blocks:
      checks.lookup(f"{' or '.join(fits)} block", name, table)


def blur_matrix(side: int, width: int | float) -> np.ndarray:
  """Give the matrix that blurs one axis of ``side`` pixels by a Gaussian, as `Perturbation` says.

  >>> blur_matrix(4, 0.5).round(2).tolist()
  [[0.79, 0.21, 0.0, 0.0], [0.11, 0.79, 0.11, 0.0], [0.0, 0.11, 0.79, 0.11], [0.0, 0.0, 0.21, 0.79]]
  """
  # Half of the odd one of ceil(6 width) and the next, and at most of the odd one of side and the next.
  half = min(math.ceil(6 * width), side) // 2
  offsets = np.arange(-half, half + 1)
  weights = np.exp(-0.5 * np.square(offsets / width))
  pixels = np.arange(side)[:, None] + offsets
  # Reflected about the centre of the last pixel.
  pixels = side - 1 - np.abs(side - 1 - np.abs(pixels))
  matrix = np.zeros((side, side))
  np.add.at(matrix, (np.arange(side)[:, None], pixels), weights / weights.sum())
  return matrix


def smooth(q: Float[Array, "n h w heads c"], width: int | float) -> Float[Array, "n hh ww heads c"]:
  """Blur queries over the pixels, in float32; an infinite width gives one pixel, their mean."""
  if width == math.inf:
    return q.mean((1, 2), keepdims=True)
  rows, columns = (jnp.asarray(blur_matrix(side, width), jnp.float32) for side in q.shape[1:3])
  return jnp.einsum("ih,jw,nhwkc->nijkc", rows, columns, q.astype(jnp.float32)).astype(q.dtype)
