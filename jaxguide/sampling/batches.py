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

from jaxguide._core import checks, keys
from jaxguide._core.devices import placement
from jaxguide._core.typing import ArrayLike, Denoiser, Float, Key, PyTree, Solver
from jaxguide.denoisers.conditions import check_cond
from jaxguide.guidance.rule import check_denoiser
from jaxguide.sampling.keys import check_indices, keys_of
from jaxguide.sampling.loop import check_start, sample


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
  x_init: ArrayLike | Callable[[np.ndarray], np.ndarray] | None = None,
  add_noise: bool = False,
) -> Float[np.ndarray, " num *shape"]:
  """Draw many examples: compiled, in micro-batches, spread over the devices.

  Nothing compiles anew for other scales, weights, labels, keys or levels, nor for a short last micro-batch. On an
  NVIDIA GPU a network's float32 products are TF32 (6.6e-4 from float64's result on an H100, against 1.1e-6) unless
  ``jax.default_matmul_precision("highest")`` holds.

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
    x_init: (num, *shape), or (*shape) for every sample: start from these at ``sigmas[0]``, and not from noise; `invert`
      finds the start that leads back to an image. Or a function that gives (n, *shape) for n samples when they are
      drawn, counted from 0, where all would not fit in memory.
    add_noise: whether ``x_init`` is clean, and each sample's own noise is added to it: image to image.

  Returns:
    (num, *shape) in host memory.

  Raises:
    ValueError: for a bad grid, a label outside the classes, lengths in ``cond`` that differ, a count below 1, an index
      above `jaxguide.keys.MAX_INDEX`, a device named twice, an ``x_init`` of another shape or not finite, or
      ``add_noise`` without one.
    TypeError: if ``denoise`` is not a pytree of arrays, ``key`` no random key, ``solver`` no solver, ``cond`` no
      numbers; or inside ``jit``, where `sample` belongs.
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
    x_init=x_init,
    add_noise=add_noise,
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
  x_init: ArrayLike | Callable[[np.ndarray], np.ndarray] | None = None,
  add_noise: bool = False,
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
    x_init: where to start from, as in `sample_batch`.
    add_noise: whether noise is added to it.

  Returns:
    An iterator over arrays (n, *shape) in host memory.

  Raises:
    ValueError, TypeError: as `sample_batch`, before the first is drawn.
    FloatingPointError: if a sample is not finite.
  """
  if isinstance(jnp.zeros(()), jax.core.Tracer):
    raise TypeError(
      "sample_batch compiles itself and cannot run inside jit, vmap or grad: call it outside, or use jax.vmap of "
      "jaxguide.sample there"
    )
  checks.sigmas(sigmas)
  check_denoiser(denoise)
  checks.solver(solver)
  cond = jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, list) else leaf, cond, is_leaf=_is_numbers)
  check_cond((denoise, solver), checks.cond(cond))
  _check_pytree("denoise", denoise)
  _check_pytree("solver", solver)
  shape, key = checks.shape("shape", shape), keys.threefry(key)
  num, cond = _broadcast(cond, num)
  num, start = check_indices(num, start, 1)
  check_start(x_init, add_noise)
  starts = x_init if callable(x_init) else _starts(x_init, num, shape)
  place = placement(devices)
  size = num if batch_size is None else min(num, checks.at_least("batch_size", batch_size, 1))
  size = math.ceil(size / len(place.devices)) * len(place.devices)
  fixed = place.copies((denoise, jnp.asarray(sigmas), solver))
  skip = checks.at_least("skip", skip, 0)
  static = {"shape": shape, "add_noise": bool(add_noise)}
  return _micro_batches(fixed, place, key, cond, starts, static, range(skip, num, size), start)


def _starts(x_init, num, shape):
  """Give the function of the samples' numbers that looks their starts up."""
  if x_init is None:
    return lambda rows: None
  x_init = np.asarray(checks.finite("x_init", np.asarray(x_init)))
  if x_init.shape not in (shape, (num, *shape)):
    raise ValueError(f"x_init must have the shape {(num, *shape)} of the samples or {shape}, got {x_init.shape}")
  return np.broadcast_to(x_init, (num, *shape)).__getitem__


def _micro_batches(fixed, place, key, cond, starts, static, firsts, start):
  num, size = firsts.stop, firsts.step
  for first in firsts:
    # The last micro-batch is filled up with copies of the last sample, so that every one has the same shape.
    rows = np.minimum(np.arange(first, first + size), num - 1)
    x_init = starts(rows)
    if x_init is not None and np.shape(x_init) != (size, *static["shape"]):
      raise ValueError(f"x_init must give {(size, *static['shape'])} for {size} samples, got {np.shape(x_init)}")
    inputs = keys_of(key, start + rows), _rows(cond, rows), x_init
    made = np.asarray(_sample_many(*fixed, *place.rows(inputs), **static))
    made = made[: num - first]
    _check_finite(made, fixed, inputs, static, start + first)
    yield made


@functools.partial(jax.jit, static_argnames=("shape", "add_noise"))
def _sample_many(denoise, sigmas, solver, keys, cond, x_init, *, shape, add_noise):
  def one(key, cond, x_init):
    return sample(denoise, key, shape, sigmas, solver, cond, None, x_init, add_noise)[0]

  return jax.vmap(one)(keys, cond, x_init)


@functools.partial(jax.jit, static_argnames=("shape", "add_noise"))
def _finite_steps(denoise, sigmas, solver, key, cond, x_init, *, shape, add_noise):
  finite = lambda state: jnp.isfinite(state.x).all()  # noqa: E731
  return sample(denoise, key, shape, sigmas, solver, cond, finite, x_init, add_noise)[1]


def _rows(tree, rows):
  return jax.tree.map(lambda leaf: leaf[rows], tree)


def _check_finite(made, fixed, inputs, static, first):
  bad = np.flatnonzero(~np.isfinite(made).reshape(len(made), -1).all(1))
  if bad.size:
    row = bad[0]
    # Only now, since looking at every step costs time: walk the first bad sample's path again.
    finite = _finite_steps(*fixed, *_rows(inputs, row), **static)
    step = int(np.argmin(np.asarray(finite)))
    raise FloatingPointError(
      f"{bad.size} of {len(made)} samples are not finite; sample {first + row} first at step {step} of {len(finite)}, "
      f"sigma {float(fixed[1][step]):.4g}. Look at the parameters and the scale"
    )


def _is_numbers(node: Any) -> bool:
  """Whether this is a list of numbers, or of such lists: what somebody writes for an array."""
  numbers = int | float | np.generic | np.ndarray
  return isinstance(node, list) and all(isinstance(item, numbers) or _is_numbers(item) for item in node)


def _check_pytree(name: str, tree: PyTree) -> None:
  for leaf in jax.tree.leaves(tree):
    if callable(leaf) or not isinstance(leaf, int | float | complex | np.generic | np.ndarray | jax.Array):
      raise TypeError(
        f"{name} must be a pytree of arrays, but holds {leaf!r}; make a function of your own one with "
        "jax.tree_util.Partial(function, params), its arrays in params and not in a closure. Of an Equinox module the "
        "params are its arrays, equinox.partition(module, equinox.is_array)[0]; combine them with the rest in apply"
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
