"""Protocols: everything on which figures depend, as plain data, and as text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import jaxguide
from jaxguide import schedules
from jaxguide.evaluation.evidence import Options
from jaxguide.evaluation.features import Features
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.reference import Reference
from jaxguide.generate.guidances import GuidanceSpec
from jaxguide.models.config import ModelConfig

OF_SAMPLES = ("samples_hash", "labels_hash", "sampling")
"""The parts of a protocol in which figures of one table differ."""

RESOLVED = ("guidance", "scale", "grid", "seed", "dtype", "matmul_precision")
"""The settings of sampling that a protocol always has. One that is not known is ``"default"``."""


def hash_of(array: np.ndarray) -> str:
  """Return what identifies an array in a protocol."""
  return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()[:16]


def protocol(
  images: np.ndarray,
  labels: np.ndarray | None,
  reference: Reference | None,
  features: Features,
  judge: Judge | None,
  options: Options,
  sampling: Mapping[str, Any] | None,
) -> dict[str, Any]:
  """Collect everything on which figures depend, as plain data.

  A judge that cannot judge the samples is left out: there are no labels, or it does not know all of them.
  """
  judges = judge is not None and labels is not None and not len(judge.unknown(labels))
  return json.loads(
    json.dumps(
      {
        **features.protocol,
        "image_shape": list(images.shape[1:]),
        "samples": len(images),
        "samples_hash": hash_of(images),
        "reference": None if reference is None else reference.protocol,
        "labels_hash": None if labels is None else hash_of(np.asarray(labels, np.int64)),
        "judge": {"name": judge.name, "hash": judge.hash} if judge is not None and judges else None,
        "options": vars(options),
        "sampling": in_force(sampling),
        "jaxguide": jaxguide.__version__,
      },
      default=list,
    )
  )


# --- how samples were drawn -----------------------------------------------------------------------


def in_force(sampling: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
  """Replace the settings that were left at their defaults by what was in force.

  Args:
    sampling: the record of a file of samples, with its ``settings`` and networks; or the settings alone. Other data are
      returned as they are.

  >>> settings = in_force({"solver": "ddim", "guidance": ["cfg"], "scale": None, "grid": None, "seed": 0})
  >>> settings["scale"], settings["grid"], settings["seed"], in_force(settings) == settings
  (2.0, 'default', 0, True)
  """
  if sampling is None:
    return None
  settings = sampling.get("settings")
  if isinstance(settings, Mapping):
    config, classifier = (_config(sampling.get(name)) for name in ("network", "classifier_network"))
    return {**sampling, "settings": _resolved(settings, config, classifier)}
  return _resolved(sampling, None, None) if "solver" in sampling else sampling


def _config(network: Any) -> ModelConfig | None:
  """Return the configuration of a network in a record; None if this version or this machine does not know it."""
  try:
    return ModelConfig(**network)
  except (ValueError, TypeError, ImportError, AttributeError):
    return None


def _resolved(
  settings: Mapping[str, Any], config: ModelConfig | None, classifier: ModelConfig | None
) -> dict[str, Any]:
  """Resolve settings as `jaxguide.generate.plan` does."""
  names, grid = settings.get("guidance"), settings.get("grid")
  if names is None and config is not None:
    names = ["none"]
    if config.low_res_shape is None and settings.get("classifier") is not None:
      names = ["classifier"]
    elif config.low_res_shape is None and config.null_cond is not None:
      names = ["cfg"]
  if grid is None and config is not None:
    grid = "respaced" if isinstance(config.noise_schedule, schedules.Table) else "karras"
  scale = settings.get("scale")
  if names is not None and not isinstance(scale, str | list):  # Else it is resolved already.
    scale = _scale(names, scale, classifier)
  known = {**settings, "guidance": names, "scale": scale, "grid": grid}
  return known | {name: "default" for name in RESOLVED if known.get(name) is None}


def _scale(names: Sequence[str], scale: float | None, classifier: ModelConfig | None) -> Any:
  """Give the scale of a guidance, a list for several that take one, and ``"none"`` where none takes one."""
  try:
    used = [spec for spec in map(GuidanceSpec.parse, names if names != ["none"] else []) if spec.takes_scale]
  except (ValueError, TypeError):
    return scale
  scales: list[float | str | None] = []
  for spec in used:
    default: float | str | None = spec.method.scale
    if spec.name == "classifier":
      default = "default" if classifier is None else classifier.scale or default
    scales.append(spec.options.get("scale", default if scale is None else scale))
    scale = None
  return "none" if not scales else scales[0] if len(scales) == 1 else scales


# --- comparison and text --------------------------------------------------------------------------


def differences(protocols: Sequence[Mapping[str, Any]]) -> list[str]:
  """Name the parts in which protocols differ, apart from those that say which samples were measured.

  >>> differences([{"features": "pixels", "samples_hash": "a"}, {"features": "inception", "samples_hash": "b"}])
  ["features: 'pixels', 'inception'"]
  """
  found = []
  for key in dict.fromkeys(key for one in protocols for key in one if key not in OF_SAMPLES):
    values = list(dict.fromkeys(json.dumps(one.get(key), sort_keys=True) for one in protocols))
    if len(values) > 1:
      found.append(f"{key}: {', '.join(repr(json.loads(value)) for value in values)}")
  return found


def protocol_text(parts: Mapping[str, Any]) -> str:
  """Give a protocol in one line, as ``key=value; key=value``. Parts that are empty or absent are left out.

  >>> protocol_text({"features": "pixels", "samples": 50, "reference": {"name": "digits", "images": 1437}})
  'features=pixels; samples=50; reference.name=digits; reference.images=1437'
  """
  return _joined(_flat("", parts))


def protocols_text(protocols: Mapping[str, Mapping[str, Any]]) -> str:
  """Give protocols by the names of their samples: what they share once, and what differs in a line for each.

  >>> print(protocols_text({"a.npz": {"features": "pixels", "samples": 50}, "b.npz": {"features": "pixels"}}))
  Protocol of all: features=pixels
  Of a.npz alone: samples=50
  """
  flat = {name: _flat("", parts) for name, parts in protocols.items()}
  if len(flat) == 1:
    return "\n".join(f"Protocol of {name}: {_joined(pairs)}" for name, pairs in flat.items())
  first, *others = flat.values()
  shared = {name: text for name, text in first.items() if all(other.get(name) == text for other in others)}
  lines = [f"Protocol of all: {_joined(shared)}"]
  for name, pairs in flat.items():
    own = {key: text for key, text in pairs.items() if key not in shared}
    lines += [f"Of {name} alone: {_joined(own)}"] if own else []
  return "\n".join(lines)


def _joined(pairs: Mapping[str, str]) -> str:
  return "; ".join(f"{name}={text}" for name, text in pairs.items())


def _flat(prefix: str, parts: Mapping[str, Any]) -> dict[str, str]:
  pairs: dict[str, str] = {}
  for name, value in parts.items():
    if isinstance(value, Mapping):
      pairs |= _flat(f"{prefix}{name}.", value)
    elif value not in (None, "", []):
      pairs[f"{prefix}{name}"] = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
  return pairs
