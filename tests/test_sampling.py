"""Properties of sampling for all guidances and solvers: traces, constants, batches, devices, memory, gradients."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr
from jax.tree_util import Partial

import jaxguide as jg
from jaxguide import scaling, schedules

SHAPE = (2,)
GRID = jg.karras(4, 0.05, 10.0)
KINDS = ("ddim_half", "ddpm", "heun", "dpmpp_2m", "unipc_2", "edm_churn")  # one solver of each kind


def draw(guided, key, label, sigmas, solver):
  return jg.sample(guided, key, SHAPE, sigmas, solver, label)[0]


@pytest.fixture
def model(random_mixture, no_rank_promotion):
  return random_mixture(0, SHAPE)


@pytest.fixture
def image_network():
  """A small network of one convolution and a label, as a denoiser, with a record of its traces."""
  traces = []

  def apply(params, x, c_noise, cond):
    traces.append(1)
    shift = params["embedding"][cond][:, None, None, :]
    time = jnp.reshape(c_noise / 1000, (-1, 1, 1, 1))
    return jax.lax.conv_general_dilated(
      jnp.tanh(x + shift) + time, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  rng = np.random.default_rng(0)
  params = {
    "embedding": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
    "kernel": jnp.asarray(0.2 * rng.normal(size=(3, 3, 2, 2)), jnp.float32),
  }
  return params, apply, traces


# --- one program ----------------------------------------------------------------------------------


def counted(denoiser, traces):
  """Wrap the denoiser as a user would, with a record of its traces."""

  def run(denoiser, x, sigma, cond):
    traces.append(1)
    return denoiser(x, sigma, cond)

  return Partial(_AlwaysEqual(run), denoiser)


class _AlwaysEqual:
  """A function equal to all others of this class, so that only jaxguide's code can cause a second trace."""

  def __init__(self, run):
    self.run = run

  def __call__(self, *args):
    return self.run(*args)

  def __hash__(self):
    return 0

  def __eq__(self, other):
    return isinstance(other, _AlwaysEqual)


def test_a_sweep_is_one_trace_of_the_users_jit(pair, random_mixture, no_rank_promotion):
  (make_guidance, solver), traces, compiled = pair, [], []

  @jax.jit
  def images(guided, solver, sigmas, key, label):
    compiled.append(1)
    return draw(guided, key, label, sigmas, solver)

  for seed, (scale, label) in enumerate([(1.0, 0), (2.0, 1), (3, 2), (np.float32(0.5), 0)]):
    mixture = random_mixture(seed, SHAPE)  # other weights
    guided = make_guidance(mixture, scale)(counted(mixture.denoiser, traces))
    grid = jg.karras(4, 0.02 + 0.01 * seed, 10.0 + seed)
    # Tracing is the part of a call before compilation.
    traced = images.trace(guided, solver, grid, jax.random.key(seed), jnp.asarray(label))
    if seed == 0:
      first = len(traces)
  assert len(compiled) == 1
  assert len(traces) == first
  # The weights, the scale and the levels are arguments: no constant of the program has more than one element.
  assert all(size <= 1 for size in constants(traced.jaxpr))


def constants(closed):
  """Sizes of all constants of a closed jaxpr and of those inside it."""
  yield from (np.size(const) for const in closed.consts)
  for equation in closed.jaxpr.eqns:
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, ClosedJaxpr)):
      if isinstance(value, ClosedJaxpr):
        yield from constants(value)


def test_a_solver_uses_a_guided_denoiser_as_a_function_only(solver, all_guidances, random_mixture):
  # A solver only calls the guided denoiser. So the other tests need not combine every guidance with every solver.
  class Wrapping:
    init = staticmethod(solver.init)

    def step(self, denoise, *args):
      return solver.step(lambda x, sigma: denoise(x, sigma), *args)  # noqa: PLW0108

  mixture = random_mixture(0, SHAPE)
  for name in ("momentum", "interval"):
    guided = all_guidances[name](mixture, 2.0)(mixture.denoiser)
    programs = [
      jax.make_jaxpr(lambda guided, key, s=s: draw(guided, key, 1, GRID, s))(guided, jax.random.key(0))
      for s in (solver, Wrapping())
    ]
    direct, wrapped = (re.sub("0x[0-9a-f]+", "", str(program)) for program in programs)
    assert direct == wrapped, name


