"""Sample i depends on the key, i and its label alone, for every generator of the key and every size of i."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import keys, smc

RING = jg.ring(4)


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch):
  """Switch off the run-time type checks, which only the tests have."""
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


OPTIONS = dict(shape=(2,), sigmas=jg.karras(4, 0.05, 10.0), solver=jg.DDIM(1.0))
KINDS = ["rbg", "unsafe_rbg", "threefry2x32"]


@pytest.mark.parametrize("impl", KINDS)
def test_a_sample_does_not_depend_on_its_batch(impl):
  key, labels = jax.random.key(3, impl=impl), np.array([0, 1, 2, 3, 1])
  whole = jg.sample_batch(RING.denoiser, key, labels, **OPTIONS)
  assert len(np.unique(whole.round(4), axis=0)) == 5
  small = jg.sample_batch(RING.denoiser, key, labels, batch_size=2, devices=jax.devices()[:1], **OPTIONS)
  np.testing.assert_allclose(small, whole, atol=1e-5)
  last = jg.sample_batch(RING.denoiser, key, labels[3:], start=3, **OPTIONS)
  np.testing.assert_allclose(last, whole[3:], atol=1e-5)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_vmap_over_keys_of_other_generators_gives_the_same_as_a_loop(impl):
  several = jax.random.split(jax.random.key(3, impl=impl), 3)
  draw = jax.jit(lambda key: jg.sample(RING.denoiser, key, (2,), OPTIONS["sigmas"], OPTIONS["solver"], 1)[0])
  np.testing.assert_allclose(jax.vmap(draw)(several), jnp.stack([draw(key) for key in several]), atol=1e-5)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_particles_do_not_depend_on_their_number_with_keys_of_other_generators(impl):
  target = smc.tempered(RING.denoiser, 4, 1.0)
  starts = [
    smc.sample_product(target, jax.random.key(1, impl=impl), num, (2,), OPTIONS["sigmas"], jg.Euler(), 1)[0]
    for num in (3, 5)
  ]
  np.testing.assert_allclose(starts[0], starts[1][:3], atol=1e-4)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_every_word_of_a_key_counts(impl):
  data = jax.random.key_data(jax.random.key(5, impl=impl))
  words = set()
  for word in range(5):
    changed = data if word == 4 else data.at[word].add(np.uint32(1))
    words.add(tuple(jax.random.key_data(keys.threefry(jax.random.wrap_key_data(changed, impl=impl))).tolist()))
  assert len(words) == 5


def test_threefry_keys_stay_as_they_are():
  key = jax.random.key(7)
  for same in (keys.threefry(key), keys.threefry(jax.random.PRNGKey(7)), keys.threefry(np.array([0, 7], np.uint32))):
    np.testing.assert_array_equal(jax.random.key_data(same), jax.random.key_data(key))


@pytest.mark.parametrize("bad", [0, 3.0, None, "seed", np.zeros(3, np.uint32), np.zeros(2, np.int32), np.uint32(3)])
def test_values_that_are_not_keys_are_refused(bad):
  draws = (
    lambda: jg.sample_batch(RING.denoiser, bad, 1, num=2, **OPTIONS),
    lambda: jg.sample_keys(bad, 2),
    lambda: jg.sample(RING.denoiser, bad, (2,), OPTIONS["sigmas"], OPTIONS["solver"], 1),
  )
  for draw in draws:
    with pytest.raises(TypeError, match=r"key must be a random key.*jax\.random\.key"):
      draw()


def test_an_array_of_keys_is_refused():
  with pytest.raises(ValueError, match=r"one random key, got keys of shape \(3,\)"):
    jg.sample_batch(RING.denoiser, jax.random.split(jax.random.key(0), 3), 1, num=3, **OPTIONS)


def test_large_indices_are_not_truncated():
  key = jax.random.key(0)
  far = jg.sample_batch(RING.denoiser, key, 1, num=2, start=2**31 + 5, **OPTIONS)
  keys_far = jax.vmap(lambda i: jax.random.fold_in(key, i))(np.array([2**31 + 5, 2**31 + 6], np.uint32))
  wanted = [jg.sample(RING.denoiser, k, (2,), OPTIONS["sigmas"], OPTIONS["solver"], 1)[0] for k in keys_far]
  np.testing.assert_allclose(far, wanted, atol=1e-5)
  for start in (2**32, 2**32 - 1, 2**70):
    with pytest.raises(ValueError, match=r"start \+ num must be at most 4294967295"):
      jg.sample_batch(RING.denoiser, key, 1, num=1, start=start, **OPTIONS)
    with pytest.raises(ValueError, match=r"start \+ num"):
      jg.sample_keys(key, 1, start=start)
