r"""The gradient of a noisy classifier, by noise level: its norm, and how far it agrees with a diffusion model.

A diffusion model with a null class implies a classifier by Bayes' rule (Ho & Salimans 2021, arXiv:2207.12598, section
3.1). Its gradient is

.. math::
  \nabla_x \log p(y | x; \sigma) = s(x, y) - s(x) = \frac{D(x, y) - D(x, \varnothing)}{\sigma^2}

A classifier of noisy examples that is exact has the same gradient, if the diffusion model is exact too.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide import guidance, sampling, schedules, solvers
from jaxguide._core import checks, keys
from jaxguide._core.typing import ArrayLike, Denoiser, Key, LogProb, PyTree, x0_of
from jaxguide.models.model import Model

QUARTILES = (25, 50, 75)


class Gradients(NamedTuple):
  """The input gradient of a classifier at each of k noise levels, lowest first. Arrays are float64.

  The columns of (k, 3) arrays are the lower quartile, the median and the upper quartile over the examples.
  """

  sigmas: np.ndarray
  """(k,) the noise levels."""

  norm: np.ndarray
  """(k, 3) the norm of ``∇ log p(label | x)``, in units of one over x0."""

  implied_norm: np.ndarray | None
  """(k, 3) the norm of the diffusion model's implied gradient; None without a diffusion model."""

  cosine: np.ndarray | None
  """(k, 3) the cosine between the two gradients; 0 where one of them is 0. None without a diffusion model."""

  dimension: int
  """The number of elements of an example. Random directions have cosines of about ``±1 / sqrt(dimension)``."""

  num: int
  """The number of examples at each level."""


def gradients(
  log_prob: LogProb,
  x0: ArrayLike,
  labels: ArrayLike,
  key: Key,
  sigmas: Sequence[float] | np.ndarray,
  *,
  denoise: Denoiser | None = None,
  null_cond: PyTree = None,
  batch_size: int = 64,
) -> Gradients:
  """Measure the gradient of a classifier with respect to noisy examples, for their true labels.

  Args:
    log_prob: the classifier, a pytree.
    x0: (n, *shape) clean examples, floats.
    labels: (n,) whole numbers.
    key: the key of the noise. The noise of an example depends on the key, its position and the level alone.
    sigmas: (k,) noise levels above 0.
    denoise: a conditional diffusion model, a pytree; None to measure the classifier alone.
    null_cond: the null label of ``denoise``.
    batch_size: the largest number of examples at a time.

  Raises:
    ValueError: if there are no examples, a level is not above 0, or ``denoise`` is given without ``null_cond``.

  >>> from jaxguide import mixtures
  >>> ring, labels = mixtures.ring(4), jnp.arange(8) % 4
  >>> exact = gradients(
  ...   ring.log_prob, ring.means[labels], labels, jax.random.key(0), [0.3, 1.0], denoise=ring.denoiser, null_cond=4
  ... )
  >>> bool((exact.cosine > 0.999).all())
  True
  """
  if denoise is not None and null_cond is None:
    raise ValueError("the implied classifier needs a null label: give the null_cond of the diffusion model")
  levels = np.sort(checks.above("each of sigmas", checks.finite("sigmas", np.asarray(sigmas, np.float64)), 0))
  x0, labels = np.asarray(x0), np.asarray(labels, np.int32)
  if not len(x0):
    raise ValueError("there are no examples to take gradients at: give at least one")
  size, key = min(len(x0), checks.at_least("batch_size", batch_size, 1)), keys.threefry(key)
  parts = []
  for first in range(0, len(x0), size):
    # The last batch is filled with copies of its last example, so that all batches have one shape.
    rows = np.minimum(np.arange(first, first + size), len(x0) - 1)
    at = jnp.asarray(levels, x0.dtype)
    part = _per_example(log_prob, denoise, null_cond, x0[rows], labels[rows], at, key, jnp.asarray(rows))
    parts.append([np.asarray(values)[:, : len(x0) - first] for values in part])
  norm, *others = (
    np.percentile(np.concatenate(values, axis=1).astype(np.float64), QUARTILES, axis=1).T
    for values in zip(*parts, strict=True)
  )
  implied_norm, cosine = others or (None, None)
  return Gradients(levels, norm, implied_norm, cosine, int(np.prod(x0.shape[1:])), len(x0))


@jax.jit
def _per_example(log_prob, denoise, null_cond, x0, labels, sigmas, key, rows):
  """Return (levels, n) arrays: the norm, and with a denoiser the norm of its gradient and the cosine."""

  def of_one(x0, label, row, level, sigma):
    noise_key = jax.random.fold_in(jax.random.fold_in(key, row), level)
    x = x0 + sigma * jax.random.normal(noise_key, x0.shape, x0.dtype)
    gradient = jax.grad(log_prob)(x, sigma, label)
    norm = jnp.sqrt(jnp.sum(jnp.square(gradient)))
    if denoise is None:
      return (norm,)
    null = jnp.asarray(null_cond, label.dtype)
    implied = (x0_of(denoise(x, sigma, label)) - x0_of(denoise(x, sigma, null))) / sigma**2
    implied_norm = jnp.sqrt(jnp.sum(jnp.square(implied)))
    product = norm * implied_norm
    return norm, implied_norm, jnp.where(product > 0, jnp.sum(gradient * implied) / product, 0)

  def at_level(level_and_sigma):
    return jax.vmap(of_one, (0, 0, 0, None, None))(x0, labels, rows, *level_and_sigma)

  return jax.lax.map(at_level, (jnp.arange(len(sigmas)), sigmas))


def guided_samples(
  denoiser: Model,
  classifier: Model,
  labels: np.ndarray,
  scales: Sequence[float],
  key: Key,
  *,
  steps: int = 25,
  batch_size: int = 64,
) -> Iterator[tuple[float, np.ndarray]]:
  """Sample with classifier guidance at several scales, from the same noise.

  The classifier guides the unconditional model, where the diffusion model has a null label or no classes; else the
  conditional one. Before the guidance x0 is clipped to its range, as in ``jaxguide sample``.

  Yields:
    The scale, and (n, *image_shape) stored examples, such as uint8 pixels.
  """
  config = denoiser.config
  sigma_min, sigma_max = level_ends(denoiser)
  rules = []
  if denoiser.null_cond is not None or config.num_classes is None:
    rules.append(guidance.unconditional(denoiser.null_cond))
  if config.data.bound is not None:
    rules.append(guidance.clip_x0(config.data.bound))
  for scale in scales:
    guided = guidance.chain(*rules, guidance.classifier(classifier.log_prob, float(scale)))(denoiser.denoiser)
    x: Any = sampling.sample_batch(
      guided,
      key,
      np.asarray(labels, np.int32),
      shape=config.image_shape,
      sigmas=schedules.karras(steps, sigma_min, sigma_max),
      solver=solvers.DPMpp2M(),
      batch_size=batch_size,
    )
    yield float(scale), config.data.decode(x)


def level_ends(model: Model, low: float = 0.01, high: float = 80.0) -> tuple[float, float]:
  """Return the least and the largest noise level at which a model is of use: within its steps or its noise range."""
  schedule, levels = model.config.noise_schedule, model.config.noise_range
  if isinstance(schedule, schedules.Table):
    sigmas = np.asarray(schedule.sigmas, np.float64)
    low, high = max(low, float(sigmas[0])), min(high, float(sigmas[-1]))
  if levels is not None:
    low, high = max(low, levels[0]), min(high, levels[1])
  return low, high
