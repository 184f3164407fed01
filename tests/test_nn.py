"""The networks: against published arrays, against NumPy, and their documented properties."""

import functools
import importlib
import re
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxguide.nn import Classifier, DhariwalUNet, DiT, EDM2UNet, SongUNet, SuperResUNet, UNet
from jaxguide.nn.convolution import convolve
from jaxguide.nn.layers import (
  AttentionBlock,
  AttentionPool,
  Downsample,
  GroupNorm,
  Upsample,
  attend,
  attend_heads,
  downsample,
  timestep_embedding,
  upsample,
)
from jaxguide.nn.parameters import shapes_alone

DATA = Path(__file__).parent / "data"

# XLA's optimisations would take most of the time of these tests, for programs that run once.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends use JAX's own rules")


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def put(array, dtype=jnp.float32):
  """An array of JAX. For one of NumPy, `jnp.asarray` compiles a program for each shape and each type."""
  return jax.device_put(np.asarray(array, dtype))


def random_params(module, *args, seed=0):
  """Random parameters. A new network has zeros and ones, and a zero would hide errors in the layers before it."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "scale":
      return 1 + 0.2 * rng.normal(size=leaf.shape).astype(np.float32)
    fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 10
    return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

  return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes_of(module, *args)))


def shapes_of(module, *args):
  """Shapes of the parameters. To trace initialisers would take a third of the time."""
  with shapes_alone():
    return jax.eval_shape(module.init, jax.random.key(0), *args)


def equations(jaxpr):
  """Every equation of a jaxpr, including those of nested jaxprs."""
  for equation in getattr(jaxpr, "eqns", ()):
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else [value]:
        yield from equations(getattr(inner, "jaxpr", inner))


def batch(n=2, height=8, width=8, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  x = put(rng.normal(size=(n, height, width, channels)))
  return x, put(rng.uniform(0, 1000, n))


SMALL = {"model_channels": 8, "num_res_blocks": 1, "num_head_channels": 4}
ONE_LEVEL = {**SMALL, "channel_mult": (1,), "attention_resolutions": (1,)}
SMALLEST = {**ONE_LEVEL, "num_res_blocks": 0}  # The blocks in the middle, and one after them, which takes a skip.


# --- Published arrays; tests/data/README.md says where they come from ---

PUBLISHED_UNETS = {
  "unet_blocks_resample": {
    "model_channels": 16,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (2, 2),
    "num_head_channels": 8,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "num_classes": 5,
    "null_class": False,
  },
  "unet_mean_resample": {
    "model_channels": 16,
    "num_res_blocks": 1,
    "attention_resolutions": (4,),
    "channel_mult": (2, 2, 2),
    "num_heads": 2,
    "num_heads_upsample": 4,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "conv_resample": False,
  },
  "unet_resample": {
    "model_channels": 8,
    "out_channels": 2,
    "num_res_blocks": 1,
    "attention_resolutions": (1, 2),
    "channel_mult": (8, 4),
    "num_heads": 4,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "use_new_attention_order": True,
  },
}

PUBLISHED_CLASSIFIERS = {
  "classifier_attention": {
    "model_channels": 8,
    "out_channels": 10,
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "channel_mult": (4, 4),
    "num_head_channels": 8,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "pool": "attention",
  },
  "classifier_adaptive": {
    "model_channels": 8,
    "out_channels": 6,
    "num_res_blocks": 2,
    "attention_resolutions": (1,),
    "channel_mult": (8,),
    "num_heads": 4,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "pool": "adaptive",
  },
  "classifier_spatial": {
    "model_channels": 16,
    "out_channels": 10,
    "num_res_blocks": 1,
    "attention_resolutions": (1,),
    "channel_mult": (2,),
    "num_heads": 2,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": True,
    "pool": "spatial",
  },
}


def load(name):
  """Arrays of a published network, images as NHWC, and its weights by name."""
  with np.load(DATA / f"{name}.npz") as file:
    arrays = {key: file[key] for key in file}
  weights = {key.removeprefix("weights/"): arrays.pop(key) for key in list(arrays) if key.startswith("weights/")}
  return {k: v.transpose(0, 2, 3, 1) if v.ndim == 4 else v for k, v in arrays.items()}, weights


def carry(weights, shapes):
  """Rename published weights, and turn them from PyTorch's layout (out, in, space) to Flax's (space, in, out)."""
  remaining = {name.replace(".", "_"): weight.astype(np.float32) for name, weight in weights.items()}

  def place(path, leaf):
    *module, kind = (part.key for part in path[1:])
    kind = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(kind, kind)
    weight = remaining.pop("_".join([*module, kind]))
    if path[-1].key == "kernel":
      weight = np.moveaxis(weight, (1, 0), (-2, -1))
      weight = weight.reshape(weight.shape[-len(leaf.shape) :])  # a 1x1 convolution is a dense layer here
    elif kind == "positional_embedding":
      weight = weight.T
    assert weight.shape == leaf.shape, path
    return weight

  params = jax.tree_util.tree_map_with_path(place, shapes)
  assert not remaining, f"weights that are no parameters: {sorted(remaining)}"
  return params


def assert_close_to_published(value, wanted, deviation):
  """Check within 5 times the published code's own float32 error, or 2e-5 of the largest value."""
  np.testing.assert_allclose(value, wanted, rtol=0, atol=max(5 * float(deviation), 2e-5 * float(abs(wanted).max())))


@pytest.mark.parametrize("name", PUBLISHED_UNETS)
def test_unet_agrees_with_published_arrays(name):
  arrays, weights = load(name)
  args = [arrays[key] for key in ("x", "t", "y") if key in arrays]
  unet = UNet(**PUBLISHED_UNETS[name])
  params = carry(weights, shapes_of(unet, *args))
  assert_close_to_published(quick_jit(unet.apply)(params, *args), arrays["output"], arrays["output_deviation"])


@pytest.mark.parametrize("name", PUBLISHED_CLASSIFIERS)
def test_classifier_and_its_gradient_agree_with_published_arrays(name):
  arrays, weights = load(name)
  x, t, y = (jax.device_put(arrays[key]) for key in "xty")
  classifier = Classifier(**PUBLISHED_CLASSIFIERS[name])
  params = carry(weights, shapes_of(classifier, x, t))
  scale = 10.0

  def log_probability(x, params, t):
    logits = classifier.apply(params, x, t)
    return scale * jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).sum(), logits

  gradient, logits = quick_jit(jax.grad(log_probability, has_aux=True))(x, params, t)
  assert_close_to_published(logits, arrays["output"], arrays["output_deviation"])
  assert_close_to_published(gradient, scale * arrays["gradient"], scale * arrays["gradient_deviation"])


