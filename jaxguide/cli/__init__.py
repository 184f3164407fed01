"""The command ``jaxguide``."""

import sys
from typing import Any

from jaxguide.cli.main import app

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def main() -> None:
  """Run the command; a problem that the user can mend is one sentence and exit status 2."""
  try:
    app(prog_name="jaxguide")
  except SystemExit as stop:
    if stop.code == INTERRUPTED and stop.__cause__ is None:  # A training has said already how it goes on.
      print("\njaxguide: stopped. Start the same command again to go on where it stopped.", file=sys.stderr)
    if stop.code:
      _end(stop.code)
    raise
  except FloatingPointError as error:
    print(f"jaxguide: {error}", file=sys.stderr)
    _end(1)
  except (ValueError, OSError, ImportError) as error:
    print(f"jaxguide: {error}", file=sys.stderr)
    _end(2)


def _end(status: Any) -> None:
  """End the process. Other processes of the same command do not have to wait for it."""
  if "jaxguide.distributed" in sys.modules and isinstance(status, int):
    from jaxguide import distributed

    distributed.end(status)
  sys.exit(status)


__all__ = ["app", "main"]