def test_a_sweep_compiles_once_and_samples_ignore_their_batch(pair, random_mixture, no_rank_promotion, caplog, request):
  make_guidance, solver = pair
  # Guidances and solvers know nothing of devices. One guidance that remembers runs on all of them; the others run on
  # one, where the samples of a micro-batch are in one program.
  devices = None if request.node.callspec.id == "momentum-heun" else jax.devices()[:1]
  made = []
  labels, key = np.arange(7) % 3, jax.random.key(0)
  # Counts JAX's log messages: a trace can be in a cache while the compiled program is not.
  with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
    for seed, (scale, label) in enumerate([(2.0, labels), (1.0, labels[::-1].copy()), (3, 2)]):
      mixture = random_mixture(seed, SHAPE)
      guided = make_guidance(mixture, scale)(mixture.denoiser)
      grid = jg.karras(4, 0.05 + 0.01 * seed, 10.0 + seed)
      # 7 samples in micro-batches of 4: the second is short, which must not compile another program.
      options = dict(shape=SHAPE, sigmas=grid, solver=solver, start=seed, batch_size=4, num=7, devices=devices)
      made.append(jg.sample_batch(guided, jax.random.key(seed), label, **options))
      # The program of the first call may be there already.
      assert len(compilations(caplog, "_sample_many" if seed == 0 else "")) <= (seed == 0)
      caplog.clear()
      if not seed:
        # The same program for the samples from index 3: each has another position and other neighbours in its batch.
        shifted = jg.sample_batch(guided, key, np.arange(3, 10) % 3, **options | {"start": 3})
        assert not compilations(caplog)
  first = made[0]
  assert first.shape == (7, 2)
  assert len(np.unique(first.round(5), axis=0)) == 7
  close(shifted[:4], first[3:])


@pytest.mark.parametrize("name", ["momentum", "classifier", "reused", "backward_guidance", "scheduled"])
def test_a_sample_is_the_same_alone(name, all_guidances, model):
  guided, key, labels = all_guidances[name](model, 2.0)(model.denoiser), jax.random.key(0), np.arange(7) % 3
  options = dict(shape=SHAPE, sigmas=GRID, solver=jg.DPMpp2M())
  whole = jg.sample_batch(guided, key, labels, batch_size=4, **options)
  keys = jg.sample_keys(key, 7)
  for i in (1, 3, 5):  # all labels, and both micro-batches
    close(alone(guided, keys[i], jnp.asarray(labels[i]), GRID, options["solver"]), whole[i])
  close(alone(guided, jg.sample_keys(key, 1, start=6)[0], jnp.asarray(labels[6]), GRID, options["solver"]), whole[6])


# XLA can sum in another order for another batch size, and sampling amplifies the rounding error.
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
alone = jax.jit(draw)


def compilations(caplog, name=""):
  """The log's messages about compiled programs, of this name if one is given."""
  messages = [record.getMessage() for record in caplog.records]
  return [message for message in messages if "Finished XLA compilation" in message and name in message]


def test_compilations_are_counted(model, caplog):
  # A check of the test above: another number of steps is another program.
  with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
    jg.sample_batch(model.denoiser, jax.random.key(0), 1, num=1, shape=SHAPE, sigmas=jg.karras(9), solver=jg.Euler())
  assert compilations(caplog, "_sample_many")


def test_another_eta_does_not_compile_again(model):
  compiled = []

  @jax.jit
  def image(solver):
    compiled.append(1)
    return draw(model.denoiser, jax.random.key(0), 1, GRID, solver)

  images = [image(jg.DDIM(eta)) for eta in (0.0, 0.5, 1, np.float32(0.7))]
  assert len(compiled) == 1
  assert not np.array_equal(images[0], images[1])


