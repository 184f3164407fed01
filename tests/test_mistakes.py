"""Errors for common mistakes: the message states what is wrong and what to do."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import evaluation, scaling, schedules, smc
from jaxguide._core import specs
from jaxguide.generate.walks import GridSpec, SolverSpec

RING = jg.ring(4)
GRID = jg.karras(3, 0.05, 10.0)


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch):
  """Disable the type checks that the tests add, since users do not have them."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def draw(**changes):
  args = {"denoise": RING.denoiser, "key": jax.random.key(0), "cond": 1, "num": 3, "shape": (2,), "sigmas": GRID}
  args |= {"solver": jg.Euler()} | changes
  return jg.sample_batch(args.pop("denoise"), args.pop("key"), **args)


MISTAKES = [
  ({"denoise": jg.classifier_free(4, 2.0)}, TypeError, "got a guidance: apply it to one first"),
  ({"denoise": jg.chain(jg.clip_x0())}, TypeError, "got a guidance: apply it to one first"),
  ({"denoise": jg.NetworkDenoiser}, TypeError, "denoise must be a denoiser"),
  ({"denoise": None}, TypeError, "denoise must be a denoiser"),
  ({"denoise": 3.0}, TypeError, "denoise must be a denoiser"),
  ({"solver": "ddim"}, TypeError, r"the name 'ddim': make it with jaxguide\.solvers\.solver\('ddim'\)"),
  ({"solver": jg.DDIM}, TypeError, r"the class DDIM: make an instance, DDIM\(\)"),
  ({"solver": None}, TypeError, "solver must be a solver, got None"),
  ({"shape": 8}, TypeError, "shape must be the sides of one example"),
  ({"shape": "8x8"}, TypeError, "shape must be the sides"),
  ({"shape": (8.0, 8)}, ValueError, "each side of shape"),
  ({"shape": (-2,)}, ValueError, "each side of shape"),
  ({"cond": "cat"}, TypeError, "cond must hold numbers or arrays, got 'cat'"),
  (
    {"cond": {"key": jax.random.split(jax.random.key(0), 3)}},
    TypeError,
    r"random keys: give jax.random.key_data\(keys\)",
  ),
  ({"cond": np.array(["cat", "dog", "cat"])}, TypeError, "cond must hold numbers"),
  ({"cond": ["cat", "dog", "cat"]}, TypeError, "cond must hold numbers"),
  ({"cond": np.array([None] * 3)}, TypeError, "cond must hold numbers"),
  ({"x_init": np.full((3, 2), np.nan)}, ValueError, "x_init must be finite"),
  ({"x_init": np.zeros((2, 2))}, ValueError, "x_init must have the shape"),
  ({"devices": [jax.devices()[0]] * 2}, ValueError, "devices must have each device only once"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_in_drawing(changes, kind, message):
  with pytest.raises(kind, match=message):
    draw(**changes)


@pytest.mark.parametrize(
  ("changes", "kind", "message"), [row for row in MISTAKES if {"denoise", "solver", "shape"} & set(row[0])]
)
def test_mistakes_inside_a_users_jit(changes, kind, message):
  args = {"denoise": RING.denoiser, "solver": jg.Euler(), "shape": (2,)} | changes
  with pytest.raises(kind, match=message):
    jax.jit(lambda key: jg.sample(args["denoise"], key, args["shape"], GRID, args["solver"], 1))(jax.random.key(0))


@pytest.mark.parametrize("cond", [[0, 1, 3], [np.int64(0), 1, 3], {"label": [0, 1, 3]}])
def test_a_list_of_labels_is_an_array(cond):
  denoise = RING.denoiser if isinstance(cond, list) else jg.given("label", RING.denoiser)
  wanted = draw(cond=np.array([0, 1, 3]), num=None)
  np.testing.assert_array_equal(draw(denoise=denoise, cond=cond, num=None), wanted)
  np.testing.assert_array_equal(draw(denoise=denoise, cond=cond, num=3), wanted)


def test_x_init_may_be_a_list_and_starts_each_sample():
  starts = [[7.0, -5.0], [1.0, 2.0], [0.0, 3.0]]
  made = draw(x_init=starts, batch_size=2)
  for start, x in zip(starts, made, strict=True):
    alone, _ = jg.sample(RING.denoiser, jax.random.key(9), (2,), GRID, jg.Euler(), 1, x_init=jnp.array(start))
    np.testing.assert_allclose(x, alone, atol=1e-5)
  np.testing.assert_allclose(draw(x_init=starts[0]), np.stack([made[0]] * 3), atol=1e-5)


def test_sample_batch_inside_jit_is_an_error():
  with pytest.raises(TypeError, match=r"cannot run inside jit.*jax\.vmap of jaxguide\.sample"):
    jax.jit(lambda scale: draw(denoise=jg.classifier_free(4, scale)(RING.denoiser)))(2.0)
  with pytest.raises(TypeError, match="cannot run inside jit"):
    jax.jit(draw)()


def test_a_guidance_in_place_of_a_denoiser_is_an_error():
  for wrong in (lambda: jg.classifier_free(4, 2.0)(jg.clip_x0()), lambda: jg.chain(jg.clip_x0())(jg.clip_x0())):
    with pytest.raises(TypeError, match="got a guidance"):
      wrong()
  network = jg.NetworkDenoiser(jnp.ones(1), lambda params, x, t, y: x, scaling.eps(schedules.Cosine()))
  with pytest.raises(TypeError, match="guidance must be a function from a denoiser to a guided one, got a denoiser"):
    jg.chain(network)
  with pytest.raises(TypeError, match="made by tempered"):
    smc.sample_product(jg.classifier_free(4, 2.0), jax.random.key(0), 4, (2,), GRID, jg.DDPM(), 1)


@pytest.mark.parametrize("schedule", ["linear", schedules.Cosine, None, 3.0])
@pytest.mark.parametrize("make", [scaling.eps, scaling.x0, scaling.v])
def test_a_name_in_place_of_a_schedule_is_an_error(make, schedule):
  with pytest.raises(TypeError, match=r"schedule must be a noise schedule.*schedules\.schedule"):
    make(schedule)
  with pytest.raises(TypeError, match="table must be a schedule of discrete steps"):
    scaling.iddpm(schedule)


def test_flow_needs_a_time_scale():
  for make in (scaling.flow, lambda: scaling.scaling("flow", schedules.Cosine())):
    with pytest.raises(TypeError, match=r"time_scale: 1\.0 .* 1000\.0"):
      make()
  assert float(scaling.scaling("flow", schedules.Cosine(), 1.0)(1.0).c_noise) == 0.5


@pytest.mark.parametrize("logits", [(1, 3, 3), (1,), (1, 2, 2, 3)])
def test_logits_of_the_wrong_shape_are_an_error(logits):
  log_prob = jg.ClassifierLogProb(jnp.ones(1), lambda params, x, t: jnp.zeros(logits), scaling.edm())
  with pytest.raises(ValueError, match=r"logits of shape \(n, classes\)"):
    log_prob(jnp.zeros(2), jnp.float32(1.0), 1)


@pytest.mark.parametrize("label", [np.array([1, 0]), 1.0])
def test_a_classifier_needs_one_label(label):
  log_prob = jg.ClassifierLogProb(jnp.ones(1), lambda params, x, t: jnp.zeros((1, 3)), scaling.edm())
  with pytest.raises(ValueError, match="one whole number as the label"):
    log_prob(jnp.zeros(2), jnp.float32(1.0), label)


def test_functions_inside_params_are_an_error():
  params = {"weight": jnp.ones(2), "activation": jax.nn.relu}
  denoise = jg.NetworkDenoiser(params, lambda params, x, t, y: params["weight"] * x, scaling.edm())
  with pytest.raises(TypeError, match=r"pytree of arrays.*equinox\.partition"):
    draw(denoise=denoise)


@pytest.mark.parametrize("scale", [1j, 2 + 0j, np.complex64(1), np.array([1j]), jnp.array(1j)], ids=repr)
def test_a_complex_scale_is_refused(scale):
  for make in (
    lambda: jg.classifier_free(4, scale),
    lambda: jg.classifier(RING.log_prob, scale),
    lambda: smc.tempered(RING.denoiser, 4, scale),
    lambda: jg.karras(3, scale),
  ):
    with pytest.raises(TypeError, match="must be a real number"):
      make()


OUT_OF_REACH = {
  "karras": lambda: jg.karras(10**12),
  "log-snr": lambda: jg.log_snr_uniform(10**12),
  "flow grid": lambda: schedules.flow(10**12),
  "from_schedule": lambda: jg.from_schedule(schedules.Cosine(), 10**12),
  "linear table": lambda: schedules.table("linear", 10**9),
  "cosine table": lambda: schedules.table("cosine", 10**9),
}


@pytest.mark.parametrize("make", OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_too_many_steps_are_an_error(make):
  with pytest.raises(ValueError, match="steps must be a whole number from 1 to 1000000"):
    make()


REFUSED = {
  "rho": (lambda: GridSpec.parse("karras:rho=1e9").levels(10, schedules.Cosine()), "rho must be at most 1000"),
  "churn": (lambda: SolverSpec.parse("edm-stochastic:churn=1e30"), "s_churn must be at most 10000"),
  "s_min": (lambda: SolverSpec.parse("edm-stochastic:s_min=5,s_max=1"), "s_min must be at most s_max"),
  "no option": (lambda: specs.parse("cfg:"), "must be written NAME:option=value"),
  "empty option": (lambda: specs.parse("cfg:scale=2,"), "must be written NAME:option=value"),
  "ratio": (lambda: jg.normalized(jg.clip_x0(), -1.0), "ratio must be at least 0"),
  "shift": (lambda: schedules.flow(4, shift=0.0), "shift must be above 0"),
  "shift of the schedule": (lambda: schedules.schedule("flow", shift=-1.0), "shift must be above 0"),
  "sigma_max": (lambda: schedules.flow(4, shift=3.0, sigma_max=5.0), "sigma_max must be above the second level"),
  "features": (lambda: evaluation.frechet_distance(np.zeros((3, 0)), np.zeros((3, 0))), "at least 1 number"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_values_without_a_meaning_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_metrics_accept_lists():
  images, labels = np.array([0, 255, 51, 51], np.uint8).reshape(4, 1, 1, 1), [0, 0, 1, 1]
  assert evaluation.diversity(images, labels) == 0.5
  a = [[-1.0], [1.0]]
  np.testing.assert_allclose(evaluation.frechet_distance(a, a), 0, atol=1e-12)


# --- inversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(jg.Heun(), 200), (jg.Euler(), 4000)], ids=["heun", "euler"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_inversion_is_undone_by_sampling(steps, scale):
  solver, number = steps
  guided, grid = jg.classifier_free(4, scale)(RING.denoiser), jg.karras(number, 0.02, 20.0)
  x0 = jnp.array([[0.9, 0.2], [1.2, -0.1], [0.7, 0.3]])

  def there_and_back(x0):
    x = jg.sampling.invert(guided, x0, grid, solver, 0)
    return x, jg.sample(guided, jax.random.key(0), (2,), grid, solver, 0, x_init=x)[0]

  there, back = jax.jit(jax.vmap(there_and_back))(x0)
  chex.assert_tree_all_finite((there, back))
  assert np.abs(np.asarray(there)).max() > 1
  # The last step of `sample` gives the denoiser's output at the last level above 0, which is not exactly x0.
  expected = jax.vmap(lambda x: guided(x, grid[-2], 0))(x0)
  np.testing.assert_allclose(back, expected, atol=1e-3)


def test_inversion_of_a_gaussian_is_its_exact_flow():
  # dx/dσ = σ (x - m) / (v + σ²), so x - m is proportional to sqrt(v + σ²).
  mean, variance = np.array([1.0, -2.0]), 0.25
  one = jg.gaussian_mixture(mean[None], np.full((1, 2), variance), [0])
  grid = jg.karras(200, 0.01, 30.0)
  x0 = np.array([1.4, -2.5])
  wanted = mean + (x0 - mean) * np.sqrt((variance + 30.0**2) / (variance + 0.01**2))
  np.testing.assert_allclose(
    jg.sampling.invert(one.denoiser, jnp.asarray(x0, jnp.float32), grid, cond=0), wanted, rtol=2e-4
  )


@pytest.mark.parametrize("solver", [jg.DDIM(), jg.DDPM(), jg.DPMpp2M(), "euler"], ids=str)
def test_inversion_needs_a_one_step_solver_without_noise(solver):
  with pytest.raises((ValueError, TypeError), match="solver"):
    jg.sampling.invert(RING.denoiser, jnp.zeros(2), GRID, solver, 0)


# --- flows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_schedule_is_its_path(shift):
  t = np.linspace(0, 0.99, 12)
  shifted = shift * t / (1 + (shift - 1) * t)  # arXiv:2403.03206, eq. 23
  schedule = schedules.schedule("flow", shift=shift)
  np.testing.assert_allclose(schedule.sigma(t), shifted / (1 - shifted), rtol=1e-5)
  np.testing.assert_allclose(schedule.time(schedule.sigma(t)), t, atol=1e-6)
  np.testing.assert_allclose(schedules.flow(5, shift)[1:-1], schedule.sigma(np.array([0.8, 0.6, 0.4, 0.2])), rtol=1e-5)
  assert float(schedule.sigma(1.0)) == 1e4


def test_a_sweep_over_shifts_compiles_once():
  @jax.jit
  @chex.assert_max_traces(1)
  def walk(grid, key):
    return jg.sample(RING.denoiser, key, (2,), grid, jg.Euler(), 1)[0]

  ends = [walk(schedules.flow(20, shift), jax.random.key(0)) for shift in (1.0, 2.0, 3.0)]
  for end in ends:
    assert np.linalg.norm(end - np.array([0.0, 1.0])) < 1
