"""Import and export of weights in the formats of other libraries.

`jaxguide.models.importers.openai` reads and writes the networks of OpenAI's guided-diffusion. The commands ``jaxguide
import-adm`` and ``jaxguide export-adm`` use it.
"""

from jaxguide.models.importers import openai, state_dicts

__all__ = ["openai", "state_dicts"]
