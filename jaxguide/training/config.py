"""The configuration of a training run, as plain data that can be stored in a JSON file."""

import dataclasses
import math

from jaxguide._core import checks, keys, specs
from jaxguide.denoisers.scaling import WEIGHTS, x0_weight
from jaxguide.denoisers.variational import LOSSES
from jaxguide.training import ema, rates

MATMUL_PRECISIONS = ("default", "high", "highest", "bfloat16", "tensorfloat32", "float32")

# The largest step: a training state counts its steps in a signed 32-bit integer.
STEPS = 2**31 - 1

TRAINING_BOUNDS: dict[str, tuple[int | float, int | float]] = {
  "steps": (1, STEPS),
  "batch_size": (1, 2**20),
  "learning_rate": (0, math.inf),
  "warmup": (0, STEPS),
  "weight_decay": (0, math.inf),
  "clip_norm": (0, math.inf),
  "ema_decay": (0, 1),
  "p_uncond": (0, 1),
  "noise_std": (0, math.inf),
  "seed": (0, keys.MAX_SEED),
  "save_every": (1, STEPS),
}


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The configuration of a training run.

  Args:
    steps: number of optimiser steps, at most 2**31 - 1.
    batch_size: examples per step, at most 2**20.
    learning_rate: the peak learning rate of AdamW.
    warmup: number of steps over which the learning rate rises linearly from 0, at most steps - 1.
    weight_decay: the weight decay of AdamW.
    clip_norm: gradients are clipped to this global norm.
    ema_decay: decay of the running mean of the parameters, if ``ema`` is ``constant``. The mean is the trained model.
    p_uncond: probability of replacing the label by the null label, for a network with a null class. Default: 0.15.
    noise_mean: mean of log sigma over the noise levels of the training. Default: -0.6. Not for a discrete process,
      which draws its steps uniformly.
    noise_std: standard deviation of log sigma. Default: 1.2. Not for a discrete process.
    loss: loss of a denoiser on a discrete process, from `jaxguide.variational.LOSSES`. Default: ``rescaled_mse``.
    seed: seed of the parameters, the batches and the noise, a whole number from 0 to 2**64 - 1. All 64 bits are used.
    save_every: number of steps between checkpoints.
    matmul_precision: precision of float32 products and convolutions, one of the names of
      ``jax.default_matmul_precision``: ``default``, ``high``, ``highest``, ``bfloat16``, ``tensorfloat32`` or
      ``float32``. On an NVIDIA GPU the default is TensorFloat-32, whose results differ by 6.6e-4 from float64; those of
      ``highest`` differ by 1.1e-6.
    rate: the learning rate after the warm-up, from `jaxguide.training.rates`: ``cosine-decay`` (falls to 0 at the last
      step), ``constant`` or ``inverse-sqrt:decay_start=70000`` (falls after that many steps).
    ema: the type of running mean, from `jaxguide.training.ema`: ``constant`` (with ``ema_decay``) or ``power:std=0.1``.
    weight: the loss weight as a function of the noise level, for a denoiser in continuous time: ``plain`` (squared
      error of the network's own prediction), or from `jaxguide.scaling` ``eps``, ``x0``, ``min-snr:gamma=5`` or
      ``edm:sigma_data=0.5``.
    uncertainty: whether the loss includes a learned uncertainty of each noise level, as in EDM2; see
      `jaxguide.uncertainty_loss`.

  Raises:
    ValueError: for a value that is out of range or of a wrong type, naming the field.
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
  matmul_precision: str = "default"
  rate: str = "cosine-decay"
  ema: str = "constant"
  weight: str = "plain"
  uncertainty: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      bounds = TRAINING_BOUNDS.get(field.name, ())
      object.__setattr__(self, field.name, checks.field(field.name, getattr(self, field.name), field.type, *bounds))
    for name in ("learning_rate", "clip_norm"):
      checks.above(name, getattr(self, name), 0)
    if self.loss is not None:
      checks.lookup("loss", self.loss, dict.fromkeys(LOSSES))
    for name, parse in (
      ("rate", lambda: rates.rate(self.rate, self.learning_rate, self.steps, self.warmup)),
      ("ema", lambda: ema.newest_share(self.ema, self.ema_decay)),
      ("weight", self._check_weight),
    ):
      try:
        parse()
      except ValueError as error:
        raise ValueError(f"{name} is invalid: {error}") from None
    if self.ema != "constant" and self.ema_decay != TrainingConfig.ema_decay:
      raise ValueError(f"ema_decay is for ema 'constant', and ema is {self.ema!r}: leave out one of them")
    checks.lookup("matmul_precision", self.matmul_precision, dict.fromkeys(MATMUL_PRECISIONS))

  def _check_weight(self) -> None:
    function, options = specs.resolve("weight", self.weight, {"plain": x0_weight, **WEIGHTS}, "sigma")
    function(1.0, **options)
