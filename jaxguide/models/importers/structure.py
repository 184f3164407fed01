"""Inference of a guided-diffusion network's configuration from the names and shapes in its state dict."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxguide._core import checks
from jaxguide._core.specs import described_fields
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers.layouts import counted, first
from jaxguide.models.importers.presets import CONSISTENCY_PRESETS, PRESETS


@dataclasses.dataclass(frozen=True)
class Options:
  """The settings of a network that names and shapes do not determine, with the names of guided-diffusion.

  Args:
    network: unet or super_res_unet; for a super_res_unet, low_res_size is enough.
    image_size: Side of the image.
    low_res_size: Side of the low-resolution image.
    num_res_blocks: Residual blocks per level.
    num_heads: Number of attention heads; or give num_head_channels instead.
    num_head_channels: Channels per attention head.
    num_heads_upsample: Number of attention heads in the upsampling path.
    use_new_attention_order: Whether queries, keys and values are ordered before the heads are split.
    dropout: Probability of dropout in training; 0 if left out.
    null_class: Whether the last class is a null class, which means no label; no if left out.
    noise_schedule: linear or cosine; or in import, as in Python, a list of betas, which gives diffusion_steps too.
    diffusion_steps: Steps that the network was trained on, 1000 for OpenAI's; 0 for continuous time.
    rescale_timesteps: Whether the time input is rescaled to 1000 steps; no if left out.
    prediction: eps or x0 as in guided-diffusion, consistency or edm as in OpenAI's consistency_models (whose attention
      has use_new_attention_order), or another prediction of jaxguide; eps if left out.
    sigma_data: Standard deviation of the data, for edm and consistency; 0.5 if left out.
    variance: small or large, if the network has learned no variance; large if left out.
    scale: Recommended guidance scale of a classifier.
  """

  network: str | None = None
  image_size: int | None = None
  low_res_size: int | None = None
  num_res_blocks: int | None = None
  num_heads: int | None = None
  num_head_channels: int | None = None
  num_heads_upsample: int | None = None
  use_new_attention_order: bool | None = None
  dropout: float | None = None
  null_class: bool | None = None
  noise_schedule: str | None = None
  diffusion_steps: int | None = None
  rescale_timesteps: bool | None = None
  prediction: str | None = None
  sigma_data: float | None = None
  variance: str | None = None
  scale: float | None = None


OPTIONS = {name: text[0].lower() + text[1:].rstrip(".") for name, text in described_fields(Options).items()}
"""The description of each option, by name."""


SCALED = ("edm", "consistency")
"""The predictions of OpenAI's consistency_models."""


@dataclasses.dataclass(frozen=True)
class Structure:
  """What the names and shapes of a state dict determine.

  Args:
    networks: the possible types of the network, each with its number of image channels. There are two types only if the
      network has the same even number of input and output channels.
    readings: the possible values of the network's fields. There are several only for a classifier whose blocks can be
      split into levels in several ways.
    num_classes: number of classes including a null class; None for an unconditional network.
    coarsest_size: side of the coarsest level, if the positional embedding of an attention pool determines it.
  """

  networks: dict[str, int]
  readings: list[dict[str, Any]]
  num_classes: int | None
  coarsest_size: int | None = None


