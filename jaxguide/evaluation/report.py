"""The results of a sweep over the guidance scale: a plot, and a report in one self-contained HTML file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxguide._core.files import write_atomically
from jaxguide.evaluation import pages
from jaxguide.evaluation.measures import MEASURES, Measures
from jaxguide.evaluation.sweep import Row, columns, formatted

TITLES = {"cfg": "classifier-free guidance", "classifier": "classifier guidance"}
"""The titles of methods. A method without a title is shown by its name."""

PLANE = ("diversity", "frechet_distance")
"""The measures on the x and y axes of the panel of fidelity against diversity."""


def _by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Group rows by method in order of appearance, and sort each group by scale.

  Raises:
    ValueError: if there are no rows.
  """
  if not rows:
    raise ValueError("there are no rows to show: evaluate at least one method at one scale")
  return {
    method: sorted((row for row in rows if row.method == method), key=lambda row: row.scale)
    for method in dict.fromkeys(row.method for row in rows)
  }


def fidelity_plot(rows: Sequence[Row], real: Measures | None = None) -> bytes:
  """Plot each measure over the scale, and fidelity against diversity.

  Each measure has a panel over the scale, whose axis is linear up to 1 and logarithmic above. If the rows have both
  measures of `PLANE`, the last panel shows the Fréchet distance over diversity, with points labelled by their scale.

  Args:
    rows: rows of any number of methods and scales, in any order.
    real: the measures of real data, drawn as grey references.

  Returns:
    A PNG image. No global state of matplotlib is changed.

  Raises:
    ValueError: if there are no rows, or they have different measures.
  """
  from matplotlib.figure import Figure
  from matplotlib.lines import Line2D

  groups, names = _by_method(rows), columns(rows)
  scales = sorted({row.scale for row in rows})
  has_plane = set(PLANE) <= set(names)
  panels = len(names) + has_plane
  figure = Figure(figsize=(10, 4 * math.ceil(panels / 2)), dpi=150)
  figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
  all_axes = list(figure.subplots(math.ceil(panels / 2), min(2, panels), squeeze=False).flat)
  for unused in all_axes[panels:]:
    unused.remove()
  by_scale, plane = all_axes[: len(names)], all_axes[len(names)] if has_plane else None
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
    color, marker = pages.STYLES[i % len(pages.STYLES)]
    style: dict[str, Any] = {"color": color, "marker": marker, "linewidth": 1.8, "markersize": 6}
    for axes, name in zip(by_scale, names, strict=True):
      axes.plot([row.scale for row in group], [row.figures[name] for row in group], **style)
    if plane:
      # The curves often lie close together, so every second method has its labels on the other side.
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

  for axes in all_axes[:panels]:
    pages.tidy(axes)
  if plane:
    plane.margins(0.1)
  figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
  return pages.png_of(figure)


def _draw_plane(axes: Any, group: Sequence[Row], style: dict[str, Any], side: int) -> None:
  """Draw one method in the panel of fidelity against diversity, with points labelled by their scale."""
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
  """Summarise the rows of one method, sorted by scale, in one sentence."""
  parts = [_summary(group, name) for name in columns(group)]
  return f"With {TITLES.get(method, method)}, {'; '.join(parts)}."


def _summary(group: Sequence[Row], name: str) -> str:
  """Give the best value of a measure and its scales; or the values at both ends, if neither direction is better."""
  measure, values = MEASURES[name], [row.figures[name] for row in group]
  if measure.better is None:
    ends = dict.fromkeys((group[0], group[-1]))
    return f"{measure.title} is " + " and ".join(
      f"{measure.text(row.figures[name])} at scale {row.scale:g}" for row in ends
    )
  superlative, choose = {"higher": ("highest", max), "lower": ("lowest", min)}[measure.better]
  best = choose(values)
  scales = [f"{row.scale:g}" for row in group if row.figures[name] == best]
  where = f"scales {', '.join(scales[:-1])} and {scales[-1]}" if len(scales) > 1 else f"scale {scales[0]}"
  return f"{measure.title} is {superlative} at {where} ({measure.text(best)})"


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
  """Write the report of a sweep: one HTML file that needs no network and runs no script.

  All statements about the results are computed from the rows.

  Args:
    path: path of the file, which is written atomically; missing parent folders are made.
    title: title of the page.
    rows: rows of any number of methods and scales, in any order.
    grids: PNG images of samples by method and scale, shown about 200 pixels wide; images of less than 240 pixels are
      enlarged without smoothing.
    plot: a PNG image, such as the result of `fidelity_plot`.
    real: the measures of the real test split, with the training split as reference.
    facts: what a reader needs to judge or repeat the run, by name: data set, solver, steps, seed.

  Raises:
    ValueError: if there are no rows or they have different measures, if an image is not a PNG, or if a grid has a
      method and scale without a row.
    OSError: if the file cannot be written.
  """
  groups = _by_method(rows)
  evaluated = {(row.method, row.scale) for row in rows}
  for method, scale in grids:
    if (method, scale) not in evaluated:
      raise ValueError(f"there is a grid of {method!r} at scale {scale:g} but no such row: evaluate those samples too")
  names = columns(rows)
  counts = ", ".join(str(n) for n in sorted({row.n for row in rows}))
  page = pages.render(
    "report.html.jinja",
    title=title,
    names=names,
    measures=MEASURES,
    descriptions={
      name: MEASURES[name].description.format(real=real.figures.get(name, math.nan), counts=counts) for name in names
    },
    facts=facts,
    findings=[_finding(method, group) for method, group in groups.items()],
    plot=pages.data_uri("plot", plot),
    table=[(TITLES.get(method, method), [formatted(row)[1:] for row in group]) for method, group in groups.items()],
    real=real,
    samples=[
      (
        TITLES.get(method, method),
        [
          (row, pages.data_uri(f"the grid of {method!r} at scale {row.scale:g}", png), pages.png_width(png))
          for row in group
          if (png := grids.get((method, row.scale)))
        ],
      )
      for method, group in groups.items()
      if any((method, row.scale) in grids for row in group)
    ],
  )
  write_atomically(path, page.encode())
