"""Random initial parameters, computed array by array.

The initialiser of a network is one large program: that of a UNet compiles for 20 s on a CPU and for minutes on a GPU.
`by_array` only traces it, and cuts the trace into one small program for each array. Arrays of the same shape and
initialiser share a program, and zeros and ones need none. So a network of hundreds of arrays needs tens of programs of
a few operations each. They are compiled side by side, and run on the host's CPU. The random bits, which take longest to
compile, are drawn by one program for all arrays.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.random import threefry2x32_p
from jax.interpreters import partial_eval

from jaxguide._core import devices
from jaxguide._core.typing import PyTree

OPTIONS = {"xla_backend_optimization_level": 1}
"""A level above 0 gives the numbers of every other; 0 takes ten times as long to run, and differs in the last bit."""

LARGEST_CACHE = 256

PIECES = (2**12, 2**16)
"""How many random words are drawn at a time, for an array up to the first and for a larger one. They fit in a cache."""

INLINED = ("checkpoint", "closed_call", "jit", "pjit", "remat2")
"""Operations that only call others. One that makes several arrays, or draws, is replaced by what it calls."""

_compiled: dict[Hashable, Any] = {}


class _Part(NamedTuple):
  """The operations that compute one array from keys and from arrays that are known."""

  eqns: Sequence[core.JaxprEqn]
  inputs: Sequence[core.Var]
  out: core.Var

  @property
  def kind(self) -> Hashable:
    """What the operations are, whatever their variables are called. Parts of one kind share a program."""
    numbers = {var: index for index, var in enumerate(self.inputs)}
    kinds: list[Hashable] = [tuple(str(var.aval) for var in self.inputs)]
    for eqn in self.eqns:
      params = tuple(sorted(eqn.params.items()))
      operands = tuple(_literal(var) if isinstance(var, core.Literal) else numbers[var] for var in eqn.invars)
      numbers.update({var: len(numbers) + index for index, var in enumerate(eqn.outvars)})
      try:
        hash(params)
        kinds.append((eqn.primitive, operands, params))
      except TypeError:
        kinds.append(_Alone(eqn))
    return (*kinds, numbers[self.out])

  def function(self, *inputs: Any) -> Any:
    """Compute the array."""
    return _function(self.inputs, [self.out], self.eqns)(*inputs)[0]

  def lower(self, inputs: Sequence[Any]) -> Any:
    """Lower the program of these operations."""
    return jax.jit(self.function, compiler_options=OPTIONS).lower(*inputs)


class _Alone:
  """An operation whose parameters cannot be compared: it is equal to itself alone."""

  def __init__(self, eqn: core.JaxprEqn):
    self.eqn = eqn


def _value(var: Any, known: Mapping[Any, Any]) -> Any:
  """Return the value of a variable, or None if it is not known yet."""
  return var.val if isinstance(var, core.Literal) else known.get(var)


def _literal(var: core.Literal) -> Hashable:
  return str(var.aval), np.asarray(var.val).tobytes()


def by_array(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
  """Return ``function(*args)``, bit for bit as ``jax.jit(function)(*args)`` gives it on the host's CPU.

  No two arrays of the result share memory, also with the arguments.

  Args:
    function: a function of arrays, such as the initialiser of a network. Each array of its result is computed by
      itself; what several need is computed for each.
    args: its arguments, all on one device, where the result is placed; or on several, and then it is computed there.

  >>> init = lambda key: {"a": jax.random.normal(key, (2,)), "b": jnp.zeros(3)}
  >>> made = by_array(init, jax.random.key(0))
  >>> bool((made["a"] == jax.jit(init)(jax.random.key(0))["a"]).all()), made["b"].shape
  (True, (3,))
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
  leaves = jax.tree.map(jnp.asarray, jax.tree.leaves(args))
  structure, host, homes = (
    jax.tree.structure(shapes),
    devices.host(),
    {each for leaf in leaves for each in leaf.devices()},
  )
  if host is None or len(homes) != 1:
    return jax.tree.unflatten(structure, [make() for make in _makers(closed, leaves, pieces=False)])
  target = next((leaf.sharding for leaf in leaves if leaf.committed), None)
  with jax.default_device(host):
    makers = _makers(closed, jax.device_put(leaves, host), pieces=True)
  made = []
  for make in makers:  # One by one, so that the host never has all of them.
    with jax.default_device(host):
      leaf = make()
    made.append(leaf if target is None and homes == {host} else placed(leaf, target))
  return jax.tree.unflatten(structure, made)


