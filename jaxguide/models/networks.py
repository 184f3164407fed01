"""The networks that a model can be made of, each with its role.

A *role* is what a network is for. It says what the network is called on, which function guidance takes it as, and what
its configuration may say. `jaxguide.training.objectives` says how a network of each role is trained.

To add a network, write its Flax module and enter it in `NETWORKS`.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen

from jaxguide import nn
from jaxguide._core import checks
from jaxguide._core.typing import PyTree
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser
from jaxguide.nn.adm.classifier import POOLS

Bounds = Mapping[str, tuple[int | float, int | float]]


class Role(NamedTuple):
  """What a network is for.

  Args:
    name: what people call a network of the role.
    classes: the network's own field for the number of its classes.
    inputs: ``config -> args``, the smallest arguments that the network can be called on, after its parameters.
    function: ``(config, params) -> function``, the network as guidance takes it.
    check: ``config -> None``; it raises ValueError where a configuration does not suit the role.
  """

  name: str
  classes: str
  inputs: Callable[[Any], tuple[Any, ...]]
  function: Callable[[Any, PyTree], Any]
  check: Callable[[Any], None]


class Network(NamedTuple):
  """A kind of network.

  Args:
    module: its Flax module. The fields of a model's configuration are the fields of this class.
    role: what it is for.
    bounds: the least and the largest value of each field that is a number. Far beyond what networks have, they catch
      slips that would end in hours of tracing or take all memory.
    check: ``fields -> None``; it raises ValueError where fields do not suit each other.
    low_res: whether its condition holds a low-resolution image.
  """

  module: type[linen.Module]
  role: Role
  bounds: Bounds = MappingProxyType({})
  check: Callable[[Mapping[str, Any]], None] = lambda fields: None
  low_res: bool = False


# --- denoisers ------------------------------------------------------------------------------------


def _denoiser_inputs(config: Any) -> tuple[Any, ...]:
  x, t = jnp.zeros((1, *config.image_shape)), jnp.zeros(1)
  label = None if config.num_classes is None else jnp.zeros(1, int)
  if config.low_res_shape is not None:
    return x, t, {"label": label, "low_res": jnp.zeros((1, *config.low_res_shape))}
  return x, t, label


def _as_denoiser(config: Any, params: PyTree) -> NetworkDenoiser:
  learned = config.variance == "learned_range"
  return NetworkDenoiser(params, config.module.apply, config.scaling, learned_variance=learned)


def _check_denoiser(config: Any) -> None:
  if config.scale is not None:
    raise ValueError("scale is what is recommended for a classifier: leave it out")
  twice = 2 * config.image_shape[-1]
  if config.variance == "learned_range" and config.fields.get("out_channels") != twice:
    raise ValueError(f"variance 'learned_range' needs twice the image's channels: give out_channels {twice}")


DENOISER = Role("denoiser", "num_classes", _denoiser_inputs, _as_denoiser, _check_denoiser)
"""A network that predicts the clean example; `jaxguide.NetworkDenoiser`."""


# --- classifiers ----------------------------------------------------------------------------------


def _classifier_inputs(config: Any) -> tuple[Any, ...]:
  return jnp.zeros((1, *config.image_shape)), jnp.zeros(1)


def _as_log_prob(config: Any, params: PyTree) -> ClassifierLogProb:
  return ClassifierLogProb(params, config.module.apply, config.scaling)


def _check_classifier(config: Any) -> None:
  if config.variance != "small":
    raise ValueError(f"a classifier has no variance, got {config.variance!r}: leave it out")


CLASSIFIER = Role("classifier", "out_channels", _classifier_inputs, _as_log_prob, _check_classifier)
"""A network that tells the class of a noisy example; `jaxguide.ClassifierLogProb`."""


# --- the table ------------------------------------------------------------------------------------

ADM_BOUNDS: Bounds = {
  "model_channels": (1, 2**16),
  "out_channels": (1, 2**16),
  "num_res_blocks": (0, 64),
  "attention_resolutions": (1, 2**16),
  "dropout": (0, 1),
  "channel_mult": (0, 2**10),
  "num_heads": (1, 2**16),
  "num_head_channels": (-1, 2**16),
  "num_heads_upsample": (-1, 2**16),
}


def _check_adm(fields: Mapping[str, Any]) -> None:
  for name in ("num_head_channels", "num_heads_upsample"):
    if fields.get(name) == 0:
      raise ValueError(f"{name} must be at least 1, or -1 to leave it to others; got 0")
  if fields.get("channel_mult") == ():
    raise ValueError("channel_mult must have a number for at least one level, got none")
  channels: int = fields.get("model_channels", nn.UNet.model_channels)
  for factor in fields.get("channel_mult", ()):
    if math.floor(factor * channels) < 1:
      raise ValueError(f"each of channel_mult must leave at least one of the {channels} model_channels, got {factor}")
  if "pool" in fields:
    checks.lookup("pool", fields["pool"], dict.fromkeys(POOLS))


NETWORKS: dict[str, Network] = {
  "unet": Network(nn.UNet, DENOISER, ADM_BOUNDS, _check_adm),
  "super_res_unet": Network(nn.SuperResUNet, DENOISER, ADM_BOUNDS, _check_adm, low_res=True),
  "classifier": Network(nn.Classifier, CLASSIFIER, ADM_BOUNDS, _check_adm),
}
