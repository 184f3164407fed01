"""The points of a sweep: settings of sampling for each method, scale and value of what else is swept.

A *method* is a guidance with its options, such as ``cfg`` or ``cfg:sigma_hi=5``. Several guidances in a chain are
joined by ``+``, such as ``cfg+dynamic-threshold``. What else is swept is written ``FIELD=value,value`` for a field of
`jaxguide.generate.Settings`, such as ``steps=10,20,50`` or ``solver=ddim,heun``; or ``GUIDANCE:OPTION=value,value`` for
an option of a guidance, such as ``cfg:sigma_hi=2,5,inf``.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxguide._core import checks, specs
from jaxguide.generate import Settings
from jaxguide.generate.identity import place
from jaxguide.generate.walks import GridSpec, SolverSpec

OWN = {
  "guidance": "guidance (--guidance cfg,classifier)",
  "scale": "scales (--scales 0,1,2)",
  "labels": "labels (--label)",
  "num": "num (--num)",
  "batch_size": "batch_size (--batch-size)",
}
"""The fields of `Settings` that ``over`` cannot sweep, since they have their own option, and that option."""

PATHS = ("model", "classifier", "base_samples", "init")
"""The fields of `Settings` that are paths."""


@dataclasses.dataclass(frozen=True)
class Cell:
  """One point of a sweep, before it is sampled.

  Args:
    method: the guidance, as it was written, without what is swept.
    settings: everything that its samples depend on.
    file: the name of its files, if they are there from an earlier sweep.
  """

  method: str
  settings: Settings
  file: str | None = None

  @property
  def name(self) -> str:
    """A name for files: the method and the scale to read, and a hash of everything but the number of samples."""
    if self.file is not None:
      return self.file
    record = dataclasses.asdict(dataclasses.replace(self.settings, num=1, batch_size=1))
    for name in PATHS:
      path = record[name]
      record[name] = str(Path(path).resolve()) if path is not None and Path(path).exists() else path
    digest = hashlib.sha256(json.dumps([self.method, record], sort_keys=True, default=list).encode()).hexdigest()[:10]
    scale = "" if self.settings.scale is None else f"_{self.settings.scale:g}"
    return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', self.method)[:40]}{scale}_{digest}"


def plain(cell: Cell) -> Cell:
  """Move a scale out of the text of a guidance to where ``scales`` are.

  >>> cell = plain(Cell("cfg:scale=3+clip", Settings(guidance=("cfg:scale=3", "clip"))))
  >>> cell.method, cell.settings.guidance, cell.settings.scale
  ('cfg+clip', ('cfg', 'clip'), 3.0)
  """
  used = cell.settings.guidance_specs or ()
  at = next((i for i, spec in enumerate(used) if spec.takes_scale), None)
  if at is None or "scale" not in used[at].options:
    return cell
  guidance, method = (
    [_without_scale(text) if i == at else text for i, text in enumerate(texts)]
    for texts in (cell.settings.guidance or (), _parts(cell.method))
  )
  settings = dataclasses.replace(cell.settings, guidance=tuple(guidance), scale=used[at].options["scale"])
  return dataclasses.replace(cell, method="+".join(method), settings=settings)


def _parts(chain: str) -> list[str]:
  """Split a chain at + before a name, but not at that of a number such as 1e+3."""
  return re.split(r"\+(?=[a-z])", chain)


def _without_scale(text: str) -> str:
  name, options = specs.parse(text)
  rest = ",".join(f"{option}={value}" for option, value in options.items() if option != "scale")
  return f"{name}:{rest}" if rest else name


def split_list(texts: str | Iterable[str]) -> list[str]:
  """Split texts at commas, but not inside the options of a name.

  >>> split_list("cfg:sigma_hi=5,combine=rescaled,classifier")
  ['cfg:sigma_hi=5,combine=rescaled', 'classifier']
  """
  parts: list[str] = []
  for text in [texts] if isinstance(texts, str) else texts:
    fresh = True
    for part in text.split(","):
      is_option = "=" in part and ":" not in part.split("=")[0]
      if is_option and not fresh and ":" in parts[-1]:
        parts[-1] += f",{part}"
      else:
        parts.append(part)
      fresh = False
  return parts


def cells(
  base: Settings,
  guidance: str | Sequence[str],
  scales: Sequence[float | int] | None = None,
  over: Sequence[str] | Mapping[str, Sequence[Any]] = (),
  default_scales: Sequence[float | int] | None = None,
) -> list[Cell]:
  """Give the points of a sweep, those of one method together.

  A guidance without a scale has one point for all scales.

  Args:
    base: the settings that all points share, without guidance.
    guidance: the methods, as texts or as one text with commas between them.
    scales: the guidance scales; if left out, the one of ``base``.
    default_scales: the scales, if neither ``scales`` nor ``base`` has one, of guidances that have none in their text.
    over: what else is swept: texts ``FIELD=value,value``, or a mapping from ``FIELD`` to values.

  Raises:
    ValueError: for a field, an option or a guidance that is unknown, a value that does not suit it, a thing that is
      swept twice, or a scale in two places.

  >>> [(cell.method, cell.settings.scale) for cell in cells(Settings(), "cfg,none", [1, 2])]
  [('cfg', 1.0), ('cfg', 2.0), ('none', None)]
  >>> [cell.settings.guidance for cell in cells(Settings(), "cfg", over=["cfg:sigma_hi=2,inf"])]
  [('cfg:sigma_hi=2',), ('cfg:sigma_hi=inf',)]
  """
  if base.guidance is not None:
    raise ValueError("guidance is given twice: leave it out of the settings")
  chains = [_parts(text) for text in split_list(guidance)]
  if scales is not None and base.scale is not None:
    raise ValueError("scale is given twice: leave it out of the settings")
  numbers = [base.scale] if scales is None else [checks.number("scale", scale) for scale in scales]
  given_scales = scales is not None or base.scale is not None
  if not numbers:
    raise ValueError("scales must have at least one number")
  _check_once("scales", numbers)
  fields, options = _swept(over)
  found: list[Cell] = []
  for chain in chains:
    names = {specs.parse(text).name for text in chain}
    own = {key: values for key, values in options.items() if key[0] in names}
    for values in itertools.product(*fields.values()):
      given = dict(zip(fields, values, strict=True))
      for chosen in itertools.product(*own.values()):
        texts = tuple(_with(text, dict(zip(own, chosen, strict=True))) for text in chain)
        settings = dataclasses.replace(base, **given, guidance=texts, scale=None)
        used = settings.guidance_specs or ()
        if not any(spec.method.gradient for spec in used):
          settings = dataclasses.replace(settings, classifier=None)
        scaled = [spec for spec in used if spec.takes_scale]
        own_scale = bool(scaled) and "scale" in scaled[0].options
        if own_scale and given_scales:
          raise ValueError(f"scale is given twice, in scales and in {scaled[0].text!r}: leave out one")
        for number in numbers if given_scales or own_scale or default_scales is None else map(float, default_scales):
          cell = plain(Cell("+".join(chain), dataclasses.replace(settings, scale=number if scaled else None)))
          if cell not in found:
            found.append(cell)
  if given_scales and all(cell.settings.scale is None for cell in found):
    raise ValueError(
      f"guidance {', '.join(map('+'.join, chains))} takes no scale: leave out scales (--scales), or choose another"
    )
  for name, option in options:
    if not any(specs.parse(text).name == name for chain in chains for text in chain):
      raise ValueError(f"{name}:{option} is swept, but no method has the guidance {name!r}: add it to guidance")
  return found


def _swept(over: Sequence[str] | Mapping[str, Sequence[Any]]) -> tuple[dict[str, list[Any]], dict[Any, list[str]]]:
  """Return what is swept: fields of settings with their values, and options of guidances with the values' texts."""
  if isinstance(over, Mapping):
    pairs = [(name, list(values)) for name, values in over.items()]
  else:
    if isinstance(over, str):
      raise TypeError(f"over must be a list of texts such as 'steps=10,20', got the text {over!r}: put it in a list")
    pairs = []
    for text in over:
      name, equals, rest = text.partition("=")
      if not (name and equals and rest):
        raise ValueError(f"over must be written FIELD=value,value or GUIDANCE:OPTION=value,value, got {text!r}")
      pairs.append((name, split_list(rest)))
  kinds = {field.name: field for field in dataclasses.fields(Settings)}
  fields: dict[str, list[Any]] = {}
  options: dict[Any, list[str]] = {}
  for name, values in pairs:
    if not values:
      raise ValueError(f"over {name!r} must have at least one value")
    guidance, colon, option = name.partition(":")
    key = (guidance, option) if colon else name
    if key in fields or key in options:
      raise ValueError(f"{name} is swept twice: give all its values at once")
    if colon:
      options[key] = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
      _check_once(name, options[key])
    elif name in OWN:
      raise ValueError(f"over cannot sweep {name}: give it by {OWN[name]}")
    else:
      field = checks.lookup("field of settings", name, kinds)
      fields[name] = [_value(name, value, field.default) for value in values]
      _check_once(name, fields[name])
  return fields, options


