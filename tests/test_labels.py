"""Labels of every whole type, and null labels that fit them or do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxguide as jg
from jaxguide.data import Images

WHOLE = [np.bool_, np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64]


def said_label(x, sigma, label):
  return jnp.zeros_like(x) + label.astype(jnp.float32)


def at(guided, cond):
  return guided(jnp.zeros(2), jnp.float32(1.0), cond).tolist()


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("null", [2, 127, 300, 70_000, np.int64(300), np.uint16(300), jnp.int32(300)], ids=repr)
def test_the_null_label_is_what_it_says(dtype, null):
  one = np.asarray(1, dtype)
  assert at(jg.classifier_free(null, 0.0)(said_label), one) == [float(null)] * 2
  assert at(jg.classifier_free(null, 1.0)(said_label), one) == [1.0, 1.0]
  composed = jg.compose(null, jnp.zeros(2))(said_label)
  assert at(composed, np.stack([one, one])) == [float(null)] * 2
  dropped = jg.losses.drop_cond(jax.random.key(0), np.ones(4, dtype), null, 1.0)
  assert dropped.tolist() == [int(null)] * 4


@pytest.mark.parametrize("dtype", [np.uint8, np.bool_, np.int8])
def test_a_null_label_that_is_not_known_yet_is_promoted(dtype):
  guided = jax.jit(lambda null, label: jg.classifier_free(null, 0.0)(said_label)(jnp.zeros(2), jnp.float32(1), label))
  assert guided(jnp.int32(300), np.asarray(1, dtype)).tolist() == [300.0, 300.0]
  assert guided(300, np.asarray(1, dtype)).tolist() == [300.0, 300.0]


@pytest.mark.parametrize(("dtype", "null"), [(np.uint32, -1), (np.int32, 2**40), (np.uint8, 2**40)])
def test_a_null_label_that_nothing_holds_is_refused(dtype, null):
  message = "does not fit cond's type"
  with pytest.raises(ValueError, match=message):
    at(jg.classifier_free(null, 0.0)(said_label), np.asarray(1, dtype))
  with pytest.raises(ValueError, match=message):
    jg.losses.drop_cond(jax.random.key(0), np.ones(4, dtype), null, 1.0)


def test_a_negative_null_label_meets_labels_without_a_sign():
  assert at(jg.classifier_free(-1, 0.0)(said_label), np.uint8(3)) == [-1.0, -1.0]


def test_a_sample_is_drawn_with_a_null_label_that_does_not_fit():
  network = Partial(lambda shift, x, sigma, label: shift + 0 * x + label.astype(x.dtype), jnp.zeros(2))
  made = jg.sample_batch(
    jg.classifier_free(300, 0.0)(network), jax.random.key(0), np.zeros(3, np.uint8), shape=(2,),
    sigmas=jg.karras(2), solver=jg.Euler(),
  )  # fmt: skip
  np.testing.assert_allclose(made, 300.0)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], (0, 1, 1, 0), *(np.array([0, 1, 1, 0], t) for t in WHOLE[1:])])
def test_images_take_labels_of_any_whole_type(labels):
  images = Images(np.zeros((4, 8, 8, 1), np.uint8), labels, 2, "mine")
  assert images.labels.dtype == np.int32
  assert images.labels.tolist() == [0, 1, 1, 0]


def test_images_may_be_a_list():
  images = Images([np.zeros((8, 8, 1), np.uint8)] * 2, [1, 0], 2, "mine")
  assert images.images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
  "labels", [[0.0, 1.0], ["a", "b"], [0], [[0, 1]], [True, False], [0, 2], [0, -1], [0, 2**32], None]
)
def test_images_refuse_what_is_no_label(labels):
  with pytest.raises((ValueError, TypeError), match="label"):
    Images(np.zeros((2, 8, 8, 1), np.uint8), labels, 2, "mine")
