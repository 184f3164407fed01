"""Evaluation of a classifier on held-out data while it trains, and early stopping."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxguide import schedules
from jaxguide._core import keys
from jaxguide._core.typing import PyTree
from jaxguide.distributed.placing import Placement
from jaxguide.models.config import ModelConfig
from jaxguide.training import held_out, journal, objectives
from jaxguide.training.config import TrainingConfig
from jaxguide.training.run_config import RunConfig


class HeldOut:
  """Held-out data, and the best evaluation on them so far.

  Args:
    model: the configuration of the classifier.
    training: the configuration of the training, whose noise levels the evaluation has.
    data: the held-out dataset.
    patience: number of evaluations without a lower negative log-likelihood after which the training stops; None for
      no early stopping.
  """

  def __init__(self, model: ModelConfig, training: TrainingConfig, data: Any, patience: int | None):
    self.model, self.training, self.data, self.patience = model, training, data, patience
    self.best, self.best_step, self._since = np.inf, 0, 0

  @classmethod
  def resume(
    cls, model: ModelConfig, training: TrainingConfig, run: RunConfig, data: Any, metrics: Path
  ) -> "HeldOut | None":
    """Return the state of early stopping after the evaluations in ``metrics.jsonl``; None without held-out data."""
    if data is None:
      return None
    state = cls(model, training, data, run.patience)
    for line in journal.read(metrics):
      if isinstance(line.get("held_out"), dict):
        state._note(line["step"], float(line["held_out"]["mean_nll"]))
    return state

  @property
  def chooses(self) -> bool:
    """Whether the model of the run is the best one, and not the last one."""
    return self.patience is not None

  @property
  def stops(self) -> bool:
    """Whether the negative log-likelihood has not fallen for too long."""
    return self.patience is not None and self._since >= self.patience

  def evaluate(self, params: PyTree, step: int, place: Placement | None = None) -> tuple[dict[str, Any], bool]:
    """Evaluate parameters, on the devices of a placement.

    Returns:
      The figures by noise level as plain data, and whether they are the best so far.
    """
    levels = held_out.evaluate(
      self.model,
      params,
      self.data,
      keys.seed_key(self.training.seed),
      noise_levels=_noise_levels(self.model, self.training),
      place=place,
    )
    names = {"sigmas": "sigma", "accuracy": "accuracy", "nll": "nll", "calibration_error": "calibration_error"}
    figures: dict[str, Any] = {
      short: [float(f"{value:.6g}") for value in getattr(levels, name)] for name, short in names.items()
    }
    figures["mean_nll"], figures["mean_accuracy"] = float(levels.mean_nll), float(levels.accuracy.mean())
    return figures, self._note(step, figures["mean_nll"])

  def _note(self, step: int, nll: float) -> bool:
    if nll < self.best:
      self.best, self.best_step, self._since = nll, step, 0
      return True
    self._since += 1
    return False


def _noise_levels(model: ModelConfig, training: TrainingConfig) -> schedules.NoiseLevels | None:
  """Return the distribution of the noise levels of a training; None for that of a discrete process."""
  if model.diffusion_steps is not None:
    return None
  levels = objectives.noise_levels(model, training)
  return levels if model.noise_range is None else schedules.Truncated(levels, *model.noise_range)
