"""What the tests of the mathematics share: float64, mixtures, and the tables of everything that is run through them.

A new guidance method or solver is one more line in `GUIDANCES` or `SOLVERS`; every structural test then covers it.
"""

import gc
import os
import sys
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import cli
from jaxguide.guidance import Rule

# The commands keep compiled programs. Here each process has a place of its own, and reads nothing half written.
_CACHE = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1"  # Else every small program of the tests would be kept.


@pytest.fixture(scope="module")
def only_new_objects():
  """Leave out what is there before these tests from searches for cycles: there is one after each failure of Orbax."""
  gc.collect()
  gc.freeze()
  yield
  gc.unfreeze()
  gc.collect()
  gc.freeze()


@pytest.fixture
def run(monkeypatch, capsys):
  """Run a command; give its exit status, what it printed, and its errors."""

  def run(*args):
    monkeypatch.setattr(sys, "argv", ["jaxguide", *map(str, args)])
    try:
      cli.main()
      status = 0
    except SystemExit as stop:
      status = stop.code
    return status, *capsys.readouterr()

  return run


def _and_not_the_next(denoise, guidance, x, sigma, cond):
  """A guidance by two conditions: the label and, negatively, the one after it."""
  return guidance(denoise)(x, sigma, jnp.stack([jnp.asarray(cond), (jnp.asarray(cond) + 1) % 3]))


def clean(mixture):
  """The classifier of clean examples, a `LogProb` that sees no noise."""
  return jax.tree_util.Partial(_clean, mixture)


def _clean(mixture, x0, sigma, cond):
  return mixture.class_log_prob(x0, 0 * sigma, cond)


# name -> (mixture, scale) -> Guidance, over a mixture whose null class is its number of classes
GUIDANCES = {
  "classifier_free": lambda m, scale: jg.classifier_free(m.num_classes, scale),
  "classifier": lambda m, scale: jg.classifier(m.log_prob, scale),
  "unconditional_classifier": lambda m, scale: jg.chain(
    jg.unconditional(m.num_classes), jg.classifier(m.log_prob, scale)
  ),
  "interval": lambda m, scale: jg.interval(jg.classifier_free(m.num_classes, scale), 0.2, 5.0),
  "clip_x0": lambda m, scale: jg.chain(jg.classifier_free(m.num_classes, scale), jg.clip_x0(2.0)),
  "classifier_after_classifier_free": lambda m, scale: jg.chain(
    jg.classifier_free(m.num_classes, scale), jg.classifier(m.log_prob, 0.5)
  ),
  "classifier_free_after_classifier": lambda m, scale: jg.chain(
    jg.classifier(m.log_prob, scale), jg.classifier_free(m.num_classes, 1.5)
  ),
  "autoguidance": lambda m, scale: jg.autoguidance(m.replace(variances=1.5 * m.variances + 0.1).denoiser, scale),
  "rescaled": lambda m, scale: jg.classifier_free(m.num_classes, scale, jg.rescaled(0.7)),
  "projected": lambda m, scale: jg.classifier_free(m.num_classes, scale, jg.projected(0.3, 1.0)),
  "zero_star": lambda m, scale: jg.classifier_free(m.num_classes, scale, jg.zero_star(5.0)),
  "momentum": lambda m, scale: jg.classifier_free(m.num_classes, scale, jg.projected(0.3, 1.0, -0.5)),
  "frequency_decoupled": lambda m, scale: jg.classifier_free(m.num_classes, scale, jg.frequency_decoupled(1.0, 0.4)),
  "scheduled": lambda m, scale: jg.classifier_free(
    m.num_classes, jg.scales.powered_cosine(scale, jg.schedules.Cosine(), 2.0)
  ),
  "cfg_pp": lambda m, scale: jg.classifier_free(m.num_classes, jg.scales.cfg_pp(scale, jg.karras(4, 0.05, 10.0))),
  "compose": lambda m, scale: Rule(_and_not_the_next, (jg.compose(m.num_classes, scale * np.array([1.0, -0.2])),)),
  "parallel": lambda m, scale: jg.parallel(jg.classifier_free(m.num_classes, scale), jg.classifier(m.log_prob, 0.5)),
  "tangential": lambda m, scale: jg.classifier_free(m.num_classes, scale, jg.tangential),
  "reused": lambda m, scale: jg.classifier(m.log_prob, scale, every=2),
  "reconstruction": lambda m, scale: jg.reconstruction(clean(m), 0.1 * scale),
  "backward_guidance": lambda m, scale: jg.backward_guidance(clean(m), 0.01 * scale, 2),
  "normalized": lambda m, scale: jg.normalized(jg.classifier(m.log_prob, 2.0), 0.1 * scale),
  "dynamic_threshold": lambda m, scale: jg.chain(
    jg.classifier_free(m.num_classes, scale), jg.dynamic_threshold(0.9, 0.5)
  ),
}

