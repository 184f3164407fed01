"""The networks of EDM (Karras et al. 2022, arXiv:2206.00364): DDPM++, NCSN++ and ADM, from their published names.

The weight ``model.enc.8x8_block0.conv0.weight`` there is the ``kernel`` of ``enc_8x8_block0/conv0`` here. The channels
of ``qkv`` are ordered (head, channel, qkv) there and (qkv, head, channel) here. The filters of the resampling are
stored there for each block, and are a field here.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxguide.models.config import ModelConfig
from jaxguide.models.importers import layouts
from jaxguide.models.importers.families import Family
from jaxguide.models.importers.layouts import Fixed, Weight

PREFIX = "model."
"""The prefix of all names, from the preconditioning that holds the network."""

SETTINGS = {
  "img_resolution": "side of the images; by default that of the names",
  "dropout": "probability of dropout in training; 0.1 if left out",
  "label_dropout": "probability of dropping a label in training; 0 if left out",
  "null_class": "whether the network was trained with labels dropped; by default if label_dropout is above 0",
  "prediction": "edm (the default), eps for VPPrecond, or ve for VEPrecond",
  "sigma_data": "standard deviation of the data, for the prediction edm; 0.5 if left out",
  "attn_resolutions": "sides of feature maps with attention, where their names are there",
  "decoder_type": "standard or skip, where there is one level alone",
}

_QKV, _PIXELS = ("qkv", "attn_qkv"), ("skip", "qkv", "proj", "conv_skip", "attn_qkv", "attn_proj")

PRECONDITIONING = {
  "EDMPrecond": {"prediction": "edm"},
  "VEPrecond": {"prediction": "ve"},
  "VPPrecond": {"prediction": "eps"},
}
"""The prediction of each class of EDM's preconditioning that can be imported."""


def claims(names: Collection[str]) -> bool:
  """Return whether names are those of EDM's networks."""
  return any(
    re.match(r"(model\.)?(map_layer[01]|map_noise|(enc|dec)\.\d+x\d+_\w+\.(conv0|norm0|affine))\.", name)
    for name in names
  )


def published_name(path: Sequence[str]) -> str:
  """Return the published name of a parameter.

  >>> published_name(("enc_8x8_block0", "norm0", "scale"))
  'enc.8x8_block0.norm0.weight'
  """
  *modules, kind = path
  kind = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
  return ".".join([*(re.sub(r"^(enc|dec)_", r"\1.", module) for module in modules), kind])


def weight(path: Sequence[str], ours: Sequence[int]) -> Weight:
  """Return the correspondence of a parameter of EDM's or EDM2's networks."""
  path, ours = tuple(path), tuple(ours)
  *modules, kind = path
  if modules and modules[-1] in _QKV:
    channels = ours[-1] // 3
    if kind == "bias":
      return Weight(path, ours, ours, (channels, 3), (1, 0))
    return Weight(path, ours, (ours[1], ours[0], 1, 1), (channels, 3, ours[0]), (2, 1, 0))
  pixels = modules and (modules[-1] in _PIXELS or modules[-1].endswith("_aux_skip"))
  return layouts.weight(path, ours, 2 if kind == "kernel" and pixels else 0)


def outer(taps: Sequence[int | float]) -> np.ndarray:
  """Return the filter of a resampling as it is stored, of shape (1, 1, taps, taps)."""
  row = np.asarray(taps, np.float32)
  return (np.outer(row, row)[None, None] / np.square(row.sum())).astype(np.float32)


def layout(config: ModelConfig) -> dict[str, Weight | Fixed]:
  """Return the tensors of a network's state dict by their names there."""
  found: dict[str, Weight | Fixed] = {}
  paths, module = layouts.paths(config), config.module
  for path, ours in paths.items():
    found[PREFIX + published_name(path)] = weight(path, ours)
  fixed = Fixed(outer(getattr(module, "resample_filter", (1, 1))))
  for block in {path[0]: None for path in paths}:
    name = PREFIX + published_name((block, ""))
    if block.endswith(("_up", "_down")):
      found[f"{name}conv0.resample_filter"] = found[f"{name}skip.resample_filter"] = fixed
    elif block.endswith("_aux_residual"):
      found[f"{name}resample_filter"] = fixed
    elif block.endswith("_aux_skip"):
      found[name.replace("_aux_skip", "_aux_down") + "resample_filter"] = fixed
  if getattr(module, "decoder_type", "standard") == "skip":
    sides = [block.split("_")[1] for block in {path[0]: None for path in paths} if block.endswith("_aux_norm")]
    coarsest = min(sides, key=lambda side: int(side.split("x")[0]))
    found |= {f"{PREFIX}dec.{side}_aux_up.resample_filter": fixed for side in sides if side != coarsest}
  return found


