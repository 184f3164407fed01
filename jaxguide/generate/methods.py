"""Guidance and solvers by name, with their options, as the command line has them."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxguide import denoisers, nn, schedules, solvers
from jaxguide import guidance as guide
from jaxguide._core import checks, promotion
from jaxguide._core.specs import choose, described, options_of, parse
from jaxguide._core.typing import Array, Guidance, LogProb, Scale, Solver, scale_at
from jaxguide.guidance import Rule
from jaxguide.guidance import combine as rules
from jaxguide.guidance import scales as scaled
from jaxguide.guidance.combine import Combine
from jaxguide.models.model import Model


@dataclasses.dataclass(frozen=True)
class Networks:
  """What guidance may be made of.

  Args:
    model: the denoiser.
    classifier: the classifier, if there is one.
    load: gives the denoiser of another folder.
    sigmas: the levels that will be walked.
    eta: how random the solver's steps are, where they are those of `jaxguide.DDIM`.
  """

  model: Model
  classifier: Model | None
  load: Callable[[str], Model]
  sigmas: Array
  eta: Any = None

  @property
  def null_cond(self) -> int:
    """The null class."""
    null = self.model.null_cond
    if null is None:
      raise ValueError(
        "the model knows no null class, which classifier-free guidance needs: choose guidance 'classifier' or 'none'"
      )
    return null

  @property
  def log_prob(self) -> LogProb:
    """What the classifier says."""
    if self.classifier is None:
      raise ValueError("guidance by a classifier needs one, and there is none")
    return self.classifier.log_prob

  def clean(self, level: float) -> LogProb:
    """What the classifier says of clean examples, asked as if a little noise were left on them."""
    return Partial(_at_level, self.log_prob, checks.finite("level", checks.above("level", level, 0)))


def _at_level(log_prob, level, x0, sigma, cond):
  return log_prob(x0, jnp.asarray(level, x0.dtype), cond)


# --- guidance -------------------------------------------------------------------------------------


def cfg(networks: Networks, scale: Scale, combine: Combine) -> Guidance:
  """Classifier-free guidance (Ho & Salimans): away from what the network says without the label."""
  return guide.classifier_free(networks.null_cond, scale, combine)


def classifier(networks: Networks, scale: Scale) -> Guidance:
  """A classifier of noisy images bends the score (Dhariwal & Nichol); with solver ddpm it shifts the mean."""
  return guide.classifier(networks.log_prob, scale)


def autoguidance(networks: Networks, scale: Scale, combine: Combine, *, weak: str) -> Guidance:
  """Away from a weaker model (Karras et al. 2024), whose folder is weak."""
  poor, model = networks.load(weak), networks.model.config
  for name in ("image_shape", "num_classes"):
    ours, theirs = getattr(model, name), getattr(poor.config, name)
    if ours != theirs:
      raise ValueError(f"the weak model in {weak} has {name} {theirs}, but the model has {ours}")
  return guide.autoguidance(poor.denoiser, scale, combine)


def _perturbed(kind: str, networks: Networks, scale: Scale, combine: Combine, blocks: Sequence[str], **options: float):
  weak = denoisers.perturbed(networks.model.denoiser, nn.Perturbation(kind, blocks, **options))
  return guide.autoguidance(weak, scale, combine)


def pag(
  networks: Networks, scale: Scale, combine: Combine, *, blocks: tuple[str, ...] = ("middle_block_1",)
) -> Guidance:
  """Away from the network with identity attention in some blocks (Ahn et al. 2024); their s is scale - 1."""
  return _perturbed("identity", networks, scale, combine, blocks)


def seg(
  networks: Networks,
  scale: Scale,
  combine: Combine,
  *,
  blocks: tuple[str, ...] = ("middle_block_1",),
  width: float = float("inf"),
) -> Guidance:
  """Away from the network with attention blurred by width pixels (Hong 2024)."""
  return _perturbed("smooth", networks, scale, combine, blocks, width=width)


def slg(
  networks: Networks, scale: Scale, combine: Combine, *, blocks: tuple[str, ...] = ("middle_block_1",)
) -> Guidance:
  """Away from the network with some blocks skipped (Stable Diffusion 3.5)."""
  return _perturbed("skip", networks, scale, combine, blocks)


def compose(networks: Networks, scale: Scale, *, labels: tuple[int, ...], scales: tuple[float, ...]) -> Guidance:
  """The label with scale, and further labels each with a scale of its own, negative to avoid one (Liu et al. 2022)."""
  null = networks.null_cond
  if len(labels) != len(scales):
    raise ValueError(f"compose needs one of its scales for each of its labels, got {len(scales)} and {len(labels)}")
  wanted = np.array([checks.whole("label", label, -(2**63), 2**63 - 1) for label in labels])
  checks.labels("label", wanted, networks.model.config.num_classes or 0)
  of_all = Partial(_with_others, checks.scale("scale", scale), jnp.array(checks.finite("scales", scales)))
  return Rule(_compose, (guide.compose(null, of_all), jnp.array(labels)))


def _compose(denoise, guidance, labels, x, sigma, cond):
  labels, cond = promotion.same_type(labels, cond)
  return guidance(denoise)(x, sigma, jnp.append(cond, labels))


def _with_others(scale, others, sigma):
  return jnp.append(scale_at(scale, sigma, others), others)


def reconstruction(networks: Networks, scale: Scale, *, level: float = 0.01) -> Guidance:
  """A classifier of clean images, by its gradient through the denoiser (DPS, universal guidance)."""
  return guide.reconstruction(networks.clean(level), scale)


def backward(networks: Networks, scale: Scale, *, steps: int = 1, level: float = 0.01) -> Guidance:
  """A classifier of clean images, by steps of ascent on x0, each of size scale (universal guidance)."""
  return guide.backward_guidance(networks.clean(level), scale, steps)


def clip(networks: Networks, *, bound: float = 1.0) -> Guidance:
  """Keep x0 in [-bound, bound], at this place of the chain."""
  del networks
  return guide.clip_x0(bound)


def dynamic_threshold(networks: Networks, *, quantile: float = 0.995, bound: float = 1.0) -> Guidance:
  """Imagen's thresholding: pull all of x0 inwards where a quantile of it is outside [-bound, bound]."""
  del networks
  return guide.dynamic_threshold(quantile, bound)


