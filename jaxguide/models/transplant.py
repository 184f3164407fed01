"""Parameters for a network from a trained or imported one, for fine-tuning.

`transplant` keeps the parameters that fit, adapts those that depend on the classes and on the image's channels, and
draws the others at random. Wherever the two networks can be compared, they start with the same outputs:

- **Classes.** Classes of the same name keep their row of the label table, or their logit. Without names, classes keep
  theirs by position if there are as many. Other classes are drawn at random. The null label is kept.
- **An unconditional network made conditional** starts with a label table of zeros (or, for labels that are vectors, a
  matrix of zeros): its output with any label is that of the unconditional one. The other way round, the null label's
  row (or, without one, the mean row) is added to a bias.
- **Image channels.** Grey from RGB: the outputs for (g, g, g), averaged over the channels. RGB from grey: for
  (g, g, g), the grey output in each channel; the input is averaged over the channels. Otherwise the first channels are
  kept, and further ones start without influence, with an output of zero.
- **A learned variance** that is added starts at zero, halfway between both bounds; one that is left out is dropped.
- **A super-resolution network from a UNet** starts without influence of the low-resolution image.
- **A classifier from a UNet** has the UNet's encoder, and a new head.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxguide._core import records
from jaxguide._core.typing import PyTree
from jaxguide.models import arrays
from jaxguide.models.config import NOT_FIELDS, ModelConfig
from jaxguide.models.initial import by_array
from jaxguide.models.model import Model, init_params, shapes
from jaxguide.models.networks import CLASSIFIER, DENOISER, find
from jaxguide.nn.adm.encoder import Encoder

# Fields of a network that may differ from the source's: they change neither names and shapes nor what is computed from
# them, or `transplant` adapts the parameters.
FREE = (
  "dropout",
  "use_checkpoint",
  "dtype",
  "cudnn_attention",
  "perturbation",
  "num_classes",
  "null_class",
  "label_size",
)

# Settings that determine what the numbers that go into a network and come out of it mean.
PROCESS = ("prediction", "schedule", "diffusion_steps", "rescale_timesteps", "encoder")

SHOWN = 4
"""The largest number of differences, and of classes, that a message lists."""


class Change(NamedTuple):
  """A parameter that is not kept as it is.

  Args:
    path: its path.
    number: number of its entries.
    how: what it became.
  """

  path: str
  number: int
  how: str


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of the parameters.

  Args:
    kept: the paths of the parameters that are those of the source, with their number of entries.
    adapted: parameters made from the source's.
    new: parameters drawn at random.
    left_out: the paths of the source's parameters that are not used.
  """

  kept: Mapping[str, int]
  adapted: Sequence[Change]
  new: Sequence[Change]
  left_out: Sequence[str]

  def __str__(self) -> str:
    lines = [f"kept     {sum(self.kept.values()):>13,} parameters in {len(self.kept)} arrays"]
    for name, changes in (("adapted", self.adapted), ("new", self.new)):
      groups: dict[str, list[Change]] = {}
      for change in changes:
        groups.setdefault(change.how, []).append(change)
      for how, group in groups.items():
        paths = _first([change.path for change in group])
        lines.append(f"{name:8} {sum(change.number for change in group):>13,} parameters: {how} ({paths})")
    if self.left_out:
      lines.append(f"left out {len(self.left_out):>13,} arrays of the source ({_first(self.left_out)})")
    return "\n".join(lines)


