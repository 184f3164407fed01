"""The networks of the demo, for scikit-learn's 8x8 digits: minutes of training on two CPU cores."""

from jaxguide.models.config import ModelConfig
from jaxguide.training.config import TrainingConfig

SHAPE = (8, 8, 1)

DENOISER = ModelConfig(
  network="unet",
  fields={"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "num_head_channels": 16},
  image_shape=SHAPE,
  num_classes=10,
)
DENOISER_TRAINING = TrainingConfig(steps=1200, p_uncond=0.15)

CLASSIFIER = ModelConfig(
  network="classifier",
  fields={"model_channels": 24, "channel_mult": (1, 2), "num_res_blocks": 1, "num_head_channels": 24},
  image_shape=SHAPE,
  num_classes=10,
)
CLASSIFIER_TRAINING = TrainingConfig(steps=500, weight_decay=0.3, noise_mean=0.0, noise_std=1.5)
