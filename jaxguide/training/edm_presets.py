"""Presets by name: the networks of EDM and EDM2, with the published process and training.

The published training of EDM augments its images, which is not done here, and neither publication clips gradients.
``jaxguide train DATA --preset NAME`` takes one. Those of 512 are for latents of 64x64x4.
"""

from typing import Any

from jaxguide._core import checks
from jaxguide.training.presets import Preset

UNCLIPPED = 1e9
"""A norm that no gradient reaches."""

_NOT_AUGMENTED = "The published training augments its images as well, which is not done here."

# EDM (arXiv:2206.00364), table 7 and appendix F.2, and train.py of github.com/NVlabs/edm. The rate rises over 10
# million images (--lr, lr_rampup_kimg), Adam with b2 = 0.999; log sigma is normal with mean -1.2 and standard deviation
# 1.2 (table 1). The half-life of the running mean, in images, gives the decay per step: 0.5 ** (batch / half-life).
_DDPMPP: dict[str, Any] = {"embedding_type": "positional", "encoder_type": "standard", "channel_mult_noise": 1} | {
  "resample_filter": (1, 1)
}
_NCSNPP: dict[str, Any] = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2} | {
  "resample_filter": (1, 3, 3, 1)
}
_SONG = {"model_channels": 128, "num_blocks": 4, "attn_resolutions": (16,), "decoder_type": "standard"}
_EDM = {"prediction": "edm", "sigma_data": 0.5}


def _edm_training(images: float, batch: int, rate: float, half_life: float) -> dict[str, Any]:
  """Return the training of EDM, whose length, warm-up and half-life of the running mean are in images."""
  return {
    "steps": round(images / batch),
    "batch_size": batch,
    "learning_rate": rate,
    "warmup": round(10e6 / batch),
    "rate": "constant",
    "weight_decay": 0.0,
    "optimizer": "adam",
    "clip_norm": UNCLIPPED,
    "ema_decay": 0.5 ** (batch / half_life),
    "p_uncond": 0.0,
    "noise_mean": -1.2,
    "noise_std": 1.2,
    "save_every": 1000,
  }


def _song(kind: str, data: str) -> Preset:
  """Return the preset of DDPM++ (``vp``) or NCSN++ (``ve``) for CIFAR-10, FFHQ-64 or AFHQ-64."""
  # Table 7: dropout 13 %, 5 % and 25 %; rate 10e-4, 2e-4 and 2e-4; batch 512, 256 and 256; 200 million images each;
  # half-life 0.5 million images. channel_mult is 2,2,2 for CIFAR-10 and 1,2,2,2 for the others (--cres).
  dropout, rate, batch = {"cifar10": (0.13, 1e-3, 512), "ffhq": (0.05, 2e-4, 256), "afhqv2": (0.25, 2e-4, 256)}[data]
  levels = (2, 2, 2) if data == "cifar10" else (1, 2, 2, 2)
  fields = {**_SONG, **(_DDPMPP if kind == "vp" else _NCSNPP), "channel_mult": levels, "dropout": dropout}
  source = f"Karras et al. 2022 (arXiv:2206.00364), table 7, {'DDPM++' if kind == 'vp' else 'NCSN++'} for {data}"
  training = _edm_training(200e6, batch, rate, 0.5e6)
  return Preset({"network": "song_unet", "fields": fields, **_EDM}, training, f"{source}. {_NOT_AUGMENTED}")


_ADM = Preset(
  # Table 7: dropout 10 %, rate 1e-4, batch 4096, 2.5 billion images, half-life 50 million images, no augmentation.
  {
    "network": "dhariwal_unet",
    "fields": {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (32, 16, 8)}
    | {"dropout": 0.10},
    **_EDM,
  },
  _edm_training(2.5e9, 4096, 1e-4, 50e6),
  "Karras et al. 2022 (arXiv:2206.00364), table 7, ADM for ImageNet-64.",
)

# EDM2 (arXiv:2312.02696), table 6, and config_presets in train_edm2.py of github.com/NVlabs/edm2: channels, rate
# (alpha_ref), dropout and length, in units of 2**20 images, by size. The batch is 2048; the rate rises over 10 million
# images and falls by the inverse square root after 70,000 steps (ImageNet-512) or 35,000 (ImageNet-64).
_EDM2_512 = {
  "xs": (128, 0.0120, 0.0, 2048),
  "s": (192, 0.0100, 0.0, 2048),
  "m": (256, 0.0090, 0.10, 2048),
  "l": (320, 0.0080, 0.10, 1792),
  "xl": (384, 0.0070, 0.10, 1280),
  "xxl": (448, 0.0065, 0.10, 896),
}
_EDM2_64 = {
  "xs": (128, 0.0120, 0.0, 1024),
  "s": (192, 0.0100, 0.0, 1024),
  "m": (256, 0.0090, 0.10, 2048),
  "l": (320, 0.0080, 0.10, 1024),
  "xl": (384, 0.0070, 0.10, 640),
}
_EDM2_BATCH = 2048


def _edm2(side: int, size: str) -> Preset:
  channels, rate, dropout, length = (_EDM2_512 if side == 512 else _EDM2_64)[size]
  # config G: channel_mult 1,2,3,4, three blocks, attention at 16 and 8 pixels, heads of 64 channels.
  fields = {"model_channels": channels, "channel_mult": (1, 2, 3, 4), "num_blocks": 3, "attn_resolutions": (16, 8)}
  training = {
    "steps": length * 2**20 // _EDM2_BATCH,
    "batch_size": _EDM2_BATCH,
    "learning_rate": rate,
    "warmup": round(10e6 / _EDM2_BATCH),
    "rate": f"inverse-sqrt:decay_start={70_000 if side == 512 else 35_000}",
    "weight_decay": 0.0,
    "optimizer": "adam:b2=0.99",
    "clip_norm": UNCLIPPED,
    "ema": ("power:std=0.05", "power:std=0.1"),
    "p_uncond": 0.0,
    "uncertainty": True,
    "weight": "edm:sigma_data=0.5",
    "noise_mean": -0.4 if side == 512 else -0.8,
    "noise_std": 1.0 if side == 512 else 1.6,
    "save_every": 1000,
  }
  what = "latents of ImageNet-512" if side == 512 else "ImageNet-64"
  source = f"Karras et al. 2024 (arXiv:2312.02696), table 6 and train_edm2.py, EDM2-{size.upper()} for {what}."
  model = {"network": "edm2_unet", "fields": {**fields, "channels_per_head": 64, "dropout": dropout}, **_EDM}
  return Preset(model, training, source)


NAMED: dict[str, Preset] = {
  **{f"edm-{data}-{kind}": _song(kind, data) for data in ("cifar10", "ffhq", "afhqv2") for kind in ("vp", "ve")},
  "edm-imagenet64-adm": _ADM,
  **{f"edm2-img512-{size}": _edm2(512, size) for size in _EDM2_512},
  **{f"edm2-img64-{size}": _edm2(64, size) for size in _EDM2_64},
}
"""The presets by name."""


def named(name: str) -> Preset:
  """Return a preset by its name.

  Raises:
    ValueError: if there is none, with the nearest name.

  >>> named("edm2-img512-xs").model["fields"]["model_channels"], named("edm-cifar10-vp").training["steps"]
  (128, 390625)
  """
  return checks.lookup("preset", name, NAMED)
