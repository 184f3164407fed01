"""One training step, and the state that it changes."""

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
  """What a checkpoint holds.

  Args:
    step: number of steps done.
    params: the parameters, as Flax collections: the network's ``params``, and others that are trained beside it.
    ema_params: their running mean.
    opt_state: the optimiser's state.
  """

  step: Leaf
  params: Leaf
  ema_params: Leaf
  opt_state: Leaf


def optimizer(config: TrainingConfig) -> optax.GradientTransformation:
  """AdamW with clipped gradients and the learning rate of the configuration."""
  rate = rates.rate(config.rate, config.learning_rate, config.steps, config.warmup)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adamw(rate, weight_decay=config.weight_decay))


def train_step(model: ModelConfig, training: TrainingConfig) -> Callable[..., Any]:
  """Make the jitted step ``(state, examples, labels) -> (state, metrics)``.

  The buffers of the state that goes in are donated: do not use that state again. ``examples`` are as the data set
  stores them, such as uint8 pixels; the model's encoder makes ``x0`` of them.
  """
  tx, loss, share = optimizer(training), objective(model, training), ema.newest_share(training.ema, training.ema_decay)

  def step(state: TrainState, examples, labels):
    key = jax.random.fold_in(keys.seed_key(training.seed), state.step)
    x0 = model.data.encode(examples)
    with jax.default_matmul_precision(training.matmul_precision):
      (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, key, x0, labels)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax counts on them.
      updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = optax.incremental_update(params, state.ema_params, share(state.step))
    return TrainState(state.step + 1, params, ema_params, opt_state), {"loss": value, **metrics}

  return jax.jit(step, donate_argnums=0)


def init_state(model: ModelConfig, training: TrainingConfig) -> TrainState:
  """Give the state that training starts from."""

  def init(key):
    params = {**init_params(model, key), **extra_params(training, key)}
    return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer(training).init(params))

  # It is one large program that runs once, so the time to compile it is all that counts; on a GPU that is minutes.
  quick = {"xla_backend_optimization_level": 0}
  with jax.default_device(devices.host()):
    return jax.jit(init, compiler_options=quick)(keys.seed_key(training.seed))
