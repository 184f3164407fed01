"""Networks of NNX, Equinox, Haiku and plain functions: their own numbers, guided, trained and stored."""

import dataclasses
import functools

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import own
import pytest
from flax import nnx
from jax._src.core import ClosedJaxpr

import jaxguide as jg
from jaxguide import data, training
from jaxguide._core.promotion import standard
from jaxguide.denoisers.frameworks import linen_class
from jaxguide.models import load, save
from jaxguide.training import ModelConfig, TrainingConfig

SCALING = jg.scaling.edm(0.7)
GRID = np.array([2.0, 0.5, 0.0], np.float32)
FRAMEWORKS = ("nnx", "equinox", "haiku", "plain")
CLASSES = {
  "nnx": (own.NnxNet, own.NnxClassifier),
  "equinox": (own.EqxNet, own.EqxClassifier),
  "haiku": (own.HaikuNet, own.HaikuClassifier),
  "plain": (own.PlainNet, own.PlainClassifier),
}
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, *own.SHAPE)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 3])


@functools.cache
def made(framework, role, seed=0):
  """The function that guidance uses, and the network as its framework calls it, on a batch in evaluation."""
  cls, key = CLASSES[framework][role == "classifier"], jax.random.key(seed)
  inputs = own.batch()[: 3 - (role == "classifier")]
  if framework == "nnx":
    model = cls(rngs=nnx.Rngs(seed))
    still = nnx.merge(*nnx.split(model))
    still.eval()
    return jg.from_nnx(model, SCALING), still
  if framework == "equinox":
    model = cls(key=key)
    return jg.from_equinox(model, SCALING), jax.vmap(eqx.nn.inference_mode(model))
  if framework == "haiku":

    def classify(x, t, is_training):
      return cls()(x, t, is_training)

    def predict(x, t, cond, is_training, perturbation=None):
      return cls()(x, t, cond, is_training, perturbation)

    network = hk.transform(predict if role == "denoiser" else classify)
    with standard():
      params = network.init(key, *inputs, is_training=True)
    how = {"role": role, "perturbable": getattr(cls, "perturbable", None)}
    options = {} if role == "denoiser" else {"is_training": False}
    native = functools.partial(network.apply, params, None, is_training=False)
    return jg.from_haiku(network, params, SCALING, **how, **options), native
  network = cls()
  params = network.init(key, *inputs)
  maker = jg.NetworkDenoiser if role == "denoiser" else jg.ClassifierLogProb
  return maker(params, network.apply, SCALING), functools.partial(network.apply, params)


@pytest.fixture(scope="module", params=FRAMEWORKS)
def framework(request):
  return request.param


@jax.jit
def called(function, *args):
  """Call a denoiser or a classifier in one program, for otherwise each of its operations is compiled."""
  return function(*args)


def weights(function):
  return function.params.get("params", function.params)


# --- the numbers are the network's own ------------------------------------------------------------


def test_a_denoiser_has_the_numbers_of_its_network(framework):
  denoise, native = made(framework, "denoiser")
  sigma = jnp.asarray(1.3)
  # Karras et al. (2022), table 1, with s = 0.7.
  s, sg = 0.7, 1.3
  root = np.sqrt(s**2 + sg**2)
  with standard():
    given = X / np.float32(root), np.full(4, np.log(sg) / 4, np.float32), LABELS
    output = jax.jit(native)(*given)
  wanted = s**2 / root**2 * np.asarray(X) + sg * s / root * np.asarray(output)
  batch = jax.jit(jax.vmap(denoise, (0, None, 0)))
  got, null = np.asarray(batch(X, sigma, LABELS)), np.asarray(batch(X, sigma, jnp.full(4, own.CLASSES)))
  np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)
  guided = jax.jit(jax.vmap(jg.classifier_free(own.CLASSES, 3.0)(denoise), (0, None, 0)))(X, sigma, LABELS)
  np.testing.assert_allclose(guided, null + 3 * (got - null), rtol=1e-4, atol=1e-5)


