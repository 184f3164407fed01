"""What a training takes, before it runs: parameters, memory, operations, and a picture of the first batch."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxguide._core import devices
from jaxguide._core.files import PathLike
from jaxguide._core.typing import PyTree
from jaxguide.distributed.placing import Placement, for_batches, split_axis
from jaxguide.models import arrays
from jaxguide.models.config import ModelConfig
from jaxguide.training import operations
from jaxguide.training.config import TrainingConfig
from jaxguide.training.objectives import Objective, objective
from jaxguide.training.step import TrainState, state_shapes, train_step

# XLA's work space beside what the forward pass keeps, in arrays of the size of the largest one. With it the estimate is
# 0.7 to 0.9 of XLA's own figure on a CPU, for the networks of the demo and for small ones of 32x32.
WORK_SPACE = 3

PICTURES = 64
"""The largest number of examples of a batch's picture."""


@dataclasses.dataclass(frozen=True)
class Description:
  """What a training takes.

  Args:
    network: the network in words.
    parameters: number of parameters of the network.
    bytes: the memory of each part of the training's state: ``parameters``, ``gradient``, ``optimiser``, ``means``.
    part: number of examples in each part of a batch, ``batch_size / accumulation``.
    activations: bytes that a part needs besides, mostly for the gradient.
    compiled: whether ``activations`` is XLA's figure for this device; otherwise it is an estimate from shapes.
    operations: floating-point operations of a step, in matrix products and convolutions.
    batch_size: examples of a step.
    steps: number of steps.
    examples: number of examples in the data, or None.
  """

  network: str
  parameters: int
  bytes: Mapping[str, int]
  part: int
  activations: int
  compiled: bool
  operations: int
  batch_size: int
  steps: int
  examples: int | None

  @property
  def memory(self) -> int:
    """The bytes of a step."""
    return sum(self.bytes.values()) + self.activations

  @property
  def epoch(self) -> float | None:
    """Number of steps in which each example is used once."""
    return None if self.examples is None else self.examples / self.batch_size

  def __str__(self) -> str:
    state = ", ".join(f"{name} {in_bytes(number)}" for name, number in self.bytes.items())
    how = "by XLA for this device" if self.compiled else "estimated from shapes"
    example = self.activations / self.part
    lines = [
      f"network     {self.network}",
      f"parameters  {self.parameters:,}",
      f"memory      {in_bytes(self.memory)} a step ({how}): {state}, and {in_bytes(self.activations)} for {self.part} "
      f"{'example' if self.part == 1 else 'examples'} at once",
      f"            An example of a part takes about {in_bytes(example)}. A higher accumulation divides the batch into "
      'smaller parts; on a GPU or TPU, remat = "blocks" stores less of each',
      f"operations  {self.operations:.3g} a step, {self.operations / self.batch_size:.3g} an example "
      "(matrix products and convolutions, forward and backward)",
    ]
    if self.examples is not None and self.epoch is not None:
      lines.append(
        f"data        {self.examples:,} examples an epoch, which is {self.epoch:,.1f} steps of {self.batch_size}; "
        f"{self.steps:,} steps are {self.steps / self.epoch:,.1f} epochs"
      )
    return "\n".join(lines)


def describe(
  model: ModelConfig, training: TrainingConfig, examples: int | None = None, *, compile: bool = False
) -> Description:
  """Describe what a training takes. It takes seconds, since only shapes are computed.

  Args:
    model: the configuration of the network.
    training: the configuration of the training.
    examples: number of examples in the data, or None.
    compile: whether to compile the step for this device, which can take minutes, for XLA's own figure of its memory.
      The default is an estimate.

  Raises:
    ValueError: if the configurations do not fit each other.

  >>> fields = {"model_channels": 16, "num_res_blocks": 1, "num_head_channels": 16}
  >>> model = ModelConfig("unet", fields, (8, 8, 1), 10)
  >>> description = describe(model, TrainingConfig(steps=100, batch_size=64), examples=640)
  >>> description.parameters, description.epoch
  (209073, 10.0)
  """
  state, batch = state_shapes(model, training), _batch(model, training.batch_size)
  # Attention by cuDNN is an operation whose inside is not seen; what it computes is the same.
  hides = hasattr(model.module, "cudnn_attention")
  visible = dataclasses.replace(model, fields={**model.fields, "cudnn_attention": False}) if hides else model
  count = operations.operations(train_step(visible, training), state, *batch)
  part = training.batch_size // training.accumulation
  activations = _compiled(model, training, state, batch) if compile else _estimate(model, training, state.params, part)
  parameters = operations.size(state.params)
  return Description(
    network=_in_words(model),
    parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params["params"])),
    bytes={
      "parameters": parameters,
      "gradient": parameters,
      "optimiser": operations.size(state.opt_state),
      "means": operations.size(state.means),
    },
    part=part,
    activations=activations,
    compiled=compile,
    operations=count,
    batch_size=training.batch_size,
    steps=training.steps,
    examples=examples,
  )


