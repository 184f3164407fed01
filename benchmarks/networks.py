"""The networks that are measured, at three sizes, with weights at random."""

import dataclasses
import os
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide.denoisers.linen import param_shapes
from jaxguide.evaluation import demo
from jaxguide.models.importers.openai import PRESETS
from jaxguide.models.initial import by_array
from jaxguide.models.model import init_params
from jaxguide.training import Model, ModelConfig
from jaxguide.training import operations as count

ON_CPU = jax.default_backend() == "cpu"
# A process that measures PyTorch on a GPU leaves JAX on the CPU.
DTYPE = os.environ.get("BENCHMARK_DTYPE") or ("float32" if ON_CPU else "bfloat16")

_PROCESS = {"num_classes": 10, "prediction": "eps", "schedule": "linear", "diffusion_steps": 1000}
_FIELDS = {
  "model_channels": 64,
  "channel_mult": (1, 2, 2),
  "num_res_blocks": 2,
  "attention_resolutions": (2, 4),
  "num_head_channels": 64,
}
SMALL = ModelConfig("unet", _FIELDS, (32, 32, 3), **_PROCESS)
SMALL_CLASSIFIER = ModelConfig("classifier", _FIELDS, (32, 32, 3), **_PROCESS)


class Size(NamedTuple):
  """Two networks, and how they are measured."""

  unet: ModelConfig
  classifier: ModelConfig
  batch: int
  rounds: int


SIZES = {
  "8x8": Size(demo.DIGITS.denoiser, demo.DIGITS.classifier, 64, 15),
  "32x32": Size(SMALL, SMALL_CLASSIFIER, 16, 7),
  "ADM-64": Size(PRESETS["64x64_diffusion"], PRESETS["64x64_classifier"], 4 if ON_CPU else 64, 3 if ON_CPU else 15),
}


def prepared(config: ModelConfig, dtype: str = DTYPE) -> ModelConfig:
  """Give a network as it is measured: without dropout, and in the type that the backend computes in."""
  wanted = {"dtype": dtype, "dropout": 0.0, "cudnn_attention": None}
  measured = {name: value for name, value in wanted.items() if hasattr(config.module, name)}
  return dataclasses.replace(config, fields={**config.fields, **measured})


def random_model(config: ModelConfig, dtype: str = DTYPE) -> Model:
  """Make a network with weights at random; they cost as much as others."""
  config = prepared(config, dtype)

  def draw(key):
    # The layers that start at zero would keep everything else from mattering.
    return jax.tree.map(lambda leaf: leaf + 0.01 * jax.random.normal(key, leaf.shape), init_params(config, key))

  return Model(config, by_array(draw, jax.random.key(0)))


def abstract_model(config: ModelConfig, dtype: str = DTYPE) -> Model:
  """Make a network whose weights are shapes only, to compile with; attention is cuDNN's if that is for a GPU."""
  config = prepared(config, dtype)
  if dtype != "float32" and hasattr(config.module, "cudnn_attention"):
    config = dataclasses.replace(config, fields={**config.fields, "cudnn_attention": True})
  return Model(config, param_shapes(config.module, *config.role.inputs(config)))


def inputs(config: ModelConfig, batch: int) -> tuple[Any, ...]:
  """Draw what a network is called on: images, times, and labels for a UNet that has classes."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((batch, *config.image_shape)).astype(np.float32)
  t = np.linspace(1, 999, batch).astype(np.float32)
  labels = np.arange(batch) % (config.num_classes or 1)
  with_labels = config.network == "unet" and config.num_classes is not None
  return tuple(map(jnp.asarray, (x, t, labels) if with_labels else (x, t)))


def operations(function: Any, *args: Any) -> float:
  """Count the floating-point operations of the products of a function: the same for every backend."""
  jax.clear_caches()  # Parts of them are traced once for a process.
  try:
    with mock.patch.object(jax, "default_backend", return_value="none"):
      return float(count.operations(function, *args))
  finally:
    jax.clear_caches()