SOLVERS = {
  "euler": jg.Euler,
  "ddim_0": lambda: jg.DDIM(0.0),
  "ddim_half": lambda: jg.DDIM(0.5),
  "ddim_1": lambda: jg.DDIM(1.0),
  "ddpm": jg.DDPM,
  "ddpm_large": lambda: jg.DDPM("large"),
  "heun": jg.Heun,
  "dpmpp_2m": jg.DPMpp2M,
  "euler_ancestral": lambda: jg.EulerAncestral(0.7, 1.0),
  "dpmpp_3m": jg.DPMpp3M,
  "dpmpp_2m_sde": jg.DPMpp2MSDE,
  "dpmpp_3m_sde": jg.DPMpp3MSDE,
  "unipc_1": lambda: jg.UniPC(1),
  "unipc_2": jg.UniPC,
  "dpmpp_2s": jg.DPMpp2S,
  "dpmpp_2s_ancestral": jg.DPMpp2SAncestral,
  "dpmpp_2s_sde": jg.DPMpp2SSDE,
  "edm_0": jg.EDMStochastic,
  "edm_churn": lambda: jg.EDMStochastic.from_churn(4, num_steps=40, s_min=0.02, s_max=50.0),
  "consistency": jg.Consistency,
}


@pytest.fixture(params=GUIDANCES)
def make_guidance(request):
  """Each guidance in turn, as ``(mixture, scale) -> Guidance``."""
  return GUIDANCES[request.param]


@pytest.fixture(name="clean")
def clean_fixture():
  """``mixture -> LogProb``: the classifier of clean examples."""
  return clean


@pytest.fixture(params=SOLVERS)
def solver(request):
  """Each solver in turn."""
  return SOLVERS[request.param]()


# A solver sees nothing of a guidance but a function, as a test shows: every guidance with one solver and every solver
# with one guidance, that with a branch, say all. What remembers depends on how often a step evaluates, so that it meets
# a solver of each kind.
PAIRS = [(name, "dpmpp_2m") for name in GUIDANCES] + [("interval", name) for name in SOLVERS if name != "dpmpp_2m"]
PAIRS += [("momentum", name) for name in ("ddpm", "heun", "edm_churn")]
PAIRS += [("reused", "heun")]


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request):
  """A guidance, as ``(mixture, scale) -> Guidance``, and a solver."""
  guidance, solver = request.param
  return GUIDANCES[guidance], SOLVERS[solver]()


@pytest.fixture
def all_solvers():
  """The whole table at once."""
  return {name: make() for name, make in SOLVERS.items()}


@pytest.fixture
def all_guidances():
  """The whole table of guidances at once."""
  return GUIDANCES


@pytest.fixture(autouse=True)
def traces_from_none():
  """`chex.assert_max_traces` counts by a function's name."""
  chex.clear_trace_counter()


@pytest.fixture
def float64():
  """Double precision for one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def given_noise(monkeypatch):
  """Each draw of noise is the "key" itself, so that a test may choose it.

  A "key" with one axis more holds more than one draw: the step's own, and then that of each number folded in.
  """

  def normal(key, shape=(), dtype=None):
    draw = key[0] if key.ndim > len(shape) else key
    assert draw.shape == tuple(shape)
    return draw.astype(dtype)

  monkeypatch.setattr(jax.random, "normal", normal)
  monkeypatch.setattr(jax.random, "fold_in", lambda key, number: key[number])


@pytest.fixture
def no_rank_promotion():
  """An operation on arrays of different ranks is an error: it is how batch axes get mixed up unseen."""
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def random_mixture():
  """``(seed, shape) -> GaussianMixture``: 7 components of 3 classes, of unequal weights and variances."""

  def make(seed, shape):
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(7, *shape))
    variances = rng.uniform(0.05, 0.5, size=(7, *shape))
    return jg.gaussian_mixture(means, variances, [0, 1, 2, 0, 1, 2, 1], rng.uniform(0.5, 2.0, size=7))

  return make


@pytest.fixture
def relative_error():
  """``(got, wanted)`` -> the largest difference, relative to the larger of 1 and the largest wanted."""

  def error(got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape
    return np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max())

  return error