def prepare(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
  """Return tensors under the prefix of EDM's preconditioning, without that of data-parallel training."""
  stripped = {re.sub(r"^(module|net|ema)\.(?=model\.)", "", name): tensor for name, tensor in tensors.items()}
  if any(name.startswith(PREFIX) for name in stripped):
    return stripped
  return {PREFIX + name: tensor for name, tensor in stripped.items()}


class Names:
  """The shapes of a state dict by name, and what EDM's and EDM2's names show in the same way.

  Args:
    shapes: the shape of each tensor, by its name without a prefix.
    unfit: what to say of a file that lacks a name.
    width: the last parts of the name of a block's weight whose first axis is the block's channels.
  """

  def __init__(self, shapes: Mapping[str, Sequence[int]], unfit: str, width: str):
    self.shapes, self.unfit, self.width = shapes, unfit, width

  def size(self, name: str, axis: int, ndim: int | None = None) -> int:
    """Return the length of an axis.

    Raises:
      ValueError: if there is no such name, or it has another number of axes.
    """
    if name not in self.shapes:
      raise ValueError(f"{self.unfit}: there is no {name} among {layouts.first(sorted(self.shapes))}")
    shape = tuple(self.shapes[name])
    if ndim is not None and len(shape) != ndim:
      raise ValueError(f"{self.unfit}: {name} has shape {shape}, expected {ndim} axes")
    return shape[axis]

  def has(self, pattern: str) -> bool:
    """Return whether a name matches a pattern from its beginning."""
    return any(re.match(pattern, name) for name in self.shapes)

  def levels(self) -> dict[str, Any]:
    """Return ``sides``, ``num_blocks``, ``widths`` (the channels of each level) and ``attn_resolutions``.

    Raises:
      ValueError: if names are missing.
    """
    blocks = [match for name in self.shapes if (match := re.match(r"dec\.(\d+)x\1_block(\d+)\.", name))]
    if not blocks:
      raise ValueError(f"{self.unfit}: there is no block of its decoder among {layouts.first(sorted(self.shapes))}")
    sides = sorted({int(match[1]) for match in blocks}, reverse=True)
    # The channels of the coarsest level's first block may differ in a torn file; the layout finds that.
    widths = [self.size(f"dec.{side}x{side}_block0.{self.width}", 0) for side in sides]
    attends = tuple(side for side in sides if self.has(rf"dec\.{side}x{side}_block\d+\.(attn_)?qkv\."))
    count = max(int(match[2]) for match in blocks)
    return {"sides": sides, "num_blocks": count, "widths": widths, "attn_resolutions": attends}


def ratio(number: int, by: int) -> int | float:
  """Return a quotient, as a whole number if it is one."""
  return number // by if number % by == 0 else number / by


def infer(tensors: Mapping[str, Any], **given: Any) -> ModelConfig:
  """Return the configuration of a network from names and shapes; see `jaxguide.models.importers.families.Family`."""
  shapes = {name.removeprefix(PREFIX): tensor.shape for name, tensor in tensors.items()}
  given = {name: value for name, value in given.items() if value is not None}
  names = Names(shapes, "incomplete, or not a network of EDM", "conv1.weight")
  found = names.levels()
  sides, widths = found.pop("sides"), found.pop("widths")
  adm = names.has(r"out_(conv|norm)\.")
  first = f"enc.{sides[0]}x{sides[0]}_conv.weight"
  noise, width = names.size("map_layer0.weight", 1, 2), names.size("map_layer0.weight", 0, 2)
  channels, finest = names.size(first, 1, 4), names.size(first, 0, 4)
  base = noise if adm else finest
  fields: dict[str, Any] = {
    **found,
    "model_channels": base,
    "channel_mult": tuple(ratio(each, base) for each in widths),
    "channel_mult_emb": ratio(width, base),
  }
  last = "out_conv.weight" if adm else f"dec.{sides[0]}x{sides[0]}_aux_conv.weight"
  if names.size(last, 0, 4) != channels:
    fields["out_channels"] = names.size(last, 0, 4)
  if "map_augment.weight" in shapes:
    fields["augment_dim"] = names.size("map_augment.weight", 1, 2)
  if not adm:
    auxiliary = "skip" if names.has(r"enc\.\w+_aux_skip\.") else "residual"
    fields |= {
      "embedding_type": "fourier" if "map_noise.freqs" in shapes else "positional",
      "channel_mult_noise": ratio(noise, base),
      "encoder_type": auxiliary if names.has(r"enc\.\w+_aux_") else "standard",
      "decoder_type": "skip" if names.has(rf"dec\.(?!{sides[0]}x)\w+_aux_conv\.") else "standard",
    }
    buffers = [tensor for name, tensor in tensors.items() if name.endswith(".resample_filter")]
    if buffers:
      fields["resample_filter"] = _taps(np.asarray(buffers[0]))
  if "heads" in given:
    raise ValueError("attention heads do not apply: DDPM++ and NCSN++ have one, and ADM's have 64 channels")
  image = given.pop("img_resolution", None) or sides[0]
  if image >> (len(sides) - 1) != sides[-1] or image != sides[0]:
    raise ValueError(f"img_resolution must be {sides[0]} according to the names, got {image}")
  prediction, sigma_data = given.pop("prediction", "edm"), given.pop("sigma_data", None)
  more: dict[str, Any] = {"time_scale": 999.0, "schedule": "linear"} if prediction == "eps" else {}
  if prediction not in ("edm", "ve", "eps"):
    raise ValueError(f"prediction must be edm, ve or eps, got {prediction!r}")
  if adm and "decoder_type" in given:
    raise ValueError("decoder_type is of DDPM++ and NCSN++, and this is an ADM: leave it out")
  given.setdefault("null_class", bool(given.get("label_dropout")))
  return ModelConfig(
    "dhariwal_unet" if adm else "song_unet",
    {**fields, **given},
    image_shape=(image, image, channels),
    num_classes=names.size("map_label.weight", 1, 2) if "map_label.weight" in shapes else None,
    prediction=prediction,
    sigma_data=(0.5 if sigma_data is None else sigma_data) if prediction == "edm" else sigma_data,
    **more,
  )


def _taps(stored: np.ndarray) -> tuple[int | float, ...]:
  """Return the taps of a stored filter, as small whole numbers if possible.

  Raises:
    ValueError: if it is not the outer product of taps with themselves.
  """
  if stored.ndim != 4 or stored.shape[:2] != (1, 1) or stored.shape[2] != stored.shape[3] or not stored.size:
    raise ValueError(f"a resample_filter has shape {stored.shape}, expected (1, 1, n, n)")
  row = stored[0, 0].sum(1)
  smallest = np.abs(row[row != 0]).min(initial=np.inf)
  for scale in (1, 2, 3, 4, 5):
    whole = row / smallest * scale
    if np.isfinite(whole).all() and np.allclose(whole, whole.round(), atol=1e-3):
      return tuple(int(tap) for tap in whole.round())
  return tuple(float(tap) for tap in row)


def stated(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """Return the settings that a published pickle states in the call of the network's class.

  Args:
    name: the class, such as ``EDMPrecond``.
    arguments: the arguments of its call.

  Raises:
    ValueError: if the class is of another preconditioning.
  """
  if name not in PRECONDITIONING:
    raise ValueError(
      f"it holds a {name}; of EDM's preconditioning {', '.join(PRECONDITIONING)} can be imported. Import the "
      "state dict of its network with --field prediction=NAME, if the prediction is one of them"
    )
  known = ("sigma_data",) if name == "EDMPrecond" else ()
  fields = ("dropout", "label_dropout")
  beta = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000}
  if name == "VPPrecond" and any(arguments.get(key, value) != value for key, value in beta.items()):
    raise ValueError(f"its VPPrecond has another process than {beta}: {dict(arguments)}")
  return {**PRECONDITIONING[name], **{key: arguments[key] for key in (*known, *fields) if key in arguments}}


def usage(config: ModelConfig) -> list[str]:
  """Return how exported weights are used in EDM's code, in lines."""
  module = config.module
  labels = config.num_classes or config.label_size or 0
  fields = ["model_channels", "channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "augment_dim"]
  fields += ["dropout", "label_dropout"]
  if config.network == "song_unet":
    fields += ["embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"]
  shown = {name: getattr(module, name) for name in fields}
  arguments = ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in shown.items())
  classes = {"edm": "EDMPrecond", "ve": "VEPrecond", "eps": "VPPrecond"}
  if config.prediction not in classes:
    return [f"Note: the network predicts {config.prediction}, which none of EDM's preconditioning classes does."]
  return [
    f"The network that takes it:\n{classes[config.prediction]}(img_resolution={config.image_shape[0]}, "
    f"img_channels={config.image_shape[2]}, label_dim={labels}, model_type='{type(module).__name__}', {arguments})"
  ]


FAMILY = Family(
  name="edm",
  title="EDM's DDPM++, NCSN++ and ADM",
  networks=("song_unet", "dhariwal_unet"),
  claims=claims,
  infer=infer,
  layout=layout,
  settings=SETTINGS,
  usage=usage,
  prepare=prepare,
  stated=stated,
)
"""The networks of EDM."""