def config_from(
  source: ModelConfig,
  image_shape: Sequence[int] | None = None,
  num_classes: int | None = None,
  class_names: Sequence[str] | None = None,
  network: str | None = None,
  label_size: int | None = None,
) -> ModelConfig:
  """Return the configuration of a network that a source's parameters fit, for other images and classes.

  Prediction, schedule and fields are those of the source. A network with classes has a null label, which
  classifier-free guidance needs, even if the source has none.

  Args:
    source: the configuration of the trained network.
    image_shape: (height, width, channels). Default: the source's.
    num_classes: number of classes, or None for an unconditional network, or one whose labels are vectors.
    class_names: the name of each class, or None.
    network: ``classifier`` for a classifier with the encoder of a UNet, or ``super_res_unet``, which takes the sides of
      its low-resolution images to be a quarter. Default: the source's.
    label_size: length of labels that are vectors, or None.

  >>> source = ModelConfig("unet", {"model_channels": 32, "out_channels": 6}, (8, 8, 3), None, variance="learned_range")
  >>> config = config_from(source, (8, 8, 1), 2, ["cat", "dog"])
  >>> config.fields["out_channels"], config.variance, config.null_cond
  (2, 'learned_range', 2)
  """
  network, shape = network or source.network, tuple(source.image_shape if image_shape is None else image_shape)
  entry, fields = find(network), dict(source.fields)
  rest: dict[str, Any] = {
    "network": network,
    "image_shape": shape,
    "num_classes": num_classes,
    "label_size": label_size,
  }
  if network != source.network:
    known = {field.name for field in dataclasses.fields(entry.module)} - {entry.role.classes}
    fields = {name: value for name, value in fields.items() if name in known and name != "null_class"}
    if entry.role is CLASSIFIER:
      rest |= {"variance": "small", "scale": None}
      if fields.get("num_head_channels", -1) == -1 and "pool" in known:
        fields["pool"] = "adaptive"  # The default pool needs num_head_channels.
  if entry.role is DENOISER:
    if fields.get("out_channels"):
      fields["out_channels"] = fields["out_channels"] // source.image_shape[-1] * shape[-1]
    if num_classes is not None or label_size is not None:
      fields.pop("null_class", None)  # Its default is true.
  if entry.low_res:
    low = source.low_res_shape or [side // 4 for side in shape[:2]]
    rest["low_res_shape"] = (*low[:2], shape[-1])
  return dataclasses.replace(source, fields=fields, class_names=class_names, **rest)


def transplant(model: ModelConfig, source: Model, key: jax.Array) -> tuple[PyTree, Report]:
  """Make initial parameters of a network from those of a trained one.

  Args:
    model: the configuration of the network; see `config_from`.
    source: the trained or imported network.
    key: a random key for the parameters that are new.

  Returns:
    ``{"params": ...}`` of the network's types, and a report of what is kept, adapted and new.

  Raises:
    ValueError: if the source has another prediction, schedule or encoder, other fields, or parameters that do not fit,
      naming the first differences.

  >>> fields = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1}
  >>> source = Model(small := ModelConfig("unet", fields, (8, 8, 1), None), None)
  >>> source = dataclasses.replace(source, params=init_params(small, jax.random.key(0)))
  >>> params, report = transplant(config_from(small, num_classes=10), source, jax.random.key(1))
  >>> [(change.path, change.how) for change in report.adapted]
  [('label_emb/embedding', '10 classes and the null label start as the unconditional network')]
  """
  _check_roles(model, source.config)
  _check_process(model, source.config)
  _check_fields(model, source.config)
  expected, given = arrays.leaves(shapes(model)["params"]), arrays.leaves(source.params["params"])
  rules = _rules(model, source.config)
  adapted: dict[str, Any] = {}
  missing: list[str] = []
  changes: list[Change] = []
  new: list[Change] = []
  for path, leaf in expected.items():
    rule = next((rule for name, rule in rules.items() if path == name or path.startswith(f"{name}/")), None)
    if rule is not None:
      made = rule(path, leaf.shape, given)
    elif path in given and given[path].shape == leaf.shape:
      made = _Made(given[path], None)
    else:
      made = None
      there = f"of shape {given[path].shape}" if path in given else "absent"
      missing.append(f"{path} is {there} there, and of shape {leaf.shape} here")
    if made is not None:
      adapted[path] = made
  if missing:
    more = f"; and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    raise ValueError(
      f"the source's parameters do not fit this {model.network}: {'; '.join(missing[:SHOWN])}{more}. "
      "Set the fields of the network to the source's (jaxguide.models.transplant.config_from does), or train it from "
      "scratch"
    )
  random = _random(model, key, [path for path, made in adapted.items() if made.rows is not None])
  kept: dict[str, int] = {}
  leaves = []
  for path, leaf in expected.items():
    made, number = adapted[path], int(np.prod(leaf.shape))
    value = made.value if made.rows is None else made.rows(np.array(random[path]))
    leaves.append(jax.device_put(np.asarray(value, leaf.dtype)))
    if made.how is None:
      kept[path] = number
    else:
      (new if made.is_new else changes).append(Change(path, number, made.how))
  used = {*kept, *(change.path for change in changes)}
  report = Report(kept, changes, new, [path for path in given if path not in used])
  return {"params": jax.tree.unflatten(jax.tree.structure(shapes(model)["params"]), leaves)}, report


class _Made(NamedTuple):
  """How a parameter is made.

  Args:
    value: its value; None if it needs random numbers.
    how: what it became, for the report; None if it is kept.
    rows: a function of the initial random value that returns its value, if it needs random numbers.
    is_new: whether nothing of it is the source's.
  """

  value: Any
  how: str | None
  rows: Callable[[np.ndarray], np.ndarray] | None = None
  is_new: bool = False


Rule = Callable[[str, tuple[int, ...], Mapping[str, Any]], _Made]


