"""EDM2's magnitude-preserving UNet (Karras et al. 2024, arXiv:2312.02696), from its published names.

The weight ``unet.enc.8x8_block0.conv_res0.weight`` there is the ``kernel`` of ``enc_8x8_block0/conv_res0`` here, and
the learned uncertainty, ``logvar_linear.weight``, is a parameter of the network. The channels of ``attn_qkv`` are
ordered (head, channel, qkv) there and (qkv, head, channel) here.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import edm, layouts
from jaxguide.models.importers.families import Family
from jaxguide.models.importers.layouts import Weight

PREFIX = "unet."

SETTINGS = {
  "heads": "number of attention heads, where all blocks with attention have the same channels",
  "channels_per_head": "channels of an attention head; 64 in the published networks",
  "img_resolution": "side of the images or latents; by default that of the names",
  "resample_filter": "filter of the resampling; (1, 1) if left out, as in the published networks",
  "label_balance": "share of the label in the embedding; 0.5 if left out",
  "concat_balance": "share of the encoder's features in the decoder; 0.5 if left out",
  "res_balance": "share of the residual; 0.3 if left out",
  "attn_balance": "share of attention; 0.3 if left out",
  "clip_act": "magnitude at which activations are clipped; 256 if left out",
  "dropout": "probability of dropout in training; 0 if left out",
  "null_class": "whether the network was trained with labels dropped; no if left out",
  "sigma_data": "standard deviation of the data; 0.5 if left out",
}


def claims(names: Collection[str]) -> bool:
  """Return whether names are those of EDM2's network."""
  blocks = r"(enc|dec)\.\d+x\d+_\w+\.(conv_res[01]|emb_linear|emb_gain)"
  known = rf"(\w+\.)?(unet\.)?(emb_fourier|emb_noise|logvar_(fourier|linear)|{blocks})(\.|$)"
  return any(re.match(known, name) for name in names)


def layout(config: ModelConfig) -> dict[str, Weight]:
  """Return the tensors of a network's state dict by their names there."""
  found = {}
  for path, ours in layouts.paths(config).items():
    prefix = "" if path[0].startswith("logvar_") else PREFIX
    found[prefix + edm.published_name(path)] = edm.weight(path, ours)
  return found


