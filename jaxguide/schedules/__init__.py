"""Noise schedules, which map time to noise, and grids, the noise levels that samplers walk.

Everything is in ``sigma``, the standard deviation of the noise on a clean example.
"""

from jaxguide.schedules.grids import GRIDS, from_schedule, karras, log_snr_uniform, respaced, spaced_timesteps
from jaxguide.schedules.noise import (
  EDM,
  SCHEDULES,
  Cosine,
  Linear,
  LogNormal,
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

__all__ = [
  "BETAS",
  "EDM",
  "GRIDS",
  "SCHEDULES",
  "Cosine",
  "Linear",
  "LogNormal",
  "LogSNR",
  "LogSNRCosine",
  "NoiseLevels",
  "NoiseSchedule",
  "Sigmoid",
  "Table",
  "alpha_bar_to_sigma",
  "betas_of",
  "cosine_betas",
  "from_schedule",
  "karras",
  "linear_betas",
  "log_snr_to_sigma",
  "log_snr_uniform",
  "respaced",
  "schedule",
  "sigma_to_alpha_bar",
  "sigma_to_log_snr",
  "spaced_timesteps",
  "table",
]
