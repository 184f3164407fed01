"""DiT, SiT, REPA's SiT and LightningDiT: names, layouts and settings of their published state dicts.

The weight ``blocks.3.attn.qkv.weight`` is the ``kernel`` of ``blocks_3/attn/qkv`` here, transposed. All four have the
same names where they have the same parts. Projectors show REPA; rotary tables, a gated ``mlp.w12``, weights of RMSNorm
or blocks without shift show LightningDiT. Otherwise the same names and shapes can be any of them.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxguide._core import checks
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import layouts
from jaxguide.models.importers.families import Family

HEADS = "number of attention heads"
SIZE = "side of the images or latents in pixels, or [height, width]"

SETTINGS = {
  "heads": HEADS,
  "image_size": SIZE,
  "null_class": "whether the last row of the table of labels means no label; true by default, as published",
  "encoder": "pixels or latents; pixels by default for 1 and 3 channels",
}

PATCHES = "x_embedder.proj.weight"
LABELS = "y_embedder.embedding_table.weight"
LAST = "final_layer.linear.weight"


def layout(config: ModelConfig) -> dict[str, layouts.Weight]:
  """Return the weights of a network's state dict by their names there."""
  found = {}
  for path, ours in layouts.paths(config).items():
    *modules, kind = path
    theirs = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, kind)
    found[".".join([*(re.sub(r"_(?=\d)", ".", module) for module in modules), theirs])] = layouts.weight(path, ours)
  return found


def depth_of(names: Collection[str], prefix: str = "blocks") -> int:
  """Return the number of blocks.

  Raises:
    ValueError: if there is none, or a number is beyond the number of names.
  """
  numbers = [int(found[1]) for name in names if (found := re.match(rf"{prefix}\.(\d+)\.", name))]
  if not numbers:
    raise ValueError(f"the weights are incomplete: they have no {prefix}.0")
  return layouts.counted(prefix, numbers, names)


def needed(tensors: Mapping[str, Any], *names: str) -> list[tuple[int, ...]]:
  """Return the shapes of tensors from which the configuration is read.

  Raises:
    ValueError: if one is missing, or has not as many axes as its name says.
  """
  missing = [name for name in names if name not in tensors]
  if missing:
    raise ValueError(f"the weights are incomplete: {layouts.first(missing)} missing")
  shapes = [tuple(np.shape(tensors[name])) for name in names]
  for name, shape in zip(names, shapes, strict=True):
    if len(shape) != (4 if name == PATCHES else 2) or 0 in shape:
      raise ValueError(f"{name} has shape {shape}, which is not that of a weight of this name")
  return shapes


