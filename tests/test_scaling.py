"""Predictions: a network that knows the answer, written in its own convention, gives the answer back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import scaling, schedules

SIGMAS = [0.002, 0.1, 0.5, 1.0, 7.0, 80.0]
TABLE = schedules.Table.from_betas(schedules.linear_betas(1000))


# What a perfect network sees and says, in its own variables. All know x0 and eps; alpha and s are the
# variance-preserving signal and noise, x_t = alpha x0 + s eps with alpha² + s² = 1.
def perfect(prediction, x0, eps, alpha, s, sigma, sigma_data=0.5):
  x_t = alpha * x0 + s * eps
  if prediction == "eps":  # DDPM, arXiv:2006.11239, eq. 11
    return x_t, eps
  if prediction == "x0":
    return x_t, x0
  if prediction == "v":  # Salimans & Ho, arXiv:2202.00512, section 4: v = alpha eps - sigma x
    return x_t, alpha * eps - s * x0
  if prediction == "edm":  # Karras et al., arXiv:2206.00364, eq. 8: the target in terms of y and n
    y, n = x0, sigma * eps
    total = sigma**2 + sigma_data**2
    return (y + n) / np.sqrt(total), (y - sigma_data**2 / total * (y + n)) / (sigma * sigma_data / np.sqrt(total))
  if prediction == "ve":  # Song et al., arXiv:2011.13456: x itself, and sigma times the score
    return x0 + sigma * eps, -eps
  if prediction == "consistency":  # Song et al., arXiv:2303.01469, appendix C
    x, above = x0 + sigma * eps, sigma - 0.002
    skip, out = 0.25 / (above**2 + 0.25), 0.5 * above / np.sqrt(sigma**2 + 0.25)
    return x / np.sqrt(sigma**2 + 0.25), (x0 - skip * x) / (out or 1)
  t = s / (s + alpha)  # Lipman et al., arXiv:2210.02747: a straight path, noise at t = 1 here
  velocity = eps - x0
  return (1 - t) * x0 + t * eps, -velocity if prediction == "flow_to_data" else velocity  # Ma et al., arXiv:2401.08740


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("prediction", scaling.PREDICTIONS)
def test_a_perfect_network_gives_back_x0(prediction, sigma, float64, relative_error):
  rng = np.random.default_rng(0)
  x0, eps = rng.normal(size=(2, 3, 2, 1))
  alpha = 1 / np.sqrt(1 + sigma**2)
  seen, output = perfect(prediction, x0, eps, alpha, sigma * alpha, sigma)

  def apply(params, x, c_noise, cond):
    inputs.append(x)
    return jnp.asarray(output)[None] * params

  inputs = []
  denoise = jg.NetworkDenoiser(jnp.asarray(1.0), apply, scaling.scaling(prediction, schedules.Cosine(), 1000.0))
  given = denoise(jnp.asarray(x0 + sigma * eps), jnp.asarray(sigma), None)
  # At its smallest level a consistency model gives its input.
  wanted = x0 + sigma * eps if prediction == "consistency" and sigma == 0.002 else x0
  assert relative_error(given, wanted) < 1e-12
  assert relative_error(inputs[0][0], seen) < 1e-12


@pytest.mark.parametrize("sigma_data", [0.3, 1.0, 2.0])
def test_edm_is_table_1(sigma_data, float64):
  sigma = np.geomspace(0.002, 80, 9)
  c_skip, c_out, c_in, c_noise = scaling.edm(sigma_data)(sigma)
  total = sigma**2 + sigma_data**2
  np.testing.assert_allclose(c_skip, sigma_data**2 / total, rtol=1e-13)
  np.testing.assert_allclose(c_out, sigma * sigma_data / np.sqrt(total), rtol=1e-13)
  np.testing.assert_allclose(c_in, 1 / np.sqrt(total), rtol=1e-13)
  np.testing.assert_allclose(c_noise, np.log(sigma) / 4, rtol=1e-13)


def test_edm_of_no_data_is_refused():
  # c_out would be 0, and the regression target infinite.
  for sigma_data in (0.0, -1.0, np.nan):
    with pytest.raises(ValueError, match="sigma_data"):
      scaling.edm(sigma_data)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_time_is_the_step_of_a_table_and_thousandths_of_a_schedule(prediction, float64):
  discrete = scaling.scaling(prediction, TABLE)(np.asarray(TABLE.sigmas)[[0, 500, 999]])
  np.testing.assert_allclose(discrete.c_noise, [0, 500, 999], atol=1e-3)
  schedule = schedules.Linear()
  continuous = scaling.scaling(prediction, schedule)(np.asarray(schedule.sigma(np.array([0.1, 0.9]))))
  np.testing.assert_allclose(continuous.c_noise, [100.0, 900.0], rtol=1e-9)


def test_flow_time(float64):
  np.testing.assert_allclose(scaling.flow(1000.0)(np.array([1.0, 3.0])).c_noise, [500.0, 750.0])
  np.testing.assert_allclose(scaling.flow(1.0)(np.array([1.0, 3.0])).c_noise, [0.5, 0.75])


def test_weights(float64):
  sigma = np.array([0.01, 0.5, 1.0, 10.0])
  alpha_bar = 1 / (1 + sigma**2)
  snr = alpha_bar / (1 - alpha_bar)
  np.testing.assert_allclose(scaling.eps_weight(sigma), snr, rtol=1e-12)
  np.testing.assert_allclose(scaling.x0_weight(sigma), np.ones(4))
  np.testing.assert_allclose(scaling.min_snr_weight(sigma), np.minimum(snr, 5), rtol=1e-12)
  np.testing.assert_allclose(scaling.min_snr_weight(sigma, 2.0), np.minimum(snr, 2), rtol=1e-12)


def test_an_unknown_prediction_names_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'flow'"):
    scaling.scaling("flo", schedules.Cosine())


@pytest.mark.parametrize("prediction", scaling.PREDICTIONS)
def test_scalings_are_pytrees_of_one_trace(prediction):
  @jax.jit
  @chex.assert_max_traces(1)
  def coefficients(make, sigma):
    return make(sigma)

  for schedule in (schedules.Linear(0.1, 20.0), schedules.Linear(0.2, 10.0)):
    coefficients(scaling.scaling(prediction, schedule, 1000.0), 1.0)
