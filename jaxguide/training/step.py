"""One training step: the optimiser, the loss of a network, and the state that they change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxguide import schedules
from jaxguide._core import keys, struct
from jaxguide._core.typing import Leaf
from jaxguide.denoisers import losses, variational
from jaxguide.models.config import ModelConfig
from jaxguide.models.model import init_params
from jaxguide.training.config import TrainingConfig


@struct.dataclass
class TrainState:
  """What a checkpoint holds."""

  step: Leaf
  params: Leaf
  ema_params: Leaf
  opt_state: Leaf


def optimizer(config: TrainingConfig) -> optax.GradientTransformation:
  """AdamW with clipped gradients, a linear warm-up and a cosine decay."""
  warmup = min(config.warmup, config.steps - 1)
  rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adamw(rate, weight_decay=config.weight_decay))


def loss_fn(model: ModelConfig, training: TrainingConfig) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
  """Make ``(params, key, x0, labels) -> (loss, metrics)`` for a network."""
  module = model.module
  levels = _noise_levels(model, training)
  drop: dict[str, Any] = {"null_cond": model.null_cond, "p_uncond": 0.15 if model.null_cond is not None else 0.0}
  if training.p_uncond is not None:
    if model.null_cond is None:
      raise ValueError("p_uncond is for a UNet with a null class: leave it out")
    drop["p_uncond"] = training.p_uncond

  def denoiser(params, key, x0, labels):
    loss_key, dropout_key = jax.random.split(key)

    def apply(params, x, t, y):
      y = None if model.num_classes is None else y
      return module.apply(params, x, t, y, train=True, rngs={"dropout": dropout_key})

    if isinstance(levels, schedules.Table):
      loss, terms = variational.variational_loss(
        params,
        apply,
        loss_key,
        x0,
        labels,
        scaling=model.scaling,
        process=levels,
        loss=training.loss or "rescaled_mse",
        variance=model.variance,
        **drop,
      )
      return loss, {"mse": terms.mse, "vb": terms.vb}
    loss = losses.denoising_loss(
      params, apply, loss_key, x0, labels, scaling=model.scaling, noise_levels=levels, **drop
    )
    return loss, {}

  def classifier(params, key, x0, labels):
    loss_key, dropout_key = jax.random.split(key)

    def apply(params, x, t):
      return module.apply(params, x, t, train=True, rngs={"dropout": dropout_key})

    loss, accuracy = losses.classifier_loss(
      params, apply, loss_key, x0, labels, scaling=model.scaling, noise_levels=levels
    )
    return loss, {"accuracy": accuracy}

  return denoiser if model.network == "unet" else classifier


def _noise_levels(model: ModelConfig, training: TrainingConfig) -> schedules.NoiseLevels:
  given = (training.noise_mean, training.noise_std)
  if training.loss is not None and (model.network == "classifier" or model.diffusion_steps is None):
    raise ValueError("a loss is chosen for a UNet on a discrete process, which has diffusion_steps: leave it out")
  if model.diffusion_steps is None:
    mean, std = (default if value is None else value for value, default in zip(given, (-0.6, 1.2), strict=True))
    return schedules.LogNormal(mean, std)
  if given != (None, None):
    raise ValueError("a discrete process draws its steps uniformly: leave out noise_mean and noise_std")
  return model.noise_schedule


def train_step(model: ModelConfig, training: TrainingConfig) -> Callable[..., Any]:
  """Make the jitted ``(state, images uint8, labels) -> (state, metrics)``; its first argument is given up."""
  tx, loss = optimizer(training), loss_fn(model, training)

  def step(state: TrainState, images, labels):
    key = jax.random.fold_in(keys.seed_key(training.seed), state.step)
    x0 = images.astype(jnp.float32) / 127.5 - 1
    with jax.default_matmul_precision(training.matmul_precision):
      (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, key, x0, labels)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # Optax counts on them.
      updates, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Early on the mean is short, or it would remember the random start.
    decay = jnp.minimum(training.ema_decay, (1 + state.step) / (10 + state.step))
    ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)
    return TrainState(state.step + 1, params, ema_params, opt_state), {"loss": value, **metrics}

  return jax.jit(step, donate_argnums=0)


def init_state(model: ModelConfig, training: TrainingConfig) -> TrainState:
  """Give the state that training starts from."""

  def init(key):
    params = init_params(model, key)
    return TrainState(jnp.zeros((), jnp.int32), params, params, optimizer(training).init(params))

  # It is one large program that runs once, so the time to compile it is all that counts; on a GPU that is minutes.
  quick = {"xla_backend_optimization_level": 0}
  with jax.default_device(_host()):
    return jax.jit(init, compiler_options=quick)(keys.seed_key(training.seed))


def _host() -> jax.Device | None:
  """The CPU; None where JAX was told to do without."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None