def _random(model: ModelConfig, key: jax.Array, paths: Sequence[str]) -> dict[str, Any]:
  """Draw the initial values of some parameters, and not the others."""
  if not paths:
    return {}

  def draw(key):
    every = arrays.leaves(init_params(model, key)["params"])  # Within a trace: what is not returned is not computed.
    return {path: every[path] for path in paths}

  return jax.device_get(by_array(draw, key))


# --- checks ---------------------------------------------------------------------------------------


def _check_roles(model: ModelConfig, source: ModelConfig) -> None:
  possible = {(source.network, source.network), ("unet", "super_res_unet"), ("unet", "classifier")}
  if (source.network, model.network) not in possible:
    raise ValueError(
      f"a {model.network} cannot start from a {source.network}: start it from a {model.network}"
      + (" or from a unet" if model.network in ("super_res_unet", "classifier") else "")
    )


def _check_process(model: ModelConfig, source: ModelConfig) -> None:
  different = [
    str(records.Difference(name, getattr(source, name), getattr(model, name)))
    for name in PROCESS
    if getattr(source, name) != getattr(model, name)
  ]
  if different:
    settings = ", ".join(f"{name} {records.shown(getattr(source, name))}" for name in PROCESS)
    raise ValueError(
      f"the source was trained to predict something else: {'; '.join(different)}. Its parameters mean nothing to this "
      f"network: set {settings}, as the source has"
    )


def _computation(config: ModelConfig) -> dict[str, Any]:
  """Return the fields that determine a network's names, shapes and what it computes from them."""
  module, role = config.module, config.role
  fields = {field.name for field in dataclasses.fields(module)} - {*NOT_FIELDS, *FREE, role.classes, "out_channels"}
  if getattr(module, "num_head_channels", -1) != -1:
    fields -= {"num_heads", "num_heads_upsample"}  # They are not used.
  if getattr(module, "resblock_updown", False):
    fields -= {"conv_resample"}
  return {name: getattr(module, name) for name in sorted(fields)}


def _check_fields(model: ModelConfig, source: ModelConfig) -> None:
  ours, theirs = _computation(model), _computation(source)
  names = ours.keys() & theirs.keys() if model.network != source.network else ours.keys() | theirs.keys()
  absent = "unused"
  different = [
    f"{name} is {theirs.get(name, absent)!r} there, and {ours.get(name, absent)!r} here"
    for name in sorted(names)
    if theirs.get(name, absent) != ours.get(name, absent)
  ]
  if different:
    more = f"; and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    raise ValueError(
      f"the source is another {source.network}: {'; '.join(different[:SHOWN])}{more}. Set the fields of the network to "
      "the source's (jaxguide.models.transplant.config_from does), or train it from scratch"
    )


# --- rules ----------------------------------------------------------------------------------------


def _rules(model: ModelConfig, source: ModelConfig) -> dict[str, Rule]:
  """Return the rules of adapted parameters, by path or by the path's beginning. Others have to fit as they are."""
  if not isinstance(model.module, Encoder):
    return {}
  rules: dict[str, Rule] = {"input_blocks_0_0/kernel": functools.partial(_first_layer, model, source)}
  if model.role is DENOISER:
    rules |= {
      "out_2/kernel": functools.partial(_last_layer, model, source),
      "out_2/bias": functools.partial(_last_layer, model, source),
      "label_emb/embedding": functools.partial(_label_table, model, source),
      "label_emb/kernel": functools.partial(_label_matrix, model, source),
    }
  elif source.role is DENOISER:
    rules["out_0"] = rules["out_1"] = rules["out_2"] = rules["out_3"] = _new_head
  else:
    head = {"attention": "out_2/c_proj", "spatial": "out_2"}.get(model.module.pool, "out_3")
    rules[head] = functools.partial(_logits, model, source)
  if (
    source.role is DENOISER
    and source.num_classes is not None
    and (model.role is not DENOISER or model.num_classes is None)
  ):
    rules["time_embed_2/bias"] = functools.partial(_without_labels, source)
  return rules


def _channels(weights: Any, number: int, axis: int, is_input: bool) -> np.ndarray:
  """Convert the axis of image channels of a weight to another number of channels; see the module's docstring."""
  weights = np.moveaxis(np.asarray(weights), axis, -1)
  old = weights.shape[-1]
  if old == number:
    out = weights
  elif number == 1:
    out = weights.sum(-1, keepdims=True) if is_input else weights.mean(-1, keepdims=True)
  elif old == 1:
    out = np.repeat(weights / number if is_input else weights, number, -1)
  else:
    out = np.zeros((*weights.shape[:-1], number), weights.dtype)
    out[..., : min(old, number)] = weights[..., : min(old, number)]
  return np.moveaxis(out, -1, axis)


def _channels_changed(old: int, new: int) -> str:
  if old == new:
    return f"{new} image channels"
  what = "averaged" if new == 1 else "shared" if old == 1 else f"the first {min(old, new)} kept"
  return f"{old} -> {new} image channels, {what}"


