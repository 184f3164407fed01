"""How a training logs, saves and draws. None of it changes the weights."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxguide._core import checks
from jaxguide.distributed import MeshConfig
from jaxguide.training.writers import WRITERS

WHOLE = (0, 2**31 - 1)

BOUNDS: dict[str, tuple[int | float, int | float]] = {
  "log_every": (1, WHOLE[1]),
  "keep": (1, WHOLE[1]),
  "keep_every": (1, WHOLE[1]),
  "sample_every": WHOLE,
  "sample_scales": (-math.inf, math.inf),
  "samples_per_class": (1, 1000),
  "sample_steps": (1, 10_000),
  "snapshot_every": WHOLE,
  "held_out_every": (1, WHOLE[1]),
  "patience": (1, WHOLE[1]),
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """How a training logs, saves and draws. None of it changes the weights, except that patience may end the training.

  Args:
    log_every: Number of steps between two lines of metrics.jsonl. Losses are fetched from the device this often.
    keep: Number of checkpoints to keep, the newest ones.
    keep_every: Checkpoints whose step is a multiple of this are kept for good. If left out, none is.
    sample_every: Number of steps between two pictures of samples, 0 for none. If left out: about ten pictures a run for
      a denoiser, none for a classifier.
    sample_scales: Guidance scales of the pictures. A model without a null class has one picture without guidance.
    samples_per_class: Samples of each class in a picture, at each scale. The first twenty classes are drawn. A model
      without classes draws sixteen times as many.
    sample_steps: Number of solver steps for a picture.
    snapshot_every: Number of steps between two snapshots of power-function running means, from which jaxguide ema makes
      means of other widths; 0 for none. If left out: about sixteen a run if there are two or more such means.
    writers: Further places for metrics and pictures: tensorboard, wandb.
    held_out_every: Number of steps between two evaluations on held-out data. If left out: about twenty a run.
    mesh: How the devices are arranged: data=-1 for a copy of the parameters on each device, fsdp=-1 to split
      parameters, optimiser state and means over all of them, data=2,fsdp=4 for both. If left out: data=-1, or one
      device if the batch cannot be divided.
    patience: Stop after this many evaluations without a lower negative log-likelihood on held-out data. The model is
      then the best one. For a classifier. If left out, jaxguide train takes 5 with the settings of a preset; otherwise
      all steps are taken.

  Raises:
    ValueError: for a value that is out of range or of a wrong type, naming the field.

  >>> RunConfig(log_every=50, writers="tensorboard").writers
  ('tensorboard',)
  """

  log_every: int = 20
  keep: int = 2
  keep_every: int | None = None
  sample_every: int | None = None
  sample_scales: Sequence[float | int] = (1.0, 3.0)
  samples_per_class: int = 4
  sample_steps: int = 25
  snapshot_every: int | None = None
  writers: Sequence[str] = ()
  held_out_every: int | None = None
  patience: int | None = None
  mesh: str | None = None

  def __post_init__(self):
    values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    if isinstance(values["writers"], str):
      values["writers"] = (values["writers"],)
    if isinstance(values["sample_scales"], int | float):
      values["sample_scales"] = (values["sample_scales"],)
    for field in dataclasses.fields(self):
      value = checks.field(field.name, values[field.name], field.type, *BOUNDS.get(field.name, ()))
      object.__setattr__(self, field.name, value)
    for name in self.writers:
      checks.lookup("writer", name, WRITERS)
    if self.mesh is not None:
      MeshConfig.parse(self.mesh)
    if not self.sample_scales:
      raise ValueError("sample_scales must have at least one scale; for no pictures give sample_every 0")

  def samples_at(self, steps: int) -> int:
    """Return the number of steps between pictures of a training of ``steps`` steps.

    >>> RunConfig().samples_at(1000), RunConfig(sample_every=0).samples_at(1000)
    (100, 0)
    """
    return max(1, -(-steps // 10)) if self.sample_every is None else self.sample_every

  def snapshots_at(self, steps: int, means: int) -> int:
    """Return the number of steps between snapshots of a training with this number of power-function means, or 0."""
    default = max(1, -(-steps // 16)) if means > 1 else 0
    return default if self.snapshot_every is None else self.snapshot_every

  def held_out_at(self, steps: int) -> int:
    """Return the number of steps between evaluations on held-out data."""
    return max(1, -(-steps // 20)) if self.held_out_every is None else self.held_out_every
