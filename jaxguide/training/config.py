"""What a model is and how it is trained, as plain data that a JSON file can hold."""

import dataclasses
import math

from jaxguide._core import checks, keys, specs
from jaxguide.denoisers.scaling import WEIGHTS, x0_weight
from jaxguide.denoisers.variational import LOSSES
from jaxguide.training import ema, rates

MATMUL_PRECISIONS = ("default", "high", "highest", "bfloat16", "tensorfloat32", "float32")

# A state counts its steps in 32 bits.
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
  """How a network is trained.

  Args:
    steps: number of optimiser steps, at most 2**31 - 1.
    batch_size: examples a step, at most 2**20.
    learning_rate: of AdamW, at its peak.
    warmup: number of steps over which the learning rate rises linearly from 0.
    weight_decay: of AdamW.
    clip_norm: the largest norm of a gradient.
    ema_decay: of the parameters' running mean, which is what is used after training, where ``ema`` is ``constant``.
    p_uncond: probability of dropping the label, for a UNet with a null class; 0.15 if left out.
    noise_mean: mean of log sigma over the training's noise levels. A discrete process draws its steps uniformly, and
      takes neither this nor the next.
    noise_std: its standard deviation.
    loss: of a UNet on a discrete process, one of `jaxguide.variational.LOSSES`; ``rescaled_mse`` if left out.
    seed: of the parameters, the batches, and the noise; a whole number from 0 to 2**64 - 1, all digits of which count.
    save_every: steps between checkpoints.
    matmul_precision: of products and convolutions of float32, as ``jax.default_matmul_precision`` has it: ``default``,
      ``high``, ``highest``, ``bfloat16``, ``tensorfloat32`` or ``float32``. On an NVIDIA GPU
      the default is TensorFloat-32, 6.6e-4 away from what float64 gives where ``highest`` is 1.1e-6 away.
    rate: how the learning rate falls, from `jaxguide.training.rates`: ``cosine`` (to 0 at the last step), ``constant``
      or ``inverse-sqrt:decay_start=70000``.
    ema: the running mean, from `jaxguide.training.ema`: ``constant`` (with ``ema_decay``) or ``power:std=0.1``.
    weight: the weight of the noise levels in the loss of a denoiser in continuous time: ``plain`` (the squared error of
      what the network predicts), or from `jaxguide.scaling` ``eps``, ``x0``, ``min-snr:gamma=5`` or
      ``edm:sigma_data=0.5``.
    uncertainty: whether the loss learns how hard each noise level is, as EDM2's does; `jaxguide.uncertainty_loss`.

  Raises:
    ValueError: for a value that is out of range or of another type than the field's, naming the field.
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
  rate: str = "cosine"
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
    for name, make in (
      ("rate", lambda: rates.rate(self.rate, self.learning_rate, self.steps, self.warmup)),
      ("ema", lambda: ema.newest_share(self.ema, self.ema_decay)),
      ("weight", lambda: specs.made("weight", self.weight, {"plain": x0_weight, **WEIGHTS}, "sigma")),
    ):
      try:
        make()
      except ValueError as error:
        raise ValueError(f"{name} is wrong: {error}") from None
    checks.lookup("matmul_precision", self.matmul_precision, dict.fromkeys(MATMUL_PRECISIONS))
