"""Plots of a sweep as SVG within the page: matplotlib draws, and the page gives the colours and the font."""

import html
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxguide.evaluation.pages import STYLES
from jaxguide.evaluation.sweep_curves import Axis, text_of

WIDE, NARROW, SWATCH = (600, 400), (360, 290), (40, 16)
"""Width and height of the plots on a laptop and on a phone, and of a line of the legend."""

TEXT, SOFT, LINE, PAGE = "#00ff01", "#00ff02", "#00ff03", "#00ff04"
_CURVES = [f"#01ff{i:02x}" for i in range(len(STYLES))]
_VARIABLES = {TEXT: "text", SOFT: "soft", LINE: "line", PAGE: "page", **{c: f"k{i}" for i, c in enumerate(_CURVES)}}
"""The colours that stand for variables of the page, so that a plot is light or dark as the page is."""


class Value(NamedTuple):
  """A point of a curve: its coordinates, their intervals, its label and what is said when the pointer is on it."""

  x: float
  y: float
  x_interval: tuple[float, float] | None
  y_interval: tuple[float, float] | None
  label: str
  tip: str
  is_odd: bool = False


class Plot(NamedTuple):
  """A plot as the template writes it: its size, the inside of its SVG, a summary, and how many points have a label."""

  width: int
  height: int
  svg: str
  summary: str
  labels: int = 0


def plot(
  curves: Sequence[Sequence[Value]],
  titles: tuple[str, str],
  real: tuple[float | None, float] | None,
  summary: str,
  size: tuple[int, int],
  *,
  axis: Axis | None = None,
  is_joined: bool = True,
) -> Plot:
  """Plot curves along the axis of a sweep, or in the plane of two measures with a label at each point.

  The vertical axis is logarithmic if the largest value is more than 20 times as large as the least. A title says so.

  Args:
    curves: the points of each curve; a curve without points keeps its style.
    titles: of the horizontal and the vertical axis.
    real: the point of real images, or None and their value; None if there is none.
    summary: what a reader who does not see the plot is told. It makes the identities of the plot its own.
    size: width and height.
    axis: the axis, if the plot is along it; the ``x`` of values is then what `places` says.
    is_joined: whether lines join the points.
  """
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogLocator

  with _look(f"{summary} {size}"):
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    axes = figure.subplots(subplot_kw={"frameon": False})
    axes.margins(0.05, 0.07)
    tips = _draw_curves(axes, curves, real, is_joined)
    low, high = axes.dataLim.intervaly
    logarithmic = [False, False]
    if 0 < 20 * low < high:
      logarithmic[1] = True
      axes.set_yscale("log")
      axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
      axes.minorticks_off()
    for line in (axes.xaxis, axes.yaxis):
      line.set_major_formatter("{x:g}")
    if axis is not None:
      logarithmic[0] = _put_ticks(axes, axis)
    across, up = (f"{title} (log)" if log else title for title, log in zip(titles, logarithmic, strict=True))
    figure.suptitle(up, x=0.01, ha="left")
    axes.set_xlabel(across, loc="right")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    if axis is not None:
      _thin(axes)
    labels = _place_labels(axes, curves, real, is_joined) if axis is None else 0
    return Plot(*size, _svg_of(figure, tips), summary, labels)


def swatch(curve: int | None, *, is_joined: bool = True) -> Plot:
  """Draw how a curve looks, for the legend; None stands for the real images. Curves from the seventh on are dashed."""
  from matplotlib.figure import Figure

  with _look(f"legend {curve}"):
    figure = Figure(figsize=(SWATCH[0] / 72, SWATCH[1] / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, 1), ylim=(-1, 1))
    axes.set_axis_off()
    if curve is None:
      _draw_real(axes, (None, 0.0))
      _draw_real(axes, (0.0, 0.0))
    else:
      if is_joined:
        _draw_line(axes, [-0.9, 0.9], [0, 0], curve)
      _draw_marks(axes, [0], [0], curve)
    return Plot(*SWATCH, _svg_of(figure, [""]), "")


# --- what is drawn --------------------------------------------------------------------------------


