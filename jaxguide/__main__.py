"""``python -m jaxguide`` is ``jaxguide``."""

from jaxguide.cli import main

main()
