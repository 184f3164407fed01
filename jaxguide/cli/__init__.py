"""The command ``jaxguide``."""

import sys

from jaxguide.cli.main import app

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def main() -> None:
  """Run the command; a problem that the user can mend is one sentence and exit status 2."""
  try:
    app()
  except SystemExit as stop:
    if stop.code == INTERRUPTED and stop.__cause__ is None:  # A training has said already how it goes on.
      print("\njaxguide: stopped. Start the same command again to go on where it stopped.", file=sys.stderr)
    raise
  except FloatingPointError as error:
    print(f"jaxguide: {error}", file=sys.stderr)
    sys.exit(1)
  except (ValueError, OSError, ImportError) as error:
    print(f"jaxguide: {error}", file=sys.stderr)
    sys.exit(2)


__all__ = ["app", "main"]