# Numbers of parameters and of tensors in the state dicts that OpenAI's guided-diffusion (commit 22e0df8) makes from the
# flags in its README for each released model. Attention is given by factors of downsampling, as the networks take it.
RELEASED_UNETS = {
  "64x64_diffusion": (192, (1, 2, 3, 4), (2, 4, 8), {"num_res_blocks": 3}, 295904454, 541),
  "128x128_diffusion": (256, (1, 1, 2, 3, 4), (4, 8, 16), {"num_heads": 4, "num_head_channels": -1}, 421529606, 493),
  "256x256_diffusion": (256, (1, 1, 2, 2, 4, 4), (8, 16, 32), {}, 553838086, 567),
  "256x256_diffusion_uncond": (256, (1, 1, 2, 2, 4, 4), (8, 16, 32), {"num_classes": None}, 552814086, 566),
  "512x512_diffusion": (256, (0.5, 1, 1, 2, 2, 4, 4), (16, 32, 64), {}, 558997638, 645),
}
RELEASED_CLASSIFIERS = {
  "64x64_classifier": (64, (1, 2, 3, 4), (2, 4, 8), 4, 65438568, 307),
  "128x128_classifier": (128, (1, 1, 2, 3, 4), (4, 8, 16), 2, 42568040, 221),
  "256x256_classifier": (256, (1, 1, 2, 2, 4, 4), (8, 16, 32), 2, 54096360, 249),
  "512x512_classifier": (512, (0.5, 1, 1, 2, 2, 4, 4), (16, 32, 64), 2, 54448360, 281),
}


def count(module, *args):
  leaves = jax.tree.leaves(shapes_of(module, *args))
  return sum(leaf.size for leaf in leaves), len(leaves)


@pytest.mark.parametrize("name", RELEASED_UNETS)
def test_unet_has_as_many_parameters_as_the_released_model(name):
  width, mult, attention, others, parameters, tensors = RELEASED_UNETS[name]
  fields = {"num_res_blocks": 2, "num_head_channels": 64, "num_classes": 1000, "null_class": False, **others}
  unet = UNet(width, out_channels=6, channel_mult=mult, attention_resolutions=attention, **fields)
  x, t, y = jnp.zeros((1, 64, 64, 3)), jnp.zeros(1), jnp.zeros(1, int)
  assert count(unet, x, t, *([] if unet.num_classes is None else [y])) == (parameters, tensors)


@pytest.mark.parametrize("name", RELEASED_CLASSIFIERS)
def test_classifier_has_as_many_parameters_as_the_released_model(name):
  side, mult, attention, blocks, parameters, tensors = RELEASED_CLASSIFIERS[name]
  classifier = Classifier(
    128, 1000, blocks, channel_mult=mult, attention_resolutions=attention, num_head_channels=64, pool="attention"
  )
  assert count(classifier, jnp.zeros((1, side, side, 3)), jnp.zeros(1)) == (parameters, tensors)


# --- The convolution ---


def reference_convolve(x, kernel, stride=1):
  """JAX's own convolution with JAX's own gradients."""
  padding = [(side // 2, side // 2) for side in kernel.shape[:2]]
  return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def loop_convolve(x, kernel, stride):
  """The definition, one output pixel at a time."""
  (n, h, w, _), (kh, kw, _, d) = x.shape, kernel.shape
  padded = np.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))
  out = np.zeros((n, -(-h // stride), -(-w // stride), d))
  for i in range(out.shape[1]):
    for j in range(out.shape[2]):
      patch = padded[:, i * stride : i * stride + kh, j * stride : j * stride + kw]
      out[:, i, j] = np.einsum("nabc,abcd->nd", patch, kernel)
  return out


CONVOLUTIONS = [
  pytest.param((2, *sides, 3), (*kernel, 3, 4), stride, id=f"{sides}-{kernel}-{stride}")
  # The second is smaller than the kernel, like the coarsest level of a small image. The third has enough rows that the
  # forward pass avoids YNNPACK. Kernels of 3 and of 5 differ in how much is padded alone.
  for sides, kernels in [
    ((7, 6), [(1, 1), (3, 3), (5, 5), (3, 1)]),
    ((2, 1), [(1, 1), (5, 5), (3, 1)]),
    ((17, 6), [(1, 1), (3, 3), (3, 1)]),
  ]
  for kernel in kernels
  for stride in (1, 2)
]


@pytest.mark.parametrize(("x_shape", "kernel_shape", "stride"), CONVOLUTIONS)
def test_convolve_and_its_derivatives(rng, x_shape, kernel_shape, stride):
  def everything(convolution, x, kernel, tangents):
    """Value, forward mode, reverse mode, and second derivatives both ways."""

    def loss(x, kernel):
      return jnp.sin(convolution(x, kernel, stride)).sum()

    def along(x, kernel):
      return sum(jnp.vdot(g, v) for g, v in zip(jax.grad(loss, (0, 1))(x, kernel), tangents, strict=True))

    return {
      "value and jvp": jax.jvp(lambda x, kernel: convolution(x, kernel, stride), (x, kernel), tangents),
      "gradient and forward over reverse": jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), tangents)[1],
      "reverse over reverse": jax.grad(along, (0, 1))(x, kernel),
    }

  with jax.enable_x64(True):
    x, u = rng.normal(size=(2, *x_shape))
    kernel, v = rng.normal(size=(2, *kernel_shape))
    both = quick_jit(lambda *args: [everything(each, *args) for each in (convolve, reference_convolve)])
    ours, wanted = jax.device_get(both(x, kernel, (u, v)))
    np.testing.assert_allclose(ours["value and jvp"][0], loop_convolve(x, kernel, stride), rtol=0, atol=1e-12)
    for name in wanted:
      for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(wanted[name]), strict=True):
        assert a.dtype == b.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * abs(b).max(), err_msg=name)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
  ("dtype", "epsilon"),
  [pytest.param(jnp.float32, 2**-23, id="float32"), pytest.param(jnp.bfloat16, 2**-7, id="bfloat16")],
)
def test_convolve_in_lower_precision(rng, dtype, epsilon, stride):
  x, kernel = (rng.normal(size=shape).astype(dtype) for shape in [(2, 7, 8, 3), (3, 3, 3, 4)])
  cotangent = rng.normal(size=(2, -(-7 // stride), 8 // stride, 4)).astype(dtype)

  def value_and_gradients(convolution, x, kernel, cotangent):
    out, back = jax.vjp(lambda x, kernel: convolution(x, kernel, stride), x, kernel)
    return out, *back(cotangent)

  run = quick_jit(value_and_gradients, static_argnums=0)
  ours = run(convolve, x, kernel, cotangent)
  # The same numbers in float64, so that the remaining difference is the rounding of sums.
  with jax.enable_x64(True):
    wanted = jax.device_get(run(reference_convolve, *(each.astype(np.float64) for each in (x, kernel, cotangent))))
  for a, b in zip(ours, wanted, strict=True):
    assert a.dtype == dtype
    np.testing.assert_allclose(np.asarray(a).astype(float), b, rtol=0, atol=4 * epsilon * abs(b).max())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("axes", [(0, None), (-1, None), (None, -1), (0, 0), (3, 1)])
def test_convolve_vmaps(rng, axes, stride):
  x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, 6, 3), (3, 3, 3, 4)])
  xs, kernels = (
    array if axis is None else np.stack([array, 2 * array, array[::-1]], axis)
    for array, axis in zip((x, kernel), axes, strict=True)
  )

  def value_and_gradients(convolution, x, kernel):
    out, back = jax.vjp(lambda x, kernel: convolution(x, kernel, stride), x, kernel)
    return out, back(jnp.cos(out))

  @quick_jit
  def mapped(xs, kernels):
    return [
      jax.vmap(functools.partial(value_and_gradients, convolution), axes)(xs, kernels)
      for convolution in (convolve, reference_convolve)
    ]

  for a, b in zip(*map(jax.tree.leaves, jax.device_get(mapped(xs, kernels))), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(abs(b).max()))


