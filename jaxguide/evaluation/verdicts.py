"""Sentences on a noisy classifier, made from its figures by noise level."""

import math
from typing import NamedTuple

import numpy as np

from jaxguide.evaluation.classifiers import Gradients
from jaxguide.training.held_out import Levels

NEAR_CHANCE = 0.1
"""An accuracy is near chance if it is less than this share of the way from chance to 1."""

WORSE_THAN_GUESSING = 1.05
"""A likelihood is worse than guessing if its logarithm is this many times that of a uniform guess."""

MISCALIBRATED = 0.1
"""A calibration error above this is named."""

GOOD_COSINE, POOR_COSINE = 0.5, 0.2

LENGTH_FACTOR = 2.0
"""Two gradients have about the same length if neither is longer than the other by more than this factor."""


class Verdicts(NamedTuple):
  """A sentence or two on each figure, and what follows from all of them."""

  accuracy: str
  nll: str
  calibration: str
  norm: str
  cosine: str
  summary: str
  useful: np.ndarray
  """(k,) whether guidance at each level is of use, by all figures that there are."""


def verdicts(levels: Levels, gradients: Gradients, *, classes: int, chance: float) -> Verdicts:
  """Judge a classifier by its figures.

  Args:
    levels: accuracy, likelihood and calibration error.
    gradients: norm and cosine of the gradient, at the same levels.
    classes: the number of classes.
    chance: the accuracy of always predicting the most frequent class.

  Raises:
    ValueError: if the two were measured at other levels.
  """
  if not np.allclose(levels.sigmas, gradients.sigmas):
    raise ValueError("levels and gradients must be measured at the same noise levels")
  near_chance = levels.accuracy < chance + NEAR_CHANCE * (1 - chance)
  misleading = levels.nll > WORSE_THAN_GUESSING * math.log(classes)
  if gradients.cosine is None:
    useful = ~near_chance & ~misleading
  else:
    # Where the classifier is nearly certain its gradient is almost 0, and the cosine is one of rounding errors.
    useful = ~misleading & ((gradients.cosine[:, 1] >= POOR_COSINE) | (levels.accuracy > 0.95))
  return Verdicts(
    accuracy=_accuracy(levels, gradients, near_chance, chance),
    nll=_nll(levels, misleading, classes),
    calibration=_calibration(levels),
    norm=_norm(gradients),
    cosine=_cosine(gradients),
    summary=_summary(levels, useful),
    useful=useful,
  )


def where(mask: np.ndarray, sigmas: np.ndarray) -> str:
  """Describe the levels of a mask, which must have at least one.

  >>> where(np.array([False, True, True]), np.array([0.1, 1.0, 10.0]))
  'at sigma 1 and above'
  >>> where(np.array([True, False, True]), np.array([0.1, 1.0, 10.0]))
  'at sigma 0.1 and 10'
  """
  if mask.all():
    return "at every noise level"
  edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
  runs = [(first, last - 1) for first, last in edges.reshape(-1, 2)]
  if len(runs) == 1:
    (first, last), ends = runs[0], [f"{sigma:.2g}" for sigma in sigmas]
    if last == len(sigmas) - 1:
      return f"at sigma {ends[first]} and above"
    if first == 0 and last > 0:
      return f"at sigma {ends[last]} and below"
  texts = [f"{sigmas[i]:.2g}" if i == j else f"{sigmas[i]:.2g} to {sigmas[j]:.2g}" for i, j in runs]
  return "at sigma " + (f"{', '.join(texts[:-1])} and {texts[-1]}" if len(texts) > 1 else texts[0])


def _accuracy(levels: Levels, gradients: Gradients, near_chance: np.ndarray, chance: float) -> str:
  first = f"With the least noise, sigma {levels.sigmas[0]:.2g}, the accuracy is {levels.accuracy[0]:.0%}"
  if not near_chance.any():
    return f"{first}; it is nowhere near chance, which is {chance:.0%}."
  then = "guidance there pushes in no useful direction"
  if gradients.cosine is not None and (gradients.cosine[near_chance, 1] >= GOOD_COSINE).all():
    then = "guidance there decides little, though its direction agrees with the diffusion model's"
  at = where(near_chance, levels.sigmas)
  return f"{first}. It is near chance ({chance:.0%}) {at}: the classifier hardly sees the class, and {then}."