def structure(shapes: Mapping[str, Sequence[int]]) -> Structure:
  """Derive the structure of a guided-diffusion network from the names and shapes in its state dict.

  Args:
    shapes: the shape of every tensor by name.

  Raises:
    ValueError: if these are not the names and shapes of such a network.
  """
  unfit = "incomplete, or not a network of guided-diffusion"

  def size(name: str, axis: int, ndim: int) -> int:
    if name not in shapes:
      raise ValueError(f"{unfit}: there is no {name} among {first(list(shapes))}")
    if len(shapes[name]) != ndim:
      raise ValueError(f"{unfit}: {name} has shape {tuple(shapes[name])}, expected {ndim} axes")
    return shapes[name][axis]

  width, in_channels = size("time_embed.0.weight", 1, 2), size("input_blocks.0.0.weight", 1, 4)
  if not width or not in_channels:
    raise ValueError(f"{unfit}: it has layers without channels")
  is_unet = any(name.startswith("output_blocks.") for name in shapes)
  ups = [name for name in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight", name)]
  indices = {int(match[1]) for name in shapes if (match := re.match(r"input_blocks\.(\d+)\.", name))}
  count = counted("input_blocks", indices, shapes)
  # Downsampling is done in one of three ways: by a convolution; by averaging, which has no parameters, so that the
  # block's index is missing; or by a residual block, whose names and shapes are like those of other blocks.
  convolutions = [i for i in indices if f"input_blocks.{i}.0.op.weight" in shapes]
  downs = convolutions or sorted(set(range(count)) - indices)
  channels = {i: size(f"input_blocks.{i}.0.in_layers.2.weight", 0, 4) for i in range(1, count) if i not in downs}
  attends = {i for i in channels if f"input_blocks.{i}.1.qkv.weight" in shapes}

  readings: list[dict[str, Any]] = []
  for levels in [1 + len(downs or ups)] if downs or is_unet else range(1, count):
    num_res_blocks = count // levels - 1
    if count % levels or not num_res_blocks:
      continue
    level_fields = _split_levels(width, channels, attends, downs, num_res_blocks)
    if level_fields is not None:
      readings.append(
        {
          "model_channels": width,
          "num_res_blocks": num_res_blocks,
          **level_fields,
          "conv_resample": bool(convolutions) or not downs,
          "resblock_updown": levels > 1 and not downs,
          "use_scale_shift_norm": size("input_blocks.1.0.emb_layers.1.weight", 0, 2) == 2 * channels[1],
        }
      )
  if not readings:
    raise ValueError(f"{unfit}: its blocks cannot be split into levels with equally many blocks")

  if not is_unet:
    pool, num_classes, coarsest_size = _pool(shapes, size)
    readings = [{**reading, "pool": pool} for reading in readings]
    return Structure({"classifier": in_channels}, readings, num_classes, coarsest_size)
  out_channels = size("out.2.weight", 0, 4)
  networks = {"unet": in_channels} if out_channels in (in_channels, 2 * in_channels) else {}
  if in_channels % 2 == 0 and out_channels in (in_channels // 2, in_channels):
    networks["super_res_unet"] = in_channels // 2
  if not networks:
    raise ValueError(
      f"a UNet with {in_channels} input and {out_channels} output channels is neither a denoiser nor an upsampler"
    )
  labels = size("label_emb.weight", 0, 2) if "label_emb.weight" in shapes else None
  return Structure(networks, [{**reading, "out_channels": out_channels} for reading in readings], labels)


def _split_levels(
  width: int, channels: Mapping[int, int], attends: set[int], downs: Sequence[int], num_res_blocks: int
) -> dict[str, Any] | None:
  """Split the downsampling path into levels of ``num_res_blocks`` blocks, with one resampling block between levels.

  Args:
    width: ``model_channels``.
    channels: the output channels of each residual block, by index.
    attends: the indices of the blocks with attention.
    downs: the indices of the resampling blocks, as far as names show them; empty if residual blocks do the resampling.
    num_res_blocks: residual blocks per level.

  Returns:
    ``channel_mult`` and ``attention_resolutions``; None if the blocks cannot be split in this way.
  """
  mult: list[int | float] = []
  attention = []
  for level, start in enumerate(range(1, max(channels) + 1, num_res_blocks + 1)):
    blocks, down = range(start, start + num_res_blocks), start + num_res_blocks
    if any(i in downs or channels[i] != channels[start] or (i in attends) != (start in attends) for i in blocks):
      return None
    if down < max(channels) and (down not in downs if downs else down in attends or channels[down] != channels[start]):
      return None
    factor = channels[start] / width
    # guided-diffusion rounds the product of factor and width down. If rounding of the quotient makes it too small, take
    # the next larger number.
    factor = factor if int(factor * width) == channels[start] else math.nextafter(factor, math.inf)
    mult.append(int(factor) if factor.is_integer() else factor)
    if start in attends:
      attention.append(2**level)
  return {"channel_mult": tuple(mult), "attention_resolutions": tuple(attention)}


def _pool(shapes: Mapping[str, Sequence[int]], size: Callable[..., int]) -> tuple[str, int, int | None]:
  """Return a classifier's pool, its number of classes, and the side of its coarsest level or None if unknown."""
  if "out.2.positional_embedding" in shapes:
    return (
      "attention",
      size("out.2.c_proj.weight", 0, 3),
      math.isqrt(max(size("out.2.positional_embedding", 1, 2) - 1, 0)),
    )
  if len(shapes.get("out.0.weight", ())) == 1:
    return "adaptive", size("out.3.weight", 0, 4), None
  pool, last = ("spatial_v2", "out.3.weight") if "out.3.weight" in shapes else ("spatial", "out.2.weight")
  return pool, size(last, 0, 2), None


def alike(inferred: Structure, presets: Mapping[str, ModelConfig] = PRESETS) -> list[str]:
  """Return the names of the published models, among presets, that have this structure."""

  def fits(config: ModelConfig) -> bool:
    module = config.module
    return (
      inferred.networks.get(config.network) == config.image_shape[2]
      and inferred.num_classes == config.num_classes
      and any(all(getattr(module, name) == reading[name] for name in reading) for reading in inferred.readings)
    )

  return [name for name, config in presets.items() if fits(config)]


def infer(shapes: Mapping[str, Sequence[int]], **options: Any) -> ModelConfig:
  """Infer a network's configuration from the names and shapes in its state dict, and from options for the rest.

  Args:
    shapes: the shape of every tensor by name.
    **options: settings from `OPTIONS` that names and shapes do not determine. Always required: ``image_size`` (unless
      an attention pool determines it), ``num_heads`` or ``num_head_channels``, ``use_new_attention_order``,
      ``noise_schedule`` and ``diffusion_steps``. A super-resolution network needs ``low_res_size``. ``network`` and
      ``num_res_blocks`` are required only if names and shapes are ambiguous.

  Raises:
    ValueError: if these are not the names and shapes of a guided-diffusion network; if required options are missing
      (the message lists all of them); or if an option is unknown, contradicts the shapes, or does not apply to this
      network.

  >>> shapes = {"time_embed.0.weight": (256, 64)}
  >>> infer(shapes, noise_schedule="cosine")
  Traceback (most recent call last):
  ...
  ValueError: incomplete, or not a network of guided-diffusion: there is no input_blocks.0.0.weight among ...
  """
  unused = _check_options(options, shapes)  # Options are removed as they are used.
  inferred, missing = structure(shapes), []

  def required(name: str) -> Any:
    if name not in unused:
      missing.append(name)
    return unused.pop(name, None)

  network = next(iter(inferred.networks))
  if len(inferred.networks) > 1:
    network = "super_res_unet" if "low_res_size" in unused else required("network") or network
    checks.lookup("network of these names and shapes", network, inferred.networks)
  channels = inferred.networks[network]
  readings = {reading["num_res_blocks"]: reading for reading in inferred.readings}
  if len(readings) > 1:
    required("num_res_blocks")
  num_res_blocks = options.get("num_res_blocks", next(iter(readings)))
  unused.pop("num_res_blocks", None)
  if num_res_blocks not in readings:
    possible = " or ".join(map(str, readings))
    raise ValueError(f"num_res_blocks must be {possible} according to names and shapes, got {num_res_blocks}")
  fields = dict(readings[num_res_blocks])

  by_channels = "num_head_channels" in unused or fields.get("pool") == "attention"
  for name in ("num_head_channels" if by_channels else "num_heads", "use_new_attention_order"):
    fields[name] = required(name)
  for name in ("dropout", "num_heads_upsample") if network != "classifier" and not by_channels else ("dropout",):
    if name in unused:
      fields[name] = unused.pop(name)

  num_classes, rest = inferred.num_classes, {}
  if network == "classifier":
    rest["scale"] = unused.pop("scale", None)
  else:
    fields["null_class"] = num_classes is not None and unused.pop("null_class", False)
    num_classes = num_classes and num_classes - fields["null_class"]
    learned = fields["out_channels"] == 2 * channels
    rest["variance"] = "learned_range" if learned else unused.pop("variance", "large")
  if network == "super_res_unet":
    rest["low_res_shape"] = (*[required("low_res_size")] * 2, channels)
  if inferred.coarsest_size is None:
    side = required("image_size")
  else:
    side = inferred.coarsest_size * 2 ** (len(fields["channel_mult"]) - 1)
    if unused.pop("image_size", side) != side:
      raise ValueError(f"the attention pool is for images of side {side}, got image_size {options['image_size']}")
  scaled = attends_to_pixels(shapes)
  if scaled:
    unused.setdefault("prediction", required("prediction") or "edm")
  process = _process(unused, required)

  if missing:
    raise ValueError(_request(missing, alike(inferred, CONSISTENCY_PRESETS if scaled else PRESETS)))
  config = ModelConfig(
    network,
    fields,
    image_shape=(side, side, channels),
    num_classes=num_classes,
    **process,
    **rest,
  )
  if unused:
    raise ValueError(f"{', '.join(unused)} cannot be chosen for this {network}: leave it out")
  return config


def _request(missing: Sequence[str], presets: Sequence[str]) -> str:
  """Ask for missing options, or for one of the presets that fit."""
  meant = {**OPTIONS, "prediction": "consistency or edm; its attention is that of OpenAI's consistency_models"}
  or_preset = f"; or, if it is one of the published models, --preset {' or '.join(presets)}" if presets else ""
  return (
    f"names and shapes do not determine the whole configuration: give "
    f"{', '.join(f'{name} ({meant[name]})' for name in missing)}; jaxguide import takes each as --field NAME=VALUE, "
    f"and import-adm as an option of its own{or_preset}"
  )


def _process(unused: dict[str, Any], required: Callable[[str], Any]) -> dict[str, Any]:
  """Return the settings of the diffusion process, and remove the options that give them."""
  prediction = unused.pop("prediction", "eps")
  if prediction in SCALED:
    # Their noise levels are a continuum, and the time input is 1000 log(sigma) / 4 in consistency_models.
    sigma_data = unused.pop("sigma_data", None)
    return {"prediction": prediction, "time_scale": 1000.0, "sigma_data": 0.5 if sigma_data is None else sigma_data}
  schedule = required("noise_schedule")
  named = schedule is None or isinstance(schedule, str)
  steps = required("diffusion_steps") if named else unused.pop("diffusion_steps", None)
  rescale = unused.pop("rescale_timesteps", False)
  return {
    "prediction": prediction,
    "schedule": schedule,
    "diffusion_steps": steps or None,
    "rescale_timesteps": rescale,
  }


def attends_to_pixels(shapes: Mapping[str, Sequence[int]]) -> bool:
  """Whether attention takes pixels and not rows of them, as in OpenAI's consistency_models alone."""
  return any(name.endswith(".qkv.weight") and len(shape) == 4 for name, shape in shapes.items())


def _check_options(options: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """Check names and ranges of `infer`'s options, and return those that are given.

  As in guided-diffusion's own flags, -1 for a number of heads or of their channels means that it is not given.
  """
  for name in options:
    checks.lookup("option", name, OPTIONS)
  settings = {name: value for name, value in options.items() if not (name.startswith("num_head") and value == -1)}
  for name in settings.keys() & {"image_size", "low_res_size", "num_heads", "num_head_channels", "num_heads_upsample"}:
    checks.at_least(name, settings[name], 1)
  checks.finite("scale", settings.get("scale", 1.0))
  scaled = attends_to_pixels(shapes)
  if scaled and options.get("prediction", "edm") not in SCALED:
    raise ValueError(
      "its attention is that of OpenAI's consistency_models: prediction must be consistency or edm, got "
      f"{options['prediction']!r}"
    )
  if scaled or options.get("prediction") in SCALED:
    settings.setdefault("use_new_attention_order", True)  # The order of consistency_models, whatever its flag.
  return settings