def _first_layer(model: ModelConfig, source: ModelConfig, path: str, shape: tuple[int, ...], given: Any) -> _Made:
  old, new = source.image_shape[-1], model.image_shape[-1]
  value = np.asarray(given[path])
  if old == new and value.shape == shape:
    return _Made(value, None)
  parts = [_channels(part, new, 2, True) for part in np.split(value, value.shape[2] // old, axis=2)]
  how = _channels_changed(old, new)
  if shape[2] > sum(part.shape[2] for part in parts):
    parts.append(np.zeros_like(parts[0]))
    how += ", and those of the low-resolution image, which have no influence yet"
  return _Made(np.concatenate(parts, 2), how)


def _last_layer(model: ModelConfig, source: ModelConfig, path: str, shape: tuple[int, ...], given: Any) -> _Made:
  old, new = source.image_shape[-1], model.image_shape[-1]
  value = np.asarray(given[path])
  if old == new and value.shape == shape:
    return _Made(value, None)
  parts = [_channels(part, new, -1, False) for part in np.split(value, value.shape[-1] // old, axis=-1)]
  number, how = shape[-1] // new, _channels_changed(old, new)
  if number > len(parts):
    parts.append(np.zeros_like(parts[0]))
    how += ", and those of the learned variance, which starts halfway between its bounds"
  elif number < len(parts):
    how += ", without those of the learned variance"
  return _Made(np.concatenate(parts[:number], -1), how)


def _matches(model: ModelConfig, source: ModelConfig) -> tuple[dict[int, int], str]:
  """Return the source's class of each class that it has too, and a text about it."""
  number, names, old_names = model.num_classes or 0, model.class_names, source.class_names
  if names is None or old_names is None:
    if source.num_classes != number:
      return {}, f"{number} new classes"
    return {i: i for i in range(number)}, f"{number} classes kept by position"
  both = {i: old_names.index(name) for i, name in enumerate(names) if name in old_names}
  if not both:
    return {}, f"{number} new classes"
  return both, f"{_first([names[i] for i in both])} kept, {number - len(both)} new classes"


def _with_rows(both: Mapping[int, int], value: np.ndarray, axis: int) -> Callable[[np.ndarray], np.ndarray]:
  """Return a function that replaces the entries of common classes in a random initial value."""

  def rows(random):
    random, old = np.moveaxis(random, axis, 0), np.moveaxis(value, axis, 0)
    for ours, theirs in both.items():
      random[ours] = old[theirs]
    return np.moveaxis(random, 0, axis)

  return rows


def _label_table(model: ModelConfig, source: ModelConfig, path: str, shape: tuple[int, ...], given: Any) -> _Made:
  null, old_null = model.null_cond, source.null_cond
  if source.num_classes is None:
    label = " and the null label" if null is not None else ""
    return _Made(np.zeros(shape), f"{model.num_classes} classes{label} start as the unconditional network")
  both, how = _matches(model, source)
  if len(both) == model.num_classes == source.num_classes and null == old_null and all(i == j for i, j in both.items()):
    return _Made(given[path], None)
  if null is not None:
    how += ", null label kept" if old_null is not None else ", null label new"
    if old_null is not None:
      both = {**both, null: old_null}
  return _Made(None, how, _with_rows(both, np.asarray(given[path]), 0), is_new=not both)


def _label_matrix(model: ModelConfig, source: ModelConfig, path: str, shape: tuple[int, ...], given: Any) -> _Made:
  if source.label_size == model.label_size:
    return _Made(given[path], None)
  return _Made(np.zeros(shape), f"labels of {model.label_size} numbers start without influence")


def _logits(model: ModelConfig, source: ModelConfig, path: str, shape: tuple[int, ...], given: Any) -> _Made:
  both, how = _matches(model, source)
  if len(both) == model.num_classes == source.num_classes and all(i == j for i, j in both.items()):
    return _Made(given[path], None)
  return _Made(None, how, _with_rows(both, np.asarray(given[path]), -1), is_new=not both)


def _new_head(path: str, shape: tuple[int, ...], given: Any) -> _Made:
  return _Made(None, "the head of the classifier", lambda random: random, is_new=True)


def _without_labels(source: ModelConfig, path: str, shape: tuple[int, ...], given: Any) -> _Made:
  table, null = np.asarray(given["label_emb/embedding"]), source.null_cond
  row = table.mean(0) if null is None else table[null]
  what = "the mean label" if null is None else "the null label"
  return _Made(np.asarray(given[path]) + row, f"{what} of the source is part of the network")


def _first(names: Sequence[str]) -> str:
  more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
  return ", ".join(names[:SHOWN]) + more
