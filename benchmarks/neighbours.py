"""Precision and recall: our time and memory, and torch-fidelity's time on the same features.

``python -m benchmarks neighbours [N [WIDTH]]``: N real and N generated features (5,000) of WIDTH numbers (2,048).
``python -m benchmarks neighbours N WIDTH alone`` measures ours once, without the peer: for sizes that take minutes.
"""

import importlib
import resource
import time
from collections.abc import Callable

import numpy as np

from benchmarks import peers, timing
from jaxguide._core import checks
from jaxguide.evaluation import metrics

K = 3


def features(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  """Make features like Inception's: not negative, and of few directions; the generated ones differ a little."""
  rng = np.random.default_rng(0)
  mix = rng.standard_normal((64, width), np.float32) / 8
  sets = []
  for shift in (0.0, 0.3):
    found = rng.standard_normal((n, 64), np.float32) @ mix + np.float32(shift)
    found += rng.standard_normal((n, width), np.float32) / 4
    sets.append(np.maximum(found, 0, out=found))
  return sets[0], sets[1]


def peak() -> float:
  """The most memory that this process has held so far, in GiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fidelity() -> Callable[[np.ndarray, np.ndarray], tuple[float, float]] | None:
  """Give torch-fidelity's precision and recall; None where it is not installed."""
  torch = peers.find("torch")
  if torch is None:
    return None
  try:
    importlib.import_module("torchvision")
  except ImportError:
    pass
  except RuntimeError:
    return None  # It does not fit this PyTorch.
  if (theirs := peers.find("torch_fidelity.metric_prc")) is None:
    return None

  def run(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    options = {"prc_neighborhood": K, "prc_batch_size": 10_000, "save_cpu_ram": True, "verbose": False}
    value = theirs.prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), **options)
    return value["precision"], value["recall"]

  return run


def main(n: str = "5000", width: str = "2048", mode: str = "beside") -> None:
  """Measure."""
  checks.lookup("mode", mode, {"beside": 0, "alone": 1})
  size, columns = (checks.whole(name, int(text), 8, 10**6) for name, text in (("N", n), ("WIDTH", width)))
  real, generated = features(size, columns)
  metrics.precision_recall(real[:300], generated[:300], K)
  before, began, used = peak(), time.perf_counter(), time.process_time()
  ours = metrics.precision_recall(real, generated, K)
  row = {"run": "jaxguide", "s": time.perf_counter() - began, "CPU s": time.process_time() - used}
  tables = {f"{size:,} x {size:,} x {columns:,}, once": [{**row, "GiB beyond the features": peak() - before}]}
  facts = [f"precision {ours.precision:.4f}, recall {ours.recall:.4f}; float32 features, k = {K}"]
  if mode == "beside" and (theirs := fidelity()) is not None:
    found = theirs(real, generated)
    facts.append(f"torch-fidelity: precision {found[0]:.4f}, recall {found[1]:.4f}")
    runs = {"jaxguide": lambda: metrics.precision_recall(real, generated, K)[:2]}
    runs["torch-fidelity"] = lambda: theirs(real, generated)
    tables["beside torch-fidelity"] = timing.summary(timing.measure(runs, rounds=3), "jaxguide")
  timing.report("neighbours", tables, facts)
