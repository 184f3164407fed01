"""Training: a training loop that can be killed and resumed, its configuration, and running means of parameters.

>>> from jaxguide.training import ModelConfig
>>> ModelConfig("unet", {"model_channels": 32}, image_shape=(8, 8, 1), num_classes=10).module.model_channels
32
"""

from jaxguide.models.config import ModelConfig
from jaxguide.models.folders import load, save
from jaxguide.models.model import Model
from jaxguide.training.config import TrainingConfig
from jaxguide.training.ema import PowerFunctionEMA
from jaxguide.training.loop import fit
from jaxguide.training.objectives import objective
from jaxguide.training.program import train
from jaxguide.training.rates import inverse_sqrt
from jaxguide.training.recipes import Recipe, recipe
from jaxguide.training.run_config import RunConfig
from jaxguide.training.signals import Interrupted
from jaxguide.training.step import TrainState, init_state, optimizer, train_step

__all__ = [
  "Interrupted",
  "Model",
  "ModelConfig",
  "PowerFunctionEMA",
  "Recipe",
  "RunConfig",
  "TrainState",
  "TrainingConfig",
  "fit",
  "init_state",
  "inverse_sqrt",
  "load",
  "objective",
  "optimizer",
  "recipe",
  "save",
  "train",
  "train_step",
]
