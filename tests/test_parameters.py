import re

import jax
import jax.numpy as jnp
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from jaxguide import nn
from jaxguide.denoisers.linen import param_shapes
from jaxguide.nn.layers import Conv

CASES = {
  "UNet": (nn.UNet(8, num_res_blocks=1, channel_mult=(1,), attention_resolutions=(1,)), (4, 4, 1)),
  "Classifier": (nn.Classifier(8, num_res_blocks=1, channel_mult=(1,), num_head_channels=8), (4, 4, 1)),
  "DiT": (nn.DiT(patch_size=2, hidden_size=8, depth=1, num_heads=2, num_classes=None), (4, 4, 1)),
  "SongUNet": (nn.SongUNet(model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=(4,)), (4, 4, 1)),
  "EDM2UNet": (nn.EDM2UNet(model_channels=64, channel_mult=(1,), num_blocks=1, attn_resolutions=(4,)), (4, 4, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_shapes_are_those_of_init(name):
  module, shape = CASES[name]
  inputs = jnp.zeros((1, *shape)), jnp.zeros(1)
  plain = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  assert param_shapes(module, *inputs) == plain


def not_traced(*args):
  raise AssertionError("the initialiser is traced")


def test_no_initialiser_is_traced_for_shapes_alone():
  x = jnp.zeros((1, 4, 4, 2))
  param_shapes(Conv(3, kernel_init=not_traced), x)
  with pytest.raises(AssertionError, match="traced"):
    Conv(3, kernel_init=not_traced).init(jax.random.key(0), x)


def test_no_initialiser_is_traced_where_the_parameter_exists():
  x = jnp.zeros((1, 4, 4, 2))
  params = Conv(3).init(jax.random.key(0), x)
  Conv(3, kernel_init=not_traced).apply(params, x)


def test_a_parameter_that_does_not_fit_is_refused():
  x = jnp.zeros((1, 4, 4, 2))
  params = Conv(3).init(jax.random.key(0), x)
  wrong = {"params": {**params["params"], "kernel": jnp.zeros((3, 3, 2, 4))}}
  with pytest.raises(ScopeParamShapeError, match=re.escape("(3, 3, 2, 4)")):
    Conv(3).apply(wrong, x)
  with pytest.raises(ScopeParamNotFoundError, match="kernel"):
    Conv(3).apply({"params": {"bias": jnp.zeros(3)}}, x)
