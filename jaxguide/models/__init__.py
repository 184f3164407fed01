"""Models: a network's configuration with its parameters, in memory and as a folder on disk.

`names` lists the trained models that come with the package. `load` reads them by their names.

>>> from jaxguide.models import ModelConfig
>>> ModelConfig("unet", {"model_channels": 32}, image_shape=(8, 8, 1), num_classes=10).module.model_channels
32
"""

from jaxguide.models.config import ModelConfig
from jaxguide.models.folders import exists, load, save
from jaxguide.models.model import Model
from jaxguide.models.pretrained import names

__all__ = ["Model", "ModelConfig", "exists", "load", "names", "save"]
