"""DiT under the names of diffusers' DiTTransformer2DModel.

It is the same network with three differences, which the configuration holds: each block has embedders of its own, of
time and label (in published files all hold the same numbers); their frequencies are spaced a little wider; and a
block's second normalisation adds 1e-5 to the variance. Queries, keys and values are three layers there and one here.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import dit, layouts
from jaxguide.models.importers.families import Family

BLOCK = "transformer_blocks"

# Their names within a block, and ours.
_IN_BLOCK = {
  "norm1.linear": "adaLN_modulation.1",
  "attn1.to_out.0": "attn.proj",
  "ff.net.0.proj": "mlp.fc1",
  "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {
  "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
  "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_TABLE = "norm1.emb.class_embedder.embedding_table.weight"
_OUTSIDE = {
  "pos_embed.proj": "x_embedder.proj",
  "proj_out_1": "final_layer.adaLN_modulation.1",
  "proj_out_2": "final_layer.linear",
}
POSITIONS = "pos_embed.pos_embed"


@dataclasses.dataclass(frozen=True)
class Joined:
  """Tensors one below the other, read when they are converted to an array.

  Args:
    parts: the tensors.
  """

  parts: tuple[Any, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the whole."""
    return (sum(np.shape(part)[0] for part in self.parts), *np.shape(self.parts[0])[1:])

  @property
  def dtype(self) -> Any:
    """The type that the tensors are stored in."""
    return self.parts[0].dtype

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Read the tensors."""
    del copy
    return np.concatenate([np.asarray(part) for part in self.parts]).astype(dtype or np.float32, copy=False)


def names(depth: int, bias: bool, per_block: bool) -> dict[str, tuple[str, ...]]:
  """Return the names there of each tensor of DiT: three for queries, keys and values, otherwise one.

  Args:
    depth: number of blocks.
    bias: whether queries, keys and values have a bias.
    per_block: whether the blocks' embedders stay apart; if not, the embedders of all blocks are listed under one.
  """
  kinds = ("weight", "bias")
  found: dict[str, tuple[str, ...]]
  found = {f"{ours}.{kind}": (f"{theirs}.{kind}",) for theirs, ours in _OUTSIDE.items() for kind in kinds}
  for number in range(depth):
    there, here = f"{BLOCK}.{number}", f"blocks.{number}"
    for theirs, ours in _IN_BLOCK.items():
      found |= {f"{here}.{ours}.{kind}": (f"{there}.{theirs}.{kind}",) for kind in kinds}
    for kind in kinds[: 1 + bias]:
      found[f"{here}.attn.qkv.{kind}"] = tuple(f"{there}.attn1.to_{part}.{kind}" for part in "qkv")
    part = f"s.{number}" if per_block else ""
    of_block = {f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in _EMBEDDERS.items() for kind in kinds}
    for ours, theirs in {**of_block, dit.LABELS: _TABLE}.items():
      name = ours.replace("embedder", f"embedder{part}", 1)
      found[name] = (*found.get(name, ()), f"{there}.{theirs}")
  return found


def prepare(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Give the tensors of diffusers' network the names of DiT. Embedders that are all the same become one.

  Raises:
    ValueError: if names are missing or unknown, naming the first.
  """
  depth = dit.depth_of(tensors, BLOCK)
  bias = any(".attn1.to_" in name and name.endswith((".to_q.bias", ".to_k.bias", ".to_v.bias")) for name in tensors)
  table = names(depth, bias, per_block=True)
  expected = [name for theirs in table.values() for name in theirs]
  missing = [name for name in expected if name not in tensors]
  unknown = [name for name in tensors if name not in set(expected) | {POSITIONS}]
  if missing or unknown:
    problems = [f"{len(each)} {what} ({layouts.first(each)})" for each, what in ((missing, "missing"),) if each]
    problems += [f"{len(each)} unknown ({layouts.first(each)})" for each in (unknown,) if each]
    raise ValueError(
      f"the weights do not fit diffusers' DiTTransformer2DModel of {depth} blocks: {', '.join(problems)}"
    )
  for theirs in table.values():
    shapes = {np.shape(tensors[each]) for each in theirs}
    if len(shapes) > 1:
      raise ValueError(f"the weights do not fit: {', '.join(theirs)} must have one shape, got {sorted(shapes)}")
  shared = names(depth, bias, per_block=False)
  same = {name: theirs for name, theirs in shared.items() if "_embedder." in name and name not in table}
  if all(_all_same([tensors[each] for each in theirs]) for theirs in same.values()):
    table = {name: theirs[:1] if name in same else theirs for name, theirs in shared.items()}
  found = {
    name: Joined(tuple(tensors[each] for each in theirs)) if len(theirs) > 1 else tensors[theirs[0]]
    for name, theirs in table.items()
  }
  return {**found, **({"pos_embed": tensors[POSITIONS]} if POSITIONS in tensors else {})}


