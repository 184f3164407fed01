"""The names of measures in a report of a sweep: title, description, direction and format."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxguide.evaluation.measures import MEASURES, Measure
from jaxguide.evaluation.results import Evaluation


class Described(NamedTuple):
  """How a measure is shown.

  Args:
    title: its name in tables and plots.
    entry: the measure.
    description: what it is and how to read it.
  """

  title: str
  entry: Measure
  description: str

  @property
  def better(self) -> str | None:
    """``"higher"``, ``"lower"`` or None."""
    return self.entry.better

  @property
  def heading(self) -> str:
    """The title, and which direction is better."""
    return self.title if self.better is None else f"{self.title} ({self.better} is better)"

  def text(self, value: float | int) -> str:
    """Format a value."""
    return self.entry.text(value)


def _unknown(evidence: Any) -> float:
  raise NotImplementedError


def describe(name: str, protocol: Mapping[str, Any], real: Evaluation | None = None) -> Described:
  """Say how a measure is shown.

  Args:
    name: the name of the measure. A name that is not in `MEASURES` is shown as it is.
    protocol: the protocol of the evaluation. Its ``"features"`` decide whether a Fréchet distance is called an FID.
    real: the figures of real images, to compare with.

  >>> describe("frechet_distance", {"features": "inception"}).title
  'FID'
  >>> describe("frechet_distance", {"features": "pixels"}).title
  'Fréchet distance (pixels)'
  """
  entry = MEASURES.get(name, Measure(_unknown, name.replace("_", " "), ""))
  title = entry.title_on(str(protocol.get("features", "")))
  description = entry.description
  if real is not None and name in real.figures:
    description = f"{description} For {real.n} real images it is {entry.text(real.figures[name].value)}.".strip()
  return Described(title, entry, description or title)
