"""The networks of OpenAI's guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233): names, layouts and settings.

The weight ``input_blocks.1.0.in_layers.2.weight`` of a guided-diffusion state dict is the ``kernel`` of
``input_blocks_1_0/in_layers_2`` here. Kernels have the layout (out, in, height, width) there and (height, width, in,
out) here, and a 1x1 convolution there is a dense layer here. There is no other difference: float32 weights are the same
bit for bit after import and export.
"""

import dataclasses
import re
from collections import ChainMap
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxguide._core.typing import PyTree
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import layouts
from jaxguide.models.importers.families import Family
from jaxguide.models.importers.presets import CONSISTENCY_PRESETS, PRESETS, UNCONDITIONAL_SCALE
from jaxguide.models.importers.structure import OPTIONS, SCALED, infer

__all__ = [
  "FAMILY",
  "OPTIONS",
  "PRESETS",
  "UNCONDITIONAL_SCALE",
  "constructor",
  "infer",
  "layout",
  "notes",
  "shapes",
  "to_params",
  "to_state_dict",
]

# Layers that are 1x1 convolutions (2 spatial axes) or convolutions with kernel size 1 (1 axis) in guided-diffusion, and
# their number of spatial axes.
_PIXEL_AXES = {"skip_connection": 2, "qkv": 1, "proj_out": 1, "qkv_proj": 1, "c_proj": 1}


