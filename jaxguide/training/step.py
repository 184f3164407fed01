"""The training step and the training state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxguide._core import devices, keys, struct
from jaxguide._core.typing import Leaf
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import init_params
from jaxguide.training import ema, rates
from jaxguide.training.config import TrainingConfig
from jaxguide.training.objectives import extra_params, objective


@struct.dataclass
class TrainState:
  """The state of a training run; a checkpoint contains one.

  Args:
    step: number of completed steps.
    params: the parameters, as Flax collections: the network's ``params``, and others that are trained together with it.
    ema_params: the running mean of the parameters.
    opt_state: the state of the optimiser.
  """

  step: Leaf
  params: Leaf
  ema_params: Leaf
  opt_state: Leaf


def optimizer(config: TrainingConfig) -> optax.GradientTransformation:
  """Return AdamW with gradient clipping and the learning-rate schedule of the configuration."""
  rate = rates.rate(config.rate, config.learning_rate, config.steps, config.warmup)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adamw(rate, weight_decay=config.weight_decay))


def train_step(model: ModelConfig, training: TrainingConfig) -> Callable[..., Any]:
  """Return the jitted training step ``(state, examples, labels) -> (state, metrics)``.

  The input state's buffers are donated; do not use it again. ``examples`` have the type that the dataset stores, such
  as uint8 pixels; the model's encoder converts them to ``x0``.
  """
  tx, loss, share = optimizer(training), objective(model, training), ema.newest_share(training.ema, training.ema_decay)

  def step(state: TrainState, examples, labels):
    key = jax.random.fold_in(keys.seed_key(training.seed), state.step)
    x0 = model.data.encode(examples)
    with jax.default_matmul_precision(training.matmul_precision):
      (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, key, x0, labels)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax needs them.
      updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optax.incremental_update(params, state.ema_params, share(state.step))
    return TrainState(state.step + 1, params, ema_params, opt_state), {"loss": value, **metrics}

  return jax.jit(step, donate_argnums=0)


def init_state(model: ModelConfig, training: TrainingConfig) -> TrainState:
  """Return the initial state of a training run, on the host's CPU if JAX has it."""

  def init(key):
    params = {**init_params(model, key), **extra_params(training, key)}
    return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer(training).init(params))

  # This large program runs once, so its compile time dominates. It would take minutes on a GPU: compile it on the CPU
  # without optimisations.
  options = {"xla_backend_optimization_level": 0}
  with jax.default_device(devices.host()):
    return jax.jit(init, compiler_options=options)(keys.seed_key(training.seed))
