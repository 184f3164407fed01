"""Guidance by two or more predictions: towards one, away from another."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxguide._core import checks, struct
from jaxguide._core.promotion import same_type
from jaxguide._core.typing import Denoiser, Example, Guidance, Leaf, PyTree, Scalar, Scale, map_x0, scale_at, x0_of
from jaxguide.denoisers.conditions import check_cond
from jaxguide.guidance import state as guidance_state
from jaxguide.guidance.combine import Combine, check_rule, linear
from jaxguide.guidance.rule import Composition, Rule, check_denoiser


def classifier_free(null_cond: PyTree, scale: Scale, combine: Combine = linear) -> Guidance:
  r"""Classifier-free guidance (Ho & Salimans 2021, arXiv:2207.12598, eq. 6).

  One network, trained with its condition dropped now and then, gives the conditional and the unconditional
  prediction; both run as one batch. In every form that the literature writes,

  .. math::
    \tilde D &= D_\varnothing + \gamma (D_y - D_\varnothing) \quad (x_0) \\
    \tilde\epsilon &= \epsilon_\varnothing + \gamma (\epsilon_y - \epsilon_\varnothing)
      = (1 + w) \epsilon_y - w \epsilon_\varnothing, \quad w = \gamma - 1 \\
    \tilde s &= s_\varnothing + \gamma (s_y - s_\varnothing), \quad s = \nabla_x \log p

  the same rule, since each of the three is an affine function of the others at fixed ``x`` and ``sigma``.

  Args:
    null_cond: what stands for "no condition", of the structure, shapes and types of one ``cond``.
    scale: γ. 0 unconditional, 1 conditional; the paper's w is ``scale - 1``. The paper uses w from 0.1 to 4. A number,
      or a function of ``sigma``; see `jaxguide.scales`.
    combine: how one prediction is made of the two, if not as above: one of `jaxguide.combine`, or any function
      ``(x0, x0_base, scale, x, sigma) -> x0``.

  Returns:
    A `Guidance`. The guided denoiser costs two evaluations.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> denoise = lambda x, sigma, cond: x * cond
  >>> guided = classifier_free(0, 3.0)(denoise)
  >>> float(guided(jnp.asarray(2.0), jnp.asarray(1.0), 1.0))
  6.0
  """
  return Composition(_classifier_free, (null_cond, checks.scale("scale", scale), check_rule(combine)))


def _classifier_free(denoise, null_cond, scale, combine):
  return Partial(_away_from_null, Both(denoise, null_cond), scale, combine)


def _away_from_null(both, scale, combine, x, sigma, cond):
  null, given = both(x, sigma, cond)
  return map_x0(lambda x0, x0_null: combine(x0, x0_null, scale_at(scale, sigma, x), x, sigma), given, null)


@struct.dataclass
class Both:
  """What a denoiser says with ``null_cond`` and with the condition, run as one batch."""

  denoise: Leaf
  null_cond: Leaf

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> tuple[Any, Any]:
    """Give the two predictions."""
    _check_null(self.denoise, cond, self.null_cond)
    both = jax.tree.map(lambda null, y: jnp.stack(same_type(null, y)), self.null_cond, cond)
    said = jax.vmap(self.denoise, (None, None, 0))(x, sigma, both)
    return jax.tree.map(operator.itemgetter(0), said), jax.tree.map(operator.itemgetter(1), said)

  def check_cond(self, cond: PyTree) -> None:
    """Raise ValueError where the denoiser knows neither ``cond`` nor the null condition."""
    check_cond(self.denoise, cond)
    if self.null_cond is not None:
      check_cond(self.denoise, self.null_cond)


def compose(null_cond: PyTree, scales: Scale) -> Guidance:
  r"""Several conditions at once, each with a scale of its own (Liu et al. 2022, arXiv:2206.01714, eq. 11 to 13).

  .. math:: \tilde D = D_\varnothing + \sum_i \gamma_i (D_{y_i} - D_\varnothing)

  A positive scale asks for a condition (conjunction), a negative one for its absence (negation). The product of
  densities :math:`p(x) \prod_i (p(x | y_i) / p(x))^{\gamma_i}` is what it aims at. (Guidances, and not conditions, are
  put together by `chain` and `parallel`.)

  Where one condition stands in for the null one, as the negative prompts of text-to-image models do, that is
  ``classifier_free(negative, scale)``.

  Args:
    null_cond: what stands for "no condition", of the structure, shapes and types of one condition.
    scales: (n,) γ of each of the n conditions, or a function of ``sigma`` that gives them.

  Returns:
    A `Guidance` for a ``cond`` that holds n conditions: each of its leaves has n in front. The guided denoiser costs
    n + 1 evaluations, run as one batch.

  Raises:
    ValueError: if a scale is not finite; when called, where ``cond`` does not hold as many conditions as there are
      scales.

  >>> guided = compose(0, jnp.array([2.0, -1.0]))(lambda x, sigma, cond: x * cond)
  >>> float(guided(jnp.asarray(1.0), jnp.asarray(1.0), jnp.array([3.0, 4.0])))
  2.0
  """
  return Composition(_compose, (null_cond, checks.scale("scales", scales)))


def _compose(denoise, null_cond, scales):
  return _Composed(denoise, null_cond, scales)


@struct.dataclass
class _Composed:
  denoise: Leaf
  null_cond: Leaf
  scales: Leaf

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> Any:
    scales = jnp.asarray(self.scales(sigma) if callable(self.scales) else self.scales, x.dtype)
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(cond)}
    if scales.ndim != 1 or counts - {scales.shape}:
      raise ValueError(
        f"compose needs one scale for each condition in cond: its scales have shape {scales.shape}, and the leaves of "
        f"cond have {sorted(count[0] if count else 'no axis' for count in counts)} in front"
      )
    _check_null(self.denoise, jax.tree.map(operator.itemgetter(0), cond), self.null_cond)

    def with_null(given, null):
      null, given = same_type(null, given)
      return jnp.concatenate([given, null[None]])

    said = jax.vmap(self.denoise, (None, None, 0))(x, sigma, jax.tree.map(with_null, cond, self.null_cond))

    def mixed(_):
      each = x0_of(said)
      return each[-1] + jnp.tensordot(scales, each[:-1] - each[-1:], axes=1)

    return map_x0(mixed, jax.tree.map(operator.itemgetter(0), said))

  def check_cond(self, cond: PyTree) -> None:
    check_cond(self.denoise, cond)
    if self.null_cond is not None:
      check_cond(self.denoise, self.null_cond)


def _check_null(denoise: Denoiser, cond: PyTree, null_cond: PyTree) -> None:
  """Raise ValueError where ``null_cond`` is not like ``cond``, or the denoiser cannot be asked about both at once."""
  given, null = jax.tree.structure(cond), jax.tree.structure(null_cond)
  if str(given) != str(null):
    raise ValueError(f"null_cond must have the structure of cond, {given}; got {null}")
  if not jax.tree.leaves(cond):
    raise ValueError("there must be a cond to guide towards, got none")
  for one, none in zip(jax.tree.leaves(cond), jax.tree.leaves(null_cond), strict=True):
    if isinstance(none, str) or np.shape(none) != np.shape(one):
      raise ValueError(f"null_cond must have the shapes of one cond, {np.shape(one)} here; got {none!r}")
  if guidance_state.find(denoise) is not None:
    raise ValueError(
      "a guidance that remembers earlier steps cannot be asked twice in one: put it last in the chain, outside this one"
    )


def autoguidance(weak: Denoiser, scale: Scale, combine: Combine = linear) -> Guidance:
  r"""A model guided by a weaker version of itself (Karras et al. 2024, arXiv:2406.02507, eq. 3).

  .. math:: \tilde D = D_{weak} + \gamma (D - D_{weak})

  What the weak model gets wrong more than the good one is pushed away from, whatever the condition. With the
  unconditional denoiser for the weak one, ``unconditional(null_cond)(denoise)``, or a separate one as EDM2 trains it
  (arXiv:2312.02696), it is `classifier_free`.

  Where no weak model was trained, `jaxguide.perturbed` makes one of the good one's own parameters::

    weak = jg.perturbed(denoise, jg.Perturbation("identity", ["middle_block_1"]))
    guided = jg.autoguidance(weak, scale=4.0)(denoise)

  That is perturbed-attention guidance (PAG, arXiv:2403.17377) for ``identity``, smoothed energy guidance (SEG,
  arXiv:2408.00760) for ``smooth``, and skip layer guidance (SLG) for ``skip``. They write ``D + s (D - D_weak)``:
  ``γ = 1 + s``.

  Args:
    weak: a smaller or less trained model of the same data and conditions; a pytree, as the denoisers here are.
    scale: γ. 0 is the weak model, 1 the good one. It is a power here too, of ``p(x) (p(x) / p_weak(x))^(γ - 1)``. The
      paper has w for it, and about 2 for ImageNet-512. Of the methods above, SEG keeps s = 3, γ = 4, and varies its
      width; PAG's code for ImageNet-256 has γ = 4 and its examples for Stable Diffusion s = 3 to 5; SLG has s about 2.8
      for Stable Diffusion 3.5, over the first fifth of the steps alone (see `interval`). A number, or a function of
      ``sigma``.
    combine: how one prediction is made of the two, if not as above; see `classifier_free`.

  Returns:
    A `Guidance`. The guided denoiser costs one evaluation of each model.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> guided = autoguidance(lambda x, sigma, cond: 0.5 * x, 2.0)(lambda x, sigma, cond: x)
  >>> float(guided(jnp.asarray(2.0), jnp.asarray(1.0), None))
  3.0
  """
  return Rule(_autoguidance, (check_denoiser(weak), checks.scale("scale", scale), check_rule(combine)))


def _autoguidance(denoise, weak, scale, combine, x, sigma, cond):
  given, poor = denoise(x, sigma, cond), weak(x, sigma, cond)
  return map_x0(lambda x0, x0_weak: combine(x0, x0_weak, scale_at(scale, sigma, x), x, sigma), given, poor)
