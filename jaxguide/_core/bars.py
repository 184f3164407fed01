"""Progress bars."""

import sys
import warnings
from typing import Any

_TO_A_FILE = 10.0


def progress_bar(total: int, *, title: str, unit: str, show: bool, initial: int = 0) -> Any:
  """Return a progress bar of tqdm, a context manager. In a notebook it is a widget where there are widgets.

  A terminal shows each change; a file, such as the log of a job, gets a line every ten seconds.

  >>> with progress_bar(3, title="sampling", unit="sample", show=False) as shown:
  ...   shown.update(3)
  """
  from tqdm import TqdmWarning
  from tqdm.auto import tqdm

  terminal = sys.stderr.isatty() or "ipykernel" in sys.modules
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # A notebook without widgets: tqdm shows text.
    return tqdm(
      total=total,
      initial=initial,
      desc=title,
      unit=unit,
      disable=not show,
      mininterval=0.1 if terminal else _TO_A_FILE,
    )
