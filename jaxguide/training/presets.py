"""Presets: settings of a network and its training by image size, from published ones.

The networks and their batch sizes, learning rates and lengths are those of the publications. The diffusion process is
not: the presets are in continuous time, with the cosine schedule and v-prediction, and they replace a share of the
labels by the null label, so that classifier-free guidance works. `jaxguide.models.importers` has the published
configurations with the discrete process, for the published weights.

The published batches were divided over many devices. On one device, give ``accumulation`` and ``remat``; the result of
a step stays the same. `jaxguide.training.describe` shows the memory and the operations of a step.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxguide._core import checks
from jaxguide.models.config import ModelConfig
from jaxguide.training.config import TrainingConfig

GUIDED_DIFFUSION = "https://github.com/openai/guided-diffusion"
IMPROVED_DIFFUSION = "https://github.com/openai/improved-diffusion"

PROCESS = "The process is this package's: continuous time, cosine schedule, v-prediction"
"""What all presets change about the published settings."""

LABELS = ", and 10% of the labels replaced by the null label (Ho & Salimans 2022, arXiv:2207.12598)"


@dataclasses.dataclass(frozen=True)
class Preset:
  """Settings of a network and its training.

  Args:
    model: settings of `jaxguide.models.ModelConfig`, ``network``, ``fields`` and others; not the images and classes.
    training: fields of `jaxguide.training.TrainingConfig`.
    source: where the numbers are from, and what differs from there.
  """

  model: Mapping[str, Any]
  training: Mapping[str, Any]
  source: str

  def model_config(
    self, image_shape: Sequence[int], num_classes: int | None, class_names: Sequence[str] | None = None, **changes: Any
  ) -> ModelConfig:
    """Return the configuration of the network for images and classes.

    Args:
      image_shape: (height, width, channels), with the sides that the preset is for.
      num_classes: number of classes, or None for an unconditional network.
      class_names: the name of each class, or None.
      **changes: settings that replace the preset's. ``fields`` replaces those fields that it has.
    """
    fields = {**self.model["fields"], **changes.pop("fields", {})}
    shapes: dict[str, Any] = {"image_shape": tuple(image_shape), "num_classes": num_classes, "class_names": class_names}
    if self.model["network"] == "super_res_unet":
      shapes["low_res_shape"] = (*(side // UPSAMPLING for side in image_shape[:2]), image_shape[2])
    return ModelConfig(**{**self.model, **shapes, **changes, "fields": fields})

  def training_config(self, model: ModelConfig, **changes: Any) -> TrainingConfig:
    """Return the configuration of the training of a network.

    Args:
      model: the configuration of the network. Without a null label, ``p_uncond`` is left out.
      **changes: fields that replace the preset's.
    """
    fields = {**self.training, **changes}
    if model.null_cond is None and "p_uncond" not in changes:
      fields.pop("p_uncond", None)
    return TrainingConfig(**fields)


@dataclasses.dataclass(frozen=True)
class _Published:
  """Settings as they were published, for one size.

  Args:
    fields: the network's fields.
    training: fields of the training.
    source: where they are from.
  """

  fields: Mapping[str, Any]
  training: Mapping[str, Any]
  source: str


DEMO = 8
"""The image size of the demo. Its settings are this package's own."""

UPSAMPLING = 4
"""The sides of a super-resolution preset's images, divided by those of its low-resolution images."""

# guided-diffusion and improved-diffusion: ema_rate 0.9999 (scripts/image_train.py); no weight decay and no annealing
# for denoisers (github.com/openai/guided-diffusion/issues/46). Their steps have no gradient clipping; clip_norm stays
# ours. A checkpoint is saved every 10,000 steps there; here every 1,000, since one device takes longer for a step.
_DENOISER = {"rate": "constant", "weight_decay": 0.0, "ema_decay": 0.9999, "p_uncond": 0.1, "save_every": 1000}

# guided-diffusion's README, "Here are flags for training the 128x128 classifier. You can modify these for training
# classifiers at other resolutions": batch_size 256, lr 3e-4, weight_decay 0.05, anneal_lr. It anneals linearly.
_CLASSIFIER = {"batch_size": 256, "learning_rate": 3e-4, "weight_decay": 0.05, "rate": "cosine-decay"} | {
  "ema_decay": 0.9999,
  "save_every": 1000,
}

# guided-diffusion/script_util.py, create_classifier and create_model. Attention at 32, 16 and 8 pixels.
_ADM = {"resblock_updown": True, "use_scale_shift_norm": True}
_ADM_CLASSIFIER = {"model_channels": 128, "num_head_channels": 64, "pool": "attention", **_ADM}