@dataclasses.dataclass(frozen=True)
class Method:
  """A guidance method.

  Args:
    make: ``(networks, ...) -> Guidance``; a ``scale`` and a rule to ``combine`` are made for it if it takes them, and
      its other parameters are its options.
    scale: of the guidance, if nobody says otherwise.
    gradient: whether it asks a classifier, of an unconditional network where there is one.
  """

  make: Callable[..., Guidance]
  scale: float | None = None
  gradient: bool = False

  @property
  def options(self) -> dict[str, inspect.Parameter]:
    """Options of its own."""
    return options_of(self.make, "networks", "scale", "combine")

  @property
  def combines(self) -> bool:
    """Whether it makes one prediction of two."""
    return "combine" in inspect.signature(self.make).parameters


METHODS: dict[str, Method] = {
  "cfg": Method(cfg, 2.0),
  "classifier": Method(classifier, 2.0, gradient=True),
  "autoguidance": Method(autoguidance, 2.0),
  "pag": Method(pag, 4.0),
  "seg": Method(seg, 4.0),
  "slg": Method(slg, 3.0),
  "compose": Method(compose, 2.0),
  "reconstruction": Method(reconstruction, 1.0, gradient=True),
  "backward": Method(backward, 0.1, gradient=True),
  "clip": Method(clip),
  "dynamic-threshold": Method(dynamic_threshold),
}


# --- what a guidance is told ----------------------------------------------------------------------


def _linear() -> Combine:
  """What the papers have: base + scale (x0 - base)."""
  return rules.linear


def _tangential() -> Combine:
  """Drop what of the base's score is off the common direction (TCFG, Kwon et al. 2025)."""
  return rules.tangential


def _frequency_decoupled(*, ratios: tuple[float, ...] = (1.0, 0.5)) -> Combine:
  """Another scale for each band of frequencies, finest first (Sadat et al. 2025)."""
  return rules.frequency_decoupled(*ratios)


COMBINES: dict[str, Callable[..., Combine]] = {
  "linear": _linear,
  "rescaled": rules.rescaled,
  "projected": rules.projected,
  "zero-star": rules.zero_star,
  "tangential": _tangential,
  "frequency-decoupled": _frequency_decoupled,
}


