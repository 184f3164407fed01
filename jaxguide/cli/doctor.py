"""The command ``doctor``, which describes the installation and the machine, and says what is wrong with them."""

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from jaxguide.cli.help import Command

app = typer.Typer()

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

OPTIONAL = ("torch", *(f"jax-{kind}-{part}" for kind in ("cuda12", "cuda13") for part in ("plugin", "pjrt")), "libtpu")

VARIABLES = re.compile(
  r"(JAX_|XLA_|TF_CPP_|TF_GPU_|TF_FORCE_GPU|TF_XLA_|NCCL_|PJRT_).*|NPROC|GLIBC_TUNABLES|(CUDA|ROCR|HIP|TPU)_VISIBLE_(DEVICES|CHIPS)|LD_LIBRARY_PATH"
  r"|(OMP|MKL|OPENBLAS)_NUM_THREADS|XDG_CACHE_HOME|TFDS_DATA_DIR"
)
"""The environment variables that change what JAX and jaxguide do."""

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)

LITTLE = 2 * 2**30
"""Memory in bytes below which even small networks may fail."""

SIDE = 64


@app.command(cls=Command)
def doctor() -> None:
  """Describe the installation and the machine, and say what is wrong, as text to paste into a report.

  It prints versions, devices, memory, the cache folder and environment variables, and multiplies two small matrices on
  each device. The exit status is 0, or 1 where something is wrong.

  Example: jaxguide doctor
  """
  sections, problems = examine()
  for title, facts in sections.items():
    print(f"{title}:", *[f"  {name}: {value}" for name, value in facts.items()] or ["  none"], sep="\n")
  if not problems:
    print("Nothing is wrong.")
    return
  print("What is wrong:", *[f"  - {problem}" for problem in problems], sep="\n")
  raise typer.Exit(1)


def examine(environment: Mapping[str, str] = os.environ) -> tuple[dict[str, dict[str, str]], list[str]]:
  """Return what there is, by section and name, and what is wrong, a sentence each with what to do."""
  devices, failures = _devices()
  versions = _versions()
  memory, free = _memory()
  cores, usable = os.cpu_count() or 1, _usable_cores()
  cache, unwritable = _cache()
  quota = _quota()
  host = {
    "system": platform.platform(),
    "cores": f"{cores}, of which this process may use {usable}" + (f"; quota {quota:g}" if quota else ""),
    "memory": f"{_size(memory)}, free {_size(free)}",
  }
  pages = huge_pages(_text("/sys/kernel/mm/transparent_hugepage/enabled"), environment)
  host |= {"huge pages": pages} if pages else {}
  variables = {name: value for name, value in sorted(environment.items()) if VARIABLES.fullmatch(name)}
  sections = {
    "Versions": versions,
    "Devices": devices,
    "Host": host,
    "Cache": cache,
    "Environment": {name: "(hidden)" if SECRET.search(name) else value for name, value in variables.items()},
  }
  backend = devices.get("backend", "none")
  problems = [
    *failures,
    *mismatches(versions),
    *missing_plugin(backend, driver(), plugins(), environment),
    *unwritable,
    *limits(cores, min(usable, quota or usable), free, environment),
  ]
  return sections, problems


def mismatches(versions: Mapping[str, str]) -> Iterable[str]:
  """Name packages of JAX whose versions do not belong together.

  >>> next(iter(mismatches({"jax": "0.10.2", "jaxlib": "0.10.1"})))[:42]
  'jax is 0.10.2 and jaxlib is 0.10.1: instal'

  >>> list(mismatches({"jax": "0.10.2", "jaxlib": "0.10.2"}))
  []
  """
  wanted = versions.get("jax", "")
  for name, version in versions.items():
    if (name == "jaxlib" or name.startswith("jax-cuda")) and version.split(".")[:3] != wanted.split(".")[:3]:
      yield f"jax is {wanted} and {name} is {version}: install both in one version, pip install -U jax {name}"


def missing_plugin(
  backend: str, driver: str | None, found: Iterable[str], environment: Mapping[str, str]
) -> Iterable[str]:
  """Say why a GPU is not used although the driver of NVIDIA is there.

  >>> next(iter(missing_plugin("cpu", "580.1", [], {})))[:42]
  'there is a driver of NVIDIA (580.1), and J'
  """
  if driver is None or backend != "cpu":
    return
  asked = environment.get("JAX_PLATFORMS", "")
  if asked:
    yield f"there is a driver of NVIDIA ({driver}), but JAX_PLATFORMS={asked} keeps JAX from it: unset it"
  elif not any("cuda" in name for name in found):
    extra = "cuda13" if int(driver.split(".")[0]) >= 580 else "cuda12"
    yield (
      f"there is a driver of NVIDIA ({driver}), and JAX has no plugin for it and computes on the CPU: "
      f"pip install -U 'jax[{extra}]'"
    )
  else:
    yield (
      f"there are a driver of NVIDIA ({driver}) and {', '.join(found)}, but JAX finds no GPU: see that nvidia-smi "
      "lists one, that CUDA_VISIBLE_DEVICES does not hide it, and that LD_LIBRARY_PATH leads to no other CUDA"
    )