_LEVELS: dict[int, dict[str, Any]] = {
  # improved-diffusion/script_util.py: channel_mult (1, 2, 2, 2) for 32. Attention at 16 and 8 pixels.
  32: {"channel_mult": (1, 2, 2, 2), "attention_resolutions": (2, 4)},
  64: {"channel_mult": (1, 2, 3, 4), "attention_resolutions": (2, 4, 8)},
  128: {"channel_mult": (1, 1, 2, 3, 4), "attention_resolutions": (4, 8, 16)},
  256: {"channel_mult": (1, 1, 2, 2, 4, 4), "attention_resolutions": (8, 16, 32)},
}

_DEMO = {"channel_mult": (1, 2), "num_res_blocks": 1}
_ADM_TABLE = "Dhariwal & Nichol 2021 (arXiv:2105.05233), Table 11, and the flags in the README of guided-diffusion"
_ADM_FLAGS = "the flags for training a classifier in the README of guided-diffusion (arXiv:2105.05233)"

PUBLISHED: dict[str, dict[int, _Published]] = {
  "unet": {
    DEMO: _Published(
      {"model_channels": 16, "num_head_channels": 16, **_DEMO},
      {"steps": 1200, "p_uncond": 0.15},
      "jaxguide demo, for 8x8 digits",
    ),
    # MODEL_FLAGS="--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3",
    # TRAIN_FLAGS="--lr 1e-4 --batch_size 128", 500K steps; num_heads 4 and attention_resolutions 16,8 are defaults.
    32: _Published(
      {"model_channels": 128, "num_res_blocks": 3, "dropout": 0.3, "num_heads": 4, "resblock_updown": False}
      | {"use_scale_shift_norm": True, **_LEVELS[32]},
      {"steps": 500_000, "batch_size": 128, "learning_rate": 1e-4, **_DENOISER},
      "Nichol & Dhariwal 2021 (arXiv:2102.09672), the flags in the README of improved-diffusion "
      f"({IMPROVED_DIFFUSION}), unconditional CIFAR-10",
    ),
    # MODEL_FLAGS="--attention_resolutions 32,16,8 --dropout 0.1 --num_channels 192 --num_head_channels 64
    # --num_res_blocks 3 --resblock_updown True --use_new_attention_order True --use_scale_shift_norm True".
    64: _Published(
      {"model_channels": 192, "num_res_blocks": 3, "num_head_channels": 64, "use_new_attention_order": True}
      | {"dropout": 0.1, **_ADM, **_LEVELS[64]},
      {"steps": 540_000, "batch_size": 2048, "learning_rate": 3e-4, **_DENOISER},
      f"{_ADM_TABLE} ({GUIDED_DIFFUSION}), ImageNet 64x64",
    ),
    # "--num_channels 256 --num_heads 4 --num_res_blocks 2".
    128: _Published(
      {"model_channels": 256, "num_res_blocks": 2, "num_heads": 4, **_ADM, **_LEVELS[128]},
      {"steps": 4_360_000, "batch_size": 256, "learning_rate": 1e-4, **_DENOISER},
      f"{_ADM_TABLE} ({GUIDED_DIFFUSION}), ImageNet 128x128",
    ),
    # "--num_channels 256 --num_head_channels 64 --num_res_blocks 2".
    256: _Published(
      {"model_channels": 256, "num_res_blocks": 2, "num_head_channels": 64, **_ADM, **_LEVELS[256]},
      {"steps": 1_980_000, "batch_size": 256, "learning_rate": 1e-4, **_DENOISER},
      f"{_ADM_TABLE} ({GUIDED_DIFFUSION}), ImageNet 256x256",
    ),
  },
  "super_res_unet": {
    # "--large_size 256 --small_size 64 --num_channels 192 --num_heads 4 --num_res_blocks 2"; the low-resolution images
    # are means over squares (scripts/super_res_train.py, mode="area").
    256: _Published(
      {"model_channels": 192, "num_res_blocks": 2, "num_heads": 4, **_ADM, **_LEVELS[256]},
      {"steps": 500_000, "batch_size": 256, "learning_rate": 1e-4, "low_res_filter": "box", **_DENOISER},
      "Dhariwal & Nichol 2021 (arXiv:2105.05233), Table 12, and the flags in the README of guided-diffusion "
      f"({GUIDED_DIFFUSION}), ImageNet 64x64 to 256x256",
    ),
  },
  "classifier": {
    DEMO: _Published(
      {"model_channels": 24, "num_head_channels": 24, **_DEMO},
      {"steps": 500, "weight_decay": 0.3, "noise_mean": 0.0, "noise_std": 1.5},
      "jaxguide demo, for 8x8 digits",
    ),
    # Not published. The levels are those of the UNet for 32.
    32: _Published(
      {"num_res_blocks": 2, **_ADM_CLASSIFIER, **_LEVELS[32], "attention_resolutions": (1, 2, 4)},
      {"steps": 300_000, **_CLASSIFIER},
      f"not published for 32x32: {_ADM_FLAGS} ({GUIDED_DIFFUSION}), which are for 128x128, at the levels of "
      "improved-diffusion's UNet for 32x32",
    ),
    # "--classifier_depth 4" in the flags for sampling with 64x64_classifier.pt.
    64: _Published(
      {"num_res_blocks": 4, **_ADM_CLASSIFIER, **_LEVELS[64]},
      {"steps": 300_000, **_CLASSIFIER},
      f"{_ADM_FLAGS} ({GUIDED_DIFFUSION}), with the depth of 64x64_classifier; batch, rate and length are those for "
      "128x128",
    ),
    128: _Published(
      {"num_res_blocks": 2, **_ADM_CLASSIFIER, **_LEVELS[128]},
      {"steps": 300_000, **_CLASSIFIER},
      f"{_ADM_FLAGS} ({GUIDED_DIFFUSION}), for 128x128",
    ),
    256: _Published(
      {"num_res_blocks": 2, **_ADM_CLASSIFIER, **_LEVELS[256]},
      {"steps": 500_000, **_CLASSIFIER},
      f"{_ADM_FLAGS} ({GUIDED_DIFFUSION}), with the 500,000 steps of the publication for 256x256; batch and rate are "
      "those for 128x128",
    ),
  },
}
"""The published settings by network and image size."""


