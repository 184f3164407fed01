"""Networks with their parameters as denoisers and as classifiers of noisy examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, struct
from jaxguide._core.promotion import together
from jaxguide._core.typing import Array, Example, Leaf, Prediction, PyTree, Scalar
from jaxguide.denoisers.linen import by_value, check_params, module_of, name_of
from jaxguide.denoisers.scaling import coefficients
from jaxguide.nn.perturbation import Perturbation


@struct.dataclass
class NetworkDenoiser:
  """A network with its parameters, as a `Denoiser`.

  Args:
    params: the network's parameters, any pytree; for Flax the dictionary that ``init`` returns.
    apply: ``apply(params, x, c_noise, cond) -> F``, on a batch: ``x`` (n, *shape), ``c_noise`` (n,), each leaf of
      ``cond`` (n, ...), or ``cond`` None. The ``apply`` of a Flax module fits. If the output has twice the channels of
      ``x``, its second half is the learned variance.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    learned_variance: whether to return a `jaxguide.typing.Prediction` with the learned variance, for
      ``DDPM(variance="learned_range")``. Otherwise the learned variance is dropped.
    num_classes: number of classes, from which `check_cond` knows what labels there are. By default it is the attribute
      ``num_classes`` of the module, or of ``apply``. Without either, labels are not checked.

  If ``apply`` is a method of a Flax module, a call checks ``params`` against the module's parameters.

  >>> from jaxguide import scaling, schedules
  >>> apply = lambda params, x, c_noise, cond: params * x      # stands for a network
  >>> denoise = NetworkDenoiser(jnp.asarray(0.5), apply, scaling.eps(schedules.Cosine()))
  >>> denoise(jnp.ones((2, 2)), jnp.asarray(1.0), None).shape
  (2, 2)
  """

  params: Leaf
  apply: Callable[..., Any] = struct.field(pytree_node=False)
  scaling: Leaf
  learned_variance: bool = struct.field(pytree_node=False, default=False)
  num_classes: int | None = struct.field(pytree_node=False, default=None)

  def __post_init__(self):
    object.__setattr__(self, "apply", by_value(self.apply))
    _check_number(self)

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree = None) -> Example | Prediction:
    """Return ``x0``, of the shape and type of ``x``, or a `Prediction` with ``x0`` and the learned variance."""
    c_skip, c_out, _, _ = coefficients(self.scaling, sigma)
    output, variance = split_variance(_apply(self, x, sigma, cond), x)
    c_skip, c_out, wide, output = together(c_skip, c_out, x, output.astype(x.dtype))
    x0 = (c_skip * wide + c_out * output).astype(x.dtype)
    if not self.learned_variance:
      return x0
    if variance is None:
      raise ValueError(
        f"the network has no learned variance: its output has the shape of the example, {output.shape}, and not twice "
        "the channels. Set learned_variance=False"
      )
    return Prediction(x0, variance.astype(x.dtype))

  def check_cond(self, cond: PyTree) -> None:
    """Raise ValueError if ``cond`` (of a dictionary, its ``label``) is not one of the network's classes.

    The label ``num_classes`` is allowed if the attribute ``null_class`` of the module, or of ``apply``, is true.
    """
    num_classes = _known(self, "num_classes")
    if num_classes is None:
      return
    label = cond.get("label") if isinstance(cond, Mapping) else cond
    null = bool(getattr(_network(self), "null_class", False))
    try:
      checks.labels("label", label, num_classes, null)
    except ValueError as error:
      if null or f"label {num_classes} " not in str(error):
        raise
      raise ValueError(
        f"{error}; if it means no label, the network needs the attribute null_class = True, which says so"
      ) from None


@struct.dataclass
class ClassifierLogProb:
  """A classifier trained on noisy examples, as a `LogProb`: ``log softmax(logits)[label]``.

  Args:
    params: the classifier's parameters.
    apply: ``apply(params, x, c_noise) -> logits``, on a batch: ``x`` (n, *shape), ``c_noise`` (n,), logits
      (n, classes).
    scaling: from `jaxguide.scaling`; it gives the classifier's inputs ``c_in * x`` and ``c_noise``, as in its training.
    noise_range: (sigma_lo, sigma_hi), the noise levels that the classifier was trained on, both included; None for all
      levels. At other levels every class has the same log-probability, ``-log(classes)``. Its gradient is 0, so
      guidance by the classifier is off there. The network is not called there, as long as ``sigma`` is one number for
      the whole batch.
    num_classes: number of classes, from which `check_cond` knows what labels there are. By default it is the attribute
      ``out_channels`` of the module, or of ``apply``.
  """

  params: Leaf
  apply: Callable[..., Any] = struct.field(pytree_node=False)
  scaling: Leaf
  noise_range: tuple[float, float] | None = struct.field(pytree_node=False, default=None)
  num_classes: int | None = struct.field(pytree_node=False, default=None)

  def __post_init__(self):
    object.__setattr__(self, "apply", by_value(self.apply))
    _check_number(self)
    if self.noise_range is not None:
      low, high = (float(checks.in_range("each of noise_range", level, 0)) for level in self.noise_range)
      if not low < high:
        raise ValueError(f"noise_range must be two noise levels, the lower one first, got {self.noise_range}")
      object.__setattr__(self, "noise_range", (low, high))

  def logits(self, x: Example, sigma: Scalar) -> Array:
    """Return the network's logits, (classes,), of one example, at levels outside ``noise_range`` too."""
    logits = _apply(self, x, sigma)
    if logits.ndim != 1:
      raise ValueError(f"the classifier must give logits of shape (n, classes), got (n, *{logits.shape})")
    return logits.astype(np.promote_types(x.dtype, np.float32))

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> Scalar:
    """Return the log-probability of the label ``cond``, a scalar.

    Raises:
      ValueError: if ``cond`` is not one whole number, or is known here and not one of the classes.
    """
    if jnp.ndim(cond) or not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
      raise ValueError(
        f"the classifier needs one whole number as the label of one example, got {jnp.result_type(cond)} of shape "
        f"{jnp.shape(cond)}"
      )
    if self.noise_range is None:
      log_probs = self._log_probs(x, sigma)
    else:
      log_probs = jax.lax.cond(self.acts_at(sigma), self._log_probs, self._uniform, x, sigma)
    return log_probs[checks.labels("label", cond, log_probs.shape[0])]

  def acts_at(self, sigma: Scalar) -> Any:
    """Return whether the noise level lies in ``noise_range``. At other levels the gradient is 0."""
    if self.noise_range is None:
      return True
    low, high = self.noise_range
    return (sigma >= low) & (sigma <= high)

  def _log_probs(self, x: Example, sigma: Scalar) -> Array:
    return jax.nn.log_softmax(self.logits(x, sigma))

  def _uniform(self, x: Example, sigma: Scalar) -> Array:
    """Return the log-probabilities of a uniform guess, (classes,)."""
    shape = jax.eval_shape(self.logits, x, sigma)
    return jnp.full(shape.shape, -np.log(shape.shape[0]), shape.dtype)

  def check_cond(self, cond: PyTree) -> None:
    """Raise ValueError if a label in ``cond`` is not one of the classifier's classes."""
    num_classes = _known(self, "out_channels")
    if num_classes is not None:
      checks.labels("label", cond, num_classes)