@on_cpu
def test_vmap_over_images_folds_into_the_batch():
  # vmap could use a grouped convolution instead, which misses the fast path.
  jaxpr = jax.make_jaxpr(jax.vmap(convolve, (0, None)))(jnp.ones((4, 2, 8, 8, 3)), jnp.ones((3, 3, 3, 5)))
  shapes = [e.invars[0].aval.shape for e in equations(jaxpr.jaxpr) if e.primitive.name == "jaxguide_convolve"]
  assert shapes == [(8, 8, 8, 3)]


def test_convolve_maps_over_devices(rng):
  mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  x = put(rng.normal(size=(4 * len(jax.devices()), 8, 8, 3)))
  kernel = put(rng.normal(size=(3, 3, 3, 4)))
  gradient = quick_jit(jax.grad(lambda x, kernel: jnp.sin(convolve(x, kernel)).sum(), (0, 1)))
  rows = jax.NamedSharding(mesh, jax.P("d"))
  for a, b in zip(gradient(jax.device_put(x, rows), kernel), gradient(x, kernel), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(abs(b).max()))


@on_cpu
def test_gradients_inside_a_loop_keep_the_forward_layout():
  """Exchanged axes (01oi of the input gradient, i01o of the kernel's) miss XLA's fast path inside a loop's body."""

  def loss(x, kernel):
    return jnp.sin(convolve(convolve(x, kernel, 2), kernel)).sum()

  def descend(x, kernel):
    def step(carry, _):
      return jax.tree.map(lambda a, g: a - 0.1 * g, carry, jax.grad(loss, (0, 1))(*carry)), None

    return lax.scan(step, (x, kernel), None, length=3)[0]

  lowered = jax.jit(descend).lower(jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4)))
  written = re.findall(r"stablehlo\.convolution.*dim_numbers = (\[.*?->\[.*?\]),", lowered.as_text())
  assert set(written) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]", "[b, 0, f]x[0, i, o]->[b, 0, f]"}
  # Two forward, two input gradients and two kernel gradients (along rows), whose layout XLA has not changed again.
  compiled = re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", lowered.compile().as_text())
  assert set(compiled) == {"b01f_01io->b01f", "b0f_0io->b0f"}
  assert len(compiled) >= 5


@on_cpu
def test_large_images_avoid_the_library_that_uses_one_core_only():
  """XLA puts the operations for YNNPACK into separate computations; see `jaxguide.nn.convolution`."""

  def gradients(x, kernel):
    return jax.value_and_grad(lambda *args: jnp.sin(convolve(*args)).sum(), (0, 1))(x, kernel)

  compiled = jax.jit(gradients).lower(jnp.ones((4, 32, 32, 64)), jnp.ones((3, 3, 64, 32))).compile().as_text()
  wrapped, entry = compiled.split("ENTRY")
  assert " convolution(" not in wrapped
  assert entry.count(" convolution(") == 3


@on_cpu
def test_a_kernel_is_flipped_for_large_images_only():
  def lowered(x_shape):
    gradient = jax.grad(lambda x: jnp.sin(convolve(x, jnp.ones((3, 3, 8, 32)))).sum())
    return jax.jit(gradient).lower(jnp.ones(x_shape)).as_text()

  assert "stablehlo.reverse" in lowered((2, 8, 8, 8))
  assert "stablehlo.reverse" not in lowered((2, 4, 4, 8))


def test_a_program_for_batches_of_any_size(rng):
  x, kernel = (put(rng.normal(size=shape)) for shape in ((3, 4, 4, 2), (3, 3, 2, 64)))
  gradient = jax.jit(jax.grad(lambda x: jnp.sin(convolve(x, kernel)).sum()))
  any_batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 4, 4, 2"), jnp.float32)
  exported = jax.export.export(gradient)(any_batch)
  np.testing.assert_allclose(exported.call(x), gradient(x), rtol=0, atol=1e-4)


@on_cpu
def test_gradient_of_the_classifier_inside_a_loop_keeps_the_forward_layout():
  x, t = batch()
  classifier = Classifier(**ONE_LEVEL)
  params = shapes_of(classifier, x, t)

  def walk(params, x):
    def step(x, _):
      return x + jax.grad(lambda x: classifier.apply(params, x, t).sum())(x), None

    return lax.scan(step, x, None, length=2)[0]

  compiled = jax.jit(walk).lower(params, x).compile().as_text()
  assert set(re.findall(r"dim_labels=(\w+->\w+)", compiled)) == {"b01f_01io->b01f"}


# --- Layers ---


def numpy_group_norm(x, scale, bias, groups):
  x = np.asarray(x, np.float64)
  n, *sides, c = x.shape
  grouped = x.reshape(n, -1, groups, c // groups)
  mean = grouped.mean((1, 3), keepdims=True)
  variance = ((grouped - mean) ** 2).mean((1, 3), keepdims=True)
  return ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(n, *sides, c) * scale + bias


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (32, 32), (48, 16), (24, 8), (20, 4), (8, 8), (3, 1)])
def test_group_norm(rng, channels, groups):
  x = rng.normal(size=(2, 5, 4, channels)) * rng.uniform(0.5, 2, channels) + rng.normal(size=channels)
  scale, bias = rng.normal(size=(2, channels))
  out = GroupNorm().apply({"params": {"scale": scale, "bias": bias}}, put(x))
  np.testing.assert_allclose(out, numpy_group_norm(x, scale, bias, groups), rtol=0, atol=1e-5)


def test_group_norm_of_vectors(rng):
  x = rng.normal(size=(3, 64)).astype(np.float32)
  out = GroupNorm().apply({"params": {"scale": np.ones(64), "bias": np.zeros(64)}}, put(x))
  # Two channels per group and no pixels: up to epsilon, the result is the sign of their difference.
  np.testing.assert_allclose(out, numpy_group_norm(x, 1, 0, 32), rtol=0, atol=2e-5)


def test_group_norm_keeps_its_digits_far_from_zero(rng):
  # In float32 the mean square of these is 1e6 to 7 digits: a difference of squares would be rounding error only.
  x = (1000 + rng.normal(size=(2, 16, 16, 32))).astype(np.float32)
  out = GroupNorm().apply({"params": {"scale": np.ones(32), "bias": np.zeros(32)}}, put(x))
  np.testing.assert_allclose(out, numpy_group_norm(x, 1, 0, 32), rtol=0, atol=3e-4)


