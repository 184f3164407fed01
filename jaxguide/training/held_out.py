r"""A classifier of noisy examples on held-out data, by noise level: accuracy, likelihood and calibration.

`evaluate` adds noise of several levels to held-out examples and classifies them. The noise of an example depends on the
key, the example's position and the level alone, so two evaluations of the same data differ by the parameters only.

The calibration error is the expected calibration error of Guo et al. (2017, arXiv:1706.04599, eq. 3): examples are
grouped by their confidence, the probability of the predicted class, into `CONFIDENCE_BINS` bins :math:`B_m` of equal
width, and

.. math:: \text{ECE} = \sum_m \frac{|B_m|}{n} |\text{acc}(B_m) - \text{conf}(B_m)|
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide import schedules
from jaxguide._core import checks, keys
from jaxguide._core.typing import ArrayLike, Key, PyTree
from jaxguide.denoisers.network import ClassifierLogProb
from jaxguide.denoisers.scaling import coefficients
from jaxguide.distributed.placing import Placement
from jaxguide.models.config import ModelConfig
from jaxguide.models.networks import CLASSIFIER

CONFIDENCE_BINS = 15
"""The number of confidence bins of the calibration error, as in Guo et al."""

BATCH_SIZE = 256


class Levels(NamedTuple):
  """What a classifier does at each of k noise levels. All arrays are float64 of shape (k,), lowest level first."""

  sigmas: np.ndarray
  """The noise levels."""

  accuracy: np.ndarray
  """The share of examples, from 0 to 1, whose most probable class is their label."""

  nll: np.ndarray
  """The mean negative log-likelihood of the labels, in nats. A uniform guess has ``log(classes)``."""

  calibration_error: np.ndarray
  """The expected calibration error, from 0 to 1."""

  confidence: np.ndarray
  """The mean probability of the most probable class. Above the accuracy, the classifier is overconfident."""

  num: int
  """The number of examples at each level."""

  @property
  def mean_nll(self) -> float:
    """The mean of ``nll`` over the levels. For levels from `levels_of` it estimates the loss of the training."""
    return float(self.nll.mean())


def levels_of(noise_levels: schedules.NoiseLevels, bins: int = 8) -> np.ndarray:
  """Return the levels in the middle of ``bins`` parts of equal probability of a distribution of noise levels.

  Args:
    noise_levels: the distribution, such as that of the training.
    bins: the number of levels, at least 1.

  Returns:
    (bins,) increasing levels.

  >>> levels_of(schedules.LogSNR(-2.0, 2.0), 4).round(3).tolist()  # log sigma is uniform in [-1, 1]
  [0.472, 0.779, 1.284, 2.117]
  """
  checks.schedule(noise_levels, "quantile")
  count = checks.at_least("bins", bins, 1)
  return np.asarray(noise_levels.quantile((np.arange(count) + 0.5) / count), np.float64)


def evaluate(
  model: ModelConfig,
  params: PyTree,
  data: Any,
  key: Key,
  bins: int | Sequence[float] | np.ndarray = 8,
  *,
  noise_levels: schedules.NoiseLevels | None = None,
  batch_size: int = BATCH_SIZE,
  place: Placement | None = None,
) -> Levels:
  """Measure a classifier on held-out data at several noise levels.

  Every example is classified at every level, so the cost is the number of levels times one pass over the data. One
  batch at a time is in memory. The network runs without dropout.

  Args:
    model: the configuration of the classifier.
    params: its parameters; other collections than ``params`` are ignored.
    data: a dataset, or an iterable of batches ``(examples, labels, ...)`` with examples as the dataset stores them.
      All batches have the size of the first, but the last one may be smaller.
    key: the key of the noise; the same key gives the same noise.
    bins: the number of levels, at the middle of equally probable parts of ``noise_levels``; or the levels themselves,
      (k,) above 0.
    noise_levels: the distribution of the levels in the training. The default is the model's noise schedule, within its
      ``noise_range``.
    batch_size: the largest number of examples at a time, if ``data`` is a dataset.
    place: the placement on a mesh, over whose devices each batch is divided. The default is the first device.

  Raises:
    ValueError: if the model is not a classifier, if there are no examples, if a label is missing or not one of the
      classes, or if a level is not above 0.
  """
  if model.role is not CLASSIFIER:
    raise ValueError(f"held-out accuracy is for a classifier, but the model is a {model.network}")
  sigmas = _sigmas(model, bins, noise_levels)
  parts = 1 if place is None else place.parts
  params = {"params": params["params"]}
  log_prob = CLASSIFIER.function(model, params if place is None else place.copies(params))
  key = keys.threefry(key)
  total, first, size = np.zeros((len(sigmas), 1 + 2 * CONFIDENCE_BINS)), 0, None
  for examples, stored_labels in _batches(data, batch_size):
    if stored_labels is None:
      raise ValueError("held-out examples need labels, and these have none: give labelled data")
    labels = checks.labels("label", np.asarray(stored_labels), model.num_classes or 0).astype(np.int32)
    size = -(-len(labels) // parts) * parts if size is None else size
    # A smaller last batch is filled with copies of its last example, which do not count.
    rows = np.minimum(np.arange(size), len(labels) - 1)
    weight = (np.arange(size) < len(labels)).astype(np.float32)
    x0 = model.data.encode(np.asarray(examples)[rows])
    batch, levels = (x0, labels[rows], weight), (jnp.asarray(sigmas, x0.dtype), key, np.int32(first))
    if place is not None:
      batch, levels = place.rows(batch), place.copies(levels)
    total += np.asarray(_sums(log_prob, *batch, *levels), np.float64)
    first += len(labels)
  if not first:
    raise ValueError("there are no held-out examples to evaluate the classifier on: give at least one")
  nll, hits, confidence = total[:, 0], total[:, 1 : 1 + CONFIDENCE_BINS], total[:, 1 + CONFIDENCE_BINS :]
  return Levels(
    sigmas=sigmas,
    accuracy=hits.sum(1) / first,
    nll=nll / first,
    calibration_error=np.abs(hits - confidence).sum(1) / first,
    confidence=confidence.sum(1) / first,
    num=first,
  )


def _sigmas(model: ModelConfig, bins: Any, noise_levels: schedules.NoiseLevels | None) -> np.ndarray:
  if np.ndim(bins):
    if noise_levels is not None:
      raise ValueError("noise_levels gives the levels for a number of bins, but bins has the levels: leave out one")
    return np.sort(checks.above("each of bins", checks.finite("bins", np.asarray(bins, np.float64)), 0))
  if noise_levels is None:
    noise_levels = model.noise_schedule
    if model.noise_range is not None:
      noise_levels = schedules.Truncated(noise_levels, *model.noise_range)
  return levels_of(noise_levels, bins)


def _batches(data: Any, batch_size: int) -> Iterator[tuple[Any, Any]]:
  """Yield examples and labels, from a dataset in its order or from an iterable of batches."""
  if not hasattr(data, "example"):
    batches: Iterable[Any] = data
    for batch in batches:
      yield batch[0], batch[1]
    return
  size = checks.at_least("batch_size", batch_size, 1)
  for first in range(0, len(data), size):
    rows = range(first, min(first + size, len(data)))
    examples, labels = zip(*(data.example(row, np.random.default_rng(row)) for row in rows), strict=True)
    yield np.stack(examples), None if labels[0] is None else np.asarray(labels)


@jax.jit
def _sums(
  log_prob: ClassifierLogProb,
  x0: jax.Array,
  labels: jax.Array,
  weight: jax.Array,
  sigmas: jax.Array,
  key: Key,
  first: ArrayLike,
) -> jax.Array:
  """Return sums over a batch, for each level: the NLL, and by confidence bin the hits and the confidences."""
  keys_of_rows = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(x0)))

  def at_level(level_and_sigma):
    level, sigma = level_and_sigma
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, level), x0.shape[1:], x0.dtype))
    _, _, c_in, c_noise = coefficients(log_prob.scaling, sigma)
    x = c_in * (x0 + sigma * noise(keys_of_rows))
    logits = log_prob.apply(log_prob.params, x.astype(x0.dtype), jnp.full(len(x0), c_noise))
    log_probs = jax.nn.log_softmax(logits.astype(x0.dtype))
    nll = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    confidence = jnp.exp(log_probs.max(1))
    # The m-th bin is ((m - 1) / M, m / M], as in the paper.
    bins = jnp.clip(jnp.ceil(confidence * CONFIDENCE_BINS).astype(int) - 1, 0, CONFIDENCE_BINS - 1)
    by_bin = weight[:, None] * jax.nn.one_hot(bins, CONFIDENCE_BINS, dtype=x0.dtype)
    hits = (logits.argmax(1) == labels).astype(x0.dtype)
    return jnp.concatenate([jnp.sum(weight * nll)[None], hits @ by_bin, confidence @ by_bin])

  return jax.lax.map(at_level, (jnp.arange(len(sigmas)), sigmas))