def _constant(networks: Networks, scale: float) -> Scale:
  """The same at every noise level."""
  del networks
  return scale


def _rising(networks: Networks, scale: float, *, floor: float | None = None) -> Scale:
  """Rising linearly with the model's time, scale on average, not below floor (Wang et al. 2024)."""
  return scaled.linear(scale, networks.model.config.noise_schedule, floor)


def _cosine(networks: Networks, scale: float) -> Scale:
  """Rising along a cosine, scale on average."""
  return scaled.cosine(scale, networks.model.config.noise_schedule)


def _powered_cosine(networks: Networks, scale: float, *, power: float = 1.0) -> Scale:
  """Rising along a cosine of a power of time, to scale at the end."""
  return scaled.powered_cosine(scale, networks.model.config.noise_schedule, power)


def _cfg_pp(networks: Networks, scale: float) -> Scale:
  """CFG++ (Chung et al. 2024): scale is their lambda, 0.2 to 1; for euler, ddim, euler-ancestral and ddpm."""
  if networks.eta is None:
    raise ValueError("schedule 'cfg++' is for solvers euler, ddim, euler-ancestral and ddpm: choose one of them")
  return scaled.cfg_pp(scale, networks.sigmas, networks.eta)


SCHEDULES: dict[str, Callable[..., Scale]] = {
  "constant": _constant,
  "linear": _rising,
  "cosine": _cosine,
  "powered-cosine": _powered_cosine,
  "cfg++": _cfg_pp,
}


def _everywhere(*, sigma_lo: float | None = None, sigma_hi: float | None = None, ratio: float | None = None) -> None:
  """Act at levels from sigma_lo to sigma_hi only; give what changes ratio times the length of the predicted noise."""


def build(text: str, networks: Networks, scale: float | None = None) -> Guidance:
  """Make a guidance of a name with options.

  Args:
    text: ``NAME:option=value,...``.
    networks: what to make it of.
    scale: of the guidance, if the text has none.

  Raises:
    ValueError: for an unknown name, naming the nearest, or an option that it does not have, or a value out of range.
  """
  spec = parse(text)
  method = checks.lookup("guidance", spec.name, METHODS)
  schedule = checks.lookup("schedule", spec.options.get("schedule", "constant"), SCHEDULES)
  rule = checks.lookup("combine rule", spec.options.get("combine", "linear"), COMBINES)
  own, everywhere = method.options, options_of(_everywhere)
  of_scale = {} if method.scale is None else options_of(schedule, "networks")
  of_rule = options_of(rule) if method.combines else {}
  words = {} if method.scale is None else {"schedule": _word("schedule", "constant")}
  words |= {"combine": _word("combine", "linear")} if method.combines else {}
  given = choose(spec, {**own, **of_scale, **of_rule, **words, **everywhere})

  def part(known: Mapping[str, Any]) -> dict[str, Any]:
    return {option: given[option] for option in known if option in given}

  missing = [name for name, option in own.items() if option.default is option.empty and name not in given]
  if missing:
    raise ValueError(f"{spec.name!r} needs its option {missing[0]}: {spec.name}:{missing[0]}=...")
  made = part(own)
  if method.scale is not None:
    number = checks.finite("scale", given.get("scale", method.scale if scale is None else scale))
    made["scale"] = schedule(networks, **{**part(of_scale), "scale": number})
  if method.combines:
    made["combine"] = rule(**part(of_rule))
  guidance = method.make(networks, **made)
  if "ratio" in given:
    guidance = guide.normalized(guidance, checks.in_range("ratio", given["ratio"], 0))
  if "sigma_lo" in given or "sigma_hi" in given:
    low, high = given.get("sigma_lo", 0.0), given.get("sigma_hi", float("inf"))
    guidance = guide.interval(guidance, low, high)
    check_levels(networks.sigmas, "sigma_lo", np.nextafter(low, np.inf), "sigma_hi", high)
  return guidance


