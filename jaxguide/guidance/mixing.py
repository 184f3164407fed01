"""Guidance by two or more predictions: towards one of them and away from another."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxguide._core import checks, struct
from jaxguide._core.promotion import same_type
from jaxguide._core.typing import Denoiser, Example, Guidance, Leaf, Prediction, PyTree, Scalar, Scale, map_x0, x0_of
from jaxguide.denoisers.conditions import check_cond
from jaxguide.guidance import passes
from jaxguide.guidance import state as guidance_state
from jaxguide.guidance.combine import Combine, check_rule, gives_x0_at_1, linear, of_base_at_0
from jaxguide.guidance.rule import Composition, Rule, check_denoiser


def classifier_free(null_cond: PyTree, scale: Scale, combine: Combine = linear) -> Guidance:
  r"""Classifier-free guidance (Ho & Salimans 2021, arXiv:2207.12598, eq. 6).

  One network, trained with its condition dropped at random, gives the conditional and the unconditional prediction.
  Both run as one batch. The forms in the literature are

  .. math::
    \tilde D &= D_\varnothing + \gamma (D_y - D_\varnothing) \quad (x_0) \\
    \tilde\epsilon &= \epsilon_\varnothing + \gamma (\epsilon_y - \epsilon_\varnothing)
      = (1 + w) \epsilon_y - w \epsilon_\varnothing, \quad w = \gamma - 1 \\
    \tilde s &= s_\varnothing + \gamma (s_y - s_\varnothing), \quad s = \nabla_x \log p

  They are equivalent, because at fixed ``x`` and ``sigma`` each of x0, eps and score is an affine function of the
  others.

  Args:
    null_cond: the condition that means "no condition", with the structure, shapes and types of one ``cond``.
    scale: γ, a number or a function of ``sigma`` (see `jaxguide.scales`). 0 is unconditional and 1 is conditional. The
      paper's w is ``scale - 1``; it uses w from 0.1 to 4.
    combine: another rule for the combination of the two predictions: one of `jaxguide.combine`, or any function
      ``(x0, x0_base, scale, x, sigma) -> x0``.

  Returns:
    A `Guidance`. The guided denoiser costs two evaluations of the denoiser. It costs one if the scale is 0 or 1 and is
    known when the program is made, or is looked at while it runs (`jaxguide.scales.static`, `branching`).

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
  def guided(scale):
    null, conditional = both(x, sigma, cond)
    return map_x0(lambda x0, x0_null: combine(x0, x0_null, scale, x, sigma), conditional, null)

  others = {}
  if gives_x0_at_1(combine):
    others[1.0] = lambda: both.one(x, sigma, cond, null=False)
  if of_base_at_0(combine):
    others[0.0] = lambda: both.one(x, sigma, cond, null=True)
  return passes.at(scale, sigma, x, others, guided)


@struct.dataclass
class Both:
  """A denoiser's two predictions, with ``null_cond`` and with the condition, computed as one batch."""

  denoise: Leaf
  null_cond: Leaf

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> tuple[Any, Any]:
    """Return the prediction with ``null_cond`` and the prediction with ``cond``."""
    _check_null(self.denoise, cond, self.null_cond)
    if isinstance(self.denoise, passes.Known) and self.denoise.knows(x, sigma, cond):
      return self.one(x, sigma, cond, null=True, variance=False), self.denoise.prediction
    conds = jax.tree.map(lambda null, y: jnp.stack(same_type(null, y)), self.null_cond, cond)
    predictions = jax.vmap(self.denoise, (None, None, 0))(x, sigma, conds)
    return jax.tree.map(operator.itemgetter(0), predictions), jax.tree.map(operator.itemgetter(1), predictions)

  def one(self, x: Example, sigma: Scalar, cond: PyTree, null: bool, variance: bool = True) -> Any:
    """Return one of the two predictions.

    A learned variance is that of ``cond``. So with one the null prediction needs both passes, unless ``variance`` is
    false, and it then has its own.
    """
    _check_null(self.denoise, cond, self.null_cond)
    if not null:
      return self.denoise(x, sigma, cond)
    null_cond = jax.tree.map(lambda null, y: same_type(null, y)[0], self.null_cond, cond)
    prediction = self.denoise(x, sigma, null_cond)
    if not variance or not isinstance(prediction, Prediction) or prediction.variance is None:
      return prediction
    return map_x0(lambda _, x0_null: x0_null, self.denoise(x, sigma, cond), prediction)

  def check_cond(self, cond: PyTree) -> None:
    """Raise ValueError if ``cond`` or the null condition is not one of the denoiser's classes."""
    check_cond(self.denoise, cond)
    if self.null_cond is not None:
      check_cond(self.denoise, self.null_cond)