def limits(cores: int, usable: float | int, free: int | None, environment: Mapping[str, str]) -> Iterable[str]:
  """Name settings and limits that make computing slow or let it fail.

  >>> list(limits(8, 8, 2**34, {}))
  []
  """
  import jax

  if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    yield "64-bit types are enabled (JAX_ENABLE_X64): arrays may take twice the memory and the time; unset it"
  if free is not None and free < LITTLE:
    yield f"only {_size(free)} of memory are free on the host: end other programs, or give the container more"
  if usable <= 1 < cores:
    yield f"this process may use one of {cores} cores: give it more (taskset, SLURM's --cpus-per-task, the container)"
  if "xla_cpu_multi_thread_eigen=false" in environment.get("XLA_FLAGS", ""):
    yield "XLA_FLAGS has --xla_cpu_multi_thread_eigen=false, so that products use one core: remove it"
  for name in ("PJRT_NPROC", "NPROC"):
    text = environment.get(name, "")
    if text.isdecimal() and 0 < int(text) < usable:
      yield f"{name}={text} limits JAX to {text} of {usable:g} cores: unset it to use all"


def huge_pages(enabled: str | None, environment: Mapping[str, str]) -> str | None:
  """Say whether large arrays are in huge pages, from Linux's setting; None where there is none.

  Without them each call waits for thousands of small pages of fresh memory. `docs/choosing.md` has measurements.

  >>> huge_pages("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
  'yes'

  >>> huge_pages("always [madvise] never", {})
  'no; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 makes gradients on a CPU faster'
  """
  found = re.search(r"\[(\w+)\]", enabled or "")
  if found is None:
    return None
  asked = re.findall(r"glibc\.malloc\.hugetlb=(\d+)", environment.get("GLIBC_TUNABLES", ""))
  if found[1] == "always" or (found[1] == "madvise" and asked[-1:] == ["1"]):
    return "yes"
  advice = "; GLIBC_TUNABLES=glibc.malloc.hugetlb=1 makes gradients on a CPU faster" if found[1] == "madvise" else ""
  return f"no{advice}"


def arithmetic(capability: Any, precision: str | None) -> dict[str, str]:
  """Say how an NVIDIA GPU of some compute capability multiplies and attends; nothing for other devices.

  >>> arithmetic("9.0", None)["float32 products"]
  'in TF32, which keeps 3 digits; JAX_DEFAULT_MATMUL_PRECISION=highest for float32'

  >>> arithmetic("7.5", None)["attention"]
  "XLA's; cuDNN's needs compute capability 8.0"

  >>> arithmetic(None, None)
  {}
  """
  try:
    number = float(capability)
  except (TypeError, ValueError):
    return {}
  products = "in float32"
  if number >= 8 and precision is None:
    products = "in TF32, which keeps 3 digits; JAX_DEFAULT_MATMUL_PRECISION=highest for float32"
  elif precision is not None:
    products = f"as JAX_DEFAULT_MATMUL_PRECISION says: {precision}"
  attention = (
    "cuDNN's in bfloat16 and float16, XLA's in float32"
    if number >= 8
    else "XLA's; cuDNN's needs compute capability 8.0"
  )
  return {"float32 products": products, "attention": attention}


