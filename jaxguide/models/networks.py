"""The networks that a model can use, each with its role.

A *role* is the purpose of a network: denoiser, classifier or autoencoder. It defines the network's inputs, the function
that guidance uses, and the checks of its configuration. `jaxguide.training.objectives` defines how each role is
trained. Autoencoders are imported, and not trained here.

To add a network, write its Flax module and add an entry to `NETWORKS`. A network of one's own needs no entry: its name
is ``module:Class``, where Python finds it.
"""

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen

from jaxguide import nn
from jaxguide._core import checks
from jaxguide._core.typing import PyTree
from jaxguide.denoisers.autoencoders import Autoencoder
from jaxguide.denoisers.frameworks import linen_class
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser
from jaxguide.models import fields


class Role(NamedTuple):
  """The purpose of a network.

  Args:
    name: the name of the role, used in messages.
    classes: the name of the module's field for the number of classes.
    inputs: ``config -> args``, the arguments of ``module.apply`` after the parameters, for a batch of one example.
    function: ``(config, params) -> function``, the function that guidance uses.
    check: ``config -> None``; raises ValueError if a configuration does not fit the role.
  """

  name: str
  classes: str
  inputs: Callable[[Any], tuple[Any, ...]]
  function: Callable[[Any, PyTree], Any]
  check: Callable[[Any], None]


class Network(NamedTuple):
  """An entry of `NETWORKS`: a type of network.

  Args:
    module: its Flax linen module class; for a class of another framework, that of
      `jaxguide.denoisers.frameworks.linen_class`. `ModelConfig.fields` are the fields of this class. A denoiser is
      called as ``module(x, t, label)``, a classifier as ``module(x, t)``, an autoencoder by its methods
      ``moments(images)`` and ``decode(latents)``, as `jaxguide.AutoencoderKL` has them. If the method takes ``train``
      as well, it is True in training, for dropout. If the class has a field for the number of classes (``num_classes``;
      ``out_channels`` of a classifier) or for the length of a label vector (``label_size``), it is set. If it has
      ``null_class=True``, label ``num_classes``, or the vector of zeros, means "no label". Other Flax collections than
      ``params`` are not supported. Parameters whose last name is in its attribute ``frozen``, such as tables of
      positions, keep their values in training. If it has a method ``forced(params)``, each step of the training begins
      with its result instead of the parameters, as in EDM2's forced weight normalisation. If it has a method
      ``logvar(params, c_noise)``, that is its learned uncertainty, which a training with ``uncertainty`` trains.
    role: its role.
    bounds: the least and the largest value of each numeric field. They are far beyond real networks, and catch mistakes
      that would lead to hours of tracing or run out of memory.
    check: ``fields -> None``; raises ValueError if fields contradict each other.
    low_res: whether its condition contains a low-resolution image.
  """

  module: type[linen.Module]
  role: Role
  bounds: fields.Bounds = MappingProxyType({})
  check: Callable[[Mapping[str, Any]], None] = lambda fields: None
  low_res: bool = False


# --- denoisers ------------------------------------------------------------------------------------


def _denoiser_inputs(config: Any) -> tuple[Any, ...]:
  x, t = jnp.zeros((1, *config.image_shape)), jnp.zeros(1)
  label = None if config.num_classes is None else jnp.zeros(1, int)
  if config.label_size is not None:
    label = jnp.zeros((1, config.label_size))
  if config.low_res_shape is not None:
    return x, t, {"label": label, "low_res": jnp.zeros((1, *config.low_res_shape))}
  return x, t, label


def _as_denoiser(config: Any, params: PyTree) -> NetworkDenoiser:
  learned, module = config.variance == "learned_range", config.module
  return NetworkDenoiser(params, module.apply, config.scaling, learned, _classes_of(config, module))


def _classes_of(config: Any, module: linen.Module) -> int | None:
  """Return the number of classes of a configuration whose network does not say it."""
  return config.num_classes if getattr(module, config.role.classes, None) is None else None


def _check_denoiser(config: Any) -> None:
  if config.scale is not None:
    raise ValueError("scale is the recommended guidance scale of a classifier: leave it out for a denoiser")
  if config.noise_range is not None:
    raise ValueError("noise_range is for a classifier: leave it out for a denoiser")
  twice = 2 * config.image_shape[-1]
  if config.variance == "learned_range" and not getattr(config.module, "learned_variance", False):
    if hasattr(config.module, "learn_sigma"):
      raise ValueError(f"variance 'learned_range' needs a network that has one: this {config.network} has none")
    if config.fields.get("out_channels") != twice:
      raise ValueError(f"variance 'learned_range' needs twice the image's channels: give out_channels {twice}")


DENOISER = Role("denoiser", "num_classes", _denoiser_inputs, _as_denoiser, _check_denoiser)
"""A network that predicts the clean example; `jaxguide.NetworkDenoiser`."""


# --- classifiers ----------------------------------------------------------------------------------


def _classifier_inputs(config: Any) -> tuple[Any, ...]:
  return jnp.zeros((1, *config.image_shape)), jnp.zeros(1)


def _as_log_prob(config: Any, params: PyTree) -> ClassifierLogProb:
  module = config.module
  return ClassifierLogProb(params, module.apply, config.scaling, config.noise_range, _classes_of(config, module))


