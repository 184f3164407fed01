"""The Inception network of the FID (Szegedy et al. 2015, arXiv:1512.00567; Heusel et al. 2017, arXiv:1706.08500).

It is the network in TensorFlow's archive of 5 December 2015. It differs from other versions of Inception v3 in three
ways: average pools leave out the padding, the last block has a maximum where the others have an average, and there are
1008 classes.
The weights are those of pytorch-fid and torch-fidelity, under the names that these two use.
"""

import functools
import hashlib
import http.client
import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import checks, files
from jaxguide._core.bars import progress_bar
from jaxguide._core.files import PathLike
from jaxguide._core.typing import Array, Float, PyTree
from jaxguide.evaluation.features import resizing
from jaxguide.evaluation.features import weights as weight_files
from jaxguide.evaluation.features.base import Features
from jaxguide.models.importers import state_dicts
from jaxguide.nn.convolution import convolve

SIDE = 299
SPATIAL_CHANNELS = 7
OUTPUTS = ("pool", "spatial", "logits")
EPSILON = 1e-3
"""What BatchNorm adds to the variance."""

NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""The names under which pytorch-fid and torch-fidelity keep the file of the weights. The content is the same."""

ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAMES[0]}"

RESIZINGS = {
  "tf1": resizing.square(SIDE, resizing.tf1_bilinear),
  "clean": resizing.square(SIDE, functools.partial(resizing.pillow, filter="bicubic")),
}


class Conv(nn.Module):
  """A convolution with its BatchNorm folded into it, and ReLU.

  Args:
    features: number of output channels.
    kernel: (height, width) of the kernel, odd numbers.
    stride: 1, or 2, which needs ``pad=False``.
    pad: whether the sides are kept by padding with zeros.
  """

  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  pad: bool = True

  @nn.compact
  def __call__(self, x):
    """Map (n, h, w, c) to (n, h', w', features)."""
    kernel = self.param("kernel", nn.initializers.he_normal(), (*self.kernel, x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    if self.kernel == (1, 1):
      x = x @ kernel[0, 0]
    elif self.stride == 1:
      # Without padding the result is cropped: `convolve` has a fast path on a CPU, and XLA's own convolution takes four
      # times as long for the large images of the first layers.
      x = convolve(x, kernel)
      x = x if self.pad else _cropped(x, self.kernel)
    else:
      x = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return nn.relu(x + jax.lax.expand_dims(bias, (0, 1, 2)))


def _cropped(x, kernel: tuple[int, int]):
  top, left = kernel[0] // 2, kernel[1] // 2
  return x[:, top : x.shape[1] - top, left : x.shape[2] - left]


def average_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
  """Average over 3x3 pixels around each pixel, over fewer at the border: padding does not count.

  >>> average_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).ravel().tolist()
  [1.5, 1.5, 1.5, 1.5]
  """
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def max_pool(x: Float[Array, "n h w c"], stride: int = 2) -> Float[Array, "n hh ww c"]:
  """Take the maximum over 3x3 pixels: with stride 1 around each pixel, with stride 2 without padding.

  >>> max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1)).ravel().tolist()
  [8.0]
  """
  return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


class BlockA(nn.Module):
  """Block of the 35x35 images; ``pooled`` is the number of channels of the branch with the average pool."""

  pooled: int

  @nn.compact
  def __call__(self, x):
    """Map (n, 35, 35, c) to (n, 35, 35, 224 + pooled)."""
    one = Conv(64, name="branch1x1")(x)
    five = Conv(48, name="branch5x5_1")(x)
    five = Conv(64, (5, 5), name="branch5x5_2")(five)
    three = Conv(64, name="branch3x3dbl_1")(x)
    three = Conv(96, (3, 3), name="branch3x3dbl_2")(three)
    three = Conv(96, (3, 3), name="branch3x3dbl_3")(three)
    pool = Conv(self.pooled, name="branch_pool")(average_pool(x))
    return jnp.concatenate([one, five, three, pool], -1)


class BlockB(nn.Module):
  """Block from 35x35 to 17x17."""

  @nn.compact
  def __call__(self, x):
    """Map (n, 35, 35, c) to (n, 17, 17, 480 + c)."""
    once = Conv(384, (3, 3), 2, pad=False, name="branch3x3")(x)
    twice = Conv(64, name="branch3x3dbl_1")(x)
    twice = Conv(96, (3, 3), name="branch3x3dbl_2")(twice)
    twice = Conv(96, (3, 3), 2, pad=False, name="branch3x3dbl_3")(twice)
    return jnp.concatenate([once, twice, max_pool(x)], -1)


class BlockC(nn.Module):
  """Block of the 17x17 images; ``inner`` is the number of channels between the convolutions of 1x7 and 7x1."""

  inner: int

  @nn.compact
  def __call__(self, x):
    """Map (n, 17, 17, c) to (n, 17, 17, 768), of which the first 192 channels are the branch of 1x1."""
    one = Conv(192, name="branch1x1")(x)
    once = Conv(self.inner, name="branch7x7_1")(x)
    once = Conv(self.inner, (1, 7), name="branch7x7_2")(once)
    once = Conv(192, (7, 1), name="branch7x7_3")(once)
    twice = Conv(self.inner, name="branch7x7dbl_1")(x)
    twice = Conv(self.inner, (7, 1), name="branch7x7dbl_2")(twice)
    twice = Conv(self.inner, (1, 7), name="branch7x7dbl_3")(twice)
    twice = Conv(self.inner, (7, 1), name="branch7x7dbl_4")(twice)
    twice = Conv(192, (1, 7), name="branch7x7dbl_5")(twice)
    pool = Conv(192, name="branch_pool")(average_pool(x))
    return jnp.concatenate([one, once, twice, pool], -1)


class BlockD(nn.Module):
  """Block from 17x17 to 8x8."""

  @nn.compact
  def __call__(self, x):
    """Map (n, 17, 17, c) to (n, 8, 8, 512 + c)."""
    three = Conv(192, name="branch3x3_1")(x)
    three = Conv(320, (3, 3), 2, pad=False, name="branch3x3_2")(three)
    seven = Conv(192, name="branch7x7x3_1")(x)
    seven = Conv(192, (1, 7), name="branch7x7x3_2")(seven)
    seven = Conv(192, (7, 1), name="branch7x7x3_3")(seven)
    seven = Conv(192, (3, 3), 2, pad=False, name="branch7x7x3_4")(seven)
    return jnp.concatenate([three, seven, max_pool(x)], -1)


class BlockE(nn.Module):
  """Block of the 8x8 images; ``maximum`` tells whether its pool takes the maximum, as in the last block."""

  maximum: bool

  @nn.compact
  def __call__(self, x):
    """Map (n, 8, 8, c) to (n, 8, 8, 2048)."""
    one = Conv(320, name="branch1x1")(x)
    three = Conv(384, name="branch3x3_1")(x)
    threes = [Conv(384, k, name=f"branch3x3_2{half}")(three) for half, k in (("a", (1, 3)), ("b", (3, 1)))]
    double = Conv(448, name="branch3x3dbl_1")(x)
    double = Conv(384, (3, 3), name="branch3x3dbl_2")(double)
    doubles = [Conv(384, k, name=f"branch3x3dbl_3{half}")(double) for half, k in (("a", (1, 3)), ("b", (3, 1)))]
    pool = Conv(192, name="branch_pool")(max_pool(x, 1) if self.maximum else average_pool(x))
    return jnp.concatenate([one, *threes, *doubles, pool], -1)


class Inception(nn.Module):
  """The network. Its submodules have the names that pytorch-fid and torch-fidelity use."""

  @nn.compact
  def __call__(self, x: Float[Array, "n h w 3"]) -> dict[str, Any]:
    """Map images in [-1, 1], published for 299x299 pixels and at least 75x75, to the outputs of `inception` by name."""
    x = Conv(32, (3, 3), 2, pad=False, name="Conv2d_1a_3x3")(x)
    x = Conv(32, (3, 3), pad=False, name="Conv2d_2a_3x3")(x)
    x = max_pool(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
    x = Conv(80, name="Conv2d_3b_1x1")(x)
    x = max_pool(Conv(192, (3, 3), pad=False, name="Conv2d_4a_3x3")(x))
    for letter, pooled in (("b", 32), ("c", 64), ("d", 64)):
      x = BlockA(pooled, name=f"Mixed_5{letter}")(x)
    x = BlockB(name="Mixed_6a")(x)
    x = BlockC(128, name="Mixed_6b")(x)
    x = BlockC(160, name="Mixed_6c")(x)
    # TensorFlow's mixed_6. Its tensor "mixed_6/conv:0" is the branch of 1x1 after ReLU, the block's first channels.
    x = BlockC(160, name="Mixed_6d")(x)
    spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    x = BlockC(192, name="Mixed_6e")(x)
    x = BlockD(name="Mixed_7a")(x)
    x = BlockE(False, name="Mixed_7b")(x)
    x = BlockE(True, name="Mixed_7c")(x)
    pool = x.mean((1, 2))
    return {"pool": pool, "spatial": spatial, "logits": nn.Dense(1008, use_bias=False, name="fc")(pool)}


def _outputs(params: PyTree, images: jax.Array) -> dict[str, jax.Array]:
  """Compute the outputs from float32 images in [0, 255], of which TensorFlow's graph takes (x - 128) / 128."""
  with jax.default_matmul_precision("highest"):
    return Inception().apply({"params": params}, (images - 128) / 128)  # type: ignore[return-value]


