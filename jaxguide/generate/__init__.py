"""Samples from a trained model into a file: what ``jaxguide sample`` does."""

from jaxguide.generate.methods import overview
from jaxguide.generate.plan import Settings
from jaxguide.generate.run import FORMATS, run

__all__ = ["FORMATS", "Settings", "overview", "run"]