def test_the_search_for_constants_finds_one(model):
  # A check of the tests with `constants`: a method of the mixture makes it a constant inside a scan.
  jaxpr = jax.make_jaxpr(lambda key: draw(model.denoise, key, 1, GRID, jg.Euler()))(jax.random.key(0))
  assert max(constants(jaxpr)) > 1


def test_weights_of_a_network_are_not_constants(image_network):
  params, apply, _ = image_network

  def image(denoise, key, label):
    return jg.sample(denoise, key, (4, 4, 2), GRID, jg.Heun(), label)[0]

  denoise = jg.classifier_free(3, 2.0)(jg.NetworkDenoiser(params, apply, scaling.eps(schedules.Cosine())))
  jaxpr = jax.make_jaxpr(image)(denoise, jax.random.key(0), jnp.asarray(1))
  weights = {np.size(leaf) for leaf in jax.tree.leaves(params)}
  assert not weights & set(constants(jaxpr))


# --- sample i does not depend on its batch --------------------------------------------------------


def test_a_sample_does_not_depend_on_batches_and_devices(model):
  guided = jg.interval(jg.classifier_free(3, 2.0), 0.2, 5.0)(model.denoiser)
  labels = np.arange(16) % 3
  key, devices = jax.random.key(7), jax.devices()
  assert len(devices) == 4
  options = dict(shape=SHAPE, sigmas=GRID, solver=jg.DDPM())
  whole = jg.sample_batch(guided, key, labels, **options)
  close(jg.sample_batch(guided, key, labels[:5], **options), whole[:5])
  close(jg.sample_batch(guided, key, labels[:1], **options), whole[:1])
  close(jg.sample_batch(guided, key, labels, batch_size=5, **options), whole)
  close(jg.sample_batch(guided, key, labels[10:], start=10, **options), whole[10:])
  close(jg.sample_batch(guided, key, labels, devices=devices[:1], **options), whole)
  close(jg.sample_batch(guided, key, labels, devices=devices[1:3], batch_size=7, **options), whole)
  close(jg.sample_batch(guided, key, labels, devices=devices[3:], batch_size=1, **options), whole)


def test_a_network_gives_the_same_on_any_number_of_devices(image_network):
  params, apply, _ = image_network
  denoise = jg.classifier_free(3, 2.0)(jg.NetworkDenoiser(params, apply, scaling.v(schedules.Cosine())))
  labels = np.arange(6) % 3
  # The same samples by `jax.vmap` of `sample`, without `sample_batch`.
  keys = jg.sample_keys(jax.random.key(0), 6)
  one = lambda key, y: jg.sample(denoise, key, (4, 4, 2), GRID, jg.DDPM(), y)[0]  # noqa: E731
  wanted = jax.jit(jax.vmap(one))(keys, labels)
  for devices in (1, 2, 4):
    options = dict(shape=(4, 4, 2), sigmas=GRID, solver=jg.DDPM(), devices=jax.devices()[:devices])
    close(jg.sample_batch(denoise, jax.random.key(0), labels, **options), wanted)


def test_vmap_equals_a_loop(model):
  guided, solver = jg.interval(jg.classifier_free(3, 2.0), 0.2, 5.0)(model.denoiser), jg.DDPM()
  keys, labels = jg.sample_keys(jax.random.key(3), 4), jnp.array([0, 1, 2, 1])
  one = jax.jit(lambda key, label: draw(guided, key, label, GRID, solver))
  looped = jnp.stack([one(keys[i], labels[i]) for i in range(4)])
  vmapped = jax.vmap(one)(keys, labels)
  np.testing.assert_allclose(vmapped, looped, rtol=1e-5, atol=1e-5)


def test_raw_keys_give_the_same_samples_as_typed_keys(model):
  options = dict(num=3, shape=SHAPE, sigmas=GRID, solver=jg.DDPM())
  typed = jg.sample_batch(model.denoiser, jax.random.key(5), 1, **options)
  np.testing.assert_array_equal(jg.sample_batch(model.denoiser, jax.random.PRNGKey(5), 1, **options), typed)


