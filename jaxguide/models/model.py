"""A network with its parameters in memory."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxguide._core.typing import PyTree
from jaxguide.denoisers.linen import check_params, param_shapes
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser
from jaxguide.models import arrays
from jaxguide.models.config import ModelConfig

LARGEST_NETWORK = 2**34
"""How many parameters a network may have: 17 billion."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network with its parameters and what there is to know about it."""

  config: ModelConfig
  params: PyTree

  @property
  def denoiser(self) -> NetworkDenoiser:
    """The network as a denoiser, if it is a UNet; one with a learned variance gives a `jaxguide.Prediction`."""
    self._expect("unet", "super_res_unet")
    learned = self.config.variance == "learned_range"
    return NetworkDenoiser(self.params, self.config.module.apply, self.config.scaling, learned_variance=learned)

  @property
  def log_prob(self) -> ClassifierLogProb:
    """The network as a log-probability of labels, if it is a classifier."""
    self._expect("classifier")
    return ClassifierLogProb(self.params, self.config.module.apply, self.config.scaling)

  @property
  def null_cond(self) -> int | None:
    """The label that stands for none; None where the network has no such label."""
    return self.config.null_cond

  def _expect(self, *networks: str) -> None:
    if self.config.network not in networks:
      raise ValueError(f"this needs a {networks[0]}, but the model is a {self.config.network}")


def init_params(config: ModelConfig, key: jax.Array) -> PyTree:
  """Draw parameters for a network."""
  return config.module.init(key, *least_inputs(config))


def least_inputs(config: ModelConfig) -> tuple[Any, ...]:
  """The least that the network can be called on."""
  x, t = jnp.zeros((1, *config.image_shape)), jnp.zeros(1)
  if config.network == "classifier":
    return x, t
  label = None if config.num_classes is None else jnp.zeros(1, int)
  if config.low_res_shape is not None:
    return x, t, {"label": label, "low_res": jnp.zeros((1, *config.low_res_shape))}
  return x, t, label


def shapes(config: ModelConfig) -> PyTree:
  """Give the shapes and types of a network's parameters, ``{"params": ...}``, without making them.

  Raises:
    ValueError: if its fields do not fit each other or the images, or it has more than `LARGEST_NETWORK` parameters.

  >>> shapes(ModelConfig("unet", {"model_channels": 32}, (8, 8, 1), 10))["params"]["label_emb"]["embedding"].shape
  (11, 128)
  """
  try:
    expected = param_shapes(config.module, *jax.eval_shape(lambda: least_inputs(config)))
  except (ArithmeticError, TypeError, AttributeError) as error:
    raise ValueError(f"a {config.network} cannot be made of these fields: {error}") from error
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(expected))
  if size > LARGEST_NETWORK:
    raise ValueError(
      f"the network would have {size:,} parameters, and may have {LARGEST_NETWORK:,}: make model_channels, "
      "channel_mult, num_res_blocks or num_classes smaller"
    )
  return expected


def check(model: Model) -> None:
  """Check that parameters are those of the network, and finite.

  Raises:
    ValueError: naming the first that is not.
  """
  shapes(model.config)
  check_params(model.config.module, model.params, *jax.eval_shape(lambda: least_inputs(model.config)))
  path = arrays.not_finite(model.params)
  if path is not None:
    raise ValueError(f"the parameter {path} is not finite: it holds infinities or NaN, and no sample can be drawn")
