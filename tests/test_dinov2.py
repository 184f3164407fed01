"""DINOv2: a NumPy transcription, Hugging Face's implementation, and its names beside Meta's."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import special

from jaxguide.evaluation.features import dinov2

WIDTH, DEPTH, HIDDEN, SIDE = 128, 2, 96, 5


def arrays_of(gated=False, registers=0, seed=0):
  """Random weights by Meta's names: two heads, two blocks, and images of 5 times 5 patches in training."""
  shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + SIDE**2, WIDTH), "mask_token": (1, WIDTH)}
  shapes |= {"register_tokens": (1, registers, WIDTH)} if registers else {}
  shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,)}
  layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
  layers |= {"mlp.w12": (2 * HIDDEN, WIDTH)} if gated else {"mlp.fc1": (HIDDEN, WIDTH)}
  layers |= {"mlp.w3" if gated else "mlp.fc2": (WIDTH, HIDDEN)}
  for block in range(DEPTH):
    for name, shape in layers.items():
      shapes |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
    for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
      shapes[f"blocks.{block}.{name}"] = (WIDTH,)
  shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
  rng = np.random.default_rng(seed)

  def draw(shape):
    scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) in (2, 4) else 0.5
    return (scale * rng.normal(size=shape)).astype(np.float32)

  return {name: draw(shape) for name, shape in shapes.items()}


def hugging_face(arrays):
  """The same arrays by the names of `transformers`."""
  plain = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
  }
  inside = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
  inside |= {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out", "attn.proj": "attention.output.dense"}
  renamed = {}
  for name, array in arrays.items():
    if name in plain:
      renamed[plain[name]] = array
      continue
    _, number, rest = name.split(".", 2)
    if rest.startswith("attn.qkv."):
      for part, piece in zip(("query", "key", "value"), np.split(array, 3), strict=True):
        renamed[f"encoder.layer.{number}.attention.attention.{part}.{rest.rpartition('.')[2]}"] = piece.copy()
      continue
    for meta, theirs in inside.items():
      rest = rest.replace(meta, theirs)
    renamed[f"encoder.layer.{number}.{rest}"] = array
  return renamed


@pytest.fixture(scope="module")
def images():
  return np.random.default_rng(1).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)


def keys_filter(x, a=-0.75):
  """Keys 1981, eq. 4."""
  x = abs(x)
  if x <= 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def interpolated(n_in, n_out, scale):
  """The matrix of a bicubic interpolation with half-pixel centres and repeated borders."""
  matrix = np.zeros((n_out, n_in))
  for i in range(n_out):
    centre = (i + 0.5) * scale - 0.5
    for pixel in range(-3, n_in + 3):
      matrix[i, min(max(pixel, 0), n_in - 1)] += keys_filter(centre - pixel)
  return matrix


def transcribed(arrays, images, gated):
  """The network after its papers, in float64, by Meta's names."""
  a = {name: array.astype(np.float64) for name, array in arrays.items()}

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * a[f"{name}.weight"] + a[f"{name}.bias"]

  def dense(x, name):
    return x @ a[f"{name}.weight"].T + a[f"{name}.bias"]

  x = (images / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  n, side, half = len(x), 16, WIDTH // 2
  patches = x.reshape(n, side, 14, side, 14, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n, side * side, -1)
  patches = patches @ a["patch_embed.proj.weight"].reshape(WIDTH, -1).T + a["patch_embed.proj.bias"]
  matrix = interpolated(SIDE, side, SIDE / (side + 0.1))
  grid = np.einsum("yr,xc,rcw->yxw", matrix, matrix, a["pos_embed"][0, 1:].reshape(SIDE, SIDE, WIDTH))
  patches = patches + grid.reshape(side * side, WIDTH)
  x = np.concatenate([np.broadcast_to(a["cls_token"][0] + a["pos_embed"][0, :1], (n, 1, WIDTH)), patches], 1)
  for number in range(DEPTH):
    block = f"blocks.{number}"
    q, k, v = np.split(dense(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), 3, axis=-1)
    heads = []
    for head in (slice(0, half), slice(half, None)):
      weights = np.exp(q[..., head] @ k[..., head].transpose(0, 2, 1) / np.sqrt(64))
      heads.append(weights / weights.sum(-1, keepdims=True) @ v[..., head])
    x = x + dense(np.concatenate(heads, -1), f"{block}.attn.proj") * a[f"{block}.ls1.gamma"]
    h = norm(x, f"{block}.norm2")
    if gated:
      gate, h = np.split(dense(h, f"{block}.mlp.w12"), 2, axis=-1)
      h = dense(gate * special.expit(gate) * h, f"{block}.mlp.w3")
    else:
      h = dense(h, f"{block}.mlp.fc1")
      h = dense(h * special.ndtr(h), f"{block}.mlp.fc2")
    x = x + h * a[f"{block}.ls2.gamma"]
  return norm(x, "norm")[:, 0]


def pool(features, images):
  return np.asarray(jax.jit(features.function)(features.params, images)["pool"])


def relative(got, wanted):
  return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("gated", [False, True])
def test_the_network_is_that_of_the_papers(gated, images, tmp_path):
  arrays = arrays_of(gated)
  save_file(arrays, tmp_path / "meta.safetensors")
  got = pool(dinov2.dinov2(tmp_path / "meta.safetensors"), images)
  assert got.shape == (2, WIDTH)
  assert relative(got, transcribed(arrays, images, gated)) < 1e-5


@pytest.mark.parametrize(("gated", "registers"), [(False, 0), (True, 4)])
def test_hugging_faces_names_are_the_same_network(gated, registers, tmp_path):
  arrays = arrays_of(gated, registers)
  save_file(arrays, tmp_path / "meta.safetensors")
  save_file(hugging_face(arrays), tmp_path / "hf.safetensors")
  ours, theirs = (dinov2.dinov2(tmp_path / f"{name}.safetensors") for name in ("meta", "hf"))
  assert ours.function == theirs.function
  jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
  assert ours.weights != theirs.weights


@pytest.mark.torch
@pytest.mark.parametrize(("gated", "registers"), [(False, 0), (True, 0), (False, 4)])
def test_transformers_gives_the_same(gated, registers, images, tmp_path, monkeypatch):
  torch = pytest.importorskip("torch")
  monkeypatch.setitem(sys.modules, "torchvision", None)  # It is not needed, and a wrong version of it does harm.
  transformers = pytest.importorskip("transformers")
  kind = "Dinov2WithRegisters" if registers else "Dinov2"
  config = getattr(transformers, f"{kind}Config")(
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=WIDTH // 64,
    image_size=14 * SIDE,
    patch_size=14,
    use_swiglu_ffn=gated,
    mlp_ratio=2,
    **({"num_register_tokens": registers} if registers else {}),
  )
  torch.manual_seed(0)
  network = getattr(transformers, f"{kind}Model")(config).eval()
  with torch.no_grad():
    for parameter in network.parameters():
      parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path)
    pixels = torch.tensor(images / 255).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (dinov2.MEAN, dinov2.STD))
    wanted = network((pixels - mean) / std).pooler_output.numpy()
  features = dinov2.dinov2(tmp_path / "model.safetensors", positions="huggingface")
  assert relative(pool(features, images), wanted) < 1e-4


