"""What a model is and how it is trained, as plain data that a JSON file can hold."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import linen

from jaxguide import checks, nn, scaling, schedules
from jaxguide.posterior import VARIANCES
from jaxguide.variational import LOSSES

NETWORKS: dict[str, type[linen.Module]] = {
  "unet": nn.UNet,
  "super_res_unet": nn.SuperResUNet,
  "classifier": nn.Classifier,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """All that has to be known about a network to use its parameters.

  Args:
    network: ``unet``, ``super_res_unet`` or ``classifier``.
    fields: the network's own fields, as `jaxguide.UNet`, `jaxguide.SuperResUNet` and `jaxguide.Classifier` have them.
    image_shape: (height, width, channels).
    num_classes: number of classes, or None for an unconditional network.
    prediction: what the network predicts, from `jaxguide.scaling`; a classifier shares the input's scaling with it.
    schedule: what tells the network its time, from `jaxguide.schedules`: a continuous one, or the betas of a table if
      there are ``diffusion_steps``.
    diffusion_steps: number of steps of the discrete process that the network was trained on; None for continuous time.
    rescale_timesteps: whether a table's steps are told to the network as if there were 1000 of them.
    variance: the noise that `jaxguide.DDPM` adds for this network, ``small``, ``large`` or ``learned_range``.
    scale: the scale of guidance that is recommended for a classifier, if one is.
    low_res_shape: (height, width, channels) of the low-resolution image, for a ``super_res_unet``.

  Raises:
    ValueError: for a name that is not known, naming the nearest, or a field that the network does not have.
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

  def __post_init__(self):
    # What was read from JSON has lists for tuples.
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in self.fields.items()}
    object.__setattr__(self, "fields", fields)
    object.__setattr__(self, "image_shape", tuple(self.image_shape))
    if len(self.image_shape) != 3:
      raise ValueError(f"image_shape must be (height, width, channels), got {self.image_shape}")
    if self.num_classes is not None:
      checks.at_least("num_classes", self.num_classes, 1)
    cls = checks.lookup("network", self.network, NETWORKS)
    known = {field.name: None for field in dataclasses.fields(cls)}
    for name in self.fields:
      if name == "perturbation":
        raise ValueError("perturbation is not one of a model's fields: give it to jaxguide.perturbed, when sampling")
      checks.lookup(f"field of {cls.__name__}", name, known)
      if name == self._classes:
        raise ValueError(f"{name} is not one of the fields: the model's num_classes tells it")
    if (self.network == "super_res_unet") != (self.low_res_shape is not None):
      raise ValueError(f"low_res_shape is for a super_res_unet, which needs it; the network is a {self.network}")
    if self.low_res_shape is not None:
      object.__setattr__(self, "low_res_shape", tuple(self.low_res_shape))
    checks.lookup("prediction", self.prediction, scaling.PREDICTIONS)
    checks.lookup("variance", self.variance, dict.fromkeys(VARIANCES))
    twice = 2 * self.image_shape[-1]
    if self.network == "classifier" and self.variance != "small":
      raise ValueError(f"a classifier has no variance, got {self.variance!r}: leave it out")
    if self.scale is not None:
      checks.finite("scale", self.scale)
      if self.network != "classifier":
        raise ValueError("scale is what is recommended for a classifier: leave it out")
    if self.variance == "learned_range" and self.fields.get("out_channels") != twice:
      raise ValueError(f"variance 'learned_range' needs twice the image's channels: give out_channels {twice}")
    if self.diffusion_steps is None:
      checks.lookup("schedule", self.schedule, schedules.SCHEDULES)
      if self.rescale_timesteps:
        raise ValueError("rescale_timesteps is for a network of discrete steps: give diffusion_steps")
    else:
      checks.lookup("schedule of discrete steps", self.schedule, schedules.BETAS)
      checks.at_least("diffusion_steps", self.diffusion_steps, 1)
      if self.prediction not in ("eps", "x0", "v"):
        raise ValueError(f"a network that predicts {self.prediction!r} is told no steps: leave out diffusion_steps")

  @property
  def _classes(self) -> str:
    """The network's own name for the number of its classes."""
    return "out_channels" if self.network == "classifier" else "num_classes"

  @property
  def noise_schedule(self) -> schedules.NoiseSchedule:
    """What tells the network its time; a `jaxguide.schedules.Table` if it was trained on discrete steps."""
    if self.diffusion_steps is None:
      return schedules.schedule(self.schedule)
    return schedules.table(self.schedule, self.diffusion_steps)

  @property
  def module(self) -> linen.Module:
    """The Flax module."""
    return NETWORKS[self.network](**self.fields, **{self._classes: self.num_classes})

  @property
  def null_cond(self) -> int | None:
    """The label that stands for none; None where the network has no such label."""
    return self.num_classes if getattr(self.module, "null_class", False) else None

  @property
  def scaling(self) -> scaling.Scaling:
    """How the network's input and output are scaled."""
    time_scale = 1000 / self.diffusion_steps if self.diffusion_steps and self.rescale_timesteps else None
    return scaling.scaling(self.prediction, self.noise_schedule, time_scale)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """How a network is trained.

  Args:
    steps: number of optimiser steps.
    batch_size: examples a step.
    learning_rate: of AdamW, at its peak; it rises linearly over ``warmup`` steps and falls along a cosine to 0.
    warmup: number of steps.
    weight_decay: of AdamW.
    clip_norm: the largest norm of a gradient.
    ema_decay: of the parameters' running mean, which is what is used after training.
    p_uncond: probability of dropping the label, for a UNet with a null class; 0.15 if left out.
    noise_mean: mean of log sigma over the training's noise levels. A discrete process draws its steps uniformly, and
      takes neither this nor the next.
    noise_std: its standard deviation.
    loss: of a UNet on a discrete process, one of `jaxguide.variational.LOSSES`; ``rescaled_mse`` if left out.
    seed: of the parameters, the batches, and the noise.
    save_every: steps between checkpoints.
  """

  steps: int
  batch_size: int = 64
  learning_rate: float = 2e-3
  warmup: int = 50
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  ema_decay: float = 0.995
  p_uncond: float | int | None = None
  noise_mean: float | int | None = None
  noise_std: float | int | None = None
  loss: str | None = None
  seed: int = 0
  save_every: int = 200

  def __post_init__(self):
    for name in ("steps", "batch_size", "save_every"):
      checks.at_least(name, getattr(self, name), 1)
    for name in ("warmup", "seed"):
      checks.at_least(name, getattr(self, name), 0)
    for name in ("learning_rate", "weight_decay", "clip_norm"):
      checks.in_range(name, getattr(self, name), 0)
    if self.noise_std is not None:
      checks.in_range("noise_std", self.noise_std, 0)
    if self.noise_mean is not None:
      checks.finite("noise_mean", self.noise_mean)
    if self.loss is not None:
      checks.lookup("loss", self.loss, dict.fromkeys(LOSSES))
    checks.in_range("ema_decay", self.ema_decay, 0, 1)
    if self.p_uncond is not None:
      checks.in_range("p_uncond", self.p_uncond, 0, 1)
