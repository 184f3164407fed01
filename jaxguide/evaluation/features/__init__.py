"""Features of images, on which distances between sets of images are computed."""

from jaxguide.evaluation.features.base import Features
from jaxguide.evaluation.features.pixels import check_images, check_labelled, pixel_features

__all__ = ["Features", "check_images", "check_labelled", "pixel_features"]
