"""Presets by name: DiT, SiT and LightningDiT in their published sizes, with the published training.

Unlike the presets by image size, these keep the published process: DiT's is the linear table of 1000 steps with a
learned variance, that of the others a flow. They are for latents of an autoencoder, such as 32x32x4 for images of
256x256 by that of Stable Diffusion, and take any images that can be cut into their patches.
"""

from typing import Any

from jaxguide._core import checks
from jaxguide.training.presets import Preset

# DiT (arXiv:2212.09748), table 1, and DiT_models in models.py of github.com/facebookresearch/DiT. SiT has the same.
SIZES: dict[str, dict[str, Any]] = {
  "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
  "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
  "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
  "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
PATCHES = (2, 4, 8)

# DiT, section 4: AdamW, rate 1e-4 without warm-up or decay, no weight decay, batch 256, running mean 0.9999; labels are
# dropped with probability 0.1 (class_dropout_prob). 400,000 steps in the comparison of sizes (table 4), 7 million for
# XL/2 (table 2). SiT (arXiv:2401.08740), section 4 and appendix: the same.
_TRAINING: dict[str, Any] = {
  "batch_size": 256,
  "learning_rate": 1e-4,
  "warmup": 0,
  "rate": "constant",
  "weight_decay": 0.0,
  "ema_decay": 0.9999,
  "p_uncond": 0.1,
  "save_every": 1000,
}

_CLIPPED = "Gradients are clipped to a norm of 1, which the publication does not do."

_DIT = {"prediction": "eps", "schedule": "linear", "diffusion_steps": 1000, "variance": "learned_range"}
_FLOW = {"prediction": "flow_to_data", "schedule": "flow"}


def _steps(size: str, patch: int) -> int:
  return 7_000_000 if (size, patch) == ("XL", 2) else 400_000


def _of_both(size: str, patch: int) -> dict[str, Preset]:
  fields, steps = {**SIZES[size], "patch_size": patch}, _steps(size, patch)
  return {
    f"DiT-{size}/{patch}": Preset(
      {"network": "dit", "fields": fields, **_DIT},
      {"steps": steps, "loss": "mse", **_TRAINING},
      f"Peebles & Xie 2023 (arXiv:2212.09748), tables 1 and 4 and section 4, DiT-{size}/{patch}. {_CLIPPED}",
    ),
    f"SiT-{size}/{patch}": Preset(
      {"network": "sit", "fields": {**fields, "learn_sigma": True}, **_FLOW},
      {"steps": steps, "noise": "uniform", **_TRAINING},
      f"Ma et al. 2024 (arXiv:2401.08740), section 4 and appendix, SiT-{size}/{patch}, linear path, velocity, uniform "
      f"times. {_CLIPPED}",
    ),
  }


# LightningDiT (arXiv:2501.01423), table 2 and section 4, and configs/lightningdit_xl_vavae_f16d32.yaml of
# github.com/hustvl/LightningDiT: batch 1024, rate 2e-4, betas 0.9 and 0.95, times by a logit-normal, gradients clipped
# to 1, running mean 0.9999, 80,000 steps (64 epochs). Its direction loss is not here.
_LIGHTNING = Preset(
  {
    "network": "lightningdit",
    "fields": {
      **SIZES["XL"],
      "patch_size": 1,
      "use_swiglu": True,
      "use_rope": True,
      "use_rmsnorm": True,
    },
    **_FLOW,
  },
  {
    **_TRAINING,
    "steps": 80_000,
    "batch_size": 1024,
    "learning_rate": 2e-4,
    "optimizer": "adamw:b2=0.95",
    "noise": "logit-normal",
  },
  "Yao et al. 2025 (arXiv:2501.01423), table 2 and section 4, LightningDiT-XL/1 on latents of 16x16x32, without its "
  "loss on the velocity's direction.",
)

NAMED: dict[str, Preset] = {
  name: preset for size in SIZES for patch in PATCHES for name, preset in _of_both(size, patch).items()
} | {"LightningDiT-XL/1": _LIGHTNING}
"""The presets by name."""


def named(name: str) -> Preset:
  """Return a preset by its name.

  Raises:
    ValueError: if there is none, with the nearest name.

  >>> named("DiT-XL/2").model["fields"]["depth"], named("SiT-B/4").training["learning_rate"]
  (28, 0.0001)
  """
  return checks.lookup("preset", name, NAMED)
