"""Networks in Flax linen.

The UNets and the noise-aware classifier of Dhariwal & Nichol 2021 (arXiv:2105.05233), the transformers DiT, SiT, REPA's
SiT and LightningDiT, the networks of EDM and EDM2, and the autoencoder of Stable Diffusion.
"""

from jaxguide.nn.adm.classifier import Classifier
from jaxguide.nn.adm.unet import SuperResUNet, UNet
from jaxguide.nn.dit.transformer import DiT, LightningDiT, RepaSiT, SiT
from jaxguide.nn.edm.dhariwal import DhariwalUNet
from jaxguide.nn.edm.song import SongUNet
from jaxguide.nn.edm2.unet import EDM2UNet
from jaxguide.nn.perturbation import Perturbation
from jaxguide.nn.vae.autoencoder import AutoencoderKL

__all__ = [
  "AutoencoderKL",
  "Classifier",
  "DhariwalUNet",
  "DiT",
  "EDM2UNet",
  "LightningDiT",
  "Perturbation",
  "RepaSiT",
  "SiT",
  "SongUNet",
  "SuperResUNet",
  "UNet",
]