def compose(null_cond: PyTree, scales: Scale) -> Guidance:
  r"""Guidance by several conditions, each with its own scale (Liu et al. 2022, arXiv:2206.01714, eq. 11 to 13).

  .. math:: \tilde D = D_\varnothing + \sum_i \gamma_i (D_{y_i} - D_\varnothing)

  A positive scale asks for a condition (conjunction), a negative scale for its absence (negation). The target density
  is :math:`p(x) \prod_i (p(x | y_i) / p(x))^{\gamma_i}`. (`chain` and `parallel` combine guidances; this function
  combines conditions.)

  A condition in place of the null one, such as a negative prompt of a text-to-image model, is
  ``classifier_free(negative, scale)``.

  Args:
    null_cond: the condition that means "no condition", with the structure, shapes and types of one condition.
    scales: (n,) γ of each of the n conditions, or a function of ``sigma`` that gives them.

  Returns:
    A `Guidance` whose ``cond`` holds n conditions: each leaf has a first axis of length n. The guided denoiser costs
    n + 1 evaluations of the denoiser, run as one batch.

  Raises:
    ValueError: if a scale is not finite; when called, if the number of conditions in ``cond`` is not that of the
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
        f"compose needs one scale for each condition in cond: its scales have shape {scales.shape}, but the first axes "
        f"of the leaves of cond have the lengths {sorted(count[0] if count else 'no axis' for count in counts)}"
      )
    _check_null(self.denoise, jax.tree.map(operator.itemgetter(0), cond), self.null_cond)

    def append_null(conds, null):
      null, conds = same_type(null, conds)
      return jnp.concatenate([conds, null[None]])

    predictions = jax.vmap(self.denoise, (None, None, 0))(x, sigma, jax.tree.map(append_null, cond, self.null_cond))
    x0s = x0_of(predictions)
    guided = x0s[-1] + jnp.tensordot(scales, x0s[:-1] - x0s[-1:], axes=1)
    return map_x0(lambda _: guided, jax.tree.map(operator.itemgetter(0), predictions))

  def check_cond(self, cond: PyTree) -> None:
    check_cond(self.denoise, cond)
    if self.null_cond is not None:
      check_cond(self.denoise, self.null_cond)


def _check_null(denoise: Denoiser, cond: PyTree, null_cond: PyTree) -> None:
  """Raise ValueError if ``null_cond`` does not match ``cond``, or if the denoiser cannot be evaluated for both."""
  structure, null_structure = jax.tree.structure(cond), jax.tree.structure(null_cond)
  if str(structure) != str(null_structure):
    missing = ": give a cond, such as the labels" if cond is None else ""
    if null_cond is None:
      missing = (
        ": the model has no condition that means no label. A network of your own has one if it has the field "
        "null_class = True and is trained with p_uncond"
      )
    raise ValueError(f"null_cond must have the structure of cond, {structure}; got {null_structure}{missing}")
  if not jax.tree.leaves(cond):
    raise ValueError("the guidance needs a condition, but cond is empty: give the sample's cond")
  for leaf, null in zip(jax.tree.leaves(cond), jax.tree.leaves(null_cond), strict=True):
    if isinstance(null, str) or np.shape(null) != np.shape(leaf):
      raise ValueError(f"null_cond must have the shapes of one cond, {np.shape(leaf)} here; got {null!r}")
  if guidance_state.find(denoise):
    raise ValueError(
      "this guidance evaluates its denoiser several times in a step, but a guidance that remembers (momentum, every) "
      "allows one evaluation: put it last in the chain, outside this one"
    )


def autoguidance(weak: Denoiser, scale: Scale, combine: Combine = linear) -> Guidance:
  r"""Autoguidance: guide a model away from a weaker version of itself (Karras et al. 2024, arXiv:2406.02507, eq. 3).

  .. math:: \tilde D = D_{weak} + \gamma (D - D_{weak})

  The result moves away from the errors that the weak model makes more than the good one, for every condition. If the
  weak model is the unconditional denoiser, this is `classifier_free`. That can be ``unconditional(null_cond)(denoise)``
  or a separate network, as in EDM2 (arXiv:2312.02696).

  Without a trained weak model, `jaxguide.perturbed` makes one with the parameters of the good model::

    weak = jg.perturbed(denoise, jg.Perturbation("identity", ["middle_block_1"]))
    guided = jg.autoguidance(weak, scale=4.0)(denoise)

  This is perturbed-attention guidance (PAG, arXiv:2403.17377) for ``identity``, smoothed energy guidance (SEG,
  arXiv:2408.00760) for ``smooth``, and skip layer guidance (SLG) for ``skip``. Their papers write
  ``D + s (D - D_weak)``, so ``γ = 1 + s``.

  Args:
    weak: a smaller or less trained model of the same data and conditions; a pytree, as the denoisers here are.
    scale: γ, a number or a function of ``sigma``. 0 is the weak model and 1 is the good one. γ is a power here too, in
      ``p(x) (p(x) / p_weak(x))^(γ - 1)``. The paper calls it w and uses about 2 for ImageNet-512. SEG keeps s = 3
      (γ = 4) and varies its width. PAG's code has γ = 4 for ImageNet-256, and s = 3 to 5 in its examples for Stable
      Diffusion. SLG has s about 2.8 for Stable Diffusion 3.5, in the first fifth of the steps only (see `interval`).
    combine: another rule for the combination of the two predictions; see `classifier_free`.

  Returns:
    A `Guidance`. The guided denoiser costs one evaluation of each model. At a scale of 0 or 1 that is known when the
    program is made, or is looked at while it runs (`jaxguide.scales.static`, `branching`), it costs one of the two.

  Raises:
    ValueError: if ``scale`` is not finite.

  >>> guided = autoguidance(lambda x, sigma, cond: 0.5 * x, 2.0)(lambda x, sigma, cond: x)
  >>> float(guided(jnp.asarray(2.0), jnp.asarray(1.0), None))
  3.0
  """
  return Rule(_autoguidance, (check_denoiser(weak), checks.scale("scale", scale), check_rule(combine)))


def _autoguidance(denoise, weak, scale, combine, x, sigma, cond):
  def guided(scale):
    good, poor = denoise(x, sigma, cond), weak(x, sigma, cond)
    return map_x0(lambda x0, x0_weak: combine(x0, x0_weak, scale, x, sigma), good, poor)

  def weak_alone():
    poor = weak(x, sigma, cond)
    if not isinstance(jax.eval_shape(denoise, x, sigma, cond), Prediction):
      return x0_of(poor)
    # A variance or a state is that of the good model.
    return map_x0(lambda _, x0_weak: x0_weak, denoise(x, sigma, cond), poor)

  others = {1.0: lambda: denoise(x, sigma, cond)} if gives_x0_at_1(combine) else {}
  if of_base_at_0(combine):
    others[0.0] = weak_alone
  return passes.at(scale, sigma, x, others, guided)
