"""The sampling loop: one example, from noise or from an image down a grid of noise levels, or up it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, keys
from jaxguide._core.typing import ArrayLike, Denoiser, Example, Key, PyTree, Solver
from jaxguide.denoisers.conditions import check_cond
from jaxguide.guidance import state as guidance_state
from jaxguide.guidance.rule import check_denoiser
from jaxguide.solvers import Euler, Heun
from jaxguide.solvers.base import Conditioned


def sample(
  denoise: Denoiser,
  key: Key,
  shape: Sequence[int],
  sigmas: ArrayLike,
  solver: Solver,
  cond: PyTree = None,
  collect: Callable[[Any], PyTree] | None = None,
  x_init: Example | np.ndarray | None = None,
  add_noise: bool = False,
) -> tuple[Example, PyTree]:
  """Draw one example by walking down a grid of noise levels.

  One ``lax.scan``; its memory does not depend on the number of steps unless ``collect`` asks for a history.

  Args:
    denoise: ``(x, sigma, cond) -> x0``, guided or not.
    key: the sample's own key, from which the start and each step's noise are made. A key of another kind than Threefry
      (``rbg``, ``unsafe_rbg``) is made one of Threefry; see `jaxguide.keys.threefry`.
    shape: shape of the example, without a batch axis.
    sigmas: (steps + 1,) noise levels that decrease and end in 0; see `jaxguide.schedules`. Their type is the sample's.
    solver: see `jaxguide.solvers`.
    cond: one example's condition, handed to ``denoise``.
    collect: ``state -> pytree``, called after every step; what it gives is stacked along a first axis of ``steps``.
      ``lambda state: state.x0`` shows what the denoiser saw.
    x_init: start from this at ``sigmas[0]`` instead of from noise, ``sigmas[0] * eps``. (The loops of DDPM start from
      ``x_t = eps``, which is ``sqrt(1 + sigmas[0]²) * eps`` here: at a network's noisiest levels, the same to 1e-4.)
    add_noise: whether ``x_init`` is clean, and the sample's own noise is added to it: image to image, as SDEdit has it
      (Meng et al. 2021, arXiv:2108.01073). The lower ``sigmas[0]``, the nearer the sample stays to ``x_init``.

  Returns:
    The example, and what ``collect`` gave (``None`` without it).

  Raises:
    ValueError: for a grid that does not decrease or end in 0, a label outside the classes, an ``x_init`` that has
      another shape or is not finite, or ``add_noise`` without one.
    TypeError: if ``denoise``, ``key``, ``shape``, ``solver`` or ``cond`` is something else, or ``x_init`` holds uint8.

  >>> from jaxguide import mixtures, schedules, solvers
  >>> ring = mixtures.ring(4)
  >>> x, xs = sample(
  ...   ring.denoiser, jax.random.key(0), (2,), schedules.karras(8), solvers.Heun(), cond=1, collect=lambda s: s.x
  ... )
  >>> x.shape, xs.shape, bool(jnp.linalg.norm(x - jnp.array([0.0, 1.0])) < 0.5)
  ((2,), (8, 2), True)
  """
  checks.sigmas(sigmas)
  check_denoiser(denoise)
  check_cond((denoise, checks.solver(solver)), checks.cond(cond))
  shape, key = checks.shape("shape", shape), keys.threefry(key)
  sigmas = jnp.asarray(sigmas)
  if not jnp.issubdtype(sigmas.dtype, jnp.floating):
    sigmas = sigmas.astype(float)
  start_key, step_key = jax.random.split(key)
  if x_init is not None and jnp.shape(x_init) != shape:
    raise ValueError(f"x_init must have the shape {shape} of the example, got {jnp.shape(x_init)}")
  check_start(x_init, add_noise)
  x = None if x_init is None else jnp.asarray(checks.finite("x_init", x_init)).astype(sigmas.dtype)
  if x is None or add_noise:
    noise = sigmas[0] * jax.random.normal(start_key, shape, sigmas.dtype)
    x = noise if x is None else x + noise

  def step(carry, inputs):
    state, remembered = carry
    i, sigma, sigma_next = inputs
    said: list[Any] = []
    conditioned = Conditioned(guidance_state.noticed(guidance_state.recall(denoise, remembered), said), cond)
    state = solver.step(conditioned, state, sigma, sigma_next, jax.random.fold_in(step_key, i))
    kept = guidance_state.after(said)
    if (kept is None) != (remembered is None):
      raise ValueError("a guidance with momentum is hidden in a function that is no pytree: make it one with Partial")
    return (state, kept), None if collect is None else collect(state)

  steps = (jnp.arange(sigmas.shape[0] - 1), sigmas[:-1], sigmas[1:])
  first = guidance_state.find(denoise)
  start = solver.init(x), None if first is None else first.or_zeros(x)
  (state, _), history = jax.lax.scan(step, start, steps)
  return state.x, history


def check_start(x_init, add_noise):
  """Check that ``x_init`` holds floats, and that there is one if noise is added to it."""
  checks.flag("add_noise", add_noise)
  if getattr(x_init, "dtype", None) == np.uint8:
    raise TypeError("x_init must be floats, as images in [-1, 1] are, got uint8: give jaxguide.data.from_uint8(images)")
  if add_noise and x_init is None:
    raise ValueError("add_noise adds noise to x_init: give one, or leave both out to start from noise alone")


def invert(
  denoise: Denoiser,
  x0: Example,
  sigmas: ArrayLike,
  solver: Solver | None = None,
  cond: PyTree = None,
) -> Example:
  r"""Walk up the noise from a clean example, along the probability flow: what `sample` would start from to end there.

  ``sample(denoise, key, shape, sigmas, solver, cond, x_init=invert(denoise, x0, sigmas, solver, cond))`` gives ``x0``
  back, to the error of the steps. It is DDIM inversion (Song et al. 2021, arXiv:2010.02502, section 4.3; Dhariwal &
  Nichol 2021, appendix F) for `jaxguide.Euler`, and the same of second order for `jaxguide.Heun`.

  Args:
    denoise: ``(x, sigma, cond) -> x0``, guided or not. Large scales of guidance are hard to invert.
    x0: a clean example.
    sigmas: (steps + 1,) levels that decrease and end in 0, as `sample` takes them; they are walked upwards, from the
      last above 0, where ``x0`` is taken to be.
    solver: a solver without noise that looks at one step alone: `jaxguide.Heun` if left out, or `jaxguide.Euler`.
    cond: one example's condition.

  Returns:
    ``x`` at ``sigmas[0]``, of the shape of ``x0``.

  Raises:
    ValueError: for a solver that adds noise or remembers steps, a bad grid or condition, or an ``x0`` that is not
      finite.

  >>> from jaxguide import mixtures, schedules, solvers
  >>> ring, grid, x0 = mixtures.ring(4), schedules.karras(40), jnp.array([0.9, 0.1])
  >>> x = invert(ring.denoiser, x0, grid, cond=0)
  >>> again = sample(ring.denoiser, jax.random.key(0), (2,), grid, solvers.Heun(), 0, x_init=x)[0]
  >>> bool(jnp.abs(again - x0).max() < 1e-2)
  True
  """
  checks.sigmas(sigmas)
  solver = Heun() if solver is None else checks.solver(solver)
  if not isinstance(solver, Heun | Euler):
    raise ValueError(f"inversion needs a solver without noise or memory, Heun() or Euler(), got {solver!r}")
  check_cond(check_denoiser(denoise), checks.cond(cond))
  if guidance_state.find(denoise) is not None:
    raise ValueError("a guidance that remembers earlier steps cannot be walked upwards: leave out its momentum")
  sigmas = jnp.asarray(sigmas)
  sigmas = sigmas if jnp.issubdtype(sigmas.dtype, jnp.floating) else sigmas.astype(float)
  levels = sigmas[-2::-1]
  conditioned, unused = Conditioned(denoise, cond), keys.seed_key(0)

  def step(state, levels):
    sigma, sigma_next = levels
    return solver.step(conditioned, state, sigma, sigma_next, unused), None

  start = solver.init(jnp.asarray(checks.finite("x0", x0)).astype(sigmas.dtype))
  return jax.lax.scan(step, start, (levels[:-1], levels[1:]))[0].x
