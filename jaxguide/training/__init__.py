"""Training: a training loop that can be killed and resumed, its configuration, and running means of parameters.

>>> from jaxguide.training import ModelConfig
>>> ModelConfig("unet", {"model_channels": 32}, image_shape=(8, 8, 1), num_classes=10).module.model_channels
32
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
  "Interrupted": "jaxguide.training.signals",
  "Model": "jaxguide.models.model",
  "ModelConfig": "jaxguide.models.config",
  "PowerFunctionEMA": "jaxguide.training.ema",
  "Recipe": "jaxguide.training.recipes",
  "RunConfig": "jaxguide.training.run_config",
  "TrainState": "jaxguide.training.step",
  "TrainingConfig": "jaxguide.training.config",
  "fit": "jaxguide.training.loop",
  "init_state": "jaxguide.training.step",
  "inverse_sqrt": "jaxguide.training.rates",
  "load": "jaxguide.models.folders",
  "objective": "jaxguide.training.objectives",
  "optimizer": "jaxguide.training.step",
  "recipe": "jaxguide.training.recipes",
  "save": "jaxguide.models.folders",
  "train": "jaxguide.training.program",
  "train_step": "jaxguide.training.step",
}
"""Where the names are. A name is imported when it is used: to load a model and to sample it, no optimiser is needed."""


def __getattr__(name: str) -> Any:
  """Import what is asked for."""
  if name in _MODULES:
    value = getattr(importlib.import_module(_MODULES[name]), name)
  else:
    try:
      value = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
      if error.name != f"{__name__}.{name}":
        raise
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
  globals()[name] = value
  return value


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
