"""What a network is trained to minimise, by its role.

`objective` gives the loss of a model as one function. The mathematics of the losses is in `jaxguide.losses` and
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
"""``(params, key, x0, labels) -> (loss, figures)``; the figures are numbers to look at while training."""


class Uncertainty(linen.Module):
  """How hard each noise level is, ``u(sigma)``, for `jaxguide.uncertainty_loss`; 0 before training.

  One linear layer on an embedding of ``c_noise`` (Karras et al. 2024, arXiv:2312.02696, section 2.2). It is trained
  beside the network, and not kept with it.
  """

  features: int = 64

  @linen.compact
  def __call__(self, c_noise):
    """Give ``u`` (n,) for ``c_noise`` (n,)."""
    embedding = timestep_embedding(c_noise, self.features)
    return linen.Dense(1, use_bias=False, kernel_init=linen.initializers.zeros, dtype=embedding.dtype)(embedding)[:, 0]


def extra_params(training: TrainingConfig, key: jax.Array) -> PyTree:
  """Give the parameters that are trained beside the network's own, as Flax collections."""
  if not training.uncertainty:
    return {}
  return {"uncertainty": Uncertainty().init(key, jnp.zeros(1))["params"]}


def objective(model: ModelConfig, training: TrainingConfig) -> Objective:
  """Give the loss that a network is trained with.

  Raises:
    ValueError: if an option does not suit the network or its process.
  """
  return OBJECTIVES[model.role.name](model, training)


def _denoiser(model: ModelConfig, training: TrainingConfig) -> Objective:
  module, null = model.module, model.null_cond
  if training.p_uncond is not None and null is None:
    raise ValueError("p_uncond is for a UNet with a null class: leave it out")
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
    raise ValueError("a loss is chosen for a UNet on a discrete process, which has diffusion_steps: leave it out")
  kind: dict[str, Any] = {"scaling": model.scaling, "noise_levels": _noise_levels(training)}
  weight = _weight(model, training)
  if training.uncertainty:
    return with_network(_uncertain(kind, weight or functools.partial(_plain_weight, model.scaling), drop))

  def denoising(params, apply, key, x0, labels):
    return losses.denoising_loss(params, apply, key, x0, labels, **kind, **drop, weight=weight), {}

  return with_network(denoising)


def _variational(model: ModelConfig, training: TrainingConfig, drop: dict[str, Any]) -> Callable[..., Any]:
  if (training.noise_mean, training.noise_std) != (None, None):
    raise ValueError("a discrete process draws its steps uniformly: leave out noise_mean and noise_std")
  if training.weight != "plain" or training.uncertainty:
    raise ValueError("weight and uncertainty are for continuous time; a discrete process has loss: leave them out")

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


def _uncertain(kind: dict[str, Any], weight: Callable[..., Any], drop: dict[str, Any]) -> Callable[..., Any]:
  def uncertainty_loss(params, apply, key, x0, labels):
    drop_key, loss_key = jax.random.split(key)

    def with_uncertainty(params, x, c_noise, y):
      return apply(params, x, c_noise, y), Uncertainty().apply({"params": params["uncertainty"]}, c_noise)

    cond = losses.drop_cond(drop_key, labels, **drop)
    return losses.uncertainty_loss(params, with_uncertainty, loss_key, x0, cond, **kind, weight=weight), {}

  return uncertainty_loss


def _classifier(model: ModelConfig, training: TrainingConfig) -> Objective:
  module = model.module
  if training.p_uncond is not None:
    raise ValueError("p_uncond is for a UNet with a null class: leave it out")
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
"""By the name of a role."""


def _noise_levels(training: TrainingConfig) -> schedules.LogNormal:
  mean = -0.6 if training.noise_mean is None else training.noise_mean
  return schedules.LogNormal(mean, 1.2 if training.noise_std is None else training.noise_std)


def _weight(model: ModelConfig, training: TrainingConfig) -> Callable[[Any], Any] | None:
  """Give the weight of ``|x0 - D|²``; None for the plain squared error of what the network predicts."""
  spec = specs.parse(training.weight)
  function = scaling.WEIGHTS.get(spec.name)
  if function is None:
    return None
  return functools.partial(function, **specs.choose(spec, specs.options_of(function, "sigma")))


def _plain_weight(scaled: scaling.Scaling, sigma: Any) -> Any:
  return 1 / jnp.square(scaling.coefficients(scaled, sigma).c_out)
