"""Features of a trained jaxguide classifier: of images of the kind that it was trained on."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxguide import models, schedules
from jaxguide._core.files import PathLike
from jaxguide._core.typing import PyTree
from jaxguide.denoisers.scaling import coefficients
from jaxguide.evaluation.features.base import Features
from jaxguide.evaluation.features.weights import DIGITS
from jaxguide.models import Model, ModelConfig, arrays

VERSION = 1


def classifier(model: PathLike) -> Features:
  """Features of a classifier that jaxguide trained: what its last layer sees of clean images.

  They suit images for which no published network is meant. The classifier may have been trained on few images, so
  compare distances only where one and the same classifier gave the features.

  Args:
    model: the folder of the classifier, or of the run that trained it. The classifier takes the images as ``x0``, with
      the least noise level that it was trained on as its time, and without noise.

  Returns:
    Features with the outputs ``pool``, the input of the network's last ``flax.linen.Dense``, and ``logits``. Images
    are not resized; they must have the size that the classifier was trained on.

  Raises:
    FileNotFoundError: if there is no model.
    ValueError: if the model is damaged or no classifier, or its logits do not come from a ``flax.linen.Dense``.
  """
  loaded = models.load(model)
  _ = loaded.log_prob  # An error for a denoiser.
  function = _Function(loaded.config)
  shape = jax.ShapeDtypeStruct((1, *loaded.config.image_shape), jnp.float32)
  jax.eval_shape(function, loaded.params, shape)
  channels = 3 if loaded.config.image_shape[-1] == 3 else None
  return Features(
    "classifier", VERSION, _digest(loaded), function, loaded.params, None, channels, "Classifier", ("pool", "logits")
  )


def _digest(model: Model) -> str:
  """Return the first digits of the SHA-256 of a model's parameters and what they are computed with."""
  digest = hashlib.sha256(repr(model.config).encode())
  for name, leaf in arrays.leaves(model.params).items():
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()[:DIGITS]


def least_level(config: ModelConfig) -> float:
  """Return the least noise level that a network was trained on; 0 in continuous time without a range of levels.

  >>> from jaxguide.models import ModelConfig
  >>> least_level(ModelConfig("classifier", {"num_head_channels": 32}, (8, 8, 1), 10, noise_range=(0.1, 5)))
  0.1
  """
  schedule, low = config.noise_schedule, 0.0
  if isinstance(schedule, schedules.Table):
    low = float(schedule.sigmas[0])
  return max(low, config.noise_range[0]) if config.noise_range else low


@dataclasses.dataclass(frozen=True, eq=False)
class _Function:
  config: ModelConfig

  def __call__(self, params: PyTree, images: jax.Array) -> Mapping[str, jax.Array]:
    """Return the outputs of images in [0, 255]."""
    config = self.config
    if images.shape[1:] != tuple(config.image_shape):
      raise ValueError(
        f"the classifier was trained on images of shape {tuple(config.image_shape)}, got images of shape "
        f"{images.shape[1:]}: resize them, or use other features"
      )
    x0 = config.data.encode(jnp.rint(images).astype(jnp.uint8))
    level = jnp.asarray(least_level(config), jnp.float32)
    _, _, c_in, c_noise = coefficients(config.scaling, level)
    time = jnp.full(len(images), c_noise, jnp.float32)
    seen: list[tuple[Any, Any]] = []

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      output = call(*args, **kwargs)
      if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
        seen.append((args[0], output))
      return output

    with nn.intercept_methods(watch):
      logits = config.module.apply(params, x0 * c_in, time)
    # The last layer has the logits as its output, or it is not the last.
    pool = next((into for into, output in reversed(seen) if output is logits), None)
    if pool is None:
      raise ValueError(
        f"the logits of {config.network} are not the output of a flax.linen.Dense layer: its features are not known"
      )
    return {"pool": pool.reshape(len(images), -1), "logits": logits}
