r"""What does sample ``p(x) p(y|x)^γ``: guided particles that are weighted and resampled on their way.

Guidance walks down the scores of

.. math:: \pi_\sigma(x) \propto \prod_i p_i(x; \sigma)^{a_i}, \quad \sum_i a_i = 1,

which for classifier-free guidance are the powers ``(1 - γ, γ)`` of ``p(x; σ)`` and ``p(x|y; σ)``. But these are not
``π_0`` with noise, and a walk along their scores does not end in ``π_0``. How far it goes astray is known. In
``x = x0 + sigma eps`` each ``p_i`` obeys the heat equation ``∂p / ∂σ² = Δp / 2``, so with its score ``s_i``

.. math::
  \frac{\partial \log p_i}{\partial \sigma^2} = \tfrac12 (\Delta \log p_i + \|s_i\|^2), \quad
  \frac{\partial \log \pi_\sigma}{\partial \sigma^2}
    = \tfrac12 \Big(\Delta \log \pi_\sigma + \sum_i a_i \|s_i\|^2\Big) + \text{const}

where a walk along ``s = Σ a_i s_i``, of any noise, follows ``(Δ log π_σ + |s|²) / 2``. The difference becomes a
particle's weight (the Feynman-Kac corrector of Skreta et al. 2025, arXiv:2503.02819, for a geometric average; here for
any number of densities):

.. math::
  \mathrm{d} \log w = -\tfrac12 \sum_i a_i \|s_i - s\|^2 \, |\mathrm{d}(\sigma^2)|
    = -\sum_i a_i \frac{\|D_i - D\|^2}{\sigma^2} \, |\mathrm{d} \log \sigma|,
  \quad D = \sum_i a_i D_i

which is ``½ γ (γ - 1) |s_y - s_∅|² |d(σ²)|`` for the powers ``(1 - γ, γ)``. Resampling by the weights on the way is
sequential Monte Carlo, as in twisted diffusion sampling (Wu et al. 2023, arXiv:2306.17775).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

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
from jaxguide.guidance import Rule, classifier
from jaxguide.guidance import state as guidance_state
from jaxguide.guidance.mixing import Both
from jaxguide.sampling.keys import sample_keys
from jaxguide.solvers.base import Conditioned


@struct.dataclass
class Product:
  """A product of powers of densities, each known by its denoiser. Make one with `tempered` or another function here.

  As a function it is the guided denoiser ``Σ a_i D_i``: `jaxguide.sample` walks with it, and does not sample it.
  """

  denoise_all: Leaf
  powers: tuple[Leaf, ...]

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree = None) -> Example | Prediction:
    """Give the guided ``x0``; a learned variance is that of the last denoiser."""
    return self.evaluate(x, sigma, cond)[0]

  def evaluate(self, x: Example, sigma: Scalar, cond: PyTree = None) -> tuple[Example | Prediction, Scalar]:
    """Give the guided ``x0``, and how fast ``log w`` rises as ``log sigma`` falls."""
    said = self.denoise_all(x, sigma, cond)
    parts = [(scale_at(power, sigma, x), x0_of(one)) for power, one in zip(self.powers, said, strict=True)]
    x0 = functools.reduce(operator.add, [power * one for power, one in parts])
    # From the differences, not from scores, which at high noise are large and nearly the same.
    spread = functools.reduce(operator.add, [power * jnp.sum(((one - x0) / sigma) ** 2) for power, one in parts])
    return map_x0(lambda _: x0, said[-1]), -spread


class Population(NamedTuple):
  """What became of the weights.

  ``ess`` is the effective sample size after each step, 1 to the number of particles: ``(Σ w)² / Σ w²`` before any
  resampling; ``resampled``, whether there was one then (after the last step there always is). ``log_normalizer``
  estimates ``log ∫ Π_i p_i(x)^{a_i} dx``.
  """

  ess: Leaf
  resampled: Leaf
  log_normalizer: Leaf


def product(denoisers: Sequence[Denoiser], powers: ArrayLike | Sequence[ArrayLike]) -> Product:
  """Give ``Π_i p_i(x)^{a_i}`` of densities that each have a denoiser.

  Autoguidance is ``product((weak, good), (1 - γ, γ))``, and two conditions at once
  ``product((uncond, one, two), (1 - γ_1 - γ_2, γ_1, γ_2))``. That the integral is finite is for the caller to know. For
  ``(1 - γ, γ)`` and ``γ ≥ 0`` it is where ``p_2 / p_1`` is bounded, as ``p(x|y) / p(x)`` is.

  Args:
    denoisers: pytrees; each is given the condition.
    powers: a_i, one for each, of any sign; their sum is 1.

  Raises:
    ValueError: if there is not one power for each, or one is not finite, or they have another sum.

  >>> double = product((lambda x, sigma, cond: x, lambda x, sigma, cond: x * cond), (-1.0, 2.0))
  >>> x0, rate = double.evaluate(jnp.asarray(1.0), jnp.asarray(0.5), 3.0)
  >>> float(x0), float(rate)  # -1 + 2 * 3, and 2 * (2 - 1) * (3 - 1)² / 0.5²
  (5.0, 32.0)
  """
  denoisers, powers = tuple(denoisers), tuple(checks.finite("powers", power) for power in powers)  # type: ignore[union-attr]
  if not denoisers or len(denoisers) != len(powers):
    raise ValueError(f"there must be one power for each denoiser, got {len(powers)} for {len(denoisers)}")
  if checks.is_concrete(powers) and (np.abs(np.sum(np.asarray(powers), 0) - 1) > 1e-5).any():
    raise ValueError(f"powers must have the sum 1, got {powers}: give the rest to the unconditional denoiser")
  return Product(Partial(_each, denoisers), powers)


def _each(denoisers, x, sigma, cond):
  return [denoise(x, sigma, cond) for denoise in denoisers]


def tempered(denoise: Denoiser, null_cond: PyTree, scale: ArrayLike) -> Product:
  """Give ``p(x) p(y|x)^γ``, that is ``p(x)^(1 - γ) p(x|y)^γ``, of which `jaxguide.classifier_free` has the scores.

  Args:
    denoise: one that knows with and without a condition; both run as one batch.
    null_cond: what stands for "no condition".
    scale: γ, the same power as everywhere: 0 unconditional, 1 conditional. Below 0 there may be no such density.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> guided = tempered(lambda x, sigma, cond: x * cond, 0, 3.0)
  >>> float(guided(jnp.asarray(2.0), jnp.asarray(1.0), 1.0))  # as classifier_free
  6.0
  """
  scale = checks.finite("scale", scale)
  return Product(Both(denoise, null_cond), (1 - scale, scale))


def tempered_by_classifier(denoise: Denoiser, log_prob: LogProb, scale: ArrayLike) -> Product:
  """Give ``p(x) p(y|x)^γ`` of a density and a classifier, of which `jaxguide.classifier` has the scores.

  Args:
    denoise: of ``p(x)``, an unconditional one: ``unconditional(null_cond)(denoise)`` of one that is not.
    log_prob: ``(x, sigma, cond) -> log p(cond | x; sigma)``. Both must be right at every noise level, or what comes out
      is not the product: a classifier of noisy examples that is only near its truth gives it nearly.
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
) -> tuple[Float[Array, " num_particles *shape"], Population]:
  """Draw a population of examples from a product of powers of densities, such as ``p(x) p(y|x)^γ``.

  Particles walk as samples of `jaxguide.sample` do, with as many evaluations (`EDMStochastic`, which evaluates after it
  has added noise, takes one more a step). Their weights are integrated by the trapezoid rule in ``log sigma``. Where
  the effective sample size falls below the threshold they are resampled, and once more at the end, so that those that
  come out have equal weights. They are right in the limit of many particles and small steps, and so is the normalizer.

  Particles are not independent as samples are: those of one ancestor are alike. A solver that adds noise, such as
  ``DDIM(1)``, `DDPM` or `DPMpp2MSDE`, parts them again, and the more it adds, the more even the weights stay, at the
  price of smaller steps: ``DPMpp2MSDE(eta=2)`` is a good choice at a large ``γ``. With a deterministic one copies stay
  copies to the end, and ``threshold=0``, which resamples at the end alone, serves it best.

  The walk starts from ``sigmas[0] * eps``, as all do here, and no weight corrects that: the first level must be large
  beside the distances in the data, times γ.

  Args:
    target: from `tempered`, `tempered_by_classifier` or `product`. Powers are leaves: a sweep over γ is one program.
    key: particle ``i`` starts and walks as the sample of ``fold_in(key, i)``.
    num_particles: how many; all are held at once.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0. Their type is the particles'.
    solver: see `jaxguide.solvers`. Its noise must be as much as it removes (``s_noise`` 1).
    cond: the one condition of them all; ``vmap`` over conditions gives a population for each.
    threshold: the effective sample size, as a fraction of the particles in [0, 1], below which they are resampled.

  Returns:
    The particles, and what became of their weights. If anything on the way was not finite, all of it is NaN.

  Raises:
    ValueError: for a bad grid, number or threshold, a label outside the classes, a guidance with momentum in it, or a
      solver with a classifier of its own, whose shift the weights would not know of.

  >>> from jaxguide import mixtures, schedules, solvers
  >>> target = tempered(mixtures.ring(4).denoiser, null_cond=4, scale=2.0)
  >>> x, population = sample_product(
  ...   target, jax.random.key(0), 100, (2,), schedules.karras(20), solvers.DDPM(), cond=1
  ... )
  >>> x.shape, population.ess.shape, bool(population.ess.min() > 10)
  ((100, 2), (20,), True)
  """
  checks.sigmas(sigmas)
  if isinstance(target, Rule):
    raise TypeError("the target must be made by tempered, tempered_by_classifier or product, got a guidance")
  check_cond((target, checks.solver(solver)), checks.cond(cond))
  shape, key = checks.shape("shape", shape), keys.threefry(key)
  num_particles = checks.at_least("num_particles", num_particles, 1)
  threshold = checks.in_range("threshold", threshold, 0, 1)
  if guidance_state.find(target) is not None:
    raise ValueError("a guidance that remembers earlier steps is of no density: leave out its momentum")
  if not isinstance(target, Product):
    raise TypeError(f"the target must be made by tempered, tempered_by_classifier or product, got {target!r}")
  s_noise = getattr(solver, "s_noise", 1.0)
  if checks.is_concrete(s_noise) and (np.asarray(s_noise) != 1).any():
    raise ValueError(f"the solver must add as much noise as it removes: its s_noise must be 1 here, got {s_noise}")
  if getattr(solver, "log_prob", None) is not None:
    raise ValueError("the solver's own classifier is not in the target: leave it out, or use tempered_by_classifier")
  sigmas = jnp.asarray(sigmas)
  if not jnp.issubdtype(sigmas.dtype, jnp.floating):
    sigmas = sigmas.astype(float)
  start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(sample_keys(key, num_particles))
  # No particle has this index.
  resample_key = jax.random.fold_in(key, np.uint32(2**32 - 1))
  x = sigmas[0] * jax.vmap(lambda key: jax.random.normal(key, tuple(shape), sigmas.dtype))(start_keys)

  def step(carry, inputs):
    state, log_weights, rate, log_normalizer = carry
    i, sigma_last, sigma, sigma_next = inputs
    said, rate_here = jax.vmap(lambda x: target.evaluate(x, sigma, cond))(state.x)
    log_weights += jnp.log(sigma_last / sigma) * (rate + rate_here) / 2
    ess = effective_sample_size(log_weights)
    again = ess < jnp.asarray(threshold, ess.dtype) * num_particles

    def renew(population):
      ancestors = resample(jax.random.fold_in(resample_key, i), log_weights)
      return jax.tree.map(lambda leaf: leaf[ancestors], population)

    state, said, rate_here = jax.lax.cond(again, renew, lambda population: population, (state, said, rate_here))
    log_normalizer += jnp.where(again, log_mean_exp(log_weights), 0)
    log_weights = jnp.where(again, 0, log_weights)

    def move(state, said, key):
      known = _Evaluated(target, cond, state.x, sigma, said)
      return solver.step(known, state, sigma, sigma_next, jax.random.fold_in(key, i))

    return (jax.vmap(move)(state, said, step_keys), log_weights, rate_here, log_normalizer), (ess, again)

  zeros = jnp.zeros(num_particles, x.dtype)
  carry = jax.vmap(solver.init)(x), zeros, zeros, jnp.zeros((), x.dtype)
  # Before the first level nothing was walked.
  levels = (jnp.arange(sigmas.shape[0] - 1), jnp.append(sigmas[:1], sigmas[:-2]), sigmas[:-1], sigmas[1:])
  (state, log_weights, rate, log_normalizer), (ess, resampled) = jax.lax.scan(step, carry, levels)

  # The last step, to 0, is infinite in log sigma, but not in sigma²: with scores that stand still, half the rate.
  log_weights += rate / 2
  log_normalizer += log_mean_exp(log_weights)
  x = state.x[resample(jax.random.fold_in(resample_key, sigmas.shape[0] - 1), log_weights)]
  population = Population(
    ess=jnp.append(ess[1:], effective_sample_size(log_weights)),
    resampled=jnp.append(resampled[1:], True),
    log_normalizer=log_normalizer,
  )
  # Weights that are not finite choose nobody: without this they would do so unseen.
  return jnp.where(jnp.isfinite(log_normalizer), x, jnp.nan), population