def test_a_classifier_has_the_numbers_of_its_network_and_guides_a_denoiser_of_another_framework(framework):
  log_prob, native = made(framework, "classifier")
  sigma = 1.3
  c_in, t = np.float32(1 / np.sqrt(0.49 + sigma**2)), np.full(1, np.log(sigma) / 4, np.float32)

  def by_hand(x, label):
    with standard():
      return jax.nn.log_softmax(native(c_in * x[None], t)[0])[label]

  x, at, label = X[0], jnp.asarray(sigma), jnp.asarray(1)
  value, gradient = jax.jit(jax.value_and_grad(by_hand))(x, label)
  np.testing.assert_allclose(called(log_prob, x, at, label), value, rtol=1e-5)
  other = FRAMEWORKS[(FRAMEWORKS.index(framework) + 1) % len(FRAMEWORKS)]
  denoise = made(other, "denoiser")[0]
  guided = called(jg.classifier(log_prob, 2.0)(denoise), x, at, label)
  wanted = np.asarray(called(denoise, x, at, label)) + 2 * sigma**2 * np.asarray(gradient)
  np.testing.assert_allclose(guided, wanted, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_used_as_they_are():
  """In NNX, Equinox and Haiku with running averages that are not the initial ones."""
  mean, var = np.float32(0.3) * np.arange(own.WIDTH, dtype=np.float32), np.full(own.WIDTH, 2.5, np.float32)
  model = own.NnxClassifier(norm=True, rngs=nnx.Rngs(0))
  model.norm.mean[...], model.norm.var[...] = jnp.asarray(mean), jnp.asarray(var)
  log_prob = jg.from_nnx(model, SCALING)

  def logits(first, last, norm_eps=1e-5):
    hidden = (np.asarray(X[0]).ravel() * c_in) @ first[0] + first[1] + np.log(1.3) / 4
    hidden = (hidden - mean) / np.sqrt(var + norm_eps)
    return hidden / (1 + np.exp(-hidden)) @ last[0] + last[1]

  c_in, sigma = 1 / np.sqrt(0.49 + 1.3**2), jnp.asarray(1.3)
  pair = [(np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])) for layer in (model.first, model.last)]
  np.testing.assert_allclose(log_prob.logits(X[0], sigma), logits(*pair), rtol=1e-4, atol=1e-5)
  chex.assert_trees_all_equal(log_prob.params["batch_stats"]["norm"]["mean"], mean)

  model, state = eqx.nn.make_with_state(own.EqxClassifier)(norm=True, key=jax.random.key(0))
  index = model.norm.batch_state_index
  state = state.set(index, (jnp.asarray(mean), jnp.asarray(var)))
  log_prob = jg.from_equinox(model, SCALING, state=state)
  pair = [(np.asarray(layer.weight).T, np.asarray(layer.bias)) for layer in (model.first, model.last)]
  np.testing.assert_allclose(log_prob.logits(X[0], sigma), logits(*pair), rtol=1e-4, atol=1e-5)

  def classify(x, t, is_training):
    return own.HaikuClassifier(norm=True)(x, t, is_training)

  network = hk.transform_with_state(classify)
  with standard():
    params, state = network.init(jax.random.key(0), *own.batch()[:2], True)
  state = jax.tree.map(jnp.zeros_like, state)
  root = "haiku_classifier/batch_norm/~/"
  state = {
    root + "mean_ema": {**state[root + "mean_ema"], "average": jnp.asarray(mean)[None]},
    root + "var_ema": {**state[root + "var_ema"], "average": jnp.asarray(var)[None]},
  }
  log_prob = jg.from_haiku(network, params, SCALING, state=state, role="classifier")
  pair = [tuple(map(np.asarray, params[f"haiku_classifier/{name}"].values())) for name in ("linear", "linear_1")]
  pair = [tuple(sorted(layer, key=np.ndim, reverse=True)) for layer in pair]
  np.testing.assert_allclose(log_prob.logits(X[0], sigma), logits(*pair), rtol=1e-4, atol=1e-5)
  # In training they would change: that is refused.
  with pytest.raises(ValueError, match="the Haiku network changes its state in evaluation"):
    jg.from_haiku(network, params, SCALING, state=state, role="classifier", is_training=True).logits(X[0], sigma)


