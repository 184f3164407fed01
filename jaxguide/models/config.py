"""What a model is, as plain data that a JSON file can hold."""

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen

from jaxguide import schedules
from jaxguide._core import checks
from jaxguide.denoisers import scaling
from jaxguide.models.encoders import ENCODERS, Encoder
from jaxguide.models.networks import NETWORKS, Network, Role
from jaxguide.schedules.posterior import VARIANCES

# The least and the largest value of each field that is a number, for each element where there are several. They are far
# beyond what networks have: what lies outside is a slip, and would end in hours of tracing or in no memory.
SIDE = (1, 2**16)

BOUNDS: dict[str, tuple[int | float, int | float]] = {
  "image_shape": SIDE,
  "low_res_shape": SIDE,
  "num_classes": (1, 2**24),
  "diffusion_steps": (1, 100_000),
  "scale": (-math.inf, math.inf),
}

LARGEST_IMAGE = 2**31 - 1

DTYPES = ("float32", "bfloat16", "float16", "float64")

# What a module has beside its own fields.
NOT_FIELDS = ("parent", "name")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """All that has to be known about a network to use its parameters.

  Args:
    network: ``unet``, ``super_res_unet`` or ``classifier``.
    fields: the network's own fields, as `jaxguide.UNet`, `jaxguide.SuperResUNet` and `jaxguide.Classifier` have them;
      ``dtype`` becomes its name.
    image_shape: (height, width, channels), each at most 65,536, and at most 2**31 - 1 numbers in all.
    num_classes: number of classes, at most 2**24, or None for an unconditional network.
    prediction: what the network predicts, from `jaxguide.scaling`; a classifier shares the input's scaling with it.
    schedule: what tells the network its time, from `jaxguide.schedules`: a continuous one, or the betas of a table if
      there are ``diffusion_steps``.
    diffusion_steps: number of steps of the discrete process that the network was trained on, at most 100,000; None for
      continuous time.
    rescale_timesteps: whether a table's steps are told to the network as if there were 1000 of them.
    variance: the noise that `jaxguide.DDPM` adds for this network, ``small``, ``large`` or ``learned_range``.
    scale: the scale of guidance that is recommended for a classifier, if one is.
    low_res_shape: (height, width, channels) of the low-resolution image, for a ``super_res_unet``.
    encoder: how the examples of a data set become what the network sees, from `jaxguide.models.encoders`.

  Raises:
    ValueError: for a name that is not known, naming the nearest; a field that the network does not have; or a value
      that is out of range or of another type than the field's, naming the field.
  """

  network: str
  fields: Mapping[str, Any]
  image_shape: Sequence[int]
  num_classes: int | None
  prediction: str = "v"
  schedule: str = "cosine"
  diffusion_steps: int | None = None
  rescale_timesteps: bool = False
  variance: str = "small"
  scale: float | int | None = None
  low_res_shape: Sequence[int] | None = None
  encoder: str = "pixels"

  def __post_init__(self):
    # As JSON has it, so that a configuration is the same before and after.
    for field in dataclasses.fields(self):
      value = checks.field(field.name, getattr(self, field.name), field.type, *BOUNDS.get(field.name, ()))
      object.__setattr__(self, field.name, value)
    for name in ("image_shape", "low_res_shape"):
      shape = getattr(self, name)
      if shape is not None and len(shape) != 3:
        raise ValueError(f"{name} must be (height, width, channels), got {reprlib.repr(shape)}")
      if shape is not None and math.prod(shape) > LARGEST_IMAGE:
        raise ValueError(f"{name} must be of at most {LARGEST_IMAGE:,} numbers, got {reprlib.repr(shape)}")
    network = checks.lookup("network", self.network, NETWORKS)
    object.__setattr__(self, "fields", _network_fields(network, self.fields))
    if network.low_res != (self.low_res_shape is not None):
      raise ValueError(f"low_res_shape is for a super_res_unet, which needs it; the network is a {self.network}")
    checks.lookup("encoder", self.encoder, ENCODERS)
    checks.lookup("prediction", self.prediction, scaling.PREDICTIONS)
    checks.lookup("variance", self.variance, dict.fromkeys(VARIANCES))
    self.role.check(self)
    if self.diffusion_steps is None:
      checks.lookup("schedule", self.schedule, schedules.SCHEDULES)
      if self.rescale_timesteps:
        raise ValueError("rescale_timesteps is for a network of discrete steps: give diffusion_steps")
    else:
      checks.lookup("schedule of discrete steps", self.schedule, schedules.BETAS)
      if self.prediction not in ("eps", "x0", "v"):
        raise ValueError(f"a network that predicts {self.prediction!r} is told no steps: leave out diffusion_steps")

  @property
  def role(self) -> Role:
    """What the network is for."""
    return NETWORKS[self.network].role

  @property
  def data(self) -> Encoder:
    """How the examples of a data set become what the network sees, and back."""
    return ENCODERS[self.encoder]

  @property
  def noise_schedule(self) -> schedules.NoiseSchedule:
    """What tells the network its time; a `jaxguide.schedules.Table` if it was trained on discrete steps."""
    if self.diffusion_steps is None:
      return schedules.schedule(self.schedule)
    return schedules.table(self.schedule, self.diffusion_steps)

  @property
  def module(self) -> linen.Module:
    """The Flax module."""
    return NETWORKS[self.network].module(**self.fields, **{self.role.classes: self.num_classes})

  @property
  def null_cond(self) -> int | None:
    """The label that stands for none; None where the network has no such label."""
    return self.num_classes if getattr(self.module, "null_class", False) else None

  @property
  def scaling(self) -> scaling.Scaling:
    """How the network's input and output are scaled."""
    time_scale = 1000 / self.diffusion_steps if self.diffusion_steps and self.rescale_timesteps else None
    if self.prediction == "flow":
      time_scale = 1000.0  # What the networks trained here are told.
    return scaling.scaling(self.prediction, self.noise_schedule, time_scale)


def _network_fields(network: Network, given: Mapping[str, Any]) -> dict[str, Any]:
  """Check the fields of a network, and give them as plain data."""
  cls, classes = network.module, network.role.classes
  known = {field.name: field.type for field in dataclasses.fields(cls) if field.name not in NOT_FIELDS}
  checked: dict[str, Any] = {}
  for name, value in given.items():
    if name == "perturbation":
      raise ValueError("perturbation is not one of a model's fields: give it to jaxguide.perturbed, when sampling")
    kind = checks.lookup(f"field of {cls.__name__}", name, known)
    if name == classes:
      raise ValueError(f"{name} is not one of the fields: the model's num_classes tells it")
    if name == "dtype":
      checked[name] = dtype_name(value)
    else:
      checked[name] = checks.field(name, value, kind, *network.bounds.get(name, ()))
  network.check(checked)
  return checked


def dtype_name(dtype: Any) -> str:
  """Give the name of a type that networks compute in.

  Raises:
    ValueError: if it is none of ``float32``, ``bfloat16``, ``float16`` and ``float64``.

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