def test_group_norm_computes_in_float32(rng):
  x = put(rng.normal(size=(2, 8, 8, 32)), jnp.bfloat16)
  out = GroupNorm().apply({"params": {"scale": np.ones(32), "bias": np.zeros(32)}}, x)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, numpy_group_norm(x, 1, 0, 32), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_group_norm_gradients(rng, silu, shifted, backend, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  scale, shift = rng.normal(size=(2, 2, 1, 1, 48)).astype(np.float32)

  def theirs(params, x):
    out = nn.GroupNorm(16, epsilon=1e-5, use_fast_variance=False).apply(params, x)
    out = out * (1 + scale) + shift if shifted else out
    return out / (1 + jnp.exp(-out)) if silu else out

  def mine(params, x):
    return GroupNorm(silu, 16).apply(params, x, (scale, shift) if shifted else None)

  x = put(rng.normal(size=(2, 5, 4, 48)))
  params = {"params": {name: put(rng.normal(size=48)) for name in ("scale", "bias")}}

  @quick_jit
  def both(*args):
    return [jax.value_and_grad(lambda *args, f=f: jnp.sin(f(*args)).sum(), (0, 1))(*args) for f in (mine, theirs)]

  ours, wanted = jax.device_get(both(params, x))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * abs(b).max()), ours, wanted)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_group_norm_has_all_derivatives(rng, backend, monkeypatch):
  """Forward mode, the derivative of a gradient, and vmap around and below a gradient, against the plain formula."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  x, direction = rng.normal(size=(2, 3, 5, 4, 8)).astype(np.float32)
  scale, bias = map(put, rng.normal(size=(2, 8)))

  def mine(x, scale):
    return GroupNorm(True, 4).apply({"params": {"scale": scale, "bias": bias}}, x)

  def plain(x, scale):
    groups = x.reshape(len(x), -1, 4, 2)
    normed = (groups - groups.mean((1, 3), keepdims=True)) / jnp.sqrt(groups.var((1, 3), keepdims=True) + 1e-5)
    return jax.nn.silu(normed.reshape(x.shape) * scale[None, None, None] + bias[None, None, None])

  def derivatives(norm):
    def out(x, scale=scale):
      return jnp.sin(norm(x, scale))

    gradient = jax.grad(lambda x: out(x).sum())
    alone = lambda x: out(x[None]).sum()  # noqa: E731
    scales = jnp.stack([scale, 2 * scale])
    return (
      jax.jvp(out, (x,), (direction,)),
      jax.jvp(gradient, (x,), (direction,)),
      jax.grad(lambda x: jnp.vdot(gradient(x), direction))(x),
      jax.vmap(jax.grad(alone))(x),
      jax.grad(lambda x: jax.vmap(alone)(x).sum())(x),
      jax.grad(lambda scale: jax.vmap(lambda x: out(x[None], scale).sum())(x).sum())(scale),
      jax.grad(lambda scales: jax.vmap(lambda scale: out(x, scale).sum())(scales).sum())(scales),
      jax.vmap(lambda x: jax.jvp(lambda x: out(x[None]), (x,), (direction[0],))[1])(x),
    )

  ours, wanted = jax.device_get(quick_jit(lambda: [derivatives(norm) for norm in (mine, plain)])())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * abs(b).max()), ours, wanted)


@pytest.mark.parametrize(
  ("shape", "kind", "double"),
  [
    ((2, 3, 4, 8), "bfloat16", False),
    ((2, 3, 4, 8), "float32", True),
    ((0, 3, 8), "float32", False),
    ((2, 8), "float32", False),
  ],
  ids=["half-parameters", "x64", "empty", "no-pixels"],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_gradient_of_group_norm_has_the_type_of_what_it_is_of(rng, shape, kind, double, shifted):
  with jax.enable_x64(double):
    x = put(rng.normal(size=shape))
    shift = put(rng.normal(size=(2, shape[0], *[1] * (len(shape) - 2), 8)))
    params = {name: put(rng.normal(size=8), kind) for name in ("scale", "bias")}

    def mine(params, x):
      return GroupNorm(True, 4).apply({"params": params}, x, shift if shifted else None)

    def plain(params, x):
      groups, axes = x.reshape(*x.shape[:-1], 4, 2), (*range(1, x.ndim - 1), x.ndim)
      normed = (groups - groups.mean(axes, keepdims=True)) / jnp.sqrt(groups.var(axes, keepdims=True) + 1e-5)
      scale, bias = (params[name].astype(jnp.float32).reshape(*[1] * (x.ndim - 1), 8) for name in ("scale", "bias"))
      out = normed.reshape(x.shape) * scale + bias
      return jax.nn.silu(out * (1 + shift[0]) + shift[1] if shifted else out)

    @quick_jit
    def both(*args):
      return [jax.grad(lambda *args, f=f: jnp.sin(f(*args)).sum(), (0, 1))(*args) for f in (mine, plain)]

    ours, wanted = jax.device_get(both(params, x))
  for found, to in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
    assert (found.shape, found.dtype) == (to.shape, to.dtype)
    close = 1e-5 if to.dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(
      np.asarray(found, np.float64), np.asarray(to, np.float64), rtol=0, atol=close * max(1, abs(to).max(initial=0))
    )


def test_the_gradient_of_group_norm_is_exported_for_any_batch(rng):
  x = put(rng.normal(size=(3, 4, 5, 8)))
  params = {"params": {"scale": jnp.ones(8), "bias": jnp.ones(8)}}
  gradient = jax.jit(jax.grad(lambda x: jnp.sin(GroupNorm(True).apply(params, x)).sum()))
  (n,) = jax.export.symbolic_shape("n")
  exported = jax.export.export(gradient)(jax.ShapeDtypeStruct((n, 4, 5, 8), jnp.float32))
  np.testing.assert_allclose(exported.call(x), gradient(x), rtol=0, atol=1e-6)


def test_the_gradient_of_group_norm_keeps_its_input_alone():
  x, kernel = jnp.zeros((4, 64, 64, 16)), jnp.zeros((3, 3, 16, 16))
  params = {"params": {"scale": jnp.ones(16), "bias": jnp.ones(16)}}

  def layers(x):
    for _ in range(8):
      x = convolve(GroupNorm(True).apply(params, x), kernel)
    return x.sum()

  needed = jax.jit(jax.grad(layers)).lower(x).compile().memory_analysis().temp_size_in_bytes
  assert needed < (8 + 2) * x.nbytes


def test_group_norm_in_half_precision_on_a_gpu(rng, monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  x = put(3 + rng.normal(size=(2, 8, 8, 32)), jnp.bfloat16)
  params = {"params": {"scale": np.ones(32), "bias": np.zeros(32)}}
  wanted = numpy_group_norm(np.asarray(x, np.float64), 1, 0, 32)
  out = GroupNorm().apply(params, x)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5)
  half = GroupNorm(dtype=jnp.bfloat16).apply(params, x)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(half, np.float32), wanted, rtol=2**-8, atol=2e-5)


@pytest.mark.parametrize(
  ("cls", "fields", "dtypes"),
  [
    pytest.param(UNet, {"use_new_attention_order": True}, ["float32", "bfloat16"], id="network"),
    # The old order of heads is the attention block's affair.
    pytest.param(AttentionBlock, {"use_new_attention_order": False}, ["float32"], id="old-order"),
  ],
)
def test_the_forms_for_a_gpu_compute_the_same(monkeypatch, cls, fields, dtypes):
  """Products in parts and normalisation in one pass, run here, against what runs here by itself."""
  fields = {**fields, "num_head_channels": 8, "cudnn_attention": False}  # There are two heads.
  fields |= {**SMALLEST, **fields, "model_channels": 16} if cls is UNet else {}
  args = batch(2, 4, 4) if cls is UNet else batch(2, 4, 4, 16)[:1]
  params = random_params(cls(**fields), *args)

  def run():
    def each(params, x, *others):
      for dtype in dtypes:
        apply = cls(**fields, dtype=dtype).apply
        yield jax.value_and_grad(lambda *args, apply=apply: jnp.sin(apply(*args, *others)).sum(), (0, 1))(params, x)

    jax.clear_caches()
    with jax.numpy_dtype_promotion("standard"):  # JAX's attention for a GPU needs it.
      return jax.device_get(quick_jit(lambda *args: list(each(*args)))(params, *args))

  wanted, *half_wanted = run()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  ours, *half = run()
  monkeypatch.undo()
  jax.clear_caches()

  def error(a, b):
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (a, b)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])

  assert error(ours, wanted) < 1e-5
  for here, there in zip(half, half_wanted, strict=True):
    assert error(here, wanted) < 1.5 * error(there, wanted) < 0.1


@pytest.mark.parametrize("features", [2, 16, 17])
def test_timestep_embedding(features):
  t = np.array([0, 0.25, 1, 17.5, 873.5, 999])
  half = features // 2
  angles = t[:, None] * np.exp(-np.log(10000) * np.arange(half) / half)
  wanted = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((6, features % 2))], axis=1)
  out = timestep_embedding(put(t), features)
  # In float32 an angle of 999 has an error of 6e-5, and the rounding of the frequency adds a similar error.
  np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-4)
  np.testing.assert_allclose(out[:3], wanted[:3], rtol=0, atol=1e-6)


def numpy_attention(qkv, heads, new_order):
  """Compute one head at a time, with the layout (qkv, head, channel) or (head, qkv, channel)."""
  qkv = np.asarray(qkv, np.float64)
  width = qkv.shape[-1] // 3 // heads
  out = []
  for head in range(heads):
    first = [part * heads + head if new_order else head * 3 + part for part in range(3)]
    q, k, v = (qkv[..., i * width : (i + 1) * width] for i in first)
    logits = q @ k.swapaxes(1, 2) / np.sqrt(width)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    out.append(weights / weights.sum(-1, keepdims=True) @ v)
  return np.concatenate(out, axis=-1)


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [1, 30])
def test_attend(rng, heads, new_order, size):
  # At size 30 the exponentials of the logits overflow unless the largest logit is subtracted first.
  qkv = (size * rng.normal(size=(2, 7, 36))).astype(np.float32)
  wanted = numpy_attention(qkv, heads, new_order)
  np.testing.assert_allclose(attend(put(qkv), heads, new_order), wanted, rtol=0, atol=5e-5 * abs(wanted).max())


def test_attention_of_many_pixels(rng):
  """On a CPU, heads are processed one by one; the gradient is that of the explicit formula."""
  qkv = put(rng.normal(size=(2, 784, 24)))
  np.testing.assert_allclose(attend(qkv, 2, True), numpy_attention(qkv, 2, True), rtol=0, atol=1e-5)

  def written_out(qkv):
    q, k, v = jnp.moveaxis(qkv.reshape(784, 3, 2, 4), 1, 0)
    weights = jax.nn.softmax(jnp.einsum("thc,shc->hts", q, k) / 2)
    return jnp.einsum("hts,shc->thc", weights, v).reshape(784, 8)

  def gradients(attention):
    return quick_jit(jax.vmap(jax.grad(lambda qkv: jnp.sin(attention(qkv)).sum())))(qkv)

  ours, wanted = gradients(lambda qkv: attend(qkv[None], 2, True)[0]), gradients(written_out)
  np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * float(abs(wanted).max()))


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_block(rng, new_order):
  x = put(rng.normal(size=(2, 3, 4, 8)))
  block = AttentionBlock(num_heads=2, use_new_attention_order=new_order)
  params = random_params(block, x)
  p = jax.tree.map(np.asarray, params["params"])
  h = numpy_group_norm(x, p["norm"]["scale"], p["norm"]["bias"], 8).reshape(2, 12, 8)
  h = numpy_attention(h @ p["qkv"]["kernel"] + p["qkv"]["bias"], 2, new_order)
  wanted = x + (h @ p["proj_out"]["kernel"] + p["proj_out"]["bias"]).reshape(x.shape)
  np.testing.assert_allclose(block.apply(params, x), wanted, rtol=0, atol=1e-5)


def test_attention_pool(rng):
  x = put(rng.normal(size=(2, 3, 4, 8)))
  pool = AttentionPool(features=5, num_head_channels=4)
  params = random_params(pool, x)
  p = jax.tree.map(np.asarray, params["params"])
  pixels = np.asarray(x, np.float64).reshape(2, 12, 8)
  tokens = np.concatenate([pixels.mean(1, keepdims=True), pixels], axis=1) + p["positional_embedding"]
  h = numpy_attention(tokens @ p["qkv_proj"]["kernel"] + p["qkv_proj"]["bias"], 2, True)[:, 0]
  wanted = h @ p["c_proj"]["kernel"] + p["c_proj"]["bias"]
  np.testing.assert_allclose(pool.apply(params, x), wanted, rtol=0, atol=1e-5)


def test_resampling(rng):
  x = put(rng.normal(size=(2, 4, 6, 3)))
  np.testing.assert_array_equal(upsample(x), np.asarray(x).repeat(2, 1).repeat(2, 2))
  wanted = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
  np.testing.assert_allclose(downsample(x), wanted, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(Downsample(use_conv=False).apply({}, x), downsample(x))
  np.testing.assert_array_equal(Upsample(use_conv=False).apply({}, x), upsample(x))


def test_resampling_by_convolution(rng):
  x = put(rng.normal(size=(2, 4, 6, 3)))
  down, up = Downsample(use_conv=True), Upsample(use_conv=True)
  kernel, bias = (put(rng.normal(size=s)) for s in [(3, 3, 3, 3), (3,)])
  out = down.apply({"params": {"op": {"kernel": kernel, "bias": bias}}}, x)
  np.testing.assert_allclose(out, loop_convolve(x, kernel, 2) + np.asarray(bias), rtol=0, atol=1e-5)
  out = up.apply({"params": {"conv": {"kernel": kernel, "bias": bias}}}, x)
  np.testing.assert_allclose(out, loop_convolve(upsample(x), kernel, 1) + np.asarray(bias), rtol=0, atol=1e-5)


# --- The networks ---


def both_shapes(module, *args):
  """Shapes of the output and of the parameters."""
  with shapes_alone():
    return jax.eval_shape(module.init_with_output, jax.random.key(0), *args)


@pytest.mark.parametrize(("sides", "channels"), [((8, 8), 1), ((12, 20), 3)])
def test_networks_take_any_image(sides, channels):
  x, t = batch(2, *sides, channels)
  y = jnp.array([0, 10])
  out, params = both_shapes(UNet(**SMALL), x, t)
  assert out.shape == x.shape
  # The network is convolutional: parameters for one image size work for another.
  bigger = jax.ShapeDtypeStruct((2, 2 * sides[0], 2 * sides[1], channels), jnp.float32)
  assert jax.eval_shape(UNet(**SMALL).apply, params, bigger, t).shape == bigger.shape
  twice = UNet(**SMALL, num_classes=10, out_channels=2 * channels)
  assert both_shapes(twice, x, t, y)[0].shape == (2, *sides, 2 * channels)
  for pool in ("attention", "adaptive", "spatial", "spatial_v2"):
    out = both_shapes(Classifier(**ONE_LEVEL, out_channels=7, pool=pool), x, t)[0]
    assert (out.shape, out.dtype) == ((2, 7), jnp.float32)


def test_spatial_v2_pool():
  """No published arrays use this pool: compare its last layers with NumPy, on the captured outputs of the blocks."""
  x, t = batch()
  classifier = Classifier(**SMALL, out_channels=5, pool="spatial_v2")
  params = random_params(classifier, x, t)
  apply = functools.partial(classifier.apply, capture_intermediates=True, mutable=["intermediates"])
  out, state = quick_jit(apply)(params, x, t)
  seen, p = state["intermediates"], jax.tree.map(np.asarray, params["params"])
  blocks = ["input_blocks_0_0", "input_blocks_1_0", "input_blocks_2_0", "input_blocks_3_1", "middle_block_2"]
  h = np.concatenate([np.asarray(seen[name]["__call__"][0]).mean((1, 2)) for name in blocks], axis=-1)
  h = h @ p["out_0"]["kernel"] + p["out_0"]["bias"]
  h = numpy_group_norm(h, p["out_1"]["scale"], p["out_1"]["bias"], 32)
  h = h / (1 + np.exp(-h)) @ p["out_3"]["kernel"] + p["out_3"]["bias"]
  np.testing.assert_allclose(out, h, rtol=0, atol=1e-4)


def test_the_output_of_a_new_unet_is_zero():
  x, t = batch()
  out, params = jax.device_get(quick_jit(UNet(**SMALLEST).init_with_output)(jax.random.key(0), x, t))
  assert out.shape == x.shape
  assert not out.any()
  # Every residual branch starts at zero as well.
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path)
    if re.search(r"out_layers_3|proj_out|'out_2'|'bias'", name):
      assert not leaf.any(), name
    elif "'kernel'" in name:
      assert leaf.std() > 0, name


def test_the_output_depends_on_every_argument():
  x, t = batch(3)
  y = np.array([0, 1, 10])
  x, t, other_y = *map(np.asarray, (x, t)), np.array([0, 1, 2])
  unet = UNet(**ONE_LEVEL, num_classes=10)
  params = random_params(unet, x, t, y)
  compiled = quick_jit(unet.apply)
  apply = lambda *args: np.asarray(compiled(params, *args))  # noqa: E731
  out = apply(x, t, y)
  for other in [(x[::-1], t, y), (x, t + 1, y), (x, t + np.float32(0.5), y), (x, t, other_y)]:
    assert abs(apply(*other) - out).max() > 1e-3
  # Examples do not influence each other.
  np.testing.assert_allclose(apply(x, t, other_y)[:2], out[:2], rtol=0, atol=1e-5)


def test_vmapped_examples_equal_the_batch():
  x, t = batch(4)
  y = jnp.array([0, 1, 2, 10])
  unet, classifier = UNet(**SMALLEST, num_classes=10), Classifier(**SMALLEST)
  for module, args in [(unet, (x, t, y)), (classifier, (x, t))]:
    params = random_params(module, *args)

    @quick_jit
    def both(params, *args, module=module):
      one = lambda *args: module.apply(params, *(arg[None] for arg in args))[0]  # noqa: E731
      return jax.vmap(one)(*args), module.apply(params, *args)

    alone, wanted = both(params, *args)
    np.testing.assert_allclose(alone, wanted, rtol=0, atol=2e-5)


def test_bfloat16():
  x, t = batch()
  y = jnp.array([1, 10])
  exact, unet = (UNet(**ONE_LEVEL, num_classes=10, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
  params = random_params(exact, x, t, y)
  shapes = shapes_of(unet, x, t, y)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), params)

  out, wanted = quick_jit(lambda *args: [module.apply(*args) for module in (unet, exact)])(params, x, t, y)
  assert out.dtype == jnp.float32
  error = np.linalg.norm(np.asarray(out) - wanted) / np.linalg.norm(wanted)
  assert (
    1e-4 < error < 0.02
  )  # bfloat16 rounds to 2**-9 in about 20 layers; the lower bound shows that float32 was not used
  assert jax.eval_shape(unet.apply, params, x.astype(jnp.bfloat16), t, y).dtype == jnp.bfloat16
  assert jax.eval_shape(exact.apply, params, x.astype(jnp.bfloat16), t, y).dtype == jnp.bfloat16

  whole = UNet(**SMALL, num_classes=10, dtype=jnp.bfloat16)
  shapes = shapes_of(whole, x, t, y)
  used = list(equations(jax.make_jaxpr(whole.apply)(shapes, x, t, y).jaxpr))

  def kinds(*primitives):
    return [e.invars[0].aval.dtype for e in used if e.primitive.name in primitives]

  # Normalisation, softmax, time and label embedding are float32; so is the last convolution.
  assert set(kinds("rsqrt", "exp", "cos", "sin", "gather")) == {jnp.dtype(jnp.float32)}
  convolutions = kinds("jaxguide_convolve", "conv_general_dilated")
  assert convolutions[:-1] == [jnp.bfloat16] * (len(convolutions) - 1)
  assert convolutions[-1] == jnp.float32
  # Two in the time embedding; on a CPU also two per normalisation, which repeat each group's value for its channels.
  spread = 2 * len(kinds("rsqrt")) if jax.default_backend() == "cpu" else 0
  assert kinds("dot_general").count(jnp.float32) == 2 + spread


def test_bfloat16_classifier():
  x, t = batch()
  exact, classifier = (Classifier(**ONE_LEVEL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
  params = random_params(exact, x, t)
  out, wanted = quick_jit(lambda *args: [module.apply(*args) for module in (classifier, exact)])(params, x, t)
  assert out.dtype == jnp.float32
  assert 1e-4 < np.linalg.norm(np.asarray(out) - wanted) / np.linalg.norm(wanted) < 0.03


def test_dropout_is_for_training():
  x, t = batch()
  unet, plain = UNet(**SMALLEST, dropout=0.3), UNet(**SMALLEST)
  params = random_params(plain, x, t)
  still = np.asarray(quick_jit(unet.apply)(params, x, t))
  np.testing.assert_array_equal(still, quick_jit(plain.apply)(params, x, t))

  @quick_jit
  def train(params, x, t, key):
    return unet.apply(params, x, t, train=True, rngs={"dropout": key})

  first, again, other = (np.asarray(train(params, x, t, jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert abs(first - other).max() > 1e-2
  assert abs(first - still).max() > 1e-2
  with pytest.raises(Exception, match="dropout"):
    jax.eval_shape(lambda *args: unet.apply(*args, train=True), params, x, t)


@pytest.mark.slow
def test_use_checkpoint_changes_nothing_but_memory():
  x, t = batch()
  fields = {**ONE_LEVEL, "dropout": 0.3}
  params = random_params(UNet(**fields), x, t)

  def loss(params, x, module):
    return jnp.sin(module.apply(params, x, t, train=True, rngs={"dropout": jax.random.key(0)})).sum()

  def run(module):
    return quick_jit(jax.value_and_grad(lambda *args: loss(*args, module), (0, 1)))(params, x)

  def remats(module):
    used = [e.primitive.name for e in equations(jax.make_jaxpr(lambda p: module.apply(p, x, t))(params).jaxpr)]
    return sum("remat" in name or name == "checkpoint" for name in used)

  module = UNet(**fields, use_checkpoint=True)
  # Normalisation always uses jax.checkpoint. The difference is the number of residual and attention blocks.
  assert remats(module) - remats(UNet(**fields)) == 5 + 4
  wanted = run(UNet(**fields))
  close = 1e-4 * max(float(abs(leaf).max()) for leaf in jax.tree.leaves(wanted[1]))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=close), run(module), wanted)


@pytest.fixture
def cudnn_calls(monkeypatch):
  """A function that lowers another for a platform, and returns which of cuDNN's attention it calls."""
  # JAX queries the GPU before it lowers; there is none here.
  cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
  monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

  def calls(platform, function, *args, capability=None):
    jax.clear_caches()  # JAX caches traces, and assumes one default backend per process.
    monkeypatch.setattr(jax, "default_backend", lambda: {"cuda": "gpu"}.get(platform, platform))
    if capability is not None:
      monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    return set(re.findall(r"cudnn\$(\w+)", lowered.as_text()))

  with jax.numpy_dtype_promotion("standard"):  # JAX's attention for a GPU needs it.
    yield calls
  jax.clear_caches()