def test_start_continues_an_earlier_call(model):
  options = dict(shape=SHAPE, sigmas=GRID, solver=jg.DDPM())
  key = jax.random.key(0)
  whole = jg.sample_batch(model.denoiser, key, 1, num=9, **options)
  parts = [jg.sample_batch(model.denoiser, key, 1, num=n, start=s, **options) for s, n in ((0, 4), (4, 5))]
  np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-5, atol=1e-6)


def test_conditions_of_any_structure():
  def by_parts(scale, x, sigma, cond):
    return scale * cond["shift"] + cond["which"].astype(x.dtype) + 0 * x

  denoise = Partial(by_parts, jnp.asarray(2.0))
  cond = {"shift": np.arange(10.0, dtype=np.float32).reshape(5, 2), "which": np.arange(5)}
  made = jg.sample_batch(denoise, jax.random.key(0), cond, shape=(2,), sigmas=GRID, solver=jg.Euler(), batch_size=4)
  np.testing.assert_allclose(made, 2 * cond["shift"] + cond["which"][:, None], rtol=1e-6)


# --- memory, gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "dpmpp_3m_sde", "edm_churn"])
def test_memory_does_not_grow_with_the_steps(name, all_solvers, model):
  # All solvers share the loop. These three have the smallest state, the largest state and two evaluations a step.
  solver = all_solvers[name]
  keys, labels = jg.sample_keys(jax.random.key(0), 64), jnp.zeros(64, int)

  def temporary(steps, collect=None):
    def batch(guided, sigmas):
      return jax.vmap(lambda key, y: jg.sample(guided, key, SHAPE, sigmas, solver, y, collect))(keys, labels)

    guided = jg.classifier_free(3, 2.0)(model.denoiser)
    analysis = jax.jit(batch).lower(guided, jg.karras(steps)).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

  growth = temporary(1000) - temporary(10)
  # Only the grid and its slices grow with the steps. A history of the samples would take 512 bytes a step.
  assert growth < 990 * 20
  if isinstance(solver, jg.Euler):
    assert temporary(1000, lambda state: state.x) - temporary(10, lambda state: state.x) > 990 * 512


@pytest.mark.parametrize(
  ("guidance", "solver_name"),
  [
    pytest.param(*pair, marks=() if pair == ("momentum", "heun") else pytest.mark.slow, id="-".join(pair))
    for pair in [(guidance, solver) for guidance in ("momentum", "classifier", "classifier_free") for solver in KINDS]
  ],
)
def test_gradients_match_finite_differences(guidance, solver_name, all_guidances, all_solvers, random_mixture, float64):
  mixture = random_mixture(0, SHAPE)

  def total(at):
    scale, shift = at
    moved = mixture.replace(means=mixture.means + shift)
    guided = all_guidances[guidance](moved, scale)(moved.denoiser)
    return draw(guided, jax.random.key(2), 1, jg.karras(4, 0.1, 3.0), all_solvers[solver_name]).sum()

  gradient = check_gradient(total, jnp.array([1.7, 0.02]))
  assert (np.abs(gradient) > 1e-5).all()


def test_gradients_of_guidance_match_finite_differences(make_guidance, random_mixture, float64, no_rank_promotion):
  mixture = random_mixture(0, SHAPE)

  def total(at):
    scale, shift, sigma, x = at[0], at[1], at[2], at[3:]
    moved = mixture.replace(means=mixture.means + shift)
    guided = make_guidance(moved, scale)(moved.denoiser)(x, sigma, jnp.asarray(1))
    return getattr(guided, "x0", guided) @ jnp.array([1.0, 0.3])  # A guidance with momentum gives a Prediction.

  gradient = check_gradient(total, jnp.array([1.7, 0.02, 0.8, 0.5, -0.9]))
  assert (np.abs(gradient) > 1e-5).all()


def check_gradient(function, at, number=None, step=1e-5):
  """Compare the gradient in the first ``number`` elements with central differences, and return the gradient."""
  return check_values(jax.jit(jax.value_and_grad(function)), at, number, step)


