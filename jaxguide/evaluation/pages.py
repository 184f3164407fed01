"""What reports share: HTML pages in one file, PNG images in them, and the look of plots."""

import base64
import io
from importlib import resources
from typing import Any

# The colours of Okabe and Ito, which colour-blind readers can distinguish. The markers serve black-and-white print.
STYLES = (
  ("#0072B2", "o"),
  ("#D55E00", "s"),
  ("#009E73", "^"),
  ("#CC79A7", "D"),
  ("#E69F00", "v"),
  ("#56B4E9", "P"),
)

COLORS = tuple(
  zip(
    ("#0072B2", "#B84A00", "#00775A", "#A8487F", "#8A6000", "#23779F"),
    ("#56B4E9", "#F28E4B", "#2FC99B", "#E79AC6", "#E6B23C", "#9AD4F5"),
    strict=True,
  )
)
"""The colours of `STYLES` for a light page and for a dark one. Text in them has a contrast of at least 4.5."""


def render(template: str, **values: Any) -> str:
  """Return an HTML page.

  Args:
    template: the name of a Jinja template beside this module. It extends ``page.html.jinja``, which has the style, and
      a policy with which the browser fetches nothing and runs no script.
    **values: the variables of the template, ``title`` among them. They are escaped.
  """
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: resources.files(__package__).joinpath(name).read_text("utf-8")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return environment.get_template(template).render(**values)


def data_uri(name: str, png: bytes) -> str:
  """Encode a PNG image as the address of an ``img`` element.

  Args:
    name: what the image is, for the error message.
    png: the image.

  Raises:
    ValueError: if it is not a PNG image.
  """
  if not png.startswith(b"\x89PNG\r\n\x1a\n"):
    raise ValueError(f"{name} must be the bytes of a PNG file, got {png[:8]!r}...; encode it as PNG")
  return "data:image/png;base64," + base64.b64encode(png).decode()


def png_width(png: bytes) -> int:
  """Read the width of a PNG image in pixels, the first field of its IHDR chunk."""
  return int.from_bytes(png[16:20], "big")


def png_of(figure: Any) -> bytes:
  """Draw a figure of matplotlib as a PNG image."""
  png = io.BytesIO()
  figure.savefig(png, format="png", metadata={"Software": None})
  return png.getvalue()


def tidy(axes: Any) -> None:
  """Give axes of matplotlib a small title, a faint grid behind the curves, and no frame at the top and the right."""
  axes.title.set_fontsize(11)
  axes.grid(color="0.9", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.margins(y=0.1)
