"""The sampling loop for one example: down a grid of noise levels from noise or an image, or up the grid."""

from __future__ import annotations

import functools
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
from jaxguide.sampling import casts
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

  The loop is one ``lax.scan``. Its memory does not depend on the number of steps, unless ``collect`` returns a history.

  Args:
    denoise: ``(x, sigma, cond) -> x0``, guided or not.
    key: the key of this sample. The initial noise and the noise of each step are drawn from it. A key that is not a
      Threefry key (``rbg``, ``unsafe_rbg``) is converted to one; see `jaxguide.keys.threefry`.
    shape: shape of the example, without a batch axis.
    sigmas: (steps + 1,) noise levels that decrease and end in 0; see `jaxguide.schedules`. The sample has their dtype.
    solver: see `jaxguide.solvers`.
    cond: the condition of this example, the third argument of ``denoise``.
    collect: ``state -> pytree``, called after every step. Its outputs are stacked along a first axis of length
      ``steps``. ``lambda state: state.x0`` collects the denoised examples.
    x_init: ``x`` at ``sigmas[0]``, in place of noise ``sigmas[0] * eps``. (The loops of DDPM start from ``x_t = eps``,
      which is ``sqrt(1 + sigmas[0]²) * eps`` here. At the highest levels of a network the two agree to 1e-4.)
    add_noise: whether the initial noise is added to ``x_init``, which is then a clean example. This is image-to-image
      sampling, SDEdit (Meng et al. 2021, arXiv:2108.01073). A lower ``sigmas[0]`` keeps the sample closer to
      ``x_init``.

  Returns:
    The example, and the stacked outputs of ``collect`` (``None`` without ``collect``).

  Raises:
    ValueError: if the grid does not decrease or does not end in 0, if a label is outside the classes, if ``x_init`` has
      another shape or is not finite, or if ``add_noise`` is set without ``x_init``.
    TypeError: if ``denoise``, ``key``, ``shape``, ``solver`` or ``cond`` is of a wrong kind, or if ``x_init`` has the
      type uint8.

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

  def step(denoise, carry, inputs):
    state, remembered = carry
    i, sigma, sigma_next = inputs
    outputs: list[Any] = []
    recording = guidance_state.recording(guidance_state.placed(denoise, remembered), outputs)
    state = solver.step(Conditioned(recording, cond), state, sigma, sigma_next, jax.random.fold_in(step_key, i))
    next_remembered = guidance_state.next_values(outputs)
    if next_remembered.keys() != remembered.keys():
      raise ValueError(
        "the denoiser contains a guidance that remembers (momentum, every), but jit cannot see it because a plain "
        "function closes over it: wrap the function with jax.tree_util.Partial and pass the guided denoiser as its "
        "argument"
      )
    return (state, next_remembered), None if collect is None else collect(state)

  steps = (jnp.arange(sigmas.shape[0] - 1), sigmas[:-1], sigmas[1:])
  start = solver.init(x), guidance_state.start(denoise, x)
  denoise = casts.ahead(denoise, lambda denoise: step(denoise, start, jax.tree.map(lambda each: each[0], steps)))
  (state, _), history = jax.lax.scan(functools.partial(step, denoise), start, steps)
  return state.x, history


def check_start(x_init, add_noise):
  """Check that ``x_init`` is not uint8, and that it is given if ``add_noise`` is set."""
  checks.flag("add_noise", add_noise)
  if getattr(x_init, "dtype", None) == np.uint8:
    raise TypeError("x_init must be floats, as images in [-1, 1] are, got uint8: give jaxguide.data.from_uint8(images)")
  if add_noise and x_init is None:
    raise ValueError("add_noise adds noise to x_init: give x_init, or leave both out to start from noise alone")


def invert(
  denoise: Denoiser,
  x0: Example,
  sigmas: ArrayLike,
  solver: Solver | None = None,
  cond: PyTree = None,
) -> Example:
  r"""Find the noise from which `sample` gives a clean example: walk up the noise levels along the probability flow.

  ``sample(denoise, key, shape, sigmas, solver, cond, x_init=invert(denoise, x0, sigmas, solver, cond))`` is ``x0``, up
  to the error of the steps. With `jaxguide.Euler` this is DDIM inversion (Song et al. 2021, arXiv:2010.02502, section
  4.3; Dhariwal & Nichol 2021, appendix F). With `jaxguide.Heun` it is a second-order version of it.

  Args:
    denoise: ``(x, sigma, cond) -> x0``, guided or not. With large guidance scales the inversion is inaccurate.
    x0: a clean example.
    sigmas: (steps + 1,) levels that decrease and end in 0, as in `sample`. The walk goes up these levels; it starts
      with ``x0`` at the last level above 0.
    solver: a one-step solver without noise, `jaxguide.Heun` (the default) or `jaxguide.Euler`.
    cond: the condition of this example.

  Returns:
    ``x`` at ``sigmas[0]``, of the shape of ``x0``.

  Raises:
    ValueError: if the solver is another one, if the grid or the condition is bad, if a guidance has momentum or reuses
      its gradient, or if ``x0`` is not finite.

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
    raise ValueError(f"inversion needs a one-step solver without noise, Heun() or Euler(), got {solver!r}")
  check_cond(check_denoiser(denoise), checks.cond(cond))
  if guidance_state.find(denoise):
    raise ValueError("a guidance that remembers (momentum, every) cannot be inverted: leave out its momentum or every")
  sigmas = jnp.asarray(sigmas)
  sigmas = sigmas if jnp.issubdtype(sigmas.dtype, jnp.floating) else sigmas.astype(float)
  levels = sigmas[-2::-1]
  conditioned, unused_key = Conditioned(denoise, cond), keys.seed_key(0)

  def step(state, levels):
    sigma, sigma_next = levels
    return solver.step(conditioned, state, sigma, sigma_next, unused_key), None

  start = solver.init(jnp.asarray(checks.finite("x0", x0)).astype(sigmas.dtype))
  return jax.lax.scan(step, start, (levels[:-1], levels[1:]))[0].x