def test_the_model_that_is_given_does_not_change():
  model = own.NnxNet(rngs=nnx.Rngs(0))
  before = jax.tree.leaves(nnx.state(model, nnx.Param))
  jg.from_nnx(model, SCALING)(X[0], jnp.asarray(1.0), jnp.asarray(1))
  assert not model.dropout.deterministic
  assert int(model.dropout.rngs.count[...]) == 0
  chex.assert_trees_all_equal(jax.tree.leaves(nnx.state(model, nnx.Param)), before)


# --- parameters are leaves ------------------------------------------------------------------------


def constants(closed):
  yield from (np.size(const) for const in closed.consts)
  for equation in closed.jaxpr.eqns:
    for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, ClosedJaxpr)):
      if isinstance(value, ClosedJaxpr):
        yield from constants(value)


def test_a_sweep_is_one_trace_without_constants(framework):
  """Of networks, scales and labels. The gradient flows to each parameter."""
  traced, (denoise, _), (log_prob, _) = [], made(framework, "denoiser"), made(framework, "classifier")

  @jax.jit
  def draw(denoise, log_prob, scale, label, sigmas, key):
    traced.append(1)
    guided = jg.chain(jg.classifier_free(own.CLASSES, scale), jg.classifier(log_prob, scale))(denoise)
    return jg.sample(guided, key, own.SHAPE, sigmas, jg.Euler(), label)[0]

  results = []
  for seed, scale, label in ((0, 1.0, 0), (1, 2.0, 1)):
    pair = made(framework, "denoiser", seed)[0], made(framework, "classifier", seed)[0]
    # Haiku's and plain functions are made anew in this test: two of them are two programs.
    pair = [dataclasses.replace(one, params=two.params) for one, two in zip((denoise, log_prob), pair, strict=True)]
    if framework in ("nnx", "equinox"):
      pair = made(framework, "denoiser", seed)[0], made(framework, "classifier", seed)[0]
    args = (*pair, jnp.asarray(scale), jnp.asarray(label), jg.karras(3, 0.02, 10.0 + seed), jax.random.key(0))
    program = draw.trace(*args)
    results.append(draw(*args))
  assert len(traced) == 1
  assert all(size <= 1 for size in constants(program.jaxpr))
  assert np.abs(results[0] - results[1]).max() > 1e-3

  def loss(params, function):
    return jnp.square(dataclasses.replace(function, params=params)(X[0], jnp.asarray(1.0), jnp.asarray(1))).sum()

  for function in (denoise, log_prob):
    gradient = jax.jit(jax.grad(loss))(function.params, function)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_samples_of_a_batch_are_those_of_one(framework):
  denoise, _ = made(framework, "denoiser")
  guided = jg.classifier_free(own.CLASSES, 2.0)(denoise)
  key, options = jax.random.key(3), {"sigmas": GRID, "solver": jg.Heun()}
  many = jg.sample_batch(guided, key, cond=np.array([0, 1, 2]), shape=own.SHAPE, **options)
  walk = jax.jit(lambda guided, key: jg.sample(guided, key, own.SHAPE, GRID, jg.Heun(), jnp.asarray(1))[0])
  one = walk(guided, jg.sample_keys(key, 3)[1])
  np.testing.assert_allclose(many[1], one, atol=1e-5)
  if framework in ("nnx", "equinox"):
    with pytest.raises(ValueError, match="label 7 is not one of the 3 classes"):
      jg.sample_batch(guided, key, cond=7, num=1, shape=own.SHAPE, **options)


# --- layouts --------------------------------------------------------------------------------------


class Conv(eqx.Module):
  """Equinox's convolution: one example, channels first."""

  conv: eqx.nn.Conv2d

  def __call__(self, x, t):
    """Predict."""
    return self.conv(x) + t