@struct.dataclass
class _Evaluated(Conditioned):
  """A denoiser that was asked at one point already, and does not run again for it."""

  x: Leaf
  sigma: Leaf
  said: Leaf

  def predict(self, x: Example, sigma: Scalar) -> Example | Prediction:
    return self.said if x is self.x and sigma is self.sigma else super().predict(x, sigma)


def resample(key: Key, log_weights: Float[Array, " n"]) -> Int[Array, " n"]:
  """Systematic resampling: who each of ``n`` equal particles is a copy of (Carpenter et al. 1999).

  With one uniform number ``u`` and the points ``j + u``. Particle ``k`` has ``n w_k`` copies, rounded up or down, and
  just as many in expectation. Copies keep the order of their ancestors, and equal weights change nothing at all.

  >>> resample(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25]))).tolist()
  [0, 0, 2, 3]
  """
  n = log_weights.shape[0]
  reached = jnp.cumsum(jnp.exp(log_weights - log_weights.max()))
  reached *= n / reached[-1]
  # The points below, with no difference of large numbers: so that whole ones stay whole.
  below = jnp.floor(reached)
  below += (reached - below > jax.random.uniform(key, (), reached.dtype)).astype(below.dtype)
  # Whatever the rounding, the last particle reaches the end.
  return jnp.minimum(jnp.searchsorted(below, jnp.arange(n, dtype=below.dtype), side="right"), n - 1)


def effective_sample_size(log_weights: Float[Array, " n"]) -> Scalar:
  """``(Σ w)² / Σ w²`` (Kong 1992), from 1 to n.

  >>> float(effective_sample_size(jnp.log(jnp.array([1.0, 1.0, 0.0, 0.0]))))
  2.0
  """
  weights = jnp.exp(log_weights - log_weights.max())
  return weights.sum() ** 2 / (weights**2).sum()


def log_mean_exp(log_weights: Float[Array, " n"]) -> Scalar:
  """Give the logarithm of the mean weight."""
  return jax.nn.logsumexp(log_weights) - jnp.log(log_weights.shape[0])