class Leaf(NamedTuple):
  """An array of a training's state on a mesh.

  Args:
    name: its path in the state.
    shape: its shape.
    axis: the axis along which it is split; None if each device has all of it.
    bytes: its bytes.
    own_bytes: the bytes that each device has.
  """

  name: str
  shape: tuple[int, ...]
  axis: int | None
  bytes: int
  own_bytes: int


def leaves(state: TrainState, place: Placement) -> list[Leaf]:
  """Return how each array of a training's state lies on a mesh.

  >>> from jaxguide.distributed import placement
  >>> model = ModelConfig("unet", {"model_channels": 32}, (8, 8, 1), 10)
  >>> rows = leaves(state_shapes(model, TrainingConfig(steps=1)), placement("fsdp=-1"))
  >>> widest = max(rows, key=lambda row: row.bytes)
  >>> widest.shape, widest.axis, widest.bytes // widest.own_bytes == len(jax.devices())
  ((3, 3, 128, 64), 2, True)
  """
  rows = []
  for name, leaf in arrays.leaves(state).items():
    axis = split_axis(leaf.shape, place.fsdp)
    size = leaf.size * leaf.dtype.itemsize
    rows.append(Leaf(name, leaf.shape, axis, size, size if axis is None else size // place.fsdp))
  return rows


def on_mesh(model: ModelConfig, training: TrainingConfig, place: Placement) -> str:
  """Describe how the state of a training lies on a mesh, array by array, with the bytes for a device."""
  rows = leaves(state_shapes(model, training), place)
  own, whole = sum(row.own_bytes for row in rows), sum(row.bytes for row in rows)
  axes = ", ".join(f"{name}={size}" for name, size in place.mesh.shape.items())
  head = f"mesh        {axes}: each device has {in_bytes(own)} of the state's {in_bytes(whole)}"
  if place.fsdp == 1:
    return f"{head}; every array is whole on every device"
  lines = [
    f"  {row.name}  {'x'.join(map(str, row.shape)) or 'number'}  "
    f"{'whole' if row.axis is None else f'axis {row.axis} in {place.fsdp} parts'}  {in_bytes(row.own_bytes)}"
    for row in rows
    if row.name.startswith("params/")
  ]
  title = "Each of the parameters, with its bytes on a device; the optimiser's state and running means are split alike:"
  return "\n".join([head, title, *lines])


def shortage(model: ModelConfig, training: TrainingConfig, mesh: str | None = None) -> str | None:
  """Return a warning if a step is estimated to need more memory than there is; None if it fits."""
  free = devices.free_bytes()
  state = state_shapes(model, training)
  part = training.batch_size // training.accumulation
  activations = _estimate(model, training, state.params, part)
  place = for_batches(training.batch_size, mesh)
  own = 1.0
  if jax.default_backend() != "cpu":  # The memory of each device, which has its share of the batch and of the state.
    activations //= place.parts
    own = sum(row.own_bytes for row in leaves(state, place)) / operations.size(state)
  needed = int(own * (operations.size(state) + operations.size(state.params))) + activations
  if free is None or needed <= free:
    return None
  return (
    f"a step needs about {in_bytes(needed)}, and {in_bytes(free)} of memory are free: give a smaller network or "
    f"batch_size, or a higher accumulation; now {part} examples are computed at once"
  )


def _batch(model: ModelConfig, number: int) -> tuple[Any, Any]:
  """Return the shapes of a batch's examples and labels."""
  pixels = model.encoder == "pixels"
  examples = jax.ShapeDtypeStruct((number, *model.image_shape), jnp.uint8 if pixels else jnp.float32)
  label_size = getattr(model, "label_size", None)
  if label_size is not None:
    return examples, jax.ShapeDtypeStruct((number, label_size), jnp.float32)
  return examples, None if model.num_classes is None else jax.ShapeDtypeStruct((number,), jnp.int32)


def _estimate(model: ModelConfig, training: TrainingConfig, params: PyTree, part: int) -> int:
  """Estimate the memory that a part of a batch needs: what the forward pass keeps, and XLA's work space."""
  if training.remat == "all" or jax.default_backend() == "cpu":
    # When the whole network is computed again for the gradient, it keeps as much as without. XLA's CPU backend drops
    # what keeps it from merging the two computations, so there it is as without as well.
    training = dataclasses.replace(training, remat="none")
  goal: Objective = objective(model, training)

  def loss(params, examples, labels):
    key = jax.random.key(0)
    batch = goal.draw(key, model.data.encode(examples), labels)
    return goal.errors(params, batch, key)[0].mean()

  batch = _batch(model, part)
  return operations.kept(loss, params, *batch) + WORK_SPACE * operations.largest(loss, params, *batch)


def _compiled(model: ModelConfig, training: TrainingConfig, state: TrainState, batch: tuple[Any, Any]) -> int:
  """Compile the step, and return XLA's figure of its memory without the state and the gradient."""
  step: Any = train_step(model, training)
  analysis = step.lower(state, *batch).compile().memory_analysis()
  total = (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )
  return max(0, total - operations.size(state) - operations.size(state.params))


def _in_words(model: ModelConfig) -> str:
  height, width, channels = model.image_shape
  labels = "unconditional" if model.num_classes is None else f"{model.num_classes} classes"
  if getattr(model, "label_size", None) is not None:
    labels = f"labels of {model.label_size} numbers"
  images = f"{height}x{width} images of {channels} {'channel' if channels == 1 else 'channels'}"
  return f"{model.network} for {images}, {labels}, {model.prediction}-prediction, {model.process}"


def in_bytes(number: float | int) -> str:
  """Format a number of bytes with a unit.

  >>> in_bytes(3 * 2**30), in_bytes(1536)
  ('3 GiB', '1.5 KiB')
  """
  for unit in ("bytes", "KiB", "MiB", "GiB"):
    if number < 1024 or unit == "GiB":
      break
    number /= 1024
  return f"{number:.3g} {unit}" if number < 1000 else f"{number:,.0f} {unit}"


def save_first_batch(path: PathLike, dataset: Any, model: ModelConfig, training: TrainingConfig) -> None:
  """Write a picture of the first batch that a training takes, as a PNG file.

  Classes stand beside their rows. A picture shows at most `PICTURES` examples.

  Args:
    path: the file.
    dataset: the data.
    model: the configuration of the network, whose class names are the captions.
    training: the configuration of the training, whose seed and batch size give the batch.

  Raises:
    OSError: if the file cannot be written.
  """
  from jaxguide import data

  examples, labels = next(iter(itertools.islice(data.batches(dataset, training.batch_size, training.seed), 1)))
  examples = _visible(np.asarray(examples)[:PICTURES])
  classes = None if labels is None else np.asarray(labels)[:PICTURES]
  if classes is not None and (classes.ndim != 1 or classes.dtype.kind not in "iu"):
    classes = None
  names = model.class_names or getattr(dataset, "class_names", None)
  number = min(training.batch_size, getattr(dataset, "__len__", lambda: training.batch_size)())
  title = f"The first batch, {len(examples)} of {number} examples" if len(examples) < number else "The first batch"
  named = names if classes is not None and names is not None and classes.max() < len(names) else None
  data.save_png(path, examples, classes, columns=8, title=title, names=named)


def _visible(examples: np.ndarray) -> np.ndarray:
  """Return examples (n, h, w, c) as uint8 pixels of 1 or 3 channels; floats are scaled to their own range."""
  if examples.dtype != np.uint8:
    low, high = examples.min(), examples.max()
    examples = np.round((examples - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
  return examples[..., : 3 if examples.shape[-1] >= 3 else 1]