def _look(salt: str) -> Any:
  """Settings of matplotlib in which a figure is made and saved; the salt makes its identities its own."""
  import matplotlib as mpl

  ticks = {"labelsize": 12, "labelcolor": SOFT, "major.size": 0, "major.pad": 6}
  settings: Any = {
    **{f"{way}tick.{name}": value for way in "xy" for name, value in ticks.items()},
    **{"font.family": "DejaVu Sans", "font.size": 12, "text.color": TEXT, "text.parse_math": False},
    **{"figure.titlesize": 12, "figure.titleweight": "bold", "figure.constrained_layout.h_pad": 4 / 72},
    **{"axes.labelcolor": TEXT, "axes.labelweight": "bold", "axes.labelpad": 7},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 1},
    **{"lines.solid_capstyle": "butt", "svg.fonttype": "none", "svg.hashsalt": salt},
  }
  return mpl.rc_context(settings)


def _draw_curves(
  axes: Any, curves: Sequence[Sequence[Value]], real: tuple[float | None, float] | None, is_joined: bool
) -> list[str]:
  """Draw curves and the real images, and return the tips of the markers in the order in which matplotlib draws them."""
  tips = []
  for i, curve in enumerate(curves):
    ups = [(v.x, *v.y_interval) for v in curve if v.y_interval]
    across = [(v.y, *v.x_interval) for v in curve if v.x_interval]
    for draw, bars in ((axes.vlines, ups), (axes.hlines, across)):
      if bars:
        draw(*np.transpose(bars), colors=_CURVES[i % len(STYLES)], alpha=0.7, linewidth=1.5)
    if is_joined:
      _draw_line(axes, [v.x for v in curve], [v.y for v in curve], i)
    for is_odd in (False, True):
      marked = [v for v in curve if v.is_odd == is_odd]
      _draw_marks(axes, [v.x for v in marked], [v.y for v in marked], i, is_odd)
      tips += [v.tip for v in marked]
  if real is not None:
    _draw_real(axes, real)
    tips += ["real images"] * (real[0] is not None)
  for artist in [*axes.lines, *axes.collections]:
    artist.set_in_layout(False)
  axes.autoscale()
  return tips


def _draw_line(axes: Any, xs: Sequence[Any], ys: Sequence[Any], curve: int) -> None:
  style = (0, (3, 2)) if curve >= len(STYLES) else "-"
  axes.plot(xs, ys, color=_CURVES[curve % len(STYLES)], linewidth=2, linestyle=style, zorder=2.5, gid="curve")


def _draw_marks(axes: Any, xs: Sequence[Any], ys: Sequence[Any], curve: int, is_odd: bool = False) -> None:
  color, marker = _CURVES[curve % len(STYLES)], STYLES[curve % len(STYLES)][1]
  face, edge, width = (PAGE, color, 2) if is_odd else (color, PAGE, 0.75)
  axes.plot(xs, ys, marker, markersize=9, mfc=face, mec=edge, mew=width, zorder=3)


def _draw_real(axes: Any, at: tuple[float | None, float]) -> None:
  if at[0] is None:
    axes.axhline(at[1], color=SOFT, linewidth=1.5, linestyle=(0, (3.3, 2.7)))
  else:
    axes.plot([at[0]], [at[1]], "*", markersize=16, mfc=SOFT, mec=PAGE, mew=0.75, zorder=3.5)


# --- axes -----------------------------------------------------------------------------------------


def places(axis: Axis) -> list[float]:
  """Return where the values of an axis lie: numbers at themselves, other values at 0, 1, 2 and so on.

  >>> places(Axis("scale", [0.0, 1.5, 4.0], True)), places(Axis("solver", ["ddim", "heun"], False))
  ([0.0, 1.5, 4.0], [0.0, 1.0])
  """
  return [float(value) if axis.is_numeric else float(i) for i, value in enumerate(axis.values)]


def _put_ticks(axes: Any, axis: Axis) -> bool:
  """Put the ticks at the values, and use logarithms above the least positive one if the largest is 8 times it.

  Returns:
    Whether there are logarithms.
  """
  least = min((value for value in axis.values if axis.is_numeric and value > 0), default=0)
  is_logarithmic = bool(least and axis.values[0] >= 0 and axis.values[-1] > 8 * least)
  if is_logarithmic:
    axes.set_xscale("symlog", base=2, linthresh=least, linscale=0.5)
  axes.set_xticks(places(axis), [text_of(value) for value in axis.values])
  axes.xaxis.minorticks_off()
  return is_logarithmic


def _thin(axes: Any) -> None:
  """Leave out the texts of ticks that would run into the one before or into the last."""
  labels = [tick.label1 for tick in axes.xaxis.get_major_ticks()]
  boxes, end = [label.get_window_extent() for label in labels], -np.inf
  for label, box in zip(labels, boxes, strict=True):
    if end + 5 <= box.x0 and (box is boxes[-1] or box.x1 + 5 <= boxes[-1].x0):
      end = box.x1
    else:
      label.set_visible(False)


