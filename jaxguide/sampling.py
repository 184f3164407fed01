"""Sampling: the loop over a grid of noise levels, its keys, and batches of any size on any number of devices.

`sample` draws one example and is what to use inside one's own ``jit`` and ``vmap``; `sample_batch` is the finished
article around it. Sample ``i`` depends on the key, ``i`` and its condition alone: it comes out the same by itself, in
a batch of any size and on any number of devices (to the rounding of the network's sums).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide import checks, memory
from jaxguide.denoisers import check_cond
from jaxguide.solvers.base import Conditioned
from jaxguide.typing import ArrayLike, Denoiser, Example, Float, Key, PyTree, Solver


def sample(
  denoise: Denoiser,
  key: Key,
  shape: Sequence[int],
  sigmas: ArrayLike,
  solver: Solver,
  cond: PyTree = None,
  collect: Callable[[Any], PyTree] | None = None,
  x_init: Example | None = None,
) -> tuple[Example, PyTree]:
  """Draw one example by walking down a grid of noise levels.

  One ``lax.scan``; its memory does not depend on the number of steps unless ``collect`` asks for a history.

  Args:
    denoise: ``(x, sigma, cond) -> x0``, guided or not.
    key: the sample's own key, from which the start and each step's noise are made.
    shape: shape of the example, without a batch axis.
    sigmas: (steps + 1,) noise levels that decrease and end in 0; see `jaxguide.schedules`. Their type is the sample's.
    solver: see `jaxguide.solvers`.
    cond: one example's condition, handed to ``denoise``.
    collect: ``state -> pytree``, called after every step; what it gives is stacked along a first axis of ``steps``.
      ``lambda state: state.x0`` shows what the denoiser saw.
    x_init: start from this at ``sigmas[0]`` instead of from noise, ``sigmas[0] * eps``. (The loops of DDPM start from
      ``x_t = eps``, which is ``sqrt(1 + sigmas[0]²) * eps`` here: at a network's noisiest levels, the same to 1e-4.)

  Returns:
    The example, and what ``collect`` gave (``None`` without it).

  Raises:
    ValueError: for a grid that does not decrease or end in 0, a label outside the classes, or an ``x_init`` of another
      shape.

  >>> from jaxguide import mixtures, schedules, solvers
  >>> ring = mixtures.ring(4)
  >>> x, xs = sample(
  ...   ring.denoiser, jax.random.key(0), (2,), schedules.karras(8), solvers.Heun(), cond=1, collect=lambda s: s.x
  ... )
  >>> x.shape, xs.shape, bool(jnp.linalg.norm(x - jnp.array([0.0, 1.0])) < 0.5)
  ((2,), (8, 2), True)
  """
  checks.sigmas(sigmas)
  check_cond((denoise, solver), cond)
  sigmas = jnp.asarray(sigmas)
  if not jnp.issubdtype(sigmas.dtype, jnp.floating):
    sigmas = sigmas.astype(float)
  start_key, step_key = jax.random.split(key)
  if x_init is None:
    x = sigmas[0] * jax.random.normal(start_key, tuple(shape), sigmas.dtype)
  elif x_init.shape == tuple(shape):
    x = x_init.astype(sigmas.dtype)
  else:
    raise ValueError(f"x_init must have the shape {tuple(shape)} of the example, got {x_init.shape}")

  def step(carry, inputs):
    state, remembered = carry
    i, sigma, sigma_next = inputs
    said: list[Any] = []
    conditioned = Conditioned(memory.noticed(memory.recall(denoise, remembered), said), cond)
    state = solver.step(conditioned, state, sigma, sigma_next, jax.random.fold_in(step_key, i))
    kept = memory.after(said)
    if (kept is None) != (remembered is None):
      raise ValueError("a guidance with momentum is hidden in a function that is no pytree: make it one with Partial")
    return (state, kept), None if collect is None else collect(state)

  steps = (jnp.arange(sigmas.shape[0] - 1), sigmas[:-1], sigmas[1:])
  first = memory.find(denoise)
  start = solver.init(x), None if first is None else first.or_zeros(x)
  (state, _), history = jax.lax.scan(step, start, steps)
  return state.x, history


def sample_keys(key: Key, num: int, start: int = 0) -> Key:
  """Give the keys of samples ``start`` to ``start + num - 1``: ``fold_in(key, i)``.

  >>> sample_keys(jax.random.key(0), 3).shape
  (3,)
  """
  num, start = checks.at_least("num", num, 0), checks.at_least("start", start, 0)
  return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(start, start + num))


def sample_batch(
  denoise: Denoiser,
  key: Key,
  cond: PyTree = None,
  *,
  shape: Sequence[int],
  sigmas: ArrayLike,
  solver: Solver,
  num: int | None = None,
  start: int = 0,
  batch_size: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  progress: Callable[[int], object] | None = None,
) -> Float[np.ndarray, " num *shape"]:
  """Draw many examples: compiled, in micro-batches, spread over the devices.

  Nothing compiles anew for other scales, weights, labels, keys or levels, nor for a short last micro-batch.

  Args:
    denoise: a pytree, as the denoisers and guidances here are. For a function of your own,
      ``jax.tree_util.Partial(function, params)`` with ``function(params, x, sigma, cond) -> x0`` of one example. Arrays
      that such a function closes over, and does not take as ``params``, become constants of the program.
    key: sample ``i`` is made from ``fold_in(key, i)``.
    cond: each leaf (num, ...); or, with ``num``, one number, as a label, for every sample; or None.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0.
    solver: see `jaxguide.solvers`.
    num: how many, if ``cond`` does not say.
    start: index of the first sample, to go on where an earlier call ended.
    batch_size: the most samples at a time, over all devices; all at once if left out.
    devices: where to run; all devices of this process if left out.
    progress: called with the number of samples just made, after each micro-batch (``tqdm(...).update`` fits).

  Returns:
    (num, *shape) in host memory.

  Raises:
    ValueError: for a bad grid, a label outside the classes, lengths in ``cond`` that differ, or a count below 1.
    TypeError: if ``denoise`` is not a pytree of arrays.
    FloatingPointError: if a sample is not finite, naming it and the step where it happened.

  >>> from jaxguide import guidance, mixtures, schedules, solvers
  >>> ring = mixtures.ring(4)
  >>> guided = guidance.classifier_free(4, 3.0)(ring.denoiser)
  >>> sample_batch(
  ...   guided, jax.random.key(0), 1, num=5, shape=(2,), sigmas=schedules.karras(8), solver=solvers.DPMpp2M()
  ... ).shape
  (5, 2)
  """
  made = []
  for x in sample_batches(
    denoise,
    key,
    cond,
    shape=shape,
    sigmas=sigmas,
    solver=solver,
    num=num,
    start=start,
    batch_size=batch_size,
    devices=devices,
  ):
    made.append(x)
    if progress is not None:
      progress(len(x))
  return np.concatenate(made)


def sample_batches(
  denoise: Denoiser,
  key: Key,
  cond: PyTree = None,
  *,
  shape: Sequence[int],
  sigmas: ArrayLike,
  solver: Solver,
  num: int | None = None,
  start: int = 0,
  batch_size: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  skip: int = 0,
) -> Iterator[Float[np.ndarray, " n *shape"]]:
  """Draw many examples as `sample_batch` does, one micro-batch after another.

  Nothing is kept, so that what is drawn may be more than fits.

  Args:
    denoise: as in `sample_batch`, and so the rest but one.
    key: sample ``i`` is made from ``fold_in(key, i)``.
    cond: each leaf (num, ...); or, with ``num``, one number for every sample; or None.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0.
    solver: see `jaxguide.solvers`.
    num: how many, if ``cond`` does not say.
    start: index of the first sample.
    batch_size: the most samples at a time, over all devices; all at once if left out.
    devices: where to run; all devices of this process if left out.
    skip: how many of the ``num`` there are already, from an earlier run that was cut off. The rest comes out as it
      would have then, to the last bit if ``skip`` is a whole number of micro-batches.

  Returns:
    An iterator over arrays (n, *shape) in host memory.

  Raises:
    ValueError, TypeError: as `sample_batch`, before the first is drawn.
    FloatingPointError: if a sample is not finite.
  """
  checks.sigmas(sigmas)
  check_cond((denoise, solver), cond)
  _check_pytree("denoise", denoise)
  _check_pytree("solver", solver)
  num, cond = _broadcast(cond, num)
  start = checks.at_least("start", start, 0)
  devices = jax.local_devices() if devices is None else list(devices)
  if not devices:
    raise ValueError("devices must name at least one device, or be left out to use all")
  size = num if batch_size is None else min(num, checks.at_least("batch_size", batch_size, 1))
  size = math.ceil(size / len(devices)) * len(devices)
  spread = jax.sharding.NamedSharding(
    jax.sharding.Mesh(np.asarray(devices), ("batch",)), jax.sharding.PartitionSpec("batch")
  )
  same = jax.sharding.NamedSharding(spread.mesh, jax.sharding.PartitionSpec())
  fixed = jax.device_put((denoise, jnp.asarray(sigmas), solver), same)

  skip = checks.at_least("skip", skip, 0)
  return _micro_batches(fixed, spread, key, cond, tuple(shape), range(skip, num, size), start)


def _micro_batches(fixed, spread, key, cond, shape, firsts, start):
  num, size = firsts.stop, firsts.step
  for first in firsts:
    # The last micro-batch is filled up with copies of the last sample, so that every one has the same shape.
    rows = np.minimum(np.arange(first, first + size), num - 1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(start + rows)
    conds = _rows(cond, rows)
    made = np.asarray(_sample_many(*fixed, *jax.device_put((keys, conds), spread), shape=shape))
    made = made[: num - first]
    _check_finite(made, fixed, keys, conds, shape, start + first)
    yield made


@functools.partial(jax.jit, static_argnames="shape")
def _sample_many(denoise, sigmas, solver, keys, cond, *, shape):
  return jax.vmap(lambda key, cond: sample(denoise, key, shape, sigmas, solver, cond)[0])(keys, cond)


@functools.partial(jax.jit, static_argnames="shape")
def _finite_steps(denoise, sigmas, solver, key, cond, *, shape):
  return sample(denoise, key, shape, sigmas, solver, cond, lambda state: jnp.isfinite(state.x).all())[1]


def _rows(tree, rows):
  return jax.tree.map(lambda leaf: leaf[rows], tree)


def _check_finite(made, fixed, keys, conds, shape, first):
  bad = np.flatnonzero(~np.isfinite(made).reshape(len(made), -1).all(1))
  if bad.size:
    row = bad[0]
    # Only now, since looking at every step costs time: walk the first bad sample's path again.
    finite = _finite_steps(*fixed, keys[row], _rows(conds, row), shape=shape)
    step = int(np.argmin(np.asarray(finite)))
    raise FloatingPointError(
      f"{bad.size} of {len(made)} samples are not finite; sample {first + row} first at step {step} of {len(finite)}, "
      f"sigma {float(fixed[1][step]):.4g}. Look at the parameters and the scale"
    )


def _check_pytree(name: str, tree: PyTree) -> None:
  for leaf in jax.tree.leaves(tree):
    if callable(leaf) or not isinstance(leaf, int | float | complex | np.generic | np.ndarray | jax.Array):
      raise TypeError(
        f"{name} must be a pytree of arrays, but holds {leaf!r}; make a function of your own one with "
        "jax.tree_util.Partial(function, params), its arrays in params and not in a closure"
      )


def _broadcast(cond: PyTree, num: int | None) -> tuple[int, PyTree]:
  """Give the number of samples and a condition whose leaves have that many rows."""
  if num is not None:
    num = checks.at_least("num", num, 1)
  leaves = jax.tree.leaves(cond)
  if num is not None and all(np.ndim(leaf) == 0 for leaf in leaves):
    return num, jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf), (num,)), cond)
  lengths = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in leaves}
  if num is not None:
    lengths |= {num}
  if not lengths:
    raise ValueError("say how many samples to draw: give num, or a cond with a row for each")
  if len(lengths) > 1 or None in lengths:
    raise ValueError(f"every leaf of cond must have one row for each sample; their lengths are {lengths}")
  return checks.at_least("the number of samples", lengths.pop(), 1), jax.tree.map(np.asarray, cond)