def _nll(levels: Levels, misleading: np.ndarray, classes: int) -> str:
  best = int(np.argmin(levels.nll))
  uniform = math.log(classes)
  if not misleading.any():
    return (
      f"The negative log-likelihood is {levels.mean_nll:.2f} nats on average over the levels, and lowest at sigma "
      f"{levels.sigmas[best]:.2g} ({levels.nll[best]:.2f}). Nowhere is it much worse than a uniform guess "
      f"({uniform:.2f})."
    )
  worst = int(np.argmax(levels.nll))
  return (
    f"The likelihood is worse than that of a uniform guess ({uniform:.2f} nats) {where(misleading, levels.sigmas)}, up "
    f"to {levels.nll[worst]:.2f} nats: the classifier is confident and wrong there, and its gradient misleads. Train "
    "it for longer or on more data, with these levels among its own, or on a part of the levels (noise_range): its "
    "guidance is off outside of them."
  )


def _calibration(levels: Levels) -> str:
  off = levels.calibration_error > MISCALIBRATED
  worst = int(np.argmax(levels.calibration_error))
  if not off.any():
    return (
      f"The calibration error is at most {levels.calibration_error[worst]:.2f}, at sigma {levels.sigmas[worst]:.2g}: "
      "the probabilities can be believed."
    )
  over = off & (levels.confidence > levels.accuracy)
  parts = []
  if over.any():
    parts.append(
      f"The classifier is overconfident {where(over, levels.sigmas)}: it has seen too little noise of this strength, "
      "or too few examples for its size"
    )
  if (off & ~over).any():
    parts.append(
      f"{'The classifier' if not parts else 'It'} is underconfident {where(off & ~over, levels.sigmas)}: it is not "
      "trained to the end"
    )
  return (
    f"{'. '.join(parts)}. The error is largest at sigma {levels.sigmas[worst]:.2g} "
    f"({levels.calibration_error[worst]:.2f})."
  )


def _norm(gradients: Gradients) -> str:
  norm, sigmas = gradients.norm[:, 1], gradients.sigmas
  most = int(np.argmax(norm))
  first = f"The median norm is largest at sigma {sigmas[most]:.2g} ({norm[most]:.2g})."
  if gradients.implied_norm is None:
    return first
  ratio = norm / np.maximum(gradients.implied_norm[:, 1], 1e-30)
  long, short = ratio > LENGTH_FACTOR, ratio < 1 / LENGTH_FACTOR
  parts = [first]
  if not (long | short).all():
    parts.append(f"It is within a factor 2 of the diffusion model's {where(~(long | short), sigmas)}.")
  if short.any():
    parts.append(f"It is less than half of the diffusion model's {where(short, sigmas)}.")
  if long.any():
    parts.append(f"It is more than twice the diffusion model's {where(long, sigmas)}: there a smaller scale would do.")
  return " ".join(parts)


def _cosine(gradients: Gradients) -> str:
  if gradients.cosine is None:
    return "There was no diffusion model with a null class to compare with: give one (--denoiser)."
  cosine, sigmas = gradients.cosine[:, 1], gradients.sigmas
  best = int(np.argmax(cosine))
  good, poor = cosine >= GOOD_COSINE, cosine < POOR_COSINE
  text = f"The median cosine is highest at sigma {sigmas[best]:.2g} ({cosine[best]:.2f})"
  if good.any():
    text += f", and at least {GOOD_COSINE:g} {where(good, sigmas)}"
  else:
    text += (
      f", and nowhere as high as {GOOD_COSINE:g}: the classifier leads elsewhere than the diffusion model's classes"
    )
  if poor.any():
    text += f". It is below {POOR_COSINE:g} {where(poor, sigmas)}"
  return text + "."


def _summary(levels: Levels, useful: np.ndarray) -> str:
  if not useful.any():
    return (
      "Guidance by this classifier is of use at no noise level: train it for longer, on more data, or on the noise "
      "levels of the sampling."
    )
  if useful.all():
    return "Guidance by this classifier is of use at every noise level."
  options = []
  if not useful[0]:
    options.append(f"sigma_lo={0.99 * levels.sigmas[useful][0]:.3g}")
  if not useful[-1]:
    options.append(f"sigma_hi={1.01 * levels.sigmas[useful][-1]:.3g}")
  advice = f" (--guidance classifier:{','.join(options)})" if options else ""
  return f"Guidance by this classifier is of use {where(useful, levels.sigmas)}{advice}."
