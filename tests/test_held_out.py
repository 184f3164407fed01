"""Classifiers on held-out data, against exact mathematics: the Bayes classifier of a Gaussian mixture."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import data, models, schedules
from jaxguide.models import encoders, networks
from jaxguide.training import held_out

MEANS, VARIANCES, CLASSES, WEIGHTS = np.array([-1.0, 0.1, 1.0]), np.array([0.02, 0.1, 0.05]), [0, 1, 0], [0.3, 0.5, 0.2]
SHAPE = (1, 1, 1)


def mixture():
  return jg.gaussian_mixture(MEANS[:, None, None, None], VARIANCES, CLASSES, WEIGHTS)


class Bayes(nn.Module):
  """The mixture's exact classifier of noisy examples, as a network. The logits are multiplied by its parameter."""

  out_channels: int = 2

  @nn.compact
  def __call__(self, x, t, *, train=False):
    """Return the logits; ``t`` is EDM's log(sigma) / 4, and ``x`` its scaled input."""
    del train
    sharpness = self.param("sharpness", nn.initializers.ones, ())
    sigma = jnp.exp(4 * t)
    x = x * jnp.sqrt(sigma**2 + 0.25)[:, None, None, None]
    labels = jnp.arange(self.out_channels)
    log_probs = jax.vmap(jax.vmap(mixture().class_log_prob, (None, None, 0)), (0, 0, None))(x, sigma, labels)
    return sharpness * log_probs


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  monkeypatch.setitem(networks.NETWORKS, "bayes", networks.Network(Bayes, networks.CLASSIFIER))
  monkeypatch.setitem(
    encoders.ENCODERS, "floats", encoders.Encoder(lambda x: jnp.asarray(x, jnp.float32), np.asarray, None, None)
  )


def config():
  return models.ModelConfig("bayes", {}, SHAPE, 2, prediction="edm", encoder="floats")


def params(sharpness):
  return {"params": {"sharpness": jnp.asarray(sharpness, jnp.float32)}}


PARAMS = params(1.0)


def draws(num, seed=0):
  rng = np.random.default_rng(seed)
  component = rng.choice(3, num, p=WEIGHTS)
  x0 = MEANS[component] + np.sqrt(VARIANCES[component]) * rng.normal(size=num)
  return x0.reshape(-1, *SHAPE).astype(np.float32), np.array(CLASSES)[component]


def batches(x0, labels, size):
  return [(x0[first : first + size], labels[first : first + size]) for first in range(0, len(x0), size)]


def densities(x, sigma):
  """p(x, y) of the noisy mixture for both classes, from its formula."""
  variances = VARIANCES + sigma**2
  parts = WEIGHTS * np.exp(-0.5 * (x[:, None] - MEANS) ** 2 / variances) / np.sqrt(2 * np.pi * variances)
  return np.stack([parts[:, [0, 2]].sum(1), parts[:, 1]])


def exact(sigma, sharpness=1.0):
  """Accuracy, NLL, calibration error and confidence by numerical integration."""
  x, dx = np.linspace(-1 - 9 * (sigma + 0.4), 1 + 9 * (sigma + 0.4), 400_001, retstep=True)
  joint = densities(x, sigma)
  powers = joint**sharpness / (joint**sharpness).sum(0)
  confidence, hit = powers.max(0), np.take_along_axis(joint, powers.argmax(0)[None], 0)[0]
  bins = np.ceil(confidence * 15)
  error = sum(abs((hit - confidence * joint.sum(0))[bins == m].sum()) for m in range(1, 16)) * dx
  nll = -(joint * np.log(np.maximum(powers, 1e-300))).sum() * dx
  return hit.sum() * dx, nll, error, (confidence * joint.sum(0)).sum() * dx


@pytest.mark.parametrize("sharpness", [1.0, 3.0, 0.4])
def test_a_known_classifier_has_its_known_figures(sharpness):
  x0, labels = draws(20_000)
  sigmas = [0.05, 0.3, 0.7, 2.0]
  key = jax.random.key(1)
  levels = held_out.evaluate(config(), params(sharpness), batches(x0, labels, 5000), key, sigmas)
  wanted = np.transpose([exact(sigma, sharpness) for sigma in sigmas])
  np.testing.assert_array_equal(levels.sigmas, sigmas)
  assert levels.num == 20_000
  # Standard errors: sqrt(1 / 4n) of a share, and that of the NLL grows with its spread.
  np.testing.assert_allclose(levels.accuracy, wanted[0], atol=0.012)
  np.testing.assert_allclose(levels.nll, wanted[1], atol=0.02 * sharpness)
  # A sum of absolute values is biased upwards, by about sqrt(15 / n) at most.
  np.testing.assert_allclose(levels.calibration_error, wanted[2], atol=0.02)
  np.testing.assert_allclose(levels.confidence, wanted[3], atol=0.01)


