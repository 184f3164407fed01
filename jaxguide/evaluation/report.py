"""What a sweep over the guidance scale shows: a plot, and a report in one self-contained file."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jaxguide._core.files import write_atomically
from jaxguide.evaluation.measures import MEASURES, Measures
from jaxguide.evaluation.sweep import Row, columns, formatted

TITLES = {"cfg": "classifier-free guidance", "classifier": "classifier guidance"}
"""The titles of methods. A method without a title is shown by its name."""

PLANE = ("diversity", "frechet_distance")
"""The measures of the panel of fidelity against diversity: across and up."""

# Okabe and Ito's colours, which colour-blind readers tell apart; the markers do it in black and white.
_STYLES = (
  ("#0072B2", "o"),
  ("#D55E00", "s"),
  ("#009E73", "^"),
  ("#CC79A7", "D"),
  ("#E69F00", "v"),
  ("#56B4E9", "P"),
)


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

  Each measure has a panel over the scale, on an axis that is linear up to 1 and logarithmic beyond. The last panel has
  the Fréchet distance over diversity, if both were measured; each point is labelled by its scale.

  Args:
    rows: of any number of methods and scales, in any order.
    real: the real data's own figures, drawn as grey references.

  Returns:
    A PNG image. Nothing global in matplotlib is touched.

  Raises:
    ValueError: if there are no rows.
  """
  from matplotlib.figure import Figure
  from matplotlib.lines import Line2D

  groups, names = _by_method(rows), columns(rows)
  scales = sorted({row.scale for row in rows})
  has_plane = set(PLANE) <= set(names)
  panels = len(names) + has_plane
  figure = Figure(figsize=(10, 4 * math.ceil(panels / 2)), dpi=150)
  figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
  every_axes = list(figure.subplots(math.ceil(panels / 2), min(2, panels), squeeze=False).flat)
  for unused in every_axes[panels:]:
    unused.remove()
  by_scale, plane = every_axes[: len(names)], every_axes[len(names)] if has_plane else None
  for axes, name in zip(by_scale, names, strict=True):
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(scales, [f"{scale:g}" for scale in scales])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="guidance scale γ", title=MEASURES[name].heading)
    if real and name in real.figures:
      axes.axhline(real.figures[name], color="0.4", linestyle="--", linewidth=1.2, zorder=1)
  reference: dict[str, Any] = {"color": "0.4", "marker": "*", "markersize": 13, "linestyle": "--"}
  handles = [Line2D([], [], **reference, label="real test split")] if real else []
  for i, (method, group) in enumerate(groups.items()):
    color, marker = _STYLES[i % len(_STYLES)]
    style: dict[str, Any] = {"color": color, "marker": marker, "linewidth": 1.8, "markersize": 6}
    for axes, name in zip(by_scale, names, strict=True):
      axes.plot([row.scale for row in group], [row.figures[name] for row in group], **style)
    if plane:
      # The curves often lie close together, so the labels of every second method are on the other side.
      _draw_plane(plane, group, style, side=1 if i % 2 == 0 else -1)
    handles.append(Line2D([], [], label=TITLES.get(method, method), **style))
  if plane:
    across, up = PLANE
    plane.set(
      xlabel=MEASURES[across].title,
      ylabel=MEASURES[up].title,
      title="fidelity against diversity, points labelled by γ",
    )
    if real and set(PLANE) <= set(real.figures):
      plane.plot(real.figures[across], real.figures[up], **reference)

  for axes in every_axes[:panels]:
    axes.title.set_fontsize(11)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)
  if plane:
    plane.margins(0.1)
  figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
  png = io.BytesIO()
  figure.savefig(png, format="png", metadata={"Software": None})
  return png.getvalue()


def _draw_plane(axes: Any, group: Sequence[Row], style: dict[str, Any], side: int) -> None:
  """Draw a method in the plane of diversity and distance, each point labelled by its scale."""
  across, up = PLANE
  axes.plot([row.figures[across] for row in group], [row.figures[up] for row in group], **style)
  for row in group:
    axes.annotate(
      f"{row.scale:g}",
      (row.figures[across], row.figures[up]),
      xytext=(6 * side, 6 * side),
      textcoords="offset points",
      ha="left" if side > 0 else "right",
      va="bottom" if side > 0 else "top",
      color=style["color"],
      fontsize=9,
    )


def _finding(method: str, group: Sequence[Row]) -> str:
  """Say in one sentence what the rows of one method show. The rows are sorted by scale."""
  parts = [_of_measure(group, name) for name in columns(group)]
  return f"With {TITLES.get(method, method)}, {'; '.join(parts)}."


def _of_measure(group: Sequence[Row], name: str) -> str:
  """Say where a measure is best, or between which values it changes if no direction is better."""
  title, values = MEASURES[name].title, [row.figures[name] for row in group]
  better = MEASURES[name].better
  if better is None:
    ends = dict.fromkeys((group[0], group[-1]))
    return f"{title} is " + " and ".join(f"{row.figures[name]:.3f} at scale {row.scale:g}" for row in ends)
  superlative, best = ("highest", max(values)) if better == "higher" else ("lowest", min(values))
  at = [f"{row.scale:g}" for row in group if row.figures[name] == best]
  where = f"scales {', '.join(at[:-1])} and {at[-1]}" if len(at) > 1 else f"scale {at[0]}"
  return f"{title} is {superlative} at {where} ({best:.3f})"


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
  names = columns(rows)
  counts = ", ".join(str(n) for n in sorted({row.n for row in rows}))
  page = template.render(
    title=title,
    names=names,
    measures=MEASURES,
    descriptions={
      name: MEASURES[name].description.format(real=real.figures.get(name, math.nan), counts=counts) for name in names
    },
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
  )
  write_atomically(path, page.encode())