def test_cudnn_attention_is_used_where_it_can_be(cudnn_calls):
  """In programs for a GPU, batched, forward and backward; never otherwise."""
  fused = {"fmhaSoftmax", "fmhaSoftmaxBackward"}

  def calls(platform, cudnn=None, channels=8, dtype=jnp.bfloat16, **more):
    q = jax.ShapeDtypeStruct((2, 16, 1, channels), dtype)
    one = lambda q: jnp.square(attend_heads(*[q[None]] * 3, cudnn)).sum()  # noqa: E731
    return cudnn_calls(platform, jax.vmap(jax.grad(one)), q, **more)

  assert calls("cuda", True) == fused
  assert not calls("cuda")  # Of a process without a GPU.
  for capability, wanted in {"7.5": set(), "gfx90a": set(), "9.0": fused}.items():
    assert calls("cuda", capability=capability) == wanted
    assert not calls("cuda", False)
  for different in ({"channels": 12}, {"channels": 136}, {"dtype": jnp.float32}):
    assert not calls("cuda", **different)
  assert calls("cuda", channels=128) == fused
  assert not calls("tpu", True)
  assert not calls("cpu", True)


ATTENDING = {
  UNet: {**ONE_LEVEL, "num_res_blocks": 0, "num_head_channels": 8},
  DiT: {"hidden_size": 8, "depth": 1, "num_heads": 1},
  SongUNet: {"model_channels": 8, "channel_mult": (1,), "num_blocks": 0},
  DhariwalUNet: {"model_channels": 64, "channel_mult": (1,), "num_blocks": 0},
  EDM2UNet: {"model_channels": 8, "channel_mult": (1,), "num_blocks": 0, "channels_per_head": 8},
}


