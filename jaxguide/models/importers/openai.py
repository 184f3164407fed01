"""Weights of OpenAI's guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233), in and out.

A weight that their state dicts name ``input_blocks.1.0.in_layers.2.weight`` is the ``kernel`` of
``input_blocks_1_0/in_layers_2`` here. Their kernels are laid out (out, in, height, width), ours (height, width, in,
out), and a convolution of one pixel is a dense layer here. Nothing else differs, so that parameters go out and come
back bit for bit.
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

# Layers that are convolutions of one pixel in the reference, and the axes of that pixel.
_PIXEL_AXES = {"skip_connection": 2, "qkv": 1, "proj_out": 1, "qkv_proj": 1, "c_proj": 1}


class _Weight(NamedTuple):
  """Where a weight of a state dict has its place: the path among our parameters, their shape, its own shape."""

  path: tuple[str, ...]
  ours: tuple[int, ...]
  shape: tuple[int, ...]

  def read(self, weight: Any) -> np.ndarray:
    """Turn the reference's layout into ours; float32, in memory of its own."""
    with np.errstate(over="ignore"):  # What does not fit float32 is refused by whoever asked.
      array = np.asarray(weight).astype(np.float32, copy=False)
    if len(self.ours) == 4:
      array = array.transpose(2, 3, 1, 0)
    elif self.transposed:
      array = array.reshape(self.shape[:2]).T
    return np.array(array, order="C")

  def write(self, leaf: Any) -> np.ndarray:
    """Turn our layout into the reference's, in memory of its own."""
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
  """Give every weight of a network's state dict, by name."""
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
      # The adaptive pool ends in a convolution of one pixel as well.
      pooled = name == "out.3.weight" and getattr(config.module, "pool", None) == "adaptive"
      pixel = 2 if pooled else _PIXEL_AXES.get(modules[-1], 0)
      shape = (shape[-1], shape[-2], *shape[:-2], *(1,) * pixel)
    layout[name] = _Weight(keys, leaf.shape, shape)
  return layout


def _expected(config: ModelConfig) -> PyTree:
  return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Give the name and shape of every weight in the state dict of a network.

  >>> len(shapes(PRESETS["64x64_diffusion"]))
  541
  """
  return {name: weight.shape for name, weight in _layout(config).items()}


def to_params(state_dict: Mapping[str, Any], config: ModelConfig) -> PyTree:
  """Turn a state dict into the parameters of one of our networks.

  Args:
    state_dict: arrays by name, or what ``np.asarray`` makes arrays of, in any type of floating-point number; they are
      converted one after another.
    config: the network, from `PRESETS`, `infer` or one's own hand.

  Returns:
    ``{"params": ...}`` of float32 arrays, as the network's ``apply`` takes them.

  Raises:
    ValueError: for names that are missing or unknown, a shape that differs, or a weight that is not finite.

  >>> config = ModelConfig("unet", {"model_channels": 32, "null_class": False}, (8, 8, 3), 10)
  >>> state_dict = {name: np.ones(shape, np.float16) for name, shape in shapes(config).items()}
  >>> to_params(state_dict, config)["params"]["input_blocks_0_0"]["kernel"].shape
  (3, 3, 3, 32)
  """
  layout, name = _layout(config), type(config.module).__name__
  missing, unknown = [key for key in layout if key not in state_dict], [key for key in state_dict if key not in layout]
  if len(missing) == len(layout):
    raise ValueError(f"another architecture: none of its {len(unknown)} names is one of {name}'s, but {first(unknown)}")
  if missing or unknown:
    wrong = [
      f"{len(names)} {'name is' if len(names) == 1 else 'names are'} {what} ({first(names)})"
      for what, names in (("missing", missing), ("unknown", unknown))
      if names
    ]
    raise ValueError(f"the weights do not fit {name}: {' and '.join(wrong)}")
  differing = [key for key, weight in layout.items() if np.shape(state_dict[key]) != weight.shape]
  if differing:
    key, *others = differing
    more = f", and {len(others)} more shapes differ" if others else ""
    raise ValueError(
      f"the weights do not fit {name}: {key} has shape {np.shape(state_dict[key])}, expected {layout[key].shape}{more}"
    )
  params: dict[str, Any] = {}
  for key, weight in layout.items():
    array = weight.read(state_dict[key])
    if not np.isfinite(array).all():
      raise ValueError(f"{key} holds numbers that are not finite in float32: the weights are damaged")
    *parents, last = weight.path
    functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, params)[last] = jnp.asarray(array)
  return params


def to_state_dict(params: PyTree, config: ModelConfig) -> dict[str, np.ndarray]:
  """Turn the parameters of one of our networks into a state dict, the inverse of `to_params`.

  Args:
    params: ``{"params": ...}``.
    config: the network.

  Returns:
    Arrays by name, in the reference's layout; a null class is the last row of ``label_emb.weight``.

  Raises:
    ValueError: if the parameters do not fit the network.
  """
  layout = _layout(config)
  leaves = {tuple(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  found, expected = ({path: np.shape(leaf) for path, leaf in leaves.items()}, {w.path: w.ours for w in layout.values()})
  for path in [*expected, *found]:
    if found.get(path) != expected.get(path):
      raise ValueError(
        f"the parameters do not fit {type(config.module).__name__}: {'/'.join(path)} is of shape {found.get(path)}, "
        f"expected {expected.get(path)} (None: there is none)"
      )
  return {name: weight.write(leaves[weight.path]) for name, weight in layout.items()}


@dataclasses.dataclass(frozen=True)
class Imported:
  """What was imported.

  Args:
    config: the network.
    parameters: their number.
    dtypes: how many tensors were stored in each type.
  """

  config: ModelConfig
  parameters: int
  dtypes: Mapping[str, int]

  def __str__(self) -> str:
    """Say it in a sentence."""
    *others, last = [f"{count} tensors of {dtype}" for dtype, count in self.dtypes.items()]
    stored = f"{', '.join(others)} and {last}" if others else last
    cast = "" if set(self.dtypes) == {"float32"} else ", cast to float32"
    return f"{type(self.config.module).__name__}, {self.parameters:,} parameters in {stored}{cast}"


def import_model(file: PathLike, out: PathLike, preset: str | None = None, **options: Any) -> Imported:
  """Make a model of a state dict of guided-diffusion: a folder that `jaxguide.models.load` reads.

  Args:
    file: a ``.safetensors`` or ``.pt`` file. The latter needs PyTorch, and is read in its safe mode.
    out: the folder, new or empty.
    preset: which of the published models it is, from `PRESETS`.
    **options: where it is none of them, what names and shapes do not tell of it; see `infer`.

  Returns:
    What it was.

  Raises:
    ValueError: if the file is not whole, carries anything but tensors, or is of another network than was named; if the
      preset is unknown; if options are missing or have no meaning. Nothing is written.
    OSError: if there is no such file, or ``out`` holds something or cannot be written.
    ImportError: for a ``.pt`` where PyTorch is not installed.
  """
  file, out = Path(file), Path(out)
  config = None if preset is None else checks.lookup("preset", preset, PRESETS)
  if config is not None and options:
    raise ValueError(f"a preset tells all there is to know: leave out {', '.join(options)}, or the preset")
  if out.is_dir() and any(out.iterdir()):
    raise OSError(f"{out} is not empty: choose a new folder, or remove it")
  check_writable(out / "config.json")
  tensors = state_dicts.read(file)
  try:
    if config is None:
      config = infer({name: tensor.shape for name, tensor in tensors.items()}, **options)
    params = to_params(tensors, config)
  except ValueError as error:
    which = f" as preset {preset}" if preset else ""
    raise ValueError(f"{file} cannot be imported{which}: {error}") from error
  dtypes = Counter(tensor.dtype for tensor in tensors.values())
  # What was read of a mapped file stays in memory for as long as there are tensors of it.
  del tensors
  folders.save(out, Model(config, params))
  return Imported(config, sum(leaf.size for leaf in jax.tree.leaves(params)), dtypes)


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was exported.

  Args:
    constructor: the call that makes the reference's network for these weights.
    flags: those of the reference's scripts that describe its process; None where it has no such process.
    notes: what else there is to know, in sentences.
  """

  constructor: str
  flags: str | None
  notes: Sequence[str]


