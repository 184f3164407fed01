"""Import and export of the weights of OpenAI's guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233).

The weight ``input_blocks.1.0.in_layers.2.weight`` of a guided-diffusion state dict is the ``kernel`` of
``input_blocks_1_0/in_layers_2`` here. Kernels have the layout (out, in, height, width) there and (height, width, in,
out) here, and a 1x1 convolution there is a dense layer here. There is no other difference: float32 weights are the same
bit for bit after import and export.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks
from jaxguide._core.files import PathLike, check_writable
from jaxguide._core.typing import PyTree
from jaxguide.models import folders
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import state_dicts
from jaxguide.models.importers.presets import PRESETS, UNCONDITIONAL_SCALE
from jaxguide.models.importers.structure import OPTIONS, first, infer
from jaxguide.models.model import Model, init_params

__all__ = [
  "OPTIONS",
  "PRESETS",
  "UNCONDITIONAL_SCALE",
  "Exported",
  "Imported",
  "constructor",
  "export_model",
  "import_model",
  "infer",
  "shapes",
  "to_params",
  "to_state_dict",
]

# Layers that are 1x1 convolutions (2 spatial axes) or convolutions with kernel size 1 (1 axis) in guided-diffusion, and
# their number of spatial axes.
_PIXEL_AXES = {"skip_connection": 2, "qkv": 1, "proj_out": 1, "qkv_proj": 1, "c_proj": 1}


class _Weight(NamedTuple):
  """The correspondence between a weight in a state dict and a parameter here.

  Args:
    path: the path of the parameter.
    ours: the shape of the parameter.
    shape: the shape of the weight in the state dict.
  """

  path: tuple[str, ...]
  ours: tuple[int, ...]
  shape: tuple[int, ...]

  def read(self, weight: Any) -> np.ndarray:
    """Convert a weight from guided-diffusion's layout to ours, as a new float32 array."""
    with np.errstate(over="ignore"):  # A value beyond float32 becomes infinite, which the caller checks.
      array = np.asarray(weight).astype(np.float32, copy=False)
    if len(self.ours) == 4:
      array = array.transpose(2, 3, 1, 0)
    elif self.transposed:
      array = array.reshape(self.shape[:2]).T
    return np.array(array, order="C")

  def write(self, leaf: Any) -> np.ndarray:
    """Convert a parameter from our layout to guided-diffusion's, as a new array."""
    array = np.asarray(leaf)
    if len(self.ours) == 4:
      array = array.transpose(3, 2, 0, 1)
    elif self.transposed:
      array = array.T.reshape(self.shape)
    return np.array(array, order="C")

  @property
  def transposed(self) -> bool:
    return self.path[-1] in ("kernel", "positional_embedding")


def _layout(config: ModelConfig) -> dict[str, _Weight]:
  """Return the weights of a network's state dict by their names there."""
  layout = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(_expected(config)):
    _, *modules, kind = keys = tuple(part.key for part in path)
    kind = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, kind)
    # input_blocks_1_0 is input_blocks.1.0, but skip_connection is skip_connection.
    name = ".".join([*(re.sub(r"_(?=\d)", ".", module) for module in modules), kind])
    shape = leaf.shape
    if keys[-1] == "positional_embedding":
      shape = shape[::-1]
    elif keys[-1] == "kernel":
      # The last layer of the adaptive pool is a 1x1 convolution too.
      adaptive_pool = name == "out.3.weight" and getattr(config.module, "pool", None) == "adaptive"
      pixel_axes = 2 if adaptive_pool else _PIXEL_AXES.get(modules[-1], 0)
      shape = (shape[-1], shape[-2], *shape[:-2], *(1,) * pixel_axes)
    layout[name] = _Weight(keys, leaf.shape, shape)
  return layout