def test_channels_first_on_one_example_is_channels_last_on_a_batch():
  model, sigma = Conv(eqx.nn.Conv2d(2, 4, 3, padding=1, key=jax.random.key(0))), jnp.asarray(0.5)
  x = jnp.asarray(RNG.normal(size=(3, 4, 5, 2)), jnp.float32)
  first = jg.from_equinox(model, SCALING, channels_first=True, learned_variance=True)

  class Last(nnx.Module):
    def __init__(self):
      self.conv = nnx.Conv(2, 4, (3, 3), padding=1, rngs=nnx.Rngs(0))
      self.conv.kernel[...] = model.conv.weight.transpose(2, 3, 1, 0)
      self.conv.bias[...] = model.conv.bias.ravel()

    def __call__(self, x, t):
      return self.conv(x) + t.reshape(-1, 1, 1, 1)

  last = jg.from_nnx(Last(), SCALING, learned_variance=True)
  got, wanted = (jax.jit(jax.vmap(one, (0, None)))(x, sigma) for one in (first, last))
  chex.assert_trees_all_close(got, wanted, atol=1e-5)
  batched = jg.from_equinox(Batched(model), SCALING, batched=True, channels_first=True, learned_variance=True)
  chex.assert_trees_all_close(jax.vmap(batched, (0, None))(x, sigma), wanted, atol=1e-5)
  with pytest.raises(ValueError, match=r"Conv must give shape .* channels last, got .*channels_first=False"):
    jg.from_equinox(Same(), SCALING)(x[0], sigma)
  with pytest.raises(ValueError, match="takes no condition, and got one"):
    first(x[0], sigma, jnp.asarray(1))


class Batched(eqx.Module):
  """One example's network as one of a batch."""

  model: Conv

  def __call__(self, x, t):
    """Predict."""
    return jax.vmap(self.model)(x, t)


class Same(eqx.Module):
  """A network whose output has another shape."""

  def __call__(self, x, t):
    """Predict."""
    return x.transpose(2, 0, 1)


Same.__name__ = "Conv"


# --- perturbations --------------------------------------------------------------------------------


def test_networks_that_say_their_blocks_are_perturbed(framework):
  denoise, _ = made(framework, "denoiser")
  if framework == "plain":
    apply = functools.partial(denoise.apply)
    apply.perturbable = own.PlainNet.perturbable
    denoise = dataclasses.replace(denoise, apply=apply)
  perturbation = jg.Perturbation("skip", ["middle"])
  weak = jg.perturbed(denoise, perturbation)
  chex.assert_trees_all_equal(weak, jg.perturbed(weak, perturbation))  # One program, and the last one counts.
  sigma, label = jnp.asarray(1.0), jnp.asarray(1)
  got, good = (np.asarray(called(function, X[0], sigma, label)) for function in (weak, denoise))
  # A middle layer of zeros does nothing, as if it were skipped.
  zero = jax.tree_util.tree_map_with_path(
    lambda path, leaf: np.zeros_like(leaf) if "middle" in str(path) else leaf, denoise.params
  )
  without = called(dataclasses.replace(denoise, params=zero), X[0], sigma, label)
  np.testing.assert_allclose(got, without, atol=1e-6)
  assert np.abs(got - good).max() > 1e-3
  guided = called(jg.autoguidance(weak, 3.0)(denoise), X[0], sigma, label)
  np.testing.assert_allclose(guided, got + 3 * (good - got), atol=1e-5)
  with pytest.raises(ValueError, match=r"block for 'skip' .*midle"):
    jg.perturbed(denoise, jg.Perturbation("skip", ["midle"]))
  with pytest.raises(ValueError, match=r"perturbation of this network .*identity"):
    jg.perturbed(denoise, jg.Perturbation("identity", ["middle"]))


def test_networks_that_say_no_blocks_are_not_perturbed():
  denoise = jg.from_equinox(Conv(eqx.nn.Conv2d(2, 2, 1, key=jax.random.key(0))), SCALING)
  with pytest.raises(ValueError, match="Conv does not say which blocks can be perturbed: give it the attribute"):
    jg.perturbed(denoise, jg.Perturbation("skip", ["middle"]))


# --- training -------------------------------------------------------------------------------------


MEANS = RNG.integers(40, 216, (2, *own.SHAPE))
IMAGES = data.Images(np.stack([MEANS[i % 2] for i in range(32)]).astype(np.uint8), np.arange(32) % 2, 2, "two pictures")
HOW = TrainingConfig(steps=20, batch_size=15, learning_rate=0.02, ema_decay=0.5)  # 15 examples run on one device.


