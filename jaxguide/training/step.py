"""The training step and the training state."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxguide._core import devices, keys, promotion, struct
from jaxguide._core.typing import Leaf, PyTree
from jaxguide.distributed.placing import Placement, not_gathered
from jaxguide.models.config import ModelConfig
from jaxguide.models.initial import by_array, placed
from jaxguide.models.model import init_params, shapes
from jaxguide.models.networks import NETWORKS
from jaxguide.training import ema, optimizers
from jaxguide.training.config import TrainingConfig
from jaxguide.training.objectives import Objective, extra_params, objective


@struct.dataclass
class TrainState:
  """The state of a training run; a checkpoint contains one.

  Args:
    step: number of completed steps.
    params: the parameters, as Flax collections: the network's ``params``, and others that are trained together with it.
    means: the running means of the parameters, a tuple with one tree for each of `TrainingConfig.means`.
    opt_state: the state of the optimiser.
    skipped: number of steps that were stepped over because the loss or the gradient was not finite.
  """

  step: Leaf
  params: Leaf
  means: Leaf
  opt_state: Leaf
  skipped: Leaf

  @property
  def ema_params(self) -> PyTree:
    """The first running mean, which is the trained model."""
    return self.means[0]


def optimizer(config: TrainingConfig) -> optax.GradientTransformation:
  """Return the optimiser of a configuration, with gradient clipping and the learning-rate schedule."""
  made = optimizers.optimizer(config.optimizer, config.schedule(), config.weight_decay)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), made)


def train_step(model: ModelConfig, training: TrainingConfig, place: Placement | None = None) -> Callable[..., Any]:
  """Return the jitted training step ``(state, examples, labels) -> (state, metrics)``.

  With a placement on a mesh, the state is split by `Placement.shardings` and the batch by `Placement.rows`, and each
  device has the metrics of the whole batch. Parameters that are split are gathered where they are used, and again in
  the backward pass.

  The buffers of the state that goes in are donated: do not use that state again. ``examples`` have the type that the
  dataset stores, such as uint8 pixels; the model's encoder converts them to ``x0``.

  The metrics are arrays: ``loss``, ``rate`` (the learning rate), ``gradient_norm`` (before it is clipped), figures of
  the objective such as ``accuracy``, and for each example ``losses`` (n,) and ``sigmas`` (n,), its noise level.

  >>> import numpy as np
  >>> fields = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "num_head_channels": 8}
  >>> model, training = ModelConfig("unet", fields, (4, 4, 1), 2), TrainingConfig(steps=10, batch_size=6)
  >>> step, state = train_step(model, training), init_state(model, training)
  >>> state, metrics = step(state, np.zeros((6, 4, 4, 1), np.uint8), np.zeros(6, np.int32))
  >>> int(state.step), metrics["losses"].shape
  (1, (6,))
  """
  tx, rate, parts = optimizer(training), training.schedule(), training.accumulation
  # Inside a loop XLA's CPU backend is slow at the gradients of Flax's convolutions; the package's networks avoid it.
  loop = model.network in NETWORKS or jax.default_backend() != "cpu"
  frozen, forced = getattr(model.module, "frozen", ()), getattr(model.module, "forced", None)
  goal, shares = objective(model, training), [ema.newest_share(text, training.ema_decay) for text in training.means]

  def step(state: TrainState, examples, labels):
    draw_key, dropout_key = jax.random.split(jax.random.fold_in(keys.seed_key(training.seed), state.step))
    if forced is not None:
      state = dataclasses.replace(state, params={**state.params, **forced(state.params)})
    with jax.default_matmul_precision(training.matmul_precision):
      x0 = model.data.encode(examples)
      if any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(state.params)):
        x0 = x0.astype(np.float64)  # Parameters in double precision are trained in double precision.
      batch = goal.draw(draw_key, x0, labels)
      gradient, (losses, figures) = _gradient(goal, parts, place, loop=loop)(state.params, batch, dropout_key)
    with promotion.standard():  # Optax needs it.
      norm, learning_rate = optax.tree.norm(gradient), jnp.asarray(rate(state.step), jnp.float32)
      updates, opt_state = tx.update(gradient, state.opt_state, state.params)
      updates = _without(frozen, updates)
      params = optax.apply_updates(state.params, updates)
      means = tuple(
        optax.incremental_update(params, mean, share(state.step))
        for mean, share in zip(state.means, shares, strict=True)
      )
    loss, skipped = losses.mean(), state.skipped
    if training.skip_nan:
      ok = jnp.isfinite(loss) & jnp.isfinite(norm)
      new, old = (params, means, opt_state), (state.params, state.means, state.opt_state)
      params, means, opt_state = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)
      skipped += (~ok).astype(skipped.dtype)
    metrics = {
      "loss": loss,
      "rate": learning_rate,
      "gradient_norm": norm,
      **{name: values.mean() for name, values in figures.items()},
      "losses": losses,
      "sigmas": goal.sigmas(batch),
    }
    return TrainState(state.step + 1, params, means, opt_state, skipped), metrics

  if place is None or len(place.devices) == 1:
    return jax.jit(step, donate_argnums=0)
  return jax.jit(step, donate_argnums=0, out_shardings=(place.shardings(state_shapes(model, training)), place.copied))


def _without(frozen: Collection[str], updates: PyTree) -> PyTree:
  """Return updates that are 0 for parameters of these names, which an optimiser with weight decay would change."""
  if not frozen:
    return updates

  def hold(path: Any, leaf: Any) -> Any:
    return jnp.zeros_like(leaf) if path[-1].key in frozen else leaf

  return jax.tree_util.tree_map_with_path(hold, updates)


def _gradient(goal: Objective, parts: int, place: Placement | None, *, loop: bool) -> Callable[..., Any]:
  """Return ``(params, batch, key) -> (gradient, (errors, figures))``, computed in parts of the batch, one by one.

  Without ``loop`` the program has the parts one after another, and takes longer to compile.
  """

  def of_part(params, batch, key):
    def loss(params):
      errors, figures = goal.errors(params if place is None else place.whole(params), batch, key)
      return errors.mean(), (errors, figures)

    if place is not None:
      batch = place.constrained(batch)
      if place.fsdp > 1:  # What was gathered for the forward pass is not kept for the backward pass.
        loss = jax.checkpoint(loss, policy=not_gathered)
    (_, rows), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return gradient, rows

  if parts == 1:
    return of_part

  def divide(leaf):
    # Part j has the rows j, j + parts, ...: where rows are split over devices, each part is as well.
    leaf = leaf if place is None else place.constrained(leaf)
    leaf = jnp.swapaxes(leaf.reshape(-1, parts, *leaf.shape[1:]), 0, 1)
    return leaf if place is None else place.constrained(leaf, 1)

  def join(leaf):
    leaf = leaf if place is None else place.constrained(leaf, 1)
    return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])

  def of_batch(params, batch, key):
    batch = jax.tree.map(divide, batch)

    def add(total, number):
      rows = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), batch)
      gradient, figures = of_part(params, rows, jax.random.fold_in(key, number))
      return jax.tree.map(jnp.add, total, gradient), figures

    total = jax.tree.map(jnp.zeros_like, params)
    if loop:
      total, rows = jax.lax.scan(add, total, jnp.arange(parts))
    else:
      figures = []
      for number in range(parts):
        total, of_rows = add(total, number + _zero(total))
        figures.append(of_rows)
      rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *figures)
    return jax.tree.map(lambda leaf: leaf / parts, total), jax.tree.map(join, rows)

  return of_batch


def _zero(total: PyTree) -> jax.Array:
  """Return 0, known only when ``total`` is: what needs it waits, so two parts of a batch are not in memory at once."""
  first = [leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(total) if leaf.size]
  return jnp.where(jnp.abs(jnp.stack(first)).max() < 0, 1, 0)  # Never below 0, also if it is not finite.


def state_shapes(model: ModelConfig, training: TrainingConfig, params: PyTree | None = None) -> TrainState:
  """Return the state of a training, as `init_state` does, with shapes instead of arrays."""
  extra = jax.eval_shape(lambda: extra_params(model, training, jax.random.key(0)))
  network = shapes(model) if params is None else jax.eval_shape(lambda: params)
  params = {**network, **extra}
  number = jax.ShapeDtypeStruct((), jnp.int32)
  opt_state = jax.eval_shape(optimizer(training).init, params)
  return TrainState(number, params, tuple(params for _ in training.means), opt_state, number)


def init_state(model: ModelConfig, training: TrainingConfig, params: PyTree | None = None) -> TrainState:
  """Return the initial state of a training run, on the host's CPU if JAX has it. No two leaves share a buffer.

  Args:
    model: the configuration of the network.
    training: the configuration of the training.
    params: initial parameters of the network, ``{"params": ...}``. Default: random ones, drawn from the seed.
  """

  def extra(key):
    return extra_params(model, training, key)

  def rest(every):
    means = tuple(jax.tree.map(jnp.copy, every) for _ in training.means)
    zero = jnp.zeros((), jnp.int32)
    return means, optimizer(training).init(every), zero, zero + 0

  with jax.default_device(devices.host()):
    key = keys.seed_key(training.seed)
    network = init_params(model, key) if params is None else jax.tree.map(placed, params)
    every = {**network, **by_array(extra, key)}
    means, opt_state, step, skipped = by_array(rest, every)
  return TrainState(step, every, means, opt_state, skipped)
