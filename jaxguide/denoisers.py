r"""From networks to denoisers and log-probabilities, and between what they say: x0, eps, v, score.

A *denoiser* is any function ``(x, sigma, cond) -> x0`` of one example ``x = x0 + sigma * eps``. To pass through
``jit`` as an argument it has to be a pytree: the ones made here are, and ``jax.tree_util.Partial(function, params)``
makes one of any function. Parameters then are leaves: new weights compile nothing anew and are never constants of the
program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError

from jaxguide import checks, struct
from jaxguide.nn.perturbation import Perturbation
from jaxguide.promotion import together
from jaxguide.scaling import coefficients
from jaxguide.typing import Array, ArrayLike, Example, Leaf, Prediction, PyTree, Scalar


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
    object.__setattr__(self, "apply", _by_value(self.apply))

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
    module = _module(self.apply)
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
    object.__setattr__(self, "apply", _by_value(self.apply))

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
    num_classes = getattr(_module(self.apply), "out_channels", None)
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
  module = _module(apply)
  if module is None or not hasattr(module, "perturbation"):
    what = type(denoiser if module is None else module).__name__
    raise ValueError(
      f"perturbed takes a NetworkDenoiser of a UNet, or of a Flax module with a field `perturbation`; got {what}. "
      "Perturb the bare denoiser, and guide afterwards"
    )
  perturbation.check(denoiser.params)
  return dataclasses.replace(denoiser, apply=dataclasses.replace(apply, module=module.clone(perturbation=perturbation)))


@struct.dataclass
class _Given:
  key: str = struct.field(pytree_node=False)
  function: Leaf

  def __call__(self, x: Example, sigma: Scalar, cond: PyTree) -> Any:
    return self.function(x, sigma, self._part(cond))

  def check_cond(self, cond: PyTree) -> None:
    check_cond(self.function, self._part(cond))

  def _part(self, cond: PyTree) -> PyTree:
    if not isinstance(cond, Mapping) or self.key not in cond:
      has = f"has {', '.join(map(repr, cond))}" if isinstance(cond, Mapping) else "is no dictionary"
      raise ValueError(f"the condition must be a dictionary with {self.key!r}, but it {has}")
    return cond[self.key]


def given(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
  """A denoiser or a log-probability that is given one part of the condition, ``cond[key]``.

  So a network that knows labels is guided by something that knows else, ``cond = {"label": ..., "y": ...}``:

  >>> import jaxguide as jg
  >>> log_prob = jg.measurement(lambda x0: x0[0], 0.1)
  >>> guided = jg.reconstruction(given("y", log_prob), 1.0)(given("label", jg.ring(4).denoiser))
  >>> guided(jnp.zeros(2), jnp.asarray(1.0), {"label": 1, "y": 0.0}).shape
  (2,)

  Guidance that is about one part goes inside: ``given("label", classifier_free(4, 2.0)(denoise))``.

  Raises:
    ValueError: once called, if the condition has no such part.
  """
  return _Given(key, function)


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


def check_cond(tree: PyTree, cond: PyTree) -> None:
  """Let every denoiser and classifier inside ``tree`` that knows its classes look at ``cond``.

  Raises:
    ValueError: for a label that is not one of the classes.
  """

  def knows(node: Any) -> bool:
    return hasattr(node, "check_cond")

  for node in jax.tree.leaves(tree, is_leaf=knows):
    if knows(node):
      node.check_cond(cond)


# --- the network's side ---------------------------------------------------------------------------


def _apply(model: NetworkDenoiser | ClassifierLogProb, x, sigma, *cond):
  """Call the network on a batch of one; ``vmap`` outside folds its axis into that batch."""
  _, _, c_in, c_noise = coefficients(model.scaling, sigma)
  c_in, wide = together(c_in, x)
  args = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], ((c_in * wide).astype(x.dtype), c_noise, *cond))
  module = _module(model.apply)
  if module is not None:
    check_params(module, model.params, *args)
  return model.apply(model.params, *args)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _ModuleMethod:
  """A Flax module's method that is equal where the modules are: Python compares bound methods by identity.

  Without it two networks of one configuration would be two programs. Fields that have no hash, such as dictionaries,
  lists and arrays, are compared by what they hold.
  """

  module: nn.Module
  name: str

  def __call__(self, *args, **kwargs):
    return getattr(self.module, self.name)(*args, **kwargs)

  def __eq__(self, other):
    return isinstance(other, _ModuleMethod) and self._value == other._value

  def __hash__(self):
    return hash(self._value)

  @functools.cached_property
  def _value(self):
    return _hashable(self.module), self.name


def _hashable(value):
  """Give a value that has a hash, and is equal where this one holds the same."""
  if isinstance(value, nn.Module):
    fields = [field.name for field in dataclasses.fields(value) if field.name not in ("parent", "name")]
    return type(value), value.name, tuple((name, _hashable(getattr(value, name))) for name in fields)
  if isinstance(value, Mapping):
    return "mapping", frozenset((key, _hashable(item)) for key, item in value.items())
  if isinstance(value, list | tuple):
    return type(value), tuple(map(_hashable, value))
  if isinstance(value, set | frozenset):
    return "set", frozenset(map(_hashable, value))
  if isinstance(value, np.ndarray | jax.Array):
    return "array", value.shape, value.dtype, np.asarray(value).tobytes()
  try:
    hash(value)
  except TypeError:
    return _Same(value)
  return value


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
  """A value that has no hash, and is equal to itself alone."""

  value: Any

  def __eq__(self, other):
    return isinstance(other, _Same) and self.value is other.value

  def __hash__(self):
    return id(self.value)


def _by_value(apply: Callable[..., Any]) -> Callable[..., Any]:
  if isinstance(apply, nn.Module):
    raise TypeError(
      f"apply must be a function of (params, x, c_noise, ...): give the module's, {type(apply).__name__}.apply"
    )
  if isinstance(apply, str) or (apply is not None and not callable(apply)):
    raise TypeError(f"apply must be a function of (params, x, c_noise, ...), got {apply!r}")
  owner = getattr(apply, "__self__", None)
  return _ModuleMethod(owner, apply.__name__) if isinstance(owner, nn.Module) else apply


def _module(apply: Callable[..., Any] | None) -> nn.Module | None:
  return apply.module if isinstance(apply, _ModuleMethod) else None


def check_params(module: nn.Module, params: PyTree, *args: Any) -> None:
  """Hold parameters against a Flax module.

  Args:
    module: the network.
    params: its variables, ``{"params": ...}``.
    *args: what it is called on; only shapes and types count.

  Raises:
    ValueError: naming the first parameter that is missing, unknown, or of another shape; or if the network cannot be
      called on ``args``.
  """
  name, expected = type(module).__name__, param_shapes(module, *args)
  ours, theirs = (
    {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}
    # Parameters may be in boxes that say how they are partitioned, or out of them.
    for leaves in map(jax.tree_util.tree_leaves_with_path, map(nn.meta.unbox, (params, expected)))
  )
  for path in [*theirs, *ours]:
    if ours.get(path) != theirs.get(path):
      if path not in ours:
        wrong = f"{path} is missing"
      elif path not in theirs:
        wrong = f"{path} is not a parameter of the network"
      else:
        wrong = f"{path} has shape {ours[path]}, expected {theirs[path]}"
      raise ValueError(f"the parameters do not fit {name}: {wrong}")


def param_shapes(module: nn.Module, *args: Any) -> PyTree:
  """Give the shapes and types of a Flax module's variables, ``{"params": ...}``, without making them.

  Args:
    module: the network.
    *args: what it is called on; only shapes and types count.

  Raises:
    ValueError: if the network cannot be called on them.

  >>> param_shapes(nn.Dense(3), jnp.zeros((1, 2)))["params"]["kernel"].shape
  (2, 3)
  """
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), args)
  leaves, treedef = jax.tree.flatten(shapes)
  return _param_shapes(_ModuleMethod(module, "init"), tuple(leaves), treedef)


@functools.lru_cache(maxsize=64)  # Tracing a network takes long, and loading one asks more than once.
def _param_shapes(init: _ModuleMethod, leaves: tuple[Any, ...], treedef: Any) -> PyTree:
  try:
    return jax.eval_shape(init, jax.random.key(0), *jax.tree.unflatten(treedef, leaves))
  except FlaxError as error:
    raise ValueError(f"{type(init.module).__name__} cannot be set up on inputs of these shapes: {error}") from error


# --- between what a denoiser can say ---------------------------------------------------------------
#
# x = x0 + sigma eps; score = grad log p(x; sigma) = -eps / sigma; v = alpha (eps - sigma x0).


def x0_to_eps(x: Array, x0: Array, sigma: ArrayLike) -> Array:
  """``(x - x0) / sigma``."""
  return (x - x0) / sigma


def eps_to_x0(x: Array, eps: Array, sigma: ArrayLike) -> Array:
  """``x - sigma eps``."""
  return x - sigma * eps


def x0_to_score(x: Array, x0: Array, sigma: ArrayLike) -> Array:
  """``(x0 - x) / sigma²``: Tweedie's formula (Efron 2011, eq. 1.4) read backwards.

  >>> float(x0_to_score(jnp.asarray(3.0), jnp.asarray(1.0), 2.0))
  -0.5
  """
  return (x0 - x) / jnp.square(sigma)


def score_to_x0(x: Array, score: Array, sigma: ArrayLike) -> Array:
  """``x + sigma² score``: Tweedie's formula."""
  return x + jnp.square(sigma) * score


def x0_to_v(x: Array, x0: Array, sigma: ArrayLike) -> Array:
  """``alpha (eps - sigma x0)`` with ``alpha = 1 / sqrt(1 + sigma²)`` (Salimans & Ho 2022, arXiv:2202.00512)."""
  return ((x - x0) / sigma - sigma * x0) / jnp.sqrt(1 + jnp.square(sigma))


def v_to_x0(x: Array, v: Array, sigma: ArrayLike) -> Array:
  """``alpha² x - alpha sigma v``, the inverse of `x0_to_v`."""
  alpha = 1 / jnp.sqrt(1 + jnp.square(sigma))
  return alpha**2 * x - alpha * sigma * v
