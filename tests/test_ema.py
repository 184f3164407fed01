"""Power-function means against EDM2's arrays (see `data/README.md`) and against the defining integrals."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jaxguide import training
from jaxguide.training import ema
from jaxguide.training.ema import Profiles


@pytest.fixture(scope="module")
def published():
  with np.load(Path(__file__).parent / "data" / "edm2_means.npz") as file:
    return dict(file)


def test_widths_and_exponents(published):
  np.testing.assert_allclose(ema.std_to_exponent(published["stds"]), published["std_to_exp"], rtol=1e-12)
  np.testing.assert_allclose(ema.exponent_to_std(published["exps"]), published["exp_to_std"], rtol=1e-14)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.25, ema.UNIFORM])
def test_a_width_is_the_standard_deviation_of_the_profile(std):
  moments = [integrate.quad(lambda time: time**k * ema.response(time, 2.0, std), 0, 2)[0] for k in range(3)]  # noqa: B023
  np.testing.assert_allclose(moments[0], 1, rtol=1e-9)
  np.testing.assert_allclose(np.sqrt(moments[2] - moments[1] ** 2) / 2, std, rtol=1e-6)


def test_the_response(published):
  got = ema.response(np.arange(64)[:, None], published["response/ofs"], published["response/std"])
  np.testing.assert_allclose(got / got.sum(0), published["response/resp"], rtol=1e-12, atol=1e-15)


def test_correlations_are_integrals(published):
  t, std = published["corr/in_ofs"], published["corr/in_std"]
  got = ema.correlation(t[:, None], std[:, None], t, std)
  np.testing.assert_allclose(got, published["corr/A"], rtol=1e-12)
  for i, j in ((0, 1), (0, 5), (7, 2)):
    both = lambda time: ema.response(time, t[i], std[i]) * ema.response(time, t[j], std[j])  # noqa: B023, E731
    np.testing.assert_allclose(got[i, j], integrate.quad(both, 0, min(t[i], t[j]))[0], rtol=1e-8)


def test_posthoc_coefficients(published):
  snapshots = Profiles(published["corr/in_ofs"], published["corr/in_std"])
  wanted = Profiles(published["posthoc/out_ofs"], published["posthoc/out_std"])
  np.testing.assert_allclose(ema.posthoc_coefficients(snapshots, wanted), published["posthoc/coefs"], atol=1e-11)


def test_a_mean_made_after_training_is_near_the_one_kept_during_it():
  # The parameters are a random walk. A mean of a third width is computed from eight snapshots of two widths.
  rng = np.random.default_rng(0)
  walk = np.cumsum(rng.normal(size=(800, 3)), axis=0).astype(np.float32)
  tracked, other = training.PowerFunctionEMA((0.05, 0.1)), training.PowerFunctionEMA((0.08,))

  @jax.jit
  def run(walk):
    def step(carry, inputs):
      t, params = inputs
      carry = tracked.update(carry[0], params, t, 1), other.update(carry[1], params, t, 1)
      return carry, carry

    start = (walk[0], walk[0]), (walk[0],)
    return jax.lax.scan(step, start, (jnp.arange(1, len(walk) + 1), walk))[1]

  (narrow, wide), (wanted,) = run(jnp.asarray(walk))
  at = np.arange(100, 801, 100)
  snapshots = Profiles(np.repeat(at, 2), np.tile([0.05, 0.1], len(at)))
  trees = ({"w": mean[t - 1]} for t in at for mean in (narrow, wide))
  coefficients = ema.posthoc_coefficients(snapshots, Profiles(800, 0.08))[:, 0]
  got = ema.weighted_sum(trees, coefficients)["w"]
  assert got.dtype == np.float32
  error = np.abs(got - wanted[-1]).max()
  nearest = min(np.abs(mean[-1] - wanted[-1]).max() for mean in (narrow, wide))
  assert error < 0.02 * nearest


def test_the_weight_of_a_step(published, float64):
  t, delta = published["beta/t_next"].astype(float), float(published["beta/t_delta"])
  for std, beta in zip(published["stds"], published["beta/beta"], strict=True):
    np.testing.assert_allclose(1 - ema.step_weight(float(std), t, delta), beta, atol=1e-14)


def test_the_weight_is_accurate_late_in_the_training():
  with jax.enable_x64(True):
    exact = float(ema.step_weight(0.1, 2e9, 2048.0))
  np.testing.assert_allclose(ema.step_weight(0.1, jnp.asarray(2e9), 2048), exact, rtol=1e-6)


def test_tracking(published):
  means = training.PowerFunctionEMA(tuple(published["track/stds"].tolist()))
  batch, params = int(published["track/batch"]), published["track/params"]
  tree = lambda p: {"bias": p[:3], "weight": p[3:].reshape(1, 5)}  # noqa: E731
  emas, update = means.init(tree(jnp.zeros(8))), jax.jit(means.update)
  for step, (now, wanted) in enumerate(zip(params, published["track/emas"], strict=True), 1):
    emas = update(emas, tree(jnp.asarray(now)), step * batch, batch)
    got = [np.append(mean["bias"], mean["weight"]) for mean in emas]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
  assert update._cache_size() == 1


@pytest.mark.parametrize("std", [0.0, -0.1, 0.3, np.nan])
def test_invalid_widths(std):
  with pytest.raises(ValueError, match="std must be above 0 and at most 1/√12"):
    ema.std_to_exponent(std)
  with pytest.raises(ValueError, match="std must be"):
    training.PowerFunctionEMA((0.05, std))


def test_snapshots_that_cannot_be_combined():
  with pytest.raises(ValueError, match="two of the snapshots have the same time and std"):
    ema.posthoc_coefficients(Profiles([1, 2, 1], 0.1), Profiles(2, 0.1))
  with pytest.raises(ValueError, match="wanted times must not be after the last snapshot's, 2, got 3"):
    ema.posthoc_coefficients(Profiles([1, 2], 0.1), Profiles(3, 0.1))
  with pytest.raises(ValueError, match="zip"):
    ema.weighted_sum([{"w": np.ones(1)}], [0.5, 0.5])


def test_the_learning_rate(published, float64):
  images = published["lr/nimg"]
  for name, batch, options in (
    ("default", 2048, {"peak": 0.01, "decay_start": 70_000, "rampup": 10e6 / 2048}),
    ("alt", 512, {"peak": 0.012, "decay_start": 35_000, "rampup": 2e6 / 512}),
  ):
    rate = training.inverse_sqrt(**options)
    np.testing.assert_allclose([rate(n / batch) for n in images], published[f"lr/{name}"], rtol=1e-12)
  assert training.inverse_sqrt(0.5, decay_start=0)(10**6) == 0.5
  with pytest.raises(ValueError, match="rampup must be at least 0"):
    training.inverse_sqrt(0.1, rampup=-1)
