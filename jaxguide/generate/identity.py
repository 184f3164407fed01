"""Which settings have the same samples, however they are written."""

import json
from pathlib import Path
from typing import Any

from jaxguide import models
from jaxguide._core.files import PathLike
from jaxguide.generate.classes import classes_of
from jaxguide.generate.plan import Load, by_number, chosen_of, classifier_folder, grid_of, scales_of
from jaxguide.generate.settings import Settings
from jaxguide.models import pretrained


def identity(settings: Settings, load: Load = models.load) -> str:
  """Write everything that samples depend on in one way, but not their number and the size of the batches.

  Every default is written out, also those that follow from the networks; options are in order; a scale in the text of
  a guidance is the same as one beside it; classes are numbers, and paths are absolute.

  Args:
    settings: the settings.
    load: loads the model of a folder.

  Returns:
    A text. Settings with the same text have the same samples.

  Raises:
    ValueError: for a setting that does not suit the networks.
    FileNotFoundError: if there is no model.

  >>> one = identity(Settings("animals", guidance="cfg:scale=2"))
  >>> one == identity(Settings("animals", num=3, grid="karras")), one == identity(Settings("animals", scale=3))
  (True, False)
  """
  model = load(settings.model)
  chosen = chosen_of(settings, model)
  folder = classifier_folder(settings) if any(spec.method.gradient for spec in chosen) else None
  classifier = None if folder is None else load(folder)
  solver, grid = settings.solver_spec, grid_of(settings, model)
  variance = {"variance": model.config.variance} if solver.name == "ddpm" else {}
  classes = None if settings.base_samples is not None else classes_of(model, classifier)
  settings, _ = by_number(settings, model, classifier)
  chosen, labels = chosen_of(settings, model), settings.labels
  scales = scales_of(settings, chosen, classifier)
  return json.dumps(
    {
      **{name: getattr(settings, name) for name in ("join", "dtype", "matmul_precision", "cudnn_attention", "clip")},
      **{name: getattr(settings, name) for name in ("seed", "steps", "init_level")},
      **{name: place(getattr(settings, name)) for name in ("model", "base_samples", "init")},
      "classifier": place(folder),
      "labels": range(classes) if labels is None and classes is not None else labels,
      "guidance": [(spec.name, _plain(spec.complete(scale))) for spec, scale in zip(chosen, scales, strict=True)],
      "solver": (solver.name, _plain({**solver.complete(), **variance, **solver.options})),
      "grid": (grid.name, _plain(grid.complete())),
    },
    sort_keys=True,
    default=list,
  )


def place(path: PathLike | None) -> str | None:
  """Return the absolute path of a file or a folder; the name of a model of the package as it is.

  >>> place("animals"), place(None)
  ('animals', None)
  """
  if path is None:
    return None
  return pretrained.name_of(path) or str(Path(path).resolve())


def _plain(options: dict[str, Any]) -> dict[str, Any]:
  """Return the values of options with all numbers as floats: 2 and 2.0 are one value."""
  return {
    name: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
    for name, value in options.items()
  }
