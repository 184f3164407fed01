"""The Inception score: how sure a classifier is of each image, and how many classes all images have."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxguide._core import checks
from jaxguide.evaluation.metrics.arrays import check_features


class Score(NamedTuple):
  """The Inception score.

  Args:
    mean: the mean over the splits, from 1 to the number of classes.
    std: the standard deviation over the splits (divided by their number, not by one less). It is that of the score of
      one split.
  """

  mean: float
  std: float


def inception_score(logits: npt.ArrayLike, splits: int = 10, seed: int | None = None) -> Score:
  """Compute the Inception score (Salimans et al. 2016, arXiv:1606.03498).

  It is ``exp(mean KL(p(y|x) || p(y)))``, where ``p(y)`` is the mean of ``p(y|x)`` over a split of the samples; the
  score is the mean over the splits. Its expectation grows with the size of a split, so compare only scores of equally
  large splits.

  The programs in use differ. torch-fidelity shuffles the samples first (here the same with ``seed=2020``, its default)
  and makes 10 splits. OpenAI's evaluator does not shuffle; its splits have 5,000 samples in the order of the file, so
  that 50,000 samples make 10, and it gives the mean alone. Samples that are sorted by class have a lower score
  unshuffled, since a split then has few classes.

  Args:
    logits: shape (n, k), before the softmax, of n samples and k classes.
    splits: the number of splits, from 1 to n.
    seed: shuffles the samples, from 0 to 2^32 - 1; None leaves them in order.

  Raises:
    ValueError: if the logits are not finite real numbers of that shape, or there are more splits than samples.

  >>> inception_score(100 * np.eye(4), splits=1)  # sure of each sample, and all four classes are there
  Score(mean=4.0, std=0.0)
  """
  logits = check_features("logits", logits, least=1)
  n = len(logits)
  splits = checks.at_least("splits", splits, 1)
  if splits > n:
    raise ValueError(f"splits must be at most the number of samples, {n}, got {splits}")
  order = np.arange(n)
  if seed is not None:
    # NumPy never changes the numbers of RandomState, and torch-fidelity uses them.
    order = np.random.RandomState(checks.whole("seed", seed, 0, 2**32 - 1)).permutation(n)
  scores = []
  for i in range(splits):
    part = logits[order[i * n // splits : (i + 1) * n // splits]].astype(np.float64)
    part -= part.max(1, keepdims=True)
    log_p = part - np.log(np.exp(part).sum(1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(0)
    # A class that no sample can have gives 0 log 0, which is 0.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))
    scores.append(np.exp((p * (log_p - log_marginal)).sum(1).mean()))
  return Score(float(np.mean(scores)), float(np.std(scores)))
