"""Features of the FID by the Inception network, in images a second, against torch-fidelity's with the same weights.

Arguments: sides of the images; 32 and 256 if there are none. ``pip install torch-fidelity`` for the peer.
"""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import peers, timing
from jaxguide.evaluation.features import extraction, inception
from jaxguide.models.importers import state_dicts

BATCH, ROUNDS = 16, 7


def random_weights(seed: int = 0) -> dict[str, np.ndarray]:
  """Draw weights that keep activations near one: kernels by their fan-in, norms near one, biases near zero."""
  rng = np.random.default_rng(seed)

  def draw(name, shape):
    if name.endswith("running_var"):
      return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1:
      return np.full(shape, name.endswith("weight"), np.float32) + 0.1 * rng.standard_normal(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * np.sqrt(2 / np.prod(shape[1:])).astype(np.float32)

  return {name: draw(name, shape) for name, shape in inception.shapes().items()}


def their_network(weights: dict[str, np.ndarray], folder: str) -> Any:
  """Make torch-fidelity's network with these weights; None where it is not at hand."""
  torch, theirs = peers.find("torch"), peers.find("torch_fidelity.feature_extractor_inceptionv3")
  if torch is None or theirs is None:
    return None
  path = Path(folder, "weights.pt")
  torch.save({name: torch.from_numpy(array) for name, array in weights.items()}, path)
  network = theirs.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
  return network.to(peers.device())


def measure(features: Any, network: Any, side: int, facts: list[str]) -> list[dict[str, Any]]:
  """Measure both on the same images, which begin and end on the host."""
  images = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), dtype=np.uint8)
  runs: dict[str, Callable[[], Any]] = {
    "jaxguide": lambda: extraction.extract(features, images, batch_size=BATCH)["pool"]
  }
  if network is not None:
    torch = peers.find("torch")
    turned = np.ascontiguousarray(images.transpose(0, 3, 1, 2))

    def theirs():
      with torch.inference_mode():
        return network(torch.from_numpy(turned).to(peers.device()))[0].cpu().numpy()

    difference = peers.check("torch-fidelity", runs["jaxguide"](), theirs(), 1e-3)
    facts.append(f"{side}x{side}: torch-fidelity's features differ from ours by {difference:.1g} of the largest number")
    runs["torch-fidelity"] = theirs
  cpu: dict[str, list[float]] = {name: [] for name in runs}

  def timed(name):
    began = time.process_time()
    runs[name]()
    cpu[name].append(time.process_time() - began)

  rows = timing.summary(timing.measure({name: functools.partial(timed, name) for name in runs}, ROUNDS), "jaxguide")
  for row, seconds in zip(rows, cpu.values(), strict=True):
    row["images/s"] = BATCH / (row["ms"] / 1e3)
    row["CPU, ms an image"] = statistics.median(seconds) / BATCH * 1e3
  return rows


def main(*sides: str) -> None:
  """Measure images of some sides."""
  if not all(side.isdecimal() and int(side) for side in sides):
    raise ValueError(f"sides must be whole numbers of at least 1, got {' '.join(sides)}")
  tables: dict[str, Any] = {}
  facts = [f"float32, {jax.default_backend()}; PyTorch and XLA have one thread for each core"]
  weights = random_weights()
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "weights.safetensors")
    state_dicts.write(path, weights)
    features, network = inception.inception(path), their_network(weights, folder)
    for side in map(int, sides or ("32", "256")):
      tables[f"images of {side}x{side}, batches of {BATCH}"] = measure(features, network, side, facts)
      timing.report("features", tables, facts)
