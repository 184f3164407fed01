"""Configurations of the models that OpenAI published with guided-diffusion (arXiv:2105.05233), from their README."""

from collections.abc import Sequence
from typing import Any

from jaxguide.models.config import ModelConfig

# Image side -> one factor for each resolution level.
_CHANNEL_MULT: dict[int, tuple[int | float, ...]] = {
  64: (1, 2, 3, 4),
  128: (1, 1, 2, 3, 4),
  256: (1, 1, 2, 2, 4, 4),
  512: (0.5, 1, 1, 2, 2, 4, 4),
}


def _config(network: str, side: int, num_classes: int | None, schedule: str, fields: dict[str, Any], **rest: Any):
  return ModelConfig(
    network,
    {"use_scale_shift_norm": True, "resblock_updown": True, **fields},
    image_shape=(side, side, 3),
    num_classes=num_classes,
    prediction="eps",
    schedule=schedule,
    diffusion_steps=1000,
    **rest,
  )


def _diffusion(
  side: int,
  *,
  num_classes: int | None = 1000,
  schedule: str = "linear",
  low_res: int | None = None,
  attention: Sequence[int] = (32, 16, 8),
  **fields: Any,
) -> ModelConfig:
  """Return the configuration of a UNet; ``attention`` lists sides of feature maps, as in the README's flags."""
  defaults = {
    "model_channels": 256,
    "out_channels": 6,
    "num_res_blocks": 2,
    "attention_resolutions": tuple(side // resolution for resolution in attention),
    "channel_mult": _CHANNEL_MULT[256 if low_res else side],
    "null_class": False,
  }
  rest = {"low_res_shape": (low_res, low_res, 3)} if low_res else {}
  network = "super_res_unet" if low_res else "unet"
  return _config(network, side, num_classes, schedule, {**defaults, **fields}, variance="learned_range", **rest)


def _classifier(side: int, scale: float, schedule: str = "linear", num_res_blocks: int = 2) -> ModelConfig:
  """Return the configuration of a classifier. Its schedule is that of the diffusion model of the same image size."""
  fields = {
    "model_channels": 128,
    "num_res_blocks": num_res_blocks,
    "attention_resolutions": tuple(side // resolution for resolution in (32, 16, 8)),
    "channel_mult": _CHANNEL_MULT[side],
    "num_head_channels": 64,
    "pool": "attention",
  }
  return _config("classifier", side, 1000, schedule, fields, scale=scale)


PRESETS: dict[str, ModelConfig] = {
  "64x64_diffusion": _diffusion(
    64,
    schedule="cosine",
    model_channels=192,
    num_res_blocks=3,
    num_head_channels=64,
    use_new_attention_order=True,
    dropout=0.1,
  ),
  "128x128_diffusion": _diffusion(128, num_heads=4),
  "256x256_diffusion": _diffusion(256, num_head_channels=64),
  "256x256_diffusion_uncond": _diffusion(256, num_classes=None, num_head_channels=64),
  "512x512_diffusion": _diffusion(512, num_head_channels=64),
  "64_256_upsampler": _diffusion(256, low_res=64, model_channels=192, num_heads=4),
  "128_512_upsampler": _diffusion(512, low_res=128, attention=(32, 16), model_channels=192, num_head_channels=64),
  **{
    f"lsun_{name}": _diffusion(256, num_classes=None, num_head_channels=64, dropout=dropout)
    for name, dropout in {"bedroom": 0.1, "cat": 0.1, "horse": 0.1, "horse_nodropout": 0.0}.items()
  },
  "64x64_classifier": _classifier(64, 1.0, "cosine", num_res_blocks=4),
  "128x128_classifier": _classifier(128, 0.5),
  "256x256_classifier": _classifier(256, 1.0),
  "512x512_classifier": _classifier(512, 4.0),
}
"""The published models by their file names without ``.pt``.

A classifier's ``scale`` is the one recommended for the class-conditional model of its size. The 256x256 classifier also
guides ``256x256_diffusion_uncond``, for which `UNCONDITIONAL_SCALE` is recommended.
"""

UNCONDITIONAL_SCALE = 10.0
"""The scale recommended for ``256x256_classifier`` on ``256x256_diffusion_uncond``."""


def _consistency(side: int, num_classes: int | None, prediction: str, **fields: Any) -> ModelConfig:
  """Return the configuration of a network of consistency_models, from the flags in ``scripts/launch.sh`` there."""
  defaults = {
    "model_channels": 256,
    "out_channels": 3,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "attention_resolutions": tuple(side // resolution for resolution in (32, 16, 8)),
    "channel_mult": _CHANNEL_MULT[side],
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "null_class": False,
  }
  scaled: dict[str, Any] = {"prediction": prediction, "time_scale": 1000.0, "sigma_data": 0.5}
  return ModelConfig("unet", {**defaults, **fields}, (side, side, 3), num_classes, **scaled)


_BY_KIND = {"cd_{}_l2": "consistency", "cd_{}_lpips": "consistency", "ct_{}": "consistency", "edm_{}_ema": "edm"}

CONSISTENCY_PRESETS: dict[str, ModelConfig] = {
  **{
    kind.format("imagenet64"): _consistency(64, 1000, prediction, model_channels=192, num_res_blocks=3)
    for kind, prediction in _BY_KIND.items()
  },
  **{
    kind.format(f"{name}256"): _consistency(256, None, prediction)
    for name in ("bedroom", "cat")
    for kind, prediction in _BY_KIND.items()
  },
}
"""The models published with OpenAI's consistency_models (Song et al. 2023, arXiv:2303.01469), by their file names."""
