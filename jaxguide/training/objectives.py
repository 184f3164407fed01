"""Training objectives by the role of a network.

`objective` returns the loss of a model as one function. The mathematics of the losses is in `jaxguide.losses` and
`jaxguide.variational`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jaxguide import schedules
from jaxguide._core import specs
from jaxguide._core.typing import PyTree
from jaxguide.denoisers import losses, scaling, variational
from jaxguide.models.config import ModelConfig
from jaxguide.models.networks import CLASSIFIER, DENOISER
from jaxguide.nn.layers import timestep_embedding
from jaxguide.schedules.tables import check_table
from jaxguide.training.config import TrainingConfig

Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
"""``(params, key, x0, labels) -> (loss, metrics)``; the metrics are numbers to display during training."""


class Uncertainty(linen.Module):
  """The learned log-variance of the loss at each noise level, ``u(sigma)``, for `jaxguide.uncertainty_loss`.

  One linear layer on an embedding of ``c_noise`` (Karras et al. 2024, arXiv:2312.02696, section 2.2). Its initial value
  is 0. It is trained together with the network, but is not part of the trained model.
  """

  features: int = 64

  @linen.compact
  def __call__(self, c_noise):
    """Return ``u`` (n,) for ``c_noise`` (n,)."""
    embedding = timestep_embedding(c_noise, self.features)
    return linen.Dense(1, use_bias=False, kernel_init=linen.initializers.zeros, dtype=embedding.dtype)(embedding)[:, 0]


def extra_params(training: TrainingConfig, key: jax.Array) -> PyTree:
  """Return the initial parameters that are trained together with the network's own, as Flax collections."""
  if not training.uncertainty:
    return {}
  return {"uncertainty": Uncertainty().init(key, jnp.zeros(1))["params"]}


def objective(model: ModelConfig, training: TrainingConfig) -> Objective:
  """Return the loss that a network is trained with.

  Raises:
    ValueError: if an option of the training does not apply to the network or its diffusion process.
  """
  return OBJECTIVES[model.role.name](model, training)


def _denoiser(model: ModelConfig, training: TrainingConfig) -> Objective:
  module, null = model.module, model.null_cond
  if training.p_uncond is not None and null is None:
    raise ValueError("p_uncond needs a network with a null class: leave it out")
  p_uncond = training.p_uncond if training.p_uncond is not None else 0.15 if null is not None else 0.0

  def with_network(loss):
    def of_params(params, key, x0, labels):
      loss_key, dropout_key = jax.random.split(key)

      def apply(params, x, c_noise, y):
        y = None if model.num_classes is None else y
        return module.apply(params, x, c_noise, y, train=True, rngs={"dropout": dropout_key})

      return loss(params, apply, loss_key, x0, labels)

    return of_params

  drop: dict[str, Any] = {"null_cond": null, "p_uncond": p_uncond}
  if model.diffusion_steps is not None:
    return with_network(_variational(model, training, drop))
  if training.loss is not None:
    raise ValueError("loss is for a denoiser on a discrete process, which has diffusion_steps: leave it out")
  process: dict[str, Any] = {"scaling": model.scaling, "noise_levels": _noise_levels(training)}
  weight = _weight(model, training)
  if training.uncertainty:
    return with_network(_uncertain(process, weight or functools.partial(_plain_weight, model.scaling), drop))

  def denoising(params, apply, key, x0, labels):
    return losses.denoising_loss(params, apply, key, x0, labels, **process, **drop, weight=weight), {}

  return with_network(denoising)


def _variational(model: ModelConfig, training: TrainingConfig, drop: dict[str, Any]) -> Callable[..., Any]:
  if (training.noise_mean, training.noise_std) != (None, None):
    raise ValueError("a discrete process draws its steps uniformly: leave out noise_mean and noise_std")
  if training.weight != "plain" or training.uncertainty:
    raise ValueError(
      "weight and uncertainty are for continuous time: leave them out, and use loss with diffusion_steps"
    )

  process = check_table(model.noise_schedule)

  def variational_loss(params, apply, key, x0, labels):
    loss, terms = variational.variational_loss(
      params,
      apply,
      key,
      x0,
      labels,
      scaling=model.scaling,
      process=process,
      loss=training.loss or "rescaled_mse",
      variance=model.variance,
      **drop,
    )
    return loss, {"mse": terms.mse, "vb": terms.vb}

  return variational_loss


def _uncertain(process: dict[str, Any], weight: Callable[..., Any], drop: dict[str, Any]) -> Callable[..., Any]:
  def uncertainty_loss(params, apply, key, x0, labels):
    drop_key, loss_key = jax.random.split(key)

    def with_uncertainty(params, x, c_noise, y):
      return apply(params, x, c_noise, y), Uncertainty().apply({"params": params["uncertainty"]}, c_noise)

    cond = losses.drop_cond(drop_key, labels, **drop)
    return losses.uncertainty_loss(params, with_uncertainty, loss_key, x0, cond, **process, weight=weight), {}

  return uncertainty_loss


def _classifier(model: ModelConfig, training: TrainingConfig) -> Objective:
  module = model.module
  if training.p_uncond is not None:
    raise ValueError("p_uncond needs a network with a null class: leave it out")
  if training.loss is not None or training.weight != "plain" or training.uncertainty:
    raise ValueError("loss, weight and uncertainty are for denoisers: leave them out")
  if model.diffusion_steps is not None and (training.noise_mean, training.noise_std) != (None, None):
    raise ValueError("a discrete process draws its steps uniformly: leave out noise_mean and noise_std")
  levels = _noise_levels(training) if model.diffusion_steps is None else model.noise_schedule

  def loss(params, key, x0, labels):
    loss_key, dropout_key = jax.random.split(key)

    def apply(params, x, c_noise):
      return module.apply(params, x, c_noise, train=True, rngs={"dropout": dropout_key})

    value, accuracy = losses.classifier_loss(
      params, apply, loss_key, x0, labels, scaling=model.scaling, noise_levels=levels
    )
    return value, {"accuracy": accuracy}

  return loss


OBJECTIVES: dict[str, Callable[[ModelConfig, TrainingConfig], Objective]] = {
  DENOISER.name: _denoiser,
  CLASSIFIER.name: _classifier,
}
"""The objective of each role, by the role's name."""


def _noise_levels(training: TrainingConfig) -> schedules.LogNormal:
  mean = -0.6 if training.noise_mean is None else training.noise_mean
  return schedules.LogNormal(mean, 1.2 if training.noise_std is None else training.noise_std)


def _weight(model: ModelConfig, training: TrainingConfig) -> Callable[[Any], Any] | None:
  """Return the weight of ``|x0 - D|²`` as a function of sigma; None for the plain squared error of the prediction."""
  spec = specs.parse(training.weight)
  function = scaling.WEIGHTS.get(spec.name)
  if function is None:
    return None
  return functools.partial(function, **specs.choose(spec, specs.options_of(function, "sigma")))


def _plain_weight(scaled: scaling.Scaling, sigma: Any) -> Any:
  """Return the weight of ``|x0 - D|²`` that equals the plain squared error of the network's prediction."""
  return 1 / jnp.square(scaling.coefficients(scaled, sigma).c_out)
