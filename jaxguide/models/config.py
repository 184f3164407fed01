"""The configuration of a model, as plain data that can be stored in a JSON file."""

import contextlib
import dataclasses
import math
import reprlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen

from jaxguide import schedules
from jaxguide._core import checks, records
from jaxguide.denoisers import scaling
from jaxguide.denoisers.frameworks import linen_class
from jaxguide.models import networks
from jaxguide.models.encoders import ENCODERS, Encoder
from jaxguide.models.networks import Network, Role
from jaxguide.schedules.posterior import VARIANCES

# The least and the largest value of each numeric field; for a list, of each element. They are far beyond real networks:
# a value outside is a mistake, and would lead to hours of tracing or run out of memory.
SIDE = (1, 2**16)

BOUNDS: dict[str, tuple[int | float, int | float]] = {
  "image_shape": SIDE,
  "low_res_shape": SIDE,
  "num_classes": (1, 2**24),
  "diffusion_steps": (1, 100_000),
  "scale": (-math.inf, math.inf),
  "noise_range": (0, math.inf),
  "label_size": (1, 2**24),
  "time_scale": (-1e6, 1e6),
  "sigma_data": (1e-6, 1e6),
}

# For the fields of networks without bounds.
ANY_NUMBER = (-(2**53), 2**53)

LARGEST_IMAGE = 2**31 - 1

DTYPES = ("float32", "bfloat16", "float16", "float64")