def layout(config: ModelConfig) -> dict[str, layouts.Weight]:
  """Return the weights of a network's state dict by their names there."""
  found = {}
  for path, ours in layouts.paths(config).items():
    *modules, kind = path
    theirs = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, kind)
    # input_blocks_1_0 is input_blocks.1.0, but skip_connection is skip_connection.
    name = ".".join([*(re.sub(r"_(?=\d)", ".", module) for module in modules), theirs])
    if kind == "positional_embedding":
      found[name] = layouts.Weight(path, ours, ours[::-1], ours[::-1], (1, 0))
      continue
    # The last layer of the adaptive pool is a 1x1 convolution too.
    adaptive_pool = name == "out.3.weight" and getattr(config.module, "pool", None) == "adaptive"
    pixel_axes = 2 if adaptive_pool else _PIXEL_AXES.get(modules[-1], 0)
    if config.prediction in SCALED and pixel_axes:
      pixel_axes = 2  # consistency_models attends to pixels and not to rows of them.
    found[name] = layouts.weight(path, ours, pixel_axes if kind == "kernel" else 0)
  return found


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Return the name and shape of every weight in the state dict of a network.

  >>> len(shapes(PRESETS["64x64_diffusion"]))
  541
  """
  return {name: weight.shape for name, weight in layout(config).items()}


def to_params(state_dict: Mapping[str, Any], config: ModelConfig) -> PyTree:
  """Convert a state dict of guided-diffusion to the parameters of a network here.

  Args:
    state_dict: arrays by name, or objects that ``np.asarray`` converts, of any floating-point type. They are converted
      one after another.
    config: the configuration of the network, from `PRESETS`, from `infer`, or written by hand.

  Returns:
    ``{"params": ...}`` of float32 arrays, for the network's ``apply``.

  Raises:
    ValueError: if names are missing or unknown, a shape differs, or a weight is not finite.

  >>> config = ModelConfig("unet", {"model_channels": 32, "null_class": False}, (8, 8, 3), 10)
  >>> state_dict = {name: np.ones(shape, np.float16) for name, shape in shapes(config).items()}
  >>> to_params(state_dict, config)["params"]["input_blocks_0_0"]["kernel"].shape
  (3, 3, 3, 32)
  """
  return layouts.to_params(state_dict, layout(config), type(config.module).__name__)


def to_state_dict(params: PyTree, config: ModelConfig) -> dict[str, np.ndarray]:
  """Convert the parameters of a network here to a state dict of guided-diffusion. The inverse of `to_params`.

  Args:
    params: ``{"params": ...}``.
    config: the configuration of the network.

  Returns:
    Arrays by name, in guided-diffusion's layout. A null class is the last row of ``label_emb.weight``.

  Raises:
    ValueError: if the parameters do not fit the network.
  """
  return layouts.to_state_dict(params, layout(config), type(config.module).__name__)


def constructor(config: ModelConfig) -> str:
  """Return the Python call that creates guided-diffusion's network, as a text.

  >>> constructor(ModelConfig("classifier", {"num_head_channels": 64}, (64, 64, 3), 10))
  "EncoderUNetModel(image_size=64, in_channels=3, model_channels=64, out_channels=10, num_res_blocks=2, ...)"

  Raises:
    ValueError: if the network's labels are vectors.
  """
  if config.label_size is not None:
    raise ValueError(
      f"guided-diffusion's networks take classes, and this one takes labels of {config.label_size} numbers: it cannot "
      "be exported"
    )
  module = config.module
  names = {"unet": "UNetModel", "super_res_unet": "SuperResModel", "classifier": "EncoderUNetModel"}
  fields = {
    "image_size": config.image_shape[0],
    "in_channels": config.image_shape[2],
    **{
      field.name: getattr(module, field.name)
      for field in dataclasses.fields(module)
      if field.name not in ("dtype", "cudnn_attention", "null_class", "label_size", "perturbation", "parent", "name")
    },
  }
  if config.network != "classifier":
    fields["out_channels"] = fields["out_channels"] or config.image_shape[2]
    if config.num_classes is not None:
      fields["num_classes"] = config.num_classes + module.null_class
  return f"{names[config.network]}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def flags(config: ModelConfig) -> str | None:
  """Return the flags of guided-diffusion's scripts for a model's process; None if they do not support it."""
  named = isinstance(config.schedule, str)
  if config.diffusion_steps is None or config.prediction not in ("eps", "x0") or not named:
    return None
  flags: dict[str, Any] = {
    "noise_schedule": config.schedule,
    "diffusion_steps": config.diffusion_steps,
    "rescale_timesteps": config.rescale_timesteps,
  }
  if config.network != "classifier":
    flags |= {"learn_sigma": config.variance == "learned_range", "predict_xstart": config.prediction == "x0"}
  return " ".join(f"--{name} {value}" for name, value in flags.items())


def notes(config: ModelConfig) -> list[str]:
  """Return the differences to guided-diffusion's own models that a user must know."""
  module, notes = config.module, []
  if config.prediction in SCALED:
    notes.append(f"it is a network of OpenAI's consistency_models, in a KarrasDenoiser of kind {config.prediction}")
  elif flags(config) is None:
    process = f"{config.prediction} on the {config.process}"
    own = "" if isinstance(config.schedule, str) else ", which GaussianDiffusion takes as they are"
    notes.append(f"guided-diffusion's scripts do not support its process: the network predicts {process}{own}")
  if getattr(module, "null_class", False) and config.num_classes is not None:
    notes.append(f"class {config.num_classes} is the null class, which means no label, for classifier-free guidance")
  if config.network != "classifier" and flags(config) is not None and config.variance == "small":
    notes.append(
      "its steps use the small variance; guided-diffusion's scripts use the large variance if none is learned"
    )
  indivisible = sorted({c for level in range(len(module.channel_mult)) if (c := module.channels(level)) % 32})
  if indivisible:
    notes.append(
      f"guided-diffusion normalises in 32 groups, which do not divide {', '.join(map(str, indivisible))} channels: "
      "change its `normalization` to GroupNorm32(math.gcd(32, channels), channels)"
    )
  return notes


def usage(config: ModelConfig) -> list[str]:
  """Return how exported weights are used in guided-diffusion, in lines."""
  lines = [f"The network that takes it:\n{constructor(config)}"]
  if flags(config) is not None:
    lines.append(f"Its process: {flags(config)}")
  return lines + [f"Note: {note}." for note in notes(config)]


def claims(names: Collection[str]) -> bool:
  """Return whether names are those of guided-diffusion's networks."""
  return any(re.match(r"(time_embed|input_blocks|middle_block|output_blocks)\.\d", name) for name in names)


FAMILY = Family(
  name="adm",
  title="OpenAI's guided-diffusion",
  networks=("unet", "super_res_unet", "classifier"),
  claims=claims,
  infer=lambda tensors, heads=None, **options: infer(
    {name: tensor.shape for name, tensor in tensors.items()},
    **({} if heads is None else {"num_heads": heads}),
    **options,
  ),
  layout=layout,
  settings=OPTIONS,
  usage=usage,
  presets=ChainMap(PRESETS, CONSISTENCY_PRESETS),
)
"""The networks of guided-diffusion."""
