"""What networks of other frameworks have in common here: each becomes a Flax linen module.

The linen module has the network's parameters as its own, under the names of its framework, and calls the network with
them. So whatever takes a linen module takes a network of another framework.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import types
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import freeze, unfreeze

from jaxguide._core import checks
from jaxguide._core.promotion import standard
from jaxguide._core.typing import Array, PyTree
from jaxguide.denoisers.frameworks.hints import constructor, hints_of
from jaxguide.denoisers.linen import ModuleMethod
from jaxguide.nn.perturbation import Perturbation

ROLES = ("denoiser", "classifier")

IN_TRAINING = {"train": True, "training": True, "is_training": True, "deterministic": False, "inference": False}
"""Arguments of networks that tell training from evaluation, with their value in training."""

Variables = Mapping[str, Mapping[str, Any]]
"""The arrays of a network: the collection ``params`` with what is trained, and others with its state."""


@runtime_checkable
class Parts(Protocol):
  """A network without its arrays. Two of one configuration are equal."""

  def shapes(self) -> Variables:
    """Return the shapes and types of the network's arrays."""
    ...

  def run(self, variables: Variables, key: Any, train: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Call the network with arrays; ``key`` is None or for dropout. What changes the network's state is refused."""
    ...


@runtime_checkable
class Maker(Protocol):
  """How the networks of a class are made, for one framework."""

  batched: bool

  def fields(self, cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of the constructor that are settings of the network."""
    ...

  def parts(self, cls: type, fields: Mapping[str, Any]) -> Parts:
    """Return the network of these fields without its arrays."""
    ...

  def initial(self, cls: type, fields: Mapping[str, Any], key: Any, args: tuple[Any, ...], options: Any) -> Variables:
    """Draw the initial arrays of the network of these fields, which will be called with ``args``."""
    ...


class Call(NamedTuple):
  """How a network is called.

  Args:
    name: the name of the network, for messages.
    role: ``denoiser`` or ``classifier``.
    batched: whether it takes a batch; otherwise it takes one example.
    channels_first: whether it takes (channels, height, width).
    takes_cond: whether it takes a condition.
    keywords: the names of the keyword arguments that it takes and that are given here.
    perturbable: the names of its blocks by the kind of perturbation; None if it cannot be perturbed.
  """

  name: str
  role: str
  batched: bool
  channels_first: bool
  takes_cond: bool
  keywords: tuple[str, ...]
  perturbable: Mapping[str, tuple[str, ...]] | None


def how_called(
  network: Any,
  signature: inspect.Signature,
  batched: bool,
  given: Mapping[str, Any],
  options: Mapping[str, Any] = types.MappingProxyType({}),
  name: str | None = None,
) -> Call:
  """Find out how a network is called.

  Args:
    network: the network or its class. Its attributes ``role``, ``batched``, ``channels_first`` and ``perturbable`` are
      used for what is not given.
    signature: the signature of its call, without the arguments for arrays.
    batched: what its framework does.
    given: the same settings, where they are not None.
    options: further keyword arguments that will be given.
    name: its name for messages, if not that of its class.

  Raises:
    TypeError: if it cannot be called as networks are here.
    ValueError: for another role.
  """
  name = name or getattr(network, "__name__", None) or type(network).__name__

  def setting(key, default):
    value = given.get(key)
    return value if value is not None else getattr(network, key, default)

  role = setting("role", "denoiser")
  checks.lookup("role", role, dict.fromkeys(ROLES))
  parameters = signature.parameters
  keywords = tuple(key for key in (*IN_TRAINING, "key", "rngs") if key in parameters and key not in options)
  further = {**dict.fromkeys(keywords), **dict.fromkeys(options)}
  wanted = 2 if role == "classifier" else 3
  takes = next((count for count in dict.fromkeys((wanted, 2)) if _binds(signature, count, further)), None)
  if takes is None:
    inputs = "(x, t)" if role == "classifier" else "(x, t, cond)"
    raise TypeError(
      f"{name} must be callable as network{inputs}, and its call takes {signature}: give every further argument a "
      f"default{', or role=' + repr('classifier') if wanted == 3 else ''}"
    )
  perturbable = setting("perturbable", None)
  if perturbable is not None:
    blocks = {kind: (names,) if isinstance(names, str) else tuple(names) for kind, names in dict(perturbable).items()}
    perturbable = blocks
    if "perturbation" not in parameters:
      raise TypeError(f"{name} says that it is perturbable, but its call takes no `perturbation`: {signature}")
  flags = {key: setting(key, default) for key, default in (("batched", batched), ("channels_first", False))}
  for key, flag in flags.items():
    checks.flag(key, flag)
  return Call(name, role, **flags, takes_cond=takes == 3, keywords=keywords, perturbable=perturbable)


def _binds(signature: inspect.Signature, count: int, keywords: Mapping[str, Any]) -> bool:
  try:
    signature.bind(*range(count), **keywords)
  except TypeError:
    return False
  return True


class OwnNetwork(linen.Module):
  """A network of another framework as a Flax linen module, called as ``module(x, t, cond)`` on a batch.

  Args:
    perturbation: given to the network as the keyword argument ``perturbation``.
  """

  perturbation: Perturbation | None = None

  @linen.nowrap
  def _how(self) -> Call:
    """Return how the network is called."""
    raise NotImplementedError

  @linen.nowrap
  def _parts(self) -> Parts:
    """Return the network without its arrays."""
    raise NotImplementedError

  @linen.nowrap
  def _initial(self, key: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variables:
    """Return initial arrays."""
    raise NotImplementedError

  @property
  def name_of_network(self) -> str:
    """The name of the network in its own framework."""
    return self._how().name

  @property
  def perturbable(self) -> Mapping[str, tuple[str, ...]] | None:
    """The names of the blocks by the kind of perturbation; None if the network cannot be perturbed."""
    return self._how().perturbable

  @linen.compact
  def __call__(self, x, t, cond=None, *, train: bool = False):
    """Call the network.

    Args:
      x: (n, *shape) examples, channels last.
      t: (n,) times.
      cond: a pytree whose leaves have shape (n, ...), or None.
      train: whether dropout is on; it uses the random key ``dropout``.
    """
    how = self._how()
    if cond is not None and not how.takes_cond:
      raise ValueError(f"{how.name} takes no condition, and got one: give its call a third argument, or cond=None")
    key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
    args = (_first(x) if how.channels_first else x, t, *([cond] if how.takes_cond else []))
    if self.is_initializing():
      one = args if how.batched else jax.tree.map(lambda leaf: leaf[0], args)
      with standard(), _said(how, one):
        made = self._initial(self.make_rng("params"), one, self._options(True, self.make_rng("params")))
      for collection, values in made.items():
        for name, value in values.items():
          self.put_variable(collection, name, value)
      if isinstance(self, Instance):
        return x  # The caller only asks for the shapes of the arrays.
    parts, variables = self._parts(), unfreeze(dict(self.variables))

    def run(key, *args):
      with standard(), _said(how, args):
        return parts.run(variables, key, train, args, self._options(train, key))

    if how.batched:
      output = run(key, *args)
    else:
      output = jax.vmap(run)(None if key is None else jax.random.split(key, x.shape[0]), *args)
    return self._checked(output, x)

  @linen.nowrap
  def _options(self, train: bool, key: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name in self._how().keywords:
      options[name] = train is IN_TRAINING[name] if name in IN_TRAINING else key
    if self.perturbation is not None:
      options["perturbation"] = self.perturbation
    return options

  @linen.nowrap
  def _checked(self, output: Any, x: Array) -> Array:
    """Check the network's output, and put its channels last."""
    how = self._how()
    if not hasattr(output, "shape"):
      raise TypeError(f"{how.name} must return one array, got {type(output).__name__}: return the prediction alone")
    if how.channels_first and how.role == "denoiser" and output.ndim == x.ndim:
      output = jnp.moveaxis(output, 1, -1)
    shape, hint = output.shape, f"it was called with batched={how.batched} and channels_first={how.channels_first}"
    if how.role == "classifier":
      if len(shape) != 2 or shape[0] != x.shape[0]:
        raise ValueError(f"the classifier {how.name} must give logits (n, classes), got {shape}; {hint}")
    elif shape[:-1] != x.shape[:-1] or shape[-1] not in (x.shape[-1], 2 * x.shape[-1]):
      wanted = (*x.shape[:-1], f"{x.shape[-1]} or {2 * x.shape[-1]}")
      raise ValueError(f"{how.name} must give shape {wanted}, channels last, got {shape}; {hint}")
    return output


def _first(x: Array) -> Array:
  return jnp.moveaxis(x, -1, 1)


@contextlib.contextmanager
def _said(how: Call, args: tuple[Any, ...]) -> Iterator[None]:
  """Add to an error inside the network how the network was called."""
  try:
    yield
  except Exception as error:
    shapes = ", ".join(
      str(jnp.shape(arg)) if hasattr(arg, "shape") else str(jax.tree.map(jnp.shape, arg)) for arg in args
    )
    error.add_note(
      f"{how.name} was called here with inputs of the shapes {shapes}. Set batched={not how.batched} if it takes "
      f"{'one example' if how.batched else 'a batch'}, and channels_first if it takes channels before pixels"
    )
    raise


# --- one network with its arrays ------------------------------------------------------------------


class Instance(OwnNetwork):
  """A network that exists already.

  Args:
    call: how it is called.
    network: the network without its arrays.
    num_classes: of a denoiser, or None.
    null_class: of a denoiser.
    out_channels: the classes of a classifier, or None.
  """

  call: Call | None = None
  network: Any = None
  num_classes: int | None = None
  null_class: bool = False
  out_channels: int | None = None

  @linen.nowrap
  def _how(self) -> Call:
    """Return how the network is called."""
    assert self.call is not None
    return self.call

  @linen.nowrap
  def _parts(self) -> Parts:
    """Return the network without its arrays."""
    return self.network

  @linen.nowrap
  def _initial(self, key: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variables:
    """Return zeros: the network is never drawn anew, and only their shapes are used."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.network.shapes())


def instance(call: Call, network: Parts, source: Any) -> Instance:
  """Make the linen module of a network that exists; ``source`` may have ``num_classes`` and ``null_class``."""

  def number(name):
    value = getattr(source, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None

  classifier = call.role == "classifier"
  return Instance(
    call=call,
    network=network,
    num_classes=None if classifier else number("num_classes"),
    null_class=bool(getattr(source, "null_class", False)),
    out_channels=(number("out_channels") or number("num_classes")) if classifier else None,
  )


# --- classes of networks --------------------------------------------------------------------------


class OfClass(OwnNetwork):
  """A network of a class: its fields are the arguments of the constructor."""

  _made_of: ClassVar[type]
  _maker: ClassVar[Any]
  _call: ClassVar[Call]
  _names: ClassVar[tuple[str, ...]]

  @linen.nowrap
  def _how(self) -> Call:
    """Return how the network is called."""
    return type(self)._call

  @linen.nowrap
  def _parts(self) -> Parts:
    """Return the network without its arrays."""
    return _parts_of(ModuleMethod(type(self)(parent=None, **self._fields()), "_new_parts"))

  @linen.nowrap
  def _new_parts(self) -> Parts:
    return self._maker.parts(self._made_of, self._fields())

  @linen.nowrap
  def _initial(self, key: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variables:
    """Draw initial arrays."""
    return self._maker.initial(self._made_of, self._fields(), key, args, options)

  @linen.nowrap
  def _fields(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in self._names}


@functools.lru_cache(maxsize=64)  # A constructor may take long, and each trace of a program needs the parts.
def _parts_of(new: ModuleMethod) -> Parts:
  return new()


def of_class(cls: type, maker: Maker, signature: inspect.Signature) -> type[OfClass]:
  """Make the linen module class of a class of another framework.

  Args:
    cls: the class.
    maker: how its networks are made.
    signature: the signature of its call, without the arguments for arrays.

  Raises:
    TypeError: if its networks cannot be called as networks are here.
    ValueError: if an argument of the constructor has a name that Flax's modules need.
  """
  parameters, hints = maker.fields(cls), hints_of(cls)
  for name in parameters:
    if hasattr(OfClass, name) or name in ("name", "parent"):
      raise ValueError(f"the constructor of {cls.__name__} has the argument {name!r}, a name of Flax's own: rename it")
  namespace: dict[str, Any] = {
    "__module__": cls.__module__,
    "__qualname__": cls.__qualname__,
    "__doc__": cls.__doc__,
    "__annotations__": {name: hints.get(name, Any) for name in parameters},
    "_made_of": cls,
    "_maker": maker,
    "_call": how_called(cls, signature, maker.batched, {}),
    "_names": tuple(parameters),
    **{name: getattr(cls, name) for name in ("role", "null_class", "frozen") if hasattr(cls, name)},
  }
  for name, parameter in parameters.items():
    if parameter.default is not inspect.Parameter.empty:
      default = parameter.default
      plain = tuple(default) if isinstance(default, list) else default
      namespace[name] = freeze(plain) if isinstance(plain, dict) else plain
  return types.new_class(cls.__name__, (OfClass,), {"kw_only": True}, lambda space: space.update(namespace))


def constructor_fields(cls: type, without: tuple[str, ...]) -> dict[str, inspect.Parameter]:
  """Return the named arguments of a constructor, without ``self`` and those of these names."""
  kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  return {one.name: one for one in constructor(cls) if one.kind in kinds and one.name not in (*without, "perturbation")}


# --- arrays by their names ------------------------------------------------------------------------


def nested(places: Any, leaves: Any) -> dict[str, dict[str, Any]]:
  """Arrange arrays by (collection, path) as nested dictionaries.

  >>> nested([("params", ("layer", "0")), ("params", ("bias",))], [1.0, 2.0])
  {'params': {'layer': {'0': 1.0}, 'bias': 2.0}}
  """
  tree: dict[str, Any] = {}
  for (collection, path), leaf in zip(places, leaves, strict=True):
    node = tree.setdefault(collection, {})
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def looked_up(variables: PyTree, place: tuple[str, tuple[str, ...]]) -> Any:
  """Return the array at a place."""
  collection, path = place
  return functools.reduce(operator.getitem, path, variables[collection])
