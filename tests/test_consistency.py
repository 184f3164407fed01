"""Consistency models: OpenAI's network, denoiser and sampler, against arrays of their code."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxguide as jg
from jaxguide import generate, models, scaling, schedules, solvers
from jaxguide.generate.plan import plan
from jaxguide.models import ModelConfig, importers
from jaxguide.models.importers.presets import CONSISTENCY_PRESETS
from jaxguide.solvers import consistency as module
from jaxguide.training import TrainingConfig
from jaxguide.training.objectives import objective

FILE = Path(__file__).parent / "data" / "networks" / "consistency_s1"
OUT_MAX, DEVIATION = 1.4156, 2e-6

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def nhwc(array):
  return jax.device_put(np.asarray(np.moveaxis(array, -3, -1), np.float32))


@pytest.fixture(scope="module")
def arrays():
  with np.load(f"{FILE}.npz") as file:
    return dict(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("consistency") / "model"
  importers.import_model(f"{FILE}.safetensors", out, prediction="consistency", num_head_channels=16, image_size=8)
  return out


@pytest.fixture(scope="module")
def model(folder):
  return models.load(folder)


def test_the_network_and_both_denoisers_are_the_published_ones(model, arrays, folder, tmp_path):
  x, cotangent = nhwc(arrays["x"]), nhwc(arrays["cotangent"])
  t, y, labels = jax.device_put([arrays[name] for name in ("t", "y", "denoise/y")])
  noisy, sigma = nhwc(arrays["denoise/x"]), jax.device_put(arrays["denoise/sigma"].astype(np.float32))
  edm = jg.NetworkDenoiser(model.params, model.config.module.apply, scaling.edm(0.5, 1000.0))

  @quick_jit
  def outputs(x, t, y, noisy, sigma, labels):
    def weighted(x):
      out = model.config.module.apply(model.params, x, t, y)
      return (out * cotangent).sum(), out

    gradient, out = jax.grad(weighted, has_aux=True)(x)
    return out, gradient, *(jax.vmap(denoise)(noisy, sigma, labels) for denoise in (model.denoiser, edm))

  wanted = ("out", "grad_x", "denoise/consistency", "denoise/edm")
  values = jax.device_get(outputs(x, t, y, noisy, sigma, labels))
  for value, name in zip(values, wanted, strict=True):
    atol = max(5 * DEVIATION, 2e-5 * abs(arrays[name]).max())
    np.testing.assert_allclose(value, nhwc(arrays[name]), rtol=0, atol=atol, err_msg=name)
  # At the smallest level a consistency model gives its input.
  assert float(arrays["denoise/sigma"][0]) == 0.002
  np.testing.assert_allclose(values[2][0], noisy[0], atol=1e-6)

  importers.export_model(folder, tmp_path / "out.safetensors")
  theirs, ours = load_file(f"{FILE}.safetensors"), load_file(tmp_path / "out.safetensors")
  assert {name: array.tobytes() for name, array in theirs.items()} == {n: a.tobytes() for n, a in ours.items()}


@pytest.mark.parametrize("guided", [False, True])
def test_multistep_sampling_is_the_published_one(model, arrays, guided, monkeypatch):
  noises = iter(nhwc(arrays["multi/noises"]))
  denoise = model.denoiser
  if guided:  # A guidance of scale 1 changes nothing.
    denoise = jg.autoguidance(lambda x, sigma, cond: 0 * x, 1.0)(denoise)
  sigmas = schedules.consistency(2, ts="-".join(map(str, arrays["multi/ts"])))
  solver, clipped = solvers.Consistency(), jg.clip_x0(1.0)(denoise)
  labels, x = jax.device_put(arrays["multi/y"]), nhwc(arrays["multi/x"])

  @quick_jit
  def step(x, sigma, sigma_next, noise):
    with monkeypatch.context() as patch:
      patch.setattr(module, "draw", lambda key, x: noise)
      return solver.step(x0, solver.init(x), sigma, sigma_next, KEY).x

  def x0(x, sigma):
    return jax.vmap(clipped, (0, None, 0))(x, sigma, labels)

  for sigma, sigma_next in itertools.pairwise(sigmas):
    x = step(x, sigma, sigma_next, next(noises))
  np.testing.assert_allclose(x, nhwc(arrays["multi/out"]), rtol=0, atol=1e-4 * abs(arrays["multi/out"]).max())


def test_the_published_levels():
  """The levels of the published sampler, written anew: the last step goes to sigma_min and adds no noise."""
  for ts, count in (((0, 22, 39), 40), ((0, 17, 39), 40), ((0, 106, 200), 201)):
    ends = np.array([80.0, 0.002]) ** (1 / 7)
    wanted = [(ends[0] + t / (count - 1) * (ends[1] - ends[0])) ** 7 for t in ts]
    grid = schedules.consistency(len(ts) - 1, ts="-".join(map(str, ts)), levels=count)
    np.testing.assert_allclose(grid, [*wanted[:-1], 0.0], rtol=1e-5)
    np.testing.assert_array_equal(
      grid, schedules.consistency(len(ts) - 1, ts="-".join(map(str, ts[:-1])), levels=count)
    )
  np.testing.assert_allclose(schedules.consistency(1), [80.0, 0.0])


@pytest.mark.parametrize("ts", ["0-22", "0-a-39", "22-0-39", "0-0-39", "0-40-41", "-1-2-3", "0-39-39"])
def test_levels_that_do_not_fit_are_refused(ts):
  with pytest.raises(ValueError, match="ts must"):
    schedules.consistency(2 if ts != "0-22" else 3, ts=ts)


def test_nothing_is_divided_by_0():
  """The coefficients and a step are finite at the levels sigma_min and 0, and so are their gradients."""
  for made in (scaling.consistency(), scaling.edm(0.5, 1000.0)):
    for level in (0.0, 0.002):
      value, slope = jax.jvp(lambda s: jnp.stack(made(s)), (jnp.asarray(level),), (jnp.asarray(1.0),))  # noqa: B023
      assert np.isfinite(value).all()
      assert np.isfinite(slope).all()
  np.testing.assert_allclose(scaling.consistency()(jnp.asarray(0.002))[:2], [1.0, 0.0], atol=1e-6)
  for sigma_next in (0.0, 0.001, 0.002):

    def step(x, sigma_next):
      solver = solvers.Consistency()
      return solver.step(lambda x, sigma: 0.5 * x, solver.init(x), jnp.asarray(1.0), sigma_next, KEY).x

    x, slope = jax.jvp(step, (jnp.ones(3), jnp.asarray(sigma_next)), (jnp.ones(3), jnp.asarray(1.0)))
    np.testing.assert_allclose(x, 0.5)
    assert np.isfinite(slope).all()


KEY = jax.random.key(0)


def test_a_consistency_model_of_a_point_gives_the_point():
  """A denoiser that gives the end of the path gives it in one step and in several, guided or not."""
  point = jnp.array([0.3, -0.2])
  for steps in (1, 3):
    grid = schedules.consistency(steps)
    x, _ = jg.sample(lambda x, sigma, cond: point, KEY, (2,), grid, solvers.Consistency())
    np.testing.assert_allclose(x, point)


def test_a_consistency_model_is_sampled_but_not_trained(model):
  with pytest.raises(ValueError, match="trained by distillation"):
    objective(model.config, TrainingConfig(steps=10))


def test_the_walk_of_a_consistency_model_is_its_own(model):
  with pytest.raises(ValueError, match=r"is a consistency model.*'ddim' needs: give solver 'consistency'"):
    plan(generate.Settings(model="cd"), lambda folder: model)
  made = plan(generate.Settings(model="cd", solver="consistency", steps=2), lambda folder: model)
  np.testing.assert_array_equal(made.sigmas, schedules.consistency(2))


@pytest.mark.parametrize("given", [{"prediction": "eps"}, {"prediction": "v", "noise_schedule": "cosine"}])
def test_other_predictions_are_refused(given):
  with pytest.raises(ValueError, match="of OpenAI's consistency_models: prediction must be consistency or edm, got '"):
    importers.read_model(f"{FILE}.safetensors", num_head_channels=16, image_size=8, **given)


def test_missing_settings_are_asked_for_together_with_the_presets_that_fit():
  with pytest.raises(ValueError, match=r"num_heads \(.*image_size \(.*prediction \(consistency or edm; its attention"):
    importers.read_model(f"{FILE}.safetensors")
  shapes = importers.openai.shapes(CONSISTENCY_PRESETS["ct_cat256"])
  with pytest.raises(ValueError, match=r"image_size.*--field NAME=VALUE.*--preset cd_bedroom256_l2 or .*cat256_ema"):
    importers.openai.infer(shapes)


def test_presets_of_the_published_models(tmp_path):
  config = CONSISTENCY_PRESETS["cd_imagenet64_lpips"]
  assert (config.prediction, config.num_classes, config.image_shape) == ("consistency", 1000, (64, 64, 3))
  assert CONSISTENCY_PRESETS["edm_cat256_ema"].scaling(jnp.asarray(1.0)).c_noise == 0
  with pytest.raises(ValueError, match="cannot be imported as preset ct_cat256: the weights do not fit UNet"):
    importers.import_model(f"{FILE}.safetensors", tmp_path / "model", preset="ct_cat256")
  assert isinstance(config, ModelConfig)
