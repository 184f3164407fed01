"""The Inception network of the FID: its parts against NumPy, and the whole against torch-fidelity and pytorch-fid."""

import hashlib
import io
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxguide.evaluation.features import extraction, inception, resizing
from jaxguide.models.importers import state_dicts

# --- the parts against NumPy ----------------------------------------------------------------------


def windows(x, height, width, stride, pad, value):
  """The pixels under a kernel at each of its positions: (n, h, w, height, width, c)."""
  sides = ((height // 2,) * 2, (width // 2,) * 2) if pad else ((0, 0), (0, 0))
  x = np.pad(x, ((0, 0), *sides, (0, 0)), constant_values=value)
  seen = np.lib.stride_tricks.sliding_window_view(x, (height, width), (1, 2))
  return seen[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def convolved(x, params, stride=1, pad=True):
  """A convolution, its bias and ReLU."""
  kernel = np.asarray(params["kernel"], np.float64)
  seen = windows(x, *kernel.shape[:2], stride, pad, 0.0)
  return np.maximum(np.tensordot(seen, kernel, 3) + np.asarray(params["bias"]), 0)


def averaged(x):
  return np.nanmean(windows(x, 3, 3, 1, True, np.nan), (3, 4))


def largest(x, stride):
  return windows(x, 3, 3, stride, stride == 1, -np.inf).max((3, 4))


def randomly(module, x):
  """Parameters of a module that keep activations near one, with biases that are not zero."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]

  def draw(leaf):
    scale = np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
    return rng.standard_normal(leaf.shape, np.float32) * np.float32(scale)

  return jax.tree.map(draw, shapes)


def image(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("side", [1, 2, 3, 8, 17])
def test_pools(side):
  x = image(2, side, side + 2, 3)
  np.testing.assert_allclose(inception.average_pool(jnp.asarray(x)), averaged(x), rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(inception.max_pool(jnp.asarray(x), 1), largest(x, 1))
  if side >= 3:
    np.testing.assert_array_equal(inception.max_pool(jnp.asarray(x)), largest(x, 2))


@pytest.mark.parametrize(
  ("kernel", "stride", "pad"),
  [((1, 1), 1, True), ((3, 3), 1, True), ((3, 3), 1, False), ((3, 3), 2, False), ((1, 7), 1, True), ((7, 1), 1, True)],
)
@pytest.mark.parametrize("side", [9, 20])
def test_convolutions(kernel, stride, pad, side):
  x = image(2, side, side + 3, 4)
  module = inception.Conv(5, kernel, stride, pad)
  params = randomly(module, x)
  found = jax.jit(module.apply)({"params": params}, x)
  np.testing.assert_allclose(found, convolved(x, params, stride, pad), rtol=1e-4, atol=1e-5)


class Transcribed:
  """The network of pytorch-fid, written anew: the blocks are those of torchvision with its names."""

  def __init__(self, params):
    self.params = params

  def conv(self, name, x, stride=1, pad=True):
    block, _, branch = name.partition(".")
    return convolved(x, self.params[block][branch] if branch else self.params[block], stride, pad)

  def chain(self, name, numbers, x):
    for number in numbers:
      x = self.conv(f"{name}_{number}", x)
    return x

  def a(self, block, x):
    five = self.chain(f"{block}.branch5x5", "12", x)
    three = self.chain(f"{block}.branch3x3dbl", "123", x)
    pool = self.conv(f"{block}.branch_pool", averaged(x))
    return np.concatenate([self.conv(f"{block}.branch1x1", x), five, three, pool], -1)

  def b(self, block, x):
    three = self.conv(f"{block}.branch3x3", x, 2, False)
    double = self.chain(f"{block}.branch3x3dbl", "12", x)
    return np.concatenate([three, self.conv(f"{block}.branch3x3dbl_3", double, 2, False), largest(x, 2)], -1)

  def c(self, block, x):
    seven = self.chain(f"{block}.branch7x7", "123", x)
    double = self.chain(f"{block}.branch7x7dbl", "12345", x)
    pool = self.conv(f"{block}.branch_pool", averaged(x))
    return np.concatenate([self.conv(f"{block}.branch1x1", x), seven, double, pool], -1)

  def d(self, block, x):
    three = self.conv(f"{block}.branch3x3_2", self.conv(f"{block}.branch3x3_1", x), 2, False)
    seven = self.conv(f"{block}.branch7x7x3_4", self.chain(f"{block}.branch7x7x3", "123", x), 2, False)
    return np.concatenate([three, seven, largest(x, 2)], -1)

  def e(self, block, x, pooled):
    three = self.conv(f"{block}.branch3x3_1", x)
    double = self.chain(f"{block}.branch3x3dbl", "12", x)
    halves = [self.conv(f"{block}.branch3x3_{half}", three) for half in ("2a", "2b")]
    halves += [self.conv(f"{block}.branch3x3dbl_{half}", double) for half in ("3a", "3b")]
    return np.concatenate([self.conv(f"{block}.branch1x1", x), *halves, self.conv(f"{block}.branch_pool", pooled)], -1)

  def __call__(self, x):
    x = self.conv("Conv2d_1a_3x3", x, 2, False)
    x = self.conv("Conv2d_2a_3x3", x, 1, False)
    x = largest(self.conv("Conv2d_2b_3x3", x), 2)
    x = self.conv("Conv2d_3b_1x1", x)
    x = largest(self.conv("Conv2d_4a_3x3", x, 1, False), 2)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
      x = self.a(block, x)
    x = self.b("Mixed_6a", x)
    for block in ("Mixed_6b", "Mixed_6c"):
      x = self.c(block, x)
    spatial = self.conv("Mixed_6d.branch1x1", x)[..., :7].reshape(len(x), -1)
    x = self.c("Mixed_6e", self.c("Mixed_6d", x))
    x = self.d("Mixed_7a", x)
    x = self.e("Mixed_7b", x, averaged(x))
    x = self.e("Mixed_7c", x, largest(x, 1))
    pool = x.mean((1, 2))
    return {"pool": pool, "spatial": spatial, "logits": pool @ np.asarray(self.params["fc"]["kernel"])}


def test_the_whole_network():
  """On an image of 107x107, which is 2x2 at the end: enough to tell the pools apart."""
  x = image(1, 107, 107, 3)
  module = inception.Inception()
  params = randomly(module, x)
  found = jax.jit(module.apply)({"params": params}, x)
  wanted = Transcribed(params)(x)
  assert {*found} == {*wanted}
  for name, value in wanted.items():
    np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


# --- the file of the weights ----------------------------------------------------------------------


def drawn(name, shape):
  """A random tensor of a scale that keeps activations near one. Variances are positive."""
  rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
  if name.endswith("running_var"):
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)
  if len(shape) == 1:
    return (name.endswith("weight") + 0.1 * rng.standard_normal(shape)).astype(np.float32)
  return rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / np.prod(shape[1:])))


def tensors(changed):
  """What `state_dicts.read` gives for a file of random weights. Values of ``changed`` replace the tensors' makers."""
  makers = {name: (shape, lambda name=name, shape=shape: drawn(name, shape)) for name, shape in file_shapes().items()}
  return {name: state_dicts.Tensor(shape, "float32", read) for name, (shape, read) in {**makers, **changed}.items()}


def file_shapes():
  return inception.shapes()


@pytest.fixture
def file(tmp_path, monkeypatch):
  """A path, and a function that says which tensors are in the file."""
  path = tmp_path / "weights.safetensors"
  path.write_bytes(b"content")

  def hold(found):
    monkeypatch.setattr(state_dicts, "read", lambda name: found)

  return path, hold


def test_the_network_has_the_published_number_of_weights():
  """Of Inception v3 without the auxiliary classifier, with 1008 classes instead of 1000."""
  shapes = inception.shapes()
  weights = [np.prod(shape) for name, shape in shapes.items() if "running" not in name]
  assert sum(weights) == 23_834_568 + 8 * 2049
  assert len(shapes) == 94 * 5 + 2
  assert shapes["Conv2d_4a_3x3.conv.weight"] == (192, 80, 3, 3)
  assert shapes["Mixed_6d.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
  assert shapes["Mixed_7c.branch3x3_2a.conv.weight"] == (384, 384, 1, 3)


def test_batch_norm_is_folded_in(file):
  path, hold = file
  counter = ((), lambda: np.zeros((), np.float32))
  hold(tensors({"Mixed_5b.branch1x1.bn.num_batches_tracked": counter}))
  made = inception.inception(path, resize="clean")
  assert made.protocol == {
    "features": "inception:resize=clean",
    "version": 1,
    "weights": hashlib.sha256(b"content").hexdigest()[:16],
  }
  x = image(2, 4, 4, 288)
  for name in ("Mixed_5d.branch1x1", "Mixed_6a.branch3x3"):
    block, branch = name.split(".")
    weight, gamma, beta, mean, variance = (
      drawn(f"{name}.{part}", file_shapes()[f"{name}.{part}"]).astype(np.float64)
      for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    )
    plain = {"kernel": weight.transpose(2, 3, 1, 0), "bias": 1e3}  # The bias keeps ReLU from doing anything.
    normal = (convolved(x, plain) - 1e3 - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(convolved(x, made.params[block][branch]), np.maximum(normal, 0), rtol=1e-3, atol=1e-5)
  np.testing.assert_array_equal(made.params["fc"]["kernel"], drawn("fc.weight", (1008, 2048)).T)


def test_resizings_of_the_features():
  assert {*inception.RESIZINGS} == {"tf1", "clean"}
  for name, matrix in (("tf1", resizing.tf1_bilinear), ("clean", resizing.pillow)):
    rows, columns = inception.RESIZINGS[name](32, 500)
    np.testing.assert_array_equal(rows, matrix(32, 299))
    np.testing.assert_array_equal(columns, matrix(500, 299))


def test_a_file_of_another_network_is_one_error(file):
  path, hold = file
  found = tensors({"fc.weight": ((1000, 2048), np.ndarray), "AuxLogits.fc.bias": ((1000,), np.ndarray)})
  del found["fc.bias"]
  hold(found)
  with pytest.raises(ValueError, match="does not hold the weights of the Inception network of the FID") as caught:
    inception.inception(path)
  message = str(caught.value)
  assert "1 missing (fc.bias)" in message
  assert "1 unknown (AuxLogits.fc.bias)" in message
  assert "1 of another shape (fc.weight has shape (1000, 2048), expected (1008, 2048))" in message


@pytest.mark.parametrize(
  ("part", "value", "message"),
  [("bn.running_var", -1.0, "running_var in .* is not positive"), ("bn.bias", np.nan, "1a_3x3 in .* is not finite")],
)
def test_a_damaged_file_is_no_silent_nan(file, part, value, message):
  path, hold = file
  zeros = {name: (shape, lambda shape=shape: np.zeros(shape, np.float32)) for name, shape in file_shapes().items()}
  hold(tensors({**zeros, f"Conv2d_1a_3x3.{part}": ((32,), lambda: np.full(32, value, np.float32))}))
  with pytest.raises(ValueError, match=message):
    inception.inception(path)


# --- where the file is ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
  return tmp_path / "torch" / "hub" / "checkpoints"


def test_without_weights_the_error_says_where_to_get_them(cache):
  with pytest.raises(FileNotFoundError, match="nothing is downloaded") as caught:
    inception.inception()
  message = str(caught.value)
  assert "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception" in message
  assert str(cache) in message
  assert not cache.exists()


@pytest.mark.parametrize("name", inception.NAMES)
def test_the_caches_of_both_libraries_are_searched(cache, monkeypatch, name):
  cache.mkdir(parents=True)
  (cache / name).write_bytes(b"")
  assert inception._cached(download=False) == cache / name
  monkeypatch.delenv("TORCH_HOME")
  monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent.parent))
  assert inception._cached(download=False) == cache / name
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setattr(Path, "home", lambda: cache / "home")
  with pytest.raises(FileNotFoundError, match=r"home/\.cache/torch/hub/checkpoints"):
    inception._cached(download=False)


class Answer(io.BytesIO):
  headers = {"Content-Length": "7"}  # noqa: RUF012


def test_a_download_is_checked_and_kept(cache, monkeypatch):
  digest = hashlib.sha256(b"weights").hexdigest()
  monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: Answer(b"weights"))
  with pytest.raises(OSError, match=f"^https.* is damaged: its SHA-256 is {digest}"):
    inception._cached(download=True)
  assert not cache.exists()
  monkeypatch.setattr(inception, "NAMES", (f"weights-{digest[:8]}.pth", "other"))
  assert inception._cached(download=True).read_bytes() == b"weights"
  monkeypatch.setattr(urllib.request, "urlopen", None)
  assert inception._cached(download=True).name == f"weights-{digest[:8]}.pth"


def test_a_download_that_fails_leaves_nothing(cache, monkeypatch):
  def refuse(address, timeout):
    raise urllib.request.URLError("no route")

  monkeypatch.setattr(urllib.request, "urlopen", refuse)
  with pytest.raises(OSError, match=r"^https.* could not be downloaded .*no route"):
    inception._cached(download=True)
  assert not cache.exists()


def test_mistakes(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no file"):
    inception.inception(tmp_path / "none.safetensors")
  with pytest.raises(ValueError, match=r"unknown resize 'clear'.*did you mean 'clean'"):
    inception.inception(tmp_path / "none.safetensors", resize="clear")
  with pytest.raises(ValueError, match="leave out weights, or leave out download"):
    inception.inception(tmp_path / "none.safetensors", download=True)


# --- the whole against the published implementations ----------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A file of random weights, and the same as PyTorch's tensors."""
  torch = pytest.importorskip("torch")
  path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
  state_dict = {name: drawn(name, shape) for name, shape in file_shapes().items()}
  state_dicts.write(path, state_dict)
  return path, {name: torch.from_numpy(array) for name, array in state_dict.items()}


@pytest.fixture(scope="module")
def images():
  """Four pictures that differ in brightness, contrast and fineness."""
  rng = np.random.default_rng(0)
  drawn = [np.kron(rng.integers(0, 256, (64 // k, 48 // k, 3)), np.ones((k, k, 1))) for k in (1, 2, 8, 16)]
  return np.stack([picture * share for picture, share in zip(drawn, (1, 0.8, 0.4, 1), strict=True)]).astype(np.uint8)


def close(found, theirs, tolerance=1e-4):
  """Features agree in proportion to what tells the images apart."""
  differing = theirs - theirs.mean(0)
  assert np.linalg.norm(differing) > 0.05 * np.linalg.norm(theirs)
  assert np.linalg.norm(found - theirs) < tolerance * np.linalg.norm(differing)


@pytest.mark.torch
@pytest.mark.slow
def test_the_whole_is_torch_fidelitys(weights, images, tmp_path):
  torch = pytest.importorskip("torch")
  peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
  path, state_dict = weights
  torch.save(state_dict, tmp_path / "weights.pt")
  names = ["2048", "logits_unbiased"]
  network = peer.FeatureExtractorInceptionV3("all", names, feature_extractor_weights_path=str(tmp_path / "weights.pt"))
  seen = []
  network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: seen.append(out))
  pool, logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  found = extraction.extract(inception.inception(path), images, outputs=("pool", "spatial", "logits"))
  close(found["pool"], pool.numpy())
  close(found["logits"], logits.numpy())
  close(found["spatial"], seen[0][:, :7].permute(0, 2, 3, 1).reshape(4, 2023).numpy())


@pytest.mark.torch
@pytest.mark.slow
def test_the_network_is_pytorch_fids(weights, monkeypatch):
  torch = pytest.importorskip("torch")
  peer = pytest.importorskip("pytorch_fid.inception")
  path, state_dict = weights
  monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *args, **kwargs: state_dict)
  network = peer.InceptionV3().eval()
  rng = np.random.default_rng(0)
  x = np.stack([np.kron(rng.uniform(0, 256, (23, 23, 3)), np.ones((13, 13, 1))), rng.uniform(0, 256, (299, 299, 3))])
  x = x.astype(np.float32)
  # pytorch-fid computes 2 x - 1 of images in [0, 1], and we (x - 128) / 128 of images in [0, 255].
  (theirs,) = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy() / 256))
  made = inception.inception(path)
  close(np.asarray(jax.jit(made.function)(made.params, x)["pool"]), theirs[..., 0, 0].numpy())


def test_outputs_have_the_published_sizes():
  made = jax.eval_shape(inception.Inception().init_with_output, jax.random.key(0), jnp.zeros((2, 299, 299, 3)))[0]
  assert {name: leaf.shape for name, leaf in made.items()} == {
    "pool": (2, 2048),
    "spatial": (2, 2023),
    "logits": (2, 1008),
  }
