"""What the names and shapes of a state dict tell of a network of OpenAI's guided-diffusion, and what they do not."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxguide._core import checks
from jaxguide.models.config import ModelConfig
from jaxguide.models.importers.presets import PRESETS

OPTIONS = {
  "network": "unet or super_res_unet; for the latter low_res_size is enough",
  "image_size": "side of the image",
  "low_res_size": "side of the low-resolution image",
  "num_res_blocks": "residual blocks a level",
  "num_heads": "attention heads, or num_head_channels in its place",
  "num_head_channels": "channels of an attention head",
  "num_heads_upsample": "attention heads on the way up",
  "use_new_attention_order": "true or false",
  "dropout": "probability in training",
  "null_class": "whether the last class stands for none",
  "noise_schedule": "linear or cosine",
  "diffusion_steps": "steps that the network was trained on, 1000 for OpenAI's; 0 for continuous time",
  "rescale_timesteps": "whether steps are told as if there were 1000",
  "prediction": "eps or x0 as in the reference, or another that jaxguide knows",
  "variance": "small or large",
  "scale": "recommended scale of a classifier's guidance",
}
"""What can be told of a network beside its weights; names as in the reference where it has one."""


@dataclasses.dataclass(frozen=True)
class Structure:
  """What names and shapes tell.

  Args:
    networks: what the network may be, with the image's channels then. Two only for one that takes and gives the same
      even number of channels.
    readings: its fields. More than one only for a classifier whose blocks can be parted into levels in several ways.
    num_classes: number of classes, a null class among them; None for an unconditional network.
    coarsest_size: side of the coarsest level, where a pool by attention tells it.
  """

  networks: dict[str, int]
  readings: list[dict[str, Any]]
  num_classes: int | None
  coarsest_size: int | None = None


def structure(shapes: Mapping[str, Sequence[int]]) -> Structure:
  """Read off what names and shapes tell.

  Args:
    shapes: the shape of every tensor by name.

  Raises:
    ValueError: if these are not the names and shapes of such a network.
  """
  other = "not whole, or of another architecture than guided-diffusion's"

  def size(name: str, axis: int, ndim: int) -> int:
    if name not in shapes:
      raise ValueError(f"{other}: there is no {name}, but {first(list(shapes))}")
    if len(shapes[name]) != ndim:
      raise ValueError(f"{other}: {name} has shape {tuple(shapes[name])}, and not {ndim} axes")
    return shapes[name][axis]

  width, taken = size("time_embed.0.weight", 1, 2), size("input_blocks.0.0.weight", 1, 4)
  if not width or not taken:
    raise ValueError(f"{other}: it has layers without channels")
  is_unet = any(name.startswith("output_blocks.") for name in shapes)
  ups = [name for name in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.2\.weight", name)]
  indices = {int(found[1]) for name in shapes if (found := re.match(r"input_blocks\.(\d+)\.", name))}
  count = max(indices) + 1
  # Blocks that resample: by convolution, or by averaging, which has no parameters; or residual blocks like the others.
  convolutions = [i for i in indices if f"input_blocks.{i}.0.op.weight" in shapes]
  downs = convolutions or sorted(set(range(count)) - indices)
  channels = {i: size(f"input_blocks.{i}.0.in_layers.2.weight", 0, 4) for i in range(1, count) if i not in downs}
  attends = {i for i in channels if f"input_blocks.{i}.1.qkv.weight" in shapes}

  readings: list[dict[str, Any]] = []
  for levels in [1 + len(downs or ups)] if downs or is_unet else range(1, count):
    num_res_blocks = count // levels - 1
    parted = _part(width, channels, attends, downs, num_res_blocks) if count % levels == 0 and num_res_blocks else None
    if parted is not None:
      readings.append(
        {
          "model_channels": width,
          "num_res_blocks": num_res_blocks,
          **parted,
          "conv_resample": bool(convolutions) or not downs,
          "resblock_updown": levels > 1 and not downs,
          "use_scale_shift_norm": size("input_blocks.1.0.emb_layers.1.weight", 0, 2) == 2 * channels[1],
        }
      )
  if not readings:
    raise ValueError(f"{other}: its blocks do not part into equal levels")

  if not is_unet:
    pool, num_classes, coarsest_size = _pool(shapes, size)
    readings = [{**reading, "pool": pool} for reading in readings]
    return Structure({"classifier": taken}, readings, num_classes, coarsest_size)
  given = size("out.2.weight", 0, 4)
  networks = {"unet": taken} if given in (taken, 2 * taken) else {}
  if taken % 2 == 0 and given in (taken // 2, taken):
    networks["super_res_unet"] = taken // 2
  if not networks:
    raise ValueError(f"a UNet that takes {taken} channels and gives {given} is neither a denoiser nor an upsampler")
  labels = size("label_emb.weight", 0, 2) if "label_emb.weight" in shapes else None
  return Structure(networks, [{**reading, "out_channels": given} for reading in readings], labels)


def _part(width: int, channels: Mapping[int, int], attends: set[int], downs: Sequence[int], num_res_blocks: int):
  """Part the way down into levels of ``num_res_blocks``, each but the last with one more block that resamples.

  Returns:
    ``channel_mult`` and ``attention_resolutions``; None where the blocks do not part so.
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
    # The reference rounds the product down.
    factor = factor if int(factor * width) == channels[start] else math.nextafter(factor, math.inf)
    mult.append(int(factor) if factor.is_integer() else factor)
    if start in attends:
      attention.append(2**level)
  return {"channel_mult": tuple(mult), "attention_resolutions": tuple(attention)}


