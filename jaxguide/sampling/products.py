r"""Sampling from ``p(x) p(y|x)^γ``: guided particles with weights and resampling (sequential Monte Carlo).

Guidance walks along the scores of

.. math:: \pi_\sigma(x) \propto \prod_i p_i(x; \sigma)^{a_i}, \quad \sum_i a_i = 1.

For classifier-free guidance the powers are ``(1 - γ, γ)``, of ``p(x; σ)`` and ``p(x|y; σ)``. ``π_σ`` is not ``π_0``
with noise, so a walk along its scores does not end in ``π_0``. The error is known. With ``x = x0 + sigma eps`` each
``p_i`` obeys the heat equation ``∂p / ∂σ² = Δp / 2``. So with its score ``s_i``

.. math::
  \frac{\partial \log p_i}{\partial \sigma^2} = \tfrac12 (\Delta \log p_i + \|s_i\|^2), \quad
  \frac{\partial \log \pi_\sigma}{\partial \sigma^2}
    = \tfrac12 \Big(\Delta \log \pi_\sigma + \sum_i a_i \|s_i\|^2\Big) + \text{const}

while a walk along ``s = Σ a_i s_i``, with any amount of noise, follows ``(Δ log π_σ + |s|²) / 2``. The difference of
the two changes the weight of a particle (the Feynman-Kac corrector of Skreta et al. 2025, arXiv:2503.02819, for a
geometric average; here for any number of densities):

.. math::
  \mathrm{d} \log w = -\tfrac12 \sum_i a_i \|s_i - s\|^2 \, |\mathrm{d}(\sigma^2)|
    = -\sum_i a_i \frac{\|D_i - D\|^2}{\sigma^2} \, |\mathrm{d} \log \sigma|,
  \quad D = \sum_i a_i D_i

For the powers ``(1 - γ, γ)`` this is ``½ γ (γ - 1) |s_y - s_∅|² |d(σ²)|``. The particles are resampled by these weights
during the walk; this is sequential Monte Carlo, as in twisted diffusion sampling (Wu et al. 2023, arXiv:2306.17775).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxguide._core import checks, keys, struct
from jaxguide._core.typing import (
  Array,
  ArrayLike,
  Denoiser,
  Example,
  Float,
  Int,
  Key,
  Leaf,
  LogProb,
  Prediction,
  PyTree,
  Scalar,
  Solver,
  map_x0,
  scale_at,
  x0_of,
)
from jaxguide.denoisers.conditions import check_cond
from jaxguide.distributed.rows import for_particles, take_rows
from jaxguide.guidance import Rule, classifier
from jaxguide.guidance import state as guidance_state
from jaxguide.guidance.mixing import Both
from jaxguide.sampling.keys import sample_keys
from jaxguide.solvers.base import Conditioned


@struct.dataclass
class Product:
  """A product of powers of densities that each have a denoiser. Make one with `tempered`, `product` and the like.

  As a function it is the guided denoiser ``Σ a_i D_i``. `jaxguide.sample` with this denoiser does not sample the
  product; `sample_product` does.
  """

  denoise_all: Leaf
  powers: tuple[Leaf, ...]

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree = None) -> Example | Prediction:
    """Return the guided ``x0``, with the learned variance of the last denoiser if it has one."""
    return self.evaluate(x, sigma, cond)[0]

  def evaluate(self, x: Example, sigma: Scalar, cond: PyTree = None) -> tuple[Example | Prediction, Scalar]:
    """Return the guided ``x0`` and the rate ``-d log w / d log sigma`` of the weight."""
    predictions = self.denoise_all(x, sigma, cond)
    parts = [(scale_at(power, sigma, x), x0_of(part)) for power, part in zip(self.powers, predictions, strict=True)]
    x0 = functools.reduce(operator.add, [power * x0_i for power, x0_i in parts])
    # From differences of x0, not of scores: at high noise the scores are large and nearly equal.
    spread = functools.reduce(operator.add, [power * jnp.sum(((x0_i - x0) / sigma) ** 2) for power, x0_i in parts])
    return map_x0(lambda _: x0, predictions[-1]), -spread


class Population(NamedTuple):
  """A record of the weights.

  Args:
    ess: (steps,) the effective sample size after each step, ``(Σ w)² / Σ w²`` before any resampling, from 1 to the
      number of particles.
    resampled: (steps,) whether the particles were resampled after the step; always after the last one.
    log_normalizer: an estimate of ``log ∫ Π_i p_i(x)^{a_i} dx``.
  """

  ess: Leaf
  resampled: Leaf
  log_normalizer: Leaf


def product(denoisers: Sequence[Denoiser], powers: ArrayLike | Sequence[ArrayLike]) -> Product:
  """Make the target ``Π_i p_i(x)^{a_i}`` from densities that each have a denoiser.

  Autoguidance is ``product((weak, good), (1 - γ, γ))``. Two conditions at once are
  ``product((uncond, one, two), (1 - γ_1 - γ_2, γ_1, γ_2))``. The integral of the product must be finite; this is not
  checked. For ``(1 - γ, γ)`` and ``γ ≥ 0`` it is finite if ``p_2 / p_1`` is bounded, as ``p(x|y) / p(x)`` is.

  Args:
    denoisers: pytrees. All receive the same condition.
    powers: a_i, one for each denoiser, of any sign; their sum is 1.

  Raises:
    ValueError: if the number of powers is not that of the denoisers, if a power is not finite, or if the sum is not 1.

  >>> double = product((lambda x, sigma, cond: x, lambda x, sigma, cond: x * cond), (-1.0, 2.0))
  >>> x0, rate = double.evaluate(jnp.asarray(1.0), jnp.asarray(0.5), 3.0)
  >>> float(x0), float(rate)  # -1 + 2 * 3, and 2 * (2 - 1) * (3 - 1)² / 0.5²
  (5.0, 32.0)
  """
  denoisers, powers = tuple(denoisers), tuple(checks.finite("powers", power) for power in powers)  # type: ignore[union-attr]
  if not denoisers or len(denoisers) != len(powers):
    raise ValueError(f"there must be one power for each denoiser, got {len(powers)} for {len(denoisers)}")
  if checks.is_concrete(powers) and (np.abs(np.sum(np.asarray(powers), 0) - 1) > 1e-5).any():
    raise ValueError(f"powers must have the sum 1, got {powers}: change the power of the unconditional denoiser")
  return Product(Partial(_evaluate_all, denoisers), powers)


def _evaluate_all(denoisers, x, sigma, cond):
  return [denoise(x, sigma, cond) for denoise in denoisers]


def tempered(denoise: Denoiser, null_cond: PyTree, scale: ArrayLike) -> Product:
  """Make the target ``p(x) p(y|x)^γ``, that is ``p(x)^(1 - γ) p(x|y)^γ``, from a conditional denoiser.

  `jaxguide.classifier_free` follows the same scores.

  Args:
    denoise: a denoiser trained with and without the condition; both evaluations run as one batch.
    null_cond: the condition that means "no condition".
    scale: γ, the power: 0 is unconditional and 1 is conditional. Below 0 the density may not exist.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> guided = tempered(lambda x, sigma, cond: x * cond, 0, 3.0)
  >>> float(guided(jnp.asarray(2.0), jnp.asarray(1.0), 1.0))  # as classifier_free
  6.0
  """
  scale = checks.finite("scale", scale)
  return Product(Both(denoise, null_cond), (1 - scale, scale))


def tempered_by_classifier(denoise: Denoiser, log_prob: LogProb, scale: ArrayLike) -> Product:
  """Make the target ``p(x) p(y|x)^γ`` from an unconditional denoiser and a classifier of noisy examples.

  `jaxguide.classifier` follows the same scores. The samples are exact only if the denoiser and the classifier are exact
  at every noise level.

  Args:
    denoise: the denoiser of ``p(x)``. Make a conditional one unconditional with ``unconditional(null_cond)(denoise)``.
    log_prob: ``(x, sigma, cond) -> log p(cond | x; sigma)``.
    scale: γ, as in `tempered`.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> target = tempered_by_classifier(lambda x, sigma, cond: x, lambda x, sigma, cond: -0.5 * (x - cond) ** 2, 2.0)
  >>> float(target(jnp.asarray(0.0), jnp.asarray(0.5), 1.0))  # as classifier
  0.5
  """
  scale = checks.finite("scale", scale)
  return Product(Partial(_with_classifier, denoise, log_prob), (1 - scale, scale))


def _with_classifier(denoise, log_prob, x, sigma, cond):
  bare = denoise(x, sigma, cond)
  return bare, classifier(log_prob, 1.0)(lambda *_: bare)(x, sigma, cond)


def sample_product(
  target: Product,
  key: Key,
  num_particles: int,
  shape: Sequence[int],
  sigmas: ArrayLike,
  solver: Solver,
  cond: PyTree = None,
  threshold: ArrayLike = 0.5,
  devices: Any = None,
) -> tuple[Float[Array, " num_particles *shape"], Population]:
  """Draw a population of examples from a product of powers of densities, such as ``p(x) p(y|x)^γ``.

  The particles walk like the samples of `jaxguide.sample`, with the same number of evaluations. (`EDMStochastic` takes
  one more in each step, because it evaluates after it has added noise.) The weights are integrated by the trapezoid
  rule in ``log sigma``. The particles are resampled when the effective sample size is below the threshold, and once
  more at the end, so the returned particles have equal weights. The particles and the normalizer are exact in the limit
  of many particles and small steps.

  The particles are not independent: those with a common ancestor are similar. A solver with noise, such as ``DDIM(1)``,
  `DDPM` or `DPMpp2MSDE`, separates copies again. More noise keeps the weights more even but needs smaller steps;
  ``DPMpp2MSDE(eta=2)`` is a good choice for a large ``γ``. With a deterministic solver copies stay equal, so use
  ``threshold=0``, which resamples at the end only.

  The walk starts from ``sigmas[0] * eps``, and no weight corrects this approximation. So the first level must be much
  larger than the distances in the data times γ.

  Args:
    target: from `tempered`, `tempered_by_classifier` or `product`. The powers are leaves, so a sweep over γ is one
      program.
    key: particle ``i`` uses the key ``fold_in(key, i)``, as sample ``i`` of `jaxguide.sample_batch` does.
    num_particles: number of particles; all are in memory at the same time, on one device or on all ``devices``.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0. The particles have their dtype.
    solver: see `jaxguide.solvers`. It must add as much noise as it removes (``s_noise`` 1).
    cond: the condition of all particles. ``vmap`` over conditions gives a population for each.
    threshold: the effective sample size, as a fraction of the particles in [0, 1], below which they are resampled.
    devices: the devices over which the particles are divided: a list, a mesh, or a `jaxguide.distributed.MeshConfig` or
      its text. The particles are the same on any number of devices. To resample, each device passes its particles on to
      the next one until all have seen them, so no device needs memory for more than two parts of the population. By
      default the particles are on one device, or where ``jit`` puts them.

  Returns:
    The particles, and the record of their weights. If a weight is not finite, all particles are NaN.

  Raises:
    ValueError: if the devices do not divide the particles; if the grid, a number or the threshold is bad, if a label is
      outside the classes, if the target contains a guidance with momentum, or if the solver has its own classifier (its
      shift is not part of the weights) or an ``s_noise`` other than 1.
    TypeError: if ``target`` is not a `Product`, or ``solver`` is not a solver.

  >>> from jaxguide import mixtures, schedules, solvers
  >>> target = tempered(mixtures.ring(4).denoiser, null_cond=4, scale=2.0)
  >>> x, population = sample_product(
  ...   target, jax.random.key(0), 100, (2,), schedules.karras(20), solvers.DDPM(), cond=1
  ... )
  >>> x.shape, population.ess.shape, bool(population.ess.min() > 10)
  ((100, 2), (20,), True)
  """
  checks.sigmas(sigmas)
  _check_target(target)
  check_cond((target, checks.solver(solver)), checks.cond(cond))
  _check_solver(solver)
  shape, key = checks.shape("shape", shape), keys.threefry(key)
  num_particles = checks.at_least("num_particles", num_particles, 1)
  threshold = checks.in_range("threshold", threshold, 0, 1)
  sigmas = jnp.asarray(sigmas)
  if not jnp.issubdtype(sigmas.dtype, jnp.floating):
    sigmas = sigmas.astype(float)
  start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(sample_keys(key, num_particles))
  # An index above MAX_INDEX, which no particle has.
  resample_key = jax.random.fold_in(key, np.uint32(2**32 - 1))
  place = None if devices is None else for_particles(num_particles, devices)
  spread, together = (lambda tree: tree, lambda tree: tree) if place is None else (place.constrained, place.joined)
  start_keys, step_keys = spread((start_keys, step_keys))
  x = sigmas[0] * jax.vmap(lambda key: jax.random.normal(key, tuple(shape), sigmas.dtype))(start_keys)

  def evaluate(state, sigma):
    return jax.vmap(lambda x: target.evaluate(x, sigma, cond))(state.x)

  def resample_if(condition, i, log_weights, particles):
    def resampled(particles):
      ancestors = resample(jax.random.fold_in(resample_key, i), log_weights)
      return take_rows(particles, ancestors, place)

    return jax.lax.cond(condition, resampled, lambda particles: particles, particles)

  def move(i, state, prediction, sigma, sigma_next):
    def move_one(state, prediction, key):
      denoise = _Evaluated(target, cond, state.x, sigma, prediction)
      return solver.step(denoise, state, sigma, sigma_next, jax.random.fold_in(key, i))

    return spread(jax.vmap(move_one)(state, prediction, step_keys))

  def step(carry, inputs):
    state, log_weights, last_rate, log_normalizer = carry
    i, sigma_last, sigma, sigma_next = inputs
    prediction, rate = evaluate(state, sigma)
    log_weights += together(jnp.log(sigma_last / sigma) * (last_rate + rate) / 2)
    ess = effective_sample_size(log_weights)
    too_low = ess < jnp.asarray(threshold, ess.dtype) * num_particles
    state, prediction, rate = resample_if(too_low, i, log_weights, (state, prediction, rate))
    log_normalizer += jnp.where(too_low, log_mean_exp(log_weights), 0)
    log_weights = jnp.where(too_low, 0, log_weights)
    return (move(i, state, prediction, sigma, sigma_next), log_weights, rate, log_normalizer), (ess, too_low)

  zeros = jnp.zeros(num_particles, x.dtype)
  carry = jax.vmap(solver.init)(x), zeros, zeros, jnp.zeros((), x.dtype)
  # In the first step sigma_last is sigma, so the weights do not change.
  levels = (jnp.arange(sigmas.shape[0] - 1), jnp.append(sigmas[:1], sigmas[:-2]), sigmas[:-1], sigmas[1:])
  (state, log_weights, rate, log_normalizer), (ess, resampled) = jax.lax.scan(step, carry, levels)

  # The last step, to 0, is infinite in log sigma but finite in sigma². With constant scores it adds half the rate.
  log_weights += together(rate / 2)
  log_normalizer += log_mean_exp(log_weights)
  ancestors = resample(jax.random.fold_in(resample_key, sigmas.shape[0] - 1), log_weights)
  x = take_rows(state.x, ancestors, place)
  population = Population(
    ess=jnp.append(ess[1:], effective_sample_size(log_weights)),
    resampled=jnp.append(resampled[1:], True),
    log_normalizer=log_normalizer,
  )
  # `resample` gives valid indices even for weights that are not finite, which would hide the error.
  return jnp.where(jnp.isfinite(log_normalizer), x, jnp.nan), population


def _check_target(target: Any) -> None:
  """Raise an error unless ``target`` is a `Product` without momentum."""
  if isinstance(target, Rule):
    raise TypeError("the target must be made by tempered, tempered_by_classifier or product, got a guidance")
  if guidance_state.find(target):
    raise ValueError(
      "the target contains a guidance that remembers (momentum, every), which has no density: leave out its momentum "
      "or every"
    )
  if not isinstance(target, Product):
    raise TypeError(f"the target must be made by tempered, tempered_by_classifier or product, got {target!r}")


def _check_solver(solver: Solver) -> None:
  """Raise ValueError if the weights would be wrong for this solver."""
  s_noise = getattr(solver, "s_noise", 1.0)
  if checks.is_concrete(s_noise) and (np.asarray(s_noise) != 1).any():
    raise ValueError(f"the solver must add as much noise as it removes: its s_noise must be 1 here, got {s_noise}")
  if getattr(solver, "log_prob", None) is not None:
    raise ValueError("the solver's own classifier is not in the target: leave it out, or use tempered_by_classifier")


@struct.dataclass
class _Evaluated(Conditioned):
  """A denoiser whose prediction at one ``x`` and ``sigma`` is known and is not computed again."""

  x: Leaf
  sigma: Leaf
  prediction: Leaf

  def predict(self, x: Example, sigma: Scalar) -> Example | Prediction:
    return self.prediction if x is self.x and sigma is self.sigma else super().predict(x, sigma)


def resample(key: Key, log_weights: Float[Array, " n"]) -> Int[Array, " n"]:
  """Systematic resampling (Carpenter et al. 1999): the index of the ancestor of each of ``n`` new particles.

  The method takes one uniform number ``u`` and the points ``j + u``. With normalised weights, particle ``k`` has
  ``n w_k`` copies in expectation, and each time this number rounded up or down. The copies are in the order of their
  ancestors. Equal weights give each particle one copy.

  >>> resample(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25]))).tolist()
  [0, 0, 2, 3]
  """
  n = log_weights.shape[0]
  cumulative = jnp.cumsum(jnp.exp(log_weights - log_weights.max()))
  cumulative *= n / cumulative[-1]
  # The number of points j + u below each cumulative weight, by `floor` and a comparison, so whole numbers stay exact.
  below = jnp.floor(cumulative)
  below += (cumulative - below > jax.random.uniform(key, (), cumulative.dtype)).astype(below.dtype)
  # Rounding can leave the last cumulative weight below n.
  return jnp.minimum(jnp.searchsorted(below, jnp.arange(n, dtype=below.dtype), side="right"), n - 1)


def effective_sample_size(log_weights: Float[Array, " n"]) -> Scalar:
  """``(Σ w)² / Σ w²`` (Kong 1992), from 1 to n.

  >>> float(effective_sample_size(jnp.log(jnp.array([1.0, 1.0, 0.0, 0.0]))))
  2.0
  """
  weights = jnp.exp(log_weights - log_weights.max())
  return weights.sum() ** 2 / (weights**2).sum()


def log_mean_exp(log_weights: Float[Array, " n"]) -> Scalar:
  """Return the logarithm of the mean weight."""
  return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.shape[0])