def inception(weights: PathLike | None = None, resize: str = "tf1", download: bool = False) -> Features:
  """Make the features of the FID, the sFID and the Inception score.

  The outputs are ``"pool"`` (2048,), for the FID; ``"spatial"`` (2023,), for the sFID of Nash et al. 2021
  (arXiv:2103.03841): the first 7 channels of TensorFlow's ``mixed_6/conv:0``, which are 17x17 pixels, in the order row,
  column, channel, as in the evaluator of OpenAI's guided-diffusion; and ``"logits"`` (1008,), for the Inception score,
  without the bias of the last layer, as in that evaluator and in torch-fidelity (its ``logits_unbiased``).

  Args:
    weights: the file `NAMES` of pytorch-fid or torch-fidelity, or a ``.safetensors`` file with the same tensors. The
      default is the file in the cache of PyTorch, where both libraries keep it: the folder ``hub/checkpoints`` in
      ``$TORCH_HOME``, which is ``~/.cache/torch`` if it is not set.
    resize: how images are brought to 299x299 pixels: ``"tf1"``, the bilinear rule of TensorFlow 1, for the FID of the
      literature; or ``"clean"``, Pillow's antialiased bicubic filter, for clean-fid (arXiv:2104.11222).
    download: whether to download the file (91 MB) to the cache if it is not there.

  Raises:
    FileNotFoundError: if there is no file of the weights. The message says where to get it.
    ValueError: if ``resize`` is unknown, both ``weights`` and ``download`` are given, or the file is damaged or is that
      of another network.
    OSError: if the download fails.

  >>> inception("missing.safetensors")
  Traceback (most recent call last):
  ...
  FileNotFoundError: there is no file missing.safetensors
  """
  resizing_by_name = checks.lookup("resize", resize, RESIZINGS)
  download = checks.flag("download", download)
  if weights is not None and download:
    raise ValueError("download=True fetches the weights of the cache: leave out weights, or leave out download")
  path = _cached(download) if weights is None else Path(weights)
  params = read_weights(path)
  name = "inception" if resize == "tf1" else f"inception:resize={resize}"
  return Features(name, 1, weight_files.digest(path), _outputs, params, resizing_by_name, 3, "Inception", OUTPUTS)


