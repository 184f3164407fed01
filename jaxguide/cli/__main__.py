"""``python -m jaxguide.cli`` is ``jaxguide``."""

from jaxguide.cli import main

main()
