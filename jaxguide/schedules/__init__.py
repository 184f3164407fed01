"""Noise schedules, which map time to noise levels, and grids, the noise levels that samplers visit.

Every noise level is a ``sigma``, the standard deviation of the noise on a clean example.
"""

from jaxguide.schedules.grids import (
  GRIDS,
  cosine_time,
  flow,
  from_schedule,
  iddpm,
  karras,
  log_snr_uniform,
  nearest_step,
  respaced,
  round_sigma,
  spaced_timesteps,
)
from jaxguide.schedules.levels import LEVELS, LogitNormal, LogNormal, UniformTime, levels
from jaxguide.schedules.noise import (
  EDM,
  SCHEDULES,
  Cosine,
  Flow,
  Linear,
  LogSNR,
  LogSNRCosine,
  NoiseLevels,
  NoiseSchedule,
  Sigmoid,
  alpha_bar_to_sigma,
  log_snr_to_sigma,
  schedule,
  sigma_to_alpha_bar,
  sigma_to_log_snr,
)
from jaxguide.schedules.tables import BETAS, Table, betas_of, cosine_betas, linear_betas, table
from jaxguide.schedules.truncated import Truncated

__all__ = [
  "BETAS",
  "EDM",
  "GRIDS",
  "LEVELS",
  "SCHEDULES",
  "Cosine",
  "Flow",
  "Linear",
  "LogNormal",
  "LogSNR",
  "LogSNRCosine",
  "LogitNormal",
  "NoiseLevels",
  "NoiseSchedule",
  "Sigmoid",
  "Table",
  "Truncated",
  "UniformTime",
  "alpha_bar_to_sigma",
  "betas_of",
  "cosine_betas",
  "cosine_time",
  "flow",
  "from_schedule",
  "iddpm",
  "karras",
  "levels",
  "linear_betas",
  "log_snr_to_sigma",
  "log_snr_uniform",
  "nearest_step",
  "respaced",
  "round_sigma",
  "schedule",
  "sigma_to_alpha_bar",
  "sigma_to_log_snr",
  "spaced_timesteps",
  "table",
]
