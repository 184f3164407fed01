"""What a sweep over the guidance scale shows: a plot, and a report in one self-contained file."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxguide._core.files import write_atomically
from jaxguide.evaluation.sweep import Measures, Row, formatted

TITLES = {"cfg": "classifier-free guidance", "classifier": "classifier guidance"}
"""What people call a method; one that is not here goes by its own name."""

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers do it in black and white.
_STYLES = (
  ("#0072B2", "o"),
  ("#D55E00", "s"),
  ("#009E73", "^"),
  ("#CC79A7", "D"),
  ("#E69F00", "v"),
  ("#56B4E9", "P"),
)

_COLUMNS = {
  "accuracy": "judged accuracy (higher is better)",
  "frechet_distance": "Fréchet distance on pixels (lower is better)",
  "diversity": "diversity within a class",
}


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Group rows by method, in order of appearance, each group by increasing scale."""
  if not rows:
    raise ValueError("there are no rows to show: evaluate at least one method at one scale")
  return {
    method: sorted((row for row in rows if row.method == method), key=lambda row: row.scale)
    for method in dict.fromkeys(row.method for row in rows)
  }


def fidelity_plot(rows: Sequence[Row], real: Measures | None = None) -> bytes:
  """Plot fidelity against diversity over the scale.

  Three panels show judged accuracy, Fréchet distance and diversity by scale, on an axis that is linear up to 1 and
  logarithmic beyond. The fourth sets Fréchet distance against diversity, each point labelled by its scale.

  Args:
    rows: of any number of methods and scales, in any order.
    real: the real data's own figures, drawn as grey references.

  Returns:
    A PNG image. Nothing global in matplotlib is touched.

  Raises:
    ValueError: if there are no rows.
  """
  from matplotlib.figure import Figure

  groups = _by_method(rows)
  scales = sorted({row.scale for row in rows})
  figure = Figure(figsize=(10, 8), dpi=150)
  figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
  *by_scale, plane = figure.subplots(2, 2).flat
  for axes, (column, label) in zip(by_scale, _COLUMNS.items(), strict=True):
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="guidance scale γ", title=label)
    if real:
      axes.axhline(getattr(real, column), color="0.4", linestyle="--", linewidth=1.2, zorder=1)
  plane.set(
    xlabel=_COLUMNS["diversity"],
    ylabel="Fréchet distance",
    title="fidelity against diversity, points labelled by γ",
  )
  reference = {"color": "0.4", "marker": "*", "markersize": 13, "linestyle": "--"}
  handles = []
  if real:
    plane.plot(real.diversity, real.frechet_distance, **reference)
    handles += plane.plot([], [], **reference, label="real test split")

  for i, (method, group) in enumerate(groups.items()):
    color, marker = _STYLES[i % len(_STYLES)]
    style: dict[str, Any] = {"color": color, "marker": marker, "linewidth": 1.8, "markersize": 6}
    for axes, column in zip(by_scale, _COLUMNS, strict=True):
      axes.plot([row.scale for row in group], [getattr(row, column) for row in group], **style)
    plane.plot([row.diversity for row in group], [row.frechet_distance for row in group], **style)
    # The curves often run together, so that every other method's labels stand on the other side.
    side = 1 if i % 2 == 0 else -1
    for row in group:
      plane.annotate(
        f"{row.scale:g}",
        (row.diversity, row.frechet_distance),
        xytext=(6 * side, 6 * side),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="bottom" if side > 0 else "top",
        color=color,
        fontsize=9,
      )
    handles += plane.plot([], [], label=TITLES.get(method, method), **style)

  for axes in (*by_scale, plane):
    axes.title.set_fontsize(11)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)
  plane.margins(0.1)
  figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
  png = io.BytesIO()
  figure.savefig(png, format="png", metadata={"Software": None})
  return png.getvalue()


def _extreme(group: Sequence[Row], column: str, best: float) -> str:
  """Say where a column takes its best value: "scale 2 (0.981)", "scales 2 and 4 (1.000)"."""
  at = [f"{row.scale:g}" for row in group if getattr(row, column) == best]
  where = f"scales {', '.join(at[:-1])} and {at[-1]}" if len(at) > 1 else f"scale {at[0]}"
  return f"{where} ({best:.3f})"


def _finding(method: str, group: Sequence[Row]) -> str:
  """Say in one sentence what one method's rows, by increasing scale, show."""
  accuracy = _extreme(group, "accuracy", max(row.accuracy for row in group))
  frechet = _extreme(group, "frechet_distance", min(row.frechet_distance for row in group))
  trend = " and ".join(f"{row.diversity:.3f} at scale {row.scale:g}" for row in dict.fromkeys((group[0], group[-1])))
  return (
    f"With {TITLES.get(method, method)} the Fréchet distance is least at {frechet} and judged accuracy "
    f"greatest at {accuracy}; diversity is {trend}."
  )


def _data_uri(what: str, png: bytes) -> str:
  if not png.startswith(b"\x89PNG\r\n\x1a\n"):
    raise ValueError(f"{what} must be the bytes of a PNG file, got {png[:8]!r}...; encode it as PNG")
  return "data:image/png;base64," + base64.b64encode(png).decode()


def _width(png: bytes) -> int:
  return int.from_bytes(png[16:20], "big")  # the first field of the IHDR chunk


def write_report(
  path: str | Path,
  *,
  title: str,
  rows: Sequence[Row],
  grids: Mapping[tuple[str, float], bytes],
  plot: bytes,
  real: Measures,
  facts: Mapping[str, str],
) -> None:
  """Write the report of a sweep: one HTML file, which opens without a network and runs no script.

  Whatever it says of the results is computed from the rows.

  Args:
    path: of the file, written atomically; missing parent folders are made.
    title: the page's title.
    rows: of any number of methods and scales, in any order.
    grids: PNG images of samples, by method and scale, shown some 160 pixels wide; smaller ones keep hard edges.
    plot: a PNG image, as `fidelity_plot` gives it.
    real: what `measure` says of the real test split, against the training split.
    facts: what a reader needs to judge or repeat the run, by name: data set, solver, steps, seed.

  Raises:
    ValueError: if there are no rows, an image is not a PNG, or a grid is of a method and scale without a row.
    OSError: if the place cannot be written.
  """
  import jinja2

  groups = _by_method(rows)
  known = {(row.method, row.scale) for row in rows}
  for method, scale in grids:
    if (method, scale) not in known:
      raise ValueError(f"there is a grid of {method!r} at scale {scale:g} but no such row; evaluate those samples too")
  template = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  ).from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))
  page = template.render(
    title=title,
    facts=facts,
    findings=[_finding(method, group) for method, group in groups.items()],
    plot=_data_uri("plot", plot),
    table=[(TITLES.get(method, method), [formatted(row)[1:] for row in group]) for method, group in groups.items()],
    real=real,
    samples=[
      (
        TITLES.get(method, method),
        [
          (row, _data_uri(f"the grid of {method!r} at scale {row.scale:g}", png), _width(png))
          for row in group
          if (png := grids.get((method, row.scale)))
        ],
      )
      for method, group in groups.items()
      if any((method, row.scale) in grids for row in group)
    ],
    counts=sorted({row.n for row in rows}),
  )
  write_atomically(path, page.encode())