def sides(tensors: Mapping[str, Any], patch_size: int, image_size: Any) -> tuple[int, int]:
  """Return height and width of the images, from the tables of positions or as given; one of both there must be.

  Raises:
    ValueError: if the size does not fit the tables.
  """
  tokens = None
  for name, axis in (("pos_embed", 1), ("feat_rope.freqs_cos", 0)):
    if name in tensors and tokens is None:
      shape = tuple(np.shape(tensors[name]))
      if len(shape) != 2 + axis:
        raise ValueError(f"{name} has shape {shape}, which is not that of a table of positions")
      tokens = shape[axis]
  if image_size is None:
    side = layouts.square(tokens or 0, "the table of positions") * patch_size
    return side, side
  given = list(image_size) if isinstance(image_size, list | tuple) else [image_size] * 2
  if len(given) != 2:
    raise ValueError(f"image_size must be a number or [height, width], got {image_size}")
  height, width = (checks.whole("image_size", side, patch_size, 2**16) for side in given)
  if height % patch_size or width % patch_size or tokens not in (None, height * width // patch_size**2):
    count = "" if tokens is None else f", of which the table of positions has {tokens}"
    raise ValueError(f"image_size {image_size} does not give whole patches of {patch_size}x{patch_size}{count}")
  return height, width


def ratio(hidden: int, width: int, swiglu: bool) -> float:
  """Return the ``mlp_ratio`` that gives a hidden width.

  Raises:
    ValueError: if there is none.

  >>> ratio(32, 128, False), ratio(32, 85, True)
  (4.0, 4.0)
  """
  from jaxguide.nn.dit.layers import mlp_width

  whole = range(width, 2 * width + 2) if swiglu else range(width, width + 1)
  fitting = [each for each in whole if int(2 / 3 * each) == width] if swiglu else list(whole)
  # A multiple of the tokens' width first, then the shortest fraction.
  for full in sorted(fitting, key=lambda each: (each / hidden).as_integer_ratio()[1]):
    for candidate in (full / hidden, float(np.nextafter(full / hidden, np.inf))):
      if mlp_width(hidden, candidate, swiglu) == width:
        return candidate
  raise ValueError(f"no mlp_ratio gives the hidden width {width} for tokens of {hidden} numbers")


def infer(
  network: str,
  tensors: Mapping[str, Any],
  heads: int | None = None,
  image_size: Any = None,
  null_class: bool = True,
  encoder: str | None = None,
  encoder_depth: int | None = None,
) -> ModelConfig:
  """Return the configuration of a network from the names and shapes of its weights.

  Args:
    network: ``dit``, ``sit``, ``repa`` or ``lightningdit``.
    tensors: the tensors by name.
    heads: number of attention heads. Normalised queries and rotary tables show it.
    image_size: side of the images, or (height, width). A table of positions shows it where the image is square.
    null_class: whether the last label means "no label".
    encoder: ``pixels`` or ``latents``.
    encoder_depth: the block whose tokens REPA's projectors take; 8 by default, as published.

  Raises:
    ValueError: if a name is missing, a setting is missing or contradicts the tensors.
  """
  gated = "blocks.0.mlp.w12.weight" in tensors
  second = "blocks.0.mlp.w3.weight" if gated else "blocks.0.mlp.fc2.weight"
  vectors = "blocks.0.adaLN_modulation.1.weight"
  (hidden, channels, patch, _), (_, width), (modulated, _) = needed(tensors, PATCHES, second, vectors)
  ((out, _),) = needed(tensors, LAST)
  labels = needed(tensors, LABELS)[0][0] if LABELS in tensors else None
  if not isinstance(null_class, bool):
    raise ValueError(f"null_class must be true or false, got {null_class!r}")
  if labels is not None and labels - null_class < 1:
    raise ValueError(f"{LABELS} has {labels} row, the null label alone: give --field null_class=false")
  per_patch, rest = divmod(out, patch**2 * channels)
  if rest or per_patch not in (1, 2):
    raise ValueError(
      f"{LAST} gives {out} numbers for each patch, expected once or twice the {patch**2 * channels} of the input"
    )
  shown = [np.shape(tensors[name])[-1] for name in ("blocks.0.attn.q_norm.weight", ROPE) if name in tensors]
  needs = {} if shown else {"heads": HEADS}
  if not {"pos_embed", ROPE} & tensors.keys():
    needs["image_size"] = SIZE
  layouts.required({"heads": heads, "image_size": image_size}, needs)
  size = sides(tensors, patch, image_size)
  fields: dict[str, Any] = {
    "patch_size": patch,
    "hidden_size": hidden,
    "depth": depth_of(tensors),
    "mlp_ratio": ratio(hidden, width, gated),
    "learn_sigma": per_patch == 2,
    "null_class": null_class,
  }
  if shown:
    if heads is not None and heads * shown[0] != hidden:
      raise ValueError(f"heads is {heads}, but the weights show heads of {shown[0]} channels of {hidden}")
    heads = hidden // shown[0]
  fields["num_heads"] = heads
  settings: dict[str, Any] = {"prediction": "flow_to_data", "schedule": "flow"}
  if network == "dit":
    settings = {"prediction": "eps", "schedule": "linear", "diffusion_steps": 1000}
    settings["variance"] = "learned_range" if per_patch == 2 else "large"
  if network == "repa":
    settings |= {"prediction": "flow", "time_scale": 1.0}
    fields |= _projectors(tensors, fields["depth"], encoder_depth)
    fields["qk_norm"] = "blocks.0.attn.q_norm.weight" in tensors
  if network == "lightningdit":
    fields |= {
      "use_qknorm": "blocks.0.attn.q_norm.weight" in tensors,
      "use_swiglu": gated,
      "use_rope": ROPE in tensors,
      "use_rmsnorm": "blocks.0.norm1.weight" in tensors,
      "wo_shift": modulated == 4 * hidden,
    }
  encoder = encoder or ("pixels" if channels in (1, 3) else "latents")
  num_classes = None if labels is None else labels - null_class
  return ModelConfig(network, fields, (*size, channels), num_classes, encoder=encoder, **settings)


ROPE = "feat_rope.freqs_cos"


def _projectors(tensors: Mapping[str, Any], depth: int, encoder_depth: int | None) -> dict[str, Any]:
  numbers = {int(found[1]) for name in tensors if (found := re.match(r"projectors\.(\d+)\.", name))}
  if not numbers:
    return {"z_dims": (), "encoder_depth": encoder_depth or min(8, depth)}
  count = layouts.counted("projectors", numbers, tensors)
  lasts = needed(tensors, *(f"projectors.{number}.4.weight" for number in range(count)))
  return {
    "z_dims": tuple(shape[0] for shape in lasts),
    "projector_dim": lasts[0][1],
    "encoder_depth": encoder_depth or min(8, depth),
  }


def complete(tensors: Mapping[str, Any], config: ModelConfig) -> Mapping[str, Any]:
  """Add the table of positions, which is the same in every network of a size, where a file leaves it out."""
  from jaxguide.nn.dit import positions

  if "pos_embed" in tensors:
    return tensors
  height, width = (side // config.fields["patch_size"] for side in config.image_shape[:2])
  return {**tensors, "pos_embed": positions.sincos(height, width, config.fields["hidden_size"])[None]}


def claims(network: str, names: Collection[str]) -> bool:
  """Return whether names, with shapes if they are a mapping, can be those of a network."""
  if not any(re.match(r"blocks\.\d+\.(attn\.qkv|adaLN_modulation\.1)\.", name) for name in names):
    return False
  if any(name.startswith("projectors.") for name in names):
    return network == "repa"
  lightning = any(
    name.startswith("feat_rope.") or re.fullmatch(r"blocks\.\d+\.(mlp\.w12\.weight|norm1\.weight)", name)
    for name in names
  )
  if isinstance(names, Mapping):
    vectors = names.get("blocks.0.adaLN_modulation.1.weight")
    shape = () if vectors is None else tuple(np.shape(vectors))
    lightning |= len(shape) == 2 and shape[0] == 4 * shape[1]
    last, first = (tuple(np.shape(names[name])) if name in names else () for name in (LAST, PATCHES))
    if network == "repa" and len(last) == 2 and len(first) == 4 and last[0] == 2 * first[1] * first[2] ** 2:
      return False  # It has no learned variance.
  if lightning:
    return network == "lightningdit"
  normed = any(re.fullmatch(r"blocks\.\d+\.attn\.q_norm\.weight", name) for name in names)
  return network in (("repa", "lightningdit") if normed else TITLES)


TITLES = {
  "dit": "DiT",
  "sit": "SiT",
  "repa": "REPA's SiT",
  "lightningdit": "LightningDiT",
}


def usage(config: ModelConfig) -> list[str]:
  """Return how exported weights are used in the published code, in lines."""
  module: Any = config.module
  height, width, channels = config.image_shape
  names = {"dit": "DiT", "sit": "SiT", "repa": "SiT", "lightningdit": "LightningDiT"}
  hidden = ("use_checkpoint", "dtype", "cudnn_attention", "num_classes", "null_class", "perturbation", *DIFFUSERS)
  fields = {each.name: getattr(module, each.name) for each in dataclasses.fields(module) if each.name not in hidden}
  fields = {name: value for name, value in fields.items() if name not in ("parent", "name")}
  if config.network == "repa":
    fields = {name: value for name, value in fields.items() if name != "learn_sigma"} | {"decoder_hidden_size": 0}
    fields["decoder_hidden_size"] = module.hidden_size
  given = {"input_size": height, "in_channels": channels, **fields, "num_classes": config.num_classes}
  given["class_dropout_prob"] = 0.1 if module.null_class else 0.0
  call = ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in given.items())
  lines = [f"The network that takes it:\n{names[config.network]}({call})"]
  if height != width:
    lines.append(f"Note: the published class takes square images, and these are {height}x{width}.")
  if config.num_classes is None:
    lines.append("Note: the published class has labels, and this network has none.")
  if config.network == "dit" and (module.freq_shift or module.norm_eps != 1e-6 or module.embedder_per_block):
    lines.append("Note: it computes as diffusers' network does: export it by --family dit-diffusers.")
  return lines


DIFFUSERS = ("qkv_bias", "norm_eps", "freq_shift", "embedder_per_block")


def _family(network: str) -> Family:
  more = {"encoder_depth": "the block whose tokens the projectors take, for training; 8 by default"}
  return Family(
    name=network,
    title=TITLES[network],
    networks=(network,),
    claims=functools.partial(claims, network),
    infer=functools.partial(infer, network),
    layout=layout,
    settings=SETTINGS | (more if network == "repa" else {}),
    usage=usage,
    complete=complete,
  )


FAMILIES = tuple(map(_family, TITLES))
"""The four families."""