def preset(network: str, size: int | Sequence[int]) -> Preset:
  """Return the preset of a network for an image size.

  A size without a preset has that of the next larger size, with as many levels as its sides can be halved.

  Args:
    network: ``unet``, ``super_res_unet`` (to images of this size, from a quarter of their sides) or ``classifier``.
    size: the side of the images, at most 256; or (height, width), of which the larger one counts.

  Raises:
    ValueError: for another network, or a size beyond the largest preset.

  >>> preset("unet", 28).model["fields"]["channel_mult"], preset("unet", 32).model["fields"]["channel_mult"]
  ((1, 2, 2), (1, 2, 2, 2))
  """
  by_size = checks.lookup("network of the presets", network, PUBLISHED)
  sides = (size,) if isinstance(size, int) else tuple(size)
  for side in sides:
    checks.at_least("size", side, 1)
  largest, number = max(sides), max(by_size)
  if largest > number:
    raise ValueError(
      f"the largest preset of a {network} is for images of {number}x{number}, got size {largest}: give a smaller size, "
      "or the fields of the network yourself"
    )
  nearest = min(number for number in by_size if number >= largest)
  published = by_size[nearest]
  fields, note = _with_levels(published.fields, sides)
  if network == "super_res_unet" and any(side % UPSAMPLING for side in sides):
    raise ValueError(f"the sides of a super_res_unet's images must be multiples of {UPSAMPLING}, got size {size}")
  source = published.source if largest == nearest else f"{nearest}x{nearest}{note}: {published.source}"
  changes = f"{PROCESS}{LABELS}, and no learned variance. Gradients are clipped to a norm of 1."
  if network == "classifier":
    changes = f"{PROCESS}. The learning rate falls by a cosine; the published one falls linearly."
  model = {"network": network, "fields": fields, "prediction": "v", "schedule": "cosine"}
  return Preset(model, dict(published.training), f"{source}." if nearest == DEMO else f"{source}. {changes}")


def _with_levels(fields: Mapping[str, Any], sides: Sequence[int]) -> tuple[dict[str, Any], str]:
  """Leave out the levels that the sides do not allow, and say so."""
  levels = len(fields["channel_mult"])
  possible = min(levels, *(1 + (side & -side).bit_length() - 1 for side in sides))
  if possible == levels:
    return dict(fields), ""
  changed = {**fields, "channel_mult": fields["channel_mult"][:possible]}
  if "attention_resolutions" in fields:
    factors = tuple(factor for factor in fields["attention_resolutions"] if factor < 2**possible)
    changed["attention_resolutions"] = factors
  times = {1: "cannot be halved", 2: "can be halved once"}.get(possible, f"can be halved {possible - 1} times")
  return changed, f" with {possible} of its {levels} levels, since the sides {times}"
