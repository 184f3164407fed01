"""What benchmarks/pictures.py draws with: panels, pictures of the plane, and sheets of images."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core.files import write_atomically

Row = dict[str, Any]
Made = tuple[Any, list[Row]]
"""A figure and the rows of its table."""

DPI, SIDE, GAP = 100, 28, 2
EDGE, BINS = 3.0, 48
EDGES = np.linspace(-EDGE, EDGE, BINS + 1)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2
FRAME = {"xlim": (-EDGE, EDGE), "ylim": (-EDGE, EDGE), "xticks": (), "yticks": (), "aspect": "equal"}


def canvas(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
  """Make a figure with panels; the size is in inches."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  pyplot.rcParams.update({"font.size": 10, "axes.titlesize": 10})
  figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, dpi=DPI)
  figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)  # In inches. Without it the titles touch the edge.
  return figure, panels


def planes(rows: int, columns: int) -> tuple[Any, Any]:
  """Make pictures of the plane beside and above one another."""
  figure, panels = canvas(rows, columns, (2.6 * columns, 2.85 * rows))
  for panel in panels.flat:
    panel.set(**FRAME)
  return figure, panels


def lattice(span: np.ndarray) -> jax.Array:
  """Give the points of a square lattice."""
  return jnp.asarray(np.stack(np.meshgrid(span, span), -1).reshape(-1, 2), jnp.float32)


def on_plane(function: Callable[..., Any], sigma: float) -> np.ndarray:
  """Evaluate a function of (x, sigma) in the middle of each bin; rows are the second coordinate."""
  values = jax.jit(jax.vmap(function, (0, None)))(lattice(CENTRES), jnp.asarray(sigma))
  return np.asarray(values, np.float64).reshape(BINS, BINS)


def histogram(x: np.ndarray) -> np.ndarray:
  """Give the share of samples in each bin."""
  return np.histogramdd(x[:, ::-1], (EDGES, EDGES))[0] / len(x)


def show(panel: Any, mass: np.ndarray, title: str = "", high: float | None = None, colours: str = "YlOrBr") -> None:
  """Show a function on the plane as colours."""
  extent = (-EDGE, EDGE, -EDGE, EDGE)
  panel.imshow(mass, origin="lower", extent=extent, cmap=colours, vmin=0, vmax=high, interpolation="bilinear")
  panel.set_title(title)


def arrows(panel: Any, function: Callable[..., Any], sigma: float, side: int = 10, most: float = np.inf) -> None:
  """Draw the change that a function of (x, sigma) gives, from x on, in the units of the plane, up to a length."""
  points = lattice(np.linspace(-2.3, 2.3, side))
  change = np.asarray(jax.jit(jax.vmap(function, (0, None)))(points, jnp.asarray(sigma)))
  length = np.linalg.norm(change, axis=1, keepdims=True)
  change = change * np.minimum(1, most / np.maximum(length, 1e-9))
  panel.quiver(*np.asarray(points).T, *change.T, angles="xy", scale_units="xy", scale=1, width=0.007, color="0.15")


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
  """Lay images of [-1, 1] out in a grid of grey levels from 0 to 1, on white."""
  cell = SIDE + GAP
  grid = np.ones((-(-len(images) // columns) * cell - GAP, columns * cell - GAP))
  for place, image in enumerate(images):
    top, left = place // columns * cell, place % columns * cell
    grid[top : top + SIDE, left : left + SIDE] = np.clip(image[..., 0] / 2 + 0.5, 0, 1)
  return grid


def sheet(
  panels: Mapping[str, Mapping[str, np.ndarray]], names: Sequence[str] = (), zoom: float = 2.8, shown: int = 10
) -> Any:
  """Draw panels of rows of images. Each row has a name at the left of the first panel, each column one above."""
  cell, lines = SIDE + GAP, max(map(len, panels.values()))
  width = len(panels) * (cell * shown * zoom / DPI + 0.15) + 1.6
  figure, axes = canvas(1, len(panels), (width, lines * cell * zoom / DPI + 0.7))
  for number, (axis, (title, rows)) in enumerate(zip(axes[0], panels.items(), strict=True)):
    grid = mosaic(np.concatenate([images[:shown] for images in rows.values()]), shown)
    axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title)
    axis.set_yticks(cell * np.arange(len(rows)) + SIDE / 2, ["" if number else name for name in rows])
    axis.set_xticks(cell * np.arange(len(names)) + SIDE / 2, names, fontsize=9 if len(panels) == 1 else 7)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axis.spines[:].set_visible(False)
  return figure


def save(figure: Any, path: Path) -> int:
  """Write a figure as a PNG file of at most 255 colours, and return its size in bytes."""
  from matplotlib import pyplot
  from PIL import Image

  drawn, content = io.BytesIO(), io.BytesIO()
  figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
  pyplot.close(figure)
  Image.open(drawn).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(content, format="png", optimize=True)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_atomically(path, content.getvalue())
  return len(content.getvalue())