def check_values(both, at, number=None, step=1e-5):
  """Do the same for a function that returns the value and the gradient."""
  gradient = both(at)[1]
  assert np.isfinite(gradient).all()
  steps = step * np.eye(at.size)[:number]
  wanted = [(both(at + h)[0] - both(at - h)[0]) / (2 * step) for h in steps]
  np.testing.assert_allclose(gradient[:number], wanted, rtol=1e-5, atol=1e-7)
  return gradient


@jax.jit
@jax.value_and_grad
def total_of_a_solver(at, mixture, solver):
  """The sum of a sample. Solvers that differ in their numbers alone share this program."""
  shift, grid = at[0], at[1:]
  moved = mixture.replace(means=mixture.means + shift)
  return draw(moved.denoiser, jax.random.key(2), 1, grid, solver).sum()


def test_gradients_of_solvers_match_finite_differences(solver, random_mixture, float64, no_rank_promotion):
  mixture = random_mixture(0, SHAPE)
  # The last level must be 0, so only its gradient's finiteness is checked.
  both = lambda at: total_of_a_solver(at, mixture, solver)  # noqa: E731
  gradient = check_values(both, np.array([0.02, 3.0, 1.0, 0.3, 0.0]), 4)
  assert (np.abs(gradient[:4]) > 1e-5).all()


def test_the_gradient_in_eta_matches_finite_differences(random_mixture, float64):
  denoiser, grid = random_mixture(0, SHAPE).denoiser, jg.karras(4, 0.1, 3.0)
  check_gradient(lambda eta: draw(denoiser, jax.random.key(2), 1, grid, jg.DDIM(eta[0])).sum(), jnp.array([0.5]))


# --- other options of `sample` --------------------------------------------------------------------


@jax.jit
def collected(denoise, solver):
  """A sample and what is collected. Solvers that differ in their numbers alone share this program."""
  collect = lambda s: {"x": s.x, "x0": s.x0, "sum": s.x.sum()}  # noqa: E731
  return jg.sample(denoise, jax.random.key(0), SHAPE, GRID, solver, 1, collect)


def test_collect_stacks_its_outputs(solver, model):
  x, history = collected(model.denoiser, solver)
  assert {name: value.shape for name, value in history.items()} == {"x": (4, 2), "x0": (4, 2), "sum": (4,)}
  np.testing.assert_array_equal(history["x"][-1], x)
  np.testing.assert_allclose(history["x0"][-1], x, rtol=1e-5)
  if isinstance(solver, jg.DDPM):
    without = jax.jit(lambda denoise, solver: jg.sample(denoise, jax.random.key(0), SHAPE, GRID, solver, 1))
    x_again, nothing = without(model.denoiser, solver)
    assert nothing is None
    np.testing.assert_array_equal(x_again, x)


def test_x_init_replaces_the_starting_noise(model):
  key, x_init = jax.random.key(0), jnp.array([7.0, -5.0])
  x0 = model.denoise(x_init, jnp.asarray(10.0), 1)
  grid = jnp.array([10.0, 0.0])
  np.testing.assert_allclose(
    jg.sample(model.denoiser, key, SHAPE, grid, jg.Euler(), 1, x_init=x_init)[0], x0, rtol=1e-5
  )
  with pytest.raises(ValueError, match="x_init must have the shape"):
    jg.sample(model.denoiser, key, SHAPE, grid, jg.Euler(), 1, x_init=jnp.zeros(3))


def test_add_noise_adds_each_samples_noise_to_the_start():
  key, image = jax.random.key(3), np.array([7.0, -5.0], np.float32)
  keep = Partial(lambda x, sigma, cond: x)  # With this denoiser the sample is its start.
  grid = np.array([4.0, 1.0, 0.0])
  options = dict(shape=SHAPE, sigmas=grid, solver=jg.Euler(), num=3)
  noise = jg.sample_batch(keep, key, **options)
  close(jg.sample_batch(keep, key, **options, x_init=image, add_noise=True), image + noise)
  close(jg.sample_batch(keep, key, **options, x_init=image), [image] * 3)
  # x_init as an array, and as a function of the positions, in micro-batches.
  images = np.arange(6, dtype=np.float32).reshape(3, 2)
  for x_init in (images, lambda rows: images[rows]):
    close(jg.sample_batch(keep, key, **options, x_init=x_init, add_noise=True, batch_size=2), images + noise)
  one = jg.sample(keep, jg.sample_keys(key, 3)[2], SHAPE, grid, jg.Euler(), x_init=image, add_noise=True)[0]
  close(one, image + noise[2])
  with pytest.raises(ValueError, match="add_noise adds noise to x_init"):
    jg.sample_batch(keep, key, **options, add_noise=True)
  with pytest.raises(ValueError, match=r"x_init must give \(4, 2\) for 4 samples, got \(2,\)"):
    jg.sample_batch(keep, key, **options, x_init=lambda rows: image)