def placed(value: Any, sharding: Any = None, dtype: Any = None) -> jax.Array:
  """Copy an array to a device, the default one if none is given."""
  if _is_key(value):
    return jax.random.wrap_key_data(placed(jax.random.key_data(value), sharding), impl=jax.random.key_impl(value))
  return jax.device_put(np.array(value, dtype), sharding)


def _is_key(array: Any) -> bool:
  return jax.dtypes.issubdtype(getattr(array, "dtype", None), jax.dtypes.prng_key)


def _makers(closed: core.ClosedJaxpr, args: Sequence[jax.Array], pieces: bool) -> list[Callable[[], jax.Array]]:
  """Return functions that compute the results of a trace, one each; with random bits drawn in pieces if ``pieces``."""
  pieces = pieces and bool(jax.config.values["jax_threefry_partitionable"]) and _in_pieces()
  jaxpr, known = _flat(closed, args)
  sources = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in eqn.outvars}

  def part(out: Any) -> _Part:
    """Give what computes a variable, from keys and what is known."""
    needed: set[int] = set()
    inputs: dict[Any, None] = {}
    stack = [out]
    while stack:
      var = stack.pop()
      if var in known:
        inputs[var] = None
      elif sources[var] not in needed:
        needed.add(sources[var])
        stack.extend(each for each in jaxpr.eqns[sources[var]].invars if not isinstance(each, core.Literal))
    return _Part([jaxpr.eqns[index] for index in sorted(needed)], list(inputs), out)

  for var, eqn in [(var, jaxpr.eqns[index]) for var, index in sources.items()]:
    bits = _Bits.of(eqn, known) if pieces else None
    if bits is not None:
      known[var] = bits
    elif _is_key(var.aval):
      # Operation by operation: JAX then has one program for all numbers that are folded into a key.
      of_key = part(var)
      known[var] = of_key.function(*(known[each] for each in of_key.inputs))

  def maker(out: Any) -> Callable[[], jax.Array]:
    value = _value(out, known)
    if value is not None and not isinstance(value, _Bits):
      return lambda: placed(value, dtype=out.aval.dtype)
    made = part(out)
    if len(made.eqns) == 1 and made.eqns[0].invars:
      name, operand = made.eqns[0].primitive.name, _value(made.eqns[0].invars[0], known)
      if name in ("copy", "copy_p") and operand is not None:
        return lambda: placed(operand)
      if name == "broadcast_in_dim" and operand is not None and np.ndim(operand) == 0:
        return lambda: jax.device_put(np.full(out.aval.shape, operand, out.aval.dtype))
    return programs.add(made, [known[each] for each in made.inputs])

  programs = _Programs()
  makers = [maker(var) for var in jaxpr.outvars]
  programs.compile()
  return makers


class _Bits(NamedTuple):
  """Random bits that are drawn in pieces, by one program for arrays of all shapes. That takes longest to compile."""

  key: jax.Array
  type: jax.ShapeDtypeStruct

  @classmethod
  def of(cls, eqn: core.JaxprEqn, known: Mapping[Any, Any]) -> "_Bits | None":
    """Give the bits that an operation draws, if they can be drawn so: bit ``i`` depends on the key and ``i`` alone."""
    if eqn.primitive.name != "random_bits" or eqn.params["bit_width"] != 32:
      return None
    out: Any = eqn.outvars[0].aval
    key = _value(eqn.invars[0], known)
    fits = key is not None and key.shape == () and jax.random.key_impl(key) == "threefry2x32" and out.size < 2**32
    return cls(key, jax.ShapeDtypeStruct(out.shape, out.dtype)) if fits else None

  def draw(self) -> np.ndarray:
    """Draw the bits."""
    words, size = jax.random.key_data(self.key), self.type.size
    drawn = np.empty(size, np.uint32)
    piece = next(each for each in PIECES if each >= min(size, PIECES[-1]))
    for start in range(0, size, piece):
      drawn[start : start + piece] = np.asarray(_piece(words, np.uint32(start), piece))[: size - start]
    return drawn.reshape(self.type.shape)


