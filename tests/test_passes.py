"""What guidance leaves out: passes at scales of 0 and 1, everything outside an interval, and what is known already."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxguide as jg
from jaxguide.guidance import Rule, passes

RING = jg.ring(4)
X, LABEL = jnp.array([0.3, -0.7]), jnp.asarray(1)


def counted(name, function, seen):
  """The function, with a record of its calls, once for each example and condition."""

  def run(parameters, x, sigma, cond):
    jax.debug.callback(lambda *_: seen.append(name), x, cond)
    return parameters(x, sigma, cond)

  return Partial(run, function)


def clean(x0, sigma, cond):
  return RING.log_prob(x0, 0 * sigma + 0.1, cond)


# name -> (log_prob, clean, weak) -> (scale -> guidance); what runs inside its interval, and at a known scale.
KINDS = {
  "cfg": (lambda p, c, w: lambda s: jg.classifier_free(4, s), {"net": 2}, {0: {"net": 1}, 1: {"net": 1}}),
  "cfg_rescaled": (
    lambda p, c, w: lambda s: jg.classifier_free(4, s, jg.rescaled()),
    {"net": 2},
    {0: {"net": 2}, 1: {"net": 1}},
  ),
  "cfg_zero_star": (
    lambda p, c, w: lambda s: jg.classifier_free(4, s, jg.zero_star()),
    {"net": 2},
    {0: {"net": 2}, 1: {"net": 2}},
  ),
  "classifier": (
    lambda p, c, w: lambda s: jg.classifier(p, s),
    {"net": 1, "log_prob": 1},
    {0: {"net": 1}, 1: {"net": 1, "log_prob": 1}},
  ),
  "reused": (
    lambda p, c, w: lambda s: jg.classifier(p, s, every=2),
    {"net": 1, "log_prob": 1},
    {0: {"net": 1}, 1: {"net": 1, "log_prob": 1}},
  ),
  "autoguidance": (
    lambda p, c, w: lambda s: jg.autoguidance(w, s),
    {"net": 1, "weak": 1},
    {0: {"weak": 1}, 1: {"net": 1}},
  ),
  "reconstruction": (
    lambda p, c, w: lambda s: jg.reconstruction(c, s),
    {"net": 1, "clean": 1},
    {0: {"net": 1}, 1: {"net": 1, "clean": 1}},
  ),
  "reconstruction_reused": (
    lambda p, c, w: lambda s: jg.reconstruction(c, s, every=3),
    {"net": 1, "clean": 1},
    {0: {"net": 1}, 1: {"net": 1, "clean": 1}},
  ),
  "backward": (
    lambda p, c, w: lambda s: jg.backward_guidance(c, s, 2),
    {"net": 1, "clean": 2},
    {0: {"net": 1}, 1: {"net": 1, "clean": 2}},
  ),
}
# Guidances without a scale that is looked at: what runs inside the interval.
MORE = {
  "compose": (lambda p, c, w: Rule(of_two, (jg.compose(4, jnp.array([2.0, -0.3])),)), {"net": 3}),
  "chain": (
    lambda p, c, w: jg.chain(jg.classifier_free(4, 2.0), jg.classifier(p, 1.0), jg.clip_x0()),
    {"net": 2, "log_prob": 1},
  ),
  "parallel": (
    lambda p, c, w: jg.parallel(jg.classifier_free(4, 2.0), jg.classifier(p, 1.0), jg.autoguidance(w, 2.0)),
    {"net": 2, "log_prob": 1, "weak": 1},
  ),
  "normalized": (lambda p, c, w: jg.normalized(jg.classifier(p, 1.0), 0.3), {"net": 1, "log_prob": 1}),
  "normalized_cfg": (lambda p, c, w: jg.normalized(jg.classifier_free(4, 2.0), 0.3), {"net": 2}),
  "unconditional": (
    lambda p, c, w: jg.chain(jg.unconditional(4), jg.classifier(p, 1.0)),
    {"net": 1, "log_prob": 1},
  ),
}


def of_two(denoise, guidance, x, sigma, cond):
  return guidance(denoise)(x, sigma, jnp.stack([cond, (cond + 1) % 4]))


@pytest.fixture
def seen():
  """What ran, by name."""
  return []


@pytest.fixture
def parts(seen):
  """The classifiers of noisy and clean examples and the weak denoiser, which are counted."""
  weak = RING.replace(variances=2 * RING.variances).denoiser
  return counted("log_prob", RING.log_prob, seen), counted("clean", Partial(clean), seen), counted("weak", weak, seen)


@pytest.fixture
def network(seen):
  """The denoiser, which is counted."""
  return counted("net", RING.denoiser, seen)


def ran(seen, call):
  """What ran in a call."""
  seen.clear()
  jax.block_until_ready(call())
  jax.effects_barrier()
  return {name: seen.count(name) for name in sorted(set(seen))}


def x0(prediction):
  return getattr(prediction, "x0", prediction)


# --- scales of 0 and 1 ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_at_scales_of_0_and_1_only_what_is_needed_runs(name, seen, parts, network):
  make, full, at = KINDS[name]
  make, args = make(*parts), (X, jnp.asarray(0.8), LABEL)
  data = jax.jit(lambda guided: x0(guided(*args)))
  wanted = {}
  for scale in (0.0, 1.0, 1.7):
    # A number that is an argument of the program is data: everything runs.
    guided = make(scale)(network)
    assert ran(seen, lambda: wanted.setdefault(scale, data(guided))) == full  # noqa: B023
    # A number in the program, and a static scale that comes as an argument, are known.
    inside = jax.jit(lambda: x0(make(scale)(network)(*args)))  # noqa: B023
    static = make(jg.scales.static(scale))(network)
    for call in (inside, lambda: data(static)):  # noqa: B023
      assert ran(seen, call) == at.get(scale, full)
      np.testing.assert_allclose(call(), wanted[scale], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_one_program_looks_at_the_scale_while_it_runs(name, seen, parts, network):
  make, full, at = KINDS[name]
  make, xs, traces = make(*parts), jnp.stack([X, 2 * X, -X]), []

  @jax.jit
  def draw(guidance):
    traces.append(1)
    return jax.vmap(lambda x: x0(guidance(network)(x, jnp.asarray(0.8), LABEL)))(xs)

  wanted = {scale: draw(make(scale)) for scale in (0.0, 1.0, 1.7)}
  traces.clear()
  for scale, value in wanted.items():
    guidance = make(jg.scales.branching(scale))
    check = lambda: np.testing.assert_allclose(draw(guidance), value, rtol=1e-5, atol=1e-6)  # noqa: E731, B023
    assert ran(seen, check) == {part: 3 * times for part, times in at.get(scale, full).items()}
  assert len(traces) == 1


def test_a_batch_of_scales_runs_each_pass_once(seen, network):
  # A choice under vmap would run one pass and two for every scale.
  def guided(scale):
    return jg.classifier_free(4, jg.scales.branching(scale))(network)(X, jnp.asarray(0.8), LABEL)

  scales = jnp.array([0.0, 1.0, 1.7])
  wanted = [jg.classifier_free(4, float(scale))(RING.denoiser)(X, jnp.asarray(0.8), LABEL) for scale in scales]
  for run in (jax.jit(jax.vmap(guided)), jax.vmap(jax.jit(guided))):
    assert ran(seen, lambda: np.testing.assert_allclose(run(scales), wanted, rtol=1e-5, atol=1e-6)) == {"net": 2}  # noqa: B023


def test_a_scale_that_depends_on_the_level_is_looked_at(seen, network):
  late = jg.scales.branching(lambda sigma: jnp.where(sigma < 1, 2.0, 1.0))
  draw = jax.jit(lambda sigma: jg.classifier_free(4, late)(network)(X, sigma, LABEL))
  assert [ran(seen, lambda: draw(sigma)) for sigma in (2.0, 0.5)] == [{"net": 1}, {"net": 2}]  # noqa: B023


def test_gradients_pass_through_a_scale_that_is_looked_at(float64):
  def value(scale, x, wrap):
    return jg.classifier_free(4, wrap(scale))(RING.denoiser)(x, jnp.asarray(0.8), LABEL).sum()

  args = jnp.asarray(1.7), X.astype(float)
  ours, wanted = (jax.grad(value, (0, 1))(*args, wrap) for wrap in (jg.scales.branching, lambda scale: scale))
  chex.assert_trees_all_close(ours, wanted, rtol=1e-12)


def test_a_learned_variance_is_that_of_the_condition(seen):
  learned = counted("net", Partial(lambda x, sigma, cond: jg.Prediction(x * cond, jnp.full_like(x, cond))), seen)
  weak = counted("weak", Partial(lambda x, sigma, cond: 0.5 * x), seen)
  at = X, jnp.asarray(0.8), jnp.asarray(3.0)
  for guidance, wanted, runs in (
    (jg.classifier_free(0.0, 0.0), 0 * X, {"net": 2}),
    (jg.classifier_free(0.0, 1.0), 3 * X, {"net": 1}),
    (jg.autoguidance(weak, 0.0), 0.5 * X, {"net": 1, "weak": 1}),
  ):
    assert ran(seen, jax.jit(lambda: guidance(learned)(*at))) == runs  # noqa: B023
    prediction = guidance(learned)(*at)
    np.testing.assert_allclose(prediction.x0, wanted)
    np.testing.assert_array_equal(prediction.variance, [3, 3])


@pytest.mark.parametrize("every", [1, 9])
def test_a_mean_shift_of_0_has_no_gradient(every, seen, parts):
  args = RING.denoiser, jax.random.key(0), (2,), jnp.array([2.0, 1.0, 0.0])
  for scale, count in ((0.0, 0), (1.0, 2 if every == 1 else 1)):
    solver = jg.DDPM(log_prob=parts[0], scale=jg.scales.static(scale), every=every)
    ran(seen, lambda: jg.sample(*args, solver, 1)[0])  # noqa: B023
    assert len(seen) == count


@pytest.mark.parametrize("scale", [np.nan, np.inf, "2", None])
def test_a_static_scale_is_a_finite_number(scale):
  with pytest.raises((ValueError, TypeError)):
    jg.scales.static(scale)
  with pytest.raises((ValueError, TypeError)):
    jg.scales.branching(scale)


# --- intervals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_outside_an_interval_the_network_runs_once_and_nothing_else(name, seen, parts, network):
  make, inside = KINDS[name][:2] if name in KINDS else MORE[name]
  guidance = make(*parts)(1.7) if name in KINDS else make(*parts)
  guided, xs = jg.interval(guidance, 0.5, 4.0)(network), jnp.stack([X, 2 * X, -X])
  draw = jax.jit(jax.vmap(lambda x, sigma: x0(guided(x, sigma, LABEL)), (0, None)))
  for level, runs in ((9.0, {"net": 1}), (2.0, inside), (0.4, {"net": 1})):
    assert ran(seen, lambda: draw(xs, level)) == {part: 3 * times for part, times in runs.items()}  # noqa: B023


def test_intervals_side_by_side_run_the_network_once_outside(seen, parts, network):
  log_prob, _, weak = parts
  free = jg.interval(jg.classifier_free(4, 2.0), 0.5, 4.0)
  by_classifier = jg.interval(jg.classifier(log_prob, 1.0, every=2), 1.0, 9.0)
  away = jg.interval(jg.autoguidance(weak, 2.0), 0.1, 3.0)
  # What runs at levels 20, 6, 2 and 0.3.
  one, asked, both = {"net": 1}, {"net": 1, "log_prob": 1}, {"net": 2, "log_prob": 1}
  for guidance, runs in (
    (jg.parallel(free, by_classifier, away), (one, asked, {**both, "weak": 1}, {"net": 1, "weak": 1})),
    (jg.normalized(free, 0.2), (one, one, {"net": 2}, one)),
    (jg.normalized(jg.parallel(free, by_classifier), 0.2), (one, asked, both, one)),
  ):
    guided = jax.jit(lambda sigma: x0(guidance(network)(X, sigma, LABEL)))  # noqa: B023
    for level, wanted in zip((20.0, 6.0, 2.0, 0.3), runs, strict=True):
      assert ran(seen, lambda: guided(level)) == wanted, level  # noqa: B023


def test_guidances_side_by_side_add_their_changes_with_a_prediction_that_is_shared(parts):
  at = X, jnp.asarray(0.8), LABEL
  free, away = jg.classifier_free(4, 2.0), jg.autoguidance(parts[2], 3.0)
  bare, changes = RING.denoiser(*at), [guidance(RING.denoiser)(*at) for guidance in (free, away)]
  np.testing.assert_allclose(jg.parallel(free, away)(RING.denoiser)(*at), sum(changes) - bare, rtol=1e-5)


def test_a_denoiser_that_knows_its_prediction_is_asked_elsewhere_too(seen, network):
  sigma = jnp.asarray(0.8)
  prediction, denoise = passes.evaluated(network, X, sigma, LABEL)
  assert ran(seen, lambda: denoise(X, sigma, LABEL)) == {}
  assert denoise(X, sigma, LABEL) is prediction
  for at in ((X + 1, sigma, LABEL), (X, sigma + 1, LABEL), (X, sigma, LABEL + 1)):
    np.testing.assert_array_equal(denoise(*at), RING.denoiser(*at))
  # Behind a gradient the input is another one.
  np.testing.assert_allclose(
    jax.jacfwd(lambda x: denoise(x, sigma, LABEL))(X), jax.jacfwd(lambda x: RING.denoiser(x, sigma, LABEL))(X)
  )
  assert dataclasses.is_dataclass(denoise)