def _check_classifier(config: Any) -> None:
  if config.variance != "small":
    raise ValueError(f"a classifier has no variance, got {config.variance!r}: leave it out")
  if config.label_size is not None:
    raise ValueError("label_size is for denoisers: a classifier predicts classes")


CLASSIFIER = Role("classifier", "out_channels", _classifier_inputs, _as_log_prob, _check_classifier)
"""A network that predicts the class of a noisy example; `jaxguide.ClassifierLogProb`."""


# --- autoencoders ---------------------------------------------------------------------------------


def _autoencoder_inputs(config: Any) -> tuple[Any, ...]:
  return (jnp.zeros((1, *config.image_shape)),)


def _as_autoencoder(config: Any, params: PyTree) -> Autoencoder:
  return Autoencoder(params, config.module.apply)


def _check_autoencoder(config: Any) -> None:
  for name in ("num_classes", "class_names", "label_size", "scale", "noise_range", "diffusion_steps"):
    if getattr(config, name) is not None:
      raise ValueError(f"an autoencoder has neither labels nor noise levels: leave out {name}")
  if config.variance != "small" or config.encoder != "pixels":
    raise ValueError("an autoencoder takes pixels and has no variance of steps: leave out encoder and variance")
  factor = getattr(config.module, "factor", 1)
  if any(side % factor for side in config.image_shape[:2]):
    raise ValueError(
      f"the sides of image_shape must be multiples of {factor}, the pixels of a latent, got {config.image_shape}"
    )


AUTOENCODER = Role("autoencoder", "num_classes", _autoencoder_inputs, _as_autoencoder, _check_autoencoder)
"""A network that maps images to latents and back; `jaxguide.Autoencoder`."""


# --- the table ------------------------------------------------------------------------------------

NETWORKS: dict[str, Network] = {
  "unet": Network(nn.UNet, DENOISER, fields.ADM, fields.check_adm),
  "super_res_unet": Network(nn.SuperResUNet, DENOISER, fields.ADM, fields.check_adm, low_res=True),
  "classifier": Network(nn.Classifier, CLASSIFIER, fields.ADM, fields.check_adm),
  "autoencoder_kl": Network(nn.AutoencoderKL, AUTOENCODER, fields.KL, fields.check_kl),
  "dit": Network(nn.DiT, DENOISER, fields.DIT, fields.check_dit),
  "sit": Network(nn.SiT, DENOISER, fields.DIT, fields.check_dit),
  "repa": Network(nn.RepaSiT, DENOISER, fields.DIT, fields.check_dit),
  "lightningdit": Network(nn.LightningDiT, DENOISER, fields.DIT, fields.check_dit),
  "song_unet": Network(nn.SongUNet, DENOISER, fields.EDM, fields.check_edm),
  "dhariwal_unet": Network(nn.DhariwalUNet, DENOISER, fields.EDM, fields.check_edm),
  "edm2_unet": Network(nn.EDM2UNet, DENOISER, fields.EDM, fields.check_edm),
}


def find(name: str) -> Network:
  """Return the network of a name.

  Args:
    name: a name of `NETWORKS`; or ``module:Class``, a class that Python can import: of a Flax linen module, or of
      another framework, see `jaxguide.denoisers.frameworks`. It is a denoiser, or what the attribute ``role`` of the
      class says, "classifier" or "autoencoder". The module is imported, so its code runs.

  Raises:
    ValueError: for an unknown name (with the nearest known one), or a class that cannot be imported or is no network.
    TypeError: if the entry in `NETWORKS` is not a `Network`.

  >>> find("unet").role.name, find("flax.linen:Dense").role.name
  ('denoiser', 'denoiser')
  """
  module, colon, path = name.partition(":") if isinstance(name, str) else (name, "", "")
  if not colon:
    network = checks.lookup("network", name, NETWORKS)
    if not isinstance(network, Network):
      raise TypeError(f"NETWORKS[{name!r}] must be a Network(module, role), got {network!r}")
    return network
  if name in _OWN:
    return _OWN[name]
  try:
    found: Any = importlib.import_module(module)
    for part in path.split("."):
      found = getattr(found, part)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f"network {name!r} cannot be imported ({error}): start Python where it finds the module {module!r} with the "
      f"class {path!r}"
    ) from error
  return own(found)[1]


def own(cls: Any) -> tuple[str, Network]:
  """Return the name and the entry of a network of one's own, a class of Flax linen or of another framework.

  Raises:
    TypeError: if the class is of another framework and its networks cannot be called as networks are here.
    ValueError: if it is not such a class.
  """
  is_linen = isinstance(cls, type) and issubclass(cls, linen.Module)
  module = cls if is_linen else linen_class(cls) if isinstance(cls, type) else None
  if module is None:
    raise ValueError(
      "network must be a name, a Flax linen module or its class, a class of NNX, Equinox or Haiku, or a class with the "
      f"methods init and apply, got {cls!r}"
    )
  for name, network in NETWORKS.items():
    if network.module is cls:
      return name, network
  name = f"{cls.__module__}:{cls.__qualname__}"
  role = checks.lookup(
    "role", getattr(cls, "role", DENOISER.name), {role.name: role for role in (DENOISER, CLASSIFIER, AUTOENCODER)}
  )
  _OWN[name] = Network(module, role)
  return name, _OWN[name]


# Classes that were used in this process. A class of a notebook or of a function cannot be imported.
_OWN: dict[str, Network] = {}
