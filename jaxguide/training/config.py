"""The configuration of a training run, as plain data that can be stored in a JSON or TOML file."""

import dataclasses
import math
from collections.abc import Sequence

from jaxguide import schedules
from jaxguide._core import checks, keys, specs
from jaxguide.denoisers.scaling import WEIGHTS, x0_weight
from jaxguide.denoisers.variational import LOSSES
from jaxguide.training import ema, optimizers, rates

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
  "accumulation": (1, 2**20),
  "label_smoothing": (0, 1),
  "skip_nan": (0, STEPS),
  "low_res_noise": (0, math.inf),
}

DEFAULT_WARMUP = 50

REMAT = ("none", "blocks", "all")

LOW_RES_FILTERS = ("box", "linear", "cubic", "lanczos3", "lanczos5")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """The configuration of a training run.

  Args:
    steps: number of optimiser steps, at most 2**31 - 1.
    batch_size: examples per step, at most 2**20.
    learning_rate: the peak learning rate.
    warmup: number of steps over which the learning rate rises linearly from 0, at most steps - 1. Default: 50, or
      steps - 1 if that is less.
    weight_decay: the weight decay; 0 for an optimiser that has none.
    clip_norm: gradients are clipped to this global norm.
    ema_decay: decay of the running mean of the parameters, if ``ema`` is ``constant``. The mean is the trained model.
    p_uncond: probability of replacing the label by the null label, for a network with a null class. Default: 0.15.
    noise_mean: mean of log sigma over the noise levels of the training, for ``noise="log-normal"``. Default: -0.6.
    noise_std: standard deviation of log sigma, for ``noise="log-normal"``. Default: 1.2.
    loss: loss of a denoiser on a discrete process, from `jaxguide.variational.LOSSES`. Default: ``rescaled_mse``.
    seed: seed of the parameters, the batches and the noise, a whole number from 0 to 2**64 - 1. All 64 bits are used.
    save_every: number of steps between checkpoints.
    matmul_precision: precision of float32 products and convolutions, one of the names of
      ``jax.default_matmul_precision``: ``default``, ``high``, ``highest``, ``bfloat16``, ``tensorfloat32`` or
      ``float32``. On an NVIDIA GPU the default is TensorFloat-32, whose results differ by 6.6e-4 from float64; those of
      ``highest`` differ by 1.1e-6.
    rate: the learning rate after the warm-up, from `jaxguide.training.rates`: ``cosine-decay`` (falls to 0 at the last
      step), ``constant`` or ``inverse-sqrt:decay_start=70000`` (falls after that many steps).
    ema: the running mean of the parameters, from `jaxguide.training.ema`: ``constant`` (with ``ema_decay``) or
      ``power:std=0.1``; or a list of several, the first of which is the trained model.
    weight: the loss weight as a function of the noise level, for a denoiser in continuous time: ``plain`` (squared
      error of the network's own prediction), or from `jaxguide.scaling` ``eps``, ``x0``, ``min-snr:gamma=5`` or
      ``edm:sigma_data=0.5``.
    uncertainty: whether the loss includes a learned uncertainty of each noise level, as in EDM2; see
      `jaxguide.uncertainty_loss`.
    noise: the distribution of the noise levels, from `jaxguide.schedules.LEVELS`: ``log-normal:mean=-0.6,std=1.2``,
      ``uniform`` (in the time of the network's schedule), ``log-snr-cosine`` or ``logit-normal:mean=0,std=1`` (of the
      time, for flows). Default: ``log-normal``. Not for a discrete process, which draws its steps uniformly.
    optimizer: an optimiser of Optax by its name there, with its options: ``adamw``, ``adam:b2=0.99``, ``lion``,
      ``muon``, ``sgd:momentum=0.9``.
    accumulation: number of parts into which a batch is divided; their gradients are added up. The result is that of the
      whole batch, and the memory that of one part. It divides ``batch_size``.
    remat: what is computed again in the backward pass to save memory: ``none``, ``blocks`` (the inside of each block)
      or ``all`` (the whole network).
    label_smoothing: the share of a classifier's target that is spread evenly over all classes, below 1.
    skip_nan: number of steps in which the loss or the gradient may be not finite. Such a step changes nothing but the
      count. Default: 0, such a step ends the training.
    low_res_filter: how a super-resolution network's low-resolution images are made from the data: ``box``, ``linear``,
      ``cubic``, ``lanczos3`` or ``lanczos5``.
    low_res_noise: the largest standard deviation of the noise that is added to low-resolution images, in units of their
      range [-1, 1]; each image has another, uniform in [0, low_res_noise] (Ho et al. 2022, arXiv:2106.15282).

  Raises:
    ValueError: for a value that is out of range or of a wrong type, naming the field.
  """

  steps: int
  batch_size: int = 64
  learning_rate: float = 2e-3
  warmup: int | None = None
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
  ema: str | Sequence[str] = "constant"
  weight: str = "plain"
  uncertainty: bool = False
  noise: str | None = None
  optimizer: str = "adamw"
  accumulation: int = 1
  remat: str = "none"
  label_smoothing: float = 0.0
  skip_nan: int = 0
  low_res_filter: str = "box"
  low_res_noise: float = 0.0

  def __post_init__(self):
    object.__setattr__(self, "ema", _one_or_several(self.ema))
    for field in dataclasses.fields(self):
      bounds = TRAINING_BOUNDS.get(field.name, ())
      if field.name != "ema":
        object.__setattr__(self, field.name, checks.field(field.name, getattr(self, field.name), field.type, *bounds))
    for name in ("learning_rate", "clip_norm"):
      checks.above(name, getattr(self, name), 0)
    if self.loss is not None:
      checks.lookup("loss", self.loss, dict.fromkeys(LOSSES))
    checks.lookup("remat", self.remat, dict.fromkeys(REMAT))
    checks.lookup("low_res_filter", self.low_res_filter, dict.fromkeys(LOW_RES_FILTERS))
    if self.label_smoothing == 1:
      raise ValueError("label_smoothing must be at least 0 and below 1, got 1")
    if self.warmup is not None and self.warmup > self.steps - 1:
      raise ValueError(
        f"warmup must be at most steps - 1, which is {self.steps - 1}, got {self.warmup}: the learning rate would not "
        "reach its peak"
      )
    if self.batch_size % self.accumulation:
      raise ValueError(
        f"accumulation must divide batch_size; {self.batch_size} examples cannot be divided into {self.accumulation} "
        "equal parts"
      )
    for name, parse in (
      ("rate", self.schedule),
      ("ema", lambda: [ema.newest_share(text, self.ema_decay) for text in self.means]),
      ("weight", self._check_weight),
      ("optimizer", lambda: optimizers.optimizer(self.optimizer, self.learning_rate, self.weight_decay)),
      ("noise", lambda: self.noise and schedules.levels(self.noise, schedules.Cosine())),
    ):
      try:
        parse()
      except ValueError as error:
        raise ValueError(f"{name} is invalid: {error}") from None
    if len(set(self.means)) < len(self.means):
      raise ValueError(f"ema has one running mean twice, got {self.ema!r}: leave out one of them")
    if "constant" not in self.means and self.ema_decay != TrainingConfig.ema_decay:
      raise ValueError(f"ema_decay is for ema 'constant', and ema is {self.ema!r}: leave out one of them")
    if self.noise not in (None, "log-normal") and (self.noise_mean, self.noise_std) != (None, None):
      raise ValueError(
        f"noise_mean and noise_std are for noise 'log-normal', and noise is {self.noise!r}: leave them out"
      )
    checks.lookup("matmul_precision", self.matmul_precision, dict.fromkeys(MATMUL_PRECISIONS))

  @property
  def means(self) -> tuple[str, ...]:
    """The running means, one text for each."""
    return (self.ema,) if isinstance(self.ema, str) else tuple(self.ema)

  def schedule(self) -> rates.Schedule:
    """Return the learning rate as a function of the step."""
    warmup = min(DEFAULT_WARMUP, self.steps - 1) if self.warmup is None else self.warmup
    return rates.rate(self.rate, self.learning_rate, self.steps, warmup)

  def _check_weight(self) -> None:
    function, options = specs.resolve("weight", self.weight, {"plain": x0_weight, **WEIGHTS}, "sigma")
    function(1.0, **options)


def _one_or_several(value: object) -> str | tuple[str, ...]:
  """Check the field ``ema``: a text, or a list of at least one. A list of one becomes a text."""
  texts = (value,) if isinstance(value, str) else checks.field("ema", value, Sequence[str])
  if not texts:
    raise ValueError("ema must have at least one running mean, such as 'constant', got an empty list")
  return texts[0] if len(texts) == 1 else texts