@pytest.mark.parametrize("cls", ATTENDING, ids=lambda cls: cls.__name__)
def test_cudnn_attention_of_a_network(cls, cudnn_calls):
  fields = {**ATTENDING[cls], "dtype": "bfloat16"}
  x, t = batch(2, 4, 4)
  params = shapes_of(cls(**fields), x, t)
  for given, wanted in {None: {"fmhaSoftmax"}, False: set()}.items():
    module = cls(**fields, cudnn_attention=given)
    assert cudnn_calls("cuda", module.apply, params, x, t, capability="9.0") == wanted


@pytest.mark.parametrize("cls", [*ATTENDING, Classifier], ids=lambda cls: cls.__name__)
def test_cudnn_attention_cannot_be_demanded_in_float32(cls):
  with pytest.raises(ValueError, match=f"give {cls.__name__} dtype bfloat16 with it, or leave it out; got float32"):
    cls(**ATTENDING.get(cls, SMALL), cudnn_attention=True)


def test_null_class():
  x, t = batch()
  y = jnp.array([0, 3])

  def rows(**fields):
    params = shapes_of(UNet(**SMALLEST, **fields), x, t, y)
    return params["params"]["label_emb"]["embedding"].shape[0]

  assert rows(num_classes=4) == 5
  assert rows(num_classes=4, null_class=False) == 4
  assert "label_emb" not in shapes_of(UNet(**SMALLEST), x, t)["params"]