# Dataclass fields that every Flax module has, which are not fields of a network.
NOT_FIELDS = ("parent", "name")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The configuration of a network: everything that is needed to use its parameters.

  Args:
    network: a name of `jaxguide.models.networks.NETWORKS`, such as ``unet``, ``classifier`` or ``dit``; or a network
      of your own: a Flax linen module, its class, a class of NNX, Equinox or Haiku, or ``"module:Class"``. The
      arguments of such a class's constructor are its fields. See `jaxguide.models.networks.Network` for how it is
      called. It is stored by its name, so that a saved model can be loaded wherever Python can import the class.
    fields: the fields of the network's class, such as those of `jaxguide.UNet`; ``dtype`` is stored by its name.
      ``{}`` for a module, which has its own.
    image_shape: (height, width, channels), each at most 65,536, and at most 2**31 - 1 numbers in all.
    num_classes: number of classes, at most 2**24, or None for an unconditional network.
    prediction: what the network predicts, a name from `jaxguide.scaling`. For a classifier it only sets the scaling of
      the input.
    schedule: the noise schedule that gives the network's time input, a name from `jaxguide.schedules`: a continuous
      schedule, or the betas of a table if ``diffusion_steps`` is given. Or the betas themselves: a list of numbers
      between 0 and 1, one for each step of a discrete process.
    diffusion_steps: number of steps of the discrete process that the network was trained on, at most 100,000; None for
      continuous time. A list of betas gives it.
    rescale_timesteps: whether the time input is the step of a table rescaled to 1000 steps.
    variance: the variance of the noise that the solver ``ddpm`` adds for this network by default, ``small``, ``large``
      or ``learned_range``. Published models have their own: OpenAI's of guided-diffusion have ``learned_range``.
    scale: the recommended guidance scale of a classifier, or None.
    low_res_shape: (height, width, channels) of the low-resolution image of a ``super_res_unet``; None for others.
    encoder: how the stored examples of a dataset are converted to x0, a name from `jaxguide.models.encoders`.
    class_names: the names of the classes, one for each, all different; None if the classes have no names.
    noise_range: the least and the largest noise level (sigma) that a classifier was trained on; None for all levels.
    label_size: length of a label that is a vector of floats, such as attributes or an embedding; ``num_classes`` is
      None then.
    time_scale: what the network's time is multiplied by, as in `jaxguide.scaling`. None for the usual factor: that of
      the discrete process if there is one, 1000 for ``flow`` and for continuous schedules, and otherwise the default of
      the prediction.
    sigma_data: the standard deviation of the data, for the predictions ``edm`` and ``consistency``; 0.5 if it is None.

  Raises:
    ValueError: for an unknown name, with the nearest known one; for a field that the network does not have; or for a
      value that is out of range or of a wrong type, naming the field.
  """

  network: Any
  fields: Mapping[str, Any]
  image_shape: Sequence[int]
  num_classes: int | None
  prediction: str = "v"
  schedule: str | Sequence[float] | np.ndarray = "cosine"
  diffusion_steps: int | None = None
  rescale_timesteps: bool = False
  variance: str = "small"
  scale: float | int | None = None
  low_res_shape: Sequence[int] | None = None
  encoder: str = "pixels"
  class_names: Sequence[str] | None = None
  noise_range: Sequence[float | int] | None = None
  label_size: int | None = None
  time_scale: float | int | None = None
  sigma_data: float | int | None = None

  def __post_init__(self):
    self._name_network()
    self._read_betas()
    # Convert values to plain data, so that a configuration equals itself after it was stored as JSON and read back.
    for field in dataclasses.fields(self):
      kind = str if field.name == "network" else field.type
      value = checks.field(field.name, getattr(self, field.name), kind, *BOUNDS.get(field.name, ()))
      object.__setattr__(self, field.name, value)
    for name in ("image_shape", "low_res_shape"):
      shape = getattr(self, name)
      if shape is not None and len(shape) != 3:
        raise ValueError(f"{name} must be (height, width, channels), got {reprlib.repr(shape)}")
      if shape is not None and math.prod(shape) > LARGEST_IMAGE:
        raise ValueError(f"{name} must have at most {LARGEST_IMAGE:,} numbers in all, got {reprlib.repr(shape)}")
    network = networks.find(self.network)
    object.__setattr__(self, "fields", _network_fields(network, self.fields))
    if network.low_res != (self.low_res_shape is not None):
      raise ValueError(
        "low_res_shape must be given for a super_res_unet, and left out for other networks; "
        f"the network is a {self.network}"
      )
    checks.lookup("encoder", self.encoder, ENCODERS)
    checks.lookup("prediction", self.prediction, scaling.PREDICTIONS)
    checks.lookup("variance", self.variance, dict.fromkeys(VARIANCES))
    self._check_class_names()
    if self.label_size is not None and self.num_classes is not None:
      raise ValueError(
        f"label_size is for labels that are vectors, and there are {self.num_classes} classes: leave out one of them"
      )
    levels = self.noise_range
    if levels is not None and (len(levels) != 2 or not levels[0] < levels[1]):
      raise ValueError(f"noise_range must be two noise levels, the lower one first, got {levels}")
    self.role.check(self)
    if self.sigma_data is not None and self.prediction not in ("edm", "consistency"):
      raise ValueError(f"sigma_data is for edm and consistency, not {self.prediction!r}: leave it out")
    if self.time_scale is not None and (self.rescale_timesteps or self.prediction == "ve"):
      raise ValueError("time_scale cannot be chosen together with rescale_timesteps, or for ve: leave it out")
    if self.diffusion_steps is None:
      checks.lookup("schedule", str(self.schedule), schedules.SCHEDULES)
      if self.rescale_timesteps:
        raise ValueError("rescale_timesteps needs a network of discrete steps: give diffusion_steps")
    else:
      if isinstance(self.schedule, str):
        checks.lookup("schedule of discrete steps", self.schedule, schedules.BETAS)
      if self.prediction not in ("eps", "x0", "v"):
        raise ValueError(
          f"a network that predicts {self.prediction!r} has no discrete steps: leave out diffusion_steps"
        )

  def _read_betas(self) -> None:
    """Check a schedule that is a list of betas, and take the number of steps from it."""
    betas: Any = self.schedule
    if isinstance(betas, str):
      return
    if isinstance(betas, jax.Array):
      betas = np.asarray(betas)
    if not isinstance(betas, list | tuple | np.ndarray) or np.array(betas, object).ndim != 1:
      hint = ", which is table.betas of a jaxguide.schedules.Table" if isinstance(betas, schedules.Table) else ""
      raise ValueError(f"schedule must be a name or a list of betas{hint}; got {reprlib.repr(betas)}")
    if not 1 <= len(betas) <= BOUNDS["diffusion_steps"][1]:
      raise ValueError(f"schedule must have 1 to {BOUNDS['diffusion_steps'][1]:,} betas, got {len(betas):,}")
    betas = checks.field("schedule", betas, Sequence[float], 0, 1)
    try:
      schedules.Table.from_betas(np.asarray(betas))
    except ValueError as error:
      raise ValueError(f"schedule: {error}") from None
    if self.diffusion_steps not in (None, len(betas)):
      raise ValueError(f"diffusion_steps is {self.diffusion_steps}, and schedule has {len(betas)} betas: leave it out")
    object.__setattr__(self, "schedule", betas)
    object.__setattr__(self, "diffusion_steps", len(betas))

  def _name_network(self) -> None:
    """Replace a Flax module or its class by its name, and a module's fields by plain data."""
    network: Any = self.network
    cls: Any = type(network)
    if isinstance(network, linen.Module):
      if self.fields:
        raise ValueError(f"fields are those of the module {type(network).__name__}: give {{}}")
      classes = networks.own(type(network))[1].role.classes
      values = {field.name: (getattr(network, field.name), field.default) for field in dataclasses.fields(network)}
      changed = {name: value for name, (value, default) in values.items() if not _same(value, default)}
      own = {name: value for name, value in changed.items() if name not in (*NOT_FIELDS, classes, "label_size")}
      object.__setattr__(self, "fields", own)
      network = type(network)
    if isinstance(network, type):
      object.__setattr__(self, "network", networks.own(network)[0])
    elif not isinstance(network, str) and linen_class(cls) is not None:
      name = cls.__name__
      raise ValueError(
        f"network is an object of {name}, and a configuration needs the class and the arguments of its constructor: "
        f"give ModelConfig({name}, {{...}}). The parameters of the object are those of its denoiser"
      )

  def _check_class_names(self) -> None:
    names = self.class_names
    if names is None:
      return
    if self.num_classes is None or len(names) != self.num_classes:
      raise ValueError(
        f"class_names must have one name for each class; there are {len(names)} names and {self.num_classes} classes"
      )
    if len(set(names)) < len(names) or "" in names:
      raise ValueError(f"class_names must all be different and not empty, got {reprlib.repr(names)}")

  @property
  def role(self) -> Role:
    """The role of the network: denoiser or classifier."""
    return networks.find(self.network).role

  @property
  def data(self) -> Encoder:
    """The encoder, which converts stored examples to x0 and back."""
    return ENCODERS[self.encoder]

  @property
  def noise_schedule(self) -> schedules.NoiseSchedule:
    """The noise schedule of the network; a `jaxguide.schedules.Table` if it was trained on discrete steps."""
    if not isinstance(self.schedule, str):
      return schedules.Table.from_betas(np.asarray(self.schedule))
    if self.diffusion_steps is None:
      return schedules.schedule(self.schedule)
    return schedules.table(self.schedule, self.diffusion_steps)

  @property
  def process(self) -> str:
    """The schedule and the time in words.

    >>> ModelConfig("unet", {}, (8, 8, 1), 10, "eps", schedule=[0.1, 0.2]).process
    'schedule of its own betas in 2 steps'
    """
    schedule = f"{self.schedule} schedule" if isinstance(self.schedule, str) else "schedule of its own betas"
    return f"{schedule} in {'continuous time' if self.diffusion_steps is None else f'{self.diffusion_steps} steps'}"

  @property
  def module(self) -> linen.Module:
    """The Flax module."""
    cls = networks.find(self.network).module
    known = {field.name for field in dataclasses.fields(cls)}
    labels = {self.role.classes: self.num_classes, "label_size": self.label_size}
    return cls(**self.fields, **{name: value for name, value in labels.items() if name in known})

  @property
  def null_cond(self) -> Any:
    """The null label, which means "no label": a number or a vector of zeros; None if the network has no null class."""
    if not getattr(self.module, "null_class", False):
      return None
    return self.num_classes if self.label_size is None else np.zeros(self.label_size, np.float32)

  @property
  def scaling(self) -> scaling.Scaling:
    """The scaling of the network's input and output."""
    time_scale: float | int | None = self.time_scale
    if self.diffusion_steps and self.rescale_timesteps:
      time_scale = 1000 / self.diffusion_steps
    if self.prediction == "flow" and time_scale is None:
      time_scale = 1000.0  # The convention of the networks that `jaxguide.training` trains.
    if self.prediction in ("edm", "consistency"):
      given = {"time_scale": time_scale, "sigma_data": self.sigma_data}
      return scaling.PREDICTIONS[self.prediction](**{k: v for k, v in given.items() if v is not None})
    return scaling.scaling(self.prediction, self.noise_schedule, time_scale)


