"""Samples from a trained model, in a file: what ``jaxguide sample`` does.

`Settings` holds everything that the samples depend on. `run` draws them and writes the file. `encode` makes a data set
of latents: what ``jaxguide encode`` does. `overview` lists the names of guidances, solvers and grids, with
their options.
"""

from jaxguide._core.specs import HelpRow
from jaxguide.generate import guidances, walks
from jaxguide.generate.encoding import Encoding, encode
from jaxguide.generate.identity import identity
from jaxguide.generate.run import FORMATS, run, unlike
from jaxguide.generate.settings import Settings
from jaxguide.generate.unfinished import clear


def overview() -> dict[str, list[HelpRow]]:
  """Give everything that can be named in `Settings`, by kind: each name with what it does and its options."""
  return {**guidances.help_rows(), **walks.help_rows()}


__all__ = ["FORMATS", "Encoding", "Settings", "clear", "encode", "identity", "overview", "run", "unlike"]
