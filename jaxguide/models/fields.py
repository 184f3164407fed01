"""What the fields of the networks may be: ranges of the numbers, and checks of what belongs together.

The ranges are far beyond real networks. They catch mistakes that would lead to hours of tracing or run out of memory.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxguide import nn
from jaxguide._core import checks
from jaxguide.nn.adm.classifier import POOLS
from jaxguide.nn.edm.song import DECODERS, EMBEDDINGS, ENCODERS
from jaxguide.nn.resampling import check_filter

Bounds = Mapping[str, tuple[int | float, int | float]]

ADM: Bounds = {
  "model_channels": (1, 2**16),
  "out_channels": (1, 2**16),
  "num_res_blocks": (0, 64),
  "attention_resolutions": (1, 2**16),
  "dropout": (0, 1),
  "channel_mult": (0, 2**10),
  "num_heads": (1, 2**16),
  "num_head_channels": (-1, 2**16),
  "num_heads_upsample": (-1, 2**16),
}


def check_adm(fields: Mapping[str, Any]) -> None:
  """Raise ValueError if fields of the networks of guided-diffusion contradict each other."""
  for name in ("num_head_channels", "num_heads_upsample"):
    if fields.get(name) == 0:
      raise ValueError(f"{name} must be at least 1, or -1 to use num_heads, got 0")
  if fields.get("channel_mult") == ():
    raise ValueError("channel_mult must have a number for at least one level, got ()")
  channels: int = fields.get("model_channels", nn.UNet.model_channels)
  for factor in fields.get("channel_mult", ()):
    if math.floor(factor * channels) < 1:
      raise ValueError(
        f"each of channel_mult, times the {channels} model_channels, must give at least one channel, got {factor}"
      )
  if "pool" in fields:
    checks.lookup("pool", fields["pool"], dict.fromkeys(POOLS))


KL: Bounds = {
  "block_out_channels": (1, 2**16),
  "layers_per_block": (1, 64),
  "latent_channels": (1, 2**12),
  "z_channels": (1, 2**12),
  "out_channels": (1, 2**12),
  "norm_num_groups": (1, 2**12),
}


def check_kl(fields: Mapping[str, Any]) -> None:
  """Raise ValueError if fields of the autoencoder contradict each other."""
  channels = fields.get("block_out_channels", nn.AutoencoderKL.block_out_channels)
  groups = fields.get("norm_num_groups", nn.AutoencoderKL.norm_num_groups)
  if not 1 <= len(channels) <= 16:
    raise ValueError(f"block_out_channels must have from 1 to 16 levels, got {len(channels)}")
  for number in channels:
    if number % groups:
      raise ValueError(f"norm_num_groups {groups} must divide each of block_out_channels, got {number}")
  for name, plain in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
    types = fields.get(name, ())
    if types and len(types) != len(channels):
      raise ValueError(f"{name} must have a type for each of the {len(channels)} levels, got {len(types)}")
    for kind in types:
      checks.lookup(name, kind, dict.fromkeys((plain, f"Attn{plain}")))
  size = fields.get("latent_channels", nn.AutoencoderKL.latent_channels)
  mapped = fields.get("use_post_quant_conv", True) and fields.get("use_quant_conv", True)
  if fields.get("z_channels") is not None and not mapped:
    raise ValueError("z_channels needs use_quant_conv and use_post_quant_conv, which map to latent_channels")
  for name in ("scaling_factor", "shift_factor"):
    factor = fields.get(name, 1.0)
    numbers = factor if isinstance(factor, tuple) else (factor,)
    if isinstance(factor, tuple) and len(factor) != size:
      raise ValueError(f"{name} must be one number, or one for each of the {size} latent channels, got {len(factor)}")
    for number in numbers:
      if checks.finite(name, checks.number(name, number)) == 0 and name == "scaling_factor":
        raise ValueError("scaling_factor must not be 0")


DIT: Bounds = {
  "patch_size": (1, 2**10),
  "hidden_size": (4, 2**16),
  "depth": (1, 2**10),
  "num_heads": (1, 2**16),
  "mlp_ratio": (2**-10, 2**10),
  "norm_eps": (0, 1),
  "freq_shift": (0, 1),
  "encoder_depth": (1, 2**10),
  "z_dims": (1, 2**16),
  "projector_dim": (1, 2**16),
}


def check_dit(fields: Mapping[str, Any]) -> None:
  """Raise ValueError if fields of the networks of the transformers contradict each other."""
  hidden, heads = fields.get("hidden_size", nn.DiT.hidden_size), fields.get("num_heads", nn.DiT.num_heads)
  if hidden % 4 or hidden % heads:
    raise ValueError(f"hidden_size must be a multiple of 4 and of the {heads} num_heads, got {hidden}")
  if fields.get("use_rope") and hidden // heads % 4:
    raise ValueError(
      f"use_rope needs heads whose channels are a multiple of 4, got {hidden // heads} of {heads} num_heads"
    )


EDM: Bounds = {
  "img_resolution": (1, 2**16),
  "out_channels": (1, 2**16),
  "augment_dim": (0, 2**16),
  "model_channels": (1, 2**16),
  "channel_mult": (0, 2**10),
  "channel_mult_emb": (0, 2**10),
  "channel_mult_noise": (0, 2**10),
  "num_blocks": (0, 64),
  "attn_resolutions": (1, 2**16),
  "dropout": (0, 1),
  "label_dropout": (0, 1),
  "label_balance": (0, 1),
  "concat_balance": (0, 1),
  "res_balance": (0, 1),
  "attn_balance": (0, 1),
  "channels_per_head": (1, 2**16),
  "clip_act": (0, math.inf),
  "logvar_channels": (1, 2**16),
}


def check_edm(fields: Mapping[str, Any]) -> None:
  """Raise ValueError if fields of the networks of EDM and EDM2 contradict each other."""
  if fields.get("channel_mult") == ():
    raise ValueError("channel_mult must have a number for at least one level, got ()")
  if "resample_filter" in fields:
    check_filter(fields["resample_filter"])
  for name, known in (("embedding_type", EMBEDDINGS), ("encoder_type", ENCODERS), ("decoder_type", DECODERS)):
    if name in fields:
      checks.lookup(name, fields[name], dict.fromkeys(known))