def _check_once(name: str, values: Sequence[Any]) -> None:
  for i, value in enumerate(values):
    if value in values[:i]:
      shown = f"{value:g}" if isinstance(value, float) else value
      raise ValueError(f"{name} has {shown} twice: give each value once")


def _value(name: str, value: Any, default: Any) -> Any:
  """Convert the text of a field's value, by the field's default."""
  if not isinstance(value, str):
    return value
  if isinstance(default, bool):
    return checks.lookup(name, value, {"true": True, "false": False})
  if isinstance(default, int) or name == "init_level":
    try:
      return int(value) if isinstance(default, int) else float(value)
    except ValueError:
      if name == "steps":  # Such as ddim25.
        return value
      raise ValueError(f"{name} must be a number, got {value!r}") from None
  return value


def _with(text: str, chosen: Mapping[tuple[str, str], str]) -> str:
  """Add options to a guidance's text."""
  name = specs.parse(text).name
  for (guidance, option), value in chosen.items():
    if guidance == name:
      text += f"{',' if ':' in text else ':'}{option}={value}"
  return text


def varied(found: Sequence[Cell]) -> dict[str, list[Any]]:
  """Return what differs among points, apart from the method: each name with the value of every point.

  The names are ``scale`` (always), fields of `Settings`, and options of guidances, as ``cfg:sigma_hi``. A point without
  an option has None. If all of these are the same for two points, they are told apart by ``point``, their name.

  >>> varied(cells(Settings(), "cfg", [1, 2], ["steps=10,20"]))
  {'scale': [1.0, 2.0, 1.0, 2.0], 'steps': [10, 10, 20, 20]}
  """
  columns: dict[str, list[Any]] = {"scale": [cell.settings.scale for cell in found]}
  for field in dataclasses.fields(Settings):
    if field.name not in OWN:
      columns[field.name] = [getattr(cell.settings, field.name) for cell in found]
  labels = (cell.settings.labels for cell in found)
  columns["labels"] = ["all" if each is None else ", ".join(map(str, each)) for each in labels]
  swept = [dict(_added_options(cell)) for cell in found]
  for name in dict.fromkeys(name for options in swept for name in options):
    columns[name] = [options.get(name) for options in swept]
  columns = {name: _unified(name, values) for name, values in columns.items()}
  # A method without a classifier has None. Where each method has one, and all the same, it tells no points apart.
  used = set(zip((cell.method for cell in found), columns["classifier"], strict=True))
  if len({method for method, _ in used}) == len(used) and len({path for _, path in used} - {None}) < 2:
    del columns["classifier"]
  columns = {
    name: values for name, values in columns.items() if name == "scale" or any(value != values[0] for value in values)
  }
  alike = [(cell.method, *map(str, row)) for cell, *row in zip(found, *columns.values(), strict=True)]
  if len(set(alike)) < len(alike):
    columns["point"] = [cell.name if alike.count(one) > 1 else None for cell, one in zip(found, alike, strict=True)]
  return columns


def _unified(name: str, values: Sequence[Any]) -> list[Any]:
  """Write values that mean the same in one way, that of the first."""
  first: dict[Any, Any] = {}
  return [first.setdefault(_meaning(name, value), value) for value in values]


def _meaning(name: str, value: Any) -> Any:
  """Return what a value means: another text, such as another path to a folder, may mean the same."""
  if name in PATHS:
    return place(value)
  if name in ("solver", "grid") and value is not None:
    spec = SolverSpec.parse(value) if name == "solver" else GridSpec.parse(value)
    return spec.name, str(sorted(spec.complete().items()))
  try:
    return float(value) if ":" in name else value
  except (TypeError, ValueError):
    return value


def _added_options(cell: Cell) -> Iterable[tuple[str, str]]:
  """Give the options that a sweep added to the guidances of a method, by name."""
  texts = cell.settings.guidance or ()
  for text, written in zip(texts, _parts(cell.method), strict=False):
    before = specs.parse(written).options
    name, options = specs.parse(text)
    yield from ((f"{name}:{option}", value) for option, value in options.items() if option not in before)
