r"""From networks to denoisers and log-probabilities, and between what they say: x0, eps, v, score.

A *denoiser* is any function ``(x, sigma, cond) -> x0`` of one example ``x = x0 + sigma * eps``. To pass through
``jit`` as an argument it has to be a pytree: the ones made here are, and ``jax.tree_util.Partial(function, params)``
makes one of any function. Parameters then are leaves: new weights compile nothing anew and are never constants of the
program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, struct
from jaxguide._core.promotion import together
from jaxguide._core.typing import Array, Example, Leaf, Prediction, PyTree, Scalar
from jaxguide.denoisers.linen import by_value, check_params, module_of
from jaxguide.denoisers.scaling import coefficients
from jaxguide.nn.perturbation import Perturbation


@struct.dataclass
class NetworkDenoiser:
  """A network with its parameters, as a `Denoiser`.

  Args:
    params: the network's parameters, any pytree; for Flax the dictionary that ``init`` gives.
    apply: ``apply(params, x, c_noise, cond) -> F``, on a batch: ``x`` (n, *shape), ``c_noise`` (n,), each leaf of
      ``cond`` (n, ...). A Flax module's ``apply`` is one; ``cond=None`` is passed on as ``None``. An output with
      twice the channels of ``x`` has the learned variance in its second half.
    scaling: what the network predicts, from `jaxguide.scaling`.
    learned_variance: whether to give a `jaxguide.typing.Prediction` that holds the learned variance, for
      ``DDPM(variance="learned_range")``; otherwise it is left out.

  Where ``apply`` is a Flax module's, ``params`` are held against the module's own, the first time that they meet, and
  labels against its ``num_classes``.

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

  def __post_init__(self):
    object.__setattr__(self, "apply", by_value(self.apply))

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree = None) -> Example | Prediction:
    """Give ``x0``, of the shape and type of ``x``, or a `Prediction` that holds it."""
    c_skip, c_out, _, _ = coefficients(self.scaling, sigma)
    output, variance = split_variance(_apply(self, x, sigma, cond), x)
    c_skip, c_out, wide, output = together(c_skip, c_out, x, output.astype(x.dtype))
    x0 = (c_skip * wide + c_out * output).astype(x.dtype)
    if not self.learned_variance:
      return x0
    if variance is None:
      raise ValueError(f"the network gave shape {output.shape} for an example of that shape: it learned no variance")
    return Prediction(x0, variance.astype(x.dtype))

  def check_cond(self, cond: PyTree) -> None:
    """Raise ValueError where ``cond``, or its ``label`` if it is a dictionary, is outside the network's classes."""
    module = module_of(self.apply)
    num_classes = getattr(module, "num_classes", None)
    if num_classes is not None:
      label = cond.get("label") if isinstance(cond, Mapping) else cond
      checks.labels("label", label, num_classes, getattr(module, "null_class", False))


@struct.dataclass
class ClassifierLogProb:
  """A classifier trained on noisy examples, as a `LogProb`: ``log softmax(logits)[label]``.

  Args:
    params: the classifier's parameters.
    apply: ``apply(params, x, c_noise) -> logits``, on a batch: ``x`` (n, *shape), ``c_noise`` (n,), logits
      (n, classes).
    scaling: from `jaxguide.scaling`; the classifier is given ``c_in * x`` and ``c_noise`` of it, as in its training.
  """

  params: Leaf
  apply: Callable[..., Any] = struct.field(pytree_node=False)
  scaling: Leaf

  def __post_init__(self):
    object.__setattr__(self, "apply", by_value(self.apply))

  def logits(self, x: Example, sigma: Scalar) -> Array:
    """Give the logits, (classes,), for one example."""
    logits = _apply(self, x, sigma)
    if logits.ndim != 1:
      raise ValueError(f"the classifier must give logits of shape (n, classes), got (n, *{logits.shape})")
    return logits.astype(np.promote_types(x.dtype, np.float32))

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> Scalar:
    """Give the log-probability of the label ``cond``, a scalar."""
    if jnp.ndim(cond) or not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
      raise ValueError(
        f"the classifier needs one whole number as the label of one example, got {jnp.result_type(cond)} of shape "
        f"{jnp.shape(cond)}"
      )
    return jax.nn.log_softmax(self.logits(x, sigma))[cond]

  def check_cond(self, cond: PyTree) -> None:
    """Raise ValueError where ``cond`` holds labels outside the classifier's classes."""
    num_classes = getattr(module_of(self.apply), "out_channels", None)
    if num_classes is not None:
      checks.labels("label", cond, num_classes)


def perturbed(denoiser: NetworkDenoiser, perturbation: Perturbation) -> NetworkDenoiser:
  """Make a weak denoiser of a good one: the same parameters, in a network whose attention or blocks are perturbed.

  It is the weak model of `jaxguide.autoguidance` where none was trained, for conditional and unconditional networks
  alike: perturbed-attention guidance, smoothed energy guidance and skip layer guidance are
  ``autoguidance(perturbed(denoise, perturbation), scale)(denoise)``, each with its own `jaxguide.Perturbation`.

  Args:
    denoiser: a `NetworkDenoiser` of a `jaxguide.UNet`, a `jaxguide.SuperResUNet` or another Flax module with a field
      ``perturbation``, not guided yet.
    perturbation: what is done to which blocks; it takes the place of one that the network has.

  Returns:
    The weak denoiser, which shares the parameters and costs no more than the good one.

  Raises:
    ValueError: if the denoiser is of no such network, or a block is none of the network's, or not one of that kind.

  >>> from jaxguide import UNet, guidance, scaling, schedules
  >>> unet, x = UNet(model_channels=32), jnp.zeros((8, 8, 1))
  >>> params = jax.jit(unet.init)(jax.random.key(0), x[None], jnp.zeros(1))
  >>> denoise = NetworkDenoiser(params, unet.apply, scaling.v(schedules.Cosine()))
  >>> weak = perturbed(denoise, Perturbation("identity", ["middle_block_1"]))
  >>> guided = guidance.autoguidance(weak, 4.0)(denoise)        # PAG with s = 3
  >>> guided(x, jnp.asarray(1.0), None).shape
  (8, 8, 1)
  """
  apply: Any = getattr(denoiser, "apply", None)
  module = module_of(apply)
  if module is None or not hasattr(module, "perturbation"):
    what = type(denoiser if module is None else module).__name__
    raise ValueError(
      f"perturbed takes a NetworkDenoiser of a UNet, or of a Flax module with a field `perturbation`; got {what}. "
      "Perturb the bare denoiser, and guide afterwards"
    )
  perturbation.check(denoiser.params)
  return dataclasses.replace(denoiser, apply=dataclasses.replace(apply, module=module.clone(perturbation=perturbation)))


def split_variance(output: Array, x: Array) -> tuple[Array, Array | None]:
  """Part what a network gave for ``x`` into its prediction and its learned variance, if it has one.

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
  """Call the network on a batch of one; ``vmap`` outside folds its axis into that batch."""
  _, _, c_in, c_noise = coefficients(model.scaling, sigma)
  c_in, wide = together(c_in, x)
  args = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], ((c_in * wide).astype(x.dtype), c_noise, *cond))
  module = module_of(model.apply)
  if module is not None:
    check_params(module, model.params, *args)
  return model.apply(model.params, *args)[0]
