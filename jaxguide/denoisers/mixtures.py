r"""Gaussian mixtures: the exact denoiser, score and class posterior at every noise level.

Let ``p(x0) = Σ_k w_k N(m_k, v_k)``, where each component has a class. With noise of level ``sigma`` the density is
``Σ_k w_k N(m_k, v_k + sigma²)``. So all quantities that guidance uses have a closed form. The tests compare with them.
A mixture is also a model for teaching and experiments: it needs no training, it can be two-dimensional, and the exact
answer is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, keys, struct
from jaxguide._core.promotion import same_type, together
from jaxguide._core.typing import Array, ArrayLike, Denoiser, Example, Key, Leaf, LogProb, PyTree, Scalar


@struct.dataclass
class GaussianMixture:
  """A mixture of Gaussians with diagonal covariances and a class for each component; see `gaussian_mixture`.

  A condition is a class label, 0 to ``num_classes - 1``. The label ``num_classes`` is the null class (all components),
  as in the networks here. The methods also accept ``None`` as the null class, but sampling needs a label if there is
  more than one class.
  """

  means: Leaf
  variances: Leaf
  log_weights: Leaf
  classes: Leaf
  num_classes: int = struct.field(pytree_node=False)

  def denoise(self, x: Example, sigma: Scalar, cond: PyTree = None) -> Example:
    r"""``E[x0 | x; sigma, cond]``, a `Denoiser`: ``Σ_k r_k (m_k + v_k / (v_k + sigma²) (x - m_k))``.

    The ``r_k`` are the posterior probabilities of the components.
    """
    variances, means, wide, sigma = together(self.variances, self.means, x, sigma)
    expected = means + variances / (variances + sigma**2) * (wide[None] - means)
    return jnp.tensordot(jax.nn.softmax(self._log_joint(x, sigma, cond)), expected, 1).astype(x.dtype)

  def log_density(self, x: Example, sigma: Scalar, cond: PyTree = None) -> Scalar:
    """``log p(x | cond; sigma)``, a scalar; its gradient in ``x`` is the score."""
    parts = self._log_joint(x, sigma, cond), self._log_weights(cond)
    joint, prior = together(*map(jax.nn.logsumexp, parts))
    return joint - prior

  def class_log_prob(self, x: Example, sigma: Scalar, cond: PyTree) -> Scalar:
    """``log p(cond | x; sigma)``, a `LogProb`: the exact classifier at every noise level."""
    joint = self._log_joint(x, sigma, cond)
    return jax.nn.logsumexp(joint) - jax.nn.logsumexp(self._log_joint(x, sigma, None))

  def tempered_log_density(self, x: Example, sigma: Scalar, cond: PyTree, scale: ArrayLike) -> Scalar:
    """``(1 - γ) log p(x; sigma) + γ log p(x | cond; sigma)``, with ``scale`` γ and without normalisation.

    At ``sigma`` 0 it is the target ``p(x) p(cond | x)^γ`` of guidance. Guided sampling follows its gradients at the
    levels above.

    >>> tempered = ring(4).tempered_log_density(jnp.array([1.0, 0.0]), jnp.asarray(0.0), 0, 1.0)
    >>> bool(jnp.allclose(tempered, ring(4).log_density(jnp.array([1.0, 0.0]), jnp.asarray(0.0), 0)))
    True
    """
    scale = jnp.asarray(checks.finite("scale", scale), x.dtype)
    return (1 - scale) * self.log_density(x, sigma) + scale * self.log_density(x, sigma, cond)

  @property
  def denoiser(self) -> Denoiser:
    """`denoise` as a pytree, which can be an argument of a jitted function."""
    return _Denoiser(self)

  @property
  def log_prob(self) -> LogProb:
    """`class_log_prob` as a pytree, which can be an argument of a jitted function."""
    return _LogProb(self)

  def sample(self, key: Key, cond: PyTree = None) -> Example:
    """Draw one clean example, of the shape of a mean; use ``vmap`` over keys to draw more."""
    component_key, noise_key = jax.random.split(keys.threefry(key))
    k = jax.random.categorical(component_key, self._log_weights(cond))
    z = jax.random.normal(noise_key, self.means.shape[1:], self.means.dtype)
    return self.means[k] + jnp.sqrt(self.variances[k]) * z

  def _log_weights(self, cond: PyTree) -> Array:
    if cond is None:
      return self.log_weights
    if jnp.ndim(cond):
      raise ValueError(f"cond must be one label of one example, got shape {jnp.shape(cond)}: use vmap over labels")
    checks.labels("label", cond, self.num_classes, null=True)
    classes, cond = same_type(self.classes, cond)
    member = (classes == cond) | (cond == self.num_classes)
    return jnp.where(member, self.log_weights, -jnp.inf)

  def _log_joint(self, x: Example, sigma: Scalar, cond: PyTree) -> Array:
    """Return ``log w_k + log N(x; m_k, v_k + sigma²)`` of each component k."""
    variances, means, x, sigma = together(self.variances, self.means, x, sigma)
    variances = variances + sigma**2
    terms = (x[None] - means) ** 2 / variances + jnp.log(2 * jnp.pi * variances)
    prior, nll = together(self._log_weights(cond), 0.5 * terms.reshape(terms.shape[0], -1).sum(1))
    return prior - nll


@struct.dataclass
class _Denoiser:
  mixture: GaussianMixture

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree = None) -> Example:
    return self.mixture.denoise(x, sigma, cond)

  def check_cond(self, cond: PyTree) -> None:
    _check_label(self.mixture, cond)


@struct.dataclass
class _LogProb:
  mixture: GaussianMixture

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> Scalar:
    return self.mixture.class_log_prob(x, sigma, cond)

  def check_cond(self, cond: PyTree) -> None:
    _check_label(self.mixture, cond)


def _check_label(mixture: GaussianMixture, cond: PyTree) -> None:
  classes = mixture.num_classes
  if cond is None and classes > 1:
    raise ValueError(f"cond must be a label of the mixture's {classes} classes, or {classes} for all of them; got None")
  checks.labels("label", cond, classes, null=True)


def gaussian_mixture(
  means: ArrayLike | Sequence[Any],
  variances: ArrayLike | Sequence[Any],
  classes: ArrayLike | Sequence[int],
  weights: ArrayLike | Sequence[float] | None = None,
) -> GaussianMixture:
  """Make a `GaussianMixture`.

  Args:
    means: (components, *shape).
    variances: above 0: one number, (components,), or any shape that broadcasts to that of ``means``.
    classes: (components,) whole numbers from 0. Each class up to the largest needs a component.
    weights: (components,) above 0; they are normalised here. The default is equal weights.

  Raises:
    ValueError: if a shape does not fit, if a variance or a weight is not above 0, or if a class has no component.

  >>> mixture = gaussian_mixture(jnp.array([[-1.0], [1.0]]), 0.1, [0, 1])
  >>> mixture.denoiser(jnp.array([0.0]), jnp.asarray(1.0), None).tolist()  # halfway between the two
  [0.0]
  """
  means = jnp.asarray(means, float)
  if means.ndim < 1 or means.shape[0] == 0:
    raise ValueError(f"means must have a first axis of at least one component, got shape {means.shape}")
  if checks.is_concrete(means) and not np.isfinite(means).all():
    raise ValueError("means must be finite")
  components = means.shape[0]
  classes = np.asarray(classes)
  weights = np.ones(components) if weights is None else np.asarray(weights, np.float64)
  if classes.shape != (components,) or weights.shape != (components,):
    raise ValueError(
      f"classes and weights must have shape ({components},), one for each mean; got {classes.shape} and {weights.shape}"
    )
  if not (np.isfinite(weights).all() and (weights > 0).all()):
    raise ValueError("weights must be finite and above 0")
  present = np.unique(classes)
  if not np.issubdtype(classes.dtype, np.integer) or not np.array_equal(present, np.arange(present.size)):
    raise ValueError(
      f"classes must be whole numbers from 0, with no class left out up to the largest, got {present.tolist()}"
    )
  variances = np.asarray(variances, np.float64)
  if variances.shape == (components,):
    variances = variances.reshape(components, *[1] * (means.ndim - 1))
  try:
    variances = np.broadcast_to(variances, means.shape)
  except ValueError as error:
    raise ValueError(f"variances of shape {variances.shape} do not fit means of shape {means.shape}") from error
  if not (np.isfinite(variances).all() and (variances > 0).all()):
    raise ValueError("variances must be finite and above 0")
  return GaussianMixture(
    means=means,
    variances=jnp.asarray(variances, means.dtype),
    log_weights=jnp.asarray(np.log(weights / weights.sum()), means.dtype),
    classes=jnp.asarray(classes),
    num_classes=int(present.size),
  )


def ring(num_classes: int = 8, radius: ArrayLike = 1.0, std: ArrayLike = 0.1) -> GaussianMixture:
  """Make a ring of equal Gaussians in two dimensions, one for each class.

  Class 0 is at the right; the others follow anticlockwise.

  >>> ring(4).means.round(2).tolist()
  [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]
  """
  angle = 2 * np.pi * np.arange(checks.at_least("num_classes", num_classes, 1)) / num_classes
  means = np.asarray(radius) * np.stack([np.cos(angle), np.sin(angle)], axis=1)
  return gaussian_mixture(means.round(12) + 0.0, np.square(std), np.arange(num_classes))
