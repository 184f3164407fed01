"""Import and export of weights in the formats of other libraries.

`import_model` reads a published state dict of any family in `jaxguide.models.importers.families`, and `export_model`
writes one. The commands ``jaxguide import`` and ``jaxguide export`` use them.
"""

from jaxguide.models.importers import layouts, openai, state_dicts
from jaxguide.models.importers.convert import Imported, export_model, import_model, read_model
from jaxguide.models.importers.families import Family, families, of_network, recognise

__all__ = [
  "Family",
  "Imported",
  "export_model",
  "families",
  "import_model",
  "layouts",
  "of_network",
  "openai",
  "read_model",
  "recognise",
  "state_dicts",
]
