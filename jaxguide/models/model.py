"""A network's configuration with its parameters, in memory."""

import dataclasses
import math
from typing import Any

import jax

from jaxguide._core.typing import PyTree
from jaxguide.denoisers.autoencoders import Autoencoder
from jaxguide.denoisers.linen import check_params, param_shapes
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser
from jaxguide.models import arrays, initial
from jaxguide.models.config import ModelConfig
from jaxguide.models.networks import AUTOENCODER, CLASSIFIER, DENOISER, Role

LARGEST_NETWORK = 2**34
"""The largest number of parameters of a network: 17 billion."""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network's configuration and parameters."""

  config: ModelConfig
  params: PyTree

  @property
  def denoiser(self) -> NetworkDenoiser:
    """The network as a denoiser. With a learned variance, the denoiser returns a `jaxguide.Prediction`.

    Raises:
      ValueError: if the network is a classifier.
    """
    return self._as(DENOISER)

  @property
  def log_prob(self) -> ClassifierLogProb:
    """The classifier as a log-probability of labels.

    Raises:
      ValueError: if the network is not a classifier.
    """
    return self._as(CLASSIFIER)

  @property
  def autoencoder(self) -> Autoencoder:
    """The network as an autoencoder, with the scale and the shift of its latents.

    Raises:
      ValueError: if the network is not an autoencoder.
    """
    return self._as(AUTOENCODER)

  @property
  def null_cond(self) -> Any:
    """The null label, which means "no label": a number or a vector of zeros; None if the network has no null class."""
    return self.config.null_cond

  def _as(self, role: Role) -> Any:
    if self.config.role is not role:
      raise ValueError(f"this needs a {role.name}, but the model is a {self.config.network}")
    return role.function(self.config, self.params)


def init_params(config: ModelConfig, key: jax.Array) -> PyTree:
  """Draw random initial parameters of a network, those of Flax's ``module.init``.

  They are computed array by array, by small programs on the host's CPU (`jaxguide.models.initial`), and are bit for bit
  the same on every platform. Within a program, and for the shapes alone (``jax.eval_shape``), this is ``module.init``.
  """

  def init(key: jax.Array) -> PyTree:
    return config.module.init(key, *config.role.inputs(config))

  in_program = isinstance(jax.random.fold_in(key, 0), jax.core.Tracer)
  return init(key) if in_program else initial.by_array(init, key)


def shapes(config: ModelConfig) -> PyTree:
  """Return the shapes and types of a network's parameters, ``{"params": ...}``, without allocating them.

  Raises:
    ValueError: if its fields contradict each other or do not fit the images, or it has more than `LARGEST_NETWORK`
      parameters.

  >>> shapes(ModelConfig("unet", {"model_channels": 32}, (8, 8, 1), 10))["params"]["label_emb"]["embedding"].shape
  (11, 128)
  """
  try:
    expected = param_shapes(config.module, *jax.eval_shape(lambda: config.role.inputs(config)))
  except (ArithmeticError, TypeError, AttributeError) as error:
    raise ValueError(f"these fields do not give a valid {config.network}: {error}") from error
  if set(expected) != {"params"}:
    raise ValueError(
      f"{config.network} has the Flax collections {', '.join(sorted(expected))}, and only params is supported: use a "
      "network without, for example, batch statistics"
    )
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(expected))
  if size > LARGEST_NETWORK:
    raise ValueError(
      f"the network would have {size:,} parameters, but at most {LARGEST_NETWORK:,} are allowed: "
      "reduce model_channels, channel_mult, num_res_blocks or num_classes"
    )
  return expected


def check(model: Model) -> None:
  """Check that a model's parameters have the network's names and shapes, and are finite.

  Raises:
    ValueError: if not, naming the first wrong parameter.
  """
  shapes(model.config)
  check_params(model.config.module, model.params, *jax.eval_shape(lambda: model.config.role.inputs(model.config)))
  path = arrays.not_finite(model.params)
  if path is not None:
    raise ValueError(f"the parameter {path} is not finite: it contains infinities or NaN")
