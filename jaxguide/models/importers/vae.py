"""Autoencoders of latent diffusion: Stable Diffusion, SDXL, FLUX.1 and LightningDiT (VA-VAE).

Three forms of names are known, each a family: those of diffusers' ``AutoencoderKL`` today (``vae``); those that it
wrote before 0.15, in which attention has query, key, value and proj_attn (``vae-old``); and those of CompVis'
latent-diffusion (``vae-ldm``), which FLUX.1's ``ae.safetensors`` and VA-VAE have too. Checkpoints of whole Stable
Diffusion models hold an autoencoder under ``first_stage_model.``, and the rest is left out.

Names and shapes show all fields but the groups of the normalisations, and the scale and the shift of the latents. A
``config.json`` of diffusers beside the file has these.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxguide import nn
from jaxguide._core import checks, records
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import layouts, torch_files
from jaxguide.models.importers.families import Family

NETWORK = "autoencoder_kl"

PREFIX = "first_stage_model."
"""What the names of the autoencoder begin with in a checkpoint of a whole latent diffusion model."""

LOSSES = ("loss.", "foundation_model.", "linear_proj.")
"""How names begin that only training uses: those of the discriminator, and of the features of VA-VAE's loss."""

PUBLISHED = 128
"""The least number of channels of published networks. They have 32 groups in each normalisation."""

MOST_LEVELS = 16

SHOWN: dict[str, str] = {
  "in_channels": "channels of images",
  "out_channels": "channels of decoded images",
  "block_out_channels": "channels of each level",
  "layers_per_block": "residual blocks of each level",
  "latent_channels": "channels of latents",
  "z_channels": "channels beside quant_conv",
  "down_block_types": "types of the encoder's levels",
  "up_block_types": "types of the decoder's levels",
  "use_quant_conv": "whether there is quant_conv",
  "use_post_quant_conv": "whether there is post_quant_conv",
  "mid_block_add_attention": "whether the middle has attention",
}
"""Settings that names and shapes show. They may be given, and must agree."""

OTHERS: dict[str, str] = {
  "norm_num_groups": "groups of each normalisation",
  "scaling_factor": "what latents are multiplied by",
  "shift_factor": "what is subtracted from latents first",
  "latents_mean": "mean of each channel of latents",
  "latents_std": "standard deviation of each channel of latents",
  "latents_stats": "LightningDiT's file of both, latents_stats.pt",
  "sample_size": "side of the images it was trained on",
  "act_fn": "activation, silu",
}
"""Settings that names and shapes do not show."""

UNUSED = ("force_upcast",)
"""Fields of a ``config.json`` without an effect here, where normalisation is always in float32."""

# Names of diffusers before 0.15, and of CompVis, by those of today.
_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

_LDM = {
  "to_q": "q",
  "to_k": "k",
  "to_v": "v",
  "to_out.0": "proj_out",
  "group_norm": "norm",
  "conv_shortcut": "nin_shortcut",
  "mid_block.resnets.0": "mid.block_1",
  "mid_block.resnets.1": "mid.block_2",
  "mid_block.attentions.0": "mid.attn_1",
  "conv_norm_out": "norm_out",
  "resnets": "block",
  "attentions": "attn",
  "downsamplers.0": "downsample",
  "upsamplers.0": "upsample",
  "down_blocks": "down",
}


def _replaced(name: str, table: Mapping[str, str]) -> str:
  """Replace parts of a dotted name. Longer entries come before those that they contain."""
  for old, new in table.items():
    name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
  return name


