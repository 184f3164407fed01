r"""The variational bound of the discrete process: bits per dimension, and the losses that train a learned variance.

Ho et al. (2020, arXiv:2006.11239, eq. 5) bound the negative log-likelihood by

.. math:: L = L_T + \sum_{t > 0} KL(q(x_{t-1} | x_t, x_0) \| p(x_{t-1} | x_t)) - \log p(x_0 | x_1)

Every term here is in bits per dimension. A divergence does not depend on the units of ``x``, so the terms equal those
of the papers, although ``x = x0 + sigma eps`` here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxguide._core import checks, keys
from jaxguide._core.typing import (
  Array,
  ArrayLike,
  Denoiser,
  Example,
  Float,
  Int,
  Key,
  Leaf,
  Prediction,
  PyTree,
  Scalar,
  x0_of,
)
from jaxguide.denoisers.losses import clean, drop_cond, stratified_uniform, wide
from jaxguide.denoisers.network import split_variance
from jaxguide.denoisers.scaling import Scaling, coefficients
from jaxguide.schedules import Table
from jaxguide.schedules.posterior import posterior_mean, reverse_variance
from jaxguide.schedules.tables import check_table

LOSSES = ("mse", "rescaled_mse", "kl", "rescaled_kl")


def normal_kl(mean: Leaf, log_variance: Leaf, other_mean: Leaf, other_log_variance: Leaf) -> Leaf:
  """KL divergence between two normal distributions, element by element, in nats.

  >>> float(normal_kl(1.0, 0.0, 0.0, 0.0))
  0.5
  """
  difference = log_variance - other_log_variance
  return 0.5 * (jnp.expm1(difference) - difference + jnp.square(mean - other_mean) * jnp.exp(-other_log_variance))


def discretized_gaussian_log_likelihood(x0: Leaf, mean: Leaf, log_std: Leaf) -> Leaf:
  """Log-probability in nats that a normal variable, rounded to one of 256 levels in [-1, 1], equals ``x0``.

  Ho et al. (2020, arXiv:2006.11239, eq. 13). The intervals of the lowest and the highest level extend to infinity. The
  normal distribution function is Page's approximation by a tanh (1977), as in the published code; its error is 2e-4.

  >>> round(float(jnp.exp(discretized_gaussian_log_likelihood(1.0, 1.0, -5.0))), 2)
  0.72
  """

  def cdf(x):
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

  def log(probability):
    return jnp.log(jnp.maximum(probability, 1e-12))

  above, below = (cdf((x0 - mean + half) * jnp.exp(-log_std)) for half in (1 / 255, -1 / 255))
  inner = jnp.where(x0 > 0.999, log(1 - below), log(above - below))
  return jnp.where(x0 < -0.999, log(above), inner)


def prior_bits(x0: Example, sigma: Scalar) -> Scalar:
  """``L_T`` of one example: the divergence of ``q(x_T | x0)`` from the standard normal, in bits per dimension."""
  alpha_bar = 1 / (1 + jnp.square(sigma))
  return normal_kl(jnp.sqrt(alpha_bar) * x0, jnp.log1p(-alpha_bar), 0.0, 0.0).mean() / math.log(2)


def vb_bits(
  x0: Example,
  x: Example,
  prediction: Example | Prediction,
  sigma: Scalar,
  sigma_next: Scalar,
  sigma_last: Scalar,
  variance: str = "small",
) -> Scalar:
  """The term of the bound for one example and the step from ``sigma`` to ``sigma_next``.

  Args:
    x0: the clean example. It must be on 256 levels in [-1, 1], or the term of the last step has no meaning.
    x: the noisy example.
    prediction: the denoiser's output for ``x``.
    sigma: the level of ``x``.
    sigma_next: the level below. At 0 the term is the negative log-likelihood of ``x0``, otherwise a divergence.
    sigma_last: the level above; ``inf`` if there is none.
    variance: the kind of the step's variance, as in `jaxguide.posterior.reverse_variance`.

  Returns:
    Bits per dimension, a scalar.
  """
  learned = prediction.variance if isinstance(prediction, Prediction) else None
  mean = posterior_mean(x, x0_of(prediction), sigma, sigma_next)
  model_variance = reverse_variance(variance, sigma, sigma_next, sigma_last, learned)
  true_variance = reverse_variance("small", sigma, sigma_next, sigma_last)
  kl = normal_kl(posterior_mean(x, x0, sigma, sigma_next), true_variance.log, mean, model_variance.log)
  nll = -discretized_gaussian_log_likelihood(x0, mean, 0.5 * model_variance.log)
  return jnp.where(sigma_next > 0, kl, nll).mean() / math.log(2)


class BitsPerDim(NamedTuple):
  """The bound of one example and its parts, in bits per dimension.

  Args:
    total: ``prior`` plus the sum of ``vb``.
    prior: the term ``L_T`` of the start.
    vb: (steps,) the term of each step, from the highest noise level down.
    x0_mse: (steps,) mean squared error of ``x0``.
    eps_mse: (steps,) mean squared error of ``eps``.
  """

  total: Leaf
  prior: Leaf
  vb: Leaf
  x0_mse: Leaf
  eps_mse: Leaf


def bits_per_dim(
  denoise: Denoiser, key: Key, x0: Example, sigmas: ArrayLike, cond: PyTree = None, variance: str = "small"
) -> BitsPerDim:
  """The variational bound on one example's negative log-likelihood; ``vmap`` it for more.

  Args:
    denoise: ``(x, sigma, cond) -> x0`` or a `Prediction`. The published figures use `jaxguide.clip_x0`.
    key: a random key for the noise, which is drawn separately for each level.
    x0: a clean example on 256 levels in [-1, 1].
    sigmas: (steps + 1,) levels that decrease and end in 0, for example from `jaxguide.respaced`.
    cond: the example's condition.
    variance: ``small``, ``large`` or ``learned_range``.

  Raises:
    TypeError: if ``key`` is not a random key.
    ValueError: if the grid does not decrease or does not end in 0.

  >>> from jaxguide import mixtures, schedules
  >>> denoise = mixtures.ring(4).denoiser
  >>> table = schedules.table("linear", 1000)
  >>> bits = bits_per_dim(denoise, jax.random.key(0), jnp.ones(2), schedules.respaced(table, 20), 4)
  >>> bits.vb.shape, bool(bits.total > 0)
  ((20,), True)
  """
  x0, key = jnp.asarray(x0), keys.threefry(key)
  checks.sigmas(sigmas)
  sigmas = jnp.asarray(sigmas, x0.dtype)

  def step(_, inputs):
    i, sigma, sigma_next, sigma_last = inputs
    x = x0 + sigma * jax.random.normal(jax.random.fold_in(key, i), x0.shape, x0.dtype)
    prediction = denoise(x, sigma, cond)
    vb = vb_bits(x0, x, prediction, sigma, sigma_next, sigma_last, variance)
    mse = jnp.square(x0_of(prediction) - x0).mean()
    return None, (vb, mse, mse / sigma**2)

  last = jnp.concatenate([jnp.full(1, jnp.inf, sigmas.dtype), sigmas[:-2]])
  _, (vb, x0_mse, eps_mse) = jax.lax.scan(step, None, (jnp.arange(len(last)), sigmas[:-1], sigmas[1:], last))
  prior = prior_bits(x0, sigmas[0])
  return BitsPerDim(prior + vb.sum(), prior, vb, x0_mse, eps_mse)


class Terms(NamedTuple):
  """A loss for each example, and the two terms whose sum it is; a term that the loss does not have is 0."""

  loss: Leaf
  mse: Leaf
  vb: Leaf


def variational_terms(
  params: PyTree,
  apply: Callable[..., Any],
  x0: Float[Array, " n *shape"],
  step: Int[Array, " n"],
  noise: Float[Array, " n *shape"],
  cond: PyTree = None,
  *,
  scaling: Scaling,
  process: Table,
  loss: str = "rescaled_mse",
  variance: str = "learned_range",
) -> Terms:
  """The training losses of the discrete process at given steps with given noise.

  The losses of Nichol & Dhariwal (2021, arXiv:2102.09672, section 3), as in OpenAI's guided-diffusion. Let ``mse`` be
  the squared error of the network's prediction, ``vb`` the term of the bound and ``T`` the number of steps:

  - ``mse``: the loss is ``mse``. With a learned variance it is ``mse + vb``, where ``vb`` trains the variance only.
  - ``rescaled_mse``: the same with ``vb`` times ``T / 1000``. This is the paper's *hybrid* loss with ``λ = 0.001``,
    because ``T`` times one term estimates the bound.
  - ``kl``: the loss is ``vb``, which trains the mean and the variance.
  - ``rescaled_kl``: the loss is ``vb`` times ``T``, an estimate of the bound.

  Args:
    params: the network's parameters.
    apply: ``apply(params, x, c_noise, cond) -> F``, on a batch; twice the channels of ``x`` for a learned variance.
    x0: (n, *shape) clean examples on 256 levels in [-1, 1].
    step: (n,) whole numbers in [0, T-1].
    noise: (n, *shape) standard normal.
    cond: a pytree whose leaves have shape (n, ...), or None.
    scaling: the network's parameterization, which also gives its time input.
    process: the steps: the network's own table, or some of its steps (`jaxguide.schedules.Table.respaced`).
    loss: ``mse``, ``rescaled_mse``, ``kl`` or ``rescaled_kl``.
    variance: ``small``, ``large`` or ``learned_range``.

  Returns:
    `Terms` of shape (n,). ``mse`` is in the units of the network's prediction, ``vb`` in bits per dimension times the
    factor of the loss.

  Raises:
    TypeError: if ``x0`` is not floats, or if ``process`` is not a `Table`.
    ValueError: if the loss or the variance is unknown, or if the output's channels do not fit the variance.
  """
  checks.lookup("loss", loss, dict.fromkeys(LOSSES))
  x0, process = clean(x0), check_table(process)
  sigmas = jnp.asarray(process.sigmas, x0.dtype)
  levels = jnp.concatenate([jnp.zeros(1, x0.dtype), sigmas, jnp.full(1, jnp.inf, x0.dtype)])
  sigma_next, sigma, sigma_last = levels[step], levels[step + 1], levels[step + 2]
  x = x0 + wide(sigma, x0) * noise
  c_skip, c_out, c_in, c_noise = coefficients(scaling, sigma)
  output, learned = split_variance(apply(params, wide(c_in, x) * x, c_noise, cond).astype(x.dtype), x)
  if (learned is not None) != (variance == "learned_range"):
    raise ValueError(
      f"variance {variance!r} does not suit a network {'without' if learned is None else 'with'} a learned variance: "
      "use variance='learned_range' if, and only if, the output has twice the channels of x"
    )
  predicted = wide(c_skip, x) * x + wide(c_out, x) * output
  squared = loss in ("mse", "rescaled_mse")
  mse = vb = jnp.zeros(x0.shape[0], x0.dtype)
  if squared:
    target = (x0 - wide(c_skip, x) * x) / wide(c_out, x)
    mse = jnp.square(output - target).reshape(x0.shape[0], -1).mean(1)
    # The bound trains the variance only; the squared error trains the mean.
    predicted = jax.lax.stop_gradient(predicted)
  if not squared or learned is not None:
    prediction = predicted if learned is None else Prediction(predicted, learned)
    vb = jax.vmap(functools.partial(vb_bits, variance=variance))(x0, x, prediction, sigma, sigma_next, sigma_last)
    vb *= {"mse": 1, "kl": 1, "rescaled_mse": process.num_steps / 1000, "rescaled_kl": process.num_steps}[loss]
  return Terms(mse + vb, mse, vb)


def variational_loss(
  params: PyTree,
  apply: Callable[..., Any],
  key: Key,
  x0: Float[Array, " n *shape"],
  cond: PyTree = None,
  *,
  scaling: Scaling,
  process: Table,
  loss: str = "rescaled_mse",
  variance: str = "learned_range",
  null_cond: PyTree = None,
  p_uncond: ArrayLike = 0.0,
) -> tuple[Scalar, Terms]:
  """The mean of `variational_terms` at random steps: the training loss of a network with a learned variance.

  Args:
    params: the network's parameters; the loss is differentiable in them.
    apply: as in `variational_terms`.
    key: a random key for the dropped conditions, the steps (stratified over the batch) and the noise.
    x0: (n, *shape) clean examples on 256 levels in [-1, 1].
    cond: a pytree whose leaves have shape (n, ...), or None.
    scaling: the network's parameterization, which also gives its time input.
    process: the steps, as in `variational_terms`.
    loss: ``mse``, ``rescaled_mse``, ``kl`` or ``rescaled_kl``.
    variance: ``small``, ``large`` or ``learned_range``.
    null_cond: the condition that replaces a dropped one; needed if ``p_uncond`` is above 0.
    p_uncond: probability of dropping the condition, in [0, 1].

  Returns:
    The loss, a scalar, and the means of the `Terms`.

  >>> from jaxguide import scaling, schedules
  >>> table = schedules.table("cosine", 1000)
  >>> apply = lambda params, x, c_noise, cond: params * jnp.concatenate([x, x], -1)
  >>> loss, terms = variational_loss(
  ...   jnp.asarray(0.0), apply, jax.random.key(0), jnp.zeros((64, 8, 8, 1)), scaling=scaling.eps(table), process=table
  ... )
  >>> bool(abs(terms.mse - 1) < 0.1)  # the network predicts 0, so mse is the variance of the noise
  True
  """
  batch = noisy_steps(key, x0, cond, process=process, null_cond=null_cond, p_uncond=p_uncond)
  terms = variational_terms(params, apply, *batch, scaling=scaling, process=process, loss=loss, variance=variance)
  means = jax.tree.map(jnp.mean, terms)
  return means.loss, means


class NoisySteps(NamedTuple):
  """The random part of `variational_loss`: the arguments of `variational_terms`, with one row for each example."""

  x0: Float[Array, " n *shape"]
  step: Int[Array, " n"]
  noise: Float[Array, " n *shape"]
  cond: PyTree


def noisy_steps(
  key: Key,
  x0: Float[Array, " n *shape"],
  cond: PyTree = None,
  *,
  process: Table,
  null_cond: PyTree = None,
  p_uncond: ArrayLike = 0.0,
) -> NoisySteps:
  """Draw everything random of `variational_loss`: the dropped conditions, the steps and the noise.

  Args:
    key: a random key.
    x0: (n, *shape) clean examples.
    cond: a pytree whose leaves have shape (n, ...), or None.
    process: the steps.
    null_cond: the condition that replaces a dropped one; needed if ``p_uncond`` is above 0.
    p_uncond: probability of dropping the condition, in [0, 1].
  """
  x0 = clean(x0)
  check_table(process)
  drop_key, step_key, noise_key = jax.random.split(key, 3)
  cond = drop_cond(drop_key, cond, null_cond, p_uncond)
  step = process.step(stratified_uniform(step_key, x0.shape[0]))
  return NoisySteps(x0, step, jax.random.normal(noise_key, x0.shape, x0.dtype), cond)
