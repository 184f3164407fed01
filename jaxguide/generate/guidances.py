"""Guidance by name, with options: ``cfg:scale=4,combine=rescaled,phi=0.7``.

A guidance method is one function and one entry in `METHODS`. The function takes the `Networks`, a scale and a combine
rule if it needs them, and its options as keyword parameters. The command line, its help and the README's table follow
from the entry.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxguide import denoisers, nn
from jaxguide import guidance as guide
from jaxguide._core import checks, promotion, specs
from jaxguide._core.specs import choose, options_of
from jaxguide._core.typing import Array, Guidance, LogProb, Scale, scale_at
from jaxguide.denoisers import scaling
from jaxguide.generate.walks import check_levels
from jaxguide.guidance import Rule
from jaxguide.guidance import combine as rules
from jaxguide.guidance import scales as scaled
from jaxguide.guidance.combine import Combine
from jaxguide.models.model import Model


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks that guidance is built from, and the walk that it will guide.

  Args:
    model: the model whose denoiser is guided.
    classifier: the classifier; None if there is none.
    load: loads the model of another folder.
    sigmas: (steps + 1,) the noise levels of the walk.
    eta: eta of a DDIM-type step (0 deterministic, 1 DDPM); None for other solvers.
  """

  model: Model
  classifier: Model | None
  load: Callable[[str], Model]
  sigmas: Array
  eta: Any = None

  @property
  def null_cond(self) -> Any:
    """The null label of the model.

    Raises:
      ValueError: if the model has none.
    """
    null = self.model.null_cond
    if null is None:
      raise ValueError(
        "the model has no null class, which classifier-free guidance needs: choose guidance 'classifier' or 'none'"
      )
    return null

  @property
  def log_prob(self) -> LogProb:
    """The classifier as a log-probability of labels.

    Raises:
      ValueError: if there is no classifier.
    """
    if self.classifier is None:
      raise ValueError("guidance by a classifier needs one, and there is none")
    return self.classifier.log_prob

  @property
  def noise_range(self) -> Sequence[float | int]:
    """The noise levels that the classifier was trained on; without a range, all levels."""
    levels = None if self.classifier is None else self.classifier.config.noise_range
    return (0.0, math.inf) if levels is None else levels

  def clean(self, level: float) -> LogProb:
    """The classifier as a log-probability for clean examples: it is evaluated at a small noise level.

    Raises:
      ValueError: if the classifier was not trained at this level.
    """
    level = checks.finite("level", checks.above("level", level, 0))
    low, high = self.noise_range
    if not low <= level <= high:
      raise ValueError(
        f"the classifier was trained on noise levels from {low:g} to {high:g}, and level {level:g} is outside: give "
        f"level={low:g}"
      )
    return Partial(_at_level, self.log_prob, level)


def _at_level(log_prob, level, x0, sigma, cond):
  return log_prob(x0, jnp.asarray(level, x0.dtype), cond)


# --- guidance -------------------------------------------------------------------------------------


def cfg(networks: Networks, scale: Scale, combine: Combine) -> Guidance:
  """Classifier-free guidance (Ho & Salimans 2021, arXiv:2207.12598): away from the prediction without the label."""
  return guide.classifier_free(networks.null_cond, scale, combine)


def classifier(networks: Networks, scale: Scale, *, every: int = 1) -> Guidance:
  """The gradient of a noisy classifier, added to the score (Dhariwal & Nichol 2021, arXiv:2105.05233)."""
  return guide.classifier(networks.log_prob, scale, every)


def autoguidance(networks: Networks, scale: Scale, combine: Combine, *, weak: str) -> Guidance:
  """Autoguidance (Karras et al. 2024, arXiv:2406.02507): away from a weaker model, loaded from the folder weak.

  An unconditional weak model gets no labels, as in EDM2's guidance (arXiv:2312.02696).
  """
  weak_model, model = networks.load(weak), networks.model.config
  unlabelled = weak_model.config.num_classes is weak_model.config.label_size is None
  for name in ("image_shape",) if unlabelled else ("image_shape", "num_classes"):
    ours, theirs = getattr(model, name), getattr(weak_model.config, name)
    if ours != theirs:
      raise ValueError(f"the weak model in {weak} has {name} {theirs}, but the model has {ours}")
  denoiser = guide.unconditional(None)(weak_model.denoiser) if unlabelled else weak_model.denoiser
  return guide.autoguidance(denoiser, scale, combine)