def _network(model: NetworkDenoiser | ClassifierLogProb) -> Any:
  """Return what has the attributes of a network: its module, or else the function."""
  module = module_of(model.apply)
  return model.apply if module is None else module


def _known(model: NetworkDenoiser | ClassifierLogProb, attribute: str) -> int | None:
  """Return the number of classes that a denoiser or a classifier was given, or that its network says."""
  found = getattr(_network(model), attribute, None) if model.num_classes is None else model.num_classes
  return int(found) if isinstance(found, int | np.integer) and not isinstance(found, bool) else None


def _check_number(model: NetworkDenoiser | ClassifierLogProb) -> None:
  if model.num_classes is not None:
    object.__setattr__(model, "num_classes", checks.at_least("num_classes", model.num_classes, 1))


def perturbed(denoiser: NetworkDenoiser, perturbation: Perturbation) -> NetworkDenoiser:
  """Make a weak denoiser from a good one: the same parameters, with perturbed attention or perturbed blocks.

  It serves as the weak model of `jaxguide.autoguidance` if no weak model was trained, for conditional and unconditional
  networks. Perturbed-attention guidance, smoothed energy guidance and skip layer guidance are
  ``autoguidance(perturbed(denoise, perturbation), scale)(denoise)`` with different values of `jaxguide.Perturbation`.

  Args:
    denoiser: a `NetworkDenoiser` without guidance, of a `jaxguide.UNet`, a `jaxguide.SuperResUNet`, another Flax
      module with a field ``perturbation``, or any other network that is ``perturbable``: an attribute, or an argument
      of `jaxguide.from_nnx` and its like, with the names of the blocks by the kind of perturbation. An ``apply`` with
      the attribute gets the keyword argument ``perturbation``.
    perturbation: the kind of perturbation and the blocks; it replaces a perturbation that the network already has.

  Returns:
    The weak denoiser. It shares the parameters with the good one and costs no more.

  Raises:
    ValueError: if the denoiser has another kind of network, if the network has no block of a given name, or if a block
      is of the wrong kind.

  >>> from jaxguide import UNet, guidance, scaling, schedules
  >>> unet, x = UNet(model_channels=32, channel_mult=(1,), num_res_blocks=1), jnp.zeros((8, 8, 1))
  >>> params = jax.jit(unet.init)(jax.random.key(0), x[None], jnp.zeros(1))
  >>> denoise = NetworkDenoiser(params, unet.apply, scaling.v(schedules.Cosine()))
  >>> weak = perturbed(denoise, Perturbation("identity", ["middle_block_1"]))
  >>> guided = guidance.autoguidance(weak, 4.0)(denoise)        # PAG with s = 3
  >>> jax.jit(guided)(x, jnp.asarray(1.0), None).shape
  (8, 8, 1)
  """
  apply: Any = getattr(denoiser, "apply", None)
  module: Any = module_of(apply)
  network = apply if module is None else module
  own = hasattr(network, "perturbable")
  if not own and (module is None or not hasattr(module, "perturbation")):
    what = type(denoiser if module is None else module).__name__
    raise ValueError(
      f"perturbed takes a NetworkDenoiser of a UNet, or of a Flax module with a field `perturbation`; got {what}. "
      "Perturb the bare denoiser and apply guidance afterwards"
    )
  if own and network.perturbable is None:
    raise ValueError(
      f"{name_of(network)} does not say which blocks can be perturbed: give it the attribute `perturbable`, such as "
      "{'skip': ['block_0']}, and its call the keyword argument `perturbation`"
    )
  perturbation.check(denoiser.params, network.perturbable if own else None)
  if module is None:
    function = apply.function if isinstance(apply, PerturbedFunction) else apply
    return dataclasses.replace(denoiser, apply=PerturbedFunction(function, perturbation))
  return dataclasses.replace(denoiser, apply=dataclasses.replace(apply, module=module.clone(perturbation=perturbation)))