def _network_fields(network: Network, fields: Mapping[str, Any]) -> dict[str, Any]:
  """Check the fields of a network, and return them as plain data."""
  cls, classes = network.module, network.role.classes
  hints = _hints(cls)
  own = [field for field in dataclasses.fields(cls) if field.name not in NOT_FIELDS]
  known, default = {field.name: hints.get(field.name, Any) for field in own}, records.defaults(cls)
  checked: dict[str, Any] = {}
  for name, value in fields.items():
    if name == "perturbation":
      raise ValueError("perturbation is not one of a model's fields: give it to jaxguide.perturbed when you sample")
    kind = checks.lookup(f"field of {cls.__name__}", name, known)
    if name in (classes, "label_size"):
      setting = "num_classes" if name == classes else name
      raise ValueError(f"{name} is not one of the fields: set {setting} of the model instead")
    if name == "dtype" and not (value is None and default.get(name, value) is None):
      checked[name] = dtype_name(value)
    else:
      checked[name] = checks.field(name, value, kind, *network.bounds.get(name, ANY_NUMBER))
  network.check(checked)
  return checked


def _hints(cls: type) -> Mapping[str, Any]:
  try:
    return typing.get_type_hints(cls)
  except (NameError, TypeError):  # An annotation that Python cannot look up, such as a name for type checkers alone.
    return {field.name: Any if isinstance(field.type, str) else field.type for field in dataclasses.fields(cls)}


def _same(a: Any, b: Any) -> bool:
  """Return whether two values of a field are the same; arrays and the like are not."""
  return a is b or (isinstance(equal := a == b, bool | np.bool_) and bool(equal))


def default_fields(network: Network) -> dict[str, Any]:
  """Return the defaults of a network's fields by name, where they are plain data."""
  found = {}
  for name, value in records.defaults(network.module).items():
    if name not in (*NOT_FIELDS, network.role.classes, "label_size", "perturbation"):
      with contextlib.suppress(ValueError):
        found[name] = checks.plain(name, value)
  return found


def dtype_name(dtype: Any) -> str:
  """Return the name of a network's ``dtype``.

  Raises:
    ValueError: if it is not ``float32``, ``bfloat16``, ``float16`` or ``float64``.

  >>> import jax.numpy as jnp
  >>> dtype_name(jnp.bfloat16), dtype_name(np.dtype("float32")), dtype_name("bfloat16")
  ('bfloat16', 'float32', 'bfloat16')
  """
  try:
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
  except (TypeError, ValueError):
    name = repr(dtype)
  if dtype is None or name not in DTYPES:
    raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {reprlib.repr(dtype)}")
  return name
