"""Samples from a trained model into a file: what ``jaxguide sample`` does."""

from jaxguide.generate.methods import overview
from jaxguide.generate.run import FORMATS, run
from jaxguide.generate.settings import Settings

__all__ = ["FORMATS", "Settings", "overview", "run"]