@pytest.mark.parametrize("role", ["denoiser", "classifier"])
def test_a_class_is_trained_saved_and_loaded(framework, role, tmp_path):
  cls = CLASSES[framework][role == "classifier"]
  config, losses = ModelConfig(cls, {"width": 12}, own.SHAPE, 2, prediction="edm"), []
  assert config.network == f"own:{cls.__qualname__}"
  assert config == ModelConfig(config.network, {"width": 12}, own.SHAPE, 2, prediction="edm")
  how = HOW if role == "denoiser" else dataclasses.replace(HOW, noise_mean=-2.0)

  def watch(step, state, metrics):
    losses.append(float(metrics["loss"]))

  run = training.RunConfig(sample_every=0)
  model = training.fit(config, how, IMAGES, tmp_path / "run", run=run, callback=watch, progress=False)
  assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
  loaded = load(tmp_path / "run")
  assert loaded.config == config
  save(tmp_path / "saved", loaded)
  again = load(tmp_path / "saved")
  chex.assert_trees_all_equal(again.params, model.params)
  if role == "classifier":
    ours, theirs = (called(one.log_prob, X[0], jnp.asarray(0.5), jnp.asarray(1)) for one in (again, model))
    assert ours == theirs
    return
  images = [
    jg.sample_batch(
      jg.classifier_free(one.null_cond, 2.0)(one.denoiser),
      jax.random.key(0),
      cond=1,
      num=2,
      shape=own.SHAPE,
      sigmas=GRID,
      solver=jg.Euler(),
      devices=jax.devices()[:1],
    )
    for one in (model, again)
  ]
  np.testing.assert_array_equal(*images)


