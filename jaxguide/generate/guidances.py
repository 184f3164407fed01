"""Guidance by name, with options: ``cfg:scale=4,combine=rescaled,phi=0.7``.

`GuidanceSpec` reads such a text and builds the guidance. Its names are those of `jaxguide.generate.methods` and
`jaxguide.generate.rules`.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxguide import guidance as guide
from jaxguide._core import checks, specs
from jaxguide._core.specs import choose, options_of
from jaxguide._core.typing import Guidance, Scale
from jaxguide.denoisers import scaling
from jaxguide.generate.methods import METHODS, Method, Networks
from jaxguide.generate.rules import COMBINES, PROFILES, rule_of, word
from jaxguide.generate.walks import check_levels
from jaxguide.guidance import scales as scaled
from jaxguide.guidance.combine import Combine


@dataclasses.dataclass(frozen=True)
class GuidanceSpec:
  """A guidance that was named with options. The options are checked; the networks are not needed yet.

  Args:
    text: ``NAME`` or ``NAME:option=value,...``, as it was written.
    name: the name.
    method: the entry in `METHODS`.
    profile: the function that makes a scale of a number, from `PROFILES`.
    rule: the function that makes the combine rule, from `COMBINES`.
    options: the values of all options.
  """

  text: str
  name: str
  method: Method
  profile: Callable[..., Scale]
  rule: Callable[..., Combine]
  options: Mapping[str, Any]

  @classmethod
  def parse(cls, text: str) -> "GuidanceSpec":
    """Read a guidance.

    Raises:
      ValueError: for an unknown name, naming the nearest; an option that it does not have, or that is missing; or a
        value of another type.

    >>> GuidanceSpec.parse("cfg:scale=4,combine=rescaled,phi=0.5").options
    {'scale': 4.0, 'combine': 'rescaled', 'phi': 0.5}
    """
    spec = specs.parse(text)
    method = checks.lookup("guidance", spec.name, METHODS)
    profile = checks.lookup("scale profile", spec.options.get("profile", "constant"), PROFILES)
    rule = rule_of(spec.options)
    options = choose(spec, _known(method, profile, rule))
    for name, parameter in method.options.items():
      if parameter.default is parameter.empty and name not in options:
        raise ValueError(f"{spec.name!r} needs its option {name}: {spec.name}:{name}=...")
    return cls(text, spec.name, method, profile, rule, options)

  @property
  def takes_scale(self) -> bool:
    """Whether the guidance has a scale."""
    return self.method.scale is not None

  def complete(self, scale: float | None) -> dict[str, Any]:
    """Give the values of all options, also of those that were left out.

    Args:
      scale: the scale, if the options have none.

    >>> GuidanceSpec.parse("clip:t_lo=0.1").complete(None)
    {'bound': 1.0, 'sigma_lo': None, 'sigma_hi': None, 't_lo': 0.1, 't_hi': None, 'step_lo': None, ...}
    """
    defaults = {name: option.default for name, option in _known(self.method, self.profile, self.rule).items()}
    return {**defaults, **({"scale": scale} if self.takes_scale else {}), **self.options}

  def _of(self, known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: self.options[name] for name in known if name in self.options}

  def build(self, networks: Networks, scale: float | None = None) -> Guidance:
    """Build the guidance.

    Args:
      networks: what to build it from.
      scale: the scale, if the options have none; the method's default if left out.

    Raises:
      ValueError: for a value that is out of range, or networks that the method cannot be built from.
    """
    options = self._of(self.method.options)
    if self.takes_scale:
      number = checks.finite("scale", self.options.get("scale", self.method.scale if scale is None else scale))
      scale_options = {**self._of(options_of(self.profile, "networks")), "scale": number}
      options["scale"] = self.profile(networks, **scale_options)
      if options["scale"] == number and number in self.method.cheap:
        options["scale"] = scaled.static(number)
    if self.method.combines:
      options["combine"] = self.rule(**self._of(options_of(self.rule)))
    guidance = self.method.make(networks, **options)
    if "ratio" in self.options:
      guidance = guide.normalized(guidance, checks.in_range("ratio", self.options["ratio"], 0))
    guidance = _narrowed(guidance, networks, self.options)
    if self.name == "classifier":
      low, high = self.options.get("sigma_lo", 0.0), self.options.get("sigma_hi", math.inf)
      # At other levels the log-probability of `jaxguide.ClassifierLogProb` is constant, so the guidance is off.
      least, largest = networks.noise_range
      names = "the classifier's least noise level", "its largest"
      check_levels(networks.sigmas, names[0], max(low, least), names[1], min(high, largest))
    return guidance


def _known(method: Method, profile: Callable[..., Scale], rule: Callable[..., Combine]) -> dict[str, inspect.Parameter]:
  """Give the options of a method with a profile and a combine rule."""
  known = dict(method.options)
  if method.scale is not None:
    known |= {**options_of(profile, "networks"), "profile": word("profile", "constant")}
  if method.combines:
    known |= {**options_of(rule), "combine": word("combine", "linear")}
  return {**known, **options_of(_everywhere)}


def help_rows() -> dict[str, list[specs.HelpRow]]:
  """Give the names of guidances, combine rules and scale profiles with their options, for the help."""
  rows = []
  for name, method in METHODS.items():
    default = "" if method.scale is None else f"{method.scale:g}"
    if name == "classifier":  # As `jaxguide.generate.plan.scales_of` has it.
      default = f"the classifier's or {default}"
    scale = {"scale": word("scale", default)} if default else {}
    rows.append(specs.help_row(name, method.make, {**scale, **method.options}))
  return {
    "--guidance": rows,
    "Options of every guidance": [specs.help_row("", _everywhere, options_of(_everywhere))],
    "combine= of cfg, autoguidance, pag, seg and slg": [
      specs.help_row(name, rule, options_of(rule)) for name, rule in COMBINES.items()
    ],
    "profile= of a scale": [
      specs.help_row(name, profile, options_of(profile, "networks", "scale")) for name, profile in PROFILES.items()
    ],
  }


def _everywhere(
  *,
  sigma_lo: float | None = None,
  sigma_hi: float | None = None,
  t_lo: float | None = None,
  t_hi: float | None = None,
  step_lo: int | None = None,
  step_hi: int | None = None,
  ratio: float | None = None,
) -> None:
  """Act at levels sigma_lo to sigma_hi, times t_lo to t_hi, or steps step_lo to step_hi - 1 only; ratio of the change.

  The change is scaled to ``ratio`` times the length of the predicted noise.
  """


BOUNDS = {kind: (f"{kind}_lo", f"{kind}_hi") for kind in ("sigma", "t", "step")}
"""The options that narrow a guidance to an interval; one kind can be given."""


def _narrowed(guidance: Guidance, networks: Networks, options: Mapping[str, Any]) -> Guidance:
  """Narrow a guidance to the interval that options give, if they give one."""
  bounds = {name: options[name] for pair in BOUNDS.values() for name in pair if name in options}
  if not bounds:
    return guidance
  kinds = [kind for kind, pair in BOUNDS.items() if set(pair) & set(bounds)]
  more: dict[str, Any] = {}
  if kinds == ["t"]:
    more["time"] = networks.model.config.scaling
    times = np.asarray(scaling.coefficients(more["time"], jnp.asarray(networks.sigmas)[:-1]).c_noise)
    low, high = bounds.get("t_lo", -math.inf), bounds.get("t_hi", math.inf)
    if low <= high and not ((times >= low) & (times <= high)).any():
      raise ValueError(
        f"no step lies between t_lo {low:g} and t_hi {high:g}: the network's time goes from {times[0]:g} to "
        f"{times[-1]:g}"
      )
  elif kinds == ["step"]:
    more["sigmas"] = networks.sigmas
  narrowed = guide.interval(guidance, **bounds, **more)
  if kinds == ["sigma"]:
    low, high = bounds.get("sigma_lo", 0.0), bounds.get("sigma_hi", math.inf)
    check_levels(networks.sigmas, "sigma_lo", np.nextafter(low, np.inf), "sigma_hi", high)
  return narrowed