def check_levels(sigmas: Array, low_name: str, low: float, high_name: str, high: float) -> None:
  """Check that some level of the walk lies in a range: what is asked for at those levels would never happen.

  Raises:
    ValueError: if there is none.
  """
  levels = np.asarray(sigmas, np.float64)[:-1]
  if not ((levels >= low) & (levels <= high)).any():
    raise ValueError(
      f"no level of the grid lies between {low_name} {low:g} and {high_name} {high:g}: they go from "
      f"{levels.max():g} to {levels.min():g}"
    )


def _word(name: str, default: str) -> inspect.Parameter:
  return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)


# --- solvers and grids ----------------------------------------------------------------------------


def _edm_stochastic(
  *, churn: float = 0.0, s_min: float = 0.0, s_max: float = float("inf"), s_noise: float = 1.0, alpha: float = 1.0
) -> None:
  """The stochastic sampler of EDM; churn is S_churn, the noise that all its steps add."""


GRIDS: dict[str, Callable[..., Array]] = {"respaced": schedules.respaced, **schedules.GRIDS}
HIDDEN = ("log_prob", "scale")  # of DDPM: they come from the guidance


def solver(text: str, num_steps: int, **options: Any) -> Solver:
  """Make a solver of a name with options.

  Args:
    text: ``NAME:option=value,...``.
    num_steps: number of steps that it will take.
    options: further fields, which the text does not have.

  Raises:
    ValueError: for an unknown name, naming the nearest, or an option that it does not have, or a value out of range.
  """
  spec = parse(text)
  cls = checks.lookup("solver", spec.name, solvers.SOLVERS)
  given = choose(spec, _solver_options(spec.name, cls))
  if spec.name == "edm-stochastic":
    return solvers.EDMStochastic.from_churn(checks.in_range("churn", given.pop("churn", 0.0), 0), num_steps, **given)
  return solvers.solver(spec.name, **given, **{name: value for name, value in options.items() if name not in given})


def _solver_options(name: str, cls: type) -> dict[str, inspect.Parameter]:
  return options_of(_edm_stochastic) if name == "edm-stochastic" else options_of(cls, *HIDDEN)


def grid(text: str, steps: int | str, table: schedules.NoiseSchedule) -> Array:
  """Make a grid of a name with options.

  Args:
    text: ``NAME:option=value,...``; ``respaced`` or one of `jaxguide.schedules.GRIDS`.
    steps: how many, or for ``respaced`` a text as well.
    table: what ``respaced`` visits.

  Raises:
    ValueError: for an unknown name, naming the nearest, an option that it does not have, a value out of range, or a
      ``table`` that is none.
  """
  spec = parse(text)
  make = checks.lookup("grid", spec.name, GRIDS)
  given = choose(spec, options_of(make, "steps", "table"))
  number = int(steps) if str(steps).isdecimal() else None
  if spec.name == "respaced":
    if not isinstance(table, schedules.Table):
      raise ValueError(f"grid 'respaced' is for models of a discrete process; choose from {', '.join(schedules.GRIDS)}")
    return schedules.respaced(table, steps if number is None else number, **given)
  if number is None:
    raise ValueError(f"grid {spec.name!r} takes a number of steps, got {steps!r}")
  return make(number, **given)


# --- help -----------------------------------------------------------------------------------------


def overview() -> dict[str, list[tuple[str, str, str]]]:
  """Give all that there is by name: for each kind the names, with what they do and their options."""

  def row(name: str, made: Callable[..., Any], options: Mapping[str, inspect.Parameter]) -> tuple[str, str, str]:
    does = (inspect.getdoc(made) or "").splitlines()[0].replace("`", "")
    return name, does, described(options)

  guidances = []
  for name, method in METHODS.items():
    scale = {} if method.scale is None else {"scale": _word("scale", f"{method.scale:g}")}
    guidances.append(row(name, method.make, {**scale, **method.options}))
  return {
    "--guidance": guidances,
    "Options of every guidance": [row("", _everywhere, options_of(_everywhere))],
    "combine= of cfg, autoguidance, pag, seg and slg": [row(n, f, options_of(f)) for n, f in COMBINES.items()],
    "schedule= of a scale": [row(n, f, options_of(f, "networks", "scale")) for n, f in SCHEDULES.items()],
    "--solver": [row(name, cls, _solver_options(name, cls)) for name, cls in solvers.SOLVERS.items()],
    "--grid": [row(name, make, options_of(make, "steps", "table")) for name, make in GRIDS.items()],
  }
