"""Combine rules and profiles of the scale, by name: one function and one entry in `COMBINES` or `PROFILES` each."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxguide._core import checks
from jaxguide._core.specs import options_of
from jaxguide._core.typing import Scale
from jaxguide.generate.methods import Networks
from jaxguide.guidance import combine as rules
from jaxguide.guidance import scales as scaled
from jaxguide.guidance.combine import Combine


def word(name: str, default: str) -> inspect.Parameter:
  """Give an option whose value is a name in a table."""
  return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)


def _linear() -> Combine:
  """The rule of the papers: base + scale (x0 - base)."""
  return rules.linear


def _tangential() -> Combine:
  """TCFG (Kwon et al. 2025, arXiv:2503.18137): remove the part of the base score off the common direction."""
  return rules.tangential


def _frequency_decoupled(*, ratios: tuple[float, ...] = (1.0, 0.5)) -> Combine:
  """FDG (Sadat et al. 2025, arXiv:2506.19713): a factor on the scale for each band of frequencies, finest first."""
  return rules.frequency_decoupled(*ratios)


@dataclasses.dataclass(frozen=True)
class _OnChannels:
  """The rule that of= names on the first channels, as published for DiT, SiT, LightningDiT; the others conditional."""

  inner: Callable[..., Combine]

  @property
  def __signature__(self) -> inspect.Signature:
    """The options: its own, and those of the rule."""
    number = inspect.Parameter("channels", inspect.Parameter.KEYWORD_ONLY, default=3, annotation=int)
    inner = (option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options_of(self.inner).values())
    return inspect.Signature([number, word("of", "linear"), *inner])

  def __call__(self, channels: int = 3, of: str = "linear", **options: Any) -> Combine:
    """Make the rule."""
    del of
    return rules.channels(channels, self.inner(**options))


COMBINES: dict[str, Callable[..., Combine]] = {
  "linear": _linear,
  "rescaled": rules.rescaled,
  "projected": rules.projected,
  "zero-star": rules.zero_star,
  "tangential": _tangential,
  "frequency-decoupled": _frequency_decoupled,
  "channels": _OnChannels(_linear),
}


def rule_of(options: Mapping[str, str]) -> Callable[..., Combine]:
  """Return the function that makes the combine rule that is named in options."""
  rule = checks.lookup("combine rule", options.get("combine", "linear"), COMBINES)
  if not isinstance(rule, _OnChannels):
    return rule
  others = {name: each for name, each in COMBINES.items() if each is not rule}
  return _OnChannels(checks.lookup("combine rule of channels", options.get("of", "linear"), others))


def _constant(networks: Networks, scale: float) -> Scale:
  """The same scale at every noise level."""
  del networks
  return scale


def _linear_profile(networks: Networks, scale: float, *, floor: float | None = None) -> Scale:
  """Rises linearly as the noise falls (Wang et al. 2024, arXiv:2404.13040); scale is the mean, floor the least."""
  return scaled.linear(scale, networks.model.config.noise_schedule, floor)


def _raised_cosine(networks: Networks, scale: float) -> Scale:
  """Rises along a cosine as the noise falls; scale is its mean over time."""
  return scaled.raised_cosine(scale, networks.model.config.noise_schedule)


def _powered_cosine(networks: Networks, scale: float, *, power: float = 1.0) -> Scale:
  """Rises along a cosine of a power of time, up to scale."""
  return scaled.powered_cosine(scale, networks.model.config.noise_schedule, power)


def _cfg_pp(networks: Networks, scale: float) -> Scale:
  """CFG++ (Chung et al. 2024, arXiv:2406.08070): scale is their lambda, 0.2 to 1; for DDIM-type solvers."""
  if networks.eta is None:
    raise ValueError("profile 'cfg++' is for solvers euler, ddim, euler-ancestral and ddpm: choose one of them")
  return scaled.cfg_pp(scale, networks.sigmas, networks.eta)


PROFILES: dict[str, Callable[..., Scale]] = {
  "constant": _constant,
  "linear": _linear_profile,
  "raised-cosine": _raised_cosine,
  "powered-cosine": _powered_cosine,
  "cfg++": _cfg_pp,
}