def _expected(config: ModelConfig) -> PyTree:
  """Return the shapes and types of a network's parameters."""
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Return the name and shape of every weight in the state dict of a network.

  >>> len(shapes(PRESETS["64x64_diffusion"]))
  541
  """
  return {name: weight.shape for name, weight in _layout(config).items()}


def to_params(state_dict: Mapping[str, Any], config: ModelConfig) -> PyTree:
  """Convert a state dict of guided-diffusion to the parameters of a network here.

  Args:
    state_dict: arrays by name, or objects that ``np.asarray`` converts, of any floating-point type. They are converted
      one after another.
    config: the configuration of the network, from `PRESETS`, from `infer`, or written by hand.

  Returns:
    ``{"params": ...}`` of float32 arrays, for the network's ``apply``.

  Raises:
    ValueError: if names are missing or unknown, a shape differs, or a weight is not finite.

  >>> config = ModelConfig("unet", {"model_channels": 32, "null_class": False}, (8, 8, 3), 10)
  >>> state_dict = {name: np.ones(shape, np.float16) for name, shape in shapes(config).items()}
  >>> to_params(state_dict, config)["params"]["input_blocks_0_0"]["kernel"].shape
  (3, 3, 3, 32)
  """
  layout = _layout(config)
  _check_state_dict(state_dict, layout, type(config.module).__name__)
  params: dict[str, Any] = {}
  for key, weight in layout.items():
    array = weight.read(state_dict[key])
    if not np.isfinite(array).all():
      raise ValueError(f"{key} contains numbers that are not finite in float32: the weights are damaged")
    *parents, last = weight.path
    functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, params)[last] = jnp.asarray(array)
  return params


def _check_state_dict(state_dict: Mapping[str, Any], layout: Mapping[str, _Weight], network: str) -> None:
  """Check that a state dict has the names and shapes of a network.

  Raises:
    ValueError: if not, naming the first names or shapes that differ.
  """
  missing, unknown = [key for key in layout if key not in state_dict], [key for key in state_dict if key not in layout]
  if len(missing) == len(layout):
    raise ValueError(
      f"the weights are of another architecture: {network} has none of their {len(unknown)} names ({first(unknown)})"
    )
  if missing or unknown:
    problems = [
      f"{len(names)} {'name is' if len(names) == 1 else 'names are'} {problem} ({first(names)})"
      for problem, names in (("missing", missing), ("unknown", unknown))
      if names
    ]
    raise ValueError(f"the weights do not fit {network}: {' and '.join(problems)}")
  differing = [key for key, weight in layout.items() if np.shape(state_dict[key]) != weight.shape]
  if differing:
    key, *others = differing
    more = f", and {len(others)} more shapes differ" if others else ""
    raise ValueError(
      f"the weights do not fit {network}: {key} has shape {np.shape(state_dict[key])}, expected {layout[key].shape}"
      f"{more}"
    )


def to_state_dict(params: PyTree, config: ModelConfig) -> dict[str, np.ndarray]:
  """Convert the parameters of a network here to a state dict of guided-diffusion. The inverse of `to_params`.

  Args:
    params: ``{"params": ...}``.
    config: the configuration of the network.

  Returns:
    Arrays by name, in guided-diffusion's layout. A null class is the last row of ``label_emb.weight``.

  Raises:
    ValueError: if the parameters do not fit the network.
  """
  layout = _layout(config)
  leaves = {tuple(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  actual, expected = (
    {path: np.shape(leaf) for path, leaf in leaves.items()},
    {w.path: w.ours for w in layout.values()},
  )
  for path in [*expected, *actual]:
    if actual.get(path) != expected.get(path):
      raise ValueError(
        f"the parameters do not fit {type(config.module).__name__}: {'/'.join(path)} has shape {actual.get(path)}, "
        f"expected {expected.get(path)} (None: no such parameter)"
      )
  return {name: weight.write(leaves[weight.path]) for name, weight in layout.items()}


@dataclasses.dataclass(frozen=True)
class Imported:
  """A summary of an import.

  Args:
    config: the configuration of the network.
    parameters: the number of parameters.
    dtypes: the number of tensors that were stored in each type.
  """

  config: ModelConfig
  parameters: int
  dtypes: Mapping[str, int]

  def __str__(self) -> str:
    """Return the summary as a phrase."""
    *others, last = [f"{count} tensors of {dtype}" for dtype, count in self.dtypes.items()]
    stored = f"{', '.join(others)} and {last}" if others else last
    cast = "" if set(self.dtypes) == {"float32"} else ", cast to float32"
    return f"{type(self.config.module).__name__}, {self.parameters:,} parameters in {stored}{cast}"


def import_model(file: PathLike, out: PathLike, preset: str | None = None, **options: Any) -> Imported:
  """Convert a state dict of guided-diffusion to a model folder, which `jaxguide.models.load` reads.

  Args:
    file: a ``.safetensors``, ``.pt`` or ``.pth`` file. None of them needs PyTorch, and nothing in them is run.
    out: the folder to write; it must be new or empty.
    preset: the name of a published model, from `PRESETS`.
    **options: without a preset, the settings that names and shapes do not determine; see `infer`.

  Returns:
    A summary of the import.

  Raises:
    ValueError: if the file is incomplete, contains something else than tensors, or does not fit the preset or the
      options; if the preset is unknown; if options are missing or do not apply. Nothing is written.
    OSError: if there is no such file, or ``out`` is not empty or cannot be written.
  """
  file, out = Path(file), Path(out)
  config = None if preset is None else checks.lookup("preset", preset, PRESETS)
  if config is not None and options:
    raise ValueError(f"a preset is a complete configuration: leave out {', '.join(options)}, or the preset")
  if out.is_dir() and any(out.iterdir()):
    raise OSError(f"{out} is not empty: choose a new folder, or remove it")
  check_writable(out / "config.json")
  tensors = state_dicts.read(file)
  try:
    if config is None:
      config = infer({name: tensor.shape for name, tensor in tensors.items()}, **options)
    params = to_params(tensors, config)
  except ValueError as error:
    as_preset = f" as preset {preset}" if preset else ""
    raise ValueError(f"{file} cannot be imported{as_preset}: {error}") from error
  dtypes = Counter(tensor.dtype for tensor in tensors.values())
  # The pages that were read of a memory-mapped file stay in memory until its tensors are deleted.
  del tensors
  folders.save(out, Model(config, params))
  return Imported(config, sum(leaf.size for leaf in jax.tree.leaves(params)), dtypes)


@dataclasses.dataclass(frozen=True)
class Exported:
  """How to use exported weights in guided-diffusion.

  Args:
    constructor: the Python call that creates guided-diffusion's network for these weights.
    flags: the flags of guided-diffusion's scripts for the model's diffusion process; None if the scripts do not support
      this process.
    notes: further differences that a user must know, in sentences.
  """

  constructor: str
  flags: str | None
  notes: Sequence[str]


def export_model(folder: PathLike, file: PathLike) -> Exported:
  """Write the parameters of a model as a state dict of guided-diffusion, for use in PyTorch.

  Args:
    folder: the model, as `jaxguide.models.load` reads it.
    file: the ``.safetensors`` or ``.pt`` file to write; an existing file is replaced. A ``.pt`` file needs PyTorch.

  Returns:
    How to use the weights in guided-diffusion.

  Raises:
    FileNotFoundError: if there is no model.
    ValueError: if the model is damaged, its labels are vectors, or the file's extension is unknown.
    OSError: if the file cannot be written.
    ImportError: for a ``.pt`` file if PyTorch is not installed.
  """
  state_dicts.check_format(file)
  check_writable(file)
  model = folders.load(folder)
  call = constructor(model.config)
  state_dicts.write(file, to_state_dict(model.params, model.config))
  return Exported(call, _flags(model.config), _notes(model.config))


def constructor(config: ModelConfig) -> str:
  """Return the Python call that creates guided-diffusion's network, as a text.

  >>> constructor(ModelConfig("classifier", {"num_head_channels": 64}, (64, 64, 3), 10))
  "EncoderUNetModel(image_size=64, in_channels=3, model_channels=64, out_channels=10, num_res_blocks=2, ...)"

  Raises:
    ValueError: if the network's labels are vectors.
  """
  if config.label_size is not None:
    raise ValueError(
      f"guided-diffusion's networks take classes, and this one takes labels of {config.label_size} numbers: it cannot "
      "be exported"
    )
  module = config.module
  names = {"unet": "UNetModel", "super_res_unet": "SuperResModel", "classifier": "EncoderUNetModel"}
  fields = {
    "image_size": config.image_shape[0],
    "in_channels": config.image_shape[2],
    **{
      field.name: getattr(module, field.name)
      for field in dataclasses.fields(module)
      if field.name not in ("dtype", "cudnn_attention", "null_class", "label_size", "perturbation", "parent", "name")
    },
  }
  if config.network != "classifier":
    fields["out_channels"] = fields["out_channels"] or config.image_shape[2]
    if config.num_classes is not None:
      fields["num_classes"] = config.num_classes + module.null_class
  return f"{names[config.network]}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def _flags(config: ModelConfig) -> str | None:
  """Return the flags of guided-diffusion's scripts for a model's process; None if they do not support it."""
  if config.diffusion_steps is None or config.prediction not in ("eps", "x0"):
    return None
  flags: dict[str, Any] = {
    "noise_schedule": config.schedule,
    "diffusion_steps": config.diffusion_steps,
    "rescale_timesteps": config.rescale_timesteps,
  }
  if config.network != "classifier":
    flags |= {"learn_sigma": config.variance == "learned_range", "predict_xstart": config.prediction == "x0"}
  return " ".join(f"--{name} {value}" for name, value in flags.items())


def _notes(config: ModelConfig) -> list[str]:
  """Return the differences to guided-diffusion's own models that a user must know."""
  module, notes = config.module, []
  if _flags(config) is None:
    process = f"{config.prediction} on the continuous {config.schedule} schedule"
    notes.append(f"guided-diffusion's scripts do not support its process: the network predicts {process}")
  if getattr(module, "null_class", False) and config.num_classes is not None:
    notes.append(f"class {config.num_classes} is the null class, which means no label, for classifier-free guidance")
  if config.network != "classifier" and _flags(config) is not None and config.variance == "small":
    notes.append(
      "its steps use the small variance; guided-diffusion's scripts use the large variance if none is learned"
    )
  indivisible = sorted({c for level in range(len(module.channel_mult)) if (c := module.channels(level)) % 32})
  if indivisible:
    notes.append(
      f"guided-diffusion normalises in 32 groups, which do not divide {', '.join(map(str, indivisible))} channels: "
      "change its `normalization` to GroupNorm32(math.gcd(32, channels), channels)"
    )
  return notes
