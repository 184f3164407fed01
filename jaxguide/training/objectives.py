"""Training objectives by the role of a network.

`objective` returns the loss of a model as one function. The mathematics of the losses is in `jaxguide.losses` and
`jaxguide.variational`.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class Objective(NamedTuple):
  """The loss of a network, divided into its random part and the part that depends on the parameters.

  Args:
    draw: ``(key, x0, labels) -> batch``: a noisy batch, a pytree whose leaves have one row for each example.
    errors: ``(params, batch, key) -> (errors, metrics)``: (n,) the loss of each example, and a dictionary of (n,)
      figures to display during training. ``key`` is for dropout.
    sigmas: ``batch -> (n,)``, the noise levels.
  """

  draw: Callable[[jax.Array, jax.Array, Any], Any]
  errors: Callable[[PyTree, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
  sigmas: Callable[[Any], jax.Array]


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


def extra_params(model: ModelConfig, training: TrainingConfig, key: jax.Array) -> PyTree:
  """Return the initial parameters that are trained together with the network's own, as Flax collections.

  They are those of `Uncertainty`, unless the network has its own, a method ``logvar(params, c_noise)``.
  """
  if not training.uncertainty or hasattr(model.module, "logvar"):
    return {}
  return {"uncertainty": Uncertainty().init(key, jnp.zeros(1))["params"]}


def objective(model: ModelConfig, training: TrainingConfig) -> Objective:
  """Return the loss that a network is trained with.

  Raises:
    ValueError: if an option of the training does not apply to the network or its diffusion process.
  """
  if model.role.name not in OBJECTIVES:
    raise ValueError(f"an {model.role.name} cannot be trained here: import a published one with jaxguide import")
  return OBJECTIVES[model.role.name](model, training)


def _denoiser(model: ModelConfig, training: TrainingConfig) -> Objective:
  null = model.null_cond
  if training.p_uncond is not None and null is None:
    raise ValueError("p_uncond needs a network with a null class: leave it out")
  if training.label_smoothing:
    raise ValueError("label_smoothing is for classifiers: leave it out")
  if model.prediction == "consistency":
    raise ValueError(
      "a consistency model is trained by distillation, which this package does not have: choose prediction 'edm'"
    )
  p_uncond = training.p_uncond if training.p_uncond is not None else 0.15 if null is not None else 0.0
  drop: dict[str, Any] = {"null_cond": null, "p_uncond": p_uncond}
  if model.diffusion_steps is not None:
    made = _variational(model, training, drop)
  elif training.loss is not None:
    raise ValueError("loss is for a denoiser on a discrete process, which has diffusion_steps: leave it out")
  else:
    made = _continuous(model, training, drop)
  if model.low_res_shape is not None:
    made = _super_resolution(model, training, made)
  if model.num_classes is None and model.label_size is None:
    # Data may have labels that the network does not take.
    return made._replace(draw=lambda key, x0, labels: made.draw(key, x0, None))
  return made


def _network(model: ModelConfig, training: TrainingConfig) -> Callable[..., Callable[..., Any]]:
  """Return ``key -> apply``, the network with dropout and rematerialisation: ``apply(params, x, c_noise, ...)``."""
  module = model.module
  if training.remat == "blocks":
    if not hasattr(module, "use_checkpoint"):
      raise ValueError(f"remat 'blocks' needs a network with the field use_checkpoint, which {model.network} lacks")
    module = module.clone(use_checkpoint=True)
  options: dict[str, Any] = {"train": True} if "train" in inspect.signature(type(module).__call__).parameters else {}

  def with_key(key):
    def apply(params, x, c_noise, *cond):
      params = {"params": params["params"]}
      return module.apply(params, x, c_noise, *cond, **options, rngs={"dropout": key})

    return jax.checkpoint(apply) if training.remat == "all" else apply

  return with_key


def _continuous(model: ModelConfig, training: TrainingConfig, drop: dict[str, Any]) -> Objective:
  network, weight = _network(model, training), _weight(training)
  draw = functools.partial(losses.noisy, noise_levels=noise_levels(model, training), **drop)

  def errors(params, batch, key):
    values = losses.denoising_errors(params, network(key), batch, scaling=model.scaling, weight=weight)
    return values, {}

  def uncertain_errors(params, batch, key):
    def apply(params, x, c_noise, cond):
      if hasattr(model.module, "logvar"):
        u = model.module.logvar(params, c_noise)
      else:
        u = Uncertainty().apply({"params": params["uncertainty"]}, c_noise)
      return network(key)(params, x, c_noise, cond), u

    plain = functools.partial(_plain_weight, model.scaling)
    return losses.uncertainty_errors(params, apply, batch, scaling=model.scaling, weight=weight or plain), {}

  return Objective(draw, uncertain_errors if training.uncertainty else errors, lambda batch: batch.sigma)


def _variational(model: ModelConfig, training: TrainingConfig, drop: dict[str, Any]) -> Objective:
  _check_no_levels(training)
  if training.weight != "plain" or training.uncertainty:
    raise ValueError(
      "weight and uncertainty are for continuous time: leave them out, and use loss with diffusion_steps"
    )
  network, process = _network(model, training), check_table(model.noise_schedule)

  def errors(params, batch, key):
    terms = variational.variational_terms(
      params,
      network(key),
      *batch,
      scaling=model.scaling,
      process=process,
      loss=training.loss or "rescaled_mse",
      variance=model.variance,
    )
    return terms.loss, {"mse": terms.mse, "vb": terms.vb}

  draw = functools.partial(variational.noisy_steps, process=process, **drop)
  return Objective(draw, errors, lambda batch: jnp.asarray(process.sigmas)[batch.step])


def _super_resolution(model: ModelConfig, training: TrainingConfig, objective: Objective) -> Objective:
  """Return an objective whose conditions contain low-resolution images, made from the clean examples."""
  resize = low_resolution(training.low_res_filter, model.image_shape, model.low_res_shape or ())

  def draw(key, x0, labels):
    batch = objective.draw(key, x0, labels)
    scale_key, noise_key = jax.random.split(jax.random.fold_in(key, 1))
    low = resize(x0)
    if training.low_res_noise:
      std = training.low_res_noise * jax.random.uniform(scale_key, x0.shape[:1], x0.dtype)
      low += losses.wide(std, low) * jax.random.normal(noise_key, low.shape, low.dtype)
    label = {} if batch.cond is None else {"label": batch.cond}
    return batch._replace(cond={**label, "low_res": low})

  return objective._replace(draw=draw)


def low_resolution(
  filter_name: str, shape: Sequence[int], low_shape: Sequence[int]
) -> Callable[[jax.Array], jax.Array]:
  """Return a function that makes low-resolution images (n, *low_shape) of images (n, *shape).

  Args:
    filter_name: ``box`` (the mean over each square of pixels, whose sides must be whole), or a method of
      `jax.image.resize`: ``linear``, ``cubic``, ``lanczos3`` or ``lanczos5``, with antialiasing.
    shape: (height, width, channels).
    low_shape: (height, width, channels), with the same channels.

  Raises:
    ValueError: if the shapes do not fit each other or the filter.

  >>> low_resolution("box", (2, 2, 1), (1, 1, 1))(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel().tolist()
  [1.5]
  """
  (height, width, channels), (low_height, low_width, low_channels) = shape, low_shape
  if channels != low_channels or low_height > height or low_width > width:
    raise ValueError(f"low_res_shape must be smaller than image_shape {tuple(shape)}, got {tuple(low_shape)}")
  if filter_name != "box":
    return lambda x: jax.image.resize(x, (x.shape[0], *low_shape), filter_name, antialias=True)
  if height % low_height or width % low_width:
    raise ValueError(
      f"low_res_filter 'box' needs sides of image_shape {tuple(shape)} that are multiples of those of low_res_shape "
      f"{tuple(low_shape)}: choose 'cubic', or another shape"
    )
  squares = (-1, low_height, height // low_height, low_width, width // low_width, channels)
  return lambda x: x.reshape(squares).mean((2, 4))


def _classifier(model: ModelConfig, training: TrainingConfig) -> Objective:
  if training.p_uncond is not None:
    raise ValueError("p_uncond needs a network with a null class: leave it out")
  if training.loss is not None or training.weight != "plain" or training.uncertainty:
    raise ValueError("loss, weight and uncertainty are for denoisers: leave them out")
  if model.diffusion_steps is None:
    levels = noise_levels(model, training)
  else:
    _check_no_levels(training)
    levels = model.noise_schedule
  if model.noise_range is not None:
    levels = schedules.Truncated(levels, *model.noise_range)
  network = _network(model, training)

  def errors(params, batch, key):
    values, correct = losses.classifier_errors(
      params, network(key), batch, scaling=model.scaling, label_smoothing=training.label_smoothing
    )
    return values, {"accuracy": correct}

  def draw(key, x0, labels):
    x0 = losses.clean(x0)
    return losses.Noisy(x0, *losses.add_noise(key, x0, levels), labels)

  return Objective(draw, errors, lambda batch: batch.sigma)


OBJECTIVES: dict[str, Callable[[ModelConfig, TrainingConfig], Objective]] = {
  DENOISER.name: _denoiser,
  CLASSIFIER.name: _classifier,
}
"""The objective of each role, by the role's name."""


def noise_levels(model: ModelConfig, training: TrainingConfig) -> schedules.NoiseLevels:
  """Return the distribution of the noise levels that a training in continuous time draws."""
  if training.noise not in (None, "log-normal"):
    return schedules.levels(training.noise, model.noise_schedule)
  mean = -0.6 if training.noise_mean is None else training.noise_mean
  return schedules.LogNormal(mean, 1.2 if training.noise_std is None else training.noise_std)


def _check_no_levels(training: TrainingConfig) -> None:
  if (training.noise_mean, training.noise_std, training.noise) != (None, None, None):
    raise ValueError("a discrete process draws its steps uniformly: leave out noise_mean, noise_std and noise")


def _weight(training: TrainingConfig) -> Callable[[Any], Any] | None:
  """Return the weight of ``|x0 - D|²`` as a function of sigma; None for the plain squared error of the prediction."""
  spec = specs.parse(training.weight)
  function = scaling.WEIGHTS.get(spec.name)
  if function is None:
    return None
  return functools.partial(function, **specs.choose(spec, specs.options_of(function, "sigma")))


def _plain_weight(scaled: scaling.Scaling, sigma: Any) -> Any:
  """Return the weight of ``|x0 - D|²`` that equals the plain squared error of the network's prediction."""
  return 1 / jnp.square(scaling.coefficients(scaled, sigma).c_out)
