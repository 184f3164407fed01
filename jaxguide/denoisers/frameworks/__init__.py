"""Networks of Flax NNX, Equinox and Haiku as denoisers and as classifiers.

``from_nnx``, ``from_equinox`` and ``from_haiku`` take a network with its arrays. A function
``apply(params, x, t, cond)``, such as the ``apply`` of a Flax linen module, needs none of them: give it to
`jaxguide.NetworkDenoiser`.

Every network here is called as ``network(x, t, cond)``, a classifier as ``network(x, t)``. What it says about itself by
attributes, or the caller by arguments of these names, is

- ``role``: ``"denoiser"`` or ``"classifier"``;
- ``batched``: True if ``x`` is (n, height, width, channels), ``t`` (n,) and each leaf of ``cond`` (n, ...); False for
  one example without the axis n. Equinox networks take one example, others a batch, unless this says otherwise;
- ``channels_first``: True if the channels of ``x`` and of the prediction stand before height and width;
- ``perturbable``: the names of the blocks by the kind of `jaxguide.Perturbation`, such as
  ``{"identity": ["attention"], "skip": ["block_0", "block_1"]}``. Such a network takes a keyword argument
  ``perturbation``, which is None or the perturbation, and applies it to the blocks ``perturbation.blocks``;
- ``num_classes`` and ``null_class``, as attributes only: labels are checked before sampling;
- arguments of the call named ``train``, ``training``, ``is_training``, ``deterministic`` or ``inference`` say whether
  it is trained, and ``key`` or ``rngs`` has random numbers for dropout in training.

The parameters are leaves of the denoiser, in ``denoiser.params["params"]`` under the names of their framework. Batch
statistics and other state are leaves as well, and are used as they are: networks run in evaluation mode.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen

from jaxguide._core import checks
from jaxguide._core.typing import PyTree
from jaxguide.denoisers.frameworks import equinox as _equinox
from jaxguide.denoisers.frameworks import flax_nnx as _nnx
from jaxguide.denoisers.frameworks import haiku as _haiku
from jaxguide.denoisers.frameworks.own import Call, Maker, OfClass, Parts, how_called, instance, of_class
from jaxguide.denoisers.network import ClassifierLogProb, NetworkDenoiser

__all__ = ["from_equinox", "from_haiku", "from_nnx", "linen_class"]

Perturbable = Mapping[str, Sequence[str] | str]


def from_nnx(
  model: Any,
  scaling: Any,
  *,
  role: str | None = None,
  batched: bool | None = None,
  channels_first: bool | None = None,
  perturbable: Perturbable | None = None,
  learned_variance: bool = False,
  noise_range: tuple[float, float] | None = None,
) -> NetworkDenoiser | ClassifierLogProb:
  """Make a denoiser, or a log-probability, of an `flax.nnx.Module` with its parameters.

  The network runs as after ``model.eval()``: without dropout, and with the running averages of batch normalisation.
  ``model`` itself does not change. A network that changes its state or draws random numbers in evaluation is refused
  when it is called.

  Args:
    model: the network, called as ``model(x, t, cond)``, or ``model(x, t)`` without a condition or as a classifier.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    role: ``"denoiser"`` or ``"classifier"``. This and the next three are the model's attributes of these names where
      they are None, see `jaxguide.denoisers.frameworks`.
    batched: whether the model takes a batch (the default) or one example.
    channels_first: whether the model takes and gives channels before height and width; False by default.
    perturbable: the names of the model's blocks by the kind of perturbation.
    learned_variance: as in `jaxguide.NetworkDenoiser`.
    noise_range: as in `jaxguide.ClassifierLogProb`.

  Returns:
    A `jaxguide.NetworkDenoiser`, or a `jaxguide.ClassifierLogProb` for a classifier.

  Raises:
    TypeError: if ``model`` is no `flax.nnx.Module`, or cannot be called so.
    ValueError: if an argument is for the other role.

  >>> import jax.numpy as jnp, jaxguide as jg
  >>> from flax import nnx
  >>> class Net(nnx.Module):
  ...   def __init__(self, *, rngs):
  ...     self.layer, self.dropout = nnx.Linear(2, 2, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
  ...   def __call__(self, x, t, cond=None):
  ...     return self.dropout(self.layer(x)) + t[:, None]
  >>> denoise = from_nnx(Net(rngs=nnx.Rngs(0)), jg.scaling.edm())
  >>> denoise(jnp.ones(2), jnp.asarray(1.0)).shape
  (2,)
  """
  from flax import nnx

  if not isinstance(model, nnx.Module):
    raise TypeError(f"from_nnx takes a flax.nnx.Module with its parameters, got {_shown(model)}")
  given = {"role": role, "batched": batched, "channels_first": channels_first, "perturbable": perturbable}
  call = how_called(model, _signature(model), _nnx.NnxMaker.batched, given)
  return _with_role(call, *_nnx.split(model), model, scaling, learned_variance, noise_range)


def from_equinox(
  model: Any,
  scaling: Any,
  *,
  state: Any = None,
  role: str | None = None,
  batched: bool | None = None,
  channels_first: bool | None = None,
  perturbable: Perturbable | None = None,
  learned_variance: bool = False,
  noise_range: tuple[float, float] | None = None,
) -> NetworkDenoiser | ClassifierLogProb:
  """Make a denoiser, or a log-probability, of an `equinox.Module` with its parameters.

  The network runs as after ``equinox.nn.inference_mode(model)``: without dropout, and with running averages. Arrays of
  floats are its parameters. Other values, such as functions and Python's numbers, belong to the program.

  Args:
    model: the network, called as ``model(x, t, cond)`` on one example, ``x`` (height, width, channels), ``t`` and
      ``cond`` scalars; ``model(x, t)`` without a condition or as a classifier. With a state it is called as
      ``model(x, t, cond, state)`` and returns the prediction and the new state.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    state: the `equinox.nn.State` of a model with batch normalisation, from `equinox.nn.make_with_state`; else None.
    role: as in `from_nnx`, and so are the next ones.
    batched: whether the model takes a batch; False by default.
    channels_first: whether the model takes channels first, as Equinox's convolutions do; False by default.
    perturbable: the names of the model's blocks by the kind of perturbation.
    learned_variance: as in `jaxguide.NetworkDenoiser`.
    noise_range: as in `jaxguide.ClassifierLogProb`.

  Raises:
    TypeError: if ``model`` is no `equinox.Module`, or cannot be called so.
    ValueError: if an argument is for the other role, or the model has layers with a state and ``state`` is None.
    ModuleNotFoundError: if Equinox is not installed.

  >>> import equinox as eqx, jax.numpy as jnp, jaxguide as jg
  >>> class Net(eqx.Module):
  ...   layer: eqx.nn.Linear
  ...   def __call__(self, x, t, cond=None):
  ...     return self.layer(x) + t
  >>> denoise = from_equinox(Net(eqx.nn.Linear(2, 2, key=jax.random.key(0))), jg.scaling.edm())
  >>> denoise(jnp.ones(2), jnp.asarray(1.0)).shape
  (2,)
  """
  import equinox

  if not isinstance(model, equinox.Module):
    raise TypeError(f"from_equinox takes an equinox.Module with its parameters, got {_shown(model)}")
  if state is None and _equinox.has_indices(model):
    raise ValueError(
      f"{type(model).__name__} has layers with a state: make it by equinox.nn.make_with_state, and give its state"
    )
  given = {"role": role, "batched": batched, "channels_first": channels_first, "perturbable": perturbable}
  signature = _signature(model)
  if state is not None:
    signature = signature.replace(parameters=[one for one in signature.parameters.values() if one.name != "state"])
  call = how_called(model, signature, _equinox.EquinoxMaker.batched, given)
  return _with_role(call, *_equinox.split(model, state), model, scaling, learned_variance, noise_range)


def from_haiku(
  transformed: Any,
  params: PyTree,
  scaling: Any,
  *,
  state: PyTree = None,
  role: str | None = None,
  batched: bool | None = None,
  channels_first: bool | None = None,
  perturbable: Perturbable | None = None,
  learned_variance: bool = False,
  noise_range: tuple[float, float] | None = None,
  **options: Any,
) -> NetworkDenoiser | ClassifierLogProb:
  """Make a denoiser, or a log-probability, of a transformed Haiku function with its parameters.

  Args:
    transformed: what `haiku.transform`, `haiku.transform_with_state` or `haiku.without_apply_rng` returned for a
      function ``f(x, t, cond)``, or ``f(x, t)`` without a condition or for a classifier. It gets no random key. If it
      takes ``is_training``, this is False.
    params: its parameters, as ``transformed.init`` returned them.
    scaling: the network's parameterization, from `jaxguide.scaling`.
    state: its state, such as batch statistics, for `haiku.transform_with_state`; else None.
    role: as in `from_nnx`, and so are the next ones. A function has no attributes, so all defaults apply.
    batched: whether the function takes a batch (the default) or one example.
    channels_first: whether the function takes and gives channels before height and width; False by default.
    perturbable: the names of the function's blocks by the kind of perturbation.
    learned_variance: as in `jaxguide.NetworkDenoiser`.
    noise_range: as in `jaxguide.ClassifierLogProb`.
    **options: further keyword arguments of the function. They belong to the program.

  Raises:
    TypeError: if ``transformed`` is not a transformed function, or cannot be called so.
    ValueError: if an argument is for the other role, or a state is missing or superfluous.

  >>> import haiku as hk, jax.numpy as jnp, jaxguide as jg
  >>> network = hk.transform(lambda x, t, cond: hk.Linear(2)(x) + t[:, None])
  >>> params = network.init(jax.random.key(0), jnp.ones((1, 2)), jnp.ones(1), None)
  >>> from_haiku(network, params, jg.scaling.edm())(jnp.ones(2), jnp.asarray(1.0)).shape
  (2,)
  """
  if not (callable(getattr(transformed, "init", None)) and callable(getattr(transformed, "apply", None))):
    raise TypeError(f"from_haiku takes what haiku.transform returns, got {_shown(transformed)}")
  arguments, signature = _haiku.arguments(transformed.apply)
  if ("state" in arguments) != (state is not None):
    problem = "has a state: give state, the second result of init" if state is None else "has no state: leave it out"
    raise ValueError(f"the Haiku function {problem}")
  given = {"role": role, "batched": batched, "channels_first": channels_first, "perturbable": perturbable}
  call = how_called(transformed, signature, _haiku.HaikuMaker.batched, given, options, "the Haiku function")
  variables = {"params": params, **({} if state is None else {"state": state})}
  leaves, tree = jax.tree.flatten(jax.tree.map(_shape, variables))
  parts = _haiku.HaikuParts(transformed.apply, arguments, tuple(options.items()), (tuple(leaves), tree))
  return _with_role(call, parts, variables, transformed, scaling, learned_variance, noise_range)


def _with_role(
  call: Call, parts: Parts, variables: PyTree, source: Any, scaling: Any, learned_variance: bool, noise_range: Any
) -> NetworkDenoiser | ClassifierLogProb:
  apply = instance(call, parts, source).apply
  checks.flag("learned_variance", learned_variance)
  if call.role == "classifier":
    if learned_variance:
      raise ValueError("learned_variance is for a denoiser: leave it out for a classifier")
    return ClassifierLogProb(variables, apply, scaling, noise_range)
  if noise_range is not None:
    raise ValueError("noise_range is for a classifier: leave it out for a denoiser")
  return NetworkDenoiser(variables, apply, scaling, learned_variance)


def _signature(model: Any) -> inspect.Signature:
  if not callable(model):
    raise TypeError(f"{type(model).__name__} has no __call__: define __call__(self, x, t, cond)")
  return inspect.signature(model)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(jax.numpy.shape(leaf), jax.numpy.result_type(leaf))


def _shown(value: Any) -> str:
  if isinstance(value, linen.Module):
    return f"the linen module {type(value).__name__}: give jaxguide.NetworkDenoiser(params, module.apply, scaling)"
  if isinstance(value, type):
    return f"the class {value.__name__}: give an object of it"
  return type(value).__name__


# --- classes, which training makes networks of ----------------------------------------------------


@functools.cache
def linen_class(cls: Any) -> type[OfClass] | None:
  """Return the linen module class of a class of another framework; None if it is of none that is known here.

  Args:
    cls: an `flax.nnx.Module`, `equinox.Module` or `haiku.Module` class, or a class with the methods ``init(key, x, t,
      cond) -> params`` and ``apply(params, x, t, cond)``, which has no attributes that are arrays.

  Raises:
    TypeError: if its networks cannot be called as networks are here.

  >>> from flax import nnx
  >>> class Net(nnx.Module):
  ...   def __init__(self, width: int = 8, *, rngs): ...
  ...   def __call__(self, x, t, cond=None): ...
  >>> linen_class(Net)().width
  8
  """
  if issubclass(cls, linen.Module):
    return None
  known: dict[str, Maker] = {
    "flax.nnx": _nnx.NnxMaker(),
    "equinox": _equinox.EquinoxMaker(),
    "haiku": _haiku.HaikuMaker(),
  }
  makers = [(sys.modules[library].Module, maker) for library, maker in known.items() if library in sys.modules]
  for base, maker in makers:
    if issubclass(cls, base):
      if not any("__call__" in vars(one) for one in cls.__mro__):
        raise TypeError(f"{cls.__name__} has no __call__: define __call__(self, x, t, cond)")
      return of_class(cls, maker, _without(inspect.signature(cls.__call__), 1, "state"))
  if callable(getattr(cls, "init", None)) and callable(getattr(cls, "apply", None)):
    return of_class(cls, _haiku.PlainMaker(), _without(inspect.signature(cls.apply), 2))
  return None


def _without(signature: inspect.Signature, first: int, *names: str) -> inspect.Signature:
  kept = [one for one in list(signature.parameters.values())[first:] if one.name not in names]
  return signature.replace(parameters=kept)