MIDDLE = ("middle_block_1",)
"""The middle of a guided-diffusion UNet, the block that is perturbed by default."""


def _perturbed(kind: str, networks: Networks, scale: Scale, combine: Combine, blocks: Sequence[str], **options: float):
  try:
    weak = denoisers.perturbed(networks.model.denoiser, nn.Perturbation(kind, blocks, **options))
  except ValueError as error:
    if tuple(blocks) != MIDDLE:
      raise
    raise ValueError(f"{error}; the default is the middle of a guided-diffusion UNet: give blocks=NAME") from error
  return guide.autoguidance(weak, scale, combine)


def pag(networks: Networks, scale: Scale, combine: Combine, *, blocks: tuple[str, ...] = MIDDLE) -> Guidance:
  """PAG (Ahn et al. 2024, arXiv:2403.17377): away from identity attention in some blocks; their s is scale - 1."""
  return _perturbed("identity", networks, scale, combine, blocks)


def seg(
  networks: Networks,
  scale: Scale,
  combine: Combine,
  *,
  blocks: tuple[str, ...] = MIDDLE,
  width: float = float("inf"),
) -> Guidance:
  """SEG (Hong 2024, arXiv:2408.00760): away from attention that is blurred by width pixels."""
  return _perturbed("smooth", networks, scale, combine, blocks, width=width)


def slg(networks: Networks, scale: Scale, combine: Combine, *, blocks: tuple[str, ...] = MIDDLE) -> Guidance:
  """SLG (Stable Diffusion 3.5): away from the network with some blocks skipped."""
  return _perturbed("skip", networks, scale, combine, blocks)


def compose(networks: Networks, scale: Scale, *, labels: tuple[int, ...], scales: tuple[float, ...]) -> Guidance:
  """Composition (Liu et al. 2022, arXiv:2206.01714): further labels with their own scales; a negative one avoids."""
  null = networks.null_cond
  if len(labels) != len(scales):
    raise ValueError(f"compose needs one scale for each label, got {len(scales)} scales and {len(labels)} labels")
  numbers = np.array([checks.whole("label", label, -(2**63), 2**63 - 1) for label in labels])
  checks.labels("label", numbers, networks.model.config.num_classes or 0)
  of_all = Partial(_with_others, checks.scale("scale", scale), jnp.array(checks.finite("scales", scales)))
  return Rule(_compose, (guide.compose(null, of_all), jnp.array(labels)))


def _compose(denoise, guidance, labels, x, sigma, cond):
  labels, cond = promotion.same_type(labels, cond)
  return guidance(denoise)(x, sigma, jnp.append(cond, labels))


def _with_others(scale, others, sigma):
  return jnp.append(scale_at(scale, sigma, others), others)


def reconstruction(networks: Networks, scale: Scale, *, level: float = 0.01, every: int = 1) -> Guidance:
  """DPS (Chung et al. 2023, arXiv:2209.14687): the gradient of a classifier of clean images, through the denoiser."""
  return guide.reconstruction(networks.clean(level), scale, every)


def backward(networks: Networks, scale: Scale, *, steps: int = 1, level: float = 0.01, every: int = 1) -> Guidance:
  """Universal guidance (Bansal et al. 2023, arXiv:2302.07121): steps of ascent on x0; scale is the step size."""
  return guide.backward_guidance(networks.clean(level), scale, steps, every)


def clip(networks: Networks, *, bound: float = 1.0) -> Guidance:
  """Clip x0 to [-bound, bound] at this place of the chain."""
  del networks
  return guide.clip_x0(bound)


