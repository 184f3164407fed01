"""Parameters that are converted once before a walk."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxguide as jg
from jaxguide import schedules
from jaxguide.denoisers import scaling
from jaxguide.nn import Classifier, UNet
from jaxguide.sampling import casts

SMALL = {"model_channels": 16, "channel_mult": (1,), "num_res_blocks": 1, "num_head_channels": 16}
SMALL["attention_resolutions"] = (1,)


@functools.cache
def guided(dtype):
  """Classifier-free guidance of a UNet, with a classifier."""
  key, rng = jax.random.key(0), np.random.default_rng(0)
  x, t, label = np.zeros((1, 8, 8, 1), np.float32), np.zeros(1, np.float32), np.zeros(1, np.int32)
  parts = []
  for module in (UNet(**SMALL, num_classes=3, dtype=dtype), Classifier(**SMALL, out_channels=3, dtype=dtype)):
    label_or_none = (label,) if isinstance(module, UNet) else ()
    shapes = jax.eval_shape(module.init, key, x, t, *label_or_none)
    params = jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    parts.append((params, module.apply, scaling.eps(schedules.Cosine())))
  unet, classifier = jg.NetworkDenoiser(*parts[0]), jg.ClassifierLogProb(*parts[1])
  return jg.chain(jg.classifier_free(3, 2.0), jg.classifier(classifier, 0.5))(unet)


def draw(denoise):
  return jg.sample(denoise, jax.random.key(1), (8, 8, 1), jg.karras(3), jg.DDIM(), 1)[0]


def conversions(jaxpr, inside=False):
  """Count the numbers that are converted to half precision inside loops, of arrays like kernels."""
  total = 0
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    if inside and name == "convert_element_type" and equation.params["new_dtype"] == jnp.bfloat16:
      shape = equation.invars[0].aval.shape
      total += int(np.prod(shape)) if len(shape) in (2, 4) and shape[0] == 3 else 0
    for value in equation.params.values():
      for each in value if isinstance(value, tuple | list) else (value,):
        body = getattr(each, "jaxpr", each)
        if hasattr(body, "eqns"):
          total += conversions(body, inside or name == "scan")
  return total


def test_parameters_are_converted_before_the_walk_and_samples_are_the_same_to_the_bit(monkeypatch):
  denoise = guided("bfloat16")
  ours = jax.jit(lambda denoise: draw(denoise)).trace(denoise)  # noqa: PLW0108 (a new function is traced again)
  assert conversions(ours.jaxpr.jaxpr) == 0
  monkeypatch.setattr(casts, "ahead", lambda denoise, function: denoise)
  theirs = jax.jit(lambda denoise: draw(denoise)).trace(denoise)  # noqa: PLW0108
  assert conversions(theirs.jaxpr.jaxpr) > 1000
  np.testing.assert_array_equal(*(traced.lower().compile()(denoise) for traced in (ours, theirs)))


def test_what_is_used_in_float32_stays():
  denoise = guided("bfloat16")
  step = lambda denoise: denoise(jnp.zeros((8, 8, 1)), jnp.asarray(1.0), 1)  # noqa: E731
  converted = jax.eval_shape(lambda denoise: casts.ahead(denoise, step), denoise)
  types = {
    "/".join(str(getattr(key, "key", key)) for key in path[-2:]): leaf.dtype
    for path, leaf in jax.tree_util.tree_leaves_with_path(converted)
    if hasattr(leaf, "dtype")
  }
  assert types["in_layers_2/kernel"] == types["qkv/kernel"] == types["proj_out/bias"] == jnp.bfloat16
  assert types["in_layers_0/scale"] == types["out_layers_0/bias"] == types["time_embed_0/kernel"] == jnp.float32
  assert types["out_2/kernel"] == jnp.float32


def test_networks_in_float32_are_not_traced():
  denoise = guided("float32")

  def never(denoise):
    pytest.fail("it was traced")

  assert casts.ahead(denoise, never) is denoise


class Twice(nn.Module):
  """A network that uses one parameter in both types, and one in half precision alone."""

  dtype: str = "bfloat16"

  @nn.compact
  def __call__(self, x, t, label=None):
    both, half = (self.param(name, nn.initializers.ones, (1, 1), jnp.float32) for name in ("both", "half"))
    return x * (both * 1.5 + (both.astype(self.dtype) * half.astype(self.dtype)).astype(jnp.float32))


def test_of_two_parameters_the_one_that_is_used_in_two_types_stays():
  module = Twice()
  params = module.init(jax.random.key(0), jnp.ones((1, 2)), jnp.ones(1))
  denoise = jg.NetworkDenoiser(params, module.apply, scaling.eps(schedules.Cosine()))
  converted = casts.ahead(denoise, lambda denoise: denoise(jnp.ones(2), jnp.asarray(1.0), None)).params["params"]
  assert {name: str(leaf.dtype) for name, leaf in converted.items()} == {"both": "float32", "half": "bfloat16"}


def test_types_of_a_parameter():
  def apply(params, x, t, cond):
    half = params["both"].astype(jnp.bfloat16) + params["half"].reshape(1, 1).astype(jnp.bfloat16)
    inner = jax.lax.cond(
      t[0] > 0, lambda a: a.astype(jnp.bfloat16), lambda a: -a.astype(jnp.bfloat16), params["branch"]
    )
    return x * (half.astype(jnp.float32) + params["both"] + inner.astype(jnp.float32))

  def used(params):
    return apply(params, jnp.ones((1, 2)), jnp.ones(1), None)

  params = {name: jnp.asarray(1.5, jnp.float32) for name in ("both", "half", "branch")}
  leaves, treedef = jax.tree.flatten(params)
  jaxpr = jax.make_jaxpr(lambda *leaves: used(treedef.unflatten(leaves)))(*leaves).jaxpr
  kinds = {name: set(casts._types(jaxpr, var)) for name, var in zip(sorted(params), jaxpr.invars, strict=True)}
  assert kinds == {
    "both": {jnp.dtype(jnp.bfloat16), None},
    "half": {jnp.dtype(jnp.bfloat16)},
    "branch": {jnp.dtype(jnp.bfloat16)},
  }