def prepare(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """Return tensors without the prefix of data-parallel training."""
  return {re.sub(r"^(module|net|ema)\.(?=unet\.|logvar_)", "", name): tensor for name, tensor in tensors.items()}


def infer(tensors: Mapping[str, Any], **given: Any) -> ModelConfig:
  """Return the configuration of a network from names and shapes; see `jaxguide.models.importers.families.Family`."""
  shapes = {name.removeprefix(PREFIX): tensor.shape for name, tensor in tensors.items()}
  names = edm.Names(shapes, "incomplete, or not a network of EDM2", "conv_res1.weight")
  found = names.levels()
  sides, widths = found.pop("sides"), found.pop("widths")
  first = f"enc.{sides[0]}x{sides[0]}_conv.weight"
  channels = names.size(first, 1, 4) - 1
  noise, width = names.size("emb_noise.weight", 1, 2), names.size("emb_noise.weight", 0, 2)
  # The finest level's channels stand for model_channels: names and shapes show the products alone.
  base = widths[0]
  fields: dict[str, Any] = {
    **found,
    "model_channels": base,
    "channel_mult": tuple(edm.ratio(each, base) for each in widths),
    "logvar_channels": names.size("logvar_fourier.freqs", 0, 1),
  }
  if noise != base:
    fields["channel_mult_noise"] = edm.ratio(noise, base)
  if width != max(widths):
    fields["channel_mult_emb"] = edm.ratio(width, base)
  if names.size("out_conv.weight", 0, 4) != channels:
    fields["out_channels"] = names.size("out_conv.weight", 0, 4)
  fields |= _heads(names, given)
  if given.pop("img_resolution", sides[0]) != sides[0]:
    raise ValueError(f"img_resolution must be {sides[0]} according to the names: leave it out")
  sigma_data = given.pop("sigma_data", 0.5)
  given.setdefault("null_class", False)
  return ModelConfig(
    "edm2_unet",
    {**fields, **given},
    image_shape=(sides[0], sides[0], channels),
    num_classes=names.size("emb_label.weight", 1, 2) if "emb_label.weight" in shapes else None,
    prediction="edm",
    sigma_data=sigma_data,
    encoder="latents" if channels not in (1, 3) else "pixels",
  )


def _heads(names: edm.Names, given: dict[str, Any]) -> dict[str, Any]:
  """Return the channels of an attention head, and remove the settings that give it.

  Raises:
    ValueError: if there is attention and no setting says how many heads, or the setting does not fit.
  """
  attending = sorted({shape[1] for name, shape in names.shapes.items() if name.endswith(".attn_qkv.weight")})
  heads, per_head = given.pop("heads", None), given.pop("channels_per_head", None)
  if not attending:
    if heads is not None:
      raise ValueError("the network has no attention: leave out heads")
    widest = max(shape[0] for name, shape in names.shapes.items() if name.endswith("_in0.conv_res1.weight"))
    return {"channels_per_head": per_head or max(64, widest + 1)}  # Its middle has attention unless heads are wider.
  if heads is None and per_head is None:
    what = f"channels of an attention head, 64 in the published networks; {attending} channels attend"
    layouts.required({}, {"channels_per_head": what})
  if per_head is None:
    if len(attending) > 1 or attending[0] % heads:
      raise ValueError(
        f"heads must divide the channels that attend, and these are the same everywhere; they are {attending}, and "
        "heads is "
        f"{heads}: give {layouts.option('channels_per_head')}"
      )
    return {"channels_per_head": attending[0] // heads}
  if any(width // per_head < 1 or width % (width // per_head) for width in attending):
    raise ValueError(f"channels_per_head {per_head} does not fit the channels that attend, {attending}")
  if heads is not None and any(width // per_head != heads for width in attending):
    raise ValueError(f"heads {heads} and channels_per_head {per_head} contradict each other: give one of them")
  return {"channels_per_head": per_head}


def stated(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings that a published pickle states in the call of the network's class.

  Args:
    name: the class, ``Precond``.
    arguments: the arguments of its call.
  """
  if name != "Precond":
    raise ValueError(f"it holds a {name}, and EDM2's networks are a Precond")
  defaults = {"channels_per_head": 64, "sigma_data": 0.5}
  known = (*defaults, *(key for key in SETTINGS if key not in ("heads", "null_class")))
  return {**defaults, **{key: arguments[key] for key in known if key in arguments}}


def usage(config: ModelConfig) -> list[str]:
  """Return how exported weights are used in EDM2's code, in lines."""
  module, labels = config.module, config.num_classes or config.label_size or 0
  fields = ["model_channels", "channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks"]
  fields += ["attn_resolutions", "label_balance", "concat_balance", "resample_filter", "channels_per_head"]
  fields += ["dropout", "res_balance", "attn_balance", "clip_act", "logvar_channels"]
  shown = {name: getattr(module, name) for name in fields}
  arguments = ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in shown.items())
  lines = [
    f"The network that takes it:\nPrecond(img_resolution={config.image_shape[0]}, img_channels={config.image_shape[2]},"
    f" label_dim={labels}, sigma_data={config.sigma_data or 0.5}, {arguments})"
  ]
  if config.prediction != "edm":
    lines.append(f"Note: Precond has EDM's preconditioning, and this network predicts {config.prediction}.")
  return lines


FAMILY = Family(
  name="edm2",
  title="EDM2's magnitude-preserving UNet",
  networks=("edm2_unet",),
  claims=claims,
  infer=infer,
  layout=layout,
  settings=SETTINGS,
  usage=usage,
  prepare=prepare,
  stated=stated,
)
"""The network of EDM2."""