def test_fields_may_be_lists():
  lists, tuples = (
    {"channel_mult": kind([1, 2]), "attention_resolutions": kind([1, 2]), "model_channels": 8} for kind in (list, tuple)
  )
  for module in (UNet, Classifier):
    assert module(**lists) == module(**tuples)
    assert hash(module(**lists)) == hash(module(**tuples))
    assert module(**lists) != module(model_channels=8)
  assert UNet(**lists).clone(num_classes=3).channel_mult == (1, 2)


@pytest.mark.parametrize(
  ("fields", "sides", "message"),
  [
    ({}, (7, 8), "multiples of 2; got 7x8"),
    ({"channel_mult": (1, 1, 1, 2)}, (16, 12), "multiples of 8; got 16x12"),
  ],
)
@pytest.mark.parametrize("module", [UNet, Classifier])
def test_sides_that_cannot_be_halved(module, fields, sides, message):
  x, t = batch(2, *sides)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module(**SMALL, **fields).init, jax.random.key(0), x, t)


@pytest.mark.parametrize("module", [UNet, Classifier])
def test_wrong_shapes(module):
  x, t = batch()
  init = module(**SMALL).init
  with pytest.raises(ValueError, match=r"images of shape \(n, height, width, channels\), got \(8, 8, 3\)"):
    jax.eval_shape(init, jax.random.key(0), x[0], t)
  for wrong in (t[:1], t[0], t[:, None]):
    with pytest.raises(ValueError, match="one time for each of 2 images"):
      jax.eval_shape(init, jax.random.key(0), x, wrong)


