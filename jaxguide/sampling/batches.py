"""Many samples: compiled, in micro-batches, on one or several devices of one or several processes.

Sample ``i`` depends on the key, ``i`` and its condition alone. It is the same alone, in a batch of any size and on any
number of devices and processes, up to the rounding of the network's sums.

Each device draws its own part of a micro-batch, and the devices do not communicate. Only parameters that are split over
devices are gathered, at each evaluation of the denoiser.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxguide._core import checks, keys
from jaxguide._core.typing import ArrayLike, Denoiser, Float, Key, PyTree, Solver
from jaxguide.denoisers.conditions import check_cond
from jaxguide.distributed import MeshConfig, processes
from jaxguide.distributed.placing import Placement, placement
from jaxguide.guidance.rule import check_denoiser
from jaxguide.sampling.keys import check_indices, keys_of
from jaxguide.sampling.loop import check_start, sample
from jaxguide.sampling.split import split_of

Devices = Sequence[jax.Device] | Mesh | MeshConfig | str | None


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
  devices: Devices = None,
  progress: Callable[[int], object] | None = None,
  x_init: ArrayLike | Callable[[np.ndarray], np.ndarray] | None = None,
  add_noise: bool = False,
) -> Float[np.ndarray, " num *shape"]:
  """Draw many examples: compiled, in micro-batches, distributed over the devices.

  Other scales, weights, labels, keys or noise levels do not compile a new program, nor does a short last micro-batch.
  On an NVIDIA GPU JAX multiplies float32 in TF32, unless ``jax.default_matmul_precision("highest")`` is set. On an H100
  results differ from float64's by 6.6e-4 with TF32, and by 1.1e-6 with "highest".

  Args:
    denoise: a pytree, as the denoisers and guided denoisers here are. Make your own function a pytree with
      ``jax.tree_util.Partial(function, params)``, where ``function(params, x, sigma, cond) -> x0`` is of one example.
      Arrays that the function closes over, and does not receive as ``params``, become constants of the program.
    key: sample ``i`` has the key ``fold_in(key, i)``.
    cond: a pytree whose leaves have shape (num, ...); or, together with ``num``, one number, such as a label, for all
      samples; or None.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0.
    solver: see `jaxguide.solvers`.
    num: number of samples. It can be left out if ``cond`` has a row for each sample.
    start: index of the first sample, to continue after an earlier call.
    batch_size: the largest number of samples at a time, over all devices. The default is all samples.
    devices: the devices that run the program: a list, a mesh, or a `jaxguide.distributed.MeshConfig` or its text, such
      as ``"fsdp=8"``, which splits the parameters. The default is all devices of all processes. Parameters that are
      split over the mesh already stay so.
    progress: called after each micro-batch with its number of samples; ``tqdm(...).update`` fits.
    x_init: ``x`` at ``sigmas[0]``, in place of noise: (num, *shape), or (*shape) for all samples. `invert` finds the
      start that gives an image. If the starts do not all fit in memory, give a function: it receives the positions of n
      samples in this call, counted from 0, and returns (n, *shape).
    add_noise: whether each sample's initial noise is added to ``x_init``, which is then clean: image to image.

  Returns:
    (num, *shape) in host memory, in every process.

  Raises:
    ValueError: if the grid is bad, a label is outside the classes, lengths in ``cond`` differ, a count is below 1, an
      index is above `jaxguide.keys.MAX_INDEX`, a device is named twice, ``x_init`` has another shape or is not finite,
      or ``add_noise`` is set without ``x_init``.
    TypeError: if ``denoise`` is not a pytree of arrays, ``key`` is not a random key, ``solver`` is not a solver, or
      ``cond`` does not hold numbers; or if called inside ``jit`` (use `sample` there).
    FloatingPointError: if a sample is not finite. The message names the sample and the step.

  >>> from jaxguide import guidance, mixtures, schedules, solvers
  >>> ring = mixtures.ring(4)
  >>> guided = guidance.classifier_free(4, 3.0)(ring.denoiser)
  >>> sample_batch(
  ...   guided, jax.random.key(0), 1, num=5, shape=(2,), sigmas=schedules.karras(8), solver=solvers.DPMpp2M()
  ... ).shape
  (5, 2)
  """
  batches = []
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
    batches.append(x)
    if progress is not None:
      progress(len(x))
  return np.concatenate(batches)


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
  devices: Devices = None,
  skip: int = 0,
  x_init: ArrayLike | Callable[[np.ndarray], np.ndarray] | None = None,
  add_noise: bool = False,
) -> Iterator[Float[np.ndarray, " n *shape"]]:
  """Draw many examples as `sample_batch` does, and yield one micro-batch after another.

  The micro-batches are not stored, so the samples together can be larger than the memory. All arguments but ``skip``
  are those of `sample_batch`.

  Args:
    denoise: a denoiser that is a pytree.
    key: sample ``i`` has the key ``fold_in(key, i)``.
    cond: a pytree whose leaves have shape (num, ...); or, together with ``num``, one number for all samples; or None.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0.
    solver: see `jaxguide.solvers`.
    num: number of samples. It can be left out if ``cond`` has a row for each sample.
    start: index of the first sample.
    batch_size: the largest number of samples at a time, over all devices. The default is all samples.
    devices: the devices that run the program, as in `sample_batch`.
    skip: number of samples, of the ``num``, that an interrupted run has already drawn. The other samples are the same
      as in that run, bit for bit if ``skip`` is a whole number of micro-batches.
    x_init: ``x`` at ``sigmas[0]``, as in `sample_batch`.
    add_noise: whether noise is added to ``x_init``.

  Returns:
    An iterator over arrays (n, *shape) in host memory, the same in every process.

  Raises:
    ValueError, TypeError: as in `sample_batch`, before the first micro-batch.
    FloatingPointError: if a sample is not finite.
  """
  batches = _begin(denoise, key, cond, shape, sigmas, solver, num, start, batch_size, devices, skip, x_init, add_noise)
  return (np.asarray(processes.gathered(batch.samples))[: batch.num] for batch in batches)


def sample_shares(
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
  devices: Devices = None,
  skip: int = 0,
  x_init: ArrayLike | Callable[[np.ndarray], np.ndarray] | None = None,
  add_noise: bool = False,
) -> Iterator[Share]:
  """Draw many examples as `sample_batches` does, and yield of each micro-batch what this process drew.

  So no process needs the memory or the time for the samples of the others. All arguments are those of `sample_batches`.

  Args:
    denoise: a denoiser that is a pytree.
    key: sample ``i`` has the key ``fold_in(key, i)``.
    cond: the conditions of all ``num`` samples; or, together with ``num``, one number for all of them; or None.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0.
    solver: see `jaxguide.solvers`.
    num: number of samples of all processes. It can be left out if ``cond`` has a row for each sample.
    start: index of the first sample.
    batch_size: the largest number of samples at a time, over all devices.
    devices: the devices that run the program, as in `sample_batch`.
    skip: number of samples that an interrupted run has already drawn.
    x_init: ``x`` at ``sigmas[0]``, as in `sample_batch`.
    add_noise: whether noise is added to ``x_init``.

  Returns:
    An iterator over `Share`.

  Raises:
    ValueError, TypeError: as in `sample_batch`, before the first micro-batch.
    FloatingPointError: in every process, if a sample is not finite.

  >>> from jaxguide import mixtures, schedules, solvers
  >>> shares = sample_shares(
  ...   mixtures.ring(4).denoiser, jax.random.key(0), 1, num=5, shape=(2,), sigmas=schedules.karras(3),
  ...   solver=solvers.DDPM(), batch_size=4,
  ... )
  >>> [(share.first, share.num, share.rows.tolist()) for share in shares]  # one process draws all
  [(0, 4, [0, 1, 2, 3]), (4, 1, [4])]
  """
  batches = _begin(denoise, key, cond, shape, sigmas, solver, num, start, batch_size, devices, skip, x_init, add_noise)
  return (_share(batch) for batch in batches)


class Share(NamedTuple):
  """What a process drew of a micro-batch.

  Args:
    first: the position of the first sample of the micro-batch in this call, counted from 0.
    num: number of samples of the micro-batch, of all processes.
    rows: (n,) the positions in this call of the samples that this process drew.
    samples: (n, *shape) these samples, in host memory.
  """

  first: int
  num: int
  rows: np.ndarray
  samples: np.ndarray


class _Batch(NamedTuple):
  """A micro-batch on the devices; its last rows may be copies of the last sample."""

  first: int
  num: int
  samples: jax.Array
  place: Placement


def _share(batch: _Batch) -> Share:
  rows = batch.place.local_rows(len(batch.samples))
  if batch.samples.is_fully_addressable:
    samples = np.asarray(batch.samples)
  else:
    # A part that several devices have occurs once.
    parts = {shard.index[0].start or 0: shard.data for shard in batch.samples.addressable_shards}
    samples = np.concatenate([np.asarray(parts[begin]) for begin in sorted(parts)])
  kept = rows < batch.num
  return Share(batch.first, batch.num, batch.first + rows[kept], samples[kept])


def _begin(denoise, key, cond, shape, sigmas, solver, num, start, batch_size, devices, skip, x_init, add_noise):
  """Check the arguments, place what is the same for all samples, and return an iterator over `_Batch`."""
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
  size = math.ceil(size / place.parts) * place.parts
  skip = checks.at_least("skip", skip, 0)
  split = split_of(denoise, place)
  fixed = (split.placed(denoise), *place.copies((jnp.asarray(sigmas), solver)))
  static = {"shape": shape, "add_noise": bool(add_noise), "split": split}
  return _micro_batches(fixed, place, key, cond, starts, static, range(skip, num, size), start)


def lower_batch(
  denoise: Denoiser,
  cond: PyTree = None,
  *,
  num: int,
  shape: Sequence[int],
  sigmas: ArrayLike,
  solver: Solver,
  devices: Devices = None,
) -> jax.stages.Lowered:
  """Lower the program that `sample_batch` runs for a micro-batch, to compile and read it. Nothing is computed.

  Args:
    denoise: a denoiser that is a pytree. Its arrays may be shapes, `jax.ShapeDtypeStruct`.
    cond: the conditions of the samples, or one number for all of them.
    num: number of samples in the micro-batch, over all devices; a multiple of their number.
    shape: shape of one example.
    sigmas: (steps + 1,) noise levels that decrease and end in 0.
    solver: see `jaxguide.solvers`.
    devices: the devices, as in `sample_batch`.

  >>> from jaxguide import mixtures, schedules, solvers
  >>> lowered = lower_batch(
  ...   mixtures.ring(4).denoiser, 1, num=8, shape=(2,), sigmas=schedules.karras(3), solver=solvers.DDPM()
  ... )
  >>> "while" in lowered.as_text()
  True
  """
  place, (num, cond) = placement(devices), _broadcast(cond, num)
  if num % place.parts:
    raise ValueError(f"num must be a multiple of the {place.parts} devices, got {num}")
  split = split_of(denoise, place)

  def shapes(tree, shardings):
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: tree))
    placed = [
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=each) for leaf, each in zip(leaves, shardings, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)

  def same(tree, sharding):
    return shapes(tree, [sharding] * len(jax.tree.leaves(tree)))

  grid, walk = same((jnp.asarray(sigmas), solver), place.copied)
  keys, rows = same((jax.eval_shape(lambda: keys_of(jax.random.key(0), np.arange(num))), cond), place.split)
  of_devices = shapes(denoise, split.shardings)
  return _sample_many.lower(of_devices, grid, walk, keys, rows, None, shape=tuple(shape), add_noise=False, split=split)


def _starts(x_init, num, shape):
  """Return a function that maps the positions of samples to their starts, or to None without ``x_init``."""
  if x_init is None:
    return lambda rows: None
  x_init = np.asarray(checks.finite("x_init", np.asarray(x_init)))
  if x_init.shape not in (shape, (num, *shape)):
    raise ValueError(f"x_init must have the shape {(num, *shape)} of the samples or {shape}, got {x_init.shape}")
  return np.broadcast_to(x_init, (num, *shape)).__getitem__


def _micro_batches(fixed, place, key, cond, starts, static, firsts, start):
  num, size = firsts.stop, firsts.step
  for first in firsts:
    # The last micro-batch is filled with copies of the last sample, so that all micro-batches have the same shape.
    rows = np.minimum(np.arange(first, first + size), num - 1)
    x_init = starts(rows)
    if x_init is not None and np.shape(x_init) != (size, *static["shape"]):
      raise ValueError(f"x_init must give {(size, *static['shape'])} for {size} samples, got {np.shape(x_init)}")
    inputs = keys_of(key, start + rows), _rows(cond, rows), x_init
    samples, finite = _sample_many(*fixed, *place.rows(inputs), **static)
    batch = _Batch(first, min(size, num - first), samples, place)
    _check_finite(np.asarray(processes.gathered(finite))[: batch.num], fixed, inputs, static, start + first)
    yield batch


@functools.partial(jax.jit, static_argnames=("shape", "add_noise", "split"))
def _sample_many(denoise, sigmas, solver, keys, cond, x_init, *, shape, add_noise, split):
  leaves, structure = jax.tree.flatten(denoise)

  def on_device(leaves, sigmas, solver, keys, cond, x_init):
    whole = split.gathering(jax.tree.unflatten(structure, leaves))

    def draw(key, cond, x_init):
      return sample(whole, key, shape, sigmas, solver, cond, None, x_init, add_noise)[0]

    samples = jax.vmap(draw)(keys, cond, x_init)
    return samples, jnp.isfinite(samples).reshape(len(samples), -1).all(1)

  place = split.place
  if len(place.devices) == 1:
    return on_device(leaves, sigmas, solver, keys, cond, x_init)
  # Each device runs the program of a single one: the partitioner decides nothing but the layers split over `tensor`.
  rows, same = PartitionSpec(place.batch_axes), PartitionSpec()
  return jax.shard_map(
    on_device,
    mesh=place.mesh,
    in_specs=(list(split.gathered), same, same, rows, rows, rows),
    out_specs=rows,
    axis_names={*place.batch_axes, *split.axes},
    check_vma=False,
  )(leaves, sigmas, solver, keys, cond, x_init)


@functools.partial(jax.jit, static_argnames=("shape", "add_noise", "split"))
def _finite_steps(denoise, sigmas, solver, key, cond, x_init, *, shape, add_noise, split):
  del split
  finite = lambda state: jnp.isfinite(state.x).all()  # noqa: E731
  return sample(denoise, key, shape, sigmas, solver, cond, finite, x_init, add_noise)[1]


def _rows(tree, rows):
  return jax.tree.map(lambda leaf: leaf[rows], tree)


def _check_finite(finite, fixed, inputs, static, first):
  bad = np.flatnonzero(~finite)
  if bad.size:
    row = int(bad[0])
    # A check in every step would cost time, so the first bad sample is drawn again to find its step.
    steps = np.asarray(processes.gathered(_finite_steps(*fixed, *_rows(inputs, row), **static)))
    step = int(np.argmin(steps))
    raise FloatingPointError(
      f"{bad.size} of {len(finite)} samples are not finite; sample {first + row} first at step {step} of "
      f"{len(steps)}, sigma {float(fixed[1][step]):.4g}: check the parameters and the scale{_labels(inputs[1], row)}"
    )


def _labels(cond: PyTree, row: int) -> str:
  """Say that the labels of a sample may be the cause: Flax gives NaN for a label that an embedding does not have."""
  leaves = [np.asarray(leaf[row]) for leaf in jax.tree.leaves(cond)]
  labels = [str(label) for leaf in leaves if leaf.dtype.kind in "iu" and leaf.size <= 8 for label in leaf.ravel()]
  if not labels:
    return ""
  named = f"label{'s' if len(labels) > 1 else ''} {', '.join(labels)}"
  return f", and that the network has {named} and the null label of its guidance"


def _is_numbers(node: Any) -> bool:
  """Whether ``node`` is a list of numbers or of such lists, and so stands for an array."""
  numbers = int | float | np.generic | np.ndarray
  return isinstance(node, list) and all(isinstance(item, numbers) or _is_numbers(item) for item in node)


def _check_pytree(name: str, tree: PyTree) -> None:
  for leaf in jax.tree.leaves(tree):
    if callable(leaf) or not isinstance(leaf, int | float | complex | np.generic | np.ndarray | jax.Array):
      raise TypeError(
        f"{name} must be a pytree of arrays, but holds {leaf!r}; make your own function a pytree with "
        "jax.tree_util.Partial(function, params), with its arrays in params and not in a closure. For an Equinox "
        "module, params is equinox.partition(module, equinox.is_array)[0]; call equinox.combine in apply"
      )


def _broadcast(cond: PyTree, num: int | None) -> tuple[int, PyTree]:
  """Return the number of samples, and a condition whose leaves have that many rows."""
  if num is not None:
    num = checks.at_least("num", num, 1)
  leaves = jax.tree.leaves(cond)
  if num is not None and all(np.ndim(leaf) == 0 for leaf in leaves):
    return num, jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf), (num,)), cond)
  lengths = {np.shape(leaf)[0] if np.ndim(leaf) else None for leaf in leaves}
  if num is not None:
    lengths |= {num}
  if not lengths:
    raise ValueError("the number of samples is not known: give num, or a cond with a row for each sample")
  if len(lengths) > 1 or None in lengths:
    raise ValueError(f"each leaf of cond must have one row for each sample; num and the leaves have lengths {lengths}")
  return checks.at_least("the number of samples", lengths.pop(), 1), jax.tree.map(np.asarray, cond)
