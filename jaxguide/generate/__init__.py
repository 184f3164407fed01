"""Samples from a trained model into a file: what ``jaxguide sample`` does."""

from jaxguide.generate.plan import GRIDS, GUIDANCES, Settings
from jaxguide.generate.run import FORMATS, run

__all__ = ["FORMATS", "GRIDS", "GUIDANCES", "Settings", "run"]
