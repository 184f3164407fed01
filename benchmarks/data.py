"""Images a second from JPEG of 256x256 to 64x64, the memory that reading takes, and the wait for data in training.

jaxguide, plain Grain and PyTorch's DataLoader decode the same files with as many workers, and resize them by the same
functions of Pillow; their images are compared first. ``python -m benchmarks data speed`` runs a part, as do ``memory``
and ``wait``.
"""

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers, timing
from jaxguide import checks, data

SIZE, STORED, BATCH = 64, 256, 64
PICTURES = 2048
WORKERS = os.cpu_count() or 1
ROUNDS = 9
DRAINED, TIMED = 8, 20
"""Batches before a measurement, which empty the buffers that were filled during the turns of others; and in it."""


def write_pictures(folder: Path, number: int, size: int, files: int = 200) -> None:
  """Write JPEG files of smooth noise with sharp edges, of about 20 KB at 256x256, in four classes."""
  import io

  from PIL import Image

  rng = np.random.default_rng(0)
  contents = []
  for _ in range(min(files, number)):
    coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8))
    array = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    array[size // 4 : size // 2, size // 4 : size // 2] = rng.integers(0, 256, 3)
    array += rng.normal(0, 6, array.shape).astype(int)
    file = io.BytesIO()
    Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    contents.append(file.getvalue())
  for label in range(4):
    (folder / str(label)).mkdir(parents=True)
  for row in range(number):
    (folder / str(row % 4) / f"{row:06}.jpg").write_bytes(contents[row % len(contents)])


def center_crop(path: str) -> np.ndarray:
  """Decode, resize and crop a file as OpenAI's guided-diffusion does (image_datasets.py, center_crop_arr)."""
  from PIL import Image

  with Image.open(path) as picture:
    picture.load()
  picture = picture.convert("RGB")
  while min(*picture.size) >= 2 * SIZE:
    picture = picture.resize(tuple(extent // 2 for extent in picture.size), resample=Image.Resampling.BOX)
  scale = SIZE / min(*picture.size)
  picture = picture.resize(tuple(round(extent * scale) for extent in picture.size), resample=Image.Resampling.BICUBIC)
  array = np.array(picture)
  top, left = (array.shape[0] - SIZE) // 2, (array.shape[1] - SIZE) // 2
  return array[top : top + SIZE, left : left + SIZE]


class Files:
  """The files of a folder with their classes, as PyTorch's and Grain's tutorials have them."""

  def __init__(self, folder: Path):
    self.paths = sorted(map(str, folder.glob("*/*.jpg")))

  def __len__(self) -> int:
    return len(self.paths)

  def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
    path = self.paths[row]
    return center_crop(path), int(Path(path).parent.name)


def closing(iterator: Any) -> Iterator[Any]:
  """Yield from an iterator of Grain, and end its threads and processes when this generator is closed or collected."""
  try:
    yield from iterator
  finally:
    iterator.close()


def ours(folder: Path, workers: int, in_processes: bool = False) -> Iterator[np.ndarray]:
  """Yield batches by jaxguide's threads, or by its worker processes with one thread each."""
  dataset = data.open_data(data.DataConfig(folder, size=SIZE, check="none"), progress=False)
  options = {"workers": 1, "processes": workers} if in_processes else {"workers": workers}
  return (batch.examples for batch in closing(data.stream(dataset, BATCH, 0, **options)))


def grain_threads(folder: Path, workers: int) -> Iterator[np.ndarray]:
  """Yield batches by Grain's threads."""
  import grain

  rows = grain.MapDataset.source(Files(folder)).seed(0).shuffle().repeat()
  options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=max(workers, 2 * BATCH))
  return (images for images, _ in closing(iter(rows.to_iter_dataset(options).batch(BATCH))))


def grain_processes(folder: Path, workers: int) -> Iterator[np.ndarray]:
  """Yield batches by Grain's worker processes, each with one thread."""
  import grain

  rows = grain.MapDataset.source(Files(folder)).seed(0).shuffle().repeat().batch(BATCH)
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  processes = grain.MultiprocessingOptions(num_workers=workers)
  return (images for images, _ in closing(iter(rows.to_iter_dataset(options).mp_prefetch(processes))))


def torch_processes(folder: Path, workers: int) -> Iterator[np.ndarray]:
  """Yield batches by PyTorch's DataLoader without end."""
  torch = peers.find("torch")
  options = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": True}
  loader: Any = torch.utils.data.DataLoader(Files(folder), BATCH, **options)
  while True:
    for images, _ in loader:
      yield images.numpy()


def check(folder: Path) -> None:
  """Check that the peers' function and ours give the same images."""
  dataset = data.open_data(data.DataConfig(folder, size=SIZE, check="none"), progress=False)
  files = Files(folder)
  for row in range(0, len(files), 100):
    np.testing.assert_array_equal(dataset.example(row, np.random.default_rng(0))[0], files[row][0])


def speed(folder: Path) -> list[dict[str, Any]]:
  """Time batches of each loader, taking turns."""
  write_pictures(folder, PICTURES, STORED)
  check(folder)
  loaders: dict[str, Callable[[], Iterator[np.ndarray]]] = {
    "jaxguide, threads": lambda: ours(folder, WORKERS),
    "Grain, threads": lambda: grain_threads(folder, WORKERS),
    "jaxguide, processes": lambda: ours(folder, WORKERS, in_processes=True),
    "Grain, processes": lambda: grain_processes(folder, WORKERS),
  }
  if peers.find("torch") is not None:
    loaders["DataLoader, processes"] = lambda: torch_processes(folder, WORKERS)
  seconds: timing.Seconds = {name: [] for name in loaders}
  cpu: timing.Seconds = {name: [] for name in loaders}
  with contextlib.ExitStack() as stack:
    sources = {name: stack.enter_context(contextlib.closing(load())) for name, load in loaders.items()}  # type: ignore
    for _ in range(ROUNDS):
      for name, source in sources.items():
        for _ in range(DRAINED):
          next(source)
        began, used = time.perf_counter(), cpu_seconds()
        for _ in range(TIMED):
          assert next(source).shape == (BATCH, SIZE, SIZE, 3)
        seconds[name].append(time.perf_counter() - began)
        cpu[name].append(cpu_seconds() - used)
  rows = timing.summary(seconds, "jaxguide, threads", label="loader")
  others = timing.summary(seconds, "jaxguide, processes", label="loader")
  return [
    {
      "loader": row["loader"],
      "images/s": BATCH * TIMED / (row["ms"] / 1e3),
      "spread": row["spread"],
      "CPU, us an image": statistics.median(cpu[row["loader"]]) / (BATCH * TIMED) * 1e6,
      "/ our threads": row["/ jaxguide, threads"],
      "/ our processes": other["/ jaxguide, processes"],
    }
    for row, other in zip(rows, others, strict=True)
  ]


def cpu_seconds() -> float:
  """Return the processor's time that this process and its children have used."""
  import psutil

  own = psutil.Process()
  times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
  return sum(each.user + each.system for each in times)


def held() -> float:
  """Return the memory that this process holds, in MiB."""
  import psutil

  return psutil.Process().memory_info().rss / 2**20


def one_pass(folder: str, check: str, results: Any) -> None:
  """Read every file of a folder once, in a process of its own, and send what it holds before, at most, and how long."""
  before, began = held(), time.perf_counter()
  dataset = data.open_data(data.DataConfig(folder, size=16, check=check), progress=False)
  opened = held()
  source, most = data.stream(dataset, BATCH, 0), opened
  first = held()
  for number in range(-(-len(dataset) // BATCH)):
    next(source)
    if number == 10:
      first = held()
    if number % 100 == 0:
      most = max(most, held())
  results.put((before, opened, first, max(most, held()), time.perf_counter() - began))


def memory(folder: Path) -> list[dict[str, Any]]:
  """Measure what a process holds while it reads few and many files."""
  context = multiprocessing.get_context("spawn")
  rows = []
  for number in (1_000, 100_000):
    write_pictures(folder / str(number), number, 32)
    for check_files in ("none", "all"):
      results = context.Queue()
      os.environ["XDG_CACHE_HOME"] = str(folder / f"cache {number} {check_files}")
      process = context.Process(target=one_pass, args=(str(folder / str(number)), check_files, results))
      process.start()
      before, opened, first, most, seconds = results.get()
      process.join()
      row = {"files": number, "check": check_files, "before, MiB": before, "opened": opened, "after 10 batches": first}
      rows.append({**row, "most": most, "growth": most - before, "s": seconds})
  return rows


def wait(folder: Path) -> list[dict[str, Any]]:
  """Measure the share of training steps that is spent waiting for the next batch."""
  import jax

  from jaxguide.training import presets  # Not above, since worker processes import this module.
  from jaxguide.training.step import init_state, train_step

  on_cpu = jax.default_backend() == "cpu"
  write_pictures(folder, PICTURES, STORED)
  dataset = data.open_data(data.DataConfig(folder, size=SIZE, check="none"), progress=False)
  preset = presets.preset("unet", SIZE)
  fields = {"model_channels": 32, "num_head_channels": 32} if on_cpu else {"dtype": "bfloat16", "cudnn_attention": True}
  model = preset.model_config((SIZE, SIZE, 3), 4, fields=fields)
  batch_size = 8 if on_cpu else 64
  training = preset.training_config(model, batch_size=batch_size, steps=10_000)
  step: Any = train_step(model, training)
  state = init_state(model, training)
  rows = []
  for name, options in (("threads", {"workers": WORKERS}), ("processes", {"workers": 1, "processes": WORKERS})):
    with contextlib.closing(data.stream(dataset, batch_size, 0, **options)) as source:  # type: ignore[type-var, arg-type]
      waited: list[float] = []
      taken: list[float] = []
      previous = None
      for _ in range(12 if on_cpu else 60):
        began = time.perf_counter()
        batch = next(source)  # type: ignore[call-overload]
        waited.append(time.perf_counter() - began)
        state, metrics = step(state, batch.examples, batch.labels)
        # As `fit` does, which lets the device run one step behind the host.
        jax.block_until_ready(previous)
        previous = metrics["loss"]
        taken.append(time.perf_counter() - began)
    half = slice(len(taken) // 2, None)
    share = sum(waited[half]) / sum(taken[half])
    row = {"reading": name, "channels": model.fields["model_channels"], "batch": batch_size}
    rows.append({**row, "ms a step": 1e3 * float(np.mean(taken[half])), "waiting": f"{share:.2%}"})
  return rows


PARTS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {"speed": speed, "memory": memory, "wait": wait}


def main(*parts: str) -> None:
  """Measure; the arguments are the parts, of which the default is all."""
  from absl import flags

  flags.FLAGS.mark_as_parsed()  # Grain's processes read absl's flags.
  tables = {}
  for part in parts or PARTS:
    measure = checks.lookup("part", part, PARTS)
    with tempfile.TemporaryDirectory() as folder:
      tables[part] = measure(Path(folder) / "pictures")
  facts = [f"{WORKERS} workers; batches of {BATCH}; every loader has the same files, filter and crop"]
  timing.report("data", tables, facts)