def _to_ldm(name: str, levels: int) -> str:
  name = _replaced(name, _LDM)
  return re.sub(r"(?<=decoder\.)up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)


def _from_ldm(name: str, levels: int) -> str:
  name = re.sub(r"(?<=decoder\.)up\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", name)
  is_attention = ".attn" in name
  table = {new: old for old, new in _LDM.items() if is_attention or new not in ("q", "k", "v", "norm", "proj_out")}
  return _replaced(name, table)


def _levels(names: Collection[str]) -> int:
  """Return the number of levels, in any form of names."""
  numbers = [
    found[1] for name in names if (found := re.match(r"(?:encoder\.down|decoder\.up)(?:_blocks)?\.(\d+)", name))
  ]
  return 1 + max(map(int, numbers), default=-1)


# --- names and shapes to a configuration ----------------------------------------------------------


def _infer(tensors: Mapping[str, Any], **given: Any) -> ModelConfig:
  """Make the configuration of a network from tensors with diffusers' names of today."""
  for name in given:
    if name not in {**SHOWN, **OTHERS}:
      known = ", ".join((*OTHERS, *SHOWN))
      raise ValueError(f"an autoencoder has no setting {name!r}; its settings are {known}")
  shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
  levels = _levels(shapes)

  def shape(*names: str) -> tuple[int, ...]:
    found = next((shapes[name] for name in names if name in shapes), None)
    if found is None or len(found) < 2:
      raise ValueError(f"the weights are incomplete: there is no weight {names[0]}")
    return found

  def count(prefix: str) -> int:
    numbers = [int(found[1]) for name in shapes if (found := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)

  def types(prefix: str, plain: str) -> tuple[str, ...]:
    found = [f"Attn{plain}" if count(f"{prefix}.{level}.attentions") else plain for level in range(levels)]
    return tuple(found) if len({*found, plain}) > 1 else ()

  if levels > MOST_LEVELS:
    raise ValueError(f"the names are of {levels:,} levels, and an autoencoder has at most {MOST_LEVELS}")
  if not levels:
    raise ValueError(f"the weights are incomplete: there is no level among the names {layouts.first(list(shapes))}")
  inner = shape("encoder.conv_out.weight")[0] // 2
  latent = shape("quant_conv.weight")[0] // 2 if "quant_conv.weight" in shapes else inner
  own: dict[str, Any] = {
    "block_out_channels": tuple(
      shape(
        f"encoder.down_blocks.{level}.resnets.0.conv1.weight",
        f"decoder.up_blocks.{levels - 1 - level}.resnets.0.conv1.weight",
      )[0]
      for level in range(levels)
    ),
    "layers_per_block": count("encoder.down_blocks.0.resnets") or count("decoder.up_blocks.0.resnets") - 1,
    "latent_channels": latent,
    "out_channels": shape("decoder.conv_out.weight")[0],
    "down_block_types": types("encoder.down_blocks", "DownEncoderBlock2D"),
    "up_block_types": types("decoder.up_blocks", "UpDecoderBlock2D"),
    "use_quant_conv": "quant_conv.weight" in shapes,
    "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    "mid_block_add_attention": count("encoder.mid_block.attentions") > 0 or count("decoder.mid_block.attentions") > 0,
    "z_channels": None if inner == latent else inner,
  }
  channels = shape("encoder.conv_in.weight")[1]
  given = {name: value for name, value in given.items() if value is not None}
  _check_shown({**own, "in_channels": channels}, given)
  own |= _scale(given, own) | {"norm_num_groups": _groups(given, own["block_out_channels"])}
  if given.get("act_fn", "silu") not in ("silu", "swish"):
    raise ValueError(f"act_fn must be silu, the activation of every published autoencoder, got {given['act_fn']!r}")
  factor = 2 ** (levels - 1)
  size = given.get("sample_size", max(256, factor))
  side = [checks.whole("sample_size", each, 1, 2**16) for each in (size if isinstance(size, list | tuple) else [size])]
  sides = [-(-each // factor) * factor for each in (side * 2 if len(side) == 1 else side)]
  default = {field.name: field.default for field in dataclasses.fields(nn.AutoencoderKL)}
  fields = {name: value for name, value in own.items() if value is not None or default[name] is not None}
  return ModelConfig(NETWORK, fields, (*sides, channels), None)


def _check_shown(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
  """Check that settings which shapes show are what they show.

  Raises:
    ValueError: if one is not.
  """
  for name in SHOWN:
    if name not in given:
      continue
    value, wanted = given[name], own[name]
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(value, tuple) and name.endswith("types") and not wanted:
      wanted = tuple(kind.removeprefix("Attn") for kind in value)
      wanted = wanted if len(value) == len(own["block_out_channels"]) else ("one for each level",)
    if value != wanted:
      raise ValueError(f"{name} is {wanted} in the weights, and {value} was given: leave it out, or take other weights")


def _groups(given: Mapping[str, Any], channels: Sequence[int]) -> int:
  if "norm_num_groups" not in given and min(channels) < PUBLISHED:
    layouts.required(given, {"norm_num_groups": OTHERS["norm_num_groups"]})
  return given.get("norm_num_groups", 32)


def _scale(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
  """Return the scale and the shift of the latents."""
  names = [name for name in ("latents_mean", "latents_std") if name in given]
  if names and (len(names) < 2 or "shift_factor" in given or "latents_stats" in given):
    raise ValueError("latents_mean and latents_std belong together, without shift_factor and latents_stats")
  if "latents_stats" in given:
    given = {"scaling_factor": 1.0, **given, **_stats(given["latents_stats"])}
  if "latents_std" in given:
    # diffusers' pipelines: (z - mean) * scaling_factor / std.
    mean, std = (np.asarray(given[name], np.float64).reshape(-1) for name in ("latents_mean", "latents_std"))
    if not (np.isfinite(std).all() and (std > 0).all()):
      raise ValueError("latents_std must be finite numbers above 0")
    scale = given.get("scaling_factor", nn.AutoencoderKL.scaling_factor) / std
    return {"scaling_factor": tuple(scale.tolist()), "shift_factor": tuple(mean.tolist())}
  if own["latent_channels"] != 4 and min(own["block_out_channels"]) >= PUBLISHED:
    # Such as those of Stable Diffusion 3 and FLUX.1, which have the same shapes and other scales.
    layouts.required(given, {"scaling_factor": OTHERS["scaling_factor"] + ", or latents_stats"})
  return {
    "scaling_factor": given.get("scaling_factor", nn.AutoencoderKL.scaling_factor),
    "shift_factor": given.get("shift_factor", nn.AutoencoderKL.shift_factor),
  }


def _stats(file: Any) -> dict[str, Any]:
  content = torch_files.read(file)
  if not isinstance(content, dict) or not {"mean", "std"} <= content.keys():
    raise ValueError(f"{file} must hold the tensors mean and std, as LightningDiT's latents_stats.pt")
  return {f"latents_{name}": content[name].read() for name in ("mean", "std")}


def settings_beside(file: Path) -> dict[str, Any]:
  """Return the settings in the ``config.json`` of diffusers beside a file of weights; none if there is none.

  Raises:
    ValueError: if it is damaged, or has a field that is not known here.
  """
  path = Path(file).with_name("config.json")
  if not path.is_file():
    return {}
  fields = records.read(path)
  if fields.get("_class_name") != "AutoencoderKL":
    return {}
  found = {name: value for name, value in fields.items() if not name.startswith("_") and value is not None}
  for name in UNUSED:
    found.pop(name, None)
  for name in found:
    if name not in {**SHOWN, **OTHERS}:
      raise ValueError(
        f"{path} has the field {name!r}, which is not known here: move the file away to import without it"
      )
  return found


# --- layouts --------------------------------------------------------------------------------------


def _name(path: Sequence[str]) -> str:
  """Return diffusers' name of a parameter."""
  *modules, kind = path
  theirs = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
  return ".".join([*(re.sub(r"_(?=\d)", ".", module) for module in modules), theirs])


def _layout(config: ModelConfig, form: str) -> dict[str, layouts.Weight]:
  """Return the weights of a network's state dict by their names, in one of the forms of names."""
  levels = len(config.module.block_out_channels)
  found = {}
  for path, ours in layouts.paths(config).items():
    name = _name(path)
    pixels: tuple[str, ...] = ("conv_shortcut", "quant_conv", "post_quant_conv")
    if form == "vae-ldm":
      pixels = (*pixels, "to_q", "to_k", "to_v", "to_out_0")
      name = _to_ldm(name, levels)
    elif form == "vae-old":
      name = _replaced(name, _OLD)
    ones = 2 if path[-1] == "kernel" and path[-2] in pixels else 0
    found[name] = layouts.weight(path, ours, ones)
  return found


def _usage(config: ModelConfig, form: str) -> list[str]:
  module = config.module
  if form == "vae-ldm":
    base = module.block_out_channels[0]
    mult = [channels / base for channels in module.block_out_channels]
    call = f"ch={base}, ch_mult={mult}, num_res_blocks={module.layers_per_block}, z_channels={module.latent_channels}"
    return [f"The network that takes it is CompVis' AutoencoderKL with {call}.", _latents(module)]
  if module.z_channels is not None:
    raise ValueError("diffusers' AutoencoderKL has no z_channels: export this network as family vae-ldm")
  names = [name for name in SHOWN if name not in ("in_channels", "z_channels")] + ["norm_num_groups"]
  fields = {"in_channels": config.image_shape[-1], **{name: getattr(module, name) for name in names}}
  for name, plain in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
    fields[name] = fields[name] or (plain,) * len(module.block_out_channels)
  call = ", ".join(f"{name}={value!r}" for name, value in fields.items())
  return [f"The network that takes it:\nAutoencoderKL({call})", _latents(module)]


def _latents(module: Any) -> str:
  return f"Its latents are (z - {module.shift_factor}) * {module.scaling_factor}."


# --- families -------------------------------------------------------------------------------------


def _prepare(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Leave out what a checkpoint holds beside the autoencoder."""
  if any(name.startswith(PREFIX) for name in tensors):
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
  return {name: tensor for name, tensor in tensors.items() if not name.startswith(LOSSES)}


def _claims(form: str) -> Callable[[Collection[str]], bool]:
  def claims(names: Collection[str]) -> bool:
    names = [name.removeprefix(PREFIX) for name in names]
    if form == "vae-ldm":
      return any(re.match(r"(encoder|decoder)\.(down\.\d+\.|up\.\d+\.|mid\.(block|attn)_\d)", name) for name in names)
    ours = [name for name in names if re.match(r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block)\.", name)]
    is_old = any(re.search(r"\.attentions\.\d+\.(query|key|value|proj_attn)\.", name) for name in ours)
    return bool(ours) and is_old == (form == "vae-old")

  return claims


def _infer_of(form: str) -> layouts.Infer:
  def infer(tensors: Mapping[str, Any], **given: Any) -> ModelConfig:
    if form == "vae-ldm":
      levels = _levels(tensors)
      tensors = {_from_ldm(name, levels): tensor for name, tensor in tensors.items()}
    elif form == "vae-old":
      tensors = {_replaced(name, {new: old for old, new in _OLD.items()}): each for name, each in tensors.items()}
    return _infer(tensors, **given)

  return infer


def _config(**fields: Any) -> ModelConfig:
  return ModelConfig(NETWORK, fields, (fields.pop("sample_size", 256),) * 2 + (3,), None)


# EDM2's training/encoders.py: the mean and the standard deviation of each channel of Stable Diffusion's latents, which
# become 0 and 0.5.
_EDM2_MEAN = (5.81, 3.25, 0.12, -2.15)
_EDM2_SCALE = tuple(0.5 / std for std in (4.17, 4.62, 3.71, 3.28))

_WITHOUT = {"use_quant_conv": False, "use_post_quant_conv": False}

PRESETS: dict[str, ModelConfig] = {
  # The vae/config.json of stabilityai/sd-vae-ft-mse, sdxl-vae, stable-diffusion-3-medium and FLUX.1-dev.
  "sd-vae": _config(),
  "edm2-vae": _config(scaling_factor=_EDM2_SCALE, shift_factor=_EDM2_MEAN, sample_size=512),
  "sdxl-vae": _config(scaling_factor=0.13025, sample_size=1024),
  "sd3-vae": _config(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, sample_size=1024, **_WITHOUT),
  "flux-vae": _config(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024, **_WITHOUT),
}
"""Configurations of published autoencoders, under diffusers' names. Those of CompVis' names end in ``-ldm``."""


def _family(form: str, title: str, presets: Mapping[str, ModelConfig]) -> Family:
  return Family(
    name=form,
    title=title,
    networks=(NETWORK,),
    claims=_claims(form),
    infer=_infer_of(form),
    layout=lambda config: _layout(config, form),
    settings={**OTHERS, **SHOWN},
    usage=lambda config: _usage(config, form),
    presets=presets,
    prepare=_prepare,
    beside=settings_beside,
  )


FAMILIES = (
  _family("vae", "autoencoders in diffusers' form", PRESETS),
  _family("vae-old", "autoencoders in diffusers' form before 0.15", {}),
  _family("vae-ldm", "autoencoders in CompVis' form", {f"{name}-ldm": config for name, config in PRESETS.items()}),
)
"""The autoencoders, by the form of their names."""