def test_missing_and_unexpected_labels():
  x, t = batch()
  y = jnp.array([0, 1])
  with pytest.raises(ValueError, match="num_classes=10 was given no labels"):
    jax.eval_shape(UNet(**SMALL, num_classes=10).init, jax.random.key(0), x, t)
  with pytest.raises(ValueError, match="num_classes=None was given unexpected labels"):
    jax.eval_shape(UNet(**SMALL).init, jax.random.key(0), x, t, y)


def test_unknown_pool():
  x, t = batch()
  with pytest.raises(ValueError, match="unknown pool 'adaptve': did you mean 'adaptive'"):
    jax.eval_shape(Classifier(**SMALL, pool="adaptve").init, jax.random.key(0), x, t)


def test_attention_pool_counts_heads_by_channels():
  x, t = batch()
  with pytest.raises(ValueError, match="give num_head_channels"):
    jax.eval_shape(Classifier(8, num_res_blocks=1).init, jax.random.key(0), x, t)


def test_heads_that_do_not_divide():
  x, t = batch()
  for fields in ({"num_heads": 3}, {"num_head_channels": 5}, {"num_heads": 2, "num_heads_upsample": 3}):
    name, number = list(fields.items())[-1]
    name = name.removesuffix("_upsample")
    with pytest.raises(ValueError, match=f"{name} {number} must divide the 16 channels"):
      jax.eval_shape(UNet(8, num_res_blocks=1, **fields).init, jax.random.key(0), x, t)


def test_gradients_inside_shard_map(rng):
  # Inside shard_map JAX's own rules must be used: the primitive's would raise an error, or sum over the devices.
  from jax.sharding import Mesh, PartitionSpec

  mesh, parts = Mesh(np.asarray(jax.devices()[:4]), ("d",)), PartitionSpec("d")
  x, kernel = (put(rng.normal(size=shape)) for shape in ((8, 4, 4, 2), (3, 3, 2, 3)))

  def gradient(x, kernel):
    return jax.grad(lambda kernel: jnp.square(convolve(x, kernel)).sum())(kernel)

  sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(parts, PartitionSpec()), out_specs=PartitionSpec())
  ours, wanted = (quick_jit(each)(x, kernel) for each in (sharded, gradient))
  np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)


def test_the_default_attention_is_at_half_the_sides_if_there_are_two_levels():
  assert UNet().attention_resolutions == (2,)
  assert UNet(channel_mult=(1,)).attention_resolutions == ()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"channel_mult": ()}, "at least one level"),
    ({"attention_resolutions": (16,)}, r"2 levels takes .* among the downsampling factors \[1, 2\], got \[16\]"),
    ({"dropout": 1.5}, "dropout must be between 0 and 1"),
  ],
)
def test_fields_out_of_range(fields, message):
  with pytest.raises(ValueError, match=message):
    UNet(**fields)


def test_inputs_that_would_silently_be_broadcast_or_cast():
  unet = UNet(num_classes=3)
  x, t = jnp.zeros((2, 8, 8, 1)), jnp.zeros(2)
  for y, message in (
    (jnp.zeros(1, int), r"one label for each of 2 images, got shape \(1,\)"),
    (jnp.array([0, 4]), "label 4 is not one of the 3 classes"),
    (jnp.array([0, -1]), "label -1 is not one of the 3 classes"),
  ):
    with pytest.raises(ValueError, match=message):
      unet.init(jax.random.key(0), x, t, y)
  with pytest.raises(ValueError, match="takes floating-point images"):
    unet.init(jax.random.key(0), x.astype(jnp.uint8), t, jnp.zeros(2, int))


# --- Super-resolution ---


def bilinear(images, height, width):
  """Interpolate each axis by the definition: a pixel's value is at its centre, and edge pixels extend outwards."""
  for axis, size in ((1, height), (2, width)):
    old = images.shape[axis]
    centres = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.floor(centres).astype(int)
    high = np.minimum(low + 1, old - 1)
    part = np.moveaxis(images, axis, -1)
    images = np.moveaxis(part[..., low] * (1 - (centres - low)) + part[..., high] * (centres - low), -1, axis)
  return images


@pytest.mark.parametrize("low_sides", [(4, 4), (2, 3), (8, 6), (1, 1)])
def test_super_resolution_concatenates_the_enlarged_image(rng, low_sides):
  x, t = batch(2, 8, 6)
  low = rng.normal(size=(2, *low_sides, 3)).astype(np.float32)
  fields = {**SMALLEST, "num_classes": 5, "out_channels": 3}
  cond = {"label": jnp.array([1, 4]), "low_res": put(low)}
  params = random_params(SuperResUNet(**fields), x, t, cond)
  beside = np.concatenate([x, bilinear(low, 8, 6).astype(np.float32)], -1)

  @quick_jit
  def both(params, x, t, beside, cond):
    return SuperResUNet(**fields).apply(params, x, t, cond), UNet(**fields).apply(params, beside, t, cond["label"])

  got, wanted = jax.device_get(both(params, x, t, beside, cond))
  np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * abs(wanted).max())
  # By default there are as many output channels as the image has, and not as many as the first layer takes.
  left_out = SuperResUNet(**{**fields, "out_channels": None})
  assert jax.eval_shape(left_out.apply, params, x, t, cond).shape == x.shape


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda low: None, "takes a condition"),
    (lambda low: {"label": jnp.array([0, 1])}, "takes a condition"),
    (lambda low: {"low_res": low, "class": 1}, "takes a condition"),
    (lambda low: low, "takes a condition"),
    (lambda low: {"low_res": low[:1]}, r"got shape \(1, 4, 4, 3\)"),
    (lambda low: {"low_res": low[..., :1]}, r"got shape \(2, 4, 4, 1\)"),
    (lambda low: {"low_res": jnp.tile(low, (1, 1, 3, 1))}, r"no larger; got shape \(2, 4, 12, 3\)"),
    (lambda low: {"low_res": low, "label": jnp.array([0, 1])}, "num_classes=None was given unexpected labels"),
  ],
)
def test_invalid_conditions_of_super_resolution(change, message):
  x, t = batch()
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(SuperResUNet(**SMALL).init, jax.random.key(0), x, t, change(jnp.zeros((2, 4, 4, 3))))


def test_an_empty_batch_has_a_gradient_of_zeros_for_the_kernel():
  kernel = jnp.ones((3, 3, 3, 4))
  gradient = jax.grad(lambda kernel: convolve(jnp.zeros((0, 8, 8, 3)), kernel).sum())(kernel)
  np.testing.assert_array_equal(gradient, np.zeros(kernel.shape))
