"""The networks, in Flax linen: the UNets and the noisy classifier of Dhariwal & Nichol 2021 (arXiv:2105.05233)."""

from jaxguide.nn.classifier import Classifier
from jaxguide.nn.perturbation import Perturbation
from jaxguide.nn.unet import SuperResUNet, UNet

__all__ = ["Classifier", "Perturbation", "SuperResUNet", "UNet"]
