"""Other people's weights, in and out.

`jaxguide.models.importers.openai` reads and writes the networks of OpenAI's guided-diffusion. The commands ``jaxguide
import-adm`` and ``jaxguide export-adm`` call it.
"""

from jaxguide.models.importers import openai, state_dicts

__all__ = ["openai", "state_dicts"]
