"""Other people's weights, in and out.

`jaxguide.interop.openai` is for the networks of OpenAI's guided-diffusion; ``jaxguide import-adm`` and ``jaxguide
export-adm`` are its commands.
"""

from jaxguide.interop import openai, state_dicts

__all__ = ["openai", "state_dicts"]