def dynamic_threshold(networks: Networks, *, quantile: float = 0.995, bound: float = 1.0) -> Guidance:
  """Thresholding (Saharia et al. 2022, arXiv:2205.11487): scale x0 down if a quantile of it is above bound."""
  del networks
  return guide.dynamic_threshold(quantile, bound)


@dataclasses.dataclass(frozen=True)
class Method:
  """A guidance method.

  Args:
    make: ``(networks, ...) -> Guidance``. If it has a parameter ``scale`` or ``combine``, it gets a scale or a combine
      rule. Its other parameters are the options of the method.
    function: the function of `jaxguide` that it calls.
    passes: how many passes of the network a step takes.
    scale: the default scale; None for a method without one.
    gradient: whether it uses the gradient of a classifier. Guidance by gradients alone runs the model unconditionally.
    cheap: the scales at which it takes fewer passes, in a program of their own.
  """

  make: Callable[..., Guidance]
  function: str
  passes: str
  scale: float | None = None
  gradient: bool = False
  cheap: tuple[float, ...] = ()

  @property
  def options(self) -> dict[str, inspect.Parameter]:
    """The method's own options."""
    return options_of(self.make, "networks", "scale", "combine")

  @property
  def combines(self) -> bool:
    """Whether it combines two predictions by a rule."""
    return "combine" in inspect.signature(self.make).parameters


METHODS: dict[str, Method] = {
  "cfg": Method(cfg, "classifier_free", "2", 2.0, cheap=(0.0, 1.0)),
  "classifier": Method(classifier, "classifier", "1, and the classifier's gradient", 2.0, gradient=True, cheap=(0.0,)),
  "autoguidance": Method(autoguidance, "autoguidance", "1, and 1 of the weaker model", 2.0, cheap=(0.0, 1.0)),
  "pag": Method(pag, "autoguidance", "2", 4.0, cheap=(0.0, 1.0)),
  "seg": Method(seg, "autoguidance", "2", 4.0, cheap=(0.0, 1.0)),
  "slg": Method(slg, "autoguidance", "2", 3.0, cheap=(0.0, 1.0)),
  "compose": Method(compose, "compose", "1 for each label, and 1", 2.0),
  "reconstruction": Method(reconstruction, "reconstruction", "1, with its gradient", 1.0, gradient=True, cheap=(0.0,)),
  "backward": Method(
    backward, "backward_guidance", "1, and the classifier's gradient", 0.1, gradient=True, cheap=(0.0,)
  ),
  "clip": Method(clip, "clip_x0", "1"),
  "dynamic-threshold": Method(dynamic_threshold, "dynamic_threshold", "1"),
}


# --- combine rules and scale profiles -------------------------------------------------------------


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
  """The rule `of` on the first channels only, as published for DiT, SiT and LightningDiT; the others conditional."""

  inner: Callable[..., Combine]

  @property
  def __signature__(self) -> inspect.Signature:
    """The options: its own, and those of the rule."""
    number = inspect.Parameter("channels", inspect.Parameter.KEYWORD_ONLY, default=3, annotation=int)
    inner = (option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options_of(self.inner).values())
    return inspect.Signature([number, _word("of", "linear"), *inner])

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


def _rule_of(options: Mapping[str, str]) -> Callable[..., Combine]:
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


# --- a guidance that was named --------------------------------------------------------------------


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
    rule = _rule_of(spec.options)
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
    known |= {**options_of(profile, "networks"), "profile": _word("profile", "constant")}
  if method.combines:
    known |= {**options_of(rule), "combine": _word("combine", "linear")}
  return {**known, **options_of(_everywhere)}


def _word(name: str, default: str) -> inspect.Parameter:
  """Give an option whose value is a name in a table."""
  return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)


def help_rows() -> dict[str, list[specs.HelpRow]]:
  """Give the names of guidances, combine rules and scale profiles with their options, for the help."""
  rows = []
  for name, method in METHODS.items():
    scale = {} if method.scale is None else {"scale": _word("scale", f"{method.scale:g}")}
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
