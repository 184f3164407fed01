"""Samples from a trained model, in a file: what ``jaxguide sample`` does.

`Settings` holds everything that the samples depend on. `run` draws them and writes the file. `encode` makes a data set
of latents: what ``jaxguide encode`` does. `export_sampler` writes a program that draws samples without jaxguide, and
`Sampler` reads it: what ``jaxguide export-sampler`` does. `overview` lists the names of guidances, solvers and grids,
with their options.
"""

from jaxguide._core.specs import HelpRow
from jaxguide.generate import guidances, walks
from jaxguide.generate.encoding import Encoding, encode
from jaxguide.generate.export import export_sampler
from jaxguide.generate.identity import identity
from jaxguide.generate.run import FORMATS, run, unlike
from jaxguide.generate.sampler import Sampler
from jaxguide.generate.settings import Settings
from jaxguide.generate.unfinished import clear


def overview() -> dict[str, list[HelpRow]]:
  """Give everything that can be named in `Settings`, by kind: each name with what it does and its options."""
  return {**guidances.help_rows(), **walks.help_rows()}


__all__ = [
  "FORMATS",
  "Encoding",
  "Sampler",
  "Settings",
  "clear",
  "encode",
  "export_sampler",
  "identity",
  "overview",
  "run",
  "unlike",
]