def test_dropout_is_on_in_training_alone(framework):
  if framework == "plain":
    return
  module = linen_class(CLASSES[framework][0])(num_classes=own.CLASSES)
  params = jax.jit(module.init)(jax.random.key(0), *own.batch())

  @functools.partial(jax.jit, static_argnames="train")
  def run(rngs, train=False):
    return module.apply(params, X, np.ones(4, np.float32), LABELS, rngs=rngs, **({"train": True} if train else {}))

  first, again, other = (np.asarray(run({"dropout": jax.random.key(seed)}, True)) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 1e-3
  np.testing.assert_array_equal(run({}), run({"dropout": jax.random.key(1)}))


def test_the_parameters_of_an_object_are_those_of_its_class(framework, tmp_path):
  """So a model in a folder can be made of them, and a training can begin with them."""
  if framework in ("haiku", "plain"):
    return
  denoise, _ = made(framework, "denoiser")
  config = ModelConfig(CLASSES[framework][0], {}, own.SHAPE, own.CLASSES, prediction="edm", sigma_data=0.7)
  save(tmp_path / "model", training.Model(config, denoise.params))
  at = X[0], jnp.asarray(1.0), jnp.asarray(2)
  np.testing.assert_allclose(called(load(tmp_path / "model").denoiser, *at), called(denoise, *at), atol=1e-6)


@pytest.mark.parametrize("framework", ["nnx", "equinox", "haiku"])
def test_batch_statistics_are_refused_in_training(framework, tmp_path):
  config = ModelConfig(CLASSES[framework][1], {"norm": True}, own.SHAPE, 2)
  with pytest.raises(ValueError, match=r"batch statistics|changes its state"):
    training.fit(config, HOW, IMAGES, tmp_path, progress=False)


# --- errors ---------------------------------------------------------------------------------------


class Mute(nnx.Module):
  """No network."""


class Needy(nnx.Module):
  """A network with one argument too many."""

  def __call__(self, x, t, cond, text):
    """Predict."""
    return x


class Noisy(nnx.Module):
  """A network that draws in evaluation."""

  def __init__(self, kind):
    self.kind, self.rngs, self.calls = kind, nnx.Rngs(0), nnx.Variable(jnp.zeros(()))

  def __call__(self, x, t, cond=None):
    """Predict."""
    if self.kind == "random":
      return x + jax.random.normal(self.rngs(), x.shape)
    if self.kind == "counting":
      self.calls[...] += 1
    return (x, t) if self.kind == "two" else x


def test_networks_that_cannot_be_used_are_refused_where_they_are_made():
  params = {"linear": {"w": jnp.zeros(2)}}
  transformed = hk.transform(lambda x, t, cond: x)
  for make, message in (
    (lambda: jg.from_nnx(Mute(), SCALING), "Mute has no __call__: define"),
    (lambda: jg.from_nnx(Needy(), SCALING), r"Needy must be callable as network\(x, t, cond\), and its call takes"),
    (lambda: jg.from_nnx(own.NnxNet, SCALING), "from_nnx takes .*got the class NnxNet: give an object of it"),
    (lambda: jg.from_nnx(own.LinenNet(), SCALING), "the linen module LinenNet: give jaxguide.NetworkDenoiser"),
    (lambda: jg.from_equinox(own.NnxNet(rngs=nnx.Rngs(0)), SCALING), "from_equinox takes .*got NnxNet"),
    (lambda: jg.from_haiku(lambda x: x, params, SCALING), "from_haiku takes what haiku.transform returns"),
    (lambda: jg.from_haiku(transformed, params, SCALING, state={}), "has no state: leave it out"),
    (lambda: jg.from_haiku(transformed, params, SCALING, role="clasifier"), "role .*clasifier.*classifier"),
    (lambda: jg.from_haiku(transformed, params, SCALING, noise_range=(0.1, 1.0)), "noise_range is for a classifier"),
    (lambda: jg.from_haiku(transformed, params, SCALING, perturbable={}), "its call takes no `perturbation`"),
    (
      lambda: jg.from_equinox(own.EqxClassifier(norm=True, key=jax.random.key(0)), SCALING),
      "layers with a state: make it by equinox.nn.make_with_state",
    ),
    (lambda: ModelConfig(own.NnxNet(rngs=nnx.Rngs(0)), {}, own.SHAPE, 2), "a configuration needs the class"),
    (
      lambda: jg.NetworkDenoiser({}, own.NnxNet(rngs=nnx.Rngs(0)), SCALING),
      r"got NnxNet with its parameters, which would be constants .* give jaxguide.from_nnx\(model, scaling\)",
    ),
    (lambda: jg.ClassifierLogProb({}, own.EqxClassifier(key=jax.random.key(0)), SCALING), "give jaxguide.from_equinox"),
    (lambda: ModelConfig(Mute, {}, own.SHAPE, 2), "Mute has no __call__"),
  ):
    with pytest.raises((TypeError, ValueError), match=message):
      make()


class Numbers(nnx.Module):
  """A network whose variables hold Python's numbers, or another value."""

  def __init__(self, other=None):
    self.scale, self.power, self.other = nnx.Param(2.0), nnx.Variable(3), nnx.Variable(other)

  def __call__(self, x, t, cond=None):
    """Scale the input."""
    return self.scale[...] * x ** self.power[...]


def test_numbers_in_variables_are_arrays():
  denoise = jg.from_nnx(Numbers(), SCALING)
  assert denoise.params["params"]["scale"].shape == ()
  assert denoise.params["state"]["power"].dtype == jnp.int32
  np.testing.assert_allclose(denoise.apply(denoise.params, X, jnp.ones(4)), 2 * X**3, rtol=1e-5)
  with pytest.raises(TypeError, match=r"the variable other holds a str, and an nnx\.Variable must hold arrays"):
    jg.from_nnx(Numbers("text"), SCALING)


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    ("random", "Noisy draws random numbers .* outside of training"),
    ("counting", "Noisy changes its state calls in evaluation"),
    ("two", "Noisy must return one array, got tuple"),
  ],
)
def test_networks_that_are_no_functions_are_refused_when_they_are_called(kind, message):
  with pytest.raises((TypeError, ValueError), match=message):
    jg.from_nnx(Noisy(kind), SCALING)(X[0], jnp.asarray(1.0))


def test_a_haiku_network_that_draws_is_refused_and_an_error_inside_says_how_it_was_called():
  network = hk.transform(lambda x, t, cond: hk.dropout(hk.next_rng_key(), 0.5, x))
  with pytest.raises(ValueError, match="the Haiku network draws random numbers outside of training"):
    jg.from_haiku(network, {}, SCALING)(X[0], jnp.asarray(1.0))
  model = own.EqxNet(key=jax.random.key(0))
  with pytest.raises(Exception, match=r".") as caught:
    jg.from_equinox(model, SCALING, batched=True)(X[0], jnp.asarray(1.0), jnp.asarray(1))
  assert any("EqxNet was called here" in note and "batched=False" in note for note in caught.value.__notes__)