def export_model(folder: PathLike, file: PathLike) -> Exported:
  """Write the parameters of a model as a state dict of guided-diffusion, for use in PyTorch.

  Args:
    folder: the model, as `jaxguide.models.load` reads it.
    file: a ``.safetensors`` or ``.pt`` file, which is replaced if it is there. The latter needs PyTorch.

  Returns:
    Under what the reference's network takes it.

  Raises:
    FileNotFoundError: if there is no model.
    ValueError: if it is torn, or the file's extension is not known.
    OSError: if the file cannot be written.
    ImportError: for a ``.pt`` where PyTorch is not installed.
  """
  state_dicts.check_format(file)
  check_writable(file)
  model = folders.load(folder)
  state_dicts.write(file, to_state_dict(model.params, model.config))
  return Exported(constructor(model.config), _flags(model.config), _notes(model.config))


def constructor(config: ModelConfig) -> str:
  """Write the call that makes the reference's network.

  >>> constructor(ModelConfig("classifier", {"num_head_channels": 64}, (64, 64, 3), 10))
  "EncoderUNetModel(image_size=64, in_channels=3, model_channels=64, out_channels=10, num_res_blocks=2, ...)"
  """
  module = config.module
  names = {"unet": "UNetModel", "super_res_unet": "SuperResModel", "classifier": "EncoderUNetModel"}
  fields = {
    "image_size": config.image_shape[0],
    "in_channels": config.image_shape[2],
    **{
      field.name: getattr(module, field.name)
      for field in dataclasses.fields(module)
      if field.name not in ("dtype", "cudnn_attention", "null_class", "perturbation", "parent", "name")
    },
  }
  if config.network != "classifier":
    fields["out_channels"] = fields["out_channels"] or config.image_shape[2]
    if config.num_classes is not None:
      fields["num_classes"] = config.num_classes + module.null_class
  return f"{names[config.network]}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"


def _flags(config: ModelConfig) -> str | None:
  """Write the flags of the reference's scripts that describe a process, if it is one that they know."""
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
  module, notes = config.module, []
  if _flags(config) is None:
    process = f"{config.prediction} on the continuous {config.schedule} schedule"
    notes.append(f"guided-diffusion's scripts have no such process: the network was trained on {process}")
  if getattr(module, "null_class", False) and config.num_classes is not None:
    notes.append(f"class {config.num_classes} stands for none, for classifier-free guidance")
  if config.network != "classifier" and _flags(config) is not None and config.variance == "small":
    notes.append(
      "its steps have the small variance; guided-diffusion's scripts take the large one where none is learned"
    )
  odd = sorted({c for level in range(len(module.channel_mult)) if (c := module.channels(level)) % 32})
  if odd:
    notes.append(
      f"guided-diffusion normalises in 32 groups, which {', '.join(map(str, odd))} channels cannot be parted into: let "
      "its `normalization` make GroupNorm32(math.gcd(32, channels), channels)"
    )
  return notes