@functools.partial(jax.jit, static_argnames="size", compiler_options=OPTIONS)
def _piece(words: jax.Array, start: Any, size: int) -> jax.Array:
  """Return bits ``start`` to ``start + size - 1`` of a key."""
  count = start + jnp.arange(size, dtype=jnp.uint32)
  high, low = threefry2x32_p.bind(*(jnp.broadcast_to(word, (size,)) for word in words), jnp.zeros_like(count), count)
  return high ^ low


@functools.cache
def _in_pieces() -> bool:
  """Whether JAX draws bits as `_piece` does. Otherwise each array draws its own, in its own program."""
  key = jax.random.key(5, impl="threefry2x32")
  expected, words = np.asarray(jax.random.bits(key, (5, 13))).ravel(), jax.random.key_data(key)
  found = [np.asarray(_piece(words, np.uint32(start), PIECES[0]))[: 65 - start] for start in (0, 60)]
  return all(np.array_equal(each, expected[-len(each) :]) for each in found)


class _Programs:
  """The programs of parts, one for each kind."""

  def __init__(self) -> None:
    # What a program depends on beside its operations.
    self.context = (
      jax.config.values["jax_enable_x64"],
      jax.config.values["jax_threefry_partitionable"],
      frozenset(jax.device_put(np.zeros(())).devices()),
    )
    self.lowered: dict[Hashable, Any] = {}
    self.found: dict[Hashable, Any] = {}

  def add(self, part: _Part, inputs: Sequence[Any]) -> Callable[[], jax.Array]:
    """Give the function that runs the program of a part; it can be called after `compile`."""
    kind = (part.kind, self.context)
    if kind in _compiled:
      self.found[kind] = _compiled[kind]
    elif kind not in self.lowered:
      self.lowered[kind] = part.lower([each.type if isinstance(each, _Bits) else each for each in inputs])
    return lambda: self.found[kind](*(each.draw() if isinstance(each, _Bits) else each for each in inputs))

  def compile(self) -> None:
    """Compile the programs that are not there, side by side."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      made = dict(zip(self.lowered, pool.map(lambda each: each.compile(), self.lowered.values()), strict=True))
    self.found.update(made)
    if len(_compiled) + len(made) > LARGEST_CACHE:
      _compiled.clear()
    _compiled.update(made)


def _flat(closed: core.ClosedJaxpr, args: Sequence[jax.Array]) -> tuple[core.Jaxpr, dict[Any, Any]]:
  """Leave out of a trace what its results do not need, and the borders of what it calls. Give the values known, too."""
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
  if any(_inner(eqn) for eqn in jaxpr.eqns):
    consts, outer = closed.consts, jaxpr
    closed = jax.make_jaxpr(lambda *args: _call(outer, consts, args))(*args)
    jaxpr = closed.jaxpr
  return jaxpr, dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))


def _inner(eqn: core.JaxprEqn) -> Any:
  """Return what an operation calls, if it only calls it, and makes several arrays or draws."""
  if eqn.primitive.name not in INLINED:
    return None
  inner = eqn.params["jaxpr"]
  return inner if len(eqn.outvars) > 1 or _draws(inner) else None


def _draws(jaxpr: Any) -> bool:
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  calls = [eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.primitive.name in INLINED]
  return any(eqn.primitive.name == "random_bits" for eqn in jaxpr.eqns) or any(map(_draws, calls))


def _call(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  """Call what a trace calls, operation by operation."""
  values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
  value = lambda var: var.val if isinstance(var, core.Literal) else values[var]  # noqa: E731
  for eqn in jaxpr.eqns:
    inner, operands = _inner(eqn), list(map(value, eqn.invars))
    if inner is None:
      names: list[Any] = [core.Var(var.aval) for var in eqn.invars]
      results = _function(names, eqn.outvars, [eqn.replace(invars=names)])(*operands)
    elif isinstance(inner, core.ClosedJaxpr):
      results = _call(inner.jaxpr, inner.consts, operands)
    else:
      results = _call(inner, (), operands)
    values.update(zip(eqn.outvars, results, strict=True))
  return list(map(value, jaxpr.outvars))


def _function(inputs: Sequence[Any], outputs: Sequence[Any], eqns: Sequence[core.JaxprEqn]) -> Callable[..., Any]:
  """Return the function of some operations of a trace."""
  info = core.DebugInfo("by_array", "by_array", ("",) * len(inputs), ("",) * len(outputs))
  jaxpr = core.Jaxpr((), list(inputs), list(outputs), list(eqns), debug_info=info)
  return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))