def _all_same(tensors: list[Any]) -> bool:
  first = np.asarray(tensors[0])
  return all(np.array_equal(first, np.asarray(each)) for each in tensors[1:])


def infer(
  tensors: Mapping[str, Any],
  heads: int | None = None,
  image_size: Any = None,
  null_class: bool = True,
  encoder: str | None = None,
) -> ModelConfig:
  """Return the configuration; as `jaxguide.models.importers.dit.infer`."""
  per_block = "t_embedders.0.mlp.0.weight" in tensors
  seen = {**tensors, dit.LABELS: tensors["y_embedders.0.embedding_table.weight"]} if per_block else tensors
  config = dit.infer("dit", seen, heads, image_size, null_class, encoder)
  own = {
    "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    "norm_eps": 1e-5,
    "freq_shift": 1,
    "embedder_per_block": per_block,
  }
  return dataclasses.replace(config, fields={**config.fields, **own})


def restore(state_dict: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """Give the tensors of DiT diffusers' names.

  Raises:
    ValueError: if diffusers' network has another table of positions, or no network without labels.
  """
  module: Any = config.module
  if config.num_classes is None:
    raise ValueError("diffusers' DiTTransformer2DModel has labels, and this network has none: use --family dit")
  table = dit.complete({}, config)["pos_embed"]
  if not np.allclose(state_dict["pos_embed"], table, atol=1e-5):
    raise ValueError("diffusers' network computes its positions, and this one has others: use --family dit")
  found: dict[str, Any] = {}
  for name, theirs in names(module.depth, module.qkv_bias, module.embedder_per_block).items():
    copies = name.startswith(("t_embedder.", "y_embedder."))
    parts = [state_dict[name]] * len(theirs) if copies else np.split(state_dict[name], len(theirs))
    found |= {each: np.array(part) for each, part in zip(theirs, parts, strict=True)}
  return found


def usage(config: ModelConfig) -> list[str]:
  """Return how exported weights are used in diffusers, in lines."""
  module: Any = config.module
  height, width, channels = config.image_shape
  labels = config.num_classes if module.null_class else f"{config.num_classes} - 1"
  lines = [
    "The network that takes it:\n"
    f"DiTTransformer2DModel(num_attention_heads={module.num_heads}, "
    f"attention_head_dim={module.hidden_size // module.num_heads}, in_channels={channels}, "
    f"out_channels={channels * (1 + module.learned_variance)}, num_layers={module.depth}, sample_size={height}, "
    f"patch_size={module.patch_size}, attention_bias={module.qkv_bias}, num_embeds_ada_norm={labels})"
  ]
  if height != width:
    lines.append(f"Note: diffusers' network takes square images, and these are {height}x{width}.")
  if not module.freq_shift or module.norm_eps != 1e-5:
    lines.append(
      "Note: diffusers' network has other frequencies of the time and another eps, so its results differ a little from "
      "those of this one, which computes as the original does."
    )
  return lines


def claims(names: Collection[str]) -> bool:
  """Return whether names are those of diffusers' network."""
  return any(name.startswith(f"{BLOCK}.") and ".norm1.emb." in name for name in names) or (
    "proj_out_1.weight" in names and "proj_out_2.weight" in names
  )


FAMILY = Family(
  name="dit-diffusers",
  title="DiT of diffusers",
  networks=("dit",),
  claims=claims,
  infer=infer,
  layout=dit.layout,
  settings=dit.SETTINGS,
  usage=usage,
  prepare=prepare,
  restore=restore,
  complete=dit.complete,
)
"""DiTTransformer2DModel."""
