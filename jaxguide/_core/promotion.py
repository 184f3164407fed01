"""Types of numbers that meet: promoted here, on purpose, so that all else runs under strict promotion."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core.typing import Array, ArrayLike


def together(*values: ArrayLike) -> list[Array]:
  """Give numbers as arrays of one type, the widest among them, whatever promotion JAX was told to allow.

  >>> [leaf.dtype.name for leaf in together(jnp.ones(2, jnp.bfloat16), jnp.float32(1), 2)]
  ['float32', 'float32', 'float32']
  """
  with jax.numpy_dtype_promotion("standard"):
    kind = jnp.result_type(*values)
  return [jnp.asarray(value, kind) for value in values]


def same_type(null: ArrayLike, cond: ArrayLike) -> tuple[Array, Array]:
  """Give a null condition and a condition as arrays of one type that holds both.

  It is the condition's own type. Where whole numbers of that type cannot hold the null label, such as 300 in ``uint8``,
  it is a larger one.

  Raises:
    ValueError: if no type holds both, or they are of different kinds.

  >>> [leaf.dtype.name for leaf in same_type(300, np.uint8(1))]
  ['int32', 'int32']
  """
  own = jnp.result_type(cond)
  _check_kind(null, own)
  whole = jnp.issubdtype(own, jnp.integer) or own == jnp.bool_
  if not whole or getattr(null, "dtype", None) == own or (own == jnp.bool_ and isinstance(null, bool | np.bool_)):
    return _alike(jnp.asarray(null, own), jnp.asarray(cond))
  if isinstance(null, jax.core.Tracer):
    both = np.promote_types(own, null.dtype)
    kind = jax.dtypes.canonicalize_dtype(both)
    if kind != both:
      raise ValueError(f"null_cond's type {null.dtype} and cond's {own.name} fit no type of JAX: give both one type")
  else:
    limits = [0, 1] if own == jnp.bool_ else [jnp.iinfo(own).min, jnp.iinfo(own).max]
    values = np.append(np.asarray(null, object), limits)
    kinds = [own] if own != jnp.bool_ else []
    kinds += [np.promote_types(own, np.int32), np.promote_types(own, np.int64)]
    kinds = [kind for kind in map(jax.dtypes.canonicalize_dtype, kinds) if _holds(kind, values)]
    if not kinds:
      raise ValueError(f"null_cond {null!r} does not fit cond's type, {own.name}: give labels of a larger type")
    kind = kinds[0]
  return _alike(jnp.asarray(null).astype(kind), jnp.asarray(cond).astype(kind))


def _check_kind(null: ArrayLike, own: Any) -> None:
  """Check that a null condition is of cond's kind: a label for labels, and a number that stays finite for numbers."""
  given = jnp.result_type(null)
  whole = jnp.issubdtype(own, jnp.integer) or own == jnp.bool_
  if whole and not jnp.issubdtype(given, jnp.integer) and given != own:
    raise ValueError(f"null_cond must be whole numbers as cond is, got {null!r}")
  if jnp.issubdtype(own, jnp.floating) and not isinstance(null, jax.core.Tracer):
    values = np.asarray(null, np.float64)
    with np.errstate(over="ignore"):
      lost = np.isfinite(values) & ~np.isfinite(values.astype(own))
    if lost.any():
      raise ValueError(f"null_cond {null!r} is infinite in cond's type, {own.name}: give conditions of a larger type")


def _alike(null: Array, cond: Array) -> tuple[Array, Array]:
  return shard_like(null, cond), cond


def shard_like(value: Array, like: Array) -> Array:
  """Give a value the mesh axes that another is spread over; a choice between both needs it where they are Explicit."""
  meshes = jax.sharding.get_abstract_mesh(), jax.typeof(like).sharding.mesh
  if any(jax.sharding.AxisType.Explicit in mesh.axis_types for mesh in meshes):
    nothing = (like != like) & False  # noqa: PLR0124, of the shape and the axes of the other
    value = value | nothing if value.dtype == jnp.bool_ else value + nothing.astype(value.dtype)
  return value


def _holds(kind: Any, values: np.ndarray) -> bool:
  if not jnp.issubdtype(kind, jnp.integer):
    return False
  limits = jnp.iinfo(kind)
  return bool((values >= limits.min).all() and (values <= limits.max).all())
