"""Networks in Flax linen."""

from jaxguide.nn.adm.classifier import Classifier
from jaxguide.nn.adm.unet import SuperResUNet, UNet
from jaxguide.nn.perturbation import Perturbation
from jaxguide.nn.vae.autoencoder import AutoencoderKL

__all__ = ["AutoencoderKL", "Classifier", "Perturbation", "SuperResUNet", "UNet"]
