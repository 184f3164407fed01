"""Import of a published state dict as a model folder, and export of a model as a state dict, for every family."""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxguide._core import checks
from jaxguide._core.files import PathLike, check_writable
from jaxguide.models import folders
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import families, layouts, state_dicts
from jaxguide.models.model import Model


@dataclasses.dataclass(frozen=True)
class Imported:
  """A summary of an import.

  Args:
    config: the configuration of the network.
    parameters: the number of parameters.
    dtypes: the number of tensors that were stored in each type.
    family: the name of the family.
  """

  config: ModelConfig
  parameters: int
  dtypes: Mapping[str, int]
  family: str

  def __str__(self) -> str:
    """Return the summary as a phrase."""
    *others, last = [f"{count} tensors of {dtype}" for dtype, count in self.dtypes.items()]
    stored = f"{', '.join(others)} and {last}" if others else last
    cast = "" if set(self.dtypes) == {"float32"} else ", cast to float32"
    return f"{type(self.config.module).__name__}, {self.parameters:,} parameters in {stored}{cast}"

  @property
  def takes(self) -> str:
    """What the network takes and predicts, as a phrase: what a user should compare with the publication."""
    config = self.config
    height, width, channels = config.image_shape
    classes = "no classes" if config.num_classes is None else f"{config.num_classes} classes"
    if config.null_cond is not None and config.num_classes is not None:
      classes += " and a null label"
    kind = "latents" if config.encoder == "latents" else "pixels"
    prediction = "" if config.role.name == "classifier" else f", prediction {config.prediction}"
    return f"{kind} of {height}x{width}x{channels}, {classes}{prediction}"


def import_model(
  file: PathLike, out: PathLike, preset: str | None = None, family: str | None = None, **given: Any
) -> Imported:
  """Convert a published state dict to a model folder, which `jaxguide.models.load` reads.

  Args:
    file: a ``.safetensors``, ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` or ``.pkl`` file. PyTorch is not needed, and
      nothing in it is run.
    out: the folder to write; it must be new or empty.
    preset: the name of a published model, from the presets of its family; its configuration is complete.
    family: the name of the family; by default it is recognised by the names of the tensors.
    **given: without a preset, the settings that names and shapes do not determine: ``heads``, the number of attention
      heads, and the other settings of the family.

  Returns:
    A summary of the import.

  Raises:
    ValueError: if the file is incomplete, contains something else than tensors, is of no known family, or does not fit
      the preset or the settings; if the preset or the family is unknown; if settings are missing or do not apply.
      Nothing is written.
    OSError: if there is no such file, or ``out`` is not empty or cannot be written.
  """
  out = Path(out)
  if out.is_dir() and any(out.iterdir()):
    raise OSError(f"{out} is not empty: choose a new folder, or remove it")
  check_writable(out / "config.json")
  model, imported = read_model(file, preset, family, **given)
  folders.save(out, model)
  return imported


def read_model(
  file: PathLike, preset: str | None = None, family: str | None = None, **given: Any
) -> tuple[Model, Imported]:
  """Read a published state dict as a model. The arguments and the errors are those of `import_model`.

  Returns:
    The model, and a summary.
  """
  file = Path(file)
  known = families.families()
  chosen = None if family is None else checks.lookup("family", family, known)
  presets = {name: each for each in known.values() if chosen in (None, each) for name in each.presets}
  if preset is not None:
    chosen = checks.lookup("preset", preset, presets)
    if given:
      raise ValueError(f"a preset is a complete configuration: leave out {', '.join(given)}, or the preset")
  found = state_dicts.read(file, any_type=True)
  try:
    chosen = chosen or families.recognise(found)
    tensors = dict(chosen.prepare(found))
    state_dicts.check_types(file, tensors)
    if preset is not None:
      config = chosen.presets[preset]
    else:
      stated = {} if found.network is None else chosen.stated(*found.network)
      config = chosen.infer(tensors, **_settings(chosen, {**stated, **chosen.beside(file), **given}))
    dtypes = Counter(str(tensor.dtype) for tensor in tensors.values())
    tensors = dict(chosen.complete(tensors, config))
    params = layouts.to_params(tensors, chosen.layout(config), type(config.module).__name__)
  except ValueError as error:
    as_preset = f" as preset {preset}" if preset else ""
    raise ValueError(f"{file} cannot be imported{as_preset}: {error}") from error
  # The pages that were read of a memory-mapped file stay in memory until its tensors are deleted.
  del found, tensors
  size = sum(leaf.size for leaf in jax.tree.leaves(params))
  return Model(config, params), Imported(config, size, dtypes, chosen.name)


def _settings(family: families.Family, given: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings that a family takes.

  Raises:
    ValueError: if one is unknown.
  """
  takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(family.infer).parameters.values())
  for name in given:
    if name not in family.settings and not takes_any:
      heads = "; attention heads do not apply" if name == "heads" else ""
      known = ", ".join(family.settings) or "none"
      raise ValueError(f"{family.title} has no setting {name!r}{heads}; its settings are {known}")
  return dict(given)


def export_model(folder: PathLike, file: PathLike, family: str | None = None) -> Sequence[str]:
  """Write the parameters of a model as a state dict with the published names, for use in PyTorch.

  Args:
    folder: the model, as `jaxguide.models.load` reads it.
    file: the ``.safetensors`` or ``.pt`` file to write; an existing file is replaced. A ``.pt`` file needs PyTorch.
    family: the form of the names, where the network has several; by default the first.

  Returns:
    What a user of the weights must know, in lines: the call that makes the network, and differences.

  Raises:
    FileNotFoundError: if there is no model.
    ValueError: if the model is damaged, or has no published form, or the file's extension is unknown.
    OSError: if the file cannot be written.
    ImportError: for a ``.pt`` file if PyTorch is not installed.
  """
  state_dicts.check_format(file)
  check_writable(file)
  model = folders.load(folder)
  chosen = families.of_network(model.config.network, family)
  lines = chosen.usage(model.config)
  layout = chosen.layout(model.config)
  state_dict = layouts.to_state_dict(model.params, layout, type(model.config.module).__name__)
  state_dicts.write(file, dict(chosen.restore(state_dict, model.config)))
  return lines