def test_the_start_has_the_first_levels_noise():
  keys = jg.sample_keys(jax.random.key(0), 4000)
  identity = lambda x, sigma, cond: x  # noqa: E731
  start = lambda key: jg.sample(identity, key, (1,), jnp.array([5.0, 0.0]), jg.Euler())[0]  # noqa: E731
  starts = jax.jit(jax.vmap(start))(keys)
  np.testing.assert_allclose([starts.mean(), starts.std()], [0, 5], atol=0.3)


def test_the_noises_of_steps_and_start_are_independent():
  zero = lambda x, sigma, cond: jnp.zeros_like(x)  # noqa: E731
  grid = jnp.array([4.0, 2.0, 1.0, 0.5, 0.0])

  def noises(key):
    _, xs = jg.sample(zero, key, (1,), grid, jg.DDPM(), collect=lambda s: s.x)
    return xs[:3, 0]

  xs = np.asarray(jax.jit(jax.vmap(noises))(jg.sample_keys(jax.random.key(0), 4000)))
  # With x0 = 0 a step is x' = (σ'/σ)² x + noise, and the noise is independent of x.
  fresh = np.stack([xs[:, 0], xs[:, 1] - xs[:, 0] / 4, xs[:, 2] - xs[:, 1] / 4], axis=1)
  correlation = np.corrcoef(fresh.T)
  assert np.abs(correlation - np.eye(3)).max() < 0.07


def test_progress_receives_the_size_of_each_micro_batch(model):
  made = []
  jg.sample_batch(
    model.denoiser, jax.random.key(0), 1, num=10, shape=SHAPE, sigmas=GRID, solver=jg.Euler(), batch_size=4,
    progress=made.append,
  )  # fmt: skip
  assert made == [4, 4, 2]


def test_samples_have_the_type_of_the_levels(solver, model):
  dtype = jnp.bfloat16
  half = jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, model)
  grid = jg.karras(4, 0.05, 10.0).astype(dtype)
  x = alone(jg.classifier_free(3, 2.0)(half.denoiser), jax.random.key(0), 1, grid, solver)
  assert x.dtype == dtype
  assert np.isfinite(np.asarray(x, np.float32)).all()


def test_sample_keys_are_folded_in():
  key = jax.random.key(9)
  wanted = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(3, 6)]
  np.testing.assert_array_equal(jax.random.key_data(jg.sample_keys(key, 3, start=3)), jnp.stack(wanted))


# --- bad input ------------------------------------------------------------------------------------

RING = jg.ring(4)


def batch(**changes):
  args = {"cond": 1, "num": 2, "shape": SHAPE, "sigmas": GRID, "solver": jg.Euler(), **changes}
  denoise = args.pop("denoise", RING.denoiser)
  return jg.sample_batch(denoise, jax.random.key(0), **args)


@pytest.mark.parametrize(
  ("grid", "message"),
  [
    ([1.0, 2.0, 0.0], r"decrease strictly, but sigmas\[0\]"),
    ([2.0, 1.0, 1.0, 0.0], r"sigmas\[1\] = 1.0 is followed by sigmas\[2\]"),
    ([2.0, 1.0], "must end in 0, but the last is 1.0"),
    ([2.0, 1.0, -1.0], "must end in 0"),
    ([0.0], "at least two levels"),
    ([], "at least two levels"),
    ([[1.0, 0.0]], "one axis"),
    (3.0, "one axis"),
    ([2.0, np.nan, 0.0], r"sigmas\[1\] is not"),
    ([np.inf, 1.0, 0.0], r"sigmas\[0\] is not"),
  ],
)
def test_a_bad_grid_is_refused(grid, message):
  with pytest.raises(ValueError, match=message):
    batch(sigmas=np.asarray(grid))
  with pytest.raises(ValueError, match=message):
    jg.sample(RING.denoiser, jax.random.key(0), SHAPE, jnp.asarray(grid), jg.Euler(), 1)


