"""What jaxguide is measured against, where it is installed: PyTorch networks, with our weights where they fit.

``pip install torch diffusers``; OpenAI's guided-diffusion is found where it can be imported. On a GPU they compute in
bfloat16 by autocast, as ours do.
"""

import contextlib
import functools
import importlib
import math
import os
import statistics
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks import timing
from benchmarks.networks import DTYPE
from jaxguide._core.typing import PyTree
from jaxguide.models.importers import openai
from jaxguide.training import Model, ModelConfig

TOLERANCE = 1e-3 if DTYPE == "float32" else 5e-2


@functools.cache
def find(name: str) -> ModuleType | None:
  """Import a peer, or say in one line that it is left out."""
  try:
    module = importlib.import_module(name)
  except ImportError as error:
    print(f"{name} is left out: {error}")
    return None
  if name == "torch":
    module.set_num_threads(len(os.sched_getaffinity(0)))  # XLA takes as many.
  return module


def device() -> str:
  """Where the peers run."""
  return "cuda" if find("torch").cuda.is_available() else "cpu"


def precision() -> Any:
  """The context in which the peers compute in the type that ours do."""
  torch = find("torch")
  return contextlib.nullcontext() if DTYPE == "float32" else torch.autocast(device(), getattr(torch, DTYPE))


def openai_network(model: Model) -> Any:
  """Make OpenAI's network with the same weights; None where PyTorch or guided-diffusion is not at hand.

  It is made faster in one respect: their attention is always rematerialised for the backward pass, here it is not.
  """
  torch, theirs = find("torch"), find("guided_diffusion.unet")
  if torch is None or theirs is None:
    return None
  theirs.checkpoint = lambda function, args, params, flag: function(*args)
  group_norm = find("guided_diffusion.nn").GroupNorm32
  # Their 32 groups do not part 16 channels; the export's notes say the same.
  with mock.patch.object(theirs, "normalization", lambda channels: group_norm(math.gcd(32, channels), channels)):
    network = eval(openai.constructor(model.config), dict(vars(theirs)))
  weights = openai.to_state_dict(model.params, model.config)
  network.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
  return network.to(device()).eval()


def diffusers_network(config: ModelConfig) -> Any:
  """Make diffusers' UNet2DModel with the same levels, widths and attention, its own weights; None if not installed."""
  if find("torch") is None or (diffusers := find("diffusers")) is None:
    return None
  module = config.module
  attends = [2**level in module.attention_resolutions for level in range(len(module.channel_mult))]
  network = diffusers.UNet2DModel(
    sample_size=config.image_shape[0],
    in_channels=config.image_shape[-1],
    out_channels=module.out_channels or config.image_shape[-1],
    block_out_channels=[module.channels(level) for level in range(len(attends))],
    layers_per_block=module.num_res_blocks,
    down_block_types=["AttnDownBlock2D" if attention else "DownBlock2D" for attention in attends],
    up_block_types=["AttnUpBlock2D" if attention else "UpBlock2D" for attention in attends[::-1]],
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    attention_head_dim=module.num_head_channels,
    norm_num_groups=math.gcd(32, module.model_channels),
    num_class_embeds=config.num_classes + module.null_class,
  )
  return network.to(device()).eval()


def predict(network: Any) -> Callable[..., Any]:
  """Give a network's prediction alone: diffusers' come inside an object."""
  return lambda *args: getattr(out := network(*args), "sample", out)


def tensors(tree: PyTree) -> Any:
  """Carry arrays over, images NCHW."""
  torch = find("torch")

  def carry(leaf):
    array = np.array(leaf)
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)) if array.ndim == 4 else array)

  return jax.tree.map(lambda leaf: carry(leaf).to(device()), tree)


def array(tensor: Any) -> np.ndarray:
  """Carry a tensor back, images NHWC."""
  values = tensor.detach().float().cpu().numpy()
  return values.transpose(0, 2, 3, 1) if values.ndim == 4 else values


def finished(run: Callable[..., Any]) -> Callable[..., Any]:
  """Make a run wait for the device."""

  def waiting(*args):
    out = run(*args)
    if device() == "cuda":
      find("torch").cuda.synchronize()
    return out

  return waiting


def check(name: str, ours: Any, theirs: Any, tolerance: float = TOLERANCE) -> float:
  """Give the largest difference over the largest number; raise AssertionError where it is above the tolerance."""
  ours, theirs = (np.asarray(value, np.float32) for value in (ours, theirs))
  difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
  assert difference <= tolerance, f"{name} differs from ours by {difference:.2g}"
  return difference


def measure(runs: Mapping[str, Callable[[], object]], rounds: int) -> tuple[timing.Seconds, float]:
  """Time runs in turns with one large matrix product in XLA and in PyTorch; give the better rate of it beside them.

  That is what the machine can do, in operations a second.
  """
  side = 2048 if DTYPE == "float32" else 8192
  a = jax.numpy.ones((side, side), DTYPE)
  product = jax.jit(lambda a: a @ a)
  products: dict[str, Callable[[], object]] = {"matrix product, XLA": lambda: product(a)}
  if (torch := find("torch")) is not None:
    b = torch.ones((side, side), dtype=getattr(torch, DTYPE), device=device())
    products["matrix product, PyTorch"] = finished(lambda: b @ b)
  seconds = timing.measure({**runs, **products}, rounds)
  return seconds, max(2.0 * side**3 / statistics.median(seconds.pop(name)) for name in products)


def rates(operations: float, seconds: float, best: float) -> dict[str, Any]:
  """Give the columns for so many operations in so many seconds, where the machine's rate is ``best``."""
  rate = operations / seconds
  return {"GFLOP/s": rate / 1e9, "of matrix rate": f"{rate / best:.0%}"}
