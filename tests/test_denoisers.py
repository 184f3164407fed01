"""Networks as denoisers and classifiers, and the conversions between predictions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import denoisers, scaling, schedules

EPS = scaling.eps(schedules.Cosine())


@pytest.fixture(scope="module")
def tiny():
  unet = jg.UNet(model_channels=32, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(), num_classes=3)
  shapes = jax.eval_shape(unet.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)), jnp.zeros(1), jnp.zeros(1, int))
  # Random values in place of the initial ones: blocks of a UNet end in zeros, so the output would not depend on inputs.
  rng = np.random.default_rng(0)
  return unet, jax.tree.map(lambda leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype), shapes)


# --- conversions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 80.0])
def test_conversions_are_those_of_the_papers_and_invertible(sigma, float64, relative_error):
  x0, eps = np.random.default_rng(0).normal(size=(2, 5))
  x = x0 + sigma * eps
  alpha = 1 / np.sqrt(1 + sigma**2)
  predictions = {
    "eps": eps,
    "score": -eps / sigma,
    "v": alpha * eps - sigma * alpha * x0,  # arXiv:2202.00512: alpha_t eps - sigma_t x
  }
  for name, value in predictions.items():
    scale = max(1, np.abs(value).max())
    converted = getattr(denoisers, f"x0_to_{name}")(jnp.asarray(x), jnp.asarray(x0), sigma)
    assert np.abs(converted - value).max() / scale < 1e-11, name
    assert relative_error(getattr(denoisers, f"{name}_to_x0")(jnp.asarray(x), jnp.asarray(value), sigma), x0) < 1e-12


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_score_of_a_gaussian(sigma, float64, relative_error):
  # For x0 ~ N(m, v): x ~ N(m, v + sigma²), and E[x0 | x] is the conditional mean of a joint Gaussian.
  m, v = 0.7, 0.3
  x = jnp.linspace(-3.0, 3.0, 7)
  posterior_mean = (m / v + x / sigma**2) / (1 / v + 1 / sigma**2)
  score = -(x - m) / (v + sigma**2)
  assert relative_error(denoisers.x0_to_score(x, posterior_mean, sigma), score) < 1e-12
  assert relative_error(denoisers.score_to_x0(x, score, sigma), posterior_mean) < 1e-12


# --- networks -------------------------------------------------------------------------------------


def test_the_network_receives_a_batch_of_one_with_its_condition():
  def apply(params, x, c_noise, cond):
    assert x.shape == (1, 2, 2, 3)
    assert c_noise.shape == (1,)
    assert cond["label"].shape == (1,)
    assert cond["text"].shape == (1, 5)
    return params["w"] * x + cond["label"].reshape(-1, 1, 1, 1)

  denoise = jg.NetworkDenoiser({"w": jnp.asarray(2.0)}, apply, scaling.x0(schedules.Cosine()))
  cond = {"label": jnp.asarray(3), "text": jnp.zeros(5)}
  x = jnp.ones((2, 2, 3))
  np.testing.assert_allclose(denoise(x, jnp.asarray(1.0), cond), np.full((2, 2, 3), 2 / np.sqrt(2) + 3), rtol=1e-6)


def test_vmap_is_the_network_on_a_batch(tiny):
  unet, params = tiny
  denoise = jg.NetworkDenoiser(params, unet.apply, EPS)
  x = jax.random.normal(jax.random.key(2), (3, 4, 4, 1))
  labels = jnp.array([0, 3, 2])
  sigma = jnp.asarray(0.8)
  got = jax.jit(jax.vmap(denoise, (0, None, 0)))(x, sigma, labels)
  alpha = 1 / np.sqrt(1 + 0.64)
  time = 1000 * schedules.Cosine().time(sigma)
  wanted = x - sigma * jax.jit(unet.apply)(params, alpha * x, jnp.full(3, time), labels)
  np.testing.assert_allclose(got, wanted, atol=2e-5)
  alone = jnp.stack([jax.jit(denoise)(x[i], sigma, labels[i]) for i in range(3)])
  np.testing.assert_allclose(got, alone, atol=2e-5)
  other = jax.jit(jax.vmap(denoise, (0, None, 0)))(x, sigma, (labels + 1) % 3)
  assert np.abs(got - other).max() > 1e-2


def test_learned_variance_is_dropped_by_default():
  def apply(params, x, c_noise, cond):
    return jnp.concatenate([0.1 * x, 100 + x], axis=-1)

  with_variance = jg.NetworkDenoiser(jnp.zeros(()), apply, EPS)
  without = jg.NetworkDenoiser(jnp.zeros(()), lambda p, x, t, y: 0.1 * x, EPS)
  x = jax.random.normal(jax.random.key(0), (2, 2, 3))
  np.testing.assert_array_equal(with_variance(x, jnp.asarray(2.0), None), without(x, jnp.asarray(2.0), None))


@pytest.mark.parametrize("shape", [(1, 2, 2, 1), (1, 2, 2, 9), (1, 2, 3, 3)])
def test_an_output_of_another_shape_is_refused(shape):
  denoise = jg.NetworkDenoiser(jnp.zeros(()), lambda p, x, t, y: jnp.zeros(shape), EPS)
  with pytest.raises(ValueError, match="the network gave shape"):
    denoise(jnp.ones((2, 2, 3)), jnp.asarray(1.0), None)


@pytest.mark.parametrize("sigma_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
def test_a_network_in_bfloat16_keeps_the_type_of_x(x_dtype, sigma_dtype):
  denoise = jg.NetworkDenoiser(jnp.ones(()), lambda p, x, t, y: (p.astype(x.dtype) * x).astype(jnp.bfloat16), EPS)
  x = jnp.ones((2, 2, 3), x_dtype)
  x0 = denoise(x, jnp.asarray(0.5, sigma_dtype), None)
  assert x0.dtype == x_dtype
  # Only the network's output is rounded to its type, the skip connection is not.
  np.testing.assert_allclose(
    x0.astype(np.float32), 1 - 0.5 * np.sqrt(0.8), atol=4e-3 if x_dtype == jnp.float32 else 2e-2
  )


def test_classifier_log_prob_is_a_log_softmax():
  weights = jax.random.normal(jax.random.key(0), (4, 5))

  def apply(params, x, c_noise):
    assert x.shape == (1, 4)
    return x @ params

  log_prob = jg.ClassifierLogProb(weights, apply, EPS)
  x, sigma = jnp.arange(4.0), jnp.asarray(1.0)
  logits = np.arange(4.0) / np.sqrt(2) @ np.asarray(weights)
  for label in range(5):
    wanted = logits[label] - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(log_prob(x, sigma, jnp.asarray(label)), wanted, rtol=1e-5)
  np.testing.assert_allclose(log_prob.logits(x, sigma), logits, rtol=1e-5)


# --- parameters and labels that do not fit --------------------------------------------------------


def changed(params, change):
  params = {"params": dict(params["params"])}
  change(params["params"])
  return params


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda p: p.pop("label_emb"), "label_emb.* is missing"),
    (lambda p: p.update(extra={"w": jnp.zeros(2)}), "extra/w is not a parameter"),
    (
      lambda p: p.update(label_emb={"embedding": jnp.zeros((9, 128))}),
      r"label_emb/embedding has shape \(9, 128\), exp",
    ),
  ],
)
def test_parameters_that_do_not_fit_are_named(tiny, change, message):
  unet, params = tiny
  denoise = jg.NetworkDenoiser(changed(params, change), unet.apply, EPS)
  with pytest.raises(ValueError, match=message):
    denoise(jnp.zeros((4, 4, 1)), jnp.asarray(1.0), jnp.asarray(0))


def test_parameters_without_their_outer_dictionary_are_refused(tiny):
  unet, params = tiny
  with pytest.raises(ValueError, match="do not fit UNet"):
    jg.NetworkDenoiser(params["params"], unet.apply, EPS)(jnp.zeros((4, 4, 1)), jnp.asarray(1.0), jnp.asarray(0))


def test_parameters_of_a_users_own_module_are_checked_too():
  class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, t, y):
      return nn.Dense(x.shape[-1])(x)

  good = Linear().init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1), None)
  x, sigma = jnp.zeros(2), jnp.asarray(1.0)
  assert jg.NetworkDenoiser(good, Linear().apply, EPS)(x, sigma, None).shape == (2,)
  bad = {"params": {"Dense_0": {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(3)}}}
  with pytest.raises(ValueError, match=r"Linear: params/Dense_0/bias has shape \(3,\), expected \(2,\)"):
    jg.NetworkDenoiser(bad, Linear().apply, EPS)(x, sigma, None)


@pytest.mark.parametrize("label", [-1, 4, 100])
def test_a_label_outside_the_classes_is_refused_before_the_network_runs(tiny, label):
  calls = []

  class Counting(jg.UNet):
    def __call__(self, *args, **kwargs):
      calls.append(1)
      return super().__call__(*args, **kwargs)

  _, params = tiny
  denoise = jg.NetworkDenoiser(params, Counting(model_channels=32, num_classes=3).apply, EPS)
  options = dict(shape=(4, 4, 1), sigmas=jg.karras(2), solver=jg.Euler())
  with pytest.raises(ValueError, match=f"label {label} is not one of the 3 classes"):
    jg.sample_batch(denoise, jax.random.key(0), label, num=2, **options)
  with pytest.raises(ValueError, match=f"label {label} is not one of the 3 classes"):
    jg.sample_batch(jg.classifier_free(3, 2.0)(denoise), jax.random.key(0), np.array([0, label]), **options)
  assert not calls


def test_the_null_class_is_a_label_if_the_network_has_one(tiny):
  unet, params = tiny
  denoisers.check_cond(jg.NetworkDenoiser(params, unet.apply, EPS), jnp.array([0, 3]))
  published = jg.NetworkDenoiser(params, unet.clone(null_class=False).apply, EPS)
  with pytest.raises(ValueError, match="label 3 is not one of the 3 classes"):
    denoisers.check_cond(published, jnp.array([0, 3]))


def test_a_condition_with_a_label_and_an_image():
  fields = {"model_channels": 8, "num_res_blocks": 1, "channel_mult": (1,), "attention_resolutions": ()}
  unet = jg.SuperResUNet(**fields, num_classes=3, null_class=False)
  x, low_res = jnp.ones((8, 8, 1)), jnp.ones((4, 4, 1))
  cond = {"label": jnp.asarray(2), "low_res": low_res}
  params = jax.jit(unet.init)(jax.random.key(0), x[None], jnp.zeros(1), jax.tree.map(lambda leaf: leaf[None], cond))
  denoise = jg.NetworkDenoiser(params, unet.apply, EPS)
  many = {"label": np.array([0, 2]), "low_res": np.zeros((2, 4, 4, 1), np.float32)}
  options = {"shape": x.shape, "sigmas": np.array([1.0, 0.0]), "solver": jg.Euler()}
  assert jg.sample_batch(denoise, jax.random.key(0), many, **options).shape == (2, 8, 8, 1)
  with pytest.raises(ValueError, match="label 3 is not one of the 3 classes"):
    jg.sample_batch(denoise, jax.random.key(0), {**many, "label": np.array([0, 3])}, **options)


def test_a_classifier_checks_labels_too():
  classifier = jg.Classifier(model_channels=32, out_channels=3, pool="adaptive")
  log_prob = jg.ClassifierLogProb({}, classifier.apply, EPS)
  guided = jg.classifier(log_prob, 1.0)(jg.ring(8).denoiser)
  with pytest.raises(ValueError, match="label 5 is not one of the 3 classes"):
    denoisers.check_cond(guided, 5)
  denoisers.check_cond(guided, 2)


class Scaled(nn.Module):
  """A network with a field that may be of any kind."""

  by: object

  @nn.compact
  def __call__(self, x, t, y=None):
    factor = self.param("factor", nn.initializers.ones, ())
    return factor * jnp.sum(jnp.asarray(jax.tree.leaves(self.by), x.dtype)) * x


@pytest.mark.parametrize(
  "field",
  [lambda a: {"a": a}, lambda a: [1, a], np.array, lambda a: jnp.full(2, a), lambda a: ([1], {"a": [a]})],
  ids=["dict", "list", "numpy", "jax", "nested"],
)
def test_modules_whose_fields_have_no_hash(field):
  def draw(value):
    module = Scaled(field(value))
    denoise = jg.NetworkDenoiser({"params": {"factor": jnp.ones(())}}, module.apply, jg.scaling.ve())
    return step(denoise)

  step = jax.jit(lambda denoise: denoise(jnp.ones(2), jnp.asarray(1.0)))
  first, other, again = draw(2.0), draw(3.0), draw(2.0)
  assert not np.array_equal(first, other)
  np.testing.assert_array_equal(first, again)
  assert step._cache_size() == 2
