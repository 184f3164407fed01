"""A network with its parameters, in memory and on disk.

A model is a folder: ``config.json`` says what it is, ``params`` holds its parameters as an Orbax checkpoint. The first
is written last and removed first, so that where writing was cut short there is no model instead of half of one.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxguide.denoisers import ClassifierLogProb, NetworkDenoiser, check_params, param_shapes
from jaxguide.files import PathLike, check_writable, write_atomically
from jaxguide.training.config import ModelConfig
from jaxguide.typing import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network with its parameters and what there is to know about it."""

  config: ModelConfig
  params: PyTree

  @property
  def denoiser(self) -> NetworkDenoiser:
    """The network as a denoiser, if it is a UNet; one with a learned variance gives a `jaxguide.Prediction`."""
    self._expect("unet", "super_res_unet")
    learned = self.config.variance == "learned_range"
    return NetworkDenoiser(self.params, self.config.module.apply, self.config.scaling, learned_variance=learned)

  @property
  def log_prob(self) -> ClassifierLogProb:
    """The network as a log-probability of labels, if it is a classifier."""
    self._expect("classifier")
    return ClassifierLogProb(self.params, self.config.module.apply, self.config.scaling)

  @property
  def null_cond(self) -> int | None:
    """The label that stands for none; None where the network has no such label."""
    return self.config.null_cond

  def _expect(self, *networks: str) -> None:
    if self.config.network not in networks:
      raise ValueError(f"this needs a {networks[0]}, but the model is a {self.config.network}")


def init_params(config: ModelConfig, key: jax.Array) -> PyTree:
  """Draw parameters for a network."""
  return config.module.init(key, *least_inputs(config))


def least_inputs(config: ModelConfig) -> tuple[Any, ...]:
  """The least that the network can be called on."""
  x, t = jnp.zeros((1, *config.image_shape)), jnp.zeros(1)
  if config.network == "classifier":
    return x, t
  label = None if config.num_classes is None else jnp.zeros(1, int)
  if config.low_res_shape is not None:
    return x, t, {"label": label, "low_res": jnp.zeros((1, *config.low_res_shape))}
  return x, t, label


def save(folder: PathLike, model: Model) -> None:
  """Write a model, in place of one that was there.

  Raises:
    OSError: if the folder cannot be written.
    ValueError: if the parameters do not fit the network.
  """
  import orbax.checkpoint as ocp

  folder = Path(folder).absolute()
  check_params(model.config.module, model.params, *least_inputs(model.config))
  check_writable(folder / "config.json")
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").unlink(missing_ok=True)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder / "params", model.params, force=True)
  write_atomically(folder / "config.json", json.dumps(dataclasses.asdict(model.config), indent=2).encode())


def load(folder: PathLike) -> Model:
  """Read a model that `save` wrote.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is torn: a part is missing or does not fit the rest.

  A model can then be guided, in one's own ``jit`` or by `jaxguide.sample_batch`::

    model = load("runs/demo/denoiser")
    guided = jaxguide.classifier_free(model.null_cond, 2.0)(model.denoiser)
  """
  import orbax.checkpoint as ocp

  folder = Path(folder).absolute()
  try:
    config = ModelConfig(**json.loads((folder / "config.json").read_text()))
    expected = param_shapes(config.module, *least_inputs(config))
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no model in {folder}: train one, with `jaxguide demo` for example") from None
  except (NotADirectoryError, UnicodeDecodeError, TypeError, ValueError) as error:
    raise ValueError(f"{folder / 'config.json'} does not describe a model ({error}): train it again") from error
  # Orbax warns about placing arrays unless it is told where; the first device is where they are used from.
  where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), expected)
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      params = checkpointer.restore(folder / "params", template)
  except Exception as error:  # Orbax and its storage raise many kinds for a torn checkpoint.
    reason = str(error).strip().split("\n")[0]
    raise ValueError(f"the parameters in {folder / 'params'} are torn or not this model's ({reason})") from error
  check_params(config.module, params, *least_inputs(config))
  return Model(config, params)


def remove(folder: PathLike) -> None:
  """Remove a model and its training's checkpoints, and nothing else that may lie in the folder."""
  folder = Path(folder)
  for part in ("config.json", "training.json"):
    (folder / part).unlink(missing_ok=True)
  for part in ("params", "checkpoints"):
    shutil.rmtree(folder / part, ignore_errors=True)
