"""Explicit promotion of types. All other code runs under JAX's strict dtype promotion."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core.typing import Array, ArrayLike


@contextlib.contextmanager
def standard() -> Iterator[None]:
  """Use JAX's standard promotion of types and ranks, for code of other libraries that needs it, such as Optax.

  >>> with standard():
  ...   (jnp.ones(2, jnp.bfloat16) + jnp.ones((3, 2))).shape
  (3, 2)
  """
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    yield


def together(*values: ArrayLike) -> list[Array]:
  """Convert numbers to arrays of one type, by JAX's standard promotion even if JAX is configured to be strict.

  >>> [leaf.dtype.name for leaf in together(jnp.ones(2, jnp.bfloat16), jnp.float32(1), 2)]
  ['float32', 'float32', 'float32']
  """
  with jax.numpy_dtype_promotion("standard"):
    dtype = jnp.result_type(*values)
  return [jnp.asarray(value, dtype) for value in values]


def same_type(null: ArrayLike, cond: ArrayLike) -> tuple[Array, Array]:
  """Convert a null condition and a condition to arrays of one type that can hold both.

  This is the condition's type. If it is an integer type that cannot hold the null label, such as 300 in ``uint8``, it
  is a larger integer type.

  Raises:
    ValueError: if no type can hold both, or one is integer and the other is not.

  >>> [leaf.dtype.name for leaf in same_type(300, np.uint8(1))]
  ['int32', 'int32']
  """
  cond_dtype = jnp.result_type(cond)
  _check_kind(null, cond_dtype)
  is_bool = cond_dtype == jnp.bool_
  whole = jnp.issubdtype(cond_dtype, jnp.integer) or is_bool
  if not whole or getattr(null, "dtype", None) == cond_dtype or (is_bool and isinstance(null, bool | np.bool_)):
    return _same_sharding(jnp.asarray(null, cond_dtype), jnp.asarray(cond))
  if isinstance(null, jax.core.Tracer):
    promoted = np.promote_types(cond_dtype, null.dtype)
    dtype = jax.dtypes.canonicalize_dtype(promoted)
    if dtype != promoted:
      raise ValueError(
        f"no type of JAX holds both null_cond's type {null.dtype} and cond's type {cond_dtype.name}: give both one type"
      )
  else:
    limits = [0, 1] if is_bool else [jnp.iinfo(cond_dtype).min, jnp.iinfo(cond_dtype).max]
    values = np.append(np.asarray(null, object), limits)
    dtypes = [cond_dtype] if not is_bool else []
    dtypes += [np.promote_types(cond_dtype, np.int32), np.promote_types(cond_dtype, np.int64)]
    dtypes = [dtype for dtype in map(jax.dtypes.canonicalize_dtype, dtypes) if _holds(dtype, values)]
    if not dtypes:
      raise ValueError(f"null_cond {null!r} does not fit cond's type, {cond_dtype.name}: give labels of a larger type")
    dtype = dtypes[0]
  return _same_sharding(jnp.asarray(null).astype(dtype), jnp.asarray(cond).astype(dtype))


def _check_kind(null: ArrayLike, cond_dtype: Any) -> None:
  """Check that a null condition is whole if cond is, and that it is not infinite in cond's type if that is floating."""
  null_dtype = jnp.result_type(null)
  whole = jnp.issubdtype(cond_dtype, jnp.integer) or cond_dtype == jnp.bool_
  if whole and not jnp.issubdtype(null_dtype, jnp.integer) and null_dtype != cond_dtype:
    raise ValueError(f"null_cond must be whole numbers as cond is, got {null!r}")
  if jnp.issubdtype(cond_dtype, jnp.floating) and not isinstance(null, jax.core.Tracer):
    values = np.asarray(null, np.float64)
    with np.errstate(over="ignore"):
      overflows = np.isfinite(values) & ~np.isfinite(values.astype(cond_dtype))
    if overflows.any():
      raise ValueError(
        f"null_cond {null!r} is infinite in cond's type, {cond_dtype.name}: give conditions of a larger type"
      )


def _same_sharding(null: Array, cond: Array) -> tuple[Array, Array]:
  return shard_like(null, cond), cond


def shard_like(value: Array, like: Array) -> Array:
  """Give ``value`` the sharding of ``like`` if mesh axes are Explicit. ``jnp.where`` requires it there."""
  meshes = jax.sharding.get_abstract_mesh(), jax.typeof(like).sharding.mesh
  if any(jax.sharding.AxisType.Explicit in mesh.axis_types for mesh in meshes):
    nothing = (like != like) & False  # noqa: PLR0124, all False, with the shape and the sharding of like
    value = value | nothing if value.dtype == jnp.bool_ else value + nothing.astype(value.dtype)
  return value


def _holds(dtype: Any, values: np.ndarray) -> bool:
  """Whether a type is an integer type whose range contains the values."""
  if not jnp.issubdtype(dtype, jnp.integer):
    return False
  limits = jnp.iinfo(dtype)
  return bool((values >= limits.min).all() and (values <= limits.max).all())
