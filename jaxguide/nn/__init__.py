"""Networks in Flax linen: the UNets and the noise-aware classifier of Dhariwal & Nichol 2021 (arXiv:2105.05233)."""

from jaxguide.nn.adm.classifier import Classifier
from jaxguide.nn.adm.unet import SuperResUNet, UNet
from jaxguide.nn.perturbation import Perturbation

__all__ = ["Classifier", "Perturbation", "SuperResUNet", "UNet"]