# --- labels that do not collide -------------------------------------------------------------------


_AROUND = ((1, 0), (0, 1), (-1, 0), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


def _place_labels(
  axes: Any, curves: Sequence[Sequence[Value]], real: tuple[float | None, float] | None, is_joined: bool
) -> int:
  """Write the labels beside their points so that they cover no other and no marker; return how many there are.

  The ends of all curves come first. For each text, places around its point are tried. Of those that are free, the one
  is taken that the fewest lines cross. A text without a free place is left out.
  """
  from matplotlib.transforms import Bbox

  def pixels(points: Sequence[Any]) -> Any:
    return np.asarray(axes.transData.transform(np.reshape(points, (-1, 2))))

  at = [pixels([(value.x, value.y) for value in curve]) for curve in curves]
  stars = pixels([real] if real and real[0] is not None else [])
  taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in np.concatenate([*at, stars])]
  segments = [pair for middles in at for pair in itertools.pairwise(middles) if is_joined]
  for value in itertools.chain.from_iterable(curves):
    segments += [pixels([(value.x, y) for y in value.y_interval])] if value.y_interval else []
    segments += [pixels([(x, value.y) for x in value.x_interval])] if value.x_interval else []
  starts, ends = np.reshape(segments, (-1, 2, 2)).swapaxes(0, 1)
  dots = np.linspace(starts, ends, 17).reshape(-1, 2)
  order = sorted((0 < i < len(c) - 1, k, i) for k, c in enumerate(curves) for i in range(len(c)))
  written = 0
  for _, k, i in order:
    text = axes.text(
      0, 0, curves[k][i].label, transform=None, ha="center", va="center", weight="bold", gid="at",
      color=_CURVES[k % len(STYLES)], zorder=4,
    )  # fmt: skip
    extent = text.get_window_extent()
    best: tuple[int, Bbox] | None = None
    for distance, (right, up) in itertools.product((6, 11), _AROUND):
      x = at[k][i][0] + right * (extent.width / 2 + distance)
      y = at[k][i][1] + up * (extent.height / 2 + distance)
      box = Bbox.from_bounds(x - extent.width / 2, y - extent.height / 2, extent.width, extent.height)
      if axes.bbox.count_contains(box.corners()) == 4 and not box.count_overlaps(taken):
        crossed = box.count_contains(dots)
        best = (crossed, box) if best is None or crossed < best[0] else best
    if best is None:
      text.remove()
    else:
      text.set_position((best[1].x0 - extent.x0, best[1].y0 - extent.y0))
      taken.append(best[1])
      written += 1
  return written


# --- SVG ------------------------------------------------------------------------------------------

_CHANGES = (
  (r"\s+", " "),
  (r"(?<=>) (?=<)", ""),
  (r' transform="rotate\(-0 [^"]*"|<g id="[^"]*"/>', ""),
  ("xlink:href", "href"),
  ('<g id="(at|curve)">', r'<g class="\1">'),
  ('<g id="[^"]*">', "<g>"),
  *((f": {color}", f": var(--{variable})") for color, variable in _VARIABLES.items()),
)
"""What is replaced in matplotlib's SVG: white space, identities that nothing refers to, and colours."""


def _svg_of(figure: Any, tips: Sequence[str]) -> str:
  """Return the inside of a figure's SVG with the colours of the page, and with a tip at each marker."""
  figure.patch.set_visible(False)
  for artist in figure.findobj():
    artist.set_clip_on(False)
  file = io.StringIO()
  figure.savefig(file, format="svg")
  # What comes before is for a file of its own: its header, its metadata, and a style that would hold in the whole page.
  svg = file.getvalue().rpartition("</svg>")[0].partition("</style>\n </defs>")[2]
  for pattern, new in _CHANGES:
    svg = re.sub(pattern, new, svg)
  svg = re.sub('(d|x|y)="[^"]*"', lambda match: re.sub(r"(\.\d\d)\d+", r"\1", match[0]), svg)
  parts = re.split("(<use [^>]*)/>", svg)
  marks = zip(parts[1::2], tips, strict=True)
  parts[1::2] = [f"{mark}><title>{html.escape(tip)}</title></use>" for mark, tip in marks]
  return "".join(parts)