@pytest.mark.torch
@pytest.mark.parametrize(("n_in", "n_out"), [(37, 16), (5, 16), (37, 50), (16, 16)])
def test_positions_are_resized_as_in_pytorch(n_in, n_out):
  functional = pytest.importorskip("torch").nn.functional
  torch = pytest.importorskip("torch")
  identity = torch.eye(n_in, dtype=torch.float64)[:, None, :, None].expand(-1, 1, -1, n_in).contiguous()

  def matrix(**how):
    return functional.interpolate(identity, mode="bicubic", **how)[:, 0, :, 0].numpy().T

  np.testing.assert_allclose(dinov2.bicubic(n_in, n_out), matrix(size=(n_out, n_out)), atol=1e-6)
  scale = (n_out + 0.1) / n_in
  np.testing.assert_allclose(dinov2.bicubic(n_in, n_out, 0.1), matrix(scale_factor=(scale, scale)), atol=1e-6)
  np.testing.assert_allclose(dinov2.pillow(n_in, n_out), matrix(size=(n_out, n_out), antialias=True), atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize(("n_in", "n_out"), [(37, 16), (5, 16), (16, 16)])
def test_bicubic_is_keys_filter(n_in, n_out, offset):
  np.testing.assert_allclose(
    dinov2.bicubic(n_in, n_out, offset), interpolated(n_in, n_out, n_in / (n_out + offset)), atol=1e-12
  )


def test_attention_is_a_softmax_over_keys():
  rng = np.random.default_rng(0)
  qkv = rng.normal(size=(2, 5, 3 * 8))
  got = dinov2.attention(jnp.float32(qkv), heads=2)
  q, k, v = (part.reshape(2, 5, 2, 4) for part in np.split(qkv, 3, axis=-1))
  for n, token, head in np.ndindex(2, 5, 2):
    weights = special.softmax([q[n, token, head] @ k[n, other, head] / 2 for other in range(5)])
    np.testing.assert_allclose(got[n, token, 4 * head : 4 * head + 4], weights @ v[n, :, head], atol=1e-5)


def test_names_say_the_options(tmp_path):
  save_file(arrays_of(), tmp_path / "w.safetensors")
  crop = dinov2.dinov2(tmp_path / "w.safetensors")
  other = dinov2.dinov2(tmp_path / "w.safetensors", preprocess="squash", positions="huggingface")
  assert (crop.name, other.name) == ("dinov2", "dinov2:preprocess=squash,positions=huggingface")
  assert not np.allclose(crop.params["params"]["positions"], other.params["params"]["positions"])
  rows, _ = crop.resize(512, 256)
  assert (rows[:, :120] == 0).all()  # 256 of 512 rows and 32 at the sides of 256 are cut off
  assert other.resize(512, 256)[0][0, :4].all()
  for option in ("preprocess", "positions"):
    with pytest.raises(ValueError, match=f"unknown {option} 'x'"):
      dinov2.dinov2(tmp_path / "w.safetensors", **{option: "x"})


def test_files_that_do_not_fit(tmp_path):
  path = tmp_path / "w.safetensors"
  with pytest.raises(FileNotFoundError, match="there is no file"):
    dinov2.dinov2(path)
  save_file({"conv1.weight": np.ones((8, 3, 7, 7), np.float32)}, path)
  with pytest.raises(ValueError, match=r"does not hold the weights of DINOv2: .* it has conv1\.weight"):
    dinov2.dinov2(path)
  arrays = arrays_of()
  del arrays["blocks.1.ls1.gamma"]
  save_file(arrays, path)
  with pytest.raises(ValueError, match=r"weights of DINOv2: 1 missing \(blocks\.1\.ls1\.gamma\)$"):
    dinov2.dinov2(path)
  arrays = arrays_of()
  arrays["norm.bias"][3] = np.nan
  save_file(arrays, path)
  with pytest.raises(ValueError, match=r"norm\.bias in .* has numbers that are not finite"):
    dinov2.dinov2(path)
  assert load_file(path).keys() == arrays.keys()
