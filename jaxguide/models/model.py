"""A network with its parameters in memory."""

import dataclasses
import math
from typing import Any

import jax

from jaxguide._core.typing import PyTree
from jaxguide.denoisers.linen import check_params, param_shapes
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser
from jaxguide.models import arrays
from jaxguide.models.config import ModelConfig
from jaxguide.models.networks import CLASSIFIER, DENOISER, Role

LARGEST_NETWORK = 2**34
"""How many parameters a network may have: 17 billion."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network with its parameters and what there is to know about it."""

  config: ModelConfig
  params: PyTree

  @property
  def denoiser(self) -> NetworkDenoiser:
    """The network as a denoiser, if that is its role; one with a learned variance gives a `jaxguide.Prediction`."""
    return self._as(DENOISER)

  @property
  def log_prob(self) -> ClassifierLogProb:
    """The network as a log-probability of labels, if it is a classifier."""
    return self._as(CLASSIFIER)

  @property
  def null_cond(self) -> int | None:
    """The label that stands for none; None where the network has no such label."""
    return self.config.null_cond

  def _as(self, role: Role) -> Any:
    if self.config.role is not role:
      raise ValueError(f"this needs a {role.name}, but the model is a {self.config.network}")
    return role.function(self.config, self.params)


def init_params(config: ModelConfig, key: jax.Array) -> PyTree:
  """Draw parameters for a network."""
  return config.module.init(key, *config.role.inputs(config))


def shapes(config: ModelConfig) -> PyTree:
  """Give the shapes and types of a network's parameters, ``{"params": ...}``, without making them.

  Raises:
    ValueError: if its fields do not fit each other or the images, or it has more than `LARGEST_NETWORK` parameters.

  >>> shapes(ModelConfig("unet", {"model_channels": 32}, (8, 8, 1), 10))["params"]["label_emb"]["embedding"].shape
  (11, 128)
  """
  try:
    expected = param_shapes(config.module, *jax.eval_shape(lambda: config.role.inputs(config)))
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
  check_params(model.config.module, model.params, *jax.eval_shape(lambda: model.config.role.inputs(model.config)))
  path = arrays.not_finite(model.params)
  if path is not None:
    raise ValueError(f"the parameter {path} is not finite: it holds infinities or NaN, and no sample can be drawn")