@functools.cache
def shapes() -> Mapping[str, tuple[int, ...]]:
  """Return the shapes of the tensors in the file of the weights, in PyTorch's order of axes, by name.

  >>> shapes()["Mixed_6d.branch7x7_2.conv.weight"]
  (160, 160, 1, 7)
  """
  params = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
  found: dict[str, tuple[int, ...]] = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
  for name, kernel in _kernels(params).items():
    height, width, channels, features = kernel.shape
    found[f"{name}.conv.weight"] = (features, channels, height, width)
    found |= {f"{name}.bn.{part}": (features,) for part in ("weight", "bias", "running_mean", "running_var")}
  return found


def _kernels(params: PyTree) -> dict[str, Any]:
  """Return the kernels of the convolutions, by the name of the convolution in the file."""
  flat = flax.traverse_util.flatten_dict(params, sep=".")
  return {
    name.removesuffix(".kernel"): leaf for name, leaf in flat.items() if name.endswith(".kernel") and leaf.ndim > 2
  }


def read_weights(path: PathLike) -> PyTree:
  """Read the parameters of `Inception`, with BatchNorm folded into the convolutions (in float64).

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is damaged, or its tensors are not those of the network.
  """
  path = Path(path)
  tensors = {name: tensor for name, tensor in state_dicts.read(path).items() if not _is_counter(name)}
  weight_files.check(path, f"the Inception network of the FID ({ADDRESS})", tensors, shapes())

  def read(name: str) -> np.ndarray:
    return np.asarray(tensors[name], np.float64)

  params = {"fc.kernel": read("fc.weight").T}
  for convolution in sorted({name.partition(".conv.")[0] for name in shapes() if ".conv." in name}):
    gamma, beta, mean, variance = (
      read(f"{convolution}.bn.{part}") for part in ("weight", "bias", "running_mean", "running_var")
    )
    if not (variance > -EPSILON).all():
      raise ValueError(f"{convolution}.bn.running_var in {path} is not positive: the file is damaged; get it again")
    scale = gamma / np.sqrt(variance + EPSILON)
    params[f"{convolution}.kernel"] = read(f"{convolution}.conv.weight").transpose(2, 3, 1, 0) * scale
    params[f"{convolution}.bias"] = beta - mean * scale
  for name, value in params.items():
    params[name] = value.astype(np.float32)
    if not np.isfinite(params[name]).all():
      raise ValueError(f"{name.rpartition('.')[0]} in {path} is not finite: the file is damaged; get it again")
  return flax.traverse_util.unflatten_dict(params, sep=".")