def driver() -> str | None:
  """Return the version of the NVIDIA driver of this machine, or None."""
  try:
    found = re.search(r"\b(\d{3}\.\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
  except OSError:
    return None
  return found[1] if found else "0"


def plugins() -> list[str]:
  """Return the names of the packages that bring further devices to JAX."""
  return [entry.dist.name for entry in importlib.metadata.entry_points(group="jax_plugins") if entry.dist is not None]


def _versions() -> dict[str, str]:
  import jaxguide

  found = {"jaxguide": jaxguide.__version__, "Python": f"{platform.python_version()} ({platform.machine()})"}
  for name in (*PACKAGES, *dict.fromkeys((*OPTIONAL, *plugins()))):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      if name in PACKAGES:
        found[name] = "not installed"
  cudnn = _cudnn()
  return found if cudnn is None else {**found, "cuDNN": cudnn}


def _cudnn() -> str | None:
  """Return the version of cuDNN that JAX has loaded, else that of the package; None where there is none."""
  try:
    from jax._src.lib import cuda_versions  # None without a plugin for CUDA. There is no public name.

    number = cuda_versions.cudnn_get_version()  # type: ignore[union-attr]
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
  except (ImportError, AttributeError, RuntimeError):
    pass
  for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
    try:
      return f"{importlib.metadata.version(name)} (package {name})"
    except importlib.metadata.PackageNotFoundError:
      continue
  return None


def _devices() -> tuple[dict[str, str], list[str]]:
  """Describe the devices, and say which of them do not compute."""
  import jax

  try:
    devices = jax.local_devices()
  except (RuntimeError, AssertionError) as error:
    reason = f" ({' '.join(str(error).split())[:300]})" if str(error) else ""
    return {}, [f"JAX finds no device{reason}: see that JAX_PLATFORMS names a kind that is there, or unset it"]
  facts, problems = {"backend": jax.default_backend()}, []
  for device in devices:
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # A cache that cannot be written is a problem of its own.
        seconds = _compute(device)
      works = f"computes ({seconds:.2f} s)"
    except (RuntimeError, ValueError) as error:
      reason = " ".join(str(error).split())[:300]
      works = "does not compute"
      problems.append(
        f"device {device.id} ({device.device_kind}) fails: {reason}. See that no other program holds its memory, and "
        "that its driver fits the version of JAX"
      )
    capability = getattr(device, "compute_capability", None)
    stats = (device.memory_stats() if device.platform != "cpu" else None) or {}
    limit = stats.get("bytes_limit")
    memory = "host memory" if limit is None else f"{_size(stats.get('bytes_in_use', 0))} of {_size(limit)} in use"
    capable = f", compute capability {capability}" if capability else ""
    facts[f"{device.platform} {device.id}"] = f"{device.device_kind}, {memory}{capable}, {works}"
  precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
  return {**facts, **arithmetic(getattr(devices[0], "compute_capability", None), precision)}, problems


def _compute(device: Any) -> float:
  """Multiply two small matrices on a device; return the seconds.

  Raises:
    ValueError: if the product is wrong.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  start = time.perf_counter()
  ones = jax.device_put(np.ones((SIDE, SIDE), np.float32), device)
  product = np.asarray(jnp.matmul(ones, ones))
  if not (product == SIDE).all():
    raise ValueError(f"a product of ones should be {SIDE}, and is {product.min()} to {product.max()}")
  return time.perf_counter() - start


def _cache() -> tuple[dict[str, str], list[str]]:
  """Describe the folder of compiled programs, and say if it cannot be written."""
  import jax

  folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  if not folder:
    return {"folder": "none"}, ["compiled programs are not kept: set JAX_COMPILATION_CACHE_DIR to a folder"]
  if "://" in folder:
    return {"folder": f"{folder} (not examined)"}, []
  path = Path(folder)
  number, size = _content(path)
  facts = {"folder": f"{folder}, {number} files, {_size(size)}"}
  try:
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    with tempfile.TemporaryFile(dir=nearest):
      pass
    room = shutil.disk_usage(nearest).free
  except OSError as error:
    facts["can be written"] = "no"
    return facts, [
      f"the cache folder {folder} cannot be written ({error.strerror}), so that each start compiles again: mend its "
      "rights, or set JAX_COMPILATION_CACHE_DIR to another folder"
    ]
  facts["can be written"] = f"yes, {_size(room)} free"
  return facts, []


def _content(folder: Path) -> tuple[int, int]:
  """Return the number and the bytes of the files in a folder; other processes may remove some meanwhile."""
  number = size = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      try:
        size += os.stat(os.path.join(parent, name)).st_size
        number += 1
      except OSError:
        continue
  return number, size


def _memory() -> tuple[int | None, int | None]:
  """Return the host's memory and the free part in bytes. In a container its limit counts."""
  from jaxguide._core import devices

  try:
    whole: int | None = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (AttributeError, ValueError, OSError):
    whole = None
  free = devices.free_host_bytes()
  limit, used = (_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
  if limit is not None and (whole is None or limit < whole):
    whole = limit
    if used is not None:
      free = min(limit - used, limit if free is None else free)
  return whole, free


def _number(path: str) -> int | None:
  try:
    return int(_text(path) or "")
  except ValueError:
    return None


def _text(path: str) -> str | None:
  try:
    return Path(path).read_text()
  except OSError:
    return None


def _quota() -> float | None:
  """Return the number of cores whose time a container may use; None without such a limit."""
  try:
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    return int(quota) / int(period)
  except (OSError, ValueError):
    return None


def _usable_cores() -> int:
  try:
    return len(os.sched_getaffinity(0))
  except AttributeError:
    return os.cpu_count() or 1


def _size(size: int | None) -> str:
  """Write a number of bytes.

  >>> _size(3 * 2**30), _size(5 * 2**20), _size(None)
  ('3.0 GiB', '5.0 MiB', 'unknown')
  """
  if size is None:
    return "unknown"
  return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