@dataclasses.dataclass(frozen=True)
class PerturbedFunction:
  """A function that gets a perturbation; equal to another one of the same function and perturbation."""

  function: Any
  perturbation: Perturbation

  def __call__(self, *args):
    """Call the function."""
    return self.function(*args, perturbation=self.perturbation)

  @property
  def perturbable(self) -> Mapping[str, Sequence[str]]:
    """The names of the function's blocks by kind."""
    return self.function.perturbable


def split_variance(output: Array, x: Array) -> tuple[Array, Array | None]:
  """Split a network's output for ``x`` into its prediction and its learned variance (None without one).

  Raises:
    ValueError: if the output has neither the shape of ``x`` nor twice its channels.
  """
  channels = x.shape[-1]
  variance = None
  if output.shape[-1] == 2 * channels:
    output, variance = output[..., :channels], output[..., channels:]
  if output.shape != x.shape:
    raise ValueError(f"the network gave shape {output.shape} for an input of shape {x.shape}")
  return output, variance


def _apply(model: NetworkDenoiser | ClassifierLogProb, x, sigma, *cond):
  """Call the network on a batch of one example; an outer ``vmap`` makes it a batch of many."""
  _, _, c_in, c_noise = coefficients(model.scaling, sigma)
  c_in, wide = together(c_in, x)
  args = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], ((c_in * wide).astype(x.dtype), c_noise, *cond))
  module = module_of(model.apply)
  if module is not None:
    check_params(module, model.params, *args)
  return model.apply(model.params, *args)[0]
