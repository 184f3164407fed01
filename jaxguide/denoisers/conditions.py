"""Conditions: pass one part of a condition to a function, and check a condition before sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxguide._core import struct
from jaxguide._core.typing import Example, Leaf, PyTree, Scalar


@struct.dataclass
class _Given:
  key: str = struct.field(pytree_node=False)
  function: Leaf

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> Any:
    return self.function(x, sigma, self._part(cond))

  def check_cond(self, cond: PyTree) -> None:
    check_cond(self.function, self._part(cond))

  def acts_at(self, sigma: Scalar) -> Any:
    """Return whether a classifier guides at this level; see `jaxguide.ClassifierLogProb`."""
    acts_at = getattr(self.function, "acts_at", None)
    return True if acts_at is None else acts_at(sigma)

  def _part(self, cond: PyTree) -> PyTree:
    if not isinstance(cond, Mapping) or self.key not in cond:
      problem = f"has {', '.join(map(repr, cond))}" if isinstance(cond, Mapping) else "is not a dictionary"
      raise ValueError(f"the condition must be a dictionary with {self.key!r}, but it {problem}")
    return cond[self.key]


def given(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """Wrap a denoiser or a log-probability so that it receives one part of the condition, ``cond[key]``.

  With this, the network and the guidance can have different conditions, ``cond = {"label": ..., "y": ...}``:

  >>> import jax.numpy as jnp, jaxguide as jg
  >>> log_prob = jg.measurement(lambda x0: x0[0], 0.1)
  >>> guided = jg.reconstruction(given("y", log_prob), 1.0)(given("label", jg.ring(4).denoiser))
  >>> guided(jnp.zeros(2), jnp.asarray(1.0), {"label": 1, "y": 0.0}).shape
  (2,)

  A guidance that uses one part only goes inside: ``given("label", classifier_free(4, 2.0)(denoise))``.

  Raises:
    ValueError: when called, if the condition is not a dictionary with ``key``.
  """
  return _Given(key, function)


def check_cond(tree: PyTree, cond: PyTree) -> None:
  """Check ``cond`` with the ``check_cond`` method of every denoiser and classifier inside ``tree`` that has one.

  Raises:
    ValueError: if a label is not one of the classes.
  """

  def can_check(node: Any) -> bool:
    return hasattr(node, "check_cond")

  for node in jax.tree.leaves(tree, is_leaf=can_check):
    if can_check(node):
      node.check_cond(cond)