def _is_counter(name: str) -> bool:
  """Whether this is what newer versions of PyTorch save with a BatchNorm, and nothing depends on."""
  return name.endswith(".bn.num_batches_tracked")


def _cached(download: bool) -> Path:
  """Return the file in PyTorch's cache.

  Raises:
    FileNotFoundError: if it is not there, and ``download`` is false.
  """
  caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
  folder = Path(os.environ.get("TORCH_HOME") or Path(caches, "torch"), "hub", "checkpoints").expanduser()
  for name in NAMES:
    if (folder / name).is_file():
      return folder / name
  if not download:
    raise FileNotFoundError(
      f"there are no weights of the Inception network: neither {' nor '.join(NAMES)} is in {folder}, and nothing is "
      f"downloaded unless download is true. Get {ADDRESS} (91 MB) and put it there, or give its path as weights"
    )
  _download(folder / NAMES[0])
  return folder / NAMES[0]


def _download(path: Path) -> None:
  """Download the weights, and check that their SHA-256 begins with the digits at the end of the file's name.

  Raises:
    OSError: if the download fails, or the digits differ. Then no file is left.
  """
  files.check_writable(path)
  content = bytearray()
  try:
    with urllib.request.urlopen(ADDRESS, timeout=60) as source:
      total = int(source.headers.get("Content-Length") or 0)
      with progress_bar(total, title=path.name, unit="byte", show=True) as bar:
        while chunk := source.read(2**20):
          content += chunk
          bar.update(len(chunk))
  except (OSError, http.client.HTTPException) as error:
    raise OSError(f"{ADDRESS} could not be downloaded ({error}): get it by other means") from error
  digest = hashlib.sha256(content).hexdigest()
  if not digest.startswith(path.stem.rpartition("-")[2]):
    raise OSError(f"{ADDRESS} is damaged: its SHA-256 is {digest}; try again")
  files.write_atomically(path, bytes(content))