def guo_2017(probabilities, labels, bins=15):
  """arXiv:1706.04599, section 2: a loop over the bins ((m - 1) / M, m / M]."""
  predicted, confidence = probabilities.argmax(1), probabilities.max(1)
  error = 0.0
  for m in range(1, bins + 1):
    members = (confidence > (m - 1) / bins) & (confidence <= m / bins)
    if members.any():
      accuracy = (predicted[members] == labels[members]).mean()
      error += members.sum() / len(labels) * abs(accuracy - confidence[members].mean())
  return error


def test_the_calibration_error_is_that_of_the_paper():
  x0, labels = draws(333, seed=2)
  labels = np.where(np.arange(333) % 3, labels, 1 - labels)  # The labels are often wrong.
  levels = held_out.evaluate(config(), PARAMS, batches(x0, labels, 333), jax.random.key(0), [1e-5])
  joint = densities(x0.reshape(-1).astype(np.float64), 0.0)
  probabilities = (joint / joint.sum(0)).T
  assert levels.calibration_error[0] == pytest.approx(guo_2017(probabilities, labels), abs=1e-4)
  assert levels.calibration_error[0] > 0.2
  assert levels.nll[0] == pytest.approx(-np.log(probabilities[np.arange(333), labels]).mean(), rel=1e-3)


def test_the_noise_does_not_depend_on_the_batches():
  x0, labels = draws(50)
  key = jax.random.key(3)
  one, many = (
    held_out.evaluate(config(), PARAMS, batches(x0, labels, size), key, [0.3, 3.0])._asdict() for size in (50, 16)
  )
  for name, values in one.items():
    np.testing.assert_allclose(values, many[name], rtol=1e-5, err_msg=name)
  again = held_out.evaluate(config(), PARAMS, batches(x0, labels, 50), jax.random.key(4), [0.3, 3.0])
  assert not np.allclose(one["nll"], again.nll, rtol=1e-3)


class Two:
  """A dataset, as an object with examples."""

  def __len__(self):
    return 50

  def example(self, i, rng):
    del rng
    x0, labels = draws(50)
    return x0[i], labels[i]


def test_a_dataset_is_evaluated_in_its_order():
  key = jax.random.key(3)
  wanted = held_out.evaluate(config(), PARAMS, batches(*draws(50), 50), key, [0.3])
  got = held_out.evaluate(config(), PARAMS, Two(), key, [0.3], batch_size=7)
  assert got.nll == pytest.approx(wanted.nll)


def test_the_levels_are_those_of_the_training():
  middles = (np.arange(8) + 0.5) / 8
  np.testing.assert_allclose(held_out.levels_of(schedules.Cosine()), schedules.Cosine().quantile(middles), rtol=1e-6)
  case = batches(*draws(4), 4)
  narrow = models.ModelConfig("bayes", {}, SHAPE, 2, prediction="edm", encoder="floats", noise_range=(0.5, 2.0))
  levels = held_out.evaluate(narrow, PARAMS, case, jax.random.key(0), 10)
  assert len(levels.sigmas) == 10
  assert levels.sigmas.min() > 0.5
  assert levels.sigmas.max() < 2
  given = held_out.evaluate(narrow, PARAMS, case, jax.random.key(0), 3, noise_levels=schedules.LogNormal(1.0, 0.1))
  np.testing.assert_allclose(given.sigmas[1], np.e, rtol=1e-6)
  assert given.mean_nll == pytest.approx(given.nll.mean())


def test_what_cannot_be_evaluated():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="is for a classifier, but the model is a unet"):
    held_out.evaluate(models.ModelConfig("unet", {}, (8, 8, 1), 2), PARAMS, [], key)
  with pytest.raises(ValueError, match="there are no held-out examples"):
    held_out.evaluate(config(), PARAMS, [], key)
  with pytest.raises(ValueError, match="label 2 is not one of the 2 classes"):
    held_out.evaluate(config(), PARAMS, [(draws(1)[0], np.array([2]))], key)
  with pytest.raises(ValueError, match="held-out examples need labels"):
    held_out.evaluate(config(), PARAMS, data.Images(np.zeros((2, 1, 1, 1), np.uint8), None, None, "nameless"), key)
  with pytest.raises(ValueError, match="each of bins must be above 0"):
    held_out.evaluate(config(), PARAMS, [], key, [0.0, 1.0])
  with pytest.raises(ValueError, match="leave out one"):
    held_out.evaluate(config(), PARAMS, [], key, [1.0], noise_levels=schedules.Cosine())
