"""Guidance methods by name.

A guidance method is one function and one entry in `METHODS`. The function takes the `Networks`, a scale and a combine
rule if it needs them, and its options as keyword parameters. The command line, its help and the tables of the
documentation follow from the entry.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxguide import denoisers, nn
from jaxguide import guidance as guide
from jaxguide._core import checks, promotion
from jaxguide._core.specs import options_of
from jaxguide._core.typing import Array, Guidance, LogProb, Scale, scale_at
from jaxguide.generate.classes import names_of, number_of
from jaxguide.guidance import Rule
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


def compose(networks: Networks, scale: Scale, *, labels: tuple[str, ...], scales: tuple[float, ...]) -> Guidance:
  """Composition (Liu et al. 2022, arXiv:2206.01714): more labels (names or numbers) with scales, negative to avoid."""
  null = networks.null_cond
  if len(labels) != len(scales):
    raise ValueError(f"compose needs one scale for each label, got {len(scales)} scales and {len(labels)} labels")
  names = names_of(networks.model, networks.classifier)
  numbers = np.array([checks.whole("label", number_of(label, names), -(2**63), 2**63 - 1) for label in labels])
  checks.labels("label", numbers, networks.model.config.num_classes or 0)
  of_all = Partial(_with_others, checks.scale("scale", scale), jnp.array(checks.finite("scales", scales)))
  return Rule(_compose, (guide.compose(null, of_all), jnp.array(numbers)))


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