def test_a_grid_may_be_whole_numbers():
  x, _ = jg.sample(RING.denoiser, jax.random.key(0), SHAPE, np.array([3, 1, 0]), jg.Euler(), 1)
  wanted, _ = jg.sample(RING.denoiser, jax.random.key(0), SHAPE, np.array([3.0, 1.0, 0.0]), jg.Euler(), 1)
  np.testing.assert_allclose(x, wanted, rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num": 0}, "num must be a whole number of at least 1"),
    ({"num": -3}, "num must be"),
    ({"num": None}, "one row for each sample"),
    ({"num": None, "cond": None, "denoise": Partial(lambda x, sigma, cond: x)}, "the number of samples is not known"),
    ({"cond": None}, "cond must be a label of the mixture's 4 classes, or 4 for all of them; got None"),
    ({"num": None, "cond": np.zeros(0, int)}, "number of samples must be"),
    ({"num": 3, "cond": np.array([0, 1])}, "one row for each sample"),
    ({"num": None, "cond": {"a": np.zeros(2, int), "b": np.zeros(3, int)}}, "one row for each sample"),
    ({"batch_size": 0}, "batch_size must be"),
    ({"devices": []}, "at least one device"),
    ({"cond": 5}, "label 5 is not one of the 4 classes"),
    ({"cond": np.array([0, -1])}, "label -1 is not one of the 4 classes"),
    ({"start": -1}, "start"),
  ],
)
def test_bad_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    batch(**changes)


def test_labels_are_whole_numbers():
  with pytest.raises(TypeError, match="label must be whole numbers"):
    batch(cond=np.array([0.0, 1.0]))


def test_functions_that_are_not_pytrees_are_refused():
  array = jnp.ones(2)

  def closure(x, sigma, cond):
    return array * x

  for denoise in (closure, jg.classifier_free(4, 2.0)(closure), jg.classifier(closure, 1.0)(RING.denoiser)):
    with pytest.raises(TypeError, match=r"pytree of arrays.*Partial"):
      batch(denoise=denoise)


def test_a_users_own_function_works_as_a_partial():
  denoise = Partial(lambda mean, x, sigma, cond: mean + 0 * x, jnp.array([2.0, 3.0]))
  np.testing.assert_allclose(batch(denoise=denoise), [[2.0, 3.0]] * 2)


def test_samples_that_are_not_finite_are_named():
  def bad(at, x, sigma, cond):
    return jnp.where((cond == 2) & (sigma < at), jnp.nan, x)

  denoise = Partial(bad, jnp.asarray(2.0))
  labels = np.array([0, 0, 0, 2, 0, 2])
  grid = jnp.array([8.0, 4.0, 1.5, 0.5, 0.0])
  with pytest.raises(FloatingPointError, match=r"sample 3 first at step 2 of 4, sigma 1\.5"):
    batch(denoise=denoise, cond=labels, num=None, sigmas=grid)
  # The same with one sample in each micro-batch, and with another start.
  with pytest.raises(FloatingPointError, match="sample 103 first at step 2"):
    batch(denoise=denoise, cond=labels, num=None, sigmas=grid, start=100, batch_size=1, devices=jax.devices()[:1])


def test_parameters_that_are_not_finite_are_found(image_network):
  params, apply, _ = image_network
  broken = {**params, "kernel": params["kernel"].at[0, 0, 0, 0].set(jnp.nan)}
  with pytest.raises(FloatingPointError, match=r"2 of 2 samples are not finite; sample 0 first at step 0"):
    batch(denoise=jg.NetworkDenoiser(broken, apply, scaling.eps(schedules.Cosine())), shape=(4, 4, 2))