def _pool(shapes: Mapping[str, Sequence[int]], size: Callable[..., int]) -> tuple[str, int, int | None]:
  """Tell a classifier's pool, its classes, and the side of its coarsest level if that is known."""
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


def alike(found: Structure) -> list[str]:
  """Name the published models that have this structure."""

  def fits(config: ModelConfig) -> bool:
    module = config.module
    return (
      found.networks.get(config.network) == config.image_shape[2]
      and found.num_classes == config.num_classes
      and any(all(getattr(module, name) == reading[name] for name in reading) for reading in found.readings)
    )

  return [name for name, config in PRESETS.items() if fits(config)]


def infer(shapes: Mapping[str, Sequence[int]], **options: Any) -> ModelConfig:
  """Describe a network by names and shapes, and by what they do not tell.

  Args:
    shapes: the shape of every tensor by name.
    **options: of `OPTIONS`, those that names and shapes leave open. Needed are ``image_size`` (unless a pool by
      attention tells it), ``num_heads`` or ``num_head_channels``, ``use_new_attention_order``, ``noise_schedule`` and
      ``diffusion_steps``; a super-resolution network needs ``low_res_size``; ``network`` and ``num_res_blocks`` are
      needed only where names and shapes can be read in two ways.

  Raises:
    ValueError: if these are not the names and shapes of a network of guided-diffusion, an option is needed that was not
      given (all such are listed), or one was given that is unknown, says otherwise than the shapes, or has no meaning
      for this network.

  >>> shapes = {"time_embed.0.weight": (256, 64)}
  >>> infer(shapes, noise_schedule="cosine")
  Traceback (most recent call last):
  ...
  ValueError: not whole, or of another architecture than guided-diffusion's: there is no input_blocks.0.0.weight, ...
  """
  for name in options:
    checks.lookup("option", name, OPTIONS)
  # -1 stands for "not given", as in the reference's own flags.
  given = {name: value for name, value in options.items() if not (name.startswith("num_head") and value == -1)}
  for name in given.keys() & {"image_size", "low_res_size", "num_heads", "num_head_channels", "num_heads_upsample"}:
    checks.at_least(name, given[name], 1)
  checks.finite("scale", given.get("scale", 1.0))
  found, missing = structure(shapes), []

  def needed(name: str) -> Any:
    if name not in given:
      missing.append(name)
    return given.pop(name, None)

  network = next(iter(found.networks))
  if len(found.networks) > 1:
    network = "super_res_unet" if "low_res_size" in given else needed("network") or network
    checks.lookup("network of these names and shapes", network, found.networks)
  channels = found.networks[network]
  readings = {reading["num_res_blocks"]: reading for reading in found.readings}
  if len(readings) > 1:
    needed("num_res_blocks")
  blocks = options.get("num_res_blocks", next(iter(readings)))
  given.pop("num_res_blocks", None)
  if blocks not in readings:
    raise ValueError(f"by names and shapes num_res_blocks is {' or '.join(map(str, readings))}, not {blocks}")
  fields = dict(readings[blocks])

  by_channels = "num_head_channels" in given or fields.get("pool") == "attention"
  for name in ("num_head_channels" if by_channels else "num_heads", "use_new_attention_order"):
    fields[name] = needed(name)
  for name in ("dropout", "num_heads_upsample") if network != "classifier" and not by_channels else ("dropout",):
    if name in given:
      fields[name] = given.pop(name)

  num_classes, rest = found.num_classes, {}
  if network == "classifier":
    rest["scale"] = given.pop("scale", None)
  else:
    fields["null_class"] = num_classes is not None and given.pop("null_class", False)
    num_classes = num_classes and num_classes - fields["null_class"]
    learned = fields["out_channels"] == 2 * channels
    rest["variance"] = "learned_range" if learned else given.pop("variance", "large")
  if network == "super_res_unet":
    rest["low_res_shape"] = (*[needed("low_res_size")] * 2, channels)
  if found.coarsest_size is None:
    side = needed("image_size")
  else:
    side = found.coarsest_size * 2 ** (len(fields["channel_mult"]) - 1)
    if given.pop("image_size", side) != side:
      raise ValueError(f"the pool by attention is for images of side {side}, not {options['image_size']}")
  schedule, steps = needed("noise_schedule"), needed("diffusion_steps")

  if missing:
    names = alike(found)
    published = f"; or, if it is one of the published models, a preset: {' or '.join(names)}" if names else ""
    raise ValueError(
      "names and shapes do not tell everything: give "
      f"{', '.join(f'{name} ({OPTIONS[name]})' for name in missing)}{published}"
    )
  config = ModelConfig(
    network,
    fields,
    image_shape=(side, side, channels),
    num_classes=num_classes,
    prediction=given.pop("prediction", "eps"),
    schedule=schedule,
    diffusion_steps=steps or None,
    rescale_timesteps=given.pop("rescale_timesteps", False),
    **rest,
  )
  if given:
    raise ValueError(f"{', '.join(given)} cannot be chosen for this {network}: leave it out")
  return config


def first(names: Sequence[str], count: int = 3) -> str:
  """Name the first few of many, and tell how many more there are."""
  rest = f" and {len(names) - count} more" if len(names) > count else ""
  return ", ".join(names[:count]) + rest
