"""Guided diffusion as pure functions in JAX.

A network becomes a *denoiser*, guidance turns one denoiser into another, a *solver* takes one step, and `sample` walks
down a grid of noise levels:

>>> import jax
>>> import jaxguide as jg
>>> model = jg.ring(num_classes=8)                                          # a Gaussian mixture, an exact denoiser
>>> guided = jg.classifier_free(null_cond=8, scale=2.0)(model.denoiser)
>>> jg.sample_batch(
...   guided, jax.random.key(0), cond=3, num=16, shape=(2,), sigmas=jg.karras(20), solver=jg.DPMpp2M()
... ).shape
(16, 2)

``import jaxguide`` loads the mathematics and the networks. Import the programs built from them by name:
`jaxguide.data`, `jaxguide.models`, `jaxguide.training`, `jaxguide.evaluation` and `jaxguide.generate`. The command
``jaxguide`` runs them.
"""

from jaxguide import denoisers, guidance, nn, sampling, schedules, solvers
from jaxguide._core import checks, keys, promotion, struct, typing  # noqa: F401
from jaxguide._core.typing import Denoiser, Guidance, LogProb, Prediction, Solver
from jaxguide.denoisers import (
  Autoencoder,
  ClassifierLogProb,
  NetworkDenoiser,
  from_equinox,
  from_haiku,
  from_nnx,
  given,
  losses,
  mixtures,
  perturbed,
  scaling,
  variational,
)
from jaxguide.denoisers.losses import classifier_loss, denoising_loss, uncertainty_loss
from jaxguide.denoisers.mixtures import GaussianMixture, gaussian_mixture, ring
from jaxguide.denoisers.variational import variational_loss
from jaxguide.guidance import (
  autoguidance,
  backward_guidance,
  chain,
  classifier,
  classifier_free,
  clip_x0,
  combine,
  compose,
  dynamic_threshold,
  interval,
  measurements,
  normalized,
  parallel,
  reconstruction,
  scales,
  unconditional,
)
from jaxguide.guidance import state as memory  # noqa: F401
from jaxguide.guidance.combine import channels, frequency_decoupled, projected, rescaled, tangential, zero_star
from jaxguide.guidance.measurements import distance, measurement
from jaxguide.nn import (
  AutoencoderKL,
  Classifier,
  DhariwalUNet,
  DiT,
  EDM2UNet,
  LightningDiT,
  Perturbation,
  RepaSiT,
  SiT,
  SongUNet,
  SuperResUNet,
  UNet,
)
from jaxguide.sampling import invert, sample, sample_batch, sample_keys
from jaxguide.sampling import products as smc
from jaxguide.sampling.products import sample_product, tempered
from jaxguide.schedules import from_schedule, karras, log_snr_uniform, posterior, respaced
from jaxguide.solvers import (
  DDIM,
  DDPM,
  Consistency,
  DPMpp2M,
  DPMpp2MSDE,
  DPMpp2S,
  DPMpp2SAncestral,
  DPMpp2SSDE,
  DPMpp3M,
  DPMpp3MSDE,
  EDMStochastic,
  Euler,
  EulerAncestral,
  Heun,
  UniPC,
)

__version__ = "0.1.0"  # The only place of the version: the metadata of the package read it here.

__all__ = [
  "DDIM",
  "DDPM",
  "Autoencoder",
  "AutoencoderKL",
  "Classifier",
  "ClassifierLogProb",
  "Consistency",
  "DPMpp2M",
  "DPMpp2MSDE",
  "DPMpp2S",
  "DPMpp2SAncestral",
  "DPMpp2SSDE",
  "DPMpp3M",
  "DPMpp3MSDE",
  "Denoiser",
  "DhariwalUNet",
  "DiT",
  "EDM2UNet",
  "EDMStochastic",
  "Euler",
  "EulerAncestral",
  "GaussianMixture",
  "Guidance",
  "Heun",
  "LightningDiT",
  "LogProb",
  "NetworkDenoiser",
  "Perturbation",
  "Prediction",
  "RepaSiT",
  "SiT",
  "Solver",
  "SongUNet",
  "SuperResUNet",
  "UNet",
  "UniPC",
  "autoguidance",
  "backward_guidance",
  "chain",
  "channels",
  "checks",
  "classifier",
  "classifier_free",
  "classifier_loss",
  "clip_x0",
  "combine",
  "compose",
  "denoisers",
  "denoising_loss",
  "distance",
  "dynamic_threshold",
  "frequency_decoupled",
  "from_equinox",
  "from_haiku",
  "from_nnx",
  "from_schedule",
  "gaussian_mixture",
  "given",
  "guidance",
  "interval",
  "invert",
  "karras",
  "keys",
  "log_snr_uniform",
  "losses",
  "measurement",
  "measurements",
  "mixtures",
  "nn",
  "normalized",
  "parallel",
  "perturbed",
  "posterior",
  "projected",
  "reconstruction",
  "rescaled",
  "respaced",
  "ring",
  "sample",
  "sample_batch",
  "sample_keys",
  "sample_product",
  "sampling",
  "scales",
  "scaling",
  "schedules",
  "smc",
  "solvers",
  "tangential",
  "tempered",
  "typing",
  "uncertainty_loss",
  "unconditional",
  "variational",
  "variational_loss",
  "zero_star",
]
