"""Features of images, on which distances between sets of images are computed.

`load` makes features from a text such as ``dinov2:weights=PATH``; `FEATURES` is the table of names. Each kind has a
module of its own: ``features.inception``, ``features.dinov2``, ``features.efficientnet``, ``features.pixels``,
``features.classifier`` and ``features.own``.
"""

from jaxguide.evaluation.features.base import Features
from jaxguide.evaluation.features.extraction import extract
from jaxguide.evaluation.features.pixels import check_images, check_labelled, pixel_features
from jaxguide.evaluation.features.registry import FEATURES, default, help_rows, load, parse

__all__ = [
  "FEATURES",
  "Features",
  "check_images",
  "check_labelled",
  "default",
  "extract",
  "help_rows",
  "load",
  "parse",
  "pixel_features",
]
